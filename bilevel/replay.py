"""Replay: metagradients of long trainings in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .assumptions import Assumptions
from .counts import Counts
from .inner_path import Forward, Pulled
from .inner_steps import InnerSteps, Segment
from .through_solver import ThroughSolver, ThroughState

__all__ = ["Replay"]


@dataclass(frozen=True)
class Replay(ThroughSolver):
    """The gradient of a whole training in what it was trained with (a metagradient), in bounded memory.

    T steps of an optimizer from y0, (y, s)_{t+1} = Phi_t((y, s)_t, x), where x may be in the objectives or in the
    optimizer (a schedule, say), are pulled back as in `Unrolled`, through the optimizer's moments too. Instead of T
    states a tree of them is held: the steps are cut into k parts, whose first states are computed; the last part is
    treated in the same way, then the one before it, down to segments whose graph fits. That holds at most
    (k - 1) ceil(log_k(T / segment)) + 1 states (`state.stored` counts them) and takes each step about
    log_k(T / segment) times again. Inner step t has its own batch (`PerStep`, or a further draw of a source) and its
    own seed, so that steps computed again are the same ones; the hypergradient is added up in float64.

    With `steps` given the training itself is the lower level: x is to lower F(x, y_T(x)). `error` is then the largest
    of |P_X(x - g) - x| and of "trust", |g'd - (F(x + h d) - F(x - h d)) / 2h| with d = g / |g| and F after the whole
    training, where that exceeds half of |g| and the difference's own rounding, else 0: if they disagree an inner
    learning rate that is too large makes training chaotic, g is noise, and `diagnosis(state)` says so. Without `steps`
    there are as many as solve the lower level, and error is that of `Unrolled`. CONVERGED means error <=
    max(rtol (|F_x| + |g - F_x|), atol) with the scale taken at x0.

    Cost of an evaluation: T (2 + log_k(T / segment)) gradients of f and T products, and 2 T gradients for the trust.

    Args:
        steps: T; None for as many as the certificate asks for.
        optimizer: implicit.SGD(lr, momentum=...), Adam, AdamW, or a function (x, t) -> one of these (an object with a
            repr of its own, where a checkpoint is to be resumed in another process); None for heavy ball of automatic
            coefficients.
        upper_step: None for QuasiNewtonStep() on the whole space and SpectralStep() on a set.
        stopping: rtol None is 1e-7 in float64 and 1e-4 in float32.
        warm_start: True begins the training at the last one's end.
        max_inner: limit of inner steps where `steps` is None.
        seed: of the random numbers that the objectives draw.
        branching: k; 2 holds the fewest states, more computes fewer steps again.
        segment: steps whose graph is held at once.

    Raises:
        TypeError: for an optimizer of another kind.
        ValueError: for numbers out of range.

    Reference:
        Engstrom, Ilyas, Chen, Feldmann, Moses & Madry 2025, Optimizing ML training with metagradient descent.

    Example:
        >>> from nestopt import bilevel, implicit
        >>> problem = bilevel.Problem(lambda x, y: ((y - 1) ** 2).sum(), lambda x, y: (y**2).sum() / 2 - y.sum())
        >>> method = bilevel.Replay(steps=10, optimizer=lambda x, t: implicit.SGD(x[t // 5].exp()))
        >>> rates, start = torch.full((2,), -2.0, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        >>> res = method(problem, rates, start)
        >>> bool(res.value < 1e-6)
        True
    """

    warm_start: bool = False
    branching: int = 4
    segment: int = 16

    assumptions: ClassVar[Assumptions] = Assumptions(
        "through the solver", "Engstrom et al. 2025", products=True, stochastic=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.branching < 2 or self.segment < 1:
            raise ValueError(
                f"Replay: branching >= 2 and segment >= 1 are needed, but got {self.branching} and {self.segment}."
            )

    @property
    def measures_bias(self) -> bool:
        """Whether the lower level is an optimisation problem, and not the training itself."""
        return self.steps is None

    def _keep(self, segments: list[Segment], part: Segment) -> None:
        if not part.count:
            return
        if part.fresh or not segments:
            segments.append(part)
        else:
            segments[-1] = replace(segments[-1], count=segments[-1].count + part.count)

    def _backwards(self, steps: InnerSteps, f: Forward) -> Iterator[tuple[Segment, int, int]]:
        for i in reversed(range(len(f.segments))):
            yield from self._parts(steps, f.segments[i], f.x, i)

    def _parts(self, steps: InnerSteps, whole: Segment, x: Tensor, held: int) -> Iterator[tuple[Segment, int, int]]:
        """The parts of a segment from the last to the first, at most branching - 1 further states held a level."""
        if whole.count <= self.segment:
            yield whole, held + 1, 0
            return
        size = -(-whole.count // self.branching)
        parts, first, again = [], 0, 0
        carry = whole.carry
        while first < whole.count:
            part = Segment(
                whole.rule, whole.first + first, min(size, whole.count - first), carry, whole.fresh and not first
            )
            parts.append(part)
            first += part.count
            if first < whole.count:
                carry = steps.advance(part, x)[0]
                again += part.count
        del carry
        while parts:
            part = parts.pop()
            for leaf, alive, more in self._parts(steps, part, x, held + len(parts)):
                yield leaf, alive, more + again
                again = 0

    def diagnosis(self, state: ThroughState) -> str:
        """What the trust residual says.

        Args:
            state: of a run.

        Returns:
            A sentence.
        """
        trust, size = float(state.residuals.get("trust", 0.0)), float(state.hypergradient.norm())
        if not trust > 0:
            return "The metagradient agrees with a finite difference of the whole training along it."
        return (
            f"The metagradient (norm {size:.3g}) and a finite difference of the whole training along it differ by "
            f"{trust:.3g}: the inner learning rate makes training chaotic, so that its derivative is noise; lower it, "
            "or train for fewer steps."
        )

    def advice(self, state: Any) -> str:
        """The diagnosis where the metagradient is not to be trusted; see `ThroughSolver.advice`.

        Args:
            state: the run's last.

        Returns:
            A sentence, or nothing.
        """
        return self.diagnosis(state) if float(state.residuals.get("trust", 0.0)) > 0 else super().advice(state)

    def _backward(self, steps: InnerSteps, f: Forward, tolerance: float) -> Pulled:
        p = super()._backward(steps, f, tolerance)
        if self.steps is None:
            return p
        return replace(
            p, extra={**p.extra, "trust": self._mistrust(steps, f, p)}, counts=p.counts + Counts(2, 2 * f.inner)
        )

    def _mistrust(self, steps: InnerSteps, f: Forward, p: Pulled) -> Tensor:
        """|directional derivative - finite difference| where it exceeds half of the gradient and the rounding."""
        g = p.hypergradient
        size, eps = g.norm(), torch.finfo(g.dtype).eps
        if not float(size) > 0:
            return torch.zeros_like(size)
        h = eps ** (1 / 3) * f.x.norm().clamp_min(1.0)
        values, y = [], f.segments[0].carry.y
        for sign in (1, -1):
            x, carry = f.x + sign * h * g / size, None
            for segment in f.segments:
                first = steps.first_carry(segment.rule, x, y, segment.first) if carry is None else carry
                carry = steps.advance(replace(segment, carry=first), x)[0]
            assert carry is not None
            values.append(steps.problem.oracle(steps.spaces, steps.data_of(f.inner)).values(x, carry.y)[0])
        difference = (values[0] - values[1]) / (2 * h)
        miss = (size - difference).abs()
        rounding = 100 * eps * (values[0].abs() + values[1].abs()) / h
        if not bool(torch.isfinite(miss)):
            return torch.full_like(miss, torch.inf)
        return torch.where(miss > 0.5 * size + rounding, miss, 0.0)
