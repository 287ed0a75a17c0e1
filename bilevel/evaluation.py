"""One evaluation of the hyperobjective: solve the lower level, then F, then (when wanted) the hypergradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nestopt.implicit import Minimizer
from nestopt.linalg import LinearSolver, Status
from nestopt.linalg.result import all_finite

from .counts import Counts
from .estimate import solve_adjoint
from .oracle import part_of
from .problem import Linearization, Problem, Spaces

__all__ = ["Evaluation", "LowerLevel"]

_FATAL = (
    Status.NEGATIVE_CURVATURE, Status.SINGULAR, Status.NON_FINITE, Status.BREAKDOWN, Status.DIVERGED,
)  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """The hyperobjective at x, as far as it was evaluated.

    Attributes:
        x: raveled upper variable.
        y: raveled lower solution.
        value: F(x, y).
        lower_residual: |f_y(x, y)|, measured.
        point: the linearized objectives; dropped as soon as the hypergradient is there.
        counts: what it cost.
        fault: why nothing can be made of it, or None.
        hypergradient: raveled, when it was asked for.
        adjoint: v, likewise.
        linear_residual: |F_y - H v|, likewise.
        scale: |F_x| + |f_xy v|, what the hypergradient was added up from.
    """

    x: Tensor
    y: Tensor
    value: Tensor
    lower_residual: Tensor
    point: Linearization | None
    counts: Counts
    fault: Status | None = None
    hypergradient: Tensor | None = None
    adjoint: Tensor | None = None
    linear_residual: Tensor | None = None
    scale: Tensor | None = None

    def residuals(self, problem: Problem, spaces: Spaces) -> dict[str, Tensor]:
        """The named parts of the error: |f_y|, |F_y - H v| and |P(x - hypergradient) - x|, zero at a solution."""
        assert self.hypergradient is not None
        assert self.linear_residual is not None
        upper = (problem.project(self.x - self.hypergradient, spaces) - self.x).norm()
        return {"lower": self.lower_residual, "adjoint": self.linear_residual, "upper": upper}


@dataclass(frozen=True)
class LowerLevel:
    """The lower solver and the adjoint's linear solver of a problem.

    Args:
        problem: the problem.
        spaces: of x and y.
        minimizer: for the lower level.
        linear_solver: for the adjoint system.
        data: passed on to the objectives when not None.
    """

    problem: Problem
    spaces: Spaces
    minimizer: Minimizer
    linear_solver: LinearSolver
    data: Any = None

    def solve(self, x: Tensor, y: Tensor, tolerance: float | None, *, check: bool = False) -> Evaluation:
        """y*(x) from y, to |f_y| <= tolerance (None: the minimizer's own), and F there.

        Args:
            x: raveled upper variable.
            y: where the minimizer starts.
            tolerance: absolute.
            check: also refuse unused variables and captured tensors.

        Returns:
            The Evaluation, without a hypergradient.
        """
        if check:
            Linearization(self.problem, self.spaces, x, y, self.data).check()
        x_tree = self.spaces.x.unflatten(x)

        def lower(y_tree: Any) -> Tensor:
            part = part_of(self.data, "lower")
            arguments = (x_tree, y_tree) if part is None else (x_tree, y_tree, part)
            return self.problem.lower(*arguments)

        solved = self.minimizer(lower, self.spaces.y.unflatten(y), tolerance)
        y = self.spaces.y.flatten(solved.x)
        point = Linearization(self.problem, self.spaces, x, y, self.data)
        counts = Counts(1, solved.gradients + 1, solved.products, 1)
        status = solved.status
        assert isinstance(status, Status)
        fault = status if status in (Status.NON_FINITE, Status.DIVERGED) else None
        if not point.finite():
            fault = Status.NON_FINITE
        return Evaluation(x, y, point.upper, point.lower_y.norm(), point, counts, fault)

    def lower_gradient_norm(self, x: Tensor, y: Tensor) -> float:
        """|f_y(x, y)|, the scale of relative tolerances for the lower level.

        Args:
            x: raveled upper variable.
            y: raveled lower variable.

        Returns:
            The norm.
        """
        return float(Linearization(self.problem, self.spaces, x, y, self.data).lower_y.norm())

    def differentiate(self, e: Evaluation, adjoint: Tensor | None, enough: float = math.inf) -> Evaluation:
        """The same evaluation with its hypergradient.

        Args:
            e: evaluated by `solve`.
            adjoint: v of a nearby point to start from, or None.
            enough: the adjoint residual that must not stand in the way of the run's end.

        Returns:
            The Evaluation with hypergradient, adjoint and residual; its graphs are dropped.
        """
        assert e.point is not None
        value, solution = solve_adjoint(e.point, self.linear_solver, adjoint, enough)
        status = solution.status
        assert isinstance(status, Status)
        fault = status if status in _FATAL else None
        if fault is None and not all_finite(value):
            fault = Status.NON_FINITE
        return Evaluation(
            e.x, e.y, e.value, e.lower_residual, None, e.counts + Counts(products=solution.products + 1), fault,
            value, solution.x, value.new_tensor(float(solution.residual_norm)),
            e.point.upper_x.norm() + (e.point.upper_x - value).norm(),
        )  # fmt: skip
