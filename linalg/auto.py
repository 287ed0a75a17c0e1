"""A solver that chooses the solver, by what is promised, by size and by what the first products show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .cg import CG
from .dense import LU, Cholesky
from .gmres import GMRES
from .ldl import LDL
from .lsmr import LSMR
from .matrices import Dense, Diagonal, Identity
from .minres import MINRES
from .operator import Composed, LinearOperator, Scaled, Shifted, Sum, Transposed
from .result import Status, any_of, check_stopping, scalar_or_tensor
from .solver import LinearSolver, Prepared, Solution

__all__ = ["Auto", "AutoSolution"]


@dataclass(frozen=True, kw_only=True)
class AutoSolution(Solution):
    """A Solution of Auto, which says how it came about.

    Attributes:
        chosen: the solvers that ran, in this order; the later ones only on the columns that the earlier could not do.
        reason: why each of them, in words.
        parts: what each of them returned.
    """

    chosen: tuple[LinearSolver, ...]
    reason: str
    parts: tuple[Solution, ...]

    @property
    def curvature(self) -> tuple[Any, Any] | None:
        """What the first solver that ran has seen of the spectrum."""
        return self.parts[0].curvature


@dataclass(frozen=True)
class PreparedAuto(Prepared):
    """The choice for one operator, with its factorisation where the choice is a direct solver."""

    first: Prepared
    reason: str

    def solve(self, b: Tensor, x0: Tensor | None = None) -> AutoSolution:
        """Solve A x = b; see Auto."""
        return self._solve(self.operator, self.first.solve(b, x0), b, x0)

    def solve_transposed(self, b: Tensor, x0: Tensor | None = None) -> AutoSolution:
        """Solve A' x = b; see Auto."""
        return self._solve(self.operator.T, self.first.solve_transposed(b, x0), b, x0)

    def _solve(self, A: LinearOperator, found: Solution, b: Tensor, x0: Tensor | None) -> AutoSolution:
        assert isinstance(self.solver, Auto)
        with torch.no_grad():
            return self.solver._complete(A, self.first.solver, self.reason, found, b.detach(), x0)


