"""BAMM: the single loop on a lower level blended with the upper objective, for lower levels with many minimisers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.linalg import Stopping

from .assumptions import Assumptions
from .counts import Counts
from .estimators import Pieces
from .hoag import Polynomial
from .oracle import Batch, part_of
from .problem import Linearization, Problem
from .single_loop import SingleLoop, SingleLoopState, seen_samples
from .stochastic import Draw, Source

__all__ = ["BAMM"]


@dataclass(frozen=True)
class BAMM(SingleLoop):
    """Bilevel averaged method of multipliers, single loop (sl-BAMM): the lower level need not be strongly convex.

    The lower level is blended with the upper one, phi = m F + (1 - m) f, so that among the minimisers of f the one
    that is best for F is meant (the optimistic choice), and all three variables move from the same point:

        y+ = y - b phi_y;   v+ = v - e_k (phi_yy v - F_y);   x+ = P_X( x - a_k (F_x - phi_xy v) ).

    Without numbers the steps are automatic (see `SingleLoop`), and m falls tenfold, from `weight` on, each time the
    blended problem is solved to a tenth of m: at the end f_y = -m F_y / (1 - m) is below the tolerance, so the blend's
    bias is part of what is measured. With numbers or the paper's schedules, and on samples, m = weight (k + 1)^(-1 /
    decline), which leaves a bias of the size of m: `BAMM.published()` after 1e5 steps has m = 0.28.

    `error` is the largest of |f_y| (of the lower level itself), |F_y - phi_yy v| and |P_X(x - g) - x|; CONVERGED means
    error <= max(rtol (|F_x| + |f_xy v|), atol) with the scale taken at x0.

    Cost of a step: two gradients of F, one of f with a graph, four products (two with numbers).

    Args:
        step_size: b and, without the line search, e_k; a number, a schedule, or None for automatic steps.
        upper_step: a_k, likewise, or an UpperStep such as TorchOptimizer.
        inner: steps in y and in v for each one in x.
        estimator: see `SingleLoop`.
        stopping: rtol None is 1e-9 in float64 and 1e-4 in float32.
        weight: m at the start, in (0, 1).
        decline: p0 of the schedule m = weight (k + 1)^(-1/p0).
        adjoint_step: e_k, where it differs from b.
        line_search: e_k = r'r / r'phi_yy r, r = F_y - phi_yy v, the exact line search, at given steps as well.

    Raises:
        ValueError: for a weight outside (0, 1), or a decline that is not positive.

    Reference:
        Liu, Liu, Yao, Zeng & Zhang 2023, "Averaged method of multipliers for bi-level optimization without lower-level
        strong convexity" (sl-BAMM).

    Example:
        >>> import torch
        >>> from nestopt import bilevel
        >>> problem = bilevel.Problem(  # the lower level fixes the sum of y alone; the upper one wants ones
        ...     upper=lambda x, y: ((y - 1) ** 2).sum(), lower=lambda x, y: (y.sum() - x) ** 2
        ... )
        >>> start = torch.zeros((), dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        >>> res = bilevel.BAMM()(problem, *start)
        >>> res.status.name, round(res.x.item(), 6)
        ('CONVERGED', 2.0)
    """

    weight: float = 0.1
    decline: float = 10.0
    adjoint_step: Callable[[int], float] | None = None
    line_search: bool = False
    stopping: Stopping = field(default=Stopping(rtol=None, max_iter=20_000))

    assumptions: ClassVar[Assumptions] = Assumptions(
        "single loop", "Liu et al. 2023", unique=False, products=True, stochastic=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.weight < 1 and self.decline > 0):
            raise ValueError(
                f"BAMM: weight in (0, 1) and decline > 0 are needed, but got {self.weight} and {self.decline}."
            )

    @classmethod
    def published(
        cls, step_size: float = 0.1, tau: float = 1 / 40, stopping: Stopping = Stopping(max_iter=10_000)
    ) -> BAMM:
        """The paper's three schedules: m_k = .9 (k+1)^(-1/10), e_k = b (k+1)^(-tau/2), a_k = b m_k^3 (k+1)^(-3 tau/2).

        Args:
            step_size: b, below 2 / L.
            tau: of the paper.
            stopping: limits.

        Returns:
            The method.
        """
        upper = Polynomial(power=1.5 * tau + 0.3, first=step_size * 0.9**3)
        adjoint = Polynomial(power=tau / 2, first=step_size)
        return cls(step_size=step_size, upper_step=upper, adjoint_step=adjoint, weight=0.9, stopping=stopping)

    @property
    def first_weight(self) -> float:
        """The weight at the start."""
        return self.weight

    def scheduled_weight(self, k: int) -> float:
        """Weight (k + 1)^(-1/decline)."""
        return float(self.weight * (k + 1) ** (-1 / self.decline))

    def blended(self, problem: Problem, data: Any, weight: float) -> tuple[Problem, Any]:
        """The problem with phi as its lower level."""

        def blend(x: Any, y: Any, *given: Any) -> Tensor:
            upper, lower = ((part_of(d, name),) for d in given for name in ("upper", "lower")) if given else ((), ())
            value: Tensor = weight * problem.upper(x, y, *upper) + (1 - weight) * problem.lower(x, y, *lower)
            return value

        blended = problem.with_lower(blend)
        if data is None or isinstance(data, Draw):
            return blended, None if data is None else _both(data)
        return blended, Batch(upper=part_of(data, "upper"), lower=data)

    def adjoint_move(
        self, problem: Problem, before: SingleLoopState, last: Pieces, b: float, data: Any
    ) -> tuple[Tensor, Counts]:
        """One step in v from the point before: by e_k, or by the exact line search."""
        r = last.upper_y - last.hessian_v
        if not self.line_search:
            e = b if self.adjoint_step is None else self.adjoint_step(int(before.iterations) - 1)
            return before.adjoint + e * r, Counts()
        point = Linearization(problem, before.spaces, before.x_vector, before.y_vector, data)
        curvature = torch.dot(r, point.hessian @ r)
        size = torch.where(curvature > 0, torch.dot(r, r) / curvature, b)
        return before.adjoint + size * r, Counts(2, 1, 1, samples=seen_samples(data, 1, 2))

    def next_weight(self, state: SingleLoopState, upper: Tensor) -> float:
        """A tenth of the weight where the blended problem is solved to a tenth of it."""
        weight = float(state.memory["weight"])
        solved = bool(upper <= 0.1 * weight * state.memory["scale"]) or bool(upper <= state.tolerance)
        return weight / 10 if solved else weight


@dataclass(frozen=True)
class _Both(Source):
    """Draws whose lower part is the whole draw, for a lower level that needs both levels' samples."""

    source: Source

    def draw(self, k: int, i: int = 0) -> Draw:
        return _both(self.source.draw(k, i))

    def whole(self) -> Draw | None:
        everything = self.source.whole()
        return None if everything is None else _both(everything)


def _both(data: Draw) -> Draw:
    return replace(data, lower=data, source=None if data.source is None else _Both(data.source))
