"""One automatic step of the single loop where nothing is random: y and v move, and x when it need not wait for them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nestopt.linalg import Status
from nestopt.linalg.result import all_finite

from .estimators import Pieces
from .monitored import Anchor, Descent, Monitored, Seen
from .problem import Problem
from .upper_step import StepState

if TYPE_CHECKING:
    from .single_loop import SingleLoop, SingleLoopState

__all__ = ["FIRST_SHARE", "waiting_step"]

FIRST_SHARE = 0.05  # of the upper residual, below which the lower and the adjoint one must be for x to move
_LEAST_SHARE = 1e-4


def waiting_step(method: SingleLoop, problem: Problem, s: SingleLoopState, data: Any) -> SingleLoopState:
    """Move x if the last step left it free to, then y and v, and judge where that leads.

    The state's memory holds the last accepted point (`anchor`), the descent in y and the adjoint's last direction at
    the present x, whether x is free to move (`ready`), the share of the upper residual that the others may have, the
    weight of F in the lower level, and whether a new weight has begun a `round`.

    Args:
        method: whose rule, weights and certificate are asked.
        problem: the problem.
        s: the state.
        data: everything, or None.

    Returns:
        The next state.
    """
    m = s.memory
    anchor = Anchor(**m["anchor"]) if "anchor" in m else None
    blend, blended = method.blended(problem, data, m["weight"])
    loop = Monitored(blend, s.spaces, method.rule_of(problem), method.inner, blended)
    if m["ready"] and anchor is not None:
        x = loop.trial(s.rule, anchor)
        seen = loop.look(x, anchor.y, anchor.v, None, None)
    else:
        x = s.x_vector
        descent = Descent(**m["descent"]) if "descent" in m else None
        seen = loop.look(x, s.y_vector, s.adjoint, descent, m["pair"] if descent is not None else None)
    s = replace(s, counts=s.counts + seen.counts)
    there = _there(method, problem, s, x, seen)
    limit = torch.maximum(m["share"] * there.residuals["upper"], 0.1 * s.tolerance)
    settled = bool((seen.point.lower_y.norm() <= limit) & (seen.r.norm() <= limit))
    fault = _fault(s, seen)
    if fault is seen.fault and settled and bool(seen.r.norm() <= s.tolerance):
        fault = None  # what is left along a flat direction is rounding
    if fault is not None and (anchor is None or "round" in m):
        return replace(s, codes=torch.tensor(fault.code))
    if fault is None and not settled:
        return replace(there, memory={**m, "descent": vars(seen.descent), "pair": seen.pair, "ready": False})
    if anchor is None:
        return _accept(method, there, loop.begin(x, seen))
    if "round" in m:
        return _accept(method, there, replace(s.rule, values=seen.merit[None]))
    if fault is not None:
        rule = loop.rule.after(s.rule, x - anchor.x, None, x.new_tensor(torch.nan))
        return _reject(replace(s, memory={**m, "flaw": fault.code}), loop, anchor, rule)
    taken, rule = loop.judge(s.rule, anchor, x, seen)
    if taken:
        return _accept(method, there, rule)
    return _reject(s, loop, anchor, rule)


def _there(method: SingleLoop, problem: Problem, s: SingleLoopState, x: Tensor, seen: Seen) -> SingleLoopState:
    """The state at the point that was looked at, with its certificate."""
    point = seen.point
    there = replace(
        s, x_vector=x, y_vector=seen.descent.y, adjoint=seen.v, hypergradient=seen.g, value=point.upper
    )  # fmt: skip
    pieces = Pieces(
        point.lower_y, point.upper_y - seen.r, point.upper_x - seen.g, point.upper_x, point.upper_y
    )  # fmt: skip
    return replace(there, **method.certificate(problem, there, pieces))


def _fault(s: SingleLoopState, seen: Seen) -> Status | None:
    if not (seen.point.finite() and all_finite(seen.g)):
        return Status.NON_FINITE
    runs_away = bool(seen.descent.y.norm() > 1e10 * (1 + s.memory["reach"]))
    return Status.DIVERGED if runs_away else seen.fault


def _accept(method: SingleLoop, s: SingleLoopState, rule: StepState) -> SingleLoopState:
    """X may move on from here."""
    anchor = Anchor(s.x_vector, s.y_vector, s.adjoint, s.hypergradient, s.value, s.residuals)
    kept = {name: value for name, value in s.memory.items() if name not in ("round", "descent", "pair", "flaw")}
    memory = {**kept, "anchor": vars(anchor), "ready": True}
    weight = method.next_weight(s, s.residuals["upper"])
    if weight != s.memory["weight"]:
        memory |= {"weight": weight, "ready": False, "round": True}
    return replace(s, rule=rule, memory=memory)


def _reject(s: SingleLoopState, loop: Monitored, anchor: Anchor, rule: StepState) -> SingleLoopState:
    """Back to the anchor, for a shorter step from there after a closer look."""
    eps = torch.finfo(anchor.x.dtype).eps
    step = float((rule.size * loop.rule.direction(rule, anchor.g)).norm())
    stuck = step <= 4 * eps * max(float(anchor.x.norm()), eps)
    why = s.memory.get("flaw", Status.LINE_SEARCH_FAILED.code)  # a flaw of H on the way explains why nothing helped
    kept = {name: value for name, value in s.memory.items() if name not in ("descent", "pair")}
    share = (s.memory["share"] / 2).clamp_min(_LEAST_SHARE)
    return replace(
        s, x_vector=anchor.x, y_vector=anchor.y, adjoint=anchor.v, hypergradient=anchor.g, value=anchor.value,
        residuals=anchor.residuals, error=torch.stack(list(anchor.residuals.values())).amax(), rule=rule,
        memory={**kept, "share": share, "ready": True},
        codes=torch.tensor(why if stuck else Status.RUNNING.code),
    )  # fmt: skip
