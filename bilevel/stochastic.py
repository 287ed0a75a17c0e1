"""Minibatches for both levels: the same k gives the same samples, so that a resumed run sees what it would have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sized
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optree
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, SequentialSampler, default_collate

from .oracle import Batch

__all__ = ["Batches", "Draw", "FromLoader", "Source"]


@dataclass(frozen=True)
class Draw(Batch):
    """One step's samples, and where they come from.

    Attributes:
        upper: third argument of `upper`.
        lower: third argument of `lower`.
        upper_block: key of the upper samples, which is the same whenever they are; None where they have none.
        lower_block: key of the lower samples.
        samples: (upper, lower) samples.
        position: k.
        source: draws more of the same step, and everything at once.
        complete: whether these are all samples, so that nothing is random.
    """

    upper_block: int | None = None
    lower_block: int | None = None
    samples: tuple[int, int] = (0, 0)
    position: int = 0
    source: Source | None = field(default=None, repr=False)
    complete: bool = False

    def other(self, i: int) -> Draw:
        """A further draw of the same step, independent of this one.

        Args:
            i: which, from 1.

        Returns:
            The draw.

        Raises:
            ValueError: if there is no source to draw from.
        """
        if self.source is None:
            raise ValueError("Draw: no source to draw further samples from; pass data=Batches(...) or FromLoader(...).")
        return self.source.draw(self.position, i)


class Source(ABC):
    """Samples by position: call it with k, the outer step."""

    @abstractmethod
    def draw(self, k: int, i: int = 0) -> Draw:
        """The i-th independent draw of step k, always the same one."""

    @abstractmethod
    def whole(self) -> Draw | None:
        """All samples as one draw, or None where they are not at hand."""

    @property
    def origin(self) -> Source:
        """The source that the samples come from, below those that map its draws."""
        return self

    def __call__(self, k: int) -> Draw:
        """The first draw of step k."""
        return self.draw(k)

    def __len__(self) -> int:
        """How many steps see as many samples as there are."""
        raise TypeError(f"{type(self).__name__} does not know its length.")


class _Samples:
    """Samples of one level, cut once into blocks by a seed."""

    def __init__(self, values: Any, batch_size: int | None, seed: int, name: str) -> None:
        self.values = values
        if isinstance(values, Dataset):
            if not isinstance(values, Sized):
                raise TypeError(f"Batches: {name} has no length; wrap it in a DataLoader and pass FromLoader(loader).")
            self.size = len(values)
        else:
            sizes = {len(leaf) for leaf in optree.tree_leaves(values) if isinstance(leaf, Tensor)}
            if len(sizes) != 1:
                raise ValueError(
                    f"Batches: all tensors of {name} must share their first dimension, the samples, but they have "
                    f"{sorted(sizes)}."
                )
            self.size = sizes.pop()
        if batch_size is not None and not (isinstance(batch_size, int) and batch_size >= 1):
            raise ValueError(f"Batches: a batch size must be a positive integer or None for all, not {batch_size!r}.")
        order = torch.from_numpy(np.random.default_rng([seed, 0]).permutation(self.size))
        self.blocks = torch.split(order, self.size if batch_size is None else batch_size)
        self.ends = np.cumsum([len(block) for block in self.blocks])

    def take(self, indices: Tensor) -> Any:
        if isinstance(self.values, Dataset):
            return default_collate([self.values[int(i)] for i in indices])
        return optree.tree_map(lambda leaf: leaf[indices.to(leaf.device)], self.values)

    def pick(self, rng: np.random.Generator) -> int:
        # blocks in proportion to their sizes: the mean over draws of a block's mean is the mean over all samples
        return int(np.searchsorted(self.ends, rng.integers(self.size), side="right"))


class Batches(Source):
    """Minibatches from tensors or datasets, cut once into fixed blocks; step k draws one block for each level.

    A block is drawn with probability proportional to its size, so a mean over its samples is an unbiased estimate of
    the mean over all. Blocks have fixed keys, which estimators with memories (SAGA) go by. To see sample indices in
    the objectives, make `torch.arange(n)` one of the tensors.

    Args:
        lower: a pytree of tensors whose first dimension counts the samples, or a map-style Dataset.
        upper: likewise; None for the lower level's samples, drawn independently.
        batch_size: samples of a lower block; None for all of them.
        upper_batch_size: likewise; 0 for the lower level's batch size.
        seed: of the blocks and the draws.

    Raises:
        ValueError: for tensors of different lengths, or a batch size that is no positive integer.

    Example:
        >>> batches = Batches(torch.arange(6.0), torch.arange(4.0), batch_size=2, seed=1)
        >>> batches(3).lower.shape, bool((batches(3).lower == batches(3).lower).all()), len(batches)
        (torch.Size([2]), True, 3)
    """

    def __init__(
        self, lower: Any, upper: Any = None, *, batch_size: int | None, upper_batch_size: int | None = 0, seed: int = 0
    ) -> None:
        self.seed = seed
        self.lower = _Samples(lower, batch_size, seed, "lower")
        size = batch_size if upper_batch_size == 0 else upper_batch_size
        self.upper = _Samples(lower if upper is None else upper, size, seed, "upper")

    def draw(self, k: int, i: int = 0) -> Draw:
        """The i-th independent draw of step k.

        Args:
            k: outer step.
            i: which draw of that step.

        Returns:
            The draw.
        """
        rng = np.random.default_rng([self.seed, 1, k, i])
        return self._at(self.upper.pick(rng), self.lower.pick(rng), k)

    def block(self, upper: int, lower: int) -> Draw:
        """The samples of two given blocks.

        Args:
            upper: key of the upper block.
            lower: key of the lower block.

        Returns:
            The draw.
        """
        return self._at(upper, lower, 0)

    def whole(self) -> Draw:
        """All samples of both levels, as one draw."""
        n, m = self.upper.size, self.lower.size
        upper, lower = self.upper.take(torch.arange(n)), self.lower.take(torch.arange(m))
        return Draw(upper, lower, samples=(n, m), source=self, complete=True)

    def __len__(self) -> int:
        """Draws in which as many samples are seen as there are, of the level with more blocks."""
        return max(len(self.upper.blocks), len(self.lower.blocks))

    def _at(self, upper: int, lower: int, k: int) -> Draw:
        i, j = self.upper.blocks[upper], self.lower.blocks[lower]
        return Draw(
            upper=self.upper.take(i),
            lower=self.lower.take(j),
            upper_block=upper,
            lower_block=lower,
            samples=(len(i), len(j)),
            position=k,
            source=self,
            complete=len(self) == 1,
        )


class FromLoader(Source):
    """Minibatches from ordinary DataLoaders, with a position that can be found again.

    Step k takes the loader's batch number k, epochs following one another. A run that resumes (or goes back) at k
    starts the epoch of k anew and skips to it, which gives the same batches when the loader is sequential, or shuffles
    by a `generator` of its own (seeded here at each epoch's start), or has a sampler with `set_epoch`.

    Args:
        lower: loader of the lower level's batches.
        upper: of the upper level's; None for the lower batches at both levels.
        draws: independent draws a step: 1, or what StocBiO, SRBA and MRBO ask for.
        seed: of the epochs' shuffles.

    Raises:
        ValueError: when a position is asked for that the loader's sampler cannot find again.

    Example:
        >>> loader = DataLoader(torch.arange(4.0), batch_size=2)
        >>> data = FromLoader(loader)
        >>> data(1).lower, data(2).lower
        (tensor([2., 3.]), tensor([0., 1.]))
    """

    def __init__(self, lower: DataLoader[Any], upper: DataLoader[Any] | None = None, draws: int = 1, seed: int = 0):
        if draws < 1:
            raise ValueError(f"FromLoader: draws must be at least 1, but got {draws}.")
        self.draws = draws
        self.lower = _Position(lower, seed, "lower")
        self.upper = None if upper is None else _Position(upper, seed + 1, "upper")

    def draw(self, k: int, i: int = 0) -> Draw:
        """The i-th draw of step k.

        Args:
            k: outer step.
            i: which draw of that step, below `draws`.

        Returns:
            The draw.

        Raises:
            ValueError: if the step has fewer draws, or the loader cannot find the position.
        """
        if i >= self.draws:
            raise ValueError(
                f"FromLoader: draw {i + 1} of step {k} was asked for, but a step has {self.draws}; pass draws={i + 1}."
            )
        lower = self.lower.at(k * self.draws + i)
        upper = lower if self.upper is None else self.upper.at(k * self.draws + i)
        return Draw(upper, lower, samples=(_count(upper), _count(lower)), position=k, source=self)

    def whole(self) -> None:
        """None: a loader's samples are not at hand all at once; pass `held=` for the certificate."""
        return

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.lower.loader)


