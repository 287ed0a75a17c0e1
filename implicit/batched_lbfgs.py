"""Limited-memory BFGS for a batch of problems."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nestopt.linalg.result import any_of

from .batched_descent import first_sizes
from .batched_minimizer import BatchedKernel, BatchedState, Memory, search, stuck_codes
from .batched_objective import BatchedObjective, Points, select

__all__ = ["BatchedLBFGS"]

_CURVATURE = 0.9  # the slope must have risen to this part of itself, so that every pair has positive curvature


@dataclass(frozen=True, kw_only=True)
class BatchedLBFGS(BatchedKernel):
    """y+ = y - t H grad f(y) with the compact form of H, so that a step is a few batched products.

    The pairs are scaled to s'd = 1. With R the upper triangle of S'D (unit diagonal) and gamma = 1 / |d_last|^2,
    H = gamma I + S R^-T (I + gamma D'D) R^-1 S' - gamma (S R^-T D' + D R^-1 S'). An absent pair is a pair of zeros,
    which changes nothing, so that items with different numbers of pairs stand side by side.

    Args:
        history_size: pairs kept.

    Reference:
        Byrd, Nocedal & Schnabel 1994, theorem 2.2; the line search: Lewis & Overton 2013.
    """

    history_size: int = 30

    def _start(self, f: BatchedObjective, points: Points, previous: BatchedState | None) -> Memory:
        shape, m = points.y.shape, self.history_size
        zeros = points.y.new_zeros
        steps = zeros(*shape[:-1], m, shape[-1])
        if previous is not None and "steps" in previous.memory and previous.memory["steps"].shape == steps.shape:
            return previous.memory
        pairs, gamma = zeros(*shape[:-1], m, m), zeros(shape[:-1])
        return {"steps": steps, "changes": torch.zeros_like(steps), "pairs": pairs, "gamma": gamma}

    def _step(self, f: BatchedObjective, s: BatchedState, running: Tensor) -> tuple[Points, Memory, Tensor]:
        start, memory = s.points, s.memory
        first = -first_sizes(start)[..., None] * start.gradient
        learnt = running & (memory["gamma"] > 0)
        d = select(learnt, -_product(memory, start.gradient), first)
        usable = torch.linalg.vecdot(start.gradient, d) < 0
        d = select(usable, d, first)
        slope = torch.linalg.vecdot(start.gradient, d)
        new, _, found = search(f, start, d, slope, running, curvature=_CURVATURE)
        failed = learnt & usable & ~found
        if any_of(failed):  # the curvature that was learnt misleads: once more without it
            d = select(failed, first, d)
            slope = torch.linalg.vecdot(start.gradient, d)
            again, _, found_again = search(f, start, d, slope, failed, curvature=_CURVATURE)
            new, found = new.where(found_again, again), found | found_again
        kept = usable & ~failed
        memory = {name: select(kept, value, torch.zeros_like(value)) for name, value in memory.items()}
        codes = torch.where(found, s.codes, stuck_codes(start, d, slope))
        return new, _extended(memory, new.y - start.y, new.gradient - start.gradient), codes


def _product(memory: Memory, g: Tensor) -> Tensor:
    """H g."""
    S, D, R, gamma = memory["steps"], memory["changes"], memory["pairs"], memory["gamma"][..., None, None]
    column = g[..., None]
    u = torch.linalg.solve_triangular(R, S @ column, upper=True, unitriangular=True)
    w = u + gamma * (D @ (D.mT @ u - column))
    w = torch.linalg.solve_triangular(R.mT, w, upper=False, unitriangular=True)
    product: Tensor = (gamma * (column - D.mT @ u) + S.mT @ w)[..., 0]
    return product


def _extended(memory: Memory, step: Tensor, change: Tensor) -> Memory:
    """The memory with one more pair, and without the oldest, for items whose pair has positive curvature."""
    S, D, R = memory["steps"], memory["changes"], memory["pairs"]
    bend = torch.linalg.vecdot(step, change)
    sizes = torch.linalg.vector_norm(step, dim=-1) * torch.linalg.vector_norm(change, dim=-1)
    floor = (torch.finfo(step.dtype).eps * sizes).clamp_min(torch.finfo(step.dtype).tiny)
    good = bend > floor
    unit = torch.where(good, bend, 1).rsqrt()[..., None]
    step, change = unit * step, unit * change
    S_new = torch.cat([S[..., 1:, :], step[..., None, :]], -2)
    D_new = torch.cat([D[..., 1:, :], change[..., None, :]], -2)
    column = S_new @ change[..., None]
    R_new = torch.cat([torch.nn.functional.pad(R[..., 1:, 1:], (0, 0, 0, 1)), column], -1)
    gamma = 1 / torch.linalg.vecdot(change, change)
    new = {"steps": S_new, "changes": D_new, "pairs": R_new, "gamma": gamma}
    return {name: select(good, value, memory[name]) for name, value in new.items()}
