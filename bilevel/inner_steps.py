"""The inner iteration y_{t+1} = Phi_t(y_t, x) of a lower level: forward, pulled back, and pushed forward."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import optree
import torch
from torch import Tensor

from nestopt.implicit import SGD
from nestopt.implicit.differentiable_optimizers import DifferentiableOptimizer
from nestopt.linalg import Status
from nestopt.linalg.autodiff import GraphOperator, evaluate, fresh_leaves, gradient, products, reached_leaves
from nestopt.linalg.isolation import RandomState
from nestopt.linalg.lanczos import extreme_eigenvalues
from nestopt.linalg.result import all_finite
from nestopt.linalg.tree import Ravel

from .counts import Counts
from .oracle import Batch, Slopes, part_of
from .problem import Linearization, Problem, Spaces
from .stochastic import Draw

__all__ = [
    "Carry",
    "InnerSteps",
    "Look",
    "PerStep",
    "Rule",
    "Segment",
    "automatic_rule",
    "curvatures",
    "curvatures_of",
    "data_at",
]

Rule: TypeAlias = DifferentiableOptimizer | Callable[[Any, int], DifferentiableOptimizer]


@dataclass(frozen=True)
class PerStep(Batch):
    """One outer step's data where each inner step has a batch of its own.

    Attributes:
        upper: third argument of `upper`.
        lower: t -> third argument of `lower` at inner step t, the same for the same t: steps are computed again.
    """

    lower: Callable[[int], Any]


def data_at(data: Any, t: int) -> Any:
    """The data of inner step t.

    Args:
        data: of the outer step.
        t: number of the inner step.

    Returns:
        A further draw of a source, PerStep's own batch, or the data as they are.
    """
    if isinstance(data, PerStep):
        return Batch(upper=data.upper, lower=data.lower(t))
    return data.other(t + 1) if isinstance(data, Draw) and not data.complete else data


@dataclass(frozen=True)
class Carry:
    """What one inner step hands to the next.

    Attributes:
        y: raveled lower variable.
        memory: the optimizer's state for it.
    """

    y: Tensor
    memory: Any

    def tensors(self) -> list[Tensor]:
        """Y, and the optimizer's floating tensors."""
        leaves = optree.tree_leaves(vars(self.memory))
        return [self.y, *(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point())]

    def rebuilt(self, tensors: list[Tensor]) -> Carry:
        """The same with other tensors in these places.

        Args:
            tensors: as many as `tensors` gives.

        Returns:
            The carry.
        """
        rest = iter(tensors[1:])
        memory: Any = optree.tree_map(
            lambda leaf: next(rest) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf,
            vars(self.memory),
        )
        return Carry(tensors[0], type(self.memory)(**memory))


@dataclass(frozen=True)
class Segment:
    """Some consecutive inner steps.

    Attributes:
        rule: the optimizer, or (x, t) -> optimizer.
        first: number of the first step.
        count: how many.
        carry: where they start.
        fresh: whether the optimizer's memory begins here.
    """

    rule: Rule
    first: int
    count: int
    carry: Carry = field(repr=False)
    fresh: bool = False


class Look(NamedTuple):
    """Both objectives at one point, without a graph.

    Attributes:
        value: F.
        upper_x: F_x, raveled; an expanded zero where F does not depend on x.
        upper_y: F_y, raveled.
        lower: |f_y|.
        finite: whether both values and all gradients are.
    """

    value: Tensor
    upper_x: Tensor
    upper_y: Tensor
    lower: Tensor
    finite: bool


