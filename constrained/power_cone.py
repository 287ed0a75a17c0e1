"""The power cone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nestopt.linalg import LinearOperator

from .scalar_equations import scalar_root
from .sets import Set
from .structured import block_jacobian
from .value_only import check_every

__all__ = ["PowerCone"]

_STEPS = 200
_LONGEST = 120.0  # exp(-120) of a point of size one is nothing, and its square is still a number


@dataclass(frozen=True, eq=False)
class PowerCone(Set):
    """{(x, y, z): x >= 0, y >= 0, x^alpha y^(1 - alpha) >= |z|}, or a product of such cones.

    The last dimension has 3 k entries: k blocks (x, y, z), in the order of cvxpy, SCS and Clarabel.

    Points of the cone stay, points of its polar go to 0, and those with z = 0 to (max(x, 0), max(y, 0), 0). For every
    other point |z| is cut to r, and with m = r (|z| - r) the others become X = (x + sqrt(x^2 + 4 alpha m)) / 2 and
    Y = (y + sqrt(y^2 + 4 (1 - alpha) m)) / 2, where X^alpha Y^(1 - alpha) = r. This equation is solved for
    tau = log(|z| / r) by Newton's method within a shrinking bracket, in float64, on blocks scaled to size one.
    Derivatives of any order, in alpha as well, come from the implicit function theorem. The Jacobian has a 3 x 3 block
    a cone; on a boundary between cases it is the one of the first that holds.

    Args:
        alpha: number in (0, 1), or a tensor of shape (k,) or (*batch, k) of them.

    Raises:
        ValueError: if alpha is not in (0, 1); when a point is projected, if its last dimension is no multiple of 3.

    Reference:
        Hien 2015, Differential properties of Euclidean projection onto power cone, Proposition 2.2.

    Example:
        >>> PowerCone(0.5).project(torch.tensor([0.0, 0.0, 2.0]))
        tensor([0.6667, 0.6667, 0.6667])
    """

    alpha: float | Tensor

    def __post_init__(self) -> None:
        alpha = torch.as_tensor(self.alpha).detach()
        check_every((alpha > 0) & (alpha < 1), "PowerCone: alpha must be strictly between 0 and 1; look for NaN.")

    def _blocks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._need_space(x)
        if x.shape[-1] % 3:
            raise ValueError(
                f"PowerCone: x must have shape (*batch, 3 k), blocks (x, y, z), but it has {tuple(x.shape)}."
            )
        blocks = x.reshape(*x.shape[:-1], x.shape[-1] // 3, 3)
        return blocks, self._fit(self.alpha, x, "alpha", blocks.shape[:-1]) + x.new_zeros(blocks.shape[:-1])

    def _project(self, x: Tensor) -> Tensor:
        return _onto_cone(*self._blocks(x)).reshape(x.shape)

    def _jacobian(self, x: Tensor) -> LinearOperator:
        blocks, alpha = self._blocks(x)
        return block_jacobian(lambda v: _onto_cone(v, alpha.detach()), blocks)


def _onto_cone(v: Tensor, alpha: Tensor) -> Tensor:
    """The projection of blocks (..., 3) with exponents (...)."""
    dtype, v, alpha = v.dtype, v.double(), alpha.double()
    size = v.detach().abs().amax(-1, keepdim=True)
    unit = torch.where((size > 0) & size.isfinite(), size, 1)
    x, y, z = (v / unit).unbind(-1)
    inside, polar, flat = _cases(x.detach(), y.detach(), z.detach().abs(), alpha.detach())
    easy = inside | polar | flat
    sign = z.detach().sign()
    # a point with a root where none is wanted, so that no derivative is NaN
    x, y, w = torch.where(easy, 0.0, x), torch.where(easy, 0.0, y), torch.where(easy, 1.0, sign * z)
    tau = scalar_root(_find_root, _slopes, x, y, w, alpha)
    r, m = w * torch.exp(-tau), -w * w * torch.exp(-tau) * torch.expm1(-tau)
    moved = unit * torch.stack([_larger_root(x, alpha * m), _larger_root(y, (1 - alpha) * m), sign * r], dim=-1)
    face = torch.cat([v[..., :2].clamp_min(0), torch.zeros_like(v[..., 2:])], dim=-1)
    p = torch.where(flat[..., None], face, moved)
    p = torch.where(polar[..., None], 0, p)
    p = torch.where(inside[..., None], v, p)
    return torch.where(v.isnan().any(-1, keepdim=True), torch.nan, p).to(dtype)


def _cases(x: Tensor, y: Tensor, w: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which points are in the cone, else in its polar, else in the plane z = 0."""
    inside = (x >= 0) & (y >= 0) & (x.clamp_min(0) ** alpha * y.clamp_min(0) ** (1 - alpha) >= w)
    left, right = (-x / alpha).clamp_min(0), (-y / (1 - alpha)).clamp_min(0)
    polar = (x <= 0) & (y <= 0) & (left**alpha * right ** (1 - alpha) >= w) & ~inside
    return inside, polar, ((w == 0) & ~inside & ~polar) | (x + y + w).isnan()


