"""Differentiating through the training of a stateful module: k steps of an optimizer as one function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .differentiable_optimizers import DifferentiableOptimizer
from .inner_step import Carry, Dropout, InnerStep, Loss, Named, lifted, within
from .transforms import transformed

__all__ = ["Trained", "unroll_training"]


@dataclass(frozen=True, eq=False)
class Trained:
    """A module after training: its tensors, as functions of all that the training depended on.

    Attributes:
        module: whose forward it is; its own parameters and buffers are untouched.
        parameters: all of them by name, tied ones once.
        buffers: by name, such as BatchNorm's running statistics after the last step.
        state: the optimizer's, to go on from.
        losses: before each step, (k,).
    """

    module: nn.Module = field(repr=False)
    parameters: Named = field(repr=False)
    buffers: Named = field(repr=False)
    state: Any = field(repr=False)
    losses: Tensor

    @property
    def finite(self) -> Any:
        """Whether every loss and trained tensor is finite: a bool, or a boolean tensor under torch.func.vmap."""
        floating = [t for t in (*self.parameters.values(), *self.buffers.values()) if t.is_floating_point()]
        checks = torch.stack([torch.isfinite(t.detach()).all() for t in (self.losses, *floating)])
        return checks.all() if transformed() else bool(checks.all())

    def __call__(self, *inputs: Any) -> Any:
        """The trained module's output, in the module's present mode; its buffers stay as they are."""
        return self.evaluate(lambda module: module(*inputs))

    def evaluate(self, function: Any, *arguments: Any) -> Any:
        """function(module, *arguments) with the trained tensors in the module's place: an outer loss, say.

        Dropout draws here as it does anywhere, in the module's present mode: call module.eval() before, or seed.

        Args:
            function: may use the module as it likes: call it, or its parts, or read its parameters.
            arguments: what else it takes.

        Returns:
            What the function returns.
        """
        buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
        if transformed():
            buffers = lifted(buffers, [self.parameters, arguments])
        with sdpa_kernel(SDPBackend.MATH):
            return within(self.module, function, {**self.parameters, **buffers}, *arguments)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the trained values into a module, in place and without their graph.

        Args:
            module: `self.module`, or another of the same class.
        """
        module.load_state_dict({**module.state_dict(), **self.parameters, **self.buffers})


