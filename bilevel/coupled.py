"""What the methods for coupled constraints share: their state, the inner minimisation, spectral steps on the potential."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nestopt.linalg import Status

from .counts import Counts
from .joint_projection import JointSet, Rows
from .lipschitz import largest_curvature
from .oracle import Oracle, Slopes
from .penalty import PenaltyMethod, PenaltyState
from .value_difference import ValueDifferenceState
from .upper_step import QuasiNewtonStep, SpectralStep, StepState, UpperStep

__all__ = ["CoupledMethod", "CoupledState", "Gap", "Inner", "keep_dual", "minimize_inner"]

_AT_CLIP = 100  # steps in a row after which a multiplier at its clip ends the run
_INNER_STEPS = 300
_START_ROUNDS = 50
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
        rows: their linear model there, and how many are inequalities.
        upper_slope: gradient of F in (x, y, z).
        gap_slope: gradient of the gap f - v in (x, y, z).
        gap: its value.
        inner: residual of theta.
        at_clip: steps in a row for which a multiplier was at its clip.
        rule: the step rule's memory.
    """

    theta: Tensor
    multiplier: Tensor
    anchor: Tensor
    penalty: Tensor
    curvature: Tensor
    scales: Tensor
    values: Tensor
    rows: Rows
    upper_slope: Tensor
    gap_slope: Tensor
    gap: Tensor
    inner: Tensor
    at_clip: Tensor
    rule: StepState

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


class Inner(NamedTuple):
    """The inner minimiser, where its gradient was evaluated.

    Attributes:
        theta: the point.
        multiplier: that belongs to it.
        values: the scaled constraints there.
        slopes: of f + <multiplier, c> at (x, theta).
        residual: norm of the gradient mapping.
        curvature: the Lipschitz constant that the last steps were taken with.
    """

    theta: Tensor
    multiplier: Tensor
    values: Tensor
    slopes: Slopes
    residual: Tensor
    curvature: Tensor


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


def minimize_inner(
    oracle: Oracle,
    scales: Tensor,
    x: Tensor,
    y: Tensor,
    start: Tensor,
    dual: Callable[[Tensor], Tensor],
    gamma: float,
    curvature: Tensor,
    tolerance: float,
    max_iter: int = _INNER_STEPS,
) -> Inner:
    """Minimise f(x, th) + M(c(x, th)) + |th - y|^2 / (2 gamma) over th in Y by accelerated projected gradients.

    M' = `dual` maps the scaled constraints to multipliers. Nesterov's scheme for 1/gamma-strong convexity with the
    momentum dropped where it points uphill; a step that the gradient at its end contradicts doubles the Lipschitz
    constant.

    Args:
        oracle: of the step.
        scales: of the constraints.
        x: raveled.
        y: the proximal centre.
        start: th0.
        dual: c -> multipliers.
        gamma: proximal parameter.
        curvature: Lipschitz constant to begin with.
        tolerance: on the gradient mapping.
        max_iter: evaluations.

    Returns:
        The last point at which the gradient was evaluated.
    """
    seen: dict[str, Tensor] = {}

    def multipliers(c: Tensor) -> Tensor:
        seen["values"] = scales * c
        seen["multiplier"] = dual(seen["values"])
        return scales * seen["multiplier"]

    v, last, before = start, start, None
    floor = 4 * torch.finfo(x.dtype).eps
    while True:
        slopes = oracle.weighted(x, v, lower=1.0, dual=multipliers)
        slope = slopes.y + (v - y) / gamma
        max_iter -= 1
        if before is not None:
            (u, slope_u) = before
            move = (v - u).norm()
            if bool((slope - slope_u).norm() > 1.01 * curvature * move + floor * slope_u.norm()):
                curvature = torch.maximum(2 * curvature, (slope - slope_u).norm() / move)
        new = oracle.prox(v - slope / curvature, 1 / curvature, x)
        residual = curvature * (new - v).norm()
        if not bool(residual > max(tolerance, floor * float(slopes.y.norm()))) or max_iter <= 0:
            return Inner(v, seen["multiplier"], seen["values"], slopes, residual, curvature)
        q = (1 / (gamma * curvature)).sqrt()
        momentum = (1 - q) / (1 + q) if bool(torch.dot(slope, new - last) <= 0) else 0.0
        before = v, slope
        v, last = new + momentum * (new - last), new
        if oracle.nonsmooth.present:
            v = oracle.prox(v, 1.0, x)