def _larger_root(x: Tensor, c: Tensor) -> Tensor:
    """(x + sqrt(x^2 + 4 c)) / 2, without cancellation."""
    root = torch.sqrt(x * x + 4 * c)
    return torch.where(x >= 0, (x + root) / 2, 2 * c / torch.where(x >= 0, 1, root - x))


def _parts(
    tau: Tensor, x: Tensor, y: Tensor, w: Tensor, alpha: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """M, X, Y, sqrt(x^2 + 4 alpha m), its like for y, and the derivative in m of alpha log X + (1 - alpha) log Y."""
    m = -w * w * torch.exp(-tau) * torch.expm1(-tau)
    X, Y = _larger_root(x, alpha * m), _larger_root(y, (1 - alpha) * m)
    S, T = torch.sqrt(x * x + 4 * alpha * m), torch.sqrt(y * y + 4 * (1 - alpha) * m)
    return m, X, Y, S, T, alpha**2 / (X * S) + (1 - alpha) ** 2 / (Y * T)


def _tau_slope(tau: Tensor, w: Tensor, by_m: Tensor) -> Tensor:
    return by_m * w * w * torch.exp(-tau) * (2 * torch.exp(-tau) - 1) + 1


def _find_root(x: Tensor, y: Tensor, w: Tensor, alpha: Tensor) -> Tensor:
    low, high = torch.zeros_like(x), torch.full_like(x, _LONGEST)
    tau, last, eps = torch.full_like(x, math.log(2)), high.clone(), 2 * torch.finfo(x.dtype).eps
    for _ in range(_STEPS):
        _, X, Y, _, _, by_m = _parts(tau, x, y, w, alpha)
        value = alpha * torch.log(X) + (1 - alpha) * torch.log(Y) + tau - torch.log(w)
        low, high = torch.where(value <= 0, tau, low), torch.where(value >= 0, tau, high)
        step = -value / _tau_slope(tau, w, by_m)
        good = (tau + step > low) & (tau + step < high) & (step.abs() <= 0.5 * last)  # else it creeps along a flat side
        # the logarithms are no more exact than this
        settled = (step.abs() <= eps * tau) | (value.abs() <= eps * (torch.log(w).abs() + tau))
        following = torch.where(settled, tau, torch.where(good, tau + step, (low + high) / 2))
        last, tau = (following - tau).abs(), following
        if bool(settled.all()):
            break
    return tau


def _slopes(tau: Tensor, x: Tensor, y: Tensor, w: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The derivatives of the root in x, y, w and alpha."""
    m, X, Y, S, T, by_m = _parts(tau, x, y, w, alpha)
    slope = _tau_slope(tau, w, by_m)
    by_alpha = torch.log(X) - torch.log(Y) + alpha * m / (X * S) - (1 - alpha) * m / (Y * T)
    return -alpha / S / slope, -(1 - alpha) / T / slope, -(2 * by_m * m - 1) / w / slope, -by_alpha / slope
