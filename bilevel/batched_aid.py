"""Implicit differentiation for many independent bilevel problems at once: seeds, restarts, data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, ClassVar

import optree
import torch
from torch import Tensor

from nestopt.implicit import Minimizer
from nestopt.implicit.batched_minimizer import BatchedMinimizer, BatchedState
from nestopt.linalg import CG, LinearSolver, Status, Stopping, iterate
from nestopt.linalg.result import is_running
from nestopt.linalg.tree import Ravel

from .assumptions import Assumptions
from .batched_points import HyperObjective, HyperPoints
from .batched_run import BatchHistory, WholeBatch, watched
from .batched_steps import ProjectedSteps, QuasiNewtonSteps
from .callbacks import Callback, Run
from .counts import Counts
from .independence import check_independent
from .method import BilevelResult, Method, check_run
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

    @property
    def y(self) -> Any:
        """The lower variables in the caller's structure."""
        return self.ravel_y.unflatten(self._points.lower)

    @property
    def value(self) -> Tensor:
        """F_k(x_k, y_k)."""
        return self._points.objective

    @property
    def residuals(self) -> dict[str, Tensor]:
        """The named parts of the error, per item."""
        p = self._points
        return {"lower": p.lower_residual, "adjoint": p.linear_residual, "upper": p.upper_residual}

    @property
    def counts(self) -> Counts:
        """Calls with the whole batch so far."""
        return Counts(self.evaluations, self.gradients, self.products, self.evaluations)

    @property
    def _points(self) -> HyperPoints:
        assert isinstance(self.points, HyperPoints)
        return self.points

    def to_dict(self) -> dict[str, Any]:
        """Everything but the structures as nested dicts of tensors and numbers, for torch.save."""
        saved = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("ravel", "ravel_y")}
        points = {name: dict(vars(saved[name])) for name in ("points", "best")}
        return {**saved, **points, "batch": list(self.batch)}

    @classmethod
    def from_dict(cls, saved: dict[str, Any], x: Ravel, y: Ravel) -> BatchedAIDState:
        """The state that `to_dict` saved.

        Args:
            saved: the nested dicts.
            x: between an item's x and its vector.
            y: likewise for y.

        Returns:
            The state, equal to the last bit.
        """
        points = {name: HyperPoints(**saved[name]) for name in ("points", "best")}
        return cls(**{**saved, **points, "batch": torch.Size(saved["batch"])}, ravel=x, ravel_y=y)


@dataclass(frozen=True, kw_only=True)
class BatchedAIDResult(BilevelResult):
    """What BatchedAID found; every figure is a tensor over the batch.

    Attributes:
        x: in the structure of x0.
        y: in the structure of y0.
        error: largest of the residuals, measured at (x, y).
        tolerance: what it was held against.
        value: F(x, y).
        residuals: lower, adjoint and upper, as in AID.
        counts: calls with the whole batch: a gradient, a product or a lower solve is one of all items.
        history: one record a step of the batch: value, error and residuals are lists over the items, flattened.
    """

    tolerance: Any
    value: Any
    residuals: dict[str, Any]


