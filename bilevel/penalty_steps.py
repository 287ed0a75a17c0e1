"""Parts of the penalty methods: schedules, gradient steps that watch the curvature, and a step size that watches F."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .lipschitz import largest_curvature
from .oracle import Oracle, Slopes

__all__ = ["Curvatures", "Growth", "Schedule", "TwoPoints", "Watch", "descend", "schedule_value"]

_LAG = 0.3  # how large the residuals in y and z may be, in slopes of x, when x moves
_SAFETY = 1.2  # on estimates of Lipschitz constants, which are lower bounds


@dataclass(frozen=True)
class Growth:
    """A penalty that grows with the step: value(k) = first * (k + 1)^power, or first + slope * k where slope is given.

    Any function k -> number does as well.

    Args:
        first: value(0), positive.
        power: of the growth; MEHA's theory asks for power < 1/2.
        slope: of linear growth, in place of a power.

    Raises:
        ValueError: if first is not positive, or the penalty would fall.

    Example:
        >>> Growth(2.0, power=0.5)(3), Growth(1.0, slope=0.1)(10)
        (4.0, 2.0)
    """

    first: float = 1.0
    power: float = 0.0
    slope: float | None = None

    def __post_init__(self) -> None:
        if not (self.first > 0 and self.power >= 0 and (self.slope is None or self.slope >= 0)):
            raise ValueError(f"Growth: first > 0, power >= 0 and slope >= 0 are needed, but got {self}.")

    def __call__(self, k: int) -> float:
        """The penalty of step k."""
        return self.first * (k + 1) ** self.power if self.slope is None else self.first + self.slope * k


Schedule = Callable[[int], float]


def schedule_value(given: float | Schedule | None, unit: Tensor, default: Schedule, k: int) -> Tensor:
    """The penalty of step k.

    Args:
        given: a number, a schedule, or None for the default in units of the problem.
        unit: curvature of F over that of f.
        default: in this unit.
        k: step.

    Returns:
        A 0-d tensor.
    """
    if given is None:
        return unit * default(k)
    return torch.full_like(unit, given(k) if callable(given) else float(given))


class Curvatures(NamedTuple):
    """Lipschitz constants of F_y and f_y, estimated at the start and raised by what the steps see.

    Attributes:
        upper: of F_y.
        lower: of f_y.
    """

    upper: Tensor
    lower: Tensor

    @classmethod
    def at(cls, oracle: Oracle, x: Tensor, y: Tensor, upper_y: Tensor) -> Curvatures:
        """Estimated by power steps on gradient differences around (x, y); F_y there is known."""
        lower_y = oracle.lower_y(x, y)[1]
        f, _ = largest_curvature(lambda v: oracle.lower_y(x, v)[1], y, slope=lower_y, norm=oracle.norm)
        F, _ = largest_curvature(lambda v: oracle.upper(x, v).y, y, slope=upper_y, norm=oracle.norm)
        size = oracle.norm(y).clamp_min(1.0)
        # where there is no curvature, the slopes have to do for a scale
        tiny = torch.finfo(y.dtype).tiny ** 0.5
        f = torch.where(f > 0, f, oracle.norm(lower_y) / size).clamp_min(tiny)
        F = torch.where(F > 0, F, oracle.norm(upper_y) / size).clamp_min(tiny)
        return cls(_SAFETY * F, _SAFETY * f)

    @property
    def unit(self) -> Tensor:
        """The natural unit of a penalty that multiplies f."""
        return self.upper / self.lower


def descend(
    oracle: Oracle,
    slope: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    steps: int,
    curvature: Tensor,
    size: float | Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Proximal gradient steps y <- prox(y - size * slope(y), size).

    Args:
        oracle: for norms and the prox.
        slope: y -> gradient.
        x: raveled upper variable.
        y: raveled start.
        steps: how many.
        curvature: Lipschitz constant of the slope as known so far.
        size: None for 1 / curvature, raised whenever two gradients show more.

    Returns:
        The last point and the curvature.
    """
    before: tuple[Tensor, Tensor] | None = None
    for _ in range(steps):
        g = slope(y)
        if size is None and before is not None:
            step = oracle.norm(y - before[0])
            seen = oracle.norm(g - before[1]) / step
            curvature = torch.where(torch.isfinite(seen), torch.maximum(curvature, seen), curvature)
        before = (y, g)
        length = 1 / curvature if size is None else size if isinstance(size, Tensor) else curvature.new_tensor(size)
        y = oracle.prox(y - length * g, length, x)
    return y, curvature


