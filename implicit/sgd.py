"""Stochastic gradient descent with momentum, differentiable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import optree
from torch import Tensor

from .differentiable_optimizers import DifferentiableOptimizer, check_hyper, is_zero, spread

__all__ = ["SGD", "SGDState"]


@dataclass(frozen=True, eq=False)
class SGDState:
    """Where SGD stands.

    Attributes:
        momentum: m for each parameter, in their structure; None before its first gradient.
    """

    momentum: Any = field(repr=False)


@dataclass(frozen=True, eq=False)
class SGD(DifferentiableOptimizer):
    """y+ = y - lr d with d = g + weight_decay y, or with momentum d <- m: m+ = momentum m + (1 - dampening) d.

    The first momentum is d itself; with `nesterov` the step is along d + momentum m+. This is torch.optim.SGD, step for
    step, as a function whose derivatives exist to any order.

    Cost of a step: a few operations a parameter; nothing is changed in place.

    Args:
        lr: below 2 / (largest curvature) for a loss to fall; any hyper-parameter may be a number, a tensor (with its
            gradient), or a pytree of these in the parameters' structure.
        momentum: in [0, 1), 0.9 being usual; the number 0 leaves it out.
        dampening: in [0, 1]; 0 with nesterov.
        weight_decay: penalty weight_decay |y|^2 / 2 added to the loss.
        nesterov: step along the gradient looked ahead.
        maximize: ascend.

    Raises:
        TypeError: for a hyper-parameter that is neither number nor floating tensor.
        ValueError: for a number out of range, or nesterov without momentum or with dampening.

    Reference:
        Sutskever, Martens, Dahl & Hinton 2013, On the importance of initialization and momentum, in torch's form.

    Example:
        >>> import torch
        >>> y, lr = torch.tensor([1.0]), torch.tensor(0.1, requires_grad=True)
        >>> sgd = SGD(lr, momentum=0.9)
        >>> state = sgd.init(y)
        >>> for _ in range(2):
        ...     y, state = sgd.step(y, 2 * y, state)
        >>> y, torch.autograd.grad(y, lr)[0]
        (tensor([0.4600], grad_fn=<SubBackward0>), tensor(-5.))
    """

    lr: Any
    momentum: Any = 0.0
    dampening: Any = 0.0
    weight_decay: Any = 0.0
    nesterov: Any = False
    maximize: Any = False

    def __post_init__(self) -> None:
        for name in ("lr", "momentum", "weight_decay", "dampening"):
            check_hyper("SGD", name, getattr(self, name))
        if self.nesterov is True and (is_zero(self.momentum) or not is_zero(self.dampening)):
            raise ValueError("SGD: nesterov needs a momentum and no dampening; use e.g. momentum=0.9, dampening=0.")

    def init(self, parameters: Any) -> SGDState:
        """No momentum yet."""
        return SGDState(optree.tree_map(lambda _: None, parameters))

    def _step(
        self, leaves: list[Tensor], gradients: Sequence[Tensor | None], state: SGDState, parameters: Any
    ) -> tuple[list[Tensor], SGDState]:
        names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
        columns = [spread(getattr(self, name), parameters, f"SGD: {name}") for name in names]
        old = spread(state.momentum, parameters, "SGD: the state's momentum", optional=True)
        new: list[Tensor] = []
        memory: list[Tensor | None] = []
        for p, g, m, lr, momentum, dampening, decay, nesterov, maximize in zip(
            leaves, gradients, old, *columns, strict=True
        ):
            if g is None:
                new.append(p)
                memory.append(m)
                continue
            d = -g if maximize else g
            if not is_zero(decay):
                d = d + decay * p
            if not is_zero(momentum):
                m = d if m is None else momentum * m + (1 - dampening) * d
                d = d + momentum * m if nesterov else m
            new.append(p - lr * d)
            memory.append(m)
        return new, SGDState(optree.tree_unflatten(optree.tree_structure(parameters), memory))
