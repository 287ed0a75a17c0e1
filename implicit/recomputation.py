"""A function of tensors whose graph is not kept: it is computed again whenever a derivative asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .pullback import pull
from .transforms import alive, recording, within_jvp

__all__ = ["recomputed"]

Outputs: TypeAlias = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
Function: TypeAlias = Callable[..., Outputs]


def recomputed(function: Function, *tensors: Tensor) -> Outputs:
    """function(*tensors), of which only the inputs are kept for a derivative, of any order, forward or reverse.

    A derivative evaluates the function again, so that it must give the same values then: it may depend on nothing but
    the tensors (what it captures is a constant) and must seed its random numbers.

    Args:
        function: of the tensors; returns two tuples of tensors, those that have a derivative and those that have none.
        tensors: the inputs; only floating ones are differentiated.

    Returns:
        What the function returns.
    """
    held = _Held(function)
    outputs = _Recomputed.apply(held, *tensors)  # type: ignore[no-untyped-call]
    return outputs[: held.live], outputs[held.live :]


@dataclass
class _Held:
    """A function, and how many of its outputs have a derivative, once that is known."""

    function: Function
    live: int = 0


class _Recomputed(torch.autograd.Function):
    """A function known by its inputs alone."""

    @staticmethod
    def forward(held: _Held, *tensors: Tensor) -> tuple[Tensor, ...]:
        live, constant = held.function(*(t.detach() for t in tensors))
        held.live = len(live)
        # an input that is handed through must not come out as the same object
        return tuple(output.clone() for output in (*live, *constant))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.function, ctx.live, ctx.count = inputs[0].function, inputs[0].live, len(output)
        ctx.mark_non_differentiable(*output[ctx.live :])
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        tensors = alive(ctx.saved_tensors)
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        with recording([*tensors, *cotangents]):
            pulled = pull(_restricted(ctx, tensors, wanted), [tensors[i] for i in wanted], cotangents[: ctx.live])
        gradients: list[Tensor | None] = [None] * len(tensors)
        for i, value in zip(wanted, pulled, strict=True):
            gradients[i] = value
        return None, *gradients

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        given = [i for i, dot in enumerate(tangents[1:]) if dot is not None]
        dots = [dot for dot in tangents[1:] if dot is not None]
        with within_jvp(ctx, dots) as tensors:
            function, inputs = _restricted(ctx, tensors, given), [tensors[i] for i in given]
            with torch.no_grad():
                zeros = [torch.zeros_like(output) for output in function(*inputs)]
            # the transpose of the transpose: many operations have no forward mode
            moved = pull(lambda *s: tuple(pull(function, inputs, s)), zeros, dots)
        return (*moved, *[None] * (ctx.count - ctx.live))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], held: _Held, *tensors: Tensor) -> Any:
        def mapped(*batched: Tensor) -> Outputs:
            every: Any = torch.func.vmap(held.function, in_dims=in_dims[1:], randomness=info.randomness)(*batched)
            return every  # type: ignore[no-any-return]

        live, constant = recomputed(mapped, *tensors)
        held.live = len(live)
        return (*live, *constant), (0,) * (len(live) + len(constant))


def _restricted(ctx: Any, tensors: Sequence[Tensor], wanted: Sequence[int]) -> Callable[..., tuple[Tensor, ...]]:
    """The outputs that have a derivative as a function of some inputs, the others held."""

    def restricted(*inputs: Tensor) -> tuple[Tensor, ...]:
        full = list(tensors)
        for i, value in zip(wanted, inputs, strict=True):
            full[i] = value
        return ctx.function(*full)[0]  # type: ignore[no-any-return]

    return restricted