@dataclass(frozen=True)
class BatchedAID(Method):
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

    It runs as any method does: by `bilevel.solve`, with callbacks and `Checkpoint`, resumed to the last bit. Callbacks
    such as ProgressBar see the batch as one run: the largest error, the mean value, the gravest status. Held data are
    refused.

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
        >>> res = bilevel.solve(problem, start, start.clone(), bilevel.BatchedAID())
        >>> [round(v, 6) for v in res.x[:2, 0].tolist()], [status.name for status in res.status]
        ([3.0, 6.0], ['CONVERGED', 'CONVERGED', 'NON_FINITE'])
    """

    batch_dims: int = 1
    lower_solver: Minimizer | None = None
    linear_solver: LinearSolver | None = None
    stopping: Stopping = Stopping(rtol=None, max_iter=200)

    owner: ClassVar[str] = "BatchedAID"
    State: ClassVar[Any] = BatchedAIDState
    parts: ClassVar[dict[str, type]] = {"points": HyperPoints, "best": HyperPoints}
    assumptions: ClassVar[Assumptions] = Assumptions("implicit", "Pedregosa 2016", products=True, batched=True)

    def __post_init__(self) -> None:
        if not isinstance(self.batch_dims, int) or self.batch_dims < 1:
            raise ValueError(f"BatchedAID: batch_dims must be an integer >= 1, but got {self.batch_dims!r}.")

    def __call__(
        self,
        problem: Problem,
        x0: Any,
        y0: Any,
        *,
        data: Callable[[int], Any] | None = None,
        callbacks: Iterable[Callable[[int, Any], Any]] = (),
        state: Any = None,
        held: Any = None,
        check_every: int | None = None,
    ) -> BatchedAIDResult:
        """Solve all problems.

        Args:
            problem: whose functions return one value an item; a smooth lower level.
            x0: upper starts; every leaf leads with the batch.
            y0: lower starts, likewise.
            data: k -> third argument of the functions at step k, with all items' samples.
            callbacks: called with (iteration, state) after each step.
            state: of an earlier result, to go on from.
            held: refused: the error is measured with each step's own data.
            check_every: refused likewise.

        Returns:
            The result, with one status, error, value and number of iterations an item.

        Raises:
            TypeError: for variables that are not real floating tensors, or a problem that is none.
            ValueError: for leaves that do not lead with the same batch, a lower level that is not smooth, unused or
                captured variables, functions that do not return one value an item, or that couple the items.
        """
        check_run(self.owner, data, callbacks)
        if held is not None or check_every is not None:
            raise ValueError(
                f"{self.owner}: held and check_every are for stochastic methods, but every step of {self.owner} "
                "measures each item's error with its own data; leave them out."
            )
        history = BatchHistory()
        callbacks = (history, *callbacks)
        run = Run(self, problem, x0, y0, history)
        for callback in callbacks:
            if isinstance(callback, Callback):
                restored = callback.start(run)
                state = restored if restored is not None else state
        s: BatchedAIDState
        if state is None:
            s = self.init(problem, x0, y0, None if data is None else data(0))
        else:
            s = state.state if isinstance(state, WholeBatch) else state

        def step(t: BatchedAIDState) -> BatchedAIDState:
            k = int(t.iterations.max()) + 1
            return self._advance(problem, t, None if data is None else data(k))

        left = max(self.stopping.max_iter - int(s.iterations.max()), 0)
        s = iterate(step, s, max_iter=left, tolerance=s.tolerance, callbacks=watched(callbacks))
        for callback in callbacks:
            if isinstance(callback, Callback):
                callback.finish(WholeBatch(s))
        return BatchedAIDResult(
            x=optree.tree_map(torch.clone, s.x), y=optree.tree_map(torch.clone, s.y), codes=s.codes,
            iterations=s.iterations, error=s.error, tolerance=s.tolerance, value=s.value, residuals=s.residuals,
            counts=s.counts, history=history.records, method=self, state=s,
        )  # fmt: skip

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
        return self._begin(problem, x0, y0, data)

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
        return replace(self._advance(problem, state, data), iterations=state.iterations + is_running(state.codes))

    def _advance(self, problem: Problem, s: BatchedAIDState, data: Any) -> BatchedAIDState:
        """One step, which `iterate` counts."""
        f = self._evaluator(problem, s.ravel, s.ravel_y, s.batch, data)
        new = self._rule(problem, s.points.y.dtype).advance(f, s)  # type: ignore[arg-type]
        assert isinstance(new, BatchedAIDState)
        return new

    def restore(self, saved: dict[str, Any], x0: Any, y0: Any) -> Any:
        """See `Method.restore`; the batch in the file has to be that of x0 and y0.

        Args:
            saved: see `Method.restore`.
            x0: see `Method.restore`.
            y0: see `Method.restore`.

        Returns:
            The state, as callbacks see it.

        Raises:
            ValueError: for another batch.
        """
        spaces = Spaces.of(x0, y0)
        (x_item, batch), (y_item, _) = (r.items(self.owner, self.batch_dims) for r in (spaces.x, spaces.y))
        if list(batch) != list(saved["batch"]):
            raise ValueError(
                f"{self.owner}: the saved run has a batch of {tuple(saved['batch'])}, but x0 leads with {tuple(batch)}."
            )
        return WholeBatch(BatchedAIDState.from_dict(saved, x_item, y_item))

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

    def _begin(self, problem: Problem, x0: Any, y0: Any, data: Any) -> BatchedAIDState:
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
        parts = {**vars(s), "points": points, "best": points, "codes": codes}
        parts |= {"evaluations": f.evaluations, "gradients": f.gradients, "products": f.products}
        return BatchedAIDState(**parts, ravel_y=y_item)

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