class TwoPoints(NamedTuple):
    """F and f at (x, y) and f at (x, z): what a penalty on f(x, y) - f(x, z) is made of.

    Attributes:
        upper: F at (x, y).
        lower: f at (x, y).
        auxiliary: f at (x, z).
        term: h_x(x, y) - h_x(x, z).
        gap: f + h at (x, y) less that at (x, z).
    """

    upper: Slopes
    lower: Slopes
    auxiliary: Slopes
    term: Tensor
    gap: Tensor

    @classmethod
    def at(cls, oracle: Oracle, x: Tensor, y: Tensor, z: Tensor) -> TwoPoints:
        """Evaluated: one gradient of F and two of f."""
        upper, lower, auxiliary = oracle.upper(x, y), oracle.lower(x, y), oracle.lower(x, z)
        gap = lower.value + oracle.term(x, y) - auxiliary.value - oracle.term(x, z)
        return cls(upper, lower, auxiliary, oracle.term_x(x, y) - oracle.term_x(x, z), gap)

    @property
    def gap_x(self) -> Tensor:
        """The gap's derivative in x with y and z held, which is exact where z is a minimiser."""
        return self.lower.x - self.auxiliary.x + self.term

    def residuals(
        self, oracle: Oracle, x: Tensor, y: Tensor, z: Tensor, slope: Tensor, penalty: Tensor
    ) -> dict[str, Tensor]:
        """Named parts of the error, all but the first in units of F: what y and z leave counts penalty-fold in x.

        Args:
            oracle: for norms, sets and the prox.
            x: raveled upper variable.
            y: raveled lower variable.
            z: raveled minimiser of f.
            slope: of the penalised objective in x.
            penalty: c.

        Returns:
            The parts: lower |f_y| at y (which carries the bias), auxiliary c |f_y| at z, blend |F_y + c f_y|, upper
            |P_X(x - slope) - x|.
        """
        return {
            "lower": oracle.lower_residual(x, y, self.lower.y),
            "auxiliary": penalty * oracle.lower_residual(x, z, self.auxiliary.y),
            "blend": penalty * oracle.lower_residual(x, y, self.upper.y / penalty + self.lower.y),
            "upper": oracle.norm(oracle.project(x - slope) - x),
        }


@dataclass(frozen=True)
class Watch:
    """The step size in x, and the last point where x moved, with which the next one is compared.

    Where the residuals in y and z (the lag) are within 0.3 of the slope in x, x moves: the size is halved if the
    potential F + penalty * gap has risen since the last move, else doubled, and kept below |dx| / |change of slope|;
    no step is longer than 0.1 max(1, |x|). Elsewhere x waits, for the lag counts penalty-fold in its slope.

    Attributes:
        size: step size.
        x: where x moved last.
        slope: there.
        value: F there.
        gap: there.
    """

    size: Tensor
    x: Tensor
    slope: Tensor
    value: Tensor
    gap: Tensor

    @classmethod
    def start(cls, oracle: Oracle, x: Tensor, y: Tensor, upper: Slopes, given: float | None = None) -> Watch:
        """With the given size, or one for a step of 0.1 max(1, |x|)."""
        steepness = torch.maximum(oracle.norm(upper.x), 0.1 * oracle.norm(upper.y))
        size = 0.1 * oracle.norm(x).clamp_min(1.0) / steepness.clamp_min(torch.finfo(x.dtype).tiny ** 0.5)
        size = size if given is None else torch.full_like(size, given)
        return cls(size, x, upper.x, upper.value, torch.zeros_like(upper.value))

    def fixed(self, given: float) -> tuple[Tensor, Watch]:
        """A size that the user chose."""
        return torch.full_like(self.size, given), self

    def move(
        self, oracle: Oracle, x: Tensor, slope: Tensor, value: Tensor, gap: Tensor, penalty: Tensor, lag: Tensor
    ) -> tuple[Tensor, Watch]:
        """The size of the step from x, zero where x waits, and what is remembered.

        Args:
            oracle: for norms.
            x: raveled upper variable.
            slope: of the potential in x.
            value: F.
            gap: what the penalty multiplies.
            penalty: its weight.
            lag: residuals in y and z in units of F.

        Returns:
            The size and the next Watch.
        """
        steepness = oracle.norm(slope)
        if bool(lag > _LAG * steepness):
            return torch.zeros_like(self.size), self
        size, step = self.size, oracle.norm(x - self.x)
        if bool(step > 0):
            before, after = self.value + penalty * self.gap, value + penalty * gap
            noise = 100 * torch.finfo(size.dtype).eps * before.abs()
            bound = step / oracle.norm(slope - self.slope)
            size = size * torch.where(after <= before + noise, 2.0, 0.5)
            size = torch.where(torch.isfinite(bound) & (bound > 0), torch.minimum(size, bound), size)
        longest = 0.1 * oracle.norm(x).clamp_min(1.0) / steepness
        return torch.where(longest < size, longest, size), Watch(size, x, slope, value, gap)
