"""Items that are NaN: their values and derivatives are, and nothing of them reaches any other item."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nestopt.implicit.transforms import alive, within_jvp

__all__ = ["shielded", "spoil"]


class _Spoil(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, good: Tensor) -> Tensor:
        return torch.where(good, x, torch.nan)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        (good,) = alive(ctx.saved_tensors)
        return torch.where(good | (v == 0), v, torch.nan), None

    @staticmethod
    def jvp(ctx: Any, x_dot: Tensor, _: Any) -> Tensor:
        with within_jvp(ctx, [x_dot]) as (good,):
            return torch.where(good, x_dot, torch.nan)


def spoil(x: Tensor, good: Tensor) -> Tensor:
    """NaN where an item is not good; its derivative is NaN too, but for a cotangent of zero, which stays zero.

    Args:
        x: values.
        good: boolean, broadcasts to x.

    Returns:
        A tensor of x's shape.
    """
    found: Tensor = _Spoil.apply(x, good.broadcast_to(x.shape))  # type: ignore[no-untyped-call]
    return found


def shielded(function: Callable[[Tensor], Tensor], x: Tensor, broken: Tensor) -> Tensor:
    """function(x), where NaN in x spoils the entries `broken` of the value, and the derivative of no other item.

    The function sees zero in the place of NaN, so that the zero cotangent of an item that is left out is not multiplied
    by NaN on its way to what all items share. Where a spoiled entry is asked for, x's derivative is NaN.

    Args:
        function: keeps x's shape.
        x: any shape.
        broken: boolean, of x's shape.

    Returns:
        A tensor of x's shape.
    """
    return torch.where(broken, spoil(x, ~broken), function(torch.where(x.isnan(), 0, x)))
