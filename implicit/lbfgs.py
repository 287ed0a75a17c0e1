"""Limited-memory BFGS: torch's, with our stopping rule and a certified gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .batched_lbfgs import BatchedLBFGS
from .minimizer import Minimizer, MinimizerState, Objective, Point, first_length, stuck

__all__ = ["LBFGS", "LBFGSState"]

# torch's thresholds are absolute: curvature pairs with y's <= 1e-10 are dropped and line searches narrower than 1e-9
# end. In the variable 2^66 y (2^30 y in lower precision, which overflows sooner), and with gradients divided by
# |grad(y0)|, both lie below the rounding level; a power of two changes no bit.
_STRETCH = {torch.float64: 2.0**66}
_STRETCH_LOW = 2.0**30


@dataclass(frozen=True, kw_only=True)
class LBFGSState(MinimizerState):
    """Where LBFGS stands.

    Attributes:
        memory: torch's state of the one parameter: curvature pairs, previous direction and gradient.
        unit: |grad| that gradients are divided by.
    """

    memory: dict[str, Any] = field(default_factory=dict, repr=False)
    unit: float


@dataclass(frozen=True)
class LBFGS(Minimizer):
    """Minimise f(y) by y+ = y - t H grad f(y), H made of the last `history_size` pairs (y+ - y, grad+ - grad).

    torch.optim.LBFGS takes the steps, with its strong Wolfe line search and without its tolerances. It is shown
    f(trial) - f(y), computed from the two slopes where the difference is at the rounding level (the trapezoidal rule,
    which turns Armijo's condition into the approximate Wolfe condition), so that |grad| can fall to its own rounding
    level and not only to the square root of it. When a line search fails, H is forgotten once.

    CONVERGED means |grad| <= max(rtol |grad(y0)|, atol), measured at x. Fifty values spent on steps that change f by
    rounding only and lower |grad| no more, or a line search that fails there, end the run as STAGNATED; a line search
    that fails while the slope promises a decrease ends it as LINE_SEARCH_FAILED, and f unbounded below as DIVERGED.

    With batch_dims every item has its own H in compact form, and a search for the weak Wolfe conditions takes the place
    of torch's: the same answers by other steps.

    Cost: one or two gradients a step, memory for 2 history_size vectors.

    Args:
        history_size: pairs kept; 10 to 100, more for ill-conditioned problems.
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in the units of the gradient.
        max_iter: limit of steps.

    Raises:
        ValueError: for a history below 1, a negative tolerance or limit.

    Reference:
        Liu & Nocedal 1989; Hager & Zhang 2005 for the rounding level.

    Example:
        >>> res = LBFGS()(lambda y: ((y - 1) ** 4 + y**2).sum(), torch.zeros(2, dtype=torch.float64))
        >>> res.x, res.status.name
        (tensor([0.4102, 0.4102], dtype=torch.float64), 'CONVERGED')
    """

    history_size: int = 30

    State: ClassVar[type[MinimizerState]] = LBFGSState
    patience: ClassVar[int] = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.history_size, int) or self.history_size < 1:
            raise ValueError(f"LBFGS: history_size must be an integer >= 1, but got {self.history_size!r}.")

    def _batched(self) -> BatchedLBFGS:
        return BatchedLBFGS(
            owner="LBFGS", rtol=self.rtol, atol=self.atol, max_iter=self.max_iter,
            history_size=self.history_size,
        )  # fmt: skip

    def _start(self, f: Objective, y: Tensor, previous: Any) -> tuple[Point, dict[str, Any]]:
        point = f.differentiate(f.evaluate(y))
        if not (isinstance(previous, LBFGSState) and previous.memory.get("old_stps")):
            return point, {"memory": {}, "unit": float(point.error) if point.error > 0 else 1.0}
        # the objective may have changed: a gradient difference across the change would be no curvature
        memory = {**previous.memory, "prev_flat_grad": point.gradient / previous.unit}
        return point, {"memory": memory, "unit": previous.unit}

    def _step(self, f: Objective, s: LBFGSState) -> Any:
        point, memory, tried = self._move(f, s, s.memory)
        if point is s.point and s.memory:
            point, memory, _ = self._move(f, s, {})
        if point is s.point:
            return s.end(stuck(point, tried, tried * float(point.error)))
        if not memory.get("old_stps") and torch.dot(point.gradient - s.point.gradient, point.y - s.point.y) <= 0:
            memory = {}  # without a pair of positive curvature, torch's next direction would have no scale
        return replace(s, point=point, memory=memory)

    def _move(self, f: Objective, s: LBFGSState, memory: dict[str, Any]) -> tuple[Point, dict[str, Any], float]:
        """A step of torch's from a copy of its memory: the point (the old, if none), memory, first length tried."""
        start = s.point
        stretch = _STRETCH.get(start.y.dtype, _STRETCH_LOW)
        p = torch.nn.Parameter(stretch * start.y)
        down = start.gradient / s.unit
        trials: list[Point] = []

        def closure() -> Tensor:
            # torch asks for the point where it stands first
            trials.append(f.differentiate(f.evaluate(p.detach() / stretch)) if trials else start)
            point = trials[-1]
            p.grad = point.gradient / s.unit if point.finite else torch.full_like(p, math.nan)
            rise = stretch / s.unit * start.rise(point) if point.finite else math.inf
            return torch.tensor(rise, dtype=torch.float64)

        # torch scales the very first step by min(1, 1 / |grad|_1), which is undone here
        first = first_length(start) / float(down.norm() * (1 / down.abs().sum()).clamp_max(1.0))
        optimizer = torch.optim.LBFGS(
            [p], 1.0 if memory else stretch * first, max_iter=1, max_eval=26, tolerance_grad=0.0, tolerance_change=0.0,
            history_size=self.history_size, line_search_fn="strong_wolfe",
        )  # fmt: skip
        optimizer.state[p].update(_copied(memory))
        optimizer.step(closure)  # type: ignore[no-untyped-call]
        y = p.detach() / stretch
        fallen = (point for point in trials if start.overflows_downhill(point))
        taken = next(fallen, None) or next((point for point in reversed(trials) if torch.equal(point.y, y)), start)
        rising = [point for point in trials if point.value - start.value > start.flat]
        if rising and start.trapezoid(rising[-1]) < 0 and abs(taken.value - start.value) <= start.flat:
            taken = start  # the slopes fall where f rises: they are not f's, and rounding only hides it in a short step
        tried = trials[1].y - start.y if len(trials) > 1 else torch.zeros_like(y)
        return taken, dict(optimizer.state[p]), float(torch.linalg.vector_norm(tried))


def _copied(memory: dict[str, Any]) -> dict[str, Any]:
    """What torch modifies in place is copied, so that a state stays what it was."""
    return {
        name: list(value) if isinstance(value, list) else value.clone() if name == "prev_flat_grad" else value
        for name, value in memory.items()
    }
