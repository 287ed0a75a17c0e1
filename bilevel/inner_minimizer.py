"""The inner minimisation of the coupled methods: accelerated projected gradients on a Lagrangian."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .oracle import Oracle, Slopes

__all__ = ["Inner", "keep_dual", "minimize_inner", "row_scales"]

_INNER_STEPS = 300


class Inner(NamedTuple):
    """The inner minimiser, where its gradient was evaluated.

    Attributes:
        theta: the point.
        multiplier: that belongs to it.
        values: the scaled constraints there.
        slopes: of f + <multiplier, c> at (x, theta).
        residual: norm of the gradient mapping.
        curvature: the Lipschitz constant that the last steps were taken with.
    """

    theta: Tensor
    multiplier: Tensor
    values: Tensor
    slopes: Slopes
    residual: Tensor
    curvature: Tensor


def minimize_inner(
    oracle: Oracle,
    scales: Tensor,
    x: Tensor,
    y: Tensor,
    start: Tensor,
    dual: Callable[[Tensor], Tensor],
    gamma: float,
    curvature: Tensor,
    tolerance: float,
    weight: float | None = None,
    max_iter: int = _INNER_STEPS,
) -> Inner:
    """Minimise f(x, th) + M(c(x, th)) + |th - y|^2 / (2 gamma) over th in Y by accelerated projected gradients.

    M' = `dual` maps the scaled constraints to multipliers. Nesterov's scheme for 1/gamma-strong convexity with the
    momentum dropped where it points uphill; a step that the gradient at its end contradicts doubles the Lipschitz
    constant.

    Args:
        oracle: of the step.
        scales: of the constraints.
        x: raveled.
        y: the proximal centre.
        start: th0.
        dual: c -> multipliers.
        gamma: proximal parameter.
        curvature: Lipschitz constant to begin with.
        tolerance: on the gradient mapping.
        weight: of F, added to f; None for none.
        max_iter: evaluations.

    Returns:
        The last point at which the gradient was evaluated.
    """
    seen: dict[str, Tensor] = {}

    def multipliers(c: Tensor) -> Tensor:
        seen["values"] = scales * c
        seen["multiplier"] = dual(seen["values"])
        return scales * seen["multiplier"]

    v, last, before = start, start, None
    floor = 4 * torch.finfo(x.dtype).eps
    while True:
        slopes = oracle.weighted(x, v, upper=weight, lower=1.0, dual=multipliers)
        slope = slopes.y + (v - y) / gamma
        max_iter -= 1
        if before is not None:
            (u, slope_u) = before
            move = (v - u).norm()
            if bool((slope - slope_u).norm() > 1.01 * curvature * move + floor * slope_u.norm()):
                curvature = torch.maximum(2 * curvature, (slope - slope_u).norm() / move)
        new = oracle.prox(v - slope / curvature, 1 / curvature, x)
        residual = curvature * (new - v).norm()
        if not bool(residual > max(tolerance, floor * float(slopes.y.norm()))) or max_iter <= 0:
            return Inner(v, seen["multiplier"], seen["values"], slopes, residual, curvature)
        q = (1 / (gamma * curvature)).sqrt()
        momentum = (1 - q) / (1 + q) if bool(torch.dot(slope, new - last) <= 0) else 0.0
        before = v, slope
        v, last = new + momentum * (new - last), new
        if oracle.nonsmooth.present:
            v = oracle.prox(v, 1.0, x)


def row_scales(oracle: Oracle, x: Tensor, y: Tensor, scale_rows: bool) -> tuple[int, Tensor]:
    """How many rows are inequalities, and each row's factor: 1 / |its gradient in (x, y)|, or 1.

    Args:
        oracle: of the problem.
        x: raveled start.
        y: likewise.
        scale_rows: False for factors of 1.

    Returns:
        The number and the factors.
    """
    if not oracle.constrained:
        return 0, x.new_ones(0)
    _, c_x, c_y = oracle.constraint_jacobian(x, y)
    norms = torch.cat([c_x, c_y], 1).norm(dim=1)
    scales = torch.where(norms > 0, 1 / norms, 1.0) if scale_rows else torch.ones_like(norms)
    return oracle.inequalities(x, y), scales


def keep_dual(seen: dict[str, Tensor], scales: Tensor, multiplier: Tensor) -> Callable[[Tensor], Tensor]:
    """Constant multipliers of the scaled constraints, whose values are kept in `seen`."""

    def dual(c: Tensor) -> Tensor:
        seen["values"] = scales * c
        return scales * multiplier

    return dual
