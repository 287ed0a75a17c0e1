"""What every penalty method shares: the public calls, faults, and the second stage that removes the penalty's bias."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from nestopt.linalg import Status, Stopping

from .assumptions import require
from .counts import Counts
from .method import Method, MethodState
from .oracle import Oracle, Slopes
from .problem import Problem, Spaces

__all__ = ["PenaltyMethod", "PenaltyState", "error_of", "penalty_tolerance", "refuse_sizes"]

_RUNNAWAY = 1e10


@dataclass(frozen=True, kw_only=True)
class PenaltyState(MethodState):
    """Where a penalty method stands.

    Attributes:
        scale: |F_x| + |F_y| at the start, which relative tolerances multiply.
        second: the second stage's own state, None before it begins.
    """

    scale: Tensor
    second: MethodState | None = None


class PenaltyMethod(Method):
    """A method whose answer is biased by a penalty, followed by a second stage that removes the bias.

    A subclass writes `_begin` and `_advance`. Its own loop ends after `stopping.max_iter` steps, or when its residuals
    other than the bias ("lower") are below it; then `debias`, any Method, goes on from its last point with
    the same tolerance. Counts, history, callbacks and checkpoints go through both stages.
    """

    debias: Method | None

    @property
    def max_steps(self) -> int:
        """Steps of both stages."""
        return self.stopping.max_iter + (0 if self.debias is None else 1 + self.debias.max_steps)

    def init(self, problem: Problem, x0: Any, y0: Any, data: Any = None) -> Any:
        """Check the problem and evaluate it at the projections of x0 and y0.

        Args:
            problem: that meets the method's assumptions.
            x0: upper start.
            y0: lower start.
            data: third argument of the objectives, if they take one; it needs debias=None.

        Returns:
            The evaluated state.

        Raises:
            TypeError: see `hypergradient`.
            ValueError: for a problem that the method does not take, unused variables, captured tensors, data with a
                second stage, or a step size beyond its bound.
        """
        require(self, problem)
        if self.debias is not None:
            require(self.debias, problem)
            name = type(self).__name__
            if data is not None:
                raise ValueError(
                    f"{name}: data may change from step to step, so that the second stage, debias="
                    f"{type(self.debias).__name__}(...), has no fixed problem to solve; pass {name}(debias=None), and "
                    "afterwards run ValueDifference() or AID() from the result's x and y with all data."
                )
        spaces = Spaces.of(x0, y0)
        oracle = problem.oracle(spaces, data)
        x = oracle.project(spaces.x.flatten(x0).detach())
        y = spaces.y.flatten(y0).detach()
        if problem.lower_set is not None:
            y = oracle.prox(y, 1.0, x)
        oracle.check(x, y)
        state = self._begin(oracle, x, y)
        return replace(state, counts=oracle.counts)

    def step(self, problem: Problem, state: Any, data: Any = None) -> Any:
        """One step of the method itself, or of its second stage once that has begun.

        Args:
            problem: the problem.
            state: the state; it is not modified.
            data: third argument of the objectives, if they take one.

        Returns:
            The next state; the last good one, ended, where the step met a NaN or ran away.
        """
        if state.second is not None:
            assert self.debias is not None
            return _follow(state, self.debias.step(problem, state.second, data), state.second.counts)
        if self.debias is not None and (int(state.iterations) >= self.stopping.max_iter or _settled(state)):
            return self.finish(problem, state, data)
        oracle = problem.oracle(state.spaces, data)
        new = self._advance(oracle, state)
        counts, iterations = state.counts + oracle.counts, state.iterations + 1
        fault = None
        if not bool(torch.isfinite(new.error)) or not bool(torch.isfinite(new.value)):
            fault = Status.NON_FINITE
        elif bool(new.error > _RUNNAWAY * state.scale.clamp_min(1.0)):
            fault = Status.DIVERGED
        if fault is not None:
            return replace(state, codes=torch.tensor(fault.code), counts=counts, iterations=iterations)
        return replace(new, counts=counts, iterations=iterations)

    def finish(self, problem: Problem, state: Any, data: Any = None) -> Any:
        """Begin the second stage at the state's point.

        Args:
            problem: the problem.
            state: of the method's own loop.
            data: third argument of the objectives, if they take one.

        Returns:
            The state with `second`, measured anew; the state itself, ended, where the second stage cannot begin.
        """
        assert self.debias is not None
        second = self.debias.init(problem, state.x, state.y, data)
        if int(second.codes) != Status.RUNNING.code:  # the last good point is the first stage's
            counts, iterations = state.counts + second.counts, state.iterations + 1
            return replace(state, codes=second.codes, counts=counts, iterations=iterations)
        return _follow(state, replace(second, tolerance=state.tolerance), Counts())

    def restore(self, saved: dict[str, Any], x0: Any, y0: Any) -> MethodState:
        """See `Method.restore`; the second stage's state is restored by its own method."""
        second = saved["second"]
        if second is not None:
            assert self.debias is not None
            second = self.debias.restore(second, x0, y0)
        state = super().restore({name: value for name, value in saved.items() if name != "second"}, x0, y0)
        assert isinstance(state, PenaltyState)
        return replace(state, second=second)

    @abstractmethod
    def _begin(self, oracle: Oracle, x: Tensor, y: Tensor) -> Any:
        """The evaluated state at (x, y); `_fields` has what all states share."""

    @abstractmethod
    def _advance(self, oracle: Oracle, s: Any) -> Any:
        """One published step, evaluated at the new point; counts and iterations are the base's."""

    def _fields(self, oracle: Oracle, x: Tensor, y: Tensor, upper: Slopes) -> dict[str, Any]:
        """The fields of a first state that do not depend on the method.

        Args:
            oracle: of the step.
            x: raveled start.
            y: likewise.
            upper: F with its gradients there.

        Returns:
            Keyword arguments of PenaltyState, without error and residuals.
        """
        scale = oracle.norm(upper.x) + oracle.norm(upper.y)
        finite = torch.isfinite(upper.value) & torch.isfinite(scale)
        return {
            "x_vector": x, "y_vector": y, "value": upper.value, "scale": scale, "spaces": oracle.spaces,
            "tolerance": penalty_tolerance(self.stopping, scale), "counts": oracle.counts,
            "codes": torch.tensor(Status.RUNNING.code if bool(finite) else Status.NON_FINITE.code),
            "iterations": torch.tensor(0),
        }  # fmt: skip


