"""The product of cones of a conic program, and the projection onto its dual."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .cones import DualCone, NonNegative, SecondOrderCone
from .exponential_cone import ExponentialCone
from .power_cone import PowerCone
from .sets import Set, WholeSpace
from .spectral_sets import PSDCone

__all__ = ["ConicCones"]


@dataclass(frozen=True)
class ConicCones:
    """K = {0}^zero x R+^nonnegative x second-order, positive semidefinite, exponential and power cones.

    This is the order of SCS and Clarabel, and of `cvxpy`'s problem data. A semidefinite cone of k x k matrices takes
    k (k + 1) / 2 rows: the upper triangle by columns, entries off the diagonal times sqrt(2), so that inner products
    are those of matrices.

    Attributes:
        zero: rows of the zero cone.
        nonnegative: rows of the nonnegative orthant.
        second_order: the sizes of the second-order cones.
        semidefinite: the k of each semidefinite cone.
        exponential: how many exponential cones, of 3 rows each.
        power: the exponents of the power cones, of 3 rows each.
    """

    zero: int = 0
    nonnegative: int = 0
    second_order: tuple[int, ...] = ()
    semidefinite: tuple[int, ...] = ()
    exponential: int = 0
    power: tuple[float, ...] = ()

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The rows of each block, in order."""
        triangles = (k * (k + 1) // 2 for k in self.semidefinite)
        return (
            self.zero, self.nonnegative, *self.second_order, *triangles, 3 * self.exponential, 3 * len(self.power)
        )  # fmt: skip

    def project_dual(self, v: Tensor) -> Tensor:
        """The projection of v onto K*.

        Args:
            v: shape (*batch, m).

        Returns:
            A tensor of its shape.
        """
        parts = [
            _project_triangle(part, kind) if isinstance(kind, int) else kind.project(part)
            for kind, part in self._blocks(v)
        ]
        return torch.cat(parts, -1) if parts else v

    def dual_jacobian(self, v: Tensor) -> Tensor:
        """The derivative of the projection onto K*, one block a cone; at kinks as the sets choose it.

        Args:
            v: shape (*batch, m), detached.

        Returns:
            Shape (*batch, m, m).
        """
        out, start = v.new_zeros(*v.shape, v.shape[-1]), 0
        for kind, part in self._blocks(v):
            rows = slice(start, start + part.shape[-1])
            out[..., rows, rows] = (
                _triangle_jacobian(part, kind) if isinstance(kind, int) else kind.jacobian(part).to_dense()
            )
            start = rows.stop
        return out

    def _blocks(self, v: Tensor) -> Iterator[tuple[Set | int, Tensor]]:
        """The dual cones that have rows, an integer for semidefinite matrices of this order, with their parts of v."""
        kinds: list[Set | int] = [WholeSpace(), NonNegative(), *[SecondOrderCone() for _ in self.second_order]]
        kinds += [*self.semidefinite, DualCone(ExponentialCone())]
        kinds += [DualCone(PowerCone(v.new_tensor(self.power))) if self.power else WholeSpace()]
        for kind, part in zip(kinds, torch.split(v, list(self.sizes), -1), strict=True):
            if part.shape[-1]:
                yield kind, part


def _triangle_places(v: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows and columns of the entries of a scaled triangle, the entry at each place of the matrix, and the scales."""
    column, row = torch.tril_indices(k, k, device=v.device)  # the upper triangle by columns is the lower one by rows
    place = torch.empty(k, k, dtype=torch.int64, device=v.device)
    place[row, column] = place[column, row] = torch.arange(len(row), device=v.device)
    return row, column, place, torch.where(row == column, v.new_tensor(1), v.new_tensor(2).sqrt())


def _project_triangle(v: Tensor, k: int) -> Tensor:
    """The projection of scaled upper triangles of k x k matrices onto the semidefinite ones."""
    row, column, place, scale = _triangle_places(v, k)
    return PSDCone().project((v / scale)[..., place])[..., row, column] * scale


def _triangle_jacobian(v: Tensor, k: int) -> Tensor:
    """The derivative of that projection, of shape (*batch, rows, rows)."""
    row, column, place, scale = _triangle_places(v, k)
    D = PSDCone().jacobian((v / scale)[..., place])
    units = (torch.eye(v.shape[-1], dtype=v.dtype, device=v.device) / scale)[:, place].flatten(-2)
    sides = units.reshape(len(units), *(1,) * (v.ndim - 1), k * k).expand(len(units), *v.shape[:-1], k * k)
    moved: Tensor = (D @ sides).unflatten(-1, (k, k))
    return (moved[..., row, column] * scale).movedim(0, -1)
