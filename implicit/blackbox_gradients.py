"""The derivative of a combinatorial solver by a linear interpolation of its loss."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .oracles import Oracle, check_costs, decide

__all__ = ["BlackboxOptimizer", "blackbox"]


def blackbox(costs: Tensor, oracle: Oracle, *, interpolation: float = 10.0, maximize: bool = False) -> Tensor:
    """The oracle's decision w(c), with an informative substitute of its derivative, which is zero.

    For the gradient v of a loss with respect to w, the loss's linearisation v'w(c) is replaced by

        f(c) = (min over w of (c + interpolation v)'w - min over w of c'w) / interpolation,

    which is continuous and piecewise linear, and the gradient is (w(c + interpolation v) - w(c)) / interpolation: one
    more call of the oracle a backward pass. With maximize, w(c) is that of the least (-c)'w, and the gradient is
    (w(c) - w(c - interpolation v)) / interpolation. f is equal to v'w(c) wherever a step of interpolation v does not
    change the decision, so that a small number gives zeros and a large one a smooth, more biased gradient. There is no
    forward mode, as the formula needs v; its own derivative is zero.

    Args:
        costs: shape (*batch, n).
        oracle: solves rows of costs, see `decide`.
        interpolation: lambda > 0, in the units of costs / v; about as large as makes interpolation * v comparable to
            the costs.
        maximize: whether the oracle maximises.

    Returns:
        w, of costs' shape.

    Raises:
        ValueError: unless interpolation is positive.

    Reference:
        Vlastelica, Paulus, Musil, Martius & Rolinek 2020, Differentiation of blackbox combinatorial solvers,
        algorithm 1.

    Example:
        >>> from nestopt import implicit
        >>> def cheapest(c):
        ...     return torch.nn.functional.one_hot(c.argmin(-1), c.shape[-1])
        >>> c = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> w = implicit.blackbox(c, cheapest, interpolation=2.0)
        >>> torch.autograd.grad(w[0], c)[0]  # costs that are raised by 2 * (1, 0) make the other one cheaper
        tensor([-0.5000,  0.5000])
    """
    check_costs("blackbox", oracle, costs)
    if not 0 < interpolation < math.inf:
        raise ValueError(f"blackbox: interpolation must be positive and finite, but got {interpolation}.")
    step = -interpolation if maximize else interpolation
    return _Blackbox.apply(oracle, step, costs)  # type: ignore[no-any-return, no-untyped-call]


class _Blackbox(torch.autograd.Function):
    """w(c), whose pullback is a difference of two decisions."""

    @staticmethod
    def forward(oracle: Oracle, step: float, costs: Tensor) -> Tensor:
        return decide(oracle, costs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.oracle, ctx.step = inputs[:2]
        ctx.save_for_backward(inputs[2], output)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        costs, w = ctx.saved_tensors
        return None, None, (decide(ctx.oracle, costs + ctx.step * v) - w.detach()) / ctx.step

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], oracle: Oracle, step: float, costs: Tensor) -> tuple[Tensor, int]:
        return _Blackbox.apply(oracle, step, costs.movedim(in_dims[2], 0)), 0  # type: ignore[no-untyped-call]


class BlackboxOptimizer(nn.Module):
    """`blackbox` as a layer from costs to decisions.

    Args:
        oracle: solves rows of costs, see `decide`.
        interpolation: lambda > 0.
        maximize: whether the oracle maximises.
    """

    def __init__(self, oracle: Oracle, *, interpolation: float = 10.0, maximize: bool = False) -> None:
        super().__init__()
        self.oracle, self.interpolation, self.maximize = oracle, interpolation, maximize

    def forward(self, costs: Tensor) -> Tensor:
        """The decisions.

        Args:
            costs: shape (*batch, n).

        Returns:
            w, likewise.
        """
        return blackbox(costs, self.oracle, interpolation=self.interpolation, maximize=self.maximize)
