"""What is refused before the first inner step: silent zeros, and step sizes that cannot work."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nestopt.implicit import SGD
from nestopt.implicit.differentiable_optimizers import DifferentiableOptimizer
from nestopt.linalg.autodiff import captured_leaves, fresh_leaves, reached_leaves
from nestopt.linalg.guard import describe_captured
from nestopt.linalg.tree import leaf_paths

from .counts import Counts
from .inner_steps import InnerSteps, Rule
from .lipschitz import largest_curvature
from .problem import Linearization

__all__ = ["check_used", "refuse_step_size"]


def check_used(point: Linearization, steps: InnerSteps, rule: Rule | None, x: Tensor, y: Tensor, horizon: int) -> None:
    """Refuse captured tensors, and upper variables that neither the objectives nor the optimizer use.

    Args:
        point: both objectives at the start.
        steps: the inner iteration.
        rule: the optimizer, None for an automatic one.
        x: raveled upper variable.
        y: raveled lower variable.
        horizon: inner steps among which a function's optimizer may use a variable.

    Raises:
        UndifferentiableError: see `Linearization.check_twice_differentiable`.
        ValueError: naming the function and the variable.
    """
    if rule is None or isinstance(rule, DifferentiableOptimizer):
        point.check()
        return
    known = [*point.x_leaves, *point.y_leaves]
    used: set[int] = set()
    for name, value in (("upper", point.upper_graph), ("lower", point.lower_graph)):
        captured = captured_leaves(value, known)
        if captured:
            raise ValueError(
                f"{name} uses tensors that require grad and are neither in x nor in y: "
                f"{describe_captured(getattr(steps.problem, name), captured)}; their gradient would be dropped. Put "
                "them into x or y, or detach them."
            )
        used |= {id(leaf) for leaf in reached_leaves(value)}
    point.check_twice_differentiable()
    leaves = fresh_leaves(steps.spaces.x, steps.spaces.x.unflatten(x))
    unused = [i for i, leaf in enumerate(point.x_leaves) if id(leaf) not in used]
    for t in range(horizon):
        if not unused:
            return
        carry = steps.first_carry(rule, x, y.clone().requires_grad_(), t)
        after, _ = steps.step(rule, leaves, carry, t, graph=True)
        reached = {id(leaf) for leaf in reached_leaves(after.y)}
        unused = [i for i in unused if id(leaves[i]) not in reached]
    if unused:
        paths = leaf_paths(steps.spaces.x.build(leaves), "x")
        raise ValueError(
            f"{', '.join(paths[i] for i in unused)} is used by neither upper, lower nor the optimizer, so its "
            "hypergradient would be a silent zero; use it, or take it out of x (look for .detach() and "
            "torch.no_grad())."
        )


def refuse_step_size(
    owner: str, rule: Rule | None, steps: InnerSteps, x: Tensor, y: Tensor, top: float | None = None
) -> Counts:
    """Refuse a constant step size that runs away on the curvature seen.

    Args:
        owner: the method's name.
        rule: the optimizer.
        steps: the inner iteration.
        x: raveled upper variable.
        y: raveled lower variable.
        top: largest curvature of f there; None to look for it by differences of ten gradients.

    Returns:
        What looking has cost.

    Raises:
        ValueError: with the bound, 2 (1 + momentum) / (top + weight_decay), over 1 - dampening or with nesterov over
            1 + 2 momentum.
    """
    if not isinstance(rule, SGD) or rule.maximize:
        return Counts()
    if not all(isinstance(v, (int, float)) for v in (rule.lr, rule.momentum, rule.dampening, rule.weight_decay)):
        return Counts()
    # the root of the step's characteristic polynomial that leaves the unit circle first does so at -1
    share = 1.0
    if rule.momentum:
        share = 1 + 2 * rule.momentum if rule.nesterov else 1 - rule.dampening
    reach = 2 * (1 + rule.momentum) / share if share > 0 else math.inf
    counts = Counts()
    if top is None:
        seen, where = largest_curvature(lambda v: steps.slope(x, v, 0), y)
        top, counts = float(seen), Counts(lower_gradients=11)
        if rule.lr * (top + rule.weight_decay) >= reach:  # a product, unlike a difference, never says too much
            top = float(torch.dot(where, steps.linearize(x, y, 0).hessian @ where))
    bound = reach / (top + rule.weight_decay) if top > 0 else math.inf
    if rule.lr >= bound:
        raise ValueError(
            f"{owner}: steps of lr {rule.lr:g} with momentum {rule.momentum:g} run away on a lower level of curvature "
            f"{top:.3g}; lr must be below {bound:.3g}, or leave the optimizer out (None), which finds it."
        )
    return counts
