"""From a flat batch of quadratic programs to certified solutions, statuses and factors for derivatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from nestopt.implicit.monitor import Monitor, Record
from nestopt.linalg.result import Status, scalar_or_tensor

from .active_set import NOTHING, ActiveSystem, corrected, polish
from .interior_point import InteriorPoint, Program, Scaling, amax, broadcast_shapes, product
from .qp_backends import Backend
from .qp_factors import Factors, numberless
from .qp_fast_paths import pivoting, separable_guess

__all__ = ["Degenerate", "Options", "Solved", "Solver", "find_solution", "solve_programs"]

Degenerate = Literal["strong", "active", "mean", "smoothed"]
# A dual and a slack, in equilibrated units, that are both no larger make a row weakly active.
WEAK = 1e-7

# (program, tolerance, max_iter) -> x, duals, iterations: who finds a first solution
Solver = Callable[[Program, float, int], tuple[Tensor, Tensor, Tensor]]
# x, duals, KKT residual, steps and active systems of equilibrated programs, given the Cholesky factors of Q as well
Found = tuple[Tensor, Tensor, Tensor, Tensor, ActiveSystem | None]
Attempt = Callable[[Program, Tensor], Found]


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

    def factors(self, active: Tensor) -> Factors:
        """The factors of the active system of these rows, but for the codes."""
        useless = self.x.isnan().any(-1)
        system = ActiveSystem.of(self.scaled, active) if self.system is None else self.system
        system = system.moved(self.scaled, active, useless)
        P = self.scaled
        first = P.q.shape[-1] + P.p
        fixed = torch.arange(first, device=P.q.device).expand(len(P.q), first)
        rows = torch.cat([fixed, system.index + first], -1)
        weights = torch.cat([self.scaling.columns, self.scaling.rows], -1).gather(-1, rows)
        weights[:, first:] *= system.valid
        return system.K, system.factors, system.pivots, rows, weights, system.deficient

    def central(self, mu: float) -> tuple[Tensor, Tensor]:
        """The point of the central path lam s = mu.

        Args:
            mu: in the program's own units.

        Returns:
            (x, duals) in the program's own units, shape (B, n + p + m), and the items where there is no such point, or
            where it has no derivative, shape (B,).
        """
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
        # K of the point, [[Q, C'], [C, -s/lam]]: singular for dependent equalities, say
        share = torch.nn.functional.pad(state.s / state.y[:, p:], (p, 0))
        rows = (1 + share).rsqrt()
        C = P.C * rows[..., None]
        K = torch.cat([torch.cat([P.Q, C.mT], -1), torch.cat([C, torch.diag_embed(-share * rows.square())], -1)], 1)
        pivots = torch.linalg.lu_factor_ex(K)[0].diagonal(dim1=-2, dim2=-1).abs()
        fit = (state.codes == Status.CONVERGED.code) & ~useless[:, 0] & ~(pivots <= NOTHING).any(-1)
        return torch.cat([state.x * scale.x, state.y * scale.y], -1), ~fit


@dataclass(frozen=True)
class Options:
    """Of a call, what is no tensor.

    Attributes:
        rtol: of the certificate.
        max_iter: limit of interior-point steps.
        backend: who finds the first solution, None for the library's own.
        degenerate: which rows are active for the derivative; None where there is none.
        smoothing: of "smoothed".
        bounds_only: whether every row is a bound.
        monitor: collects a record of the solve, or None.
        roomy: of the programs.
    """

    rtol: float
    max_iter: int
    backend: Backend | None
    degenerate: Degenerate | None
    smoothing: float
    bounds_only: bool
    monitor: Monitor | None
    roomy: bool = False


def find_solution(options: Options, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Solve programs of any batch dimensions, and factorise what their derivatives need.

    Args:
        options: of the call.
        tensors: Q, q, A, b, G, h, and x and the duals of a warm start; None for what there is not.

    Returns:
        (x, nu, lam), value, codes, iterations, error, weakly active, deficient; then, for a derivative, one or two sets
        of factors without codes, or what `attach_smoothed` needs of the point of the central path.
    """
    Q, q, A, b, G, h, warm_x, warm_y = (None if t is None else t.detach() for t in tensors)
    assert Q is not None and q is not None
    n, dtype = q.shape[-1], q.dtype
    batch = broadcast_shapes(
        *(t.shape[:-2] for t in (Q, A, G) if t is not None), *(t.shape[:-1] for t in (q, b, h) if t is not None)
    )

    def flat(t: Tensor, space: int) -> Tensor:
        return (
            t.to(torch.float64)
            .expand(*batch, *t.shape[t.ndim - space :])
            .reshape(batch.numel(), *t.shape[t.ndim - space :])
        )

    rows, limits = ([flat(t, k) for t in pair if t is not None] for pair, k in (((A, G), 2), ((b, h), 1)))
    P, c = flat(Q, 2), flat(q, 1)
    p = 0 if b is None else b.shape[-1]
    program = Program(
        Q=0.5 * (P + P.mT), q=c, C=torch.cat(rows, 1) if rows else c.new_zeros(len(c), 0, n),
        d=torch.cat(limits, 1) if limits else c.new_zeros(len(c), 0), p=p, roomy=options.roomy,
    )  # fmt: skip
    warm = None if warm_x is None or warm_y is None else (flat(warm_x, 1), flat(warm_y, 1))
    solver = None if options.backend is None else options.backend.find
    solved = solve_programs(program, options.rtol, options.max_iter, solver, warm, options.bounds_only)
    if options.monitor is not None:
        error, steps = (scalar_or_tensor(t.reshape(batch)) for t in (solved.error, solved.iterations))
        record = Record(
            kind="point", codes=solved.codes.reshape(batch), residual_norm=error, error=error, tolerance=options.rtol,
            iterations=steps,
        )  # fmt: skip
        options.monitor.records.append(record)
    w = torch.cat([solved.x, solved.y], -1)
    value = (solved.x * (0.5 * (program.Q @ solved.x[..., None])[..., 0] + program.q)).sum(-1)
    policy = options.degenerate
    if policy == "smoothed":
        central, lost = solved.central(options.smoothing)
        worse = torch.where((solved.codes == Status.CONVERGED.code) & lost, Status.STAGNATED.code, solved.codes)
        extra: tuple[Tensor, ...] = (central.to(dtype), worse, lost)
        deficient = torch.zeros_like(solved.codes, dtype=torch.bool)
    else:
        first = solved.factors(solved.strong | solved.weak if policy == "active" else solved.strong)
        deficient = first[-1]
        extra = first if policy is not None else ()
        if policy == "mean":
            extra = (*extra, *solved.factors(solved.strong | solved.weak))
    found = (
        w.to(dtype),
        value.to(dtype),
        solved.codes,
        solved.iterations,
        solved.error,
        solved.weak.sum(-1),
        deficient,
    )
    return tuple(t.reshape(batch + t.shape[1:]) for t in (*found, *extra))


