"""One preconditioned step in the place of a solve: the cheapest answer, with a measure of how wrong it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .operator import LinearOperator
from .result import Status, any_of, check_stopping, scalar_or_tensor
from .solver import LinearSolver, Solution, default_rtol, measure

__all__ = ["SingleStep"]


@dataclass(frozen=True)
class SingleStep(LinearSolver):
    """Approximate the solution of A x = b, A symmetric positive definite, by x = a P b, P = I unless one is given.

    With P = I this is the "one-step" or "Hessian-free" hypergradient of the literature. It is biased unless P A is a
    multiple of the identity: the residual |b - A x| is measured and says how far off x is, and the usual ending is
    MAX_ITER. CONVERGED means |b - A x| <= max(rtol |b|, atol). With a step size of None, a = b'A d / |A d|^2, d = P b,
    makes the residual the smallest that any multiple of d has, so that it is never above |b|, that of x = 0. From an x0
    it is x0 + a P (b - A x0): a sequence of nearly equal systems, each started at the last answer, gets ever closer.

    A step from an x0 that enlarges the residual is DIVERGED: the step size is too large, and x stays where it started.
    d'A d < 0 is NEGATIVE_CURVATURE with its direction, A d = 0 is SINGULAR, likewise.

    Cost: 1 product for the step size, 1 to measure (2 below float64), 1 for an x0.

    Args:
        step_size: a, below 2 / lambda_max of P A; None for the best one.
        preconditioner: P, close to the inverse of A; None for the identity.
        rtol: relative tolerance of the claim; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in b's units.

    Raises:
        ValueError: for a negative tolerance, or a step size that is not positive.

    Reference:
        Bolte, Pauwels & Vaiter 2023, One-step differentiation of iterative algorithms; Luketina et al. 2016 (T1-T2).

    Example:
        >>> from nestopt.linalg import Diagonal, SingleStep
        >>> A = Diagonal(torch.tensor([1.0, 3.0], dtype=torch.float64))
        >>> sol = SingleStep()(A, torch.ones(2, dtype=torch.float64))
        >>> sol.x, sol.status.name, round(sol.residual_norm, 4)
        (tensor([0.4000, 0.4000], dtype=torch.float64), 'MAX_ITER', 0.6325)
    """

    step_size: float | None = None
    preconditioner: LinearOperator | None = None
    rtol: float | None = None
    atol: float = 0.0

    needs_symmetric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_stopping(type(self).__name__, self.rtol, self.atol, 0)
        if self.step_size is not None and not 0 < self.step_size < float("inf"):
            raise ValueError(
                f"{type(self).__name__}: step_size must be a number > 0, but got {self.step_size}; use None for the "
                "size with the smallest residual."
            )

    def _solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None) -> Solution:
        norm = A.norm(b)
        every = torch.ones_like(norm, dtype=torch.bool)
        tolerance = ((default_rtol(A.dtype) if self.rtol is None else self.rtol) * norm).clamp_min(self.atol)
        x, r, error, products = torch.zeros_like(b), b, norm, 0
        if x0 is not None:
            x = torch.where((norm == 0)[..., None], 0, x0)
            r, error, products = measure(A, x, b, every)
        start, moved = error, ~(error <= tolerance)
        d = r if self.preconditioner is None else self.preconditioner @ r
        fault = torch.full_like(norm, Status.MAX_ITER.code, dtype=torch.int64)
        if self.step_size is None:
            image = A.active_matvec(d, moved)
            products += int(moved.sum()) if A.skips(moved) else moved.numel()
            square = A.vecdot(image, image)
            fault = torch.where(A.vecdot(d, image) < 0, Status.NEGATIVE_CURVATURE.code, fault)
            fault = torch.where(square == 0, Status.SINGULAR.code, fault)
            size = A.vecdot(r, image).clamp_min(0) / torch.where(square == 0, 1, square)
            size = torch.where(fault == Status.MAX_ITER.code, size, 0)
        else:
            size = torch.full_like(norm, self.step_size)
        x = torch.where(moved[..., None], x + size[..., None] * d, x)
        _, measured, spent = measure(A, x, b, moved)
        error = torch.where(moved, measured, error)
        grown = torch.zeros_like(moved) if x0 is None else error > start * (1 + 1e-6)
        x, error = torch.where(grown[..., None], x - size[..., None] * d, x), torch.where(grown, start, error)
        fault = torch.where(grown, Status.DIVERGED.code, fault)
        codes = torch.where(error <= tolerance, Status.CONVERGED.code, fault)
        codes = torch.where(error < torch.inf, codes, Status.NON_FINITE.code)
        named = (codes == Status.NEGATIVE_CURVATURE.code) | (codes == Status.SINGULAR.code)
        length = A.norm(d)
        unit = d / torch.where(length > 0, length, 1)[..., None]
        return Solution(
            x=x, codes=codes, iterations=scalar_or_tensor(moved.to(torch.int64)), error=scalar_or_tensor(error),
            residual_norm=scalar_or_tensor(error), tolerance=scalar_or_tensor(tolerance), products=products + spent,
            direction=torch.where(named[..., None], unit, 0) if any_of(named) else None,
        )  # fmt: skip
