"""The lower level's nonsmooth term h(x, .) on raveled vectors: its value, its prox, and its derivative in x."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import optree
from torch import Tensor

from nestopt.constrained import Prox, Set
from nestopt.constrained.terms import Terms

if TYPE_CHECKING:
    from .problem import Problem, Spaces

__all__ = ["LowerProx", "NonsmoothTerm"]


@dataclass(frozen=True)
class LowerProx:
    """A nonsmooth term h(x, y) of the lower level, by its prox and its value.

    Args:
        prox: (y, step, x) -> the minimiser over z of h(x, z) + |z - y|^2 / (2 step), in the structure of y.
        value: (x, y) -> h(x, y), a scalar tensor that is differentiable in x.

    Example:
        >>> import torch
        >>> term = LowerProx(
        ...     prox=lambda y, step, x: y.sign() * (y.abs() - step * x).clamp_min(0),
        ...     value=lambda x, y: x * y.abs().sum(),
        ... )
        >>> term.prox(torch.tensor([3.0, -0.5]), 1.0, torch.tensor(1.0))
        tensor([2., -0.])
    """

    prox: Callable[[Any, float, Any], Any]
    value: Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class NonsmoothTerm:
    """h(x, .) of a problem on raveled vectors: a prox, a set, or zero.

    Args:
        problem: whose lower_prox or lower_set it is.
        spaces: of x and y.
    """

    problem: Problem
    spaces: Spaces

    @property
    def present(self) -> bool:
        """Whether there is one."""
        return self.problem.lower_prox is not None or self.problem.lower_set is not None

    @property
    def depends_on_x(self) -> bool:
        """Whether h_x may differ from zero."""
        term = self.problem.lower_prox
        return isinstance(term, LowerProx) or (callable(term) and not isinstance(term, (Prox, Set)))

    def prox(self, v: Tensor, step: float | Tensor, x: Tensor) -> Tensor:
        """The minimiser over z of h(x, z) + |z - v|^2 / (2 step).

        Args:
            v: raveled.
            step: positive.
            x: raveled upper variable.

        Returns:
            Raveled; v itself where there is no term.
        """
        if not self.present:
            return v
        term, x_tree = self.problem.lower_prox, self.spaces.x.unflatten(x)
        if isinstance(term, LowerProx):
            return self.spaces.y.flatten(term.prox(self.spaces.y.unflatten(v), float(step), x_tree))
        return self._terms(x_tree).prox(v, v.new_tensor(step) if isinstance(step, (int, float)) else step)

    def value(self, x_tree: Any, y_tree: Any) -> Tensor:
        """h(x, y) as a scalar with its graph; a set counts as zero.

        Args:
            x_tree: upper variable in its structure.
            y_tree: lower variable in its structure.

        Returns:
            A 0-d tensor.
        """
        term = self.problem.lower_prox
        if isinstance(term, LowerProx):
            return term.value(x_tree, y_tree)
        return self._terms(x_tree).value(self.spaces.y.join(optree.tree_leaves(y_tree)))

    def _terms(self, x_tree: Any) -> Terms:
        given = self.problem.lower_set if self.problem.lower_prox is None else self.problem.lower_prox
        if callable(given) and not isinstance(given, (Prox, Set)):
            given = given(x_tree)
        return Terms.of("Problem", given, self.spaces.y, 0)
