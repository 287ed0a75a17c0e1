"""Vector-Jacobian products that can be differentiated again, inside every transform of torch.func and outside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nestopt.linalg.guard import unbatchable

from .transforms import transformed

__all__ = ["pairing", "pull", "restrict"]

Function = Callable[..., tuple[Tensor, ...]]
Product = Callable[..., Sequence[Tensor]]


def pull(function: Function, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
    """The product J' c of a function's Jacobian at `inputs`, differentiable in the inputs, c and all else it uses.

    Args:
        function: takes the inputs, returns a tuple of tensors.
        inputs: floating tensors.
        cotangents: c, one an output.

    Returns:
        One tensor an input; zeros where nothing depends on it.
    """
    return list(_linearize(function, inputs)[1](*cotangents))


def _linearize(function: Function, inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Product]:
    """The outputs, and the function of cotangents that gives J' c."""
    if transformed():
        result: Any = torch.func.vjp(function, *inputs)
        return result[0], lambda *cotangents: result[1](cotangents)
    # outside transforms plain autograd has fewer restrictions (checkpoints, BatchNorm) and costs less
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # an alias is a new node: differentiating with respect to it leaves out the paths by which one input (the
        # solution) depends on another (its parameters)
        aliases = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in inputs]
        outputs = function(*aliases)
    live = [i for i, output in enumerate(outputs) if output.requires_grad]

    def product(*cotangents: Tensor) -> list[Tensor]:
        found: Sequence[Tensor | None] = [None] * len(aliases)
        if live:
            found = torch.autograd.grad(
                [outputs[i] for i in live], aliases, [cotangents[i] for i in live],
                create_graph=create_graph, allow_unused=True,
            )  # fmt: skip
        return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]

    return outputs, product


def restrict(function: Callable[..., Tensor], operands: Sequence[Tensor], wanted: Sequence[int]) -> Function:
    """The function of the wanted operands alone, the others held at their values."""
    return lambda *inputs: (function(*_replaced(operands, wanted, inputs)),)


def _replaced(operands: Sequence[Tensor], wanted: Sequence[int], inputs: Sequence[Tensor]) -> list[Tensor]:
    full = list(operands)
    for position, value in zip(wanted, inputs, strict=True):
        full[position] = value
    return full


def pairing(
    function: Callable[..., Tensor],
    operands: Sequence[Tensor],
    wanted: Sequence[int],
    left: Tensor,
    right: Tensor,
) -> list[Tensor]:
    """The gradient of <left, A right> with respect to the wanted operands, where A = d function / d operands[0].

    Args:
        function: of the operands (y, *theta), y of shape (*systems, n), with a value of y's shape.
        operands: y and theta.
        wanted: positions among the operands.
        left: shape (*sides, *systems, n), held fixed.
        right: likewise.

    Returns:
        One tensor a wanted operand, summed over the sides.
    """
    sides = left.ndim - operands[0].ndim

    def adjoint_image(*inputs: Tensor) -> tuple[Tensor, ...]:  # A' left
        full = _replaced(operands, wanted, inputs)
        outputs, product = _linearize(restrict(function, full, [0]), [full[0]])
        if not sides:
            return tuple(product(left))
        if unbatchable(outputs):
            rows = [product(row)[0] for row in left.flatten(0, sides - 1)]
            return (torch.stack(rows).reshape(left.shape),)
        for _ in range(sides):
            product = torch.func.vmap(product)
        return tuple(product(left))

    return pull(adjoint_image, [operands[i] for i in wanted], [right])
