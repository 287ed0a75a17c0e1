"""Derivatives that are inexact on purpose: what their passes share, and the truncated series behind most of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nestopt.linalg import LinearOperator, Solution, Status, iterate
from nestopt.linalg.lanczos import extreme_eigenvalues
from nestopt.linalg.result import evolve, is_running, scalar_or_tensor
from nestopt.linalg.solver import default_rtol

__all__ = ["Approximation", "BackwardPass", "Series", "StepPass", "step_sizes"]


class Approximation(Protocol):
    """What a pass prepares at a point, as linalg's Prepared."""

    def solve(self, b: Tensor, x0: Tensor | None = None) -> Solution:
        """About A^{-1} b."""

    def solve_transposed(self, b: Tensor, x0: Tensor | None = None) -> Solution:
        """About A'^{-1} b."""


class BackwardPass(ABC):
    """How a derivative is approximated: takes the place of a LinearSolver as `solver=` of root, fixed_point and argmin.

    Its systems are solved inexactly because the user says so: the residual of each is measured and recorded by the
    monitor as ever, with MAX_ITER where it is above the tolerance, and that is no failure. What still is one: a
    derivative that is not finite, and a proof that the approximation has no meaning (negative curvature).
    """

    @abstractmethod
    def check(self, owner: str, is_map: bool, symmetric: bool) -> None:
        """Refuse a public function for which this pass means nothing.

        Args:
            owner: the public function.
            is_map: whether the user's function is a map y -> T(y, theta).
            symmetric: whether A = dR/dy is promised symmetric.

        Raises:
            ValueError: where the combination means nothing.
        """

    @abstractmethod
    def prepare(self, A: LinearOperator, is_map: bool) -> Approximation:
        """What many solves at a point share.

        Args:
            A: dR/dy.
            is_map: whether it is I - dT/dy.

        Returns:
            An object with solve and solve_transposed, inexact ones.
        """


@dataclass(frozen=True, kw_only=True)
class StepPass(BackwardPass):
    """A pass that differentiates steps of a map: of the user's T, or of y -> y - s R(y, theta).

    Args:
        step: s; None for the inverse of the largest eigenvalue of A that Lanczos bounds, which needs a symmetric A.
    """

    step: float | None = None

    @property
    @abstractmethod
    def plan(self) -> tuple[int, float]:
        """How many steps, and the fraction of each that is taken."""

    def check(self, owner: str, is_map: bool, symmetric: bool) -> None:
        """Refuse a second map, and the lack of any; see BackwardPass."""
        name = type(self).__name__
        if is_map and self.step is not None:
            raise ValueError(
                f"{owner}: {name}(step={self.step}) means nothing for a fixed point, whose map T is the step itself; "
                f"leave step out."
            )
        if not is_map and self.step is None and not symmetric:
            raise ValueError(
                f"{owner}: {name} differentiates steps of a map, and a residual that is not promised symmetric has "
                f"none; give the step of y - step * R(y), {name}(..., step=0.1), or write the map for fixed_point."
            )

    def prepare(self, A: LinearOperator, is_map: bool) -> Series:
        """The series that the steps' derivative at the point sums; see BackwardPass."""
        (terms, damping), (sizes, faults, products) = self.plan, step_sizes(A, self.step, is_map)
        return Series(A, damping * sizes, faults, terms, products)

    def __post_init__(self) -> None:
        name, (steps, damping) = type(self).__name__, self.plan
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"{name}: steps must be an integer >= 1, but got {steps!r}.")
        if not 0 < damping <= 1:
            raise ValueError(f"{name}: damping must be in (0, 1], but got {damping}; use 1 for none.")
        if self.step is not None and not 0 < self.step < float("inf"):
            raise ValueError(f"{name}: step must be a number > 0 or None, but got {self.step}.")


def step_sizes(A: LinearOperator, step: float | None, is_map: bool) -> tuple[Tensor, Tensor, int]:
    """The step s of y - s R for every system.

    Args:
        A: shape (*systems, n, n).
        step: given by the user, or None.
        is_map: whether the step is that of the user's map, 1.

    Returns:
        The steps; codes, RUNNING where the steps make sense; and the products spent to find them.
    """
    batch = A.batch_shape
    codes = torch.zeros(batch, dtype=torch.int64, device=A.device)
    if is_map or step is not None or not batch.numel() or not A.shape[-1]:
        size = 1.0 if is_map or step is None else step
        return torch.full(batch, size, dtype=A.dtype, device=A.device), codes, 0
    spectrum = extreme_eigenvalues(A, steps=20)
    low, high, rest = (
        torch.as_tensor(value, dtype=A.dtype, device=A.device).expand(batch)
        for value in (spectrum.lowest, spectrum.highest, spectrum.highest_residual)
    )
    top = torch.maximum(high.abs(), low.abs())
    codes = torch.where(low < -100 * torch.finfo(A.dtype).eps * top, Status.NEGATIVE_CURVATURE.code, codes)
    codes = torch.where(top == 0, Status.SINGULAR.code, codes)
    codes = torch.where(top < torch.inf, codes, Status.NON_FINITE.code)
    return torch.where(codes == 0, 1 / (high + rest), torch.nan), codes, spectrum.products


@dataclass(frozen=True)
class _SeriesState:
    """Where a sum stands; every tensor is per column."""

    x: Tensor
    r: Tensor
    codes: Tensor
    iterations: Tensor
    error: Tensor


@dataclass(frozen=True)
class Series:
    """s sum_{j < terms} (I - s A)^j b in the place of A^{-1} b, for any square A: `terms` products a solve.

    Args:
        operator: A.
        sizes: s, per system.
        faults: codes, not RUNNING for a system that has no s.
        terms: of the sum.
        spent: products that finding s took.
    """

    operator: LinearOperator
    sizes: Tensor
    faults: Tensor
    terms: int
    spent: int

    def solve(self, b: Tensor, x0: Tensor | None = None) -> Solution:
        """Sum the series for A; a start has no meaning for it."""
        return self._sum(self.operator, b)

    def solve_transposed(self, b: Tensor, x0: Tensor | None = None) -> Solution:
        """Sum the series for A'."""
        return self._sum(self.operator.T, b)

    def _sum(self, A: LinearOperator, b: Tensor) -> Solution:
        norm = A.norm(b)
        sizes, tolerance = self.sizes.expand(norm.shape)[..., None], default_rtol(A.dtype) * norm
        codes = torch.where(norm == 0, Status.CONVERGED.code, self.faults.expand(norm.shape))
        count = torch.zeros_like(codes)

        def add(s: _SeriesState) -> _SeriesState:
            running = is_running(s.codes)[..., None]
            x = torch.where(running, s.x + sizes * s.r, s.x)
            r = torch.where(running, b - A._matvec(x), s.r)
            return evolve(s, x=x, r=r, error=A.norm(r))

        with torch.no_grad():
            s = iterate(add, _SeriesState(torch.zeros_like(b), b, codes, count, norm), max_iter=self.terms)
        codes = torch.where((s.codes == Status.MAX_ITER.code) & (s.error <= tolerance), Status.CONVERGED.code, s.codes)
        named: Any = (self.faults.expand(norm.shape) != Status.RUNNING.code) & (norm != 0)
        error = scalar_or_tensor(s.error)
        return Solution(
            x=torch.where(named[..., None], torch.nan, s.x), codes=codes, iterations=scalar_or_tensor(s.iterations),
            error=error, residual_norm=error, tolerance=scalar_or_tensor(tolerance), state=s,
            products=self.terms * norm.numel(),
        )  # fmt: skip
