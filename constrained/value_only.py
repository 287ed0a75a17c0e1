"""Functions of values alone: no derivative passes through them, and vmap hands them one more batch dimension."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nestopt.implicit.transforms import forward_mode, tracked, transformed

__all__ = ["check_every", "differentiated", "opaque"]


class _Opaque(torch.autograd.Function):
    """A batched function that may look at its values, under any transform of torch.func."""

    @staticmethod
    def forward(function: Callable[..., Any], spaces: Sequence[int], *tensors: Tensor) -> Any:
        with torch.no_grad():
            return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(*((output,) if isinstance(output, Tensor) else output))

    @staticmethod
    def backward(ctx: Any, *v: Tensor) -> Any:
        return (None,) * len(ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        return None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], function: Callable[..., Any], spaces: Sequence[int],
        *tensors: Tensor,
    ) -> tuple[Any, Any]:  # fmt: skip
        dims = in_dims[2:]
        most = max(t.ndim - (d is not None) - s for t, d, s in zip(tensors, dims, spaces, strict=True))
        aligned = []
        for tensor, dim, space in zip(tensors, dims, spaces, strict=True):
            if dim is None:
                aligned.append(tensor)
            else:  # the mapped dimension in front of the largest batch, so that all still broadcast
                front = tensor.movedim(dim, 0)
                gap = most - (front.ndim - 1 - space)
                aligned.append(front.reshape(front.shape[0], *(1,) * gap, *front.shape[1:]))
        out = _Opaque.apply(function, spaces, *aligned)  # type: ignore[no-untyped-call]
        return out, 0 if isinstance(out, Tensor) else (0,) * len(out)


def opaque(function: Callable[..., Any], *tensors: Tensor, spaces: Sequence[int]) -> Any:
    """function(*tensors) as constants: tensors that nothing is differentiated through.

    The function may loop until it has converged and look at numbers, because no transform reaches it: under
    torch.func.vmap it is called once, with one more batch dimension in front.

    Args:
        function: of tensors of shapes (*batch, *space) whose batches broadcast, to a tensor or a tuple of tensors that
            begin with the broadcast batch.
        tensors: its arguments; they are detached.
        spaces: for each tensor, how many of its last dimensions are not batch.

    Returns:
        What the function returns.
    """
    return _Opaque.apply(function, tuple(spaces), *(tensor.detach() for tensor in tensors))  # type: ignore[no-untyped-call]


def check_every(valid: Tensor, message: str) -> None:
    """Raise unless every entry is true, also under vmap, where nobody else may look.

    Args:
        valid: boolean tensor.
        message: of the error.

    Raises:
        ValueError: with the message.
    """

    def look(values: Tensor) -> Tensor:
        if not bool(values.all()):
            raise ValueError(message)
        return values

    opaque(look, valid, spaces=[0])


def differentiated(*tensors: Tensor) -> bool:
    """Whether a derivative with respect to any of the tensors is recorded now, in either mode."""
    if not (torch.is_grad_enabled() or transformed() or forward_mode()):
        return False
    return any(tracked(tensor, mapped=False) for tensor in tensors)
