"""Normalisations written out, because their kernels' higher derivatives are wrong in torch, and say nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .faults import stem_of
from .guard import UndifferentiableError, graph_nodes

__all__ = ["WRITTEN_OUT", "PlainNormalization", "WrittenOut", "normalizes"]

Value = TypeVar("Value")

WRITTEN_OUT = frozenset(
    {
        "batchnormwithupdate", "cudnnbatchnorm", "miopenbatchnorm", "nativebatchnorm", "nativegroupnorm",
        "nativelayernorm", "weightnorminterface",
    }
)  # fmt: skip


class PlainNormalization(TorchFunctionMode):
    """Computes batch_norm, instance_norm, layer_norm, group_norm and weight_norm by elementary operations.

    What torch 2.13 makes of their kernels, without a word: third derivatives of the first three are wrong, and so are
    second ones when a function that holds their gradient is vmapped and then differentiated; second derivatives of
    weight_norm are wrong, and those of group_norm in batches of cotangents; a bias without a weight has none.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _PLAIN.get(func, func)(*args, **(kwargs or {}))


@dataclass
class WrittenOut:
    """Whether some function needs PlainNormalization, which costs time at every operation, found out from its graph.

    Attributes:
        needed: whether an evaluation has met one of its kernels.
        left: one that PlainNormalization does not reach, as in a scripted module.
    """

    needed: bool = False
    left: str | None = None

    def evaluate(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """The value, whose graph has every derivative: where it holds one of those kernels, it is made anew without.

        Args:
            function: of the arguments, outside of every transform.
            arguments: of it.

        Returns:
            The value.

        Raises:
            UndifferentiableError: for a weight_norm that is left.
        """
        if not self.needed:
            value = function(*arguments)
            if normalizes([value]) is None:
                return value
            self.needed = True
        with PlainNormalization():
            value = function(*arguments)
        self.left = self.left or normalizes([value])
        if self.left is not None and stem_of(self.left) == "weightnorminterface":  # wrong from the second derivative on
            self.check()
        return value

    def guarded(self, function: Callable[..., Value]) -> Callable[..., Value]:
        """The function, with its normalisations written out if they have to be at the time of the call.

        Args:
            function: takes and returns anything.

        Returns:
            The function; it checks.
        """

        def run(*arguments: Any) -> Value:
            self.check()
            with PlainNormalization() if self.needed else nullcontext():
                return function(*arguments)

        return run

    def check(self) -> None:
        """Refuse what is left.

        Raises:
            UndifferentiableError: for a kernel.
        """
        if self.left is not None:
            operation, cure = f"the kernel {self.left}", "call F.layer_norm and the like outside of scripted code"
            message = f"{operation} has wrong derivatives of higher order, or in batches, in PyTorch; {cure}."
            raise UndifferentiableError(message, operation, None, cure)


def normalizes(outputs: Iterable[Tensor]) -> str | None:
    """The first kernel in a graph that PlainNormalization would write out.

    Args:
        outputs: tensors with their graph.

    Returns:
        The name of its node, or None.
    """
    names = (node.name() for node in graph_nodes(outputs))
    return next((name for name in names if stem_of(name) in WRITTEN_OUT), None)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    axes = [d for d in range(input.ndim) if d != 1]
    if training:
        mean, var = input.mean(axes), input.var(axes, correction=0)
        n = input.numel() // input.shape[1]
        if n < 2:
            raise ValueError(
                f"batch_norm in train mode needs more than one value a channel, but got shape {tuple(input.shape)}; "
                "use a larger batch, or eval mode."
            )
        _update(running_mean, mean, momentum)
        _update(running_var, var * (n / (n - 1)), momentum)
    elif running_mean is None or running_var is None:
        raise ValueError("batch_norm in eval mode needs running_mean and running_var, but got None; use train mode.")
    else:
        mean, var = running_mean, running_var
    return _scaled(input, mean, var, weight, bias, eps, [1, -1] + [1] * (input.ndim - 2))


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return _batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    axes = list(range(2, input.ndim))
    mean, var = input.mean(axes), input.var(axes, correction=0)
    n = input[0, 0].numel()
    _update(running_mean, mean.mean(0), momentum)
    _update(running_var, var.mean(0) * (n / max(1, n - 1)), momentum)
    shape = [1, -1] + [1] * (input.ndim - 2)
    normal = _scaled(input, mean, var, None, None, eps, [*mean.shape] + [1] * (input.ndim - 2))
    return _affine(normal, weight, bias, shape)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    axes = list(range(-len(normalized_shape), 0))
    mean, var = input.mean(axes, keepdim=True), input.var(axes, correction=0, keepdim=True)
    return _scaled(input, mean, var, weight, bias, eps, None)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    groups = input.reshape(input.shape[0], num_groups, -1)
    mean, var = groups.mean(-1, keepdim=True), groups.var(-1, correction=0, keepdim=True)
    normal = _scaled(groups, mean, var, None, None, eps, None).reshape(input.shape)
    return _affine(normal, weight, bias, [1, -1] + [1] * (input.ndim - 2))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    axes = [d for d in range(v.ndim) if dim == -1 or d != dim % v.ndim]  # torch says -1 for the whole of v
    norm: Tensor = torch.linalg.vector_norm(v, dim=axes, keepdim=True)
    return v * (g / norm)


def _scaled(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    shape: list[int] | None,
) -> Tensor:
    if shape is not None:
        mean, var = mean.reshape(shape), var.reshape(shape)
    return _affine((input - mean) * torch.rsqrt(var + eps), weight, bias, shape)


def _affine(normal: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list[int] | None) -> Tensor:
    if weight is not None:
        normal = normal * (weight if shape is None else weight.reshape(shape))
    if bias is not None:
        normal = normal + (bias if shape is None else bias.reshape(shape))
    return normal


def _update(running: Tensor | None, value: Tensor, momentum: float) -> None:
    if running is not None:
        running.mul_(1 - momentum).add_(momentum * value.detach())


def _reordered(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The kernels take weight and bias before the running statistics, and one flag more."""

    def kernel(input: Tensor, weight: Any, bias: Any, mean: Any, var: Any, *rest: Any) -> Tensor:
        return function(input, mean, var, weight, bias, *rest[:3])

    return kernel


_PLAIN: dict[Any, Callable[..., Tensor]] = {
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    torch.batch_norm: _reordered(_batch_norm),
    torch.instance_norm: _reordered(_instance_norm),
    torch.layer_norm: _layer_norm,
    torch.group_norm: _group_norm,
    torch._weight_norm: _weight_norm,
}
