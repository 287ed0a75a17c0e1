"""Upper steps for a batch of independent bilevel problems, each item with its own size and its own search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nestopt.implicit.batched_descent import spectral_sizes
from nestopt.implicit.batched_lbfgs import BatchedLBFGS
from nestopt.implicit.batched_minimizer import BatchedMinimizer, BatchedState, Memory, search, stuck_codes
from nestopt.implicit.batched_objective import Points

from .batched_points import HyperObjective, HyperPoints

__all__ = ["ProjectedSteps", "QuasiNewtonSteps"]

_MEMORY = 10  # accepted values that a projected step is compared with


class _Judged:
    """What both step rules share: the error is that of the points, and every step starts at the accepted y and v."""

    def _start_from(self, f: HyperObjective, s: BatchedState, running: Tensor) -> None:
        assert isinstance(s.points, HyperPoints)
        f.resume(s.points, ~running, s.tolerance)


@dataclass(frozen=True, kw_only=True)
class QuasiNewtonSteps(_Judged, BatchedLBFGS):
    """L-BFGS directions with a weak Wolfe search; see `BatchedLBFGS`."""

    def _step(self, f: Any, s: BatchedState, running: Tensor) -> tuple[Points, Memory, Tensor]:
        self._start_from(f, s, running)
        return super()._step(f, s, running)

    def _measure(self, f: Any, points: Points, memory: Memory) -> Tensor:
        return points.error

    def _scale(self, points: Points, size: Tensor) -> Tensor:
        assert isinstance(points, HyperPoints)
        return points.scale


@dataclass(frozen=True, kw_only=True)
class ProjectedSteps(_Judged, BatchedMinimizer):
    """Spectral projected gradients: x + t (P(x - size g) - x), with a non-monotone search for t."""

    def _start(self, f: HyperObjective, points: Points, previous: BatchedState | None) -> Memory:
        length = 0.1 * points.y.norm(dim=-1).clamp_min(1.0)
        size = length / points.gradient.norm(dim=-1).clamp_min(torch.finfo(length.dtype).tiny)
        return {"size": size, "values": points.value[..., None].expand(*points.value.shape, _MEMORY)}

    def _step(self, f: HyperObjective, s: BatchedState, running: Tensor) -> tuple[Points, Memory, Tensor]:
        self._start_from(f, s, running)
        start, size, values = s.points, s.memory["size"], s.memory["values"]
        target = f.project(start.y - size[..., None] * start.gradient)
        d = target - start.y
        slope = torch.linalg.vecdot(start.gradient, d)
        new, t, found = search(f, start, d, slope, running, reference=values.amax(-1), target=target)  # type: ignore[arg-type]
        # where no positive curvature was seen, ten times the length; t < 1 shortens it
        size = spectral_sizes(new.y - start.y, new.gradient - start.gradient, t * size)
        values = torch.cat([values[..., 1:], new.value[..., None]], -1)
        codes = torch.where(found, s.codes, stuck_codes(start, d, slope))
        return new, {"size": size, "values": values}, codes

    def _measure(self, f: Any, points: Points, memory: Memory) -> Tensor:
        return points.error

    def _scale(self, points: Points, size: Tensor) -> Tensor:
        assert isinstance(points, HyperPoints)
        return points.scale
