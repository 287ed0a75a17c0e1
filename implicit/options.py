"""The options that root, fixed_point and argmin share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nestopt.linalg import CG, GMRES, LU, LinearOperator, LinearSolver
from nestopt.linalg.result import check_stopping

from .backward_pass import Approximation, BackwardPass
from .monitor import Monitor, OnFailure, check_on_failure
from .warm_start import WarmStart

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """How a derivative is computed and what it must certify; `root` documents each.

    Attributes:
        solver: a LinearSolver, a BackwardPass, or None for the automatic choice.
        batch_dims: leading dimensions of every leaf of y that count independent systems.
        symmetric: promise that dR/dy is symmetric.
        on_failure: "raise", "warn" or "nan".
        monitor: collects records, or None.
        rtol: how far y may be from a root, relative to |y|; None for eps^(1/4) of the dtype.
        atol: how far y may be from a root; None for eps^(1/2).
        warm_start: start of iterative solves; None for zero.
    """

    solver: LinearSolver | BackwardPass | None
    batch_dims: int
    symmetric: bool
    on_failure: OnFailure
    monitor: Monitor | None
    rtol: float | None
    atol: float | None
    warm_start: WarmStart | None

    @property
    def inexact(self) -> bool:
        """Whether the user accepts a derivative that is not exact."""
        return isinstance(self.solver, BackwardPass)

    def check(self, owner: str, is_map: bool) -> None:
        """Refuse options that mean nothing.

        Args:
            owner: the public function, for messages.
            is_map: whether its function is a map.

        Raises:
            TypeError: if solver is neither a LinearSolver nor a BackwardPass.
            ValueError: if batch_dims is negative, or the pass does not fit the function.
        """
        solver: Any = self.solver
        if isinstance(solver, BackwardPass):
            solver.check(owner, is_map, self.symmetric)
        elif solver is not None and not isinstance(solver, LinearSolver):
            kind = solver.__name__ if isinstance(solver, type) else type(solver).__name__
            raise TypeError(
                f"{owner}: solver must be an instance such as nestopt.linalg.GMRES() or implicit.OneStep(), but got "
                f"{kind}."
            )
        check_on_failure(owner, self.on_failure)
        if self.batch_dims < 0:
            raise ValueError(f"{owner}: batch_dims must be an integer >= 0, but got {self.batch_dims!r}.")
        check_stopping(owner, self.rtol, 0.0 if self.atol is None else self.atol, 0)

    def limits(self, dtype: torch.dtype) -> tuple[float, float]:
        """(rtol, atol), with the defaults of a dtype put in."""
        eps = torch.finfo(dtype).eps
        return eps**0.25 if self.rtol is None else self.rtol, eps**0.5 if self.atol is None else self.atol

    def prepare(self, A: LinearOperator, is_map: bool) -> Approximation:
        """The solver, or the automatic choice for an operator, with what it does once for it.

        LU while one matrix has n <= 512 and all systems together no more than 2^24 entries (128 MiB in float64); beyond
        that CG when A is promised symmetric, as at a minimiser, and GMRES when it is not.

        Args:
            A: of shape (*systems, n, n).
            is_map: whether it is I - J of a map.

        Returns:
            An object with solve and solve_transposed.

        Raises:
            TypeError: for a half precision without a solver.
        """
        if isinstance(self.solver, BackwardPass):
            return self.solver.prepare(A, is_map)
        if self.solver is not None:
            return self.solver.prepare(A)
        if A.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"y is {A.dtype}, for which there is no automatic solver; pass y.float(), or choose one such as CG()."
            )
        if A.shape[-1] <= 512 and A.shape.numel() <= 2**24:
            return LU().prepare(A)
        return CG().prepare(A) if A.symmetric else GMRES().prepare(A)
