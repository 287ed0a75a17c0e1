"""Constrained problems, and how far a point is from satisfying their optimality conditions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optree
import torch
from torch import Tensor

from nestopt.implicit.border import objective_values
from nestopt.implicit.pullback import pull
from nestopt.linalg.tree import Ravel, named_tree

__all__ = ["KKT", "Problem", "Rows"]


@dataclass(frozen=True, kw_only=True)
class KKT:
    """How far a point with multipliers is from the Karush-Kuhn-Tucker conditions: four residuals, per item.

    Each is the largest absolute entry. With L = f + lam'h + mu'g + z'x, where z > 0 pushes against the upper bound and
    z < 0 against the lower one:

    | part               | residual                                               | scale               |
    |--------------------|--------------------------------------------------------|---------------------|
    | stationarity       | f_x + h_x' lam + g_x' mu + z                           | its largest summand |
    | primal feasibility | h, max(g, 0), and what x exceeds its bounds by         | x                   |
    | dual feasibility   | max(-mu, 0), and z where there is no bound on its side | the multipliers     |
    | complementarity    | mu g, and z times the distance to the bound it needs   | f                   |

    Every scale is at least 1, so that a residual divided by it is an absolute error for small problems and a relative
    one for large ones.

    Attributes:
        stationarity: shape (*batch,), like the others.
        primal_feasibility: in the units of the constraints.
        dual_feasibility: in the units of the multipliers.
        complementarity: in the units of the objective.
        scales: what the four are divided by in `scaled`, of shape (4, *batch).

    Example:
        >>> from nestopt.constrained import Problem
        >>> problem = Problem(lambda x: ((x - 2) ** 2).sum(), inequality=lambda x: x - 1)
        >>> x, mu = torch.ones(1), torch.tensor([1.5])
        >>> kkt = problem.kkt(x, inequality_dual=mu)
        >>> float(kkt.stationarity), float(kkt.primal_feasibility), float(kkt.scaled.stationarity)
        (0.5, 0.0, 0.25)
    """

    stationarity: Tensor
    primal_feasibility: Tensor
    dual_feasibility: Tensor
    complementarity: Tensor
    scales: Tensor

    @property
    def parts(self) -> Tensor:
        """The four residuals, of shape (4, *batch), in the order of the attributes."""
        return torch.stack([self.stationarity, self.primal_feasibility, self.dual_feasibility, self.complementarity])

    @property
    def scaled(self) -> KKT:
        """The residuals divided by their scales."""
        parts = self.parts / self.scales
        return KKT(
            stationarity=parts[0], primal_feasibility=parts[1], dual_feasibility=parts[2], complementarity=parts[3],
            scales=torch.ones_like(self.scales),
        )  # fmt: skip

    @property
    def error(self) -> Tensor:
        """The largest scaled residual, per item."""
        return (self.parts / self.scales).amax(0)


@dataclass(frozen=True)
class Problem:
    """min f(x) subject to h(x) = 0, g(x) <= 0, low <= x <= high.

    The functions may take further arguments, `objective(x, *theta)`, all of them the same, with respect to which a
    solution is differentiated (`solution`). x is a tensor or a pytree of tensors; so are the values of the
    constraints, and each multiplier has the structure and shape of its constraint's value. With L = f + lam'h + mu'g
    + z'x, mu >= 0; z, the multiplier of the bounds, is positive where x is held by its upper bound and negative where
    by its lower one.

    Where a method takes batch_dims = k > 0, the first k dimensions of x count independent problems; the functions map
    the whole batch, the objective to one value an item.

    Args:
        objective: f(x, *theta), a scalar (one an item).
        equality: h(x, *theta), None for none.
        inequality: g(x, *theta), None for none.
        bounds: (low, high), each None, a number, or for x's structure a tree of numbers and tensors that broadcast to
            its tensors; infinite entries are no bounds.

    Raises:
        TypeError: if a function cannot be called, or bounds is no pair.

    Example:
        >>> problem = Problem(lambda x, a: ((x - a) ** 2).sum(), equality=lambda x, a: x.sum() - 1, bounds=(0, None))
        >>> x, a = torch.tensor([0.0, 1.0]), torch.tensor([-1.0, 1.0])
        >>> kkt = problem.kkt(x, torch.tensor(0.0), None, torch.tensor([-2.0, 0.0]), a)
        >>> float(kkt.error)
        0.0
    """

    objective: Callable[..., Tensor]
    equality: Callable[..., Any] | None = None
    inequality: Callable[..., Any] | None = None
    bounds: tuple[Any, Any] | None = None

    def __post_init__(self) -> None:
        for name, role in (("objective", self.objective), ("equality", self.equality), ("inequality", self.inequality)):
            if not callable(role) and (role is not None or name == "objective"):
                raise TypeError(f"Problem: {name} must be a function of x, but got {type(role).__name__}.")
        if self.bounds is not None and (not isinstance(self.bounds, tuple) or len(self.bounds) != 2):
            raise TypeError(
                f"Problem: bounds must be a pair (low, high), but got {self.bounds!r}; write (0.0, None) for x >= 0."
            )

    def lagrangian(
        self,
        x: Any,
        equality_dual: Any = None,
        inequality_dual: Any = None,
        bound_dual: Any = None,
        *theta: Any,
        batch_dims: int = 0,
    ) -> Tensor:
        """L = f + lam'h + mu'g + z+'(x - high) + z-'(x - low), z+ and z- the positive and negative part of z.

        Args:
            x: the point.
            equality_dual: lam; None for zero.
            inequality_dual: mu; None for zero.
            bound_dual: z, of x's structure; None for zero.
            theta: further arguments of the functions.
            batch_dims: leading dimensions of x that count problems.

        Returns:
            One value an item.

        Raises:
            ValueError: for structures, shapes or dtypes that do not fit.
        """
        rows = Rows.of(self, x, theta, batch_dims)
        return rows.lagrangian(*rows.join(x, equality_dual, inequality_dual, bound_dual), self.bounds, theta)

    def kkt(
        self,
        x: Any,
        equality_dual: Any = None,
        inequality_dual: Any = None,
        bound_dual: Any = None,
        *theta: Any,
        batch_dims: int = 0,
    ) -> KKT:
        """The four residuals of the optimality conditions; the arguments, and the errors, are those of `lagrangian`.

        Returns:
            The residuals, which carry no graph.
        """
        with torch.no_grad():
            rows = Rows.of(self, x, theta, batch_dims)
            return rows.kkt(*rows.join(x, equality_dual, inequality_dual, bound_dual), self.bounds, theta)


@dataclass(frozen=True)
class Rows:
    """A problem at the shapes of one x: vectors for trees, and bounds as further inequalities.

    The rows G of all inequalities are g, then low - x, then x - high, each of the two for every entry of x where the
    problem gives that side at all; a row whose bound is infinite is -inf.

    Attributes:
        problem: the problem.
        batch: leading dimensions of x.
        x: x's structure for one item.
        h: the structure of the equalities' values, None without.
        g: that of the inequalities'.
    """

    problem: Problem
    batch: torch.Size
    x: Ravel
    h: Ravel | None
    g: Ravel | None

    @classmethod
    def of(cls, problem: Problem, x: Any, theta: Sequence[Any], batch_dims: int) -> Rows:
        """Check x, and evaluate the constraints once to see their shapes.

        Args:
            problem: the problem.
            x: the point.
            theta: further arguments of the functions.
            batch_dims: leading dimensions of x that count problems.

        Returns:
            The rows.

        Raises:
            ValueError: if batch_dims is negative, or leaves of x differ in their leading dimensions.
        """
        ravel = Ravel.of(x, "x")
        item, batch = ravel.items("Problem", batch_dims)
        values: list[Ravel | None] = []
        for name, function in (("equality", problem.equality), ("inequality", problem.inequality)):
            if function is None:
                values.append(None)
                continue
            with torch.no_grad():
                value = function(ravel.build([leaf.detach() for leaf in ravel.leaves(x)]), *theta)
            values.append(_per_item(Ravel.of(value, f"the value of {name}"), batch, name, ravel))
        return cls(problem, batch, item, values[0], values[1])

    @property
    def size(self) -> int:
        """The number of variables of an item."""
        return self.x.size

    def split_inequalities(self, G: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Rows (*batch, r) as those of g, of the lower and of the upper bounds; None where there is no such side."""
        sides = [side is not None for side in self.problem.bounds or (None, None)]
        parts = list(torch.split(G, [self.g.size if self.g else 0, *(self.size for side in sides if side)], dim=-1))
        low = parts[1] if sides[0] else None
        return parts[0], low, parts[-1] if sides[1] else None

    def functions(self, v: Tensor, bounds: Any, theta: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """F, h and G at a vector.

        Args:
            v: shape (*batch, n).
            bounds: the problem's pair, or what stands for it.
            theta: further arguments of the functions.

        Returns:
            Shapes (*batch,), (*batch, m), (*batch, r).

        Raises:
            TypeError: if the objective returns no floating tensor.
            ValueError: if it does not return one value an item.
        """
        x = self.x.unflatten(v)
        f = objective_values("Problem", self.problem.objective(x, *theta), self.batch)
        h, g = (
            v.new_zeros(*self.batch, 0) if ravel is None or function is None else _rows(ravel, function(x, *theta))
            for ravel, function in ((self.h, self.problem.equality), (self.g, self.problem.inequality))
        )
        G = [g]
        low, high = (None, None) if bounds is None else bounds
        if low is not None:
            G.append(self._bound(low, v, "low") - v)
        if high is not None:
            G.append(v - self._bound(high, v, "high"))
        return f.reshape(self.batch), h, torch.cat(G, -1) if len(G) > 1 else G[0]

    def lagrangian(self, v: Tensor, lam: Tensor, mu: Tensor, bounds: Any, theta: Sequence[Any]) -> Tensor:
        """L = f + lam'h + mu'G, one value an item."""
        f, h, G = self.functions(v, bounds, theta)
        return f + _dot(lam, h) + _dot(mu, G)

    def gradient(self, v: Tensor, lam: Tensor, mu: Tensor, bounds: Any, theta: Sequence[Any]) -> Tensor:
        """L_x = f_x + h_x' lam + G_x' mu, differentiable in everything."""
        (found,) = pull(lambda v: self.functions(v, bounds, theta), [v], [v.new_ones(self.batch), lam, mu])
        return found

    def jacobians(self, v: Tensor, bounds: Any, theta: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """f_x, h_x and G_x, dense, by one backward pass a row.

        Args:
            v: shape (*batch, n).
            bounds: the problem's pair, or what stands for it.
            theta: further arguments of the functions.

        Returns:
            Shapes (*batch, n), (*batch, m, n), (*batch, r, n).
        """
        linearized: Any = torch.func.vjp(lambda v: self.functions(v, bounds, theta), v)
        values, product = linearized
        zero = [torch.zeros_like(value) for value in values]
        gradient = product((torch.ones_like(values[0]), zero[1], zero[2]))[0]
        found = []
        for k in (1, 2):
            free = values[2].shape[-1] - (self.g.size if self.g else 0) if k == 2 else 0
            rows = []
            for i in range(values[k].shape[-1] - free):
                unit = torch.zeros_like(values[k])
                unit[..., i] = 1
                rows.append(product((zero[0], *(unit if j == k else zero[j] for j in (1, 2))))[0])
            eye = torch.eye(self.size, dtype=v.dtype, device=v.device).expand(*self.batch, -1, -1)
            parts = [torch.stack(rows, -2)] if rows else [v.new_zeros(*self.batch, 0, self.size)]
            if k == 2:
                low, high = self.problem.bounds or (None, None)
                parts += ([] if low is None else [-eye]) + ([] if high is None else [eye])
            found.append(torch.cat(parts, -2))
        return gradient, found[0], found[1]

    def join(self, x: Any, equality_dual: Any, inequality_dual: Any, bound_dual: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Trees as vectors: x, lam, and the multipliers of G; None stands for zero.

        Args:
            x: the point.
            equality_dual: lam.
            inequality_dual: mu.
            bound_dual: z.

        Returns:
            Shapes (*batch, n), (*batch, m), (*batch, r).
        """
        v = self._vector(self.x, x, "x")
        lam = self._dual(self.h, equality_dual, "equality_dual", v)
        mu = [self._dual(self.g, inequality_dual, "inequality_dual", v)]
        low, high = self.problem.bounds or (None, None)
        held = None if low is None and high is None else self.x
        z = self._dual(held, bound_dual, "bound_dual", v)
        if low is not None:
            mu.append((-z).clamp_min(0) if high is not None else -z)
        if high is not None:
            mu.append(z.clamp_min(0) if low is not None else z)
        return v, lam, torch.cat(mu, -1) if len(mu) > 1 else mu[0]

    def split(self, v: Tensor, lam: Tensor, mu: Tensor) -> tuple[Any, Any, Any, Any]:
        """Vectors as the trees x, equality_dual, inequality_dual and bound_dual, None for what the problem has not."""
        g, low, high = self.split_inequalities(mu)
        z = None if low is None and high is None else torch.zeros_like(v)
        if z is not None:
            z = z + (0 if high is None else high) - (0 if low is None else low)
        return (
            self.x.unflatten(v),
            None if self.h is None else self.h.unflatten(lam),
            None if self.g is None else self.g.unflatten(g),
            None if z is None else self.x.unflatten(z),
        )

    def kkt(self, v: Tensor, lam: Tensor, mu: Tensor, bounds: Any, theta: Sequence[Any]) -> KKT:
        """The residuals at vectors; see `Problem.kkt`."""
        f, h, G = self.functions(v, bounds, theta)
        idle = torch.isneginf(G)
        parts = [self.gradient(v, a, b, bounds, theta) for a, b in ((lam, mu), (torch.zeros_like(lam), mu * 0))]
        stationarity, gradient = _largest(parts[0]), _largest(parts[1])
        through_h = _largest(self.gradient(v, lam, mu * 0, bounds, theta) - parts[1]) if lam.shape[-1] else 0 * gradient
        through_g = _largest(self.gradient(v, 0 * lam, mu, bounds, theta) - parts[1]) if mu.shape[-1] else 0 * gradient
        scales = [
            torch.maximum(torch.maximum(gradient, through_h), through_g), _largest(v),
            torch.maximum(_largest(lam), _largest(mu)), f.abs(),
        ]  # fmt: skip
        return KKT(
            stationarity=stationarity,
            primal_feasibility=torch.maximum(_largest(h), _largest(G.clamp_min(0))),
            dual_feasibility=_largest(torch.where(idle, mu.abs(), (-mu).clamp_min(0))),
            complementarity=_largest(torch.where(idle, 0, mu * torch.where(idle, 0, G))),
            scales=torch.stack(scales).clamp_min(1),
        )

    def _bound(self, bound: Any, v: Tensor, name: str) -> Tensor:
        treespec = self.x.treespec
        leaves, given = optree.tree_flatten(bound)
        if given != treespec:  # one for all
            leaves = [bound] * len(self.x.shapes)
        parts = []
        for leaf, shape in zip(leaves, self.x.shapes, strict=True):
            try:
                value = torch.as_tensor(leaf, dtype=v.dtype, device=v.device)
                parts.append(value.broadcast_to(self.batch + shape).reshape(*self.batch, shape.numel()))
            except (RuntimeError, TypeError, ValueError) as error:
                raise ValueError(
                    f"Problem: bounds: {name} must be a number or a tensor that broadcasts to x's shape "
                    f"{tuple(self.batch + shape)}, or a tree of them like x, but got {leaf!r}."
                ) from error
        return torch.cat(parts, -1)

    def _vector(self, ravel: Ravel, tree: Any, name: str) -> Tensor:
        whole = replace(ravel, shapes=tuple(self.batch + shape for shape in ravel.shapes), name=name)
        return ravel.join(whole.leaves(tree))

    def _dual(self, ravel: Ravel | None, tree: Any, name: str, v: Tensor) -> Tensor:
        if ravel is None and tree is not None:
            raise ValueError(f"Problem: {name} was given, but the problem has no such constraints; pass None.")
        if ravel is None or tree is None:
            return v.new_zeros(*self.batch, 0 if ravel is None else ravel.size)
        return self._vector(ravel, tree, name)


def _per_item(value: Ravel, batch: torch.Size, name: str, x: Ravel) -> Ravel:
    for shape in value.shapes:
        if shape[: len(batch)] != batch:
            raise ValueError(
                f"Problem: {name} must return tensors that begin with x's batch dimensions {tuple(batch)}, but one has "
                f"shape {tuple(shape)}."
            )
    if value.dtype != x.dtype or value.device != x.device:
        raise ValueError(
            f"Problem: {name} must return {x.dtype} on {x.device} like x, but it returned {value.dtype} on "
            f"{value.device}."
        )
    return replace(value, shapes=tuple(shape[len(batch) :] for shape in value.shapes))


def _rows(ravel: Ravel, value: Any) -> Tensor:
    return ravel.join(optree.tree_leaves(named_tree(value)))


def _dot(dual: Tensor, value: Tensor) -> Tensor:
    # a multiplier of zero takes no part where the constraint is -inf
    return (dual * torch.where(torch.isneginf(value) & (dual == 0), 0, value)).sum(-1)


def _largest(v: Tensor) -> Tensor:
    return v.abs().amax(-1) if v.shape[-1] else v.new_zeros(v.shape[:-1])
