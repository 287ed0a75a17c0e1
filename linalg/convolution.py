"""Convolutions whose second derivatives cost what they must: torch computes more, and by slower kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

__all__ = ["FastConvolutions"]

_CONVOLUTIONS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}


@dataclass(frozen=True)
class _Geometry:
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        zero = [0] * len(self.stride)
        out: Tensor = torch.ops.aten.convolution(
            x, weight, bias, self.stride, self.padding, self.dilation, False, zero, self.groups
        )
        return out

    def pull(self, g: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> tuple[Tensor | None, ...]:
        """Cotangents of x, weight and bias, those of the mask."""
        zero = [0] * len(self.stride)
        out: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
            g, x, weight, weight.shape[:1], self.stride, self.padding, self.dilation, False, zero, self.groups, mask
        )
        return out


class _Convolution(Function):
    """x * w + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return geometry.apply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled():
            return *_Pullback.apply(g, x, weight, ctx.geometry, mask), None  # type: ignore[no-untyped-call]
        return *ctx.geometry.pull(g, x, weight, mask), None


class _Pullback(Function):
    """The backward pass of a convolution: bilinear in g and (x, w), which gives its own derivatives.

    torch's own also computes what nobody asked for (the cotangent of the first layer's data), and transposed
    convolutions by its slowest kernel.
    """

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry, mask: list[bool]
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, weight)
        ctx.geometry = geometry
        return geometry.pull(g, x, weight, mask)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, w: Tensor | None, b: Tensor | None) -> Any:
        """Cotangents of g, x, weight from those (u, w, b) of the pulled x, weight, bias."""
        g, x, weight = ctx.saved_tensors
        geometry: _Geometry = ctx.geometry
        of_g = of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            parts = [] if u is None else [geometry.apply(u, weight, None)]
            if w is not None:
                parts.append(geometry.apply(x, w, b))
            elif b is not None:
                parts.append(b.reshape(-1, *[1] * len(geometry.stride)).expand_as(g))
            of_g = sum(parts[1:], parts[0]) if parts else None
        if ctx.needs_input_grad[1] and w is not None:
            of_x = geometry.pull(g, x, w, [True, False, False])[0]
        if ctx.needs_input_grad[2] and u is not None:
            of_weight = geometry.pull(g, u, weight, [False, True, False])[1]
        return of_g, of_x, of_weight, None, None


class FastConvolutions(TorchFunctionMode):
    """While it is active, conv1d, conv2d and conv3d record a graph that is cheaper to differentiate twice.

    Products with the Hessian of small convolutional networks cost 1.1 to 1.9 gradients instead of 1.4 to 2.8. Not for
    evaluations that torch.func traces; transposed convolutions, autocast and padding="same" are left to torch.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _CONVOLUTIONS:
            return _convolve(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _convolve(
    func: Callable[..., Any],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    size = _CONVOLUTIONS[func]
    tensors = (input, weight) if bias is None else (input, weight, bias)
    plain = (
        isinstance(padding, str)
        or input.ndim != size + 2
        or torch.is_autocast_enabled(input.device.type)
        or not any(tensor.requires_grad for tensor in tensors)
    )
    if plain:
        return func(input, weight, bias, stride, padding, dilation, groups)
    geometry = _Geometry(_each(stride, size), _each(padding, size), _each(dilation, size), groups)
    return _Convolution.apply(input, weight, bias, geometry)  # type: ignore[no-untyped-call]


def _each(value: Any, size: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * size if len(values) == 1 else values
