"""How far a computed hypergradient can be from the true one: a bound from measured residuals and curvature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nestopt.linalg import LinearOperator
from nestopt.linalg.autodiff import GraphOperator, gradient
from nestopt.linalg.lanczos import extreme_eigenvalues, operator_norm

from .optimality import Optimality
from .problem import Linearization

__all__ = ["Certificate", "Constants", "certify"]

_SMALL = 300  # up to this dimension Lanczos may exhaust the space, which makes its figures exact


@dataclass(frozen=True)
class Constants:
    """The local constants of a hypergradient's error bound.

    With psi(x, y) = F(x, y) - v' f_y(x, y) at the computed adjoint v, the gradient of psi in x is the hypergradient and
    its gradient in y is the residual of the adjoint system.

    Attributes:
        strong_convexity: lower bound mu of the eigenvalues of f_yy (singular values of R_z); 0 when none is known.
        largest_curvature: largest eigenvalue of f_yy (singular value of R_z).
        cross: norm of f_xy (R_x).
        upper_lower: norm of psi_xy.
        lower_lower: norm of psi_yy.
        products: products with derivatives that the estimates took.
    """

    strong_convexity: float
    largest_curvature: float
    cross: float
    upper_lower: float
    lower_lower: float
    products: int = 0


@dataclass(frozen=True)
class Certificate:
    """A bound on |hypergradient - d phi / dx|, with its parts.

    Attributes:
        error_bound: the bound; inf when no curvature bound is known.
        constants: what it was made of, to be passed on to the next call while they change little.
        lower_distance: bound |f_y| / mu of the distance of y to the lower solution.
        lowest_eigenvalue: the smallest Ritz value of f_yy that was seen, None when strong_convexity was given.
    """

    error_bound: float
    constants: Constants
    lower_distance: float
    lowest_eigenvalue: float | None


def certify(
    point: Linearization | Optimality,
    adjoint: Tensor,
    residual_norm: float,
    strong_convexity: float | None = None,
    constants: Constants | None = None,
    *,
    effort: int = 100,
    seed: int = 0,
) -> Certificate:
    r"""Bound the error of G = psi_x as the derivative of phi(x) = F(x, y*(x)).

    With delta = y - y*, |delta| <= |f_y| / mu, and the residual rho = psi_y of the adjoint system H v = F_y,

        dphi - G = [psi_x(y*) - psi_x(y)] - f_xy H^{-1} rho(y*),     rho(y*) = rho(y) + [psi_y(y*) - psi_y(y)],

    so that |dphi - G| <= |psi_xy| |delta| + (|f_xy| / mu) (|rho| + |psi_yy| |delta|), with the norms taken at y: exact
    when F and f are quadratic in y, first order in delta otherwise. Rounding of f_y and rho at the scale of
    machine epsilon times |H| is added to them. The norms, and mu unless it is given, are Lanczos bounds (not estimates)
    that fail with a probability of 1e-8 over the random start. Where Lanczos cannot prove a positive mu within `effort`
    products (about the root of the condition number, or the dimension, is what it needs) the bound is inf.

    For the conditions R(x, z) = 0 of a constrained or non-smooth lower level the same holds, to first order in delta,
    with R in place of f_y, z of y, and of eigenvalues the singular values of R_z, a matrix that has to be formed; as
    long as the same rows, and the same piece of the prox, are active at z and z*.

    Args:
        point: both objectives at (x, y), or the optimality conditions there.
        adjoint: the computed v.
        residual_norm: |F_y - H v|, measured.
        strong_convexity: mu, when known; every eigenvalue of f_yy must be at least this between y and y*.
        constants: of an earlier call; nothing is estimated then.
        effort: limit of products for mu, and for each of the norms (which need 5 to 20); raised to the dimension where
            that is at most 300.
        seed: of the random starts.

    Returns:
        The Certificate.
    """
    eps = torch.finfo(adjoint.dtype).eps
    lowest = None
    if constants is None:
        constants, lowest = _estimate(point, adjoint, strong_convexity, effort, seed)
    mu = constants.strong_convexity if strong_convexity is None else strong_convexity
    y = torch.cat([leaf.detach().flatten() for leaf in point.y_leaves])
    top = constants.largest_curvature
    lower = float(point.lower_y.norm()) + eps * top * float(y.norm())
    rho = residual_norm + eps * (top * float(adjoint.norm()) + float(point.upper_y.norm()))
    if not mu > 0:
        return Certificate(float("inf"), constants, float("inf"), lowest)
    distance = lower / mu
    bound = constants.upper_lower * distance + constants.cross / mu * (rho + constants.lower_lower * distance)
    rounding = 4 * eps * (float(point.upper_x.norm()) + constants.cross * float(adjoint.norm()))
    return Certificate(bound + rounding, constants, distance, lowest)


def _estimate(
    point: Linearization | Optimality, adjoint: Tensor, strong_convexity: float | None, effort: int, seed: int
) -> tuple[Constants, float | None]:
    equations = isinstance(point, Optimality)
    out, into = (point.ravel, point.ravel_x) if isinstance(point, Optimality) else (point.spaces.y, point.spaces.x)
    generator = torch.Generator(adjoint.device).manual_seed(seed)
    steps = max(effort, out.size) if out.size <= _SMALL else effort
    known = strong_convexity is not None
    if equations:
        sigma = torch.linalg.svdvals(point.hessian.to_dense())
        top, lowest, spent = float(sigma[0]), float(sigma[-1]), 0
        rounding = 10 * out.size * torch.finfo(sigma.dtype).eps * top
        mu = max(lowest - rounding, 0.0)
    else:
        spectrum = extreme_eigenvalues(point.hessian, steps=steps, rtol=0.2, generator=generator, need_lowest=not known)
        mu = max(float(spectrum.lowest_bound), 0.0) if strong_convexity is None else strong_convexity
        top, lowest = max(abs(float(spectrum.lowest)), abs(float(spectrum.highest))), float(spectrum.lowest)
        spent = spectrum.products
    slopes = point.lower_y_graph_beyond()  # psi is differentiated twice more
    psi = point.upper_graph - sum(
        ((g * v).sum() for g, v in zip(slopes, out.split(adjoint), strict=True)),
        torch.zeros((), dtype=adjoint.dtype, device=adjoint.device),
    )
    psi_y = gradient(psi, point.y_leaves, create_graph=True)
    operators: list[LinearOperator] = [
        point.cross,
        GraphOperator(psi_y, point.x_leaves, out, into),
        GraphOperator(psi_y, point.y_leaves, out, out, symmetric=True),
    ]
    norms = [operator_norm(operator, steps=steps, rtol=0.2, generator=generator) for operator in operators]
    cross, upper_lower, lower_lower = (float(norm.bound) for norm in norms)
    spent += sum(norm.products for norm in norms)
    return Constants(mu, top, cross, upper_lower, lower_lower, spent), None if known else lowest
