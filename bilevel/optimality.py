"""The optimality conditions of a constrained or non-smooth lower level as equations, with graphs for derivatives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import optree
import torch
from torch import Tensor

from nestopt.linalg import Dense, LinearOperator
from nestopt.linalg.autodiff import GraphOperator, evaluate, gradient
from nestopt.linalg.isolation import isolated
from nestopt.linalg.result import all_finite
from nestopt.linalg.tree import Ravel

from .oracle import part_of

if TYPE_CHECKING:
    from .oracle import Oracle
    from .problem import Problem, Spaces

__all__ = ["DENSE_SIZE", "Optimality"]

DENSE_SIZE = 512  # up to this dimension the Jacobian is formed
_WEAK = 0.375  # a row is weakly active where neither its value nor its multiplier is above eps to this power


class Optimality:
    """R(x, z) = 0, the conditions that z = (y, dual) solves the lower level, at one (x, z).

    With L = f + weight F + <dual, c>, c = (g, h), h(x, .) the non-smooth term (or a set's indicator),

        R = ((y - prox(y - s L_y, s)) / s,  g_i on active rows and dual_i on the others,  h).

    A row of g is active where dual_i > -g_i. Where both are below eps^(3/8) max(1, |dual|) it is weakly active: y is
    not differentiable in x, and the row counts as inactive, for the derivative to the side where the constraint lets
    go. At a kink of the prox the derivative is that which its Prox or Set documents (L1 keeps a zero). R_z is the
    matrix of the implicit function theorem; without constraints and prox it is f_yy.

    The names of the attributes are those of `Linearization`, with z in place of y and R in place of f_y.

    Attributes:
        upper: F(x, y), detached.
        lower: f(x, y), detached.
        upper_x: F_x, raveled.
        upper_y: (F_y, 0), raveled.
        lower_y: R, raveled.
        residual: |(y - prox(y - L_y, 1), min(dual_g, -g), h)|, which is |R| but at weakly active rows.
        hessian: R_z as an operator.
        cross: R_x as an operator.
        weak: how many rows are weakly active.

    Args:
        problem: the problem.
        spaces: of x and y.
        x: raveled upper variable.
        y: raveled lower variable.
        dual: multipliers, inequalities first.
        data: of the step.
        weight: of F in L.
        step: s, which the solutions do not depend on: 1 for what is reported, shorter for the equations of a solver.
        pull: (rho, centre) of a further term rho |y - centre|^2 / 2 in L, for a solver's regularised equations.
    """

    def __init__(
        self,
        problem: Problem,
        spaces: Spaces,
        x: Tensor,
        y: Tensor,
        dual: Tensor,
        data: Any = None,
        weight: float = 0.0,
        step: float = 1.0,
        pull: tuple[float, Tensor] | None = None,
    ) -> None:
        self.problem, self.spaces, self.data, self.step, self.pull = problem, spaces, data, step, pull
        self.oracle: Oracle = problem.oracle(spaces, data)
        with torch.inference_mode(False):
            leaf_x, leaf_y, leaf_dual = (v.detach().clone().requires_grad_() for v in (x, y, dual))
        self.x_leaves, self.y_leaves = [leaf_x], [leaf_y, leaf_dual]
        self.ravel_x, self.ravel = Ravel.of(leaf_x, "x"), Ravel.of((leaf_y, leaf_dual), "(y, dual)")
        self._trees = spaces.x.unflatten(leaf_x), spaces.y.unflatten(leaf_y)
        self.upper_graph, self.lower_graph = self._evaluate("upper"), self._evaluate("lower")
        self.upper, self.lower = self.upper_graph.detach(), self.lower_graph.detach()
        slopes = gradient(self.upper_graph, [leaf_x, leaf_y])
        self.upper_x, self.upper_y = slopes[0], torch.cat([slopes[1], torch.zeros_like(leaf_dual)])
        rows = self._rows(leaf_x)
        self.lower_y_graph, self.residual, self.weak = self._equations(leaf_y, leaf_dual, rows, weight)
        self.lower_y = self.ravel.join(self.lower_y_graph).detach()
        self.cross: LinearOperator = GraphOperator(
            self.lower_y_graph, [leaf_x], self.ravel, self.ravel_x, chunk_size=64
        )
        self._jacobian: LinearOperator | None = None

    @property
    def hessian(self) -> LinearOperator:
        """R_z: a matrix up to dimension 512, beyond that an operator along the kept graph."""
        if self._jacobian is None:
            operator = GraphOperator(self.lower_y_graph, self.y_leaves, self.ravel, self.ravel, chunk_size=64)
            n = self.ravel.size
            self._jacobian = operator
            if n <= DENSE_SIZE:
                eye = torch.eye(n, dtype=self.ravel.dtype, device=self.ravel.device)
                self._jacobian = Dense((operator.T @ eye).detach())
        return self._jacobian

    @property
    def products(self) -> int:
        """Products that forming R_z has taken."""
        return self.ravel.size if isinstance(self._jacobian, Dense) else 0

    def check(self) -> None:
        """Refuse silent zeros; see `Oracle.check`."""
        x, y = self.x_leaves[0].detach(), self.y_leaves[0].detach()
        self.oracle.check(x, y)

    def finite(self) -> bool:
        """Whether values, gradients and residual are."""
        parts = (self.upper, self.lower, self.upper_x, self.upper_y, self.lower_y)
        return all(all_finite(part) for part in parts)

    def lower_y_graph_beyond(self) -> list[Tensor]:
        """R with its graph, one tensor for y and one for the multipliers."""
        return self.lower_y_graph

    def _evaluate(self, name: str) -> Tensor:
        part = part_of(self.data, name)
        arguments = self._trees if part is None else (*self._trees, part)
        return evaluate(getattr(self.problem, name), *arguments, name=name)

    def _rows(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The constraints g and h with their graphs."""
        found = []
        for name in ("inequality", "equality"):
            function = getattr(self.problem, name)
            part = part_of(self.data, name)
            arguments = self._trees if part is None else (*self._trees, part)
            with isolated():
                found.append(like.new_zeros(0) if function is None else flat(function(*arguments), like))
        return found[0], found[1]

    def _equations(
        self, y: Tensor, dual: Tensor, rows: tuple[Tensor, Tensor], weight: float
    ) -> tuple[list[Tensor], Tensor, int]:
        g, h = rows
        mu = dual[: len(g)]
        lagrangian = self.lower_graph + dual @ torch.cat([g, h])
        if weight:
            lagrangian = lagrangian + weight * self.upper_graph
        if self.pull is not None:
            lagrangian = lagrangian + self.pull[0] * (y - self.pull[1]).square().sum() / 2
        slope = gradient(lagrangian, [y], create_graph=True)[0]
        moved = self.oracle.nonsmooth.prox(y - self.step * slope, self.step, self.x_leaves[0])
        first = (y - moved) / self.step if self.oracle.nonsmooth.present else slope
        small = torch.finfo(y.dtype).eps ** _WEAK * float(dual.detach().abs().amax().clamp_min(1)) if len(dual) else 0.0
        weak = (g.detach().abs() <= small) & (mu.detach().abs() <= small)
        held = (mu.detach() > -g.detach()) & ~weak
        equations = [first, torch.cat([torch.where(held, g, mu), h])]
        natural = torch.cat([first, torch.minimum(mu, -g), h]).detach()
        return equations, natural.norm(), int(weak.sum())


def flat(value: Any, like: Tensor) -> Tensor:
    """The tensors of a tree as one vector.

    Args:
        value: tree of tensors.
        like: of the dtype and device of an empty one.

    Returns:
        A vector.
    """
    parts = [leaf.reshape(-1) for leaf in optree.tree_leaves(value)]
    return torch.cat(parts) if parts else like.new_zeros(0)
