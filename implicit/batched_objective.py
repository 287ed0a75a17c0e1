"""A batch of independent problems: the points where they stand, and their objective, evaluated together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nestopt.linalg.isolation import isolated
from nestopt.linalg.tree import Ravel

from .border import objective_values
from .jacobian import SystemJacobian

__all__ = ["BatchedObjective", "Points", "ravel_batch", "select"]


def select(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """New for the items of a mask, old for the others.

    Args:
        mask: shape (*batch,).
        new: shape (*batch, ...).
        old: likewise.

    Returns:
        A tensor of their shape.
    """
    return torch.where(mask.reshape(mask.shape + (1,) * (old.ndim - mask.ndim)), new, old)


@dataclass(frozen=True)
class Points:
    """f and its gradient at one point an item, cut from every graph.

    Attributes:
        y: shape (*batch, n).
        value: shape (*batch,).
        gradient: shape (*batch, n).
        error: shape (*batch,): |gradient|, or what the method holds against its tolerance.
    """

    y: Tensor
    value: Tensor
    gradient: Tensor
    error: Tensor

    @property
    def flat(self) -> Tensor:
        """A change of f below this may be rounding (eps^(3/4) |f|), and is judged by gradients instead."""
        return self.value.abs() * float(torch.finfo(self.y.dtype).eps ** 0.75)

    def trapezoid(self, other: Points) -> Tensor:
        """f(other) - f(self) by the trapezoidal rule along the slopes: exact to the order |other - self|^3."""
        rise: Tensor = torch.linalg.vecdot(self.gradient + other.gradient, other.y - self.y) / 2
        return rise

    def where(self, mask: Tensor, new: Points) -> Points:
        """The new points for the items of a mask, these for the others."""
        return Points(
            select(mask, new.y, self.y), select(mask, new.value, self.value),
            select(mask, new.gradient, self.gradient), select(mask, new.error, self.error),
        )  # fmt: skip


class BatchedObjective:
    """The user's function of a pytree of whole batches as a function of vectors, counting how often it is called.

    Args:
        owner: the class in whose name errors are raised.
        function: objective(y) -> one value an item, a tensor of shape (*batch,).
        ravel: between an item and its vector.
        batch: leading dimensions of every leaf.
    """

    def __init__(self, owner: str, function: Callable[[Any], Tensor], ravel: Ravel, batch: torch.Size) -> None:
        if not callable(function):
            raise TypeError(f"{owner}: objective must be a function of y, but got {type(function).__name__}.")
        self.owner, self.function, self.ravel, self.batch = owner, function, ravel, batch
        self.evaluations = self.gradients = self.products = 0

    def values(self, y: Tensor) -> Tensor:
        """The values at y of shape (*batch, n), without its gradient."""
        with torch.no_grad():
            return self._evaluate(y)

    def points(self, y: Tensor) -> Points:
        """Values and gradients at y of shape (*batch, n)."""
        leaf = y.detach().requires_grad_()
        with torch.enable_grad():
            value = self._evaluate(leaf)
        gradient = self._gradient(value, leaf)
        self.gradients += 1
        return Points(leaf.detach(), value.detach(), gradient, torch.linalg.vector_norm(gradient, dim=-1))

    def hessian(self, y: Tensor) -> SystemJacobian:
        """The Hessian of every item, of shape (*batch, n, n), along the graph of the gradient."""
        self.gradients += 1
        return SystemJacobian(lambda leaf: self._gradient(self._evaluate(leaf), leaf, True), y, [], [], symmetric=True)

    def _gradient(self, value: Tensor, leaf: Tensor, create_graph: bool = False) -> Tensor:
        if not value.requires_grad:
            return torch.zeros_like(leaf)
        # items are independent: the gradient of the sum is each item's own
        (gradient,) = torch.autograd.grad(
            value, leaf, torch.ones_like(value), create_graph=create_graph, materialize_grads=True
        )
        return gradient

    def _evaluate(self, y: Tensor) -> Tensor:
        self.evaluations += 1
        with isolated():
            value = self.function(self.ravel.unflatten(y))
        return objective_values(self.owner, value, self.batch).reshape(self.batch).to(y.dtype)


def ravel_batch(owner: str, y0: Any, batch_dims: int) -> tuple[Ravel, torch.Size, Tensor]:
    """Split the leaves of y0 into a batch and its items.

    Args:
        owner: the class in whose name errors are raised.
        y0: pytree of tensors.
        batch_dims: leading dimensions, the same in every leaf, that count independent problems.

    Returns:
        The ravel of an item, the batch's shape, and a copy of y0 of shape (*batch, n), without a graph.

    Raises:
        ValueError: if batch_dims is no integer >= 0, or the leaves do not begin with the same dimensions.
    """
    ravel = Ravel.of(y0, "y0")
    item, batch = ravel.items(owner, batch_dims)
    return item, batch, item.join([leaf.detach() for leaf in ravel.leaves(y0)]).clone()
