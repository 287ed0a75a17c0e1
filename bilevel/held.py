"""The certificate on held data: what a stochastic run's error means."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from nestopt.linalg import CG, Status

from .counts import Counts
from .estimate import solve_adjoint
from .problem import Linearization
from .stochastic import Draw, Source

if TYPE_CHECKING:
    from .method import Method, MethodState
    from .problem import Problem

__all__ = ["HeldCheck", "measure"]


@dataclass(frozen=True)
class HeldCheck:
    """Measures a run's error on held data every so many steps; in between the last measurement stands.

    Args:
        method: the method, whose `measure` it calls.
        problem: the problem.
        data: the held data.
        every: steps between two measurements.
    """

    method: Method
    problem: Problem
    data: Any
    every: int

    @classmethod
    def of(cls, method: Method, problem: Problem, data: Any, held: Any, every: int | None) -> HeldCheck | None:
        """The check of a run, or None where its steps see everything and measure by themselves.

        Args:
            method: the method.
            problem: the problem.
            data: of the run.
            held: data of the certificate; None for all samples of a source that has them at hand.
            every: steps between two measurements; None for an epoch of a source, 100 steps without one.

        Returns:
            The check.

        Raises:
            ValueError: if every is not positive.
        """
        if every is not None and every < 1:
            raise ValueError(f"{type(method).__name__}: check_every must be at least 1, but got {every}.")
        source = data if isinstance(data, Source) else None
        smooth = (
            problem.second_order
            and problem.lower_prox is problem.lower_set is problem.inequality is problem.equality is None
        )
        if held is None and source is not None and smooth:
            held = source.whole()
            if held is not None and len(source) == 1:  # every step sees it all
                return None
        if held is None:
            return None
        return cls(method, problem, held, every or (100 if source is None else max(10, len(source))))

    def now(self, state: Any) -> Any:
        """The state with its error measured here.

        Args:
            state: of the method.

        Returns:
            It, or itself where it has ended by a fault.
        """
        return state if state.codes else self.method.measure(self.problem, state, self.data)

    def after(self, before: Any, state: Any) -> Any:
        """The state after a step: measured when that is due, else with the last measurement.

        Args:
            before: the state that the step began with.
            state: after it.

        Returns:
            The state.
        """
        if int(state.iterations) % self.every == 0:
            return self.now(state)
        return replace(state, error=before.error, residuals=before.residuals, value=before.value)

    def finish(self, state: Any) -> Any:
        """The last state, measured where it is.

        Args:
            state: at the end of the run.

        Returns:
            The state, CONVERGED if that is what the measurement shows.
        """
        if state.status not in (Status.MAX_ITER, Status.STOPPED) or int(state.iterations) % self.every == 0:
            return state
        state = self.method.measure(self.problem, state, self.data)
        return replace(state, codes=torch.where(state.error <= state.tolerance, Status.CONVERGED.code, state.codes))


def measure(problem: Problem, state: MethodState, data: Any) -> Any:
    """Any method's state with |f_y|, |F_y - H v| and |P(x - hypergradient) - x| measured on other data, v by CG.

    Args:
        problem: with a smooth, unconstrained lower level.
        state: whose x and y they are measured at.
        data: third argument of the objectives.

    Returns:
        The state.

    Raises:
        ValueError: where the lower level is neither smooth nor unconstrained.
    """
    problem.require_smooth_lower_level("held data: the certificate")
    x, spaces = state.x_vector, state.spaces
    point = Linearization(problem, spaces, x, state.y_vector, data)
    slope, solution = solve_adjoint(point, CG(), None)
    residuals = {
        "lower": point.lower_y.norm(),
        "adjoint": x.new_tensor(float(solution.residual_norm)),
        "upper": (problem.project(x - slope, spaces) - x).norm(),
    }
    n, m = data.samples if isinstance(data, Draw) else (0, 0)
    return replace(
        state,
        value=point.upper,
        error=torch.stack(list(residuals.values())).amax(),
        residuals=residuals,
        counts=state.counts + Counts(1, 1, solution.products + 1, samples=n + m * (solution.products + 2)),
    )
