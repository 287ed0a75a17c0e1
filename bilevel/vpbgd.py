"""V-PBGD: projected gradient steps on F plus a penalty on f(x, y) - min f."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from nestopt.linalg import Stopping

from .assumptions import Assumptions
from .counts import Counts
from .method import Method, MethodState
from .oracle import Oracle
from .penalty import PenaltyMethod, PenaltyState, error_of, refuse_sizes
from .penalty_steps import Curvatures, Schedule, TwoPoints, Watch, descend, schedule_value
from .value_difference import ValueDifference

__all__ = ["VPBGD", "VPBGDState"]


@dataclass(frozen=True, kw_only=True)
class VPBGDState(PenaltyState):
    """Where V-PBGD stands.

    Attributes:
        auxiliary: w, raveled.
        penalty: c.
        slope: F_x + c (f_x(x, y) - f_x(x, w)).
        slope_y: F_y + c f_y.
        gap: f(x, y) - f(x, w).
        watch: the step size in x.
        upper_curvature: of F in y.
        lower_curvature: of f in y.
    """

    auxiliary: Tensor
    penalty: Tensor
    slope: Tensor
    slope_y: Tensor
    gap: Tensor
    watch: Watch
    upper_curvature: Tensor
    lower_curvature: Tensor


@dataclass(frozen=True)
class VPBGD(PenaltyMethod):
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
        step_size: a for x and y, below 2 / (L_F + c L_f); None watches.
        auxiliary_step_size: b, below 2 / L_f; None watches.
        debias: the second stage: ValueDifference() (first order), AID() (products), None for the bare method.
        stopping: of the first stage: rtol None is 1e-6 in float64 and 1e-3 in lower precision.

    Raises:
        ValueError: for sizes or steps that are not positive.

    Reference:
        Shen & Chen 2023, algorithm 1 (V-PBGD).

    Example:
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

    parts: ClassVar[dict[str, type]] = {"counts": Counts, "watch": Watch}

    def __post_init__(self) -> None:
        refuse_sizes(self, "steps", "penalty", "ramp", "step_size", "auxiliary_step_size")

    def _begin(self, oracle: Oracle, x: Tensor, y: Tensor) -> VPBGDState:
        upper = oracle.upper(x, y)
        seen = Curvatures.at(oracle, x, y, upper.y)
        zero = torch.zeros_like(upper.value)
        s = VPBGDState(
            **self._fields(oracle, x, y, upper), error=zero, auxiliary=y, penalty=zero, slope=upper.x, slope_y=upper.y,
            gap=zero, watch=Watch.start(oracle, x, y, upper), upper_curvature=seen.upper, lower_curvature=seen.lower,
        )  # fmt: skip
        return self._look(oracle, s, x, y, 0)

    def _advance(self, oracle: Oracle, s: VPBGDState) -> VPBGDState:
        x, c = s.x_vector, s.penalty
        if self.step_size is not None:
            (size, watch), size_y = s.watch.fixed(self.step_size), torch.full_like(c, self.step_size)
        else:
            lag = s.residuals["auxiliary"] + s.residuals["blend"]
            size, watch = s.watch.move(oracle, x, s.slope, s.value, s.gap, c, lag)
            size_y = 1 / (s.upper_curvature + c * s.lower_curvature)
        x = oracle.project(x - size * s.slope)
        y = oracle.prox(s.y_vector - size_y * s.slope_y, size_y, x)
        return self._look(oracle, replace(s, watch=watch), x, y, int(s.iterations) + 1)

    def _look(self, oracle: Oracle, s: VPBGDState, x: Tensor, y: Tensor, k: int) -> VPBGDState:
        """T steps of w at (x, y), and what is seen there."""
        unit = Curvatures(s.upper_curvature, s.lower_curvature).unit
        c = schedule_value(self.penalty, unit, lambda i: 1.0 + 99.0 * min(i / self.ramp, 1.0), k)
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
