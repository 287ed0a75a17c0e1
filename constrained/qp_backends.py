"""Other solvers of quadratic programs behind the same call: each finds a first solution, which is then polished."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .interior_point import Program

__all__ = ["OSQP", "Backend", "Moreau", "ProxQP"]


class Backend(ABC):
    """A solver from another package; `solve_qp` polishes, certifies and differentiates what it finds.

    It runs on the CPU in float64; an item that it cannot solve comes back as it is and gets its status from the
    certificates of `solve_qp`. A subclass writes `_find`.
    """

    package: ClassVar[str]

    def find(self, program: Program, tolerance: float, max_iter: int) -> tuple[Tensor, Tensor, Tensor]:
        """First solutions of a flat batch of equilibrated programs.

        Args:
            program: the batch.
            tolerance: of the solver's own residuals.
            max_iter: limit of its iterations.

        Returns:
            x, the duals of all rows, and the iterations.

        Raises:
            ImportError: if the package is not installed.
        """
        try:
            module = importlib.import_module(self.package)
        except ImportError as error:
            name = type(self).__name__
            raise ImportError(
                f"{name}: the package {self.package} is not installed; install it, or use backend=None for the "
                "library's own solver."
            ) from error
        Q, q, C, d = (t.cpu().numpy() for t in (program.Q, program.q, program.C, program.d))
        found = self._find(module, Q, q, C, d, program.p, tolerance, max_iter)
        x, y, iterations = (torch.as_tensor(np.asarray(a), device=program.q.device) for a in found)
        x, y = (torch.where(torch.isfinite(t), t, 0).to(program.q.dtype) for t in (x, y))
        lam = y[:, program.p :].clamp_min(0)  # a first solution, not an answer: polishing starts at finite numbers
        return x, torch.cat([y[:, : program.p], lam], -1), iterations.to(torch.int64)

    @abstractmethod
    def _find(
        self, module: Any, Q: Any, q: Any, C: Any, d: Any, p: int, tolerance: float, max_iter: int
    ) -> tuple[Any, Any, Any]:
        """Arrays of the solutions (B, n), duals (B, p + m) and iterations (B,)."""


@dataclass(frozen=True)
class ProxQP(Backend):
    """ProxQP of the package proxsuite, one program after another: a proximal augmented Lagrangian method.

    Example:
        >>> ProxQP()
        ProxQP()

    Reference:
        Bambade, El-Kazdadi, Taylor & Carpentier 2022.
    """

    package: ClassVar[str] = "proxsuite"

    def _find(
        self, module: Any, Q: Any, q: Any, C: Any, d: Any, p: int, tolerance: float, max_iter: int
    ) -> tuple[Any, Any, Any]:
        n, m = q.shape[1], C.shape[1] - p
        x, y, steps = np.zeros_like(q), np.zeros_like(d), np.zeros(len(q), dtype=np.int64)
        for i in range(len(q)):
            solver = module.proxqp.dense.QP(n, p, m)
            solver.settings.eps_abs, solver.settings.eps_rel, solver.settings.max_iter = tolerance, 0.0, 10 * max_iter
            equality = (C[i, :p], d[i, :p]) if p else (None, None)
            inequality = (C[i, p:], np.full(m, -np.inf), d[i, p:]) if m else (None, None, None)
            solver.init(Q[i], q[i], *equality, *inequality)
            solver.solve()
            results = solver.results
            x[i], y[i] = results.x, np.concatenate([results.y, results.z])
            steps[i] = results.info.iter
        return x, y, steps


@dataclass(frozen=True)
class OSQP(Backend):
    """OSQP of the package osqp, one program after another: the alternating direction method of multipliers.

    Example:
        >>> OSQP()
        OSQP()

    Reference:
        Stellato, Banjac, Goulart, Bemporad & Boyd 2020.
    """

    package: ClassVar[str] = "osqp"

    def _find(
        self, module: Any, Q: Any, q: Any, C: Any, d: Any, p: int, tolerance: float, max_iter: int
    ) -> tuple[Any, Any, Any]:
        sparse = importlib.import_module("scipy.sparse")
        x, y, steps = np.zeros_like(q), np.zeros_like(d), np.zeros(len(q), dtype=np.int64)
        for i in range(len(q)):
            low = np.concatenate([d[i, :p], np.full(C.shape[1] - p, -np.inf)])
            solver = module.OSQP()
            solver.setup(
                sparse.csc_matrix(np.triu(Q[i])), q[i], sparse.csc_matrix(C[i]), low, d[i], eps_abs=tolerance,
                eps_rel=tolerance, max_iter=200 * max_iter, verbose=False, polishing=False,
            )  # fmt: skip
            results = solver.solve()
            x[i], y[i], steps[i] = results.x, results.y, results.info.iter
        return x, y, steps


@dataclass(frozen=True)
class Moreau(Backend):
    """The interior-point method of the package moreau, a whole batch in one call.

    Example:
        >>> Moreau()
        Moreau()
    """

    package: ClassVar[str] = "moreau"

    def _find(
        self, module: Any, Q: Any, q: Any, C: Any, d: Any, p: int, tolerance: float, max_iter: int
    ) -> tuple[Any, Any, Any]:
        count, n = q.shape
        rows = C.shape[1]
        settings = module.Settings(device="cpu", batch_size=count, max_iter=max_iter)
        settings.ipm_settings.tol_feas = settings.ipm_settings.tol_gap_abs = tolerance
        settings.ipm_settings.tol_gap_rel = tolerance
        solver = module.CompiledSolver(
            n=n, m=rows, P_row_offsets=list(range(0, n * n + 1, n)), P_col_indices=list(range(n)) * n,
            A_row_offsets=list(range(0, rows * n + 1, n)), A_col_indices=list(range(n)) * rows,
            cones=module.Cones(num_zero_cones=p, num_nonneg_cones=rows - p), settings=settings,
        )  # fmt: skip
        solver.setup(np.ascontiguousarray(Q.reshape(count, -1)), np.ascontiguousarray(C.reshape(count, -1)))
        solution = solver.solve(np.ascontiguousarray(q), np.ascontiguousarray(d))
        return solution.x, solution.z, np.asarray(solver.info.iterations)