def keep_dual(seen: dict[str, Tensor], scales: Tensor, multiplier: Tensor) -> Callable[[Tensor], Tensor]:
    """Constant multipliers of the scaled constraints, whose values are kept in `seen`."""

    def dual(c: Tensor) -> Tensor:
        seen["values"] = scales * c
        return scales * multiplier

    return dual


class CoupledMethod(PenaltyMethod):
    """A penalty on a gap that is known through an inner minimisation, by spectral projected gradients or as published.

    With no step sizes given, u = (x, y, z) moves along u+ = P(u - size (F'/c + gap')), size by Barzilai and Borwein
    with a non-monotone Armijo test on F/c + gap, the inner problem solved to a tenth of what the stationarity still
    allows, and c grows tenfold whenever the bias is what is left of the error. A subclass writes the gap, the
    projection and the published step.
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
        if not oracle.constrained:
            count, scales = 0, x.new_ones(0)
        else:
            count = oracle.inequalities(x, y)
            _, c_x, c_y = oracle.constraint_jacobian(x, y)
            norms = torch.cat([c_x, c_y], 1).norm(dim=1)
            scales = torch.where(norms > 0, 1 / norms, 1.0) if self.scale_rows else torch.ones_like(norms)
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
            c0 = torch.maximum(c0, 10 * self.gamma1 * shared["scale"] / w.norm().clamp_min(len(w) ** 0.5))
        empty = CoupledState(
            **shared, error=upper.value.new_tensor(torch.inf), theta=y, multiplier=z, anchor=z,
            penalty=c0.clamp_max(self.c_max), curvature=_SAFETY * curvature, scales=scales, rows=rows,
            values=scales, upper_slope=w, gap_slope=w, gap=upper.value, inner=upper.value, at_clip=torch.tensor(0), rule=start,
        )  # fmt: skip
        if code != Status.RUNNING:
            return replace(empty, codes=torch.tensor(code.code))
        if int(empty.codes) != Status.RUNNING.code:
            return empty
        if self.step_size is None:
            return self._lower_start(oracle, joint, empty)
        s = self._evaluate(oracle, joint, empty, w, z, rows, 1e-2 * float(empty.scale))
        return s

    def _lower_start(self, oracle: Oracle, joint: JointSet, s: CoupledState) -> CoupledState:
        """Begin at a rough lower solution with its multipliers, or F's first steps would follow the gap of wrong ones.

        The proximal method of multipliers at x0: (th, lam) from (th, lam), then (x0, th) is projected.
        """
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

    def _advance(self, oracle: Oracle, s: CoupledState) -> CoupledState:
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
        noise = 10 * eps * float(s.value.abs() / s.penalty + s.gap.abs()) + self.gamma1 * float(new.inner + s.inner) ** 2
        if bool(torch.dot(D, u_new - u) < 0) and step.accepts(rule, u_new - u, D, value, noise):
            new = replace(new, rule=step.after(rule, u_new - u, D_new - D, value))
            if bool(torch.dot(u_new - u, D_new - D) <= 0) and bool(new.gap > s.gap) and bool(s.penalty < self.c_max):
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
        return replace(s, penalty=c, rule=rule, residuals=residuals)

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
        c = joint.values(w)
        same = c.shape == s.values.shape and bool(((c - s.values).abs() <= 1e-6 * (1 + c.abs())).all())
        if not same:
            raise ValueError(
                f"{self._name}: the constraints depend on the data, so that from step to step their rows belong to "
                "other samples, but a multiplier has to stay with its own (there is no sample key); let the "
                "constraints use all samples at every step, and only the objectives the minibatch."
            )
