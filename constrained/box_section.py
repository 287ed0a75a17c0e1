"""Boxes cut by a hyperplane: the capped simplex, the knapsack polytope, budgets."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nestopt.linalg import LinearOperator

from .sets import Box, Set
from .structured import DiagonalPlusLowRank
from .value_only import check_every, opaque

__all__ = ["BoxSection", "capped_simplex"]


@dataclass(frozen=True, eq=False)
class BoxSection(Set):
    """{x: low <= x <= high, a'x = b}.

    P(x) = clamp(x - theta a, low, high), where theta solves g(theta) = a'P - b = 0 and g is piecewise linear and never
    increases. Bisection over the sorted breakpoints finds the piece, and the equation is solved exactly on it; then x
    is replaced by x - theta a, which has the same projection, and the same is done again, so that entries of 1e9 lose
    nothing. With a_F the part of a on the free entries F, those strictly between their bounds, the Jacobian is
    diag(F) - a_F a_F' / |a_F|^2. At a kink, entries that only touch a bound are not free.

    The simplex is low=0, high=inf, a=1; `capped_simplex` has high=1; the knapsack polytope has weights a.

    Cost: one sort of 2 n breakpoints and log2(2 n) evaluations of g, twice.

    Args:
        low: number or tensor of shape (n,) or (*batch, n); -inf for none.
        high: likewise; inf for none.
        a: number or tensor, finite, likewise; entries of zero are allowed.
        b: number, or tensor of shape (*batch,).

    Raises:
        ValueError: if low <= high does not hold, or a or b is not finite; and, when a point is projected, if no x
            within the bounds has a'x = b.

    Reference:
        Kiwiel 2008, Breakpoint searching algorithms for the continuous quadratic knapsack problem.

    Example:
        >>> BoxSection(0.0, 1.0, torch.tensor([1.0, 1.0, 2.0]), 2.0).project(torch.tensor([2.0, 0.0, 0.5]))
        tensor([1.0000, 0.0000, 0.5000])
    """

    low: float | Tensor = 0.0
    high: float | Tensor = math.inf
    a: float | Tensor = 1.0
    b: float | Tensor = 1.0

    def __post_init__(self) -> None:
        try:
            Box(self.low, self.high)
        except ValueError as error:
            raise ValueError(f"BoxSection: {str(error).removeprefix('Box: ')}") from None
        for name, value in (("a", self.a), ("b", self.b)):
            check_every(torch.as_tensor(value).detach().isfinite(), f"BoxSection: {name} must be finite.")

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The point moved along a, a, b, the free entries, the bounds of the others, and |a_F|^2 or 1."""
        self._need_space(x)
        low, high, a = self._fit(self.low, x, "low"), self._fit(self.high, x, "high"), self._fit(self.a, x, "a")
        b = self._fit_item(self.b, x, "b")
        theta, free, lower = opaque(
            _identify,
            *(t.expand(*t.shape[:-1], x.shape[-1]) if t.ndim else t.expand(x.shape[-1]) for t in (x, low, high, a)),
            b[..., 0] if b.ndim else b,
            spaces=[1, 1, 1, 1, 0],
        )
        # the projection does not change along a, whatever a is: theta is a constant for every derivative
        x = x - torch.where(a == 0, 0, theta * a)
        bound = torch.where(free, 0, torch.where(lower, low, high))
        square = torch.where(free, a * a, 0).sum(-1, keepdim=True)
        return x, a, b, free, bound, torch.where(square == 0, 1, square)

    def _project(self, x: Tensor) -> Tensor:
        moved, a, b, free, bound, square = self._parts(x)
        inner = torch.where(free, moved, bound)
        theta = (((a * inner).sum(-1, keepdim=True)) - b) / square
        p = torch.where(free, inner - theta * a, bound)
        return torch.where(x.isnan().any(-1, keepdim=True), torch.nan, p)

    def _jacobian(self, x: Tensor) -> LinearOperator:
        _, a, _, free, _, square = self._parts(x)
        nan = x.isnan().any(-1, keepdim=True)
        row = torch.where(free, a, 0).detach()
        return DiagonalPlusLowRank(
            torch.where(nan, torch.nan, free.to(x.dtype)), row[..., None, :], -1 / square.detach()
        )


def _identify(x: Tensor, low: Tensor, high: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Theta of shape (*batch, 1), where x - theta a is strictly between the bounds, and where it is at the lower."""
    shape = torch.broadcast_shapes(x.shape, low.shape, high.shape, a.shape, (*b.shape, 1))  # type: ignore[no-untyped-call]
    x, low, high, a = (t.expand(shape) for t in (x, low, high, a))
    b = b[..., None].expand(*shape[:-1], 1)
    _check_reachable(low, high, a, b)
    x = torch.where(x.isnan().any(-1, keepdim=True), 0, x)  # the item's answer is NaN, whatever is found here
    total = torch.zeros_like(b)
    for _ in range(2):
        theta = _solve(torch.where(a == 0, x, x - total * a), low, high, a, b)
        total = total + theta
    step = torch.where(a == 0, 0, total * a)
    y = x - step
    slack = 8 * torch.finfo(x.dtype).eps * torch.where(y.isfinite(), y.abs(), 0)
    lower = y <= low + slack
    return total, ~lower & (y < high - slack), lower


def _check_reachable(low: Tensor, high: Tensor, a: Tensor, b: Tensor) -> None:
    ends = torch.stack([torch.where(a == 0, 0, a * low), torch.where(a == 0, 0, a * high)])
    least, most = ends.amin(0).sum(-1, keepdim=True), ends.amax(0).sum(-1, keepdim=True)
    finite = torch.where(ends.isfinite(), ends, 0).abs().amax(0).sum(-1, keepdim=True)
    slack = 10 * torch.finfo(a.dtype).eps * (finite + b.abs())
    if not bool(((least - slack <= b) & (b <= most + slack)).all()):
        raise ValueError(
            "BoxSection: the set is empty: no x within the bounds has a'x = b; b must lie between the smallest and the "
            f"largest a'x, which are {float(least.flatten()[0]):.6g} and {float(most.flatten()[0]):.6g} in the first "
            "item."
        )


def _solve(x: Tensor, low: Tensor, high: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The root theta of a'clamp(x - theta a, low, high) = b, of shape (*batch, 1)."""
    if x.shape[-1] == 0:
        return torch.zeros_like(b)
    moving = a != 0
    safe = torch.where(moving, a, 1)
    ends = torch.stack([(x - low) / safe, (x - high) / safe])
    first, last = ends.amin(0), ends.amax(0)  # before, the entry stands at one bound, and after at the other
    infinite = torch.full_like(b, torch.inf)
    both = torch.cat([torch.where(moving, t, torch.inf) for t in (first, last)], dim=-1).sort(-1).values
    points = torch.cat([-infinite, both, infinite], -1)

    def decided(theta: Tensor) -> Tensor:  # whether g(theta) >= 0; where theta is infinite, x - theta a means nothing
        excess = torch.where(moving, a * torch.clamp(x - theta * safe, low, high), 0).sum(-1, keepdim=True) - b
        return torch.where(theta.isfinite(), excess >= 0, theta < 0)

    left = torch.zeros_like(b, dtype=torch.long)  # g(points[left]) >= 0 > g(points[right])
    right = torch.full_like(left, points.shape[-1] - 1)
    for _ in range(points.shape[-1].bit_length()):
        middle = (left + right) // 2
        up = decided(points.gather(-1, middle)) | (middle == 0)
        left, right = torch.where(up, middle, left), torch.where(up, right, torch.maximum(middle, left + 1))
    begin, end = points.gather(-1, left), points.gather(-1, right)
    free = moving & (first <= begin) & (last >= end)
    bound = torch.where((last <= begin) == (a > 0), low, high)
    reached = torch.where(free, x, torch.where(moving, bound, 0))
    square = torch.where(free, a * a, 0).sum(-1, keepdim=True)
    theta = ((a * reached).sum(-1, keepdim=True) - b) / square
    # nothing is free: every theta of the piece will do
    inside = torch.where(begin.isfinite() & end.isfinite(), (begin + end) / 2, 0)
    inside = torch.where(begin.isfinite() & ~end.isfinite(), begin + 1 + begin.abs(), inside)
    inside = torch.where(end.isfinite() & ~begin.isfinite(), end - 1 - end.abs(), inside)
    return torch.where(square == 0, inside, theta)


def capped_simplex(total: float | Tensor, high: float | Tensor = 1.0) -> BoxSection:
    """{x: 0 <= x <= high, sum x = total}: the convex hull of the top-k indicators for an integer total k.

    Args:
        total: number in [0, n high], or tensor of shape (*batch,).
        high: number, or tensor of shape (n,) or (*batch, n).

    Returns:
        The set.

    Example:
        >>> capped_simplex(2.0).project(torch.tensor([3.0, 1.0, 0.5, -1.0]))
        tensor([1.0000, 0.7500, 0.2500, 0.0000])
    """
    return BoxSection(0.0, high, 1.0, total)
