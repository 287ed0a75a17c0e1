"""Closed convex sets with projections in closed form."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from nestopt.linalg.tree import leaf_paths, named_tree

__all__ = ["Ball", "Box", "Set", "Simplex", "WholeSpace", "project"]


class Set(ABC):
    """A closed convex set C, known by its projection P(x) = argmin over z in C of |z - x|.

    The space is x's LAST dimension and everything before it is batch. Projections are differentiable in x (and in the
    set's tensors) wherever they are smooth, and NaN stays NaN. A subclass writes `_project`.
    """

    def project(self, x: Tensor) -> Tensor:
        """The nearest point of the set.

        Args:
            x: shape (*batch, n).

        Returns:
            A tensor of x's shape and dtype.

        Raises:
            TypeError: if x is not a floating tensor.
            ValueError: if its shape, dtype or device does not fit the set.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{type(self).__name__}.project: x must be a real floating tensor, but got {kind}.")
        return self._project(x)

    def contains(self, x: Tensor, atol: float | None = None) -> Tensor:
        """Whether |x - P(x)| <= atol, for each item of the batch; NaN is in no set.

        Args:
            x: shape (*batch, n).
            atol: tolerated distance; None for 10 eps max(1, |x|).

        Returns:
            A boolean tensor of shape (*batch,).

        Raises:
            TypeError: see `project`.
            ValueError: see `project`.
        """
        gap = x - self.project(x)
        distance, size = (v.abs() if v.ndim == 0 else torch.linalg.vector_norm(v, dim=-1) for v in (gap, x))
        return distance <= (10 * torch.finfo(x.dtype).eps * size.clamp_min(1.0) if atol is None else atol)

    @abstractmethod
    def _project(self, x: Tensor) -> Tensor:
        """The projection of a floating tensor."""

    def _fit(self, value: float | Tensor, x: Tensor, name: str) -> Tensor:
        """A number or tensor of the set as a tensor that broadcasts to x, or an error that says why it does not."""
        owner = type(self).__name__
        if not isinstance(value, Tensor):
            return x.new_tensor(value)
        if value.dtype != x.dtype or value.device != x.device:
            raise ValueError(
                f"{owner}: {name} is {value.dtype} on {value.device}, but x is {x.dtype} on {x.device}; convert one "
                "with .to()."
            )
        if value.ndim > x.ndim or any(a not in (1, b) for a, b in zip(value.shape[::-1], x.shape[::-1], strict=False)):
            raise ValueError(
                f"{owner}: {name} of shape {tuple(value.shape)} does not broadcast to x of shape {tuple(x.shape)}."
            )
        return value

    def _need_space(self, x: Tensor) -> None:
        if x.ndim == 0:
            raise ValueError(f"{type(self).__name__}: x must have shape (*batch, n), but it is 0-d; use x[None].")


@dataclass(frozen=True)
class WholeSpace(Set):
    """All of the space: the projection is the identity.

    Example:
        >>> WholeSpace().project(torch.ones(2))
        tensor([1., 1.])
    """

    def _project(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True, eq=False)
class Box(Set):
    """{x: low <= x <= high}, elementwise; x may have any shape that the bounds broadcast to, 0-d included.

    Args:
        low: number or tensor; -inf for none.
        high: number or tensor; inf for none.

    Raises:
        ValueError: if low <= high does not hold everywhere (NaN included).

    Example:
        >>> Box(0.0, torch.tensor([1.0, torch.inf])).project(torch.tensor([[2.0, 2.0], [-1.0, 0.5]]))
        tensor([[1.0000, 2.0000],
                [0.0000, 0.5000]])
    """

    low: float | Tensor = -math.inf
    high: float | Tensor = math.inf

    def __post_init__(self) -> None:
        low, high = (
            b if isinstance(b, Tensor) else torch.tensor(b, dtype=torch.float64) for b in (self.low, self.high)
        )
        try:
            valid = bool((low.detach().double() <= high.detach().double()).all())
        except RuntimeError as error:
            raise ValueError(
                f"Box: low and high must broadcast, but they have shapes {tuple(low.shape)} and {tuple(high.shape)}."
            ) from error
        if not valid:
            raise ValueError(
                "Box: low <= high must hold in every entry, and it does not; look for NaN and swapped bounds."
            )

    def _project(self, x: Tensor) -> Tensor:
        return torch.clamp(x, self._fit(self.low, x, "low"), self._fit(self.high, x, "high"))


