"""F3SA: F2SA with momentum-assisted gradient estimators, for stochastic objectives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.linalg import Stopping

from .assumptions import Assumptions
from .method import Method, MethodState
from .oracle import Oracle, Slopes
from .penalty import error_of, refuse_sizes
from .penalty_steps import Growth, Schedule, TwoPoints, raised, refuse_long_step, schedule_value, secant
from .value_difference import ValueDifference
from .watched import WatchedMethod, WatchedState, shrunk

__all__ = ["F3SA", "F3SAState"]


@dataclass(frozen=True, kw_only=True)
class F3SAState(WatchedState):
    """Where F3SA stands.

    Attributes:
        auxiliary: z, raveled.
        penalty: lambda.
        estimates_x: of F_x and f_x at (x, y), and of f_x at (x, z), of shape (3, n_x).
        estimates_y: of F_y, f_y, f_y, likewise.
    """

    auxiliary: Tensor
    penalty: Tensor
    estimates_x: Tensor
    estimates_y: Tensor


@dataclass(frozen=True)
class F3SA(WatchedMethod):
    """F2SA with one step in y and z, and a STORM estimator on each of the three gradients.

    With the estimators A of grad F(x, y), B of grad f(x, y) and C of grad f(x, z), one step is

        z+ = z - b C_y,   y+ = y - a (A_y / lambda + B_y),   x+ = P_X(x - s (A_x + lambda (B_x - C_x))),
        A+ = grad F(x+, y+; xi) + (1 - e) (A - grad F(x, y; xi)),   likewise B+ and C+,

    the same sample xi (this step's data) at both points, then lambda grows. Sizes that are not given are F2SA's; x
    waits while y and z have not followed. On data that never changes A, B, C are the exact gradients, for every e.

    `error` is F2SA's; with data, it is measured by the step's sample.

    Cost of a step: two gradients of F and four of f, no product. It touches the problem through its Oracle only.

    Args:
        momentum: e, in (0, 1]; 1 is plain F2SA with T = 1, small values average more.
        penalty: lambda: a number, a schedule k -> lambda, or None for (10 + k/10) (curvature of F) / (curvature of f).
        upper_step_size: s; None watches.
        lower_step_size: a, below 2 / (L_f + L_F / lambda), or it is refused; None watches.
        auxiliary_step_size: b, below 2 / L_f, or it is refused; None watches.
        debias: the second stage: ValueDifference() (first order), AID() (products), None for the bare method, which
            data need.
        stopping: of the first stage: rtol None is 1e-7 in float64 and 1e-3 in lower precision.

    Raises:
        ValueError: for numbers that are not positive, or a momentum above 1.

    Reference:
        Kwon, Kwon, Wright & Nowak 2023, algorithm 2; Cutkosky & Orabona 2019 for the estimator.

    Example:
        >>> from nestopt import bilevel
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y: ((y - 1) ** 2).sum(), lower=lambda x, y: ((y - x) ** 2).sum() + 0.5 * (y**2).sum()
        ... )
        >>> start = torch.zeros(2, dtype=torch.float64)
        >>> res = F3SA()(problem, start, start.clone())
        >>> res.status.name, [round(v, 5) for v in res.x.tolist()]
        ('CONVERGED', [1.5, 1.5])
    """

    momentum: float = 0.1
    penalty: float | Schedule | None = None
    upper_step_size: float | None = None
    lower_step_size: float | None = None
    auxiliary_step_size: float | None = None
    debias: Method | None = ValueDifference()
    stopping: Stopping = Stopping(rtol=None, max_iter=100)

    State: ClassVar[type[MethodState]] = F3SAState
    assumptions: ClassVar[Assumptions] = Assumptions("penalty", "Kwon et al. 2023", stochastic=True)

    def __post_init__(self) -> None:
        refuse_sizes(self, "momentum", "penalty", "upper_step_size", "lower_step_size", "auxiliary_step_size")
        if self.momentum > 1:
            raise ValueError(f"F3SA: momentum must be in (0, 1], but got {self.momentum}; 1 is no momentum.")

    def _first(self, oracle: Oracle, upper: Slopes, shared: dict[str, Any]) -> F3SAState:
        x, y = shared["x_vector"], shared["y_vector"]
        p = TwoPoints.at(oracle, x, y, y)
        s = F3SAState(**shared, auxiliary=y, penalty=shared["gap"], estimates_x=_x(p), estimates_y=_y(p))
        lam = self._penalty(s, 0)
        refuse_long_step(self, "auxiliary_step_size", oracle, lambda v: oracle.lower_y(x, v)[1], y)
        refuse_long_step(
            self, "lower_step_size", oracle, lambda v: oracle.weighted(x, v, upper=1 / lam, lower=1.0).y, y
        )
        return self._measured(oracle, replace(s, penalty=lam), p)

    def _advance(self, oracle: Oracle, s: F3SAState) -> F3SAState:
        x, y, z, lam = s.x_vector, s.y_vector, s.auxiliary, s.penalty
        f, F, factor = s.lower_curvature, s.upper_curvature, shrunk(oracle, s)
        b = factor / f if self.auxiliary_step_size is None else self.auxiliary_step_size
        a = factor / (f + F / lam) if self.lower_step_size is None else self.lower_step_size
        slope, slope_y = _slope(s)
        size, watch = self._size_in_x(oracle, s, slope, lam, self.upper_step_size)
        x_new = oracle.project(x - size * slope)
        y_new, z_new = y - a * slope_y, z - b * s.estimates_y[2]
        old, new = TwoPoints.at(oracle, x, y, z), TwoPoints.at(oracle, x_new, y_new, z_new)
        keep = 1 - self.momentum
        if not bool(oracle.norm(x_new - x) > 0):  # over all pieces, where x is sharded
            f = raised(f, secant(oracle, new.lower.y - old.lower.y, y_new - y, y))
            f = raised(f, secant(oracle, new.auxiliary.y - old.auxiliary.y, z_new - z, z))
        found = replace(
            s, watch=watch, x_vector=x_new, y_vector=y_new, auxiliary=z_new,
            estimates_x=_x(new) + keep * (s.estimates_x - _x(old)),
            estimates_y=_y(new) + keep * (s.estimates_y - _y(old)),
            lower_curvature=f,
        )  # fmt: skip
        return self._measured(oracle, replace(found, penalty=self._penalty(found, int(s.iterations) + 1)), new)

    def _measured(self, oracle: Oracle, s: F3SAState, p: TwoPoints) -> F3SAState:
        slope = p.upper.x + s.penalty * p.gap_x
        residuals = p.residuals(oracle, s.x_vector, s.y_vector, s.auxiliary, slope, s.penalty)
        return replace(s, gap=p.gap, value=p.upper.value, residuals=residuals, error=error_of(residuals))

    def _penalty(self, s: F3SAState, k: int) -> Tensor:
        return schedule_value(self.penalty, s.curvatures.unit, Growth(10.0, slope=0.1), k)


def _slope(s: F3SAState) -> tuple[Tensor, Tensor]:
    """The estimated slopes of F + lambda (f(y) - f(z)) in x, and of F / lambda + f in y."""
    A, B, C = s.estimates_x
    return A + s.penalty * (B - C), s.estimates_y[0] / s.penalty + s.estimates_y[1]


def _x(p: TwoPoints) -> Tensor:
    return torch.stack([p.upper.x, p.lower.x, p.auxiliary.x])


def _y(p: TwoPoints) -> Tensor:
    return torch.stack([p.upper.y, p.lower.y, p.auxiliary.y])
