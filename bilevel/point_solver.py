"""Linear solvers that have to know the point where the lower level is linearized."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from nestopt.linalg import LinearOperator, LinearSolver, Solution

__all__ = ["PointSolver"]


class PointSolver(LinearSolver):
    """A solver of the adjoint system H v = F_y that has to know more of the point (x, y) than H.

    A subclass writes `at`, which `hypergradient` and methods call before they solve.
    """

    @abstractmethod
    def at(self, point: Any) -> LinearSolver:
        """The solver for the system of one point.

        Args:
            point: the linearized lower level.

        Returns:
            A LinearSolver.
        """

    def _solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None) -> Solution:
        raise TypeError(
            f"{type(self).__name__} needs the point where the lower level is linearized; pass it as linear_solver to "
            "bilevel.hypergradient or to a method such as bilevel.AID."
        )
