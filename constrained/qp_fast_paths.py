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


def pivoting(program: Program, L: Tensor, active: Tensor | None = None, rounds: int = 30) -> tuple[Tensor, ...]:
    """Block principal pivoting on the dual of strictly convex programs.

    Without x and nu the conditions are the linear complementarity problem w = r + M lam >= 0, lam >= 0, lam'w = 0 with
    M = G H G', H the inverse of Q on the kernel of A. For a set F of active rows M_FF lam_F = -r_F, and w is zero in F;
    a round exchanges all rows with a negative lam or w, and where three rounds have not made these fewer, only the last
    of them, until they are: that ends for every positive definite M, mostly within five rounds. Each costs m^3/3.

    Args:
        program: equilibrated programs.
        L: Cholesky factors of Q, shape (B, n, n); garbage where there is none.
        active: the rows to begin with, shape (B, m); None for those that the minimiser on A x = b violates.
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
    everyone = torch.arange(len(r), device=r.device)
    here = everyone
    F = r_in < 0 if active is None else active
    lam = torch.zeros_like(r_in)
    fewest, chances = torch.full_like(here, m + 1), torch.full_like(here, 3)
    all_F, all_lam, ended = F, lam, torch.zeros_like(fit)
    part, r_part, scale_part = M, r_in, scale
    index = torch.arange(1, m + 1, device=r.device)
    for _ in range(rounds):
        inside = F.to(r.dtype)
        masked = part * (inside[:, None] * inside[..., None])
        masked.diagonal(dim1=-2, dim2=-1).add_(1 - inside)
        factor, info = torch.linalg.cholesky_ex(masked)
        lam = torch.cholesky_solve((-r_part * inside)[..., None], factor)[..., 0]
        w = torch.baddbmm(r_part[..., None], part, lam[..., None])[..., 0]
        wrong = torch.where(F, lam, w) < 0
        count = wrong.sum(-1)
        regular = (info == 0) & (factor.diagonal(dim1=-2, dim2=-1).amin(-1) > LEAST**0.5)
        done = (count == 0) & regular
        undecided = (torch.maximum(lam * scale_part, (w / scale_part).abs()) <= UNDECIDED).any(-1)
        going = regular & (count > 0)
        if here is everyone:
            all_F, all_lam, ended = F, lam, done & ~undecided
        else:
            all_F, all_lam = all_F.index_put((here,), F), all_lam.index_put((here,), lam)
            ended = ended.index_put((here,), done & ~undecided)
        left = going.nonzero()[:, 0]
        if not len(left):
            break
        fewer = count < fewest
        chances = torch.where(fewer, 3, chances - 1)
        fewest = torch.minimum(fewest, count)
        last = (wrong * index).amax(-1, keepdim=True) == index
        F = F ^ torch.where((chances > 0)[:, None], wrong, last)
        if len(left) < len(here):
            here, F, part, r_part, scale_part = here[left], F[left], part[left], r_part[left], scale_part[left]
            fewest, chances = fewest[left], chances[left]
    lam = all_lam * scale
    y = lam
    if p:
        nu = -torch.linalg.solve_triangular(L_A.mT, U[..., :1] + U[..., 1:] @ lam[..., None], upper=True)[..., 0]
        y = torch.cat([nu, lam], -1)
    x = -torch.linalg.solve_triangular(L.mT, u + V @ y[..., None], upper=True)[..., 0]
    fit = fit & ended & torch.isfinite(x).all(-1)
    each = fit[:, None]
    return torch.where(each, x, 0), torch.where(each, y, 0), all_F & each, fit


def _regular(factor: Tensor, matrix: Tensor, info: Tensor) -> Tensor:
    """Whether the pivots are no rounding of the diagonal they came from."""
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    return (info == 0) & (pivots > LEAST * matrix.diagonal(dim1=-2, dim2=-1)).all(-1)
