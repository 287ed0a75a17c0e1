"""Balls of the l1 and the largest-entry norm; the Euclidean one is `Ball`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nestopt.linalg import LinearOperator

from .sets import Between, Set, check_number, kept_nan, simplex_support
from .structured import DiagonalPlusLowRank

__all__ = ["L1Ball", "LinfBall"]


@dataclass(frozen=True, eq=False)
class L1Ball(Set):
    """{x: sum |x - center| <= radius}.

    With d = x - center, a point outside goes to center + sign(d) max(|d| - theta, 0): the absolute values are projected
    onto the simplex of size radius, by sorting, and entries of 1e9 lose nothing. Inside, the Jacobian is I; outside,
    with s = sign(d) on the support and 0 off it, it is diag(|s|) - s s' / sum |s|. At a kink a point on the sphere
    counts as inside, and entries with |d| = theta are not in the support.

    Cost: one sort of the last dimension.

    Args:
        radius: number >= 0, or a tensor of shape (*batch,) of them.
        center: number, or tensor of shape (n,) or (*batch, n).

    Raises:
        ValueError: if radius is negative or not finite.

    Reference:
        Duchi, Shalev-Shwartz, Singer & Chandra 2008, Figure 1.

    Example:
        >>> L1Ball(1.0).project(torch.tensor([2.0, -1.5, 0.1]))
        tensor([ 0.7500, -0.2500,  0.0000])
    """

    radius: float | Tensor = 1.0
    center: float | Tensor = 0.0

    def __post_init__(self) -> None:
        check_number("L1Ball", "radius", self.radius)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The center, the radius, whether x is outside, the signs, |d| less its largest entry, and the support."""
        self._need_space(x)
        center, radius = self._fit(self.center, x, "center"), self._fit_item(self.radius, x, "radius")
        d = x - center
        sign = d.detach().sign()
        outside = ~(d.detach().abs().sum(-1, keepdim=True) <= radius.detach()) | (radius == 0)
        size = sign * d
        if x.shape[-1]:
            size = size - size.detach().amax(-1, keepdim=True)
        return center, radius, outside, sign, size, simplex_support(size, radius) if x.shape[-1] else size > 0

    def _project(self, x: Tensor) -> Tensor:
        center, radius, outside, sign, size, support = self._parts(x)
        theta = (torch.where(support, size, 0).sum(-1, keepdim=True) - radius) / support.sum(
            -1, keepdim=True
        ).clamp_min(1)
        moved = torch.where(support | size.isnan(), sign * (size - theta), 0)
        return torch.where(outside, center + moved, x)

    def _jacobian(self, x: Tensor) -> LinearOperator:
        _, _, outside, sign, _, support = self._parts(x)
        kept = kept_nan(x, support | ~outside)
        s = torch.where(support & outside, sign, 0)
        return DiagonalPlusLowRank(kept, s[..., None, :], -1 / support.sum(-1, keepdim=True).clamp_min(1).to(x.dtype))


@dataclass(frozen=True, eq=False)
class LinfBall(Between):
    """{x: max |x - center| <= radius}.

    The Jacobian is diagonal, 1 for an entry with |x - center| <= radius and 0 for the others (and for all if radius is
    0); an entry at the limit counts as within.

    Args:
        radius: number >= 0, or a tensor of shape (*batch,) of them.
        center: number, or tensor of shape (n,) or (*batch, n).

    Raises:
        ValueError: if radius is negative or not finite.

    Example:
        >>> LinfBall(1.0).project(torch.tensor([2.0, -1.5, 0.1]))
        tensor([ 1.0000, -1.0000,  0.1000])
    """

    radius: float | Tensor = 1.0
    center: float | Tensor = 0.0

    def __post_init__(self) -> None:
        check_number("LinfBall", "radius", self.radius)

    def _bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._need_space(x)
        center, radius = self._fit(self.center, x, "center"), self._fit_item(self.radius, x, "radius")
        return center - radius, center + radius