@dataclass(frozen=True)
class InnerSteps:
    """The inner iteration of one problem with one outer step's data.

    Attributes:
        problem: the problem.
        spaces: of x and y.
        data: of the outer step.
        weight: t -> a_t where the direction is (1 - a_t) f_y + a_t F_y; None for f_y.
        seed: of the random numbers that the objectives draw, each step its own; None where they draw none.
    """

    problem: Problem
    spaces: Spaces
    data: Any = None
    weight: Callable[[int], float] | None = None
    seed: int | None = None

    def step(self, rule: Rule, x_leaves: list[Tensor], carry: Carry, t: int, *, graph: bool) -> tuple[Carry, Tensor]:
        """One step, and the slope that it was taken along.

        Args:
            rule: the optimizer.
            x_leaves: of the upper variable.
            carry: where to start; its y requires grad where a graph is wanted.
            t: the step's number.
            graph: keep the step's graph.

        Returns:
            The next carry, and the slope.
        """
        y = carry.y if graph else _leaf(carry.y)
        x = self.spaces.x.build(x_leaves)
        value = self.seeded(lambda: self._objective(x, y, t), t)
        with torch.set_grad_enabled(graph):
            (slope,) = gradient(value, [y], create_graph=graph, keep=graph)
            optimizer = rule if isinstance(rule, DifferentiableOptimizer) else rule(x, t)
            new, memory = optimizer.step(y if graph else y.detach(), slope, carry.memory)
        return Carry(new, memory), slope

    def first_carry(self, rule: Rule, x: Tensor, y: Tensor, t: int) -> Carry:
        """The start y with the optimizer's first memory."""
        optimizer = rule if isinstance(rule, DifferentiableOptimizer) else rule(self.spaces.x.unflatten(x), t)
        return Carry(y, optimizer.init(y))

    def advance(
        self, segment: Segment, x: Tensor, *, enough: float = -1.0, limit: float = math.inf
    ) -> tuple[Carry, int, float, tuple[int, Status] | None]:
        """Take the segment's steps without a graph.

        Args:
            segment: where from, how, and how many.
            x: raveled upper variable.
            enough: stop where |f_y| is at most this and no weight is on F.
            limit: |y| from which on the iterates count as running away.

        Returns:
            The last carry, the steps taken, the last slope's norm (before the last step, or where it stopped), and the
            number of the step that left the finite numbers or the limit with what it did (the carry is that before it),
            or None.
        """
        x_leaves, carry, size = [leaf.detach() for leaf in self.spaces.x.split(x)], segment.carry, math.inf
        for i in range(segment.count):
            t = segment.first + i
            after, slope = self.step(segment.rule, x_leaves, carry, t, graph=False)
            size = float(slope.norm())
            del slope
            if size <= enough and (self.weight is None or self.weight(t) == 0):
                return carry, i, size, None
            if not float(after.y.norm()) < limit:  # NaN fails it
                return carry, i, size, (t, Status.DIVERGED if all_finite(after.y) else Status.NON_FINITE)
            carry = after
        return carry, segment.count, size, None

    def pull(self, segment: Segment, x: Tensor, cotangents: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """B'a and A'a of a segment, computed again with its graph.

        Args:
            segment: the steps.
            x: raveled upper variable.
            cotangents: a, for the tensors of the carry after them (of y alone where the rest has none).

        Returns:
            The part of the hypergradient, and the cotangents of the carry before them.
        """
        x_leaves = [_leaf(leaf) for leaf in self.spaces.x.split(x)]
        inputs = [_leaf(t) for t in segment.carry.tensors()]
        end = segment.carry.rebuilt(inputs)
        for i in range(segment.count):
            end = self.step(segment.rule, x_leaves, end, segment.first + i, graph=True)[0]  # the slope is not held
        outputs = end.tensors()[: len(cotangents)]
        along = [c.to(o) for c, o in zip(cotangents, outputs, strict=True)]
        pulled = products(outputs, [*x_leaves, *inputs], along, keep=False)
        n = len(x_leaves)
        return self.spaces.x.join(pulled[:n]), pulled[n : n + 1] if segment.fresh else pulled[n:]

    def push(self, segment: Segment, x: Tensor, tangent: Tensor) -> tuple[Carry, Tensor, Tensor]:
        """One step with its tangents: Z <- A Z + B, for the whole carry.

        Args:
            segment: of one step.
            x: raveled upper variable.
            tangent: Z' of shape (upper variables, carry's size).

        Returns:
            The next carry, its tangent, and the slope.
        """
        x_leaves = fresh_leaves(self.spaces.x, self.spaces.x.unflatten(x))
        inputs = [t.detach().clone().requires_grad_() for t in segment.carry.tensors()]
        end, slope = self.step(segment.rule, x_leaves, segment.carry.rebuilt(inputs), segment.first, graph=True)
        outputs = end.tensors()
        m, size = len(tangent), sum(t.numel() for t in inputs)
        tangent = torch.cat([tangent, tangent.new_zeros(m, size - tangent.shape[1])], 1)  # a new memory is constant
        into = Ravel.of(tuple(inputs) + tuple(x_leaves), "carry")
        jacobian = GraphOperator(outputs, [*inputs, *x_leaves], Ravel.of(tuple(outputs), "carry"), into, chunk_size=m)
        moved = jacobian @ torch.cat([tangent, torch.eye(m, dtype=x.dtype, device=x.device)], 1)
        return end.rebuilt([t.detach() for t in outputs]), moved.detach(), slope.detach()

    def data_of(self, t: int) -> Any:
        """The data of inner step t."""
        return data_at(self.data, t)

    def linearize(self, x: Tensor, y: Tensor, t: int) -> Linearization:
        """Both objectives at (x, y) with the data and the random numbers of inner step t."""
        point: Linearization = self.seeded(lambda: Linearization(self.problem, self.spaces, x, y, self.data_of(t)), t)
        return point

    def look(self, x: Tensor, y: Tensor, t: int) -> Look:
        """Both objectives' first-order information at (x, y) with the data and the random numbers of inner step t."""
        found: Look = self.seeded(lambda: self._look(x, y, t), t)
        return found

    def slope(self, x: Tensor, y: Tensor, t: int) -> Tensor:
        """f_y with the data and the random numbers of inner step t."""
        found: Tensor = self.seeded(lambda: self._lower(x, y, self.data_of(t))[1], t)
        return found

    def lower_slopes(self, x: Tensor, y: Tensor, t: int) -> Slopes:
        """The direction's objective at inner step t with its gradients in x and y."""
        oracle = self.problem.oracle(self.spaces, self.data_of(t))
        weight = 0.0 if self.weight is None else self.weight(t)
        slopes: Slopes = self.seeded(lambda: oracle.weighted(x, y, upper=weight or None, lower=1 - weight), t)
        return slopes

    def _look(self, x: Tensor, y: Tensor, t: int) -> Look:
        data, space = self.data_of(t), self.spaces
        x_leaves, y_leaves = ([_leaf(leaf) for leaf in part] for part in (space.x.split(x), space.y.split(y)))
        upper = self._evaluate("upper", space.x.build(x_leaves), space.y.build(y_leaves), data)
        reached = {id(leaf) for leaf in reached_leaves(upper)}
        moving = x_leaves if any(id(leaf) in reached for leaf in x_leaves) else []
        slopes = gradient(upper, [*moving, *y_leaves], keep=False)
        upper_x = space.x.join(slopes[: len(moving)]) if moving else x.new_zeros(1).expand_as(x)
        upper_y = space.y.join(slopes[len(moving) :])
        del slopes
        lower, slope = self._lower(x, y, data)
        parts = (upper, lower, upper_x, upper_y, slope)
        return Look(upper.detach(), upper_x, upper_y, slope.norm(), all(all_finite(part) for part in parts))

    def _lower(self, x: Tensor, y: Tensor, data: Any) -> tuple[Tensor, Tensor]:
        """The value f and its slope f_y."""
        leaves = [_leaf(leaf) for leaf in self.spaces.y.split(y)]
        value = self._evaluate("lower", self.spaces.x.unflatten(x.detach()), self.spaces.y.build(leaves), data)
        return value.detach(), self.spaces.y.join(gradient(value, leaves, keep=False))

    def _objective(self, x: Any, y: Tensor, t: int) -> Tensor:
        data = data_at(self.data, t)
        tree = self.spaces.y.build(self.spaces.y.split(y))
        weight = 0.0 if self.weight is None else self.weight(t)
        total: Tensor = self._evaluate("lower", x, tree, data)
        if weight:
            total = (1 - weight) * total + weight * self._evaluate("upper", x, tree, data)
        return total

    def _evaluate(self, name: str, x: Any, y: Any, data: Any) -> Tensor:
        part = part_of(data, name)
        return evaluate(getattr(self.problem, name), x, y, *(() if part is None else (part,)), name=name)

    def seeded(self, call: Callable[[], Any], t: int) -> Any:
        """Call with the random numbers of inner step t, and leave torch's generators as they were."""
        if self.seed is None:
            return call()
        device = self.spaces.x.device
        places = [torch.device("cpu"), *([device] if device.type == "cuda" else [])]
        states = (torch.Generator(p).manual_seed(self.seed * 1_000_003 + t).get_state() for p in places)
        return RandomState(device, tuple(states)).run(call)


def _leaf(t: Tensor) -> Tensor:
    """A new leaf with the tensor's own memory; an inference tensor, which cannot require grad, is copied."""
    with torch.inference_mode(False):
        return (t.clone() if t.is_inference() else t.detach()).requires_grad_()


def automatic_rule(
    steps: InnerSteps, x: Tensor, y: Tensor, t: int, shorten: float = 1.0
) -> tuple[SGD, float, bool, Counts]:
    """Heavy ball with Polyak's coefficients for the curvatures of f that Lanczos sees at a point.

    lr = 4 / (sqrt(L) + sqrt(m))^2 and momentum = ((sqrt(L) - sqrt(m)) / (sqrt(L) + sqrt(m)))^2, with m a hundredth of L
    where the smallest curvature is not positive.

    Args:
        steps: of the problem.
        x: raveled upper variable.
        y: raveled lower variable.
        t: number of the inner step whose data are looked at.
        shorten: factor on L.

    Returns:
        The optimizer, its rate of convergence on a quadratic, whether f is flat in some direction, and the cost.
    """
    point = steps.linearize(x, y, t)
    ends = extreme_eigenvalues(point.hessian, steps=60, rtol=0.05)
    counts = Counts(1, 1, int(ends.products))
    high, low = float(ends.highest), float(ends.lowest)
    top = max(abs(high), abs(low))
    if steps.weight is not None and steps.weight(t):  # F is in the direction as well
        leaves = fresh_leaves(steps.spaces.y, steps.spaces.y.unflatten(y))
        part = part_of(data_at(steps.data, t), "upper")
        arguments = steps.spaces.x.unflatten(x), steps.spaces.y.build(leaves), *(() if part is None else (part,))
        value = steps.seeded(lambda: evaluate(steps.problem.upper, *arguments, name="upper"), t)
        space = steps.spaces.y
        upper = GraphOperator(gradient(value, leaves, create_graph=True), leaves, space, space, symmetric=True)
        seen = extreme_eigenvalues(upper, steps=30, rtol=0.05, need_lowest=False)
        top = max(top, abs(float(seen.highest)), abs(float(seen.lowest)))
        counts += Counts(1, 0, int(seen.products))
    if not top > 0 or not math.isfinite(top):
        return SGD(1.0), 0.5, True, counts
    flat = low <= 1e3 * torch.finfo(y.dtype).eps * top
    least = 0.01 * top if flat else 0.95 * low
    big, small = math.sqrt(1.02 * top * shorten), math.sqrt(min(least, top))
    root = (big - small) / (big + small)
    return SGD(4 / (big + small) ** 2, momentum=root**2), root, flat, counts


def curvatures(rule: SGD) -> tuple[float, float]:
    """The constants L and m, from Polyak's coefficients of them.

    Args:
        rule: of `automatic_rule`.

    Returns:
        The largest and the smallest curvature that it was made for.
    """
    return curvatures_of(float(rule.lr), float(rule.momentum))


def curvatures_of(lr: float, momentum: float) -> tuple[float, float]:
    """`curvatures` of plain numbers, NaN where they are.

    Args:
        lr: of the rule.
        momentum: of the rule.

    Returns:
        L and m.
    """
    root = math.sqrt(max(momentum, 0.0))
    total = 2 / math.sqrt(lr)  # sqrt(L) + sqrt(m)
    return (total * (1 + root) / 2) ** 2 / 1.02, (total * (1 - root) / 2) ** 2
