"""How far to go along the hypergradient: rules that need no tuning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .curvature_pairs import Pairs

__all__ = ["ConstantStep", "QuasiNewtonStep", "SpectralStep", "StepState", "UpperStep"]


@dataclass(frozen=True)
class StepState:
    """What a rule remembers between trials.

    Attributes:
        size: the step size of the next trial, a 0-d tensor.
        values: recent accepted values of the hyperobjective, newest last.
        steps: recent accepted steps, of shape (k, n), newest last; none unless the rule uses them.
        changes: the hypergradient's change over each.
        memory: what else a rule keeps, such as an optimizer's state; nested dicts of tensors and numbers.
    """

    size: Tensor
    values: Tensor
    steps: Tensor
    changes: Tensor
    memory: dict[str, Any] = field(default_factory=dict)


def _fresh(size: Tensor, value: Tensor, x: Tensor) -> StepState:
    return StepState(size, value[None], x.new_zeros(0, len(x)), x.new_zeros(0, len(x)))


class UpperStep(ABC):
    """A rule for trial steps P_X(x + size * direction): where to, how far, what to accept, what to try next.

    One trial is one outer step of the method: a rejected trial leaves x where it was and costs a lower solve.
    """

    first: float = 0.1

    def start(self, x: Tensor, hypergradient: Tensor, value: Tensor) -> StepState:
        """The state at the first evaluated point: a first step of length first * max(1, |x|)."""
        size = self.first * x.norm().clamp_min(1.0) / hypergradient.norm().clamp_min(torch.finfo(x.dtype).tiny)
        return _fresh(size, value, x)

    def direction(self, s: StepState, hypergradient: Tensor) -> Tensor:
        """Where the next trial goes."""
        return -hypergradient

    @abstractmethod
    def accepts(self, s: StepState, dx: Tensor, hypergradient: Tensor, value: Tensor, noise: float) -> bool:
        """Whether the trial is taken.

        Args:
            s: the rule's state.
            dx: trial minus x, after projection.
            hypergradient: at x.
            value: hyperobjective at the trial; may be NaN.
            noise: how far two values may differ by the inexactness of the lower solves alone.
        """

    @abstractmethod
    def after(self, s: StepState, dx: Tensor, change: Tensor | None, value: Tensor) -> StepState:
        """The next state.

        Args:
            s: the rule's state.
            dx: trial minus x.
            change: hypergradient at the trial minus that at x; None when the trial was rejected.
            value: hyperobjective at the trial.
        """


@dataclass(frozen=True)
class ConstantStep(UpperStep):
    """The same step size always, every finite trial accepted, as in the papers.

    Args:
        size: below 2 / L for a hypergradient with Lipschitz constant L.

    Example:
        >>> ConstantStep(0.1).size
        0.1
    """

    size: float

    def __post_init__(self) -> None:
        if not self.size > 0:
            raise ValueError(f"ConstantStep: size must be positive, but got {self.size}; SpectralStep() chooses it.")

    def start(self, x: Tensor, hypergradient: Tensor, value: Tensor) -> StepState:
        """The given size."""
        return _fresh(x.new_tensor(self.size), value, x)

    def accepts(self, s: StepState, dx: Tensor, hypergradient: Tensor, value: Tensor, noise: float) -> bool:
        """Every finite value."""
        return bool(torch.isfinite(value))

    def after(self, s: StepState, dx: Tensor, change: Tensor | None, value: Tensor) -> StepState:
        """The same size; after a rejected (non-finite) trial there is nothing else to try, so the size becomes 0."""
        if change is None:
            return replace(s, size=torch.zeros_like(s.size))
        return replace(s, values=value[None])


@dataclass(frozen=True)
class SpectralStep(UpperStep):
    """Spectral (Barzilai-Borwein) steps with a non-monotone Armijo test: projected gradients that need no tuning.

    A trial is accepted when phi(trial) <= max of the last `memory` values + decrease * <hypergradient, dx> + noise.
    After it the next size is dx'dx / dx'dg (or dx'dg / dg'dg, where that is less than half of it), which follows the
    local curvature; where the hypergradient shows no positive curvature along dx the size grows fourfold. A rejected
    trial halves the size; one with a NaN divides it by ten.

    Args:
        first: length of the first trial step relative to max(1, |x|).
        memory: accepted values that a trial is compared with; 1 forces descent.
        decrease: Armijo's constant, in (0, 1/2).

    Reference:
        Birgin, Martinez & Raydan 2000, algorithm SPG1 (one trial a step); Dai & Fletcher 2005 on alternating sizes.

    Example:
        >>> SpectralStep(memory=1)
        SpectralStep(first=0.1, memory=1, decrease=0.0001)
    """

    first: float = 0.1
    memory: int = 10
    decrease: float = 1e-4

    def __post_init__(self) -> None:
        if not (self.first > 0 and self.memory >= 1 and 0 < self.decrease < 0.5):
            raise ValueError(f"SpectralStep: first > 0, memory >= 1 and 0 < decrease < 1/2 are needed, but got {self}.")

    def accepts(self, s: StepState, dx: Tensor, hypergradient: Tensor, value: Tensor, noise: float) -> bool:
        """The non-monotone Armijo test; NaN and inf fail it."""
        return bool(value <= s.values.max() + self.decrease * torch.dot(hypergradient, dx) + noise)

    def after(self, s: StepState, dx: Tensor, change: Tensor | None, value: Tensor) -> StepState:
        """The spectral size after an accepted trial, a smaller one after a rejected."""
        if change is None:
            return replace(s, size=s.size * (0.5 if torch.isfinite(value) else 0.1))
        values = torch.cat([s.values, value[None]])[-self.memory :]
        curvature = torch.dot(dx, change)
        if curvature <= 0:
            return replace(s, size=4 * s.size, values=values)
        long, short = torch.dot(dx, dx) / curvature, curvature / torch.dot(change, change)
        # Dai & Fletcher's choice: the short size where the two differ much, else the long one
        size = torch.where(short < 0.5 * long, short, long)
        return replace(s, size=size, values=values)


@dataclass(frozen=True)
class QuasiNewtonStep(UpperStep):
    """Limited-memory BFGS directions with an Armijo test, for an upper level without a set.

    The direction is -B g with the inverse BFGS matrix B of the last `memory` pairs (dx, dg), in its compact form; a
    pair enters when dx'dg > 1e-10 |dx| |dg|. The first trial along a direction has size 1 (before there is a pair,
    the length first * max(1, |x|)). A trial is accepted when phi(trial) <= phi(x) + decrease * <g, dx> + noise; a
    rejected one halves the size, one with a NaN divides it by ten, and after eight halvings the pairs are forgotten.

    Args:
        first: length of the first trial step relative to max(1, |x|).
        memory: pairs that are kept.
        decrease: Armijo's constant, in (0, 1/2).

    Reference:
        Byrd, Nocedal & Schnabel 1994, theorem 2.2; Nocedal & Wright 2006, algorithm 7.5.

    Example:
        >>> QuasiNewtonStep(memory=5)
        QuasiNewtonStep(first=0.1, memory=5, decrease=0.0001)
    """

    first: float = 0.1
    memory: int = 20
    decrease: float = 1e-4

    def __post_init__(self) -> None:
        if not (self.first > 0 and self.memory >= 1 and 0 < self.decrease < 0.5):
            raise ValueError(f"QuasiNewtonStep: first > 0, memory >= 1 and 0 < decrease < 1/2 are needed, not {self}.")

    def direction(self, s: StepState, hypergradient: Tensor) -> Tensor:
        """-B g."""
        return Pairs.of(s.steps, s.changes).direction(hypergradient)

    def accepts(self, s: StepState, dx: Tensor, hypergradient: Tensor, value: Tensor, noise: float) -> bool:
        """The Armijo test; NaN and inf fail it."""
        return bool(value <= s.values[-1] + self.decrease * torch.dot(hypergradient, dx) + noise)

    def after(self, s: StepState, dx: Tensor, change: Tensor | None, value: Tensor) -> StepState:
        """Learn from an accepted trial; shorten after a rejected one."""
        if change is None:
            size = s.size * (0.5 if torch.isfinite(value) else 0.1)
            if len(s.steps) and size < 2**-8:  # the pairs mislead: start again from the steepest descent
                last = s.steps[-1].norm() / s.changes[-1].norm()
                return replace(s, size=last, steps=s.steps[:0], changes=s.changes[:0])
            return replace(s, size=size)
        steps, changes = s.steps, s.changes
        if torch.dot(dx, change) > 1e-10 * dx.norm() * change.norm():
            steps = torch.cat([steps, dx[None]])[-self.memory :]
            changes = torch.cat([changes, change[None]])[-self.memory :]
        size = torch.ones_like(s.size) if len(steps) else 4 * s.size
        return StepState(size, value[None], steps, changes)
