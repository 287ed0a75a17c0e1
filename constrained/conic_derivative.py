"""Optimality of a conic program as a root, with any-order derivatives, and the solvers that find it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from nestopt.implicit.jacobian import SystemJacobian
from nestopt.linalg import LU, LinearOperator, Status
from nestopt.linalg.dense import Factored

from .conic_cones import ConicCones
from .conic_form import ConicForm, accumulate
from .kkt import refine

__all__ = ["ConicEquations", "ConicLU", "find_conic", "measure_conic"]

Program = tuple[Any, Any, Any, Any]


@dataclass(frozen=True)
class ConicEquations:
    """Optimality of min x'P x / 2 + c'x subject to A x + s = b, s in K, as a root.

    R(x, v) = (P x + c + A'y, A x + s - b) with y = P_K*(v) and s = y - v.

    By Moreau's decomposition v = y - s with y in K*, s in K and y's = 0: these three hold for every v, and R = 0 is all
    that is left of the optimality conditions.

    Attributes:
        cones: K.
        sizes: n and m.
        P_at: rows and columns of the entries of P.
        A_at: those of A.
    """

    cones: ConicCones
    sizes: tuple[int, int]
    P_at: tuple[Tensor, Tensor]
    A_at: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, form: ConicForm, device: torch.device) -> ConicEquations:
        """The equations of a form, on a device."""
        maps = form.on(device)
        return cls(form.cones, (form.n, form.m), maps["P_at"], maps["A_at"])

    def products(self, x: Tensor, y: Tensor, P: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """P x, A'y and A x, from the entries of P and A."""
        n, m = self.sizes
        return (
            accumulate(P * x[..., self.P_at[1]], self.P_at[0], n),
            accumulate(A * y[..., self.A_at[0]], self.A_at[1], n),
            accumulate(A * x[..., self.A_at[1]], self.A_at[0], m),
        )

    def residual(self, z: Tensor, P: Tensor, c: Tensor, A: Tensor, b: Tensor) -> Tensor:
        """R at z = (x, v), of z's shape (*batch, n + m)."""
        x, v = torch.split(z, list(self.sizes), -1)
        y = self.cones.project_dual(v)
        Px, Aty, Ax = self.products(x, y, P, A)
        return torch.cat([Px + c + Aty, Ax + (y - v) - b], -1)

    def jacobian(self, z: Tensor, P: Tensor, c: Tensor, A: Tensor, b: Tensor) -> Tensor:
        """DR/dz = ((P, A'D), (A, D - I)) with D of the projection onto K*, of shape (*batch, n + m, n + m)."""
        n, m = self.sizes
        D = self.cones.dual_jacobian(z[..., n:])
        matrix = torch.zeros(*z.shape, n + m, dtype=z.dtype, device=z.device)
        dense = torch.zeros(*z.shape[:-1], m, n, dtype=z.dtype, device=z.device)
        matrix[(..., *self.P_at)] = P
        dense[(..., *self.A_at)] = A
        matrix[..., :n, n:], matrix[..., n:, :n] = dense.mT @ D, dense
        matrix[..., n:, n:] = D - torch.eye(m, dtype=z.dtype, device=z.device)
        return matrix

    def lagrangian(self, z: Tensor, P: Tensor, c: Tensor, d: Tensor, A: Tensor, b: Tensor) -> Tensor:
        """X'P x / 2 + c'x + d + y'(A x - b), stationary in z at a solution."""
        x, v = torch.split(z, list(self.sizes), -1)
        y = self.cones.project_dual(v)
        Px, _, Ax = self.products(x, y, P, A)
        return (x * (Px / 2 + c)).sum(-1) + d + (y * (Ax - b)).sum(-1)


def measure_conic(equations: ConicEquations, z: Tensor, P: Tensor, c: Tensor, A: Tensor, b: Tensor) -> Tensor:
    """The larger of the two residuals, each relative to one plus its largest summand, per item."""
    x, v = torch.split(z, list(equations.sizes), -1)
    y = equations.cones.project_dual(v)
    Px, Aty, Ax = equations.products(x, y, P, A)
    parts = []
    for r, terms in ((Px + c + Aty, (Px, c, Aty)), (Ax + (y - v) - b, (Ax, y - v, b))):
        if r.shape[-1]:
            parts.append(r.abs().amax(-1) / (1 + torch.stack([t.abs().amax(-1) for t in terms]).amax(0)))
    return torch.stack(parts).amax(0)


@dataclass(frozen=True)
class ConicLU(LU):
    """LU of the Jacobian of R, which is written down instead of found by n + m backward passes.

    Args:
        equations: of R.
    """

    equations: ConicEquations | None = None

    def prepare(self, A: LinearOperator) -> Factored:
        """Factorise.

        Args:
            A: the Jacobian of the equations' residual with its point and data, of shape (*batch, n + m, n + m).

        Returns:
            The factors; products with A itself certify the solutions.
        """
        if not isinstance(A, SystemJacobian) or self.equations is None:
            return super().prepare(A)
        self._check_operator(A)
        with torch.no_grad():
            matrix = self.equations.jacobian(A.y.detach(), *(t.detach() for t in A.theta))
            return Factored(self, A, matrix, *self._factorise(matrix))


def find_conic(
    equations: ConicEquations,
    solver: str | None,
    options: Mapping[str, Any],
    tolerance: float,
    *data: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve every item by the solver, and refine by semismooth Newton steps; NaN for an item without a solution.

    Args:
        equations: of the form.
        solver: an installed solver of cvxpy, None for Clarabel.
        options: of the solver.
        tolerance: for `measure_conic`.
        data: P, c, A, b and which items may be tried, with the same batch in front.

    Returns:
        z of shape (*batch, n + m), Status codes and the measured error, of shape (*batch,).
    """
    *numbers, inside = data
    batch, device = torch.broadcast_shapes(inside.shape, *(t.shape[:-1] for t in numbers)), inside.device  # type: ignore[no-untyped-call]
    inside, numbers = inside.expand(batch), [t.expand(*batch, -1) for t in numbers]
    flat = [t.reshape(batch.numel(), t.shape[-1]).cpu().numpy() for t in numbers]
    places = [tuple(i.cpu().numpy() for i in at) for at in (equations.P_at, equations.A_at)]
    solve = _clarabel if solver is None or solver.upper() == "CLARABEL" else _cvxpy(solver)
    n, m = equations.sizes
    z, codes = np.full((batch.numel(), n + m), np.nan), np.zeros(batch.numel(), dtype=np.int64)
    for i, allowed in enumerate(inside.flatten().tolist()):
        P, c, A, b = (t[i] for t in flat)
        if not all(np.isfinite(t).all() for t in (P, c, A, b)):
            codes[i] = Status.NON_FINITE.code
        elif not allowed:
            codes[i] = Status.NOT_CONVEX.code
        else:
            program = (_matrix(P, places[0], (n, n)), c, _matrix(A, places[1], (m, n)), b)
            found, codes[i] = solve(program, equations.cones, options)
            if found is not None:
                z[i] = found
    start = torch.as_tensor(z, device=device).reshape(*batch, n + m)
    code = torch.as_tensor(codes, device=device).reshape(batch)
    present = torch.isfinite(start).all(-1)
    best, error = start, torch.full(batch, torch.nan, dtype=torch.float64, device=device)
    if bool(present.any()):
        kept = [t[present] for t in numbers]
        (sharp,) = refine(equations.residual, equations.jacobian)(start[present], *kept)
        best = start.clone()
        best[present] = sharp
        error[present] = measure_conic(equations, sharp, *kept)
        solved = present & (error <= tolerance)
        code = torch.where(solved, Status.CONVERGED.code, code)
        # what the solver called solved is not, where the residual says so
        code = torch.where(~solved & (code == Status.CONVERGED.code), Status.STAGNATED.code, code)
    best = torch.where((code == Status.CONVERGED.code)[..., None], best, torch.nan)
    return best, code, error


def _matrix(values: Any, at: tuple[Any, ...], shape: tuple[int, int]) -> Any:
    return sp.csc_array((values, at), shape=shape)


def _clarabel(program: Program, cones: ConicCones, options: Mapping[str, Any]) -> tuple[Any, int]:
    clarabel = import_module("clarabel")
    kinds = [clarabel.ZeroConeT(cones.zero)] if cones.zero else []
    kinds += [clarabel.NonnegativeConeT(cones.nonnegative)] if cones.nonnegative else []
    kinds += [clarabel.SecondOrderConeT(size) for size in cones.second_order]
    kinds += [clarabel.PSDTriangleConeT(k) for k in cones.semidefinite]
    kinds += [clarabel.ExponentialConeT() for _ in range(cones.exponential)]
    kinds += [clarabel.PowerConeT(alpha) for alpha in cones.power]
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    for name, value in options.items():
        if not hasattr(settings, name):
            raise ValueError(f"ConvexProgram: solver_options has {name!r}, which is no setting of Clarabel.")
        setattr(settings, name, value)
    P, c, A, b = program
    found = clarabel.DefaultSolver(sp.csc_matrix(sp.triu(P)), c, sp.csc_matrix(A), b, kinds, settings).solve()
    status = _STATUSES.get(str(found.status), Status.STAGNATED)
    x, y, s = (np.asarray(part) for part in (found.x, found.z, found.s))
    if status in (Status.INFEASIBLE, Status.UNBOUNDED):
        return None, (status if _proves(status, program, cones, x, y) else Status.STAGNATED).code
    return np.concatenate([x, y - s]), status.code


def _proves(status: Status, program: Program, cones: ConicCones, x: Any, y: Any) -> bool:
    """Whether y is a Farkas certificate of infeasibility, or x a direction of endless descent, up to `_CERTIFIED`.

    A'y = 0, y in K* and b'y < 0: no feasible (x, s) has |x| + |s| below a million. P x = 0, -A x in K and c'x < 0: from
    any feasible point the objective falls without bound along x.

    Args:
        status: INFEASIBLE or UNBOUNDED, as the solver says.
        program: P, c, A and b of an item.
        cones: K.
        x: what the solver found, shape (n,).
        y: its multipliers, shape (m,).

    Returns:
        The truth.
    """

    def onto_dual(v: Any) -> Any:
        return cones.project_dual(torch.as_tensor(v, dtype=torch.float64)).numpy()

    P, c, A, b = program
    if status is Status.INFEASIBLE:
        gain, lost = -b @ y, (A.T @ y, y - onto_dual(y))
    else:
        gain, lost = -c @ x, (P @ x, onto_dual(A @ x))  # s in K projects -s to zero
    return bool(gain > 0) and all(np.abs(part).max(initial=0) <= _CERTIFIED * gain for part in lost)


_CERTIFIED = 1e-6  # relative to the certificate's gain


_STATUSES = {
    "Solved": Status.CONVERGED,
    "AlmostSolved": Status.CONVERGED,
    "PrimalInfeasible": Status.INFEASIBLE,
    "AlmostPrimalInfeasible": Status.INFEASIBLE,
    "DualInfeasible": Status.UNBOUNDED,
    "AlmostDualInfeasible": Status.UNBOUNDED,
    "MaxIterations": Status.MAX_ITER,
    "MaxTime": Status.MAX_ITER,
}


def _cvxpy(solver: str) -> Callable[[Program, ConicCones, Mapping[str, Any]], tuple[Any, int]]:
    """Any other solver, by handing the conic program back to cvxpy."""
    cp = import_module("cvxpy")

    def solve(program: Program, cones: ConicCones, options: Mapping[str, Any]) -> tuple[Any, int]:
        P, c, A, b = program
        x = cp.Variable(len(c))
        objective = c @ x if P.nnz == 0 else cp.quad_form(x, cp.psd_wrap(P)) / 2 + c @ x
        constraints: list[Any] = []
        reads: list[Callable[[Any], Any]] = []
        edges = np.cumsum([0, *cones.sizes])
        for k, size in enumerate(cones.sizes):
            if not size:
                continue
            part = slice(edges[k], edges[k + 1])
            s = b[part] - A[part] @ x
            if k == 0:
                constraint, read = s == 0, lambda c: -c.dual_value
            elif k == 1:
                constraint, read = s >= 0, lambda c: c.dual_value
            elif k < 2 + len(cones.second_order):
                constraint = cp.SOC(s[0], s[1:])
                read = lambda c: np.concatenate([np.ravel(d) for d in c.dual_value])  # noqa: E731
            elif k < len(cones.sizes) - 2:
                order = cones.semidefinite[k - 2 - len(cones.second_order)]
                fill, read = _triangle(order)
                constraint = cp.reshape(fill @ s, (order, order), order="C") >> 0
            else:
                # older versions of cvxpy refuse vectors of one power cone
                three = (s[0], s[1], s[2]) if size == 3 else (s[0::3], s[1::3], s[2::3])
                power = k == len(cones.sizes) - 1
                constraint = cp.PowCone3D(*three, np.array(cones.power)) if power else cp.ExpCone(*three)
                read = lambda c: np.stack([np.ravel(d) for d in c.dual_value], -1).ravel()  # noqa: E731
            constraints.append(constraint)
            reads.append(read)
        problem = cp.Problem(cp.Minimize(objective), constraints)
        try:
            problem.solve(solver=solver.upper(), **options)
        except cp.error.SolverError as error:
            try:
                problem.get_problem_data(solver.upper())
            except cp.error.SolverError:
                raise ValueError(
                    f"ConvexProgram: the solver {solver} cannot do the cones of the problem ({error}); leave solver at "
                    "None."
                ) from error
            return None, Status.STAGNATED.code
        if "infeasible" in problem.status or "unbounded" in problem.status:
            _, code = _clarabel(program, cones, {})  # cvxpy hands no certificate on
            certified = (Status.INFEASIBLE.code, Status.UNBOUNDED.code)
            return None, code if code in certified else Status.STAGNATED.code
        if x.value is None or any(c.dual_value is None for c in constraints):
            return None, Status.MAX_ITER.code
        duals = [np.ravel(read(constraint)) for read, constraint in zip(reads, constraints, strict=True)]
        y = np.concatenate([np.zeros(0), *duals])
        return np.concatenate([x.value, y - (b - A @ x.value)]), Status.CONVERGED.code

    return solve


def _triangle(k: int) -> tuple[Any, Callable[[Any], Any]]:
    """The map from a scaled triangle to the matrix by rows, and from a constraint's dual matrix to a triangle."""
    column, row = np.tril_indices(k)
    place, scale = np.arange(len(row)), np.where(row == column, 1.0, 2**0.5)
    off = row != column
    fill = sp.coo_array(
        (
            1 / np.concatenate([scale, scale[off]]),
            (np.concatenate([row * k + column, (column * k + row)[off]]), np.concatenate([place, place[off]])),
        ),
        shape=(k * k, len(row)),
    )
    return fill.tocsr(), lambda constraint: constraint.dual_value[row, column] * scale
