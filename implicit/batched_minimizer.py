"""What minimisers of a batch share: the call, the state, the endings of an item, and the search along a direction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.linalg import Status, iterate
from nestopt.linalg.cg import default_rtol
from nestopt.linalg.result import Callback, any_of, check_stopping, is_running, scalar_or_tensor
from nestopt.linalg.tree import Ravel

from .batched_objective import BatchedObjective, Points, ravel_batch, select
from .minimizer import ARMIJO, MinimizeResult

__all__ = ["BatchedKernel", "BatchedMinimizer", "BatchedState", "Memory", "result_fields", "search", "stuck_codes"]

Memory = dict[str, Tensor]  # a method's own tensors, of shapes (*batch, ...)


@dataclass(frozen=True, kw_only=True)
class BatchedState:
    """Where the minimisers of a batch stand.

    Attributes:
        points: the newest point of each item; where an item has STAGNATED, its best one.
        best: the point of smallest error.
        stale: steps since `best` was found that changed f by rounding only.
        scale: what rtol is relative to.
        tolerance: what the error is held against.
        codes: Status codes.
        iterations: steps taken.
        memory: the method's own tensors.
        evaluations: calls of the objective so far, each with the whole batch.
        gradients: gradients so far, likewise.
        products: products with the Hessian of an item so far.
        ravel: between an item's vector and its tree.
        batch: shape of the batch.
    """

    points: Points
    best: Points
    stale: Tensor
    scale: Tensor
    tolerance: Tensor
    codes: Tensor
    iterations: Tensor
    memory: Memory = field(repr=False)
    evaluations: int = 0
    gradients: int = 0
    products: int = 0
    ravel: Ravel = field(repr=False)
    batch: torch.Size

    @property
    def error(self) -> Tensor:
        """The error at the newest point, per item."""
        return self.points.error

    @property
    def x(self) -> Any:
        """The newest points in the caller's structure."""
        return self.ravel.unflatten(self.points.y)


