"""Between the user's pytrees and the vector and tensors that a derivative is attached to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor, nn

from nestopt.linalg.isolation import isolated
from nestopt.linalg.tree import Ravel, leaf_paths, named_tree

__all__ = ["Border", "Equation", "Operands", "objective_values"]


@dataclass(frozen=True)
class Equation:
    """What a public function says about y: its residual, and the words for messages.

    Attributes:
        owner: the public function.
        solution: what y is said to be.
        role: what the user's function is called.
        residual: R from the border, the vector of y, and the tensors of theta.
        is_map: whether the user's function is a map T, and R is y - T(y, theta).
    """

    owner: str
    solution: str
    role: str
    residual: Callable[[Border, Tensor, Sequence[Tensor]], Tensor]
    is_map: bool = False


@dataclass(frozen=True)
class Operands:
    """The tensors of a call: y as one vector an item, and the tensor leaves of theta.

    Attributes:
        y: shape (*batch, n), cut from its graph.
        theta: the tensor leaves of theta, in optree's order.
        arguments: for each, which argument of the call it belongs to.
    """

    y: Tensor
    theta: list[Tensor]
    arguments: list[int]


@dataclass(frozen=True)
class Border:
    """Checks y and theta once, and turns the user's function of pytrees into one of a vector and tensors.

    Attributes:
        equation: of the public function.
        function: the user's.
        ravel: y's structure for one item.
        batch: leading dimensions of every leaf of y.
        treespec: theta's structure.
        leaves: theta's leaves, None where a tensor stands.
    """

    equation: Equation
    function: Callable[..., Any]
    ravel: Ravel
    batch: torch.Size
    treespec: Any
    leaves: tuple[Any, ...]

    @classmethod
    def of(
        cls, equation: Equation, function: Callable[..., Any], y: Any, theta: tuple[Any, ...], batch_dims: int
    ) -> tuple[Border, Operands]:
        """Check the arguments of a call.

        Args:
            equation: of the public function.
            function: the user's.
            y: pytree of floating tensors.
            theta: pytrees; what is not a tensor is a constant.
            batch_dims: leading dimensions of every leaf of y that count independent systems.

        Returns:
            The border and its operands.

        Raises:
            TypeError: for a leaf of y that is not a floating tensor, a module or a complex tensor in theta.
            ValueError: for leaves of y without the same leading dimensions, or dtypes or devices that differ.
        """
        owner, ravel = equation.owner, Ravel.of(y, "y")
        if not callable(function):
            raise TypeError(f"{owner}: {equation.role} must be a function, but got {type(function).__name__}.")
        vector = [leaf.detach() for leaf in ravel.leaves(y)]
        ravel, batch = ravel.items(owner, batch_dims)
        tree: Any = theta
        paths, leaves, treespec = optree.tree_flatten_with_path(tree)
        kept: list[tuple[Tensor, int]] = []
        for (argument, *_), leaf, name in zip(paths, leaves, leaf_paths(theta, "theta"), strict=True):
            if isinstance(leaf, nn.Module):
                raise TypeError(
                    f"{owner}: {name} is the module {type(leaf).__name__}, whose parameters would be constants; pass "
                    "dict(module.named_parameters()) and use torch.func.functional_call in the function, or use a "
                    "RootLayer."
                )
            if isinstance(leaf, Tensor):
                _check_parameter(owner, name, leaf, ravel)
                kept.append((leaf, argument))
        constants = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        y_vector, *tensors = (_normal(tensor) for tensor in (ravel.join(vector), *(leaf for leaf, _ in kept)))
        operands = Operands(y_vector, tensors, [argument for _, argument in kept])
        return cls(equation, function, ravel, batch, treespec, constants), operands

    def residual(self, vector: Tensor, *theta: Tensor) -> Tensor:
        """R, of the vector's shape (*batch, n)."""
        return self.equation.residual(self, vector, theta)

    def call(self, vector: Tensor, theta: Sequence[Tensor]) -> Any:
        """The user's function at the trees that the vector and theta stand for.

        Autocast is off, so that an evaluation gives the same numbers in a backward pass, which runs outside of it.

        Args:
            vector: shape (*batch, n).
            theta: the tensor leaves.

        Returns:
            What the function returns.
        """
        rest = iter(theta)
        leaves = [next(rest) if leaf is None else leaf for leaf in self.leaves]
        arguments = optree.tree_unflatten(self.treespec, leaves)
        with isolated(), torch.autocast(self.ravel.device.type, enabled=False):
            return self.function(self.ravel.unflatten(vector), *arguments)

    def vector(self, value: Any) -> Tensor:
        """What the user's function returned, which must look like y, as a vector of shape (*batch, n).

        Args:
            value: the value.

        Returns:
            The vector.

        Raises:
            TypeError: for a leaf that is not a tensor.
            ValueError: if the structure, a shape, dtype or device is not y's.
        """
        owner, name, tree = self.equation.owner, self.equation.role, named_tree(value)
        leaves, treespec = optree.tree_flatten(tree)
        if treespec != self.ravel.treespec:
            raise ValueError(
                f"{owner}: {name} must return the structure of y, {self.ravel.treespec}, but it returned {treespec}."
            )
        for path, leaf, shape in zip(leaf_paths(tree, f"{name}(y)"), leaves, self.ravel.shapes, strict=True):
            if not isinstance(leaf, Tensor):
                raise TypeError(f"{owner}: {path} must be a torch.Tensor, but it is {type(leaf).__name__}.")
            if leaf.shape != self.batch + shape:
                raise ValueError(
                    f"{owner}: {path} must have the shape of y, {tuple(self.batch + shape)}, but it has "
                    f"{tuple(leaf.shape)}."
                )
            if leaf.dtype != self.ravel.dtype or leaf.device != self.ravel.device:
                raise ValueError(
                    f"{owner}: {path} must be {self.ravel.dtype} on {self.ravel.device} like y, but it is "
                    f"{leaf.dtype} on {leaf.device}."
                )
        return self.ravel.join(leaves)


def objective_values(owner: str, value: Any, batch: torch.Size) -> Tensor:
    """What an objective returned, which must be one value an item.

    Args:
        owner: in whose name errors are raised.
        value: that the objective returned.
        batch: the items' shape.

    Returns:
        The value as it is: of shape (*batch), or of a single item any shape with one entry.

    Raises:
        TypeError: if the value is no floating tensor.
        ValueError: if it is not one value an item.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{owner}: objective must return a floating tensor, but it returned {kind}.")
    if value.shape != batch and (batch or value.numel() != 1):
        wanted = f"one value an item, of shape {tuple(batch)}" if batch else "a scalar"
        raise ValueError(
            f"{owner}: objective must return {wanted}, but it returned a tensor of shape {tuple(value.shape)}; "
            f"{'sum over each item alone' if batch else 'return its mean or sum'}."
        )
    return value


def _normal(tensor: Tensor) -> Tensor:
    """A copy of an inference tensor, which no graph may hold; any other tensor itself."""
    return tensor.clone() if tensor.is_inference() else tensor


def _check_parameter(owner: str, name: str, leaf: Tensor, ravel: Ravel) -> None:
    if leaf.is_complex():
        raise TypeError(f"{owner}: {name} must be real, but it is {leaf.dtype}; pass torch.view_as_real({name}).")
    if leaf.is_floating_point() and (leaf.dtype != ravel.dtype or leaf.device != ravel.device):
        raise ValueError(
            f"{owner}: {name} must be {ravel.dtype} on {ravel.device} like y, but it is {leaf.dtype} on {leaf.device}; "
            f"convert it with .to({ravel.dtype}), through which its gradient flows back."
        )
