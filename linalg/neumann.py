"""The truncated Neumann series, with a step size that is known to contract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .lanczos import extreme_eigenvalues
from .operator import LinearOperator
from .result import Status, any_of, check_stopping, evolve, is_running, iterate, scalar_or_tensor
from .solver import LinearSolver, Solution, default_rtol, measure

__all__ = ["Neumann"]


@dataclass(frozen=True)
class NeumannState:
    """Where a run stands; every tensor is per column."""

    x: Tensor
    r: Tensor
    codes: Tensor
    iterations: Tensor
    error: Tensor
    step_size: Tensor
    direction: Tensor
    products: int


@dataclass(frozen=True)
class Neumann(LinearSolver):
    """Approximate the solution of A x = b, A symmetric positive definite, by v = a sum_{j < terms} (I - a A)^j b.

    Richardson's iteration x <- x + a (b - A x), which from x0 = 0 gives the truncated series of hypergradient papers
    exactly, `terms` terms after as many steps. It contracts for 0 < a < 2 / lambda_max, and converges at the rate
    1 - a lambda_min: at an equal number of products CG is always better. MAX_ITER is its usual ending, x then being the
    truncated sum; CONVERGED means that |b - A x| <= max(rtol |b|, atol) was measured, after which it stops early.

    Before the first step, Lanczos looks at the spectrum. Its largest Ritz value is a lower bound of lambda_max, so one
    beyond 2 / a proves that the series diverges: the outcome is DIVERGED, with x where it started. A negative Ritz
    value is NEGATIVE_CURVATURE with its direction, A = 0 is SINGULAR. Where Lanczos saw neither, a residual that grows
    proves one of the two, and ends the run before the step that made it grow.

    Cost: 1 product a term, and at most `lanczos_steps` before the first.

    Args:
        terms: limit of terms; 5 to 20 in the literature, condition number times log(1 / rtol) to converge, after which
            no further one is spent.
        step_size: a, below 2 / lambda_max; None for the inverse of Lanczos' upper bound of lambda_max.
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in b's units.
        lanczos_steps: limit of Lanczos steps; 0 trusts step_size and saves them.

    Raises:
        ValueError: for a negative tolerance or limit, a step size that is not positive, or neither a step size nor
            Lanczos steps to find one.

    Reference:
        Lorraine, Vicol & Duvenaud 2020; the refusal: Saad, Iterative Methods for Sparse Linear Systems, 4.2.1.

    Example:
        >>> from nestopt.linalg import Dense, Neumann
        >>> A = Dense(torch.tensor([[2.0, 0.0], [0.0, 4.0]], dtype=torch.float64), symmetric=True)
        >>> b = torch.tensor([2.0, 4.0], dtype=torch.float64)
        >>> Neumann(terms=2, step_size=0.25)(A, b).x
        tensor([0.7500, 1.0000], dtype=torch.float64)
        >>> Neumann(terms=2, step_size=1.0)(A, b).status.name
        'DIVERGED'
    """

    terms: int = 1000
    step_size: float | None = None
    rtol: float | None = None
    atol: float = 0.0
    lanczos_steps: int = 20

    needs_symmetric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_stopping("Neumann", self.rtol, self.atol, 0)
        for name, value in (("terms", self.terms), ("lanczos_steps", self.lanczos_steps)):
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"Neumann: {name} must be an integer >= 0, but got {value!r}; use e.g. {name}=20.")
        if self.step_size is not None and not 0 < self.step_size < float("inf"):
            raise ValueError(
                f"Neumann: step_size must be a number > 0, but got {self.step_size}; use None for a safe choice."
            )
        if self.step_size is None and self.lanczos_steps == 0:
            raise ValueError("Neumann: lanczos_steps=0 needs a step_size; give one, or let Lanczos find it.")

    def _solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None) -> Solution:
        norm = A.norm(b)
        rtol = default_rtol(A.dtype) if self.rtol is None else self.rtol
        tolerance = (rtol * norm).clamp_min(self.atol)
        s = self._start(A, b, x0, tolerance)
        s = iterate(lambda s: self._step(A, b, s, tolerance), s, max_iter=self.terms)
        codes, error, products = s.codes, s.error, s.products
        unsure = codes != Status.CONVERGED.code
        if A.dtype != torch.float64 and any_of(unsure):  # what the steps measured has the rounding of a lower precision
            _, bound, spent = measure(A, s.x, b, unsure)
            error, products = torch.where(unsure, bound, error), products + spent
            within = (codes == Status.MAX_ITER.code) & (error <= tolerance)
            codes = torch.where(within, Status.CONVERGED.code, codes)
        named = (codes == Status.NEGATIVE_CURVATURE.code) | (codes == Status.SINGULAR.code)
        return Solution(
            x=s.x, codes=codes, iterations=scalar_or_tensor(s.iterations), error=scalar_or_tensor(error), state=s,
            residual_norm=scalar_or_tensor(error), tolerance=scalar_or_tensor(tolerance), products=products,
            direction=torch.where(named[..., None], s.direction, 0) if any_of(named) else None,
        )  # fmt: skip

    def _start(self, A: LinearOperator, b: Tensor, x0: Tensor | None, tolerance: Tensor) -> NeumannState:
        norm = A.norm(b)
        x = torch.zeros_like(b) if x0 is None else torch.where((norm == 0)[..., None], 0, x0)
        r, error, products = (b, norm, 0) if x0 is None else measure(A, x, b, torch.ones_like(norm, dtype=torch.bool))
        codes = torch.where(error <= tolerance, Status.CONVERGED.code, Status.RUNNING.code)
        codes = torch.where(error < torch.inf, codes, Status.NON_FINITE.code)
        count = torch.zeros_like(codes)
        eps = torch.finfo(A.dtype).eps
        size = torch.full_like(norm, self.step_size or 0.0)
        direction = torch.zeros_like(b)
        if self.lanczos_steps and any_of(is_running(codes)):
            spectrum = extreme_eigenvalues(A, steps=self.lanczos_steps)
            low, high, rest = (
                torch.as_tensor(value, dtype=A.dtype, device=A.device).expand(norm.shape)
                for value in (spectrum.lowest, spectrum.highest, spectrum.highest_residual)
            )
            top = torch.maximum(high.abs(), low.abs())
            size = 1 / (high + rest) if self.step_size is None else size
            ruling = torch.where(size * high > 2 * (1 + 100 * eps), Status.DIVERGED.code, Status.RUNNING.code)
            ruling = torch.where(low < -100 * eps * top, Status.NEGATIVE_CURVATURE.code, ruling)
            ruling = torch.where(top == 0, Status.SINGULAR.code, ruling)
            ruling = torch.where(top < torch.inf, ruling, Status.NON_FINITE.code)
            codes = torch.where(is_running(codes), ruling, codes)
            direction = spectrum.lowest_vector.expand(b.shape)
            products += spectrum.products
        return NeumannState(x, r, codes, count, error, size, direction, products)

    def _step(self, A: LinearOperator, b: Tensor, s: NeumannState, tolerance: Tensor) -> NeumannState:
        running = is_running(s.codes)
        step = torch.where(running[..., None], s.step_size[..., None] * s.r, 0)
        x = s.x + step
        r = torch.where(running[..., None], b - A.active_matvec(x, running), s.r)
        error = torch.where(running, A.norm(r), s.error)
        products = s.products + (int(running.sum()) if A.skips(running) else running.numel())

        # While 0 <= a A <= 2 no residual grows. One that does tells by r'Ar which of the two is violated.
        # The rounding of A x, with |A| <= 2 / a, is no growth.
        noise = 100 * torch.finfo(A.dtype).eps * (A.norm(b) + 2 * A.norm(x) / s.step_size)
        grown = running & (error > s.error * (1 + 1e-6) + noise)
        codes, direction = s.codes, s.direction
        if r.is_cuda or any_of(grown):
            w = s.r - r  # a A r
            negative = A.vecdot(s.r, w) < 0
            # where r'Ar > 0 it may still be either: a Rayleigh quotient above 2 / a proves that the step is too long,
            # and without one the run goes on until r'Ar tells
            pull = A.active_matvec(w, grown & ~negative)
            products += int((grown & ~negative).sum())
            long = ~negative & (s.step_size * A.vecdot(w, pull) > 2 * A.vecdot(w, w))
            grown = grown & (negative | long)
            fault = torch.where(negative, Status.NEGATIVE_CURVATURE.code, Status.DIVERGED.code)
            codes = torch.where(grown, fault, codes)
            unit = s.r / torch.where(s.error > 0, s.error, 1)[..., None]
            direction = torch.where((grown & negative)[..., None], unit, direction)
            x = torch.where(grown[..., None], s.x, x)
            error = torch.where(grown, s.error, error)
        claims = is_running(codes) & running & (error <= tolerance)
        if r.is_cuda or any_of(claims):
            _, bound, spent = measure(A, x, b, claims) if A.dtype != torch.float64 else (r, error, 0)
            error, products = torch.where(claims, bound, error), products + spent
            codes = torch.where(claims & (error <= tolerance), Status.CONVERGED.code, codes)
        return evolve(s, x=x, r=r, codes=codes, error=error, direction=direction, products=products)
