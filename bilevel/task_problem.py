"""Many lower problems that share the upper variable: folds, tasks of a meta-batch, scenarios."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import optree
import torch
from torch import Tensor

from nestopt.implicit.batched_objective import select

from .problem import Problem

__all__ = ["TaskFunction", "TaskProblem"]


@dataclass(frozen=True)
class TaskFunction:
    """One value a task as the scalar that every method takes: the sum over tasks, or the mean.

    An excluded task's value is left out; in the sum it is replaced by |y_k|^2 / 2, so that its y_k ends at zero and is
    coupled to nothing. NaN in the values of an excluded task does not reach the gradient in y.

    Args:
        function: (x, y) or (x, y, data) -> values of shape (*batch,).
        name: what it is called in messages.
        batch_dims: how many dimensions count tasks.
        excluded: which tasks are left out, None for none.
        mean: for the mean in place of the sum; the function may then return its own scalar.
    """

    function: Callable[..., Tensor]
    name: str
    batch_dims: int
    excluded: Tensor | None
    mean: bool

    def __call__(self, x: Any, y: Any, *data: Any) -> Tensor:
        """The scalar."""
        if not self.mean:
            return self.each(x, y, *data).sum()
        values = self._values(x, y, *data)
        if isinstance(values, Tensor) and values.ndim == 0 and self.excluded is None:
            return values
        self._check(values, y)
        if self.excluded is None:
            return values.mean()
        return torch.where(self.excluded, 0, values).sum() / (~self.excluded).sum()

    def each(self, x: Any, y: Any, *data: Any) -> Tensor:
        """The values of all tasks, |y_k|^2 / 2 for excluded ones."""
        values = self._values(x, y, *data)
        self._check(values, y)
        if self.excluded is None:
            return values
        squares = [(leaf**2).flatten(self.batch_dims).sum(-1) for leaf in _parts(y, self.batch_dims)]
        return torch.where(self.excluded, torch.stack(squares).sum(0) / 2, values)

    def _values(self, x: Any, y: Any, *data: Any) -> Tensor:
        if self.excluded is not None:  # a cut at the input too: zero times NaN is NaN
            mask = self.excluded
            y = optree.tree_map(lambda leaf: select(mask, leaf.detach(), leaf), y)
        return self.function(x, y, *data)

    def _check(self, values: Any, y: Any) -> None:
        batch = optree.tree_leaves(y)[0].shape[: self.batch_dims]
        if not isinstance(values, Tensor) or values.shape != batch:
            got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            scalar = " (or, as long as no task is excluded, a scalar)" if self.mean else ""
            raise ValueError(
                f"TaskProblem: {self.name} must return one value a task, a tensor of shape {tuple(batch)}{scalar}, but "
                f"got {got}; reduce over the last dimensions only."
            )


@dataclass(frozen=True)
class TaskProblem(Problem):
    """min over x in X of the mean over k of F_k(x, y_k*(x)), y_k*(x) = argmin f_k(x, .): many tasks, one x.

    The leaves of y lead with the batch of tasks, (*batch, ...); `lower` and `upper` take x and the whole y, and return
    one value a task, in which y_k appears in the k-th value alone. Folds of a cross-validation, tasks of a meta-batch
    and scenarios are such problems. To any method it is a Problem with f the sum of f_k and F the mean of F_k, so that
    all of them solve it; `AID` and `HOAG` run one batched lower solver and one batched adjoint solve with all tasks'
    systems at once, each task with its own steps, and a block-diagonal product costs one backward pass.

    A task that fails (NaN in its data, an objective without a minimum) ends the run with that status;
    `solve_tasks(..., drop_failed=True)` leaves it out and says so, and every result of `solve_tasks` names each task's
    own status. `problem.without(mask)` leaves tasks out by hand.

    Args:
        batch_dims: how many leading dimensions of y's leaves count tasks.
        excluded: which tasks are left out, a boolean tensor of the batch's shape; None for none.

    Raises:
        TypeError: if upper or lower is not callable.
        ValueError: if batch_dims < 1, or every task is excluded.

    Example:
        >>> from nestopt import bilevel
        >>> centres = torch.tensor([[1.0], [2.0], [6.0]], dtype=torch.float64)  # one a task
        >>> problem = bilevel.TaskProblem(
        ...     upper=lambda x, y: ((y - centres) ** 2).sum(-1),
        ...     lower=lambda x, y: ((y - x) ** 2).sum(-1) + ((y - centres) ** 2).sum(-1),
        ... )
        >>> x0, y0 = torch.zeros(1, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
        >>> res = bilevel.solve(problem, x0, y0)
        >>> res.status.name, res.x
        ('CONVERGED', tensor([3.0000], dtype=torch.float64))
    """

    batch_dims: int = 1
    excluded: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.batch_dims, int) or self.batch_dims < 1:
            raise ValueError(f"TaskProblem: batch_dims must be an integer >= 1, but got {self.batch_dims!r}.")
        if self.excluded is not None and (self.excluded.dtype != torch.bool or bool(self.excluded.all())):
            raise ValueError("TaskProblem: excluded must be a boolean tensor that leaves at least one task.")
        for name in ("upper", "lower"):
            given = getattr(self, name)
            function = given.function if isinstance(given, TaskFunction) else given
            wrapped = TaskFunction(function, name, self.batch_dims, self.excluded, name == "upper")
            object.__setattr__(self, name, wrapped)

    def without(self, mask: Tensor) -> TaskProblem:
        """The problem without some tasks.

        Args:
            mask: which tasks to leave out, besides those that already are; boolean, of the batch's shape.

        Returns:
            A TaskProblem for the same variables.

        Raises:
            ValueError: if no task is left.
        """
        return replace(self, excluded=mask if self.excluded is None else mask | self.excluded)

    def with_lower(self, lower: Callable[..., Tensor]) -> Problem:
        """See `Problem.with_lower`; a scalar has no structure of tasks left."""
        return Problem(
            self.upper, lower, self.upper_set, self.lower_set, self.inequality, self.equality, self.lower_prox
        )


def _parts(y: Any, batch_dims: int) -> list[Tensor]:
    """The leaves with at least one dimension beyond the batch."""
    return [leaf[..., None] if leaf.ndim == batch_dims else leaf for leaf in optree.tree_leaves(y)]
