"""What lower levels of every kind share, and the smooth one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nestopt.implicit import NewtonCG
from nestopt.linalg import CG, GMRES, LU, LinearSolver, Result, Status
from nestopt.linalg.autodiff import evaluate

from .counts import Counts
from .optimality import DENSE_SIZE, Optimality
from .oracle import part_of
from .problem import Linearization, Problem, Spaces

__all__ = ["LowerLevel", "LowerSolution", "SmoothLevel", "nonsymmetric_solver", "outcome"]


@dataclass(frozen=True)
class LowerSolution:
    """What a lower solve found.

    Attributes:
        y: raveled.
        dual: multipliers of the constraints, inequalities first; empty where there are none.
        residual: |(y - prox(y - L_y, 1), min(dual_g, -g), h)|, measured there; |f_y| where the lower level is smooth.
        status: how the solve ended.
        counts: what it cost.
    """

    y: Tensor
    dual: Tensor
    residual: Tensor
    status: Status
    counts: Counts


@dataclass(frozen=True)
class LowerLevel(ABC):
    """min over y of f(x, y) + weight F(x, y) + h(x, y), subject to the lower level's constraints, for any x.

    Args:
        problem: the problem.
        spaces: of x and y.
        solver: None for the kind's own.
        data: of the step, None for functions of (x, y).
    """

    problem: Problem
    spaces: Spaces
    solver: Any = None
    data: Any = None

    @abstractmethod
    def solve(
        self,
        x: Tensor,
        y: Tensor,
        dual: Tensor | None = None,
        upper_weight: float = 0.0,
        tolerance: float | None = None,
    ) -> LowerSolution:
        """A minimiser.

        Args:
            x: raveled upper variable.
            y: raveled start.
            dual: multipliers to start from, None for none.
            upper_weight: the weight of F.
            tolerance: absolute, for the residual; None for the dtype's rtol (1e-10 in float64) times the slope's size.

        Returns:
            The LowerSolution.
        """

    @abstractmethod
    def linearize(self, x: Tensor, y: Tensor, dual: Tensor) -> Linearization | Optimality:
        """F and the lower level's conditions at a point, with graphs.

        Args:
            x: raveled upper variable.
            y: raveled lower variable.
            dual: multipliers.

        Returns:
            The point.
        """

    def default_linear_solver(self, rtol: float | None = None, atol: float = 0.0) -> LinearSolver:
        """For the adjoint system of this kind of lower level.

        Args:
            rtol: relative tolerance.
            atol: absolute tolerance.

        Returns:
            LU up to dimension 512, GMRES beyond.
        """
        return nonsymmetric_solver(self.spaces.y.size, rtol, atol)

    def first_dual(self, x: Tensor, y: Tensor) -> Tensor:
        """The multipliers where none are known: zeros.

        Args:
            x: raveled upper variable.
            y: raveled lower variable.

        Returns:
            A vector, empty without constraints.
        """
        return y.new_zeros(0)

    def estimate_dual(self, x: Tensor, y: Tensor) -> Tensor:
        """Multipliers at a computed minimiser.

        Args:
            x: raveled upper variable.
            y: raveled lower variable.

        Returns:
            A vector, empty without constraints.
        """
        return self.first_dual(x, y)

    def check(self, x: Tensor, y: Tensor) -> None:
        """Refuse captured tensors, unused variables and operations that cannot be differentiated twice.

        Args:
            x: raveled upper variable.
            y: raveled lower variable.
        """
        self.problem.oracle(self.spaces, self.data).check(x, y)
        Linearization(self.problem, self.spaces, x, y, self.data).check_twice_differentiable()

    def objective(self, x: Tensor, upper_weight: float = 0.0) -> Callable[[Any], Tensor]:
        """The map y -> f(x, y) + weight F(x, y), y in its structure."""
        x_tree = self.spaces.x.unflatten(x)

        def total(y_tree: Any) -> Tensor:
            value = evaluate(self.problem.lower, *self._arguments("lower", x_tree, y_tree), name="lower")
            if upper_weight:
                F = evaluate(self.problem.upper, *self._arguments("upper", x_tree, y_tree), name="upper")
                value = value + upper_weight * F
            return value

        return total

    def _arguments(self, name: str, x_tree: Any, y_tree: Any) -> tuple[Any, ...]:
        part = part_of(self.data, name)
        return (x_tree, y_tree) if part is None else (x_tree, y_tree, part)


class SmoothLevel(LowerLevel):
    """A smooth lower level without constraints: a Minimizer, NewtonCG() unless another is given."""

    def solve(
        self,
        x: Tensor,
        y: Tensor,
        dual: Tensor | None = None,
        upper_weight: float = 0.0,
        tolerance: float | None = None,
    ) -> LowerSolution:
        """See `LowerLevel.solve`; |f_y| is the residual that the minimizer measured."""
        minimizer = NewtonCG() if self.solver is None else self.solver
        solved = minimizer(self.objective(x, upper_weight), self.spaces.y.unflatten(y), tolerance)
        counts = Counts(solved.gradients if upper_weight else 0, solved.gradients, solved.products, 1)
        y = self.spaces.y.flatten(solved.x)
        return LowerSolution(y, y.new_zeros(0), torch.as_tensor(solved.error).to(y), outcome(solved), counts)

    def loosened(self, rtol: float, atol: float) -> SmoothLevel:
        """The same level, whose solver without a tolerance of the call stops at max(rtol |f_y(x, y0)|, atol).

        Args:
            rtol: relative to the slope where the solve begins.
            atol: absolute.

        Returns:
            The level.
        """
        minimizer = NewtonCG() if self.solver is None else self.solver
        return replace(self, solver=replace(minimizer, rtol=rtol, atol=atol))

    def linearize(self, x: Tensor, y: Tensor, dual: Tensor) -> Linearization:
        """See `LowerLevel.linearize`."""
        return Linearization(self.problem, self.spaces, x, y, self.data)

    def check(self, x: Tensor, y: Tensor) -> None:
        """See `LowerLevel.check`."""
        Linearization(self.problem, self.spaces, x, y, self.data).check()

    def default_linear_solver(self, rtol: float | None = None, atol: float = 0.0) -> LinearSolver:
        """CG.

        Args:
            rtol: relative tolerance.
            atol: absolute tolerance.

        Returns:
            The solver.
        """
        return CG(rtol=rtol, atol=atol)


def outcome(found: Result) -> Status:
    """The status of a single problem's result.

    Args:
        found: the result.

    Returns:
        The Status.
    """
    status = found.status
    assert isinstance(status, Status)
    return status


def nonsymmetric_solver(n: int, rtol: float | None = None, atol: float = 0.0) -> LinearSolver:
    """LU up to dimension 512, GMRES beyond.

    Args:
        n: the dimension.
        rtol: of GMRES; LU is exact.
        atol: likewise.

    Returns:
        The solver.
    """
    return LU() if n <= DENSE_SIZE else GMRES(rtol=rtol, atol=atol)
