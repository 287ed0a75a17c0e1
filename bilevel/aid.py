"""Approximate implicit differentiation: lower solve, adjoint solve, step in the upper variable."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.implicit import Minimizer, NewtonCG
from nestopt.linalg import CG, LinearSolver, Status, Stopping

from .assumptions import Assumptions
from .counts import Counts
from .evaluation import Evaluation, LowerLevel
from .method import Method, MethodState
from .problem import Problem, Spaces
from .upper_step import QuasiNewtonStep, SpectralStep, StepState, UpperStep

__all__ = ["AID", "AIDState", "upper_tolerance"]

_RUNNING = Status.RUNNING.code


@dataclass(frozen=True, kw_only=True)
class AIDState(MethodState):
    """Where AID stands: at an accepted point with its hypergradient.

    Attributes:
        hypergradient: raveled, at x.
        adjoint: v with H v = F_y, to start the next adjoint solve from.
        rule: the upper step rule's memory.
        y_first: raveled y0, where a run without warm starts begins every lower solve.
    """

    hypergradient: Tensor
    adjoint: Tensor
    rule: StepState
    y_first: Tensor


@dataclass(frozen=True)
class AID(Method):
    """Approximate implicit differentiation for a smooth lower level with positive definite f_yy.

    One step: try x+ = P_X(x + size * d), d = -g or a quasi-Newton direction; solve min f(x+, .) from the last y; if the
    upper step rule takes F(x+, y+), solve H v = F_y from the last v and set g+ = F_x - f_xy v; else stay at x and try a
    smaller size. Lower levels are solved to a tenth of the run's tolerance, so nothing but the upper step limits the
    accuracy.

    `error` is the largest of |f_y|, |F_y - H v| and |P_X(x - g) - x|, all measured at the point returned; CONVERGED
    means error <= max(rtol * (|F_x| + |f_xy v|), atol) with the scale taken at x0. A lower Hessian that is singular or
    indefinite ends the run as SINGULAR or NEGATIVE_CURVATURE: the hypergradient does not exist there.

    Cost of a step: one lower solve, one gradient of F, one of f with a graph, and, when accepted, the products of the
    adjoint solve plus one.

    Args:
        upper_step: None for QuasiNewtonStep() on the whole space and SpectralStep() on a set, which need no tuning;
            ConstantStep(size) for stochastic data or to follow a paper.
        lower_solver: NewtonCG() for up to about 1e5 variables, LBFGS() beyond, LazyNewton() below a few hundred,
            LevenbergMarquardt() where f is loss(mark_outputs(model(y))) with few outputs, GradientDescent(max_iter=k)
            for k-step AID; its accuracy limits the hypergradient's.
        linear_solver: CG(); Cholesky() below a few hundred lower variables; Recycled(CG(), rank=30) where its products
            are dear and a few dozen eigenvalues stand out; Neumann(terms) to follow a paper.
        stopping: rtol None is 1e-9 in float64 and 1e-4 in float32.
        warm_start: False to start each lower and adjoint solve anew from the first ones; where y*(x) is not unique the
            two converge to different answers (Vicol et al. 2022).

    Reference:
        Pedregosa 2016, algorithm 1 with exact inner solves; Ji, Yang & Liang 2021 (AID-BiO).

    Example:
        >>> from nestopt import bilevel
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y: ((y - 1) ** 2).sum(), lower=lambda x, y: ((y - x) ** 2).sum() + 0.5 * (y**2).sum()
        ... )
        >>> res = bilevel.AID()(problem, torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
        >>> res.status.name, res.x
        ('CONVERGED', tensor([1.5000, 1.5000], dtype=torch.float64))
    """

    upper_step: UpperStep | None = None
    lower_solver: Minimizer = NewtonCG()
    linear_solver: LinearSolver = CG()
    stopping: Stopping = Stopping(rtol=None, max_iter=200)
    warm_start: bool = True

    State: ClassVar[type[MethodState]] = AIDState
    assumptions: ClassVar[Assumptions] = Assumptions("implicit", "Pedregosa 2016", products=True)
    parts: ClassVar[dict[str, type]] = {"counts": Counts, "rule": StepState}

    def init(self, problem: Problem, x0: Any, y0: Any, data: Any = None) -> AIDState:
        """Check the problem and evaluate it at the projection of x0.

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
        problem.require_smooth_lower_level("AID")
        spaces = Spaces.of(x0, y0)
        level = LowerLevel(problem, spaces, self.lower_solver, self.linear_solver, data)
        x = problem.project(spaces.x.flatten(x0).detach(), spaces)
        y = spaces.y.flatten(y0).detach()
        e = level.differentiate(level.solve(x, y, None, check=True), None)
        assert e.scale is not None
        assert e.linear_residual is not None
        tolerance = upper_tolerance(self.stopping, e.scale)
        if e.fault is None and (float(e.lower_residual) > 0.1 * tolerance or float(e.linear_residual) > tolerance):
            again = level.solve(x, e.y, 0.1 * tolerance)
            spent = e.counts
            e = level.differentiate(again, e.adjoint, tolerance)
            e = replace(e, counts=spent + e.counts)
        assert e.hypergradient is not None
        assert e.adjoint is not None
        rule = self._rule(problem).start(x, e.hypergradient, e.value)
        return self._state(problem, spaces, e, rule, tolerance, e.counts, 0, y)

    def step(self, problem: Problem, state: AIDState, data: Any = None) -> AIDState:
        """Try one upper step.

        Args:
            problem: the problem.
            state: the state.
            data: third argument of the objectives, if they take one.

        Returns:
            The next state; x is unchanged when the trial was rejected.
        """
        s, spaces = state, state.spaces
        level = LowerLevel(problem, spaces, self.lower_solver, self.linear_solver, data)
        step = self._rule(problem)
        direction = step.direction(s.rule, s.hypergradient)
        x = problem.project(s.x_vector + s.rule.size * direction, spaces)
        dx = x - s.x_vector
        start = s.y_vector if self.warm_start else s.y_first
        e = level.solve(x, start, 0.1 * float(s.tolerance))
        eps = torch.finfo(x.dtype).eps
        noise = 10 * eps * float(s.value.abs()) + float(s.adjoint.norm() * (e.lower_residual + s.residuals["lower"]))
        if e.fault is None and step.accepts(s.rule, dx, s.hypergradient, e.value, noise):
            e = level.differentiate(e, s.adjoint if self.warm_start else None, float(s.tolerance))
        if e.fault is None and e.hypergradient is not None:
            rule = step.after(s.rule, dx, e.hypergradient - s.hypergradient, e.value)
            return self._state(
                problem, spaces, e, rule, float(s.tolerance), s.counts + e.counts, int(s.iterations) + 1, s.y_first
            )
        rule = step.after(s.rule, dx, None, e.value)
        stuck = float(rule.size * step.direction(rule, s.hypergradient).norm()) <= 4 * eps * max(
            float(s.x_vector.norm()), eps
        )
        code = (e.fault or Status.LINE_SEARCH_FAILED).code if stuck else _RUNNING
        return replace(s, rule=rule, codes=torch.tensor(code), counts=s.counts + e.counts, iterations=s.iterations + 1)

    def _rule(self, problem: Problem) -> UpperStep:
        if self.upper_step is not None:
            return self.upper_step
        return QuasiNewtonStep() if problem.upper_set is None else SpectralStep()

    def _state(
        self,
        problem: Problem,
        spaces: Spaces,
        e: Evaluation,
        rule: StepState,
        tolerance: float,
        counts: Counts,
        k: int,
        y_first: Tensor,
    ) -> AIDState:
        assert e.hypergradient is not None
        assert e.adjoint is not None
        residuals = e.residuals(problem, spaces)
        return AIDState(
            x_vector=e.x,
            y_vector=e.y,
            value=e.value,
            error=torch.stack(list(residuals.values())).amax(),
            tolerance=e.value.new_tensor(tolerance),
            codes=torch.tensor(_RUNNING if e.fault is None else e.fault.code),
            iterations=torch.tensor(k),
            counts=counts,
            spaces=spaces,
            residuals=residuals,
            hypergradient=e.hypergradient,
            adjoint=e.adjoint,
            rule=rule,
            y_first=y_first,
        )


def upper_tolerance(stopping: Stopping, scale: Tensor) -> float:
    """max(rtol * scale, atol), where rtol None is 1e-9 in float64 and 1e-4 in lower precision.

    Args:
        stopping: of the method.
        scale: |F_x| + |f_xy v| at x0.

    Returns:
        The absolute tolerance of a run.
    """
    return float(stopping.tolerance(scale, 1e-9 if scale.dtype == torch.float64 else 1e-4))