@dataclass(frozen=True, kw_only=True)
class BatchedMinimizer(ABC):
    """Minimises each item of a batch; one that has ended is frozen, and no item's path depends on another's.

    A single problem is the batch of shape (). A subclass writes `_start` and `_step`, and `_measure` where its error is
    not |grad|.

    Args:
        rtol: relative tolerance; None for the dtype's.
        atol: absolute tolerance.
        max_iter: limit of steps.
    """

    rtol: float | None = None
    atol: float = 0.0
    max_iter: int = 1000

    patience: ClassVar[int] = 30  # flat steps without a smaller error, before STAGNATED

    def __post_init__(self) -> None:
        check_stopping(type(self).__name__, self.rtol, self.atol, self.max_iter)

    def run(
        self, f: BatchedObjective, start: Tensor | BatchedState, tolerance: float | None, callbacks: Iterable[Callback]
    ) -> BatchedState:
        """The last state of a run.

        Args:
            f: the objective.
            start: points of shape (*batch, n), or the state of an earlier run.
            tolerance: absolute, in place of rtol and atol.
            callbacks: see `iterate`.

        Returns:
            The state.
        """
        s = self.begin(f, start, tolerance)
        return iterate(
            lambda state: self.advance(f, state),
            s,
            max_iter=self.max_iter,
            tolerance=s.tolerance,
            callbacks=callbacks,
        )

    def begin(self, f: BatchedObjective, start: Tensor | BatchedState, tolerance: float | None) -> BatchedState:
        """The evaluated state.

        Args:
            f: the objective.
            start: points of shape (*batch, n), or the state of an earlier run, perhaps of a changed objective.
            tolerance: absolute, in place of rtol and atol.

        Returns:
            The state.

        Raises:
            ValueError: for a negative tolerance.
        """
        if tolerance is not None and not tolerance >= 0:
            raise ValueError(f"{f.owner}: tolerance must be a number >= 0 or None, but got {tolerance}.")
        before = f.evaluations, f.gradients, f.products
        previous = start if isinstance(start, BatchedState) else None
        points = f.points(start.points.y if isinstance(start, BatchedState) else start)
        memory = self._start(f, points, previous)
        size = points.error
        points = replace(points, error=self._measure(f, points, memory))
        scale = self._scale(points, size)
        rtol = default_rtol(points.y.dtype) if self.rtol is None else self.rtol
        limit = (rtol * scale).clamp_min(self.atol) if tolerance is None else torch.full_like(scale, tolerance)
        finite = torch.isfinite(points.value) & torch.isfinite(points.error) & torch.isfinite(size)
        zero = torch.zeros_like(scale, dtype=torch.int64)
        return BatchedState(
            points=points, best=points, stale=zero, scale=scale, tolerance=limit, iterations=zero, memory=memory,
            codes=torch.where(finite, Status.RUNNING.code, Status.NON_FINITE.code), ravel=f.ravel, batch=f.batch,
            evaluations=f.evaluations - before[0], gradients=f.gradients - before[1], products=f.products - before[2],
        )  # fmt: skip

    def advance(self, f: BatchedObjective, s: BatchedState) -> BatchedState:
        """One step of the items that are RUNNING and not stationary.

        Args:
            f: the objective.
            s: the state; it is not modified.

        Returns:
            The next state.
        """
        running = is_running(s.codes) & (s.error > 0)  # a stationary point has no direction to leave by
        before = f.evaluations, f.gradients, f.products
        points, memory, codes = self._step(f, s, running)
        moved = running & is_running(codes)
        memory = {name: select(moved, value, s.memory[name]) for name, value in memory.items()}
        size = torch.linalg.vector_norm(points.gradient, dim=-1)
        points = replace(points, error=self._measure(f, points, memory))
        s = replace(
            s, memory=memory, codes=torch.where(running, codes, s.codes),
            evaluations=s.evaluations + f.evaluations - before[0], gradients=s.gradients + f.gradients - before[1],
            products=s.products + f.products - before[2],
        )  # fmt: skip
        return self._judge(s, points, size, moved)

    def _judge(self, s: BatchedState, b: Points, size: Tensor, moved: Tensor) -> BatchedState:
        """Take the new points, and end the items that ran away, met a NaN, or stand at the rounding level."""
        a, eps = s.points, torch.finfo(b.y.dtype).eps
        good = torch.isfinite(b.value) & torch.isfinite(b.error) & torch.isfinite(size)
        downhill = (b.value == -torch.inf) | ((b.value < a.value) & torch.isinf(size))
        lost = torch.where(downhill, Status.DIVERGED.code, Status.NON_FINITE.code)
        codes = torch.where(moved & ~good, lost, s.codes)
        moved = moved & good  # else the last finite point is kept
        points = a.where(moved, b)
        length = points.y.abs().sum(-1)
        codes = torch.where(moved & (length > eps**-2), Status.DIVERGED.code, codes)
        flat = ((b.value - a.value).abs() <= b.flat) | ((b.y - a.y).abs().sum(-1) <= 10 * eps * length)
        renewed = moved & (~flat | (b.error < 0.9 * s.best.error))
        best = s.best.where(renewed, b)
        stale = torch.where(renewed, 0, s.stale + moved)
        tired = moved & (stale >= self.patience) & is_running(codes)
        codes = torch.where(tired & ~(points.error <= s.tolerance), Status.STAGNATED.code, codes)
        return replace(s, points=points.where(tired, best), best=best, stale=stale, codes=codes)

    @abstractmethod
    def _start(self, f: Any, points: Points, previous: BatchedState | None) -> Memory:
        """The method's own tensors at the starting points."""

    @abstractmethod
    def _step(self, f: Any, s: BatchedState, running: Tensor) -> tuple[Points, Memory, Tensor]:
        """New points and memory (of the items that are running; others are not read), and codes of those that ended."""

    def _measure(self, f: Any, points: Points, memory: Memory) -> Tensor:
        """The error that is held against the tolerance."""
        size: Tensor = torch.linalg.vector_norm(points.gradient, dim=-1)
        return size

    def _scale(self, points: Points, size: Tensor) -> Tensor:
        """What rtol is relative to, from the starting points and |grad| there."""
        return points.error


@dataclass(frozen=True, kw_only=True)
class BatchedKernel(BatchedMinimizer):
    """The batched form of a Minimizer, which keeps the public call; its own loop is of floats and branches.

    One problem runs faster on floats, and keeps torch's line search and the states that warm starts rely on; a batch
    needs masks in their place.

    Args:
        owner: the Minimizer's name, for messages.
    """

    owner: str

    def minimize(
        self, objective: Any, y0: Any, tolerance: float | None, batch_dims: int, callbacks: Iterable[Callback]
    ) -> MinimizeResult:
        """`Minimizer.__call__` for a batch."""
        f, start = self._border(objective, y0, batch_dims)
        return MinimizeResult(**result_fields(self.run(f, start, tolerance, callbacks)))

    def init(self, objective: Any, y0: Any, tolerance: float | None, batch_dims: int) -> BatchedState:
        """`Minimizer.init` for a batch."""
        f, start = self._border(objective, y0, batch_dims)
        return self.begin(f, start, tolerance)

    def step(self, objective: Any, state: BatchedState) -> BatchedState:
        """`Minimizer.step` for a batch."""
        return self.advance(self._border(objective, state, 0)[0], state)

    def _border(self, objective: Any, y0: Any, batch_dims: int) -> tuple[BatchedObjective, Tensor | BatchedState]:
        if isinstance(y0, BatchedState):
            return BatchedObjective(self.owner, objective, y0.ravel, y0.batch), y0
        ravel, batch, start = ravel_batch(self.owner, y0, batch_dims)
        return BatchedObjective(self.owner, objective, ravel, batch), start


