"""How the single-loop methods estimate their directions from minibatches: they differ in this, not in the loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .stochastic import Batches, Draw

__all__ = ["SAGA", "SPIDER", "STORM", "Estimator", "Minibatch", "Pieces"]


class Pieces(NamedTuple):
    """What the directions are made of; the first three come from lower samples, the others from upper ones.

    Attributes:
        lower_y: f_y.
        hessian_v: f_yy v.
        cross_v: f_xy v.
        upper_x: F_x.
        upper_y: F_y.
    """

    lower_y: Tensor
    hessian_v: Tensor
    cross_v: Tensor
    upper_x: Tensor
    upper_y: Tensor

    def map(self, function: Callable[..., Tensor], *others: Pieces) -> Pieces:
        """The function of each piece and the others' like it."""
        return Pieces(*(function(*parts) for parts in zip(self, *others, strict=True)))


Look = Callable[[Any], Pieces]  # a batch -> the pieces, at a fixed (x, y, v)


class Estimator(ABC):
    """An estimate of the five pieces from each step's samples, with a memory that the method's state keeps."""

    def start(self, here: Look, data: Any) -> tuple[Pieces, dict[str, Any]]:
        """The first estimate and memory.

        Args:
            here: pieces at the start.
            data: the first batch.

        Returns:
            Both.
        """
        return here(data), {}

    @abstractmethod
    def next(
        self, here: Look, before: Look, data: Any, last: Pieces, memory: dict[str, Any], k: int, size: float
    ) -> tuple[Pieces, dict[str, Any]]:
        """The estimate after a step.

        Args:
            here: pieces at the new point.
            before: pieces at the point before.
            data: the step's batch.
            last: the estimate before.
            memory: from the last call.
            k: the step.
            size: b L, the step size in y times the largest curvature of f_yy seen.

        Returns:
            The estimate and the memory.
        """


@dataclass(frozen=True)
class Minibatch(Estimator):
    """The pieces on the step's own samples."""

    def next(
        self, here: Look, before: Look, data: Any, last: Pieces, memory: dict[str, Any], k: int, size: float
    ) -> tuple[Pieces, dict[str, Any]]:
        """Those on the step's samples."""
        return here(data), memory


@dataclass(frozen=True)
class SAGA(Estimator):
    """Each block's last pieces are remembered: piece - remembered + mean of all remembered (Defazio et al. 2014).

    Needs blocks with keys, `Batches`. Memory: one vector of the pieces for every block. The start takes one pass. Over
    several processes (`Shards`) a row is that of the whole block, the same on all ranks.
    """

    def start(self, here: Look, data: Any) -> tuple[Pieces, dict[str, Any]]:
        """One pass over all blocks.

        Args:
            here: pieces at the start.
            data: the first batch.

        Returns:
            The full pieces, and the tables.
        """
        source, blocks = _batches(data, "SAGA memories")
        lower, upper = blocks.lower, blocks.upper
        rows = [here(source.block(min(i, len(upper.blocks) - 1), min(i, len(lower.blocks) - 1)))
                for i in range(max(len(lower.blocks), len(upper.blocks)))]  # fmt: skip
        low = torch.stack([torch.cat(row[:3]) for row in rows[: len(lower.blocks)]])
        high = torch.stack([torch.cat(row[3:]) for row in rows[: len(upper.blocks)]])
        memory = {"lower": low, "upper": high}
        for name, level, table in (("lower", lower, low), ("upper", upper, high)):
            weights = table.new_tensor([len(block) / level.size for block in level.blocks])
            memory[f"{name}_weights"], memory[f"{name}_mean"] = weights, weights @ table
        return _split(memory["lower_mean"], memory["upper_mean"], rows[0]), memory

    def next(
        self, here: Look, before: Look, data: Any, last: Pieces, memory: dict[str, Any], k: int, size: float
    ) -> tuple[Pieces, dict[str, Any]]:
        """The corrected pieces; the blocks' rows and the means are brought up to date."""
        _batches(data, "SAGA memories")
        pieces, new, estimate = here(data), dict(memory), {}
        for name, block, row in (
            ("lower", data.lower_block, torch.cat(pieces[:3])), ("upper", data.upper_block, torch.cat(pieces[3:])),
        ):  # fmt: skip
            table, mean = memory[name].clone(), memory[f"{name}_mean"]
            change = row - table[block]
            estimate[name] = change + mean
            table[block] = row
            new[name], new[f"{name}_mean"] = table, mean + memory[f"{name}_weights"][block] * change
        return _split(estimate["lower"], estimate["upper"], pieces), new


