"""Which method a problem calls for, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from nestopt.implicit import LBFGS
from nestopt.linalg import Dense, LinearOperator, Status
from nestopt.linalg.lanczos import extreme_eigenvalues

from .aid import AID
from .bamm import BAMM
from .counts import Counts
from .f2sa import F2SA
from .lower_choice import SmoothLevel, lower_level
from .lv_hba import LVHBA
from .meha import MEHA
from .method import Method
from .problem import Linearization, Problem, Spaces
from .soba import SABA, SOBA
from .stochastic import Batches, Draw

__all__ = ["Choice", "choose"]

_LARGE = 100_000  # lower variables beyond which Newton's products cost more than L-BFGS's gradients
_TABLE = 4096  # blocks of samples that SABA keeps a gradient of
_LANCZOS = 60
_FAULTS = (Status.NON_FINITE, Status.DIVERGED, Status.INFEASIBLE)


@dataclass(frozen=True)
class Choice:
    """A method, and what was learnt on the way to it.

    Attributes:
        method: the method.
        reason: why, in one line.
        y0: where its lower variable starts, in the structure of y.
        counts: what looking has cost.
    """

    method: Method
    reason: str
    y0: Any
    counts: Counts = Counts()


def choose(problem: Problem, x0: Any, y0: Any, data: Callable[[int], Any] | None = None) -> Choice:
    """The method that `solve` takes where none is given.

    It looks, in this order, at the data (are two steps' the same? is a minibatch's lower level convex?), at the lower
    level (constraints, set or prox, or smooth), at its size, and at the curvature at the lower solution for x0: where
    that is singular the lower solution is not unique, and a method is taken that selects the one that suits the upper
    level.

    Cost: one lower solve, and up to 60 products (a matrix's singular values where there are constraints or a prox).

    Args:
        problem: the problem.
        x0: upper start.
        y0: lower start.
        data: of the steps, None for functions of (x, y).

    Returns:
        The Choice.

    Raises:
        ValueError: for minibatches of a constrained or non-smooth lower level, which no method here takes.
    """
    first = None if data is None else data(0)
    spaces = Spaces.of(x0, y0)
    if data is not None and not _same(first, data(1)):
        return _stochastic(problem, first, data, spaces, x0, y0)
    sizes = f"{spaces.x.size} upper and {spaces.y.size} lower variables"
    kind, selecting = _kind(problem)
    level = lower_level(problem, spaces, first)
    large = spaces.y.size > _LARGE
    method = AID(lower_solver=LBFGS()) if large and kind == "smooth" else AID()
    if large:
        reason = f"AID: {sizes}; the lower level is {kind} and too large to look at its curvature beforehand."
        return Choice(method, reason, y0)
    x = problem.project(spaces.x.flatten(x0).detach(), spaces)
    y = spaces.y.flatten(y0).detach()
    level.check(x, y)
    # a curvature is not asked for more digits than this
    found = (level.loosened(1e-3, 0.0) if isinstance(level, SmoothLevel) else level).solve(x, y)
    if found.status in _FAULTS:
        reason = f"AID: {sizes}; it reports why the {kind} lower level cannot be solved: {found.status.name}."
        return Choice(method, reason, y0, found.counts)
    point = level.linearize(x, found.y, found.dual)
    low, high, products = _curvature(point.hessian)
    counts = found.counts + Counts(1, 1, products)
    if low <= 1e3 * torch.finfo(y.dtype).eps * high:
        name = type(selecting).__name__
        return Choice(
            selecting,
            f"{name}: {sizes}; the {kind} lower level has no curvature in some direction ({low:.0e} of {high:.0e}), so "
            f"that its solution is not unique; {name} selects the one that is best for the upper level.",
            y0,
            counts,
        )
    reason = f"AID: {sizes}; the {kind} lower level has a unique solution (curvature {low:.1e} to {high:.1e})."
    return Choice(method, reason, spaces.y.unflatten(found.y), counts)


def _kind(problem: Problem) -> tuple[str, Method]:
    """The kind of lower level, and the method that selects among its solutions."""
    if problem.inequality is not None or problem.equality is not None:
        return "constrained", LVHBA()
    if problem.lower_set is not None or problem.lower_prox is not None:
        return "composite", MEHA()
    return "smooth", BAMM()


def _curvature(hessian: LinearOperator) -> tuple[float, float, int]:
    """The smallest eigenvalue (or singular value) and the largest, as far as Lanczos sees them, and the products."""
    if isinstance(hessian, Dense):
        values = torch.linalg.svdvals(hessian.to_dense())
        return float(values[-1]), float(values[0]), hessian.shape[-1]
    if not hessian.symmetric:  # an operator of conditions: too large for its matrix, and the adjoint solve tells
        return 1.0, 1.0, 0
    seen = extreme_eigenvalues(hessian, steps=min(_LANCZOS, hessian.shape[-1]), rtol=0.1)
    return float(seen.lowest), max(abs(float(seen.lowest)), abs(float(seen.highest))), seen.products


def _stochastic(problem: Problem, first: Any, data: Callable[[int], Any], spaces: Spaces, x0: Any, y0: Any) -> Choice:
    kind, _ = _kind(problem)
    if kind != "smooth":
        raise ValueError(
            f"solve: the data change from step to step and the lower level is {kind}, but no method takes minibatches "
            "of such; pass the full data, write the constraint as a penalty, or choose a method yourself."
        )
    x, y = problem.project(spaces.x.flatten(x0).detach(), spaces), spaces.y.flatten(y0).detach()
    point = Linearization(problem, spaces, x, y, first)
    point.check()
    low, high, products = _curvature(point.hessian) if point.finite() else (1.0, 1.0, 0)
    counts = Counts(1, 1, products)
    if low < -1e-2 * high:
        reason = (
            f"F2SA: minibatches of a lower level that is not convex at the start (curvature {low:.1e} to {high:.1e}), "
            "so that no system with its Hessian is solved; the penalty's bias stays, and the error holds it."
        )
        return Choice(F2SA(debias=None), reason, y0, counts)
    if isinstance(data, Batches) and isinstance(first, Draw) and first.lower_block is not None:
        reason = "SABA: minibatches of a finite data set, whose gradients it remembers, so that steps stay long."
        return Choice(SABA(), reason, y0, counts)
    reason = "SOBA: minibatches without keys, so that nothing can be remembered of them; its steps shrink."
    return Choice(SOBA(), reason, y0, counts)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Draw) and isinstance(b, Draw):
        return a.complete and b.complete
    left, left_tree = optree.tree_flatten(a, none_is_leaf=True)
    right, right_tree = optree.tree_flatten(b, none_is_leaf=True)
    return left_tree == right_tree and all(p is q or _equal(p, q) for p, q in zip(left, right, strict=True))


def _equal(p: Any, q: Any) -> bool:
    """Of two tensors, with NaN equal to itself: a NaN in one process's data must not change what that process does."""
    if not (isinstance(p, Tensor) and isinstance(q, Tensor) and p.shape == q.shape and p.dtype == q.dtype):
        return False
    return bool(((p == q) | ((p != p) & (q != q))).all())
