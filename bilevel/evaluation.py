"""One evaluation of the hyperobjective: solve the lower level, then F, then (when wanted) the hypergradient."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nestopt.linalg import LinearSolver, Status
from nestopt.linalg.result import all_finite

from .counts import Counts
from .estimate import correct_adjoint, solve_adjoint
from .lower_choice import LowerLevel, LowerSolver, SmoothLevel, lower_level
from .optimality import Optimality
from .problem import Linearization, Problem, Spaces

__all__ = ["Evaluation", "Evaluator"]

_FATAL = (
    Status.NEGATIVE_CURVATURE, Status.SINGULAR, Status.NON_FINITE, Status.BREAKDOWN, Status.DIVERGED,
)  # fmt: skip
_LOST = (Status.NON_FINITE, Status.DIVERGED, Status.INFEASIBLE, Status.UNBOUNDED)


@dataclass(frozen=True)
class Evaluation:
    """The hyperobjective at x, as far as it was evaluated.

    Attributes:
        x: raveled upper variable.
        y: raveled lower solution.
        dual: multipliers of the lower level's constraints, inequalities first; empty where there are none.
        value: F(x, y).
        merit: what a line search compares: F(x, y), or, of an inexact evaluation with its hypergradient, `corrected`.
        lower_residual: |f_y(x, y)|, or that of the optimality conditions (see `Optimality`), measured.
        point: the linearized conditions; dropped as soon as the hypergradient is there.
        counts: what it cost.
        fault: why nothing can be made of it, or None.
        hypergradient: raveled, when it was asked for.
        adjoint: v, likewise.
        linear_residual: |F_y - H v|, likewise.
        scale: |F_x| + |f_xy v|, what the hypergradient was added up from; |F_y| where both are zero.
    """

    x: Tensor
    y: Tensor
    dual: Tensor
    value: Tensor
    merit: Tensor
    lower_residual: Tensor
    point: Linearization | Optimality | None
    counts: Counts
    fault: Status | None = None
    hypergradient: Tensor | None = None
    adjoint: Tensor | None = None
    linear_residual: Tensor | None = None
    scale: Tensor | None = None

    def corrected(self, adjoint: Tensor) -> Tensor:
        """F(x, y) - v'f_y: F(x, y*(x)) up to the product of both systems' errors; before the graphs are dropped.

        Args:
            adjoint: v.

        Returns:
            A 0-d tensor.
        """
        assert self.point is not None
        return self.value - torch.dot(adjoint, self.point.lower_y)

    def residuals(self, problem: Problem, spaces: Spaces) -> dict[str, Tensor]:
        """The named parts of the error: |f_y|, |F_y - H v| and |P(x - hypergradient) - x|, zero at a solution."""
        assert self.hypergradient is not None
        assert self.linear_residual is not None
        upper = (problem.project(self.x - self.hypergradient, spaces) - self.x).norm()
        return {"lower": self.lower_residual, "adjoint": self.linear_residual, "upper": upper}


@dataclass(frozen=True)
class Evaluator:
    """The lower solver and the adjoint's linear solver of a problem.

    Args:
        level: the lower level.
        linear_solver: for the adjoint system.
        forcing: fraction of the residual at the start to which the lower level is solved, where that is above the
            tolerance; 0 for the tolerance alone. Smooth lower levels only.
        correcting: whether the adjoint system is solved for the correction of its start, so that the linear solver's
            rtol is relative to the residual there.
    """

    level: LowerLevel
    linear_solver: LinearSolver
    forcing: float = 0.0
    correcting: bool = False

    @classmethod
    def of(
        cls,
        problem: Problem,
        spaces: Spaces,
        lower_solver: LowerSolver | None,
        linear_solver: LinearSolver | None,
        data: Any = None,
    ) -> Evaluator:
        """The evaluator of a problem, with its kind's own solvers where None is given.

        Args:
            problem: the problem.
            spaces: of x and y.
            lower_solver: for the lower level.
            linear_solver: for the adjoint system.
            data: passed on to the objectives when not None.

        Returns:
            The evaluator.
        """
        level = lower_level(problem, spaces, data, lower_solver)
        return cls(level, level.default_linear_solver() if linear_solver is None else linear_solver)

    def solve(
        self, x: Tensor, y: Tensor, tolerance: float | None, dual: Tensor | None = None, *, check: bool = False
    ) -> Evaluation:
        """y*(x) from y, to |f_y| <= tolerance (None: the solver's own), and F there.

        Args:
            x: raveled upper variable.
            y: where the solver starts.
            tolerance: absolute.
            dual: multipliers to start from.
            check: also refuse unused variables and captured tensors.

        Returns:
            The Evaluation, without a hypergradient.
        """
        level = self.level
        if check:
            level.check(x, y)
        if self.forcing and tolerance is not None:
            assert isinstance(level, SmoothLevel)
            level, tolerance = level.loosened(self.forcing, tolerance), None
        found = level.solve(x, y, dual, 0.0, tolerance)
        point = level.linearize(x, found.y, found.dual)
        counts = found.counts + Counts(1, 1)
        fault = found.status if found.status in _LOST else None
        if not point.finite():
            fault = Status.NON_FINITE
        value = point.upper
        return Evaluation(x, found.y, found.dual, value, value, _residual(point), point, counts, fault)

    def lower_residual(self, x: Tensor, y: Tensor) -> float:
        """The residual of the lower level at a point, the scale of relative tolerances.

        Args:
            x: raveled upper variable.
            y: raveled lower variable.

        Returns:
            The norm.
        """
        return float(_residual(self.level.linearize(x, y, self.level.first_dual(x, y))))

    def differentiate(self, e: Evaluation, adjoint: Tensor | None, enough: float = math.inf) -> Evaluation:
        """The same evaluation with its hypergradient.

        Args:
            e: evaluated by `solve`.
            adjoint: v of a nearby point to start from, or None.
            enough: the adjoint residual that must not stand in the way of the run's end.

        Returns:
            The Evaluation with hypergradient, adjoint and residual; its graphs are dropped.
        """
        point = e.point
        assert point is not None
        if e.fault is not None and not point.finite():
            nothing = torch.full_like(e.x, torch.nan)
            lost = e.value.new_tensor(torch.nan)
            return replace(
                e, point=None, hypergradient=nothing, adjoint=torch.full_like(point.lower_y, torch.nan),
                linear_residual=lost, scale=lost,
            )  # fmt: skip
        if self.correcting and adjoint is not None:
            value, solution = correct_adjoint(point, self.linear_solver, adjoint)
        else:
            value, solution = solve_adjoint(point, self.linear_solver, adjoint, enough)
        status = solution.status
        assert isinstance(status, Status)
        fault = e.fault if e.fault is not None else status if status in _FATAL else None
        if fault is None and not all_finite(value):
            fault = Status.NON_FINITE
        scale = point.upper_x.norm() + (point.upper_x - value).norm()
        products = solution.products + 1 + (point.products if isinstance(point, Optimality) else 0)
        return replace(
            e, point=None, counts=e.counts + Counts(products=products), fault=fault, hypergradient=value,
            merit=e.corrected(solution.x) if self.forcing else e.value,
            adjoint=solution.x, linear_residual=value.new_tensor(float(solution.residual_norm)),
            scale=torch.where(scale == 0, point.upper_y.norm(), scale),
        )  # fmt: skip


def _residual(point: Linearization | Optimality) -> Tensor:
    return point.residual if isinstance(point, Optimality) else point.lower_y.norm()
