"""Conjugate gradients for a whole path of shifts, from one Krylov space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .cg import CG
from .operator import LinearOperator, power_of_two
from .result import Status, any_of, check_stopping, evolve, is_running, iterate
from .solver import LinearSolver, Solution, default_rtol, measure

__all__ = ["MultiShiftCG", "MultiShiftSolution"]

_CLAIMED = -1  # internal code: the recurrence claims convergence, a fresh product has yet to confirm it
_ALONE = -2  # internal code: the common recurrence has ended here, the shift goes on by itself


@dataclass(frozen=True, kw_only=True)
class MultiShiftState:
    """Where a run stands; per column, or per shift and column where so marked. The seed is the smallest shift."""

    x: Tensor  # (shifts, *columns, n), as are p and direction
    p: Tensor
    direction: Tensor
    codes: Tensor  # (shifts, *columns), as are iterations, error, zeta and ratio
    iterations: Tensor
    error: Tensor
    zeta: Tensor  # the residual of a shift is zeta times the seed's
    ratio: Tensor  # of two successive zetas
    r: Tensor  # r and rr are the seed's, in units of `unit`
    rr: Tensor
    alpha: Tensor
    beta: Tensor
    unit: Tensor
    scale: Tensor  # the largest Rayleigh quotient seen, per shift
    k: int = 0
    products: int = 0


@dataclass(frozen=True, kw_only=True)
class MultiShiftSolution(Solution):
    """The solutions for every shift: x, codes, iterations, error and the rest have the shifts as their first dimension.

    Attributes:
        shifts: sigma_i, in the order in which they were given.
        alone: which shifts and columns left the common Krylov space and were finished by CG on their own.
    """

    shifts: Tensor
    alone: Tensor


@dataclass(frozen=True)
class MultiShiftCG(LinearSolver):
    """Solve (A + sigma_i I) x_i = b for k shifts at once, A symmetric, one product with A a step for all of them.

    The Krylov space of A + sigma I from b does not depend on sigma. CG runs on the smallest shift, the seed; from
    x0 = 0 the residuals of the others are multiples zeta_i r of its residual, so that scalars give their step lengths:

        zeta_i(j+1) / zeta_i(j) = 1 / (1 + alpha (sigma_i - sigma_seed) + alpha beta_old / alpha_old (1 - ratio_old)).

    A shift freezes once it claims convergence, large ones first, the seed last. CONVERGED means that a fresh product
    gave |b - (A + sigma_i I) x_i| <= max(rtol |b|, atol) for that shift and column. Where a claim was wrong, or where
    the seed has no positive curvature but a larger shift may have, the shift goes on from where it stands by CG on its
    own, and `alone` says so. The seed without positive curvature is NEGATIVE_CURVATURE or SINGULAR, with the direction.

    Cost: 1 product a step and column as long as one of its shifts runs, 1 to verify each shift; memory for 2 k vectors.

    Args:
        shifts: sigma_1, ..., sigma_k, finite, in any order, negative ones too as long as A + sigma I is definite.
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in b's units.
        max_iter: limit of steps, those alone included.
        preconditioner: must be None. M A and M (A + sigma I) span different spaces, so that one Krylov space no longer
            serves all shifts.

    Raises:
        ValueError: for a preconditioner, no shift, a shift that is not finite, a negative tolerance or limit.

    Reference:
        Frommer & Maass 1999; Jegerlehner 1996, equations 2.42-2.44.

    Example:
        >>> from nestopt.linalg import Dense, MultiShiftCG
        >>> A = Dense(torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64)), symmetric=True)
        >>> sol = MultiShiftCG([0.0, 1.0])(A, torch.tensor([2.0, 12.0], dtype=torch.float64))
        >>> [[round(x, 8) for x in row] for row in sol.x.tolist()]
        [[2.0, 4.0], [1.0, 3.0]]
        >>> sol.status, sol.state.k
        (Statuses(CONVERGED: 2), 2)
    """

    shifts: Sequence[float]
    rtol: float | None = None
    atol: float = 0.0
    max_iter: int = 1000
    preconditioner: None = None

    needs_symmetric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_stopping("MultiShiftCG", self.rtol, self.atol, self.max_iter)
        object.__setattr__(self, "shifts", tuple(float(sigma) for sigma in self.shifts))
        if not self.shifts or not all(math.isfinite(sigma) for sigma in self.shifts):
            raise ValueError(f"MultiShiftCG: shifts must be one or more finite numbers, but got {self.shifts}.")
        if self.preconditioner is not None:
            raise ValueError(
                "MultiShiftCG: preconditioner must be None, because M (A + sigma I) has another Krylov space for each "
                "sigma; use CG(preconditioner=M) on A.shift(sigma), one shift after the other."
            )

    def _check(self, A: LinearOperator, b: Tensor, x0: Tensor | None) -> None:
        super()._check(A, b, x0)
        if x0 is not None:
            raise ValueError(
                "MultiShiftCG: x0 must be None, because only from zero do all shifts have the same first residual; "
                "solve for the correction, or use CG on A.shift(sigma)."
            )

    def _solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None) -> MultiShiftSolution:
        norm = A.norm(b)
        rtol = default_rtol(A.dtype) if self.rtol is None else self.rtol
        tolerance = (rtol * norm).clamp_min(self.atol)
        s = self._start(A, b, norm, tolerance)
        s = iterate(lambda s: self._step(A, s, tolerance), s, max_iter=self.max_iter, check_every=8 if b.is_cuda else 1)
        return self._finish(A, b, s, tolerance)

    def _start(self, A: LinearOperator, b: Tensor, norm: Tensor, tolerance: Tensor) -> MultiShiftState:
        k, unit = len(self.shifts), power_of_two(norm[..., None])
        codes = torch.where(norm <= tolerance, Status.CONVERGED.code, Status.RUNNING.code)
        codes = torch.where(norm < torch.inf, codes, Status.NON_FINITE.code).expand(k, *norm.shape)
        running, one = is_running(codes), torch.ones_like(norm)
        r = torch.where(running[0][..., None], b / unit[..., None], 0)
        none, ones = b.new_zeros(k, *b.shape), norm.new_ones(k, *norm.shape)
        return MultiShiftState(
            x=none, p=r.expand_as(none), direction=none, codes=codes, iterations=torch.zeros_like(codes),
            error=norm.expand_as(ones), zeta=ones, ratio=ones, r=r, rr=A.vecdot(r, r), alpha=one, beta=0 * one,
            unit=unit, scale=0 * ones,
        )  # fmt: skip

    def _step(self, A: LinearOperator, s: MultiShiftState, tolerance: Tensor) -> MultiShiftState:
        """One step of the seed, and what it means for every shift."""
        running = is_running(s.codes)
        active = running.any(0)  # columns; the seed steps as long as any of their shifts does
        sigma = _per_shift(torch.tensor(self.shifts, dtype=A.dtype, device=A.device), s.rr)
        seed = min(range(len(self.shifts)), key=self.shifts.__getitem__)
        p = s.p[seed]
        q = A.active_matvec(p, active) + sigma[seed][..., None] * p
        spent = int(active.sum()) if A.skips(active) else active.numel()

        pq = A.vecdot(p, q)
        alpha = s.rr / pq
        ratio = 1 / (1 + alpha * (sigma - sigma[seed]) + alpha * s.beta / s.alpha * (1 - s.ratio))
        zeta = s.zeta * ratio
        length = alpha * ratio  # of the step of each shift, from which its curvature p'(A + sigma I)p follows
        own = _per_shift(torch.arange(len(self.shifts), device=A.device) == seed, s.rr)
        rayleigh = torch.where(own, pq, s.zeta.square() * s.rr / length) / A.vecdot(s.p, s.p)
        scale = torch.fmax(s.scale, rayleigh.abs())
        floor = 10 * torch.finfo(A.dtype).eps * scale
        bent = ~(rayleigh > floor)
        broken = active & bent[seed]  # what the seed fails at ends the recurrence of all shifts
        bent = running & bent & (~broken | own)
        moved = running & ~bent & ~broken
        go = moved.any(0)

        step = torch.where(moved, length * s.unit, 0)
        x = torch.addcmul(s.x, step[..., None], s.p)
        r = torch.where(go[..., None], torch.addcmul(s.r, alpha[..., None], q, value=-1), s.r)
        rr = A.vecdot(r, r)
        error = torch.where(moved, zeta.abs() * rr.sqrt() * s.unit, s.error)
        beta = rr / s.rr
        p = torch.addcmul(zeta[..., None] * r, (beta * ratio.square())[..., None], s.p)
        # the seed of a column goes on as long as any of its shifts does, also where it is itself within its tolerance
        keep = moved | (go & own)

        fault = torch.where(rayleigh < -floor, Status.NEGATIVE_CURVATURE.code, Status.SINGULAR.code)
        fault = torch.where(torch.isfinite(rayleigh), fault, Status.NON_FINITE.code)
        # far below the rounding of b there is nothing more to come, and the squares of zeta would underflow
        goal = torch.maximum(tolerance, 0.01 * torch.finfo(A.dtype).eps * s.unit)
        codes = torch.where(moved & (error <= goal), _CLAIMED, s.codes)
        codes = torch.where(running & broken, _ALONE, codes)
        codes = torch.where(bent, fault, codes)
        return evolve(
            s, x=x, r=r, rr=rr, p=torch.where(keep[..., None], p, s.p), error=error, codes=codes, scale=scale,
            zeta=torch.where(keep, zeta, s.zeta), ratio=torch.where(keep, ratio, s.ratio), alpha=alpha, beta=beta,
            direction=torch.where(bent[..., None], s.p, s.direction), k=s.k + 1, products=s.products + spent,
        )  # fmt: skip

    def _finish(self, A: LinearOperator, b: Tensor, s: MultiShiftState, tolerance: Tensor) -> MultiShiftSolution:
        """Measure every shift and column that took a step or failed; finish alone those that have to."""
        parts: list[tuple[Tensor, ...]] = []
        products = s.products
        for i, sigma in enumerate(self.shifts):
            part, spent = self._settle(A.shift(sigma), b, s, i, tolerance)
            parts.append(part)
            products += spent
        x, codes, iterations, error, direction, alone = (torch.stack(part) for part in zip(*parts, strict=True))
        named = (codes == Status.NEGATIVE_CURVATURE.code) | (codes == Status.SINGULAR.code)
        return MultiShiftSolution(
            x=x, codes=codes, iterations=iterations, error=error, residual_norm=error, state=s,
            tolerance=tolerance.expand_as(error), products=products,
            direction=torch.where(named[..., None], direction, 0) if any_of(named) else None,
            shifts=torch.tensor(self.shifts, dtype=A.dtype, device=A.device), alone=alone,
        )  # fmt: skip

    def _settle(
        self, shifted: LinearOperator, b: Tensor, s: MultiShiftState, i: int, tolerance: Tensor
    ) -> tuple[tuple[Tensor, ...], int]:
        x, codes, iterations, direction = s.x[i], s.codes[i], s.iterations[i], s.direction[i]
        unsure = codes != Status.CONVERGED.code
        _, bound, products = measure(shifted, x, b, unsure)
        error = torch.where(unsure, bound, s.error[i])
        alone = (codes == _ALONE) | ((codes == _CLAIMED) & (error > tolerance))
        codes = torch.where(unsure & (error <= tolerance), Status.CONVERGED.code, codes)
        codes = torch.where(error < torch.inf, codes, Status.NON_FINITE.code)
        size = shifted.norm(direction)[..., None]
        direction = torch.where(size > 0, direction / size, 0)
        if any_of(alone):
            cg = CG(rtol=self.rtol, atol=self.atol, max_iter=self.max_iter - s.k)
            rest = cg(shifted, torch.where(alone[..., None], b, 0), torch.where(alone[..., None], x, 0))
            x = torch.where(alone[..., None], rest.x, x)
            codes = torch.where(alone, rest.codes, codes)
            error = torch.where(alone, torch.as_tensor(rest.error, dtype=error.dtype, device=error.device), error)
            iterations = iterations + torch.where(alone, torch.as_tensor(rest.iterations, device=codes.device), 0)
            products += rest.products
            if rest.direction is not None:
                direction = torch.where(alone[..., None], rest.direction, direction)
        return (x, codes, iterations, error, direction, alone), products


def _per_shift(values: Tensor, column: Tensor) -> Tensor:
    """Values of shape (shifts,), with a dimension of one for each dimension of a tensor over columns."""
    return values.reshape(-1, *(1,) * column.ndim)
