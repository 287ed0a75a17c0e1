"""From a flat batch of quadratic programs to certified solutions, statuses and factors for derivatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nestopt.linalg.result import Status

from .active_set import ActiveSystem, polish
from .interior_point import InteriorPoint, Program, Scaling, amax, product
from .qp_fast_paths import pivoting, separable_guess

__all__ = ["NUMBERLESS", "Solved", "Solver", "solve_programs"]

# Statuses that come without numbers.
NUMBERLESS = (Status.INFEASIBLE, Status.UNBOUNDED, Status.NOT_CONVEX, Status.NON_FINITE)
# A dual and a slack, in equilibrated units, that are both no larger make a row weakly active.
WEAK = 1e-7

# (program, tolerance, max_iter) -> x, duals, iterations: who finds a first solution
Solver = Callable[[Program, float, int], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Solved:
    """What was found of a flat batch.

    Attributes:
        x: shape (B, n).
        y: duals of all rows, shape (B, p + m).
        codes: Status codes.
        iterations: of the solver.
        error: the relative KKT residual at x and y, in equilibrated units.
        strong: rows with a positive dual, shape (B, m).
        weak: rows with neither dual nor slack, shape (B, m).
        scaled: the equilibrated programs.
        scaling: how they are scaled.
        system: the active systems that were tried last, None where there were none.
    """

    x: Tensor
    y: Tensor
    codes: Tensor
    iterations: Tensor
    error: Tensor
    strong: Tensor
    weak: Tensor
    scaled: Program
    scaling: Scaling
    system: ActiveSystem | None

    def factors(self, active: Tensor) -> tuple[Tensor, ...]:
        """The factors of the active system of these rows, as `qp_derivative.Factors`."""
        useless = self.x.isnan().any(-1)
        system = ActiveSystem.of(self.scaled, active) if self.system is None else self.system
        system = system.moved(self.scaled, active, useless)
        scale = torch.cat([self.scaling.columns, self.scaling.rows], -1)
        return (*system.parts(), scale, self.codes)

    def central(self, mu: float) -> Tensor:
        """(x, duals) of the point of the central path lam s = mu in the program's own units, shape (B, n + p + m)."""
        P, scale = self.scaled, self.scaling
        useless = self.x.isnan().any(-1, keepdim=True)
        x, y = torch.where(useless, 0, self.x) / scale.x, torch.where(useless, 0, self.y) / scale.y
        p = P.p
        unit = scale.y[:, p:] / scale.d[:, p:]  # lam s = unit * scaled lam * scaled s, the same for all rows
        target = mu / unit
        lead = y[:, p:] - (P.d - product(P.C, x))[:, p:]  # lam - s, which the path keeps to first order
        root = (lead.square() + 4 * target).sqrt()
        larger = 0.5 * (lead.abs() + root)
        lam = torch.where(lead > 0, larger, target / larger)
        start = (x, torch.cat([y[:, :p], lam], -1), target / lam)
        state = InteriorPoint(P, target=target).solve(1e-11, 100, start)
        return torch.cat([state.x * scale.x, state.y * scale.y], -1)


