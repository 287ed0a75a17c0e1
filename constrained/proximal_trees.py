"""Proximal steps of pytrees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor

from nestopt.linalg.tree import leaf_paths, named_tree

from .prox import Indicator, Prox
from .sets import Set

__all__ = ["prox_tree", "value_tree"]


def prox_tree(proxes: Any, tree: Any, step: float | Tensor = 1.0) -> Any:
    """The proximal step of a pytree, tensor by tensor.

    Args:
        proxes: None for g = 0; a Prox, or a Set for its indicator, for every tensor of the tree; or a pytree of the
            tree's structure that holds one of them for each tensor.
        tree: pytree of tensors, or a module for its parameters.
        step: positive number, or tensor that broadcasts to the batch of every tensor.

    Returns:
        The tree after the step (for a module, the dict of its parameters).

    Raises:
        TypeError: if an entry of proxes is none of these.
        ValueError: if proxes has another structure than the tree.

    Example:
        >>> from nestopt.constrained import L1
        >>> prox_tree({"a": L1(1.0), "b": None}, {"a": torch.tensor(3.0), "b": torch.tensor(3.0)})
        {'a': tensor(2.), 'b': tensor(3.)}
    """
    leaves, treespec = _each(proxes, tree, lambda g, leaf: g.prox(leaf, step), lambda leaf: leaf)
    return optree.tree_unflatten(treespec, leaves)


def value_tree(proxes: Any, tree: Any) -> Tensor:
    """The sum of g over all tensors of a pytree, and over the batch of each.

    Args:
        proxes: as for `prox_tree`.
        tree: likewise.

    Returns:
        A 0-d tensor.

    Raises:
        TypeError: see `prox_tree`.
        ValueError: see `prox_tree`; also if the tree has no tensor.

    Example:
        >>> from nestopt.constrained import L1
        >>> value_tree({"a": L1(2.0), "b": None}, {"a": torch.tensor([3.0, -1.0]), "b": torch.tensor(3.0)})
        tensor(8.)
    """
    values, _ = _each(proxes, tree, lambda g, leaf: g.value(leaf).sum(), lambda leaf: leaf.new_zeros(()))
    if not values:
        raise ValueError("value_tree: tree must hold at least one tensor, but it is empty.")
    return torch.stack(values).sum()


def _each(
    proxes: Any, tree: Any, function: Callable[[Prox, Tensor], Tensor], otherwise: Callable[[Tensor], Tensor]
) -> tuple[list[Tensor], Any]:
    """The function of each tensor with its Prox, and the tree's structure."""
    tree = named_tree(tree)
    leaves, treespec = optree.tree_flatten(tree)
    if proxes is None or isinstance(proxes, Prox | Set):
        each = [proxes] * len(leaves)
    else:
        # the tree is flattened again, because None is a leaf here
        each, given = optree.tree_flatten(proxes, none_is_leaf=True)
        expected = optree.tree_structure(tree, none_is_leaf=True)
        if given != expected:
            raise ValueError(f"proxes must have the structure of the variable, {expected}, but it has {given}.")
    results = []
    for path, one, leaf in zip(leaf_paths(tree, "proxes"), each, leaves, strict=True):
        if one is not None and not isinstance(one, Prox | Set):
            raise TypeError(f"{path} must be a Prox, a Set or None, but got {type(one).__name__}; use e.g. L1(0.1).")
        g = Indicator(one) if isinstance(one, Set) else one
        results.append(otherwise(leaf) if g is None else function(g, leaf))
    return results, treespec
