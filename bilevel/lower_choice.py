"""The kind of lower level that a problem has: smooth, composite (a set or a prox), or a program (constraints)."""

from __future__ import annotations

from typing import Any

import torch

from nestopt.constrained import SQP, ProximalGradient
from nestopt.implicit import Minimizer

from .composite_level import CompositeLevel
from .lower_kinds import LowerLevel, LowerSolution, SmoothLevel
from .problem import Problem, Spaces
from .program_level import ProgramLevel, bounds_of
from .task_level import TaskLevel
from .task_problem import TaskProblem

__all__ = ["CompositeLevel", "LowerLevel", "LowerSolution", "LowerSolver", "ProgramLevel", "SmoothLevel", "lower_level"]

LowerSolver = Minimizer | ProximalGradient | SQP


def lower_level(problem: Problem, spaces: Spaces, data: Any = None, solver: LowerSolver | None = None) -> LowerLevel:
    """The kind of lower level that a problem has.

    Args:
        problem: the problem.
        spaces: of x and y.
        data: of the step, None for functions of (x, y).
        solver: a Minimizer for a smooth lower level, ProximalGradient(max_iter=...) (whose limit of steps alone counts)
            for one with a set or a prox, SQP() for one with constraints; None for the kind's own.

    Returns:
        The level.

    Raises:
        ValueError: for a solver of another kind, or a prox beside constraints.
    """
    program = problem.inequality is not None or problem.equality is not None
    composite = problem.lower_prox is not None or problem.lower_set is not None
    if program and problem.lower_prox is not None:
        raise ValueError(
            "Problem: lower_prox beside inequality or equality has no solver here; write the term with slack variables "
            "and constraints, e.g. |y| <= t."
        )
    kind: type[LowerLevel] = ProgramLevel if program else CompositeLevel if composite else SmoothLevel
    if kind is SmoothLevel and isinstance(problem, TaskProblem):
        kind = TaskLevel
    wanted: Any = SQP if program else ProximalGradient if composite else Minimizer
    if solver is not None and not isinstance(solver, wanted):
        has = "constraints" if program else "a lower_set or lower_prox" if composite else "a smooth lower level"
        raise ValueError(
            f"lower_solver: the problem has {has}, which takes {wanted.__name__}, but got {solver!r}; None is the best "
            "default."
        )
    if program:
        with torch.no_grad():
            bounds_of(problem, spaces, torch.zeros(spaces.y.size, dtype=spaces.y.dtype, device=spaces.y.device))
    return kind(problem, spaces, solver, data)
