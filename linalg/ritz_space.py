"""What a Krylov solve leaves behind: recorded products, the Ritz vectors in them, and the inverse they approximate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .operator import Derived, LinearOperator

__all__ = ["Recorder", "RitzInverse", "RitzSpace"]

_OVERLAP = 1e-2  # of an old vector, what is squarely left after taking out the new ones, below which it is dropped


def _combine(V: Tensor, weights: Tensor) -> Tensor:
    """The combinations sum_i weights_ij V_i of rows of V (m, *batch, n), weights (*batch, m, k)."""
    return torch.einsum("i...n,...ij->j...n", V, weights)


def _gram(A: LinearOperator, V: Tensor, U: Tensor) -> Tensor:
    """The inner products of the rows of V (m, *batch, n) and U (k, *batch, n), of shape (*batch, m, k)."""
    if A._space() is None:
        return torch.einsum("i...n,j...n->...ij", V, U)
    return A.vecdot(V[:, None], U[None]).movedim((0, 1), (-2, -1))


def _basis(A: LinearOperator, S: Tensor, image: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of the rows of S with its image, without what lies in S below the floor (zero rows)."""
    d, V = torch.linalg.eigh(_gram(A, S, S))
    keep = d > floor
    count = int(keep.sum(-1).max()) if keep.numel() else 0
    T = (V * torch.where(keep, d, torch.inf).rsqrt()[..., None, :])[..., V.shape[-1] - count :]
    return _combine(S, T), _combine(image, T)


@dataclass(frozen=True)
class RitzSpace:
    """Approximate eigenvectors of an operator with their images, as the last solves knew them.

    For a symmetric operator W holds Ritz vectors and theta their values; otherwise W and image / theta hold approximate
    right and left singular vectors. A row that is not used is zero, its theta 1.

    Attributes:
        W: orthonormal rows, of shape (k, *batch, n).
        image: A W, exact only in part: a later operator is not multiplied with W again.
        theta: of shape (k, *batch).
        centre: geometric mean of the extreme magnitudes of the spectrum without W, of shape (*batch).
        symmetric: which of the two.
    """

    W: Tensor
    image: Tensor
    theta: Tensor
    centre: Tensor
    symmetric: bool


def refine(
    A: LinearOperator,
    space: RitzSpace | None,
    S: Float[Tensor, "m *batch n"],
    image: Float[Tensor, "m *batch n"],
    rank: int,
    *,
    definite: bool,
) -> RitzSpace | None:
    """The `rank` Ritz vectors that slow a Krylov method most, from new pairs (s, A s) and an older space.

    New pairs come first: of the old vectors only what is not among the new ones is kept, and of its image only the part
    that no new pair determines (for symmetric A, s'(A w) = (A s)'w is known). Rayleigh and Ritz then give the pairs. As
    the convergence bound knows the spectrum by its condition number alone, those are taken, i from the lower end and
    rank - i from the upper, without which it is smallest. No product is spent.

    Args:
        A: whose inner product and promises are meant.
        space: of an earlier operator, or None.
        S: vectors, of any length; zero rows are allowed.
        image: A S.
        rank: number of vectors wanted.
        definite: whether only positive Ritz values are of use.

    Returns:
        The space, or None where nothing usable was found.
    """
    # nothing that is not finite may enter: it would stay for ever
    good = torch.isfinite(S).all(-1) & torch.isfinite(image).all(-1)
    norm = A.norm(torch.where(good[..., None], S, 0))
    scale = torch.where(good & (norm > 0), norm, torch.inf)[..., None]
    S, image = (torch.where(good[..., None], part, 0) / scale for part in (S, image))
    if not bool(torch.isfinite(image).all()):
        return space
    S, image = _basis(A, S, image, S.shape[0] * torch.finfo(S.dtype).eps ** 0.6)
    if space is not None:
        overlap = _gram(A, S, space.W)
        W, Y = _basis(A, space.W - _combine(S, overlap), space.image - _combine(image, overlap), _OVERLAP)
        if A.symmetric:
            Y = Y + _combine(S, _gram(A, image, W) - _gram(A, S, Y))
        S, image = torch.cat([S, W]), torch.cat([image, Y])
    if not S.shape[0]:
        return None
    if A.symmetric:
        G = _gram(A, S, image)
        theta, U = torch.linalg.eigh((G + G.mT) / 2)
    else:
        square, U = torch.linalg.eigh(_gram(A, image, image))
        theta = square.clamp_min(0).sqrt()
    return _select(A, _combine(S, U), _combine(image, U), theta.movedim(-1, 0), rank, definite)


