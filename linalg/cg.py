"""Conjugate gradients over many columns at once, with a mask, a reason and a true residual for each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.linalg import eigvalsh_tridiagonal
from torch import Tensor

from .krylov import PENDING, STRIDE, Krylov, KrylovState
from .operator import LinearOperator, power_of_two
from .result import Status, all_of, any_of, evolve, is_running, scalar_or_tensor
from .solver import Solution, default_rtol

__all__ = ["CG", "CGSolution", "default_rtol"]


@dataclass(frozen=True, kw_only=True)
class CGState(KrylovState):
    """Where a run of CG stands; every tensor is per column."""

    r: Tensor  # r, p and rz are in units of `unit`, so that their squares neither over- nor underflow
    p: Tensor  # zero for a column that has ended
    rz: Tensor
    scale: Tensor  # the largest Rayleigh quotient seen
    unit: Tensor
    energy: Tensor  # x'Ax/2 - b'x has fallen by half of this since the start,
    energy_seen: Tensor  # and by this at the last look for a plateau
    coefficients: tuple[tuple[Tensor, Tensor, Tensor], ...] = field(default=(), repr=False)  # alpha, beta, who moved


@dataclass(frozen=True, kw_only=True)
class CGSolution(Solution):
    """A Solution of CG, which also knows the Ritz values of its Lanczos tridiagonal."""

    preconditioned: bool = False

    @property
    def curvature(self) -> tuple[Any, Any] | None:
        """(smallest, largest) Ritz value per column, inside A's spectrum; None after a preconditioned solve."""
        extremes = None if self.preconditioned else _extremes(self.state.coefficients)
        return None if extremes is None else (scalar_or_tensor(extremes[0]), scalar_or_tensor(extremes[1]))

    @property
    def condition(self) -> Any:
        """The condition number that CG met, of M A with a preconditioner M and of A without, per column; None unseen.

        It is the ratio of the extreme Ritz values, and so an estimate from below. A preconditioner that helps makes it
        smaller than a solve without finds it; `compare_preconditioners` looks at both.
        """
        extremes = _extremes(self.state.coefficients)
        return None if extremes is None else scalar_or_tensor(extremes[1] / extremes[0])


