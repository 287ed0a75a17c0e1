"""What every minimiser shares: the public call with its checks, the state, the stagnation rule and the result."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nestopt.linalg import Result, Status, iterate
from nestopt.linalg.autodiff import GraphOperator, evaluate, gradient
from nestopt.linalg.cg import default_rtol
from nestopt.linalg.result import Callback, LoopState, check_stopping
from nestopt.linalg.tree import Ravel

from .transforms import untraced

__all__ = [
    "ARMIJO",
    "MinimizeResult",
    "Minimizer",
    "MinimizerState",
    "Objective",
    "Point",
    "Trial",
    "first_length",
    "shorter_step",
    "stuck",
]

ARMIJO = 1e-4  # a step must lower f by this fraction of what the slope promises
_RUNNING = Status.RUNNING.code


class Trial(NamedTuple):
    """f evaluated at y, with its graph: the gradient is not computed yet."""

    y: Tensor
    leaves: list[Tensor]
    graph: Tensor
    value: float


@dataclass(frozen=True)
class Point:
    """f and its gradient at y, raveled and cut from every graph."""

    y: Tensor
    value: float
    gradient: Tensor
    error: Tensor

    @property
    def finite(self) -> bool:
        """Whether value and gradient are."""
        return math.isfinite(self.value) and bool(torch.isfinite(self.error))

    @property
    def flat(self) -> float:
        """A change of f below this may be rounding (eps^(3/4) |f|), and is judged by gradients instead."""
        return float(torch.finfo(self.y.dtype).eps ** 0.75) * abs(self.value)

    def trapezoid(self, other: Point) -> float:
        """f(other) - f(self) by the trapezoidal rule along the slopes: exact to the order |other - self|^3."""
        return 0.5 * float(torch.dot(self.gradient + other.gradient, other.y - self.y))

    def rise(self, other: Point) -> float:
        """f(other) - f(self); where that is at the rounding level, from the slopes."""
        rise = other.value - self.value
        return rise if abs(rise) > self.flat else self.trapezoid(other)

    def overflows_downhill(self, other: Point) -> bool:
        """Whether f has fallen from here to where it, or its gradient, is too large for the dtype: unbounded below."""
        return other.value == -math.inf or (other.value < self.value and bool(torch.isinf(other.error)))


class Objective:
    """The user's function of a pytree as a function of one vector, counting what it is asked for.

    Args:
        function: objective(y) -> scalar tensor.
        ravel: between y and the vector.
    """

    def __init__(self, function: Callable[[Any], Tensor], ravel: Ravel) -> None:
        self.function, self.ravel = function, ravel
        self.evaluations = self.gradients = self.products = 0

    def evaluate(self, y: Tensor) -> Trial:
        """The value at a vector that nobody will modify in place."""
        self.evaluations += 1
        leaves = [part.detach().requires_grad_() for part in self.ravel.split(y)]
        graph = evaluate(self.function, self.ravel.build(leaves), name="objective")
        return Trial(y, leaves, graph, float(graph.detach()))

    def differentiate(self, trial: Trial) -> Point:
        """The trial with its gradient."""
        return self._point(trial, gradient(trial.graph, trial.leaves))

    def linearize(self, trial: Trial) -> tuple[Point, GraphOperator]:
        """The trial with its gradient, and the Hessian along the gradient's graph."""
        parts = gradient(trial.graph, trial.leaves, create_graph=True)
        return self._point(trial, parts), GraphOperator(parts, trial.leaves, self.ravel, self.ravel, symmetric=True)

    def _point(self, trial: Trial, parts: list[Tensor]) -> Point:
        self.gradients += 1
        vector = self.ravel.join(parts).detach()
        return Point(trial.y, trial.value, vector, torch.linalg.vector_norm(vector))


@dataclass(frozen=True, kw_only=True)
class MinimizerState:
    """Where a minimiser stands.

    Attributes:
        point: the newest point with its value and gradient; where the run has STAGNATED, the best one.
        scale: |grad| at the starting point.
        tolerance: what |grad| is held against.
        codes: Status code.
        iterations: steps taken.
        evaluations: values of the objective so far.
        gradients: gradients so far.
        products: Hessian products so far.
        best: the point of smallest |grad|.
        stale: values spent since `best` was found, on steps that change f by rounding only.
        ravel: between the vectors and the caller's structure.
    """

    point: Point
    scale: Tensor
    tolerance: Tensor
    codes: Tensor
    iterations: Tensor
    evaluations: int = 0
    gradients: int = 0
    products: int = 0
    best: Point
    stale: int = 0
    ravel: Ravel = field(repr=False)

    @property
    def error(self) -> Tensor:
        """|grad| at the newest point."""
        return self.point.error

    @property
    def x(self) -> Any:
        """The newest point in the caller's structure."""
        return self.ravel.unflatten(self.point.y)

    def end(self, status: Status) -> Any:
        """The same state, ended."""
        return replace(self, codes=torch.full_like(self.codes, status.code))


