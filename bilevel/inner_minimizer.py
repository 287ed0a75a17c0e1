"""The inner problems of the coupled methods: a Lagrangian's minimiser in y, and its saddle point."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .linearized_set import clip_multipliers
from .oracle import Oracle, Slopes

__all__ = ["Inner", "Saddle", "accelerated_dual", "keep_dual", "minimize_inner", "row_scales"]

_INNER_STEPS = 300
_ROUNDS = 300
_AT_CLIP = 20  # rounds in a row after which a multiplier at its clip ends an accelerated dual


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
    relative: float = 0.0,
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
        relative: another tolerance, relative to the gradient mapping at the start.
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
        if before is None and relative:
            tolerance = max(tolerance, relative * float(residual))
        if not bool(residual > max(tolerance, floor * float(slopes.y.norm()))) or max_iter <= 0:
            return Inner(v, seen["multiplier"], seen["values"], slopes, residual, curvature)
        q = (1 / (gamma * curvature)).sqrt()
        momentum = (1 - q) / (1 + q) if bool(torch.dot(slope, new - last) <= 0) else 0.0
        before = v, slope
        v, last = new + momentum * (new - last), new
        if oracle.nonsmooth.present:
            v = oracle.prox(v, 1.0, x)


class Saddle(NamedTuple):
    """A solved max-min problem.

    Attributes:
        y: the minimiser.
        dual: its multipliers, of scaled rows.
        slopes: of f + weight F + <dual, c> at (x, y).
        residual: of its conditions: stationarity, feasibility, complementarity.
        curvature: see `Inner`.
        values: the scaled constraints at (x, y).
    """

    y: Tensor
    dual: Tensor
    slopes: Slopes
    residual: Tensor
    curvature: Tensor
    values: Tensor


def accelerated_dual(
    oracle: Oracle,
    scales: Tensor,
    inequalities: int,
    x: Tensor,
    y: Tensor,
    dual: Tensor,
    *,
    gamma: float,
    radius: float,
    curvature: Tensor,
    tolerance: float,
    weight: float | None = None,
    gamma_dual: float = 1.0,
    rounds: int = _ROUNDS,
) -> Saddle:
    """Max over mu, min over y in Y of f(x, y) + weight F(x, y) + <mu, c(x, y)> by an accelerated dual.

    The proximal method of multipliers, y+ = argmin f + weight F + augmented term(z) + |. - y|^2 / (2 gamma),
    mu+ = P_Z(z + gamma_dual c(x, y+)), with Nesterov's momentum on the dual, z = mu+ + t (mu+ - mu), dropped where the
    residual rises. Without f's strong convexity the dual alone has no gradient; the proximal term gives it one. Each
    minimiser is found to a tenth of the residual before.

    Args:
        oracle: of the step.
        scales: of the constraints.
        inequalities: how many rows are.
        x: raveled upper variable.
        y: start.
        dual: mu to start from.
        gamma: proximal parameter.
        radius: multipliers stay within [0, r], [-r, r] for equalities; one that is held there for 20 rounds ends it.
        curvature: Lipschitz constant to begin with.
        tolerance: on the residual.
        weight: of F, None for none.
        gamma_dual: step of the multipliers.
        rounds: limit of minimisations.

    Returns:
        The Saddle, whose residual counts what a clip holds back.
    """

    def clipped(z: Tensor, c: Tensor) -> Tensor:
        return clip_multipliers(z + gamma_dual * c, inequalities, radius)

    z, age, last, at_clip = dual, 0, torch.inf, 0
    enough, relative = 0.0, 0.1
    floor = 100 * torch.finfo(x.dtype).eps
    for _ in range(rounds):
        inner = minimize_inner(
            oracle, scales, x, y, y, partial(clipped, z), gamma, 0.95 * curvature, max(enough, 0.1 * tolerance),
            weight, relative,
        )  # fmt: skip
        # what is left of the conditions at the new point is what the proximal terms and the clip held back
        free = clip_multipliers(z + gamma_dual * inner.values, inequalities)
        parts = (inner.theta - y).norm() / gamma, (free - z).norm() / gamma_dual, inner.residual
        residual = torch.stack(parts).sum()
        age = age + 1 if bool(residual <= last) else 0
        at_clip = at_clip + 1 if bool((free != inner.multiplier).any()) else 0
        momentum = age / (age + 3)
        z = clip_multipliers(inner.multiplier + momentum * (inner.multiplier - dual), inequalities, radius)
        y, dual, curvature, last = inner.theta, inner.multiplier, inner.curvature, float(residual)
        if not bool(residual > max(tolerance, floor * float(inner.slopes.value.abs()))) or at_clip >= _AT_CLIP:
            break
        enough, relative = 0.1 * last, 0.0
    return Saddle(y, dual, inner.slopes, residual, curvature, inner.values)


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
