"""What the methods for coupled constraints share: their state, and quasi-Newton steps on the penalised potential."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nestopt.linalg import Status

from .counts import Counts
from .inner_minimizer import Inner, minimize_inner, row_scales
from .joint_projection import JointSet, Rows
from .lipschitz import largest_curvature
from .oracle import Oracle
from .penalty import PenaltyMethod, PenaltyState
from .problem import Problem
from .upper_step import QuasiNewtonStep, SpectralStep, StepState
from .value_difference import ValueDifferenceState

__all__ = ["CoupledMethod", "CoupledState", "Gap"]

_AT_CLIP = 100  # steps in a row after which a multiplier at its clip ends the run
_START_ROUNDS = 50
_STALL = 60  # steps without a tenth off the error, which rounding and the inner accuracy then hold
_SAFETY = 1.2  # on a curvature estimated from below


@dataclass(frozen=True, kw_only=True)
class CoupledState(PenaltyState):
    """Where a method for coupled constraints stands.

    Attributes:
        theta: the lower level's proximal point at (x, y), raveled.
        multiplier: lam of the scaled constraints, inequalities first.
        anchor: z, the multipliers that lam is held to.
        penalty: c_k.
        curvature: Lipschitz constant of the inner gradient.
        scales: the constraints' factors, 1 / (norm of their gradient at the start) where rows are scaled.
        values: the scaled constraints at (x, y).
        probe: likewise at a point that stays, to see whether they depend on the data.
        rows: their linear model there, and how many are inequalities.
        upper_slope: gradient of F in (x, y, z).
        gap_slope: gradient of the gap f - v in (x, y, z).
        gap: its value.
        inner: residual of theta.
        at_clip: steps in a row for which a multiplier was at its clip.
        rule: the step rule's memory.
        best: smallest error of this penalty so far.
        stalled: steps since it was last lowered by a tenth.
    """

    theta: Tensor
    multiplier: Tensor
    anchor: Tensor
    penalty: Tensor
    curvature: Tensor
    scales: Tensor
    values: Tensor
    probe: Tensor
    rows: Rows
    upper_slope: Tensor
    gap_slope: Tensor
    gap: Tensor
    inner: Tensor
    at_clip: Tensor
    rule: StepState
    best: Tensor
    stalled: Tensor

    @property
    def dual(self) -> Tensor:
        """Multipliers of the constraints as the user wrote them, inequalities first, each raveled."""
        if isinstance(self.second, ValueDifferenceState):
            return self.second.duals[0 if self.second.one_sided else 1]
        return self.scales * self.multiplier

    @property
    def inequality_dual(self) -> Tensor:
        """Multipliers of g(x, y) <= 0, >= 0."""
        return self.dual[: self.rows.inequalities]

    @property
    def equality_dual(self) -> Tensor:
        """Multipliers of h(x, y) = 0."""
        return self.dual[self.rows.inequalities :]

    @property
    def advice(self) -> str:
        """What the status means here."""
        if int(self.at_clip):
            return (
                f"a multiplier is at its clip since {int(self.at_clip)} steps, so that the lower level is not the one "
                "that was asked for: raise `radius`, or look for constraints that no y can meet."
            )
        return self.status.value


class Gap(NamedTuple):
    """The gap f - v that the penalty holds down.

    Attributes:
        value: of the gap.
        slope: in (x, y, z).
        lower: how far y is from a lower solution, in the units of f_y.
        dual: how far z is from a multiplier.
    """

    value: Tensor
    slope: Tensor
    lower: Tensor
    dual: Tensor


class CoupledMethod(PenaltyMethod):
    """A penalty on a gap that is known through an inner minimisation, by spectral projected gradients or as published.

    With no step sizes given, u = (x, y, z) takes quasi-Newton steps along the feasible set, u+ = P(u - size B D), D the
    projected gradient of F / c + gap, with an Armijo test on F / c + gap; the inner problem is solved to a tenth of
    what the stationarity still allows, and c grows whenever the bias is what is left of the error. A subclass writes
    the gap, the projection and the published step.
    """

    parts: ClassVar[dict[str, type]] = {"counts": Counts, "rule": StepState, "rows": Rows}
    gamma1: float
    gamma2: float
    c0: float
    power: float
    c_max: float
    radius: float
    step_size: float | None
    inner_step_size: float | None
    dual_step_size: float | None
    scale_rows: bool
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
        return torch.cat([z[:inequalities].clamp(0, self.radius), z[inequalities:].clamp(-self.radius, self.radius)])

    @abstractmethod
    def inner_dual(self, z: Tensor, inequalities: int) -> Callable[[Tensor], Tensor]:
        """The multipliers of the inner problem as a function of the scaled constraints at theta."""

    @abstractmethod
    def evaluate_gap(self, oracle: Oracle, joint: JointSet, w: Tensor, z: Tensor, inner: Inner) -> Gap:
        """The gap at u = (w, z), from its inner minimiser."""

    @abstractmethod
    def published_step(self, oracle: Oracle, joint: JointSet, s: Any, c: Tensor) -> tuple[Tensor, Rows, Tensor, Inner]:
        """One iteration of the paper: the new (x, y) with its rows, z, and theta with its multipliers."""

    def joint(self, oracle: Oracle, scales: Tensor, inequalities: int) -> JointSet:
        """C with its projection."""
        return JointSet(oracle, scales, inequalities)

    @abstractmethod
    def move(self, joint: JointSet, w: Tensor, rows: Rows) -> tuple[Tensor, Rows] | None:
        """The projection of (x, y), None where it was not found."""

    def _begin(self, oracle: Oracle, x: Tensor, y: Tensor) -> Any:
        if oracle.data is not None and self.step_size is None:
            raise ValueError(
                f"{self._name}: automatic steps compare the potential from step to step, which data that change do not "
                f"allow; give step_size, inner_step_size and dual_step_size, as {self._name}.published() has them, or "
                "put all data into the objectives."
            )
        count, scales = row_scales(oracle, x, y, self.scale_rows)
        joint = self.joint(oracle, scales, count)
        w, rows, code = self._first_point(joint, torch.cat([x, y]))
        x, y = w[: len(x)], w[len(x) :]
        upper = oracle.upper(x, y)
        shared = self._fields(oracle, x, y, upper)
        z = torch.zeros_like(scales)
        dual = self.inner_dual(z, count)

        def slope(th: Tensor) -> Tensor:
            found = oracle.weighted(x, th, lower=1.0, dual=lambda c: scales * dual(scales * c))
            return found.y + th / self.gamma1

        curvature = largest_curvature(slope, y)[0] + 1 / self.gamma1
        self._check_steps(curvature)
        start = SpectralStep().start(w, w, upper.value)
        c0 = upper.value.new_tensor(self.c0)
        if self.step_size is None:  # a first penalty that holds y to within a tenth of the variables' size
            c0 = torch.maximum(c0, 10 * self.gamma1 * shared["scale"] / _size(w))
        empty = CoupledState(
            **shared, error=upper.value.new_tensor(torch.inf), theta=y, multiplier=z, anchor=z,
            penalty=c0.clamp_max(self.c_max), curvature=_SAFETY * curvature, scales=scales, rows=rows,
            values=scales, upper_slope=w, gap_slope=w, gap=upper.value, inner=upper.value,
            at_clip=torch.tensor(0), rule=start, best=upper.value.new_tensor(torch.inf), stalled=torch.tensor(0),
            probe=joint.values(_probe_point(w)),
        )  # fmt: skip
        if code != Status.RUNNING:
            return replace(empty, codes=torch.tensor(code.code))
        if int(empty.codes) != Status.RUNNING.code:
            return empty
        if self.step_size is None:
            return self._lower_start(oracle, joint, empty)
        return self._evaluate(oracle, joint, empty, w, z, rows, 1e-2 * float(empty.scale))

    def _lower_start(self, oracle: Oracle, joint: JointSet, s: CoupledState) -> CoupledState:
        # F's first steps would follow the gap of wrong multipliers: first the proximal method of multipliers at x0
        x, th, z, m = s.x_vector, s.y_vector, s.anchor, s.rows.inequalities
        curvature = s.curvature
        for _ in range(_START_ROUNDS):
            dual = partial(self._augmented, z, m)
            inner = minimize_inner(oracle, s.scales, x, th, th, dual, self.gamma1, curvature, 1e-3 * float(s.scale))
            moved = (inner.theta - th).norm() / self.gamma1 + (inner.multiplier - z).norm() / self.gamma2
            th, z, curvature = inner.theta, inner.multiplier, inner.curvature
            if not bool(moved > 1e-2 * s.scale):
                break
        w, rows = torch.cat([x, th]), s.rows
        if not bool(torch.isfinite(th.sum() + z.sum())):
            return replace(s, codes=torch.tensor(Status.NON_FINITE.code))
        moved_to = self.move(joint, w, rows)
        w, rows = moved_to if moved_to is not None else (torch.cat([x, s.y_vector]), rows)
        s = replace(s, theta=th, y_vector=th, curvature=curvature)
        s = self._evaluate(oracle, joint, s, w, z, rows, 1e-2 * float(s.scale / s.penalty))
        u, D = self._potential(joint, s)
        return replace(s, rule=QuasiNewtonStep().start(u, D, s.value / s.penalty + s.gap))

    def _augmented(self, z: Tensor, inequalities: int, c: Tensor) -> Tensor:
        """P_Z(z + gamma2 c), the maximiser over lam of <lam, c> - |lam - z|^2 / (2 gamma2)."""
        return self.clip(z + self.gamma2 * c, inequalities)

    def _first_point(self, joint: JointSet, w: Tensor) -> tuple[Tensor, Rows, Status]:
        found = joint.feasible(w)
        return found.point, found.rows, Status.RUNNING if found.status == Status.CONVERGED else found.status

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
        joint = self.joint(oracle, s.scales, s.rows.inequalities)
        w = torch.cat([s.x_vector, s.y_vector])
        rows = s.rows
        if oracle.data is not None:
            self._check_rows(joint, s, w)
        k = int(s.iterations)
        if self.step_size is not None:
            c = s.penalty.new_tensor(min(self.c0 * (k + 1) ** self.power, self.c_max))
            w, rows, z, inner = self.published_step(oracle, joint, s, c)
            return self._measure(oracle, joint, replace(s, penalty=c), w, z, rows, inner)
        if self.debias is None and self._settled(s):
            s = self._raised(joint, s, w, min(10.0, 2 * float(s.residuals["lower"] / s.tolerance)))
        rule, step = s.rule, QuasiNewtonStep()
        u, D = self._potential(joint, s)
        target = u + rule.size * step.direction(rule, D)
        moved = self.move(joint, target[: len(w)], rows)
        short = replace(s, rule=step.after(rule, D, None, s.value))
        if moved is None:
            return self._stuck(short, D)
        z = self.clip(target[len(w) :], rows.inequalities)
        enough = 0.05 * max(float(s.tolerance), float(s.error - s.residuals["lower"])) / float(s.penalty)
        new = self._evaluate(oracle, joint, s, moved[0], z, moved[1], enough)
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
        residuals = {**s.residuals, "upper": upper, "inner": c * s.inner}
        r = s.rule
        size = r.steps[-1].norm() / r.changes[-1].norm() if len(r.steps) else r.size
        rule = StepState(size, (s.value / c + s.gap)[None], r.steps[:0], r.changes[:0])
        return replace(
            s, penalty=c, rule=rule, residuals=residuals, best=torch.full_like(s.best, torch.inf),
            stalled=torch.zeros_like(s.stalled),
        )  # fmt: skip

    def _potential(self, joint: JointSet, s: CoupledState) -> tuple[Tensor, Tensor]:
        """U and the gradient of F / c + gap there, its tangent part where quasi-Newton directions are taken."""
        w, z = torch.cat([s.x_vector, s.y_vector]), s.anchor
        D = s.upper_slope / s.penalty + s.gap_slope
        along = w - self.tangent(joint, w - D[: len(w)], s.rows)
        return torch.cat([w, z]), torch.cat([along, z - self.clip(z - D[len(w) :], s.rows.inequalities)])

    def _evaluate(
        self, oracle: Oracle, joint: JointSet, s: CoupledState, w: Tensor, z: Tensor, rows: Rows, enough: float
    ) -> CoupledState:
        x, y = w[: joint.split], w[joint.split :]
        start = s.theta + (y - s.y_vector)
        dual = self.inner_dual(z, rows.inequalities)
        inner = minimize_inner(oracle, s.scales, x, y, start, dual, self.gamma1, 0.95 * s.curvature, enough)
        return self._measure(oracle, joint, s, w, z, rows, inner)

    def _measure(
        self, oracle: Oracle, joint: JointSet, s: CoupledState, w: Tensor, z: Tensor, rows: Rows, inner: Inner
    ) -> CoupledState:
        """The state at u = (w, z), with theta at hand."""
        x, y = w[: joint.split], w[joint.split :]
        upper = oracle.upper(x, y)
        gap = self.evaluate_gap(oracle, joint, w, z, inner)
        upper_slope = torch.cat([upper.x, upper.y, torch.zeros_like(z)])
        values = joint.values(w)
        residuals = {
            "upper": self._stationarity(joint, w, rows, upper_slope + s.penalty * gap.slope),
            "inner": s.penalty * inner.residual,
            "dual": gap.dual,
            "lower": gap.lower,
        }
        if self.stays_feasible:
            residuals["feasibility"] = joint.violation(values)
        at_clip = bool((inner.multiplier.abs() >= self.radius).any())
        clipped = s.at_clip + 1 if at_clip else torch.zeros_like(s.at_clip)
        ended = Status.DIVERGED.code if int(clipped) >= _AT_CLIP else Status.RUNNING.code
        return replace(
            s, x_vector=x, y_vector=y, value=upper.value, error=torch.stack(list(residuals.values())).amax(),
            residuals=residuals, theta=inner.theta, multiplier=inner.multiplier, anchor=z, curvature=inner.curvature,
            rows=rows, values=values, upper_slope=upper_slope, gap_slope=gap.slope, gap=gap.value, inner=inner.residual,
            at_clip=clipped, codes=torch.tensor(ended),
        )  # fmt: skip

    def _stationarity(self, joint: JointSet, w: Tensor, rows: Rows, slope: Tensor) -> Tensor:
        # the tangent step: on a curved set the step of F + c gap itself would end far away
        size: Tensor = (self.tangent(joint, w - slope[: len(w)], rows) - w).norm()
        return size

    @abstractmethod
    def tangent(self, joint: JointSet, v: Tensor, rows: Rows) -> Tensor:
        """The projection of v onto the linearised feasible set."""

    def _check_rows(self, joint: JointSet, s: CoupledState, w: Tensor) -> None:
        """Refuse constraints whose rows change with the data: multipliers would belong to other samples."""
        c = joint.values(_probe_point(w))
        same = c.shape == s.probe.shape and torch.allclose(c, s.probe, rtol=1e-6, atol=1e-6, equal_nan=True)
        if not same:
            raise ValueError(
                f"{self._name}: the constraints depend on the data, so that from step to step their rows belong to "
                "other samples, but a multiplier has to stay with its own (there is no sample key); let the "
                "constraints use all samples at every step, and only the objectives the minibatch."
            )


def _probe_point(w: Tensor) -> Tensor:
    return torch.randn(w.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(w)


def _size(w: Tensor) -> float:
    """What counts as large for a change of the variables."""
    return max(float(w.norm()), math.sqrt(len(w)))
