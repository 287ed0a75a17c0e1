"""Implicit differentiation for many independent bilevel problems at once: seeds, restarts, data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import optree
import torch
from torch import Tensor

from nestopt.implicit import Minimizer
from nestopt.implicit.batched_minimizer import BatchedMinimizer, BatchedState
from nestopt.linalg import CG, LinearSolver, Result, Status, Stopping, iterate
from nestopt.linalg.result import Callback, is_running
from nestopt.linalg.tree import Ravel

from .batched_points import HyperObjective, HyperPoints
from .batched_steps import ProjectedSteps, QuasiNewtonSteps
from .counts import Counts
from .independence import check_independent
from .problem import Linearization, Problem, Spaces
from .task_problem import TaskProblem

__all__ = ["BatchedAID", "BatchedAIDResult", "BatchedAIDState"]


@dataclass(frozen=True, kw_only=True)
class BatchedAIDState(BatchedState):
    """Where a batch of bilevel problems stands: `points` are HyperPoints.

    Attributes:
        ravel_y: between an item's y and its vector; `ravel` is that of x.
    """

    ravel_y: Ravel = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class BatchedAIDResult(Result):
    """What BatchedAID found; every figure is a tensor over the batch.

    Attributes:
        x: in the structure of x0.
        y: in the structure of y0.
        error: largest of the residuals, measured at (x, y).
        tolerance: what it was held against.
        value: F(x, y).
        residuals: lower, adjoint and upper, as in AID.
        counts: calls with the whole batch: a gradient, a product or a lower solve is one of all items.
    """

    y: Any
    tolerance: Tensor
    value: Tensor
    residuals: dict[str, Tensor]
    counts: Counts


@dataclass(frozen=True)
class BatchedAID:
    """Approximate implicit differentiation for a batch of independent problems, each with its own steps and ending.

    min over x_k in X of F_k(x_k, y_k*(x_k)) for every item k of the leading dimensions of x and y: seeds, restarts,
    data sets, models of an ensemble. upper(x, y) and lower(x, y) take the whole batches and return one value an item.
    One step moves every running item along its own L-BFGS direction with a weak Wolfe search (with an upper set, along
    a spectral projected gradient with a non-monotone one), each trial a batched lower solve and a batched adjoint
    solve. An item that ends is frozen; NaN in one changes no other, and the path of an item does not depend on its
    neighbours, so that a batch gives what a loop over its items gives. For many lower problems that share ONE x (folds,
    tasks) use `TaskProblem` with AID.

    The lower level is smooth, with a positive definite f_yy. `error` of an item is the largest of |f_y|, |F_y - H v|
    and |P_X(x - g) - x|; CONVERGED means error <= max(rtol (|F_x| + |f_xy v|), atol) with the scale taken at x0.
    NON_FINITE, DIVERGED, SINGULAR and NEGATIVE_CURVATURE name what is wrong at the start of an item; a trial point with
    such a fault is refused, and the step shortened.

    Cost: that of the slowest item, in calls with the whole batch.

    Args:
        batch_dims: leading dimensions of every leaf of x and y that count problems.
        lower_solver: with a batched form: NewtonCG(), LBFGS(), GradientDescent(); None for NewtonCG().
        linear_solver: for the batch of adjoint systems; None for CG(), Cholesky() below a hundred lower variables.
        stopping: rtol None is 1e-9 in float64 and 1e-4 in float32.

    Raises:
        ValueError: if batch_dims < 1.

    Reference:
        Pedregosa 2016; Byrd, Nocedal & Schnabel 1994 for the steps; Birgin, Martinez & Raydan 2000 on a set.

    Example:
        >>> from nestopt import bilevel
        >>> goals = torch.tensor([[1.0], [2.0], [torch.nan]], dtype=torch.float64)  # one an item
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y: ((y - goals) ** 2).sum(-1), lower=lambda x, y: (1.5 * y**2 - x * y).sum(-1)
        ... )
        >>> start = torch.zeros(3, 1, dtype=torch.float64)
        >>> res = bilevel.BatchedAID()(problem, start, start.clone())
        >>> [round(v, 6) for v in res.x[:2, 0].tolist()], [status.name for status in res.status]
        ([3.0, 6.0], ['CONVERGED', 'CONVERGED', 'NON_FINITE'])
    """

    batch_dims: int = 1
    lower_solver: Minimizer | None = None
    linear_solver: LinearSolver | None = None
    stopping: Stopping = Stopping(rtol=None, max_iter=200)

    owner: ClassVar[str] = "BatchedAID"

    def __post_init__(self) -> None:
        if not isinstance(self.batch_dims, int) or self.batch_dims < 1:
            raise ValueError(f"BatchedAID: batch_dims must be an integer >= 1, but got {self.batch_dims!r}.")

    def __call__(
        self,
        problem: Problem,
        x0: Any,
        y0: Any,
        *,
        data: Any = None,
        callbacks: Iterable[Callback] = (),
        state: BatchedAIDState | None = None,
    ) -> BatchedAIDResult:
        """Solve all problems.

        Args:
            problem: whose functions return one value an item; a smooth lower level.
            x0: upper starts; every leaf leads with the batch.
            y0: lower starts, likewise.
            data: third argument of the functions, the same at each step.
            callbacks: called with (iteration, state) after each step.
            state: of an earlier result, to go on from.

        Returns:
            The result, with one status, error, value and number of iterations an item.

        Raises:
            TypeError: for variables that are not real floating tensors, or a problem that is none.
            ValueError: for leaves that do not lead with the same batch, a lower level that is not smooth, unused or
                captured variables, functions that do not return one value an item, or that couple the items.
        """
        if state is None:
            f, s = self._begin(problem, x0, y0, data)
        else:
            s = state
            f = self._evaluator(problem, s.ravel, s.ravel_y, s.batch, data)
        rule = self._rule(problem, s.points.y.dtype)
        left = max(self.stopping.max_iter - int(s.iterations.max()), 0)
        s = iterate(
            lambda t: rule.advance(f, t),  # type: ignore[arg-type, return-value]
            s, max_iter=left, tolerance=s.tolerance, callbacks=callbacks,
        )  # fmt: skip
        return _result(s)

    def init(self, problem: Problem, x0: Any, y0: Any, data: Any = None) -> BatchedAIDState:
        """The evaluated starting points; see `__call__` for the arguments.

        Args:
            problem: see `__call__`.
            x0: see `__call__`.
            y0: see `__call__`.
            data: see `__call__`.

        Returns:
            The state.
        """
        return self._begin(problem, x0, y0, data)[1]

    def step(self, problem: Problem, state: BatchedAIDState, data: Any = None) -> BatchedAIDState:
        """One step of every item that is running.

        Args:
            problem: see `__call__`.
            state: from `init` or `step`.
            data: see `__call__`.

        Returns:
            The next state.
        """
        assert isinstance(state, BatchedAIDState)
        f = self._evaluator(problem, state.ravel, state.ravel_y, state.batch, data)
        new = self._rule(problem, state.points.y.dtype).advance(f, state)  # type: ignore[arg-type]
        assert isinstance(new, BatchedAIDState)
        return replace(new, iterations=new.iterations + is_running(state.codes))

    def _rule(self, problem: Problem, dtype: torch.dtype) -> BatchedMinimizer:
        rtol = self.stopping.rtol
        rtol = (1e-9 if dtype == torch.float64 else 1e-4) if rtol is None else rtol
        atol, limit = self.stopping.atol, self.stopping.max_iter
        if problem.upper_set is None:
            return QuasiNewtonSteps(owner=self.owner, rtol=rtol, atol=atol, max_iter=limit)
        return ProjectedSteps(rtol=rtol, atol=atol, max_iter=limit)

    def _evaluator(self, problem: Problem, x: Ravel, y: Ravel, batch: torch.Size, data: Any) -> HyperObjective:
        linear_solver = CG() if self.linear_solver is None else self.linear_solver
        return HyperObjective(problem, x, y, batch, self.lower_solver, linear_solver, data)

    def _begin(self, problem: Problem, x0: Any, y0: Any, data: Any) -> tuple[HyperObjective, BatchedAIDState]:
        """Check the problem, and evaluate it at the projection of x0."""
        if not isinstance(problem, Problem):
            raise TypeError(f"{self.owner}: problem must be a bilevel.Problem, but got {type(problem).__name__}.")
        if isinstance(problem, TaskProblem):
            raise ValueError(f"{self.owner}: the tasks of a TaskProblem share one x; use bilevel.AID() or solve_tasks.")
        problem.require_smooth_lower_level(self.owner)
        spaces = Spaces.of(x0, y0)
        (x_item, batch), (y_item, other) = (r.items(self.owner, self.batch_dims) for r in (spaces.x, spaces.y))
        if batch != other:
            raise ValueError(
                f"{self.owner}: x and y must lead with the same batch, but x has {tuple(batch)}, y {tuple(other)}."
            )
        f = self._evaluator(problem, x_item, y_item, batch, data)
        x = f.project(x_item.join(spaces.x.leaves(x0)).detach().clone())
        y = y_item.join(spaces.y.leaves(y0)).detach().clone()
        self._check(f, spaces, x, y, data)
        f.start = y
        rule = self._rule(problem, x.dtype)
        s = rule.begin(f, x, None)  # type: ignore[arg-type]
        assert isinstance(s.points, HyperPoints)
        points = f.refined(s.points, s.tolerance)
        codes = torch.where(points.fault == Status.RUNNING.code, s.codes, points.fault)
        fields = {**vars(s), "points": points, "best": points, "codes": codes}
        fields |= {"evaluations": f.evaluations, "gradients": f.gradients, "products": f.products}
        return f, BatchedAIDState(**fields, ravel_y=y_item)

    def _check(self, f: HyperObjective, spaces: Spaces, x: Tensor, y: Tensor, data: Any) -> None:
        """Refuse silent zeros, and items that are coupled."""
        upper, lower = f.function("upper"), f.function("lower")

        def total(function: Any) -> Any:
            return lambda x_tree, y_tree, *_: function(
                f.ravel.join(spaces.x.leaves(x_tree)), f.ravel_y.join(spaces.y.leaves(y_tree))
            ).sum()

        whole = (spaces.x.join(f.ravel.split(x)), spaces.y.join(f.ravel_y.split(y)))
        Linearization(Problem(total(upper), total(lower)), spaces, *whole).check()
        for name, function in (("upper", upper), ("lower", lower)):
            check_independent(self.owner, name, partial(function, x), y)
            check_independent(self.owner, name, partial(_swapped, function, y), x)


def _swapped(function: Callable[[Tensor, Tensor], Tensor], y: Tensor, x: Tensor) -> Tensor:
    return function(x, y)


def _result(s: BatchedAIDState) -> BatchedAIDResult:
    p = s.points
    assert isinstance(p, HyperPoints)
    return BatchedAIDResult(
        x=optree.tree_map(torch.clone, s.ravel.unflatten(p.y)), codes=s.codes,
        y=optree.tree_map(torch.clone, s.ravel_y.unflatten(p.lower)),
        iterations=s.iterations, error=s.error, tolerance=s.tolerance, value=p.objective, state=s,
        residuals={"lower": p.lower_residual, "adjoint": p.linear_residual, "upper": p.upper_residual},
        counts=Counts(s.evaluations, s.gradients, s.products, s.evaluations),
    )  # fmt: skip
