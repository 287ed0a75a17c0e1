"""Outcomes and the only loop of the library: Status, Stopping, Result, iterate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

__all__ = ["Callback", "LoopState", "Result", "SolverError", "Status", "Statuses", "Stopping", "iterate"]


class Status(Enum):
    """How a solve ended; the member's value is the advice to whoever called it.

    Example:
        >>> Status.CONVERGED.code, Status.from_code(1)
        (1, <Status.CONVERGED: 'the measured error is within the tolerance'>)
    """

    RUNNING = "the solve has not ended; keep calling step"
    CONVERGED = "the measured error is within the tolerance"
    MAX_ITER = "the iteration limit came before the tolerance; raise max_iter, loosen rtol, or precondition"
    STAGNATED = (
        "the error stopped falling above the tolerance, as it does at the rounding level of the dtype; "
        "use float64, loosen rtol, or precondition"
    )
    NEGATIVE_CURVATURE = (
        "the operator has negative curvature along `direction`: it is not positive definite; "
        "use MINRES, add a shift, or solve the lower level to a minimiser"
    )
    SINGULAR = (
        "the operator is singular to working precision along `direction`; "
        "add a shift, or use a least-squares solver or a method that needs no inverse"
    )
    BREAKDOWN = "the recurrence broke down before the tolerance; change x0, the preconditioner or the solver"
    DIVERGED = (
        "the iterates run away: the step size is too large (lower it, or let the solver choose it), or the "
        "objective is unbounded below (add a penalty or bounds)"
    )
    NON_FINITE = "a NaN or inf appeared; look for it in the inputs first, then for overflow in the objective"
    NOT_STATIONARY = "the lower level is not at a stationary point; solve it further before differentiating"
    LINE_SEARCH_FAILED = "no step along the search direction lowered the objective; check its gradient and smoothness"
    STOPPED = "a callback asked to stop"
    INFEASIBLE = "no point meets all constraints, as a certificate proves; drop or relax some of them"
    UNBOUNDED = (
        "the objective falls without end along a feasible direction; add constraints, bounds or a quadratic term"
    )
    NOT_CONVEX = "the quadratic term has negative curvature, so that the program is not convex; add a shift to it"
    NOT_CONTRACTING = (
        "the fixed-point map does not contract along the iterates: the observed `rate` is 1 or more, or the errors "
        "cycle; damp it, rescale it, or use Anderson, Broyden or NewtonKrylov"
    )

    @property
    def code(self) -> int:
        """The member's position, which is what a tensor of outcomes over a batch holds."""
        return _CODES[self]

    @classmethod
    def from_code(cls, code: int) -> Status:
        """The member with this code.

        Args:
            code: an integer that `Status.code` returned.

        Returns:
            The member.
        """
        return _MEMBERS[code]


_MEMBERS = tuple(Status)
_CODES = {member: code for code, member in enumerate(_MEMBERS)}


class Statuses:
    """The outcomes of a batch: a tensor of codes that reads as Status members.

    `statuses == Status.CONVERGED` is a boolean tensor of the batch's shape, `statuses[i]` is a member (or again a
    batch), and iterating gives the members in row-major order.

    Args:
        codes: integer tensor of `Status.code` values, of the batch's shape.

    Example:
        >>> s = Statuses(torch.tensor([1, 2]))
        >>> s[1].name, (s == Status.CONVERGED).tolist()
        ('MAX_ITER', [True, False])
    """

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes

    @property
    def shape(self) -> torch.Size:
        """The batch's shape."""
        return self.codes.shape

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: Any) -> Status | Statuses:
        return status_of(self.codes[index])

    def __iter__(self) -> Iterator[Status]:
        return (Status.from_code(code) for code in self.codes.flatten().tolist())

    def __eq__(self, other: object) -> Any:
        if isinstance(other, Status):
            return self.codes == other.code
        if isinstance(other, Statuses):
            return self.codes == other.codes
        return NotImplemented

    def __ne__(self, other: object) -> Any:
        equal = self.__eq__(other)
        return equal if equal is NotImplemented else ~equal

    __hash__ = None  # type: ignore[assignment]  # a mutable tensor inside

    def __repr__(self) -> str:
        names = [status.name for status in self]
        counts = ", ".join(f"{name}: {names.count(name)}" for name in dict.fromkeys(names))
        return f"Statuses({counts})"


def status_of(codes: Tensor) -> Status | Statuses:
    """One Status for a 0-d tensor of codes, Statuses for a batch."""
    return Status.from_code(int(codes)) if codes.ndim == 0 else Statuses(codes)


def scalar_or_tensor(value: Tensor) -> Any:
    """A Python number for a 0-d tensor, the tensor itself for a batch."""
    return value.item() if value.ndim == 0 else value


class SolverError(RuntimeError):
    """A solve did not converge and its caller asked, by `unwrap`, for an answer or an error.

    Args:
        message: the sentence with the statuses and their advice.
        result: the Result that failed, with whatever it holds.
    """

    def __init__(self, message: str, result: Result) -> None:
        super().__init__(message)
        self.result = result


