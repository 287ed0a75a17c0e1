"""MEHA: the Moreau envelope in place of the lower value function, single loop and free of Hessians."""

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
from .watched import WatchedMethod, WatchedState

__all__ = ["MEHA", "MEHAState"]

# (alpha, beta, eta, gamma, c0, p), as seen to work
_PUBLISHED = {
    "elastic net": (1e-3, 1e-5, 1e-5, 2.0, 1e-2, 0.1),
    "sparse group lasso": (1e-4, 1e-3, 1e-3, 1.0, 1.0, 0.49),
    "low-rank completion": (1e-4, 1e-4, 1e-4, 10.0, 2.0, 0.48),
}


@dataclass(frozen=True, kw_only=True)
class MEHAState(WatchedState):
    """Where MEHA stands; its gap is f + h at y, less f + h + |theta - y|^2 / (2 gamma) at theta.

    Attributes:
        auxiliary: theta, raveled.
        penalty: c.
        upper_slopes: F_x at (x, y).
        lower_slopes: f_x + h_x at (x, y).
    """

    auxiliary: Tensor
    penalty: Tensor
    upper_slopes: Tensor
    lower_slopes: Tensor


@dataclass(frozen=True)
class MEHA(WatchedMethod):
    """Moreau-envelope based Hessian-free method, for f weakly convex in y plus a term h(x, y) with a prox.

    The lower level is replaced by f + h - v <= 0 with the envelope v(x, y) = min over theta of f(x, theta) +
    h(x, theta) + |theta - y|^2 / (2 gamma), and the penalised problem F / c + f + h - v is descended, one step each:

        theta+ = prox_(eta h(x, .))(theta - eta (f_y(x, theta) + (theta - y) / gamma))
        x+ = P_X(x - alpha (F_x(x, y) / c + f_x(x, y) + h_x(x, y) - f_x(x, theta+) - h_x(x, theta+)))
        y+ = prox_(beta h(x+, .))(y - beta (F_y(x+, y) / c + f_y(x+, y) - (y - theta+) / gamma))

    with c = c_k growing: F is DIVIDED by it, and the threshold of a prox is eta times the weight. Where no size is
    given, eta and beta are 1 / (Lipschitz constant of their slope), raised when steps see more, and x moves
    where theta and y have nearly settled: alpha is halved if F + c (f + h - v) has risen since the last move, else
    doubled, below |dx| / |change of the slope|. The lower solution need not be unique: F selects among them.

    `error` is the largest of: lower, the prox residual of f + h at y, which carries the bias O(1/c); auxiliary, c
    times that of theta's problem; blend, c times that of y's; upper, |P_X(x - slope) - x|; then the second stage's.
    CONVERGED means error <= max(rtol (|F_x| + |F_y|), atol) with the scale taken at the start.

    Cost of a step: two gradients of F, five of f and two proxes; no product.

    Args:
        penalty: c: a schedule k -> c such as Growth(c0, power=p) with 0 <= p < 1/2, a number, or None for
            Growth(10, power=0.49) times (curvature of F) / (curvature of f).
        gamma: below 1 / (2 rho) for a rho-weakly convex f; None for 1 / (2 L_f), which is below it. A convex f allows
            any gamma, and is faster with a large one: 10 / L_f and more.
        upper_step_size: alpha; None watches.
        lower_step_size: beta, below 2 / (L_f + 1 / gamma + L_F / c); None watches.
        auxiliary_step_size: eta, below 2 / (L_f + 1 / gamma), or it is refused where h is zero; None watches.
        debias: the second stage: ValueDifference() (first order), AID() (products), None for the bare method.
        stopping: of the first stage: rtol None is 1e-7 in float64 and 1e-3 in lower precision. Raise max_iter with
            debias=None, to tens of thousands.

    Raises:
        ValueError: for sizes that are not positive.

    Reference:
        Liu, Liu, Yao, Zeng & Zhang 2024 (ICML), algorithm 1.

    Example:
        >>> from nestopt import bilevel
        >>> from nestopt.constrained import L1
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y: ((y - 1) ** 2).sum(), lower=lambda x, y: ((y - 3) ** 2).sum() / 2,
        ...     lower_prox=lambda x: L1(x.exp()),
        ... )
        >>> res = MEHA()(problem, torch.zeros((), dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
        >>> res.status.name, round(float(res.x.exp()), 5), [round(v, 5) for v in res.y.tolist()]
        ('CONVERGED', 2.0, [1.0, 1.0])
    """

    penalty: float | Schedule | None = None
    gamma: float | None = None
    upper_step_size: float | None = None
    lower_step_size: float | None = None
    auxiliary_step_size: float | None = None
    debias: Method | None = ValueDifference()
    stopping: Stopping = Stopping(rtol=None, max_iter=100)

    State: ClassVar[type[MethodState]] = MEHAState
    assumptions: ClassVar[Assumptions] = Assumptions(
        "penalty", "Liu et al. 2024", lower_set=True, lower_prox=True, unique=False
    )

    def __post_init__(self) -> None:
        refuse_sizes(self, "penalty", "gamma", "upper_step_size", "lower_step_size", "auxiliary_step_size")

    @classmethod
    def published(cls, name: str, debias: Method | None = None, max_iter: int = 10_000) -> MEHA:
        """The constants of the paper's experiments.

        Args:
            name: "elastic net", "sparse group lasso" or "low-rank completion".
            debias: as of the class; the paper has none.
            max_iter: steps.

        Returns:
            The method.

        Raises:
            ValueError: for another name.

        Example:
            >>> MEHA.published("elastic net").gamma
            2.0
        """
        if name not in _PUBLISHED:
            raise ValueError(
                f"MEHA.published: name must be one of {', '.join(map(repr, _PUBLISHED))}, but got {name!r}."
            )
        alpha, beta, eta, gamma, c0, p = _PUBLISHED[name]
        return cls(Growth(c0, power=p), gamma, alpha, beta, eta, debias, Stopping(rtol=None, max_iter=max_iter))

    def _first(self, oracle: Oracle, upper: Slopes, shared: dict[str, Any]) -> MEHAState:
        x, y = shared["x_vector"], shared["y_vector"]
        s = MEHAState(**shared, auxiliary=y, penalty=shared["gap"], upper_slopes=upper.x, lower_slopes=x)
        gamma = self._gamma(s)
        if not oracle.nonsmooth.present:
            refuse_long_step(self, "auxiliary_step_size", oracle, lambda v: oracle.lower_y(x, v)[1] + v / gamma, y)
        return self._measured(oracle, s, x, y, y, 0)

    def _advance(self, oracle: Oracle, s: MEHAState) -> MEHAState:
        x, y, c, gamma = s.x_vector, s.y_vector, s.penalty, self._gamma(s)
        f, F = s.lower_curvature, s.upper_curvature
        eta = self._size(self.auxiliary_step_size, 1 / (f + 1 / gamma))
        beta = self._size(self.lower_step_size, 1 / (f + 1 / gamma + F / c))
        first = oracle.lower_y(x, s.auxiliary)[1]
        theta = oracle.prox(s.auxiliary - eta * (first + (s.auxiliary - y) / gamma), eta, x)
        there = oracle.lower(x, theta)
        f = raised(f, secant(oracle, there.y - first, theta - s.auxiliary, theta))
        slope = s.upper_slopes / c + s.lower_slopes - there.x - oracle.term_x(x, theta)
        size, watch = self._size_in_x(oracle, s, c * slope, c, self.upper_step_size)
        alpha = size if self.upper_step_size is not None else c * size
        x = oracle.project(x - alpha * slope)
        blend = oracle.weighted(x, y, upper=1 / c, lower=1.0)
        y = oracle.prox(y - beta * (blend.y - (y - theta) / gamma), beta, x)
        return self._measured(oracle, replace(s, lower_curvature=f, watch=watch), x, y, theta, int(s.iterations) + 1)

    def _measured(self, oracle: Oracle, s: MEHAState, x: Tensor, y: Tensor, theta: Tensor, k: int) -> MEHAState:
        c = schedule_value(self.penalty, s.curvatures.unit, Growth(10.0, power=0.49), k)
        gamma = self._gamma(s)
        p, pull = TwoPoints.at(oracle, x, y, theta), (y - theta) / gamma
        slope = p.upper.x + c * p.gap_x
        residuals = p.residuals(oracle, x, y, theta, slope, c)
        residuals["auxiliary"] = c * oracle.lower_residual(x, theta, p.auxiliary.y - pull)
        residuals["blend"] = c * oracle.lower_residual(x, y, p.upper.y / c + p.lower.y - pull)
        return replace(
            s, x_vector=x, y_vector=y, auxiliary=theta, penalty=c, upper_slopes=p.upper.x,
            lower_slopes=p.lower.x + oracle.term_x(x, y), gap=p.gap - gamma / 2 * oracle.dot(pull, pull),
            value=p.upper.value, residuals=residuals, error=error_of(residuals),
        )  # fmt: skip

    def _gamma(self, s: Any) -> Tensor:
        return 0.5 / s.lower_curvature if self.gamma is None else torch.full_like(s.lower_curvature, self.gamma)

    def _size(self, given: float | None, automatic: Tensor) -> Tensor:
        return automatic if given is None else torch.full_like(automatic, given)
