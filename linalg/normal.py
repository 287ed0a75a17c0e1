"""Least squares, and systems without symmetry, by a symmetric solver on the normal equations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .cg import CG
from .operator import LinearOperator
from .result import Status, any_of, check_stopping, evolve, is_running, iterate, scalar_or_tensor
from .solver import LinearSolver, Solution, default_rtol

__all__ = ["Normal"]


@dataclass(frozen=True)
class NormalState:
    """Where a run stands; every tensor is per column."""

    x: Tensor
    r: Tensor  # b - A x
    g: Tensor  # A'(b - A x)
    codes: Tensor
    iterations: Tensor  # rounds
    error: Tensor
    residual_norm: Tensor
    steps: Tensor  # of the wrapped solver
    direction: Tensor
    products: int


@dataclass(frozen=True)
class Normal(LinearSolver):
    """Solve A x = b for any A of shape (m, n) by A'A x = A'b, with a solver for symmetric systems.

    For square A this is the system itself, and CONVERGED means |b - A x| <= max(rtol |b|, atol). For rectangular A it
    is least squares, from x0 = 0 the solution of minimum norm, and CONVERGED means |A'(b - A x)| <= max(rtol |A'b|,
    atol). Either is measured with A and A', never read off the wrapped solver, and `error` is what was measured;
    `residual_norm` is |b - A x| for both. The wrapped solver is called again for the correction A'A d = A'(b - A x) as
    long as that halves the error: its tolerance need not be strict. A square system without a solution is SINGULAR once
    A'r vanishes to working precision: x is then its least-squares solution, and `direction` is r.

    The condition number is SQUARED: above 1e7 in float64 (3e3 in float32) nothing is left of the small singular values.
    Prefer MINRES for symmetric, GMRES for nonsymmetric square A.

    Cost: 2 products (with A and with A') a step of the wrapped solver and a round.

    Args:
        solver: for A'A, which is symmetric and positive semidefinite.
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in units of b (square A) or A'b (rectangular A).
        rounds: limit of calls of the wrapped solver.

    Raises:
        TypeError: if solver is not a LinearSolver.
        ValueError: for a negative tolerance or limit.

    Reference:
        Hestenes & Stiefel 1952, section 10; Bjorck, Numerical Methods for Least Squares Problems, 1996.

    Example:
        >>> from nestopt.linalg import CG, Dense, Normal
        >>> A = Dense(torch.tensor([[1.0], [1.0]], dtype=torch.float64))
        >>> sol = Normal(CG())(A, torch.tensor([1.0, 3.0], dtype=torch.float64))
        >>> sol.x, sol.status.name, round(sol.residual_norm, 8)
        (tensor([2.], dtype=torch.float64), 'CONVERGED', 1.41421356)
    """

    solver: LinearSolver = CG()
    rtol: float | None = None
    atol: float = 0.0
    rounds: int = 10

    needs_square: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_stopping("Normal", self.rtol, self.atol, self.rounds)
        if not isinstance(self.solver, LinearSolver):
            raise TypeError(f"Normal: solver must be a LinearSolver, but got {self.solver!r}; use e.g. Normal(CG()).")

    def _solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None) -> Solution:
        adjoint = A.T
        target = adjoint._matvec(b)
        size = A.norm(b)
        rtol = default_rtol(A.dtype) if self.rtol is None else self.rtol
        square = A.shape[-1] == A.shape[-2]
        tolerance = (rtol * (size if square else A.norm(target))).clamp_min(self.atol)
        slope = torch.where(size > 0, A.norm(target) / size, 0)  # a lower bound of |A|
        x = torch.zeros_like(target) if x0 is None else torch.where((A.norm(target) == 0)[..., None], 0, x0)
        zero = torch.zeros_like(size, dtype=torch.int64)
        blank = torch.zeros_like(size)
        s = NormalState(x, b, target, zero, zero, blank, size, zero, torch.zeros_like(target), size.numel())
        s = self._measure(A, b, s, slope)
        codes = torch.where(s.error <= tolerance, Status.CONVERGED.code, s.codes)
        codes = torch.where(s.error < torch.inf, codes, Status.NON_FINITE.code)
        s = iterate(lambda s: self._round(A, b, s, slope, tolerance), evolve(s, codes=codes), max_iter=self.rounds)
        named = (s.codes == Status.SINGULAR.code) | (s.codes == Status.NEGATIVE_CURVATURE.code)
        return Solution(
            x=s.x, codes=s.codes, iterations=scalar_or_tensor(s.steps), error=scalar_or_tensor(s.error), state=s,
            residual_norm=scalar_or_tensor(s.residual_norm), tolerance=scalar_or_tensor(tolerance), products=s.products,
            direction=torch.where(named[..., None], s.direction, 0) if any_of(named) else None,
        )  # fmt: skip

    def _measure(self, A: LinearOperator, b: Tensor, s: NormalState, slope: Tensor) -> NormalState:
        """The state with what is true at its x."""
        r, bound = A.certified_residual(s.x, b)
        g, gradient_bound = A.T.certified_residual(r, torch.zeros_like(s.x))  # -A'r
        error = bound
        if A.shape[-1] != A.shape[-2]:  # what rounding hides of r, A' may enlarge
            error = gradient_bound + (bound - A.norm(r)).clamp_min(0) * slope
        products = s.products + (A.certification_products + A.T.certification_products) * error.numel()
        return evolve(s, r=r, g=-g, error=error, residual_norm=bound, products=products)

    def _round(self, A: LinearOperator, b: Tensor, s: NormalState, slope: Tensor, tolerance: Tensor) -> NormalState:
        """Correct x by the wrapped solver, and measure again."""
        running = is_running(s.codes)
        gram = A.T @ A
        inner = self.solver(gram, torch.where(running[..., None], s.g, 0))
        step = torch.where(running[..., None], inner.x, 0)
        steps = s.steps + torch.as_tensor(inner.iterations, device=s.steps.device)
        new = self._measure(A, b, evolve(s, x=s.x + step, steps=steps, products=s.products + 2 * inner.products), slope)
        better = new.error < s.error
        x = torch.where(better[..., None], new.x, s.x)
        new = evolve(
            new, x=x, r=torch.where(better[..., None], new.r, s.r), g=torch.where(better[..., None], new.g, s.g),
            error=torch.where(better | ~torch.isfinite(new.error), new.error, s.error),
            residual_norm=torch.where(better, new.residual_norm, s.residual_norm),
        )  # fmt: skip

        # where a round no longer halves the error there is nothing more to gain, and the wrapped solver knows why
        # (or at its own limit, which is a limit of all steps)
        ended = torch.where(inner.codes == Status.CONVERGED.code, Status.STAGNATED.code, inner.codes)
        spent = inner.codes == Status.MAX_ITER.code
        stuck = running & (spent | ~(new.error <= 0.5 * s.error)) & torch.isfinite(new.error)
        size = A.norm(new.r)
        direction = inner_direction = torch.zeros_like(s.direction) if inner.direction is None else inner.direction
        if A.shape[-1] == A.shape[-2]:
            blocked = ~spent & (A.norm(new.g) <= torch.finfo(A.dtype).eps ** 0.5 * slope * size)  # A'r = 0
            ended = torch.where(blocked, Status.SINGULAR.code, ended)
            direction = torch.where((blocked & (size > 0))[..., None], new.r / size[..., None], inner_direction)
        codes = torch.where(stuck, ended, s.codes)
        codes = torch.where(running & (new.error <= tolerance), Status.CONVERGED.code, codes)
        return evolve(new, codes=codes, direction=torch.where(stuck[..., None], direction, s.direction))
