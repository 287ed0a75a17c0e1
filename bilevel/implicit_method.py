"""What AID and HOAG share: trial steps in x, lower and adjoint solves of a given accuracy, and the certificate."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.implicit import NewtonCG
from nestopt.linalg import LinearSolver, Status, Stopping

from .assumptions import require
from .counts import Counts
from .evaluation import Evaluation, Evaluator
from .inverses import inverse_name
from .lower_choice import LowerSolver, SmoothLevel, lower_level
from .method import Method, MethodState
from .problem import Problem, Spaces
from .upper_step import QuasiNewtonStep, SpectralStep, StepState, UpperStep

__all__ = ["REJECTIONS", "Accuracy", "ImplicitMethod", "ImplicitState", "upper_tolerance"]

_RUNNING = Status.RUNNING.code
REJECTIONS = 3  # in a row, after which inexact solves are no longer trusted
_TRUSTED = 1e-2  # of the value, that the lower residual at the start may change
_SINGULAR_TRIALS = 8  # in a row, each shorter than the last: it is not that the first one went too far


@dataclass(frozen=True)
class Accuracy:
    """What the solves of one step have to reach.

    Attributes:
        lower: absolute tolerance of the lower level, None for its solver's own.
        adjoint: relative tolerance of the adjoint system, None for the solver's own.
        enough: adjoint residual that must not stand in the way of the run's end.
        forcing: fraction of its first residual at which a warm-started solve of a smooth lower level, or of its adjoint
            system, may stop early, though no sooner than the absolute tolerances say; 0 for none.
    """

    lower: float | None
    adjoint: float | None = None
    enough: float = torch.inf
    forcing: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ImplicitState(MethodState):
    """Where an implicit method stands: at an accepted point with its hypergradient.

    Attributes:
        hypergradient: raveled, at x.
        adjoint: v with H v = F_y, to start the next adjoint solve from.
        dual: multipliers of the lower level's constraints, inequalities first; empty where there are none.
        rule: the upper step rule's memory.
        y_first: raveled y0, where a run without warm starts begins every lower solve.
        singular: trials in a row whose lower Hessian was singular.
        rejected: trials in a row that were not taken.
        tightening: factor on a schedule of tolerances.
        lower_scale: the lower level's residual at (x0, y0), which relative tolerances multiply.
        upper_scale: the upper residual at x0.
        inverse: which inverse of the lower Hessian the hypergradient is made with: "exact" unless one was named.
    """

    hypergradient: Tensor
    adjoint: Tensor
    dual: Tensor
    rule: StepState
    y_first: Tensor
    singular: int = 0
    rejected: int = 0
    tightening: float = 1.0
    lower_scale: float = 0.0
    upper_scale: float = 0.0
    inverse: str = "exact"


class ImplicitMethod(Method):
    """One step: a trial x+, its lower solution, and, where the upper step rule takes it, its hypergradient.

    A subclass is a frozen dataclass and writes `_accuracy`.
    """

    upper_step: UpperStep | None
    lower_solver: LowerSolver | None
    linear_solver: LinearSolver | None
    stopping: Stopping
    warm_start: bool

    State: ClassVar[type[MethodState]] = ImplicitState
    parts: ClassVar[dict[str, type]] = {"counts": Counts, "rule": StepState}

    @abstractmethod
    def _accuracy(self, s: ImplicitState | None, k: int, scale: float) -> Accuracy:
        """What step k has to reach from state s; None at the start, where the lower residual is `scale`."""

    def _tightened(self, tightening: float, rise: float | None = None, slopes: float = 0.0) -> float:
        """The factor on tolerances after a step.

        Args:
            tightening: before it.
            rise: of the value, None where the trial was rejected.
            slopes: the rise by the trapezoidal rule, from the hypergradients at both ends.

        Returns:
            The factor.
        """
        return 0.5 * tightening if rise is None else tightening

    def init(self, problem: Problem, x0: Any, y0: Any, data: Any = None) -> ImplicitState:
        """Check the problem and evaluate it at the projection of x0.

        Args:
            problem: the problem.
            x0: upper start.
            y0: where the first lower solve starts.
            data: third argument of the objectives, if they take one.

        Returns:
            The evaluated state.

        Raises:
            TypeError: see `hypergradient`.
            ValueError: see `hypergradient`; also for a lower level that no solver here takes.
        """
        require(self, problem)
        spaces = Spaces.of(x0, y0)
        x, y = problem.project(spaces.x.flatten(x0).detach(), spaces), spaces.y.flatten(y0).detach()
        first = self._evaluator(problem, spaces, data, Accuracy(None))
        first.level.check(x, y)
        scale = first.lower_residual(x, y)
        e, tolerance = self._first(problem, spaces, data, x, y, scale)
        e = replace(e, counts=e.counts + Counts(1, 1))
        assert e.hypergradient is not None
        rule = self._rule(problem).start(x, e.hypergradient, e.merit)
        state = self._state(problem, spaces, e, rule, tolerance, e.counts, 0, y)
        return replace(state, lower_scale=scale, upper_scale=float(state.residuals["upper"]))

    def step(self, problem: Problem, state: ImplicitState, data: Any = None) -> ImplicitState:
        """Try one upper step.

        Args:
            problem: the problem.
            state: the state.
            data: third argument of the objectives, if they take one.

        Returns:
            The next state; x is unchanged when the trial was rejected.
        """
        s, k = state, int(state.iterations) + 1
        accuracy = self._accuracy(s, k, s.lower_scale)
        evaluator = self._evaluator(problem, s.spaces, data, accuracy)
        step = self._rule(problem)
        x = problem.project(s.x_vector + s.rule.size * step.direction(s.rule, s.hypergradient), s.spaces)
        dx = x - s.x_vector
        start, dual = (s.y_vector, s.dual) if self.warm_start else (s.y_first, None)
        e, inexact = evaluator.solve(x, start, accuracy.lower, dual), evaluator.forcing > 0
        eps = torch.finfo(x.dtype).eps
        # F(x, y) - v'f_y has the lower solver's error to second order only
        value = e.corrected(s.adjoint) if inexact else e.value
        exact = max(float(e.lower_residual), float(s.residuals["lower"])) <= 0.1 * float(s.tolerance)
        left = float(s.adjoint.norm() * (e.lower_residual + s.residuals["lower"])) if exact or not inexact else 0.0
        rounding = float(s.value.abs()) + float(s.adjoint.norm()) * s.lower_scale
        noise = 10 * eps * rounding + left
        if e.fault is None and step.accepts(s.rule, dx, s.hypergradient, value, noise):
            e = evaluator.differentiate(e, s.adjoint if self.warm_start else None, accuracy.enough)
            if inexact and e.fault is None:
                e = self._sharpened(problem, s.spaces, float(s.tolerance), e, data)
        if e.fault is None and e.hypergradient is not None:
            rule = step.after(s.rule, dx, e.hypergradient - s.hypergradient, e.merit)
            moved = self._state(problem, s.spaces, e, rule, float(s.tolerance), s.counts + e.counts, k, s.y_first)
            rise, slopes = float(e.merit - s.rule.values[-1]), float(torch.dot(e.hypergradient + s.hypergradient, dx))
            tightening = self._tightened(s.tightening, rise, slopes / 2)
            return replace(moved, tightening=tightening, lower_scale=s.lower_scale, upper_scale=s.upper_scale)
        rule = step.after(s.rule, dx, None, value)
        stuck = float(rule.size * step.direction(rule, s.hypergradient).norm()) <= 4 * eps * max(
            float(s.x_vector.norm()), eps
        )
        singular = s.singular + 1 if e.fault is Status.SINGULAR else 0
        code = _RUNNING
        if stuck or singular >= _SINGULAR_TRIALS:
            code = (e.fault or Status.LINE_SEARCH_FAILED).code
        shorter = replace(
            s, rule=rule, codes=torch.tensor(code), counts=s.counts + e.counts, iterations=s.iterations + 1,
            singular=singular, rejected=s.rejected + 1, tightening=self._tightened(s.tightening),
        )  # fmt: skip
        rough = float(s.residuals["lower"]) > 0.1 * float(s.tolerance) or float(s.residuals["adjoint"]) > s.tolerance
        return self._doubted(problem, shorter, s.rule, data) if inexact and rough and e.fault is None else shorter

    def _first(
        self, problem: Problem, spaces: Spaces, data: Any, x: Tensor, y: Tensor, scale: float
    ) -> tuple[Evaluation, float]:
        """The evaluation of the start, and the run's tolerance."""
        accuracy, spent = self._accuracy(None, 0, scale), Counts()
        evaluator = self._evaluator(problem, spaces, data, accuracy)
        if evaluator.forcing:
            e = evaluator.solve(x, y, 0.0)
            e = evaluator.differentiate(e, None) if e.fault is None else e
            # a y0 that is far off may leave so much of the residual that even the corrected value means nothing
            if e.fault is None and bool((e.merit - e.value).abs() <= _TRUSTED * e.value.abs()):
                assert e.scale is not None
                tolerance = upper_tolerance(self.stopping, e.scale)
                return self._sharpened(problem, spaces, tolerance, e, data), tolerance
            y, spent = e.y if e.fault is None else y, e.counts
            evaluator = self._evaluator(problem, spaces, data, replace(accuracy, forcing=0.0))
        e = evaluator.differentiate(evaluator.solve(x, y, accuracy.lower), None)
        assert e.scale is not None
        assert e.linear_residual is not None
        tolerance = upper_tolerance(self.stopping, e.scale)
        exact = accuracy.lower is None and e.fault is None
        if exact and (float(e.lower_residual) > 0.1 * tolerance or float(e.linear_residual) > tolerance):
            spent += e.counts
            e = evaluator.differentiate(evaluator.solve(x, e.y, 0.1 * tolerance, e.dual), e.adjoint, tolerance)
        return replace(e, counts=spent + e.counts), tolerance

    def _sharpened(self, problem: Problem, spaces: Spaces, tolerance: float, e: Evaluation, data: Any) -> Evaluation:
        """The evaluation, made exact where the run would end with it but for its lower or adjoint residual."""
        residuals = e.residuals(problem, spaces)
        left = float(residuals["lower"]) > 0.1 * tolerance or float(residuals["adjoint"]) > tolerance
        if not left or float(residuals["upper"]) > tolerance:
            return e
        again = self._exact(problem, spaces, tolerance, (e.x, e.y, e.dual), e.adjoint, data)
        return replace(again, counts=e.counts + again.counts)

    def _doubted(self, problem: Problem, s: ImplicitState, rule: StepState, data: Any) -> ImplicitState:
        """The state, its point evaluated exactly: a trial was worse than what the state believes of itself.

        Args:
            problem: the problem.
            s: the state, its step shortened.
            rule: the step's, before that: what an inexact value refused is worth another trial.
            data: third argument of the objectives.

        Returns:
            The state.
        """
        point = s.x_vector, s.y_vector, s.dual
        e = self._exact(problem, s.spaces, float(s.tolerance), point, s.adjoint, data)
        if e.fault is not None:
            return replace(s, counts=s.counts + e.counts)
        rule = replace(rule, values=torch.cat([rule.values[:-1], e.value[None]]))
        again = self._state(
            problem, s.spaces, e, rule, float(s.tolerance), s.counts + e.counts, int(s.iterations), s.y_first
        )
        kept = ("singular", "rejected", "tightening", "lower_scale", "upper_scale")
        return replace(again, **{name: getattr(s, name) for name in kept})

    def _exact(
        self,
        problem: Problem,
        spaces: Spaces,
        tolerance: float,
        point: tuple[Tensor, Tensor, Tensor],
        adjoint: Tensor | None,
        data: Any,
    ) -> Evaluation:
        """The hyperobjective and its gradient at (x, y, dual), to a tenth of the tolerance."""
        evaluator = self._evaluator(problem, spaces, data, Accuracy(0.1 * tolerance, None, tolerance))
        x, y, dual = point
        e = evaluator.solve(x, y, 0.1 * tolerance, dual)
        return e if e.fault is not None else evaluator.differentiate(e, adjoint, tolerance)

    def _rule(self, problem: Problem) -> UpperStep:
        if self.upper_step is not None:
            return self.upper_step
        return QuasiNewtonStep() if problem.upper_set is None else SpectralStep()

    def _evaluator(self, problem: Problem, spaces: Spaces, data: Any, accuracy: Accuracy) -> Evaluator:
        level = lower_level(problem, spaces, data, self.lower_solver)
        if accuracy.adjoint is None:
            solver = level.default_linear_solver() if self.linear_solver is None else self.linear_solver
            searches = self.warm_start and isinstance(self._rule(problem), (QuasiNewtonStep, SpectralStep))
            # Newton steps gain as much from near a solution as from afar; a solver that has to learn curvature does not
            newton = isinstance(level, SmoothLevel) and isinstance(self.lower_solver, NewtonCG | None)
            if not (accuracy.forcing and searches and newton):
                return Evaluator(level, solver)
            if self.linear_solver is None:
                enough = 0.0 if accuracy.enough == torch.inf else accuracy.enough
                solver = level.default_linear_solver(accuracy.forcing, 0.1 * enough)
            return Evaluator(level, solver, accuracy.forcing, self.linear_solver is None)
        enough = 0.0 if accuracy.enough == torch.inf else accuracy.enough
        if self.linear_solver is None:
            return Evaluator(level, level.default_linear_solver(accuracy.adjoint, enough))
        tolerances: dict[str, Any] = {"rtol": accuracy.adjoint, "atol": enough}
        return Evaluator(level, replace(self.linear_solver, **tolerances))  # type: ignore[type-var]

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
    ) -> ImplicitState:
        assert e.hypergradient is not None
        assert e.adjoint is not None
        residuals = e.residuals(problem, spaces)
        return ImplicitState(
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
            dual=e.dual,
            rule=rule,
            y_first=y_first,
            inverse=inverse_name(self.linear_solver),
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
