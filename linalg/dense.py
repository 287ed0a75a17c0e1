"""Direct solves of operators small enough to be materialised."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .operator import LinearOperator
from .result import Status, any_of, check_stopping, scalar_or_tensor
from .solver import LinearSolver, Prepared, Solution, default_rtol, measure

__all__ = ["LU", "Cholesky", "Direct", "Factored", "by_columns", "faults_of"]


@dataclass(frozen=True)
class Factored(Prepared):
    """A factorisation kept for many solves with A and A'; a solve costs only the products that certify it."""

    matrix: Tensor
    factors: tuple[Tensor, ...]
    faults: Tensor
    strength: Tensor

    def solve(self, b: Tensor, x0: Tensor | None = None) -> Solution:
        """Solve A x = b by the kept factors; x0 is not needed and not used."""
        return self._solve(b, x0, transposed=False)

    def solve_transposed(self, b: Tensor, x0: Tensor | None = None) -> Solution:
        """Solve A' x = b by the kept factors; x0 is not needed and not used."""
        return self._solve(b, x0, transposed=True)

    def estimate(self, b: Tensor) -> Tensor:
        """A^{-1} b by the factors alone, neither refined nor verified; NaN where the factorisation failed."""
        with torch.no_grad():
            x: Tensor = self.solver._columns(self, b, False)  # type: ignore[attr-defined]
            return torch.where((self.faults == Status.RUNNING.code)[..., None], x, torch.nan)

    def _solve(self, b: Tensor, x0: Tensor | None, transposed: bool) -> Solution:
        self.solver._check(self.operator, b, x0)
        with torch.no_grad():
            return self.solver._substitute(self, b.detach(), transposed)  # type: ignore[attr-defined, no-any-return]


