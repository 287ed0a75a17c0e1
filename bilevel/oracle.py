"""First-order information of a bilevel problem at raveled points, counted as it is spent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import optree
import torch
from torch import Tensor

from nestopt.linalg.autodiff import evaluate, gradient, products, reached_leaves
from nestopt.linalg.guard import describe_captured
from nestopt.linalg.isolation import isolated
from nestopt.linalg.tree import leaf_paths

from .counts import Counts
from .nonsmooth import NonsmoothTerm

if TYPE_CHECKING:
    from .problem import Problem, Spaces

__all__ = ["Batch", "Oracle", "Slopes", "part_of", "refuse_silent_zeros"]


@dataclass(frozen=True)
class Batch:
    """One step's data where the two levels take different samples.

    Attributes:
        upper: third argument of `upper`.
        lower: third argument of `lower` (and of the constraints).
    """

    upper: Any
    lower: Any


def part_of(data: Any, function: str) -> Any:
    """What a problem's function receives of a step's data.

    Args:
        data: any, or a Batch.
        function: upper, lower, inequality or equality.

    Returns:
        The third argument, or None for none.
    """
    if isinstance(data, Batch):
        return data.upper if function == "upper" else data.lower
    return data


class Slopes(NamedTuple):
    """A value with its raveled gradients.

    Attributes:
        value: 0-d, detached.
        x: gradient in x.
        y: gradient in y.
    """

    value: Tensor
    x: Tensor
    y: Tensor


class Oracle:
    """Values and gradients of F, f, h and the constraints at raveled points.

    Make one for each step; `counts` adds up what it was asked. A problem whose vectors are spread over processes
    returns its own subclass from `Problem.oracle`, so methods take `dot` and `norm` from here.

    Args:
        problem: the problem.
        spaces: of x and y.
        data: of this step, None for objectives of (x, y).
    """

    def __init__(self, problem: Problem, spaces: Spaces, data: Any = None) -> None:
        self.problem, self.spaces, self.data = problem, spaces, data
        self.nonsmooth = NonsmoothTerm(problem, spaces)
        self.counts = Counts()

    def check(self, x: Tensor, y: Tensor) -> None:
        """Refuse silent zeros, as methods do once at their start: captured tensors and variables that nothing uses.

        Args:
            x: raveled upper variable.
            y: raveled lower variable.

        Raises:
            ValueError: naming the function and the variable.
        """
        x_leaves, y_leaves = self._leaves(x, y)
        values = {name: self._evaluate(name, x_leaves, y_leaves) for name in ("upper", "lower")}
        if self.nonsmooth.depends_on_x:
            trees = self.spaces.x.build(x_leaves), self.spaces.y.build(y_leaves)
            values["lower_prox"] = self.nonsmooth.value(*trees)
        for name in ("inequality", "equality"):
            if getattr(self.problem, name) is not None:
                values[name] = self._rows(name, x_leaves, y_leaves).sum()
        refuse_silent_zeros(self.problem, self.spaces, values, x_leaves, y_leaves)

    def upper(self, x: Tensor, y: Tensor) -> Slopes:
        """The upper objective F with F_x and F_y."""
        return self.weighted(x, y, upper=1.0)

    def lower(self, x: Tensor, y: Tensor) -> Slopes:
        """The lower objective f with f_x and f_y, without the nonsmooth term."""
        return self.weighted(x, y, lower=1.0)

    def weighted(
        self,
        x: Tensor,
        y: Tensor,
        *,
        upper: float | Tensor | None = None,
        lower: float | Tensor | None = None,
        dual: Tensor | Callable[[Tensor], Tensor] | None = None,
    ) -> Slopes:
        """The sum a F + b f + <dual, c> with its gradients, by one backward pass.

        Args:
            x: raveled upper variable.
            y: raveled lower variable.
            upper: a; None leaves F out, unevaluated.
            lower: b; None likewise.
            dual: multipliers of the constraints c = (g, h), constants here, or what gives them from the values of c;
                None likewise.

        Returns:
            The Slopes.
        """
        x_leaves, y_leaves = self._leaves(x, y)
        rowed = dual is not None and (not isinstance(dual, Tensor) or dual.numel() > 0)
        parts = []
        for name, weight in (("upper", upper), ("lower", lower)):
            if weight is not None:
                value = self._evaluate(name, x_leaves, y_leaves)
                parts.append(value if isinstance(weight, float) and weight == 1 else weight * value)
        if rowed:
            rows = self._constraints(x_leaves, y_leaves)
            weights = dual(rows.detach()) if callable(dual) else dual
            assert weights is not None
            parts.append(weights.detach() @ rows)
        self.counts += Counts(int(upper is not None), int(lower is not None), constraint_evaluations=int(rowed))
        total = sum(parts[1:], parts[0]) if parts else x.new_zeros(())
        slopes = gradient(total, [*x_leaves, *y_leaves])
        n = len(x_leaves)
        return Slopes(total.detach(), self.spaces.x.join(slopes[:n]), self.spaces.y.join(slopes[n:]))

    def lower_y(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The lower objective f and f_y."""
        _, y_leaves = leaves = self._leaves(x, y)
        value = self._evaluate("lower", *leaves)
        self.counts += Counts(0, 1)
        return value.detach(), self.spaces.y.join(gradient(value, y_leaves))

    def values(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Both objectives F and f, without derivatives (not counted as gradients)."""
        with torch.no_grad():
            leaves = self.spaces.x.split(x), self.spaces.y.split(y)
            return self._evaluate("upper", *leaves), self._evaluate("lower", *leaves)

    def term_x(self, x: Tensor, y: Tensor) -> Tensor:
        """h_x(x, y), zero where the nonsmooth term does not depend on x."""
        if not self.nonsmooth.depends_on_x:
            return torch.zeros_like(x)
        x_leaves, y_leaves = self._leaves(x, y)
        value = self.nonsmooth.value(self.spaces.x.build(x_leaves), self.spaces.y.build(y_leaves))
        return self.spaces.x.join(gradient(value, x_leaves))

    def term(self, x: Tensor, y: Tensor) -> Tensor:
        """h(x, y), zero where there is no nonsmooth term; a set counts as zero."""
        if not self.nonsmooth.present:
            return x.new_zeros(())
        with torch.no_grad():
            return self.nonsmooth.value(self.spaces.x.unflatten(x), self.spaces.y.unflatten(y))

    def prox(self, v: Tensor, step: float | Tensor, x: Tensor) -> Tensor:
        """The lower level's prox (or projection onto its set), v itself where there is neither."""
        return self.nonsmooth.prox(v, step, x)

    def project(self, x: Tensor) -> Tensor:
        """The nearest point of the upper set."""
        return self.problem.project(x, self.spaces)

    @property
    def constrained(self) -> bool:
        """Whether the problem has an inequality or an equality."""
        return self.problem.inequality is not None or self.problem.equality is not None

    def constraints(self, x: Tensor, y: Tensor) -> Tensor:
        """The constraints c = (g(x, y), h(x, y)) as one vector, inequalities first; empty where there are none."""
        with torch.no_grad():
            self.counts += Counts(constraint_evaluations=1)
            return self._constraints(self.spaces.x.split(x), self.spaces.y.split(y))

    def inequalities(self, x: Tensor, y: Tensor) -> int:
        """How many of the constraints are inequalities."""
        if self.problem.inequality is None:
            return 0
        with torch.no_grad():
            return len(self._rows("inequality", self.spaces.x.split(x), self.spaces.y.split(y)))

    def constraint_names(self, x: Tensor, y: Tensor) -> list[str]:
        """What each of the constraints is called in a message, such as `inequality['a'][0]`.

        Args:
            x: raveled upper variable.
            y: raveled lower variable.

        Returns:
            One name a row.
        """
        names = []
        for name in ("inequality", "equality"):
            function = getattr(self.problem, name)
            if function is None:
                continue
            with torch.no_grad(), isolated():
                found = function(*self._arguments(name, self.spaces.x.split(x), self.spaces.y.split(y)))
            for path, leaf in zip(leaf_paths(found, name), optree.tree_leaves(found), strict=True):
                names += [path] if leaf.ndim == 0 else [f"{path}[{i}]" for i in range(leaf.numel())]
        return names

    def constraint_jacobian(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The constraints c with their Jacobians (p, n_x) and (p, n_y): one backward pass a row, run as one batch."""
        x_leaves, y_leaves = self._leaves(x, y)
        rows = self._constraints(x_leaves, y_leaves)
        self.counts += Counts(constraint_evaluations=1)
        if not rows.numel():
            return rows.detach(), x.new_zeros(0, len(x)), y.new_zeros(0, len(y))
        leaves = [*x_leaves, *y_leaves]
        if len(rows) == 1:  # a plain backward pass is much cheaper than a vmapped one
            slopes = [slope[None] for slope in gradient(rows[0], leaves)]
        else:
            eye = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
            slopes = products([rows], leaves, [eye], batched=True)
        n = len(x_leaves)
        return rows.detach(), self.spaces.x.join(slopes[:n]), self.spaces.y.join(slopes[n:])

    def lower_residual(self, x: Tensor, y: Tensor, slope: Tensor) -> Tensor:
        """|y - prox(y - slope)| with step 1: |slope| itself where the lower level is smooth.

        Args:
            x: raveled upper variable.
            y: raveled lower variable.
            slope: f_y(x, y).

        Returns:
            The norm.
        """
        if not self.nonsmooth.present:
            return self.norm(slope)
        return self.norm(y - self.prox(y - slope, 1.0, x))

    def dot(self, u: Tensor, v: Tensor) -> Tensor:
        """<u, v> over the whole space."""
        return torch.dot(u, v)

    def norm(self, v: Tensor) -> Tensor:
        """|v| over the whole space."""
        size: Tensor = v.norm()
        return size

    def _leaves(self, x: Tensor, y: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        with torch.inference_mode(False):  # an inference tensor cannot require grad
            pairs = (self.spaces.x, x), (self.spaces.y, y)
            x_leaves, y_leaves = ([p.detach().clone().requires_grad_() for p in ravel.split(v)] for ravel, v in pairs)
        return x_leaves, y_leaves

    def _arguments(self, name: str, x_leaves: list[Tensor], y_leaves: list[Tensor]) -> tuple[Any, ...]:
        trees = self.spaces.x.build(x_leaves), self.spaces.y.build(y_leaves)
        part = part_of(self.data, name)
        return trees if part is None else (*trees, part)

    def _evaluate(self, name: str, x_leaves: list[Tensor], y_leaves: list[Tensor]) -> Tensor:
        return evaluate(getattr(self.problem, name), *self._arguments(name, x_leaves, y_leaves), name=name)

    def _rows(self, name: str, x_leaves: list[Tensor], y_leaves: list[Tensor]) -> Tensor:
        with isolated():
            found = getattr(self.problem, name)(*self._arguments(name, x_leaves, y_leaves))
        return _joined([leaf.reshape(-1) for leaf in optree.tree_leaves(found)], x_leaves)

    def _constraints(self, x_leaves: list[Tensor], y_leaves: list[Tensor]) -> Tensor:
        names = [name for name in ("inequality", "equality") if getattr(self.problem, name) is not None]
        parts = [self._rows(name, x_leaves, y_leaves) for name in names]
        return _joined(parts, x_leaves)


def _joined(parts: list[Tensor], leaves: list[Tensor]) -> Tensor:
    """The parts as one vector, empty where there are none."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else leaves[0].new_zeros(0)


def refuse_silent_zeros(
    problem: Problem, spaces: Spaces, values: dict[str, Tensor], x_leaves: list[Tensor], y_leaves: list[Tensor]
) -> None:
    """Refuse captured tensors, objectives that lack y, and variables that nothing uses.

    Args:
        problem: whose functions they are.
        spaces: of x and y.
        values: of all functions in which x may stand, by name, with their graphs.
        x_leaves: leaves that the graphs begin at.
        y_leaves: likewise.

    Raises:
        ValueError: naming the function and the variable.
    """
    known, used = [*x_leaves, *y_leaves], set()
    for name, value in values.items():
        leaves = reached_leaves(value)
        found = {id(leaf) for leaf in leaves}
        captured = [leaf for leaf in leaves if all(leaf is not ours for ours in known)]
        if captured:
            raise ValueError(
                f"{name} uses tensors that require grad and are neither in x nor in y: "
                f"{describe_captured(getattr(problem, name), captured)}; their gradient would be "
                "dropped. Put them into x or y, or detach them."
            )
        if name in ("upper", "lower") and not any(id(leaf) in found for leaf in y_leaves):
            raise ValueError(
                f"{name} does not depend on y, so there is nothing to differentiate; look for .detach(), "
                "torch.no_grad() or an unused argument."
            )
        used |= found
    paths = leaf_paths(spaces.x.build(x_leaves), "x")
    unused = [path for path, leaf in zip(paths, x_leaves, strict=True) if id(leaf) not in used]
    if unused:
        raise ValueError(
            f"{', '.join(unused)} is used by no function of the problem, so its hypergradient would be a silent "
            "zero; use it, or take it out of x (look for .detach() and torch.no_grad())."
        )
