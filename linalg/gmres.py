"""Restarted generalised minimal residuals for any square system, many columns at once."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .krylov import PENDING, Krylov, KrylovState
from .operator import LinearOperator
from .orthogonal import combine, orthogonalise
from .result import Status, any_of, evolve, is_running
from .solver import Solution

__all__ = ["GMRES"]


@dataclass(frozen=True, kw_only=True)
class GMRESState(KrylovState):
    """Where a run of GMRES stands: x is that of the last restart, error the residual norm after the steps since then.

    The five arrays are filled in place, so only the last state of a run can go on. All columns stand at the same place
    of their cycle; one that restarts on its own has zeros before it.
    """

    V: Tensor = field(repr=False)  # (restart + 1, *columns, n), orthonormal rows
    Z: Tensor = field(repr=False)  # (restart, *columns, n), what the preconditioner made of them; V's own rows without
    R: Tensor = field(repr=False)  # (*columns, restart, restart), the rotated Hessenberg matrix: upper triangular
    Q: Tensor = field(repr=False)  # (*columns, restart + 1, restart + 1), the product of the rotations
    g: Tensor = field(repr=False)  # (*columns, restart), the rotated right-hand side
    left: Tensor  # what the rotations have left of the residual, with a sign
    scale: Tensor  # the largest |A M v| seen, a lower bound of |A M|
    started: Tensor  # the residual norm where the cycle began


@dataclass(frozen=True)
class GMRES(Krylov[GMRESState]):
    """Solve A x = b for any square A, symmetric or not, one product with A a step and none with its transpose.

    Arnoldi's process, preconditioned from the right (A z_j with z_j = M v_j, x = x + sum_j y_j z_j), with classical
    Gram-Schmidt done twice and Givens rotations, minimises |b - A x| over the space of the z_j; after `restart` steps
    it begins anew from the true residual. The z_j are kept (flexible GMRES), so that the preconditioner need not be one
    matrix: it may be another solver, stopped early, or change from step to step, and what is minimised stays the true
    residual. All columns of b run at once, and one that has ended is frozen. CONVERGED means that a fresh product gave
    |b - A x| <= max(rtol |b|, atol); a wrong claim of the recurrence restarts, or ends as STAGNATED when that no longer
    halves the true residual. Also STAGNATED: a whole cycle that gains nothing (the next one would repeat it; raise
    `restart`), or a long window that gains less than 1 %. Where a claim or a cycle fails and A is singular on the
    Krylov space to working precision, the column is SINGULAR: exhausting the space is no convergence. `direction` is
    then the null vector, and x minimises the residual without a part along it. Where it is not A but the preconditioner
    that gave z_j which depend on each other, the column is a BREAKDOWN.

    Cost: 1 product a step (and one with the preconditioner), 1 a cycle; memory for restart + 1 vectors a column, twice
    that with a preconditioner; 4 restart n operations a step.

    Args:
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in b's units.
        max_iter: limit of steps, over all cycles.
        preconditioner: operator close to the INVERSE of A; need not be symmetric, nor linear, nor the same each time.
        restart: steps of a cycle; the more the fewer steps in all, 50 is common; capped at n.

    Raises:
        ValueError: for a negative tolerance or limit, or restart < 1.

    Reference:
        Saad & Schultz 1986; Saad 1993, algorithm 2.2 (flexible); Giraud, Langou & Rozloznik 2005 (Gram-Schmidt); Brown
        & Walker 1997 (singular systems).

    Example:
        >>> from nestopt.linalg import GMRES, Dense
        >>> A = Dense(torch.tensor([[1.0, 2.0], [0.0, 4.0]], dtype=torch.float64))
        >>> sol = GMRES()(A, torch.tensor([5.0, 8.0], dtype=torch.float64))
        >>> [round(x, 8) for x in sol.x.tolist()], sol.status.name, sol.iterations
        ([1.0, 2.0], 'CONVERGED', 2)
    """

    restart: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.restart < 1:
            raise ValueError(f"GMRES: restart must be at least 1, but got {self.restart}.")

    def init(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> GMRESState:
        """The evaluated state at x0.

        Args:
            A: square operator.
            b: right-hand sides (*sides, *batch, n).
            x0: start, zero when None.

        Returns:
            The state.
        """
        start, r = self._start(A, b, x0)
        m = max(1, min(self.restart, A.shape[-1]))
        columns = b.shape[:-1]
        V = b.new_zeros(m + 1, *b.shape)
        Z = V[:-1] if self.preconditioner is None else b.new_zeros(m, *b.shape)
        state = GMRESState(
            **vars(start), V=V, Z=Z, R=b.new_zeros(*columns, m, m),
            Q=b.new_zeros(*columns, m + 1, m + 1), g=b.new_zeros(*columns, m), left=start.error,
            scale=torch.zeros_like(start.error), started=start.error,
        )  # fmt: skip
        return self._begin(A, state, r, is_running(state.codes), 0)

    def _begin(self, A: LinearOperator, s: GMRESState, r: Tensor, which: Tensor, j: int) -> GMRESState:
        """A new cycle from the residual r for some columns, at place j of the common cycle."""
        norm = A.norm(r)
        v = r / torch.where(norm > 0, norm, 1)[..., None]
        s.V[:] = torch.where(which[..., None], 0, s.V)
        s.V[j] = torch.where(which[..., None], v, s.V[j])
        eye = torch.eye(s.Q.shape[-1], dtype=r.dtype, device=r.device)
        s.R[:] = torch.where(which[..., None, None], 0, s.R)
        s.Q[:] = torch.where(which[..., None, None], eye, s.Q)
        # a column that begins within the common cycle has too few steps left in it to be judged by them
        started = torch.where(which, torch.inf if j else norm, s.started)
        return evolve(s, left=torch.where(which, norm, s.left), started=started)

    def step(self, A: LinearOperator, b: Tensor, s: GMRESState, look: int = 1) -> GMRESState:
        """One step for every column that is RUNNING.

        Args:
            A: the operator.
            b: right-hand sides.
            s: the state.
            look: verify claims of convergence only at every so many steps, and where a cycle ends.

        Returns:
            The next state.
        """
        running = is_running(s.codes)
        m, k = s.R.shape[-1], s.k + 1
        j = s.k % m
        V = s.V[: j + 1]
        if self.preconditioner is not None:
            s.Z[j] = self._precondition(V[j])
        w, spent = self._multiply(A, s.Z[j], running)
        scale = torch.fmax(s.scale, A.norm(w))
        w, h = orthogonalise(A, V, w)
        below = A.norm(w)

        # rotate the new column of the Hessenberg matrix, then make the rotation that takes `below` out of it
        column = (s.Q[..., : j + 1, : j + 1] @ h.movedim(0, -1)[..., None])[..., 0]
        last = column[..., j]
        diagonal = torch.hypot(last, below)
        tiny = 10 * torch.finfo(A.dtype).eps * scale
        moved = running & (diagonal > tiny)
        blocked = running & (diagonal <= tiny)
        cosine, sine = torch.where(moved, last / diagonal, 1), torch.where(moved, below / diagonal, 0)
        s.V[j + 1] = torch.where((moved & (below > tiny))[..., None], w / below[..., None], 0)
        s.R[..., : j + 1, j] = torch.where(running[..., None], column, 0)
        # not 0 where a step was blocked: 0 marks what no step has written
        s.R[..., j, j] = torch.where(running, diagonal.clamp_min(torch.finfo(A.dtype).tiny), 0)
        row = s.Q[..., j, : j + 1].clone()
        s.Q[..., j, : j + 1], s.Q[..., j + 1, : j + 1] = cosine[..., None] * row, -sine[..., None] * row
        s.Q[..., j, j + 1], s.Q[..., j + 1, j + 1] = sine, cosine
        s.g[..., j] = torch.where(moved, cosine * s.left, 0)
        left = torch.where(moved, -sine * s.left, s.left)

        error = torch.where(moved, left.abs(), s.error)
        error = torch.where(running & ~torch.isfinite(diagonal), torch.nan, error)
        pending = blocked | (moved & ((error <= s.goal) | (below <= tiny)))
        s = evolve(
            s, error=error, left=left, scale=scale, k=k, products=s.products + spent,
            codes=torch.where(pending, PENDING, s.codes),
        )  # fmt: skip
        ends = k % m == 0
        if ends or (k % look == 0 and (look > 1 or any_of(pending))):
            s = self._restart(A, b, s, ends)
        return self._stop_on_plateau(A, s)

    def _restart(self, A: LinearOperator, b: Tensor, s: GMRESState, ends: bool) -> GMRESState:
        """Fold the PENDING columns' steps (all, where a cycle ends) into x, rule on them, begin the next cycle."""
        columns = (s.codes == PENDING) | (is_running(s.codes) & ends)
        x, g = s.x, s.g.clone()
        s, r, restart = self._settle(A, b, self._fold(s, columns), columns)
        vain = columns & is_running(s.codes) & (s.error >= (1 - 1e-6) * s.started)
        codes = torch.where(vain, Status.STAGNATED.code, s.codes)
        worse = columns & (s.error > s.started)  # the small system was too ill-conditioned to be of use
        s = evolve(s, codes=codes, x=torch.where(worse[..., None], x, s.x))
        failed = columns & (restart | (codes == Status.STAGNATED.code))
        if any_of(failed):
            s = self._name_singular(A, s, failed, x, g)
        return self._begin(A, s, r, (restart | (columns & ends)) & is_running(s.codes), s.k % s.R.shape[-1])

    def _name_singular(self, A: LinearOperator, s: GMRESState, failed: Tensor, x: Tensor, g: Tensor) -> GMRESState:
        """SINGULAR where the small matrix is: with its null vector, and the step that has no part along it."""
        eye = torch.eye(s.R.shape[-1], dtype=A.dtype, device=A.device)
        # only what is finite: LAPACK refuses a column of NaN
        U, sigma, Vh = torch.linalg.svd(torch.where(failed[..., None, None], _filled(s), eye))
        info = torch.finfo(A.dtype)
        small = sigma <= 10 * info.eps * s.scale[..., None] + 2 * info.tiny
        null = combine(Vh[..., -1, :].movedim(-1, 0), s.Z)
        found = failed & small[..., -1]
        # the small matrix is singular, too, where the vectors of the preconditioner depend on each other
        collapsed = A.norm(null) <= info.eps**0.5 * A.norm(s.Z).amax(0)
        fault = torch.where(collapsed, Status.BREAKDOWN.code, Status.SINGULAR.code)
        y = torch.where(small, 0, (U.mT @ g[..., None])[..., 0] / sigma)
        step = combine((Vh.mT @ y[..., None])[..., 0].movedim(-1, 0), s.Z)
        return evolve(
            s, codes=torch.where(found, fault, s.codes),
            x=torch.where(found[..., None], x + step, s.x), direction=torch.where(found[..., None], null, s.direction),
        )  # fmt: skip

    def _fold(self, s: GMRESState, columns: Tensor) -> GMRESState:
        """Take the steps since the last restart into x, for some columns."""
        y = torch.linalg.solve_triangular(_filled(s), s.g[..., None], upper=True)[..., 0]
        step = combine(y.movedim(-1, 0), s.Z)
        s.g[:] = torch.where(columns[..., None], 0, s.g)
        return evolve(s, x=torch.where(columns[..., None], s.x + step, s.x))

    def _finish(self, A: LinearOperator, b: Tensor, s: GMRESState) -> Solution:
        return super()._finish(A, b, self._fold(s, s.codes != Status.NON_FINITE.code))


def _filled(s: GMRESState) -> Tensor:
    """R with a diagonal where no step has written one: it has no part in the solution."""
    empty = s.R.diagonal(dim1=-2, dim2=-1) == 0
    size = torch.where(s.scale > 0, s.scale, 1)[..., None]
    return s.R + torch.diag_embed(torch.where(empty, size, 0))
