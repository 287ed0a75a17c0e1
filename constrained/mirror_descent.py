"""Mirror descent: gradient steps in the geometry of a simplex or a box, which stay inside it by themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.implicit.batched_minimizer import BatchedState, Memory, stuck_codes
from nestopt.implicit.batched_objective import Points, select
from nestopt.linalg.result import any_of

from .first_order import Composite, FirstOrder
from .prox import Indicator
from .sets import Box, Simplex
from .terms import per_item

__all__ = ["MirrorDescent"]

_DECREASE = 0.5  # of what the slope at the start promises for the whole step


@dataclass(frozen=True, eq=False)
class MirrorDescent(FirstOrder):
    """Minimise f(y) over a simplex or a box by exponentiated gradients, y+ = the mirror image of u(y) - s grad f(y).

    The mirror map u is log y on a simplex (y = scale softmax(u), of the entropy), log((y - low) / (high - y)) between
    two bounds (Fermi and Dirac's entropy), +-log of the distance to a single bound (on y >= 0, u = log y), and y itself
    without bounds. The size s of each item is doubled after every step, and cut until
    f(y+) <= f(y) + <grad f(y), y+ - y> / 2 (from the slopes at both ends where rounding hides the difference).

    CONVERGED means gap <= max(rtol scale, atol), measured at the point returned. On a simplex, the gap is that of Frank
    and Wolfe, <grad f, y> - min over vertices v of <grad f, v> >= f(y) - min f for convex f. On a box it is likewise
    the most that the slope promises within the bounds, sum_i max(f_i, 0) (y_i - low_i) + max(-f_i, 0) (high_i - y_i),
    where a distance to no bound counts as max(1, |y_i|). The scale is the larger of the gap at y0 and sum |f_i y_i|.

    Coordinates that vanish at the minimiser do so geometrically, and y never touches the boundary; a start on it is
    moved inside by eps times the size of the set. Where exact zeros matter, use ProjectedGradient.

    Cost of a step: one gradient of f, one more for each cut; no projection.

    Args:
        set: a Simplex or Box for every tensor of y, or a pytree of y's structure with one or None for each.
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in the units of f.
        max_iter: limit of steps.

    Raises:
        TypeError: for another set.
        ValueError: for a negative tolerance or limit.

    Reference:
        Beck & Teboulle 2003; Kivinen & Warmuth 1997; the line search: Li & Cevher 2019; the gap: Jaggi 2013.

    Example:
        >>> from nestopt.constrained import Simplex
        >>> res = MirrorDescent(Simplex())(
        ...     lambda y: ((y - torch.tensor([0.2, 0.3, 0.5])) ** 2).sum(), torch.full((3,), 1 / 3))
        >>> res.x, res.status.name
        (tensor([0.2000, 0.3000, 0.5000]), 'CONVERGED')
    """

    set: Any = None

    patience: ClassVar[int] = 300

    def _terms(self) -> Any:
        return self.set

    def _inside(self, f: Composite, y: Tensor) -> Tensor:
        for term in f.terms.each:
            kind = getattr(term, "set", None)
            if not (term is None or (isinstance(term, Indicator) and isinstance(kind, (Simplex, Box)))):
                name = type(term if kind is None else kind).__name__
                raise TypeError(
                    f"MirrorDescent: set must be a Simplex or a Box, but got {name}; use ProjectedGradient."
                )
        return _joined(f, [_interior(*pair) for pair in _parts(f, f.terms.domain(y))])

    def _start(self, f: Composite, points: Points, previous: BatchedState | None) -> Memory:
        if previous is not None:
            return previous.memory
        dual = _joined(f, [_dual(*pair) for pair in _parts(f, points.y)])
        largest = points.gradient.abs().amax(-1) if points.y.shape[-1] else torch.zeros_like(points.value)
        return {"dual": dual, "size": 1 / largest.clamp_min(torch.finfo(largest.dtype).tiny)}

    def _step(self, f: Composite, s: BatchedState, running: Tensor) -> tuple[Points, Memory, Tensor]:
        start, dual, size = s.points, s.memory["dual"], s.memory["size"]
        hidden_below, eps = 10 * start.flat, torch.finfo(size.dtype).eps
        down = _centred(f, start)
        taken, found, pending = start, torch.zeros_like(running), running
        moved = start.y
        for k in range(60):
            if not any_of(pending):
                break
            u = dual - size[..., None] * start.gradient
            moved = _joined(f, [_primal(*pair) for pair in _parts(f, u)])
            trial = f.points(select(pending, moved, start.y))
            step = trial.y - start.y
            slope = torch.linalg.vecdot(down, step)
            rise = trial.value - start.value
            hidden = (rise.abs() <= start.flat) & (-slope <= hidden_below)
            trapezoid = torch.linalg.vecdot(down + _centred(f, trial), step) / 2
            lower = (rise <= _DECREASE * slope) | (hidden & (trapezoid <= _DECREASE * slope))
            still = step.abs().sum(-1) <= eps * start.y.abs().sum(-1)
            enough = pending & lower & (slope < 0) & (trial.value < torch.inf)
            taken, found = taken.where(enough, trial), found | enough
            dual = select(enough, u, dual)
            size = torch.where(enough, 2 * size if k == 0 else size, torch.where(pending, 0.5 * size, size))
            pending = pending & ~enough & ~still
        d = moved - start.y
        codes = torch.where(found, s.codes, stuck_codes(start, d, torch.linalg.vecdot(down, d)))
        return taken, {"dual": dual, "size": size}, codes

    def _measure(self, f: Composite, points: Points, memory: Memory) -> Tensor:
        pairs = zip(_parts(f, points.y), _parts(f, points.gradient), strict=True)
        gaps = (per_item(_gap(space, y, g), len(f.batch)) for (space, y), (_, g) in pairs)
        return sum(gaps, torch.zeros_like(points.value))

    def _scale(self, points: Points, size: Tensor) -> Tensor:
        return torch.maximum(points.error, (points.gradient * points.y).abs().sum(-1))


def _parts(f: Composite, v: Tensor) -> list[tuple[Any, Tensor]]:
    """The set and the vectors of each leaf, which has at least one dimension beyond the batch."""
    leaves = f.ravel.split(v)
    return [
        (None if term is None else term.set, leaf[..., None] if leaf.ndim == len(f.batch) else leaf)  # type: ignore[attr-defined]
        for term, leaf in zip(f.terms.each, leaves, strict=True)
    ]


def _centred(f: Composite, points: Points) -> Tensor:
    """The gradient less a constant over each simplex, on which no step within it depends but its rounding does."""
    pairs = zip(_parts(f, points.y), _parts(f, points.gradient), strict=True)
    leaves = [
        g - (g * y).sum(-1, keepdim=True) / _total_of(space, y) if isinstance(space, Simplex) else g
        for (space, y), (_, g) in pairs
    ]
    return _joined(f, leaves)


def _joined(f: Composite, leaves: list[Tensor]) -> Tensor:
    return f.ravel.join([leaf.reshape(f.batch + shape) for leaf, shape in zip(leaves, f.ravel.shapes, strict=True)])


def _bounds(box: Box | None, y: Tensor) -> tuple[Tensor, Tensor]:
    low, high = (-math.inf, math.inf) if box is None else (box.low, box.high)
    low, high = (torch.as_tensor(b, dtype=y.dtype, device=y.device).detach() for b in (low, high))
    return low.expand_as(y), high.expand_as(y)


def _total_of(simplex: Simplex, y: Tensor) -> Tensor:
    """The sum of each vector."""
    return torch.as_tensor(simplex.scale, dtype=y.dtype, device=y.device).detach()[..., None]


def _interior(space: Simplex | Box | None, y: Tensor) -> Tensor:
    """The point, moved inside where it stands on the boundary."""
    room = torch.finfo(y.dtype).eps
    if isinstance(space, Simplex):
        total = _total_of(space, y)
        y = torch.maximum(y, room * total)
        return y * (total / y.sum(-1, keepdim=True))
    low, high = _bounds(space, y)
    width = torch.where(torch.isinf(high - low), 1, high - low)
    return torch.minimum(torch.maximum(y, low + room * width), high - room * width)


def _dual(space: Simplex | Box | None, y: Tensor) -> Tensor:
    """The mirror map."""
    if isinstance(space, Simplex):
        return y.log()
    low, high = _bounds(space, y)
    below, above = torch.isfinite(low), torch.isfinite(high)
    left, right = torch.where(below, y - low, 1).log(), torch.where(above, high - y, 1).log()
    return torch.where(below | above, left - right, y)


def _primal(space: Simplex | Box | None, u: Tensor) -> Tensor:
    """Its inverse."""
    if isinstance(space, Simplex):
        return _total_of(space, u) * torch.softmax(u, -1)
    low, high = _bounds(space, u)
    below, above = torch.isfinite(low), torch.isfinite(high)
    between = torch.where(below & above, low + (high - low) * torch.sigmoid(u), u)
    return torch.where(below & ~above, low + u.exp(), torch.where(above & ~below, high - (-u).exp(), between))


def _gap(space: Simplex | Box | None, y: Tensor, g: Tensor) -> Tensor:
    """What the slope promises, per vector of a simplex or entry of a box."""
    if isinstance(space, Simplex):
        return ((g - g.amin(-1, keepdim=True)) * y).sum(-1)
    low, high = _bounds(space, y)
    free = y.abs().clamp_min(1.0)
    down, up = torch.where(torch.isfinite(low), y - low, free), torch.where(torch.isfinite(high), high - y, free)
    return g.clamp_min(0) * down + (-g).clamp_min(0) * up
