"""Optimizers as pure functions of parameters, gradients and a state, differentiable in all of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from nestopt.linalg.tree import leaf_paths

__all__ = ["DifferentiableOptimizer", "check_hyper", "is_zero", "spread", "zeros_like"]


class DifferentiableOptimizer(ABC):
    """One step of training as a function: (parameters, gradients, state) -> (parameters, state).

    Nothing is changed in place, and everything is differentiable to any order, forward and reverse: in the parameters,
    in the gradients, and in every hyper-parameter that is a tensor. A hyper-parameter is a number, a tensor that
    broadcasts to every parameter, or a pytree of the parameters' structure with one of them at each leaf, so that each
    tensor, or each of its elements, may have its own. A parameter whose gradient is None (the loss does not depend on
    it) is left as it is, with its state, as torch.optim does.

    A subclass is a frozen dataclass of hyper-parameters; its state is a dataclass of pytrees.
    """

    @abstractmethod
    def init(self, parameters: Any) -> Any:
        """The state before the first step.

        Args:
            parameters: pytree of tensors.

        Returns:
            The state.
        """

    def step(self, parameters: Any, gradients: Any, state: Any) -> tuple[Any, Any]:
        """One step.

        Args:
            parameters: pytree of tensors.
            gradients: of their structure; None where the loss does not depend on a parameter.
            state: of `init` or of the last step.

        Returns:
            The new parameters, and the new state.

        Raises:
            ValueError: if the gradients or a hyper-parameter do not fit the parameters.
        """
        leaves, treespec = optree.tree_flatten(parameters)
        owner = type(self).__name__
        found = spread(gradients, parameters, f"{owner}: gradients", optional=True)
        for path, p, g in zip(leaf_paths(parameters, "gradients"), leaves, found, strict=True):
            if g is not None and g.shape != p.shape:
                raise ValueError(f"{owner}: {path} must have shape {tuple(p.shape)}, but it has {tuple(g.shape)}.")
        new, state = self._step(leaves, found, state, parameters)
        for path, p, q in zip(leaf_paths(parameters, "parameters"), leaves, new, strict=True):
            if q.shape != p.shape or q.dtype != p.dtype:
                raise ValueError(
                    f"{owner}: {path}, {p.dtype} of shape {tuple(p.shape)}, became {q.dtype} of shape "
                    f"{tuple(q.shape)}: a hyper-parameter must broadcast to it and have its dtype; give each parameter "
                    "its own in a pytree."
                )
        return optree.tree_unflatten(treespec, new), state

    @abstractmethod
    def _step(
        self, leaves: list[Tensor], gradients: Sequence[Tensor | None], state: Any, parameters: Any
    ) -> tuple[list[Tensor], Any]:
        """`step` on leaves, after its checks; `parameters` is the tree, for `spread`."""


def spread(value: Any, parameters: Any, name: str, *, optional: bool = False) -> list[Any]:
    """A hyper-parameter, or a part of the state, for each leaf of the parameters.

    Args:
        value: a number or tensor for every leaf, or a pytree of the parameters' structure.
        parameters: pytree of tensors.
        name: for messages.
        optional: whether None may stand for a leaf, and nothing for all of them.

    Returns:
        One entry a leaf.

    Raises:
        ValueError: if the structure is another.
    """
    treespec = optree.tree_structure(parameters)
    if not optional and isinstance(value, Tensor | int | float):
        return [value] * treespec.num_leaves
    try:
        return list(treespec.flatten_up_to(value))
    except ValueError as error:
        kinds = "a pytree" if optional else "a number, a tensor, or a pytree"
        raise ValueError(
            f"{name} must be {kinds} of the parameters' structure {treespec}, but got {type(value).__name__}: {error}"
        ) from None


def check_hyper(owner: str, name: str, value: Any, low: float = 0.0, high: float = math.inf) -> None:
    """Refuse numbers outside [low, high), alone or in a tree; the values of tensors are their maker's business.

    Args:
        owner: the optimizer's class.
        name: of the hyper-parameter.
        value: number, tensor, or pytree of these.
        low: least number.
        high: bound that is not reached.

    Raises:
        TypeError: for a leaf that is neither number nor floating tensor.
        ValueError: for a number out of range.
    """
    for path, leaf in zip(leaf_paths(value, name), optree.tree_leaves(value), strict=True):
        if isinstance(leaf, Tensor):
            if not leaf.is_floating_point():
                raise TypeError(f"{owner}: {path} must be a floating tensor, but it is {leaf.dtype}; use .double().")
        elif not isinstance(leaf, int | float):
            raise TypeError(f"{owner}: {path} must be a number or a tensor, but got {type(leaf).__name__}.")
        elif not low <= leaf < high:
            raise ValueError(f"{owner}: {path} must lie in [{low}, {high}), but got {leaf}.")


def is_zero(value: Any) -> bool:
    """Whether a hyper-parameter is the number 0, so that its term is left out; a tensor is never read."""
    return not isinstance(value, Tensor) and value == 0


def zeros_like(parameters: Any) -> Any:
    """A tree of zeros, cut from the parameters' graph."""
    return optree.tree_map(lambda p: torch.zeros_like(p, requires_grad=False), parameters)
