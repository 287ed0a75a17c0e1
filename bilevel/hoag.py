"""HOAG: implicit differentiation with lower and adjoint solves that get only as accurate as the outer loop needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from nestopt.linalg import CG, GMRES, Recycled, Stopping

from .assumptions import Assumptions
from .implicit_method import Accuracy, ImplicitMethod, ImplicitState
from .lower_choice import LowerSolver
from .upper_step import StepState, UpperStep

__all__ = ["HOAG", "Geometric", "LipschitzStep", "Polynomial", "ToleranceSchedule"]


@dataclass(frozen=True)
class Geometric:
    """eps_k = first * ratio^k, a summable schedule.

    Args:
        ratio: in (0, 1); 0.9 is the paper's.
        first: eps_0, relative to the residuals at the start.

    Example:
        >>> round(Geometric(0.9)(10), 6)
        0.034868
    """

    ratio: float = 0.9
    first: float = 0.1

    def __call__(self, k: int) -> float:
        """eps_k."""
        return float(self.first * self.ratio**k)


@dataclass(frozen=True)
class Polynomial:
    """eps_k = first * (k + 1)^-power, summable for power > 1.

    Args:
        power: 2 and 3 are the paper's quadratic and cubic schedules.
        first: eps_0, relative to the residuals at the start.

    Example:
        >>> Polynomial(2.0)(9)
        0.001
    """

    power: float = 2.0
    first: float = 0.1

    def __call__(self, k: int) -> float:
        """eps_k."""
        return float(self.first * (k + 1) ** -self.power)


ToleranceSchedule = Geometric | Polynomial


@dataclass(frozen=True)
class LipschitzStep(UpperStep):
    """HOAG's own step rule: projected gradient steps of size 1 / L, L a running guess of a Lipschitz constant.

    A trial is taken when phi+ < phi + 0.2 |phi|. Then L shrinks by 5 % when phi+ <= phi - L |dx|^2 / 2, is kept when
    phi+ <= phi, and doubles when phi grew; a rejected trial doubles it as well. Two changes to the paper's rule: it
    doubles L in the last case only, so that with a step a little too long phi grows by less than 20 % a step for ever;
    and it asks for a fall of L |dx|^2, which no gradient step can give, so that L never falls once its slack, the
    tolerances of the solves, is gone. Here there is no slack but rounding.

    Args:
        lipschitz: first L; None for a first step of length 0.1 max(1, |x|).

    Raises:
        ValueError: if lipschitz is not positive.

    Reference:
        Pedregosa 2016, section 5.

    Example:
        >>> LipschitzStep(2.0)
        LipschitzStep(lipschitz=2.0)
    """

    lipschitz: float | None = None

    def __post_init__(self) -> None:
        if self.lipschitz is not None and not self.lipschitz > 0:
            raise ValueError(f"LipschitzStep: lipschitz must be positive, but got {self.lipschitz}; None estimates it.")

    def start(self, x: Tensor, hypergradient: Tensor, value: Tensor) -> StepState:
        """The state at the first evaluated point."""
        first = super().start(x, hypergradient, value)
        return first if self.lipschitz is None else replace(first, size=x.new_tensor(1 / self.lipschitz))

    def accepts(self, s: StepState, dx: Tensor, hypergradient: Tensor, value: Tensor, noise: float) -> bool:
        """Whether phi grows by less than 20 %; NaN and inf fail it."""
        return bool(value <= s.values[-1] + 0.2 * s.values[-1].abs() + noise)

    def after(self, s: StepState, dx: Tensor, change: Tensor | None, value: Tensor) -> StepState:
        """A larger size after a good step, half of it after a bad one."""
        if change is None:
            return replace(s, size=0.5 * s.size)
        last = s.values[-1] + 10 * torch.finfo(dx.dtype).eps * s.values[-1].abs()
        good = value <= last - dx.square().sum() / (2 * s.size)
        factor = torch.where(good, 1 / 0.95, torch.where(value <= last, 1.0, 0.5))
        return replace(s, size=factor * s.size, values=value[None])


@dataclass(frozen=True)
class HOAG(ImplicitMethod):
    """Hyperparameter optimisation with approximate gradient: AID with summable tolerances for its two solves.

    Step k solves the lower level to |f_y| <= eps_k |f_y(x0, y0)| and the adjoint system to |r| <= eps_k |F_y|, both
    warm-started. eps_k is the schedule's, halved at each rejected trial, but no more than a tenth of the upper
    residual's fall since the start (so that solves are never less accurate than the hypergradient is small, and the end
    does not wait for the schedule), and solves stop at a tenth of the run's tolerance. The steps in x are AID's;
    `upper_step=LipschitzStep()` with Stopping(max_iter=1000) or more is the paper's rule, gradient steps of size 1 / L.

    `error`, CONVERGED and the kinds of lower level are AID's: the largest measured residual against
    max(rtol * (|F_x| + |f_xy v|), atol).

    Cost of a step: as AID's, with looser and therefore cheaper solves early on.

    Args:
        schedule: eps_k; Geometric(0.9), Polynomial(2) and Polynomial(3) are the paper's.
        upper_step: see AID.
        lower_solver: None, or one that reaches the tolerance that it is given: NewtonCG() or LBFGS() for a smooth lower
            level; see AID.
        linear_solver: None for CG() (GMRES() or LU() where the lower level is not smooth), or Recycled(CG()), which
            remembers from step to step; its rtol and atol are replaced by eps_k and a tenth of the run's tolerance.
        stopping: rtol None is 1e-9 in float64 and 1e-4 in float32.
        warm_start: see AID.

    Reference:
        Pedregosa 2016, algorithm 1 and section 5 (step size).

    Example:
        >>> from nestopt import bilevel
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y: ((y - 1) ** 2).sum(), lower=lambda x, y: ((y - x) ** 2).sum() + 0.5 * (y**2).sum()
        ... )
        >>> res = bilevel.HOAG()(problem, torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
        >>> res.status.name, [round(v, 6) for v in res.x.tolist()]
        ('CONVERGED', [1.5, 1.5])
    """

    schedule: ToleranceSchedule = Geometric()
    upper_step: UpperStep | None = None
    lower_solver: LowerSolver | None = None
    linear_solver: CG | GMRES | Recycled | None = None
    stopping: Stopping = Stopping(rtol=None, max_iter=500)
    warm_start: bool = True

    assumptions: ClassVar[Assumptions] = Assumptions(
        "implicit", "Pedregosa 2016", products=True, lower_set=True, lower_prox=True, inequality=True, equality=True
    )

    def _accuracy(self, s: ImplicitState | None, k: int, scale: float) -> Accuracy:
        if s is None:
            return Accuracy(self.schedule(0) * scale if scale < torch.inf else None, self.schedule(0))
        fallen = float(s.residuals["upper"]) / s.upper_scale if s.upper_scale > 0 else 0.0
        eps, enough = min(s.tightening * self.schedule(k), 0.1 * fallen), 0.1 * float(s.tolerance)
        return Accuracy(max(eps * s.lower_scale, enough), eps, enough)
