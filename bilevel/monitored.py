"""Single-loop steps that need no tuning where nothing is random: exact line searches, and an upper level that waits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nestopt.linalg import LinearOperator, Status
from nestopt.linalg.autodiff import GraphOperator, evaluate, fresh_leaves, gradient
from nestopt.linalg.result import all_finite

from .counts import Counts
from .oracle import part_of
from .problem import Linearization, Problem, Spaces
from .upper_step import StepState, UpperStep

__all__ = ["Anchor", "Descent", "LowerPoint", "Monitored", "Seen"]


class LowerPoint(NamedTuple):
    """f at one (x, y) with what a step in y needs; a Linearization has the same three.

    Attributes:
        lower: f(x, y).
        lower_y: f_y, raveled.
        hessian: f_yy.
    """

    lower: Tensor
    lower_y: Tensor
    hessian: LinearOperator

    @classmethod
    def at(cls, problem: Problem, spaces: Spaces, x: Tensor, y: Tensor, data: Any) -> LowerPoint:
        """Evaluate f with its gradient's graph."""
        leaves = fresh_leaves(spaces.y, spaces.y.unflatten(y))
        part = part_of(data, "lower")
        arguments = (spaces.x.unflatten(x), spaces.y.build(leaves), *(() if part is None else (part,)))
        value = evaluate(problem.lower, *arguments, name="lower")
        graph = gradient(value, leaves, create_graph=True)
        hessian = GraphOperator(graph, leaves, spaces.y, spaces.y, symmetric=True)
        return cls(value.detach(), spaces.y.join(graph).detach(), hessian)


def _conjugate(r: Tensor, before: tuple[Tensor, Tensor] | None) -> Tensor:
    """Polak and Ribiere's direction with its restart: r + max(0, r'(r - r0) / r0'r0) d0."""
    if before is None:
        return r
    r0, d0 = before
    size = torch.dot(r0, r0)
    beta = torch.where(size > 0, torch.dot(r, r - r0) / size, 0.0).clamp_min(0.0)
    d = r + beta * d0
    return torch.where(torch.dot(r, d) > 0, d, r)


@dataclass(frozen=True)
class Descent:
    """Where y stands and where it goes next: a conjugate direction with the exact step along f's curvature.

    Attributes:
        y: last accepted point.
        residual: -f_y there.
        direction: d.
        size: -f_y'd / d'f_yy d; twice the last one where the curvature is not positive; halved by a rejected trial.
        slope: -f_y'd.
        value: f there.
        high: largest |f_yy d| / |d| seen.
    """

    y: Tensor
    residual: Tensor
    direction: Tensor
    size: Tensor
    slope: Tensor
    value: Tensor
    high: Tensor

    @classmethod
    def at(cls, point: LowerPoint | Linearization, y: Tensor, before: Descent | None = None) -> Descent:
        """The next direction from y, by one product."""
        r = -point.lower_y
        d = _conjugate(r, None if before is None else (before.residual, before.direction))
        image, length = point.hessian @ d, d.norm()
        seen = torch.where(length > 0, image.norm() / length, 0.0)
        high = seen if before is None else torch.maximum(seen, before.high)
        slope, curvature = torch.dot(r, d), torch.dot(d, image)
        eps = torch.finfo(y.dtype).eps
        grown = 1 / high if before is None else torch.maximum(2 * before.size, 1 / high)
        size = torch.where(curvature > 10 * eps * high * length.square(), slope / curvature, grown)
        return cls(y, r, d, torch.where(length > 0, size, 0.0), slope, point.lower, high)

    @property
    def trial(self) -> Tensor:
        """The next point to look at."""
        return self.y + self.size * self.direction

    def accepts(self, value: Tensor) -> bool:
        """Armijo's test up to rounding; NaN fails it."""
        noise = 10 * torch.finfo(value.dtype).eps * self.value.abs()
        return bool(value <= self.value - 1e-4 * self.size * self.slope + noise)

    def after(self, point: LowerPoint | Linearization) -> Descent:
        """The descent after its trial was looked at: onwards from there, or half as far from y."""
        if self.accepts(point.lower) and all_finite(point.lower_y):
            return Descent.at(point, self.trial, self)
        return replace(self, size=self.size * (0.5 if all_finite(point.lower) else 0.1))


@dataclass(frozen=True)
class Anchor:
    """The last accepted (x, y, v), to go back to.

    Attributes:
        x: raveled upper variable.
        y: raveled lower variable.
        v: adjoint.
        g: hypergradient.
        value: F(x, y).
        residuals: the named parts of the error there.
    """

    x: Tensor
    y: Tensor
    v: Tensor
    g: Tensor
    value: Tensor
    residuals: dict[str, Tensor]


