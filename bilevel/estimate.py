"""The hypergradient by the implicit function theorem, with its certificate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nestopt.linalg import CG, LinearSolver, Result, Solution, Status
from nestopt.linalg.result import all_finite

from .certificate import Certificate, Constants, certify
from .problem import Linearization, Problem, Spaces

__all__ = ["Hypergradient", "hypergradient", "solve_adjoint"]


@dataclass(frozen=True, kw_only=True)
class Hypergradient(Result):
    """The derivative of phi(x) = F(x, y*(x)) as computed at (x, y), and what is known of its error.

    Attributes:
        x: the hypergradient in the structure of x; also `value`.
        error: |F_y - H v|, the measured residual of the adjoint system; also `linear_residual`.
        error_bound: bound on |value - d phi/dx| (see `certify`); inf when no curvature bound is known, None when no
            certificate was asked for.
        lower_gradient_norm: |f_y(x, y)|.
        curvature: (smallest, largest) Ritz value of f_yy seen by the linear solver or the certificate, None if neither
            saw one.
        adjoint: v, in the structure of y, to warm-start the next call.
        upper: F(x, y).
        lower: f(x, y).
        constants: the certificate's constants, to be reused while they change little.
        products: products with second derivatives that were spent, certificate included.
    """

    error_bound: float | None
    lower_gradient_norm: float
    curvature: tuple[float, float] | None
    adjoint: Any
    upper: float
    lower: float
    constants: Constants | None
    products: int

    @property
    def value(self) -> Any:
        """The hypergradient, in the structure of x."""
        return self.x

    @property
    def linear_residual(self) -> float:
        """|F_y - H v|, measured."""
        return float(self.error)


def hypergradient(
    problem: Problem,
    x: Any,
    y: Any,
    linear_solver: LinearSolver | None = None,
    *,
    adjoint: Any = None,
    data: Any = None,
    strong_convexity: float | None = None,
    constants: Constants | None = None,
    certificate: bool = True,
    lower_rtol: float = 1e-3,
) -> Hypergradient:
    r"""The derivative of phi(x) = F(x, y*(x)), y*(x) = argmin f(x, .), from a computed y.

    d phi = F_x - f_xy v with H v = F_y, H = f_yy(x, y): one gradient of F, one kept gradient graph of f, one backward
    pass for each product of the linear solve, one for f_xy v. With r = F_y - H v and a lower bound mu of H's
    eigenvalues, `error_bound` bounds the distance to the true derivative.

    The status is CONVERGED when the linear solver met its tolerance and the distance of y to the lower solution,
    |f_y| / mu, is at most lower_rtol * max(1, |y|); else NOT_STATIONARY, or the linear solver's status
    (NEGATIVE_CURVATURE and SINGULAR say what is wrong with H), or NON_FINITE. The value is returned in every case.

    Cost: 2 gradients of F and f with a graph, k products for k steps of the linear solver, 1 for f_xy v; the
    certificate adds Lanczos runs, unless `constants` are passed or it is switched off: up to 2 k products (300 for
    fewer variables than that) for mu and 5 to 20 for each of three norms, some through third derivatives.

    Args:
        problem: with a smooth, unconstrained lower level.
        x: upper variable, a pytree of tensors or a module.
        y: lower variable, the computed lower solution, likewise.
        linear_solver: for H v = F_y; None for CG(). A dense Cholesky() is best below a few hundred variables.
        adjoint: v of a nearby point, in the structure of y, to start from.
        data: third argument of the objectives, when they take one.
        strong_convexity: mu, when known; the bound is then rigorous for quadratics.
        constants: of an earlier Hypergradient, so that the certificate costs no product.
        certificate: False to leave the bound out.
        lower_rtol: how close y must be to the lower solution, relative to max(1, |y|).

    Returns:
        The Hypergradient.

    Raises:
        TypeError: for variables that are not real floating tensors, or objectives that return no scalar.
        ValueError: for shared memory, mixed dtypes or devices, an unused upper variable, tensors that require grad
            captured by a closure, or a constrained or non-smooth lower level.

    Reference:
        Pedregosa 2016, eq. (3); the bound is derived in `certify`.

    Example:
        >>> from nestopt import bilevel
        >>> problem = bilevel.Problem(lambda x, y: (y**2).sum() / 2, lambda x, y: (y**2).sum() - (x * y).sum())
        >>> x = torch.tensor([2.0, 4.0], dtype=torch.float64)
        >>> hg = bilevel.hypergradient(problem, x, x / 2)
        >>> hg.value, hg.status.name, hg.error_bound < 1e-12
        (tensor([0.5000, 1.0000], dtype=torch.float64), 'CONVERGED', True)
    """
    problem.require_smooth_lower_level("hypergradient")
    spaces = Spaces.of(x, y)
    point = Linearization(problem, spaces, spaces.x.flatten(x).detach(), spaces.y.flatten(y).detach(), data)
    point.check()
    start = None if adjoint is None else spaces.y.flatten(adjoint).detach()
    value, solution = solve_adjoint(point, CG() if linear_solver is None else linear_solver, start)
    certified = None
    if certificate and point.finite() and all_finite(solution.x):
        effort = max(30, 2 * int(solution.iterations))
        residual = float(solution.residual_norm)
        certified = certify(point, solution.x, residual, strong_convexity, constants, effort=effort)
    curvature = _curvature(solution, certified)
    mu = strong_convexity or (curvature[0] if curvature else None)
    limit = lower_rtol * max(1.0, float(spaces.y.flatten(y).detach().norm()))
    code = _judge(point, solution, curvature, mu, limit)
    return Hypergradient(
        x=spaces.x.unflatten(value),
        codes=torch.tensor(code.code),
        iterations=solution.iterations,
        error=solution.residual_norm,
        error_bound=certified.error_bound if certified else (float("inf") if certificate else None),
        lower_gradient_norm=float(point.lower_y.norm()),
        curvature=curvature,
        adjoint=spaces.y.unflatten(solution.x),
        upper=float(point.upper),
        lower=float(point.lower),
        constants=certified.constants if certified else constants,
        products=solution.products + 1 + (certified.constants.products if certified and constants is None else 0),
    )


def solve_adjoint(
    point: Linearization, solver: LinearSolver, start: Tensor | None, enough: float = float("inf")
) -> tuple[Tensor, Solution]:
    """The raveled hypergradient at a linearized point: H v = F_y, then F_x - f_xy v.

    Args:
        point: both objectives at (x, y).
        solver: for H v = F_y.
        start: v of a nearby point, or None.
        enough: where the solver converged to its own tolerance but left a larger residual than this, it solves once
            more, for the correction.

    Returns:
        The hypergradient and the Solution of the adjoint system.
    """
    solution = solver(point.hessian, point.upper_y, start)
    if solution.converged and float(solution.residual_norm) > enough:
        H, b = point.hessian, point.upper_y
        more = solver(H, b - H @ solution.x)
        x = solution.x + more.x
        _, error = H.certified_residual(x, b)
        if float(error) < float(solution.residual_norm):
            spent = solution.products + more.products + 1 + H.certification_products
            steps = solution.iterations + more.iterations
            norm = float(error)
            solution = replace(solution, x=x, error=norm, residual_norm=norm, products=spent, iterations=steps)
    return point.upper_x - point.cross.T @ solution.x, solution


def _curvature(solution: Solution, certified: Certificate | None) -> tuple[float, float] | None:
    seen = [solution.curvature] if solution.curvature is not None else []
    if certified is not None and certified.lowest_eigenvalue is not None:
        seen.append((certified.lowest_eigenvalue, certified.constants.largest_curvature))
    return (float(min(low for low, _ in seen)), float(max(high for _, high in seen))) if seen else None


def _judge(
    point: Linearization, solution: Solution, curvature: tuple[float, float] | None, mu: float | None, limit: float
) -> Status:
    if not point.finite():
        return Status.NON_FINITE
    if not solution.converged:
        status = solution.status
        assert isinstance(status, Status)
        return status
    eps = torch.finfo(point.lower_y.dtype).eps
    if curvature is not None and curvature[0] <= 10 * eps * abs(curvature[1]):
        # a solver for indefinite systems has solved it all the same: y is no minimiser
        return Status.NEGATIVE_CURVATURE if curvature[0] < -10 * eps * abs(curvature[1]) else Status.SINGULAR
    if mu is None:  # no curvature was seen: one product along the lower gradient measures it there
        size = float(point.lower_y.norm())
        along = float((point.hessian @ point.lower_y).norm()) if size else 1.0
        mu = along / size if size else 1.0
    distance = float(point.lower_y.norm()) / mu if mu > 0 else float("inf")
    return Status.CONVERGED if distance <= limit else Status.NOT_STATIONARY
