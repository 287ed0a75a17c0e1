"""The context in which every user's function is evaluated: twice differentiable, and without side effects."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as modules
from torch.nn.parameter import is_lazy

__all__ = ["Isolation", "RandomState", "isolated"]


@dataclass(frozen=True)
class Swap:
    """One buffer of one module, for the time of a call."""

    module: nn.Module
    name: str
    original: Tensor
    clone: Tensor


@dataclass
class Isolation:
    """Clones of the buffers of every module that is called, shared by all the calls of one evaluation.

    The originals go back when the module returns, and the graph keeps the clones: so neither does an evaluation move
    running statistics, nor can later training steps invalidate a kept graph. A buffer that is updated in one call is
    seen updated by the next one of the same evaluation, as it would be without the clones.

    Attributes:
        calls: how many module calls were seen.
    """

    thread: int = field(default_factory=threading.get_ident)
    calls: int = 0
    frames: list[tuple[nn.Module, list[Swap], bool | None]] = field(default_factory=list)
    # keyed by the original's id; the original is held, so that its id stays its own
    latest: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    clones: set[int] = field(default_factory=set)

    def enter(self, module: nn.Module, _arguments: Any = None) -> None:
        """Before a module's forward: hand it clones of its buffers (and of its descendants', when it is outermost)."""
        if self._foreign():
            return
        self.calls += 1
        swaps = [
            Swap(owner, name, buffer, self._clone(buffer))
            for owner in ([module] if self.frames else list(module.modules()))
            for name, buffer in owner._buffers.items()
            if buffer is not None and id(buffer) not in self.clones and not is_lazy(buffer)
        ]
        for swap in swaps:
            swap.module._buffers[swap.name] = swap.clone
        cudnn = None
        if isinstance(module, nn.RNNBase):  # cuDNN's recurrent layers have no second derivative
            cudnn, torch.backends.cudnn.enabled = torch.backends.cudnn.enabled, False
        self.frames.append((module, swaps, cudnn))

    def leave(self, module: nn.Module, *_arguments: Any) -> None:
        """After a module's forward, whether it returned or raised: put everything back."""
        # another global hook that raised before `enter` leaves without having entered
        if self._foreign() or not self.frames or self.frames[-1][0] is not module:
            return
        _, swaps, cudnn = self.frames.pop()
        for swap in reversed(swaps):
            buffers = swap.module._buffers
            now = dict(buffers.items()).get(swap.name)  # a ScriptModule's buffers are no dict
            if isinstance(now, Tensor) and now is not swap.clone:  # the module assigned a new tensor
                self._remember(swap.original, now)
            buffers[swap.name] = swap.original
        if cudnn is not None:
            torch.backends.cudnn.enabled = cudnn

    def _foreign(self) -> bool:
        # hooks are global: other threads go on training, and a compiler must not trace them
        return torch.compiler.is_compiling() or threading.get_ident() != self.thread

    def _clone(self, buffer: Tensor) -> Tensor:
        if id(buffer) not in self.latest:
            self._remember(buffer, buffer.clone())
        return self.latest[id(buffer)][1]

    def _remember(self, original: Tensor, current: Tensor) -> None:
        self.latest[id(original)] = (original, current)
        self.clones.add(id(current))


@contextmanager
def isolated() -> Iterator[Isolation]:
    """Evaluate a user's function so that it can be differentiated twice and leaves nothing changed.

    Attention runs by its mathematical kernel (the fused ones have no second derivative), recurrent layers without
    cuDNN (likewise), gradients are enabled, and the modules that are called work on clones of their buffers: BatchNorm
    in train mode normalises by the batch, but its running statistics and `num_batches_tracked` stay, and so do the
    vectors of spectral_norm, whose power iteration counts as constant. What a bare function updates in place (a tensor
    that is not a module's buffer) is not protected.

    Yields:
        The Isolation, which counts the calls of modules.
    """
    # an inference tensor could not be saved for a backward pass
    with _cloning() as isolation, torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield isolation


_ACTIVE = threading.local()


@contextmanager
def _cloning() -> Iterator[Isolation]:
    active: Isolation | None = getattr(_ACTIVE, "isolation", None)
    if active is not None:  # a function that evaluates another one: the outer evaluation's clones serve both
        yield active
        return
    isolation = _ACTIVE.isolation = Isolation()
    hooks = (
        modules.register_module_forward_pre_hook(isolation.enter),
        modules.register_module_forward_hook(isolation.leave, always_call=True),
    )
    try:
        yield isolation
    finally:
        del _ACTIVE.isolation
        for hook in hooks:
            hook.remove()
        while isolation.frames:  # a pre-hook that raised leaves its module's frame behind
            isolation.leave(isolation.frames[-1][0])


@dataclass(frozen=True)
class RandomState:
    """The state of torch's global generators, so that every evaluation draws the same masks.

    Args:
        device: whose generator is kept beside the CPU's.
        states: their states.
    """

    device: torch.device
    states: tuple[Tensor, ...]

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """The present state.

        Args:
            device: whose generator is kept beside the CPU's.

        Returns:
            The state.
        """
        cuda = (torch.cuda.get_rng_state(device),) if device.type == "cuda" else ()
        return cls(device, (torch.get_rng_state(), *cuda))

    def set(self) -> None:
        """Make it the present state."""
        torch.set_rng_state(self.states[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self.states[1], self.device)

    def run(self, function: Callable[[], Any]) -> Any:
        """Call a function from this state, and leave the generators as they were found.

        Args:
            function: without arguments.

        Returns:
            What it returns.
        """
        before = RandomState.now(self.device)
        try:
            self.set()
            return function()
        finally:
            before.set()