@dataclass(frozen=True)
class Auto(LinearSolver):
    """Solve A x = b by the solver that suits A, and say which one it was and why; for A not square, least squares.

    | A is                    | small, or stored and not large | else                                              |
    |-------------------------|--------------------------------|---------------------------------------------------|
    | promised definite       | Cholesky                       | CG                                                |
    | known not to be         | LDL                            | MINRES                                            |
    | symmetric, else unknown | LDL                            | CG, until a direction without positive curvature  |
    | square                  | LU                             | GMRES                                             |
    | not square              | LSMR                           | LSMR                                              |

    Columns that CG or Cholesky end as NEGATIVE_CURVATURE or SINGULAR, and those that LDL or LU end as SINGULAR, are
    solved again: by MINRES for symmetric A, which also gives a least-squares solution and the null direction of a
    singular system, by GMRES for any other. Nothing is changed silently: `chosen` lists the solvers in the order in
    which they ran, and `reason` says why. Statuses, residuals and CONVERGED, |b - A x| <= max(rtol |b|, atol), are
    those of the solver that had the last word on a column; for LSMR `error` is |A'(b - A x)|, held against |A'b|.

    Cost: that of the solvers that ran, added up; a direct one takes n products with a matrix-free operator.

    Args:
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in b's units.
        max_iter: limit of steps of each iterative solver.
        direct_size: largest n for which a stored matrix is factorised; at 1000, n^3/3 operations are some hundred
            products, which CG needs at a condition number of a hundred.
        materialise_size: likewise for a matrix-free operator, which n products have to materialise first.

    Raises:
        ValueError: for a negative tolerance or limit.

    Example:
        >>> from nestopt.linalg import Auto, Dense
        >>> A = Dense(torch.tensor([[2.0, 1.0], [1.0, -3.0]]), symmetric=True)
        >>> sol = Auto()(A, torch.tensor([4.0, -5.0]))
        >>> [round(x, 4) for x in sol.x.tolist()], [type(solver).__name__ for solver in sol.chosen]
        ([1.0, 2.0], ['LDL'])
        >>> sol.reason
        'LDL: A is symmetric, its definiteness is not promised, and it is stored with n = 2 <= direct_size = 1000'
    """

    rtol: float | None = None
    atol: float = 0.0
    max_iter: int = 1000
    direct_size: int = 1000
    materialise_size: int = 64

    needs_square: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_stopping("Auto", self.rtol, self.atol, self.max_iter)
        for name, value in (("direct_size", self.direct_size), ("materialise_size", self.materialise_size)):
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"Auto: {name} must be an integer >= 0, but got {value!r}; 0 is never to factorise.")

    def choose(self, A: LinearOperator) -> tuple[LinearSolver, str]:
        """The solver that runs first, and why.

        Args:
            A: the operator.

        Returns:
            The solver, and the reason in words.
        """
        self._check_operator(A)
        m, n = A.shape[-2:]
        if m != n:
            return self._krylov(LSMR), f"LSMR: A is not square but {m} x {n}, a least-squares problem"
        stored = _is_stored(A)
        limit, name = (self.direct_size, "direct_size") if stored else (self.materialise_size, "materialise_size")
        direct = n <= limit
        size = f"it is {'stored' if stored else 'matrix-free'} with n = {n} {'<=' if direct else '>'} {name} = {limit}"
        solver: LinearSolver
        if not A.symmetric:
            solver, what = self._direct(LU) if direct else self._krylov(GMRES), "A is not promised symmetric"
        elif A.definite:
            solver, what = self._direct(Cholesky) if direct else self._krylov(CG), "A is promised positive definite"
        elif A.definite is False:
            solver = self._direct(LDL) if direct else self._krylov(MINRES)
            what = "A is symmetric and known not to be positive definite"
        else:
            solver = self._direct(LDL) if direct else self._krylov(CG)
            what = "A is symmetric, its definiteness is not promised"
        return solver, f"{type(solver).__name__}: {what}, and {size}"

    def prepare(self, A: LinearOperator) -> PreparedAuto:
        """Choose, and factorise where the choice is a direct solver.

        Args:
            A: the operator.

        Returns:
            An object with `solve(b, x0)` and `solve_transposed(b, x0)`.
        """
        solver, reason = self.choose(A)
        return PreparedAuto(self, A, solver.prepare(A), reason)

    def _direct(self, kind: type[Cholesky] | type[LDL] | type[LU]) -> LinearSolver:
        return kind(self.rtol, self.atol)

    def _krylov(self, kind: type[CG] | type[MINRES] | type[GMRES] | type[LSMR]) -> LinearSolver:
        return kind(self.rtol, self.atol, self.max_iter)

    def _solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None) -> AutoSolution:
        solver, reason = self.choose(A)
        return self._complete(A, solver, reason, solver(A, b, x0), b, x0)

    def _complete(
        self, A: LinearOperator, solver: LinearSolver, reason: str, first: Solution, b: Tensor, x0: Tensor | None
    ) -> AutoSolution:
        """Hand the columns that the first solver could not do to the one that can, and put both together."""
        chosen: tuple[LinearSolver, ...] = (solver,)
        parts: tuple[Solution, ...] = (first,)
        x, codes, direction, products = first.x, first.codes, first.direction, first.products
        iterations, error, residual_norm = first.iterations, first.error, first.residual_norm
        left = (codes == Status.NEGATIVE_CURVATURE.code) | (codes == Status.SINGULAR.code)
        if any_of(left) and not isinstance(solver, (MINRES, GMRES, LSMR)):
            second = self._krylov(MINRES if A.symmetric else GMRES)
            # the other columns are zero from a start at zero: they cost no product
            start = None if x0 is None else torch.where(left[..., None], x0, 0)
            again = second(A, torch.where(left[..., None], b, 0), start)
            counts: dict[str, int] = {}
            for code in codes[left].flatten().tolist():
                name = Status.from_code(code).name
                counts[name] = counts.get(name, 0) + 1
            ended = " and ".join(f"{count} as {name}" for name, count in counts.items())
            reason += f"; {type(second).__name__}: {type(solver).__name__} ended {ended} of {codes.numel()} columns"
            chosen, parts = (*chosen, second), (*parts, again)
            error = _select(left, again.error, error, b)
            residual_norm = _select(left, again.residual_norm, residual_norm, b)
            iterations = scalar_or_tensor(left * again.iterations + iterations)
            x, codes = torch.where(left[..., None], again.x, x), torch.where(left, again.codes, codes)
            direction, products = again.direction, products + again.products
        return AutoSolution(
            x=x, codes=codes, iterations=iterations, error=error,
            residual_norm=residual_norm, tolerance=first.tolerance, products=products,
            direction=direction, chosen=chosen, reason=reason, parts=parts,
        )  # fmt: skip


def _select(mask: Tensor, new: Any, old: Any, like: Tensor) -> Any:
    """Numbers or tensors over columns: the new ones where the mask holds."""
    new, old = (torch.as_tensor(value, dtype=like.dtype, device=like.device) for value in (new, old))
    return scalar_or_tensor(torch.where(mask, new, old))


def _is_stored(A: LinearOperator) -> bool:
    """Whether materialising A costs nothing to speak of."""
    if isinstance(A, (Sum, Scaled, Shifted, Composed, Transposed)):
        return all(_is_stored(part) for part in A.parts)
    return isinstance(A, (Dense, Diagonal, Identity))