class Seen(NamedTuple):
    """One look at (x, y, v), after the adjoint's own steps there.

    Attributes:
        point: the linearized objectives.
        descent: of y.
        v: adjoint.
        r: F_y - H v.
        pair: residual and direction of the adjoint's last step.
        g: F_x - f_xy v.
        low: least curvature seen.
        fault: why H is of no use, or None.
        counts: what it cost.
    """

    point: Linearization
    descent: Descent
    v: Tensor
    r: Tensor
    pair: tuple[Tensor, Tensor]
    g: Tensor
    low: Tensor
    fault: Status | None
    counts: Counts

    @property
    def merit(self) -> Tensor:
        """F - v'f_y: the hyperobjective up to the product of both residuals."""
        return self.point.upper - torch.dot(self.v, self.point.lower_y)


@dataclass(frozen=True)
class Monitored:
    """One problem's single-loop steps of automatic size.

    A step moves y and v `inner` times each along conjugate directions, with the exact line search r'd / d'H d; trials
    in y must lower f. x moves by its rule when |f_y| and |F_y - H v| are below 1/20 of the upper residual (or a tenth
    of the tolerance): until then its step size is zero. The rule compares F - v'f_y, which differs from the
    hyperobjective by the product of both residuals only; a trial that it refuses is taken back.

    Args:
        problem: whose lower level may be a blend of both objectives.
        spaces: of x and y.
        rule: of the steps in x.
        inner: steps in y and in v for one look.
        data: third argument of the objectives.
    """

    problem: Problem
    spaces: Spaces
    rule: UpperStep
    inner: int = 1
    data: Any = None

    def descend(self, x: Tensor, y: Tensor, descent: Descent | None) -> tuple[Descent, Linearization, Counts]:
        """`inner` steps in y, the last one looked at with both objectives."""
        counts = Counts()
        if descent is None:
            descent = Descent.at(LowerPoint.at(self.problem, self.spaces, x, y, self.data), y)
            counts += Counts(lower_gradients=1, products=1)
        for _ in range(self.inner - 1):
            descent = descent.after(LowerPoint.at(self.problem, self.spaces, x, descent.trial, self.data))
            counts += Counts(lower_gradients=1, products=1)
        point = Linearization(self.problem, self.spaces, x, descent.trial, self.data)
        counts += Counts(1, 1, 1)
        after = descent.after(point)
        if after.y is descent.y:  # taken back: both objectives must be known where y is
            point = Linearization(self.problem, self.spaces, x, descent.y, self.data)
            counts += Counts(1, 1)
        return after, point, counts

    def look(
        self, x: Tensor, y: Tensor, v: Tensor, descent: Descent | None, before: tuple[Tensor, Tensor] | None
    ) -> Seen:
        """Step in y, then in v, and form the hypergradient.

        Args:
            x: raveled upper variable.
            y: raveled lower variable.
            v: adjoint.
            descent: of y at this x, None to begin one.
            before: residual and direction of the last step in v, None to begin anew.

        Returns:
            What is seen there.
        """
        descent, point, counts = self.descend(x, y, descent)
        eps, fault = torch.finfo(x.dtype).eps, None
        r = point.upper_y - point.hessian @ v
        high, low = descent.high, torch.full_like(descent.high, torch.inf)
        for _ in range(self.inner):
            q = _conjugate(r, before)
            image, square = point.hessian @ q, torch.dot(q, q)
            curvature = torch.dot(q, image)
            counts += Counts(products=1)
            if not square > 0:
                break
            high = torch.maximum(high, image.norm() / square.sqrt())
            if curvature <= 10 * eps * high * square:
                fault = Status.NEGATIVE_CURVATURE if curvature < -10 * eps * high * square else Status.SINGULAR
                break
            low = torch.minimum(low, curvature / square)
            size = torch.dot(r, q) / curvature
            before, v = (r, q), v + size * q
            r = r - size * image
        g = point.upper_x - point.cross.T @ v
        pair = (r, r) if before is None else before
        return Seen(point, replace(descent, high=high), v, r, pair, g, low, fault, counts + Counts(products=2))

    def begin(self, x: Tensor, seen: Seen) -> StepState:
        """The rule's memory at the first point where x may move."""
        return self.rule.start(x, seen.g, seen.merit)

    def trial(self, rule: StepState, anchor: Anchor) -> Tensor:
        """Where x goes next from the anchor."""
        step = rule.size * self.rule.direction(rule, anchor.g)
        return self.problem.project(anchor.x + step, self.spaces)

    def judge(self, rule: StepState, anchor: Anchor, x: Tensor, seen: Seen) -> tuple[bool, StepState]:
        """Whether a trial that has been looked at closely is taken, and the rule's memory after it."""
        dx, merit = x - anchor.x, seen.merit
        error = torch.where(torch.isfinite(seen.low), seen.point.lower_y.norm() * seen.r.norm() / seen.low, 0.0)
        noise = float(10 * torch.finfo(x.dtype).eps * seen.point.upper.abs() + error)
        if seen.fault is None and self.rule.accepts(rule, dx, anchor.g, merit, noise):
            return True, self.rule.after(rule, dx, seen.g - anchor.g, merit)
        return False, self.rule.after(rule, dx, None, merit)
