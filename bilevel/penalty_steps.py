"""Parts of the penalty methods: schedules, gradient steps that watch the curvature, and what is measured after them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .lipschitz import largest_curvature
from .oracle import Oracle, Slopes

__all__ = [
    "Curvatures",
    "Growth",
    "Schedule",
    "TwoPoints",
    "descend",
    "raised",
    "ramp",
    "refuse_long_step",
    "rounded_up",
    "schedule_value",
    "secant",
]

_SAFETY = 1.2  # on estimates of Lipschitz constants, which are lower bounds
_OFF_GRID = 0.318  # a curvature of exactly 1 or 3/2 must not lie on either side of a boundary by rounding


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
        A 0-d tensor; inf where the schedule overflows, which ends the run at that step as NON_FINITE.

    Raises:
        ValueError: for a schedule that returns no positive number.
    """
    if given is None:
        return unit * default(k)
    try:
        value = float(given(k)) if callable(given) else float(given)
    except OverflowError:  # Python's own powers raise where tensors give inf
        value = math.inf
    if not value > 0:
        raise ValueError(f"penalty: the schedule must return positive numbers, but at step {k} it returned {value}.")
    return torch.full_like(unit, value if value <= torch.finfo(unit.dtype).max else math.inf)


def refuse_long_step(method: Any, name: str, oracle: Oracle, slope: Callable[[Tensor], Tensor], at: Tensor) -> None:
    """Refuse a given step size beyond 2 / L, with which gradient steps run away wherever they start.

    With data nothing is refused, for one batch's curvature is not that of the mean.

    Args:
        method: whose field it is.
        name: of the field; None passes.
        oracle: of the step.
        slope: the gradient that is followed.
        at: raveled point.

    Raises:
        ValueError: naming the field and the bound.
    """
    size = getattr(method, name)
    if size is None or oracle.data is not None:
        return
    seen = float(largest_curvature(slope, at, norm=oracle.norm)[0])  # a lower bound of L
    if size * seen >= 2:
        raise ValueError(
            f"{type(method).__name__}: {name} must be below 2 / L = {2 / seen:.2e}, L the curvature at the start, "
            f"beyond which gradient steps run away, but got {size}; lower it, or pass None, which chooses it."
        )


def ramp(steps: int) -> Schedule:
    """From 1 to 100 in so many steps, and 100 from there on."""
    return lambda k: 1.0 + 99.0 * min(k / steps, 1.0)


def rounded_up(value: Tensor) -> Tensor:
    """The value rounded up, by at most a sixth, to a grid on which no simple fraction lies.

    Differences of gradients magnify the rounding of sums a million-fold. Step sizes that are made from rounded ones are
    the same however the sums were formed: in one process, or in two that have half of the samples each.

    Args:
        value: positive; NaN and inf give NaN.

    Returns:
        A tensor of its shape.
    """
    unit = (value.log2() + _OFF_GRID).floor().exp2() / 8
    return ((value / unit - _OFF_GRID).ceil() + _OFF_GRID) * unit


def secant(oracle: Oracle, change: Tensor, moved: Tensor, at: Tensor) -> Tensor:
    """The curvature |change of a gradient| / |moved|; NaN where the step is so short that it would be rounding.

    Args:
        oracle: for norms.
        change: of the gradient.
        moved: the step.
        at: where to.

    Returns:
        A 0-d tensor.
    """
    length = oracle.norm(moved)
    long = length > torch.finfo(at.dtype).eps ** 0.5 * oracle.norm(at)
    return torch.where(long, oracle.norm(change) / length, torch.nan)


def raised(curvature: Tensor, seen: Tensor) -> Tensor:
    """The larger of a curvature as known so far and what was seen, rounded up; the first where that is not finite."""
    seen = rounded_up(seen)
    return torch.where(torch.isfinite(seen), torch.maximum(curvature, seen), curvature)


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
        return cls(rounded_up(_SAFETY * F), rounded_up(_SAFETY * f))

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
            curvature = raised(curvature, secant(oracle, g - before[1], y - before[0], y))
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
