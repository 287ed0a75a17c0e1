"""Lower levels with constraints, which may couple both levels."""

from __future__ import annotations

import optree
import torch
from torch import Tensor

from nestopt import constrained
from nestopt.constrained import SQP, solve_qp
from nestopt.constrained.sets import Between
from nestopt.linalg.isolation import isolated

from .counts import Counts
from .lower_kinds import LowerLevel, LowerSolution, outcome
from .optimality import Optimality, flat
from .problem import Problem, Spaces

__all__ = ["ProgramLevel", "bounds_of"]


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
        return LowerSolution(found.x, torch.cat(multipliers), residual, outcome(found), counts)

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