@dataclass(frozen=True)
class Stopping:
    """When an iteration may stop: error <= max(rtol * scale, atol), or after max_iter steps.

    `scale` is the solver's own: the norm of the right-hand side for a linear system, the error at the starting point
    for a minimiser.

    Args:
        rtol: relative tolerance; below the dtype's rounding level the outcome is STAGNATED. None leaves the choice to
            the method, which documents it for each dtype.
        atol: absolute tolerance, in the units of the error.
        max_iter: limit of steps, at least 0.

    Raises:
        ValueError: if a tolerance is negative or NaN, or max_iter is negative.

    Example:
        >>> Stopping(rtol=1e-6).tolerance(torch.tensor(100.0))
        tensor(1.0000e-04)
    """

    rtol: float | None = 1e-8
    atol: float = 0.0
    max_iter: int = 1000

    def __post_init__(self) -> None:
        check_stopping(type(self).__name__, self.rtol, self.atol, self.max_iter)

    def tolerance(self, scale: Tensor, default_rtol: float = 1e-8) -> Tensor:
        """The absolute tolerance max(rtol * scale, atol), per item of the batch.

        Args:
            scale: the error's reference, per item.
            default_rtol: stands for an rtol of None.

        Returns:
            A tensor of scale's shape.
        """
        return ((default_rtol if self.rtol is None else self.rtol) * scale).clamp_min(self.atol)


def check_stopping(owner: str, rtol: float | None, atol: float, max_iter: int) -> None:
    """Refuse tolerances and limits that no solve can mean."""
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None and not value >= 0:
            raise ValueError(f"{owner}: {name} must be a number >= 0, but got {value}; use e.g. {name}=1e-8.")
    if not isinstance(max_iter, int) or max_iter < 0:
        raise ValueError(f"{owner}: max_iter must be an integer >= 0, but got {max_iter!r}; use e.g. max_iter=100.")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a solver returns: the answer, how it ended, and the error MEASURED at the answer.

    Attributes:
        x: what was asked for, in the structure that the caller gave.
        codes: Status codes, a tensor of the batch's shape (0-d for one problem).
        iterations: steps taken; an int, or a tensor over the batch.
        error: the certified error at x; a float, or a tensor over the batch.
        state: the solver's last state, from which `step` can go on.

    Example:
        >>> r = Result(x=torch.ones(2), codes=torch.tensor(2), iterations=7, error=0.5)
        >>> r.status.name, r.converged
        ('MAX_ITER', False)
        >>> r.unwrap()
        Traceback (most recent call last):
            ...
        nestopt.linalg.result.SolverError: Result: MAX_ITER (error 5.00e-01 after 7 iterations): the iteration ...
    """

    x: Any
    codes: Tensor
    iterations: Any
    error: Any
    state: Any = None

    @property
    def status(self) -> Status | Statuses:
        """How the solve ended: a Status, or Statuses over a batch."""
        return status_of(self.codes)

    @property
    def converged(self) -> Any:
        """Whether the measured error is within the tolerance: a bool, or a boolean tensor over a batch."""
        return scalar_or_tensor(self.codes == Status.CONVERGED.code)

    def unwrap(self) -> Any:
        """The answer x if every item converged.

        Returns:
            `x`.

        Raises:
            SolverError: otherwise, with the statuses, the worst error and the advice.
        """
        failed = self.codes != Status.CONVERGED.code
        if not bool(failed.any()):
            return self.x
        codes = self.codes[failed].flatten().tolist() if self.codes.ndim else [int(self.codes)]
        error = torch.as_tensor(self.error)
        worst = float(error[failed].max() if error.ndim else error)
        iterations = int(torch.as_tensor(self.iterations).max())
        members = [Status.from_code(code) for code in dict.fromkeys(codes)]
        names = ", ".join(
            member.name if self.codes.ndim == 0 else f"{codes.count(member.code)} of {self.codes.numel()} {member.name}"
            for member in members
        )
        advice = "; ".join(member.value for member in members)
        raise SolverError(
            f"{type(self).__name__}: {names} (error {worst:.2e} after {iterations} iterations): {advice}.", self
        )


@runtime_checkable
class LoopState(Protocol):
    """What `iterate` reads of a solver's state: three tensors of the batch's shape."""

    @property
    def codes(self) -> Tensor:
        """Status codes; items that are not RUNNING are frozen by the solver's own step."""

    @property
    def iterations(self) -> Tensor:
        """Steps taken, per item."""

    @property
    def error(self) -> Tensor:
        """The error at the state's point, per item."""


State = TypeVar("State", bound=LoopState)
Callback = Callable[[int, Any], Any]