def interior_point(program: Program, tolerance: float, max_iter: int) -> tuple[Tensor, Tensor, Tensor]:
    """The library's own solver."""
    method = InteriorPoint(program, floor=0.1 * tolerance / max(program.m, 1))
    state = method.solve(tolerance, max_iter)
    return state.x, state.y, state.iterations


def interior_point_float32(program: Program, tolerance: float, max_iter: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same in float32, for a loose tolerance at half the cost."""
    narrow = Program(program.Q.float(), program.q.float(), program.C.float(), program.d.float(), program.p)
    x, y, steps = interior_point(narrow, tolerance, max_iter)
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
    program, codes, absent = _sanitise(program)
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
    attempts: list[Attempt] = []
    if solver is None and m <= 2 * scaled.q.shape[-1]:
        attempts.append(_pivoted)
    # loosely first: the polished solution of the right active rows is exact; more is for the items that need it
    if solver is None:
        attempts.append(partial(_polished, interior_point_float32, 1e-3, min(max_iter, 25)))
    for tolerance in (1e-6, min(rtol, 1e-9)):
        attempts.append(partial(_polished, solver or interior_point, tolerance, max_iter))
    for attempt in attempts if m and B else ():
        if left is not None and not bool(left.any()):
            break
        if left is None or (system is None and bool(left.all())):
            x, y, error, steps, system = attempt(scaled, L)
            iterations = iterations + steps
        else:
            rows = left.nonzero()[:, 0]
            found_x, found_y, found_error, steps, _ = attempt(scaled.take(rows), L[rows])
            better = found_error < error[rows]
            x, y, error = (
                old.index_put((rows[better],), new[better])
                for old, new in ((x, found_x), (y, found_y), (error, found_error))
            )
            iterations = iterations.index_add(0, rows, steps)
        left = ~(error <= rtol) & (codes == 0)
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
    if absent is not None:  # nothing depends on a limit of inf
        y = torch.where(absent, 0, y)
        strong, weak = (rows & ~absent[:, p:] for rows in (strong, weak))
    useless = numberless(codes)
    bad = useless[:, None]
    scaled = _trivial(scaled, useless) if bool(useless.any()) else scaled
    return Solved(
        x=torch.where(bad, torch.nan, x * scaling.x), y=torch.where(bad, torch.nan, y * scaling.y), codes=codes,
        iterations=iterations, error=torch.where(useless, torch.nan, error), strong=strong & ~bad, weak=weak & ~bad,
        scaled=scaled, scaling=scaling, system=system,
    )  # fmt: skip


def _pivoted(part: Program, L: Tensor) -> Found:
    """By pivoting; what it has not solved has the error inf."""
    x, y, active, fit = pivoting(part, L)
    error = torch.full_like(x[:, 0], torch.inf)
    steps = torch.zeros_like(fit, dtype=torch.int64)
    if not bool(fit.any()):
        return x, y, error, steps, None
    system = ActiveSystem.of(part, active)
    x, _, y, reached = corrected(part, system, x, y)
    return x, y, torch.where(fit, reached, error), steps, system


def _polished(finder: Solver, tolerance: float, max_iter: int, part: Program, L: Tensor) -> Found:
    """By a solver whose active rows are then tried."""
    x, y, steps = finder(part, tolerance, max_iter)
    x, y, error, system = polish(part, x, y, _seems_active(part, x, y))
    return x, y, error, steps, system


def _seems_active(P: Program, x: Tensor, y: Tensor) -> Tensor:
    """The inequalities whose dual is larger than their slack."""
    return y[:, P.p :] > (P.d - product(P.C, x))[:, P.p :]


def _sanitise(program: Program) -> tuple[Program, Tensor, Tensor | None]:
    """Rows without a limit, if any, become 0 x <= 1, and programs that are not numbers the trivial one."""
    p = program.p
    absent = program.d == torch.inf
    absent[:, :p] = False
    never = (program.d == -torch.inf)[:, p:].any(-1)
    d = torch.where(absent, 1, program.d)
    some = bool(absent.any())
    C = torch.where(absent[..., None], 0, program.C) if some else program.C
    # a finite sum proves finite entries; an infinite one may be an overflow, and is looked at again
    sums = program.Q.sum((-2, -1)) + program.q.sum(-1) + C.sum((-2, -1))
    finite = torch.isfinite(sums) & ~torch.isnan(d).any(-1)
    if not bool(finite.all()):
        finite = torch.isfinite(program.Q).all(-1).all(-1) & torch.isfinite(program.q).all(-1)
        finite = finite & torch.isfinite(C).all(-1).all(-1) & ~torch.isnan(d).any(-1)
    codes = torch.where(finite & torch.isfinite(d[:, :p]).all(-1), 0, Status.NON_FINITE.code)
    codes = torch.where((codes == 0) & never, Status.INFEASIBLE.code, codes)
    program = replace(program, C=C, d=d)
    program = _trivial(program, codes != 0) if bool((codes != 0).any()) else program
    return program, codes, absent if some else None


def _trivial(program: Program, rows: Tensor) -> Program:
    """The program min |x|^2 / 2, without constraints, in the place of these programs."""
    eye = torch.eye(program.q.shape[-1], dtype=program.q.dtype, device=program.q.device)
    d = torch.zeros_like(program.d)
    d[:, program.p :] = 1
    return replace(
        program, Q=torch.where(rows[:, None, None], eye, program.Q), q=torch.where(rows[:, None], 0, program.q),
        C=torch.where(rows[:, None, None], 0, program.C), d=torch.where(rows[:, None], d, program.d),
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
    sizes = (program.d * y).abs().sum(-1).clamp_min(1)
    infeasible = (farkas > 1e-8 * sizes) & (amax(product(program.C.mT, y).abs()) <= 1e-7 * farkas)
    eye = eye[:, :n, :n]
    C = torch.cat([program.Q, A, G, eye, -eye], 1)
    d = torch.cat([A.new_zeros(B, n + p + m), A.new_ones(B, 2 * n)], -1)
    x, _ = _linear(Program(torch.zeros_like(eye), program.q, C, d, n + p))
    leak = torch.cat([product(C[:, : n + p], x).abs(), product(G, x)], -1)
    fall = -(program.q * x).sum(-1)
    sizes = (program.q * x).abs().sum(-1).clamp_min(1)
    unbounded = (fall > 1e-8 * sizes) & (amax(leak) <= 1e-7 * fall)
    codes = torch.where(unbounded, Status.UNBOUNDED.code, 0)
    return torch.where(infeasible, Status.INFEASIBLE.code, codes)


def _linear(program: Program) -> tuple[Tensor, Tensor]:
    """Solution and duals of a linear program that has a solution."""
    x, y, _ = interior_point(program, 1e-9, 100)
    return polish(program, x, y, _seems_active(program, x, y))[:2]
