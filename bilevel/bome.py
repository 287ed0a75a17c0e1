"""BOME: bilevel optimisation made easy, by dynamic barrier gradient descent."""

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
from .penalty_steps import TwoPoints, descend, refuse_long_step
from .value_difference import ValueDifference
from .watched import WatchedMethod, WatchedState

__all__ = ["BOME", "BOMEState"]


@dataclass(frozen=True, kw_only=True)
class BOMEState(WatchedState):
    """Where BOME stands; its gap is q.

    Attributes:
        auxiliary: the point after T descent steps from y, raveled.
        penalty: the multiplier lambda.
        slope: F_x + lambda q_x.
        slope_y: F_y + lambda q_y.
    """

    auxiliary: Tensor
    penalty: Tensor
    slope: Tensor
    slope_y: Tensor


@dataclass(frozen=True)
class BOME(WatchedMethod):
    """Dynamic barrier descent on F subject to q(x, y) = f(x, y) - f(x, y_T) <= 0.

    One step, with y_T the point after T gradient steps on f(x, .) from y, taken as a constant:

        (x, y) <- (x, y) - a (grad F + lambda grad q),
        lambda = max(eta - <grad F, grad q> / |grad q|^2, 0),

    the direction nearest to grad F along which q falls at the rate eta |grad q|^2 at least. The published method has
    one size a. Without one, it runs in variables scaled so that a = 1: x by a size as in F2SA, y by
    1 / (L_F + lambda L_f); the inner products are those of these variables.

    `error` is the largest of: lower |f_y| at y, which carries the bias; auxiliary lambda |f_y| at y_T;
    blend |F_y + lambda f_y|; upper |P_X(x - slope) - x|; then the second stage's. CONVERGED
    means error <= max(rtol (|F_x| + |F_y|), atol) with the scale taken at the start.

    Cost of a step: one gradient of F and 2 + T of f, no product.

    Args:
        steps: T, of which the published figures use 10.
        rate: eta, in (0, 1]; 0.5 is the paper's.
        step_size: a for x and y, below 2 / L_F, or it is refused; None watches.
        auxiliary_step_size: of the T steps, below 2 / L_f, or it is refused; None watches.
        debias: the second stage: ValueDifference() (first order), AID() (products), None for the bare method.
        stopping: of the first stage: rtol None is 1e-7 in float64 and 1e-3 in lower precision.

    Raises:
        ValueError: for numbers that are not positive.

    Reference:
        Ye, Liu, Wright, Stone & Liu 2022, algorithm 1 with the control barrier phi = eta |grad q|^2.

    Example:
        >>> from nestopt import bilevel
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y: ((y - 1) ** 2).sum(), lower=lambda x, y: ((y - x) ** 2).sum() + 0.5 * (y**2).sum()
        ... )
        >>> start = torch.zeros(2, dtype=torch.float64)
        >>> res = BOME()(problem, start, start.clone())
        >>> res.status.name, [round(v, 5) for v in res.x.tolist()]
        ('CONVERGED', [1.5, 1.5])
    """

    steps: int = 10
    rate: float = 0.5
    step_size: float | None = None
    auxiliary_step_size: float | None = None
    debias: Method | None = ValueDifference()
    stopping: Stopping = Stopping(rtol=None, max_iter=50)

    State: ClassVar[type[MethodState]] = BOMEState
    assumptions: ClassVar[Assumptions] = Assumptions("penalty", "Ye et al. 2022", unique=False)

    def __post_init__(self) -> None:
        refuse_sizes(self, "steps", "rate", "step_size", "auxiliary_step_size")

    def _first(self, oracle: Oracle, upper: Slopes, shared: dict[str, Any]) -> BOMEState:
        x, y, seen = shared["x_vector"], shared["y_vector"], shared["upper_curvature"] / shared["lower_curvature"]
        s = BOMEState(**shared, auxiliary=y, penalty=10 * seen, slope=upper.x, slope_y=upper.y)
        refuse_long_step(self, "step_size", oracle, lambda v: oracle.upper(x, v).y, y)
        refuse_long_step(self, "auxiliary_step_size", oracle, lambda v: oracle.lower_y(x, v)[1], y)
        return self._look(oracle, s, x, y)

    def _advance(self, oracle: Oracle, s: BOMEState) -> BOMEState:
        size, watch = self._size_in_x(oracle, s, s.slope, s.penalty, self.step_size)
        size_y = self._size_in_y(s)
        x = oracle.project(s.x_vector - size * s.slope)
        return self._look(oracle, replace(s, watch=watch), x, s.y_vector - size_y * s.slope_y)

    def _look(self, oracle: Oracle, s: BOMEState, x: Tensor, y: Tensor) -> BOMEState:
        """The T steps from y, the multiplier, and what is seen there."""
        below, f = descend(
            oracle, lambda v: oracle.lower_y(x, v)[1], x, y, self.steps, s.lower_curvature, self.auxiliary_step_size
        )
        p = TwoPoints.at(oracle, x, y, below)
        size_y = self._size_in_y(s)
        size = s.watch.size if self.step_size is None else size_y
        along = size * oracle.dot(p.upper.x, p.gap_x) + size_y * oracle.dot(p.upper.y, p.lower.y)
        square = size * oracle.dot(p.gap_x, p.gap_x) + size_y * oracle.dot(p.lower.y, p.lower.y)
        lam = torch.where(square > 0, (self.rate - along / square).clamp_min(0.0), torch.zeros_like(square))
        tiny = torch.finfo(x.dtype).eps ** 0.5 * s.upper_curvature / s.lower_curvature  # lambda = 0 leaves F_y alone
        slope, slope_y = p.upper.x + lam * p.gap_x, p.upper.y + lam * p.lower.y
        residuals = p.residuals(oracle, x, y, below, slope, lam.clamp_min(tiny))
        return replace(
            s, x_vector=x, y_vector=y, auxiliary=below, penalty=lam, slope=slope, slope_y=slope_y, gap=p.gap,
            value=p.upper.value, residuals=residuals, error=error_of(residuals), lower_curvature=f,
        )  # fmt: skip

    def _size_in_y(self, s: BOMEState) -> Tensor:
        if self.step_size is not None:
            return torch.full_like(s.penalty, self.step_size)
        return 1 / (s.upper_curvature + s.penalty * s.lower_curvature)
