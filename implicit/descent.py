"""Gradient descent with a constant step, or with spectral steps that need no tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.linalg import Status

from .batched_descent import BatchedDescent
from .line_search import MEMORY, nonmonotone_search, spectral_size
from .minimizer import Minimizer, MinimizerState, Objective, Point, first_length, stuck

__all__ = ["DescentState", "GradientDescent"]


@dataclass(frozen=True, kw_only=True)
class DescentState(MinimizerState):
    """Where gradient descent stands.

    Attributes:
        size: the next step size.
        values: the last accepted values, newest last.
        first_value: f(y0).
    """

    size: float
    values: tuple[float, ...]
    first_value: float


@dataclass(frozen=True)
class GradientDescent(Minimizer):
    """Minimise f(y) by y+ = y - size * grad f(y).

    With `step_size` the size is that constant, and `GradientDescent(step_size=a, max_iter=k, rtol=0)` takes exactly k
    steps and ends as MAX_ITER (unless the gradient vanishes); a size above 2 / lambda_max ends as DIVERGED, at the last
    finite point.

    Without it, nothing needs tuning: with s = y - y_old and d = grad - grad_old the size is s's / s'd, or s'd / d'd
    where that is less than half of it, and is multiplied by ten where s'd <= 0; it is cut until
    f(y+) <= max of the last 10 values - 1e-4 * size * |grad|^2. So neither f nor |grad| falls at every step.

    CONVERGED means |grad| <= max(rtol |grad(y0)|, atol), measured at x. 300 steps that change f by rounding only
    and lower |grad| no more end the run as STAGNATED, at the best of them; f unbounded below ends it as DIVERGED.

    Cost: one gradient a step, and one value for each size that is tried.

    Args:
        step_size: below 2 / lambda_max of the Hessian, best near 2 / (lambda_max + lambda_min); None chooses it.
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32), 0 for a fixed number of
            steps.
        atol: absolute tolerance, in the units of the gradient.
        max_iter: limit of steps; spectral steps take about 10 sqrt(condition number), a constant one the number itself.

    Raises:
        ValueError: for a step size that is not positive, a negative tolerance or limit.

    Reference:
        Barzilai & Borwein 1988; Raydan 1997, with the line search of Grippo, Lampariello & Lucidi 1986; the choice
        between the two sizes: Zhou, Gao & Dai 2006.

    Example:
        >>> res = GradientDescent()(lambda y: ((y - 1) ** 2).sum(), torch.zeros(3, dtype=torch.float64))
        >>> res.x, res.status.name
        (tensor([1.0000, 1.0000, 1.0000], dtype=torch.float64), 'CONVERGED')
    """

    step_size: float | None = None

    State: ClassVar[type[MinimizerState]] = DescentState
    patience: ClassVar[int] = 300

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_size is not None and not 0 < self.step_size < math.inf:
            raise ValueError(
                f"GradientDescent: step_size must be positive and finite, but got {self.step_size}; None chooses it."
            )

    def _batched(self) -> BatchedDescent:
        return BatchedDescent(
            owner="GradientDescent", rtol=self.rtol, atol=self.atol, max_iter=self.max_iter,
            step_size=self.step_size,
        )  # fmt: skip

    def _start(self, f: Objective, y: Tensor, previous: Any) -> tuple[Point, dict[str, Any]]:
        point = f.differentiate(f.evaluate(y))
        if self.step_size is not None:
            size = self.step_size
        elif isinstance(previous, DescentState):
            size = previous.size
        else:
            size = first_length(point) / max(float(point.error), torch.finfo(torch.float64).tiny)
        return point, {"size": size, "values": (point.value,), "first_value": point.value}

    def _step(self, f: Objective, s: DescentState) -> Any:
        return self._spectral(f, s) if self.step_size is None else self._constant(f, s)

    def _constant(self, f: Objective, s: DescentState) -> Any:
        point = f.differentiate(f.evaluate(s.point.y - s.size * s.point.gradient))
        if not point.finite:
            return s.end(Status.DIVERGED)
        grown = point.error > s.scale * torch.finfo(point.y.dtype).eps ** -0.5
        new = replace(s, point=point)
        return new.end(Status.DIVERGED) if bool(grown) and point.value > s.first_value else new

    def _spectral(self, f: Objective, s: DescentState) -> Any:
        slope = -s.size * float(s.error) ** 2
        found = nonmonotone_search(f, s.point, -s.size * s.point.gradient, slope, max(s.values))
        if found is None:
            return s.end(stuck(s.point, s.size * float(s.error), -slope))
        point = f.differentiate(found[0])
        size = spectral_size(point.y - s.point.y, point.gradient - s.point.gradient, found[1] * s.size)
        return replace(s, point=point, size=size, values=(*s.values, point.value)[-MEMORY:])