def result_fields(s: BatchedState) -> dict[str, Any]:
    """What a Result says of the last state."""
    return {
        "x": s.ravel.unflatten(s.points.y.clone()), "codes": s.codes, "iterations": scalar_or_tensor(s.iterations),
        "error": scalar_or_tensor(s.error), "state": s, "tolerance": scalar_or_tensor(s.tolerance),
        "value": scalar_or_tensor(s.points.value), "evaluations": s.evaluations, "gradients": s.gradients,
        "products": s.products,
    }  # fmt: skip


def search(
    f: BatchedObjective,
    start: Points,
    d: Tensor,
    slope: Tensor,
    running: Tensor,
    *,
    reference: Tensor | None = None,
    curvature: float | None = None,
    target: Tensor | None = None,
) -> tuple[Points, Tensor, Tensor]:
    """For each item, the first t in 1, ... with f(y + t d) <= reference + 1e-4 t slope.

    Where rounding hides the change of f and of what the slope promises, it is computed from the slopes at both ends
    (approximate Wolfe). With `curvature` = c the slope at y + t d must also have risen to c slope (weak Wolfe): t is
    doubled, then bisected.

    Args:
        f: the objective.
        start: y.
        d: directions.
        slope: of f along d, negative.
        running: which items.
        reference: what f is compared with; None for f(y).
        curvature: between 1e-4 and 1; None for backtracking alone.
        target: y + d, without its rounding.

    Returns:
        The points (those of `start` where none was found), t, and where one was found.

    Reference:
        Lewis & Overton 2013, algorithm 2.6; Hager & Zhang 2005 for the rounding level.
    """
    base = start.value if reference is None else reference
    t, low = torch.ones_like(slope), torch.zeros_like(slope)
    high = torch.full_like(slope, torch.inf)
    hidden = -slope <= 10 * start.flat
    taken, found, pending, at = start, torch.zeros_like(running), running, t
    for _ in range(40):
        if not any_of(pending):
            break
        y = start.y + t[..., None] * d
        y = y if target is None else select(t == 1, target, y)
        trial = f.points(select(pending, y, start.y))
        rise = trial.value - start.value
        allowed = ARMIJO * t * slope
        lower = trial.value - base <= allowed
        lower = lower | (hidden & (rise.abs() <= start.flat) & (start.trapezoid(trial) <= allowed))
        if reference is not None:
            lower = lower | (hidden & (trial.value - base <= start.flat))
        lower = pending & lower & (trial.value < torch.inf)
        taken, at, found = taken.where(lower, trial), torch.where(lower, t, at), found | lower
        enough = lower
        if curvature is not None:
            enough = lower & ~(torch.linalg.vecdot(trial.gradient, d) < curvature * slope)
        low, high = torch.where(lower, t, low), torch.where(pending & ~lower, t, high)
        pending = pending & ~enough
        bend = rise - slope * t
        parabola = torch.where(bend > 0, -0.5 * slope * t * t / bend, 0.5 * t)
        parabola = torch.where(torch.isfinite(parabola), parabola.clamp(0.1 * t, 0.5 * t), 0.1 * t)
        parabola = torch.where(torch.isfinite(rise), parabola, 0.1 * t)
        inner = torch.where(low > 0, 0.5 * (low + high), parabola)
        t = torch.where(pending, torch.where(torch.isinf(high), 2 * t, inner), t)
    return taken, at, found


def stuck_codes(start: Points, d: Tensor, slope: Tensor) -> Tensor:
    """Why no step along d was taken: STAGNATED when rounding hides the decrease, else LINE_SEARCH_FAILED.

    Args:
        start: where the search started.
        d: its direction.
        slope: along it.

    Returns:
        Status codes.
    """
    length, size = torch.linalg.vector_norm(d, dim=-1), torch.linalg.vector_norm(start.y, dim=-1)
    rounding = (-slope <= start.flat) | (length <= 10 * torch.finfo(d.dtype).eps * size)
    return torch.where(rounding, Status.STAGNATED.code, Status.LINE_SEARCH_FAILED.code)
