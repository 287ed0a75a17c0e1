"""Pytrees at the border: check them once, ravel them to one vector, and put vectors back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import optree
import torch
from torch import Tensor, nn

__all__ = ["Ravel", "leaf_paths", "named_tree"]


def named_tree(tree: Any) -> Any:
    """The pytree that stands for a user's variable: a module becomes the dict of its named parameters."""
    return dict(tree.named_parameters()) if isinstance(tree, nn.Module) else tree


def leaf_paths(tree: Any, name: str) -> list[str]:
    """A readable path for each leaf, such as `y['layer.weight']`, in optree's order."""
    paths, _, _ = optree.tree_flatten_with_path(tree)
    return [name + "".join(f"[{entry!r}]" for entry in path) for path in paths]


@dataclass(frozen=True)
class Ravel:
    """The map between a pytree of tensors and one vector, made from an example of the tree.

    Leaves follow optree's order (dicts by sorted key). Vectors may carry leading batch dimensions: a vector of shape
    (*batch, n) becomes leaves of shape (*batch, *leaf.shape).

    Args:
        treespec: optree's structure.
        shapes: the leaves' shapes.
        dtype: common dtype of the leaves.
        device: common device of the leaves.
        name: what the argument is called in error messages.

    Example:
        >>> r = Ravel.of({"b": torch.ones(2), "a": torch.zeros(())}, "y")
        >>> r.size, r.flatten({"b": torch.ones(2), "a": torch.zeros(())})
        (3, tensor([0., 1., 1.]))
        >>> r.unflatten(torch.arange(3.0))["b"]
        tensor([1., 2.])
    """

    treespec: Any
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    device: torch.device
    name: str = "x"

    @classmethod
    def of(cls, tree: Any, name: str) -> Ravel:
        """Check that every leaf is a floating tensor, all of one dtype and device, and remember the structure.

        Args:
            tree: pytree of tensors, or a module for its parameters.
            name: what to call it in error messages.

        Returns:
            The map.

        Raises:
            TypeError: for a leaf that is not a real floating tensor.
            ValueError: for an empty tree, or leaves of several dtypes or devices.
        """
        tree = named_tree(tree)
        leaves, treespec = optree.tree_flatten(tree)
        if not leaves:
            raise ValueError(f"{name} must hold at least one tensor, but it is an empty {type(tree).__name__}.")
        paths = leaf_paths(tree, name)
        for path, leaf in zip(paths, leaves, strict=True):
            if not isinstance(leaf, Tensor):
                raise TypeError(
                    f"{path} must be a torch.Tensor, but got {type(leaf).__name__}; use torch.as_tensor(..., "
                    "dtype=torch.float64)."
                )
            if not leaf.is_floating_point():
                raise TypeError(f"{path} must have a real floating dtype, but it is {leaf.dtype}; use {path}.double().")
            for attribute in ("dtype", "device"):
                first, here = getattr(leaves[0], attribute), getattr(leaf, attribute)
                if here != first:
                    raise ValueError(
                        f"all tensors of {name} must share one {attribute}, but {paths[0]} has {first} and {path} has "
                        f"{here}; convert them with .to({first!r})."
                    )
        return cls(treespec, tuple(leaf.shape for leaf in leaves), leaves[0].dtype, leaves[0].device, name)

    def items(self, owner: str, batch_dims: int) -> tuple[Ravel, torch.Size]:
        """The map of one item of a tree whose first dimensions count items.

        Args:
            owner: in whose name errors are raised.
            batch_dims: how many dimensions; they must be the same in every leaf.

        Returns:
            The map, and the batch's shape.

        Raises:
            ValueError: if batch_dims is no integer >= 0, or the leaves do not begin with the same dimensions.
        """
        if not isinstance(batch_dims, int) or batch_dims < 0:
            raise ValueError(f"{owner}: batch_dims must be an integer >= 0, but got {batch_dims!r}.")
        batch = self.shapes[0][:batch_dims]
        for i, shape in enumerate(self.shapes):
            if len(shape) < batch_dims or shape[:batch_dims] != batch:
                path = leaf_paths(optree.tree_unflatten(self.treespec, range(len(self.shapes))), self.name)[i]
                raise ValueError(
                    f"{owner}: with batch_dims={batch_dims} every leaf of {self.name} must begin with the same "
                    f"{batch_dims} dimensions, {tuple(batch)}, but {path} has shape {tuple(shape)}."
                )
        return replace(self, shapes=tuple(shape[batch_dims:] for shape in self.shapes)), batch

    @property
    def size(self) -> int:
        """The dimension n of the raveled space."""
        return sum(shape.numel() for shape in self.shapes)

    def leaves(self, tree: Any) -> list[Tensor]:
        """The tree's leaves, after checking that it has this structure, these shapes, this dtype and device.

        Args:
            tree: pytree like the example.

        Returns:
            The leaves in optree's order.

        Raises:
            ValueError: if the structure, a shape, the dtype or the device differs.
        """
        tree = named_tree(tree)
        leaves, treespec = optree.tree_flatten(tree)
        if treespec != self.treespec:
            raise ValueError(f"{self.name} must have the structure {self.treespec}, but got {treespec}.")
        for path, leaf, shape in zip(leaf_paths(tree, self.name), leaves, self.shapes, strict=True):
            if not isinstance(leaf, Tensor) or leaf.shape != shape:
                raise ValueError(f"{path} must have shape {tuple(shape)}, but got {_describe(leaf)}.")
            if leaf.dtype != self.dtype or leaf.device != self.device:
                raise ValueError(
                    f"{path} must be {self.dtype} on {self.device}, but got {leaf.dtype} on {leaf.device}."
                )
        return leaves

    def flatten(self, tree: Any) -> Tensor:
        """The tree as one vector of shape (n,)."""
        return self.join(self.leaves(tree))

    def join(self, leaves: list[Tensor]) -> Tensor:
        """Leaves of shapes (*batch, *shape) as one vector of shape (*batch, n); nothing is checked."""
        parts = []
        for leaf, shape in zip(leaves, self.shapes, strict=True):
            parts.append(leaf.reshape(*leaf.shape[: leaf.ndim - len(shape)], shape.numel()))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def split(self, vector: Tensor) -> list[Tensor]:
        """The leaves, of shapes (*batch, *shape), of a vector of shape (*batch, n)."""
        batch = vector.shape[:-1]
        if len(self.shapes) == 1:
            return [vector.reshape(batch + self.shapes[0])]
        parts = torch.split(vector, [shape.numel() for shape in self.shapes], dim=-1)
        return [part.reshape(batch + shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def unflatten(self, vector: Tensor) -> Any:
        """A vector of shape (*batch, n) as the tree, leaves of shapes (*batch, *shape)."""
        return optree.tree_unflatten(self.treespec, self.split(vector))

    def build(self, leaves: list[Tensor]) -> Any:
        """The tree with these leaves."""
        return optree.tree_unflatten(self.treespec, leaves)

    def copy(self, tree: Any) -> Any:
        """A copy of the tree, cut from its graph, after the checks of `leaves`."""
        return self.build([leaf.detach().clone() for leaf in self.leaves(tree)])

    def call(self, function: Callable[[Any], Tensor]) -> Callable[[Tensor], Tensor]:
        """The function of a tree as a function of one vector."""
        return lambda vector: function(self.unflatten(vector))


def _describe(leaf: Any) -> str:
    return str(tuple(leaf.shape)) if isinstance(leaf, Tensor) else type(leaf).__name__
