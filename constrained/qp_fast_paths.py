"""Programs that need no interior point: bounds only, or nearly, and strictly convex ones."""

from __future__ import annotations

import torch
from torch import Tensor

from .interior_point import Program, product

__all__ = ["pivoting", "separable_guess"]

# Of pivots, relative to the diagonal: a matrix with smaller ones is left to the methods that need none.
LEAST = 1e-7
# A row with neither dual nor slack: which rows are active is then for the interior point to say.
UNDECIDED = 1e-7


def separable_guess(program: Program) -> tuple[Tensor, Tensor]:
    """A point and the active rows of it, by the diagonal of Q alone.

    For bounds and a diagonal Q this is the solution; for another Q it is where the primal-dual active set method starts
    (Hintermueller, Ito & Kunisch 2003), which for bounds mostly ends within a few rounds.

    Args:
        program: equilibrated programs whose rows are bounds.

    Returns:
        x, shape (B, n), and the active rows, shape (B, m).
    """
    diagonal = program.Q.diagonal(dim1=-2, dim2=-1)
    free = torch.where(diagonal > 0, -program.q / diagonal, -program.q.sign())
    gap = product(program.C, free) - program.d
    active = gap > 0
    step = product(program.C.mT, torch.where(active, gap, 0) / program.C.square().sum(-1).clamp_min(1e-300))
    return free - step, active


def pivoting(program: Program, L: Tensor, rounds: int = 30) -> tuple[Tensor, ...]:
    """Block principal pivoting on the dual of strictly convex programs.

    Without x and nu the conditions are the linear complementarity problem w = r + M lam >= 0, lam >= 0, lam'w = 0 with
    M = G H G', H the inverse of Q on the kernel of A. For a set F of active rows M_FF lam_F = -r_F, and w is zero in F;
    a round exchanges all rows with a negative lam or w, and where three rounds have not made these fewer, only the last
    of them, until they are: that ends for every positive definite M, mostly within five rounds. Each costs m^3/3.

    Args:
        program: equilibrated programs.
        L: Cholesky factors of Q, shape (B, n, n); garbage where there is none.
        rounds: limit.

    Returns:
        x, the duals of all rows, the active rows, and the items, shape (B,), where these are the solution: those that
        have ended, with regular matrices, and with either a dual or a slack in every row.

    Reference:
        Judice & Pires 1994, "A block principal pivoting algorithm for large-scale strictly monotone linear
        complementarity problems"; Kim & Park 2011.
    """
    P, p, m = program, program.p, program.m
    right = torch.cat([P.q[:, None], P.C], 1).mT
    V = torch.linalg.solve_triangular(L, right, upper=False)
    u, V = V[..., :1], V[..., 1:]
    S = V.mT @ V
    r = P.d + (V.mT @ u)[..., 0]
    fit = L.diagonal(dim1=-2, dim2=-1).amin(-1) > LEAST**0.5
    M, w_free = S, r
    if p:
        L_A, info = torch.linalg.cholesky_ex(S[:, :p, :p])
        fit = fit & _regular(L_A, S[:, :p, :p], info)
        U = torch.linalg.solve_triangular(L_A, torch.cat([r[:, :p, None], S[:, :p, p:]], -1), upper=False)
        M = torch.baddbmm(S[:, p:, p:], U[..., 1:].mT, U[..., 1:], alpha=-1)
        w_free = r[:, p:] - (U[..., 1:].mT @ U[..., :1])[..., 0]
    scale = M.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300).rsqrt()  # rows of M with a diagonal of ones
    M = M * (scale[:, None] * scale[..., None])
    r_in = w_free * scale
    F = r_in < 0
    here: Tensor | None = None  # the items that go on, None for all
    fewest = torch.full_like(F[:, 0], m + 1, dtype=torch.int64)
    chances = torch.full_like(fewest, 3)
    part, r_part = M, r_in
    index = torch.arange(1, m + 1, device=r.device)
    for _ in range(rounds):
        lam, regular = _restricted(part, r_part, F)
        wrong = torch.where(F, lam, torch.baddbmm(r_part[..., None], part, lam[..., None])[..., 0]) < 0
        count = wrong.sum(-1)
        if here is None:
            all_F, all_lam, ended = F, lam, regular & (count == 0)
        else:
            all_F, all_lam = all_F.index_put((here,), F), all_lam.index_put((here,), lam)
            ended = ended.index_put((here,), regular & (count == 0))
        left = (regular & (count > 0)).nonzero()[:, 0]
        if not len(left):
            break
        chances = torch.where(count < fewest, 3, chances - 1)
        fewest = torch.minimum(fewest, count)
        last = (wrong * index).amax(-1, keepdim=True) == index
        F = F ^ torch.where((chances > 0)[:, None], wrong, last)
        if len(left) < len(F):
            here = left if here is None else here[left]
            F, part, r_part, fewest, chances = (t[left] for t in (F, part, r_part, fewest, chances))
    slack = torch.baddbmm(r_in[..., None], M, all_lam[..., None])[..., 0] / scale
    lam = all_lam * scale
    y = lam
    if p:
        nu = -torch.linalg.solve_triangular(L_A.mT, U[..., :1] + U[..., 1:] @ lam[..., None], upper=True)[..., 0]
        y = torch.cat([nu, lam], -1)
    x = -torch.linalg.solve_triangular(L.mT, u + V @ y[..., None], upper=True)[..., 0]
    decided = (torch.maximum(lam, slack.abs()) > UNDECIDED).all(-1)
    fit = fit & ended & decided & torch.isfinite(x).all(-1)
    each = fit[:, None]
    return torch.where(each, x, 0), torch.where(each, y, 0), all_F & each, fit


def _restricted(M: Tensor, r: Tensor, F: Tensor) -> tuple[Tensor, Tensor]:
    """The lam with M_FF lam_F = -r_F and zero outside of F, and whether M_FF is regular; M has ones on its diagonal."""
    m = F.shape[-1]
    k = int(F.sum(-1).max())
    index = None
    inside = F
    if m > 16 and 2 * k <= m:  # the rows of F in front, and no others
        index = F.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :k]
        inside, r = F.gather(-1, index), r.gather(-1, index)
        M = M.gather(1, index[..., None].expand(-1, -1, m)).gather(2, index[:, None].expand(-1, k, -1))
    weight = inside.to(r.dtype)
    M = M * (weight[:, None] * weight[..., None])
    M.diagonal(dim1=-2, dim2=-1).add_(1 - weight)
    factor, info = torch.linalg.cholesky_ex(M)
    lam = torch.cholesky_solve((r * -weight)[..., None], factor)[..., 0]
    regular = info == 0
    if k:
        regular = regular & (factor.diagonal(dim1=-2, dim2=-1).amin(-1) > LEAST**0.5)
    return (lam if index is None else r.new_zeros(len(r), m).scatter(-1, index, lam)), regular


def _regular(factor: Tensor, matrix: Tensor, info: Tensor) -> Tensor:
    """Whether the pivots are no rounding of the diagonal they came from."""
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    return (info == 0) & (pivots > LEAST * matrix.diagonal(dim1=-2, dim2=-1)).all(-1)
