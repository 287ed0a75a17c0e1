"""Adam and AdamW, differentiable also where a gradient is zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import optree
import torch
from torch import Tensor

from .differentiable_optimizers import DifferentiableOptimizer, check_hyper, is_zero, spread, zeros_like

__all__ = ["Adam", "AdamState", "AdamW"]


@dataclass(frozen=True, eq=False)
class AdamState:
    """Where Adam stands; each a pytree in the parameters' structure.

    Attributes:
        steps: taken, a number for each parameter.
        mean: running mean of gradients, from zero.
        square: running mean of their squares.
        largest: elementwise largest `square` so far; None for a parameter without amsgrad.
    """

    steps: Any
    mean: Any = field(repr=False)
    square: Any = field(repr=False)
    largest: Any = field(repr=False)


@dataclass(frozen=True, eq=False)
class Adam(DifferentiableOptimizer):
    """y+ = y - lr m^ / (sqrt(v^ + eps_root) + eps), m and v running means of the gradient d and of d^2.

    m^ and v^ are divided by 1 - beta^t, the sum of their weights (after t steps), and d = g + weight_decay y.

    The default is NOT torch's denominator: sqrt(v^) + eps has no derivative where a gradient has always been zero, and
    a curvature of 1 / v^(3/2) near there, so eps stands inside of the root by default (eps_root = 1e-16, as large there
    as torch's 1e-8 outside). `Adam(lr, eps=1e-8, eps_root=0)` is torch.optim.Adam step for step; its first derivative
    is right everywhere (where v = 0 the step m^ / eps is linear, and the root counts as constant), its second only
    where v > 0. A step is about lr whatever the gradient's size, so the derivative with respect to what only scales the
    gradient is near zero, and large (1 / sqrt(eps_root)) where the gradient vanishes.

    Cost of a step: some ten operations a parameter; nothing is changed in place.

    Args:
        lr: about the largest move of an element in a step; any hyper-parameter may be a number, a tensor (with its
            gradient), or a pytree of these in the parameters' structure.
        betas: weights of the old means, in [0, 1).
        eps: added to the root.
        weight_decay: penalty weight_decay |y|^2 / 2 added to the loss (decoupled from the means in AdamW).
        amsgrad: divide by the largest v so far.
        eps_root: added to v^ inside of the root.
        maximize: ascend.

    Raises:
        TypeError: for a hyper-parameter that is neither number nor floating tensor.
        ValueError: for a number out of range, or betas that are no pair.

    Reference:
        Kingma & Ba 2015, algorithm 1; Reddi, Kale & Kumar 2018 (amsgrad).

    Example:
        >>> import torch
        >>> y, lr = torch.tensor([1.0, 2.0]), torch.tensor(0.1, requires_grad=True)
        >>> adam = Adam(lr)
        >>> y, state = adam.step(y, torch.tensor([3.0, 0.0]), adam.init(y))
        >>> y, torch.autograd.grad(y.sum(), lr)[0]
        (tensor([0.9000, 2.0000], grad_fn=<SubBackward0>), tensor(-1.0000))
    """

    lr: Any = 1e-3
    betas: tuple[Any, Any] = (0.9, 0.999)
    eps: Any = 0.0
    weight_decay: Any = 0.0
    amsgrad: Any = False
    eps_root: Any = 1e-16
    maximize: Any = False

    decoupled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        owner = type(self).__name__
        for name in ("lr", "eps", "weight_decay", "eps_root"):
            check_hyper(owner, name, getattr(self, name))
        if not isinstance(self.betas, tuple) or len(self.betas) != 2:
            raise ValueError(f"{owner}: betas must be a pair such as (0.9, 0.999), but got {self.betas!r}.")
        for i, beta in enumerate(self.betas):
            check_hyper(owner, f"betas[{i}]", beta, high=1.0)

    def init(self, parameters: Any) -> AdamState:
        """Means of zero."""
        steps = optree.tree_map(lambda _: 0, parameters)
        amsgrad = iter(spread(self.amsgrad, parameters, f"{type(self).__name__}: amsgrad"))
        largest = optree.tree_map(lambda p: zeros_like(p) if next(amsgrad) else None, parameters)
        return AdamState(steps, zeros_like(parameters), zeros_like(parameters), largest)

    def _step(
        self, leaves: list[Tensor], gradients: Sequence[Tensor | None], state: AdamState, parameters: Any
    ) -> tuple[list[Tensor], AdamState]:
        owner = type(self).__name__
        hypers = {
            "lr": self.lr, "betas[0]": self.betas[0], "betas[1]": self.betas[1], "eps": self.eps,
            "weight_decay": self.weight_decay, "eps_root": self.eps_root, "maximize": self.maximize,
        }  # fmt: skip
        columns = [spread(value, parameters, f"{owner}: {name}") for name, value in hypers.items()]
        names = ("steps", "mean", "square", "largest")
        old = [
            spread(getattr(state, name), parameters, f"{owner}: the state's {name}", optional=True) for name in names
        ]
        new: list[Tensor] = []
        memory: list[tuple[Any, ...]] = []
        for p, g, t, m, v, top, lr, beta1, beta2, eps, decay, eps_root, maximize in zip(
            leaves, gradients, *old, *columns, strict=True
        ):
            if g is None:
                new.append(p)
                memory.append((t, m, v, top))
                continue
            d = -g if maximize else g
            if not is_zero(decay):
                p, d = (p - lr * decay * p, d) if self.decoupled else (p, d + decay * p)
            t = t + 1
            m = beta1 * m + (1 - beta1) * d
            v = beta2 * v + (1 - beta2) * d * d
            top = top if top is None else torch.maximum(top, v)
            root = _root((v if top is None else top) / (1 - beta2**t), eps_root)
            new.append(p - lr * (m / (1 - beta1**t)) / (root if is_zero(eps) else root + eps))
            memory.append((t, m, v, top))
        treespec = optree.tree_structure(parameters)
        # without leaves there are no columns to transpose
        parts = zip(*memory, strict=True) if memory else [()] * 4
        return new, AdamState(*(optree.tree_unflatten(treespec, part) for part in parts))


@dataclass(frozen=True, eq=False)
class AdamW(Adam):
    """Adam with weight decay apart from the means: y shrinks by the factor 1 - lr weight_decay before each step.

    Otherwise like `Adam`; `AdamW(lr, eps=1e-8, eps_root=0)` is torch.optim.AdamW step for step.

    Args:
        weight_decay: lr weight_decay is the part of a parameter that is lost in a step.

    Reference:
        Loshchilov & Hutter 2019, algorithm 2.

    Example:
        >>> import torch
        >>> adam = AdamW(0.1, weight_decay=0.5)
        >>> adam.step(torch.ones(1), torch.zeros(1), adam.init(torch.ones(1)))[0]
        tensor([0.9500])
    """

    weight_decay: Any = 1e-2

    decoupled: ClassVar[bool] = True


def _root(v: Tensor, eps_root: Any) -> Tensor:
    """sqrt(v + eps_root); constant, instead of without a derivative, where that is the root of zero."""
    if not is_zero(eps_root):
        v = v + eps_root
    zero = v == 0
    return torch.where(zero, 0, torch.where(zero, 1, v).sqrt())
