"""Elementwise functions that are the root of an equation in one unknown, differentiable to any order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nestopt.implicit.transforms import alive, recording, within_jvp

__all__ = ["scalar_root"]


class _ScalarRoot(torch.autograd.Function):
    """Elementwise rho(v_1, ...), whose derivatives are explicit functions of v and of rho, which is this again."""

    @staticmethod
    def forward(solve: Callable[..., Tensor], slopes: Callable[..., Sequence[Tensor]], *v: Tensor) -> Tensor:
        with torch.no_grad():
            return solve(*v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.slopes = inputs[1]
        # the OUTPUT is saved: it comes back attached to this node, so that a second derivative sees it move
        ctx.save_for_backward(output, *inputs[2:])
        ctx.save_for_forward(output, *inputs[2:])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        if g is None:
            return (None,) * len(ctx.needs_input_grad)
        rho, *v = alive(ctx.saved_tensors)
        with recording([rho, *v, g]):
            return None, None, *(g * slope for slope in ctx.slopes(rho, *v))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        dots = [tangent for tangent in tangents[2:] if tangent is not None]
        with within_jvp(ctx, dots) as (rho, *v):
            slopes = ctx.slopes(rho, *v)
            pairs = zip(slopes, tangents[2:], strict=True)
            return sum((slope * dot for slope, dot in pairs if dot is not None), torch.zeros_like(rho))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], solve: Callable[..., Tensor],
        slopes: Callable[..., Sequence[Tensor]], *v: Tensor,
    ) -> tuple[Tensor, int]:  # fmt: skip
        front = [
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip(v, in_dims[2:], strict=True)
        ]
        return scalar_root(solve, slopes, *front), 0


def scalar_root(solve: Callable[..., Tensor], slopes: Callable[..., Sequence[Tensor]], *v: Tensor) -> Tensor:
    """Return rho = solve(*v) with the derivatives that the implicit function theorem gives it.

    Args:
        solve: of tensors of one shape, elementwise, by any means; it may look at numbers.
        slopes: (rho, *v) -> d rho / d v_i for each i: differentiable functions of the root and of v.
        v: tensors of one shape.

    Returns:
        The root, of that shape.
    """
    return _ScalarRoot.apply(solve, slopes, *v)  # type: ignore[no-any-return, no-untyped-call]
