"""Projected gradient descent with spectral steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.implicit.batched_descent import first_sizes, spectral_sizes
from nestopt.implicit.batched_minimizer import BatchedState, Memory, search, stuck_codes
from nestopt.implicit.batched_objective import Points
from nestopt.implicit.line_search import MEMORY

from .first_order import Composite, FirstOrder, step_residual

__all__ = ["ProjectedGradient"]


@dataclass(frozen=True, eq=False)
class ProjectedGradient(FirstOrder):
    """Minimise f(y) over a convex set C, known by its projection P, by spectral projected gradients.

    The direction is d = P(y - s grad f(y)) - y, so that y + t d is feasible for 0 <= t <= 1, and t = 1 is cut until
    f(y + t d) <= max of the last 10 values + 1e-4 t <grad f, d>. The size s of the next step is the spectral one:
    |step|^2 / <step, change of the gradient>, or <step, change> / |change|^2 where that is less than half of it. Each
    item has its own; nothing needs tuning, and neither f nor the error falls at every step.

    CONVERGED means |y - P(y - c grad f(y))| / c <= max(rtol scale, atol), measured at the point returned, with c the
    item's 1 / (largest curvature seen lately) and scale the larger of |grad f(y0)| and the error at y0. It is zero
    exactly where no feasible direction descends. The run ends as STAGNATED at the rounding level, and f unbounded below
    on C as DIVERGED.

    Cost of a step: one gradient of f, one more for each cut, and two projections.

    Args:
        set: C: a convex Set for every tensor of y, or a pytree of y's structure with a Set or None for each.
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in the units of the gradient.
        max_iter: limit of steps; about 10 sqrt(condition number).

    Raises:
        ValueError: for a negative tolerance or limit.

    Reference:
        Birgin, Martinez & Raydan 2000, algorithm SPG2; the choice between the two sizes: Zhou, Gao & Dai 2006.

    Example:
        >>> from nestopt.constrained import Simplex
        >>> res = ProjectedGradient(Simplex())(
        ...     lambda y: ((y - torch.tensor([2.0, 1.5, 0.0])) ** 2).sum(), torch.zeros(3))
        >>> res.x, res.status.name
        (tensor([0.7500, 0.2500, 0.0000]), 'CONVERGED')
    """

    set: Any = None

    patience: ClassVar[int] = 300

    def _terms(self) -> Any:
        return self.set

    def _start(self, f: Composite, points: Points, previous: BatchedState | None) -> Memory:
        kept = None if previous is None else previous.memory
        size = first_sizes(points) if kept is None else kept["size"]
        values = points.value[..., None].expand(*points.value.shape, MEMORY)
        return {"size": size, "short": size if kept is None else kept["short"], "values": values}

    def _step(self, f: Composite, s: BatchedState, running: Tensor) -> tuple[Points, Memory, Tensor]:
        start, size, values = s.points, s.memory["size"], s.memory["values"]
        with torch.no_grad():
            target = f.terms.prox(start.y - size[..., None] * start.gradient, size)
        d = target - start.y
        # the projection promises <grad f, d> <= -|d|^2 / s, which near the answer is lost in rounding
        slope = torch.fmin(torch.linalg.vecdot(start.gradient, d), -torch.linalg.vecdot(d, d) / size)
        new, t, found = search(f, start, d, slope, running & (slope < 0), reference=values.amax(-1), target=target)
        step, change = new.y - start.y, new.gradient - start.gradient
        size = spectral_sizes(step, change, t * size)
        seen = torch.linalg.vector_norm(step, dim=-1) / torch.linalg.vector_norm(change, dim=-1)
        short = torch.where(seen < torch.inf, torch.fmin(2 * s.memory["short"], seen), size)
        values = torch.cat([values[..., 1:], new.value[..., None]], -1)
        codes = torch.where(found, s.codes, stuck_codes(start, d, slope))
        return new, {"size": size, "short": torch.fmin(short, size), "values": values}, codes

    def _measure(self, f: Composite, points: Points, memory: Memory) -> Tensor:
        with torch.no_grad():
            return step_residual(f.terms, points.y, points.gradient, memory["short"])

    def _scale(self, points: Points, size: Tensor) -> Tensor:
        return torch.maximum(points.error, size)
