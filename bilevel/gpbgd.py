"""G-PBGD: projected gradient steps on F plus a penalty on |f_y|^2."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.linalg import Stopping

from .assumptions import Assumptions
from .counts import Counts
from .method import Method, MethodState
from .oracle import Oracle
from .penalty import PenaltyMethod, PenaltyState, error_of, refuse_sizes
from .penalty_steps import Curvatures, Schedule, Watch, schedule_value
from .problem import Linearization, Problem
from .value_difference import ValueDifference

__all__ = ["GPBGD", "GPBGDState"]


@dataclass(frozen=True, kw_only=True)
class GPBGDState(PenaltyState):
    """Where G-PBGD stands.

    Attributes:
        penalty: c.
        slope: F_x + 2 c f_xy f_y.
        slope_y: F_y + 2 c f_yy f_y.
        gap: |f_y|^2.
        watch: the step size in x.
        upper_curvature: of F in y.
        lower_curvature: of f in y.
    """

    penalty: Tensor
    slope: Tensor
    slope_y: Tensor
    gap: Tensor
    watch: Watch
    upper_curvature: Tensor
    lower_curvature: Tensor


@dataclass(frozen=True)
class GPBGD(PenaltyMethod):
    """Penalty-based bilevel gradient descent on F(x, y) + c |f_y(x, y)|^2.

    One step, with c ramped up linearly to its last value:

        (x, y) <- P_X((x, y) - a (grad F + 2 c (f_xy f_y, f_yy f_y))).

    The gradient of |f_y|^2 takes PRODUCTS with second derivatives, unlike every other penalty method here, and squares
    the lower level's condition number; any stationary point of f satisfies the constraint, a maximum too. Without a
    size y gets 1 / (L_F + 2 c L_f^2), and x its own as in F2SA, which is zero while y has not followed.

    `error` is the largest of: lower |f_y|, which carries the bias O(1/c); blend, the y-slope; upper
    |P_X(x - slope) - x|; then the second stage's. CONVERGED means error <= max(rtol (|F_x| + |F_y|), atol) with the
    scale taken at the start.

    Cost of a step: one gradient of F, one of f with a graph, and two products.

    Args:
        penalty: c: a number, a schedule k -> c, or None for a ramp from 1 to 100 times (curvature of F) /
            (curvature of f)^2 over `ramp` steps.
        ramp: steps of the automatic ramp.
        step_size: a for x and y, below 2 / (L_F + 2 c L_f^2); None watches.
        debias: the second stage: ValueDifference() (first order), AID() (products), None for the bare method.
        stopping: of the first stage: rtol None is 1e-6 in float64 and 1e-3 in lower precision.

    Raises:
        ValueError: for numbers that are not positive.

    Reference:
        Shen & Chen 2023, algorithm 1 with the penalty of section 2.2 (G-PBGD); Mehra & Hamm 2021.

    Example:
        >>> from nestopt import bilevel
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y: ((y - 1) ** 2).sum(), lower=lambda x, y: ((y - x) ** 2).sum() + 0.5 * (y**2).sum()
        ... )
        >>> start = torch.zeros(2, dtype=torch.float64)
        >>> res = GPBGD()(problem, start, start.clone())
        >>> res.status.name, [round(v, 5) for v in res.x.tolist()]
        ('CONVERGED', [1.5, 1.5])
    """

    penalty: float | Schedule | None = None
    ramp: int = 50
    step_size: float | None = None
    debias: Method | None = ValueDifference()
    stopping: Stopping = Stopping(rtol=None, max_iter=100)

    State: ClassVar[type[MethodState]] = GPBGDState
    assumptions: ClassVar[Assumptions] = Assumptions("penalty", "Shen & Chen 2023", unique=False, products=True)

    parts: ClassVar[dict[str, type]] = {"counts": Counts, "watch": Watch}

    def __post_init__(self) -> None:
        refuse_sizes(self, "penalty", "ramp", "step_size")

    def init(self, problem: Problem, x0: Any, y0: Any, data: Any = None) -> GPBGDState:
        """See `PenaltyMethod.init`; also refuses operations that cannot be differentiated twice."""
        state: GPBGDState = super().init(problem, x0, y0, data)
        Linearization(problem, state.spaces, state.x_vector, state.y_vector, data).check()
        return state

    def _begin(self, oracle: Oracle, x: Tensor, y: Tensor) -> GPBGDState:
        upper = oracle.upper(x, y)
        seen = Curvatures.at(oracle, x, y, upper.y)
        zero = torch.zeros_like(upper.value)
        s = GPBGDState(
            **self._fields(oracle, x, y, upper), error=zero, penalty=zero, slope=upper.x, slope_y=upper.y, gap=zero,
            watch=Watch.start(oracle, x, y, upper), upper_curvature=seen.upper,
            lower_curvature=seen.lower,
        )  # fmt: skip
        return self._look(oracle, s, x, y, 0)

    def _advance(self, oracle: Oracle, s: GPBGDState) -> GPBGDState:
        x, f, c = s.x_vector, s.lower_curvature, s.penalty
        if self.step_size is not None:
            (size, watch), size_y = s.watch.fixed(self.step_size), torch.full_like(c, self.step_size)
        else:
            size, watch = s.watch.move(oracle, x, s.slope, s.value, s.gap, c, s.residuals["blend"])
            size_y = 1 / (s.upper_curvature + 2 * c * f.square())
        x = oracle.project(x - size * s.slope)
        y = s.y_vector - size_y * s.slope_y
        new = self._look(oracle, replace(s, watch=watch), x, y, int(s.iterations) + 1)
        if self.step_size is not None or bool(size > 0) or bool(new.penalty > c):
            return new
        seen = oracle.norm(new.slope_y - s.slope_y) / oracle.norm(y - s.y_vector)  # L_F + 2 c L_f^2 along the step
        raised = ((seen - s.upper_curvature).clamp_min(0.0) / (2 * c)).sqrt()
        return replace(new, lower_curvature=torch.where(torch.isfinite(raised), torch.maximum(f, raised), f))

    def _look(self, oracle: Oracle, s: GPBGDState, x: Tensor, y: Tensor, k: int) -> GPBGDState:
        unit = s.upper_curvature / s.lower_curvature.square()
        c = schedule_value(self.penalty, unit, lambda i: 1.0 + 99.0 * min(i / self.ramp, 1.0), k)
        point = Linearization(oracle.problem, oracle.spaces, x, y, oracle.data)
        g = point.lower_y
        slope, slope_y = point.upper_x + 2 * c * (point.cross.T @ g), point.upper_y + 2 * c * (point.hessian @ g)
        oracle.counts += Counts(1, 1, 2)
        residuals = {
            "lower": oracle.norm(g),
            "blend": oracle.norm(slope_y),
            "upper": oracle.norm(oracle.project(x - slope) - x),
        }
        return replace(
            s, x_vector=x, y_vector=y, penalty=c, slope=slope, slope_y=slope_y, gap=oracle.dot(g, g),
            value=point.upper, residuals=residuals, error=error_of(residuals),
        )  # fmt: skip
