"""V-PBGD: projected gradient steps on F plus a penalty on f(x, y) - min f."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from nestopt.linalg import Stopping

from .assumptions import Assumptions
from .method import Method, MethodState
from .oracle import Oracle, Slopes
from .penalty import error_of, refuse_sizes
from .penalty_steps import Schedule, TwoPoints, descend, ramp, refuse_long_step, schedule_value
from .value_difference import ValueDifference
from .watched import WatchedMethod, WatchedState

__all__ = ["VPBGD", "VPBGDState"]


@dataclass(frozen=True, kw_only=True)
class VPBGDState(WatchedState):
    """Where V-PBGD stands.

    Attributes:
        auxiliary: w, raveled.
        penalty: c.
        slope: F_x + c (f_x(x, y) - f_x(x, w)).
        slope_y: F_y + c f_y.
    """

    auxiliary: Tensor
    penalty: Tensor
    slope: Tensor
    slope_y: Tensor


@dataclass(frozen=True)
class VPBGD(WatchedMethod):
    """Penalty-based bilevel gradient descent on F(x, y) + c (f(x, y) - min over w of f(x, w)).

    One step, with c ramped up linearly to its last value:

        T times   w <- P_Y(w - b f_y(x, w)),
        (x, y) <- P_(X, Y)((x, y) - a grad(F + c (f(x, y) - f(x, w)))),     f_x(x, w) kept, w a constant.

    The published method has one size a for x and y. Without one, y gets 1 / (L_F + c L_f), and x its own as
    in F2SA, which is zero while y and w have not followed.

    `error` is the largest of: lower |f_y| at y, which carries the bias O(1/c); auxiliary c |f_y| at w;
    blend |F_y + c f_y|; upper |P_X(x - slope) - x|; then the second stage's. With a lower set these are
    projected steps. CONVERGED means error <= max(rtol (|F_x| + |F_y|), atol) with the scale taken at the start.

    Cost of a step: one gradient of F and 2 + T of f, no product.

    Args:
        steps: T.
        penalty: c: a number, a schedule k -> c, or None for a ramp from 1 to 100 times (curvature of F) /
            (curvature of f) over `ramp` steps.
        ramp: steps of the automatic ramp.
        step_size: a for x and y, below 2 / (L_F + c L_f), or it is refused; None watches.
        auxiliary_step_size: b, below 2 / L_f, or it is refused; None watches.
        debias: the second stage: ValueDifference() (first order), AID() (products), None for the bare method.
        stopping: of the first stage: rtol None is 1e-7 in float64 and 1e-3 in lower precision.

    Raises:
        ValueError: for sizes or steps that are not positive.

    Reference:
        Shen & Chen 2023, algorithm 1 (V-PBGD).

    Example:
        >>> import torch
        >>> from nestopt import bilevel
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y: ((y - 1) ** 2).sum(), lower=lambda x, y: ((y - x) ** 2).sum() + 0.5 * (y**2).sum()
        ... )
        >>> start = torch.zeros(2, dtype=torch.float64)
        >>> res = VPBGD()(problem, start, start.clone())
        >>> res.status.name, [round(v, 5) for v in res.x.tolist()]
        ('CONVERGED', [1.5, 1.5])
    """

    steps: int = 3
    penalty: float | Schedule | None = None
    ramp: int = 50
    step_size: float | None = None
    auxiliary_step_size: float | None = None
    debias: Method | None = ValueDifference()
    stopping: Stopping = Stopping(rtol=None, max_iter=100)

    State: ClassVar[type[MethodState]] = VPBGDState
    assumptions: ClassVar[Assumptions] = Assumptions("penalty", "Shen & Chen 2023", lower_set=True, unique=False)

    def __post_init__(self) -> None:
        refuse_sizes(self, "steps", "penalty", "ramp", "step_size", "auxiliary_step_size")

    def _first(self, oracle: Oracle, upper: Slopes, shared: dict[str, Any]) -> VPBGDState:
        x, y = shared["x_vector"], shared["y_vector"]
        s = VPBGDState(**shared, auxiliary=y, penalty=shared["gap"], slope=upper.x, slope_y=upper.y)
        if not oracle.nonsmooth.present:
            c = self._penalty(s, 0)
            refuse_long_step(self, "step_size", oracle, lambda v: oracle.weighted(x, v, upper=1.0, lower=c).y, y)
            refuse_long_step(self, "auxiliary_step_size", oracle, lambda v: oracle.lower_y(x, v)[1], y)
        return self._look(oracle, s, x, y, 0)

    def _advance(self, oracle: Oracle, s: VPBGDState) -> VPBGDState:
        x, c = s.x_vector, s.penalty
        size, watch = self._size_in_x(oracle, s, s.slope, c, self.step_size)
        size_y = 1 / (s.upper_curvature + c * s.lower_curvature) if self.step_size is None else size
        x = oracle.project(x - size * s.slope)
        y = oracle.prox(s.y_vector - size_y * s.slope_y, size_y, x)
        return self._look(oracle, replace(s, watch=watch), x, y, int(s.iterations) + 1)

    def _look(self, oracle: Oracle, s: VPBGDState, x: Tensor, y: Tensor, k: int) -> VPBGDState:
        """T steps of w at (x, y), and what is seen there."""
        c = self._penalty(s, k)
        w, f = descend(
            oracle, lambda v: oracle.lower_y(x, v)[1], x, s.auxiliary, self.steps, s.lower_curvature,
            self.auxiliary_step_size,
        )  # fmt: skip
        p = TwoPoints.at(oracle, x, y, w)
        slope, slope_y = p.upper.x + c * p.gap_x, p.upper.y + c * p.lower.y
        residuals = p.residuals(oracle, x, y, w, slope, c)
        return replace(
            s, x_vector=x, y_vector=y, auxiliary=w, penalty=c, slope=slope, slope_y=slope_y, gap=p.gap,
            value=p.upper.value, residuals=residuals, error=error_of(residuals), lower_curvature=f,
        )  # fmt: skip

    def _penalty(self, s: VPBGDState, k: int) -> Tensor:
        return schedule_value(self.penalty, s.curvatures.unit, ramp(self.ramp), k)
