"""The Lanczos step and recurrence: an orthonormal Krylov basis and A's tridiagonal matrix in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from .operator import LinearOperator
from .orthogonal import normalise, orthogonalise
from .probes import gaussians
from .result import iterate

__all__ = ["LanczosState", "eigenpairs", "expand", "random_start", "tridiagonalise"]


@dataclass(frozen=True)
class LanczosState:
    """Where a run stands after k steps; the basis is filled in place, so only the last state can go on."""

    basis: Tensor  # (steps + 1, *columns, n), its first k + 1 rows filled
    alpha: tuple[Tensor, ...]  # k times (*columns)
    beta: tuple[Tensor, ...]
    codes: Tensor
    iterations: Tensor
    error: Tensor  # in units of what is allowed; the dtype's largest number while not looked at

    @property
    def k(self) -> int:
        """Steps taken, by the column that took most."""
        return len(self.alpha)

    @property
    def matrix(self) -> tuple[Tensor, Tensor]:
        """The diagonal and what stands beside it, (*columns, k) each, in float64; the last beta leads out of it."""
        return torch.stack(self.alpha, -1).double(), torch.stack(self.beta, -1).double()


def random_start(A: LinearOperator, count: int, generator: torch.Generator | None) -> Float[Tensor, "count *batch n"]:
    """Random unit vectors, `count` for each system; None is a new generator with seed 0."""
    v = gaussians(A, count, generator)
    return v / A.norm(v)[..., None]


def expand(
    A: LinearOperator, V: Float[Tensor, "k *columns n"]
) -> tuple[Float[Tensor, "k *columns"], Float[Tensor, "*columns n"], Float[Tensor, "*columns"]]:
    """The Lanczos step: A times the last row of V, split along all rows.

    Args:
        A: symmetric operator.
        V: orthonormal rows, or rows of zeros.

    Returns:
        The coefficients along V, the next unit vector and its coefficient; both zero where V's span is invariant.
    """
    w = A._matvec(V[-1])
    size = A.norm(w)
    w, h = orthogonalise(A, V, w)
    unit, beta = normalise(A, w, size)
    return h, unit, beta


def tridiagonalise(
    A: LinearOperator,
    start: Float[Tensor, "*columns n"],
    steps: int,
    gap: Callable[[LanczosState], Tensor] | None = None,
) -> LanczosState:
    """Lanczos with full reorthogonalisation from unit vectors, for at most `steps` steps.

    Args:
        A: symmetric operator.
        start: unit vectors.
        steps: limit; from n on the Krylov space is exhausted anyway.
        gap: a column has ended when this is at most 1; None to end with the Krylov space only.

    Returns:
        The last state. A column that was exhausted before has zeros in beta from there on, and behind them the
        Rayleigh quotient of its start, which lies inside the spectrum.
    """
    steps = min(steps, A.shape[-1])
    with torch.no_grad():
        basis = start.new_empty(steps + 1, *start.shape)
        basis[0] = start
        unseen = start.new_full(start.shape[:-1], torch.finfo(start.dtype).max, dtype=torch.float64)
        zero = torch.zeros_like(unseen, dtype=torch.int64)
        state = LanczosState(basis, (), (), zero, zero, unseen)
        return iterate(lambda s: _step(A, s, gap), state, max_iter=steps, tolerance=torch.ones_like(unseen))


def _step(A: LinearOperator, s: LanczosState, gap: Callable[[LanczosState], Tensor] | None) -> LanczosState:
    k = s.k + 1
    h, s.basis[k], beta = expand(A, s.basis[:k])
    alpha = torch.where(s.beta[-1] == 0, s.alpha[0], h[-1]) if s.alpha else h[-1]
    s = replace(s, alpha=(*s.alpha, alpha), beta=(*s.beta, beta))
    last = k == s.basis.shape[0] - 1
    if gap is not None and k > 8 and k % (k // 8) and not last:  # the small eigenproblem is not looked at in every step
        return s
    error = torch.where(beta == 0, 0, torch.full_like(s.error, 2) if gap is None else gap(s))
    return replace(s, error=torch.where(torch.isfinite(alpha) & torch.isfinite(beta), error, torch.nan))


def eigenpairs(
    alpha: Float[Tensor, "*columns k"], beta: Float[Tensor, "*columns k"]
) -> tuple[Float[Tensor, "*columns k"], Float[Tensor, "*columns k k"]]:
    """Eigenvalues, ascending, and eigenvectors (as columns) of the tridiagonal; values NaN where it is not finite."""
    finite = (torch.isfinite(alpha) & torch.isfinite(beta)).all(-1, keepdim=True)
    off = torch.where(finite, beta, 0)[..., :-1]
    T = torch.diag_embed(torch.where(finite, alpha, 0)) + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    values, vectors = torch.linalg.eigh(T)
    return torch.where(finite, values, torch.nan), vectors
