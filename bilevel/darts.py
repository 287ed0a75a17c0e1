"""DARTS: the pull through inner steps by central differences of gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nestopt.implicit import SGD

from .assumptions import Assumptions
from .counts import Counts
from .inner_steps import InnerSteps, Segment
from .through_solver import ThroughSolver

__all__ = ["DARTS"]


@dataclass(frozen=True)
class DARTS(ThroughSolver):
    """Differentiable architecture search's difference: inner steps pulled back by two gradients of f each.

    With one inner step w = y - xi f_y(x, y), the paper's case, the hypergradient of F(x, w) is

        g = F_x - xi (f_x(x, y + e d) - f_x(x, y - e d)) / (2 e),    d = F_y(x, w),    e = epsilon / |d|,

    and the same two gradients give f_yy d, so that any number of steps, with momentum too, is pulled back without
    second derivatives: c = a_m - lr a_y, g += f_xy c, a_y += f_yy c, a_m = momentum c, both products by one difference.
    One step solves another problem than the bilevel one (1/xi in the place of f_yy), so by default there are as many
    as the certificate asks for; `DARTS.published(xi)` is the paper's.

    `error` is that of `Unrolled`, the largest of |f_y|, |dF / dy_t| at the first step that was differentiated, and
    |P_X(x - g) - x|; CONVERGED means error <= max(rtol (|F_x| + |g - F_x|), atol) with the scale taken at x0. What the
    differences themselves are wrong by, e^2 |c|^3 f''' / 6 plus rounding over e, is not in it.

    Cost of an evaluation: one gradient of f an inner step, four more for each step that is pulled back; the automatic
    inner step size looks at f's curvature by some twenty products.

    Args:
        steps: inner steps of each evaluation; None for as many as the certificate asks for.
        optimizer: implicit.SGD(xi), with momentum if wanted, both numbers; None for the coefficients of the
            curvatures seen.
        upper_step: None for QuasiNewtonStep() on the whole space and SpectralStep() on a set.
        stopping: rtol None is 1e-7 in float64 and 1e-4 in float32.
        warm_start: whether the inner steps begin at the last y, or always at y0.
        max_inner: limit of inner steps where `steps` is None.
        seed: of the random numbers that the objectives draw.
        epsilon: length |e c| of the differences; 0.01 in the paper; None for eps^(1/3) max(1, |y|).

    Raises:
        TypeError: for another optimizer.
        ValueError: for an epsilon that is not positive, or SGD with options beyond a step size and a momentum.

    Reference:
        Liu, Simonyan & Yang 2019, DARTS: differentiable architecture search, equations 7 and 8.

    Example:
        >>> from nestopt import bilevel
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y: ((y - 1) ** 2).sum(), lower=lambda x, y: ((y - x) ** 2).sum() + 0.5 * (y**2).sum()
        ... )
        >>> res = bilevel.DARTS()(problem, torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
        >>> res.status.name, [round(v, 5) for v in res.x.tolist()]
        ('CONVERGED', [1.5, 1.5])
    """

    epsilon: float | None = None

    assumptions: ClassVar[Assumptions] = Assumptions("through the solver", "Liu et al. 2019", products=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epsilon is not None and not self.epsilon > 0:
            raise ValueError(f"DARTS: epsilon must be positive, but got {self.epsilon}; None chooses it.")
        if self.optimizer is None:
            return
        if not isinstance(self.optimizer, SGD):
            raise TypeError(
                f"DARTS: the differences are those of gradient steps, but optimizer is {self.optimizer!r}; use "
                "implicit.SGD(xi, momentum=...), or Unrolled, which takes any."
            )
        o = self.optimizer
        if not all(isinstance(v, (int, float)) for v in (o.lr, o.momentum)) or any(
            (o.dampening, o.weight_decay, o.nesterov, o.maximize)
        ):
            raise ValueError(
                "DARTS: SGD with a number for lr and for momentum, and without other options, is needed; write a "
                "weight decay into the lower objective, or use Unrolled."
            )

    @classmethod
    def published(cls, xi: float) -> DARTS:
        """The paper's: one step of size xi, epsilon 0.01.

        Args:
            xi: the inner step size.

        Returns:
            The method, whose bias is its residual "adjoint".
        """
        return cls(steps=1, optimizer=SGD(xi), epsilon=0.01)

    def _pull(
        self, steps: InnerSteps, segment: Segment, x: Tensor, cotangents: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], Counts]:
        rule = segment.rule
        assert isinstance(rule, SGD)
        leaves = [leaf.detach() for leaf in steps.spaces.x.split(x)]
        carry, points = segment.carry, []
        for t in range(segment.first, segment.first + segment.count):
            points.append(carry.y)
            carry, _ = steps.step(rule, leaves, carry, t, graph=False)
        a_y = cotangents[0]
        a_m = cotangents[1] if len(cotangents) > 1 else torch.zeros_like(a_y)
        g, counts = torch.zeros_like(x, dtype=torch.float64), Counts(lower_gradients=segment.count)
        base = torch.finfo(x.dtype).eps ** (1 / 3)
        for i in reversed(range(segment.count)):
            y, c = points[i], a_m - rule.lr * a_y
            length = c.norm()
            if bool(length > 0):
                e = (base * y.norm().clamp_min(1.0) if self.epsilon is None else self.epsilon) / length
                ahead, behind = (steps.lower_slopes(x, y + s * e * c, segment.first + i) for s in (1, -1))
                g = g + (ahead.x.double() - behind.x.double()) / (2 * e.double())
                a_y = a_y + (ahead.y - behind.y) / (2 * e)
                counts += Counts(lower_gradients=2)
            a_m = rule.momentum * c
        fresh = segment.fresh or len(segment.carry.tensors()) == 1
        return g, [a_y] if fresh else [a_y, a_m], counts
