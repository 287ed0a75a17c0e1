"""The nonsmooth part of a composite objective over a pytree: a prox, a set or nothing for each tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from nestopt.linalg.tree import Ravel, leaf_paths

from .prox import Indicator, Prox
from .sets import Set

__all__ = ["Terms", "per_item"]


def per_item(values: Tensor, batch_dims: int) -> Tensor:
    """The sum over all dimensions but the batch's."""
    return values.flatten(batch_dims).sum(-1) if values.ndim > batch_dims else values


@dataclass(frozen=True)
class Terms:
    """g(y) = the sum of a term for each leaf of y, with its prox, on vectors of shape (*batch, n).

    Args:
        each: for each leaf, a Prox or None.
        ravel: between an item and its vector.
        batch_dims: how many dimensions the batch has.
    """

    each: tuple[Prox | None, ...]
    ravel: Ravel
    batch_dims: int

    @classmethod
    def of(cls, owner: str, prox: Any, ravel: Ravel, batch_dims: int) -> Terms:
        """One term for each leaf.

        Args:
            owner: the class in whose name errors are raised.
            prox: None; a Prox or Set for every leaf; or a pytree of the variable's structure that holds a Prox, Set or
                None for each.
            ravel: of the variable.
            batch_dims: how many dimensions the batch has.

        Returns:
            The terms.

        Raises:
            TypeError: for an entry that is none of them.
            ValueError: for another structure.
        """
        example = optree.tree_unflatten(ravel.treespec, list(range(len(ravel.shapes))))
        if prox is None or isinstance(prox, (Prox, Set)):
            each: list[Any] = [prox] * len(ravel.shapes)
        else:
            each, given = optree.tree_flatten(prox, none_is_leaf=True)
            expected = optree.tree_structure(example, none_is_leaf=True)
            if given != expected and not (len(each) == 1 and not isinstance(each[0], (Prox, Set))):
                raise ValueError(f"{owner}: prox must have the structure of y, {expected}, but it has {given}.")
        for path, one in zip(leaf_paths(example, "prox"), each, strict=False):
            if one is not None and not isinstance(one, (Prox, Set)):
                raise TypeError(
                    f"{owner}: {path} must be a Prox, a Set or None, but got {type(one).__name__}; use e.g. L1(0.1) or "
                    "Box(0.0, 1.0)."
                )
        return cls(tuple(Indicator(one) if isinstance(one, Set) else one for one in each), ravel, batch_dims)

    def prox(self, v: Tensor, size: Tensor) -> Tensor:
        """The minimiser of g(z) + |z - v|^2 / (2 size) over z.

        Args:
            v: shape (*batch, n).
            size: shape (*batch,).

        Returns:
            Shape (*batch, n).
        """
        return self._map(v, lambda term, leaf, shape: term.prox(leaf, size.reshape(shape)))

    def domain(self, v: Tensor) -> Tensor:
        """The nearest point where g is finite, as far as g is the indicator of sets.

        Args:
            v: shape (*batch, n).

        Returns:
            Shape (*batch, n).
        """
        return self._map(v, lambda term, leaf, shape: term.prox(leaf) if isinstance(term, Indicator) else leaf)

    def value(self, v: Tensor) -> Tensor:
        """The sum of the terms.

        Args:
            v: shape (*batch, n).

        Returns:
            Shape (*batch,).
        """
        total = v.new_zeros(v.shape[:-1])
        for term, leaf in zip(self.each, self.ravel.split(v), strict=True):
            if term is not None:
                value = term._minimum(leaf[..., None] if leaf.ndim == self.batch_dims else leaf)
                total = total + per_item(value, self.batch_dims)
        return total

    def _map(self, v: Tensor, one: Callable[[Any, Tensor, tuple[int, ...]], Tensor]) -> Tensor:
        images = []
        for term, leaf, shape in zip(self.each, self.ravel.split(v), self.ravel.shapes, strict=True):
            if term is None:
                images.append(leaf)
                continue
            extended = leaf[..., None] if not shape else leaf  # an item that is 0-d is a vector of one entry
            dims = getattr(term, "space_dims", 1)
            batch = extended.shape[: self.batch_dims] + (1,) * (extended.ndim - dims - self.batch_dims)
            images.append(one(term, extended, tuple(batch)).reshape(leaf.shape))
        return self.ravel.join(images) if images else torch.zeros_like(v)
