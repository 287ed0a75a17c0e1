"""The adjoint systems of many tasks, solved at once, each with its own steps and its own ending."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nestopt.linalg import CG, LinearOperator, LinearSolver, Solution, Status
from nestopt.linalg.tree import Ravel

from .point_solver import PointSolver
from .task_problem import TaskProblem

__all__ = ["Blocks", "PerTask", "Tasks", "worst"]

_SEVERITY = (
    Status.NON_FINITE, Status.DIVERGED, Status.UNBOUNDED, Status.INFEASIBLE, Status.NEGATIVE_CURVATURE, Status.SINGULAR,
    Status.BREAKDOWN, Status.LINE_SEARCH_FAILED, Status.NOT_STATIONARY, Status.STAGNATED, Status.MAX_ITER,
)  # fmt: skip


def worst(codes: Tensor) -> Status:
    """The status that stands for all tasks.

    Args:
        codes: one a task.

    Returns:
        CONVERGED where all are, else the gravest.
    """
    present = {int(code) for code in codes.flatten()}
    left = [Status.from_code(code) for code in present if code != Status.CONVERGED.code]
    return next((s for s in _SEVERITY if s in left), left[0]) if left else Status.CONVERGED


@dataclass(frozen=True)
class Tasks:
    """Between the raveled y of all tasks and one vector a task.

    Args:
        whole: ravel of y.
        item: ravel of one task's y.
        batch: the batch's shape.
    """

    whole: Ravel
    item: Ravel
    batch: torch.Size

    @classmethod
    def of(cls, whole: Ravel, batch_dims: int) -> Tasks:
        """The tasks of a raveled y.

        Args:
            whole: ravel of y.
            batch_dims: how many dimensions count tasks.

        Returns:
            The Tasks.

        Raises:
            ValueError: if the leaves do not begin with the same dimensions.
        """
        return cls(whole, *whole.items("TaskProblem", batch_dims))

    def split(self, v: Tensor) -> Tensor:
        """(*sides, N) as (*sides, *batch, n)."""
        return self.item.join(self.whole.split(v))

    def join(self, v: Tensor) -> Tensor:
        """(*sides, *batch, n) as (*sides, N)."""
        return self.whole.join(self.item.split(v))


class Blocks(LinearOperator):
    """The diagonal blocks, (*batch, n, n), of an operator that couples no two tasks.

    Args:
        A: shape (N, N).
        tasks: the layout.
    """

    def __init__(self, A: LinearOperator, tasks: Tasks) -> None:
        n = tasks.item.size
        super().__init__((*tasks.batch, n, n), A.dtype, A.device, symmetric=A.symmetric, definite=A.definite)
        self.whole, self.tasks = A, tasks

    def _matvec(self, v: Tensor) -> Tensor:
        return self.tasks.split(self.whole._matvec(self.tasks.join(v)))

    def _rmatvec(self, v: Tensor) -> Tensor:
        return self.tasks.split(self.whole._rmatvec(self.tasks.join(v)))


@dataclass(frozen=True, kw_only=True)
class TaskSolution(Solution):
    """A Solution over all tasks.

    Attributes:
        tasks: the Solution with one status, residual and count a task.
    """

    tasks: Solution

    @property
    def curvature(self) -> tuple[Any, Any] | None:
        """(smallest, largest) Ritz value over the tasks."""
        seen = self.tasks.curvature
        if seen is None:
            return None
        low, high = (torch.as_tensor(value) for value in seen)
        # a task without a step (F_y = 0) has seen nothing
        finite = torch.isfinite(low) & torch.isfinite(high)
        return (float(low[finite].amin()), float(high[finite].amax())) if bool(finite.any()) else None


@dataclass(frozen=True)
class PerTask(PointSolver):
    """Solve H_k v_k = F_{k,y} for all tasks of a TaskProblem at once, by a batched solver.

    Each task has its own step sizes, number of steps and status; a product with all H_k is one backward pass. The
    outcome is the gravest of the tasks', the residual the norm over all of them.

    Cost: counted in backward passes, each with all tasks.

    Args:
        solver: any solver for a batch of systems: CG(), MINRES(), Cholesky(), Neumann(), NystromCG(), ...

    Example:
        >>> PerTask().solver.max_iter
        1000
    """

    solver: LinearSolver = CG()

    def at(self, point: Any) -> LinearSolver:
        """The solver for the tasks of this point.

        Args:
            point: the linearized lower level of a TaskProblem.

        Returns:
            A LinearSolver.

        Raises:
            ValueError: for another problem.
        """
        problem = point.problem
        if not isinstance(problem, TaskProblem) or not point.hessian.symmetric:
            raise ValueError(
                "PerTask: it is for a bilevel.TaskProblem with a smooth lower level, whose tasks are not coupled; use "
                f"linear_solver={self.solver!r} itself."
            )
        return _AllTasks(self.solver, Tasks.of(point.spaces.y, problem.batch_dims))


@dataclass(frozen=True)
class _AllTasks(LinearSolver):
    solver: LinearSolver
    tasks: Tasks

    def _solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None) -> Solution:
        tasks = self.tasks
        found = self.solver(Blocks(A, tasks), tasks.split(b), None if x0 is None else tasks.split(x0))
        count = max(tasks.batch.numel(), 1)
        residual = float(torch.linalg.vector_norm(torch.as_tensor(found.residual_norm)))
        return TaskSolution(
            x=tasks.join(found.x), codes=torch.tensor(worst(found.codes).code), error=residual, residual_norm=residual,
            iterations=int(torch.as_tensor(found.iterations).max()), products=-(-found.products // count),
            tolerance=float(torch.linalg.vector_norm(torch.as_tensor(found.tolerance))), tasks=found,
            direction=None if found.direction is None else tasks.join(found.direction),
        )  # fmt: skip
