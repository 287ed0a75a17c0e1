"""What every solver of y = T(y) and R(y) = 0 shares: the public calls, the state, the endings and the result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.linalg import Result, Status, iterate
from nestopt.linalg.isolation import isolated
from nestopt.linalg.result import Callback, all_of, any_of, check_stopping, evolve, is_running, scalar_or_tensor
from nestopt.linalg.solver import default_rtol

from .border import Border, Equation
from .transforms import tracked, transformed, untraced

__all__ = [
    "FixedPointResult",
    "FixedPointSolver",
    "FixedPointState",
    "Problem",
    "check_positive",
    "dots",
    "mix",
    "norm",
    "select",
]

_RUNNING = Status.RUNNING.code
_WINDOW = 6  # errors from which the rate is fitted


def norm(v: Tensor) -> Tensor:
    """The Euclidean norm of every item's vector."""
    size: Tensor = torch.linalg.vector_norm(v, dim=-1)
    return size


def select(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """The new vectors for the items of a mask, the old ones for the others; no copy where all are of one kind."""
    if not mask.is_cuda:
        if all_of(mask):
            return new
        if not any_of(mask):
            return old
    return torch.where(mask[..., None], new, old)


def dots(rows: Tensor, v: Tensor) -> Tensor:
    """The inner products of v (*batch, n) with the rows (*batch, m, n)."""
    return (rows @ v[..., None])[..., 0]


def mix(weights: Tensor, rows: Tensor) -> Tensor:
    """The sum of the rows (*batch, m, n) with weights (*batch, m)."""
    return (weights[..., None, :] @ rows)[..., 0, :]


def check_positive(owner: str, name: str, value: float) -> None:
    """Refuse a hyper-parameter that must be a number > 0."""
    if not value > 0:
        raise ValueError(f"{owner}: {name} must be a number > 0, but got {value}.")


def _map_residual(border: Border, vector: Tensor, theta: Sequence[Tensor]) -> Tensor:
    return vector - border.vector(border.call(vector, theta))


def _root_residual(border: Border, vector: Tensor, theta: Sequence[Tensor]) -> Tensor:
    return border.vector(border.call(vector, theta))


class Problem:
    """F(y) = y - T(y), or R(y), as a function of the vectors of all items; it counts what it is asked for.

    Args:
        border: between the vectors and the caller's structure.
        evaluations: values of F so far.
    """

    def __init__(self, border: Border, evaluations: int) -> None:
        self.border, self.evaluations = border, evaluations

    @property
    def is_map(self) -> bool:
        """Whether a fixed point is sought, not a root."""
        return self.border.equation.residual is _map_residual

    def evaluate(self, y: Tensor) -> Tensor:
        """F(y), recorded by nothing."""
        self.evaluations += 1
        border = self.border
        with isolated(), torch.no_grad(), torch.autocast(y.device.type, enabled=False):
            value = border.vector(border.function(border.ravel.unflatten(y))).detach()
        return y - value if self.is_map else value

    def differentiable(self, y: Tensor) -> Tensor:
        """F(y) with its graph."""
        self.evaluations += 1
        return self.border.residual(y)


@dataclass(frozen=True, kw_only=True)
class FixedPointState:
    """Where a solver stands; every tensor is per item, and a step changes only the items that are RUNNING.

    Attributes:
        y: the newest points, of shape (*batch, n).
        residual: F there, y - T(y) or R(y).
        error: |F|.
        tolerance: what it is held against.
        codes: Status codes.
        iterations: steps taken.
        best: the points of smallest error.
        best_residual: F there.
        best_error: |F| there.
        start: |F| at the starting point.
        size: of y0, T(y0) and F(y0), the largest norm.
        recent: logarithms of the last errors, newest last, NaN before the first.
        stale: steps since `best` was found.
        flat: steps since then that were too short to change anything but the rounding.
        evaluations: values of the function so far, of all items at once.
        border: between the vectors and the caller's structure.
    """

    y: Tensor
    residual: Tensor
    error: Tensor
    tolerance: Tensor
    codes: Tensor
    iterations: Tensor
    best: Tensor
    best_residual: Tensor
    best_error: Tensor
    start: Tensor
    size: Tensor
    recent: Tensor
    stale: Tensor
    flat: Tensor
    evaluations: int
    border: Border = field(repr=False)

    @property
    def x(self) -> Any:
        """The newest points in the caller's structure."""
        return self.border.ravel.unflatten(self.y)

    @property
    def rate(self) -> Tensor:
        """The factor by which the error changes in a step, fitted to the last ones; NaN before there are two."""
        seen = ~self.recent.isnan()
        weight = seen.to(self.recent.dtype)
        count = weight.sum(0)
        t = torch.arange(_WINDOW, dtype=weight.dtype, device=weight.device).reshape(-1, *(1,) * self.error.ndim)
        t = (t - (t * weight).sum(0) / count) * weight
        slope = (t * torch.where(seen, self.recent, 0)).sum(0) / t.square().sum(0)
        return torch.where(count > 1, slope.exp(), torch.nan)


@dataclass(frozen=True, kw_only=True)
class FixedPointResult(Result):
    """What a solver of y = T(y) or R(y) = 0 returns; all but `evaluations` is per item.

    Attributes:
        x: the solution in the structure of y0, new tensors without a graph: where an item did not converge, its point
            of smallest error.
        error: |T(x) - x| or |R(x)|, evaluated at x.
        tolerance: what the error was held against.
        rate: the observed rate of contraction: the factor of the error in a step, fitted to the last six; 1 or more
            where the iteration does not contract. NaN where fewer than two points were seen.
        evaluations: calls of the function, each of which is for the whole batch.
    """

    tolerance: Any
    rate: Any
    evaluations: int


@dataclass(frozen=True)
class FixedPointSolver(ABC):
    """Solves y = T(y) or R(y) = 0 over a pytree y, many independent items at once: `solver(function, y0)`.

    A subclass is a frozen dataclass of hyper-parameters and writes `_start` and `_step`. `fixed_point(T, y0)` and
    `root(R, y0)` say which of the two is meant; a call is the one that the method is known for.

    CONVERGED means that the error measured at the point returned, |T(y) - y| or |R(y)|, is at most
    max(rtol * scale, atol), with scale = max(|T(y0)|, |T(y0) - y0|) for a fixed point and |R(y0)| for a root; scale is
    of the start, so that iterates which run away do not loosen the test. An item that has ended stays where it is while
    the others go on, and the path of an item does not depend on the others.
    NOT_CONTRACTING: the errors of a fixed-point iteration run away, or do not fall any more; the result's `rate` says
    how fast (DIVERGED where a root is sought). STAGNATED: steps at the rounding level lower the error no more.

    The result's x goes into `fixed_point(T, x, *theta)` or `root(R, x, *theta)`, which attach its derivative. A solver
    looks at its errors, which vmap does not show: under transforms use it in a layer (`FixedPointLayer`, `RootLayer`,
    `DEQ`), where mapped dimensions become items of its batch.

    Args:
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in the units of the error.
        max_iter: limit of steps.
    """

    rtol: float | None = field(default=None, kw_only=True)
    atol: float = field(default=0.0, kw_only=True)
    max_iter: int = field(default=1000, kw_only=True)

    State: ClassVar[type[FixedPointState]] = FixedPointState
    patience: ClassVar[int] = 5  # flat steps without a smaller error, before STAGNATED
    solves_maps: ClassVar[bool] = True  # whether a call means T, not R

    def __post_init__(self) -> None:
        check_stopping(type(self).__name__, self.rtol, self.atol, self.max_iter)

    @untraced
    def __call__(
        self,
        function: Callable[[Any], Any],
        y0: Any,
        tolerance: float | None = None,
        *,
        batch_dims: int = 0,
        callbacks: Iterable[Callback] = (),
    ) -> FixedPointResult:
        """Solve from y0.

        Args:
            function: T or R, whichever this method is for: takes a tree like y0, returns one of the same structure,
                shapes and dtype. Nothing of it is recorded.
            y0: where to start: a tensor or a pytree of tensors, which are only read.
            tolerance: absolute tolerance for the error, in place of rtol and atol.
            batch_dims: number of leading dimensions, the same in every leaf of y0, that count independent items; the
                function takes and returns all of them.
            callbacks: called with (iteration, state) after each step; a true return value ends the run as STOPPED.

        Returns:
            The result; a failed item is a status, never an exception.

        Raises:
            RuntimeError: under vmap; see the class.
            TypeError: if function is not callable or a leaf is not a real floating tensor.
            ValueError: if function does not return y0's structure, or an argument has no meaning.
        """
        run = self.fixed_point if self.solves_maps else self.root
        return run(function, y0, tolerance, batch_dims=batch_dims, callbacks=callbacks)

    @untraced
    def fixed_point(
        self,
        T: Callable[[Any], Any],
        y0: Any,
        tolerance: float | None = None,
        *,
        batch_dims: int = 0,
        callbacks: Iterable[Callback] = (),
    ) -> FixedPointResult:
        """Solve y = T(y); see `__call__`."""
        return self._run(T, self._init(T, y0, tolerance, batch_dims, True), callbacks)

    @untraced
    def root(
        self,
        R: Callable[[Any], Any],
        y0: Any,
        tolerance: float | None = None,
        *,
        batch_dims: int = 0,
        callbacks: Iterable[Callback] = (),
    ) -> FixedPointResult:
        """Solve R(y) = 0; see `__call__`."""
        return self._run(R, self._init(R, y0, tolerance, batch_dims, False), callbacks)

    def init(
        self, function: Callable[[Any], Any], y0: Any, tolerance: float | None = None, *, batch_dims: int = 0
    ) -> Any:
        """The evaluated state at y0, for the kind of function that a call means.

        Args:
            function: see `__call__`.
            y0: see `__call__`.
            tolerance: see `__call__`.
            batch_dims: see `__call__`.

        Returns:
            The state, of the method's own class.

        Raises:
            RuntimeError: see `__call__`.
            TypeError: see `__call__`.
            ValueError: see `__call__`.
        """
        return self._init(function, y0, tolerance, batch_dims, self.solves_maps)

    def step(self, function: Callable[[Any], Any], state: Any) -> Any:
        """One step of every item that is RUNNING.

        Args:
            function: see `__call__`.
            state: from `init` or `step`; it is not modified.

        Returns:
            The next state.
        """
        s, running = state, is_running(state.codes)
        problem = Problem(replace(s.border, function=function), s.evaluations)
        with torch.no_grad():
            moves = self._step(problem, s, running)
            return self._judge(problem, s, running, **moves)

    @abstractmethod
    def _start(self, problem: Problem, y: Tensor, residual: Tensor) -> dict[str, Any]:
        """The fields that the method's state adds to FixedPointState."""

    @abstractmethod
    def _step(self, problem: Problem, s: Any, running: Tensor) -> dict[str, Any]:
        """y, residual and `length` (how far the step tried to go) after it, new codes, and the method's own fields.

        What it says of items that are not running is not used, but for the method's own fields.
        """

    def _init(
        self, function: Callable[[Any], Any], y0: Any, tolerance: float | None, batch_dims: int, is_map: bool
    ) -> Any:
        name = type(self).__name__
        if not isinstance(batch_dims, int) or batch_dims < 0:
            raise ValueError(f"{name}: batch_dims must be an integer >= 0, but got {batch_dims!r}.")
        if tolerance is not None and not tolerance >= 0:
            raise ValueError(f"{name}: tolerance must be a number >= 0 or None, but got {tolerance}.")
        words = ("a fixed point", "T", _map_residual) if is_map else ("a root", "R", _root_residual)
        border, operands = Border.of(Equation(name, *words), function, y0, (), batch_dims)
        problem = Problem(border, 0)
        with torch.no_grad():
            y = operands.y.detach().clone()
            F = problem.evaluate(y)
            if transformed() and (tracked(F) or tracked(y)):
                self._refuse_transforms()
            error = norm(F)
            size = torch.maximum(torch.maximum(norm(y), norm(y - F)), error)
            limit = torch.full_like(error, tolerance or 0.0)
            if tolerance is None:
                rtol = default_rtol(y.dtype) if self.rtol is None else self.rtol
                limit = (rtol * (torch.maximum(norm(y - F), error) if is_map else error)).clamp_min(self.atol)
            codes = torch.where(error <= limit, Status.CONVERGED.code, _RUNNING)
            codes = torch.where(torch.isfinite(error), codes, Status.NON_FINITE.code)
            count = torch.zeros_like(codes)
            recent = error.new_full((_WINDOW, *error.shape), torch.nan)
            recent[-1] = _log(error)
            memory = self._start(problem, y, F)
        return self.State(
            y=y, residual=F, error=error, tolerance=limit, codes=codes, iterations=count, best=y, best_residual=F,
            best_error=error, start=error, size=size, recent=recent, stale=count, flat=count,
            evaluations=problem.evaluations, border=border, **memory,
        )  # fmt: skip

    def _judge(
        self, problem: Problem, s: Any, running: Tensor, y: Tensor, residual: Tensor, length: Tensor,
        codes: Tensor | None = None, **memory: Any,
    ) -> Any:  # fmt: skip
        """The state after a step: nothing moves that has ended, and every item that has reached an ending gets one."""
        error, is_map, eps = norm(residual), problem.is_map, torch.finfo(y.dtype).eps
        finite = torch.isfinite(error)
        keep = running & finite
        y, F = select(keep, y, s.y), select(keep, residual, s.residual)
        moved = keep & (y != s.y).any(-1)
        recent = torch.where(moved, torch.cat([s.recent[1:], _log(error)[None]]), s.recent)
        # values that overflow after errors that grew: the iterates ran away
        away = running & torch.isposinf(error) & (s.error > s.start)
        error = torch.where(keep, error, s.error)
        better = keep & (error < s.best_error)
        well = keep & (error < 0.9 * s.best_error)
        flat = ~well & (length <= 100 * eps * norm(y))
        flat = torch.where(running, torch.where(well, 0, s.flat + flat), s.flat)

        ending = s.codes if codes is None else torch.where(running, codes, s.codes)
        ending = torch.where(running & ~finite & (ending == _RUNNING), Status.NON_FINITE.code, ending)
        ending = torch.where(keep & (ending == _RUNNING) & (flat >= self.patience), Status.STAGNATED.code, ending)
        # relative to 1/eps^2, so that leaving an unstable fixed point for a stable one is not taken for running away
        away = away | (keep & (error > eps**-2 * s.start))
        ending = torch.where(away, self._runaway(is_map), ending)
        within = keep & (error <= s.tolerance)
        ending = torch.where(within, Status.CONVERGED.code, ending)
        if is_map:  # T(y) - y means nothing where y has grown until rounding swallows what T adds to it
            ending = torch.where(within & (eps * norm(y) > s.size), self._runaway(is_map), ending)
        return evolve(
            s, y=y, residual=F, error=error, codes=ending, iterations=s.iterations + running,
            best=select(better, y, s.best), best_error=torch.where(better, error, s.best_error),
            best_residual=select(better, F, s.best_residual), recent=recent, flat=flat,
            stale=torch.where(running, torch.where(better, 0, s.stale + 1), s.stale),
            evaluations=problem.evaluations, **memory,
        )  # fmt: skip

    def _refuse_transforms(self) -> None:
        raise RuntimeError(
            f"{type(self).__name__}: under a transform of torch.func it does not see the numbers that it decides by; "
            "use batch_dims for many items, or a layer (FixedPointLayer, RootLayer, DEQ), which takes mapped ones "
            "as items."
        )

    def _runaway(self, is_map: bool) -> int:
        return (Status.NOT_CONTRACTING if is_map else Status.DIVERGED).code

    def _run(self, function: Callable[[Any], Any], start: Any, callbacks: Iterable[Callback]) -> FixedPointResult:
        s = iterate(lambda state: self.step(function, state), start, max_iter=self.max_iter, callbacks=callbacks)
        is_map, rate, codes = Problem(s.border, 0).is_map, s.rate, s.codes
        seen = s.iterations >= 2 * _WINDOW
        wandering = seen & ((2 * s.stale >= s.iterations) | (s.error > 10 * s.best_error))
        lost = (codes == Status.MAX_ITER.code) & (wandering | ((rate > 1) & (s.error > s.start)))
        if is_map and any_of(lost):
            codes = torch.where(lost, Status.NOT_CONTRACTING.code, codes)
        done = codes == Status.CONVERGED.code
        x = torch.where(done[..., None], s.y, s.best)
        error = torch.where(done, s.error, s.best_error)
        s = evolve(s, codes=codes)
        return FixedPointResult(
            x=s.border.ravel.unflatten(x.clone()), codes=codes, iterations=scalar_or_tensor(s.iterations),
            error=scalar_or_tensor(error), state=s, tolerance=scalar_or_tensor(s.tolerance),
            rate=scalar_or_tensor(rate), evaluations=s.evaluations,
        )  # fmt: skip


def _log(error: Tensor) -> Tensor:
    return error.clamp_min(torch.finfo(error.dtype).tiny).log()
