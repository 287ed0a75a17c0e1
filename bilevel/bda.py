"""BDA: bilevel descent aggregation, for lower levels with many minimisers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .assumptions import Assumptions
from .through_solver import ThroughSolver

__all__ = ["BDA"]


@dataclass(frozen=True)
class BDA(ThroughSolver):
    """Bilevel descent aggregation: inner steps along both objectives' slopes, differentiated through.

    Inner step t goes along (1 - a_t) f_y + a_t F_y with a_t = weight / (t + 1), that is a <- a (t + 1) / (t + 2), so
    that among the minimisers of f it ends near the one that is best for F (the optimistic choice). The hypergradient is
    that of F(x, y_T(x)), by the reverse pass of `Unrolled` through the same steps. The paper's weight falls so slowly
    that |f_y| stays near a_T |F_y|; here it is zero after `blend` steps, and the rest settle f: what that leaves of the
    choice between minimisers is made up by warm starts. `BDA.published()` keeps the weight.

    `error` is the largest of |f_y|, of |dF / dy_t| at the first step t that was differentiated (what the start could
    still change: zero at an optimistic solution, also where f is flat), and of |P_X(x - g) - x|; CONVERGED means
    error <= max(rtol (|F_x| + |g - F_x|), atol) with the scale taken at x0.

    Cost of an evaluation: one gradient of f an inner step (one of F too, while blended); two gradients' worth and one
    product for each step that is differentiated.

    Args:
        steps: inner steps of each evaluation; None for as many as the certificate asks for.
        optimizer: the inner one; None for heavy ball with the coefficients of the curvatures seen.
        upper_step: None for QuasiNewtonStep() on the whole space and SpectralStep() on a set.
        stopping: rtol None is 1e-7 in float64 and 1e-4 in float32.
        warm_start: False begins every evaluation at y0; where y*(x) is not unique that is another answer.
        max_inner: limit of inner steps where `steps` is None.
        seed: of the random numbers that the objectives draw.
        weight: a_0, in [0, 1); 0.4 to 0.5 in the paper.
        blend: inner steps after which a is zero; None for never.

    Raises:
        ValueError: for a weight outside [0, 1), or blend below 1.

    Reference:
        Liu, Mu, Yuan, Zeng & Zhang 2020, A generic first-order algorithmic framework for bi-level programming beyond
        lower-level singleton, algorithm 1.

    Example:
        >>> import torch
        >>> from nestopt import bilevel
        >>> problem = bilevel.Problem(  # any y[1] minimises the lower level; the upper one wants y[1] = x
        ...     upper=lambda x, y: ((x - y[1]) ** 2 + (y[0] - 1) ** 2).sum(), lower=lambda x, y: (y[0] - x) ** 2
        ... )
        >>> start = torch.zeros((), dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        >>> res = bilevel.BDA()(problem, *start)
        >>> res.status.name, round(res.x.item(), 5)
        ('CONVERGED', 1.0)
    """

    weight: float = 0.5
    blend: int | None = 25

    assumptions: ClassVar[Assumptions] = Assumptions(
        "through the solver", "Liu et al. 2020", unique=False, products=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.weight < 1 or (self.blend is not None and self.blend < 1):
            raise ValueError(
                f"BDA: weight in [0, 1) and blend >= 1 (or None) are needed, but got {self.weight} and {self.blend}."
            )

    @classmethod
    def published(cls, steps: int = 64, weight: float = 0.5) -> BDA:
        """The paper's algorithm: a fixed number of steps, the weight never zero, every evaluation from y0.

        Args:
            steps: K of the paper.
            weight: a_0.

        Returns:
            The method.
        """
        return cls(steps=steps, weight=weight, blend=None, warm_start=False)

    def _weight(self, t: int) -> float:
        return self.weight / (t + 1) if self.blend is None or t < self.blend else 0.0
