"""The exponential cone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nestopt.linalg import LinearOperator

from .scalar_equations import scalar_root
from .sets import Set
from .structured import block_jacobian

__all__ = ["ExponentialCone"]

_LOGARITHM = 800.0  # beyond the logarithm of every ratio of two doubles
_FLAT = 50.0  # where x < -50 y, the cone is z >= 0: its boundary exp(x / y) is less than the rounding of one
_STEPS = 200  # bisection alone would need 64 for the last bit


@dataclass(frozen=True)
class ExponentialCone(Set):
    """The closure of {(x, y, z): y > 0, y exp(x / y) <= z}, or a product of such cones.

    The last dimension has 3 k entries: k blocks (x, y, z), in the order of cvxpy, SCS and Clarabel.

    Points of the cone stay, points of its polar go to 0, and those with x <= 0 and y <= 0 to (x, 0, max(z, 0)). Every
    other v is s (rho, 1, e^rho) + mu (1, 1 - rho, -e^-rho), a point of the cone plus one of the polar, with
    s = ((rho - 1) x + y) / q, mu = (x - rho y) / q and q = rho^2 - rho + 1; what is left is one increasing equation
    s e^rho - mu e^-rho = z in rho, solved by Newton's method within a shrinking bracket. Everything is computed in
    float64, on blocks scaled to size one. Derivatives of any order come from the implicit function theorem. The
    Jacobian has a 3 x 3 block a cone; on a boundary between cases, it is the one of the first that holds: I in the
    cone, 0 in the polar.

    Raises:
        ValueError: when a point is projected whose last dimension is no multiple of 3.

    Reference:
        Friberg 2021, Projection onto the exponential cone: a univariate root-finding problem.

    Example:
        >>> ExponentialCone().project(torch.tensor([1.0, 1.0, 1.0]))
        tensor([0.4263, 0.7517, 1.3254])
    """

    def _blocks(self, x: Tensor) -> Tensor:
        self._need_space(x)
        if x.shape[-1] % 3:
            raise ValueError(
                f"ExponentialCone: x must have shape (*batch, 3 k), blocks (x, y, z), but it has {tuple(x.shape)}."
            )
        return x.reshape(*x.shape[:-1], x.shape[-1] // 3, 3)

    def _project(self, x: Tensor) -> Tensor:
        return _onto_cone(self._blocks(x)).reshape(x.shape)

    def _jacobian(self, x: Tensor) -> LinearOperator:
        return block_jacobian(_onto_cone, self._blocks(x))


def _onto_cone(v: Tensor) -> Tensor:
    """The projection of blocks (..., 3)."""
    dtype, v = v.dtype, v.double()
    size = v.detach().abs().amax(-1, keepdim=True)
    unit = torch.where((size > 0) & size.isfinite(), size, 1)
    x, y, z = (v / unit).unbind(-1)
    inside, polar, corner = _cases(x.detach(), y.detach(), z.detach())
    easy = inside | polar | corner
    # a point with a root where none is wanted, so that no derivative is NaN
    x, y, z = (torch.where(easy, 1.0, t) for t in (x, y, z))
    rho = scalar_root(_find_root, _slopes, x, y, z)
    q = rho * rho - rho + 1
    s, mu = ((rho - 1) * x + y) / q, (x - rho * y) / q
    # of two equal values, the one whose exponential does not grow
    top = torch.where(rho > 0, z + mu * torch.exp(-rho.clamp_min(0)), s * torch.exp(rho.clamp_max(0)))
    moved = unit * torch.stack([s * rho, s, top], dim=-1)
    face = torch.cat([v[..., :1], v[..., 1:].clamp_min(0)], dim=-1)
    p = torch.where(corner[..., None], face, moved)
    p = torch.where(polar[..., None], 0, p)
    p = torch.where(inside[..., None], v, p)
    return torch.where(v.isnan().any(-1, keepdim=True), torch.nan, p).to(dtype)


def _cases(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which points are in the cone, else in its polar, else nearest to a face: y = 0, or z = 0 up to exp(-50)."""
    above = (y > 0) & (y * torch.exp(x / torch.where(y > 0, y, 1)) <= z)
    inside = above | ((y == 0) & (x <= 0) & (z >= 0))
    below = (x > 0) & (x * torch.exp(y / torch.where(x > 0, x, 1) - 1) <= -z)
    polar = (below | ((x == 0) & (y <= 0) & (z <= 0))) & ~inside
    nan = x.isnan() | y.isnan() | z.isnan()
    return inside, polar, ((x <= 0) & (y <= x / -_FLAT) & ~inside & ~polar) | nan


def _residual(rho: Tensor, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """S e^rho - mu e^-rho - z, and its derivative in rho, both times e^-|rho|."""
    q = rho * rho - rho + 1
    s, mu = ((rho - 1) * x + y) / q, (x - rho * y) / q
    turn = (2 * rho - 1) / q
    s_slope, mu_slope = x / q - s * turn, -y / q - mu * turn
    up, down = torch.exp(rho - rho.abs()), torch.exp(-rho - rho.abs())
    return s * up - mu * down - z * torch.exp(-rho.abs()), (s_slope + s) * up + (mu - mu_slope) * down


def _find_root(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    low = torch.where(x > 0, 1 - y / torch.where(x > 0, x, 1), -torch.inf)  # here s = 0
    high = torch.where(y > 0, x / torch.where(y > 0, y, 1), torch.inf)  # here mu = 0
    # farther from zero than this an exponential outweighs everything, and beyond 1e60 a square would overflow
    low, high = (
        torch.maximum(low, high.clamp_max(0) - _LOGARITHM).clamp(-1e60, 1e60),
        torch.minimum(high, low.clamp_min(0) + _LOGARITHM).clamp(-1e60, 1e60),
    )
    rho, last = (low + high) / 2, high - low
    for _ in range(_STEPS):
        value, slope = _residual(rho, x, y, z)
        low, high = torch.where(value <= 0, rho, low), torch.where(value >= 0, rho, high)
        step = -value / slope
        good = (rho + step > low) & (rho + step < high) & (step.abs() <= 0.5 * last)  # else it creeps along a flat side
        settled = step.abs() <= 2 * torch.finfo(rho.dtype).eps * rho.abs().clamp_min(1)
        following = torch.where(settled, rho, torch.where(good, rho + step, (low + high) / 2))
        last, rho = (following - rho).abs(), following
        if bool(settled.all()):
            break
    return rho


def _slopes(rho: Tensor, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The derivatives of the root in x, y and z."""
    q = rho * rho - rho + 1
    up, down = torch.exp(rho - rho.abs()), torch.exp(-rho - rho.abs())
    _, slope = _residual(rho, x, y, z)
    return (
        -((rho - 1) * up - down) / q / slope,
        -(up + rho * down) / q / slope,
        torch.exp(-rho.abs()) / slope,
    )
