"""Step sizes of the single loop on samples: schedules, and estimates of the curvatures that bound them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .counts import Counts
from .evaluation import Evaluation, Evaluator
from .upper_step import StepState, UpperStep

__all__ = ["ScheduledStep", "upper_curvature"]


@dataclass(frozen=True)
class ScheduledStep(UpperStep):
    """Step sizes by a schedule k -> size, every finite trial accepted.

    Args:
        schedule: such as Polynomial(power=0.5, first=0.1).

    Example:
        >>> from nestopt.bilevel import Polynomial
        >>> ScheduledStep(Polynomial(0.5)).schedule(3)
        0.05
    """

    schedule: Callable[[int], float]

    def start(self, x: Tensor, hypergradient: Tensor, value: Tensor) -> StepState:
        """The first size."""
        none = x.new_zeros(0, len(x))
        return StepState(x.new_tensor(self.schedule(0)), value[None], none, none, {"k": 0})

    def accepts(self, s: StepState, dx: Tensor, hypergradient: Tensor, value: Tensor, noise: float) -> bool:
        """Every finite value."""
        return bool(torch.isfinite(value))

    def after(self, s: StepState, dx: Tensor, change: Tensor | None, value: Tensor) -> StepState:
        """The next size; after a non-finite trial there is nothing else to try, so it becomes 0."""
        if change is None:
            return replace(s, size=torch.zeros_like(s.size))
        k = s.memory["k"] + 1
        return replace(s, size=s.size.new_tensor(self.schedule(k)), values=value[None], memory={"k": k})


def upper_curvature(evaluator: Evaluator, e: Evaluation, steps: int = 3) -> tuple[float, Counts]:
    """The hyperobjective's largest curvature, by power steps on differences of hypergradients.

    Args:
        evaluator: of hypergradients.
        e: evaluated where the curvature is wanted.
        steps: power steps, a lower and an adjoint solve each.

    Returns:
        A lower bound of the curvature, usually within a fifth of it, and what it cost; the hypergradient's norm, or 1,
        where none was seen.
    """
    assert e.hypergradient is not None
    x, g, counts = e.x, e.hypergradient, Counts()
    u = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(x)
    t = torch.finfo(x.dtype).eps ** (1 / 3) * max(1.0, float(x.norm()))
    best = 0.0
    for _ in range(steps):
        u = u / u.norm()
        there = evaluator.differentiate(evaluator.solve(x + t * u, e.y, None), e.adjoint)
        counts += there.counts
        if there.fault is not None or there.hypergradient is None:
            break
        u = (there.hypergradient - g) / t
        best = max(best, float(u.norm()))
        if not u.norm() > 0:
            break
    return best or float(g.norm()) or 1.0, counts
