"""What every bilevel method shares: the public call, the result, and the lower level's solver."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.linalg import Result, SolverError, Status, Stopping, iterate

from .assumptions import Assumptions
from .callbacks import Callback, History, Run
from .counts import Counts
from .held import HeldCheck, measure
from .inverses import advised
from .problem import Problem, Spaces

__all__ = ["BilevelResult", "Counts", "Method", "MethodState", "check_run"]


@dataclass(frozen=True, kw_only=True)
class MethodState:
    """Where a method stands: raveled variables, the error measured there, and how the run is going.

    Attributes:
        x_vector: raveled upper variable.
        y_vector: raveled lower variable.
        value: F(x, y).
        error: largest of the lower residual, the adjoint residual and the projected upper step, or the method's own.
        tolerance: what the error is held against.
        codes: Status code.
        iterations: outer steps taken.
        counts: what they cost.
        spaces: the structures of x and y.
        residuals: the named parts of the error.
    """

    x_vector: Tensor
    y_vector: Tensor
    value: Tensor
    error: Tensor
    tolerance: Tensor
    codes: Tensor
    iterations: Tensor
    counts: Counts
    spaces: Spaces = field(repr=False)
    residuals: dict[str, Tensor] = field(default_factory=dict)

    @property
    def x(self) -> Any:
        """The upper variable in its structure."""
        return self.spaces.x.unflatten(self.x_vector)

    @property
    def y(self) -> Any:
        """The lower variable in its structure."""
        return self.spaces.y.unflatten(self.y_vector)

    @property
    def status(self) -> Status:
        """How the run stands."""
        return Status.from_code(int(self.codes))

    def to_dict(self) -> dict[str, Any]:
        """Everything but the structures as nested dicts of tensors and numbers, for torch.save."""
        return {f.name: _pack(getattr(self, f.name)) for f in fields(self) if f.name != "spaces"}

    @classmethod
    def from_dict(cls, saved: dict[str, Any], spaces: Spaces, parts: dict[str, type]) -> MethodState:
        """The state that `to_dict` saved.

        Args:
            saved: the nested dicts.
            spaces: the structures of x and y.
            parts: dataclass of each field that holds one.

        Returns:
            The state, equal to the last bit.
        """
        values = {name: parts[name](**value) if name in parts else value for name, value in saved.items()}
        return cls(spaces=spaces, **values)


def _pack(value: Any) -> Any:
    if isinstance(value, MethodState):  # a second stage's
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _pack(getattr(value, f.name)) for f in fields(value)}
    return value


@dataclass(frozen=True, kw_only=True)
class BilevelResult(Result):
    """What a bilevel method found.

    Attributes:
        x: the upper variable, in the structure of x0.
        y: the lower variable, in the structure of y0.
        error: largest of the residuals below, measured at (x, y).
        tolerance: what it was held against.
        value: F(x, y).
        residuals: the named parts of the error, such as lower, adjoint and upper.
        counts: gradients, products and lower solves.
        history: one record an outer step: value, error, residuals, counts and seconds.
        method: that found it.
        reason: why `solve` chose the method; empty where it was given.
    """

    y: Any
    tolerance: float
    value: float
    residuals: dict[str, float]
    counts: Counts
    history: list[dict[str, Any]]
    method: Any = None
    reason: str = ""

    def unwrap(self) -> Any:
        """The upper variable if the run converged; see `linalg.Result.unwrap`.

        Returns:
            `x`.

        Raises:
            SolverError: otherwise, with the status, the error and the advice.
        """
        try:
            return super().unwrap()
        except SolverError as error:
            more = "" if self.method is None else self.method.advice(self.state)
            raise SolverError(" ".join(part for part in (advised(error), more) if part), self) from None


class Method(ABC):
    """A bilevel method: a frozen dataclass of hyper-parameters with `init` and `step`.

    Call it as `method(problem, x0, y0)`, or as `bilevel.solve(problem, x0, y0, method=method)`, or write the loop:
    `state = method.init(problem, x, y)`, then `state = method.step(problem, state, data)`.
    """

    State: ClassVar[type[MethodState]]
    parts: ClassVar[dict[str, type]] = {"counts": Counts}
    assumptions: ClassVar[Assumptions]
    stopping: Stopping

    @abstractmethod
    def init(self, problem: Problem, x0: Any, y0: Any, data: Any = None) -> Any:
        """Check the problem and evaluate it at the start."""

    @abstractmethod
    def step(self, problem: Problem, state: Any, data: Any = None) -> Any:
        """One outer step: move, then evaluate."""

    def __call__(
        self,
        problem: Problem,
        x0: Any,
        y0: Any,
        *,
        data: Callable[[int], Any] | None = None,
        callbacks: Iterable[Callable[[int, Any], Any]] = (),
        state: MethodState | None = None,
        held: Any = None,
        check_every: int | None = None,
    ) -> BilevelResult:
        """Run the method; see `bilevel.solve` for the arguments."""
        check_run(type(self).__name__, data, callbacks)
        history = History()
        callbacks = (history, *callbacks)
        run = Run(self, problem, x0, y0, history)
        for callback in callbacks:
            if isinstance(callback, Callback):
                restored = callback.start(run)
                state = restored if restored is not None else state

        def batch(k: int) -> Any:
            return None if data is None else data(k)

        check = HeldCheck.of(self, problem, data, held, check_every)

        def step(s: Any) -> Any:
            moved = self.step(problem, s, batch(int(s.iterations) + 1))
            return moved if check is None else check.after(s, moved)

        if state is None:
            state = self.init(problem, x0, y0, batch(0))
            state = state if check is None else check.now(state)
        limit, tolerance = max(self.max_steps - int(state.iterations), 0), state.tolerance
        first = [state]
        del state  # this frame would hold the start's vectors through the run
        state = iterate(step, first.pop(), max_iter=limit, tolerance=tolerance, callbacks=callbacks)
        state = state if check is None else check.finish(state)
        for callback in callbacks:
            if isinstance(callback, Callback):
                callback.finish(state)
        return BilevelResult(
            x=state.x,
            y=state.y,
            codes=state.codes,
            iterations=int(state.iterations),
            error=float(state.error),
            tolerance=float(state.tolerance),
            value=float(state.value),
            residuals={name: float(value) for name, value in state.residuals.items()},
            counts=state.counts,
            history=history.records,
            method=self,
            state=state,
        )

    def advice(self, state: Any) -> str:
        """What a run that did not converge says beyond its status.

        Args:
            state: its last.

        Returns:
            A sentence, or nothing.
        """
        return ""

    @property
    def max_steps(self) -> int:
        """Limit of outer steps of a run: those of the stopping, and of a second stage where a method has one."""
        return self.stopping.max_iter

    def measure(self, problem: Problem, state: Any, held: Any) -> Any:
        """The state with its error measured on held data.

        Args:
            problem: the problem.
            state: the state.
            held: third argument of the objectives.

        Returns:
            The state.
        """
        return measure(problem, state, held)

    def restore(self, saved: dict[str, Any], x0: Any, y0: Any) -> MethodState:
        """The state that `MethodState.to_dict` saved, for variables structured like x0 and y0.

        Args:
            saved: the nested dicts.
            x0: upper variable of the same structure.
            y0: lower variable of the same structure.

        Returns:
            The state.
        """
        state = self.State.from_dict(saved, Spaces.of(x0, y0), self.parts)
        resumed = torch.where(state.codes == Status.MAX_ITER.code, Status.RUNNING.code, state.codes)
        return replace(state, codes=resumed)


def check_run(owner: str, data: Any, callbacks: Any) -> None:
    """Refuse data and callbacks that cannot be called.

    Args:
        owner: who asks.
        data: k -> batch, or None.
        callbacks: of (iteration, state).

    Raises:
        TypeError: naming the argument, and how it is passed.
    """
    if data is not None and not callable(data):
        raise TypeError(
            f"{owner}: data must be a function k -> batch, such as bilevel.Batches(...) or bilevel.FromLoader(loader), "
            f"but got {type(data).__name__}."
        )
    if not isinstance(callbacks, Iterable):
        raise TypeError(
            f"{owner}: callbacks must be a list of them, but got {type(callbacks).__name__}; write callbacks=[...]."
        )
