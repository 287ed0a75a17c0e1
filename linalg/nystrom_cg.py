"""Conjugate gradients that build a Nystrom preconditioner for each system by themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .cg import CG
from .nystrom import NystromSketch
from .operator import LinearOperator
from .preconditioner import Spectral
from .result import check_stopping
from .solver import LinearSolver, Solution

__all__ = ["NystromCG"]


@dataclass(frozen=True)
class NystromCG(LinearSolver):
    """Solve A x = b, A symmetric positive definite, by CG with a randomized Nystrom approximation as preconditioner.

    From products with `rank` random orthonormal columns comes A_hat = U L U', and CG runs with
    P = U L^-1 U' + (I - U U') / l_min, l_min the smallest of L: the eigenvalues above l_min are scaled to about 1, and
    the condition number that CG sees is about l_min / lambda_min. Nothing is to be chosen but the rank, and the answer
    is CG's: CONVERGED means |b - A x| <= max(rtol |b|, atol), measured. Where the sketch meets negative curvature, no
    curvature or a NaN, CG runs without a preconditioner, and names it.

    Cost: rank products for each system, then CG's. Worth it where some ten or hundred eigenvalues stand out and there
    are many right-hand sides, or a condition number that CG needs many times rank steps for; for a sequence of systems,
    `Recycled(CG())` learns the same from its own steps, for nothing.

    Args:
        rank: columns of the sketch; at most n are used.
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in b's units.
        max_iter: limit of CG's steps.
        seed: of the sketch.

    Raises:
        ValueError: if rank < 1, or a tolerance or limit is negative.

    Reference:
        Frangella, Tropp & Udell 2023, Randomized Nystrom preconditioning.

    Example:
        >>> from nestopt.linalg import CG, Diagonal, NystromCG
        >>> A = Diagonal(torch.cat([torch.linspace(1, 2, 180), torch.logspace(2, 5, 20)]).double())
        >>> b = torch.ones(200, dtype=torch.float64)
        >>> CG()(A, b).iterations, NystromCG(rank=30)(A, b).iterations
        (133, 18)
    """

    rank: int = 20
    rtol: float | None = None
    atol: float = 0.0
    max_iter: int = 1000
    seed: int = 0

    needs_symmetric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_stopping(type(self).__name__, self.rtol, self.atol, self.max_iter)
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"NystromCG: rank must be an integer >= 1, but got {self.rank!r}; use e.g. rank=20.")

    def _solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None) -> Solution:
        n = A.shape[-1]
        cg, generator = CG(self.rtol, self.atol, self.max_iter), torch.Generator(A.device).manual_seed(self.seed)
        if n == 0 or A._space() is not None:  # the sketch would not keep to an inner product of A's own
            return cg(A, b, x0)
        sketch = NystromSketch.draw(A, min(self.rank, n), generator)
        spent = sketch.rank * A.batch_shape.numel()
        floor = 10 * n * torch.finfo(A.dtype).eps * sketch.values.amax(0)
        # below that, what looks like curvature is rounding, which a preconditioner would blow up
        if bool((sketch.finite & ~sketch.indefinite(torch.zeros_like(floor)) & (sketch.values[-1] > 10 * floor)).all()):
            preconditioner = Spectral(A, floor, sketch.vectors, sketch.values, sketch.values[-1], positive=True)
            cg = replace(cg, preconditioner=preconditioner)
        solution = cg(A, b, x0)
        return replace(solution, products=solution.products + spent)
