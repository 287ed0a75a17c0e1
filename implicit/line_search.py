"""What minimisers share: the step along a direction, and the way out of a saddle."""

from __future__ import annotations

import torch
from torch import Tensor

from nestopt.linalg import LinearOperator

from .minimizer import ARMIJO, Objective, Point, Trial, shorter_step

__all__ = ["MEMORY", "leave_saddle", "nonmonotone_search", "search", "spectral_size"]

MEMORY = 10  # accepted values that a step which need not be monotone is compared with


def leave_saddle(f: Objective, point: Point, hessian: LinearOperator, d: Tensor, p: Tensor) -> Tensor:
    """The step d and, from its end, along the direction p of curvature <= 0 as far as doubled steps lower f.

    Args:
        f: the objective, which counts one product.
        point: where both start.
        hessian: at that point.
        d: step of descent, perhaps zero.
        p: direction with p'Hp <= 0, of any sign and length.

    Returns:
        The whole step; never zero unless p is.
    """
    f.products += 1
    slope = torch.dot(point.gradient, p)
    p = p / torch.copysign(torch.linalg.vector_norm(p), -slope)
    bend = abs(float(torch.dot(p, hessian @ p)))
    limit = max(1.0, float(torch.linalg.vector_norm(point.y)))
    newton = abs(float(torch.dot(point.gradient, p))) / bend if bend > 0 else limit  # as if the curvature were |p'Hp|
    step = min(newton, limit) * p
    moving = bool(d.any())
    value = f.evaluate(point.y + d).value if moving else point.value
    for _ in range(20):
        trial = f.evaluate(point.y + d + step)
        if not trial.value < value:
            break
        d, step, value, moving = d + step, 2 * step, trial.value, True
    return d if moving else step


def search(f: Objective, point: Point, d: Tensor, slope: float) -> tuple[Point, LinearOperator] | None:
    """Backtracking from t = 1 until f(y + t d) - f(y) <= 1e-4 t slope.

    Where rounding hides the change of f, it is computed from the slopes at both ends (approximate Wolfe).

    Args:
        f: the objective.
        point: y.
        d: direction.
        slope: of f along d, negative.

    Returns:
        The point y + t d with its Hessian; None when no t will do.
    """
    t = 1.0
    for _ in range(40):
        trial = f.evaluate(point.y + t * d)
        rise = trial.value - point.value
        if rise <= ARMIJO * t * slope and -rise > point.flat:
            return f.linearize(trial)
        if abs(rise) <= point.flat and -slope <= 10 * point.flat:
            new = f.linearize(trial)
            if point.trapezoid(new[0]) <= ARMIJO * t * slope:
                return new
        if -t * slope <= point.flat:
            return None
        t = shorter_step(t, slope, rise)
    return None


def nonmonotone_search(
    f: Objective, point: Point, d: Tensor, slope: float, reference: float
) -> tuple[Trial, float] | None:
    """Backtracking from t = 1 until f(y + t d) <= reference + 1e-4 t slope.

    Args:
        f: the objective.
        point: y.
        d: direction.
        slope: of f along d, negative.
        reference: the largest of the last MEMORY accepted values.

    Returns:
        The trial and its t; None when no t will do.
    """
    slack = point.flat if -slope <= 10 * point.flat else 0.0  # f cannot judge a promise below rounding
    t = 1.0
    for _ in range(40):
        trial = f.evaluate(point.y + t * d)
        if trial.value - reference <= ARMIJO * t * slope + slack:
            return trial, t
        t = shorter_step(t, slope, trial.value - point.value)
    return None


def spectral_size(step: Tensor, change: Tensor, size: float) -> float:
    """The next size of a gradient step: 1 / (curvature seen along the last one).

    Args:
        step: y+ - y.
        change: of the gradient.
        size: of the last step, which is multiplied by ten where no positive curvature was seen.

    Returns:
        s's / s'd, or s'd / d'd where that is less than half of it.
    """
    ss, sd, dd = (float(torch.dot(a, b)) for a, b in ((step, step), (step, change), (change, change)))
    if not sd > 0:
        return 10 * size
    long, short = ss / sd, sd / dd
    return short if short < 0.5 * long else long