@dataclass(frozen=True, eq=False)
class Ball(Set):
    """{x: |x - center|_2 <= radius}.

    Args:
        radius: number >= 0.
        center: number, or tensor of shape (n,) or (*batch, n).

    Raises:
        ValueError: if radius is negative or not finite.

    Example:
        >>> Ball(1.0).project(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """

    radius: float = 1.0
    center: float | Tensor = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.radius < math.inf:
            raise ValueError(
                f"Ball: radius must be a finite number >= 0, but got {self.radius}; use WholeSpace() for all."
            )

    def _project(self, x: Tensor) -> Tensor:
        self._need_space(x)
        center = self._fit(self.center, x, "center")
        d = x - center
        largest = d.detach().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        outside = torch.linalg.vector_norm(d / largest, dim=-1, keepdim=True) > self.radius / largest
        # where twice: inside, the norm may be zero, and its derivative must not be asked for
        direction = torch.where(outside, d / largest, 1.0)
        direction = direction / torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
        return torch.where(outside, center + self.radius * direction, x)


@dataclass(frozen=True)
class Simplex(Set):
    """{x: x >= 0, sum x = scale}, in the last dimension.

    P(x) = max(x - theta, 0), theta found exactly from the sorted entries; the largest entry is subtracted first, so
    that entries of 1e9 lose nothing. -inf is allowed and gives 0.

    Args:
        scale: positive number.

    Raises:
        ValueError: if scale is not positive and finite.

    Reference:
        Held, Wolfe & Crowder 1974.

    Example:
        >>> Simplex().project(torch.tensor([0.0, 0.0, -torch.inf]))
        tensor([0.5000, 0.5000, 0.0000])
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"Simplex: scale must be positive and finite, but got {self.scale}.")

    def _project(self, x: Tensor) -> Tensor:
        self._need_space(x)
        x = x - x.detach().amax(-1, keepdim=True)  # the projection does not change along (1, ..., 1)
        with torch.no_grad():
            u = x.sort(dim=-1, descending=True).values
            count = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
            size = (u * count > u.cumsum(-1) - self.scale).sum(-1, keepdim=True)
            support = x >= u.gather(-1, (size - 1).clamp_min(0))
        theta = (torch.where(support, x, 0).sum(-1, keepdim=True) - self.scale) / support.sum(-1, keepdim=True)
        return (x - theta).clamp_min(0)


def project(sets: Any, tree: Any) -> Any:
    """The nearest point to a pytree.

    Args:
        sets: None for the whole space; a Set, which each tensor of the tree is projected onto; or a pytree of the
            tree's structure that holds a Set or None for each tensor.
        tree: pytree of tensors, or a module for its parameters.

    Returns:
        The projected tree (for a module, the dict of its parameters).

    Raises:
        TypeError: if an entry of sets is neither a Set nor None.
        ValueError: if sets has another structure than the tree.

    Example:
        >>> project({"a": Box(0.0, 1.0), "b": None}, {"a": torch.tensor(3.0), "b": torch.tensor(3.0)})
        {'a': tensor(1.), 'b': tensor(3.)}
    """
    tree = named_tree(tree)
    if sets is None:
        return tree
    leaves, treespec = optree.tree_flatten(tree)
    if isinstance(sets, Set):
        each: Sequence[Any] = [sets] * len(leaves)
    else:
        # the tree is flattened again, because None is a leaf here
        each, given = optree.tree_flatten(sets, none_is_leaf=True)
        expected = optree.tree_structure(tree, none_is_leaf=True)
        if given != expected:
            raise ValueError(f"sets must have the structure of the variable, {expected}, but it has {given}.")
    for path, one in zip(leaf_paths(tree, "sets"), each, strict=True):
        if one is not None and not isinstance(one, Set):
            raise TypeError(f"{path} must be a Set or None, but got {type(one).__name__}; use e.g. Box(0.0, 1.0).")
    projected = [leaf if one is None else one.project(leaf) for one, leaf in zip(each, leaves, strict=True)]
    return optree.tree_unflatten(treespec, projected)