@dataclass(frozen=True)
class CG(Krylov[CGState]):
    """Solve A x = b for symmetric positive definite A, one product with A a step.

    Hestenes-Stiefel recurrence for all columns of b (right-hand sides and systems) at once; a column that has ended is
    frozen and, where the operator is not a batch, costs no more products. CONVERGED means that a fresh product gave
    |b - A x| <= max(rtol |b|, atol): when the recurrence claims it, the true residual is computed, and if the claim was
    wrong the column restarts from the true residual, or ends as STAGNATED when that no longer halves it. Curvature
    p'Ap is judged against the rounding level of |A| |p|^2, so scaling A changes nothing: negative is
    NEGATIVE_CURVATURE, zero is SINGULAR, both with the direction. A preconditioner with r'Mr <= 0 is a BREAKDOWN.
    b = 0 gives x = 0.

    Cost: 1 product a step, 1 to verify, 1 for x0, at most 1 in every `replace_every` steps against drift. (A residual
    costs 2 where A can only multiply below float64: the second one measures the rounding of the first.)

    Args:
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in b's units.
        max_iter: limit of steps; 20 to 50 is common for hypergradients, sqrt(condition number) * 10 for 1e-8.
        preconditioner: symmetric positive definite operator close to the INVERSE of A.
        replace_every: steps between replacements of the recurrent residual by the true one, as long as the rounding
            of that is below a thousandth of it.

    Raises:
        ValueError: for a negative tolerance or limit.

    Reference:
        Hestenes & Stiefel 1952; residual replacement: van der Vorst & Ye 2000.

    Example:
        >>> from nestopt.linalg import CG, Dense
        >>> A = Dense(torch.tensor([[2.0, 0.0], [0.0, 4.0]], dtype=torch.float64), symmetric=True, definite=True)
        >>> sol = CG(rtol=1e-10)(A, torch.tensor([2.0, 4.0], dtype=torch.float64))
        >>> sol.x, sol.status.name, sol.iterations
        (tensor([1., 1.], dtype=torch.float64), 'CONVERGED', 2)
    """

    replace_every: int = 50

    needs_symmetric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.replace_every < 1:
            raise ValueError(f"CG: replace_every must be at least 1, but got {self.replace_every}.")

    def _check_operator(self, A: LinearOperator) -> None:
        super()._check_operator(A)
        if A.definite is False:
            raise TypeError(f"CG: A must be positive definite, but {A!r} is known not to be; use MINRES or A.shift.")

    def init(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> CGState:
        """The evaluated state at x0.

        Args:
            A: symmetric operator.
            b: right-hand sides (*sides, *batch, n).
            x0: start, zero when None.

        Returns:
            The state.
        """
        start, r = self._start(A, b, x0)
        unit = power_of_two(start.error[..., None])
        r = r / unit[..., None]
        z = self._precondition(r)
        rz = A.vecdot(r, z)
        start = self._name_preconditioner(start, rz)
        p = torch.where(is_running(start.codes)[..., None], z, 0)
        return CGState(**vars(start), r=r, p=p, rz=rz, scale=0 * rz, unit=unit, energy=0 * rz, energy_seen=0 * rz)

    def step(self, A: LinearOperator, b: Tensor, s: CGState, look: int = 1) -> CGState:
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
        q, spent = self._multiply(A, s.p, running)
        pq = A.vecdot(s.p, q)
        rayleigh = pq / A.vecdot(s.p, s.p)
        scale = torch.fmax(s.scale, rayleigh)  # fmax: a NaN must not enter the scale
        floor = (10 * torch.finfo(A.dtype).eps) * scale
        moved = rayleigh > floor  # false for a column that has ended: its p is zero, its quotient NaN
        everyone = look == 1 and all_of(moved)  # the common case, in which nothing is selected
        if not everyone:
            moved = moved & running
            s = _name_curvature(s, running & ~moved, rayleigh, floor)

        alpha = s.rz / pq if everyone else torch.where(moved, s.rz / pq, 0)
        x = torch.addcmul(s.x, (alpha * s.unit).unsqueeze(-1), s.p)
        r = torch.addcmul(s.r, alpha.unsqueeze(-1), q, value=-1)
        rr = A.vecdot(r, r)
        error, k = rr.sqrt() * s.unit, s.k + 1
        energy = torch.addcmul(s.energy, alpha, s.rz)
        s = evolve(s, x=x, error=error, scale=scale, energy=energy, k=k, products=s.products + spent)

        claims, restart = error <= s.goal, None
        claimed = look > 1 or any_of(claims)
        if claimed:
            s = evolve(s, codes=torch.where(claims & moved, PENDING, s.codes))
        due = k % self.replace_every < look
        if k % look == 0 and (claimed or due):
            columns = s.codes == PENDING
            if due:  # the true residual brings rounding of its own, which near the end is worse than the drift
                noise = torch.finfo(A.dtype).eps * s.scale * A.norm(s.x)
                columns = columns | (moved & (noise <= 1e-3 * s.error))
            s, true, restart = self._settle(A, b, s, columns)
            r = torch.where(columns[..., None], true / s.unit[..., None], r)
            s, energy = _judge_anew(s, restart), torch.where(restart, 0, energy)
            rr = A.vecdot(r, r)
        if k % STRIDE == 0:  # the residual of an ill-conditioned system may rise for long while the energy falls
            s = self._stop_on_plateau(A, s, energy > (1 + 1e-6) * s.energy_seen)
            s = evolve(s, energy_seen=energy)

        z = self._precondition(r)
        rz = rr if z is r else A.vecdot(r, z)
        s = self._name_preconditioner(s, rz)
        beta = rz / s.rz
        if restart is not None:
            beta = torch.where(restart, 0, beta)
        p = torch.addcmul(z, beta.unsqueeze(-1), s.p)
        if not everyone or restart is not None:
            p = torch.where(is_running(s.codes)[..., None], p, 0)
        return evolve(s, r=r, p=p, rz=rz, coefficients=(*s.coefficients, (alpha, beta, moved)))

    def _name_preconditioner(self, s: KrylovState, rz: Tensor) -> Any:
        """BREAKDOWN where r'Mr shows that the preconditioner is not positive definite."""
        if self.preconditioner is None:
            return s
        broken = is_running(s.codes) & ~(rz > 0) & (s.error > 0)
        fault = torch.where(rz <= 0, Status.BREAKDOWN.code, Status.NON_FINITE.code)
        return evolve(s, codes=torch.where(broken, fault, s.codes))

    def _solution(self, **parts: object) -> CGSolution:
        return CGSolution(preconditioned=self.preconditioner is not None, **parts)  # type: ignore[arg-type]


def _name_curvature(s: CGState, faulty: Tensor, rayleigh: Tensor, floor: Tensor) -> CGState:
    """The ending of columns whose direction has no positive curvature."""
    fault = torch.where(rayleigh < -floor, Status.NEGATIVE_CURVATURE.code, Status.SINGULAR.code)
    fault = torch.where(torch.isfinite(rayleigh), fault, Status.NON_FINITE.code)
    direction = torch.where(faulty[..., None], s.p, s.direction)
    return evolve(s, codes=torch.where(faulty, fault, s.codes), direction=direction)


def _judge_anew(s: CGState, restart: Tensor) -> CGState:
    """Forget the progress of columns that restart: what is left to gain is nothing beside it."""
    return evolve(
        s, energy=torch.where(restart, 0, s.energy), energy_seen=torch.where(restart, 0, s.energy_seen),
        best=torch.where(restart, s.error, s.best), best_at=torch.where(restart, s.k, s.best_at),
    )  # fmt: skip


def _extremes(coefficients: tuple[tuple[Tensor, Tensor, Tensor], ...]) -> tuple[Tensor, Tensor] | None:
    """Extreme eigenvalues of CG's T_kk = 1/alpha_k + beta_{k-1}/alpha_{k-1}, T_{k,k+1} = sqrt(beta_k)/alpha_k."""
    # Per column, by bisection in O(steps): a dense eigenvalue problem outlasts the solve once steps are thousands.
    if not coefficients:
        return None
    alpha, beta, moved = (torch.stack(part, dim=-1) for part in zip(*coefficients, strict=True))
    columns, shape = alpha.shape[:-1].numel(), alpha.shape[:-1]
    a, b, m = (part.detach().cpu().reshape(columns, -1).numpy() for part in (alpha, beta, moved))
    out = torch.full((2, columns), torch.nan, dtype=torch.float64)
    for column in range(columns):
        steps = int(m[column].sum())  # a column moves until it ends: its steps come first
        if not steps:
            continue
        size, ratio = a[column, :steps].astype(np.float64), b[column, :steps].clip(0).astype(np.float64)
        diagonal, off = 1 / size, np.sqrt(ratio[:-1]) / size[:-1]
        diagonal[1:] += ratio[:-1] / size[:-1]
        if steps == 1:
            out[:, column] = diagonal[0]  # older SciPy refuses a matrix of one entry
        elif np.isfinite(diagonal).all() and np.isfinite(off).all():
            for end, index in enumerate((0, steps - 1)):
                out[end, column] = eigvalsh_tridiagonal(diagonal, off, select="i", select_range=(index, index))[0]
    low, high = out.reshape(2, *shape).to(alpha)
    return low, high
