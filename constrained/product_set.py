"""Products of sets, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nestopt.linalg import LinearOperator

from .sets import Set

__all__ = ["ProductSet"]


@dataclass(frozen=True, eq=False)
class ProductSet(Set):
    """{x: the i-th block of x is in the i-th set}, blocks following each other in the last dimension.

    Projection and Jacobian act on each block by itself: the cones of a conic program, say.

    Args:
        sets: sets of vectors.
        sizes: for each, how many entries its block has.

    Raises:
        TypeError: if an entry of sets is no Set of vectors, or a size no integer.
        ValueError: for another number of sizes than of sets, or a negative size.

    Example:
        >>> from nestopt.constrained import Box, Simplex
        >>> ProductSet([Simplex(), Box(0.0, 1.0)], [2, 1]).project(torch.tensor([1.0, 1.0, 3.0]))
        tensor([0.5000, 0.5000, 1.0000])
    """

    sets: Sequence[Set]
    sizes: Sequence[int]

    def __post_init__(self) -> None:
        for name in ("sets", "sizes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.sets) != len(self.sizes):
            raise ValueError(f"ProductSet: there are {len(self.sets)} sets, but {len(self.sizes)} sizes.")
        for i, (one, size) in enumerate(zip(self.sets, self.sizes, strict=True)):
            found: Any = one
            if not isinstance(found, Set) or found.space_dims != 1:
                raise TypeError(f"ProductSet: sets[{i}] must be a Set of vectors, but got {type(one).__name__}.")
            if not isinstance(size, int):
                raise TypeError(f"ProductSet: sizes[{i}] must be an integer, but got {type(size).__name__}.")
            if size < 0:
                raise ValueError(f"ProductSet: sizes[{i}] must be >= 0, but got {size}.")

    def _split(self, x: Tensor) -> Sequence[Tensor]:
        self._need_space(x)
        if x.shape[-1] != sum(self.sizes):
            raise ValueError(
                f"ProductSet: x must have shape (*batch, {sum(self.sizes)}), the sum of the sizes {self.sizes}, but it "
                f"has {tuple(x.shape)}."
            )
        return x.split(self.sizes, dim=-1) if self.sizes else []  # type: ignore[no-untyped-call]

    def _project(self, x: Tensor) -> Tensor:
        parts = [s._project(block) for s, block in zip(self.sets, self._split(x), strict=True)]
        return torch.cat(parts, dim=-1) if parts else x

    def _broken(self, x: Tensor) -> Tensor:
        parts = [s._broken(block) for s, block in zip(self.sets, self._split(x), strict=True)]
        return torch.cat(parts, dim=-1) if parts else x.isnan()

    def _jacobian(self, x: Tensor) -> LinearOperator:
        blocks = [s._jacobian(block) for s, block in zip(self.sets, self._split(x), strict=True)]
        return _Blocks(blocks, x)


class _Blocks(LinearOperator):
    """Symmetric operators along the diagonal."""

    def __init__(self, blocks: list[LinearOperator], x: Tensor) -> None:
        super().__init__((*x.shape, x.shape[-1]), x.dtype, x.device, symmetric=True)
        self.blocks, self.sizes = blocks, [block.shape[-1] for block in blocks]

    def _matvec(self, v: Tensor) -> Tensor:
        if not self.blocks:
            return v
        parts = v.split(self.sizes, dim=-1)  # type: ignore[no-untyped-call]
        return torch.cat([block._matvec(part) for block, part in zip(self.blocks, parts, strict=True)], dim=-1)
