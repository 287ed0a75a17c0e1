"""The bilevel problem, and its evaluation at a point with the graphs that its derivatives need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from nestopt.constrained import Set, project
from nestopt.linalg import LinearOperator
from nestopt.linalg.autodiff import GraphOperator, evaluate, fresh_leaves, gradient
from nestopt.linalg.guard import graph_nodes, probe, refusal
from nestopt.linalg.isolation import RandomState
from nestopt.linalg.normalization import WrittenOut, normalizes
from nestopt.linalg.result import all_finite
from nestopt.linalg.tree import Ravel, leaf_paths, named_tree

from .oracle import Oracle, part_of, refuse_silent_zeros

__all__ = ["Linearization", "Problem", "Spaces"]


@dataclass(frozen=True)
class Problem:
    """min over x in X of F(x, y*(x)), where y*(x) minimises f(x, .), perhaps under constraints.

    x and y are tensors, pytrees of tensors or modules (their parameters). Functions take (x, y), or (x, y, data) when
    the solve is given data.

    Args:
        upper: F(x, y) -> scalar tensor.
        lower: f(x, y) -> scalar tensor.
        upper_set: X, a set with a projection, or a pytree of sets and Nones like x; None for the whole space.
        lower_set: a set that y is kept in, or a pytree of sets and Nones like y.
        inequality: g(x, y) -> tensor (or pytree of tensors) <= 0, constraints of the lower level.
        equality: h(x, y) = 0, likewise.
        lower_prox: a nonsmooth term h(x, y) of the lower level: a Prox such as `constrained.L1(0.1)`, or a pytree of
            them like y; a function x -> such, where its weights depend on x; or a `LowerProx` of prox and value.

    Raises:
        TypeError: if upper or lower is not callable.

    Example:
        >>> import torch
        >>> from nestopt import bilevel
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y: ((y - 1) ** 2).sum() + 0.1 * (x**2).sum(), lower=lambda x, y: ((y - x) ** 2).sum()
        ... )
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> res = bilevel.solve(problem, 0 * one, 0 * one)
        >>> res.status.name, round(res.x.item(), 6)
        ('CONVERGED', 0.909091)
    """

    upper: Callable[..., Tensor]
    lower: Callable[..., Tensor]
    upper_set: Any = None
    lower_set: Any = None
    inequality: Callable[..., Tensor] | None = None
    equality: Callable[..., Tensor] | None = None
    lower_prox: Any = None

    second_order: ClassVar[bool] = True  # whether `upper` and `lower` can be differentiated by whoever has them

    def __post_init__(self) -> None:
        for name in ("upper", "lower"):
            if not callable(getattr(self, name)):
                raise TypeError(
                    f"Problem: {name} must be a function of (x, y) that returns a scalar tensor, but got "
                    f"{type(getattr(self, name)).__name__}."
                )
        for name in ("inequality", "equality"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise TypeError(f"Problem: {name} must be a function of (x, y), but got {getattr(self, name)!r}.")
        if self.lower_set is not None and self.lower_prox is not None:
            raise ValueError(
                "Problem: lower_set and lower_prox are both given, but the prox of a sum is neither of theirs; pass "
                "one lower_prox whose prox maps into the set, or a pytree of terms and sets like y as lower_prox."
            )

    def oracle(self, spaces: Spaces, data: Any = None) -> Oracle:
        """First-order information, as methods ask for it.

        Args:
            spaces: of x and y.
            data: of one step.

        Returns:
            A fresh Oracle, whose counts start at zero.
        """
        return Oracle(self, spaces, data)

    def require_smooth_lower_level(self, method: str) -> None:
        """Refuse what a method for a smooth, unconstrained lower level would have to ignore.

        Args:
            method: who asks.

        Raises:
            ValueError: if the lower level has a set, constraints or a prox.
        """
        names = [n for n in ("lower_set", "inequality", "equality", "lower_prox") if getattr(self, n) is not None]
        if names:
            raise ValueError(
                f"{method} differentiates the minimiser of a smooth, unconstrained lower level, but the problem has "
                f"{' and '.join(names)}; drop them, or write the constraint into the lower objective as a penalty."
            )

    def with_lower(self, lower: Callable[..., Tensor]) -> Problem:
        """The problem with another lower objective, as methods that regularise or blend it need.

        Args:
            lower: scalar function of (x, y), or (x, y, data).

        Returns:
            A problem, of a kind that takes a scalar.
        """
        return replace(self, lower=lower)

    def project(self, x: Tensor, spaces: Spaces) -> Tensor:
        """The nearest point of the upper set.

        Args:
            x: raveled upper variable.
            spaces: where it lives.

        Returns:
            The projection, raveled.
        """
        if self.upper_set is None:
            return x
        if isinstance(self.upper_set, Set) and len(spaces.x.shapes) == 1:
            return spaces.x.join([self.upper_set.project(spaces.x.split(x)[0])])
        return spaces.x.flatten(project(self.upper_set, spaces.x.unflatten(x)))


@dataclass(frozen=True)
class Spaces:
    """The raveled spaces of x and y, made and checked once at the border."""

    x: Ravel
    y: Ravel

    @classmethod
    def of(cls, x: Any, y: Any) -> Spaces:
        """Check the two variables against each other.

        Args:
            x: upper variable.
            y: lower variable.

        Returns:
            The spaces.

        Raises:
            TypeError: for leaves that are not real floating tensors.
            ValueError: if x and y differ in dtype or device, or share memory, or one holds a tensor twice.
        """
        spaces = cls(Ravel.of(x, "x"), Ravel.of(y, "y"))
        for attribute in ("dtype", "device"):
            upper, lower = getattr(spaces.x, attribute), getattr(spaces.y, attribute)
            if upper != lower:
                raise ValueError(
                    f"x and y must share one {attribute}, but x has {upper} and y has {lower}; convert one with .to()."
                )
        named = [*_named_leaves(x, "x"), *_named_leaves(y, "y")]
        for i, (first, a) in enumerate(named):
            for second, b in named[i + 1 :]:
                if _overlap(a, b):
                    raise ValueError(
                        f"{first} and {second} share memory, but each variable needs its own; pass {second}.clone()."
                    )
        return spaces


def _named_leaves(tree: Any, name: str) -> list[tuple[str, Tensor]]:
    tree = named_tree(tree)
    return list(zip(leaf_paths(tree, name), Ravel.of(tree, name).leaves(tree), strict=True))


def _overlap(a: Tensor, b: Tensor) -> bool:
    if a.numel() == 0 or b.numel() == 0 or a.device != b.device or a.device.type == "meta":
        return False
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    (low_a, high_a), (low_b, high_b) = _extent(a), _extent(b)
    return low_a < high_b and low_b < high_a


def _extent(t: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


class Linearization:
    """Both objectives at one (x, y), with the gradient of f kept as a graph.

    Attributes:
        upper: F(x, y), detached.
        lower: f(x, y), detached.
        upper_x: F_x, raveled.
        upper_y: F_y, raveled.
        lower_y: f_y, raveled.
        hessian: f_yy as an operator, one backward pass a product.
        cross: f_yx as an operator (rows y, columns x); `cross.T @ v` is f_xy v, one backward pass.

    Args:
        problem: the problem.
        spaces: the spaces of x and y.
        x: raveled upper variable.
        y: raveled lower variable.
        data: passed on to the objectives when not None.
    """

    def __init__(self, problem: Problem, spaces: Spaces, x: Tensor, y: Tensor, data: Any = None) -> None:
        self.problem, self.spaces, self.data = problem, spaces, data
        self.x_leaves = fresh_leaves(spaces.x, spaces.x.unflatten(x))
        self.y_leaves = fresh_leaves(spaces.y, spaces.y.unflatten(y))
        trees = spaces.x.build(self.x_leaves), spaces.y.build(self.y_leaves)
        self._trees: tuple[Any, Any] = trees
        self.upper_graph = self._evaluate("upper")
        self._random = RandomState.now(x.device)
        self.lower_graph = self._evaluate("lower")
        upper = gradient(self.upper_graph, [*self.x_leaves, *self.y_leaves])
        self.upper_x = spaces.x.join(upper[: len(self.x_leaves)])
        self.upper_y = spaces.y.join(upper[len(self.x_leaves) :])
        self.lower_y_graph = gradient(self.lower_graph, self.y_leaves, create_graph=True)
        self.lower_y = spaces.y.join(self.lower_y_graph).detach()
        self.upper, self.lower = self.upper_graph.detach(), self.lower_graph.detach()
        self.hessian: LinearOperator = GraphOperator(
            self.lower_y_graph, self.y_leaves, spaces.y, spaces.y, symmetric=True
        )
        self.cross: LinearOperator = GraphOperator(self.lower_y_graph, self.x_leaves, spaces.y, spaces.x)

    def check(self) -> None:
        """Refuse silent zeros: captured tensors, unused variables, objectives that lack a variable.

        Raises:
            UndifferentiableError: naming an operation of f that cannot be differentiated twice, and the cure.
            ValueError: naming the function and the variable.
        """
        values = {"upper": self.upper_graph, "lower": self.lower_graph}
        refuse_silent_zeros(self.problem, self.spaces, values, self.x_leaves, self.y_leaves)
        self.check_twice_differentiable()

    def check_twice_differentiable(self) -> None:
        """Refuse an f with an operation whose second derivative is missing, or wrong.

        Raises:
            UndifferentiableError: naming the operation, and the cure.
        """
        found = probe(graph_nodes([self.lower_graph]))
        if found is not None:
            undifferentiable = refusal("lower", *found, lambda: self._evaluate("lower"))
            raise undifferentiable

    def lower_y_graph_beyond(self) -> list[Tensor]:
        """The gradient of f in y with a graph that has third derivatives of f: torch's normalisations have wrong ones.

        Returns:
            One tensor a leaf of y; `lower_y_graph` itself where f holds no normalisation.
        """
        if not normalizes([self.lower_graph]):
            return self.lower_y_graph
        written_out = WrittenOut(needed=True)
        value = self._random.run(lambda: written_out.evaluate(lambda: self._evaluate("lower")))
        written_out.check()
        return gradient(value, self.y_leaves, create_graph=True)

    def _evaluate(self, name: str) -> Tensor:
        part = part_of(self.data, name)
        arguments = self._trees if part is None else (*self._trees, part)
        return evaluate(getattr(self.problem, name), *arguments, name=name)

    def finite(self) -> bool:
        """Whether both values and all gradients are finite."""
        parts = (self.upper, self.lower, self.upper_x, self.upper_y, self.lower_y)
        return all(all_finite(part) for part in parts)
