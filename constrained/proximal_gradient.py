"""Proximal gradient descent, accelerated, with step sizes and restarts that need no tuning."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.implicit.batched_descent import first_sizes
from nestopt.implicit.batched_minimizer import BatchedState, Memory
from nestopt.implicit.batched_objective import Points, select
from nestopt.linalg import Status
from nestopt.linalg.result import any_of

from .first_order import Composite, FirstOrder, step_residual

__all__ = ["ProximalGradient"]

_GROWTH = 1.05  # more would overshoot 1 / L along directions in which the momentum is small


@dataclass(frozen=True, eq=False)
class ProximalGradient(FirstOrder):
    """Minimise f(y) + g(y) for smooth f and a g with a prox, by FISTA with backtracking and adaptive restart.

    From the extrapolated point z, with a size s of its own for every item,

        y+ = prox(z - s grad f(z), s),    t+ = (1 + sqrt(1 + 4 t^2 s / s+)) / 2,    z+ = y+ + (t - 1) / t+ (y+ - y),

    where s is cut until f(y+) <= f(z) + <grad f(z), y+ - z> + |y+ - z|^2 / (2 s); where rounding hides these
    differences, they are computed from the slopes at both ends. The next one, s+, is 1.05 s where less than a quarter
    of that curvature was seen, 10 s where none was. When <z - y+, y+ - y> > 0 the momentum points uphill: t goes back
    to 1, and s+ = 2 s. So neither a Lipschitz constant nor strong convexity need be known.

    CONVERGED means |y - prox(y - s grad f(y), s)| / s <= max(rtol scale, atol), measured at the point returned, with
    s the item's own 1 / (curvature seen) and scale the larger of |grad f(y0)| and the error at y0. At a minimiser it is
    zero for every s; without g it is |grad f|. The run ends as STAGNATED at the rounding level. A g that is not convex
    gives a stationary point at best.

    Cost of a step: two gradients of f (at z, and at y+ for the certificate), one more for each cut, three proxes.

    Args:
        prox: g: a Prox or a Set for every tensor of y, or a pytree of y's structure with a Prox, a Set or None for
            each. A weight for each item has shape (*batch, 1); what it captures is not differentiated here, but by
            `composite_argmin`.
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in the units of the gradient.
        max_iter: limit of steps; about sqrt(condition number) times 30 for 1e-10.

    Raises:
        ValueError: for a negative tolerance or limit.

    Reference:
        Beck & Teboulle 2009, equations 4.1 to 4.3; Scheinberg, Goldfarb & Bai 2014, algorithm 2 (sizes that grow);
        O'Donoghue & Candes 2015, equation 13 (restarts by the gradient).

    Example:
        >>> from nestopt.constrained import L1
        >>> res = ProximalGradient(L1(1.0))(
        ...     lambda y: ((y - torch.tensor([3.0, 0.5])) ** 2).sum() / 2, torch.zeros(2))
        >>> res.x, res.status.name
        (tensor([2.0000, 0.0000]), 'CONVERGED')
    """

    prox: Any = None

    patience: ClassVar[int] = 500

    def _terms(self) -> Any:
        return self.prox

    def _start(self, f: Composite, points: Points, previous: BatchedState | None) -> Memory:
        size = first_sizes(points) if previous is None else previous.memory["size"]
        probe = f.points(points.y - (1e-3 * size)[..., None] * points.gradient) if previous is None else points
        change = torch.linalg.vector_norm(probe.gradient - points.gradient, dim=-1)
        step = torch.linalg.vector_norm(probe.y - points.y, dim=-1)
        guess = step / change  # of the right order, and cut or doubled later
        size = torch.where((change > 0) & torch.isfinite(guess), guess, size)
        return {"size": size, "momentum": torch.ones_like(size), "z": points.y}

    def _step(self, f: Composite, s: BatchedState, running: Tensor) -> tuple[Points, Memory, Tensor]:
        y, size, t = s.points.y, s.memory["size"], s.memory["momentum"]
        z = f.points(s.memory["z"])
        lost = ~(torch.isfinite(z.value) & torch.isfinite(z.error))  # extrapolated out of the domain of f
        z, t = z.where(lost, s.points), torch.where(lost, 1, t)
        z = replace(z, error=torch.linalg.vector_norm(z.gradient, dim=-1))
        new, size, following, found = _backtrack(f, z, size, running)
        step = new.y - y
        uphill = torch.linalg.vecdot(z.y - new.y, step) > 0
        longer = (1 + (1 + 4 * t * t * (size / following)).sqrt()) / 2
        following = torch.where(uphill, 2 * size, following)
        ahead = select(uphill, new.y, new.y + ((t - 1) / longer)[..., None] * step)
        t = torch.where(uphill, 1, longer)
        codes = torch.where(found, s.codes, Status.LINE_SEARCH_FAILED.code)
        return new, {"size": following, "momentum": t, "z": ahead}, codes

    def _measure(self, f: Composite, points: Points, memory: Memory) -> Tensor:
        with torch.no_grad():
            return step_residual(f.terms, points.y, points.gradient, memory["size"])

    def _scale(self, points: Points, size: Tensor) -> Tensor:
        return torch.maximum(points.error, size)


def _backtrack(f: Composite, z: Points, size: Tensor, running: Tensor) -> tuple[Points, Tensor, Tensor, Tensor]:
    """The prox-gradient step from z with the first size, of smaller and smaller ones, that majorises f.

    Args:
        f: the problem.
        z: where the steps start.
        size: to try first.
        running: which items.

    Returns:
        The new points, their sizes, the sizes to try next (larger where little curvature was seen), and where one was
        found.
    """
    eps = torch.finfo(z.y.dtype).eps
    taken, found, pending, following = z, torch.zeros_like(running), running, size
    for _ in range(60):
        if not any_of(pending):
            break
        with torch.no_grad():
            target = f.terms.prox(z.y - size[..., None] * z.gradient, size)
        trial = f.points(select(pending, target, z.y))
        step = trial.y - z.y
        square = torch.linalg.vecdot(step, step)
        exact = trial.value - z.value - torch.linalg.vecdot(z.gradient, step)
        slopes = torch.linalg.vecdot(trial.gradient - z.gradient, step) / 2
        hidden = exact.abs() <= z.flat
        excess = torch.where(hidden, slopes, exact)
        still = square.sqrt() <= 10 * eps * torch.linalg.vector_norm(z.y, dim=-1)  # no curvature can be seen
        enough = pending & ((excess <= square / (2 * size)) | still) & (trial.value < torch.inf)
        taken, found, pending = taken.where(enough, trial), found | enough, pending & ~enough
        fit = 0.9 * square / (2 * excess)
        shorter = torch.where(
            torch.isfinite(fit), torch.maximum(torch.minimum(fit, 0.9 * size), 0.1 * size), 0.1 * size
        )
        growth = torch.where(excess <= 0, 10.0, torch.where(8 * excess * size <= square, _GROWTH, 1.0))
        following = torch.where(enough, torch.where(still, 1.0, growth) * size, following)
        size = torch.where(pending, shorter, size)
    return taken, size, following, found
