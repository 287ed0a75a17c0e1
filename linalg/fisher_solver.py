"""The empirical Fisher matrix in the Hessian's place: one product with its inverse, judged by the true residual."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .mfac import DampedFisher
from .operator import LinearOperator
from .result import Status, check_stopping, scalar_or_tensor
from .solver import LinearSolver, Solution, default_rtol, measure

__all__ = ["FisherSolver"]


@dataclass(frozen=True)
class FisherSolver(LinearSolver):
    """Approximate the solution of A x = b by x = F^-1 b, F a damped empirical Fisher matrix, and measure b - A x.

    The answer of methods that put M-FAC in the place of an inverse Hessian: no product with A is spent but those that
    measure. From x0 it is x0 + F^-1 (b - A x0). CONVERGED means |b - A x| <= max(rtol |b|, atol), measured, which is
    rare: the empirical Fisher matrix is NOT the Hessian, except near a minimum where the model interpolates its data
    (every gradient then vanishes, and F with them), and the damping is part of F alone. The usual ending is MAX_ITER,
    with the true residual in `residual_norm`: above |b|, x = 0 was the better answer. For an exact answer use
    `CG(preconditioner=F.inverse)`, for which F need only resemble A.

    Cost: the products that measure: 1 a column in float64, 2 below, as many again for x0.

    Args:
        fisher: F of A's shape, an MFAC or BlockMFAC.
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32). 0.1 asks for a usable
            direction only.
        atol: absolute tolerance, in b's units.

    Raises:
        TypeError: if fisher is neither.
        ValueError: for a negative tolerance.

    Reference:
        Singh & Alistarh 2020, WoodFisher, section 2; Kunstner, Balles & Hennig 2019 on the difference of the two.

    Example:
        >>> from nestopt.linalg import MFAC, Dense
        >>> F = MFAC(torch.tensor([[2.0, 0.0], [0.0, 2.0]], dtype=torch.float64), damping=0.1)
        >>> A = Dense(torch.tensor([[2.0, 0.0], [0.0, 2.0]], dtype=torch.float64), symmetric=True)
        >>> sol = FisherSolver(F)(A, torch.tensor([1.05, 0.0], dtype=torch.float64))
        >>> sol.x, sol.status.name, round(sol.residual_norm, 3)
        (tensor([0.5000, 0.0000], dtype=torch.float64), 'MAX_ITER', 0.05)
    """

    fisher: DampedFisher
    rtol: float | None = None
    atol: float = 0.0

    def __post_init__(self) -> None:
        check_stopping(type(self).__name__, self.rtol, self.atol, 0)
        if not isinstance(self.fisher, DampedFisher):
            raise TypeError(
                f"{type(self).__name__}: fisher must be an MFAC or a BlockMFAC, but got {type(self.fisher).__name__}."
            )

    def _check_operator(self, A: LinearOperator) -> None:
        super()._check_operator(A)
        F = self.fisher
        fits = F.shape[-2:] == A.shape[-2:] and F.batch_shape in (torch.Size(()), A.batch_shape)
        if not fits or F.dtype != A.dtype or F.device != A.device:
            raise ValueError(f"{type(self).__name__}: fisher {F!r} must have the shape, dtype and device of A, {A!r}.")

    def _solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None) -> Solution:
        norm = A.norm(b)
        every = torch.ones_like(norm, dtype=torch.bool)
        rtol = default_rtol(A.dtype) if self.rtol is None else self.rtol
        tolerance = (rtol * norm).clamp_min(self.atol)
        x, r, error, products = torch.zeros_like(b), b, norm, 0
        if x0 is not None:
            x = torch.where((norm == 0)[..., None], 0, x0)
            r, error, products = measure(A, x, b, every)
        moved = ~(error <= tolerance)
        x = torch.where(moved[..., None], x + self.fisher._solve(r), x)
        _, measured, spent = measure(A, x, b, moved)
        error = torch.where(moved, measured, error)
        codes = torch.where(error <= tolerance, Status.CONVERGED.code, Status.MAX_ITER.code)
        codes = torch.where(error < torch.inf, codes, Status.NON_FINITE.code)
        return Solution(
            x=x, codes=codes, iterations=scalar_or_tensor(moved.to(torch.int64)), error=scalar_or_tensor(error),
            residual_norm=scalar_or_tensor(error), tolerance=scalar_or_tensor(tolerance), products=products + spent,
        )  # fmt: skip
