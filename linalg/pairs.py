"""Extreme eigenpairs of a symmetric operator by thick-restart Lanczos, each certified by a fresh product."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .operator import LinearOperator
from .orthogonal import combine_all, normalise, orthogonalise
from .probes import gaussians
from .result import Result, Status, any_of, iterate, scalar_or_tensor
from .tridiagonal import expand, random_start

__all__ = ["EigenpairsResult", "extreme_pairs"]

Which = Literal["highest", "lowest", "magnitude"]


@dataclass(frozen=True, kw_only=True)
class EigenpairsResult(Result):
    """Extreme eigenpairs; x holds the values, of shape (*batch, k), the most extreme first.

    Attributes:
        vectors: unit eigenvectors, of shape (*batch, k, n), orthogonal to each other.
        residuals: |A u - value u| from fresh products, below float64 with their rounding; (*batch, k). An eigenvalue is
            at least this close to each value, and for an isolated one as close as residual^2 / gap.
        tolerance: what the residuals had to reach.
        products: products with A, all systems together.
    """

    vectors: Tensor = field(repr=False)
    residuals: Tensor
    tolerance: Any
    products: int

    @property
    def values(self) -> Tensor:
        """The eigenvalues: x by its usual name."""
        return self.x  # type: ignore[no-any-return]


def extreme_pairs(
    A: LinearOperator,
    k: int = 1,
    which: Which = "highest",
    *,
    rtol: float | None = None,
    max_iter: int = 1000,
    basis: int | None = None,
    generator: torch.Generator | None = None,
) -> EigenpairsResult:
    """The k highest, lowest or largest eigenvalues of a symmetric A of shape (*batch, n, n), and their eigenvectors.

    Lanczos with full reorthogonalisation. When the basis is full, it is shrunk to the wanted Ritz vectors and half of
    the others, which with the next Lanczos vector span a Krylov space again. A Krylov space that ends early, as it does
    with few distinct eigenvalues, goes on from fresh random directions until one of them brings nothing new.

    A pair has converged when |A u - value u| <= rtol |A|, measured by a fresh product, |A| being the largest Ritz value
    in magnitude. That proves an eigenvalue near value and not that no other lies further out: where a Krylov space does
    not end, one start vector finds one direction of a repeated eigenvalue's space, and a second copy only late, by
    rounding. So do not ask for the lowest pairs of a matrix with a kernel. For bounds beyond which nothing lies see
    `extreme_eigenvalues`.

    Cost: 1 product a step and 1 for each pair at the end (2 below float64); memory for `basis` vectors.

    Args:
        A: operator promised symmetric.
        k: number of pairs, 1 to n.
        which: "highest", "lowest", or "magnitude" for the largest in absolute value.
        rtol: relative to |A|; None for 1e-8 in float64, 1e-5 below. The square root of the accuracy wanted of isolated
            values is enough.
        max_iter: limit of products a system, without those at the end.
        basis: vectors kept, above k; None for 2 k + 30 or n. More of them need fewer products.
        generator: of the random vectors; None for a new one with seed 0.

    Returns:
        The EigenpairsResult, with a status for each system; error is the largest of its residuals. STAGNATED says that
        the recurrence had converged and the fresh product disagrees, as it does at the rounding level.

    Raises:
        TypeError: if A is not an operator promised symmetric.
        ValueError: if k, which, rtol, max_iter or basis does not fit.

    Reference:
        Wu & Simon 2000, Thick-restart Lanczos method for large symmetric eigenvalue problems.

    Example:
        >>> from nestopt.linalg import Diagonal
        >>> top = extreme_pairs(Diagonal(torch.arange(1.0, 101.0, dtype=torch.float64)), k=2)
        >>> [round(value, 6) for value in top.values.tolist()], top.status.name
        ([100.0, 99.0], 'CONVERGED')
    """
    n = A.shape[-1] if isinstance(A, LinearOperator) else 0
    basis = min(2 * k + 30, n) if basis is None else basis
    _check(A, k, which, rtol, max_iter, basis)
    rtol = (1e-8 if A.dtype == torch.float64 else 1e-5) if rtol is None else rtol
    generator = torch.Generator(A.device).manual_seed(0) if generator is None else generator
    with torch.no_grad():
        search = _Search(A, k, which, rtol, generator)
        state = search.init(basis)
        return search.finish(iterate(search.step, state, max_iter=max_iter, tolerance=torch.ones_like(state.error)))


def _check(A: LinearOperator, k: int, which: str, rtol: float | None, max_iter: int, basis: int) -> None:
    if not isinstance(A, LinearOperator):
        raise TypeError(f"extreme_pairs: A must be a LinearOperator, but got {type(A).__name__}; use linalg.Dense.")
    if not A.symmetric:
        raise TypeError(f"extreme_pairs: A must be promised symmetric, but {A!r} is not; use A.T @ A for its SVD.")
    n = A.shape[-1]
    if not 1 <= k <= n:
        raise ValueError(f"extreme_pairs: k must be from 1 to n = {n}, but got {k}.")
    if which not in get_args(Which):
        raise ValueError(f"extreme_pairs: which must be one of {', '.join(get_args(Which))}, but got {which!r}.")
    if rtol is not None and not rtol > 0:
        raise ValueError(f"extreme_pairs: rtol must be positive, or None for the dtype's own, but got {rtol}.")
    if max_iter < k:
        raise ValueError(f"extreme_pairs: max_iter must be at least k = {k}, one product a pair, but got {max_iter}.")
    if not min(k + 2, n) <= basis <= n:
        raise ValueError(f"extreme_pairs: basis must be from min(k + 2, n) = {min(k + 2, n)} to {n}, but got {basis}.")


@dataclass(frozen=True)
class _PairsState:
    basis: Tensor  # (limit + 1, *batch, n), its first size + 1 rows filled; changed in place
    T: Tensor  # (*batch, limit, limit), float64, A in the first `size` rows; changed in place
    size: int
    beta: Tensor  # what couples the basis to its last row
    left: Tensor  # whether an invariant subspace was left by a fresh direction
    seen: Tensor  # (*batch, k), the wanted values when one was last left
    codes: Tensor
    iterations: Tensor
    error: Tensor  # the largest wanted residual in units of what is allowed


@dataclass(frozen=True)
class _Search:
    A: LinearOperator
    k: int
    which: str
    rtol: float
    generator: torch.Generator

    def init(self, limit: int) -> _PairsState:
        start = random_start(self.A, 1, self.generator)[0]
        basis = start.new_zeros(limit + 1, *start.shape)
        basis[0] = start
        error = start.new_full(start.shape[:-1], torch.finfo(torch.float64).max, dtype=torch.float64)
        zero = torch.zeros_like(error, dtype=torch.int64)
        T = error.new_zeros(*error.shape, limit, limit)
        seen = error.new_full((*error.shape, self.k), torch.inf)
        return _PairsState(basis, T, 0, torch.zeros_like(error), zero.bool(), seen, zero, zero, error)

    def step(self, s: _PairsState) -> _PairsState:
        if s.size == s.T.shape[-1]:
            s = self._restart(s)
        m = s.size + 1
        h, unit, beta = expand(self.A, s.basis[:m])
        column = h.movedim(0, -1).double()
        s.T[..., :m, m - 1], s.T[..., m - 1, :m] = column, column
        whole = m == self.A.shape[-1]
        # rounding alone couples an invariant subspace to what follows, and more of it than a single step can tell
        level = min(100 * torch.finfo(self.A.dtype).eps, self.rtol / 10)
        beta = beta.double()
        ended = beta <= level * s.T.abs().amax((-2, -1))
        beta = torch.where(ended, 0, beta)
        some = not beta.is_cuda and any_of(ended)  # looking would cost a synchronisation on a GPU
        if not whole and (beta.is_cuda or some):
            unit = torch.where(ended[..., None], self._fresh(s.basis[:m]), unit)
        s.basis[m] = unit
        s = replace(s, size=m, beta=torch.zeros_like(s.beta) if whole else beta, left=s.left | ended)
        # the small eigenproblem is not looked at in every step
        if m < self.k or (m > 8 and m % (m // 8) and not some and m < s.T.shape[-1]):
            return replace(s, error=torch.where(torch.isfinite(beta), s.error, torch.nan))
        values, _, residuals, allowed = self._ritz(s)
        wanted, worst = values[..., : self.k], residuals[..., : self.k].amax(-1)
        error = torch.where(worst == 0, 0, worst / allowed.clamp_min(1e-300))
        if not whole:
            # Behind an invariant subspace further copies of its eigenvalues may wait: the end is when the next such
            # subspace, from a fresh direction, brings nothing that is wanted more.
            settled = ended & ((wanted - s.seen).abs().amax(-1) <= allowed)
            error = torch.where(s.left & ~settled, error.clamp_min(2), error)
        seen = torch.where(ended[..., None], wanted, s.seen)
        return replace(s, error=torch.where(torch.isfinite(beta), error, torch.nan), seen=seen)

    def _fresh(self, V: Tensor) -> Tensor:
        v = gaussians(self.A, 1, self.generator)[0]
        w, _ = orthogonalise(self.A, V, v)
        return normalise(self.A, w, self.A.norm(v))[0]

    def _ritz(self, s: _PairsState) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ritz values, vectors in the basis and residuals, most wanted first, and what a residual may be."""
        T = s.T[..., : s.size, : s.size]
        finite = torch.isfinite(T).all(-1).all(-1)
        values, vectors = torch.linalg.eigh(torch.where(finite[..., None, None], T, 0))
        values = torch.where(finite[..., None], values, torch.nan)
        size = values.abs()
        key = {"highest": values, "lowest": -values, "magnitude": size}[self.which]
        order = key.argsort(-1, descending=True)
        values = values.gather(-1, order)
        vectors = vectors.gather(-1, order[..., None, :].expand_as(vectors))
        return values, vectors, s.beta[..., None] * vectors[..., -1, :].abs(), self.rtol * size.amax(-1)

    def _restart(self, s: _PairsState) -> _PairsState:
        """Keep the wanted Ritz vectors and half of the others; the last row goes on as it is."""
        keep = self.k + (s.size - self.k) // 2
        values, vectors, _, _ = self._ritz(s)
        weights = vectors[..., :keep].movedim((-2, -1), (0, 1)).to(s.basis.dtype)
        s.basis[:keep] = combine_all(weights, s.basis[: s.size])
        s.basis[keep] = s.basis[s.size]
        s.T.zero_()
        s.T[..., :keep, :keep] = torch.diag_embed(values[..., :keep])
        return replace(s, size=keep)

    def finish(self, s: _PairsState) -> EigenpairsResult:
        A, k = self.A, self.k
        batch = A.batch_shape
        if s.size < k:  # only where nothing was finite
            values, tolerance = s.basis.new_full((*batch, k), torch.nan), s.basis.new_full(batch, torch.nan)
            vectors, residuals, checks = s.basis.new_full((*batch, k, A.shape[-1]), torch.nan), values, 0
        else:
            found, weights, _, allowed = self._ritz(s)
            values, tolerance = found[..., :k].to(A.dtype), allowed.to(A.dtype)
            chosen = weights[..., :k].movedim((-2, -1), (0, 1)).to(A.dtype)
            rows = combine_all(chosen, s.basis[: s.size])
            rows = rows / A.norm(rows)[..., None]
            theta = values.movedim(-1, 0)
            _, certified = A.certified_residual(rows, theta[..., None] * rows)
            certified = certified + torch.finfo(A.dtype).eps / 2 * theta.abs()  # the rounding of value u itself
            vectors, residuals, checks = rows.movedim(0, -2), certified.movedim(0, -1), k * A.certification_products
        error = residuals.amax(-1)
        doubted = torch.where(s.codes == Status.CONVERGED.code, Status.STAGNATED.code, s.codes)
        steps = int(s.iterations.max()) if s.iterations.numel() else 0
        return EigenpairsResult(
            x=values,
            codes=torch.where(error <= tolerance, Status.CONVERGED.code, doubted),
            iterations=scalar_or_tensor(s.iterations),
            error=scalar_or_tensor(error),
            vectors=vectors,
            residuals=residuals,
            tolerance=scalar_or_tensor(tolerance),
            products=(steps + checks) * batch.numel(),
        )
