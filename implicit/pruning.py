"""Optimal Brain Surgeon for networks: which weights cost least to remove, and how the others make up for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from nestopt.linalg import MFAC, DampedFisher
from nestopt.linalg.tree import Ravel, named_tree

__all__ = ["CubicSparsity", "PruneStep", "Pruner"]


@dataclass(frozen=True)
class CubicSparsity:
    """The gradual schedule s(t) = final + (initial - final) (1 - t / steps)^3: fast while weights are plenty.

    Args:
        final: sparsity after the last step, in [0, 1].
        steps: number of prunings, at least 1.
        initial: sparsity before the first.

    Raises:
        ValueError: unless 0 <= initial <= final <= 1 and steps >= 1.

    Reference:
        Zhu & Gupta 2017, eq. (1).

    Example:
        >>> schedule = CubicSparsity(0.96, steps=4)
        >>> [round(schedule(t), 3) for t in range(5)]
        [0.0, 0.555, 0.84, 0.945, 0.96]
    """

    final: float
    steps: int
    initial: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.initial <= self.final <= 1 or self.steps < 1:
            raise ValueError(
                "CubicSparsity: 0 <= initial <= final <= 1 and steps >= 1 are needed, but got "
                f"initial={self.initial}, final={self.final}, steps={self.steps}."
            )

    def __call__(self, t: int) -> float:
        """The sparsity after pruning t of steps (final beyond)."""
        left = 1 - min(max(t, 0), self.steps) / self.steps
        return self.final + (self.initial - self.final) * left**3


@dataclass(frozen=True)
class PruneStep:
    """What one pruning did.

    Attributes:
        removed: weights that it set to zero.
        sparsity: part of all weights that is zero now.
        predicted_increase: sum of the scores, by which the quadratic model says the loss rises (each weight on its
            own); None for magnitude pruning, which has no model.
    """

    removed: int
    sparsity: float
    predicted_increase: float | None


class Pruner:
    r"""Prunes tensors in place, by Optimal Brain Surgeon with M-FAC or by magnitude, and keeps them pruned.

    With the empirical Fisher matrix F of the loss in the place of its Hessian, weight p costs w_p^2 / (2 [F^-1]_pp),
    and its removal is best made up for by adding -(w_p / [F^-1]_pp) F^-1 e_p to the others. `prune` removes the set S
    of smallest scores with the sum of these updates,

        w <- w - F^-1 sum_{p in S} (w_p / [F^-1]_pp) e_p,  then w_S = 0,

    which treats the members of S as independent: a few rounds of small S are better than one large one. F is that of
    the weights that are left: the columns of those pruned before are zero, so that no update reaches them. Every row of
    the gradients counts, whatever m. The empirical Fisher matrix is not the Hessian, except near a minimum where the
    model interpolates its data; the score is of use where the network is trained.

    Cost: the diagonal of F^-1 and one product: n m^2 for m gradients of n weights.

    Args:
        params: pytree of the tensors to be pruned, or a module for all of its parameters; they are changed in place. To
            leave biases alone pass a dict of the weights.
        fisher: makes F from gradients (m, n): MFAC, or `lambda G: BlockMFAC(G, blocks=2000, damping=1e-5)`.

    Attributes:
        masks: True where a weight is left, a tensor for each leaf in optree's order.
        into: the Ravel of params, which gives gradients their order, as in `linalg.per_sample_gradients`.

    Raises:
        TypeError: if a leaf of params is not a floating tensor.

    Reference:
        Hassibi & Stork 1992; Frantar, Kurtic & Alistarh 2021, M-FAC, section 3.1.

    Example:
        >>> w = torch.tensor([1.0, 1.0, -3.0])
        >>> pruner = Pruner(w, lambda G: MFAC(G, damping=0.01))
        >>> step = pruner.prune(1 / 3, torch.tensor([[0.1, 1.0, 0.0], [0.0, 0.0, 1.0]]))
        >>> step.removed, w  # the second weight makes up for the first
        (1, tensor([ 0.0000,  1.0980, -3.0000]))
    """

    def __init__(self, params: Any, fisher: Callable[[Tensor], DampedFisher] = MFAC) -> None:
        self.into = Ravel.of(params, "params")
        self.fisher = fisher
        self._leaves: list[Tensor] = optree.tree_leaves(named_tree(params))
        self.masks = [torch.ones_like(leaf, dtype=torch.bool) for leaf in self._leaves]

    @property
    def sparsity(self) -> float:
        """The part of all weights that has been pruned."""
        return 1 - sum(int(mask.sum()) for mask in self.masks) / max(1, self.into.size)

    @torch.no_grad()
    def prune(self, sparsity: float, gradients: Tensor | None = None) -> PruneStep:
        """Remove weights until the given part of all of them is zero.

        Args:
            sparsity: in [0, 1], at least the present one; rounded to a whole number of weights.
            gradients: of samples or mini-batches at the present weights, (m, n), for Optimal Brain Surgeon; None
                removes the weights of least magnitude, and changes no other.

        Returns:
            What was done.

        Raises:
            ValueError: if sparsity is out of range, or gradients do not fit the weights.
        """
        n = self.into.size
        kept = self.into.join(list(self.masks))
        pruned, goal = n - int(kept.sum()), round(sparsity * n) if 0 <= sparsity <= 1 else -1
        if goal < pruned:
            raise ValueError(
                f"Pruner: sparsity must lie between the present {pruned / max(1, n):.4f} and 1, but got {sparsity}; "
                "what is pruned stays pruned."
            )
        w = self.into.join([leaf.detach() for leaf in self._leaves])
        if gradients is None:
            score, F = w.abs(), None
        else:
            if not isinstance(gradients, Tensor) or gradients.ndim != 2 or gradients.shape[-1] != n:
                shape = tuple(gradients.shape) if isinstance(gradients, Tensor) else type(gradients).__name__
                raise ValueError(f"Pruner: gradients must have shape (m, {n}), one a row, but got {shape}.")
            F = self.fisher(gradients * kept)
            inverse = F.inverse_diagonal()
            score = w.square() / (2 * inverse)
        # a stable sort, so that ties (in a layer of equal weights, say) fall the same way on every run
        order = torch.argsort(torch.where(kept, score, torch.inf), stable=True)[: goal - pruned]
        increase = None
        if F is not None:
            increase = float(score[order].sum())
            pull = torch.zeros_like(w)
            pull[order] = w[order] / inverse[order]
            w = w - F.solve(pull)
        kept[order] = False
        self.masks = self.into.split(kept)
        for leaf, part, mask in zip(self._leaves, self.into.split(w), self.masks, strict=True):
            leaf.copy_(torch.where(mask, part, 0))
        return PruneStep(len(order), goal / max(1, n), increase)

    @torch.no_grad()
    def apply(self) -> None:
        """Set the pruned weights to zero again, after anything that may have moved them."""
        for leaf, mask in zip(self._leaves, self.masks, strict=True):
            leaf.copy_(torch.where(mask, leaf, 0))

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Apply the masks after every step of an optimizer, so that retraining keeps what is pruned at zero.

        Args:
            optimizer: any; its momentum may still hold parts for pruned weights, which come to nothing.

        Returns:
            A handle whose remove() undoes this.
        """
        return optimizer.register_step_post_hook(lambda *_: self.apply())
