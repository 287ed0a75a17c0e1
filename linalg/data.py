"""Operators of mini-batched data: the sum over batches, kept or read again at every product, with checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Protocol

import optree
import torch
from torch import Tensor

from .chunks import Blocks
from .isolation import RandomState
from .operator import LinearOperator
from .tree import Ravel

__all__ = ["BatchSum", "Part", "batch_size", "check_reduction"]


class Part(Protocol):
    """The operator of one batch, with its scalar and the scalar's gradient."""

    value: Tensor
    unused: list[str]

    @property
    def gradient(self) -> Tensor:
        """The gradient of the batch's scalar."""

    def _matvec(self, v: Tensor) -> Tensor: ...

    def _mark(self) -> Tensor:
        """A vector that belongs to this batch alone, such as its gradient."""

    def _share(self, blocks: tuple[Blocks, ...] | None) -> tuple[Blocks, ...]:
        """Use the Blocks of another batch's operator, and hand on those in use."""


def check_reduction(owner: str, reduction: str) -> None:
    """Refuse reductions that nobody defined."""
    if reduction not in ("sum", "mean"):
        raise ValueError(f'{owner}: reduction must be "sum" or "mean", but got {reduction!r}.')


def batch_size(_part: Any, batch: Any) -> int:
    """How many samples a batch has: the first dimension of its first tensor.

    Args:
        batch: pytree with a tensor whose first dimension is the samples.

    Returns:
        The number.

    Raises:
        ValueError: if the batch has no such tensor.
    """
    tensors = (leaf for leaf in optree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim)
    first = next(tensors, None)
    if first is None:
        raise ValueError(
            f'reduction="mean" weighs a batch by the first dimension of its first tensor, but {type(batch).__name__} '
            'holds none; use reduction="sum" and weigh in the loss.'
        )
    return len(first)


