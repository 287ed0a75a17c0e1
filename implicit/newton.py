"""Newton's method with truncated conjugate gradients for the step."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.linalg import CG, LinearOperator, Status

from .batched_newton import BatchedNewtonCG
from .line_search import leave_saddle, search
from .minimizer import Minimizer, MinimizerState, Objective, Point, stuck

__all__ = ["NewtonCG", "NewtonState"]

_FORCING = 0.1  # the loosest relative residual of a Newton system


@dataclass(frozen=True, kw_only=True)
class NewtonState(MinimizerState):
    """Where NewtonCG stands.

    Attributes:
        hessian: at the newest point, along the graph of its gradient; None in a state that a result holds.
        forcing: relative residual to which the next Newton system is solved.
    """

    forcing: float
    hessian: LinearOperator | None = field(default=None, repr=False)


@dataclass(frozen=True)
class NewtonCG(Minimizer):
    """Minimise f(y) by Newton steps, H d = -grad f solved by CG only as far as it pays.

    The gradient's graph is kept for the step, so a product H v is one backward pass. CG stops at |H d + g| <= eta |g|
    with eta = min(0.1, 0.9 (|g| / |g_old|)^2), Eisenstat & Walker's choice 2, or at a tenth of the tolerance, if that
    is larger: quadratic convergence without solving far from the answer what its quadratic model cannot foresee. Each
    system starts from zero, because only then is every iterate of CG a direction of descent. Where CG meets
    curvature <= 0 along p, its iterate is followed by a step |g'p| / |p'Hp| p, doubled as long as f falls, which leaves
    saddles fast. Of the step t d, t = 1 is tried first, and f has to fall by
    1e-4 t |g'd|; where rounding hides the change of f it is computed from the slopes at both ends (approximate Wolfe).

    CONVERGED means |grad| <= max(rtol |grad(y0)|, atol), measured at x. When neither f nor |grad| can fall further the
    run ends as STAGNATED, where the slope still promises more, as LINE_SEARCH_FAILED. DIVERGED means that f is
    unbounded below, as far as the dtype can tell: give it a penalty, or its variable a bound.

    Cost of a step: one gradient with a graph, a value for each t, and the products of CG, one more than its steps.

    Args:
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in the units of the gradient.
        max_iter: limit of Newton steps; 10 to 30 are common.
        cg_max_iter: limit of products for one step; the step is then what CG has reached.
        preconditioner: symmetric positive definite operator close to the INVERSE of the Hessian.

    Raises:
        ValueError: for a negative tolerance or limit.

    Reference:
        Eisenstat & Walker 1996, Choosing the forcing terms in an inexact Newton method, equation 2.6; Dembo & Steihaug
        1983; Nocedal & Wright 2006, algorithm 7.1; Hager & Zhang 2005 for the rounding level.

    Example:
        >>> res = NewtonCG()(lambda y: (y.exp() - 2 * y).sum(), torch.zeros(2, dtype=torch.float64))
        >>> res.x, res.status.name
        (tensor([0.6931, 0.6931], dtype=torch.float64), 'CONVERGED')
    """

    max_iter: int = field(default=200, kw_only=True)
    cg_max_iter: int = 1000
    preconditioner: LinearOperator | None = None

    State: ClassVar[type[MinimizerState]] = NewtonState
    patience: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.cg_max_iter, int) or self.cg_max_iter < 1:
            raise ValueError(f"NewtonCG: cg_max_iter must be an integer >= 1, but got {self.cg_max_iter!r}.")

    def _batched(self) -> BatchedNewtonCG:
        return BatchedNewtonCG(
            owner="NewtonCG", rtol=self.rtol, atol=self.atol, max_iter=self.max_iter,
            cg_max_iter=self.cg_max_iter, preconditioner=self.preconditioner,
        )  # fmt: skip

    def _start(self, f: Objective, y: Tensor, previous: Any) -> tuple[Point, dict[str, Any]]:
        point, hessian = f.linearize(f.evaluate(y))
        return point, {"hessian": hessian, "forcing": _FORCING}

    def _release(self, s: NewtonState) -> NewtonState:
        return replace(s, hessian=None)

    def _step(self, f: Objective, s: NewtonState) -> Any:
        size = float(s.error)
        hessian = f.linearize(f.evaluate(s.point.y))[1] if s.hessian is None else s.hessian
        down = s.point.gradient / -size  # of unit length, so that no square in CG underflows
        solution = CG(s.forcing, 0.1 * float(s.tolerance) / size, self.cg_max_iter, self.preconditioner)(hessian, down)
        f.products += solution.products
        d = size * solution.x
        if solution.direction is not None:
            d = leave_saddle(f, s.point, hessian, d, solution.direction)
        slope = -size * float(torch.dot(d, down))
        if not slope < 0:  # CG came to nothing: a product was not finite, or the preconditioner is not definite
            return s.end(Status.NON_FINITE if solution.status == Status.NON_FINITE else Status.BREAKDOWN)
        taken = search(f, s.point, d, slope)
        if taken is None:
            return s.end(stuck(s.point, float(torch.linalg.vector_norm(d)), -slope))
        # their safeguard eta >= 0.9 eta_old^2 is for forcings above 1/3: below 0.1 it never binds
        forcing = min(_FORCING, 0.9 * (float(taken[0].error) / size) ** 2)
        return replace(s, point=taken[0], hessian=taken[1], forcing=forcing)
