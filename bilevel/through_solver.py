"""What the methods share that differentiate through the lower level's solver: forward, backward, trial, certificate."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.implicit import SGD
from nestopt.implicit.differentiable_optimizers import DifferentiableOptimizer
from nestopt.linalg import Status, Stopping
from nestopt.linalg.isolation import RandomState
from nestopt.linalg.result import all_finite

from .assumptions import require
from .counts import Counts
from .inner_checks import check_used, refuse_step_size
from .inner_path import Forward, Path, Pulled
from .inner_steps import InnerSteps, Rule, Segment, automatic_rule, curvatures, curvatures_of, data_at
from .method import Method, MethodState
from .problem import Linearization, Problem, Spaces
from .upper_step import QuasiNewtonStep, SpectralStep, StepState, UpperStep

__all__ = ["ThroughSolver", "ThroughState", "default_step", "through_tolerance"]

_RUNNING = Status.RUNNING.code
_CHUNK = 25  # inner steps between two looks at the clock, and between two stored states of a reverse pass


@dataclass(frozen=True, kw_only=True)
class ThroughState(MethodState):
    """Where a method stands that differentiates through the solver.

    Attributes:
        hypergradient: raveled, at x.
        rule: the upper step rule's memory.
        y_first: raveled y0, where a run without warm starts begins every lower solve; empty with them.
        coefficients: lr and momentum of the automatic inner optimizer where the number of steps is given; NaN where
            nothing asks for f's curvature.
        curvature: the smallest of f that was assumed; likewise.
        inner: inner steps of the last evaluation.
        pulled: how many of them were differentiated.
        stored: most inner states that were held at once.
        diverged_at: the inner step that ran away last, -1 where none has.
        seed: of the objectives' random numbers, -1 where they draw none.
        memory: what else a method keeps: tensors by name.
    """

    hypergradient: Tensor
    rule: StepState
    y_first: Tensor
    coefficients: Tensor
    curvature: Tensor
    inner: Tensor
    pulled: Tensor
    stored: Tensor
    diverged_at: Tensor
    seed: Tensor
    memory: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ThroughSolver(Method, ABC):
    """y_T(x) by T steps of an inner optimizer, F(x, y_T(x)) differentiated through them.

    Args:
        steps: inner steps of each evaluation; None for as many as the certificate asks for.
        optimizer: the inner one, or a function (x, t) -> optimizer whose hyper-parameters x holds; None for heavy ball
            with the coefficients of Lanczos' curvatures.
        upper_step: None for QuasiNewtonStep() on the whole space and SpectralStep() on a set.
        stopping: rtol None is 1e-7 in float64 and 1e-4 in float32.
        warm_start: whether the inner steps begin at the last y, or always at y0.
        max_inner: limit of inner steps where `steps` is None.
        seed: of the random numbers that the objectives draw; each inner step has its own, the same in every evaluation.
    """

    steps: int | None = None
    optimizer: Rule | None = None
    upper_step: UpperStep | None = None
    stopping: Stopping = Stopping(rtol=None, max_iter=200)
    warm_start: bool = True
    max_inner: int = 20_000
    seed: int = 0

    State: ClassVar[type[MethodState]] = ThroughState
    parts: ClassVar[dict[str, type]] = {"counts": Counts, "rule": StepState}

    def __post_init__(self) -> None:
        owner = type(self).__name__
        for name, least in (("steps", 1), ("max_inner", 1)):
            value = getattr(self, name)
            if not (value is None and name == "steps") and not (isinstance(value, int) and value >= least):
                raise ValueError(f"{owner}: {name} must be an integer >= {least}, but got {value!r}.")
        if isinstance(self.optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"{owner}: optimizer is torch.optim's {type(self.optimizer).__name__}, which steps in place; use "
                "implicit.SGD, implicit.Adam, implicit.AdamW, or implicit.from_torch."
            )
        if self.optimizer is not None and not (
            isinstance(self.optimizer, DifferentiableOptimizer) or callable(self.optimizer)
        ):
            raise TypeError(
                f"{owner}: optimizer must be a differentiable optimizer such as implicit.SGD(0.1), or a function "
                f"(x, t) of one, but got {type(self.optimizer).__name__}."
            )

    def init(self, problem: Problem, x0: Any, y0: Any, data: Any = None) -> ThroughState:
        """Check the problem and evaluate it at the projection of x0.

        Args:
            problem: with a smooth, unconstrained lower level.
            x0: upper start, a pytree of tensors or a module.
            y0: where the inner steps start.
            data: third argument of the objectives, if they take one; `PerStep` for a batch an inner step.

        Returns:
            The evaluated state.

        Raises:
            TypeError: see `hypergradient`.
            ValueError: see `hypergradient`; or for an inner step size that cannot work, with its bound.
        """
        steps, s, counts = self._begin(problem, x0, y0, data)
        x, y, guess = s.x_vector, s.y_vector, s.tolerance
        f = self._forward(steps, x, y, float(guess), s.coefficients)
        s = replace(
            s, y_vector=f.y, value=f.value, error=f.lower, counts=counts + f.counts, inner=torch.tensor(f.inner),
            diverged_at=torch.tensor(f.at),
        )  # fmt: skip
        if f.fault is not None:
            residuals = {"lower": f.lower, "upper": torch.full_like(f.lower, torch.nan)}
            return replace(s, codes=torch.tensor(f.fault.code), residuals=residuals)
        p = self._backward(steps, f, float(guess))
        tolerance = through_tolerance(self.stopping, f.upper_x.norm() + (p.hypergradient - f.upper_x).norm())
        counts = s.counts + p.counts
        if self.steps is None and float(tolerance) < float(torch.maximum(f.lower, p.adjoint)):
            f = self._forward(steps, x, f.y if self.warm_start else y, float(tolerance), s.coefficients)
            p = self._backward(steps, f, float(tolerance)) if f.fault is None else p
            counts += f.counts + p.counts
        rule_state = self._rule(problem).start(x, p.hypergradient, f.value)
        return self._state(problem, replace(s, tolerance=tolerance), f, p, rule_state, counts, 0)

    def step(self, problem: Problem, state: ThroughState, data: Any = None) -> ThroughState:
        """Try one upper step.

        Args:
            problem: the problem.
            state: the state.
            data: third argument of the objectives, if they take one.

        Returns:
            The next state; x is unchanged when the trial was rejected.
        """
        s, rule, k = state, self._rule(problem), int(state.iterations) + 1
        steps = self._inner(problem, s.spaces, data, int(s.seed))
        x = problem.project(s.x_vector + s.rule.size * rule.direction(s.rule, s.hypergradient), s.spaces)
        eps = torch.finfo(x.dtype).eps
        f = self._forward(steps, x, s.y_vector if self.warm_start else s.y_first, float(s.tolerance), s.coefficients)
        noise = 10 * eps * float(s.value.abs())
        if self.steps is None:
            spread = f.upper_y.norm() * (f.lower + s.residuals.get("lower", f.lower)) / max(f.least, eps)
            noise += float(spread)
        # x - s.x_vector is not held while the graph of the inner steps is
        if f.fault is None and rule.accepts(s.rule, x - s.x_vector, s.hypergradient, f.value, noise):
            p = self._backward(steps, f, float(s.tolerance))
            if all_finite(p.hypergradient):
                after = rule.after(s.rule, x - s.x_vector, p.hypergradient - s.hypergradient, f.value)
                return self._state(problem, s, f, p, after, s.counts + f.counts + p.counts, k)
            f = replace(f, fault=Status.NON_FINITE, counts=f.counts + p.counts)
        value = f.value if f.fault is None else torch.full_like(f.value, torch.nan)
        after = rule.after(s.rule, x - s.x_vector, None, value)
        length = float((after.size * rule.direction(after, s.hypergradient)).norm())
        stuck = length <= 4 * eps * max(float(s.x_vector.norm()), eps)
        code = (f.fault or Status.LINE_SEARCH_FAILED).code if stuck else _RUNNING
        at = torch.tensor(f.at) if f.at >= 0 else s.diverged_at
        return replace(
            s, rule=after, codes=torch.tensor(code), counts=s.counts + f.counts, iterations=s.iterations + 1,
            diverged_at=at,
        )  # fmt: skip

    def _begin(self, problem: Problem, x0: Any, y0: Any, data: Any) -> tuple[InnerSteps, ThroughState, Counts]:
        """The checked start, before any inner step, with a guess of the tolerance."""
        require(self, problem)
        spaces = Spaces.of(x0, y0)
        x = problem.project(spaces.x.flatten(x0).detach(), spaces)
        y = spaces.y.flatten(y0).detach()
        before = RandomState.now(x.device)
        point = Linearization(problem, spaces, x, y, data_at(data, 0))
        seed = -1 if all(map(torch.equal, before.states, RandomState.now(x.device).states)) else self.seed
        before.set()
        steps = self._inner(problem, spaces, data, seed)
        check_used(point, steps, self.optimizer, x, y, self.steps or 1)
        value, lower = point.upper, point.lower_y.norm()
        scale = point.upper_x.norm() + point.upper_y.norm()
        del point  # its graph
        top, low, coefficients, counts = None, math.nan, (math.nan, math.nan), Counts()
        if self._needs_curvature:
            rule, _, _, counts = automatic_rule(steps, x, y, 0)
            top, low = curvatures(rule)
            coefficients = (rule.lr, rule.momentum)
        counts += refuse_step_size(type(self).__name__, self.optimizer, steps, x, y, top)
        none = x.new_empty(1, 0)
        s = ThroughState(
            x_vector=x, y_vector=y, value=value, error=lower, tolerance=through_tolerance(self.stopping, scale),
            codes=torch.tensor(_RUNNING), iterations=torch.tensor(0), counts=counts, spaces=spaces,
            hypergradient=x.new_zeros(1).expand_as(x), rule=StepState(x.new_ones(()), value[None], none, none),
            y_first=y.new_empty(0) if self.warm_start else y, coefficients=x.new_tensor(coefficients),
            curvature=x.new_tensor(low),
            inner=torch.tensor(0), pulled=torch.tensor(0), stored=torch.tensor(0), diverged_at=torch.tensor(-1),
            seed=torch.tensor(seed),
        )  # fmt: skip
        return steps, s, counts + Counts(1, 1)

    def advice(self, state: Any) -> str:
        """What a run that did not converge says beyond its status.

        Args:
            state: its last.

        Returns:
            A sentence, or nothing.
        """
        if state.status in (Status.DIVERGED, Status.NON_FINITE) and int(state.diverged_at) >= 0:
            return (
                f"Inner step {int(state.diverged_at)} ran away; x and y are those of the last good evaluation. Lower "
                "the optimizer's lr, or leave optimizer and steps out (None), which chooses both."
            )
        given = self.steps is not None or self._truncation is not None or "target" in state.residuals
        if given and _bias(state.residuals) > float(state.tolerance):
            found = ", ".join(f"{k} {float(v):.2g}" for k, v in state.residuals.items() if k != "upper")
            return (
                f"Of {int(state.inner)} inner steps {int(state.pulled)} are differentiated, and the bias that is left "
                f"({found}) is none that steps in x lower: take more of them, or leave their numbers out (None)."
            )
        return ""

    # What a method may do otherwise.

    def _weight(self, t: int) -> float:
        """The weight of F in the direction of inner step t."""
        return 0.0

    def _terminal(self, steps: InnerSteps, f: Forward) -> tuple[Tensor, Counts]:
        """What is pulled back through the steps: F_y."""
        return f.upper_y, Counts()

    def _pull(
        self, steps: InnerSteps, segment: Segment, x: Tensor, cotangents: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], Counts]:
        """B'a and A'a of a segment, with the cost."""
        part, before = steps.pull(segment, x, cotangents)
        return part, before, Counts(lower_gradients=segment.count, products=segment.count)

    def _keep(self, segments: list[Segment], part: Segment) -> None:
        """Store the inner state where a part of the steps began."""
        if part.count:
            segments.append(part)

    def _backwards(self, steps: InnerSteps, f: Forward) -> Iterator[tuple[Segment, int, int]]:
        """The segments from the last to the first, the states held at once, and the steps taken again for them."""
        for segment in reversed(f.segments):
            yield segment, len(f.segments), 0

    @property
    def measures_bias(self) -> bool:
        """Whether |f_y| and the adjoint residual are parts of the error."""
        return True

    @property
    def _truncation(self) -> int | None:
        return None

    @property
    def _needs_curvature(self) -> bool:
        """Whether f's curvature is asked for beyond the refusal of a step size."""
        return self.steps is None or self.optimizer is None

    def _inner(self, problem: Problem, spaces: Spaces, data: Any, seed: int) -> InnerSteps:
        plain = type(self)._weight is ThroughSolver._weight
        return InnerSteps(problem, spaces, data, None if plain else self._weight, seed if seed >= 0 else None)

    def _rule(self, problem: Problem) -> UpperStep:
        return default_step(self.upper_step, problem)

    # The evaluation.

    def _forward(self, steps: InnerSteps, x: Tensor, y: Tensor, tolerance: float, coefficients: Tensor) -> Forward:
        """The inner steps from y."""
        top, least = curvatures_of(*coefficients.tolist())
        path = Path(x, y, 1e10 * (1 + float(y.norm())), 0.1 * tolerance, top, least)
        if self.optimizer is not None or self.steps is not None:
            lr, momentum = (float(c) for c in coefficients)
            self._given_steps(steps, path, SGD(lr, momentum=momentum) if self.optimizer is None else self.optimizer)
        else:
            self._automatic_steps(steps, path)
        seen = steps.look(x, path.y, path.t)
        if path.fault is None and not seen.finite:
            path.fault = Status.NON_FINITE
        return Forward(
            x, path.y, path.segments, seen.value, seen.upper_x, seen.upper_y, seen.lower, path.t,
            path.least, path.top, path.flat, path.counts + Counts(1, 1), path.fault, path.at,
        )  # fmt: skip

    def _given_steps(self, steps: InnerSteps, path: Path, rule: Rule) -> None:
        """A given number of steps, or as many of a given optimizer as bring |f_y| down."""
        carry = steps.first_carry(rule, path.x, path.y, 0)
        total = self.max_inner if self.steps is None else self.steps
        early = 0 if self.steps is None or self._truncation is None else max(0, total - self._truncation)
        while path.t < total and path.fault is None:
            end = early if path.t < early else total  # what is not differentiated is not kept
            part = Segment(rule, path.t, min(_CHUNK, end - path.t), carry, fresh=path.t == 0)
            enough = path.enough if self.steps is None and path.t else -1.0
            carry, taken, last, bad = steps.advance(part, path.x, enough=enough, limit=path.limit)
            if bad is not None:
                path.at, path.fault = bad
            if path.t >= early:
                self._keep(path.segments, replace(part, count=taken))
            path.t, path.y, path.counts = path.t + taken, carry.y, path.counts + Counts(lower_gradients=taken)
            if self.steps is None and last <= path.enough:
                break

    def _automatic_steps(self, steps: InnerSteps, path: Path) -> None:
        """Rounds of heavy ball, each with the curvatures where it begins, until |f_y| is small."""
        shorten = 1.0
        for _ in range(5):
            rule, rate, path.flat, spent = automatic_rule(steps, path.x, path.y, path.t, shorten)
            path.counts += spent
            path.top, path.least = curvatures(rule)
            carry, begun, first, last = steps.first_carry(rule, path.x, path.y, path.t), path.t, math.inf, math.inf
            need = max(_CHUNK, self._needed(steps, path.x, path.y, rate, path.enough))
            segments: list[Segment] = []
            t, bad = begun, None
            while t - begun < 3 * need and t < self.max_inner:
                part = Segment(rule, t, _CHUNK, carry, fresh=t == begun)
                enough = path.enough if t - begun >= need else -1.0
                carry, taken, last, bad = steps.advance(part, path.x, enough=enough, limit=path.limit)
                self._keep(segments, replace(part, count=taken))
                t += taken
                first = last if first == math.inf else first
                if bad is not None or taken < _CHUNK or last > 1e6 * first:
                    break
            path.counts += Counts(lower_gradients=t - begun)
            if bad is not None or (last > 10 * first and last > path.enough):
                path.at, path.fault = (t, Status.DIVERGED) if bad is None else bad
                shorten *= 4  # the curvature along the way is larger than where it was looked at
                continue
            path.fault, path.at, path.t, path.y = None, -1, t, carry.y
            path.segments += segments
            if last <= path.enough or t >= self.max_inner:
                return

    def _needed(self, steps: InnerSteps, x: Tensor, y: Tensor, rate: float, enough: float) -> int:
        """Steps after which an adjoint of F_y's size has fallen to `enough`, by the rate on a quadratic."""
        seen = steps.look(x, y, 0)
        size = float(torch.maximum(seen.upper_y.norm(), seen.lower))
        if not (size > enough > 0 and rate > 0 and math.isfinite(size)):
            return 1
        # heavy ball's transient is (1 + t (1 - rate)) rate^t
        ratio = math.log(size / enough)
        return min(self.max_inner, math.ceil((ratio + math.log1p(ratio)) / -math.log(min(rate, 1 - 1e-6))))

    def _backward(self, steps: InnerSteps, f: Forward, tolerance: float) -> Pulled:
        """The hypergradient, by as many of the steps as it needs."""
        a, counts = self._terminal(steps, f)
        extra = {} if a is f.upper_y else {"target": (a - f.upper_y).norm()}
        cotangents, g, pulled, stored = [a], f.upper_x, 0, 0
        for found, held, again in self._backwards(steps, f):
            segment, stored = found, max(stored, held)
            counts += Counts(lower_gradients=again)
            if self._truncation is not None:
                left = self._truncation - pulled
                if left <= 0:
                    break
                if segment.count > left:
                    skipped = replace(segment, count=segment.count - left)
                    carry = steps.advance(skipped, f.x)[0]
                    segment = Segment(segment.rule, segment.first + segment.count - left, left, carry)
            part, cotangents, spent = self._pull(steps, segment, f.x, cotangents)
            # two terms need no more digits than their sum is rounded to; more of them are added up in float64
            g = g + part if pulled == 0 else g.double() + part
            pulled, counts = pulled + segment.count, counts + spent
            if self.steps is None and self._truncation is None:
                upper = steps.problem.project(f.x - g.to(f.x), steps.spaces) - f.x
                if float(cotangents[0].norm()) <= max(0.1 * tolerance, 1e-3 * float(upper.norm())):
                    break
        return Pulled(g.to(f.x), cotangents[0].norm(), pulled, stored, counts, extra)

    def _state(
        self, problem: Problem, s: ThroughState, f: Forward, p: Pulled, rule: StepState, counts: Counts, k: int
    ) -> ThroughState:
        upper = (problem.project(f.x - p.hypergradient, s.spaces) - f.x).norm()
        residuals = {"lower": f.lower, "adjoint": p.adjoint} if self.measures_bias else {}
        residuals |= {"upper": upper, **p.extra}
        finite = f.fault is None and all_finite(p.hypergradient)
        code = _RUNNING if finite else (f.fault or Status.NON_FINITE).code
        fixed = self.steps is not None or self._truncation is not None or bool(p.extra)
        bias, before = _bias(residuals), _bias(s.residuals)
        if finite and fixed and s.residuals and float(upper) <= float(s.tolerance) < bias and bias > 0.99 * before:
            code = Status.STAGNATED.code  # too few steps are all that is left, and more outer ones do not help
        if finite and f.flat and self._weight(0) == 0 and float(upper) <= float(s.tolerance) < float(p.adjoint):
            code = Status.SINGULAR.code
        return replace(
            s, x_vector=f.x, y_vector=f.y, value=f.value, error=torch.stack(list(residuals.values())).amax(),
            codes=torch.tensor(code), iterations=torch.tensor(k), counts=counts, residuals=residuals,
            hypergradient=p.hypergradient, rule=rule, curvature=f.x.new_tensor(f.least), inner=torch.tensor(f.inner),
            pulled=torch.tensor(p.pulled), stored=torch.maximum(s.stored, torch.tensor(p.stored)),
        )  # fmt: skip


def _bias(residuals: dict[str, Tensor]) -> float:
    """The largest residual that no step in x lowers."""
    return max([float(value) for name, value in residuals.items() if name != "upper"], default=0.0)


def default_step(given: UpperStep | None, problem: Problem) -> UpperStep:
    """The rule given, or QuasiNewtonStep() on the whole space and SpectralStep() on a set.

    Args:
        given: a method's own.
        problem: whose upper set counts.

    Returns:
        The rule.
    """
    if given is not None:
        return given
    return QuasiNewtonStep() if problem.upper_set is None else SpectralStep()


def through_tolerance(stopping: Stopping, scale: Tensor) -> Tensor:
    """max(rtol * scale, atol), where rtol None is 1e-7 in float64 and 1e-4 in lower precision.

    Args:
        stopping: of the method.
        scale: |F_x| + |hypergradient - F_x| at x0.

    Returns:
        The absolute tolerance of a run.
    """
    return stopping.tolerance(scale, 1e-7 if scale.dtype == torch.float64 else 1e-4)
