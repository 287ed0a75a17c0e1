"""Samples of many lower problems of one kind: a few of them and a few samples of each at a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optree
import torch
from torch import Tensor

from .stochastic import Draw, Source

__all__ = ["BlockBatches", "BlockDraw"]


@dataclass(frozen=True)
class BlockDraw(Draw):
    """Samples of some of the blocks.

    Attributes:
        blocks: which, sorted.
        count: how many there are.
    """

    blocks: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    count: int = 0


class BlockBatches(Source):
    """Samples of many lower problems: step k draws some blocks, and some samples of each.

    The objectives get tensors of shape (blocks, samples, ...) and the matching rows of y, and must return the MEAN
    over the blocks at hand, at both levels.

    Args:
        lower: a pytree of tensors of shape (m, n, ...): n samples of each of m blocks.
        upper: likewise, with the same m; None for the lower level's samples, drawn independently.
        blocks: how many blocks a step draws.
        batch_size: how many samples of each.
        seed: of the draws.

    Raises:
        ValueError: if the tensors do not share m, or more is to be drawn than there is.

    Example:
        >>> batches = BlockBatches(torch.arange(12.0).reshape(4, 3), blocks=2, batch_size=1)
        >>> batches(0).blocks.shape, batches(0).lower.shape
        (torch.Size([2]), torch.Size([2, 1]))
    """

    def __init__(self, lower: Any, upper: Any = None, *, blocks: int, batch_size: int, seed: int = 0) -> None:
        self.lower, self.upper = lower, lower if upper is None else upper
        self.blocks, self.batch_size, self.seed = blocks, batch_size, seed
        leaves: list[Tensor] = [*optree.tree_leaves(self.lower), *optree.tree_leaves(self.upper)]
        shapes = {tuple(leaf.shape[:1]) for leaf in leaves}
        if len(shapes) != 1:
            raise ValueError(f"BlockBatches: all tensors must share their first dimension, the blocks, not {shapes}.")
        self.count: int = leaves[0].shape[0]
        if not 1 <= blocks <= self.count:
            raise ValueError(f"BlockBatches: blocks must be between 1 and {self.count}, but got {blocks}.")
        least = min(leaf.shape[1] for leaf in leaves)
        if not 1 <= batch_size <= least:
            raise ValueError(f"BlockBatches: batch_size must be between 1 and {least}, but got {batch_size}.")

    def draw(self, k: int, i: int = 0) -> BlockDraw:
        """The i-th independent draw of step k.

        Args:
            k: outer step.
            i: which draw of that step.

        Returns:
            The draw.
        """
        rng = np.random.default_rng([self.seed, k, i])
        blocks = torch.from_numpy(np.sort(rng.choice(self.count, self.blocks, replace=False)))
        size = self.blocks * self.batch_size
        upper, lower = self._take(self.upper, blocks, rng), self._take(self.lower, blocks, rng)
        return BlockDraw(
            upper, lower, samples=(size, size), position=k, source=self, blocks=blocks, count=self.count
        )  # fmt: skip

    def whole(self) -> BlockDraw:
        """All samples of all blocks."""
        sizes = [int(np.prod(optree.tree_leaves(part)[0].shape[:2])) for part in (self.upper, self.lower)]
        return BlockDraw(
            self.upper, self.lower, samples=(sizes[0], sizes[1]), source=self, complete=True,
            blocks=torch.arange(self.count), count=self.count,
        )  # fmt: skip

    def __len__(self) -> int:
        """Draws in which as many blocks are seen as there are."""
        return -(-self.count // self.blocks)

    def _take(self, values: Any, blocks: Tensor, rng: np.random.Generator) -> Any:
        n = optree.tree_leaves(values)[0].shape[1]
        rows = torch.from_numpy(rng.permuted(np.tile(np.arange(n), (len(blocks), 1)), axis=1)[:, : self.batch_size])
        return optree.tree_map(lambda leaf: leaf[blocks[:, None].to(leaf.device), rows.to(leaf.device)], values)
