"""The transforms and the compiler under which a function runs: the only file that asks torch's internals."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd import forward_ad

__all__ = [
    "alive",
    "dual",
    "first_item",
    "forward_mode",
    "over_batched_gradients",
    "recording",
    "tracked",
    "transformed",
    "untraced",
    "within_jvp",
]

Function = TypeVar("Function", bound=Callable[..., Any])


def transformed() -> bool:
    """Whether a transform of torch.func (or the vmap of a batched backward) is active."""
    return torch._C._are_functorch_transforms_active()


def forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is open outside torch.func."""
    return forward_ad._current_level >= 0


def untraced(function: Function) -> Function:
    """The function as one graph break of torch.compile: it is neither traced nor are the functions that it calls.

    It is what torch.compiler.disable does, which cannot be used where a module is imported, for it imports the compiler
    (a second or more), nor at each call, for the call is traced then, and compiled anew whenever its arguments change.
    A function that the user has compiled himself runs compiled in it.

    Args:
        function: takes and returns anything.

    Returns:
        The function.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        before = eval_frame.set_eval_frame(None)
        try:
            return function(*args, **kwargs)
        finally:
            eval_frame.set_eval_frame(before)

    skip = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT)
    marked: Any = run
    eval_frame.set_code_exec_strategy(marked.__code__, skip)
    marked._torchdynamo_disable, marked._torchdynamo_disable_recursive = True, True
    marked._torchdynamo_disable_msg = "it looks at the residuals that it certifies"
    marked._torchdynamo_orig_callable = function
    return marked  # type: ignore[no-any-return]


def alive(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors without the wrappers of transforms that have ended, as every torch operation sees them."""
    return [torch._C._functorch.unwrap_if_dead(tensor) for tensor in tensors]


def dual(tensor: Tensor) -> bool:
    """Whether the tensor carries a forward-mode tangent at the current level."""
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def recording(tensors: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """Grad mode off unless a tensor is differentiated, so that no result is part of a graph that leads nowhere."""
    wanted = transformed() or any(tensor.requires_grad for tensor in tensors)
    return torch.set_grad_enabled(torch.is_grad_enabled() and wanted)


@contextmanager
def within_jvp(ctx: Any, tangents: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The primal values of the tensors saved for a jvp staticmethod, in a context in which it can be differentiated.

    torch switches forward mode off there, for outer levels as well, whose derivative would silently be zero.

    Args:
        ctx: of the autograd.Function.
        tangents: that were given.

    Yields:
        The primal values.
    """
    saved = alive(ctx.saved_tensors)
    with forward_ad._set_fwd_grad_enabled(True), recording([*saved, *tangents]):
        yield [forward_ad.unpack_dual(tensor).primal for tensor in saved]  # type: ignore[no-untyped-call]


def _here(tensor: Tensor) -> bool:
    level = torch._C._functorch.current_level()
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor) and (
        torch._C._functorch.maybe_get_level(tensor) == level
    )


def first_item(tensor: Tensor) -> Tensor:
    """The tensor outside every transform: no derivative is tracked, and the first item stands for a vmapped batch."""
    if not transformed():
        return torch._C._functorch.unwrap_if_dead(tensor).detach()
    if not _here(tensor):
        with temporarily_pop_interpreter_stack():
            return first_item(tensor)
    inner = torch._C._functorch.get_unwrapped(tensor)
    batched = torch._C._functorch.is_batchedtensor(tensor)
    dim = torch._C._functorch.maybe_get_bdim(tensor) if batched else 0
    with temporarily_pop_interpreter_stack():
        return first_item(inner.select(dim, 0) if batched else inner)


def tracked(tensor: Tensor, *, mapped: bool = True) -> bool:
    """Whether any level differentiates the tensor, in reverse or forward mode, or (where `mapped`) maps over it."""
    here = transformed() and _here(tensor)
    batched = here and torch._C._functorch.is_batchedtensor(tensor)
    if batched and mapped:
        return True
    if not batched and (here or not transformed()) and (tensor.requires_grad or dual(tensor)):
        return True
    if not transformed():
        return False
    inner = torch._C._functorch.get_unwrapped(tensor) if here else tensor
    with temporarily_pop_interpreter_stack():
        return tracked(inner, mapped=mapped)


def over_batched_gradients(function: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    """function(v), with the batch in front if v is one of `torch.autograd.grad(..., is_grads_batched=True)`.

    That argument uses an older vmap, which an autograd.Function cannot see: without this, function would meet a tensor
    whose values nobody may look at.

    Args:
        function: takes many vectors, and gives as many.
        v: a vector, or a batch of them in disguise.

    Returns:
        The value, in the same disguise.
    """
    if not torch._C._functorch.is_legacy_batchedtensor(v):
        return function(v)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    rows = torch._remove_batch_dim(v, level, 0, 0)  # v has the level: the batch size is not read
    return torch._add_batch_dim(function(rows), 0, level)
