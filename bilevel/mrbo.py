"""MRBO and TTSA: the single loop with STORM's momentum, and on two time scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nestopt.linalg import Stopping

from .assumptions import Assumptions
from .estimators import STORM, Estimator
from .hoag import Polynomial
from .single_loop import SingleLoop

__all__ = ["MRBO", "TTSA"]


@dataclass(frozen=True)
class MRBO(SingleLoop):
    """Momentum-based recursive bilevel optimizer: the single loop on STORM estimates.

    y -= b d_y, v -= b d_v, x = P_X(x - a d_x), where each d is here + (1 - m_k)(d - before) with the same samples at
    both points, and m_k = (b_k L / 2)^2 follows the step's square (see `STORM`). The noise falls like the root of m_k:
    like k^(-1/3) by the paper's steps b_k ~ k^(-1/3), which `MRBO.published` has and which are best where nothing is
    convex. Automatic steps (see `SingleLoop`) fall like k^(-1/2), so that m_k ~ 1 / k and, around a minimiser where the
    hyperobjective has curvature, the error falls like k^(-1/2): no method that sees each sample once does better. On a
    finite set SABA() and SRBA() go further.

    `error` is the largest of |f_y|, |F_y - H v| and |P_X(x - g) - x|, measured at the point returned, on all data where
    nothing is random and on held data else; CONVERGED means error <= max(rtol (|F_x| + |f_xy v|), atol), the scale
    taken at x0.

    Cost of a step: two gradients of F, two of f, four products.

    Args:
        step_size: b, a number below 2 / L or a schedule k -> number; None for automatic steps.
        upper_step: a, likewise, or an UpperStep such as TorchOptimizer; None for automatic ones.
        inner: steps in y and in v for each one in x.
        estimator: STORM(momentum) with another m_k.
        stopping: rtol None is 1e-9 in float64 and 1e-4 in float32.

    Reference:
        Yang, Ji & Liang 2021, "Provably faster algorithms for bilevel optimization"; the adjoint goes on from the last
        one here, where the paper computes a Neumann series anew.

    Example:
        >>> import torch
        >>> from nestopt import bilevel
        >>> problem = bilevel.Problem(lambda x, y: ((y - 1) ** 2).sum(), lambda x, y: ((y - x) ** 2).sum())
        >>> start = torch.zeros(2, dtype=torch.float64)
        >>> res = bilevel.MRBO(step_size=0.2, upper_step=0.05)(problem, start, start.clone())
        >>> res.status.name, [round(v, 6) for v in res.x.tolist()]
        ('CONVERGED', [1.0, 1.0])
    """

    estimator: Estimator = STORM()

    assumptions: ClassVar[Assumptions] = Assumptions(
        "single loop", "Yang, Ji & Liang 2021", products=True, stochastic=True
    )

    @classmethod
    def published(
        cls, step_size: float = 0.1, upper_step: float = 0.1, stopping: Stopping = Stopping(max_iter=10_000)
    ) -> MRBO:
        """The paper's schedules: b_k = b (k+1)^(-1/3), a_k = a (k+1)^(-1/3), m_k ~ b_k^2 ~ (k+1)^(-2/3).

        Args:
            step_size: b, below 2 / L.
            upper_step: a.
            stopping: limits.

        Returns:
            The method.

        Example:
            >>> MRBO.published().step_size(7)
            0.05
        """
        steps = [Polynomial(power=1 / 3, first=first) for first in (step_size, upper_step)]
        return cls(step_size=steps[0], upper_step=steps[1], stopping=stopping)


@dataclass(frozen=True)
class TTSA(SingleLoop):
    """Two-timescale stochastic approximation: the single loop with x on a slower scale than y and v.

    y -= b_k f_y, v -= b_k (f_yy v - F_y), x = P_X(x - a_k (F_x - f_xy v)) with b_k ~ k^(-2/5) and a_k ~ k^(-3/5), so
    that in the end y and v follow x as if it stood still. Automatic steps: see `SingleLoop`.

    `error` is the largest of |f_y|, |F_y - H v| and |P_X(x - g) - x|, measured at the point returned, on all data where
    nothing is random and on held data else; CONVERGED means error <= max(rtol (|F_x| + |f_xy v|), atol), the scale
    taken at x0.

    Cost of a step: one gradient of F, one of f with a graph, two products (four where nothing is random).

    Args:
        step_size: b, a number below 2 / L or a schedule such as Polynomial(0.4, 0.1); None for automatic steps.
        upper_step: a, likewise, such as Polynomial(0.6, 0.1), or an UpperStep; None for automatic ones.
        inner: steps in y and in v for each one in x.
        estimator: how the directions are estimated from samples.
        stopping: rtol None is 1e-9 in float64 and 1e-4 in float32.

    Reference:
        Hong, Wai, Wang & Yang 2023, "A two-timescale stochastic algorithm framework for bilevel optimization"; the
        adjoint is tracked here, where the paper samples a Neumann series.

    Example:
        >>> import torch
        >>> from nestopt import bilevel
        >>> problem = bilevel.Problem(lambda x, y: ((y - 1) ** 2).sum(), lambda x, y: ((y - x) ** 2).sum())
        >>> start = torch.zeros(2, dtype=torch.float64)
        >>> res = bilevel.TTSA()(problem, start, start.clone())
        >>> res.status.name, [round(v, 6) for v in res.x.tolist()]
        ('CONVERGED', [1.0, 1.0])
    """

    decay: ClassVar[tuple[float, float]] = (0.4, 0.6)

    assumptions: ClassVar[Assumptions] = Assumptions("single loop", "Hong et al. 2023", products=True, stochastic=True)
