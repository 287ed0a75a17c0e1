"""Convex cones with projections in closed form, and their duals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nestopt.linalg import LinearOperator

from .sets import Set, kept_nan
from .structured import DiagonalPlusLowRank

__all__ = ["DualCone", "NonNegative", "SecondOrderCone"]


@dataclass(frozen=True)
class NonNegative(Set):
    """{x: x >= 0}, elementwise; x may have any shape.

    The Jacobian is diagonal, 1 where x >= 0 and 0 elsewhere, so that a zero counts as within.

    Example:
        >>> NonNegative().project(torch.tensor([1.0, -1.0]))
        tensor([1., 0.])
    """

    def _project(self, x: Tensor) -> Tensor:
        return x.clamp_min(0)

    def _broken(self, x: Tensor) -> Tensor:
        return x.isnan()

    def _jacobian(self, x: Tensor) -> LinearOperator:
        return DiagonalPlusLowRank(kept_nan(x, x >= 0))


@dataclass(frozen=True)
class SecondOrderCone(Set):
    """{x = (t, z): |z|_2 <= t}: the bound t is the FIRST entry, as in cvxpy, SCS and Clarabel.

    P(x) is x where |z| <= t, 0 where |z| <= -t, and else (t + |z|)/2 (1, z / |z|). In the third case the Jacobian has
    the eigenvalues 1 along (1, z/|z|), 0 along (1, -z/|z|), and (1 + t/|z|)/2 on the rest; on the boundaries it is the
    one of the first two cases that the point belongs to: I, or 0.

    Example:
        >>> SecondOrderCone().project(torch.tensor([0.0, 3.0, 4.0]))
        tensor([2.5000, 1.5000, 2.0000])
    """

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """t, |z|, z/|z|, whether x is inside and whether in neither cone; made up where no derivative is wanted."""
        self._need_space(x)
        if x.shape[-1] == 0:
            raise ValueError("SecondOrderCone: x must have shape (*batch, n) with n >= 1: (t, z); it has no entries.")
        t, z = x[..., :1], x[..., 1:]
        if z.shape[-1] == 0:
            z = torch.zeros_like(t)
        largest = z.detach().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        size = largest * torch.linalg.vector_norm(z.detach() / largest, dim=-1, keepdim=True)
        inside = size <= t.detach()
        beside = ~(inside | (size <= -t.detach()))
        scaled = torch.where(beside & (size != 0), z / largest, 1.0)
        norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
        return t, largest * norm, scaled / norm, inside, beside

    def _project(self, x: Tensor) -> Tensor:
        t, size, w, inside, beside = self._split(x)
        half = (t + size) / 2
        moved = torch.cat([half, half * w[..., : x.shape[-1] - 1]], dim=-1)
        return torch.where(inside, x, torch.where(beside, moved, 0))

    def _jacobian(self, x: Tensor) -> LinearOperator:
        t, size, w, inside, beside = self._split(x)
        rest = torch.where(beside, (1 + t / size) / 2, inside.to(x.dtype))
        w = w[..., : x.shape[-1] - 1]
        one = torch.ones_like(t)
        rows = torch.stack([torch.cat([one, w], -1), torch.cat([one, -w], -1)], dim=-2) / 2**0.5
        weights = torch.where(beside, torch.cat([1 - rest, -rest], dim=-1), 0.0)
        rest = torch.where(x.isnan().any(-1, keepdim=True), torch.nan, rest)
        return DiagonalPlusLowRank(rest.expand_as(x), rows, weights)


@dataclass(frozen=True)
class DualCone(Set):
    """{y: y'x >= 0 for every x of a cone K}.

    By Moreau's decomposition the projection is y + P_K(-y), and the Jacobian I - D_K(-y).

    Args:
        cone: a closed convex cone; that it is one cannot be checked.

    Raises:
        TypeError: if cone is not a Set.

    Reference:
        Moreau 1962.

    Example:
        >>> DualCone(NonNegative()).project(torch.tensor([1.0, -1.0]))
        tensor([1., 0.])
    """

    cone: Set

    def __post_init__(self) -> None:
        if not isinstance(self.cone, Set):
            raise TypeError(f"DualCone: cone must be a Set, but got {type(self.cone).__name__}.")

    @property
    def space_dims(self) -> int:  # type: ignore[override]
        """Those of the cone."""
        return self.cone.space_dims

    def _project(self, x: Tensor) -> Tensor:
        return x + self.cone._project(-x)

    def _broken(self, x: Tensor) -> Tensor:
        return self.cone._broken(x)

    def _jacobian(self, x: Tensor) -> LinearOperator:
        D = self.cone._jacobian(-x)
        return -(D.shift(-1.0))