def unroll_training(
    module: nn.Module,
    loss: Loss,
    batches: Sequence[Any],
    optimizer: DifferentiableOptimizer,
    *,
    parameters: Named | None = None,
    buffers: Named | None = None,
    state: Any = None,
    truncate: int | None = None,
    checkpoint_every: int | None = None,
    dropout: Dropout = "error",
    seed: int = 0,
) -> Trained:
    """Train a module for a few steps, as a differentiable function of where it starts and of all that it trains with.

    From y_0 = the module's parameters, step t is y_{t+1}, s_{t+1} = optimizer.step(y_t, d loss(y_t, batch_t)/dy_t, s_t)
    and the result is y_k with its graph: derivatives of any order, forward and reverse, with respect to y_0, the
    batches, the optimizer's hyper-parameters and all that the loss captures. The module is neither copied nor changed:
    its tensors are exchanged for the time of a call. Parameters that do not require grad are used and not trained; tied
    parameters are one; a parameter that the loss does not use is not moved (nor decayed), as in torch.optim - under a
    transform of torch.func likewise. Buffers follow the training in the result: with BatchNorm in train mode the
    running statistics are updated at each step. Train and eval mode are the module's.

    Attention runs by its mathematical kernel, since the fused ones have no second derivative, and autocast is off.
    Under `torch.no_grad()` the same training runs without a graph. To train many tasks at once from one start, call it
    inside of torch.func.vmap over the tasks' batches (MAML).

    Cost: the gradient of an unrolled loop is about two more gradients a step; its memory is that of k graphs. With
    `checkpoint_every=c` it is that of c graphs and of k/c copies of parameters, buffers and state (sqrt(k) is least),
    for one more gradient a step.

    Args:
        module: any; while loss runs, its parameters and buffers are the present ones.
        loss: (module, batch) -> scalar tensor. Whatever it does with the module counts: calling it more than once,
            parts of it, a penalty on module.parameters().
        batches: one a step, pytrees; [batch] * k for k steps on the same.
        optimizer: `SGD`, `Adam`, `AdamW`, what `from_torch` returns, or any other DifferentiableOptimizer; the
            structure of its hyper-parameters is that of the trainable parameters by name.
        parameters: initial values by name in the place of the module's, some or all: the start of a task, or a frozen
            parameter that is learnt outside.
        buffers: likewise.
        state: of the optimizer, such as the last result's; None to begin.
        truncate: differentiate the last so many steps only, which then begin at a constant: the derivative with respect
            to y_0 is zero unless all steps are counted.
        checkpoint_every: steps of a segment whose graph is not kept but computed again in backward. The loss must then
            capture no tensor that requires grad: pass those in the batches.
        dropout: "error" refuses a loss that draws random numbers; "off" switches the dropout modules off; "same" seeds
            every evaluation alike; "different" draws new masks in each step. Under vmap give its `randomness` too.
        seed: of "same" and "different"; torch's global generators are left as they were.

    Returns:
        The trained parameters, buffers, optimizer state and losses; call it like the module.

    Raises:
        TypeError: for a module, optimizer or loss of another kind.
        ValueError: for a loss that is not a scalar or does not depend on the parameters, a module that changes its
            parameters in forward, unknown names, random numbers without a policy, or tensors captured with
            checkpoint_every.

    Reference:
        Maclaurin, Duvenaud & Adams 2015; Finn, Abbeel & Levine 2017, MAML; Chen, Xu, Zhang & Guestrin 2016 for
        checkpoints; Shaban, Cheng, Hatch & Boots 2019 for truncation.

    Example:
        >>> from nestopt import implicit
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(net.weight, 2.0)
        >>> lr = torch.tensor(0.1, requires_grad=True)
        >>> x = torch.ones(1, 1)
        >>> trained = implicit.unroll_training(net, lambda m, x: (m(x) ** 2).sum() / 2, [x, x], implicit.SGD(lr))
        >>> outer = trained(x).sum()  # 2 (1 - lr)^2
        >>> torch.autograd.grad(outer, [lr, net.weight])
        (tensor(-3.6000), tensor([[0.8100]]))
    """
    k = len(batches)
    for name, value, low in (("truncate", truncate, 0), ("checkpoint_every", checkpoint_every, 1)):
        if value is not None and (not isinstance(value, int) or value < low):
            raise ValueError(f"unroll_training: {name} must be an integer >= {low} or None, but got {value!r}.")
    loop = InnerStep.of(module, loss, optimizer, dropout, seed, k)
    carry = Carry.of(module, optimizer, parameters, buffers, state)
    cut = 0 if truncate is None else max(0, k - truncate)
    losses: list[Tensor] = []
    if cut:
        with torch.no_grad():
            carry, losses = loop.run(optimizer, carry.detached(), batches[:cut], 0)
        carry, losses = carry.detached(), [value.detach() for value in losses]
    if checkpoint_every is None:
        carry, more = loop.run(optimizer, carry, batches[cut:], cut)
        losses += more
    elif cut < k:
        loop = loop.recomputable(carry, batches[cut])
        for first in range(cut, k, checkpoint_every):
            carry, more = loop.segment(optimizer, carry, batches[first : first + checkpoint_every], first)
            losses += more
    values = {**carry.fixed, **carry.parameters}
    ordered = {name: values[name] for name, _ in module.named_parameters()}
    stacked = torch.stack(losses) if losses else next(iter(ordered.values())).detach().new_zeros(0)
    return Trained(module, ordered, carry.buffers, carry.state, stacked)
