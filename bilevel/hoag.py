"""HOAG: implicit differentiation with lower and adjoint solves that get only as accurate as the outer loop needs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.implicit import Minimizer, NewtonCG
from nestopt.linalg import CG, Recycled, Status, Stopping

from .aid import upper_tolerance
from .assumptions import Assumptions
from .counts import Counts
from .evaluation import Evaluation, LowerLevel
from .method import Method, MethodState
from .problem import Problem, Spaces

__all__ = ["HOAG", "Geometric", "HOAGState", "Polynomial", "ToleranceSchedule"]

_RUNNING = Status.RUNNING.code


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


@dataclass(frozen=True, kw_only=True)
class HOAGState(MethodState):
    """Where HOAG stands.

    Attributes:
        hypergradient: raveled, at x.
        adjoint: v, to start the next adjoint solve from.
        lipschitz: the running guess L of the hypergradient's Lipschitz constant; the step size is 1 / L.
        tightening: factor on the schedule, halved at each rejection.
        lower_scale: |f_y| at the start, which eps_k multiplies.
    """

    hypergradient: Tensor
    adjoint: Tensor
    lipschitz: Tensor
    tightening: float
    lower_scale: float


@dataclass(frozen=True)
class HOAG(Method):
    """Hyperparameter optimisation with approximate gradient: summable tolerances and an adaptive step.

    Step k solves the lower level to |f_y| <= eps_k * |f_y(x0, y0)| and the adjoint system to |r| <= eps_k |F_y|, both
    warm-started, and tries x+ = P_X(x - g / L). With C = 1/4 the trial is taken and L shrinks by 5 % when

        phi+ <= phi + C eps_{k+1} + eps_k (C + 1) |dx| - L |dx|^2 / 2;

    it is taken and L kept when phi+ is between that and phi; else L doubles, and where phi+ >= phi + 0.2 |phi| x stays
    and the tolerances are halved. Two changes to the paper's rule: it doubles L in the last case only, so that with a
    step a little too long phi grows by less than 20 % a step for ever; and it asks for L |dx|^2, which no gradient step
    can give once eps is small, so that L never falls again. Tolerances stop falling at a tenth of the run's own.

    `error` and CONVERGED are AID's: the largest measured residual against max(rtol * (|F_x| + |f_xy v|), atol), so the
    run cannot end before the schedule has come down to the tolerance (0.9^k takes 150 steps to 1e-7).

    Cost of a step: as AID's, with looser and therefore cheaper solves early on.

    Args:
        schedule: eps_k; Geometric(0.9), Polynomial(2) and Polynomial(3) are the paper's.
        lipschitz: first L; None for a first step of length 0.1 max(1, |x|).
        lower_solver: must reach the tolerance that it is given: NewtonCG() or LBFGS().
        linear_solver: CG, or Recycled(CG()), which remembers from step to step; its rtol and atol are replaced by
            eps_k and a tenth of the run's tolerance.
        stopping: rtol None is 1e-9 in float64 and 1e-4 in float32.

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
    lipschitz: float | None = None
    lower_solver: Minimizer = NewtonCG()
    linear_solver: CG | Recycled = CG()
    stopping: Stopping = Stopping(rtol=None, max_iter=500)

    State: ClassVar[type[MethodState]] = HOAGState
    assumptions: ClassVar[Assumptions] = Assumptions("implicit", "Pedregosa 2016", products=True)
    parts: ClassVar[dict[str, type]] = {"counts": Counts}

    def __post_init__(self) -> None:
        if self.lipschitz is not None and not self.lipschitz > 0:
            raise ValueError(f"HOAG: lipschitz must be positive, but got {self.lipschitz}; None estimates it.")

    def init(self, problem: Problem, x0: Any, y0: Any, data: Any = None) -> HOAGState:
        """Check the problem and evaluate it, to eps_0, at the projection of x0.

        Args:
            problem: with a smooth, unconstrained lower level.
            x0: upper start.
            y0: where the first lower solve starts.
            data: third argument of the objectives, if they take one.

        Returns:
            The evaluated state.

        Raises:
            TypeError: see `hypergradient`.
            ValueError: see `hypergradient`.
        """
        problem.require_smooth_lower_level("HOAG")
        spaces = Spaces.of(x0, y0)
        x, y = problem.project(spaces.x.flatten(x0).detach(), spaces), spaces.y.flatten(y0).detach()
        level = self._level(problem, spaces, data, self.schedule(0))
        scale = level.lower_gradient_norm(x, y)
        tolerance = self.schedule(0) * scale if math.isfinite(scale) else None
        e = level.differentiate(level.solve(x, y, tolerance, check=True), None)
        assert e.hypergradient is not None
        assert e.scale is not None
        g = e.hypergradient
        tiny = torch.finfo(g.dtype).tiny
        first = (g.norm() / (0.1 * x.norm().clamp_min(1.0))).clamp_min(tiny)
        s = HOAGState(
            x_vector=x,
            y_vector=e.y,
            value=e.value,
            error=e.value,
            tolerance=g.new_tensor(upper_tolerance(self.stopping, e.scale)),
            codes=torch.tensor(_RUNNING),
            iterations=torch.tensor(-1),  # _state counts one more
            counts=Counts(),
            spaces=spaces,
            hypergradient=g,
            adjoint=g,
            lipschitz=first if self.lipschitz is None else g.new_tensor(self.lipschitz),
            tightening=1.0,
            lower_scale=scale,
        )
        return self._state(problem, spaces, e, s)

    def step(self, problem: Problem, state: HOAGState, data: Any = None) -> HOAGState:
        """Try one upper step.

        Args:
            problem: the problem.
            state: the state.
            data: third argument of the objectives, if they take one.

        Returns:
            The next state; x is unchanged when the trial was rejected.
        """
        s, k, C = state, int(state.iterations) + 1, 0.25
        before, now = s.tightening * self.schedule(k - 1), s.tightening * self.schedule(k)
        enough = 0.1 * float(s.tolerance)
        level = self._level(problem, s.spaces, data, now, enough)
        x = problem.project(s.x_vector - s.hypergradient / s.lipschitz, s.spaces)
        step = (x - s.x_vector).norm()
        e = level.solve(x, s.y_vector, max(now * s.lower_scale, enough))
        slack = C * now + before * (C + 1) * step + 10 * torch.finfo(x.dtype).eps * s.value.abs()
        good = e.value <= s.value + slack - s.lipschitz * step.square() / 2
        factor = torch.where(good, 0.95, torch.where(e.value <= s.value + slack, 1.0, 2.0))
        if e.fault is None and bool(e.value < s.value + 0.2 * s.value.abs()):  # NaN fails it
            e = level.differentiate(e, s.adjoint)
            if e.fault is None:
                return self._state(problem, s.spaces, e, replace(s, lipschitz=factor * s.lipschitz))
        eps = torch.finfo(x.dtype).eps
        stuck = float(step) <= 4 * eps * max(float(s.x_vector.norm()), eps)
        return replace(
            s,
            iterations=s.iterations + 1,
            lipschitz=2 * s.lipschitz,
            tightening=0.5 * s.tightening,
            codes=torch.tensor((e.fault or Status.LINE_SEARCH_FAILED).code if stuck else _RUNNING),
            counts=s.counts + e.counts,
        )

    def _level(self, problem: Problem, spaces: Spaces, data: Any, eps: float, enough: float = 0.0) -> LowerLevel:
        solver = replace(self.linear_solver, rtol=eps, atol=enough)
        return LowerLevel(problem, spaces, self.lower_solver, solver, data)

    def _state(self, problem: Problem, spaces: Spaces, e: Evaluation, s: HOAGState) -> HOAGState:
        assert e.hypergradient is not None
        assert e.adjoint is not None
        residuals = e.residuals(problem, spaces)
        return replace(
            s,
            iterations=s.iterations + 1,
            x_vector=e.x,
            y_vector=e.y,
            value=e.value,
            error=torch.stack(list(residuals.values())).amax(),
            codes=torch.tensor(_RUNNING if e.fault is None else e.fault.code),
            counts=s.counts + e.counts,
            residuals=residuals,
            hypergradient=e.hypergradient,
            adjoint=e.adjoint,
        )
