"""Minimal residuals of minimum length for symmetric systems, singular and inconsistent ones included."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .krylov import PENDING, Krylov, KrylovState, choose
from .minres import MINRES
from .operator import LinearOperator
from .result import Status, any_of, evolve, is_running
from .solver import Solution, default_rtol, measure

__all__ = ["MINRESQLP"]


@dataclass(frozen=True, kw_only=True)
class MINRESQLPState(KrylovState):
    """Where a run of MINRES-QLP stands; every tensor is per column, in the notation of Choi, Paige & Saunders.

    `past` holds what later steps need of the two factors: of the last left reflection its cosine and sine, of the next
    column of R delta and epsilon, of the last two rows of L gamma, theta and eta, the last two of tau, and mu_{k-3} and
    mu_{k-2}.
    """

    base: Tensor  # the part of x that no later step changes
    v_old: Tensor  # Lanczos vectors
    v: Tensor
    w_old: Tensor  # columns of W = V P
    w: Tensor
    past: Tensor  # (*columns, 14)
    beta: Tensor  # the last entry beside the diagonal of the tridiagonal matrix
    phi: Tensor  # |r|
    size: Tensor  # lower bound of |A|
    suspicion: Tensor  # |A r| / (|A| |r|) below which r is examined for being a null vector
    suspect: Tensor  # which claims are that one
    slope: Tensor  # the smallest |A r| / |r| that was below it,
    kept: Tensor  # and the x there
    origin: Tensor  # x0


@dataclass(frozen=True)
class MINRESQLP(Krylov[MINRESQLPState]):
    """Solve min |A x - b| for symmetric A, indefinite or singular too, for the solution of minimum length |x|.

    Lanczos' tridiagonal matrix is factored as Q L P, by reflections from the left as in MINRES and from the right, and
    x = (V P) u with L u = Q'b. These are MINRES' iterates, formed from orthonormal directions; where b has no part
    outside the range of A, the solution they lead to is of minimum length already. All columns of b run at once; one
    that has ended is frozen.

    CONVERGED means that a fresh product gave |b - A x| <= max(rtol |b|, atol). A system without a solution can not
    reach that. It ends as SINGULAR, which is this solver's success there: fresh products with r = b - A x, far above
    rounding, gave |r'Ar| <= 20 eps |A| |r|^2, and |A r| <= 5 sqrt(eps) |A| |r| at the x that is returned, with |A| a
    lower bound seen by the run. That x is the least-squares solution of minimum length (from x0 = 0; from another x0
    the one closest to it), `residual_norm` is |r| itself and `direction` the null vector r / |r|. The run goes on until
    |A r| <= rtol |A| |r|, or rises again, as it does at a few sqrt(eps): minimising |r| tells no more of it. x has then
    grown along r; two short solves, of systems that do have a solution, take that out and bring |A r| down further (to
    1e-10 and less in float64 at conditions of 1e4). STAGNATED is a claim of the recurrence that was wrong again after a
    restart from the true residual, or an x that the products did not certify.

    Cost: 1 product a step, 1 to verify, 1 for x0; where there is no solution, a seventh as many products again (seen at
    n = 800) up to as many (n = 30) for the two solves, whose steps are not in `iterations`. It takes no preconditioner:
    one would change both norms that are minimised.

    Args:
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in b's units.
        max_iter: limit of steps; as for MINRES.
        preconditioner: must be None.

    Raises:
        ValueError: for a negative tolerance or limit, or a preconditioner.

    Reference:
        Choi, Paige & Saunders 2011, MINRES-QLP; the null vector taken out of MINRES' x: Liu, Milzarek & Roosta 2022.

    Example:
        >>> from nestopt.linalg import MINRESQLP, Dense
        >>> A = Dense(torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64), symmetric=True)
        >>> consistent = MINRESQLP()(A, torch.tensor([2.0, 2.0], dtype=torch.float64))
        >>> [round(x, 8) for x in consistent.x.tolist()], consistent.status.name
        ([1.0, 1.0], 'CONVERGED')
        >>> sol = MINRESQLP()(A, torch.tensor([3.0, 1.0], dtype=torch.float64))
        >>> [round(x, 8) for x in sol.x.tolist()], sol.status.name, round(sol.residual_norm, 8)
        ([1.0, 1.0], 'SINGULAR', 1.41421356)
    """

    needs_symmetric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preconditioner is not None:
            raise ValueError(
                "MINRESQLP: preconditioner must be None, because with one neither |b - A x| nor |x| is what is "
                "minimised; use MINRES(preconditioner=...) for a system that has a solution."
            )

    def init(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> MINRESQLPState:
        """The evaluated state at x0.

        Args:
            A: symmetric operator.
            b: right-hand sides (*sides, *batch, n).
            x0: start, zero when None.

        Returns:
            The state.
        """
        start, r = self._start(A, b, x0)
        zero = torch.zeros_like(start.error)
        state = MINRESQLPState(
            **vars(start), base=r, v_old=r, v=r, w_old=r, w=r, past=torch.stack([zero] * 14, dim=-1), beta=zero,
            phi=zero, size=zero, suspicion=torch.full_like(zero, 3 * torch.finfo(A.dtype).eps ** 0.5),
            suspect=torch.zeros_like(start.codes, dtype=torch.bool), slope=torch.full_like(zero, torch.inf), kept=r,
            origin=start.x,
        )  # fmt: skip
        return self._begin(A, state, r)

    def _level(self, A: LinearOperator) -> float:
        """The |A r| / (|A| |r|) at which a least-squares solution is good enough."""
        eps = torch.finfo(A.dtype).eps
        return max(10 * eps, min(default_rtol(A.dtype) if self.rtol is None else self.rtol, math.sqrt(eps)))

    def _begin(self, A: LinearOperator, s: MINRESQLPState, r: Tensor) -> MINRESQLPState:
        """The state with a new Lanczos process from the residual r."""
        norm, none = A.norm(r), torch.zeros_like(r)
        past = torch.zeros_like(s.past)
        past[..., 0] = -1  # the reflection before the first leaves what it is applied to
        return evolve(
            s, base=s.x, v_old=none, v=r / torch.where(norm > 0, norm, 1)[..., None], w_old=none, w=none, past=past,
            beta=torch.zeros_like(norm), phi=norm,
        )  # fmt: skip

    def step(self, A: LinearOperator, b: Tensor, s: MINRESQLPState, look: int = 1) -> MINRESQLPState:
        """One step for every column that is RUNNING.

        Args:
            A: the operator.
            b: right-hand sides.
            s: the state.
            look: verify claims of convergence only at every so many steps.

        Returns:
            The next state.
        """
        running, eps = is_running(s.codes), torch.finfo(A.dtype).eps
        c, sine, delta, epsilon, gamma2, gamma1, theta2, theta1, eta2, eta1, tau2, tau1, mu4, mu3 = s.past.unbind(-1)
        q, spent = self._multiply(A, s.v, running)
        alpha = A.vecdot(q, s.v)
        q = q - alpha[..., None] * s.v - s.beta[..., None] * s.v_old
        beta = A.norm(q)
        size = torch.fmax(s.size, torch.hypot(torch.hypot(s.beta, alpha), beta))

        # the new column of R: the last reflection, then the one that takes beta out
        above = c * delta + sine * alpha
        bar = sine * delta - c * alpha
        next_delta, next_epsilon = -c * beta, sine * beta
        slope, curvature = torch.hypot(bar, next_delta), (c * bar).abs()  # |A r| / |r| and |r'Ar| / |r|^2 before it
        c, sine, gamma = _reflect(bar, beta)
        tau, phi = c * s.phi, sine * s.phi

        # the same column made lower triangular from the right, against columns k - 2 and k - 1
        c2, s2, gamma2 = _reflect(gamma2, epsilon)
        theta1, above = c2 * theta1 + s2 * above, s2 * theta1 - c2 * above
        eta, gamma = s2 * gamma, -c2 * gamma
        c3, s3, gamma1 = _reflect(gamma1, above)
        theta, gamma = s3 * gamma, -c3 * gamma
        w2 = c2[..., None] * s.w_old + s2[..., None] * s.v
        w = s2[..., None] * s.w_old - c2[..., None] * s.v
        w1, w = c3[..., None] * s.w + s3[..., None] * w, s3[..., None] * s.w - c3[..., None] * w

        tiny = 10 * eps * size
        mu2 = _divide(tau2 - eta2 * mu4 - theta2 * mu3, gamma2, tiny)
        mu1 = _divide(tau1 - eta1 * mu3 - theta1 * mu2, gamma1, tiny)
        mu = _divide(tau - eta * mu2 - theta * mu1, gamma, tiny)
        base = s.base + mu2[..., None] * w2
        x = base + mu1[..., None] * w1 + mu[..., None] * w

        # Minimising |r| tells parts of r in the range of A from rounding down to sqrt(eps) |r|, no further: |A r| falls
        # to about that and rises again. The best x is kept.
        better = running & (slope <= s.suspicion * size) & (curvature <= tiny) & (slope < s.slope)
        least = torch.where(better, slope, s.slope)
        kept = torch.where(better[..., None], s.x, s.kept)
        exhausted = beta <= tiny
        suspect = running & (
            (least <= self._level(A) * size) | (slope > 30 * least) | (exhausted & (least < torch.inf))
        )
        # A x may grow until its rounding hides the residual: look before that
        drowned = (eps * size * A.norm(x) > 5 * phi) & (phi > s.goal)
        blocked = running & ~suspect & (drowned | ~(torch.hypot(bar, beta) > tiny))
        moved = running & ~suspect & ~blocked
        past = (c, sine, next_delta, next_epsilon, gamma1, gamma, theta1, theta, eta1, eta, tau1, tau, mu3, mu2)
        new = evolve(
            s, x=x, base=base, v_old=s.v, v=q / torch.where(beta > 0, beta, 1)[..., None], w_old=w1, w=w,
            past=torch.stack(past, dim=-1), beta=beta, phi=phi, error=phi,
        )  # fmt: skip
        pending = (moved & (exhausted | (phi <= s.goal))) | blocked
        codes = torch.where(pending | suspect, PENDING, s.codes)
        codes = torch.where(running & ~(size < torch.inf), Status.NON_FINITE.code, codes)
        codes = torch.where(running & ~(beta < torch.inf), Status.NON_FINITE.code, codes)
        stay = evolve(s, x=torch.where(suspect[..., None], kept, s.x))
        s = evolve(
            choose(moved, new, stay), codes=codes, suspect=suspect | s.suspect, kept=kept, slope=least, k=s.k + 1,
            products=s.products + spent, size=torch.where(running, size, s.size),
        )  # fmt: skip
        if s.k % look == 0 and (look > 1 or any_of(pending | suspect)):
            s = self._verify(A, b, s)
        return self._stop_on_plateau(A, s)

    def _verify(self, A: LinearOperator, b: Tensor, s: MINRESQLPState) -> MINRESQLPState:
        """Rule on the claims; certify least-squares solutions by a product with the residual, restart the others."""
        eps, suspect = torch.finfo(A.dtype).eps, s.suspect
        before, pending = s, s.codes == PENDING
        s, r, restart = self._settle(A, b, s, pending)
        # what suspects claim is no small residual: that it is none costs them nothing
        s = evolve(
            s, goal=torch.where(suspect, before.goal, s.goal), suspect=torch.zeros_like(suspect),
            verified=torch.where(suspect, before.verified, s.verified),
        )  # fmt: skip
        doubtful = restart | (pending & (s.codes == Status.STAGNATED.code))
        if not any_of(doubtful):
            return s
        image, slope, spent = measure(A, r, torch.zeros_like(b), doubtful)  # -A r
        norm = A.norm(r)
        curvature = A.vecdot(image, r / torch.where(norm > 0, norm, 1)[..., None]).abs()
        unit = s.size * norm
        null = doubtful & (slope <= 5 * eps**0.5 * unit) & (curvature <= 20 * eps * unit)
        null = null & (norm > 100 * eps * (s.size * A.norm(s.x) + A.norm(b)))
        suspect = suspect & doubtful
        codes = torch.where(suspect, Status.RUNNING.code, s.codes)
        s = evolve(
            s, codes=torch.where(null, Status.SINGULAR.code, codes), products=s.products + spent,
            direction=torch.where(null[..., None], r, s.direction),
            suspicion=torch.where(suspect, 0.1 * s.suspicion, s.suspicion),
            slope=torch.where(suspect, torch.inf, s.slope),
        )  # fmt: skip
        return choose(restart & ~suspect & ~null, self._begin(A, s, r), s)

    def _finish(self, A: LinearOperator, b: Tensor, s: MINRESQLPState) -> Solution:
        null = s.codes == Status.SINGULAR.code
        return super()._finish(A, b, self._shorten(A, b, s, null) if any_of(null) else s)

    def _shorten(self, A: LinearOperator, b: Tensor, s: MINRESQLPState, null: Tensor) -> MINRESQLPState:
        """Take the null vector out of x, and what is left of r in the range of A out of both.

        The Krylov space has one null vector n, the part of b outside the range of A, and x grew along it. r is n only
        up to y, of size sqrt(eps) |r|; but y solves the system A y = A r, which has a solution.

        Returns:
            The state, STAGNATED where fresh products do not certify the new x.
        """
        solver = MINRES(rtol=torch.finfo(A.dtype).eps ** 0.25, max_iter=self.max_iter)
        r = torch.where(null[..., None], s.direction, 0)
        unit = r / torch.where(null, A.norm(r), 1)[..., None]
        image, spent = self._multiply(A, unit, null)
        part = solver(A, image)
        n = unit - part.x
        n = n / torch.where(null, A.norm(n), 1)[..., None]
        x = s.x - A.vecdot(n, s.x - s.origin)[..., None] * n
        step = solver(A, r - A.vecdot(n, r)[..., None] * n)
        x = torch.where(null[..., None], x + step.x, s.x)
        r, norm, last = measure(A, x, b, null)
        _, slope, then = measure(A, r, torch.zeros_like(b), null)
        failed = null & ~(slope <= 5 * torch.finfo(A.dtype).eps ** 0.5 * s.size * norm)
        return evolve(
            s, x=x, codes=torch.where(failed, Status.STAGNATED.code, s.codes),
            products=s.products + spent + part.products + step.products + last + then,
        )  # fmt: skip


def _reflect(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The reflection [[c, s], [s, -c]] that takes (a, b) to (r, 0), and r; c = 1 for (0, 0)."""
    r = torch.hypot(a, b)
    some = r > 0
    return torch.where(some, a / r, 1), torch.where(some, b / r, 0), r


def _divide(numerator: Tensor, pivot: Tensor, tiny: Tensor) -> Tensor:
    """Forward substitution in a factor without full rank: where the pivot is rounding, the unknown is left out."""
    return torch.where(pivot.abs() > tiny, numerator / pivot, 0)