def _select(A: LinearOperator, W: Tensor, image: Tensor, theta: Tensor, rank: int, definite: bool) -> RitzSpace | None:
    """The pairs that leave the smallest condition number behind, at most `rank` a system."""
    size = theta.abs()
    valid = (A.norm(W) > 0.5) & (size > 10 * torch.finfo(W.dtype).eps * size.amax(0))
    if definite:
        valid &= theta > 0
    elif A.symmetric:  # an interior Ritz value with a residual larger than itself stands for no eigenvalue
        valid &= A.norm(image - theta[..., None] * W) <= size
    if not bool(valid.any()):
        return None
    order = torch.where(valid, size, torch.inf).argsort(0)
    values, count = torch.where(valid, size, torch.inf).gather(0, order), valid.sum(0)

    def value(index: Tensor) -> Tensor:
        return values.gather(0, index.clamp(0, values.shape[0] - 1)[None])[0]

    # with i pairs taken from below and rank - i from above
    low = torch.arange(rank + 1, device=W.device).reshape(-1, *(1,) * count.ndim).expand(-1, *count.shape)
    spread = torch.stack([value(count - 1 - rank + i) / value(i) for i in low])
    spread = torch.where(low > count - 1 - (rank - low), 1.0, spread)
    below = spread.argmin(0)
    above = rank - below
    middle = (value(below.minimum(count - 1)) * value((count - 1 - above).clamp_min(0))).sqrt()
    place = torch.arange(values.shape[0], device=W.device).reshape(-1, *(1,) * count.ndim)
    taken = ((place < below) | (place >= count - above)) & (place < count)
    first = torch.where(taken, 0, 1).argsort(dim=0, stable=True)[: int(taken.sum(0).max())]
    rows, taken = order.gather(0, first), taken.gather(0, first)
    pick = rows[..., None].expand(*rows.shape, W.shape[-1])
    W, image = (torch.where(taken[..., None], part.gather(0, pick), 0) for part in (W, image))
    theta = torch.where(taken, theta.gather(0, rows), 1)
    centre = torch.where(count > 0, middle, 1)
    return RitzSpace(W, image, theta, centre, A.symmetric)


def _project(A: LinearOperator, V: Tensor, r: Tensor) -> Tensor:
    """The inner products of rows of V (k, *batch, n) with r (*sides, *batch, n), of shape (k, *sides, *batch)."""
    sides = r.ndim - V.ndim + 1
    return A.vecdots(V.reshape(V.shape[0], *(1,) * sides, *V.shape[1:]), r)