@dataclass(frozen=True)
class Direct(LinearSolver):
    """A solver that factorises the materialised matrix; it writes `_factorise` and `_back`."""

    rtol: float | None = None
    atol: float = 0.0
    refinements: int = 2

    def __post_init__(self) -> None:
        check_stopping(type(self).__name__, self.rtol, self.atol, self.refinements)

    def _solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None) -> Solution:
        solution = self._substitute(self.prepare(A), b, transposed=False)
        return replace(solution, products=solution.products + A.shape[-1] * A.batch_shape.numel())

    def prepare(self, A: LinearOperator) -> Factored:
        """Materialise A by n products and factorise it.

        Args:
            A: square operator, of shape (*batch, n, n).

        Returns:
            The factors, with solve and solve_transposed.
        """
        self._check_operator(A)
        with torch.no_grad():
            matrix = A.to_dense().detach()
            return Factored(self, A, matrix, *self._factorise(matrix))

    @abstractmethod
    def _factorise(self, matrix: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """The factors, and for each matrix a code and the strength of its weakest pivot."""

    @abstractmethod
    def _back(self, factors: tuple[Tensor, ...], b: Tensor, transposed: bool) -> Tensor:
        """The columns of A^-1 b or A'^-1 b, of shape (*batch, n, columns)."""

    def _substitute(self, f: Factored, b: Tensor, transposed: bool) -> Solution:
        A = f.operator.T if transposed else f.operator
        rtol = default_rtol(A.dtype) if self.rtol is None else self.rtol
        tolerance = (rtol * A.norm(b)).clamp_min(self.atol)
        x = self._columns(f, b, transposed)
        residual, error = A.certified_residual(x, b)
        products = error.numel() * A.certification_products
        faults = f.faults.expand(error.shape)
        ok = faults == Status.RUNNING.code
        iterations = torch.zeros_like(error, dtype=torch.int64)
        for _ in range(self.refinements):
            again = ok & (error > tolerance) & torch.isfinite(error)
            if not any_of(again):
                break
            trial = torch.where(again[..., None], x + self._columns(f, residual, transposed), x)
            fresh, size, spent = measure(A, trial, b, again)
            better = again & (size < error)
            x = torch.where(better[..., None], trial, x)
            residual = torch.where(better[..., None], fresh, residual)
            error = torch.where(better, size, error)
            iterations, products = iterations + again, products + spent
        zero = A.norm(b) == 0
        x = torch.where(zero[..., None], 0, x)
        error = torch.where(zero, 0, error)
        codes = torch.where(error <= tolerance, Status.CONVERGED.code, Status.STAGNATED.code)
        # a weak pivot is no proof of a singular matrix, but a residual that it spoiled is
        spoiled = (f.strength.expand(error.shape) <= 100) & (codes == Status.STAGNATED.code)
        codes = torch.where(spoiled, Status.SINGULAR.code, codes)
        codes = torch.where(torch.isfinite(error), codes, Status.NON_FINITE.code)
        named = ~ok & ~(zero & (faults != Status.NON_FINITE.code))
        codes = torch.where(named, faults, codes)
        # a failed factorisation has no solution to offer: x is NaN, and says so
        x = torch.where(named[..., None], torch.nan, x)
        error = torch.where(named, torch.nan, error)
        return Solution(
            x=x, codes=codes, iterations=scalar_or_tensor(iterations), error=scalar_or_tensor(error),
            residual_norm=scalar_or_tensor(error), tolerance=scalar_or_tensor(tolerance), products=products,
        )  # fmt: skip

    def _columns(self, f: Factored, b: Tensor, transposed: bool) -> Tensor:
        return by_columns(lambda columns: self._back(f.factors, columns, transposed), b, f.operator.batch_shape)


def by_columns(solve: Callable[[Tensor], Tensor], b: Tensor, batch: torch.Size) -> Tensor:
    """Hand many right-hand sides to `solve` as the columns of one matrix a system.

    Args:
        solve: maps (*batch, n, columns) to the same shape.
        b: shape (*sides, *batch, n).
        batch: of systems.

    Returns:
        The solution, of b's shape.
    """
    sides = b.ndim - 1 - len(batch)
    columns = b.flatten(0, sides - 1).movedim(0, -1) if sides else b[..., None]
    x = solve(columns)
    return x.movedim(-1, 0).reshape(b.shape) if sides else x[..., 0]


def _strength(pivots: Tensor, summands: Tensor) -> Tensor:
    """The weakest pivot of each matrix, in units of the rounding of what it was summed from; infinite for n = 0."""
    # Comparing a pivot with its own summands, not with the largest pivot, makes this independent of scaling.
    n = pivots.shape[-1]
    if not n:
        return pivots.new_full(pivots.shape[:-1], torch.inf)
    strength = pivots.abs() / (n * torch.finfo(pivots.dtype).eps * summands)
    return torch.where(summands == 0, 0, strength).amin(-1)  # a pivot of nothing is the weakest there is


def faults_of(matrix: Tensor, strength: Tensor) -> Tensor:
    """Codes: SINGULAR where a pivot is nothing but rounding, NON_FINITE where the matrix is."""
    codes = torch.where(strength <= 1, Status.SINGULAR.code, Status.RUNNING.code)
    return torch.where(torch.isfinite(matrix).all(-1).all(-1), codes, Status.NON_FINITE.code)


@dataclass(frozen=True)
class Cholesky(Direct):
    """Solve A x = b for symmetric positive definite A by its Cholesky factor.

    CONVERGED means |b - A x| <= max(rtol |b|, atol), measured, after at most `refinements` steps of iterative
    refinement. A matrix that is not positive definite is NEGATIVE_CURVATURE or SINGULAR, and x is then NaN.

    Cost: n products to materialise A, n^3/3 to factorise; `prepare(A)` keeps the factor for many solves.

    Args:
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in b's units.
        refinements: limit of refinement steps.

    Example:
        >>> from nestopt.linalg import Cholesky, Dense
        >>> Cholesky()(Dense(torch.tensor([[4.0]]), symmetric=True), torch.tensor([2.0])).x
        tensor([0.5000])
    """

    needs_symmetric: ClassVar[bool] = True

    def _factorise(self, matrix: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        # LAPACK refuses NaN by an exception on some builds: factorise the identity in its place, the code tells
        finite = torch.isfinite(matrix).all(-1).all(-1)
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        L, info = torch.linalg.cholesky_ex(torch.where(finite[..., None, None], matrix, eye))
        strength = _strength(L.diagonal(dim1=-2, dim2=-1).square(), L.square().sum(-1))
        codes = faults_of(matrix, strength)
        if bool(((info > 0) & finite).any()):
            lowest = torch.linalg.eigvalsh(torch.where(finite[..., None, None], matrix, eye))
            scale = lowest.abs().amax(-1)
            negative = lowest[..., 0] < -10 * matrix.shape[-1] * torch.finfo(matrix.dtype).eps * scale
            fault = torch.where(negative, Status.NEGATIVE_CURVATURE.code, Status.SINGULAR.code)
            codes = torch.where((info > 0) & finite, fault, codes)
        return (L,), codes, strength

    def _back(self, factors: tuple[Tensor, ...], b: Tensor, transposed: bool) -> Tensor:
        return torch.cholesky_solve(b, factors[0])


@dataclass(frozen=True)
class LU(Direct):
    """Solve A x = b for any square A by LU with partial pivoting.

    CONVERGED means |b - A x| <= max(rtol |b|, atol), measured, after at most `refinements` steps of iterative
    refinement. A matrix that is singular to working precision is SINGULAR, and x is then NaN.

    Cost: n products to materialise A, 2 n^3/3 to factorise; `prepare(A)` keeps the factors for solves with A and A'.

    Args:
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in b's units.
        refinements: limit of refinement steps.

    Example:
        >>> from nestopt.linalg import LU, Dense
        >>> LU()(Dense(torch.tensor([[0.0, 2.0], [1.0, 0.0]])), torch.tensor([2.0, 3.0])).x
        tensor([3., 1.])
    """

    def _factorise(self, matrix: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        finite = torch.isfinite(matrix).all(-1).all(-1)
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        factors, pivots, _ = torch.linalg.lu_factor_ex(torch.where(finite[..., None, None], matrix, eye))
        _, L, U = torch.lu_unpack(factors, pivots, unpack_pivots=False)
        strength = _strength(U.diagonal(dim1=-2, dim2=-1), (L.abs() * U.mT.abs()).sum(-1))
        return (factors, pivots), faults_of(matrix, strength), strength

    def _back(self, factors: tuple[Tensor, ...], b: Tensor, transposed: bool) -> Tensor:
        x: Tensor = torch.linalg.lu_solve(factors[0], factors[1], b, adjoint=transposed)
        return x
