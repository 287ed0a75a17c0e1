"""Named stand-ins for the inverse of a singular lower Hessian."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nestopt.linalg import CG, LSMR, LU, MINRESQLP, LinearOperator, LinearSolver, Solution, SolverError, Status
from nestopt.linalg.result import scalar_or_tensor

__all__ = ["MinimumNormInverse", "NamedInverse", "RidgeInverse", "advised", "inverse_name"]

_ADVICE = (
    "The lower solution is not unique there, so that it has no derivative: use a method that needs none, such as "
    "bilevel.MEHA(), BAMM() or BDA(), or name the stand-in for the inverse that is meant, by "
    "linear_solver=MinimumNormInverse() or RidgeInverse(shift)."
)


class NamedInverse(LinearSolver):
    """A stand-in for H^-1 where the lower Hessian H is singular, so that y*(x) is not unique and has no derivative.

    What is returned is then not the derivative of F(x, y*(x)): it is what `name` says, and results repeat the name.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """What stands for the inverse."""


@dataclass(frozen=True)
class MinimumNormInverse(NamedInverse):
    """v = H^+ b: the shortest v of least |b - H v|, so that flat directions of the lower level stay where they are.

    A hypergradient with it is the derivative of F(x, y(x)) along the minimisers that move as little as possible, which
    gradient steps from a start that does not depend on x follow where the flat directions do not turn with x.

    CONVERGED means that `error` = |P r| <= max(rtol |b|, atol), r = b - H v and P the projection onto H's range:
    measured by the singular vectors up to n = 512, beyond that as |H'r| / |H|, with |H| the largest |H u| / |u| of the
    products that measure it.

    Cost: n products and an SVD up to n = 512; beyond that MINRES-QLP's (LSMR's for an H that is not symmetric).

    Args:
        rtol: relative tolerance; None for 1e-8 in float64 and 1e-4 in float32.
        atol: absolute tolerance.
        cutoff: singular values below this times the largest count as zero; None for n eps of the dtype times 100.
        direct_size: largest n that is decomposed.

    Example:
        >>> from nestopt.linalg import Dense
        >>> H = Dense(torch.diag(torch.tensor([2.0, 0.0])), symmetric=True)
        >>> MinimumNormInverse()(H, torch.tensor([1.0, 5.0])).x
        tensor([0.5000, 0.0000])
    """

    rtol: float | None = None
    atol: float = 0.0
    cutoff: float | None = None
    direct_size: int = 512

    @property
    def name(self) -> str:
        """Minimum norm."""
        return "minimum norm"

    def _solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None) -> Solution:
        eps = torch.finfo(b.dtype).eps
        n = A.shape[-1]
        rtol = (1e-8 if b.dtype == torch.float64 else 1e-4) if self.rtol is None else self.rtol
        tolerance = (rtol * torch.linalg.vector_norm(b, dim=-1)).clamp_min(self.atol)
        if n <= self.direct_size:
            matrix = A.to_dense()
            if not bool(torch.isfinite(matrix).all()):
                return _solution(torch.full_like(b, torch.nan), tolerance * torch.nan, tolerance, n)
            U, sigma, V = torch.linalg.svd(matrix)
            kept = sigma > (100 * n * eps if self.cutoff is None else self.cutoff) * sigma[..., :1]
            weights = torch.where(kept, 1 / torch.where(kept, sigma, 1), 0)

            def apply(r: Tensor) -> tuple[Tensor, Tensor]:
                inside = torch.where(kept, (U.mT @ r[..., None])[..., 0], 0)
                return (V.mT @ (weights * inside)[..., None])[..., 0], torch.linalg.vector_norm(inside, dim=-1)

            x, _ = apply(b)
            x = x + apply(b - (matrix @ x[..., None])[..., 0])[0]
            return _solution(x, apply(b - (matrix @ x[..., None])[..., 0])[1], tolerance, n)
        inner: LinearSolver = MINRESQLP(1e-2 * rtol) if A.symmetric else LSMR(1e-2 * rtol)
        found = inner(A, b)
        r = A.residual(found.x, b)
        back = A.T @ r
        sizes = []
        for v in (found.x, back):
            norm = torch.linalg.vector_norm(v, dim=-1)  # a zero vector says nothing of |H|
            sizes.append(torch.where(norm == 0, 0, torch.linalg.vector_norm(A @ v, dim=-1) / norm))
        largest = torch.stack(sizes).amax(0)
        error = torch.linalg.vector_norm(back, dim=-1) / torch.where(largest > 0, largest, 1)
        return _solution(found.x, error, tolerance, found.products + 4)


@dataclass(frozen=True)
class RidgeInverse(NamedInverse):
    """v = (H + shift I)^-1 b, as if the lower level had the further term shift/2 |y - y*|^2.

    A hypergradient with it is biased by O(shift / curvature) along curved directions of the lower level and finite
    along flat ones.

    CONVERGED, error and cost are the inner solver's, for the shifted system.

    Args:
        shift: positive; 1e-3 of the largest curvature is common.
        solver: of the shifted system; None for CG() where H is symmetric, LU() elsewhere.

    Raises:
        ValueError: if shift is not positive.

    Example:
        >>> from nestopt.linalg import Dense
        >>> RidgeInverse(1.0)(Dense(torch.diag(torch.tensor([1.0, 0.0])), symmetric=True), torch.ones(2)).x
        tensor([0.5000, 1.0000])
    """

    shift: float = 1e-3
    solver: LinearSolver | None = None

    needs_square: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"RidgeInverse: shift must be positive, but got {self.shift}.")

    @property
    def name(self) -> str:
        """Ridge, with its shift."""
        return f"ridge ({self.shift:g})"

    def _solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None) -> Solution:
        inner = self.solver or (CG() if A.symmetric else LU())
        return inner(A.shift(self.shift), b, x0)


def inverse_name(solver: LinearSolver | None) -> str:
    """Which inverse a solver stands for.

    Args:
        solver: of the adjoint system.

    Returns:
        "exact", or a named inverse's name.
    """
    return solver.name if isinstance(solver, NamedInverse) else "exact"


def advised(error: SolverError) -> str:
    """The message of a bilevel result's error, with what to do where the lower Hessian is singular.

    Args:
        error: of `Result.unwrap`.

    Returns:
        The message.
    """
    return f"{error} {_ADVICE}" if error.result.status is Status.SINGULAR else str(error)


def _solution(x: Tensor, error: Tensor, tolerance: Tensor, products: int) -> Solution:
    met = error <= tolerance
    codes = torch.where(met, Status.CONVERGED.code, Status.STAGNATED.code)
    codes = torch.where(torch.isfinite(error), codes, Status.NON_FINITE.code)
    number = scalar_or_tensor(error)
    return Solution(
        x=x, codes=codes, iterations=scalar_or_tensor(torch.zeros_like(codes)), error=number, residual_norm=number,
        tolerance=scalar_or_tensor(tolerance), products=products,
    )  # fmt: skip
