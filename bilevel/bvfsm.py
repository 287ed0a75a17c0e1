"""BVFSM: the value function by sequences of regularised problems with a log barrier."""

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
from .penalty_steps import Growth, Schedule, TwoPoints, descend, refuse_long_step, schedule_value
from .value_difference import ValueDifference
from .watched import WatchedMethod, WatchedState

__all__ = ["BVFSM", "BVFSMState"]


@dataclass(frozen=True, kw_only=True)
class BVFSMState(WatchedState):
    """Where BVFSM stands; its gap is f(x, y) less the regularised value at z.

    Attributes:
        auxiliary: z, raveled.
        slack: mu, what f(x, y) may exceed the regularised value by.
        barrier: sigma.
        slope: F_x + sigma / (slack - gap) (f_x(x, y) - f_x(x, z)).
    """

    auxiliary: Tensor
    slack: Tensor
    barrier: Tensor
    slope: Tensor


@dataclass(frozen=True)
class BVFSM(WatchedMethod):
    """Bilevel value-function based sequential minimisation with an interior log barrier.

    With r = 1 / c falling to zero, one step is

        T times   z <- z - b (f_y(x, z) + theta z),                          v = f(x, z) + theta |z|^2 / 2,
        T times   a descent step with backtracking in y on
                  F(x, y) + theta |y|^2 / 2 - sigma log(1 - (f(x, y) - v) / mu),
        x <- P_X(x - s (F_x + sigma / (mu - (f(x, y) - v)) (f_x(x, y) - f_x(x, z)))),

    with mu ~ r^2, sigma ~ r, theta ~ r^3 in units of the problem, so that the multiplier sigma / (mu - gap) is at least
    of the size of c. The barrier blocks: a y with f(x, y) >= v + mu has the value infinity and is never taken, and
    where a step in x or a shorter mu leaves y outside, y goes back towards z, which is always inside. F selects among
    lower solutions that are not unique.

    `error` is the largest of: lower |f_y| at y, which carries the bias; auxiliary, the multiplier
    times |f_y| at z; blend, |F_y + multiplier f_y|; upper |P_X(x - slope) - x|; then the second stage's. CONVERGED
    means error <= max(rtol (|F_x| + |F_y|), atol) with the scale taken at the start.

    Cost of a step: 1 + T gradients of F, 2 + 2 T of f and a few values for each backtracking; no product.

    Args:
        steps: T.
        penalty: c as a schedule k -> c, or a number, in units of the problem; None for Growth(10.0, power=0.5).
        upper_step_size: s; None for one that doubles, below |dx| / |change of the slope|, and is zero
            while y and z lag.
        auxiliary_step_size: b, below 2 / L_f, or it is refused; None watches.
        debias: the second stage: ValueDifference() (first order), AID() (products), None for the bare method.
        stopping: of the first stage: rtol None is 1e-7 in float64 and 1e-3 in lower precision.

    Raises:
        ValueError: for numbers that are not positive.

    Reference:
        Liu, Liu, Yuan, Zeng & Zhang 2021 (ICML), algorithm 1 with the barrier of equation 5.

    Example:
        >>> from nestopt import bilevel
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y: ((y - 1) ** 2).sum(), lower=lambda x, y: ((y - x) ** 2).sum() + 0.5 * (y**2).sum()
        ... )
        >>> start = torch.zeros(2, dtype=torch.float64)
        >>> res = BVFSM()(problem, start, start.clone())
        >>> res.status.name, [round(v, 5) for v in res.x.tolist()]
        ('CONVERGED', [1.5, 1.5])
    """

    steps: int = 10
    penalty: float | Schedule | None = None
    upper_step_size: float | None = None
    auxiliary_step_size: float | None = None
    debias: Method | None = ValueDifference()
    stopping: Stopping = Stopping(rtol=None, max_iter=30)

    State: ClassVar[type[MethodState]] = BVFSMState
    assumptions: ClassVar[Assumptions] = Assumptions("penalty", "Liu et al. 2021", unique=False)

    def __post_init__(self) -> None:
        refuse_sizes(self, "steps", "penalty", "upper_step_size", "auxiliary_step_size")

    def _first(self, oracle: Oracle, upper: Slopes, shared: dict[str, Any]) -> BVFSMState:
        x, y, zero = shared["x_vector"], shared["y_vector"], shared["gap"]
        s = BVFSMState(**shared, auxiliary=y, slack=zero, barrier=zero, slope=upper.x)
        refuse_long_step(self, "auxiliary_step_size", oracle, lambda v: oracle.lower_y(x, v)[1], y)
        return self._inner(oracle, s, x, 0)

    def _advance(self, oracle: Oracle, s: BVFSMState) -> BVFSMState:
        none, parts = torch.zeros_like(s.gap), dict(s.residuals)
        for name in ("auxiliary", "blend"):
            parts[name] = 0.3 * parts[name]
        # slack and barrier move at every step, so that potentials say nothing: the secant alone bounds the size
        blind = replace(s, value=none, gap=none, residuals=parts)
        size, watch = self._size_in_x(oracle, blind, s.slope, none, self.upper_step_size)
        x = oracle.project(s.x_vector - size * s.slope)
        return self._inner(oracle, replace(s, watch=watch), x, int(s.iterations) + 1)

    def _inner(self, oracle: Oracle, s: BVFSMState, x: Tensor, k: int) -> BVFSMState:
        """The T steps of z, then of y inside the barrier, and what is seen there."""
        F, f = s.upper_curvature, s.lower_curvature
        c = schedule_value(self.penalty, torch.ones_like(f), Growth(10.0, power=0.5), k)
        theta = f / c**3
        scale = F * oracle.dot(s.y_vector, s.y_vector).clamp_min(1.0)  # of F
        s = replace(s, slack=scale / (F / f * c**2), barrier=scale / c)
        z, f = descend(
            oracle, lambda v: oracle.lower_y(x, v)[1] + theta * v, x, s.auxiliary, self.steps, f,
            self.auxiliary_step_size,
        )  # fmt: skip
        floor = oracle.values(x, z)[1] + theta / 2 * oracle.dot(z, z)
        y = self._inside(oracle, s, x, s.y_vector, z, floor)
        for _ in range(self.steps):
            y = self._descended(oracle, s, x, y, floor, theta, F, f)
        p = TwoPoints.at(oracle, x, y, z)
        gap = p.lower.value - floor
        multiplier = s.barrier / (s.slack - gap)
        slope = p.upper.x + multiplier * p.gap_x
        residuals = p.residuals(oracle, x, y, z, slope, multiplier)
        return replace(
            s, x_vector=x, y_vector=y, auxiliary=z, slope=slope, gap=gap, value=p.upper.value, residuals=residuals,
            error=error_of(residuals), lower_curvature=f,
        )  # fmt: skip

    def _inside(self, oracle: Oracle, s: BVFSMState, x: Tensor, y: Tensor, z: Tensor, floor: Tensor) -> Tensor:
        """The first of y, (y + z) / 2, ... with f < v + mu; z itself at last."""
        for _ in range(60):
            if bool(oracle.values(x, y)[1] - floor < 0.99 * s.slack):
                return y
            y = (y + z) / 2
        return z

    def _descended(
        self, oracle: Oracle, s: BVFSMState, x: Tensor, y: Tensor, floor: Tensor, theta: Tensor, F: Tensor, f: Tensor
    ) -> Tensor:
        """One gradient step on F + theta |y|^2 / 2 + barrier, shortened until it descends; y itself if none does."""
        upper, lower = oracle.upper(x, y), oracle.lower(x, y)
        room = s.slack - (lower.value - floor)
        multiplier = s.barrier / room
        g = upper.y + multiplier * lower.y + theta * y
        square = oracle.dot(g, g)
        bend = oracle.dot(lower.y, lower.y) * multiplier.square() / s.barrier
        size = 2 / (F + multiplier * f + bend)
        here = upper.value + theta / 2 * oracle.dot(y, y) + _barrier(s, lower.value - floor)
        noise = 10 * torch.finfo(y.dtype).eps * here.abs()  # below which values would choose by rounding
        for _ in range(30):
            trial = y - size * g
            F_new, f_new = oracle.values(x, trial)
            there = F_new + theta / 2 * oracle.dot(trial, trial) + _barrier(s, f_new - floor)
            if bool(there <= here - 1e-4 * size * square + noise):
                return trial
            size = size / 2
        return y


def _barrier(s: BVFSMState, gap: Tensor) -> Tensor:
    """-sigma log(1 - gap / mu), infinite where f is not below the regularised value plus mu."""
    room = 1 - gap / s.slack
    return torch.where(room > 0, -s.barrier * room.clamp_min(torch.finfo(room.dtype).tiny).log(), torch.inf)
