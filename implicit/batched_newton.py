"""Newton's method with truncated conjugate gradients for a batch of problems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nestopt.linalg import CG, LinearOperator, Status
from nestopt.linalg.result import any_of, is_running

from .batched_minimizer import BatchedKernel, BatchedState, Memory, search, stuck_codes
from .batched_objective import BatchedObjective, Points, select

__all__ = ["BatchedNewtonCG"]

_FORCING = 0.1


@dataclass(frozen=True, kw_only=True)
class BatchedNewtonCG(BatchedKernel):
    """The steps of NewtonCG for every item, all Newton systems in one run of CG.

    Each system is scaled by its own forcing term, so that one tolerance of CG is every item's own.

    Args:
        cg_max_iter: limit of products for one step.
        preconditioner: of every item's system.
    """

    cg_max_iter: int = 1000
    preconditioner: LinearOperator | None = None

    patience: ClassVar[int] = 2

    def _start(self, f: BatchedObjective, points: Points, previous: BatchedState | None) -> Memory:
        return {"forcing": torch.full_like(points.value, _FORCING)}

    def _step(self, f: BatchedObjective, s: BatchedState, running: Tensor) -> tuple[Points, Memory, Tensor]:
        start, size = s.points, s.error
        eta = torch.maximum(s.memory["forcing"], 0.1 * s.tolerance / size)
        unit = torch.where(running, size * eta, 1)[..., None]
        b = torch.where(running[..., None], -start.gradient / unit, 0)
        hessian = f.hessian(start.y)
        solution = CG(0.0, 1.0, self.cg_max_iter, self.preconditioner)(hessian, b)  # |H d + g| <= eta |g|
        f.products += solution.products
        d = unit * solution.x
        if solution.direction is not None:
            d = _leave_saddle(f, start, hessian, d, solution.direction)
        slope = torch.linalg.vecdot(start.gradient, d)
        descent = slope < 0
        new, _, found = search(f, start, d, slope, running & descent)
        # CG came to nothing: a product was not finite, or the preconditioner is not definite
        broken = torch.where(solution.codes == Status.NON_FINITE.code, solution.codes, Status.BREAKDOWN.code)
        codes = torch.where(found, s.codes, torch.where(descent, stuck_codes(start, d, slope), broken))
        forcing = (0.9 * (new.error / size) ** 2).clamp_max(_FORCING)
        return new, {"forcing": torch.where(is_running(codes), forcing, _FORCING)}, codes


def _leave_saddle(f: BatchedObjective, start: Points, hessian: LinearOperator, d: Tensor, p: Tensor) -> Tensor:
    """The steps d and, where p is not zero, from their ends along p of curvature <= 0 while doubled steps lower f."""
    pending = p.abs().sum(-1) > 0
    size = torch.linalg.vector_norm(p, dim=-1)
    slope = torch.linalg.vecdot(start.gradient, p)
    p = select(pending, p / torch.copysign(size, -slope)[..., None], p)
    f.products += int(pending.sum())
    bend = torch.linalg.vecdot(p, hessian @ p).abs()
    limit = torch.linalg.vector_norm(start.y, dim=-1).clamp_min(1.0)
    newton = torch.linalg.vecdot(start.gradient, p).abs() / bend  # as if the curvature were |p'Hp|
    first = step = torch.where(bend > 0, torch.minimum(newton, limit), limit)[..., None] * p
    moving = d.abs().sum(-1) > 0
    bent, value = pending, torch.where(moving, f.values(start.y + d), start.value)
    for _ in range(20):
        if not any_of(pending):
            break
        trial = f.values(torch.where(pending[..., None], start.y + d + step, start.y))
        pending = pending & (trial < value)
        d, value = select(pending, d + step, d), torch.where(pending, trial, value)
        step, moving = 2 * step, moving | pending
    return select(bent & ~moving, first, d)
