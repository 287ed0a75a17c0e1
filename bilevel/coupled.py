"""What the methods for coupled constraints share: their state, and quasi-Newton steps on the penalised potential."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nestopt.linalg import Status, Stopping

from .counts import Counts
from .inner_minimizer import Inner, accelerated_dual, minimize_inner, row_scales
from .joint_projection import JointSet, Projection, Rows
from .linearized_set import clip_multipliers
from .lipschitz import largest_curvature
from .method import Method, MethodState
from .multipliers import MultiplierState, clip_code, probe_rows, refuse_changed_rows
from .oracle import Oracle
from .penalty import PenaltyMethod
from .problem import Problem
from .upper_step import QuasiNewtonStep, SpectralStep, StepState
from .value_difference import ValueDifference

__all__ = ["CoupledMethod", "CoupledState", "Gap", "Moved"]

_AT_CLIP = 100  # steps in a row after which a multiplier at its clip ends the run
_START_ROUNDS = 50
_STALL = 60  # steps without a tenth off the error, which rounding and the inner accuracy then hold
_SAFETY = 1.2  # on a curvature estimated from below


@dataclass(frozen=True, kw_only=True)
class CoupledState(MultiplierState):
    """Where LV-HBA or BiC-GAFFA stands, with theta the lower level's proximal point at (x, y).

    Attributes:
        anchor: z, the multipliers that lam is held to.
        values: the scaled constraints at (x, y).
        rows: their linear model there.
        upper_slope: gradient of F in (x, y, z).
        gap_slope: gradient of the gap f - v in (x, y, z).
        gap: its value.
        inner: residual of theta.
        best: smallest error of this penalty so far.
        stalled: steps since it was last lowered by a tenth.
    """

    anchor: Tensor
    values: Tensor
    rows: Rows
    upper_slope: Tensor
    gap_slope: Tensor
    gap: Tensor
    inner: Tensor
    best: Tensor
    stalled: Tensor


class Moved(NamedTuple):
    """Where a step has led.

    Attributes:
        point: (x, y).
        rows: the constraints' model there.
        values: the scaled constraints there; None where they were not needed.
    """

    point: Tensor
    rows: Rows
    values: Tensor | None = None


class Gap(NamedTuple):
    """The gap f - v that the penalty holds down.

    Attributes:
        value: of the gap.
        slope: in (x, y, z).
        lower: how far y is from a lower solution, in the units of f_y.
        dual: how far z is from a multiplier.
        values: the scaled constraints at (x, y), None where the gap does not ask for them.
    """

    value: Tensor
    slope: Tensor
    lower: Tensor
    dual: Tensor
    values: Tensor | None = None


@dataclass(frozen=True)
class CoupledMethod(PenaltyMethod):
    """A penalty on a gap that is known through an inner minimisation, by spectral projected gradients or as published.

    With no step sizes given, u = (x, y, z) takes quasi-Newton steps along the feasible set, u+ = P(u - size B D), D the
    projected gradient of F / c + gap, with an Armijo test on F / c + gap; the inner problem is solved to a hundredth of
    what the stationarity still allows, and c grows whenever the bias is what is left of the error. A subclass writes
    the gap, the projection and the published step.
    """

    gamma1: float = 1.0
    gamma2: float = 1.0
    c0: float = 1.0
    power: float = 0.3
    c_max: float = 1e8
    radius: float = 1e3
    step_size: float | None = None
    inner_step_size: float | None = None
    dual_step_size: float | None = None
    scale_rows: bool = True
    debias: Method | None = ValueDifference()
    stopping: Stopping = Stopping(rtol=None, max_iter=2000)

    State: ClassVar[type[MethodState]] = CoupledState
    parts: ClassVar[dict[str, type]] = {"counts": Counts, "rule": StepState, "rows": Rows}
    stays_feasible: ClassVar[bool]

    def __post_init__(self) -> None:
        for name in ("gamma1", "gamma2", "c0", "c_max", "radius"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{self._name}: {name} must be a finite number > 0, but got {getattr(self, name)}.")
        if not 0 <= self.power < 0.5:
            raise ValueError(
                f"{self._name}: power must be in [0, 1/2), beyond which the penalty outgrows the steps, but got "
                f"{self.power}."
            )
        sizes = {name: getattr(self, name) for name in ("step_size", "inner_step_size", "dual_step_size")}
        given = [name for name, value in sizes.items() if value is not None]
        if given and len(given) < 3:
            raise ValueError(
                f"{self._name}: step_size, inner_step_size and dual_step_size belong together, but only "
                f"{' and '.join(given)} is given; give all three, or none for automatic ones."
            )
        for name in given:
            if not sizes[name] > 0:
                raise ValueError(f"{self._name}: {name} must be > 0, but got {sizes[name]}; None chooses it.")

    @property
    def _name(self) -> str:
        return type(self).__name__

    def clip(self, z: Tensor, inequalities: int) -> Tensor:
        """P_Z, Z = [0, r]^p for inequalities and [-r, r] for equalities."""
        return clip_multipliers(z, inequalities, self.radius)

    @abstractmethod
    def inner_dual(self, z: Tensor, inequalities: int) -> Callable[[Tensor], Tensor]:
        """The multipliers of the inner problem as a function of the scaled constraints at theta."""

    @abstractmethod
    def evaluate_gap(self, oracle: Oracle, joint: JointSet, w: Tensor, z: Tensor, inner: Inner) -> Gap:
        """The gap at u = (w, z), from its inner minimiser."""

    @abstractmethod
    def published_step(self, oracle: Oracle, joint: JointSet, s: Any, c: Tensor) -> tuple[Moved, Tensor, Inner]:
        """One iteration of the paper: the new (x, y), z, and theta with its multipliers."""

    def joint(self, oracle: Oracle, scales: Tensor, inequalities: int) -> JointSet:
        """C with its projection."""
        return JointSet(oracle, scales, inequalities)

    @abstractmethod
    def move(self, joint: JointSet, w: Tensor, rows: Rows) -> Moved | None:
        """The feasible point that a step to w ends at, None where it was not found."""

    def _begin(self, oracle: Oracle, x: Tensor, y: Tensor) -> Any:
        if oracle.data is not None and self.step_size is None:
            raise ValueError(
                f"{self._name}: automatic steps compare the potential from step to step, which data that change do not "
                f"allow; give step_size, inner_step_size and dual_step_size, as {self._name}.published() has them, or "
                "put all data into the objectives."
            )
        count, scales = row_scales(oracle, x, y, self.scale_rows)
        joint = self.joint(oracle, scales, count)
        first = joint.feasible(torch.cat([x, y]))
        start = self._first_point(joint, torch.cat([x, y]), first)
        x, y = start.point[: len(x)], start.point[len(x) :]
        upper = oracle.upper(x, y)
        shared = self._fields(oracle, x, y, upper)
        z = torch.zeros_like(scales)
        dual = self.inner_dual(z, count)

        def slope(th: Tensor) -> Tensor:
            found = oracle.weighted(x, th, lower=1.0, dual=lambda c: scales * dual(scales * c))
            return found.y + th / self.gamma1

        # automatic steps correct it on their way
        curvature = largest_curvature(slope, y, steps=10 if self.step_size else 5)[0] + 1 / self.gamma1
        self._check_steps(curvature)
        w, status = start.point, first.status
        c0 = upper.value.new_tensor(self.c0)
        if self.step_size is None:  # a first penalty that holds y to within a tenth of the variables' size
            c0 = torch.maximum(c0, 10 * self.gamma1 * shared["scale"] / _size(w))
        infinite = upper.value.new_tensor(torch.inf)
        empty = CoupledState(
            **shared, error=infinite, theta=y, multiplier=z, anchor=z, penalty=c0.clamp_max(self.c_max),
            curvature=_SAFETY * curvature, scales=scales, inequalities=count, rows=start.rows, values=first.values,
            upper_slope=w, gap_slope=w, gap=upper.value, inner=upper.value, at_clip=torch.tensor(0),
            rule=SpectralStep().start(w, w, upper.value), best=infinite, stalled=torch.tensor(0),
            probe=probe_rows(joint), conflict=joint.conflict(first) if status is Status.INFEASIBLE else "",
        )  # fmt: skip
        if status is not Status.CONVERGED:
            assert isinstance(status, Status)
            return replace(empty, codes=torch.tensor(status.code))
        if int(empty.codes) != Status.RUNNING.code:
            return empty
        if self.step_size is None:
            return self._lower_start(oracle, joint, empty)
        return self._evaluate(oracle, joint, empty, start, z, 1e-2 * float(empty.scale))

    def _lower_start(self, oracle: Oracle, joint: JointSet, s: CoupledState) -> CoupledState:
        # F's first steps would follow the gap of wrong multipliers: first those of the lower level at x0
        x, y = s.x_vector, s.y_vector
        found = accelerated_dual(
            oracle, s.scales, s.inequalities, x, y, s.anchor, gamma=self.gamma1, gamma_dual=self.gamma2,
            radius=self.radius, curvature=s.curvature, tolerance=1e-2 * float(s.scale), rounds=_START_ROUNDS,
        )  # fmt: skip
        if not bool(torch.isfinite(found.y.sum() + found.dual.sum())):
            return replace(s, codes=torch.tensor(Status.NON_FINITE.code))
        moved = self.move(joint, torch.cat([x, found.y]), s.rows)
        moved = Moved(torch.cat([x, y]), s.rows, s.values) if moved is None else moved
        s = replace(s, theta=found.y, y_vector=found.y, curvature=found.curvature)
        s = self._evaluate(oracle, joint, s, moved, found.dual, 1e-2 * float(s.scale / s.penalty))
        u, D = self._potential(joint, s)
        return replace(s, rule=QuasiNewtonStep().start(u, D, s.value / s.penalty + s.gap))

    def _augmented(self, z: Tensor, inequalities: int, c: Tensor) -> Tensor:
        """P_Z(z + gamma2 c), the maximiser over lam of <lam, c> - |lam - z|^2 / (2 gamma2)."""
        return self.clip(z + self.gamma2 * c, inequalities)

    def _first_point(self, joint: JointSet, w: Tensor, found: Projection) -> Moved:
        """Where a run from w begins, given a point of C near it."""
        return Moved(found.point, found.rows, found.values)

    def _check_steps(self, curvature: Tensor) -> None:
        if self.inner_step_size is not None and self.inner_step_size * float(curvature) >= 2:
            raise ValueError(
                f"{self._name}: inner_step_size must be below 2 / L = {2 / float(curvature):.2e}, beyond which theta "
                f"runs away, but got {self.inner_step_size}; lower it, or pass no step sizes."
            )

    def step(self, problem: Problem, state: Any, data: Any = None) -> Any:
        """One step; a run that stalls goes over to its second stage."""
        new = super().step(problem, state, data)
        if new.second is None and self.debias is not None and int(new.codes) == Status.STAGNATED.code:
            running = replace(new, codes=torch.tensor(Status.RUNNING.code), iterations=state.iterations)
            return self.finish(problem, running, data)
        return new

    def _advance(self, oracle: Oracle, s: CoupledState) -> CoupledState:
        new = self._move(oracle, s)
        if self.step_size is not None or int(new.codes) != Status.RUNNING.code:
            return new
        if bool(new.error < 0.9 * new.best):
            return replace(new, best=new.error, stalled=torch.zeros_like(s.stalled))
        stalled = new.stalled + 1
        code = Status.STAGNATED if int(stalled) >= _STALL else Status.RUNNING
        return replace(new, stalled=stalled, codes=torch.tensor(code.code))

    def _move(self, oracle: Oracle, s: CoupledState) -> CoupledState:
        joint = self.joint(oracle, s.scales, s.inequalities)
        w = torch.cat([s.x_vector, s.y_vector])
        if oracle.data is not None:
            refuse_changed_rows(self._name, joint, s.probe)
        k = int(s.iterations)
        if self.step_size is not None:
            c = s.penalty.new_tensor(min(self.c0 * (k + 1) ** self.power, self.c_max))
            return self._measure(oracle, joint, replace(s, penalty=c), *self.published_step(oracle, joint, s, c))
        if self.debias is None and self._settled(s):
            s = self._raised(joint, s, w, min(10.0, 2 * float(s.residuals["lower"] / s.tolerance)))
        rule, step = s.rule, QuasiNewtonStep()
        u, D = self._potential(joint, s)
        # u + P'(u - slope) d, P' the projector onto the face that the projected gradient stays on: d itself may lead
        # off the face, along which the potential rises although D'd < 0
        ahead = u - s.upper_slope / s.penalty - s.gap_slope + rule.size * step.direction(rule, D)
        target = D + self._along(joint, s, ahead)
        moved = self.move(joint, target[: len(w)], s.rows)
        short = replace(s, rule=step.after(rule, D, None, s.value))
        if moved is None:
            return self._stuck(short, D)
        z = self.clip(target[len(w) :], s.inequalities)
        # pairs from less accurate slopes cost more steps than they save gradients
        enough = 0.01 * max(float(s.tolerance), float(s.error - s.residuals["lower"])) / float(s.penalty)
        new = self._evaluate(oracle, joint, s, moved, z, enough)
        u_new, D_new = self._potential(joint, new)
        value = new.value / s.penalty + new.gap
        eps = torch.finfo(w.dtype).eps
        noise = (
            10 * eps * float(s.value.abs() / s.penalty + s.gap.abs()) + self.gamma1 * float(new.inner + s.inner) ** 2
        )
        if bool(torch.dot(D, u_new - u) < 0) and step.accepts(rule, u_new - u, D, value, noise):
            new = replace(new, rule=step.after(rule, u_new - u, D_new - D, value))
            bends = bool(torch.dot(u_new - u, D_new - D) <= 0) and bool(new.gap > s.gap)
            if bends and self.gamma1 * float(new.residuals["lower"]) > 0.1 * _size(w) and float(s.penalty) < self.c_max:
                # F falls faster and faster as y leaves the lower solutions: this penalty does not hold it
                return self._raised(joint, new, u_new[: len(w)], 10.0)
            return new
        return self._stuck(replace(short, rule=step.after(rule, D, None, value)), D)

    def _stuck(self, s: CoupledState, D: Tensor) -> CoupledState:
        """The state after a rejected trial, ended where there is nothing left to try."""
        if float(s.rule.size * D.norm()) > torch.finfo(D.dtype).eps * max(1.0, float(s.y_vector.norm())):
            return s
        return replace(s, codes=torch.tensor(Status.STAGNATED.code))

    def _settled(self, s: CoupledState) -> bool:
        """Whether the bias is what is left of the error."""
        rest = max(float(value) for name, value in s.residuals.items() if name != "lower")
        lower, tolerance = float(s.residuals["lower"]), float(s.tolerance)
        return tolerance < lower and rest <= max(0.1 * lower, 0.5 * tolerance)

    def _raised(self, joint: JointSet, s: CoupledState, w: Tensor, factor: float) -> CoupledState:
        """The state with a larger penalty, measured with it."""
        c = (factor * s.penalty).clamp_max(self.c_max)
        upper = self._stationarity(joint, w, s.rows, s.upper_slope + c * s.gap_slope)
        dual = c / s.penalty * s.residuals["dual"]
        residuals = {**s.residuals, "upper": upper, "inner": c * s.inner, "dual": dual}
        r = s.rule
        size = r.steps[-1].norm() / r.changes[-1].norm() if len(r.steps) else r.size
        rule = StepState(size, (s.value / c + s.gap)[None], r.steps[:0], r.changes[:0])
        return replace(
            s, penalty=c, rule=rule, residuals=residuals, best=torch.full_like(s.best, torch.inf),
            stalled=torch.zeros_like(s.stalled),
        )  # fmt: skip

    def _potential(self, joint: JointSet, s: CoupledState) -> tuple[Tensor, Tensor]:
        """The point u and the projected gradient of F / c + gap there."""
        w, z = torch.cat([s.x_vector, s.y_vector]), s.anchor
        u = torch.cat([w, z])
        return u, u - self._along(joint, s, u - s.upper_slope / s.penalty - s.gap_slope)

    def _along(self, joint: JointSet, s: CoupledState, u: Tensor) -> Tensor:
        """The projection of u onto the linearised feasible set and Z."""
        n = len(u) - len(s.anchor)
        return torch.cat([self.tangent(joint, u[:n], s.rows), self.clip(u[n:], s.inequalities)])

    def _evaluate(
        self, oracle: Oracle, joint: JointSet, s: CoupledState, moved: Moved, z: Tensor, enough: float
    ) -> CoupledState:
        x, y = moved.point[: joint.split], moved.point[joint.split :]
        start = s.theta + (y - s.y_vector)
        dual = self.inner_dual(z, s.inequalities)
        inner = minimize_inner(oracle, s.scales, x, y, start, dual, self.gamma1, 0.95 * s.curvature, enough)
        return self._measure(oracle, joint, s, moved, z, inner)

    def _measure(
        self, oracle: Oracle, joint: JointSet, s: CoupledState, moved: Moved, z: Tensor, inner: Inner
    ) -> CoupledState:
        """The state at u = (w, z), with theta at hand."""
        w, rows = moved.point, moved.rows
        x, y = w[: joint.split], w[joint.split :]
        upper = oracle.upper(x, y)
        gap = self.evaluate_gap(oracle, joint, w, z, inner)
        upper_slope = torch.cat([upper.x, upper.y, torch.zeros_like(z)])
        known = moved.values if gap.values is None else gap.values
        values = joint.values(w) if known is None else known
        residuals = {
            "upper": self._stationarity(joint, w, rows, upper_slope + s.penalty * gap.slope),
            "inner": s.penalty * inner.residual,
            "dual": s.penalty * gap.dual,
            "lower": gap.lower,
        }
        if self.stays_feasible:
            residuals["feasibility"] = joint.violation(values)
        at_clip = bool((inner.multiplier.abs() >= self.radius).any())
        clipped = s.at_clip + 1 if at_clip else torch.zeros_like(s.at_clip)
        return replace(
            s, x_vector=x, y_vector=y, value=upper.value, error=torch.stack(list(residuals.values())).amax(),
            residuals=residuals, theta=inner.theta, multiplier=inner.multiplier, anchor=z, curvature=inner.curvature,
            rows=rows, values=values, upper_slope=upper_slope, gap_slope=gap.slope, gap=gap.value, inner=inner.residual,
            at_clip=clipped, codes=clip_code(clipped, _AT_CLIP),
        )  # fmt: skip

    def _stationarity(self, joint: JointSet, w: Tensor, rows: Rows, slope: Tensor) -> Tensor:
        # the tangent step: on a curved set the step of F + c gap itself would end far away
        size: Tensor = (self.tangent(joint, w - slope[: len(w)], rows) - w).norm()
        return size

    @abstractmethod
    def tangent(self, joint: JointSet, v: Tensor, rows: Rows) -> Tensor:
        """The projection of v onto the linearised feasible set."""


def _size(w: Tensor) -> float:
    """What counts as large for a change of the variables."""
    return max(float(w.norm()), math.sqrt(len(w)))
