"""Real-time forward differentiation: x moves while the inner optimizer runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.implicit import SGD
from nestopt.linalg import Status, Stopping
from nestopt.linalg.result import all_finite

from .assumptions import Assumptions
from .counts import Counts
from .inner_steps import Carry, InnerSteps, Rule, Segment, automatic_rule, curvatures
from .problem import Problem
from .through_solver import ThroughSolver, ThroughState
from .unrolled import tangent_residual

__all__ = ["RealTime"]

_RUNNING = Status.RUNNING.code
_THETA = 0.05  # how small |f_y| and the tangent's residual are, in upper ones, when x may move


@dataclass(frozen=True)
class RealTime(ThroughSolver):
    """Forward-mode hypergradients on line (RTHO): y and its tangent are carried on, and x moves every few inner steps.

    One outer step takes `steps` inner steps at the present x, with Z <- A_t Z + B_t, and then g = F_x + Z' F_y. The
    inner optimizer, its memory and Z are never started anew, so that Z follows dy*/dx as y follows y*. With the
    automatic upper rules x waits until |f_y| and the bias of g are below 1/20 of the upper residual, and a trial that
    the rule refuses is taken back with its y and Z; with ConstantStep, or TorchOptimizer, x moves at every outer step
    as in the paper.

    `error` is the largest of |f_y|, |F_y| |f_yy Z + f_yx| / m (m the smallest curvature: a bound of the hypergradient's
    bias) and |P_X(x - g) - x|, at the point returned; CONVERGED means error <= max(rtol (|F_x| + |F_y|), atol) with the
    scale taken at the start.

    Cost of an outer step: `steps` gradients of f, each with as many products as there are upper variables: for few of
    them. Memory: Z.

    Args:
        steps: inner steps of an outer one.
        optimizer: the inner one; None for heavy ball of automatic coefficients, which follow x.
        upper_step: None for QuasiNewtonStep() on the whole space and SpectralStep() on a set; ConstantStep(size) to
            follow the paper.
        stopping: rtol None is 1e-7 in float64 and 1e-4 in float32.
        warm_start: must be True here.
        max_inner: not used; `steps` says how many.
        seed: of the random numbers that the objectives draw.

    Raises:
        ValueError: without steps or warm start.

    Reference:
        Franceschi, Donini, Frasconi & Pontil 2017, section 3.2 (RTHO).

    Example:
        >>> from nestopt import bilevel
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y: ((y - 1) ** 2).sum(), lower=lambda x, y: ((y - x) ** 2).sum() + 0.5 * (y**2).sum()
        ... )
        >>> res = bilevel.RealTime()(problem, torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
        >>> res.status.name, [round(v, 5) for v in res.x.tolist()]
        ('CONVERGED', [1.5, 1.5])
    """

    steps: int | None = 20
    stopping: Stopping = Stopping(rtol=None, max_iter=2000)

    assumptions: ClassVar[Assumptions] = Assumptions("through the solver", "Franceschi et al. 2017", products=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is None or not self.warm_start:
            raise ValueError("RealTime: y and its tangent are carried on every few steps; give steps, and warm_start.")

    def init(self, problem: Problem, x0: Any, y0: Any, data: Any = None) -> ThroughState:
        """Check the problem, and take the first inner steps at the projection of x0.

        Args:
            problem: with a smooth, unconstrained lower level.
            x0: upper start.
            y0: where the inner steps start.
            data: third argument of the objectives, if they take one.

        Returns:
            The evaluated state.

        Raises:
            TypeError: see `hypergradient`.
            ValueError: see `hypergradient`; or for an inner step size that cannot work, with its bound.
        """
        steps, s, counts = self._begin(problem, x0, y0, data)
        s = replace(s, y_first=s.y_vector)
        carry = steps.first_carry(self._optimizer(s.coefficients), s.x_vector, s.y_vector, 0)
        tangent = s.x_vector.new_zeros(s.spaces.x.size, s.spaces.y.size)
        kept = {"x": s.x_vector, "y": carry.y, "optimizer": vars(carry.memory), "tangent": tangent}
        s = replace(s, counts=counts, iterations=torch.tensor(-1), memory={**kept, "anchor": None})
        return self._look(problem, s, steps)

    def step(self, problem: Problem, state: ThroughState, data: Any = None) -> ThroughState:
        """Take the next inner steps, then move x.

        Args:
            problem: the problem.
            state: the state.
            data: third argument of the objectives, if they take one.

        Returns:
            The next state.
        """
        return self._look(problem, state, self._inner(problem, state.spaces, data, int(state.seed)))

    @property
    def _needs_curvature(self) -> bool:
        return True

    def _optimizer(self, coefficients: Tensor) -> Rule:
        if self.optimizer is not None:
            return self.optimizer
        lr, momentum = (float(c) for c in coefficients)
        return SGD(lr, momentum=momentum)

    def _look(self, problem: Problem, s: ThroughState, steps: InnerSteps) -> ThroughState:
        m, t, k = s.memory, int(s.inner), int(s.iterations) + 1
        x, rule = m["x"], self._optimizer(s.coefficients)
        blank = steps.first_carry(rule, x, m["y"], t)
        carry, tangent = Carry(m["y"], type(blank.memory)(**m["optimizer"])), m["tangent"]
        assert self.steps is not None
        anchor, fault, at = m["anchor"], None, int(s.diverged_at)
        for i in range(t, t + self.steps):
            after, moved, _ = steps.push(Segment(rule, i, 1, carry), x, tangent)
            if not (all_finite(moved) and float(after.y.norm()) < 1e10 * (1 + float(s.y_first.norm()))):
                fault, at = Status.DIVERGED if all_finite(after.y) else Status.NON_FINITE, i
                break
            carry, tangent = after, moved
        inner = t + self.steps
        point = steps.linearize(x, carry.y, inner)
        counts = s.counts + Counts(1, 1 + self.steps, len(x) * (self.steps + 2))
        z = tangent[:, : s.spaces.y.size]
        g = point.upper_x + z @ point.upper_y
        residuals = {
            "lower": point.lower_y.norm(),
            "adjoint": tangent_residual(point, z, max(float(s.curvature), torch.finfo(x.dtype).tiny)),
            "upper": (problem.project(x - g, s.spaces) - x).norm(),
        }
        s = replace(
            s, counts=counts, iterations=torch.tensor(k), inner=torch.tensor(inner), diverged_at=torch.tensor(at)
        )
        if fault is None and not (point.finite() and all_finite(g)):
            fault = Status.NON_FINITE
        if fault is not None and anchor is None:
            return replace(s, codes=torch.tensor(fault.code), residuals=residuals)
        here = {"x": x, "y": carry.y, "optimizer": vars(carry.memory), "tangent": tangent}
        upper_rule = self._rule(problem)
        waits = float(torch.maximum(residuals["lower"], residuals["adjoint"])) > max(
            0.1 * float(s.tolerance), _THETA * float(residuals["upper"])
        )
        if fault is None and self.upper_step is None and waits:
            s = self._at(s, x, carry.y, point.upper, g, residuals)
            return replace(s, memory={**here, "anchor": anchor})
        taken = True
        if anchor is None:
            after_rule = upper_rule.start(x, g, point.upper)
        else:
            dx = x - anchor["x"]
            spread = point.upper_y.norm() * (residuals["lower"] + anchor["residuals"]["lower"])
            noise = 10 * torch.finfo(x.dtype).eps * float(point.upper.abs()) + float(spread / s.curvature)
            taken = fault is None and upper_rule.accepts(s.rule, dx, anchor["g"], point.upper, noise)
            change = g - anchor["g"] if taken else None
            value = point.upper if fault is None else torch.full_like(point.upper, torch.nan)
            after_rule = upper_rule.after(s.rule, dx, change, value)
        if taken:
            anchor = {**here, "g": g, "residuals": residuals, "value": point.upper}
        move = after_rule.size * upper_rule.direction(after_rule, anchor["g"])
        eps = torch.finfo(x.dtype).eps
        stuck = not taken and float(move.norm()) <= 4 * eps * max(float(anchor["x"].norm()), eps)
        code = (fault or Status.LINE_SEARCH_FAILED).code if stuck else _RUNNING
        s = self._at(s, anchor["x"], anchor["y"], anchor["value"], anchor["g"], anchor["residuals"])
        further = problem.project(anchor["x"] + move, s.spaces)
        kept = {name: anchor[name] for name in ("y", "optimizer", "tangent")}
        if self.optimizer is None:  # the curvature moves with x
            found, _, _, spent = automatic_rule(steps, further, anchor["y"], inner)
            low = curvatures(found)[1]
            s = replace(
                s, coefficients=x.new_tensor([found.lr, found.momentum]), curvature=x.new_tensor(low),
                counts=s.counts + spent,
            )  # fmt: skip
        return replace(s, rule=after_rule, codes=torch.tensor(code), memory={"x": further, **kept, "anchor": anchor})

    @staticmethod
    def _at(
        s: ThroughState, x: Tensor, y: Tensor, value: Tensor, g: Tensor, residuals: dict[str, Tensor]
    ) -> ThroughState:
        error = torch.stack(list(residuals.values())).amax()
        return replace(s, x_vector=x, y_vector=y, value=value, hypergradient=g, residuals=residuals, error=error)
