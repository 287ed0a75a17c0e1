"""solve: the one call that runs any method."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .aid import AID
from .method import BilevelResult, Method, MethodState
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
) -> BilevelResult:
    """Solve min over x in X of F(x, y*(x)), y*(x) = argmin f(x, .), by any method.

    Args:
        problem: the objectives and sets.
        x0: upper start, a pytree of tensors or a module; it is projected onto the upper set.
        y0: lower start, likewise.
        method: None for AID(), which needs a smooth lower level with positive definite f_yy and no tuning.
        data: k -> third argument of both objectives at outer step k, the same for the same k (so that a resumed run
            sees the same); None for objectives of (x, y).
        callbacks: functions of (iteration, state), or Callbacks: ProgressBar, Checkpoint, EarlyStopping.
        state: an earlier result's state, to go on from in place of x0 and y0.

    Returns:
        The BilevelResult: x, y, status, error, residuals, counts and history.

    Raises:
        TypeError: for variables that are not real floating tensors, or objectives that return no scalar.
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
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"solve: problem must be a bilevel.Problem, but got {type(problem).__name__}.")
    method = AID() if method is None else method
    if not isinstance(method, Method):
        raise TypeError(f"solve: method must be a method such as bilevel.AID(), but got {method!r}.")
    return method(problem, x0, y0, data=data, callbacks=callbacks, state=state)
