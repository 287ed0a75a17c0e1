"""Checks of what a set or a proximal operator is given: its point, its step, and its own numbers and tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_weight", "fit", "need_floating", "nonnegative"]


def need_floating(method: str, x: Any) -> None:
    """Refuse what is not a real floating tensor.

    Args:
        method: its name with that of its class.
        x: the argument.

    Raises:
        TypeError: if x is not a floating tensor.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{method}: x must be a real floating tensor, but got {kind}.")


def check_weight(owner: str, name: str, value: float | Tensor, *, positive: bool = False) -> None:
    """Refuse a number that is negative (or zero, where it must be positive) or not finite.

    A tensor may hold anything here: one bad item is to spoil itself alone, so `nonnegative` marks bad entries where the
    tensor is used, without waiting for a GPU.

    Args:
        owner: the class.
        name: of the argument.
        value: number or tensor.
        positive: whether zero is refused too.

    Raises:
        TypeError: if value is neither a number nor a floating tensor.
        ValueError: if it is a number out of range.
    """
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{owner}: {name} must be a number or a floating tensor, but got {value.dtype}.")
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{owner}: {name} must be a number or a floating tensor, but got {type(value).__name__}.")
    if not 0 <= value < math.inf or (positive and value == 0):
        raise ValueError(f"{owner}: {name} must be finite and {'> 0' if positive else '>= 0'}, but got {value}.")


def fit(owner: str, name: str, value: float | Tensor, x: Tensor, shape: torch.Size) -> Tensor:
    """A number or tensor in x's dtype and device that broadcasts to `shape`, or an error that says why it does not.

    Args:
        owner: the class.
        name: of the argument.
        value: number or tensor.
        x: the point whose dtype and device count.
        shape: that the value is to broadcast to without enlarging it.

    Returns:
        The value as a tensor.

    Raises:
        ValueError: if dtype, device or shape does not fit.
    """
    if not isinstance(value, Tensor):
        return x.new_full((), value)
    if value.dtype != x.dtype or value.device != x.device:
        raise ValueError(
            f"{owner}: {name} is {value.dtype} on {value.device}, but x is {x.dtype} on {x.device}; convert one "
            "with .to()."
        )
    if value.ndim > len(shape) or any(a not in (1, b) for a, b in zip(value.shape[::-1], shape[::-1], strict=False)):
        raise ValueError(
            f"{owner}: {name} of shape {tuple(value.shape)} does not broadcast to {tuple(shape)}, as x of shape "
            f"{tuple(x.shape)} needs."
        )
    return value


def nonnegative(value: Tensor, *, positive: bool = False) -> Tensor:
    """The value, NaN where it is negative (or zero, where it must be positive): such an item is spoiled, and alone.

    Args:
        value: tensor.
        positive: whether zero is bad too.

    Returns:
        A tensor of its shape.
    """
    return torch.where(value > 0 if positive else value >= 0, value, torch.nan)
