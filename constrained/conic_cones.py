"""The product of cones of a conic program, and the projection onto its dual."""

from __future__ import annotations

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
        kinds: list[Set | int] = [WholeSpace(), NonNegative(), *[SecondOrderCone() for _ in self.second_order]]
        kinds += [*self.semidefinite, DualCone(ExponentialCone())]
        kinds += [DualCone(PowerCone(v.new_tensor(self.power))) if self.power else WholeSpace()]
        parts = []
        for kind, part in zip(kinds, torch.split(v, list(self.sizes), -1), strict=True):
            if part.shape[-1]:
                parts.append(_project_triangle(part, kind) if isinstance(kind, int) else kind.project(part))
        return torch.cat(parts, -1) if parts else v


def _project_triangle(v: Tensor, k: int) -> Tensor:
    """The projection of scaled upper triangles of k x k matrices onto the semidefinite ones."""
    column, row = torch.tril_indices(k, k, device=v.device)  # the upper triangle by columns is the lower one by rows
    place = torch.empty(k, k, dtype=torch.int64, device=v.device)
    place[row, column] = place[column, row] = torch.arange(len(row), device=v.device)
    scale = torch.where(row == column, v.new_tensor(1), v.new_tensor(2).sqrt())
    matrix = (v / scale)[..., place]
    return PSDCone().project(matrix)[..., row, column] * scale
