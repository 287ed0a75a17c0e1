"""Minimal residuals for symmetric systems that may be indefinite or singular, many columns at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .krylov import PENDING, Krylov, KrylovState, choose
from .operator import LinearOperator
from .result import Status, any_of, evolve, is_running
from .solver import measure

__all__ = ["MINRES"]

_SUSPECT = -2  # internal code: the residual may be a null vector, products with it have yet to confirm that


@dataclass(frozen=True, kw_only=True)
class MINRESState(KrylovState):
    """Where a run of MINRES stands; every tensor is per column, in the notation of Elman, Silvester & Wathen."""

    r: Tensor  # the residual that the recurrences give; only followed where a preconditioner hides its norm
    u_old: Tensor  # Lanczos vectors, <u_j, M u_j> = 1
    u: Tensor
    z: Tensor  # M u
    w_old: Tensor  # search directions
    w: Tensor
    gamma: Tensor  # off-diagonal of the tridiagonal
    eta: Tensor  # signed norm |r|_M that is left
    c_old: Tensor  # rotations: cosines and sines
    c: Tensor
    sine_old: Tensor
    sine: Tensor
    suspicion: Tensor  # |A r| / (|A| |r|) below which r is examined for being a null vector
    size: Tensor  # lower bound of |A|: the largest |A z| / |z| seen
    largest: Tensor  # likewise of the preconditioned operator


@dataclass(frozen=True)
class MINRES(Krylov[MINRESState]):
    """Solve A x = b for symmetric A, indefinite or singular too, one product with A a step.

    Lanczos and Givens rotations minimise the residual (its M-norm, for a preconditioner M) over the Krylov space, for
    all columns of b at once; a column that has ended is frozen. CONVERGED means that a fresh product gave |b - A x| <=
    max(rtol |b|, atol); a wrong claim of the recurrence restarts from the true residual, or ends as STAGNATED when that
    no longer halves it. A singular system with a solution converges to one; one without a solution ends as SINGULAR
    once r = b - A x, far above rounding, is a null vector of A to working precision, measured: |A r| <= 5 sqrt(eps) |A|
    |r| and |r'Ar| <= 10 eps |A| |r|^2. Then x is a least-squares solution and `direction` is r. A preconditioner with
    v'Mv < 0 is a BREAKDOWN.

    Cost: 1 product a step, 1 to verify, 1 for x0, 2 more to look at A r where a claim fails.

    Args:
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in b's units.
        max_iter: limit of steps; an indefinite system takes about as many as CG on its square, its condition number's.
        preconditioner: symmetric positive definite operator close to the inverse of |A| (the matrix absolute value).

    Raises:
        ValueError: for a negative tolerance or limit.

    Reference:
        Paige & Saunders 1975; Choi, Paige & Saunders 2011 (least-squares stopping); Elman, Silvester & Wathen 2014,
        algorithm 4.1 (the preconditioned form).

    Example:
        >>> from nestopt.linalg import MINRES, Dense
        >>> A = Dense(torch.tensor([[1.0, 2.0], [2.0, -1.0]], dtype=torch.float64), symmetric=True)
        >>> sol = MINRES()(A, torch.tensor([5.0, 0.0], dtype=torch.float64))
        >>> [round(x, 8) for x in sol.x.tolist()], sol.status.name, sol.iterations
        ([1.0, 2.0], 'CONVERGED', 2)
    """

    needs_symmetric: ClassVar[bool] = True

    def init(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> MINRESState:
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
        state = MINRESState(
            **vars(start), r=r, u_old=r, u=r, z=r, w_old=r, w=r, gamma=zero, eta=zero, c_old=zero, c=zero,
            sine_old=zero, sine=zero, size=zero, largest=zero,
            suspicion=torch.full_like(zero, 3 * torch.finfo(A.dtype).eps ** 0.5),
        )  # fmt: skip
        return self._begin(A, state, r)

    def _begin(self, A: LinearOperator, s: MINRESState, r: Tensor) -> MINRESState:
        """The state with a new Lanczos process from the residual r."""
        norm = A.norm(r)
        u = r / torch.where(norm > 0, norm, 1)[..., None]  # before squares are formed
        z = self._precondition(u)
        gamma = A.vecdot(u, z)
        broken = is_running(s.codes) & (gamma <= 0) & (norm > 0)
        codes = torch.where(broken, Status.BREAKDOWN.code, s.codes)
        root = torch.where(gamma > 0, gamma, 1).sqrt()
        zero, one, none = torch.zeros_like(norm), torch.ones_like(norm), torch.zeros_like(r)
        return evolve(
            s, codes=codes, r=r, u_old=none, u=u / root[..., None], z=z / root[..., None], w_old=none, w=none,
            gamma=zero, eta=norm * root, c_old=one, c=one, sine_old=zero, sine=zero,
        )  # fmt: skip

    def step(self, A: LinearOperator, b: Tensor, s: MINRESState, look: int = 1) -> MINRESState:
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
        q, spent = self._multiply(A, s.z, running)
        delta = A.vecdot(q, s.z)
        v = q - delta[..., None] * s.u - s.gamma[..., None] * s.u_old
        norm = A.norm(v)
        v = v / torch.where(norm > 0, norm, 1)[..., None]  # before squares are formed
        z = self._precondition(v)
        square = A.vecdot(v, z)
        root = torch.where(square > 0, square, 1).sqrt()
        gamma = norm * root

        alpha0 = s.c * delta - s.c_old * s.sine * s.gamma
        alpha1 = torch.hypot(alpha0, gamma)
        alpha2 = s.sine * delta + s.c_old * s.c * s.gamma
        alpha3 = s.sine_old * s.gamma

        eps = torch.finfo(A.dtype).eps
        largest = torch.fmax(s.largest, torch.hypot(torch.hypot(s.gamma, delta), gamma))
        size = largest if self.preconditioner is None else torch.fmax(s.size, A.norm(q) / A.norm(s.z))
        # Of r as it is before the step, |A r| / |r| and r'Ar / |r|^2 are known. Minimising |r| can leave a share of the
        # order of sqrt(eps) of the range of A in it, but no more: where both are that small, r is a null vector, and a
        # step would only add to x in its direction.
        suspect = running & (torch.hypot(alpha0, s.c * gamma) <= s.suspicion * largest)
        suspect = suspect & ((s.c * alpha0).abs() <= 10 * eps * largest)

        c, sine = alpha0 / alpha1, gamma / alpha1
        w = (s.z - alpha3[..., None] * s.w_old - alpha2[..., None] * s.w) / alpha1[..., None]
        x = s.x + (c * s.eta)[..., None] * w
        eta = -sine * s.eta
        u, z = v / root[..., None], z / root[..., None]
        r, error = s.r, eta.abs()
        if self.preconditioner is not None:
            r = sine.square()[..., None] * s.r + (c * eta)[..., None] * u
            error = A.norm(r)
        # A x may grow until its rounding hides the residual: look before that
        drowned = (eps * size * A.norm(x) > 5 * error) & (error > s.goal)
        blocked = running & ~suspect & (drowned | ~(alpha1 > 10 * eps * largest))
        moved = running & ~suspect & ~blocked
        new = evolve(
            s, x=x, r=r, u_old=s.u, u=u, z=z, w_old=s.w, w=w, gamma=gamma, eta=eta, c_old=s.c, c=c, sine_old=s.sine,
            sine=sine, error=error,
        )  # fmt: skip
        exhausted = gamma <= 10 * eps * largest
        pending = (moved & (exhausted | (error <= s.goal))) | blocked
        codes = torch.where(suspect, _SUSPECT, torch.where(pending, PENDING, s.codes))
        codes = torch.where(running & (square < -10 * eps * A.norm(z)), Status.BREAKDOWN.code, codes)
        codes = torch.where(running & ~torch.isfinite(square), Status.NON_FINITE.code, codes)
        s = evolve(
            choose(moved, new, s), codes=codes, k=s.k + 1, products=s.products + spent,
            size=torch.fmax(s.size, size), largest=torch.fmax(s.largest, largest),
        )  # fmt: skip
        if s.k % look == 0 and (look > 1 or any_of(pending | suspect)):
            s = self._verify(A, b, s)
        return self._stop_on_plateau(A, s)

    def _verify(self, A: LinearOperator, b: Tensor, s: MINRESState) -> MINRESState:
        """Rule on the claims; name singular systems by products with the residual, and restart the others."""
        pending, suspect = s.codes == PENDING, s.codes == _SUSPECT
        s, r, restart = self._settle(A, b, s, pending | suspect)
        doubtful = suspect | restart | (pending & (s.codes == Status.STAGNATED.code))
        if not any_of(doubtful):
            return s
        zero, eps, error = torch.zeros_like(b), torch.finfo(A.dtype).eps, A.norm(r)
        image, _, first = measure(A, r, zero, doubtful)  # -A r
        second, _, then = measure(A, image, zero, doubtful)  # A A r
        slope = A.norm(image)
        curvature = A.vecdot(image, r / torch.where(error > 0, error, 1)[..., None]).abs()
        null = (slope <= 5 * eps**0.5 * s.size * error) & (curvature <= 10 * eps * s.size * error)
        # what is left in A r is noise, of all of the spectrum, where r is null; small eigenvectors would stay small
        null &= (slope <= 100 * eps * s.size * error) | (A.norm(second) > 0.01 * s.size * slope)
        singular = doubtful & null & (error > 100 * eps * (s.size * A.norm(s.x) + A.norm(b)))
        codes = torch.where(suspect, Status.RUNNING.code, s.codes)
        s = evolve(
            s, codes=torch.where(singular, Status.SINGULAR.code, codes), products=s.products + first + then,
            direction=torch.where(singular[..., None], r, s.direction),
            suspicion=torch.where(suspect, 0.3 * s.suspicion, s.suspicion),
        )  # fmt: skip
        return choose(restart & ~singular, self._begin(A, s, r), s)
