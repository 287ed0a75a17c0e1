"""The loop of the methods that move y, the adjoint v and x at once; they differ in their estimator and their steps."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.implicit import NewtonCG
from nestopt.linalg import CG, Status, Stopping
from nestopt.linalg.lanczos import extreme_eigenvalues
from nestopt.linalg.result import all_finite

from .aid import upper_tolerance
from .assumptions import require
from .counts import Counts
from .estimators import Estimator, Minibatch, Pieces
from .evaluation import Evaluator
from .method import Method, MethodState
from .monitored import LowerPoint
from .problem import Linearization, Problem, Spaces
from .step_sizes import ScheduledStep, upper_curvature
from .stochastic import Draw
from .upper_step import ConstantStep, QuasiNewtonStep, SpectralStep, StepState, UpperStep
from .waiting import FIRST_SHARE, waiting_step

__all__ = ["SingleLoop", "SingleLoopState"]

_RUNNING = Status.RUNNING.code
_LOWER, _ADJOINT = NewtonCG(), CG()
_ROUGH_ADJOINT = CG(rtol=0.1, max_iter=40)  # for a scale only


@dataclass(frozen=True, kw_only=True)
class SingleLoopState(MethodState):
    """Where a single-loop method stands.

    Attributes:
        hypergradient: estimate of F_x - f_xy v.
        adjoint: v.
        rule: the upper step rule's memory.
        memory: the automatic steps' or the estimator's own.
    """

    hypergradient: Tensor
    adjoint: Tensor
    rule: StepState
    memory: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SingleLoop(Method, ABC):
    """The loop: y -= b f_y; v -= b (f_yy v - F_y); x = P_X(x - a (F_x - f_xy v)), all estimated at the same point.

    Where nothing is random (no data, or all samples at once) and no step_size is given, the steps are those of
    `Monitored`: conjugate directions with exact line searches for y and v, and an x that waits for them and moves by
    the upper rule. Then all estimators are exact, and the methods differ in `inner` only.

    On samples, the automatic b is 1/(3 L) with L the largest curvature of f_yy (Lanczos on the first batch, and the
    largest |f_yy v| / |v| since), and a = b mu / (2 M), with mu the smallest curvature and M the hyperobjective's
    (differences of hypergradients on the first batch); both fall as the method's theory asks.

    Args:
        step_size: b, a number or a schedule k -> number; None for automatic steps.
        upper_step: a, likewise, or an UpperStep such as TorchOptimizer; None for automatic ones.
        inner: steps in y and in v for each one in x.
        estimator: how the directions are estimated from samples.
        stopping: rtol None is 1e-9 in float64 and 1e-4 in float32.
    """

    step_size: float | Callable[[int], float] | None = None
    upper_step: float | Callable[[int], float] | UpperStep | None = None
    inner: int = 1
    estimator: Estimator = Minibatch()
    stopping: Stopping = Stopping(rtol=None, max_iter=20_000)

    State: ClassVar[type[MethodState]] = SingleLoopState
    parts: ClassVar[dict[str, type]] = {"counts": Counts, "rule": StepState}
    decay: ClassVar[tuple[float, float]] = (0.5, 0.5)  # powers of 1 + k/100 in the automatic steps of (y, v) and of x

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field_name in ("step_size", "upper_step"):
            value = getattr(self, field_name)
            if isinstance(value, (int, float)) and not value > 0:
                raise ValueError(f"{name}: {field_name} must be positive, but got {value}; None chooses it.")
        if self.inner < 1:
            raise ValueError(f"{name}: inner must be at least 1, but got {self.inner}.")

    def init(self, problem: Problem, x0: Any, y0: Any, data: Any = None) -> SingleLoopState:
        """Check the problem, find the scales at x0, and evaluate there.

        Automatic steps solve both lower systems once for that; where all steps are given nothing is solved.

        Args:
            problem: with a smooth, unconstrained lower level.
            x0: upper start, projected onto its set.
            y0: lower start; automatic steps go on from the solution found from it.
            data: the first batch.

        Returns:
            The evaluated state.

        Raises:
            TypeError: see `hypergradient`.
            ValueError: see `hypergradient`; or for step sizes that cannot work.
        """
        require(self, problem)
        spaces = Spaces.of(x0, y0)
        x = problem.project(spaces.x.flatten(x0).detach(), spaces)
        y = spaces.y.flatten(y0).detach()
        Linearization(problem, spaces, x, y, data).check()
        blend, blended = self.blended(problem, data, self.first_weight)
        if self.step_size is not None and self.upper_step is not None:
            return self._unsolved(problem, blend, blended, spaces, x, y)
        level = Evaluator.of(blend, spaces, _LOWER, _ADJOINT, blended)
        e = level.differentiate(level.solve(x, y, None), None)
        assert e.hypergradient is not None
        assert e.adjoint is not None
        assert e.scale is not None
        counts = e.counts + Counts(1, 1)
        fault, g = e.fault, e.hypergradient
        state = SingleLoopState(
            x_vector=x, y_vector=e.y, value=e.value, error=e.lower_residual,
            tolerance=x.new_tensor(upper_tolerance(self.stopping, e.scale)), codes=torch.tensor(_RUNNING),
            iterations=torch.tensor(0), counts=counts, spaces=spaces, residuals=e.residuals(blend, spaces),
            hypergradient=g, adjoint=e.adjoint, rule=StepState(g.new_ones(()), e.value[None], g[None, :0], g[None, :0]),
            memory={"weight": self.first_weight, "scale": e.scale},
        )  # fmt: skip
        if fault is not None or not all_finite(g):
            return replace(state, codes=torch.tensor((fault or Status.NON_FINITE).code))
        if self._monitors(data):
            share = x.new_tensor(FIRST_SHARE)
            memory = {**state.memory, "share": share, "ready": False, "reach": float(e.y.norm())}
            return waiting_step(self, problem, replace(state, memory=memory), data)
        start = state if self.step_size is None else replace(state, y_vector=y, adjoint=torch.zeros_like(e.adjoint))
        return self._start(problem, blend, blended, start, lambda: upper_curvature(level, e))

    def _unsolved(
        self, problem: Problem, blend: Problem, data: Any, spaces: Spaces, x: Tensor, y: Tensor
    ) -> SingleLoopState:
        """The start of given steps: a lower level that has no minimiser yet, a network's say, is no obstacle."""
        point = Linearization(blend, spaces, x, y, data)
        found = _ROUGH_ADJOINT(point.hessian, point.upper_y)
        cross = point.cross.T @ found.x
        scale = point.upper_x.norm() + cross.norm()
        scale = torch.where(scale == 0, point.upper_y.norm(), scale)
        none = x[None, :0]
        state = SingleLoopState(
            x_vector=x, y_vector=y, value=point.upper, error=point.lower_y.norm(),
            tolerance=x.new_tensor(upper_tolerance(self.stopping, scale)), codes=torch.tensor(_RUNNING),
            iterations=torch.tensor(0), counts=Counts(1, 1, found.products + 1), spaces=spaces,
            residuals={"lower": point.lower_y.norm()}, hypergradient=point.upper_x - cross,
            adjoint=torch.zeros_like(y), rule=StepState(x.new_ones(()), point.upper[None], none, none),
            memory={"weight": self.first_weight, "scale": scale},
        )  # fmt: skip
        if not (point.finite() and all_finite(cross)):
            return replace(state, codes=torch.tensor(Status.NON_FINITE.code))
        return self._start(problem, blend, data, state, None)

    def step(self, problem: Problem, state: SingleLoopState, data: Any = None) -> SingleLoopState:
        """Move y, v and x, then evaluate.

        Args:
            problem: the problem.
            state: the state.
            data: the step's batch.

        Returns:
            The next state; with a fault's status and the last good point where the step led to no number.
        """
        state = replace(state, iterations=state.iterations + 1)
        if "share" in state.memory:
            return waiting_step(self, problem, state, data)
        return self._moved(problem, state, data)

    def measure(self, problem: Problem, state: SingleLoopState, held: Any) -> SingleLoopState:
        """The state with |f_y|, |F_y - H v| and |P(x - g) - x| measured on held data, v its own.

        Args:
            problem: the problem.
            state: the state.
            held: third argument of the objectives.

        Returns:
            The state.
        """
        blend, blended = self.blended(problem, held, state.memory["weight"])
        pieces, point, spent = pieces_at(blend, state, blended)
        return replace(
            state,
            value=point.upper,
            counts=state.counts + spent,
            **self.certificate(problem, state, pieces),
        )

    # What a blend of both objectives in the lower level changes (BAMM); the others keep it as it is.
    @property
    def first_weight(self) -> float:
        """The first weight of F in the lower level."""
        return 0.0

    def blended(self, problem: Problem, data: Any, weight: float) -> tuple[Problem, Any]:
        """The problem whose lower level is blended with F, and its data."""
        return problem, data

    def next_weight(self, state: SingleLoopState, upper: Tensor) -> float:
        """The weight after a point where x may move; a smaller one starts a new round there."""
        return float(state.memory["weight"])

    def _monitors(self, data: Any) -> bool:
        complete = data is None or (isinstance(data, Draw) and data.complete)
        return complete and self.step_size is None

    def rule_of(self, problem: Problem) -> UpperStep:
        """The rule of the steps in x."""
        rule = self.upper_step
        if isinstance(rule, UpperStep):
            return rule
        if isinstance(rule, (int, float)):
            return ConstantStep(rule)
        if rule is not None:
            return ScheduledStep(rule)
        return QuasiNewtonStep() if problem.upper_set is None else SpectralStep()

    def certificate(self, problem: Problem, s: SingleLoopState, pieces: Pieces) -> dict[str, Any]:
        """The named residuals of a state whose pieces are known, and their maximum."""
        weight = s.memory["weight"]
        slope = (pieces.lower_y - weight * pieces.upper_y) / (1 - weight) if weight else pieces.lower_y
        g = pieces.upper_x - pieces.cross_v
        residuals = {
            "lower": slope.norm(),
            "adjoint": (pieces.upper_y - pieces.hessian_v).norm(),
            "upper": (problem.project(s.x_vector - g, s.spaces) - s.x_vector).norm(),
        }
        return {"residuals": residuals, "error": torch.stack(list(residuals.values())).amax()}

    # Given steps, or automatic ones on samples.
    def _start(
        self,
        problem: Problem,
        blend: Problem,
        data: Any,
        s: SingleLoopState,
        curvature: Callable[[], tuple[float, Counts]] | None,
    ) -> SingleLoopState:
        rule = self.rule_of(problem)
        if isinstance(rule, (SpectralStep, QuasiNewtonStep)) and self.upper_step is not None:
            raise ValueError(
                f"{type(self).__name__}: {type(rule).__name__} compares values of F that are exact, which single-loop "
                "steps on samples or of given size do not have; use a number, a schedule or TorchOptimizer."
            )
        point = Linearization(blend, s.spaces, s.x_vector, s.y_vector, data)
        ends = extreme_eigenvalues(point.hessian, steps=40, rtol=0.05)
        top, low = float(ends.highest), float(ends.lowest)
        high = max(top, -low)
        counts = s.counts + Counts(1, 1, ends.products)
        if self.step_size is not None:
            first = self._size(self.step_size, 0)
            if first * top >= 2:
                raise ValueError(
                    f"{type(self).__name__}: step_size begins with {first:g}, but gradient steps on a lower level of "
                    f"curvature {top:.3g} run away from {2 / top:.3g} on; use less than that, or None."
                )
        track: dict[str, Any] = {}
        base = 1 / (3 * high) if self.step_size is None else self._size(self.step_size, 0)
        rate = min(1.0, base * max(low, 1e-3 * high))  # how fast one step in y or v closes the gap to x
        if curvature is not None and self.upper_step is None:
            slope, spent = curvature()
            counts += spent
            track = {
                "rate": min(1.0, self.inner * rate),
                "curvature": slope,
                "k": 0,
                "x": s.x_vector,
                "g": s.hypergradient,
            }
        s = replace(s, counts=counts)
        estimate, kept, counts, point, fresh = self._estimate(blend, s, None, data, None, base * high)
        g = estimate.upper_x - estimate.cross_v
        rule_state = rule.start(s.x_vector, g, point.upper)
        if self.upper_step is None:
            rule_state = ConstantStep(1.0).start(s.x_vector, g, point.upper)
        s = replace(s, hypergradient=g, rule=rule_state, value=point.upper, counts=s.counts + counts)
        s = replace(s, **self.certificate(problem, s, fresh))
        memory = {"high": point.upper.new_tensor(high), "rate": rate, "track": track, "first_error": s.error}
        memory |= {"estimate": estimate._asdict(), "estimator": kept}
        return replace(s, memory={**s.memory, **memory})

    @staticmethod
    def _size(given: float | Callable[[int], float], k: int) -> float:
        return float(given(k) if callable(given) else given)

    def sizes(self, s: SingleLoopState, k: int) -> tuple[float, float]:
        """The step sizes b, and a as a factor on the rule's own."""
        m = s.memory
        lower = 1 / (3 * float(m["high"])) * (1 + k / 100) ** -self.decay[0]
        if self.step_size is not None:
            lower = self._size(self.step_size, k)
        if self.upper_step is not None:
            return lower, 1.0
        # x stays within a tenth of its size while y and v follow
        track = m["track"]
        most = 0.1 * track["rate"] * max(1.0, float(s.x_vector.norm()))
        upper = 0.5 * track["rate"] / track["curvature"] * (1 + k / 100) ** -self.decay[1]
        return lower, min(upper, most / max(float(s.hypergradient.norm()), 1e-300))

    def _tracked(self, track: dict[str, Any], s: SingleLoopState, k: int) -> dict[str, Any]:
        """The hyperobjective's curvature along the way, where the estimates' noise dies out."""
        if not track or any(self.decay) or k - track["k"] < 10 / track["rate"]:
            return track
        dx, dg = float((s.x_vector - track["x"]).norm()), float((s.hypergradient - track["g"]).norm())
        seen = min(max(dg / dx, track["curvature"] / 2), track["curvature"] * 2) if dx > 0 else track["curvature"]
        return {**track, "curvature": seen, "k": k, "x": s.x_vector, "g": s.hypergradient}

    def _moved(self, problem: Problem, s: SingleLoopState, data: Any) -> SingleLoopState:
        m, k, spaces = s.memory, int(s.iterations) - 1, s.spaces
        weight = self.scheduled_weight(k)
        blend, blended = self.blended(problem, data, weight)
        last, rule = (
            Pieces(**m["estimate"]),
            self.rule_of(problem) if self.upper_step is not None else ConstantStep(1.0),
        )
        b, a = self.sizes(s, k)
        x = problem.project(s.x_vector + a * s.rule.size * rule.direction(s.rule, s.hypergradient), spaces)
        there, counts = self.move_lower(blend, s, x, last, b, blended)
        estimate, kept, spent, point, fresh = self._estimate(blend, there, s, blended, last, b * float(m["high"]))
        g = estimate.upper_x - estimate.cross_v
        dx, change = x - s.x_vector, g - s.hypergradient
        finite = point.finite() and all_finite(g) and all_finite(estimate.hessian_v)
        if not finite:
            return self.lost(s, s.counts + counts + spent)
        size = there.adjoint.norm()
        seen = torch.where(size > 0, fresh.hessian_v.norm() / size, 0.0)
        there = replace(
            there, hypergradient=g, value=point.upper, counts=s.counts + counts + spent,
            rule=rule.after(s.rule, dx, change, point.upper),
            memory={**m, "weight": weight, "high": torch.maximum(m["high"], seen), "estimate": estimate._asdict(),
                    "estimator": kept},
        )  # fmt: skip
        there.memory["track"] = self._tracked(m["track"], there, k)
        return replace(there, **self.certificate(problem, there, fresh))

    def sample_rule(self, problem: Problem) -> UpperStep:
        """The rule of the steps in x on samples."""
        return ConstantStep(1.0) if self.upper_step is None else self.rule_of(problem)

    def lost(self, s: SingleLoopState, counts: Counts) -> SingleLoopState:
        """The last good state with the status of a step that led to no number."""
        grew = bool(s.error > 1e3 * s.memory["first_error"])
        return replace(s, codes=torch.tensor((Status.DIVERGED if grew else Status.NON_FINITE).code), counts=counts)

    def scheduled_weight(self, k: int) -> float:
        """The weight of F in the lower level at step k of given size."""
        return 0.0

    def move_lower(
        self, problem: Problem, before: SingleLoopState, x: Tensor, last: Pieces, b: float, data: Any
    ) -> tuple[SingleLoopState, Counts]:
        """Steps in y and v: one by the last estimate, or `inner` ones at the new x, each on its own draw."""
        s = replace(before, x_vector=x)
        if self.inner == 1:
            y = s.y_vector - b * last.lower_y
            v, counts = self.adjoint_move(problem, before, last, b, data)
            return replace(s, y_vector=y, adjoint=v), counts
        y, counts = self.lower_steps(problem, s, b, data)
        v = s.adjoint
        point = None
        for i in range(self.inner):
            part = further(data, self.inner + i)
            if point is None or draws(data):
                point = Linearization(problem, s.spaces, x, y, part)
                counts += Counts(1, 1, samples=seen_samples(part, 1, 1))
            v = v - b * (point.hessian @ v - point.upper_y)
            counts += Counts(products=1, samples=seen_samples(part, 0, 1))
        return replace(s, y_vector=y, adjoint=v), counts

    def adjoint_move(
        self, problem: Problem, before: SingleLoopState, last: Pieces, b: float, data: Any
    ) -> tuple[Tensor, Counts]:
        """One step in v by the last estimate."""
        return before.adjoint - b * (last.hessian_v - last.upper_y), Counts()

    def lower_steps(self, problem: Problem, s: SingleLoopState, b: float, data: Any) -> tuple[Tensor, Counts]:
        """`inner` gradient steps in y, each on its own draw."""
        y, counts = s.y_vector, Counts()
        for i in range(self.inner):
            part = further(data, i)
            y = y - b * LowerPoint.at(problem, s.spaces, s.x_vector, y, part).lower_y
            counts += Counts(lower_gradients=1, samples=seen_samples(part, 0, 1))
        return y, counts

    def _estimate(
        self,
        problem: Problem,
        s: SingleLoopState,
        before: SingleLoopState | None,
        data: Any,
        last: Pieces | None,
        size: float,
    ) -> tuple[Pieces, dict[str, Any], Counts, Linearization, Pieces]:
        seen: list[tuple[Pieces, Linearization]] = []
        counts: list[Counts] = []

        def look(at: SingleLoopState, batch: Any) -> Pieces:
            pieces, point, spent = pieces_at(problem, at, batch)
            seen.append((pieces, point))
            counts.append(spent)
            return pieces

        if before is None or last is None:
            estimate, kept = self.estimator.start(lambda batch: look(s, batch), data)
        else:
            estimate, kept = self.estimator.next(
                lambda batch: look(s, batch), lambda batch: look(before, batch), data, last,
                s.memory["estimator"], int(s.iterations), size,
            )  # fmt: skip
        pieces, point = seen[0]
        return estimate, kept, sum(counts, Counts()), point, pieces


def draws(data: Any) -> bool:
    """Whether a step can draw further samples."""
    return isinstance(data, Draw) and data.source is not None and not data.complete


def further(data: Any, i: int) -> Any:
    """The i-th further draw of a step, or the same batch where there is nothing to draw from."""
    return data.other(i + 1) if draws(data) else data


def seen_samples(data: Any, upper: int, lower: int) -> int:
    """Samples that so many evaluations on a batch see."""
    n, m = data.samples if isinstance(data, Draw) else (0, 0)
    return upper * n + lower * m


def pieces_at(problem: Problem, s: SingleLoopState, data: Any) -> tuple[Pieces, Linearization, Counts]:
    """The pieces of the directions at a state's (x, y, v) on a batch, and what they cost."""
    point = Linearization(problem, s.spaces, s.x_vector, s.y_vector, data)
    return pieces_of(point, s.adjoint), point, Counts(1, 1, 2, samples=seen_samples(data, 1, 3))


def pieces_of(point: Linearization, v: Tensor) -> Pieces:
    """The pieces of the directions at a point with an adjoint, by two products."""
    return Pieces(point.lower_y, point.hessian @ v, point.cross.T @ v, point.upper_x, point.upper_y)
