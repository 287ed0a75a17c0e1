"""Contrastive losses: the true decision against a pool of others, with few calls of the solver."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

from .oracles import Oracle, check_pair, decide

__all__ = ["ContrastiveLoss", "SolutionPool", "contrastive", "contrastive_map"]


def contrastive(
    predicted: Tensor, solution: Tensor, pool: Tensor, *, costs: Tensor | None = None, maximize: bool = False
) -> Tensor:
    """Noise contrastive estimation: the true decision w* should be cheaper than those of a pool S, on average.

        l(c_hat) = mean over w in S of (c_hat - c)'w* - (c_hat - c)'w,

    linear in c_hat, with c = 0 unless `costs` are given. With costs the loss of a perfect prediction is zero and that
    of another is the difference to it in the true costs' scale; without them it is unbounded below, and c_hat should
    come from a bounded model. No call of the solver.

    Args:
        predicted: c_hat, shape (*batch, n).
        solution: w* = w(c), of the same shape.
        pool: feasible decisions, shape (k, n).
        costs: c, to be subtracted, or None.
        maximize: whether costs are gains.

    Returns:
        One loss an item, shape (*batch,). Take .mean().

    Raises:
        ValueError: for shapes that do not fit, or an empty pool.

    Reference:
        Mulamba, Mandi, Diligenti, Lombardi, Bucarey & Guns 2021, Contrastive losses and solution caching for
        predict-and-optimize.

    Example:
        >>> from nestopt import implicit
        >>> w, pool = torch.tensor([1.0, 0.0]), torch.eye(2)
        >>> implicit.contrastive(torch.tensor([1.0, 3.0]), w, pool)
        tensor(-1.)
    """
    return torch.mean(_gaps("contrastive", predicted, solution, pool, costs, maximize), -1)


def contrastive_map(
    predicted: Tensor, solution: Tensor, pool: Tensor, *, costs: Tensor | None = None, maximize: bool = False
) -> Tensor:
    """The contrastive loss against the one decision of the pool that looks best: the largest gap instead of the mean.

        l(c_hat) = (c_hat - c)'w* - min over w in S of (c_hat - c)'w,

    convex in c_hat, and zero at least once w* is in the pool. Where several are the cheapest the gradient goes to one
    of them.

    Args:
        predicted: c_hat, shape (*batch, n).
        solution: w* = w(c), of the same shape.
        pool: feasible decisions, shape (k, n).
        costs: c, to be subtracted, or None.
        maximize: whether costs are gains.

    Returns:
        One loss an item, shape (*batch,). Take .mean().

    Raises:
        ValueError: for shapes that do not fit, or an empty pool.

    Reference:
        Mulamba et al. 2021, section 3 (the maximum a posteriori form).

    Example:
        >>> from nestopt import implicit
        >>> w, pool = torch.tensor([1.0, 0.0]), torch.eye(2)
        >>> implicit.contrastive_map(torch.tensor([3.0, 1.0]), w, pool)
        tensor(2.)
    """
    return _gaps("contrastive_map", predicted, solution, pool, costs, maximize).max(-1).values


def _gaps(
    owner: str, predicted: Tensor, solution: Tensor, pool: Tensor, costs: Tensor | None, maximize: bool
) -> Tensor:
    check_pair(owner, predicted, solution, ("predicted", "solution"))
    if not isinstance(pool, Tensor) or pool.ndim != 2 or not len(pool) or pool.shape[-1] != predicted.shape[-1]:
        came = tuple(pool.shape) if isinstance(pool, Tensor) else type(pool).__name__
        raise ValueError(
            f"{owner}: pool must hold at least one decision, shape (k, {predicted.shape[-1]}), but got {came}."
        )
    if costs is not None:
        check_pair(owner, predicted, costs)
    c = predicted if costs is None else predicted - costs
    gaps = (c * solution).sum(-1, keepdim=True) - c @ pool.to(c).mT
    return -gaps if maximize else gaps


class SolutionPool(nn.Module):
    """The different decisions met so far, as a buffer that grows and is saved with a model.

    Args:
        solutions: decisions to begin with, shape (*batch, n), such as those of the training set.

    Example:
        >>> from nestopt import implicit
        >>> pool = implicit.SolutionPool(torch.eye(2))
        >>> pool.add(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        >>> len(pool)
        3
    """

    solutions: Tensor

    def __init__(self, solutions: Tensor) -> None:
        super().__init__()
        self.register_buffer("solutions", _different(solutions.detach()))

    def __len__(self) -> int:
        return len(self.solutions)

    def add(self, solutions: Tensor) -> None:
        """Take in decisions; those that are there already, and those with NaN, change nothing.

        Args:
            solutions: shape (*batch, n).

        Raises:
            ValueError: for another n.
        """
        if solutions.shape[-1:] != self.solutions.shape[-1:]:
            raise ValueError(
                f"SolutionPool: decisions must have {self.solutions.shape[-1]} entries, but got shape "
                f"{tuple(solutions.shape)}."
            )
        rows = solutions.detach().reshape(-1, solutions.shape[-1]).to(self.solutions)
        self.solutions = _different(torch.cat([self.solutions, rows]))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        saved = state_dict.get(f"{prefix}solutions")
        if isinstance(saved, Tensor):  # of any size
            self.solutions = self.solutions.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class ContrastiveLoss(nn.Module):
    """A contrastive loss with a pool that grows by solving now and then, averaged over the batch.

    Args:
        oracle: solves rows of costs, see `decide`.
        pool: decisions to begin with; it must hold a few, such as those of the training set.
        solve_ratio: part of the calls in which the oracle solves for the predicted costs and the pool takes them in.
        largest: `contrastive_map` instead of `contrastive`.
        relative: subtract the true costs.
        maximize: whether costs are gains, and the oracle maximises.
        seed: of the choice of calls in which to solve.

    Raises:
        ValueError: unless 0 <= solve_ratio <= 1.

    Reference:
        Mulamba et al. 2021, algorithm 1.
    """

    def __init__(
        self,
        oracle: Oracle,
        pool: SolutionPool,
        *,
        solve_ratio: float = 0.1,
        largest: bool = False,
        relative: bool = True,
        maximize: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= solve_ratio <= 1:
            raise ValueError(f"ContrastiveLoss: solve_ratio must lie in [0, 1], but got {solve_ratio}.")
        self.oracle, self.pool, self.solve_ratio = oracle, pool, solve_ratio
        self.largest, self.relative, self.maximize = largest, relative, maximize
        self.stream = random.Random(seed)

    def forward(self, predicted: Tensor, costs: Tensor, solution: Tensor | None = None) -> Tensor:
        """The mean loss over a batch.

        Args:
            predicted: c_hat, shape (*batch, n).
            costs: c, likewise.
            solution: w(c), if it is known.

        Returns:
            A scalar.
        """
        best = decide(self.oracle, costs) if solution is None else solution
        if self.stream.random() < self.solve_ratio:
            self.pool.add(decide(self.oracle, predicted))
        loss = contrastive_map if self.largest else contrastive
        shift = costs if self.relative else None
        return torch.mean(loss(predicted, best, self.pool.solutions, costs=shift, maximize=self.maximize))


def _different(solutions: Tensor) -> Tensor:
    rows = solutions.reshape(-1, solutions.shape[-1])
    different: Tensor = torch.unique(rows[rows.isfinite().all(-1)], dim=0)
    return different
