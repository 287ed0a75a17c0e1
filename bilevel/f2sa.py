"""F2SA: the fully first-order method, two lower problems in place of a Hessian."""

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
from .watched import WatchedMethod, WatchedState, shrunk

__all__ = ["F2SA", "F2SAState"]


@dataclass(frozen=True, kw_only=True)
class F2SAState(WatchedState):
    """Where F2SA stands.

    Attributes:
        auxiliary: z, raveled.
        penalty: lambda.
        slope: F_x + lambda (f_x(x, y) - f_x(x, z)).
    """

    auxiliary: Tensor
    penalty: Tensor
    slope: Tensor


@dataclass(frozen=True)
class F2SA(WatchedMethod):
    """Fully first-order (stochastic) approximation: descent on F(x, y) + lambda (f(x, y) - min over z of f(x, z)).

    One step, with lambda growing:

        x <- P_X(x - s (F_x(x, y) + lambda (f_x(x, y) - f_x(x, z)))),
        T times   z <- z - b f_y(x, z)   and   y <- y - a (F_y(x, y) / lambda + f_y(x, y)).

    The step in y is that of F + lambda f with its size divided by lambda, and a, b = O(1) against a small s make two
    time scales, without which it does not work. Without sizes a and b are 1 / (the curvature seen so far), and x moves
    where y and z have nearly settled: s is halved if F + lambda (f(x, y) - f(x, z)) has risen since the last move, else
    doubled, below |dx| / |change of the slope|. With data (minibatches; pass debias=None) nothing is watched, and
    automatic sizes shrink like (1 + k/100)^(-1/2).

    `error` is the largest of: lower |f_y| at y, which is |F_y| / lambda once y has settled and so carries the bias;
    auxiliary lambda |f_y| at z and blend |F_y + lambda f_y|, which enter the slope; upper
    |P_X(x - slope) - x|; then the second stage's. CONVERGED means error <= max(rtol (|F_x| + |F_y|), atol) with the
    scale taken at the start.

    Cost of a step: 1 + T gradients of F and 2 + 2 T of f, no product. It touches the problem through its Oracle only.

    Args:
        steps: T; 1 suffices for well-conditioned lower levels, 10 is safe.
        penalty: lambda: a number, a schedule k -> lambda such as Growth(1.0, slope=0.1), or None for
            (10 + k) (curvature of F) / (curvature of f).
        upper_step_size: s, well below a / 10; None watches.
        lower_step_size: a, below 2 / (L_f + L_F / lambda), or it is refused; None watches.
        auxiliary_step_size: b, below 2 / L_f, or it is refused; None watches.
        debias: the second stage: ValueDifference() (first order), AID() (products), None for the bare method.
        stopping: of the first stage: rtol None is 1e-7 in float64 and 1e-3 in lower precision. Raise max_iter with
            debias=None: the bias falls like 1 / lambda.

    Raises:
        ValueError: for sizes or steps that are not positive.

    Reference:
        Kwon, Kwon, Wright & Nowak 2023, algorithm 1.

    Example:
        >>> from nestopt import bilevel
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y: ((y - 1) ** 2).sum(), lower=lambda x, y: ((y - x) ** 2).sum() + 0.5 * (y**2).sum()
        ... )
        >>> start = torch.zeros(2, dtype=torch.float64)
        >>> res = F2SA()(problem, start, start.clone())
        >>> res.status.name, [round(v, 5) for v in res.x.tolist()]
        ('CONVERGED', [1.5, 1.5])
    """

    steps: int = 10
    penalty: float | Schedule | None = None
    upper_step_size: float | None = None
    lower_step_size: float | None = None
    auxiliary_step_size: float | None = None
    debias: Method | None = ValueDifference()
    stopping: Stopping = Stopping(rtol=None, max_iter=50)

    State: ClassVar[type[MethodState]] = F2SAState
    assumptions: ClassVar[Assumptions] = Assumptions("penalty", "Kwon et al. 2023", stochastic=True)

    def __post_init__(self) -> None:
        refuse_sizes(self, "steps", "penalty", "upper_step_size", "lower_step_size", "auxiliary_step_size")

    def _first(self, oracle: Oracle, upper: Slopes, shared: dict[str, Any]) -> F2SAState:
        x, y = shared["x_vector"], shared["y_vector"]
        s = F2SAState(**shared, auxiliary=y, penalty=shared["gap"], slope=upper.x)
        lam = self._penalty(s, 0)
        refuse_long_step(self, "auxiliary_step_size", oracle, lambda v: oracle.lower_y(x, v)[1], y)
        refuse_long_step(
            self, "lower_step_size", oracle, lambda v: oracle.weighted(x, v, upper=1 / lam, lower=1.0).y, y
        )
        return self._inner(oracle, s, x, 0)

    def _advance(self, oracle: Oracle, s: F2SAState) -> F2SAState:
        size, watch = self._size_in_x(oracle, s, s.slope, s.penalty, self.upper_step_size)
        x = oracle.project(s.x_vector - size * s.slope)
        return self._inner(oracle, replace(s, watch=watch), x, int(s.iterations) + 1)

    def _inner(self, oracle: Oracle, s: F2SAState, x: Tensor, k: int) -> F2SAState:
        """T steps of z and y at the new x, and what is seen there."""
        f, F, factor = s.lower_curvature, s.upper_curvature, shrunk(oracle, s)
        lam = self._penalty(s, k)
        a, b = self.lower_step_size, self.auxiliary_step_size
        b_size = factor / f if b is None and factor < 1 else b
        z, f = descend(oracle, lambda v: oracle.lower_y(x, v)[1], x, s.auxiliary, self.steps, f, b_size)
        blend = f + F / lam
        y, seen = descend(
            oracle, lambda v: oracle.weighted(x, v, upper=1 / lam, lower=1.0).y, x, s.y_vector, self.steps, blend,
            factor / blend if a is None and factor < 1 else a,
        )  # fmt: skip
        p = TwoPoints.at(oracle, x, y, z)
        slope = p.upper.x + lam * p.gap_x
        residuals = p.residuals(oracle, x, y, z, slope, lam)
        return replace(
            s, x_vector=x, y_vector=y, auxiliary=z, penalty=lam, slope=slope, gap=p.gap, value=p.upper.value,
            residuals=residuals, error=error_of(residuals), lower_curvature=torch.maximum(f, seen - F / lam),
        )  # fmt: skip

    def _penalty(self, s: F2SAState, k: int) -> Tensor:
        return schedule_value(self.penalty, s.curvatures.unit, Growth(10.0, slope=1.0), k)
