"""The block-diagonal M-FAC: one small empirical Fisher matrix for each block of the parameter vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .mfac import MFAC, DampedFisher

__all__ = ["BlockMFAC"]


@dataclass(frozen=True)
class _Group:
    """Consecutive blocks of one size, which are one batch of systems."""

    start: int
    size: int
    count: int
    fisher: MFAC

    @property
    def columns(self) -> slice:
        return slice(self.start, self.start + self.size * self.count)

    def split(self, v: Tensor) -> Tensor:
        """The group's part of v (..., n), of shape (..., count, size)."""
        return v[..., self.columns].reshape(*v.shape[:-1], self.count, self.size)


class BlockMFAC(DampedFisher):
    """F = damping I + the diagonal blocks of (1/m) sum_i g_i g_i', as an operator that knows its inverse.

    Each block is an MFAC of its own columns; blocks of one size that follow each other are one batch. Against the whole
    F, couplings between blocks are lost; what remains is inverted exactly, and m gradients say more about a block of
    n_b << m parameters than about all n.

    Cost: as MFAC for the same m and n, plus m^3 / 3 and m^2 of memory for each block. So blocks below m columns cost
    more than they need.

    Args:
        gradients: one a row, (m, n) or (*batch, m, n); views of it are kept, not copies.
        blocks: size of the blocks, the last one holding what remains; or the sizes themselves, which add up to n (such
            as the numbers of parameters of a network's tensors).
        damping: see MFAC.

    Attributes:
        groups: the blocks, in order.

    Raises:
        TypeError: if gradients is no floating tensor.
        ValueError: if the sizes are not positive or do not add up to n; and as for MFAC.

    Reference:
        Frantar, Kurtic & Alistarh 2021, M-FAC, section 3.1.

    Example:
        >>> G = torch.tensor([[1.0, 1.0, 2.0], [0.0, 1.0, 0.0]])
        >>> BlockMFAC(G, blocks=2, damping=0.5).to_dense()
        tensor([[1.0000, 0.5000, 0.0000],
                [0.5000, 1.5000, 0.0000],
                [0.0000, 0.0000, 2.5000]])
    """

    def __init__(self, gradients: Tensor, blocks: int | Sequence[int], damping: float = 1e-5) -> None:
        if not isinstance(gradients, Tensor) or gradients.ndim < 2:
            kind = tuple(gradients.shape) if isinstance(gradients, Tensor) else type(gradients).__name__
            raise TypeError(f"BlockMFAC: gradients must be a floating torch.Tensor (*batch, m, n), but got {kind}.")
        n, batch = gradients.shape[-1], gradients.shape[:-2]
        super().__init__((*batch, n, n), gradients.dtype, gradients.device, damping)
        self.groups: list[_Group] = []
        start = 0
        for size, count in _runs(blocks, n):
            part = gradients[..., start : start + size * count].view(*gradients.shape[:-1], count, size).movedim(-2, -3)
            self.groups.append(_Group(start, size, count, MFAC(part, damping)))
            start += size * count
        self._block_of = torch.repeat_interleave(
            torch.tensor([size for group in self.groups for size in [group.size] * group.count], dtype=torch.int64)
        ).to(self.device)

    def _matvec(self, v: Tensor) -> Tensor:
        return self._join([group.fisher._matvec(group.split(v)).flatten(-2) for group in self.groups], v)

    def _solve(self, v: Tensor) -> Tensor:
        return self._join([group.fisher._solve(group.split(v)).flatten(-2) for group in self.groups], v)

    def inverse_diagonal(self) -> Tensor:
        """The diagonal of F^-1, of shape (*batch, n)."""
        empty = torch.zeros(*self.batch_shape, 0, dtype=self.dtype, device=self.device)
        return self._join([group.fisher.inverse_diagonal().flatten(-2) for group in self.groups], empty)

    def _element(self, rows: Tensor, columns: Tensor) -> Tensor:
        out = torch.zeros(*self.batch_shape, len(rows), dtype=torch.float64, device=self.device)
        same = self._block_of[rows] == self._block_of[columns]
        for group in self.groups:
            here = (same & (rows >= group.start) & (rows < group.columns.stop)).nonzero()[:, 0]
            p, q = rows[here] - group.start, columns[here] - group.start
            for k in torch.unique(p // group.size).tolist():  # each block has a factor of its own
                inside = p // group.size == k
                elements = group.fisher._element(p[inside] % group.size, q[inside] % group.size)
                out[..., here[inside]] = elements[..., k, :]
        return out

    def _appendable(self) -> None:
        pass

    def _append(self, g: Tensor) -> None:
        for group in self.groups:
            group.fisher._append(group.split(g))

    def _join(self, parts: list[Tensor], like: Tensor) -> Tensor:
        return torch.cat(parts, dim=-1) if parts else like


def _runs(blocks: int | Sequence[int], n: int) -> list[tuple[int, int]]:
    """(size, count) of each run of equal sizes."""
    if isinstance(blocks, int):
        if blocks < 1:
            raise ValueError(f"BlockMFAC: blocks must be a size of at least 1, but got {blocks}.")
        whole, rest = divmod(n, blocks)
        return [run for run in ((blocks, whole), (rest, 1)) if run[0] and run[1]]
    sizes = list(blocks)
    if any(not isinstance(size, int) or size < 1 for size in sizes) or sum(sizes) != n:
        raise ValueError(
            f"BlockMFAC: blocks must be sizes of at least 1 that add up to the {n} columns of gradients, but got "
            f"{sizes[:8]}{' ...' if len(sizes) > 8 else ''} with the sum {sum(sizes)}."
        )
    runs: list[tuple[int, int]] = []
    for size in sizes:
        if runs and runs[-1][0] == size:
            runs[-1] = size, runs[-1][1] + 1
        else:
            runs.append((size, 1))
    return runs
