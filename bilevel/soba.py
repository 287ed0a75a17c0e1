"""SOBA, SABA and SRBA: one step in y, v and x at a time, on minibatches, with SAGA memories, with SPIDER."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .assumptions import Assumptions
from .estimators import SAGA, SPIDER, Estimator
from .single_loop import SingleLoop

__all__ = ["SABA", "SOBA", "SRBA"]


@dataclass(frozen=True)
class SOBA(SingleLoop):
    """Stochastic bilevel algorithm: one step in y, v and x from the same point, each on the step's samples.

    y -= b f_y;  v -= b (f_yy v - F_y);  x = P_X(x - a (F_x - f_xy v)). Automatic steps (see `SingleLoop`): exact line
    searches where nothing is random; on samples constants that fall like k^(-1/2), so that the noise ball shrinks.

    `error` is the largest of |f_y|, |F_y - H v| and |P_X(x - g) - x|, measured at the point returned, on all data where
    nothing is random and on held data else; CONVERGED means error <= max(rtol (|F_x| + |f_xy v|), atol), the scale
    taken at x0.

    Cost of a step: one gradient of F, one of f with a graph, two products (four where nothing is random).

    Args:
        step_size: b, a number below 2 / L or a schedule k -> number; None for automatic steps.
        upper_step: a, likewise, or an UpperStep such as TorchOptimizer; None for automatic ones.
        inner: steps in y and in v for each one in x.
        estimator: how the directions are estimated from samples.
        stopping: rtol None is 1e-9 in float64 and 1e-4 in float32.

    Reference:
        Dagreou, Ablin, Vaiter & Moreau 2022, "A framework for bilevel optimization that enables stochastic and global
        variance reduction algorithms".

    Example:
        >>> import torch
        >>> from nestopt import bilevel
        >>> problem = bilevel.Problem(lambda x, y: ((y - 1) ** 2).sum(), lambda x, y: ((y - x) ** 2).sum())
        >>> start = torch.zeros(2, dtype=torch.float64)
        >>> res = bilevel.SOBA(step_size=0.2, upper_step=0.05)(problem, start, start.clone())
        >>> res.status.name, [round(v, 6) for v in res.x.tolist()]
        ('CONVERGED', [1.0, 1.0])
    """

    assumptions: ClassVar[Assumptions] = Assumptions(
        "single loop", "Dagreou et al. 2022", products=True, stochastic=True
    )


class _VarianceReduced(SingleLoop):
    """The noise of the samples dies out, so that automatic steps need not fall."""

    decay: ClassVar[tuple[float, float]] = (0.0, 0.0)


@dataclass(frozen=True)
class SABA(_VarianceReduced):
    """SOBA with SAGA's memories: linear convergence on a finite set of samples, with constant steps.

    Each block of samples has its last f_y, f_yy v, f_xy v (lower) and F_x, F_y (upper) remembered; a direction is made
    of the drawn block's new ones less its remembered ones plus the mean of all remembered. The data must be `Batches`,
    whose blocks have keys. Automatic steps: see `SingleLoop`; they stay constant.

    `error` is as in SOBA, measured on all samples once an epoch.

    Cost of a step: one gradient of F, one of f with a graph, two products; memory: one vector for every block.

    Args:
        step_size: b, a number below 2 / L or a schedule k -> number; None for automatic steps.
        upper_step: a, likewise, or an UpperStep such as TorchOptimizer; None for automatic ones.
        inner: steps in y and in v for each one in x; those in between are on plain samples.
        estimator: SAGA().
        stopping: rtol None is 1e-9 in float64 and 1e-4 in float32.

    Reference:
        Dagreou, Ablin, Vaiter & Moreau 2022, section 3.2.

    Example:
        >>> import torch
        >>> from nestopt import bilevel
        >>> t = torch.arange(8.0, dtype=torch.float64) / 8
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y, d: ((y - d) ** 2).mean(), lower=lambda x, y, d: ((y - x * d) ** 2).mean()
        ... )
        >>> start = torch.zeros((), dtype=torch.float64)
        >>> res = bilevel.SABA()(problem, start, start.clone(), data=bilevel.Batches(t, batch_size=2))
        >>> res.status.name, round(res.x.item(), 6)
        ('CONVERGED', 1.0)
    """

    estimator: Estimator = SAGA()

    assumptions: ClassVar[Assumptions] = Assumptions(
        "single loop", "Dagreou et al. 2022", products=True, stochastic=True
    )


@dataclass(frozen=True)
class SRBA(_VarianceReduced):
    """SOBA with SPIDER's recursion: a full pass once an epoch, differences on the same samples between.

    d = (full direction) every epoch, else d + (here - before) with the step's samples at both points. The data must be
    `Batches`, which has all samples at hand. Automatic steps: see `SingleLoop`; they stay constant.

    `error` is as in SOBA, measured on all samples once an epoch.

    Cost of a step: two gradients of F, two of f, four products; of an epoch's first one, all samples once.

    Args:
        step_size: as in SABA.
        upper_step: likewise.
        inner: likewise.
        estimator: SPIDER(every) with another length of the recursion.
        stopping: as in SABA.

    Reference:
        Dagreou, Moreau, Vaiter & Ablin 2023, "A lower bound and a near-optimal algorithm for bilevel empirical risk
        minimization".

    Example:
        >>> import torch
        >>> from nestopt import bilevel
        >>> lower, upper = torch.linspace(-1, 1, 12, dtype=torch.float64), torch.linspace(0, 2, 6, dtype=torch.float64)
        >>> problem = bilevel.Problem(lambda x, y, d: ((y - d) ** 2).mean(), lambda x, y, d: ((y - x - d) ** 2).mean())
        >>> data = bilevel.Batches(lower, upper, batch_size=3)
        >>> res = bilevel.SRBA()(problem, torch.zeros_like(lower[0]), torch.zeros_like(lower[0]), data=data)
        >>> res.status.name, round(res.x.item(), 6)  # the difference of the means
        ('CONVERGED', 1.0)
    """

    estimator: Estimator = SPIDER()

    assumptions: ClassVar[Assumptions] = Assumptions(
        "single loop", "Dagreou et al. 2023", products=True, stochastic=True
    )
