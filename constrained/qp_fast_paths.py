"""Programs that need no interior point: bounds only, or nearly."""

from __future__ import annotations

import torch
from torch import Tensor

from .interior_point import Program, product

__all__ = ["separable_guess"]


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
