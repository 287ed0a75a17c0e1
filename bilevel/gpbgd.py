"""G-PBGD: projected gradient steps on F plus a penalty on |f_y|^2."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from nestopt.linalg import Stopping

from .assumptions import Assumptions
from .counts import Counts
from .method import Method, MethodState
from .oracle import Oracle, Slopes
from .penalty import error_of, refuse_sizes
from .penalty_steps import Schedule, raised, ramp, refuse_long_step, schedule_value, secant
from .problem import Linearization, Problem
from .value_difference import ValueDifference
from .watched import WatchedMethod, WatchedState

__all__ = ["GPBGD", "GPBGDState"]


@dataclass(frozen=True, kw_only=True)
class GPBGDState(WatchedState):
    """Where G-PBGD stands; its gap is |f_y|^2.

    Attributes:
        penalty: c.
        slope: F_x + 2 c f_xy f_y.
        slope_y: F_y + 2 c f_yy f_y.
    """

    penalty: Tensor
    slope: Tensor
    slope_y: Tensor


@dataclass(frozen=True)
class GPBGD(WatchedMethod):
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
        step_size: a for x and y, below 2 / (L_F + 2 c L_f^2), or it is refused; None watches.
        debias: the second stage: ValueDifference() (first order), AID() (products), None for the bare method.
        stopping: of the first stage: rtol None is 1e-7 in float64 and 1e-3 in lower precision.

    Raises:
        ValueError: for numbers that are not positive.

    Reference:
        Shen & Chen 2023, algorithm 1 with the penalty of section 2.2 (G-PBGD); Mehra & Hamm 2021.

    Example:
        >>> import torch
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

    def __post_init__(self) -> None:
        refuse_sizes(self, "penalty", "ramp", "step_size")

    def init(self, problem: Problem, x0: Any, y0: Any, data: Any = None) -> GPBGDState:
        """See `PenaltyMethod.init`; also refuses operations that cannot be differentiated twice."""
        state: GPBGDState = super().init(problem, x0, y0, data)
        Linearization(problem, state.spaces, state.x_vector, state.y_vector, data).check()
        return state

    def _first(self, oracle: Oracle, upper: Slopes, shared: dict[str, Any]) -> GPBGDState:
        s = GPBGDState(**shared, penalty=shared["gap"], slope=upper.x, slope_y=upper.y)
        c = self._penalty(s, 0)

        def slope_y(v: Tensor) -> Tensor:
            point = Linearization(oracle.problem, oracle.spaces, s.x_vector, v, oracle.data)
            oracle.counts += Counts(1, 1, 1)
            slope: Tensor = point.upper_y + 2 * c * (point.hessian @ point.lower_y)
            return slope

        refuse_long_step(self, "step_size", oracle, slope_y, s.y_vector)
        return self._look(oracle, s, s.x_vector, s.y_vector, 0)

    def _advance(self, oracle: Oracle, s: GPBGDState) -> GPBGDState:
        x, f, c = s.x_vector, s.lower_curvature, s.penalty
        size, watch = self._size_in_x(oracle, s, s.slope, c, self.step_size)
        size_y = 1 / (s.upper_curvature + 2 * c * f.square()) if self.step_size is None else size
        x = oracle.project(x - size * s.slope)
        y = s.y_vector - size_y * s.slope_y
        new = self._look(oracle, replace(s, watch=watch), x, y, int(s.iterations) + 1)
        if self.step_size is not None or bool(size > 0) or bool(new.penalty > c):
            return new
        seen = secant(oracle, new.slope_y - s.slope_y, y - s.y_vector, y)  # L_F + 2 c L_f^2 along the step
        return replace(new, lower_curvature=raised(f, ((seen - s.upper_curvature).clamp_min(0.0) / (2 * c)).sqrt()))

    def _look(self, oracle: Oracle, s: GPBGDState, x: Tensor, y: Tensor, k: int) -> GPBGDState:
        c = self._penalty(s, k)
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

    def _penalty(self, s: GPBGDState, k: int) -> Tensor:
        return schedule_value(self.penalty, s.upper_curvature / s.lower_curvature.square(), ramp(self.ramp), k)
