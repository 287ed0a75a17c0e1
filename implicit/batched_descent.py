"""Gradient descent for a batch of problems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nestopt.linalg import Status

from .batched_minimizer import BatchedKernel, BatchedState, Memory, search, stuck_codes
from .batched_objective import BatchedObjective, Points
from .line_search import MEMORY

__all__ = ["BatchedDescent", "first_sizes", "spectral_sizes"]


@dataclass(frozen=True, kw_only=True)
class BatchedDescent(BatchedKernel):
    """The steps of GradientDescent for every item, each with its own step size.

    Args:
        step_size: constant; None for spectral steps.
    """

    step_size: float | None = None

    patience: ClassVar[int] = 300

    def _start(self, f: BatchedObjective, points: Points, previous: BatchedState | None) -> Memory:
        kept = None if previous is None else previous.memory.get("size")
        size = first_sizes(points) if kept is None else kept
        values = points.value[..., None].expand(*points.value.shape, MEMORY)
        return {"size": size, "values": values, "first": points.value, "norm": points.error}

    def _step(self, f: BatchedObjective, s: BatchedState, running: Tensor) -> tuple[Points, Memory, Tensor]:
        return self._spectral(f, s, running) if self.step_size is None else self._constant(f, s, self.step_size)

    def _constant(self, f: BatchedObjective, s: BatchedState, size: float) -> tuple[Points, Memory, Tensor]:
        new = f.points(s.points.y - size * s.points.gradient)
        lost = ~(torch.isfinite(new.value) & torch.isfinite(new.error))
        grown = new.error > s.memory["norm"] * torch.finfo(new.y.dtype).eps ** -0.5
        lost = lost | (grown & (new.value > s.memory["first"]))
        return new, s.memory, torch.where(lost, Status.DIVERGED.code, s.codes)

    def _spectral(self, f: BatchedObjective, s: BatchedState, running: Tensor) -> tuple[Points, Memory, Tensor]:
        start, size, values = s.points, s.memory["size"], s.memory["values"]
        d = -size[..., None] * start.gradient
        slope = torch.linalg.vecdot(start.gradient, d)
        new, t, found = search(f, start, d, slope, running, reference=values.amax(-1))
        size = spectral_sizes(new.y - start.y, new.gradient - start.gradient, t * size)
        values = torch.cat([values[..., 1:], new.value[..., None]], -1)
        codes = torch.where(found, s.codes, stuck_codes(start, d, slope))
        return new, {**s.memory, "size": size, "values": values}, codes


def first_sizes(points: Points) -> Tensor:
    """Step sizes along the gradient when nothing is known of the curvature.

    Args:
        points: where the steps start; `error` is |gradient|.

    Returns:
        A tensor of shape (*batch,).
    """
    length: Tensor = 0.1 * torch.linalg.vector_norm(points.y, dim=-1).clamp_min(1.0)
    return length / points.error.clamp_min(torch.finfo(length.dtype).tiny)


def spectral_sizes(step: Tensor, change: Tensor, size: Tensor) -> Tensor:
    """The next sizes of gradient steps: 1 / (curvature seen along the last ones).

    Args:
        step: y+ - y.
        change: of the gradient.
        size: of the last step, which is multiplied by ten where no positive curvature was seen.

    Returns:
        s's / s'd, or s'd / d'd where that is less than half of it.
    """
    ss, sd, dd = (torch.linalg.vecdot(a, b) for a, b in ((step, step), (step, change), (change, change)))
    long, short = ss / sd, sd / dd
    return torch.where(sd > 0, torch.where(short < 0.5 * long, short, long), 10 * size)