def error_of(residuals: dict[str, Tensor]) -> Tensor:
    """The largest of the named parts; NaN where one is."""
    return torch.stack(list(residuals.values())).amax()


def refuse_sizes(method: Any, *names: str) -> None:
    """Refuse numbers that are not positive and finite among a method's hyper-parameters.

    Args:
        method: whose they are.
        names: of the fields; None and schedules pass.

    Raises:
        ValueError: naming the field.
    """
    for name in names:
        value = getattr(method, name)
        if value is not None and not callable(value) and not 0 < value < float("inf"):
            raise ValueError(
                f"{type(method).__name__}: {name} must be positive and finite, but got {value}; the docstring says "
                "what works, and the default needs no tuning."
            )


def penalty_tolerance(stopping: Stopping, scale: Tensor) -> Tensor:
    """max(rtol * scale, atol), where rtol None is 1e-7 in float64 and 1e-3 in lower precision.

    Args:
        stopping: of the method.
        scale: |F_x| + |F_y| at the start, which may be a hundred times the hypergradient.

    Returns:
        The absolute tolerance of a run.
    """
    return stopping.tolerance(scale, 1e-7 if scale.dtype == torch.float64 else 1e-3)


def _settled(s: PenaltyState) -> bool:
    """Whether the bias is what is left of the error."""
    rest = [value for name, value in s.residuals.items() if name != "lower"]
    return bool(torch.stack(rest).amax() <= s.residuals["lower"])


def _follow(s: Any, second: MethodState, before: Counts) -> Any:
    """The state that shows what its second stage has reached."""
    spent = {f.name: getattr(second.counts, f.name) - getattr(before, f.name) for f in fields(Counts)}
    return replace(
        s, second=second, x_vector=second.x_vector, y_vector=second.y_vector, value=second.value, error=second.error,
        residuals=second.residuals, codes=second.codes, counts=s.counts + Counts(**spent), iterations=s.iterations + 1,
    )  # fmt: skip