@dataclass(frozen=True, kw_only=True)
class MinimizeResult(Result):
    """What a minimiser returns.

    Attributes:
        x: the minimiser in the structure of y0: new tensors, without a graph.
        error: |grad f(x)|, from a fresh gradient at x.
        tolerance: what the error was held against; a float, or a tensor over the batch.
        value: f(x), likewise.
        evaluations: values of the objective that were spent; with batch_dims, calls with the whole batch.
        gradients: gradients, likewise.
        products: products with the Hessian, likewise; with batch_dims, those of all items together.
    """

    tolerance: Any
    value: Any
    evaluations: int
    gradients: int
    products: int


@dataclass(frozen=True, kw_only=True)
class Minimizer(ABC):
    """Minimises objective(y) over a pytree y: `minimizer(objective, y0, tolerance=None)`.

    A subclass is a frozen dataclass of hyper-parameters and writes `_start` and `_step`. CONVERGED means that the
    gradient measured at the point returned has |grad| <= max(rtol |grad(y0)|, atol), or <= `tolerance` when the caller
    gives one. That is a stationary point: from a saddle or a maximum, where the gradient is zero, no minimiser moves.

    Args:
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in the units of the gradient.
        max_iter: limit of steps.
    """

    rtol: float | None = None
    atol: float = 0.0
    max_iter: int = 1000

    State: ClassVar[type[MinimizerState]] = MinimizerState
    patience: ClassVar[int] = 5  # values spent on flat steps without a smaller |grad|, before STAGNATED

    def __post_init__(self) -> None:
        check_stopping(type(self).__name__, self.rtol, self.atol, self.max_iter)

    @untraced
    def __call__(
        self,
        objective: Callable[[Any], Tensor],
        y0: Any,
        tolerance: float | None = None,
        *,
        batch_dims: int = 0,
        callbacks: Iterable[Callback] = (),
    ) -> MinimizeResult:
        """Minimise objective from y0.

        Args:
            objective: of a tree like y0, returns a scalar tensor.
            y0: where to start: a tensor, a pytree of tensors or a module (its parameters), which are only read; or the
                `state` of an earlier result, perhaps of a slightly different objective: the run starts at its point
                and keeps what the method had learnt of the curvature.
            tolerance: absolute tolerance for |grad|, in place of rtol and atol.
            batch_dims: leading dimensions, the same in every leaf of y0, that count independent problems. objective
                then takes the whole batch and returns one value an item; an item that has ended is frozen, and what
                becomes of it changes no other. A state of such a run brings its own batch.
            callbacks: called with (iteration, state) after each step; a true return value ends the run as STOPPED.

        Returns:
            The result; a failed run is a status, never an exception.

        Raises:
            TypeError: if objective is not callable or returns no floating tensor, or a leaf of y0 is none.
            ValueError: if objective returns no scalar (an item), tolerance is negative, y0 mixes dtypes or devices, or
                the method has no batched form.
        """
        if batch_dims or _many(y0):
            return self._batched().minimize(objective, y0, tolerance, batch_dims, callbacks)  # type: ignore[no-any-return]
        start = self.init(objective, y0, tolerance)
        s = iterate(
            lambda state: self.step(objective, state),
            start,
            max_iter=self.max_iter,
            tolerance=start.tolerance,
            callbacks=callbacks,
        )
        s = self._release(s)
        return MinimizeResult(
            x=s.ravel.unflatten(s.point.y.clone()), codes=s.codes, iterations=int(s.iterations), error=float(s.error),
            state=s, tolerance=float(s.tolerance), value=s.point.value, evaluations=s.evaluations,
            gradients=s.gradients, products=s.products,
        )  # fmt: skip

    def init(
        self, objective: Callable[[Any], Tensor], y0: Any, tolerance: float | None = None, *, batch_dims: int = 0
    ) -> Any:
        """The evaluated state at y0.

        Args:
            objective: see `__call__`.
            y0: see `__call__`.
            tolerance: see `__call__`.
            batch_dims: see `__call__`.

        Returns:
            The state, of the method's own class; it costs one gradient.

        Raises:
            TypeError: see `__call__`.
            ValueError: see `__call__`.
        """
        name = type(self).__name__
        if batch_dims or _many(y0):
            return self._batched().init(objective, y0, tolerance, batch_dims)
        if not callable(objective):
            raise TypeError(f"{name}: objective must be a function of y, but got {type(objective).__name__}.")
        if tolerance is not None and not tolerance >= 0:
            raise ValueError(f"{name}: tolerance must be a number >= 0 or None, but got {tolerance}.")
        previous = y0 if isinstance(y0, MinimizerState) else None
        ravel = Ravel.of(y0, "y0") if previous is None else previous.ravel
        y = ravel.flatten(y0).detach().clone() if previous is None else previous.point.y
        f = Objective(objective, ravel)
        point, memory = self._start(f, y, previous)
        rtol = default_rtol(y.dtype) if self.rtol is None else self.rtol
        limit = (rtol * point.error).clamp_min(self.atol) if tolerance is None else point.error.new_tensor(tolerance)
        zero = torch.zeros_like(point.error, dtype=torch.int64)
        return self.State(
            point=point, scale=point.error, tolerance=limit, iterations=zero, best=point, ravel=ravel,
            codes=zero + (_RUNNING if point.finite else Status.NON_FINITE.code),
            evaluations=f.evaluations, gradients=f.gradients, products=f.products, **memory,
        )  # fmt: skip

    def step(self, objective: Callable[[Any], Tensor], state: Any) -> Any:
        """One step, which ends with a gradient at the new point.

        Args:
            objective: see `__call__`.
            state: from `init` or `step`; it is not modified.

        Returns:
            The next state; the same one where the gradient is zero or NaN.
        """
        if _many(state):
            return self._batched().step(objective, state)
        if not bool(state.error > 0):
            return state  # a stationary point has no direction to leave by
        f = Objective(objective, state.ravel)
        new = self._step(f, state)
        new = replace(
            new,
            evaluations=state.evaluations + f.evaluations,
            gradients=state.gradients + f.gradients,
            products=state.products + f.products,
        )
        return new if new.point is state.point else _judge(state, new, self.patience)

    def _batched(self) -> Any:
        """The method for a batch of problems: a BatchedMinimizer."""
        raise ValueError(
            f"{type(self).__name__}: it minimises one problem at a time, but batch_dims > 0 was asked for; use LBFGS, "
            "NewtonCG or GradientDescent, or minimise the sum over the batch with batch_dims=0."
        )

    @abstractmethod
    def _start(self, f: Objective, y: Tensor, previous: Any) -> tuple[Point, dict[str, Any]]:
        """The evaluated starting point, and the fields that the method's state adds to MinimizerState."""

    @abstractmethod
    def _step(self, f: Objective, s: Any) -> Any:
        """The next state: a new point, or the same point and an ending."""

    def _release(self, s: Any) -> Any:
        """The state without graphs, for the result."""
        return s


