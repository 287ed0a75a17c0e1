"""Normalisation layers written out, because their kernels' higher derivatives are wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["PlainNormalization"]


class PlainNormalization(TorchFunctionMode):
    """Computes batch_norm, instance_norm and layer_norm by elementary operations.

    torch 2.13 differentiates their kernels wrongly, and without a word: batch_norm's third derivative is not symmetric,
    and all three have a wrong second derivative when a function that holds their gradient, with respect to the weight
    too, is vmapped and then differentiated.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _PLAIN.get(func, func)(*args, **(kwargs or {}))


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
    else:
        assert running_mean is not None
        assert running_var is not None
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
    torch.batch_norm: _reordered(_batch_norm),
    torch.instance_norm: _reordered(_instance_norm),
    torch.layer_norm: _layer_norm,
}
