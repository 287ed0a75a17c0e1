"""Inexact Newton steps by GMRES, with a backtracking line search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.linalg import GMRES, LinearSolver, Status
from nestopt.linalg.result import any_of

from .fixed_point_solver import FixedPointSolver, FixedPointState, Problem, check_positive, norm
from .jacobian import SystemJacobian
from .transforms import transformed

__all__ = ["NewtonKrylov", "NewtonKrylovState"]

_ARMIJO = 1e-4  # a step of length t has to lower |F| by this part of t |F|
_SHORTEST = 1e-8  # t of the last step that is tried


@dataclass(frozen=True, kw_only=True)
class NewtonKrylovState(FixedPointState):
    """Where Newton-Krylov stands.

    Attributes:
        forcing: eta of the last linear solve, per item.
        previous: |F| before it.
        products: products with the Jacobian and its transpose so far, all items together.
    """

    forcing: Tensor
    previous: Tensor
    products: int = 0


@dataclass(frozen=True)
class NewtonKrylov(FixedPointSolver):
    """Solve R(y) = 0 (a call, `root`) or y = T(y) (`fixed_point`, with F = y - T(y)) by inexact Newton steps.

    GMRES finds d with |F + F' d| <= eta |F|, from exact products with the Jacobian F' of every item; eta follows
    Eisenstat & Walker's second choice, 0.9 (|F| / |F_before|)^2, with their safeguard, so that early steps are cheap
    and the last ones quadratic. Then t = 1, shortened to the minimiser of the parabola through |F|^2 (within
    [t/10, t/2]), until |F(y + t d)| <= (1 - 1e-4 t) |F(y)|.

    CONVERGED means |R(y)| <= max(rtol |R(y0)|, atol), or for a fixed point
    |T(y) - y| <= max(rtol max(|T(y0)|, |T(y0) - y0|), atol), measured at the point returned. SINGULAR, BREAKDOWN or
    NON_FINITE: the linear solver gave no direction. LINE_SEARCH_FAILED: no step lowers |F|, as at a point where
    R is not zero and R'R has its minimum; start elsewhere. STAGNATED: likewise, at the rounding level.

    Cost of a step: two evaluations of the function (one with its graph), a backward pass for every product of GMRES
    through the kept graph; an evaluation for each shortening.

    Args:
        linear_solver: of F' d = -F, used as it is, in place of GMRES and its eta; e.g. `LU()` for small n.
        first_forcing: eta of the first step, below 1.
        max_forcing: upper limit of eta, below 1.
        restart: steps of a cycle of GMRES.
        max_linear_iter: limit of its steps.
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in the units of F.
        max_iter: limit of steps; Newton's method needs 5 to 20, more where it has to be damped.

    Raises:
        TypeError: for a linear_solver that is none.
        ValueError: for an eta outside (0, 1), or a negative tolerance or limit.

    Reference:
        Eisenstat & Walker 1996, equation 2.6 and section 6; Kelley 1995, chapters 6 and 8.

    Example:
        >>> import torch
        >>> from nestopt.implicit import NewtonKrylov
        >>> R = lambda y: torch.stack([y[0] ** 2 + y[1] ** 2 - 2, y[0] - y[1]])
        >>> NewtonKrylov()(R, torch.tensor([3.0, 0.5], dtype=torch.float64)).x
        tensor([1.0000, 1.0000], dtype=torch.float64)
    """

    linear_solver: LinearSolver | None = None
    first_forcing: float = 0.1
    max_forcing: float = 0.9
    restart: int = 50
    max_linear_iter: int = 200

    State: ClassVar[type[FixedPointState]] = NewtonKrylovState
    solves_maps: ClassVar[bool] = False
    patience: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        solver: Any = self.linear_solver
        if solver is not None and not isinstance(solver, LinearSolver):
            raise TypeError(
                f"NewtonKrylov: linear_solver must be an instance such as nestopt.linalg.LU(), but got {solver!r}."
            )
        for name in ("first_forcing", "max_forcing"):
            value = getattr(self, name)
            check_positive("NewtonKrylov", name, value)
            if not value < 1:
                raise ValueError(f"NewtonKrylov: {name} must be below 1, but got {value}.")
        for name in ("restart", "max_linear_iter"):
            check_positive("NewtonKrylov", name, getattr(self, name))

    def _start(self, problem: Problem, y: Tensor, residual: Tensor) -> dict[str, Any]:
        if transformed():  # where plain autograd, which its products are of, is not to be had
            self._refuse_transforms()
        size = norm(residual)
        return {"forcing": torch.full_like(size, self.first_forcing), "previous": torch.full_like(size, torch.nan)}

    def _step(self, problem: Problem, s: NewtonKrylovState, running: Tensor) -> dict[str, Any]:
        forcing = self._forcing(s)
        A = SystemJacobian(problem.differentiable, s.y, (), (), symmetric=False)
        b = torch.where(running[..., None], -s.residual, 0)
        if self.linear_solver is None:
            # |b| = 1 / eta makes the solver's absolute tolerance 1 the relative tolerance eta of each item
            scale = torch.where(running, forcing * s.error, 1)
            solver = GMRES(rtol=0.0, atol=1.0, max_iter=self.max_linear_iter, restart=self.restart)
            solution = solver(A, b / scale[..., None])
            d = scale[..., None] * solution.x
        else:
            solution = self.linear_solver(A, b)
            d = solution.x
        usable = running & torch.isfinite(d).all(-1)
        y, F, found = self._search(problem, s, torch.where(usable[..., None], d, 0), usable)

        length = norm(d)
        # Newton's last steps: where one this short does not lower |F|, rounding is all that is left
        hidden = length <= torch.finfo(d.dtype).eps ** 0.5 * norm(s.y)
        codes = torch.where(hidden, Status.STAGNATED.code, Status.LINE_SEARCH_FAILED.code)
        for status in (Status.SINGULAR, Status.BREAKDOWN, Status.NEGATIVE_CURVATURE, Status.NON_FINITE):
            codes = torch.where(solution.codes == status.code, status.code, codes)
        codes = torch.where(usable | (codes != Status.STAGNATED.code), codes, Status.NON_FINITE.code)
        codes = torch.where(found, Status.RUNNING.code, codes)
        return {
            "y": y, "residual": F, "length": length, "codes": codes, "forcing": forcing,
            "previous": torch.where(running, s.error, s.previous), "products": s.products + solution.products,
        }  # fmt: skip

    def _forcing(self, s: NewtonKrylovState) -> Tensor:
        """Eta of every item, by its own last errors; never tighter than half of what the tolerance asks for."""
        ratio = 0.9 * (s.error / s.previous) ** 2
        safeguard = 0.9 * s.forcing**2
        eta = torch.where(safeguard > 0.1, torch.maximum(ratio, safeguard), ratio)
        eta = torch.where(torch.isfinite(s.previous), eta, s.forcing).clamp_max(self.max_forcing)
        enough = 0.5 * s.tolerance / s.error
        return torch.maximum(eta, torch.where(torch.isfinite(enough), enough, 0)).clamp(
            10 * torch.finfo(eta.dtype).eps, self.max_forcing
        )

    def _search(
        self, problem: Problem, s: NewtonKrylovState, d: Tensor, searching: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Points that lower |F| enough, F there, and for which items there is one."""
        y, F, found, t = s.y, s.residual, torch.zeros_like(searching), torch.ones_like(s.error)
        while True:
            trial = s.y + t[..., None] * d
            value = problem.evaluate(trial)
            size = norm(value)
            good = searching & (size <= (1 - _ARMIJO * t) * s.error) & (size < s.error)  # false for NaN
            y, F = torch.where(good[..., None], trial, y), torch.where(good[..., None], value, F)
            found, searching = found | good, searching & ~good & (t > _SHORTEST)
            if not any_of(searching):
                break
            shape = size**2 + (2 * t - 1) * s.error**2
            best = torch.where(torch.isfinite(size), t * t * s.error**2 / shape, 0)
            t = torch.where(searching, best.clamp(0.1 * t, 0.5 * t), t)
        return y, F, found
