"""The hypergradient by the implicit function theorem, with its certificate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nestopt.linalg import Dense, LinearSolver, Result, Solution, SolverError, Status
from nestopt.linalg.result import all_finite

from .certificate import Certificate, Constants, certify
from .inverses import MinimumNormInverse, NamedInverse, advised, inverse_name
from .lower_choice import LowerLevel, lower_level
from .optimality import Optimality
from .point_solver import PointSolver
from .problem import Linearization, Problem, Spaces

__all__ = ["Hypergradient", "correct_adjoint", "hypergradient", "solve_adjoint"]


@dataclass(frozen=True, kw_only=True)
class Hypergradient(Result):
    """The derivative of phi(x) = F(x, y*(x)) as computed at (x, y), and what is known of its error.

    Attributes:
        x: the hypergradient in the structure of x; also `value`.
        error: |F_y - H v|, the measured residual of the adjoint system; also `linear_residual`.
        error_bound: bound on |value - d phi/dx| (see `certify`); inf where `bound_reason` says why there is none, None
            when no certificate was asked for.
        bound_reason: why error_bound is inf, None where it is not.
        inverse: which inverse of H the value is made with: "exact", or the name of a `NamedInverse`.
        lower_gradient_norm: |f_y(x, y)|; for a constrained or non-smooth lower level the residual of its conditions.
        dual: multipliers of the lower level's constraints, inequalities first, one vector; empty without.
        weak: weakly active rows: at zero with a multiplier of zero, counted as inactive.
        curvature: (smallest, largest) Ritz value of f_yy seen by the linear solver or the certificate, None if neither
            saw one.
        adjoint: v, in the structure of y, to warm-start the next call.
        upper: F(x, y).
        lower: f(x, y).
        constants: the certificate's constants, to be reused while they change little.
        products: products with second derivatives that were spent, certificate included.
    """

    error_bound: float | None
    bound_reason: str | None
    inverse: str
    dual: Tensor
    weak: int
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

    def unwrap(self) -> Any:
        """The hypergradient if the linear solver converged at a lower solution; see `linalg.Result.unwrap`.

        Returns:
            `x`.

        Raises:
            SolverError: otherwise, with the status, the error and the advice.
        """
        try:
            return super().unwrap()
        except SolverError as error:
            raise SolverError(advised(error), self) from None

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
    dual: Any = None,
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

    Where y is kept in a set, has a prox or constraints g <= 0, h = 0, the same is done with the optimality conditions
    R(x, z) = 0 of z = (y, multipliers) in place of f_y: R_z'u = (F_y, 0), d phi = F_x - R_x'u; see `Optimality` for R,
    for the side that is taken at weakly active rows, and at kinks. mu is then the smallest singular value of R_z, and
    the bound holds as long as no row becomes active or inactive between y and the solution.

    The status is CONVERGED when the linear solver met its tolerance and the distance of y to the lower solution,
    |f_y| / mu, is at most lower_rtol * max(1, |y|); else NOT_STATIONARY, or the linear solver's status
    (NEGATIVE_CURVATURE and SINGULAR say what is wrong with H), or NON_FINITE. The value is returned in every case.
    Where H is singular y*(x) is not unique and has no derivative: use a method that needs none (MEHA, BAMM, BDA), or
    say by `MinimumNormInverse()` or `RidgeInverse(shift)` which stand-in is meant; the result's `inverse` repeats it.

    Cost: 2 gradients of F and f with a graph, k products for k steps of the linear solver, 1 for f_xy v; the
    certificate adds Lanczos runs, unless `constants` are passed or it is switched off: up to 2 k products (300 for
    fewer variables than that) for mu and 5 to 20 for each of three norms, some through third derivatives.

    Args:
        problem: the problem.
        x: upper variable, a pytree of tensors or a module.
        y: lower variable, the computed lower solution, likewise.
        linear_solver: for H v = F_y; None for CG(), and for R_z, which is not symmetric, LU() up to dimension 512 and
            GMRES() beyond. A dense Cholesky() is best for H below a few hundred variables.
        adjoint: v of a nearby point, an earlier result's `adjoint`, to start from.
        dual: multipliers of the constraints, one vector, inequalities first, such as `state.dual` of AID's result; None
            for those that fit f_y best.
        data: third argument of the objectives, when they take one.
        strong_convexity: mu of f_yy, when known; the bound is then rigorous for quadratics. Smooth lower levels only.
        constants: of an earlier Hypergradient, so that the certificate costs no product.
        certificate: False to leave the bound out.
        lower_rtol: how close y must be to the lower solution, relative to max(1, |y|).

    Returns:
        The Hypergradient.

    Raises:
        TypeError: for variables that are not real floating tensors, or objectives that return no scalar.
        ValueError: for shared memory, mixed dtypes or devices, an unused upper variable, tensors that require grad
            captured by a closure, or strong_convexity with a constrained or non-smooth lower level.

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
    spaces = Spaces.of(x, y)
    level = lower_level(problem, spaces, data)
    x_vector, y_vector = spaces.x.flatten(x).detach(), spaces.y.flatten(y).detach()
    level.check(x_vector, y_vector)
    known = level.estimate_dual(x_vector, y_vector) if dual is None else torch.as_tensor(dual).to(y_vector)
    point = level.linearize(x_vector, y_vector, known)
    smooth = isinstance(point, Linearization)
    if strong_convexity is not None and not smooth:
        raise ValueError(
            "hypergradient: strong_convexity is that of f_yy, but the lower level is constrained or non-smooth: its "
            "bound takes the smallest singular value of the optimality conditions, which is computed; pass None."
        )
    solver = level.default_linear_solver() if linear_solver is None else linear_solver
    value, solution = solve_adjoint(point, solver, _adjoint_vector(level, known, adjoint))
    certified, reason = None, None
    if certificate:
        reason = _no_bound(point, solver, solution)
    if certificate and reason is None:
        effort = max(30, 2 * int(solution.iterations))
        residual = float(solution.residual_norm)
        certified = certify(point, solution.x, residual, strong_convexity, constants, effort=effort)
        if certified.error_bound == float("inf"):
            reason = "no positive lower bound of the curvature (of the singular values of R_z) could be shown"
    curvature = _curvature(solution, certified)
    limit = lower_rtol * max(1.0, float(y_vector.norm()))
    named = isinstance(solver, NamedInverse)
    if isinstance(point, Optimality):
        code = _judge_conditions(level, point, solution, limit, named)
    else:
        mu = strong_convexity or (curvature[0] if curvature else None)
        code = _judge(point, solution, None if named else curvature, None if named else mu, limit)
    return Hypergradient(
        x=spaces.x.unflatten(value),
        codes=torch.tensor(code.code),
        iterations=solution.iterations,
        error=solution.residual_norm,
        error_bound=certified.error_bound if certified else (float("inf") if certificate else None),
        bound_reason=reason,
        inverse=inverse_name(solver),
        dual=known,
        weak=0 if isinstance(point, Linearization) else point.weak,
        lower_gradient_norm=float(point.lower_y.norm() if isinstance(point, Linearization) else point.residual),
        curvature=curvature,
        adjoint=spaces.y.unflatten(solution.x) if smooth else solution.x,
        upper=float(point.upper),
        lower=float(point.lower),
        constants=certified.constants if certified else constants,
        products=solution.products
        + 1
        + (0 if isinstance(point, Linearization) else point.products)
        + (certified.constants.products if certified and constants is None else 0),
    )


def solve_adjoint(
    point: Linearization | Optimality, solver: LinearSolver, start: Tensor | None, enough: float = float("inf")
) -> tuple[Tensor, Solution]:
    """The raveled hypergradient at a linearized point: H v = F_y (R_z'v = F_z), then F_x - f_xy v (F_x - R_x'v).

    Args:
        point: both objectives at (x, y), or the optimality conditions there.
        solver: for H v = F_y.
        start: v of a nearby point, or None.
        enough: where the solver converged to its own tolerance but left a larger residual than this, it solves once
            more, for the correction.

    Returns:
        The hypergradient and the Solution of the adjoint system.
    """
    H, b = point.hessian if point.hessian.symmetric else point.hessian.T, point.upper_y
    solver = solver.at(point) if isinstance(solver, PointSolver) else solver
    solution = solver(H, b, start)
    if solution.converged and float(solution.residual_norm) > enough and not isinstance(solver, NamedInverse):
        more = solver(H, b - H @ solution.x)
        x = solution.x + more.x
        _, error = H.certified_residual(x, b)
        if float(error) < float(solution.residual_norm):
            spent = solution.products + more.products + 1 + H.certification_products
            steps = solution.iterations + more.iterations
            norm = float(error)
            solution = replace(solution, x=x, error=norm, residual_norm=norm, products=spent, iterations=steps)
    return point.upper_x - point.cross.T @ solution.x, solution


def correct_adjoint(point: Linearization | Optimality, solver: LinearSolver, start: Tensor) -> tuple[Tensor, Solution]:
    """The raveled hypergradient, with the adjoint system solved for the correction of a start.

    H d = F_y - H start, v = start + d: the solver's rtol is relative to the residual of the start.

    Args:
        point: both objectives at (x, y).
        solver: for H d = r.
        start: v of a nearby point.

    Returns:
        The hypergradient and the Solution of the adjoint system.
    """
    H = point.hessian if point.hessian.symmetric else point.hessian.T
    solver = solver.at(point) if isinstance(solver, PointSolver) else solver
    found = solver(H, point.upper_y - H @ start)
    solution = replace(found, x=start + found.x, products=found.products + 1)
    return point.upper_x - point.cross.T @ solution.x, solution


def _curvature(solution: Solution, certified: Certificate | None) -> tuple[float, float] | None:
    seen = [solution.curvature] if solution.curvature is not None else []
    if certified is not None and certified.lowest_eigenvalue is not None:
        seen.append((certified.lowest_eigenvalue, certified.constants.largest_curvature))
    return (float(min(low for low, _ in seen)), float(max(high for _, high in seen))) if seen else None


def _adjoint_vector(level: LowerLevel, dual: Tensor, adjoint: Any) -> Tensor | None:
    if adjoint is None:
        return None
    if isinstance(adjoint, Tensor) and adjoint.shape == (level.spaces.y.size + len(dual),):
        return adjoint.detach()
    return level.spaces.y.flatten(adjoint).detach()


def _no_bound(point: Linearization | Optimality, solver: LinearSolver, solution: Solution) -> str | None:
    """Why there is no certificate, before one is tried."""
    if not point.finite() or not all_finite(solution.x):
        return "a value, a gradient or the adjoint is not finite"
    if isinstance(solver, NamedInverse):
        return f"the value is made with a stand-in for the inverse ({solver.name}), not with the inverse"
    if isinstance(point, Optimality) and point.weak:
        return f"{point.weak} constraints are weakly active, where y*(x) has no derivative but one to each side"
    if isinstance(point, Optimality) and not isinstance(point.hessian, Dense):
        return f"the conditions have dimension {point.ravel.size}, too large for their smallest singular value"
    return None


def _judge_conditions(level: LowerLevel, point: Optimality, solution: Solution, limit: float, named: bool) -> Status:
    if not point.finite():
        return Status.NON_FINITE
    status = solution.status
    assert isinstance(status, Status)
    if status is not Status.CONVERGED:
        return status
    newton = (MinimumNormInverse() if named else level.default_linear_solver())(point.hessian, point.lower_y)
    distance = float(newton.x.norm())  # to the solution, to first order
    return Status.CONVERGED if distance <= limit else Status.NOT_STATIONARY


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
