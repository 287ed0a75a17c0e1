"""Polyhedra by their inequalities and equations."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from nestopt.implicit import ImplicitWarning
from nestopt.linalg import LinearOperator

from .affine import check_rows, onto_rows, orthonormal_rows, times
from .sets import Set
from .spoiled_items import spoil
from .structured import DiagonalPlusLowRank
from .value_only import opaque

__all__ = ["Polyhedron"]

_INDEPENDENT = 1e-9  # of a unit row from the span of others
_TOLERANCE = 1e-10  # of the certificate, relative to the size of the point and its distance


@dataclass(frozen=True, eq=False)
class Polyhedron(Set):
    """{x: G x <= h, A x = b}.

    With the equations eliminated, the projection is a least distance problem, which Lawson and Hanson's active sets
    solve in finitely many steps as non-negative least squares, for all items of a batch at once, in float64. With the
    active rows C known, it is the projection onto {C x = d}, and that is what is differentiated. Before it is used, the
    active set is certified: no inequality is violated and no multiplier is negative by more than 1e-10, relative to
    the largest entry of x and to its distance. An item that fails this is NaN, after an ImplicitWarning, and changes no
    other.

    The Jacobian is I - Q Q' for an orthonormal basis Q of the active rows, so that at a kink (a row that is active with
    multiplier zero) it is the one of the smallest face that holds P(x). A row that is active and depends on others is
    left out, and gets no derivative.

    Cost: one QR factorisation of size n + m an active row.

    Args:
        G: shape (m, n) or (*batch, m, n).
        h: shape (m,) or (*batch, m); inf for a row that asks nothing.
        A: shape (k, n) or (*batch, k, n) of full row rank, or None.
        b: shape (k,) or (*batch, k), or None.

    Raises:
        TypeError: if one is not a floating tensor.
        ValueError: if they do not fit each other, A's rows are dependent, or the set is empty.

    Reference:
        Lawson & Hanson 1974, Solving Least Squares Problems, chapter 23 (NNLS and LDP).

    Example:
        >>> triangle = Polyhedron(torch.tensor([[-1.0, 0.0], [0.0, -1.0], [1.0, 1.0]]), torch.tensor([0.0, 0.0, 1.0]))
        >>> triangle.project(torch.tensor([1.0, 0.5]))
        tensor([0.7500, 0.2500])
    """

    G: Tensor
    h: Tensor
    A: Tensor | None = None
    b: Tensor | None = None

    def __post_init__(self) -> None:
        check_rows("Polyhedron", self.G, self.h, ("G", "h"))
        if (self.A is None) != (self.b is None):
            raise ValueError("Polyhedron: A and b belong together, but one of them is None.")
        if self.A is not None and self.b is not None:
            check_rows("Polyhedron", self.A, self.b)
            if self.A.shape[-1] != self.G.shape[-1] or self.A.dtype != self.G.dtype or self.A.device != self.G.device:
                raise ValueError(
                    f"Polyhedron: G and A must have the same columns, dtype and device, but they have "
                    f"{tuple(self.G.shape)} ({self.G.dtype}) and {tuple(self.A.shape)} ({self.A.dtype})."
                )
        self._active(self.G.new_zeros(self.G.shape[-1]))  # an empty set is named here

    def _equations(self) -> tuple[Tensor, Tensor]:
        if self.A is None or self.b is None:
            return self.G.new_zeros(0, self.G.shape[-1]), self.h.new_zeros(0)
        return self.A, self.b

    def _active(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return opaque(_identify, x, self.G, self.h, *self._equations(), spaces=[1, 2, 1, 2, 1])  # type: ignore[no-any-return]

    def _checked(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        self._need_space(x)
        n, (A, b) = self.G.shape[-1], self._equations()
        if x.shape[-1] != n:
            raise ValueError(
                f"Polyhedron: x must have shape (*batch, {n}) for G's columns, but it has {tuple(x.shape)}."
            )
        for name, value, space in (("G", self.G, 2), ("h", self.h, 1), ("A", A, 2), ("b", b, 1)):
            self._fit(value, x, name, (*x.shape[:-1], *value.shape[value.ndim - space :]))
        return self._active(x)

    def _project(self, x: Tensor) -> Tensor:
        active, W, Q, good = self._checked(x)
        A, b = self._equations()
        rows = torch.where(active[..., None], self.G, 0)
        right = torch.where(active, self.h, 0)
        batch = rows.shape[:-2]
        C = torch.cat([A.expand(*batch, *A.shape[-2:]), rows], dim=-2)
        d = torch.cat([b.expand(*batch, b.shape[-1]), right], dim=-1)
        p = spoil(onto_rows(x, C, d, W, Q), good[..., None])
        return torch.where(x.isfinite().all(-1, keepdim=True), p, torch.nan)

    def _jacobian(self, x: Tensor) -> LinearOperator:
        _, _, Q, good = self._checked(x)
        usable = x.isfinite().all(-1, keepdim=True) & good[..., None]
        return DiagonalPlusLowRank(torch.where(usable, 1.0, torch.nan).to(x.dtype).expand_as(x), Q)


def _identify(x: Tensor, G: Tensor, h: Tensor, A: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which rows of G are active at the projection, W and Q of `onto_rows` for A and those, and who is certified."""
    dtype = x.dtype
    x, G, h, A, b = (t.double() for t in (x, G, h, A, b))
    W, Q = orthonormal_rows(A, b, "Polyhedron")
    x = torch.where(x.isfinite().all(-1, keepdim=True), x, 0)
    start = x - times(Q.mT, times(Q, x) - times(W, b))
    # the inequalities G d <= gap of a step d that keeps the equations, rows scaled to one
    size = torch.linalg.vector_norm(G, dim=-1)
    inner = G - (G @ Q.mT) @ Q
    length = torch.linalg.vector_norm(inner, dim=-1)
    moving = length > _INDEPENDENT * size
    length = torch.where(moving, length, 1)
    rows, gap = torch.where(moving[..., None], inner / length[..., None], 0), (h - times(G, start)) / length
    batch, n, m = gap.shape[:-1], G.shape[-1], gap.shape[-1]
    rows, gap, moving = rows.expand(*batch, m, n), gap.expand(*batch, m), moving.expand(*batch, m)
    scale = torch.maximum(start.abs().amax(-1), (start - x).abs().amax(-1)) if n else x.new_ones(batch)
    scale = scale.expand(batch).clamp_min(1e-300)
    if bool((~moving & (gap < -_TOLERANCE * torch.maximum(scale[..., None], h.abs()))).any()):
        raise ValueError(_EMPTY)
    gap = torch.where(moving, gap, torch.inf)
    items = math.prod(batch)
    # Not by solve_qp's engine: it certifies to 1e-9 of a program's size and decides rows at 1e-7, which for an x at a
    # distance of 1e9 leaves .1 and more, where rows are decided at 1e-13 here; and where more rows meet than there are
    # dimensions its duals are positive on rows that depend on each other, of which a projection needs a basis.
    active, good = _least_distance(rows.reshape(items, m, n), gap.reshape(items, m))
    active, good = active.reshape(*batch, m), good.reshape(batch)
    W, Q, p, multipliers = _solve_rows(start, A, b, G, h, active)
    scale = torch.maximum(scale, (p - start).abs().amax(-1)) if n else scale
    slack = (gap - times(rows, p - start)) / scale[..., None]
    lowest = torch.where(active, multipliers, 0).amin(-1) if m else scale
    good = good & ~(slack < -_TOLERANCE).any(-1) & ~(lowest < -_TOLERANCE * scale)
    if not bool(good.all()):
        warnings.warn(
            f"Polyhedron: {int((~good).sum())} of {good.numel()} items have no certified active set, and are NaN: it "
            f"violates an inequality by {float(-slack.min()):.1e}, or a multiplier's sign by "
            f"{float(-(lowest / scale).min()):.1e}, relative to the size of x; scale G and h, or remove rows that "
            "nearly depend on others.",
            ImplicitWarning, stacklevel=2,
        )  # fmt: skip
    waiting = (slack < _TOLERANCE) & ~active  # kinks: rows that are active with multiplier zero
    while bool(waiting.any()):
        first = waiting & (waiting.cumsum(-1) == 1)
        row = torch.where(first[..., None], G / size.clamp_min(1e-300)[..., None], 0).sum(-2)
        new = torch.linalg.vector_norm(row - times(Q.mT, times(Q, row)), dim=-1, keepdim=True) > _INDEPENDENT
        active, waiting = active | (first & new), waiting & ~first
        W, Q, _, _ = _solve_rows(start, A, b, G, h, active)
    return active, W.to(dtype), Q.to(dtype), good


