"""The gradients of M-FAC as the rows of one tall-and-wide matrix, read by blocks of columns wherever they lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .dense import by_columns
from .matrices import dense_product as product

__all__ = ["Rows", "product", "solve_factored"]


_STRIP = 4096, 32  # columns, rows: how far products are summed in float32 before float64 takes over


def solve_factored(L: Tensor, t: Tensor) -> Tensor:
    """(L L')^-1 t for t of shape (*sides, *batch, m) and L of shape (*batch, m, m)."""
    return by_columns(lambda columns: torch.cholesky_solve(columns, L), t, L.shape[:-2])


@dataclass(frozen=True)
class Rows:
    """G of shape (*batch, m, n) as pages of rows, with the products that M-FAC needs.

    Args:
        pages: tensors (*batch, m_i, n).
        dtype: of the vectors; products of half precision are computed in float32.
        device: of the vectors; blocks of pages that lie elsewhere are moved.
        width: columns of a block.
    """

    pages: tuple[Tensor, ...]
    dtype: torch.dtype
    device: torch.device
    width: int

    @classmethod
    def of(cls, pages: list[Tensor], device: torch.device | str | None, width: int | None, name: str) -> Rows:
        """Check the pages and choose the width."""
        if not pages:
            raise ValueError(f"MFAC: {name} must hold at least one page of gradients, but there is none.")
        for page in pages:
            if not isinstance(page, Tensor) or not page.is_floating_point():
                kind = page.dtype if isinstance(page, Tensor) else type(page).__name__
                raise TypeError(f"MFAC: {name} must be floating torch.Tensors (*batch, m, n), but got {kind}.")
            if page.ndim < 2:
                raise ValueError(
                    f"MFAC: {name} must have shape (*batch, m, n), one gradient a row, but got {tuple(page.shape)}; "
                    "pass gradient[None] for a single one."
                )
            first = pages[0]
            same = page.shape[:-2] == first.shape[:-2] and page.shape[-1] == first.shape[-1]
            if not same or page.dtype != first.dtype or page.device != first.device:
                raise ValueError(
                    f"MFAC: all {name} must agree in all but the number of rows, but got {tuple(first.shape)} of "
                    f"{first.dtype} on {first.device} and {tuple(page.shape)} of {page.dtype} on {page.device}."
                )
        home = pages[0].device if device is None else torch.empty(0, device=device).device
        m = sum(page.shape[-2] for page in pages)
        if m == 0:
            raise ValueError(
                f"MFAC: {name} has shape {tuple(pages[0].shape)}: no gradient, so that their mean is undefined; "
                "pass at least one row, or start empty with MFAC.window(m, n)."
            )
        if width is not None and width < 1:
            raise ValueError(f"MFAC: width must be at least 1 column, but got {width}.")
        entries = 2**18 if home.type == "cpu" else 2**24  # a float64 block that stays in the processor's cache
        systems = pages[0].shape[:-2].numel() * m
        chosen = max(64, entries // max(1, systems)) if width is None else width
        return cls(tuple(page.detach() for page in pages), pages[0].dtype, home, chosen)

    @property
    def batch(self) -> torch.Size:
        """The batch of matrices."""
        return self.pages[0].shape[:-2]

    @property
    def m(self) -> int:
        """The number of gradients."""
        return sum(page.shape[-2] for page in self.pages)

    @property
    def n(self) -> int:
        """Their dimension."""
        return self.pages[0].shape[-1]

    @property
    def working(self) -> torch.dtype:
        """The dtype of products."""
        return self.dtype if self.dtype in (torch.float32, torch.float64) else torch.float32

    @property
    def resident(self) -> bool:
        """Whether G is one tensor on the device of the vectors."""
        return len(self.pages) == 1 and self.pages[0].device == self.device

    def blocks(self, dtype: torch.dtype, width: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """The columns of G block by block, on the device in `dtype`."""
        width = self.width if width is None else width
        for start in range(0, self.n, width):
            columns = slice(start, min(start + width, self.n))
            parts = [page[..., columns].to(self.device, dtype, non_blocking=True) for page in self.pages]
            yield columns, parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)

    def gram(self) -> Tensor:
        """G G' in float64, of shape (*batch, m, m)."""
        K = torch.zeros(*self.batch, self.m, self.m, dtype=torch.float64, device=self.device)
        for _, block in self.blocks(torch.float64):
            K += block @ block.mT
        return K

    def times(self, v: Tensor) -> Tensor:
        """G v for v of shape (*sides, *batch, n): (*sides, *batch, m), summed over blocks in float64."""
        t = torch.zeros(*v.shape[:-1], self.m, dtype=torch.float64, device=self.device)
        v = v.to(self.working)
        width = self.n if self.working == torch.float64 else _STRIP[0]
        for columns, block in self.blocks(self.working, max(width, 1) if self._direct else None):
            t = t + product(block, v[..., columns])
        return t

    def times64(self, g: Tensor) -> Tensor:
        """G g with float64 products for one g of shape (*batch, n): a row of the Gram matrix."""
        t = torch.zeros(*self.batch, self.m, dtype=torch.float64, device=self.device)
        for columns, block in self.blocks(torch.float64):
            t += product(block, g[..., columns].double())
        return t

    def combine(self, t: Tensor) -> Tensor:
        """G' t for t of shape (*sides, *batch, m): (*sides, *batch, n), summed over strips of rows in float64."""
        if self._direct:
            return self._strips(self.pages[0], t)
        parts = [self._strips(block, t) for _, block in self.blocks(self.working)]
        return torch.cat(parts, dim=-1) if parts else t.new_zeros(*t.shape[:-1], 0)

    def _strips(self, block: Tensor, t: Tensor) -> Tensor:
        if self.working == torch.float64:
            return product(block.mT, t)
        # the weights of nearly parallel gradients cancel: a long float32 sum would keep the rounding of its large parts
        out = torch.zeros(*t.shape[:-1], block.shape[-1], dtype=torch.float64, device=self.device)
        for start in range(0, self.m, _STRIP[1]):
            rows = slice(start, start + _STRIP[1])
            out += product(block[..., rows, :].mT, t[..., rows].to(self.working))
        return out

    def whiten(self, L: Tensor) -> tuple[Rows, Tensor]:
        """V = L^-1 G, kept where the pages lie, and 1 - sum of its squares per column, in float64."""
        V = torch.empty(*self.batch, self.m, self.n, dtype=self.working, device=self.pages[0].device)
        parts = []
        for columns, block in self.blocks(torch.float64):
            whitened = torch.linalg.solve_triangular(L, block, upper=False)
            V[..., columns] = whitened.to(V.device, V.dtype)
            parts.append(1 - whitened.square().sum(-2))
        diagonal = torch.cat(parts, -1) if parts else L.new_zeros(*self.batch, 0)
        return replace(self, pages=(V,)), diagonal

    def complement(self, L: Tensor) -> Tensor:
        """1 - V[:, p]'V[:, p] for every column p of V = L^-1 G, in float64, without keeping V."""
        parts = [
            1 - torch.linalg.solve_triangular(L, block, upper=False).square().sum(-2)
            for _, block in self.blocks(torch.float64)
        ]
        return torch.cat(parts, -1) if parts else L.new_zeros(*self.batch, 0)

    def columns(self, index: Tensor) -> Tensor:
        """The columns of G with these numbers, float64, of shape (*batch, m, k)."""
        parts = [page[..., index.to(page.device)].to(self.device, torch.float64) for page in self.pages]
        return torch.cat(parts, dim=-2)

    def copy(self, rows: Tensor | None = None) -> Rows:
        """The same with rows of its own."""
        return replace(self, pages=((self.pages[0] if rows is None else rows).clone(),))

    def replace(self, i: int, g: Tensor) -> None:
        """Write g over row i, in place."""
        self.pages[0][..., i, :] = g

    @property
    def _direct(self) -> bool:
        return self.resident and self.pages[0].dtype == self.working
