"""L-BFGS in its compact form, whose curvature memory is a few tensors that go from one lower solve to the next."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.implicit import Minimizer
from nestopt.implicit.minimizer import ARMIJO, MinimizerState, Objective, Point, first_length, stuck

from .curvature_pairs import Pairs

__all__ = ["CompactLBFGS", "CompactState"]


@dataclass(frozen=True, kw_only=True)
class CompactState(MinimizerState):
    """Where CompactLBFGS stands.

    Attributes:
        pairs: the curvature memory.
    """

    pairs: Pairs = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class CompactLBFGS(Minimizer):
    """Minimise a smooth function by L-BFGS with a weak Wolfe search, in a dozen tensor operations a step.

    The direction is -H g with the inverse BFGS matrix H of the last pairs in its compact form. The search takes t = 1
    first, and brackets a step with f(y + t d) <= f(y) + 1e-4 t g'd and a slope above 0.9 g'd; differences of f at the
    rounding level are read from the slopes. A pair enters when s't > 1e-10 |s| |t|. A run that begins from the state of
    an earlier one keeps its pairs: with as many pairs as variables, the next solve of a nearly equal problem is a few
    Newton steps.

    CONVERGED means |grad f(y)| <= max(rtol |grad f(y0)|, atol), or <= the tolerance of the call.

    Cost of a step: one gradient, a few more where the search brackets; memory of 2 history_size vectors.

    Args:
        history_size: pairs kept.

    Raises:
        ValueError: for a history below 1, a negative tolerance or limit.

    Reference:
        Byrd, Nocedal & Schnabel 1994, theorem 2.2; Lewis & Overton 2013 for the search.

    Example:
        >>> res = CompactLBFGS()(lambda y: ((y - 1) ** 4 + y**2).sum(), torch.zeros(2, dtype=torch.float64))
        >>> res.x, res.status.name
        (tensor([0.4102, 0.4102], dtype=torch.float64), 'CONVERGED')
    """

    history_size: int = 50

    State: ClassVar[type[MinimizerState]] = CompactState
    patience: ClassVar[int] = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.history_size, int) or self.history_size < 1:
            raise ValueError(f"CompactLBFGS: history_size must be an integer >= 1, but got {self.history_size!r}.")

    def _start(self, f: Objective, y: Tensor, previous: Any) -> tuple[Point, dict[str, Any]]:
        point = f.differentiate(f.evaluate(y))
        none = y.new_zeros(0, len(y))
        return point, {"pairs": previous.pairs if isinstance(previous, CompactState) else Pairs.of(none, none)}

    def _step(self, f: Objective, s: CompactState) -> Any:
        pairs, direction = s.pairs, s.pairs.direction(s.point.gradient)
        slope = float(torch.dot(s.point.gradient, direction))
        if not (slope < 0 and math.isfinite(slope)):  # the pairs mislead: rounding, or a change of the objective
            none = direction.new_zeros(0, len(direction))
            pairs, direction, slope = Pairs.of(none, none), -s.point.gradient, -(float(s.error) ** 2)
        first = 1.0 if len(pairs.steps) else first_length(s.point) / float(s.error)
        point, length = _search(f, s.point, direction, slope, first)
        if point is None:
            if len(pairs.steps):  # once more along the gradient
                none = direction.new_zeros(0, len(direction))
                return replace(s, pairs=Pairs.of(none, none), stale=s.stale + 1)
            return s.end(stuck(s.point, length * float(direction.norm()), -length * slope))
        step, change = point.y - s.point.y, point.gradient - s.point.gradient
        if bool(torch.dot(step, change) > 1e-10 * step.norm() * change.norm()):
            pairs = pairs.append(step, change, self.history_size)
        return replace(s, point=point, pairs=pairs)


def _search(
    f: Objective, start: Point, direction: Tensor, slope: float, t: float, limit: int = 40
) -> tuple[Point | None, float]:
    """A weak Wolfe point along the direction, by bracketing with secant steps; None where nothing lowers f."""
    low, high, best, first = 0.0, math.inf, None, t
    for _ in range(limit):
        point = f.differentiate(f.evaluate(start.y + t * direction))
        if start.overflows_downhill(point):
            return point, t
        end = float(torch.dot(point.gradient, direction)) if point.finite else math.nan
        if not (point.finite and start.rise(point) <= ARMIJO * t * slope):
            high = t
        elif end < 0.9 * slope:
            low, best = t, point
        else:
            return point, t
        secant = t * slope / (slope - end) if math.isfinite(end) and end > slope else math.nan
        if math.isinf(high):
            t = min(max(secant, 2 * t), 10 * t) if math.isfinite(secant) else 4 * t
        else:
            width = high - low
            t = min(max(secant, low + 0.1 * width), high - 0.1 * width) if math.isfinite(secant) else low + 0.3 * width
            if best is not None and width <= 0.01 * high:
                break
    return best, first
