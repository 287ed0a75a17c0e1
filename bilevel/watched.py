"""What the penalty methods without a line search share: a step size in x that watches, curvatures, the first state."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .counts import Counts
from .oracle import Oracle, Slopes
from .penalty import PenaltyMethod, PenaltyState
from .penalty_steps import Curvatures, rounded_up

__all__ = ["Watch", "WatchedMethod", "WatchedState", "shrunk"]

_LAG = 0.3  # how large the residuals in y and z may be, in slopes of x, when x moves


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
    def start(cls, oracle: Oracle, x: Tensor, upper: Slopes) -> Watch:
        """With a size for a step of 0.1 max(1, |x|)."""
        steepness = torch.maximum(oracle.norm(upper.x), 0.1 * oracle.norm(upper.y))
        size = 0.1 * oracle.norm(x).clamp_min(1.0) / steepness.clamp_min(torch.finfo(x.dtype).tiny ** 0.5)
        return cls(size, x, upper.x, upper.value, torch.zeros_like(upper.value))

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
            bound = 1 / rounded_up(oracle.norm(slope - self.slope) / step)
            size = size * torch.where(after <= before + noise, 2.0, 0.5)
            size = torch.where(torch.isfinite(bound) & (bound > 0), torch.minimum(size, bound), size)
        longest = 0.1 * oracle.norm(x).clamp_min(1.0) / steepness
        return torch.where(longest < size, longest, size), Watch(size, x, slope, value, gap)


@dataclass(frozen=True, kw_only=True)
class WatchedState(PenaltyState):
    """Where a penalty method stands whose steps in x are watched.

    Attributes:
        gap: what the penalty multiplies: how far y is from a lower solution.
        watch: the step size in x.
        upper_curvature: of F in y.
        lower_curvature: of f in y.
    """

    gap: Tensor
    watch: Watch
    upper_curvature: Tensor
    lower_curvature: Tensor

    @property
    def curvatures(self) -> Curvatures:
        """Of F and f in y."""
        return Curvatures(self.upper_curvature, self.lower_curvature)


class WatchedMethod(PenaltyMethod):
    """A penalty method of gradient steps in x and y. A subclass writes `_first` and `_advance`."""

    parts: ClassVar[dict[str, type]] = {"counts": Counts, "watch": Watch}

    @abstractmethod
    def _first(self, oracle: Oracle, upper: Slopes, shared: dict[str, Any]) -> Any:
        """The evaluated state at the start.

        Args:
            oracle: of the step.
            upper: F with its gradients at the start.
            shared: the fields of a WatchedState.
        """

    def _begin(self, oracle: Oracle, x: Tensor, y: Tensor) -> Any:
        upper = oracle.upper(x, y)
        seen = Curvatures.at(oracle, x, y, upper.y)
        zero = torch.zeros_like(upper.value)
        shared = self._fields(oracle, x, y, upper) | {
            "error": zero, "gap": zero, "watch": Watch.start(oracle, x, upper), "upper_curvature": seen.upper,
            "lower_curvature": seen.lower,
        }  # fmt: skip
        return self._first(oracle, upper, shared)

    def _size_in_x(
        self, oracle: Oracle, s: Any, slope: Tensor, penalty: Tensor, given: float | None
    ) -> tuple[Tensor, Watch]:
        """The size of the step in x, and what the next one is compared with.

        Args:
            oracle: of the step.
            s: the state.
            slope: in x.
            penalty: of the gap.
            given: the user's size, None for none.

        Returns:
            The size and the Watch.
        """
        if given is not None:
            return torch.full_like(s.watch.size, given), s.watch
        if oracle.data is not None and self.assumptions.stochastic:  # two steps' values cannot be compared
            return shrunk(oracle, s) * s.watch.size, s.watch
        lag = sum(value for name, value in s.residuals.items() if name in ("auxiliary", "blend"))
        moved: tuple[Tensor, Watch] = s.watch.move(oracle, s.x_vector, slope, s.value, s.gap, penalty, lag)
        return moved


def shrunk(oracle: Oracle, s: PenaltyState) -> float:
    """The factor (1 + k/100)^(-1/2) on automatic step sizes for minibatches; 1 without data.

    Args:
        oracle: of the step.
        s: the state.

    Returns:
        The factor.
    """
    return 1.0 if oracle.data is None else float((1 + int(s.iterations) / 100) ** -0.5)
