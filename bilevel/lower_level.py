"""Solvers of the three kinds of lower level: smooth, composite (a set or a prox), and program (constraints)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from nestopt import constrained
from nestopt.constrained import Prox, ProximalGradient, solve_qp
from nestopt.constrained.sets import Between
from nestopt.constrained.sqp import SQP
from nestopt.implicit import Minimizer, NewtonCG
from nestopt.linalg import CG, GMRES, LU, LinearOperator, LinearSolver, Result, Status
from nestopt.linalg.autodiff import evaluate
from nestopt.linalg.isolation import isolated
from nestopt.linalg.result import all_finite
from nestopt.linalg.solver import default_rtol

from .counts import Counts
from .lipschitz import largest_curvature
from .nonsmooth import NonsmoothTerm
from .optimality import DENSE_SIZE, Optimality, flat
from .oracle import part_of
from .problem import Linearization, Problem, Spaces
from .task_problem import TaskProblem

__all__ = [
    "CompositeLevel",
    "LowerLevel",
    "LowerSolution",
    "LowerSolver",
    "ProgramLevel",
    "SmoothLevel",
    "lower_level",
    "nonsymmetric_solver",
]

LowerSolver = Minimizer | ProximalGradient | SQP


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
        """Y -> f(x, y) + weight F(x, y), y in its structure."""
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
        return LowerSolution(y, y.new_zeros(0), torch.as_tensor(solved.error).to(y), _status(solved), counts)

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


class CompositeLevel(LowerLevel):
    """A lower level with a set or a prox: semismooth Newton steps, and proximal gradient steps where they fail.

    A Newton step solves R_z d = -R, R = (y - prox(y - s f_y, s)) / s with s = 1 / (curvature of f), and is taken,
    perhaps halved, where it shrinks |R|, or where f + h after a proximal gradient step from it is less than after one
    from y. Between two phases of such steps `ProximalGradient` runs, each time for longer, so that the method converges
    wherever that does, and ends fast once the piece of the prox is the right one.
    """

    def solve(
        self,
        x: Tensor,
        y: Tensor,
        dual: Tensor | None = None,
        upper_weight: float = 0.0,
        tolerance: float | None = None,
    ) -> LowerSolution:
        """See `LowerLevel.solve`."""
        term = NonsmoothTerm(self.problem, self.spaces)
        objective, counts = self.objective(x, upper_weight), Counts(lower_solves=1)
        whole = ProximalGradient() if self.solver is None else self.solver
        if self.problem.lower_set is not None:  # f may not be defined elsewhere
            y = term.prox(y, 1.0, x)
        none, spent, step, target = y.new_zeros(0), 30, 0.0, tolerance
        while True:
            if not step:
                step, more = self._step(x, y, upper_weight)
                counts += more
            y, more = self._newton(x, y, upper_weight, step, 0.0 if target is None else target)
            counts += more + Counts(1, 1)
            point = self._point(x, y, upper_weight, 1.0)
            if target is None:
                target = default_rtol(y.dtype) * max(1.0, float(y.norm()))
            size = point.residual
            if not point.finite() or float(size) <= target or spent > whole.max_iter:
                break
            run = ProximalGradient(_Term(term, x), max_iter=spent)
            found = run(lambda v: objective(self.spaces.y.unflatten(v)), y, 0.1 * target)
            counts += Counts(found.gradients if upper_weight else 0, found.gradients)
            ended = _status(found)
            if ended in (Status.NON_FINITE, Status.DIVERGED, Status.LINE_SEARCH_FAILED):
                return LowerSolution(y, none, size, ended, counts)
            if ended in (Status.STAGNATED, Status.CONVERGED):  # no first-order step gets further
                spent = whole.max_iter
            y, spent, step = found.x, 3 * spent, 0.0
        status = Status.CONVERGED if float(size) <= target else Status.MAX_ITER
        if not point.finite():
            status = Status.NON_FINITE
        elif status is Status.MAX_ITER and float(size) <= 1e3 * torch.finfo(y.dtype).eps * (1 + float(y.norm())) / step:
            status = Status.STAGNATED
        return LowerSolution(y, none, size, status, counts)

    def linearize(self, x: Tensor, y: Tensor, dual: Tensor) -> Optimality:
        """See `LowerLevel.linearize`."""
        return Optimality(self.problem, self.spaces, x, y, dual, self.data)

    def _point(self, x: Tensor, y: Tensor, weight: float, step: float) -> Optimality:
        return Optimality(self.problem, self.spaces, x, y, y.new_zeros(0), self.data, weight, step)

    def _step(self, x: Tensor, y: Tensor, weight: float) -> tuple[float, Counts]:
        """1 / (curvature of f at y), at most 1: then |R| is no less than with the step 1 of the certificate."""
        oracle = self.problem.oracle(self.spaces, self.data)

        def slope(v: Tensor) -> Tensor:
            return oracle.weighted(x, v, upper=weight or None, lower=1.0).y

        curvature = 1.2 * float(largest_curvature(slope, y, steps=6)[0])
        return (1 / curvature if 1 < curvature < torch.inf else 1.0), oracle.counts

    def _newton(self, x: Tensor, y: Tensor, weight: float, step: float, target: float) -> tuple[Tensor, Counts]:
        """Newton steps from y while they help."""
        counts, point = Counts(1, 1), self._point(x, y, weight, step)
        ahead = self._value(x, point, weight)
        target = target or default_rtol(y.dtype) * max(1.0, float(y.norm()))
        for _ in range(50):
            if not float(point.residual) > 0.5 * target:  # NaN ends it too
                break
            solution = self.default_linear_solver()(point.hessian, -point.lower_y)
            counts += Counts(products=solution.products + point.products)
            if not all_finite(solution.x):
                break
            for size in (1.0, 0.5, 0.25):
                trial = self._point(x, point.y_leaves[0].detach() + size * solution.x, weight, step)
                counts += Counts(1, 1)
                value = self._value(x, trial, weight)
                noise = 100 * torch.finfo(y.dtype).eps * (1 + abs(ahead))
                shrinks = float(trial.residual) <= (1 - 0.25 * size) * float(point.residual)
                if (shrinks and value <= ahead + noise) or value < ahead - noise:
                    break
            else:
                break
            if (
                value < ahead - noise and not shrinks
            ):  # the step led to another piece: start there from a feasible point
                trial = self._point(x, self._image(trial), weight, step)
                counts += Counts(1, 1)
                value = self._value(x, trial, weight)
            point, ahead = trial, value
        return point.y_leaves[0].detach(), counts

    def _image(self, point: Optimality) -> Tensor:
        """The proximal gradient step from a point."""
        return point.y_leaves[0].detach() - point.step * point.lower_y

    def _value(self, x: Tensor, point: Optimality, weight: float) -> float:
        """The objective after a proximal gradient step, inf where it is not finite."""
        with torch.no_grad():
            x_tree, y_tree = self.spaces.x.unflatten(x), self.spaces.y.unflatten(self._image(point))
            total = self.objective(x, weight)(y_tree) + NonsmoothTerm(self.problem, self.spaces).value(x_tree, y_tree)
            return float(total) if bool(torch.isfinite(total)) else torch.inf


class ProgramLevel(LowerLevel):
    """A lower level with constraints, which may couple x and y: `constrained.SQP`, warm-started with its multipliers.

    A lower set beside the constraints has to be one of bounds (Box, NonNegative, or a tree of such).
    """

    def solve(
        self,
        x: Tensor,
        y: Tensor,
        dual: Tensor | None = None,
        upper_weight: float = 0.0,
        tolerance: float | None = None,
    ) -> LowerSolution:
        """See `LowerLevel.solve`."""
        solver = SQP() if self.solver is None else self.solver
        sides = self._sides(x, y)
        dual = self.first_dual(x, y) if dual is None else dual
        objective = self.objective(x, upper_weight)
        program = constrained.Problem(
            lambda v: objective(self.spaces.y.unflatten(v)),
            None if self.problem.equality is None else lambda v: self._rows("equality", x, v),
            None if self.problem.inequality is None else lambda v: self._rows("inequality", x, v),
            bounds_of(self.problem, self.spaces, y),
        )
        found = solver(
            program, y, tolerance=tolerance,
            inequality_dual=None if self.problem.inequality is None else dual[: sides[0]],
            equality_dual=None if self.problem.equality is None else dual[sides[0] :],
        )  # fmt: skip
        multipliers = [part for part in (found.inequality_dual, found.equality_dual) if part is not None]
        counts = Counts(found.gradients if upper_weight else 0, found.gradients, found.products, 1, found.evaluations)
        residual = torch.as_tensor(found.error).to(y)
        return LowerSolution(found.x, torch.cat(multipliers), residual, _status(found), counts)

    def linearize(self, x: Tensor, y: Tensor, dual: Tensor) -> Optimality:
        """See `LowerLevel.linearize`."""
        return Optimality(self.problem, self.spaces, x, y, dual, self.data)

    def first_dual(self, x: Tensor, y: Tensor) -> Tensor:
        """See `LowerLevel.first_dual`."""
        return y.new_zeros(sum(self._sides(x, y)))

    def estimate_dual(self, x: Tensor, y: Tensor) -> Tensor:
        """The multipliers, those of inequalities >= 0 and of active rows alone, with the least |f_y + C'dual|.

        Args:
            x: raveled upper variable.
            y: raveled lower variable.

        Returns:
            A vector.
        """
        oracle = self.problem.oracle(self.spaces, self.data)
        rows, _, C = oracle.constraint_jacobian(x, y)
        count = self._sides(x, y)[0]
        eps = torch.finfo(y.dtype).eps ** 0.375 * max(1.0, float(y.abs().amax()))
        used = torch.ones_like(rows, dtype=torch.bool)
        used[:count] = rows[:count] >= -eps
        bounds = bounds_of(self.problem, self.spaces, y)
        free = torch.ones_like(y, dtype=torch.bool)
        if bounds is not None:
            free = (y > bounds[0] + eps) & (y < bounds[1] - eps)
        C, slope = C[used][:, free], oracle.lower_y(x, y)[1][free]
        dual = torch.zeros_like(rows)
        if not len(C) or not bool(torch.isfinite(C).all() & torch.isfinite(slope).all()):
            return dual
        low = C.new_full((len(C),), -torch.inf)
        low[: int(used[:count].sum())] = 0.0
        dual[used] = solve_qp(C @ C.mT, C @ slope, low=low).x
        return dual

    def _sides(self, x: Tensor, y: Tensor) -> tuple[int, int]:
        with torch.no_grad():
            return tuple(  # type: ignore[return-value]
                0 if getattr(self.problem, name) is None else len(self._rows(name, x, y))
                for name in ("inequality", "equality")
            )

    def _rows(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        arguments = self._arguments(name, self.spaces.x.unflatten(x), self.spaces.y.unflatten(y))
        with isolated():
            return flat(getattr(self.problem, name)(*arguments), y)


def _status(found: Result) -> Status:
    status = found.status
    assert isinstance(status, Status)
    return status


@dataclass(frozen=True)
class _Term(Prox):
    """h(x, .) of a problem on raveled vectors, at a fixed x."""

    term: NonsmoothTerm
    x: Tensor

    def _value(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            spaces = self.term.spaces
            return self.term.value(spaces.x.unflatten(self.x), spaces.y.unflatten(x))

    def _prox(self, x: Tensor, step: Tensor) -> Tensor:
        return self.term.prox(x, step.reshape(()), self.x)

    def _jacobian(self, x: Tensor, step: Tensor) -> LinearOperator:
        raise NotImplementedError  # R's graph has it


def bounds_of(problem: Problem, spaces: Spaces, y: Tensor) -> tuple[Tensor, Tensor] | None:
    """The lower set of a program as bounds of raveled vectors.

    Args:
        problem: with a lower set of bounds, or none.
        spaces: of x and y.
        y: raveled lower variable.

    Returns:
        (low, high), or None without a set.

    Raises:
        ValueError: for a set of another kind.
    """
    if problem.lower_set is None:
        return None
    leaves = spaces.y.split(y)
    given = problem.lower_set
    sets = [given] * len(leaves) if isinstance(given, constrained.Set) else optree.tree_leaves(given, none_is_leaf=True)
    low, high = [], []
    for leaf, one in zip(leaves, sets, strict=True):
        infinite = torch.full_like(leaf, torch.inf)
        if one is None:
            pair = (-infinite, infinite)
        elif isinstance(one, constrained.NonNegative):
            pair = (torch.zeros_like(leaf), infinite)
        elif isinstance(one, Between):
            pair = one._bounds(leaf)
        else:
            raise ValueError(
                "Problem: beside inequality or equality the lower_set must be one of bounds (Box, NonNegative), but "
                f"got {type(one).__name__}; write it as inequality and equality."
            )
        low.append(torch.as_tensor(pair[0]).to(leaf).expand_as(leaf))
        high.append(torch.as_tensor(pair[1]).to(leaf).expand_as(leaf))
    return spaces.y.join(low), spaces.y.join(high)


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
        from .task_level import TaskLevel

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
