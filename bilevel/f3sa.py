"""F3SA: F2SA with momentum-assisted gradient estimators, for stochastic objectives."""

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
from .penalty_steps import Curvatures, Growth, Schedule, TwoPoints, Watch, schedule_value
from .value_difference import ValueDifference

__all__ = ["F3SA", "F3SAState"]


@dataclass(frozen=True, kw_only=True)
class F3SAState(PenaltyState):
    """Where F3SA stands.

    Attributes:
        auxiliary: z, raveled.
        penalty: lambda.
        estimates_x: of F_x and f_x at (x, y), and of f_x at (x, z), of shape (3, n_x).
        estimates_y: of F_y, f_y, f_y, likewise.
        gap: f(x, y) - f(x, z).
        watch: the step size in x.
        upper_curvature: of F in y.
        lower_curvature: of f in y.
    """

    auxiliary: Tensor
    penalty: Tensor
    estimates_x: Tensor
    estimates_y: Tensor
    gap: Tensor
    watch: Watch
    upper_curvature: Tensor
    lower_curvature: Tensor


@dataclass(frozen=True)
class F3SA(PenaltyMethod):
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
        lower_step_size: a, below 2 / (L_f + L_F / lambda); None watches.
        auxiliary_step_size: b, below 2 / L_f; None watches.
        debias: the second stage: ValueDifference() (first order), AID() (products), None for the bare method, which
            data need.
        stopping: of the first stage: rtol None is 1e-6 in float64 and 1e-3 in lower precision.

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

    parts: ClassVar[dict[str, type]] = {"counts": Counts, "watch": Watch}

    def __post_init__(self) -> None:
        refuse_sizes(self, "momentum", "penalty", "upper_step_size", "lower_step_size", "auxiliary_step_size")
        if self.momentum > 1:
            raise ValueError(f"F3SA: momentum must be in (0, 1], but got {self.momentum}; 1 is no momentum.")

    def _begin(self, oracle: Oracle, x: Tensor, y: Tensor) -> F3SAState:
        upper = oracle.upper(x, y)
        seen = Curvatures.at(oracle, x, y, upper.y)
        zero = torch.zeros_like(upper.value)
        p = TwoPoints.at(oracle, x, y, y)
        s = F3SAState(
            **self._fields(oracle, x, y, upper), error=zero, auxiliary=y, penalty=self._penalty(seen, 0),
            estimates_x=_x(p), estimates_y=_y(p), gap=zero, upper_curvature=seen.upper, lower_curvature=seen.lower,
            watch=Watch.start(oracle, x, y, upper),
        )  # fmt: skip
        return self._measured(oracle, s, p)

    def _advance(self, oracle: Oracle, s: F3SAState) -> F3SAState:
        x, y, z, lam = s.x_vector, s.y_vector, s.auxiliary, s.penalty
        shrunk = 1.0 if oracle.data is None else float((1 + int(s.iterations) / 100) ** -0.5)
        f, F = s.lower_curvature, s.upper_curvature
        b = shrunk / f if self.auxiliary_step_size is None else self.auxiliary_step_size
        a = shrunk / (f + F / lam) if self.lower_step_size is None else self.lower_step_size
        slope, slope_y = _slope(s)
        if self.upper_step_size is not None:
            size, watch = s.watch.fixed(self.upper_step_size)
        elif oracle.data is not None:
            size, watch = shrunk * s.watch.size, s.watch
        else:
            lag = s.residuals["auxiliary"] + s.residuals["blend"]
            size, watch = s.watch.move(oracle, x, slope, s.value, s.gap, lam, lag)
        x_new = oracle.project(x - size * slope)
        y_new, z_new = y - a * slope_y, z - b * s.estimates_y[2]
        old, new = TwoPoints.at(oracle, x, y, z), TwoPoints.at(oracle, x_new, y_new, z_new)
        keep = 1 - self.momentum
        for moved, change in ((y_new - y, new.lower.y - old.lower.y), (z_new - z, new.auxiliary.y - old.auxiliary.y)):
            seen = oracle.norm(change) / oracle.norm(moved)
            still = torch.equal(x_new, x) and bool(torch.isfinite(seen))
            f = torch.maximum(f, seen) if still else f
        found = replace(
            s, watch=watch, x_vector=x_new, y_vector=y_new, auxiliary=z_new,
            penalty=self._penalty(Curvatures(F, f), int(s.iterations) + 1),
            estimates_x=_x(new) + keep * (s.estimates_x - _x(old)),
            estimates_y=_y(new) + keep * (s.estimates_y - _y(old)),
            lower_curvature=f,
        )  # fmt: skip
        return self._measured(oracle, found, new)

    def _measured(self, oracle: Oracle, s: F3SAState, p: TwoPoints) -> F3SAState:
        slope = p.upper.x + s.penalty * p.gap_x
        residuals = p.residuals(oracle, s.x_vector, s.y_vector, s.auxiliary, slope, s.penalty)
        return replace(s, gap=p.gap, value=p.upper.value, residuals=residuals, error=error_of(residuals))

    def _penalty(self, seen: Curvatures, k: int) -> Tensor:
        return schedule_value(self.penalty, seen.unit, Growth(10.0, slope=0.1), k)


def _slope(s: F3SAState) -> tuple[Tensor, Tensor]:
    """The estimated slopes of F + lambda (f(y) - f(z)) in x, and of F / lambda + f in y."""
    A, B, C = s.estimates_x
    return A + s.penalty * (B - C), s.estimates_y[0] / s.penalty + s.estimates_y[1]


def _x(p: TwoPoints) -> Tensor:
    return torch.stack([p.upper.x, p.lower.x, p.auxiliary.x])


def _y(p: TwoPoints) -> Tensor:
    return torch.stack([p.upper.y, p.lower.y, p.auxiliary.y])
