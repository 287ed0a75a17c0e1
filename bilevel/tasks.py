"""Solve a problem of many tasks, and say of each task how it ended."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import optree
import torch
from torch import Tensor

from nestopt.implicit.batched_objective import select
from nestopt.implicit.minimizer import MinimizeResult
from nestopt.linalg import CG, Status
from nestopt.linalg.result import Callback, Statuses

from .aid import AID
from .batched_points import is_fatal
from .method import BilevelResult, Method
from .per_task import Blocks
from .problem import Linearization, Spaces
from .task_level import TaskLevel
from .task_problem import TaskFunction, TaskProblem

__all__ = ["TaskReport", "TaskResult", "examine_tasks", "solve_tasks"]


@dataclass(frozen=True)
class TaskReport:
    """How each task's lower level stands at one x.

    Attributes:
        codes: Status codes of the lower solve, or of the adjoint solve where that is what failed; shape (*batch,).
        failed: which tasks have no derivative there: NaN, a run away, a singular or indefinite H_k.
        values: F_k(x, y_k), shape (*batch,); None where `upper` returns a scalar.
        residuals: |f_{k,y}|, shape (*batch,).
        y: the lower solutions, in the structure of y.
    """

    codes: Tensor
    failed: Tensor
    values: Tensor | None
    residuals: Tensor
    y: Any

    @property
    def status(self) -> Statuses:
        """The codes as Status members."""
        return Statuses(self.codes)


@dataclass(frozen=True, kw_only=True)
class TaskResult(BilevelResult):
    """A BilevelResult with what became of each task.

    Attributes:
        y: like y0; NaN in the tasks that are excluded, which have no solution.
        tasks: the report at x; an excluded task keeps the status, the residual and the value that it failed with.
        excluded: which tasks x and value were found without; all False unless drop_failed.
    """

    tasks: TaskReport
    excluded: Tensor


def examine_tasks(
    problem: TaskProblem, x: Any, y: Any, *, method: AID | None = None, data: Any = None, tolerance: float | None = None
) -> TaskReport:
    """Solve every task's lower level and adjoint system at x, and say how each of them went.

    Args:
        problem: the problem; excluded tasks report the solution zero of their stand-in.
        x: upper variable.
        y: lower start.
        method: whose lower solver is used; None for AID().
        data: third argument of the objectives.
        tolerance: of each task's |f_{k,y}|; None for the lower solver's own.

    Returns:
        The TaskReport.
    """
    spaces = Spaces.of(x, y)
    level = TaskLevel(problem, spaces, None if method is None else method.lower_solver, data)
    x_vector = spaces.x.flatten(x).detach()
    found: MinimizeResult = level.minimise(x_vector, spaces.y.flatten(y).detach(), tolerance)
    upper, tasks = problem.upper, level.tasks
    assert isinstance(upper, TaskFunction)
    codes, failed = found.codes, is_fatal(found.codes)
    arguments = level._arguments("upper", spaces.x.unflatten(x_vector), found.x)
    with torch.no_grad():
        values = upper.function(*arguments)
    own = isinstance(values, Tensor) and values.shape == tasks.batch
    if own:
        bad = ~torch.isfinite(values) & ~failed
        codes, failed = torch.where(bad, Status.NON_FINITE.code, codes), failed | bad
    if not bool(failed.all()):  # what has failed must not spoil the others' adjoint systems
        kept = problem.without(failed) if own else problem
        point = Linearization(kept, spaces, x_vector, spaces.y.flatten(found.x), data)
        adjoint = CG()(Blocks(point.hessian, tasks), tasks.split(point.upper_y))
        bad = is_fatal(adjoint.codes) & ~failed
        codes, failed = torch.where(bad, adjoint.codes, codes), failed | bad
    y_found = optree.tree_map(torch.clone, found.x)  # leaves with memory of their own, as the border asks for
    return TaskReport(codes, failed, values.detach() if own else None, torch.as_tensor(found.error), y_found)


def solve_tasks(
    problem: TaskProblem,
    x0: Any,
    y0: Any,
    method: Method | None = None,
    *,
    drop_failed: bool = False,
    data: Any = None,
    callbacks: Iterable[Callback] = (),
) -> TaskResult:
    """Solve a problem of many tasks that share x, with a status for each task.

    Every task's lower level and adjoint system is solved at x0 first. Where some fail, the run ends at once with their
    status, or, with drop_failed, goes on without them: they are out of F, of f and of the error, `excluded` names them,
    and a warning is not needed because nothing is hidden: `tasks.status` says with which status each of them failed. A
    task that fails later, at a trial point, makes that trial fail, and the step is shortened.

    A NaN that task k's functions multiply with x itself reaches the gradient in x even so, as zero times NaN is NaN;
    the run then ends as NON_FINITE, and the task has to be taken out of the functions.

    Cost: that of the method, one batched lower and adjoint solve more at x0, and one at the end.

    Args:
        problem: the problem.
        x0: upper start.
        y0: lower start; its leaves lead with the batch of tasks.
        method: None for AID().
        drop_failed: leave out the tasks that fail at x0.
        data: k -> third argument of the objectives at outer step k, with all tasks' samples.
        callbacks: see `solve`.

    Returns:
        The TaskResult.

    Raises:
        TypeError: if problem is no TaskProblem.
        ValueError: as `solve`.

    Example:
        >>> from nestopt import bilevel
        >>> centres = torch.tensor([[1.0], [torch.nan], [6.0]], dtype=torch.float64)
        >>> problem = bilevel.TaskProblem(
        ...     upper=lambda x, y: ((y - centres) ** 2).sum(-1),
        ...     lower=lambda x, y: ((y - x) ** 2).sum(-1) + ((y - centres) ** 2).sum(-1),
        ... )
        >>> x0, y0 = torch.zeros(1, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
        >>> bilevel.solve_tasks(problem, x0, y0).status.name
        'NON_FINITE'
        >>> res = bilevel.solve_tasks(problem, x0, y0, drop_failed=True)
        >>> res.x, res.status.name, [status.name for status in res.tasks.status]
        (tensor([3.5000], dtype=torch.float64), 'CONVERGED', ['CONVERGED', 'NON_FINITE', 'CONVERGED'])
    """
    if not isinstance(problem, TaskProblem):
        raise TypeError(f"solve_tasks: problem must be a bilevel.TaskProblem, but got {type(problem).__name__}.")
    method = AID() if method is None else method
    own = method if isinstance(method, AID) else None
    first = examine_tasks(problem, x0, y0, method=own, data=None if data is None else data(0))
    excluded = torch.zeros_like(first.failed) if problem.excluded is None else problem.excluded
    if drop_failed and bool(first.failed.any()) and not bool(first.failed.all()):
        problem = problem.without(first.failed)
        excluded = excluded | first.failed
    res = method(problem, x0, y0, data=data, callbacks=callbacks)
    part = None if data is None else data(int(res.iterations))
    last = first
    if bool(torch.isfinite(res.state.x_vector).all() & torch.isfinite(res.state.y_vector).all()):
        tolerance = max(float(res.tolerance), 0.0) / math.sqrt(excluded.numel())
        last = examine_tasks(
            problem, res.x, res.y, method=own, data=part, tolerance=tolerance if math.isfinite(tolerance) else None
        )
    last = _merged(last, first, excluded)
    y = optree.tree_map(lambda leaf: select(excluded, torch.full_like(leaf, torch.nan), leaf), res.y)
    fields = {**vars(res), "y": y}
    return TaskResult(**fields, tasks=last, excluded=excluded)


def _merged(last: TaskReport, first: TaskReport, excluded: Tensor) -> TaskReport:
    """The last report, with the first one's words on the tasks that were excluded."""
    values = last.values
    if values is not None and first.values is not None:
        values = torch.where(excluded, first.values, values)
    return replace(
        last,
        codes=torch.where(excluded, first.codes, last.codes),
        failed=last.failed | (excluded & first.failed),
        residuals=torch.where(excluded, first.residuals, last.residuals),
        values=values,
    )
