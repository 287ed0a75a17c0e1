"""The inverse BFGS matrix of a few pairs (step, change of the gradient), in its compact form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Pairs"]


@dataclass(frozen=True)
class Pairs:
    """The last steps s and gradient changes t of a run, oldest first, with their products.

    Attributes:
        steps: S, of shape (k, n).
        changes: T, likewise.
        cross: S T'.
        gram: T T'.
    """

    steps: Tensor
    changes: Tensor
    cross: Tensor
    gram: Tensor

    @classmethod
    def of(cls, steps: Tensor, changes: Tensor) -> Pairs:
        """The pairs with their products.

        Args:
            steps: S.
            changes: T.

        Returns:
            The pairs.
        """
        return cls(steps, changes, steps @ changes.T, changes @ changes.T)

    def append(self, step: Tensor, change: Tensor, limit: int) -> Pairs:
        """With one pair more, and without the oldest where there are too many.

        Args:
            step: s.
            change: t, with s't > 0.
            limit: pairs kept.

        Returns:
            The pairs.
        """
        drop = max(len(self.steps) + 1 - limit, 0)
        steps, changes = torch.cat([self.steps[drop:], step[None]]), torch.cat([self.changes[drop:], change[None]])
        old, row = self.cross[drop:, drop:], step @ changes.T
        cross = torch.cat([torch.cat([old, (steps[:-1] @ change)[:, None]], 1), row[None]])
        new = changes @ change
        gram = torch.cat([torch.cat([self.gram[drop:, drop:], new[:-1, None]], 1), new[None]])
        return Pairs(steps, changes, cross, gram)

    def direction(self, gradient: Tensor) -> Tensor:
        """-H g, with the inverse BFGS matrix H of the pairs (Byrd, Nocedal & Schnabel 1994, equation 2.6).

        Args:
            gradient: g.

        Returns:
            The direction; -g where there are no pairs.
        """
        if not len(self.steps):
            return -gradient
        gamma = self.cross[-1, -1] / self.gram[-1, -1]
        upper = self.cross.triu()
        u = torch.linalg.solve_triangular(upper, (self.steps @ gradient)[:, None], upper=True)
        right = self.cross.diagonal()[:, None] * u + gamma * (self.gram @ u - (self.changes @ gradient)[:, None])
        w = torch.linalg.solve_triangular(upper.T, right, upper=False)
        d: Tensor = -gamma * gradient - w[:, 0] @ self.steps + gamma * (u[:, 0] @ self.changes)
        return d