def interior_point(
    program: Program, tolerance: float, max_iter: int, enough: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The library's own solver."""
    method = InteriorPoint(program, floor=0.1 * tolerance / max(program.m, 1))
    state = method.solve(tolerance, max_iter, enough=enough)
    return state.x, state.y, state.iterations


def interior_point_float32(program: Program, tolerance: float, max_iter: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same in float32, for a loose tolerance at half the cost."""
    narrow = Program(program.Q.float(), program.q.float(), program.C.float(), program.d.float(), program.p)
    # the last few items take as many steps as all others: polishing ends most of them
    x, y, steps = interior_point(narrow, tolerance, max_iter, enough=0.9)
    x, y = (torch.where(torch.isfinite(t), t, 0).to(program.q.dtype) for t in (x, y))
    return x, y, steps


def solve_programs(
    program: Program,
    rtol: float,
    max_iter: int,
    solver: Solver | None = None,
    warm: tuple[Tensor, Tensor] | None = None,
    bounds_only: bool = False,
) -> Solved:
    """Solve, polish and certify.

    Args:
        program: flat batch in float64; an inequality with d = inf is none.
        rtol: what the relative KKT residual may be.
        max_iter: limit of interior-point steps.
        solver: who finds the first solution; None for the interior-point method.
        warm: x and duals of a nearby solution; its active rows are tried first.
        bounds_only: whether every row is a bound of one variable.

    Returns:
        The solutions.
    """
    program, codes = _sanitise(program)
    scaled, scaling = program.equilibrate()
    codes, L = _check_convex(scaled, codes)
    if bool((codes != 0).any()):
        scaled = _trivial(scaled, codes != 0)
    B, m, p = len(program.q), program.m, program.p
    x, y = torch.zeros_like(program.q), torch.zeros_like(program.d)
    iterations = torch.zeros(B, dtype=torch.int64, device=x.device)
    error = torch.full_like(x.sum(-1), torch.inf)
    system: ActiveSystem | None = None
    left: Tensor | None = None
    if warm is not None or not m or bounds_only:
        if warm is not None:
            x, y = (torch.where(torch.isfinite(t), t, 0) for t in (warm[0] / scaling.x, warm[1] / scaling.y))
        if warm is None and bounds_only:
            x, active = separable_guess(scaled)
        else:
            active = _seems_active(scaled, x, y)
        x, y, error, system = polish(scaled, x, y, active)
        left = error > rtol
    elif solver is None and m <= scaled.q.shape[-1]:
        found_x, found_y, active, fit = pivoting(scaled, L)
        if bool(fit.any()):  # the others pass through, and are solved below
            x, y, error, system = polish(scaled, found_x, found_y, active, fit)
            left = ~fit | (error > rtol)
            error = torch.where(fit, error, torch.inf)
    if m and (left is None or bool(left.any())):
        rows = None if left is None or bool(left.all()) else left.nonzero()[:, 0]
        part = scaled if rows is None else scaled.take(rows)
        # loosely first: the polished solution of the right active rows is exact; more is for the items that need it
        for loosely, tolerance in ((True, 1e-3), (False, 1e-6), (False, min(rtol, 1e-9))):
            if loosely and solver is not None:
                continue
            finder = interior_point_float32 if loosely else (solver or interior_point)
            found_x, found_y, steps = finder(part, tolerance, min(max_iter, 25) if loosely else max_iter)
            found_x, found_y, found_error, found_system = polish(
                part, found_x, found_y, _seems_active(part, found_x, found_y)
            )
            if rows is None:
                x, y, error, iterations, system = found_x, found_y, found_error, steps, found_system
            else:
                better = found_error < error[rows]
                x, y, error = (
                    old.index_put((rows[better],), new[better])
                    for old, new in ((x, found_x), (y, found_y), (error, found_error))
                )
                iterations = iterations.index_add(0, rows, steps)
            left = error > rtol
            if not bool(left.any()):
                break
            rows = left.nonzero()[:, 0]
            part = scaled.take(rows)
    outcome = torch.where(error <= rtol, Status.CONVERGED.code, Status.STAGNATED.code)
    outcome = torch.where((error > rtol) & (iterations >= max_iter), Status.MAX_ITER.code, outcome)
    open_items = (error > rtol) & (codes == 0)
    if bool(open_items.any()):
        rows = open_items.nonzero()[:, 0]
        named = _certify(scaled.take(rows))
        outcome = outcome.index_put((rows,), torch.where(named != 0, named, outcome[rows]))
    codes = torch.where(codes != 0, codes, outcome)
    lam, slack = y[:, p:], (scaled.d - product(scaled.C, x))[:, p:]
    strong = lam > WEAK
    weak = ~strong & (slack.abs() <= WEAK)
    useless = torch.stack([codes == status.code for status in NUMBERLESS]).any(0)
    bad = useless[:, None]
    scaled = _trivial(scaled, useless) if bool(useless.any()) else scaled
    return Solved(
        x=torch.where(bad, torch.nan, x * scaling.x), y=torch.where(bad, torch.nan, y * scaling.y), codes=codes,
        iterations=iterations, error=torch.where(useless, torch.nan, error), strong=strong & ~bad, weak=weak & ~bad,
        scaled=scaled, scaling=scaling, system=system,
    )  # fmt: skip


def _seems_active(P: Program, x: Tensor, y: Tensor) -> Tensor:
    """The inequalities whose dual is larger than their slack."""
    return y[:, P.p :] > (P.d - product(P.C, x))[:, P.p :]


def _sanitise(program: Program) -> tuple[Program, Tensor]:
    """Rows without a limit become 0 x <= 1, and programs that are not numbers the trivial one."""
    p = program.p
    absent = program.d == torch.inf
    absent[:, :p] = False
    never = (program.d == -torch.inf)[:, p:].any(-1)
    d = torch.where(absent, 1, program.d)
    C = program.C if not bool(absent.any()) else torch.where(absent[..., None], 0, program.C)
    # a finite sum proves finite entries; an infinite one may be an overflow, and is looked at again
    sums = program.Q.sum((-2, -1)) + program.q.sum(-1) + C.sum((-2, -1))
    finite = torch.isfinite(sums) & ~torch.isnan(d).any(-1)
    if not bool(finite.all()):
        finite = torch.isfinite(program.Q).all(-1).all(-1) & torch.isfinite(program.q).all(-1)
        finite = finite & torch.isfinite(C).all(-1).all(-1) & ~torch.isnan(d).any(-1)
    codes = torch.where(finite & torch.isfinite(d[:, :p]).all(-1), 0, Status.NON_FINITE.code)
    codes = torch.where((codes == 0) & never, Status.INFEASIBLE.code, codes)
    program = replace(program, C=C, d=d)
    return (_trivial(program, codes != 0) if bool((codes != 0).any()) else program), codes


def _trivial(program: Program, rows: Tensor) -> Program:
    """The program min |x|^2 / 2, without constraints, in the place of these programs."""
    eye = torch.eye(program.q.shape[-1], dtype=program.q.dtype, device=program.q.device)
    d = torch.zeros_like(program.d)
    d[:, program.p :] = 1
    return Program(
        Q=torch.where(rows[:, None, None], eye, program.Q), q=torch.where(rows[:, None], 0, program.q),
        C=torch.where(rows[:, None, None], 0, program.C), d=torch.where(rows[:, None], d, program.d), p=program.p,
    )  # fmt: skip


def _check_convex(scaled: Program, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The codes, with the programs named whose Q is indefinite, and the Cholesky factors of Q."""
    L, info = torch.linalg.cholesky_ex(scaled.Q)
    doubtful = (info > 0) & (codes == 0)
    if not bool(doubtful.any()):
        return codes, L
    rows = doubtful.nonzero()[:, 0]
    shifted = scaled.Q[rows]
    shifted.diagonal(dim1=-2, dim2=-1).add_(1e-9)
    failed = torch.linalg.cholesky_ex(shifted)[1] > 0
    codes = codes.index_put((rows,), torch.where(failed, Status.NOT_CONVEX.code, 0))
    L = L.index_put((rows,), torch.zeros_like(shifted))  # half a factor is none
    return codes, L


def _certify(program: Program) -> Tensor:
    """Codes of the programs that a certificate shows to have no solution, 0 for the others.

    Two linear programs that always have a solution. Infeasible: min t, A x - b in [-t, t], G x - h <= t, t >= 0; a
    positive t comes with multipliers y of Farkas: C'y = 0 and d'y < 0. Unbounded: min q'x, Q x = 0, A x = 0, G x <= 0,
    |x_i| <= 1.

    Args:
        program: equilibrated.

    Returns:
        The codes, shape (B,).
    """
    n, p, m, B = program.q.shape[-1], program.p, program.m, len(program.q)
    A, G = program.C[:, :p], program.C[:, p:]
    eye = torch.eye(n + 1, dtype=A.dtype, device=A.device).expand(B, n + 1, n + 1)
    zero = A.new_zeros(B, n + 1)
    rows = torch.cat([A, -A, G], 1)
    C = torch.cat([torch.cat([rows, -torch.ones_like(rows[..., :1])], -1), -eye[:, n:]], 1)
    d = torch.cat([program.d[:, :p], -program.d[:, :p], program.d[:, p:], zero[:, :1]], -1)
    _, y = _linear(Program(torch.zeros_like(eye), eye[:, n], C, d, 0))
    y = torch.cat([y[:, :p] - y[:, p : 2 * p], y[:, 2 * p : -1].clamp_min(0)], -1)
    farkas = -(program.d * y).sum(-1)
    infeasible = (farkas > 1e-8) & (amax(product(program.C.mT, y).abs()) <= 1e-7 * farkas)
    eye = eye[:, :n, :n]
    C = torch.cat([program.Q, A, G, eye, -eye], 1)
    d = torch.cat([A.new_zeros(B, n + p + m), A.new_ones(B, 2 * n)], -1)
    x, _ = _linear(Program(torch.zeros_like(eye), program.q, C, d, n + p))
    leak = torch.cat([product(C[:, : n + p], x).abs(), product(G, x)], -1)
    fall = -(program.q * x).sum(-1)
    unbounded = (fall > 1e-8) & (amax(leak) <= 1e-7 * fall)
    codes = torch.where(unbounded, Status.UNBOUNDED.code, 0)
    return torch.where(infeasible, Status.INFEASIBLE.code, codes)


def _linear(program: Program) -> tuple[Tensor, Tensor]:
    """Solution and duals of a linear program that has a solution."""
    x, y, _ = interior_point(program, 1e-9, 100)
    return polish(program, x, y, _seems_active(program, x, y))[:2]
