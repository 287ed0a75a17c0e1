"""What the first-order methods for f + g share: the public call, the evaluated problem and the result."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.implicit.batched_minimizer import BatchedMinimizer, BatchedState, result_fields
from nestopt.implicit.batched_objective import BatchedObjective, ravel_batch
from nestopt.linalg import Result
from nestopt.linalg.result import Callback
from nestopt.linalg.tree import Ravel

from .terms import Terms

__all__ = ["Composite", "CompositeResult", "FirstOrder", "step_residual"]


class Composite(BatchedObjective):
    """A smooth objective f, evaluated with its gradient, and the terms of g."""

    def __init__(
        self, owner: str, function: Callable[[Any], Tensor], ravel: Ravel, batch: torch.Size, terms: Terms
    ) -> None:
        super().__init__(owner, function, ravel, batch)
        self.terms = terms


def step_residual(terms: Terms, y: Tensor, gradient: Tensor, size: Tensor) -> Tensor:
    """The norm |y - prox(y - s f_y, s)| / s of the prox-gradient map, which is zero exactly at stationary points.

    The step s f_y is made no shorter than eps^(1/2) |y|: rounding would swallow it, and call any point stationary.

    Args:
        terms: of g.
        y: shape (*batch, n).
        gradient: f_y, likewise.
        size: s, of shape (*batch,).

    Returns:
        Shape (*batch,).
    """
    slow = torch.finfo(y.dtype).eps ** 0.5 * torch.linalg.vector_norm(y, dim=-1)
    least = slow / torch.linalg.vector_norm(gradient, dim=-1)
    size = torch.where(torch.isfinite(least), torch.maximum(size, least), size)
    image = terms.prox(y - size[..., None] * gradient, size)
    residual: Tensor = torch.linalg.vector_norm(y - image, dim=-1) / size
    return residual


@dataclass(frozen=True, kw_only=True)
class CompositeResult(Result):
    """What a first-order method for f + g returns; over a batch, numbers are tensors.

    Attributes:
        x: the minimiser in the structure of y0: new tensors, without a graph.
        error: the certificate that the method documents, measured at x.
        tolerance: what it was held against.
        value: f(x) + g(x).
        evaluations: calls of f, each with the whole batch.
        gradients: gradients of f, likewise.
        products: none are used.
    """

    tolerance: Any
    value: Any
    evaluations: int
    gradients: int
    products: int


@dataclass(frozen=True, kw_only=True)
class FirstOrder(BatchedMinimizer):
    """Minimises f(y) + g(y), f known by its gradient and g by its prox, for every item of a batch.

    Args:
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in the units of the error.
        max_iter: limit of steps.
    """

    max_iter: int = 10000

    patience: ClassVar[int] = 100

    def __call__(
        self,
        objective: Callable[[Any], Tensor],
        y0: Any,
        tolerance: float | None = None,
        *,
        batch_dims: int = 0,
        callbacks: Iterable[Callback] = (),
    ) -> CompositeResult:
        """Minimise from y0.

        Args:
            objective: f: takes a tree like y0 and returns a scalar tensor; with batch_dims, one value an item.
            y0: where to start: a tensor, a pytree of tensors or a module (its parameters), which are only read; or the
                `state` of an earlier result.
            tolerance: absolute tolerance for the error, in place of rtol and atol.
            batch_dims: leading dimensions, the same in every leaf of y0, that count independent problems. An item that
                has ended is frozen, and what becomes of it changes no other.
            callbacks: called with (iteration, state) after each step; a true return value ends the run as STOPPED.

        Returns:
            The result; a failed run is a status, never an exception.

        Raises:
            TypeError: if objective is not callable or returns no floating tensor, or a leaf of y0 is none.
            ValueError: if objective returns no scalar (an item), tolerance is negative, or shapes or dtypes do not fit.
        """
        f, start = self._border(objective, y0, batch_dims)
        s = self.run(f, start, tolerance, callbacks)
        fields = result_fields(s)
        total = s.points.value + f.terms.value(s.points.y)
        fields["value"] = total.item() if total.ndim == 0 else total
        return CompositeResult(**fields)

    def init(
        self, objective: Callable[[Any], Tensor], y0: Any, tolerance: float | None = None, *, batch_dims: int = 0
    ) -> BatchedState:
        """The evaluated state at y0.

        Args:
            objective: see `__call__`.
            y0: see `__call__`.
            tolerance: see `__call__`.
            batch_dims: see `__call__`.

        Returns:
            The state.

        Raises:
            TypeError: see `__call__`.
            ValueError: see `__call__`.
        """
        f, start = self._border(objective, y0, batch_dims)
        return self.begin(f, start, tolerance)

    def step(self, objective: Callable[[Any], Tensor], state: BatchedState) -> BatchedState:
        """One step of every item that is RUNNING.

        Args:
            objective: see `__call__`.
            state: from `init` or `step`; it is not modified.

        Returns:
            The next state.
        """
        return self.advance(self._border(objective, state, 0)[0], state)

    def _border(self, objective: Any, y0: Any, batch_dims: int) -> tuple[Composite, Tensor | BatchedState]:
        owner = type(self).__name__
        if isinstance(y0, BatchedState):
            terms = Terms.of(owner, self._terms(), y0.ravel, len(y0.batch))
            return Composite(owner, objective, y0.ravel, y0.batch, terms), y0
        ravel, batch, start = ravel_batch(owner, y0, batch_dims)
        f = Composite(owner, objective, ravel, batch, Terms.of(owner, self._terms(), ravel, len(batch)))
        with torch.no_grad():
            return f, self._inside(f, start)

    @abstractmethod
    def _terms(self) -> Any:
        """The prox, set, or pytree of them."""

    def _inside(self, f: Composite, y: Tensor) -> Tensor:
        """A starting point where f may be evaluated."""
        return f.terms.domain(y)