def iterate(
    step: Callable[[State], State],
    state: State,
    *,
    max_iter: int,
    tolerance: Tensor | None = None,
    callbacks: Iterable[Callback] = (),
    check_every: int = 1,
) -> State:
    """Run `step` until every item has ended: the only loop of the library.

    Counting, the test for NaN, the tolerance, the limit and the callbacks are here, so that no method forgets them.
    An item ends as CONVERGED when error <= tolerance, NON_FINITE when its error is NaN or inf, MAX_ITER at the limit;
    any other ending is the step's own doing, and a frozen item is never counted. A limit is a limit of steps of this
    call: a state that ended at MAX_ITER or STOPPED runs on when it is passed in again.

    Args:
        step: moves, then evaluates; returns the next state (a dataclass with codes, iterations and error), with new
            codes where an item ended, never the old ones changed in place.
        state: the evaluated starting state.
        max_iter: limit of steps in this call.
        tolerance: absolute, per item; None when the step itself says CONVERGED (because it must verify first).
        callbacks: each is called with (iteration, state) after every step and once before the first; a true return
            value ends the run as STOPPED.
        check_every: look for the end every so many steps (each look is a synchronisation on a GPU).

    Returns:
        The last state, with no item RUNNING.

    Example:
        >>> from dataclasses import make_dataclass
        >>> Halving = make_dataclass("Halving", ["codes", "iterations", "error"])
        >>> start = Halving(torch.tensor(0), torch.tensor(0), torch.tensor(1.0))
        >>> end = iterate(lambda s: replace(s, error=s.error / 2), start, max_iter=9, tolerance=torch.tensor(0.1))
        >>> int(end.iterations), Status.from_code(int(end.codes)).name
        (4, 'CONVERGED')
    """
    callbacks = tuple(callbacks)
    resumed = (state.codes == Status.MAX_ITER.code) | (state.codes == Status.STOPPED.code)
    state = evolve(state, codes=torch.where(resumed, Status.RUNNING.code, state.codes))
    state = _judge(state, is_running(state.codes), tolerance)
    stop = _call(callbacks, 0, state)
    codes, looked = None, False
    for k in range(max_iter):
        if state.codes is not codes:  # a step in which nothing ended hands its codes on: nothing new to look at
            codes, running, looked = state.codes, is_running(state.codes), False
        if not looked and k % check_every == 0:
            looked = any_of(running)
            if not looked:
                break
        if stop:
            break
        before = state.iterations  # a step that users may call by themselves counts for itself: never twice
        state = _judge(step(state), running, tolerance)
        state = evolve(state, iterations=before + running)
        stop = _call(callbacks, k + 1, state)
    left = Status.STOPPED.code if stop else Status.MAX_ITER.code
    return evolve(state, codes=torch.where(is_running(state.codes), left, state.codes))


def all_of(mask: Tensor) -> bool:
    """Whether every item is true; reading a 0-d tensor directly takes a tenth of the time of `all`."""
    return bool(mask.all() if mask.ndim else mask)


def any_of(mask: Tensor) -> bool:
    """Whether any item is true."""
    return bool(mask.any() if mask.ndim else mask)


def all_finite(x: Tensor) -> bool:
    """Whether x has no NaN and no infinity: a finite sum proves it at a tenth of the cost of asking every entry."""
    return bool(torch.isfinite(x.detach().sum())) or bool(torch.isfinite(x).all())


def evolve(state: State, **changes: Any) -> State:
    """`dataclasses.replace` for the states of a loop, at a tenth of its cost.

    Args:
        state: an instance of a dataclass.
        changes: new values of some of its fields.

    Returns:
        A copy with these changes.
    """
    kind: Any = type(state)
    values = getattr(state, "__dict__", {})
    if len(values) != len(kind.__dataclass_fields__) or getattr(kind, "__post_init__", None) is not None:
        return replace(state, **changes)  # type: ignore[type-var]  # slots, a cached property, a derived field
    new = object.__new__(kind)
    new.__dict__.update(values, **changes)
    return new  # type: ignore[no-any-return]


def is_running(codes: Tensor) -> Tensor:
    """Which items have not ended."""
    return codes.logical_not()  # RUNNING is code 0, and a comparison with a Python number takes thrice as long


def _judge(state: State, ran: Tensor, tolerance: Tensor | None) -> State:
    """Give an ending to the items that the step left RUNNING and that have reached one."""
    finite = state.error < torch.inf  # false for NaN
    # looking is cheap on the CPU and a synchronisation on a GPU; in the common case there is nothing to do
    if tolerance is None and not finite.is_cuda and all_of(finite):
        return state
    running = ran & is_running(state.codes)
    codes = torch.where(running & ~finite, Status.NON_FINITE.code, state.codes)
    if tolerance is not None:
        codes = torch.where(running & (state.error <= tolerance), Status.CONVERGED.code, codes)
    return evolve(state, codes=codes)


def _call(callbacks: tuple[Callback, ...], iteration: int, state: Any) -> bool:
    return any([bool(callback(iteration, state)) for callback in callbacks])  # every callback is called