@dataclass(frozen=True)
class SPIDER(Estimator):
    """A full pass every so many steps; between, last + piece here - piece before on the same samples.

    Args:
        every: steps between two full passes; None for as many as see all samples once.

    Reference:
        Fang et al. 2018; Dagreou et al. 2023 (SRBA).
    """

    every: int | None = None

    def start(self, here: Look, data: Any) -> tuple[Pieces, dict[str, Any]]:
        """A full pass.

        Args:
            here: pieces at the start.
            data: the first batch.

        Returns:
            The full pieces, and no memory.
        """
        return here(_batches(data, "SPIDER")[0].whole()), {}

    def next(
        self, here: Look, before: Look, data: Any, last: Pieces, memory: dict[str, Any], k: int, size: float
    ) -> tuple[Pieces, dict[str, Any]]:
        """The full pieces at a restart, the recursion between."""
        source, _ = _batches(data, "SPIDER")
        if k % (self.every or len(source)) == 0:
            return here(source.whole()), memory
        return last.map(lambda e, new, old: e + new - old, here(data), before(data)), memory


@dataclass(frozen=True)
class STORM(Estimator):
    """Momentum with a correction: piece here + (1 - a)(last - piece before), the same samples at both points.

    The estimate's error e obeys e+ = (1 - a)(e + d) + a n: n is the noise of a batch, d that of a difference of two
    points. A step moves by b |e|, so that |d|^2 <= (b L |e|)^2 / 4 with L above the batches' curvatures, and e's
    variance settles below a |n|^2 / (2 - (b L)^2 / (4 a)): it is bounded if a follows the step's square, and vanishes
    with it.

    Args:
        momentum: k -> a in (0, 1], such as `lambda k: 0.1`; None for (b L / 2)^2, with which steps that fall like
            k^(-1/3) give the paper's a ~ k^(-2/3), but at least 1 / (k + 1), so that the first batch's noise dies out
            under small constant steps as well, and at most 1.

    Reference:
        Cutkosky & Orabona 2019; Yang, Ji & Liang 2021 (MRBO).

    Example:
        >>> STORM().weight(99, 0.5), STORM().weight(99, 0.01)
        (0.0625, 0.01)
    """

    momentum: Callable[[int], float] | None = None

    def weight(self, k: int, size: float) -> float:
        """The momentum's a.

        Args:
            k: the step.
            size: b L.

        Returns:
            It.
        """
        if self.momentum is not None:
            return float(self.momentum(k))
        return min(1.0, max(size**2 / 4, 1 / (k + 1)))

    def next(
        self, here: Look, before: Look, data: Any, last: Pieces, memory: dict[str, Any], k: int, size: float
    ) -> tuple[Pieces, dict[str, Any]]:
        """The corrected momentum."""
        a = self.weight(k, size)
        return here(data).map(lambda new, e, old: new + (1 - a) * (e - old), last, before(data)), memory


def _batches(data: Any, who: str) -> tuple[Any, Batches]:
    """Where the samples come from, and the blocks underneath."""
    source = data.source if isinstance(data, Draw) else None
    blocks = None if source is None else source.origin
    if not isinstance(blocks, Batches):
        raise ValueError(
            f"{who} need samples with keys and all of them at hand, but the data are {type(data).__name__}; pass "
            "data=bilevel.Batches(...), or use SOBA(), AmIGO(), StocBiO(), MRBO() or TTSA()."
        )
    return source, blocks


def _split(lower: Tensor, upper: Tensor, like: Pieces) -> Pieces:
    sizes = [len(piece) for piece in like]
    return Pieces(*torch.split(lower, sizes[:3]), *torch.split(upper, sizes[3:]))