class BatchSum(LinearOperator):
    """The sum of the operators of batches, or their mean weighted by samples.

    Memory is that of one batch's operator at a time, made and dropped in turn at every product (a block of vectors
    reads the data once), unless all are kept. Data that are read again must be the same ones each time: two passes at
    construction must agree in length and, batch by batch, in the value and the gradient (a Fisher matrix: the outputs);
    every later pass must have as many batches. Evaluations replay the state of torch's generators that they had in the
    first pass; what the data's own iterator draws is left to it.

    Args:
        owner: who speaks in error messages.
        make: (batch, its index) -> its operator.
        data: iterable of batches.
        into: Ravel of the params.
        reduction: "sum", or "mean" for the operators' mean weighted by `weigh`.
        weigh: (operator, batch) -> samples.
        keep: hold every batch's operator, so that data are read once.

    Attributes:
        value: the reduced value, 0-d.
        gradient: the reduced gradient, (n,).
        count: the number of batches.
        unused: paths of the tensors of params that no batch depends on.
        blocks: the Blocks that all batches share.

    Raises:
        TypeError: if data is no iterable, or an iterator that can be read only once while it has to be read again.
        ValueError: if data is empty, shuffles, or changes length.
    """

    def __init__(
        self,
        owner: str,
        make: Callable[[Any, int], Any],
        data: Iterable[Any],
        into: Ravel,
        *,
        reduction: str = "sum",
        weigh: Callable[[Any, Any], int] = batch_size,
        keep: bool = False,
    ) -> None:
        check_reduction(owner, reduction)
        super().__init__((into.size, into.size), into.dtype, into.device, symmetric=True)
        self.owner, self.make, self.data, self.count = owner, make, data, 0
        self._mean, self._weigh, self._into = reduction == "mean", weigh, into
        self._kept: list[tuple[int, Any]] = []
        self._states: list[RandomState] = []
        self._check_data(keep)
        self.value, self.gradient = torch.zeros((), dtype=into.dtype, device=into.device), self._zeros()
        self._samples, prints = 0, []
        self.unused: list[str] = []
        self.blocks: tuple[Blocks, ...] | None = None
        for batch in data:
            state = RandomState.now(self.device)
            same = bool(self._states) and _equal(state, self._states[-1])
            self._states.append(self._states[-1] if same else state)  # a loss that draws nothing costs no memory
            part = make(batch, self.count)
            weight = weigh(part, batch) if self._mean else 1
            self.value, self.gradient = self.value + weight * part.value, self.gradient + weight * part.gradient
            self._samples, self.count = self._samples + weight, self.count + 1
            self.unused = [path for path in part.unused if self.count == 1 or path in self.unused]
            self.blocks = part._share(self.blocks)
            if keep:
                self._kept.append((weight, part))
            else:
                prints.append(self._print(part))
        if not self.count or not self._samples:
            raise ValueError(f"{owner}: data must give at least one batch with a sample, but it gave none.")
        self.value, self.gradient = self._reduce(self.value), self._reduce(self.gradient)
        if not keep:
            self._compare(prints)

    def _zeros(self) -> Tensor:
        return torch.zeros(self.shape[-1], dtype=self.dtype, device=self.device)

    def _reduce(self, total: Tensor) -> Tensor:
        return total / self._samples if self._mean else total

    def _check_data(self, keep: bool) -> None:
        kind = type(self.data).__name__
        if not isinstance(self.data, Iterable) or isinstance(self.data, Tensor | str):
            raise TypeError(f"{self.owner}: data must be an iterable of batches, but got {kind}; wrap it in a list.")
        if isinstance(self.data, Iterator) and not keep:
            raise TypeError(
                f"{self.owner}: data is a {kind}, which can be read only once, but every product reads it; pass a list "
                "or a DataLoader, or keep the graphs."
            )

    def _print(self, part: Part) -> Tensor:
        """A batch's value, the norm of its mark and its product with fixed signs: what two passes are held to."""
        mark = part._mark().double()
        flips = torch.randint(2, mark.shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8)
        return torch.stack([part.value.double(), mark.norm(), (mark * (2 * flips - 1).to(mark.device)).sum()])

    def _compare(self, prints: list[Tensor]) -> None:
        first, second = torch.stack(prints), torch.stack([self._print(part) for _, part in self._parts()])
        scale = torch.stack([first.abs(), second.abs()]).amax(0)
        scale = torch.cat([scale[:, :1], scale[:, 1:2].expand(-1, 2)], dim=1)
        same = (first - second).abs() <= torch.finfo(self.dtype).eps ** 0.5 * scale
        same |= (first == second) | (first.isnan() & second.isnan())
        wrong = (~same).any(1).nonzero()
        if len(wrong):
            raise ValueError(
                f"{self.owner}: two passes over data disagree, first at batch {int(wrong[0])}: the loader is shuffling "
                "or its samples are random, so that products would belong to different matrices; use shuffle=False "
                "and fixed augmentations, a list of batches, or keep the graphs, which reads data once."
            )

    def _parts(self) -> Iterator[tuple[int, Any]]:
        """(weight, operator) of every batch in turn."""
        if self._kept:
            yield from self._kept
            return
        seen = 0
        for index, batch in enumerate(self.data):
            seen = index + 1
            if seen > self.count:
                break
            part = self._states[index].run(partial(self.make, batch, index))
            part._share(self.blocks)
            yield self._weigh(part, batch) if self._mean else 1, part
        if seen != self.count:
            more = "more" if seen > self.count else f"{seen} batches"
            raise ValueError(
                f"{self.owner}: data gave {self.count} batches at first and {more} now: the loader changes length; fix "
                "its sampler, or pass a list of batches."
            )

    def _matvec(self, v: Tensor) -> Tensor:
        total, samples = torch.zeros_like(v), 0
        for weight, part in self._parts():
            total.add_(part._matvec(v), alpha=weight)
            samples += weight
        if samples != self._samples:
            raise ValueError(
                f"{self.owner}: data gave {self._samples} samples at first and {samples} now: the loader changes "
                "length; fix its sampler, or pass a list of batches."
            )
        return self._reduce(total)


def _equal(left: RandomState, right: RandomState) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.states, right.states, strict=True))