class RitzInverse(Derived):
    """An approximate inverse made of a RitzSpace, stale or not, which stays definite whatever the operator has become.

    For symmetric A, with T = image / theta (= W where it is exact), the balancing form

        M = (I - W T') M0 (I - T W') + W |theta|^-1 W',

    where M0 approximates the inverse on the rest: 1 / centre, or a preconditioner that is given. M is symmetric
    positive definite for any T and W of full rank: x'M x = 0 needs W'x = 0, and then x = 0. With an exact image, M A is
    1 on W and deflates it. For other A, with C = image / theta of orthonormal rows, M = M0 (I - C C') + W theta^-1 C',
    so that A M = C C' + A M0 (I - C C') with an exact image, as in GCRO.

    Args:
        A: the operator to precondition; no product with it is spent.
        space: the vectors.
        base: M0, or None.

    Reference:
        Mandel 1993 (balancing); Gratton, Sartenaer & Tshimanga 2011 (limited-memory preconditioners); de Sturler 1996
        (GCRO); Erhel, Burrage & Pohl 1996 (deflation as a preconditioner of GMRES).
    """

    def __init__(self, A: LinearOperator, space: RitzSpace, base: LinearOperator | None = None) -> None:
        definite = True if A.symmetric else None
        super().__init__(tuple(A.shape), A.dtype, A.device, symmetric=A.symmetric, definite=definite)
        self.parts, self.space, self.base = (A,), space, base
        self.T_rows = space.image / space.theta[..., None]

    def _matvec(self, v: Tensor) -> Tensor:
        s = self.space
        sides = v.ndim - s.W.ndim + 1
        theta = s.theta.abs().reshape(s.theta.shape[0], *(1,) * sides, *s.theta.shape[1:])
        left = s.W if s.symmetric else self.T_rows
        weights = _project(self, left, v)
        rest = v - self._spread(weights, self.T_rows)
        rest = rest / s.centre[..., None] if self.base is None else self.base._matvec(rest)
        weights = weights / theta - (_project(self, self.T_rows, rest) if s.symmetric else 0)
        return rest + self._spread(weights, s.W)

    def _spread(self, weights: Tensor, V: Tensor) -> Tensor:
        sides = weights.ndim - V.ndim + 1
        return torch.einsum("k...,k...n->...n", weights, V.reshape(V.shape[0], *(1,) * sides, *V.shape[1:]))


class Recorder(Derived):
    """An operator that keeps the products it forms, and folds them into a RitzSpace.

    Args:
        operator: A, which forms the products.
        space: where to start from, or None.
        rank: vectors of the space that is wanted.
        window: pairs held before they are folded into twice as many Ritz vectors as are wanted; 0 to keep nothing.
        definite: see `refine`.
    """

    def __init__(
        self, operator: LinearOperator, space: RitzSpace | None, rank: int, window: int, *, definite: bool
    ) -> None:
        super().__init__(
            tuple(operator.shape), operator.dtype, operator.device, symmetric=operator.symmetric,
            definite=operator.definite,
        )  # fmt: skip
        self.operator, self.parts = operator, (operator,)
        self.space, self.rank, self.window, self.only_positive = space, rank, window, definite
        self.known: tuple[Tensor, Tensor] | None = None  # what the next certified_residual returns, already paid for
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._held = 0

    def _matvec(self, v: Tensor) -> Tensor:
        out = self.operator._matvec(v)
        self._record(v, out)
        return out

    def certified_residual(self, x: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The operator's own; its product with x is kept like any other."""
        if self.known is not None:
            known, self.known = self.known, None
            return known
        r, bound = self.operator.certified_residual(x, b)
        self._record(x, b - r)
        return r, bound

    @property
    def certification_products(self) -> int:
        """As the operator says."""
        return self.operator.certification_products

    def skips(self, active: Tensor) -> bool:
        """As the operator says."""
        return self.operator.skips(active)

    def __repr__(self) -> str:
        return repr(self.operator)

    def _record(self, v: Tensor, image: Tensor) -> None:
        if not self.window:
            return
        shape = (-1, *self.batch_shape, self.shape[-1])
        # a copy: GMRES writes its basis in place
        self._pairs.append((v.reshape(shape).clone(), image.reshape(shape)))
        self._held += v[..., 0].numel() // max(1, self.batch_shape.numel())
        if self._held >= self.window:
            self._fold(2 * self.rank)

    def _fold(self, rank: int) -> None:
        if self._pairs and self.shape[-1] and self.batch_shape.numel():
            S, image = (torch.cat(part) for part in zip(*self._pairs, strict=True))
            self.space = refine(self, self.space, S, image, rank, definite=self.only_positive)
        self._pairs, self._held = [], 0

    def harvest(self) -> RitzSpace | None:
        """The space after everything that was recorded.

        Returns:
            The RitzSpace, of at most `rank` vectors, or None where there is nothing to recycle.
        """
        self._fold(self.rank)
        s = self.space
        if s is not None and s.W.shape[0] > self.rank:  # the window was full with the last product
            self.space = _select(self, s.W, s.image, s.theta, self.rank, self.only_positive)
        return self.space