class _Position:
    """A loader that is asked by position."""

    def __init__(self, loader: DataLoader[Any], seed: int, name: str) -> None:
        self.loader, self.seed, self.name = loader, seed, name
        self.next = 0
        self.recent: dict[int, Any] = {}
        self.stream: Iterator[Any] | None = None

    def at(self, k: int) -> Any:
        if k in self.recent:
            return self.recent[k]
        epoch, offset = divmod(k, len(self.loader))
        if self.stream is None or k != self.next:
            self._check(k)
        if self.stream is None or k != self.next or offset == 0:
            self._open(epoch)
            self.next = k - offset
        while self.next <= k:
            assert self.stream is not None
            try:
                value = next(self.stream)
            except StopIteration:
                raise ValueError(
                    f"FromLoader: the {self.name} loader ended at batch {self.next % len(self.loader)} of an epoch of "
                    f"{len(self.loader)}; its sampler yields fewer batches than len(loader) says."
                ) from None
            self.next += 1
        while len(self.recent) >= 8:  # a step's draws, and the last step's, may be asked for twice
            self.recent.pop(next(iter(self.recent)))
        self.recent[k] = value
        return value

    def _open(self, epoch: int) -> None:
        sampler: Any = self.loader.sampler
        if self.loader.generator is not None:
            self.loader.generator.manual_seed(self.seed * 1_000_003 + epoch)
        if hasattr(sampler, "set_epoch"):  # torch's own protocol for distributed samplers
            sampler.set_epoch(epoch)
        self.stream = iter(self.loader)

    def _check(self, k: int) -> None:
        sampler = self.loader.sampler
        known = isinstance(sampler, SequentialSampler) or hasattr(sampler, "set_epoch")
        if k and not known and self.loader.generator is None:
            raise ValueError(
                f"FromLoader: batch {k} of the {self.name} loader was asked for after batch {self.next - 1}, but its "
                f"{type(sampler).__name__} draws from the global generator and has lost its place; build the "
                "DataLoader with generator=torch.Generator()."
            )


def _count(values: Any) -> int:
    leaves = [leaf for leaf in optree.tree_leaves(values) if isinstance(leaf, Tensor) and leaf.ndim]
    return len(leaves[0]) if leaves else 1
