"""solve: the one call that runs any method."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from .choice import choose
from .method import BilevelResult, Method, MethodState, check_run
from .problem import Problem

__all__ = ["solve"]


def solve(
    problem: Problem,
    x0: Any,
    y0: Any,
    method: Method | None = None,
    *,
    data: Callable[[int], Any] | None = None,
    callbacks: Iterable[Callable[[int, Any], Any]] = (),
    state: MethodState | None = None,
    held: Any = None,
    check_every: int | None = None,
) -> BilevelResult:
    """Solve min over x in X of F(x, y*(x)), y*(x) = argmin f(x, .), by any method.

    Args:
        problem: the objectives and sets.
        x0: upper start, a pytree of tensors or a module; it is projected onto the upper set.
        y0: lower start, likewise.
        method: None to have one chosen by the data, the lower level's kind, its size and its curvature at the first
            lower solution; the result's `reason` says which and why. `bilevel.methods()` lists all.
        data: k -> third argument of both objectives at outer step k, the same for the same k (so that a resumed run
            sees the same): `Batches(...)`, `FromLoader(...)`, or any function; None for objectives of (x, y).
        callbacks: functions of (iteration, state), or Callbacks: ProgressBar, Checkpoint, EarlyStopping.
        state: an earlier result's state, to go on from in place of x0 and y0.
        held: data on which the error is measured; None for all samples of `Batches`, and for each step's own data
            where nothing else is at hand.
        check_every: outer steps between two measurements on held data; None for an epoch.

    Returns:
        The BilevelResult: x, y, status, error, residuals, counts, history, the method and, where it was chosen, the
        reason.

    Raises:
        TypeError: for variables that are not real floating tensors, objectives that return no scalar, or data and
            callbacks that cannot be called.
        ValueError: for shared memory, mixed dtypes or devices, an unused upper variable, tensors that require grad
            captured by a closure, or a problem that the method cannot solve.

    Example:
        >>> import torch
        >>> from nestopt import bilevel
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y: ((y - 1) ** 2).sum(), lower=lambda x, y: ((y - x) ** 2).sum() + 0.5 * (y**2).sum()
        ... )
        >>> start = torch.zeros(1, dtype=torch.float64)
        >>> res = bilevel.solve(problem, start, start.clone())
        >>> res.status.name, res.x, res.error <= res.tolerance
        ('CONVERGED', tensor([1.5000], dtype=torch.float64), True)
        >>> print(res.reason[:80])
        AID: 1 upper and 1 lower variables; the smooth lower level has a unique solution
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"solve: problem must be a bilevel.Problem, but got {type(problem).__name__}.")
    check_run("solve", data, callbacks)
    options: dict[str, Any] = {"data": data, "callbacks": callbacks, "state": state}
    options |= {"held": held, "check_every": check_every}
    if method is None:
        choice = choose(problem, x0, y0, data)
        result = choice.method(problem, x0, choice.y0, **options)
        return replace(result, reason=choice.reason, counts=result.counts + choice.counts)
    if not isinstance(method, Method):
        raise TypeError(f"solve: method must be a method such as bilevel.AID(), but got {method!r}.")
    return method(problem, x0, y0, **options)
