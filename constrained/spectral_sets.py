"""Sets of matrices known by their eigenvalues or singular values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nestopt.linalg import FunctionOperator, LinearOperator

from .sets import Set, check_number
from .spectral_function import (
    differentiated,
    finite_or,
    positive_part,
    positive_product,
    shrink,
    shrink_product,
    shrunk_sum,
    surplus,
    with_value,
)

__all__ = ["NuclearBall", "PSDCone", "SpectralBall", "matrix_operator"]


def matrix_operator(x: Tensor, finite: Tensor, product: Callable[[Tensor], Tensor]) -> LinearOperator:
    """A symmetric operator on matrices of x's shape, flattened by rows.

    Args:
        x: shape (*batch, m, n).
        finite: shape (*batch, 1, 1): where it is false, the products are NaN.
        product: of matrices (*sides, *batch, m, n).

    Returns:
        An operator of shape (*batch, m n, m n).
    """
    space = x.shape[-2:]

    def matvec(v: Tensor) -> Tensor:
        return torch.where(finite, product(v.reshape(*v.shape[:-1], *space)), torch.nan).flatten(-2)

    return FunctionOperator(matvec, (*x.shape[:-2], *(space.numel(),) * 2), x.dtype, x.device, symmetric=True)


@dataclass(frozen=True)
class PSDCone(Set):
    """The symmetric positive semidefinite matrices {X: X = X', X >= 0}, in the last two dimensions.

    P(X) = Q max(L, 0) Q' with (X + X') / 2 = Q L Q'. The derivative is right for repeated and clustered eigenvalues,
    to every order. At the kink, an eigenvalue that is zero up to rounding, D is the limit from inside the cone.

    Cost: one eigendecomposition, also for all derivatives.

    Reference:
        Higham 1988, Computing a nearest symmetric positive semidefinite matrix; Sun & Sun 2002, Semismooth
        matrix-valued functions (the derivative).

    Example:
        >>> PSDCone().project(torch.tensor([[0.0, 2.0], [2.0, 0.0]]))
        tensor([[1.0000, 1.0000],
                [1.0000, 1.0000]])
    """

    space_dims: ClassVar[int] = 2

    def _need_space(self, x: Tensor) -> None:
        super()._need_space(x)
        if x.shape[-1] != x.shape[-2]:
            raise ValueError(f"PSDCone: x must have shape (*batch, n, n), but it has shape {tuple(x.shape)}.")

    def _project(self, x: Tensor) -> Tensor:
        self._need_space(x)
        return positive_part((x + x.mT) / 2, kink=1.0)

    def _jacobian(self, x: Tensor) -> LinearOperator:
        X, finite = finite_or((x + x.mT) / 2, torch.zeros(x.shape[-2:], dtype=x.dtype, device=x.device))
        values, Q = torch.linalg.eigh(X)
        return matrix_operator(x, finite, lambda H: positive_product(values, Q, (H + H.mT) / 2, kink=1.0))


@dataclass(frozen=True, eq=False)
class SpectralBall(Set):
    """{X: the largest singular value is at most the radius}, in the last two dimensions.

    P(X) = U min(S, radius) V' for X = U S V'. The derivative is right for repeated and clustered singular values, to
    every order. At the kink, a singular value equal to the radius, D is the limit from inside.

    Cost: one thin singular value decomposition; second derivatives add eigendecompositions of order m + n.

    Args:
        radius: number >= 0, or tensor of shape (*batch,).

    Raises:
        ValueError: if a radius is negative or not finite.

    Reference:
        Lewis & Malick 2008, Alternating projections on manifolds (projections onto sets of singular values).

    Example:
        >>> SpectralBall(1.0).project(torch.diag(torch.tensor([3.0, 0.5])))
        tensor([[1.0000, 0.0000],
                [0.0000, 0.5000]])
    """

    radius: float | Tensor = 1.0

    space_dims: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_number("SpectralBall", "radius", self.radius)

    def _project(self, x: Tensor) -> Tensor:
        self._need_space(x)
        radius = self._fit_item(self.radius, x, "radius")
        X, finite = _finite(x)
        U, S, Vh = torch.linalg.svd(X.detach(), full_matrices=False)
        P = (U * S[..., None, :].minimum(radius.detach())) @ Vh
        if differentiated(X, radius):
            P = with_value(X - shrink(X, radius), P)
        inside = (S[..., :1, None] <= radius).all(-2, keepdim=True)
        return torch.where(finite, torch.where(inside, X, P), torch.nan)

    def _jacobian(self, x: Tensor) -> LinearOperator:
        radius = self._fit_item(self.radius, x, "radius").detach()
        X, finite = _finite(x)
        U, S, Vh = torch.linalg.svd(X, full_matrices=False)
        return matrix_operator(x, finite, lambda H: H - shrink_product(U, S, Vh, radius, H))


@dataclass(frozen=True, eq=False)
class NuclearBall(Set):
    """{X: the sum of singular values is at most the radius}, in the last two dimensions.

    P(X) = U max(S - theta, 0) V' for X = U S V', theta found exactly from the singular values as for a simplex; its
    derivative is that of sum max(S - theta, 0) = radius. Right for repeated and clustered singular values, to every
    order. At the kinks, D is the limit from inside the ball, and takes a singular value equal to theta for a zero one.

    Cost: one thin singular value decomposition; derivatives add two eigendecompositions of order m + n.

    Args:
        radius: number >= 0, or tensor of shape (*batch,).

    Raises:
        ValueError: if a radius is negative or not finite.

    Reference:
        Cai, Candes & Shen 2010, A singular value thresholding algorithm; Held, Wolfe & Crowder 1974 (theta).

    Example:
        >>> NuclearBall(2.0).project(torch.diag(torch.tensor([3.0, 2.0])))
        tensor([[1.5000, 0.0000],
                [0.0000, 0.5000]])
    """

    radius: float | Tensor = 1.0

    space_dims: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_number("NuclearBall", "radius", self.radius)

    def _project(self, x: Tensor) -> Tensor:
        self._need_space(x)
        radius = self._fit_item(self.radius, x, "radius")
        X, finite = _finite(x)
        if 0 in X.shape[-2:]:
            return x
        U, S, Vh = torch.linalg.svd(X.detach(), full_matrices=False)
        inside, count, theta, over = _level(S, radius.detach())
        P = (U * over[..., None, :]) @ Vh
        if differentiated(X, radius):
            # theta is detached: one Newton step on sum max(S - theta, 0) = radius, which is linear here, moves it
            P = with_value(shrink(X, with_value((shrunk_sum(X, theta) - radius) / count, theta)), P)
        P = torch.where(inside, X, P)
        return torch.where(finite, torch.where(radius == 0, 0, P), torch.nan)  # a ball of one point has no derivative

    def _jacobian(self, x: Tensor) -> LinearOperator:
        radius = self._fit_item(self.radius, x, "radius").detach()
        X, finite = _finite(x)
        if 0 in X.shape[-2:]:
            return matrix_operator(x, finite, lambda H: H)
        U, S, Vh = torch.linalg.svd(X, full_matrices=False)
        inside, count, theta, _ = _level(S, radius)
        E = (U * (surplus(S, theta) > 0)[..., None, :]) @ Vh

        def product(H: Tensor) -> Tensor:
            along = (E * H).sum((-2, -1), keepdim=True) / count
            moved = torch.where(inside, H, shrink_product(U, S, Vh, theta, H) - along * E)
            return torch.where(radius == 0, 0, moved)

        return matrix_operator(x, finite, product)


def _finite(x: Tensor) -> tuple[Tensor, Tensor]:
    return finite_or(x, torch.zeros(x.shape[-2:], dtype=x.dtype, device=x.device))


def _level(S: Tensor, radius: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whether the descending S sum to at most the radius, how many stay, theta, and max(S - theta, 0)."""
    down = S - S[..., :1]  # the first is subtracted first, so that large values lose nothing
    sums, numbers = down.cumsum(-1), torch.arange(1, S.shape[-1] + 1, dtype=S.dtype, device=S.device)
    inside = S.sum(-1)[..., None, None] <= radius
    level = radius[..., 0] if radius.ndim else radius
    count = (down * numbers > sums - level).sum(-1, keepdim=True).clamp_min(1)
    theta = (sums.gather(-1, count - 1) - level) / count
    over = (down - theta).clamp_min(0)
    # inside, where theta is not used, a positive one keeps the derivatives finite
    theta = torch.where(inside, 1 + S[..., :1, None], (S[..., :1] + theta)[..., None])
    return inside, count[..., None], theta, over