_EMPTY = "Polyhedron: the set is empty: no x has G x <= h and A x = b; relax h, or look for signs."


def _solve_rows(
    x: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor, active: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W and Q, the projection of x onto the equations and active rows, and the multipliers of the rows of size one."""
    batch = active.shape[:-1]
    rows = torch.where(active[..., None], G, 0)
    C = torch.cat([A.expand(*batch, *A.shape[-2:]), rows], dim=-2)
    d = torch.cat([b.expand(*batch, b.shape[-1]), torch.where(active, h, 0)], dim=-1)
    W, Q = _factor(C, torch.cat([torch.zeros_like(d[..., : b.shape[-1]], dtype=torch.bool), ~active], -1))
    y = times(Q, x) - times(W, d)
    lengths = torch.linalg.vector_norm(C, dim=-1)
    return W, Q, x - times(Q.mT, y), (lengths * times(W.mT, y))[..., b.shape[-1] :]


def _factor(C: Tensor, idle: Tensor) -> tuple[Tensor, Tensor]:
    """W and Q = W C for C whose idle rows are zero: those are completed by unit vectors of dimensions of their own."""
    size = torch.linalg.vector_norm(C, dim=-1)
    size = torch.where(size > 0, size, 1)
    k = C.shape[-2]
    stacked = torch.cat([(C / size[..., None]).mT, torch.diag_embed(idle.to(C.dtype))], dim=-2)
    Q, R = torch.linalg.qr(stacked)
    eye = torch.eye(k, dtype=C.dtype, device=C.device)
    return torch.linalg.solve_triangular(R.mT, eye, upper=False) / size[..., None, :], Q[..., : C.shape[-1], :].mT


def _least_distance(rows: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that are active at the shortest d with rows d <= gap: an independent set with positive multipliers.

    Args:
        rows: shape (items, m, n), of size one, or zero with gap inf.
        gap: shape (items, m), inf allowed.

    Returns:
        A boolean tensor of shape (items, m), and whether the active set has settled, of shape (items,).

    Raises:
        ValueError: if there is no such d.
    """
    passive = torch.zeros_like(gap, dtype=torch.bool)
    if not gap.numel():
        return passive, gap.new_ones(len(gap), dtype=torch.bool)
    asked = gap.isfinite()
    worst = torch.where(asked, -gap, 0).amax(-1, keepdim=True)
    busy = (worst > 0)[:, 0]
    unit = torch.where(worst > 0, worst, 1)
    # |E u - f| is least over u >= 0, E = [-rows'; -gap'], f = (0, ..., 0, 1)
    E = torch.cat([-rows.mT, (-torch.where(asked, gap, 0) / unit)[:, None]], dim=1) * asked[:, None]
    size = torch.linalg.vector_norm(E, dim=1)
    E = E / torch.where(size > 0, size, 1)[:, None]
    u, blocked = torch.zeros_like(gap), ~asked
    adding = busy.clone()
    for _ in range(20 * (gap.shape[-1] + 1)):
        r = -(E @ u[..., None])[..., 0]
        r[:, -1] += 1
        length = torch.linalg.vector_norm(r, dim=-1, keepdim=True)
        if bool((busy & (length[:, 0] < 1e-11)).any()):
            raise ValueError(_EMPTY)
        w = torch.where(passive | blocked, -torch.inf, (E.mT @ r[..., None])[..., 0])
        best, j = w.max(-1)
        busy = busy & (~adding | (best > 1e-13 * length[:, 0]))
        if not bool(busy.any()):
            break
        entering = torch.zeros_like(passive).scatter_(-1, j[:, None], True) & (busy & adding)[:, None]
        passive = passive | entering
        z = _least_squares(E, passive)
        # a column that cannot enter by rounding is blocked until something else moves
        refused = (entering & (z <= 0)).any(-1)
        passive, blocked = passive & ~(entering & refused[:, None]), blocked | (entering & refused[:, None])
        negative = passive & (z <= 0)
        short = torch.where(negative, u / (u - z).clamp_min(1e-300), torch.inf).amin(-1, keepdim=True)
        partial = negative.any(-1) & busy & ~refused
        whole = busy & ~refused & ~partial
        moved = torch.where(partial[:, None], u + short * (z - u), torch.where(whole[:, None], z, u))
        leaving = partial[:, None] & negative & (moved <= 1e-14 * moved.amax(-1, keepdim=True))
        passive, u = passive & ~leaving, torch.where(leaving, 0, moved)
        blocked = torch.where(whole[:, None], ~asked, blocked)
        adding = torch.where(busy, ~partial, adding)
    return passive, ~busy


def _least_squares(E: Tensor, passive: Tensor) -> Tensor:
    """The z that is zero off the passive columns and minimises |E z - e|, e the last unit vector."""
    k = int(passive.sum(-1).max())
    order = passive.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :k]
    kept = passive.gather(-1, order)
    columns = E.gather(-1, order[:, None].expand(-1, E.shape[1], -1)) * kept[:, None]
    W, Q = _factor(columns.mT, ~kept)
    z = torch.where(kept, times(W.mT, Q[..., -1]), 0)
    return torch.zeros_like(passive, dtype=E.dtype).scatter_(-1, order, z)
