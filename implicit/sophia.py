"""Sophia: clipped steps of momentum over a stochastic estimate of the Hessian's diagonal."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.linalg import LinearOperator

from .minimizer import Minimizer, MinimizerState, Objective, Point

__all__ = ["Sophia", "SophiaState"]


@dataclass(frozen=True, kw_only=True)
class SophiaState(MinimizerState):
    """Where Sophia stands.

    Attributes:
        momentum: running mean of gradients, (n,).
        diagonal: running mean of u * (H u), (n,).
        weights: sums of the weights of both means, which start from zero.
        estimates: how many estimates of the diagonal were made.
        age: steps since the last one.
        hessian: at the newest point, where the next step makes one.
    """

    momentum: Tensor = field(repr=False)
    diagonal: Tensor = field(repr=False)
    weights: tuple[float, float]
    estimates: int
    age: int
    hessian: LinearOperator | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Sophia(Minimizer):
    """Minimise f(y) by y+ = y - step_size * clip(m / max(gamma h, eps), -1, 1), coordinate by coordinate.

    m is the running mean of the gradients, h that of u * (H u), u random signs, one product every `refresh_every`
    steps: Hutchinson's estimate of diag(H). Where h is small or negative the step is step_size in m's direction. Both
    means are divided by the sum of their weights (the paper starts them at zero, which makes the first steps of h too
    long), and there is no weight decay, which would change the minimiser. There is no line search: f need not fall at
    every step, and a coordinate along which the curvature stays negative never settles.

    CONVERGED means |grad| <= max(rtol |grad(y0)|, atol), measured at x; MAX_ITER, that the steps have not settled:
    lower step_size, or use LBFGS. f unbounded below ends a run as DIVERGED only when it has walked that far.

    Cost of a step: one gradient, and 1 / refresh_every products.

    Args:
        step_size: the largest move of a coordinate in a step, in the units of y.
        gamma: the unclipped step is step_size / gamma of Newton's along each coordinate; equal to step_size or larger.
        momentum: weight of the old mean of gradients; it lets H's largest eigenvalue in units of its diagonal be up to
            2 (1 + momentum) / (1 - momentum).
        averaging: weight of the old mean of the diagonal.
        refresh_every: steps with one estimate of the diagonal.
        eps: least denominator, in the units of the gradient.
        seed: of the random signs.
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in the units of the gradient.
        max_iter: limit of steps; hundreds to thousands.

    Raises:
        ValueError: for a step size, gamma or eps that is not positive, a weight outside [0, 1), a negative tolerance or
            limit.

    Reference:
        Liu, Li, Hall, Liang & Ma 2024, Sophia: a scalable stochastic second-order optimizer, algorithm 3 with
        Hutchinson's estimator (algorithm 1).

    Example:
        >>> scale = torch.tensor([1.0, 1e4], dtype=torch.float64)
        >>> res = Sophia(momentum=0.5)(lambda y: (scale * (y - 1) ** 2).sum(), torch.zeros(2, dtype=torch.float64))
        >>> res.x, res.status.name
        (tensor([1.0000, 1.0000], dtype=torch.float64), 'CONVERGED')
    """

    step_size: float = 0.05
    gamma: float = 0.05
    momentum: float = 0.96
    averaging: float = 0.99
    refresh_every: int = 10
    eps: float = 1e-12
    seed: int = 0
    max_iter: int = field(default=5000, kw_only=True)

    State: ClassVar[type[MinimizerState]] = SophiaState
    patience: ClassVar[int] = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("step_size", "gamma", "eps"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"Sophia: {name} must be positive and finite, but got {value}.")
        for name in ("momentum", "averaging"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"Sophia: {name} must lie in [0, 1), but got {value}; use e.g. 0.9.")
        if not isinstance(self.refresh_every, int) or self.refresh_every < 1:
            raise ValueError(f"Sophia: refresh_every must be an integer >= 1, but got {self.refresh_every!r}.")

    def _start(self, f: Objective, y: Tensor, previous: Any) -> tuple[Point, dict[str, Any]]:
        trial, zero = f.evaluate(y), torch.zeros_like(y)
        if isinstance(previous, SophiaState) and previous.estimates:
            names = ("diagonal", "weights", "estimates", "age")
            memory = {name: getattr(previous, name) for name in names}
            memory["weights"] = (0.0, previous.weights[1])  # the old gradients may be another objective's
            return f.differentiate(trial), {**memory, "momentum": zero}
        point, hessian = f.linearize(trial)
        return point, {
            "momentum": zero, "diagonal": zero, "weights": (0.0, 0.0), "estimates": 0, "age": 0, "hessian": hessian,
        }  # fmt: skip

    def _release(self, s: SophiaState) -> SophiaState:
        return replace(s, hessian=None)

    def _step(self, f: Objective, s: SophiaState) -> Any:
        if not s.estimates or s.age >= self.refresh_every:
            s = self._refresh(f, s)
        wm, wh = self.momentum * s.weights[0] + 1 - self.momentum, s.weights[1]
        m = self.momentum * s.momentum + (1 - self.momentum) * s.point.gradient
        ratio = (m / wm) / (self.gamma / wh * s.diagonal).clamp_min(self.eps)
        trial = f.evaluate(s.point.y - self.step_size * ratio.clamp(-1, 1))
        due = s.age + 1 >= self.refresh_every
        point, hessian = f.linearize(trial) if due else (f.differentiate(trial), None)
        return replace(s, point=point, hessian=hessian, momentum=m, weights=(wm, wh), age=s.age + 1)

    def _refresh(self, f: Objective, s: SophiaState) -> SophiaState:
        """The state with one more estimate of the diagonal in its mean."""
        hessian = f.linearize(f.evaluate(s.point.y))[1] if s.hessian is None else s.hessian
        y = s.point.y
        generator = torch.Generator(y.device).manual_seed(self.seed + s.estimates)
        u = 2.0 * torch.randint(0, 2, y.shape, generator=generator, device=y.device).to(y.dtype) - 1
        f.products += 1
        diagonal = self.averaging * s.diagonal + (1 - self.averaging) * u * (hessian @ u)
        weights = (s.weights[0], self.averaging * s.weights[1] + 1 - self.averaging)
        return replace(s, diagonal=diagonal, weights=weights, estimates=s.estimates + 1, age=0, hessian=None)
