"""SPO+: the convex surrogate of the regret of a predicted objective."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .oracles import Oracle, check_pair, decide

__all__ = ["SPOPlusLoss", "spo_plus"]


def spo_plus(
    predicted: Tensor, costs: Tensor, oracle: Oracle, *, solution: Tensor | None = None, maximize: bool = False
) -> Tensor:
    """An upper bound of the regret of predicted costs, convex in them: the loss to train a predictor of costs by.

    For min over w in S of c'w, with w* = w(c):

        l(c_hat, c) = max over w of (c - 2 c_hat)'w + 2 c_hat'w* - c'w* >= c'w(c_hat) - c'w*,

    with the subgradient 2 (w* - w(2 c_hat - c)) in c_hat: one call of the oracle. With maximize, w is of the largest
    c'w and the loss is that of (-c_hat, -c): max over w of (2 c_hat - c)'w - 2 c_hat'w* + c'w*. The derivative with
    respect to c is that of the same formula; second derivatives are zero wherever they exist.

    Cost: one oracle call, and one more without `solution`.

    Args:
        predicted: c_hat, shape (*batch, n).
        costs: c, of the same shape.
        oracle: solves rows of costs, see `decide`.
        solution: w*, if it is known: it does not change over training.
        maximize: whether c are gains, and the oracle maximises.

    Returns:
        One loss an item, shape (*batch,); NaN for an item with NaN. Take .mean().

    Raises:
        ValueError: if the shapes differ.

    Reference:
        Elmachtoub & Grigas 2022, Smart "predict, then optimize", definition 3 and proposition 3.

    Example:
        >>> from nestopt import implicit
        >>> def cheapest(c):
        ...     return torch.nn.functional.one_hot(c.argmin(-1), c.shape[-1])
        >>> c_hat = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> loss = implicit.spo_plus(c_hat, torch.tensor([3.0, 2.5]), cheapest)
        >>> loss, torch.autograd.grad(loss, c_hat)[0]
        (tensor(2.5000, grad_fn=<SumBackward1>), tensor([-2.,  2.]))
    """
    check_pair("spo_plus", predicted, costs)
    best = decide(oracle, costs) if solution is None else solution
    check_pair("spo_plus", best, costs, ("solution", "costs"))
    best = best.detach()
    mixed = 2 * predicted - costs
    # w(2 c_hat - c) is constant around almost every point: autograd's derivative of this is the subgradient
    gap = (mixed * (best - decide(oracle, mixed))).sum(-1)
    return -gap if maximize else gap


class SPOPlusLoss(nn.Module):
    """`spo_plus` as a module, averaged over the batch.

    Args:
        oracle: solves rows of costs, see `decide`.
        maximize: whether costs are gains, and the oracle maximises.

    Example:
        >>> from nestopt import implicit
        >>> def cheapest(c):
        ...     return torch.nn.functional.one_hot(c.argmin(-1), c.shape[-1])
        >>> implicit.SPOPlusLoss(cheapest)(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 2.5]]))
        tensor(2.5000)
    """

    def __init__(self, oracle: Oracle, *, maximize: bool = False) -> None:
        super().__init__()
        self.oracle, self.maximize = oracle, maximize

    def forward(self, predicted: Tensor, costs: Tensor, solution: Tensor | None = None) -> Tensor:
        """The mean loss over a batch.

        Args:
            predicted: c_hat, shape (*batch, n).
            costs: c, likewise.
            solution: w(c), if it is known.

        Returns:
            A scalar.
        """
        return torch.mean(spo_plus(predicted, costs, self.oracle, solution=solution, maximize=self.maximize))
