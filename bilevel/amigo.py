"""AmIGO and StocBiO: several steps in y for each one in x; the adjoint by as many steps, or by a Neumann series."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from .assumptions import Assumptions
from .counts import Counts
from .estimators import Pieces
from .monitored import LowerPoint
from .problem import Linearization, Problem
from .single_loop import SingleLoop, SingleLoopState, draws, further, seen_samples

__all__ = ["AmIGO", "StocBiO"]


@dataclass(frozen=True)
class AmIGO(SingleLoop):
    """Ten warm-started steps in y and in v for each one in x.

    From the last y and v: y <- y - b f_y(x, y) and v <- v - b (f_yy v - F_y), `inner` times each, every step on a draw
    of its own; then x+ = P_X(x - a (F_x - f_xy v)). Automatic steps: see `SingleLoop`.

    `error` is the largest of |f_y|, |F_y - H v| and |P_X(x - g) - x|, measured at the point returned, on all data where
    nothing is random and on held data else; CONVERGED means error <= max(rtol (|F_x| + |f_xy v|), atol), the scale
    taken at x0.

    Cost of a step, with inner = T, on samples: T + 1 gradients of F, 2 T + 1 of f, T + 2 products; at given steps where
    nothing is random 2, T + 2 and T + 2; by automatic ones there 1, T and 2 T + 2.

    Args:
        step_size: b, a number below 2 / L or a schedule k -> number; None for automatic steps.
        upper_step: a, likewise, or an UpperStep such as TorchOptimizer; None for automatic ones.
        inner: T; 10 is the paper's.
        estimator: how the directions are estimated from samples.
        stopping: rtol None is 1e-9 in float64 and 1e-4 in float32.

    Reference:
        Arbel & Mairal 2022, "Amortized implicit differentiation for stochastic bilevel optimization".

    Example:
        >>> import torch
        >>> from nestopt import bilevel
        >>> problem = bilevel.Problem(lambda x, y: ((y - 1) ** 2).sum(), lambda x, y: ((y - x) ** 2).sum())
        >>> start = torch.zeros(2, dtype=torch.float64)
        >>> res = bilevel.AmIGO()(problem, start, start.clone())
        >>> res.status.name, [round(v, 6) for v in res.x.tolist()]
        ('CONVERGED', [1.0, 1.0])
    """

    inner: int = 10

    assumptions: ClassVar[Assumptions] = Assumptions(
        "single loop", "Arbel & Mairal 2022", products=True, stochastic=True
    )


@dataclass(frozen=True)
class StocBiO(SingleLoop):
    """Ten steps in y, then the adjoint by a Neumann series whose every term has a batch of its own.

    y <- y - b f_y(x, y), `inner` times; v = b sum_{q=0..Q} prod_{j=1..q} (I - b H_j) F_y with H_j = f_yy on the j-th
    draw; then x+ = P_X(x - a (F_x - f_xy v)). The series is cut: v lacks (I - b H)^(Q+1) of the solution, which the
    adjoint residual shows. Where nothing is random and no step_size is given, v goes on from the last one by conjugate
    directions in place of the series, and nothing is cut (see `SingleLoop`).

    `error` is as in AmIGO.

    Cost of a step: 2 gradients of F, inner + Q + 2 of f, Q + 2 products.

    Args:
        step_size: b, a number below 2 / L or a schedule k -> number; None for automatic steps.
        upper_step: a, likewise, or an UpperStep such as TorchOptimizer; None for automatic ones.
        inner: steps in y.
        estimator: how the directions are estimated from samples.
        stopping: rtol None is 1e-9 in float64 and 1e-4 in float32.
        terms: Q; None for the number that leaves a thousandth of the slowest part, at most 300.

    Raises:
        ValueError: for a number of terms below 1.

    Reference:
        Ji, Yang & Liang 2021, "Bilevel optimization: convergence analysis and enhanced design", algorithm 2.

    Example:
        >>> import torch
        >>> from nestopt import bilevel
        >>> problem = bilevel.Problem(lambda x, y: ((y - 1) ** 2).sum(), lambda x, y: ((y - x) ** 2).sum())
        >>> start = torch.zeros(2, dtype=torch.float64)
        >>> res = bilevel.StocBiO(step_size=0.2, upper_step=0.2, terms=40)(problem, start, start.clone())
        >>> res.status.name, [round(v, 6) for v in res.x.tolist()]
        ('CONVERGED', [1.0, 1.0])
    """

    inner: int = 10
    terms: int | None = None

    assumptions: ClassVar[Assumptions] = Assumptions(
        "single loop", "Ji, Yang & Liang 2021", products=True, stochastic=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.terms is not None and self.terms < 1:
            raise ValueError(f"StocBiO: terms must be at least 1, but got {self.terms}; None chooses it.")

    def move_lower(
        self, problem: Problem, before: SingleLoopState, x: Tensor, last: Pieces, b: float, data: object
    ) -> tuple[SingleLoopState, Counts]:
        """Gradient steps in y, then the series."""
        s = replace(before, x_vector=x)
        y, counts = self.lower_steps(problem, s, b, data)
        part = further(data, self.inner)
        point = Linearization(problem, s.spaces, x, y, part)
        term, hessian = b * point.upper_y, point.hessian
        counts += Counts(1, 1, samples=seen_samples(part, 1, 1))
        v = term
        terms = self.terms or min(300, math.ceil(7 / float(before.memory["rate"])))
        for q in range(terms):
            if draws(data):
                part = further(data, self.inner + 1 + q)
                hessian = LowerPoint.at(problem, s.spaces, x, y, part).hessian
                counts += Counts(lower_gradients=1, samples=seen_samples(part, 0, 1))
            term = term - b * (hessian @ term)
            v = v + term
            counts += Counts(products=1, samples=seen_samples(part, 0, 1))
        return replace(s, y_vector=y, adjoint=v), counts
