"""BMG: bootstrapped meta-gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .assumptions import Assumptions
from .counts import Counts
from .inner_path import Forward
from .inner_steps import InnerSteps, Segment
from .through_solver import ThroughSolver

__all__ = ["BMG"]


@dataclass(frozen=True)
class BMG(ThroughSolver):
    """Bootstrapped meta-gradient: match the inner iterate with a target that it would reach later.

    From y_K(x), K inner steps from y_0, the target takes `bootstrap` - 1 more of them and one gradient step of size b
    on F, t = y' - b F_y(x, y'), and is held constant; x moves along

        g = F_x + (dy_K / dx)' M (y_K - t) / b,

    the slope of |y_K - t|^2_M / 2 over b, by the reverse pass of `Unrolled`, with a pseudo-metric M. The last step must
    be one on F: a target of steps on f alone knows nothing of the upper level, and the match is perfect at every
    y*(x). Where y_K = y*(x) the further inner steps do nothing and, with M = I, g is the hypergradient.

    `error` is the largest of |f_y|, of the cotangent at the first step that was differentiated, of "target",
    |M (y_K - t) / b - F_y|, and of |P_X(x - g) - x|; CONVERGED means error <= max(rtol (|F_x| + |g - F_x|), atol) with
    the scale taken at x0. With another metric g vanishes at another point, unless F_y does: there "target" stays, and
    the run ends as STAGNATED.

    Cost of an evaluation: `Unrolled`'s, and `bootstrap` gradients.

    Args:
        steps: inner steps K of each evaluation; None for as many as the certificate asks for.
        optimizer: the inner one; None for heavy ball with the coefficients of the curvatures seen.
        upper_step: None for QuasiNewtonStep() on the whole space and SpectralStep() on a set.
        stopping: rtol None is 1e-7 in float64 and 1e-4 in float32.
        warm_start: whether the inner steps begin at the last y, or always at y0.
        max_inner: limit of inner steps where `steps` is None.
        seed: of the random numbers that the objectives draw.
        bootstrap: steps from y_K to the target, the last of them on F.
        target_step: b; None for 1 / (largest curvature of f seen at the start).
        metric: (x, y, d) -> M d on raveled vectors, M positive semi-definite; None for the identity.

    Raises:
        ValueError: for bootstrap below 1 or a step that is not positive.

    Reference:
        Flennerhag, Schroecker, Zahavy, van Hasselt, Silver & Singh 2022, Bootstrapped meta-learning.

    Example:
        >>> import torch
        >>> from nestopt import bilevel
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y: ((y - 1) ** 2).sum(), lower=lambda x, y: ((y - x) ** 2).sum() + 0.5 * (y**2).sum()
        ... )
        >>> res = bilevel.BMG()(problem, torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
        >>> res.status.name, [round(v, 5) for v in res.x.tolist()]
        ('CONVERGED', [1.5, 1.5])
    """

    bootstrap: int = 5
    target_step: float | None = None
    metric: Callable[[Any, Any, Tensor], Tensor] | None = None

    assumptions: ClassVar[Assumptions] = Assumptions("through the solver", "Flennerhag et al. 2022", products=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bootstrap < 1 or (self.target_step is not None and not self.target_step > 0):
            raise ValueError(
                f"BMG: bootstrap >= 1 and target_step > 0 (or None) are needed, but got {self.bootstrap} and "
                f"{self.target_step}."
            )

    @property
    def _needs_curvature(self) -> bool:
        return super()._needs_curvature or self.target_step is None

    def _terminal(self, steps: InnerSteps, f: Forward) -> tuple[Tensor, Counts]:
        rule, t = f.segments[-1].rule, f.inner
        size = self.target_step if self.target_step is not None else 1 / f.top
        ahead = f.y
        if self.bootstrap > 1:
            segment = Segment(rule, t, self.bootstrap - 1, steps.first_carry(rule, f.x, f.y, t))
            ahead = steps.advance(segment, f.x)[0].y
        oracle = steps.problem.oracle(steps.spaces, steps.data_of(t))
        miss = f.y - (ahead - size * oracle.upper(f.x, ahead).y)
        moved = miss if self.metric is None else self.metric(f.x, f.y, miss)
        return moved / size, Counts(1, self.bootstrap - 1)
