"""Sets that are not convex, whose nearest point is known in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nestopt.linalg import LinearOperator

from .sets import Set, check_number
from .spectral_function import finite_or, full_column_rank, polar_factor, polar_product
from .spectral_sets import matrix_operator
from .structured import DiagonalPlusLowRank

__all__ = ["Sphere", "Stiefel"]


@dataclass(frozen=True, eq=False)
class Sphere(Set):
    """{x: |x - center|_2 = radius}, in the last dimension. NOT convex.

    P(x) = center + radius (x - center) / |x - center|, smooth everywhere but at the center. There every point of the
    sphere is nearest, none is chosen, and P and D are NaN in that item. Of a convex set's laws the obtuse angle and
    0 <= D <= I do not hold: D = radius / |d| (I - u u') for d = x - center, u = d / |d| stretches inside the sphere.

    Args:
        radius: positive number, or tensor of shape (*batch,).
        center: number, or tensor of shape (n,) or (*batch, n).

    Raises:
        ValueError: if a radius is not positive and finite.

    Reference:
        Absil & Malick 2012, Projection-like retractions on matrix manifolds.

    Example:
        >>> Sphere(10.0).project(torch.tensor([3.0, 4.0]))
        tensor([6., 8.])
    """

    radius: float | Tensor = 1.0
    center: float | Tensor = 0.0

    convex: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("Sphere", "radius", self.radius, positive=True)

    def _direction(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The center, (x - center) / |x - center|, |x - center|, and whether that is zero."""
        self._need_space(x)
        center = self._fit(self.center, x, "center")
        d = x - center
        # divided by its largest entry, nothing overflows or underflows
        unit = d.detach().abs().amax(-1, keepdim=True) if d.shape[-1] else d.new_zeros((*d.shape[:-1], 1))
        lost = unit == 0
        d = torch.where(lost, 1, d / torch.where(lost, 1, unit))  # the norm has no derivative at zero
        size = torch.linalg.vector_norm(d, dim=-1, keepdim=True)
        return center, d / size, unit * size, lost

    def _project(self, x: Tensor) -> Tensor:
        center, u, _, lost = self._direction(x)
        return torch.where(lost, torch.nan, center + self._fit_item(self.radius, x, "radius") * u)

    def _jacobian(self, x: Tensor) -> LinearOperator:
        _, u, size, lost = self._direction(x)
        ratio = torch.where(lost, torch.nan, self._fit_item(self.radius, x, "radius") / size).detach()
        return DiagonalPlusLowRank(ratio.expand(x.shape), u.detach()[..., None, :], -ratio)


@dataclass(frozen=True)
class Stiefel(Set):
    """{X: X'X = I}, the frames of n orthonormal columns in m >= n dimensions, in the last two. NOT convex.

    P(X) = U V' for X = U S V', the orthogonal factor of the polar decomposition, smooth where X has full column rank,
    to every order and for repeated singular values. Without full rank (up to rounding) many frames are nearest, none
    is chosen, and P and D are NaN in that item. Of a convex set's laws the obtuse angle and 0 <= D <= I do not hold.

    Cost: one thin singular value decomposition, also for all derivatives.

    Reference:
        Higham 1986, Computing the polar decomposition; Kenney & Laub 1991, Polar decomposition and matrix sign
        function condition estimates (the derivative).

    Example:
        >>> Stiefel().project(torch.tensor([[0.0, 2.0], [3.0, 0.0], [0.0, 0.0]]))
        tensor([[0., 1.],
                [1., 0.],
                [0., 0.]])
    """

    space_dims: ClassVar[int] = 2
    convex: ClassVar[bool] = False

    def _need_space(self, x: Tensor) -> None:
        super()._need_space(x)
        if x.shape[-2] < x.shape[-1]:
            raise ValueError(
                f"Stiefel: x must have at least as many rows as columns, but it has shape {tuple(x.shape)}; pass x.mT "
                "for orthonormal rows."
            )

    def _project(self, x: Tensor) -> Tensor:
        self._need_space(x)
        return polar_factor(x)

    def _jacobian(self, x: Tensor) -> LinearOperator:
        X, finite = finite_or(x, torch.eye(*x.shape[-2:], dtype=x.dtype, device=x.device))
        U, S, Vh = torch.linalg.svd(X, full_matrices=False)
        return matrix_operator(x, finite & full_column_rank(X, S), lambda H: polar_product(X, U, S, Vh, H))
