"""Stabilised biconjugate gradients for any square system: short recurrences, no product with the transpose."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .krylov import PENDING, Krylov, KrylovState, choose
from .operator import LinearOperator, power_of_two
from .result import Status, any_of, evolve, is_running

__all__ = ["BiCGStab"]


@dataclass(frozen=True, kw_only=True)
class BiCGStabState(KrylovState):
    """Where a run of BiCGStab stands; every tensor is per column, in the notation of van der Vorst."""

    r: Tensor  # r and p are in units of `unit`, so that their squares neither over- nor underflow
    p: Tensor
    shadow: Tensor  # the fixed vector of length 1 that the left Krylov space is built from
    rho: Tensor  # <shadow, r>
    unit: Tensor
    size: Tensor  # the largest |A y| / |y| seen, a lower bound of |A|
    broken: Tensor  # which claims are breakdowns; `shadow` is then what the next one leans on
    restarted: Tensor  # the measured error at the last restart after a breakdown


@dataclass(frozen=True)
class BiCGStab(Krylov[BiCGStabState]):
    """Solve A x = b for any square A by short recurrences, two products with A a step.

    Van der Vorst's recurrence, preconditioned from the right: alpha = <shadow, r> / <shadow, A M p> takes the residual
    to s = r - alpha A M p, and omega = <t, s> / <t, t>, with t = A M s, minimises |s - omega t|. All columns of b run
    at once; one that has ended is frozen. CONVERGED means that a fresh product gave |b - A x| <= max(rtol |b|, atol); a
    wrong claim of the recurrence restarts from the true residual, or ends as STAGNATED when that no longer halves it.
    Where <shadow, r>, <shadow, A M p> or <t, s> vanishes to working precision the recurrence has broken down: it
    restarts from the true residual with a shadow that leans on A r, and ends as BREAKDOWN when it breaks down again
    before the residual has halved (as it must for skew-symmetric A: use GMRES). A direction y with |A y| at the
    rounding level of |A| |y| is SINGULAR; singular systems without a solution may also end as STAGNATED or BREAKDOWN.
    The residual is not monotone: where GMRES' memory is no concern, it needs fewer products.

    Cost: 2 products a step, 1 to verify or to restart, 1 for x0, 1 in every `replace_every` steps against drift.

    Args:
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in b's units.
        max_iter: limit of steps.
        preconditioner: operator close to the INVERSE of A, need not be symmetric.
        replace_every: steps between replacements of the recurrent residual by the true one.

    Raises:
        ValueError: for a negative tolerance or limit, or replace_every < 1.

    Reference:
        van der Vorst 1992; residual replacement: van der Vorst & Ye 2000; breakdowns: Sleijpen & van der Vorst 1995.

    Example:
        >>> from nestopt.linalg import BiCGStab, Dense
        >>> A = Dense(torch.tensor([[1.0, 2.0], [0.0, 4.0]], dtype=torch.float64))
        >>> sol = BiCGStab()(A, torch.tensor([5.0, 8.0], dtype=torch.float64))
        >>> [round(x, 8) for x in sol.x.tolist()], sol.status.name, sol.iterations
        ([1.0, 2.0], 'CONVERGED', 2)
    """

    replace_every: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.replace_every < 1:
            raise ValueError(f"BiCGStab: replace_every must be at least 1, but got {self.replace_every}.")

    def init(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> BiCGStabState:
        """The evaluated state at x0.

        Args:
            A: square operator.
            b: right-hand sides (*sides, *batch, n).
            x0: start, zero when None.

        Returns:
            The state.
        """
        start, r = self._start(A, b, x0)
        unit = power_of_two(start.error[..., None])
        blank = torch.zeros_like(start.error)
        state = BiCGStabState(
            **vars(start), r=r, p=r, shadow=r, rho=blank, unit=unit, size=blank,
            broken=torch.zeros_like(start.codes, dtype=torch.bool), restarted=torch.full_like(blank, torch.inf),
        )  # fmt: skip
        return self._begin(A, state, r / unit[..., None])

    def _begin(self, A: LinearOperator, s: BiCGStabState, r: Tensor, lean: Tensor | None = None) -> BiCGStabState:
        """The state with a new recurrence from the residual r; its shadow is r, or leans on a unit vector too."""
        shadow = _unit(A, r)
        if lean is not None:
            shadow = _unit(A, shadow + lean)
        return evolve(s, r=r, p=r, shadow=shadow, rho=A.vecdot(shadow, r))

    def step(self, A: LinearOperator, b: Tensor, s: BiCGStabState, look: int = 1) -> BiCGStabState:
        """One step for every column that is RUNNING.

        Args:
            A: the operator.
            b: right-hand sides.
            s: the state.
            look: verify claims of convergence only at every so many steps.

        Returns:
            The next state.
        """
        running = is_running(s.codes)
        floor = 10 * torch.finfo(A.dtype).eps
        y = self._precondition(s.p)
        v, spent = self._multiply(A, y, running)
        long, image = A.norm(y), A.norm(v)
        size = torch.fmax(s.size, image / long)  # fmax: a NaN must not enter the size
        sigma = A.vecdot(s.shadow, v)
        null = running & (image <= floor * size * long)
        broken = running & ~null & ((sigma.abs() <= floor * image) | (s.rho.abs() <= floor * A.norm(s.r)))
        half = running & ~null & ~broken

        alpha = torch.where(half, s.rho / sigma, 0)
        x = s.x + (alpha * s.unit)[..., None] * y
        r = s.r - alpha[..., None] * v
        left = A.norm(r)
        whole = half & ~(left * s.unit <= s.goal)  # a NaN goes on to be named
        z = self._precondition(r)
        t, more = self._multiply(A, z, whole)
        long, image = A.norm(z), A.norm(t)
        size = torch.where(whole, torch.fmax(size, image / long), size)
        cosine = A.vecdot(t / torch.where(image > 0, image, 1)[..., None], r)
        stuck = whole & (image <= floor * size * long)
        omega = torch.where(whole & ~stuck, cosine / image, 0)
        direction = torch.where(null[..., None], y, torch.where(stuck[..., None], z, s.direction))
        broken = broken | (whole & ~stuck & (cosine.abs() <= floor * left))  # the half step is taken all the same
        x = x + (omega * s.unit)[..., None] * z
        r = r - omega[..., None] * t
        error = A.norm(r) * s.unit
        rho = A.vecdot(s.shadow, r)
        p = r + (rho / s.rho * (alpha / omega))[..., None] * (s.p - omega[..., None] * v)

        # A x may grow until its rounding hides the residual: look before that
        drowned = (torch.finfo(A.dtype).eps * size * A.norm(x) > 5 * error) & (error > s.goal)
        pending = half & ~stuck & ((error <= s.goal) | drowned)
        moved = evolve(s, x=x, r=r, p=p, rho=rho, error=error)
        codes = torch.where(null | stuck, Status.SINGULAR.code, torch.where(pending, PENDING, s.codes))
        lost = running & ~(image < torch.inf) & ~null
        codes = torch.where(lost & half, Status.NON_FINITE.code, codes)
        broken = broken & is_running(codes)
        lean = torch.where(half[..., None], t, v)
        shadow = torch.where(broken[..., None], _unit(A, lean), s.shadow)
        s = evolve(
            choose(half, moved, s), codes=torch.where(broken, PENDING, codes), broken=broken | s.broken, shadow=shadow,
            direction=direction, size=torch.where(running, size, s.size), k=s.k + 1,
            products=s.products + spent + more,
        )  # fmt: skip
        due = s.k % self.replace_every < look
        if s.k % look == 0 and (due or look > 1 or any_of(s.codes == PENDING)):
            s = self._verify(A, b, s, due)
        return self._stop_on_plateau(A, s)

    def _verify(self, A: LinearOperator, b: Tensor, s: BiCGStabState, due: bool) -> BiCGStabState:
        """Measure the claims, the broken columns and, where it is due, all; rule on them, and restart."""
        columns = (s.codes == PENDING) | (is_running(s.codes) & due)
        goal = s.goal
        s, r, restart = self._settle(A, b, s, columns)
        stopped = s.broken & (is_running(s.codes) | (s.codes == Status.STAGNATED.code))
        vain = s.error > 0.5 * s.restarted
        codes = torch.where(stopped, torch.where(vain, Status.BREAKDOWN.code, Status.RUNNING.code), s.codes)
        broken = stopped & ~vain
        r = r / s.unit[..., None]
        s = evolve(
            s, codes=codes, r=torch.where((columns & is_running(codes))[..., None], r, s.r),
            goal=torch.where(s.broken, goal, s.goal), restarted=torch.where(s.broken, s.error, s.restarted),
            broken=torch.zeros_like(broken),
        )  # fmt: skip
        s = choose(restart & ~stopped, self._begin(A, s, r), s)
        return choose(broken, self._begin(A, s, r, s.shadow), s)


def _unit(A: LinearOperator, v: Tensor) -> Tensor:
    norm = A.norm(v)
    return v / torch.where(norm > 0, norm, 1)[..., None]
