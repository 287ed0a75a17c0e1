"""The lower level of many tasks: one batched lower solver."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nestopt.implicit import NewtonCG
from nestopt.implicit.minimizer import MinimizeResult
from nestopt.linalg import CG, LinearSolver

from .counts import Counts
from .independence import check_independent
from .lower_kinds import LowerSolution, SmoothLevel
from .per_task import PerTask, Tasks, worst
from .task_problem import TaskFunction, TaskProblem

__all__ = ["TaskLevel"]


class TaskLevel(SmoothLevel):
    """The smooth lower level of a TaskProblem: every task's minimiser by one run of a batched Minimizer."""

    def solve(
        self,
        x: Tensor,
        y: Tensor,
        dual: Tensor | None = None,
        upper_weight: float = 0.0,
        tolerance: float | None = None,
    ) -> LowerSolution:
        """See `LowerLevel.solve`; the status is the gravest of the tasks'."""
        if upper_weight:  # F may couple the tasks
            return super().solve(x, y, dual, upper_weight, tolerance)
        count = self.tasks.batch.numel()
        solved = self.minimise(x, y, None if tolerance is None else tolerance / math.sqrt(count))
        counts = Counts(0, solved.gradients, -(-solved.products // count), 1)
        y = self.spaces.y.flatten(solved.x)
        residual = torch.linalg.vector_norm(torch.as_tensor(solved.error)).to(y)
        return LowerSolution(y, y.new_zeros(0), residual, worst(solved.codes), counts)

    def loosened(self, rtol: float, atol: float) -> SmoothLevel:
        """See `SmoothLevel.loosened`; rtol is relative to each task's slope, atol to all tasks'."""
        return super().loosened(rtol, atol / math.sqrt(self.tasks.batch.numel()))

    def check(self, x: Tensor, y: Tensor) -> None:
        """See `LowerLevel.check`; also refuses functions that couple the tasks."""
        super().check(x, y)
        tasks, lower = self.tasks, self.problem.lower
        assert isinstance(lower, TaskFunction)
        x_tree = self.spaces.x.unflatten(x)

        def each(v: Tensor) -> Tensor:
            return lower.each(*self._arguments("lower", x_tree, tasks.item.unflatten(v)))

        check_independent("TaskProblem", "lower", each, tasks.split(y))

    @property
    def tasks(self) -> Tasks:
        """The layout of y."""
        assert isinstance(self.problem, TaskProblem)
        return Tasks.of(self.spaces.y, self.problem.batch_dims)

    def minimise(self, x: Tensor, y: Tensor, tolerance: float | None) -> MinimizeResult:
        """All tasks' minimisers.

        Args:
            x: raveled upper variable.
            y: raveled start.
            tolerance: of each task, absolute; None for the solver's own.

        Returns:
            The batched result, with one status a task.
        """
        problem, lower = self.problem, self.problem.lower
        assert isinstance(problem, TaskProblem)
        assert isinstance(lower, TaskFunction)
        x_tree = self.spaces.x.unflatten(x)
        minimizer = NewtonCG() if self.solver is None else self.solver

        def each(y_tree: Any) -> Tensor:
            return lower.each(*self._arguments("lower", x_tree, y_tree))

        found: MinimizeResult = minimizer(each, self.spaces.y.unflatten(y), tolerance, batch_dims=problem.batch_dims)
        return found

    def default_linear_solver(self, rtol: float | None = None, atol: float = 0.0) -> LinearSolver:
        """CG for all tasks at once.

        Args:
            rtol: relative tolerance of each task.
            atol: absolute tolerance of each.

        Returns:
            The solver.
        """
        return PerTask(CG(rtol=rtol, atol=atol))