def _many(start: Any) -> bool:
    """Whether this is the state of a run over a batch."""
    return isinstance(start, LoopState) and not isinstance(start, MinimizerState)


def _judge(old: MinimizerState, new: MinimizerState, patience: int) -> Any:
    """Give an ending to a step that ran away, met a NaN, or belongs to a run at the rounding level."""
    a, b = old.point, new.point
    eps = torch.finfo(b.y.dtype).eps
    if not b.finite:  # the last finite point is kept
        return replace(new, point=a).end(Status.DIVERGED if a.overflows_downhill(b) else Status.NON_FINITE)
    size = float(b.y.abs().amax())
    if size > eps**-2:
        return new.end(Status.DIVERGED)
    flat = abs(b.value - a.value) <= b.flat or float((b.y - a.y).abs().amax()) <= 10 * eps * size
    if not flat or bool(b.error < 0.9 * new.best.error):
        return replace(new, best=b, stale=0)
    stale = new.stale + new.evaluations - old.evaluations
    if stale < patience:
        return replace(new, stale=stale)
    return replace(new, point=new.best).end(Status.STAGNATED)


def first_length(point: Point) -> float:
    """How long a first step along the gradient should be, when nothing is known of the curvature."""
    return 0.1 * max(1.0, float(torch.linalg.vector_norm(point.y)))


def stuck(point: Point, length: float, decrease: float) -> Status:
    """Why no step along a direction was taken.

    Args:
        point: where the search started.
        length: of the first step tried.
        decrease: what the slope promised for it.

    Returns:
        STAGNATED when rounding hides the decrease, else LINE_SEARCH_FAILED.
    """
    rounding = 10 * torch.finfo(point.y.dtype).eps * float(torch.linalg.vector_norm(point.y))
    return Status.STAGNATED if decrease <= point.flat or length <= rounding else Status.LINE_SEARCH_FAILED


def shorter_step(t: float, slope: float, rise: float) -> float:
    """The step to try after t: the minimiser of the parabola through f, its slope and f(t), kept in [t/10, t/2].

    Args:
        t: rejected step.
        slope: derivative of f along the direction, at 0; negative.
        rise: f(t) - f(0); may be NaN or inf.

    Returns:
        The next step.
    """
    if not math.isfinite(rise):
        return 0.1 * t
    bend = rise - slope * t
    return min(max(-0.5 * slope * t * t / bend, 0.1 * t), 0.5 * t) if bend > 0 else 0.5 * t
