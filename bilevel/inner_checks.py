"""What is refused before the first inner step: silent zeros, and step sizes that cannot work."""

from __future__ import annotations

import math

from torch import Tensor

from nestopt.implicit import SGD
from nestopt.implicit.differentiable_optimizers import DifferentiableOptimizer
from nestopt.linalg.autodiff import captured_leaves, fresh_leaves, reached_leaves
from nestopt.linalg.guard import describe_captured
from nestopt.linalg.tree import leaf_paths

from .inner_steps import InnerSteps, Rule
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


def refuse_step_size(owner: str, rule: Rule | None, top: float) -> None:
    """Refuse a constant step size that runs away on the curvature seen.

    Args:
        owner: the method's name.
        rule: the optimizer.
        top: largest curvature of f.

    Raises:
        ValueError: with the bound, 2 (1 + momentum) / top.
    """
    if not isinstance(rule, SGD) or rule.nesterov:
        return
    if not all(isinstance(v, (int, float)) for v in (rule.lr, rule.momentum)):
        return
    bound = 2 * (1 + rule.momentum) / top if top > 0 else math.inf
    if rule.lr >= bound:
        raise ValueError(
            f"{owner}: steps of lr {rule.lr:g} with momentum {rule.momentum:g} run away on a lower level of curvature "
            f"{top:.3g}; lr must be below {bound:.3g}, or leave the optimizer out (None), which finds it."
        )
