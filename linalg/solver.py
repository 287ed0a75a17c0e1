"""What every linear solver shares: the public call with its checks, and the Solution that it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .operator import LinearOperator
from .result import Result

__all__ = ["LinearSolver", "Prepared", "Solution", "default_rtol", "measure"]


def default_rtol(dtype: torch.dtype) -> float:
    """The relative tolerance taken when none is given: 1e-10 in float64, 1e-5 in float32, 1e-2 in half precision."""
    return {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 1e-2)


def measure(A: LinearOperator, x: Tensor, b: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, int]:
    """The certified residual of some columns, zero for the others where leaving them out saves their products.

    Args:
        A: the operator.
        x: shape (*sides, *batch, n).
        b: shape (*sides, *batch, m).
        columns: which ones, of shape (*sides, *batch).

    Returns:
        b - A x, the bound of its norm that a claim may rest on, and the products spent.
    """
    if not A.skips(columns) or bool(columns.all()):
        r, bound = A.certified_residual(x, b)
        return r, bound, columns.numel() * A.certification_products
    r, bound = torch.zeros_like(b), b.new_zeros(columns.shape)
    if bool(columns.any()):
        r[columns], bound[columns] = A.certified_residual(x[columns], b[columns])
    return r, bound, int(columns.sum()) * A.certification_products


@dataclass(frozen=True, kw_only=True)
class Solution(Result):
    """The solution of A x = b, per column, with the TRUE residual measured at x.

    Attributes:
        x: the newest iterate, of b's shape.
        residual_norm: |b - A x| from a fresh product, which is also `error`; a float, or a tensor over columns. Where A
            can only multiply below float64, the measured rounding of that product is added.
        tolerance: max(rtol |b|, atol), what residual_norm was held against.
        products: products with A that were spent, all columns together, verification included.
        direction: where a column ended as NEGATIVE_CURVATURE or SINGULAR, the direction p with p'Ap <= 0 (to working
            precision), of b's shape, zero for other columns; None when there is none.
    """

    residual_norm: Any
    tolerance: Any
    products: int
    direction: Tensor | None = None

    @property
    def curvature(self) -> tuple[Any, Any] | None:
        """(smallest, largest) Ritz value of the operator seen by the solve, or None if unseen.

        They lie inside the spectrum: the smallest is an upper bound of the smallest eigenvalue.
        """
        return None


class LinearSolver(ABC):
    """Solves A x = b for every column of b: `solver(A, b, x0=None)`.

    A subclass is a frozen dataclass of hyper-parameters and writes `_solve`. Columns are independent: what stands
    before the last dimension of b is right-hand sides first, then the operator's batch of systems, and each column has
    its own iterations, residual and status.
    """

    needs_symmetric: ClassVar[bool] = False
    needs_square: ClassVar[bool] = True

    def __call__(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> Solution:
        """Solve A x = b.

        Args:
            A: shape (*batch, m, n).
            b: shape (*sides, *batch, m).
            x0: where to start, of x's shape (*sides, *batch, n); zero when None.

        Returns:
            The Solution; a failing column is a status, never an exception.

        Raises:
            TypeError: if A is not a LinearOperator (wrap a matrix in `Dense`), or a promise that this solver needs is
                missing.
            ValueError: if a shape, dtype or device does not fit.
        """
        self._check(A, b, x0)
        with torch.no_grad():
            return self._solve(A, b.detach(), None if x0 is None else x0.detach())

    def prepare(self, A: LinearOperator) -> Prepared:
        """Do once what many solves with A and its transpose share (a factorisation); an iterative solver shares none.

        Args:
            A: the operator.

        Returns:
            An object with `solve(b, x0)` and `solve_transposed(b, x0)`.
        """
        self._check_operator(A)
        return Prepared(self, A)

    @abstractmethod
    def _solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None) -> Solution:
        """Solve a checked system."""

    def _check_operator(self, A: LinearOperator) -> None:
        name = type(self).__name__
        if not isinstance(A, LinearOperator):
            raise TypeError(
                f"{name}: A must be a LinearOperator, but got {type(A).__name__}; use linalg.Dense(matrix)."
            )
        if self.needs_square and A.shape[-1] != A.shape[-2]:
            raise ValueError(f"{name}: A must be square, but it has shape {tuple(A.shape)}; use LSMR().")
        if self.needs_symmetric and not A.symmetric:
            raise TypeError(
                f"{name}: A must be promised symmetric, but {A!r} is not; build it with symmetric=True, or use "
                "a solver for general matrices (LU, GMRES)."
            )

    def _check(self, A: LinearOperator, b: Tensor, x0: Tensor | None) -> None:
        self._check_operator(A)
        A._check(b, A.shape[-2], "b")
        if x0 is not None:
            A._check(x0, A.shape[-1], "x0")
            if x0.shape[:-1] != b.shape[:-1]:
                raise ValueError(
                    f"{type(self).__name__}: x0 must have a column for each of b's {tuple(b.shape[:-1])}, but got "
                    f"{tuple(x0.shape[:-1])}."
                )


@dataclass(frozen=True)
class Prepared:
    """A solver with its operator: solves with A and with A'.

    Args:
        solver: the solver.
        operator: A.
    """

    solver: LinearSolver
    operator: LinearOperator

    def solve(self, b: Tensor, x0: Tensor | None = None) -> Solution:
        """Solve A x = b; see LinearSolver."""
        return self.solver(self.operator, b, x0)

    def solve_transposed(self, b: Tensor, x0: Tensor | None = None) -> Solution:
        """Solve A' x = b; see LinearSolver."""
        return self.solver(self.operator.T, b, x0)
