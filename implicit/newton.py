"""Newton's method with truncated conjugate gradients for the step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.linalg import CG, LinearOperator, Status

from .minimizer import ARMIJO, Minimizer, MinimizerState, Objective, Point, Trial, shorter_step, stuck

__all__ = ["NewtonCG", "NewtonState"]


@dataclass(frozen=True, kw_only=True)
class NewtonState(MinimizerState):
    """Where NewtonCG stands.

    Attributes:
        hessian: at the newest point, along the graph of its gradient; None in a state that a result holds.
    """

    hessian: LinearOperator | None = field(default=None, repr=False)


@dataclass(frozen=True)
class NewtonCG(Minimizer):
    """Minimise f(y) by Newton steps, H d = -grad f solved by CG only as far as it pays.

    The gradient's graph is kept for the step, so a product H v is one backward pass. CG stops at
    |H d + g| <= min(1/2, sqrt(|g| / |g0|)) |g| (at a tenth of the tolerance, if that is larger), which makes the
    convergence superlinear. Where it meets curvature <= 0 along p, its iterate is followed by a step |g'p| / |p'Hp| p,
    doubled as long as f falls, which leaves saddles fast. Of the step t d, t = 1 is tried first, and f has to fall by
    1e-4 t |g'd|; where rounding hides the change of f it is computed from the slopes at both ends (approximate Wolfe).

    CONVERGED means |grad| <= max(rtol |grad(y0)|, atol), measured at x. When neither f nor |grad| can fall further the
    run ends as STAGNATED, where the slope still promises more, as LINE_SEARCH_FAILED; f unbounded below is DIVERGED.

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
        Dembo & Steihaug 1983; Nocedal & Wright 2006, algorithm 7.1; Hager & Zhang 2005 for the rounding level.

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

    def _start(self, f: Objective, trial: Trial, previous: Any) -> tuple[Point, dict[str, Any]]:
        point, hessian = f.linearize(trial)
        return point, {"hessian": hessian}

    def _release(self, s: NewtonState) -> NewtonState:
        return replace(s, hessian=None)

    def _step(self, f: Objective, s: NewtonState) -> Any:
        size = float(s.error)
        hessian = f.linearize(f.evaluate(s.point.y))[1] if s.hessian is None else s.hessian
        down = s.point.gradient / -size  # of unit length, so that no square in CG underflows
        forcing = min(0.5, math.sqrt(size / float(s.scale)))
        solution = CG(forcing, 0.1 * float(s.tolerance) / size, self.cg_max_iter, self.preconditioner)(hessian, down)
        f.products += solution.products
        d = size * solution.x
        if solution.direction is not None:
            d = _leave(f, s.point, hessian, d, solution.direction, down)
        slope = -size * float(torch.dot(d, down))
        if not slope < 0:  # CG came to nothing: a product was not finite, or the preconditioner is not definite
            return s.end(Status.NON_FINITE if solution.status == Status.NON_FINITE else Status.BREAKDOWN)
        taken = _search(f, s.point, d, slope)
        if taken is None:
            return s.end(stuck(s.point, float(torch.linalg.vector_norm(d)), -slope))
        return replace(s, point=taken[0], hessian=taken[1])


def _leave(f: Objective, point: Point, hessian: LinearOperator, d: Tensor, p: Tensor, down: Tensor) -> Tensor:
    """The step d of CG and, from there, along the direction p of curvature <= 0 as far as doubled steps lower f."""
    f.products += 1
    bend = abs(float(torch.dot(p, hessian @ p)))
    limit = max(1.0, float(torch.linalg.vector_norm(point.y))) / float(torch.linalg.vector_norm(p))
    newton = float(point.error * torch.dot(p, down)) / bend if bend > 0 else limit  # as if the curvature were |p'Hp|
    step = min(newton, limit) * p
    moving = bool(d.any())
    value = f.evaluate(point.y + d).value if moving else point.value
    for _ in range(20):
        trial = f.evaluate(point.y + d + step)
        if not trial.value < value:
            break
        d, step, value, moving = d + step, 2 * step, trial.value, True
    return d if moving else step


def _search(f: Objective, point: Point, d: Tensor, slope: float) -> tuple[Point, LinearOperator] | None:
    """The point y + t d that is taken, with its Hessian; None when there is none."""
    t = 1.0
    for _ in range(40):
        trial = f.evaluate(point.y + t * d)
        rise = trial.value - point.value
        if rise <= ARMIJO * t * slope and -rise > point.flat:
            return f.linearize(trial)
        if abs(rise) <= point.flat and -slope <= 10 * point.flat:  # rounding: the slopes at both ends judge
            new = f.linearize(trial)
            if point.trapezoid(new[0]) <= ARMIJO * t * slope:
                return new
        if -t * slope <= point.flat:
            return None
        t = shorter_step(t, slope, rise)
    return None
