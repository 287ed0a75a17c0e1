"""Evolution strategies through inner problems: what PES and ES-Single share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.implicit.differentiable_optimizers import DifferentiableOptimizer
from nestopt.linalg import Status, Stopping
from nestopt.linalg.isolation import isolated
from nestopt.linalg.result import all_finite

from .assumptions import require
from .counts import Counts
from .inner_steps import InnerSteps, automatic_rule, curvatures
from .method import Method, MethodState
from .oracle import part_of
from .problem import Problem, Spaces
from .through_solver import default_step
from .upper_step import StepState, UpperStep

__all__ = ["Evolution", "EvolutionState"]

_RUNNING = Status.RUNNING.code


@dataclass(frozen=True, kw_only=True)
class EvolutionState(MethodState):
    """Where an evolution strategy stands.

    Attributes:
        hypergradient: the estimate.
        rule: the upper step rule's memory.
        y_first: raveled y0, where an episode of given truncations begins.
        particles: inner iterates, (1 + 2 N, lower variables): at x, at x + noise, at x - noise.
        optimizer: the inner optimizer's memory for all of them.
        noise: the present perturbations of x, (N, upper variables).
        sums: what each particle's losses are weighted with.
        inner: inner steps taken in this episode.
        draws: how often perturbations have been drawn, which is the place in the random sequence.
        diverged_at: the inner step that ran away last, -1 where none has.
    """

    hypergradient: Tensor
    rule: StepState
    y_first: Tensor
    particles: Tensor
    optimizer: dict[str, Any] = field(default_factory=dict)
    noise: Tensor
    sums: Tensor
    inner: Tensor
    draws: Tensor
    diverged_at: Tensor


@dataclass(frozen=True)
class _Swarm:
    """All particles after some inner steps.

    Attributes:
        y: (1 + 2 N, lower variables).
        memory: the optimizer's.
        inner: the next step's number.
        lower: |f_y| at x (with a lower_step: the length of the last step).
        counts: what it cost.
        fault: why nothing can be made of it, or None.
        at: the step that ran away.
    """

    y: Tensor
    memory: dict[str, Any]
    inner: int
    lower: Tensor
    counts: Counts
    fault: Status | None = None
    at: int = -1


@dataclass(frozen=True)
class Evolution(Method, ABC):
    """Antithetic pairs x +- eps_i, each with its own inner iterates, and no derivative of an inner step.

    See `PES` and `ESSingle`.
    """

    steps: int | None = None
    truncations: int = 1
    particles: int | None = None
    sigma: float | None = None
    optimizer: DifferentiableOptimizer | None = None
    lower_step: Callable[[Any, Any, int], Any] | None = None
    upper_step: UpperStep | None = None
    stopping: Stopping = Stopping(rtol=None, max_iter=200)
    seed: int = 0
    orthogonal: bool = True
    batched: bool = True
    max_inner: int = 20_000

    State: ClassVar[type[MethodState]] = EvolutionState
    parts: ClassVar[dict[str, type]] = {"counts": Counts, "rule": StepState}

    def __post_init__(self) -> None:
        owner = type(self).__name__
        for name in ("steps", "truncations", "particles", "max_inner"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{owner}: {name} must be an integer >= 1, but got {value!r}.")
        if self.sigma is not None and not self.sigma > 0:
            raise ValueError(f"{owner}: sigma must be positive, but got {self.sigma}; None chooses it.")
        if self.steps is None and (self.truncations > 1 or self.lower_step is not None):
            raise ValueError(
                f"{owner}: truncations and lower_step need the number of steps of a truncation; give steps, or leave "
                "them out: then an episode is one truncation, as long as it takes to solve the lower level."
            )
        if self.lower_step is not None and self.optimizer is not None:
            raise ValueError(f"{owner}: lower_step and optimizer are both the inner step; give one of them.")
        if self.truncations > 1 and self.upper_step is None:
            raise ValueError(
                f"{owner}: losses of different truncations cannot be compared, which the automatic upper rules do; "
                "pass upper_step=ConstantStep(size) or TorchOptimizer(...)."
            )

    @abstractmethod
    def perturb(self, state: EvolutionState, fresh: Tensor, begins: bool) -> tuple[Tensor, Tensor]:
        """The perturbations of the next truncation and the weights of its losses.

        Args:
            state: before it.
            fresh: newly drawn perturbations.
            begins: whether an episode begins.

        Returns:
            Both, (N, upper variables).
        """

    def init(self, problem: Problem, x0: Any, y0: Any, data: Any = None) -> EvolutionState:
        """Check the problem, and run the first truncation at the projection of x0.

        Args:
            problem: with an unconstrained lower level; x near its set must be usable, for it is perturbed.
            x0: upper start.
            y0: where the inner steps start.
            data: third argument of the objectives, if they take one; `PerStep` for a batch an inner step.

        Returns:
            The evaluated state.

        Raises:
            TypeError: see `hypergradient`.
            ValueError: see `hypergradient`.
        """
        require(self, problem)
        spaces = Spaces.of(x0, y0)
        x = problem.project(spaces.x.flatten(x0).detach(), spaces)
        y = spaces.y.flatten(y0).detach()
        steps = InnerSteps(problem, spaces, data, None, self.seed)
        if self.lower_step is None:
            problem.oracle(spaces, steps.data_of(0)).check(x, y)
        m = len(x)
        pairs = 2 * m if self.particles is None else self.particles
        first = problem.oracle(spaces, steps.data_of(0)).upper(x, y)
        scale = first.x.norm() + first.y.norm()
        none = x.new_zeros(pairs, m)
        s = EvolutionState(
            x_vector=x, y_vector=y, value=first.value, error=scale, tolerance=self._tolerance(scale),
            codes=torch.tensor(_RUNNING), iterations=torch.tensor(-1), counts=Counts(1), spaces=spaces,
            hypergradient=torch.zeros_like(x),
            rule=StepState(x.new_ones(()), first.value[None], x[None, :0], x[None, :0]),
            y_first=y, particles=y.expand(1 + 2 * pairs, -1).clone(), noise=none, sums=none, inner=torch.tensor(0),
            draws=torch.tensor(0), diverged_at=torch.tensor(-1),
        )  # fmt: skip
        return self._look(problem, s, x, steps, None)

    def step(self, problem: Problem, state: EvolutionState, data: Any = None) -> EvolutionState:
        """One truncation at a new x.

        Args:
            problem: the problem.
            state: the state.
            data: third argument of the objectives, if they take one.

        Returns:
            The next state; x is unchanged when the upper rule rejected the trial.
        """
        s = state
        rule = self._rule(problem)
        x = problem.project(s.x_vector + s.rule.size * rule.direction(s.rule, s.hypergradient), s.spaces)
        return self._look(problem, s, x, InnerSteps(problem, s.spaces, data, None, self.seed), x - s.x_vector)

    def _look(
        self, problem: Problem, s: EvolutionState, x: Tensor, steps: InnerSteps, dx: Tensor | None
    ) -> EvolutionState:
        rule, k, eps = self._rule(problem), int(s.iterations) + 1, torch.finfo(x.dtype).eps
        noise, weights, widths, swarm = self._truncation(s, x, steps, k)
        points = torch.cat([x[None], x + noise, x - noise])
        counts = s.counts + swarm.counts + Counts(len(points))
        losses = self._losses(steps, points, swarm.y, swarm.inner)
        value = losses[0]
        g, error = self._estimate(losses, weights, widths)
        moved: dict[str, Any] = {"particles": swarm.y, "optimizer": swarm.memory, "noise": noise, "sums": weights}
        moved |= {"inner": torch.tensor(swarm.inner), "draws": s.draws + 1}
        s = replace(s, counts=counts, iterations=torch.tensor(k), draws=s.draws + 1)
        fault = swarm.fault if all_finite(losses) else (swarm.fault or Status.NON_FINITE)
        if dx is None and fault is not None:
            bad = {"lower": swarm.lower, "sampling": error, "upper": torch.full_like(error, torch.nan)}
            at = torch.tensor(swarm.at)
            return replace(s, codes=torch.tensor(fault.code), residuals=bad, diverged_at=at)
        taken = dx is None or fault is None
        if dx is not None and taken:
            taken = rule.accepts(s.rule, dx, s.hypergradient, value, 20 * eps * float(value.abs()))
        if not taken:
            assert dx is not None
            after = rule.after(s.rule, dx, None, value if fault is None else torch.full_like(value, torch.nan))
            length = float((after.size * rule.direction(after, s.hypergradient)).norm())
            stuck = length <= 4 * eps * max(float(s.x_vector.norm()), eps)
            code = (fault or Status.LINE_SEARCH_FAILED).code if stuck else _RUNNING
            at = torch.tensor(swarm.at) if swarm.at >= 0 else s.diverged_at
            return replace(s, rule=after, codes=torch.tensor(code), diverged_at=at)
        after = rule.start(x, g, value) if dx is None else rule.after(s.rule, dx, g - s.hypergradient, value)
        upper = (problem.project(x - g, s.spaces) - x).norm()
        residuals = {"lower": swarm.lower, "sampling": error, "upper": upper}
        return replace(
            s, x_vector=x, y_vector=swarm.y[0], value=value, hypergradient=g, rule=after, residuals=residuals,
            error=torch.stack(list(residuals.values())).amax(), **moved,
        )  # fmt: skip

    def _truncation(
        self, s: EvolutionState, x: Tensor, steps: InnerSteps, k: int
    ) -> tuple[Tensor, Tensor, Tensor, _Swarm]:
        """Perturb x, and take the inner steps of one truncation with every particle."""
        widths = self._widths(x, len(s.noise))
        begins = k % self.truncations == 0
        noise, weights = self.perturb(s, self.draw(x, widths, int(s.draws)), begins)
        y, memory, t = s.particles, s.optimizer, int(s.inner)
        if begins and self.steps is not None:
            y, memory, t = s.y_first.expand_as(y).clone(), {}, 0
        elif self.steps is None:
            memory = {}
        points = torch.cat([x[None], x + noise, x - noise])
        return (
            noise,
            weights,
            widths,
            self._advance(steps, points, y, memory, t, float(s.tolerance), float(widths.min())),
        )

    def episode(self, problem: Problem, x: Any, y0: Any, data: Any = None, draw: int = 0) -> Tensor:
        """Each pair's estimate of the slope of the mean loss over one episode's truncations, x held.

        Args:
            problem: the problem.
            x: upper variable.
            y0: where the inner steps start.
            data: third argument of the objectives, if they take one.
            draw: the place in the random sequence where the episode begins.

        Returns:
            (N, upper variables): their mean is the estimate, their spread its variance.
        """
        state = self.init(problem, x, y0, data)
        x_vector = state.x_vector
        steps = InnerSteps(problem, state.spaces, data, None, self.seed)
        total = torch.zeros_like(state.noise)
        for r in range(self.truncations):
            state = replace(state, draws=torch.tensor(draw + r))
            noise, weights, widths, swarm = self._truncation(state, x_vector, steps, r)
            points = torch.cat([x_vector[None], x_vector + noise, x_vector - noise])
            losses = self._losses(steps, points, swarm.y, swarm.inner)
            total = total + self._terms(losses, weights, widths) / self.truncations
            state = replace(
                state, particles=swarm.y, optimizer=swarm.memory, noise=noise, sums=weights,
                inner=torch.tensor(swarm.inner),
            )  # fmt: skip
        return total

    def draw(self, x: Tensor, widths: Tensor, place: int) -> Tensor:
        """Perturbations with the covariance sigma^2 I, from the seed and the place in its sequence alone.

        Args:
            x: raveled upper variable.
            widths: sigma of each pair.
            place: how often has been drawn before.

        Returns:
            (N, upper variables).
        """
        m, pairs = len(x), len(widths)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + place)
        if not self.orthogonal:
            return torch.randn(pairs, m, generator=generator, dtype=torch.float64).to(x) * widths[:, None]
        frames = []
        for _ in range(-(-pairs // m)):
            Q, R = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64))
            frames.append((Q * R.diagonal().sign()).T * math.sqrt(m))  # the sign makes the frame uniform
        return torch.cat(frames)[:pairs].to(x) * widths[:, None]

    def _widths(self, x: Tensor, pairs: int) -> Tensor:
        if self.sigma is not None:
            return x.new_full((pairs,), self.sigma)
        length = torch.finfo(x.dtype).eps ** 0.25 * max(1.0, float(x.norm()))
        widths = x.new_full((pairs,), length / math.sqrt(len(x)))
        widths[pairs // 2 :] *= 0.5  # so that the two halves differ by what the smoothing adds
        return widths

    @staticmethod
    def _terms(losses: Tensor, weights: Tensor, widths: Tensor) -> Tensor:
        pairs = len(widths)
        slopes = (losses[1 : 1 + pairs] - losses[1 + pairs :]) / (2 * widths**2)
        return slopes[:, None] * weights

    def _estimate(self, losses: Tensor, weights: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
        """The mean over pairs, and the standard error of it from independent blocks of them."""
        terms = self._terms(losses, weights, widths)
        pairs, m = weights.shape
        size = min(m, pairs // 2) if self.orthogonal else 1
        if size < 1 or pairs // max(size, 1) < 2:
            return terms.mean(0), torch.full_like(losses[0], torch.inf)  # of one block nothing is known
        blocks = torch.stack([block.mean(0) for block in torch.split(terms[: pairs // size * size], size)])
        spread = (blocks - blocks.mean(0)).square().sum() / (len(blocks) * (len(blocks) - 1))
        return terms.mean(0), spread.sqrt()

    def _advance(
        self, steps: InnerSteps, x: Tensor, y: Tensor, memory: dict[str, Any], t: int, tolerance: float, width: float
    ) -> _Swarm:
        counts, limit, last = Counts(), 1e10 * (1 + float(y.norm())), x.new_zeros(())
        if self.lower_step is not None:
            assert self.steps is not None
            for i in range(t, t + self.steps):
                y, before = self._mapped(self._user_step(steps, i), x, y), y
                last = (y[0] - before[0]).norm()
                if not float(y.norm()) < limit:
                    return _Swarm(before, {}, i, last, counts, _named(y), i)
            return _Swarm(y, {}, t + self.steps, last, counts)
        shorten, begun = 1.0, (y, memory, t)
        for _ in range(4):
            y, memory, t = begun
            rule, enough, spent = self._inner_rule(steps, x, y, t, tolerance, width, shorten)
            counts += spent
            state = rule.init(y)
            state = type(state)(**memory) if memory else state
            total, bad, fault = self.max_inner if self.steps is None else self.steps, None, None
            for i in range(t, t + total):
                slope = self._slopes(steps, x, y, i)
                counts += Counts(lower_gradients=len(x))
                last = slope[0].norm()
                if self.steps is None and float(slope.norm(dim=-1).max()) <= enough:
                    return _Swarm(y, vars(state), i, last, counts)
                after, state = rule.step(y, slope, state)
                if not float(after.norm()) < limit:
                    bad, fault = i, _named(after)
                    break
                y = after
            if bad is None:
                last = self._slopes(steps, x[:1], y[:1], t + total)[0].norm()
                return _Swarm(y, vars(state), t + total, last, counts + Counts(lower_gradients=1))
            if self.optimizer is not None:
                break
            shorten *= 4
        return _Swarm(begun[0], {}, begun[2], last, counts, fault, -1 if bad is None else bad)

    def _inner_rule(
        self, steps: InnerSteps, x: Tensor, y: Tensor, t: int, tolerance: float, width: float, shorten: float
    ) -> tuple[DifferentiableOptimizer, float, Counts]:
        """The optimizer, and the |f_y| below which differences of losses are right to the tolerance."""
        rule, _, _, counts = automatic_rule(steps, x[0], y[0], t, shorten)
        top, low = curvatures(rule)
        upper = steps.linearize(x[0], y[0], t).upper_y.norm()
        eps = torch.finfo(y.dtype).eps
        enough = 0.05 * tolerance * min(1.0, width * low / max(float(upper), eps))
        chosen: DifferentiableOptimizer = rule if self.optimizer is None else self.optimizer
        return chosen, max(enough, 10 * eps * top * (1 + float(y[0].norm()))), counts + Counts(1, 1)

    def _slopes(self, steps: InnerSteps, x: Tensor, y: Tensor, t: int) -> Tensor:
        def slope(a: Tensor, b: Tensor) -> Tensor:
            found: Tensor = torch.func.grad(lambda v: self._value(steps, "lower", a, v, t))(b)
            return found

        def alone(a: Tensor, b: Tensor) -> Tensor:
            return steps.lower_slopes(a, b, t).y

        return self._mapped(slope if self.batched else alone, x, y, steps, t)

    def _losses(self, steps: InnerSteps, x: Tensor, y: Tensor, t: int) -> Tensor:
        with torch.no_grad():
            return self._mapped(lambda a, b: self._value(steps, "upper", a, b, t), x, y, steps, t).detach()

    def _mapped(
        self, function: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, steps: InnerSteps | None = None,
        t: int = 0,
    ) -> Tensor:  # fmt: skip
        """A function of all particles' (x, y), every one with the same random numbers."""

        def call() -> Tensor:
            if not self.batched:
                return torch.stack([function(a, b) for a, b in zip(x, y, strict=True)])
            try:
                found: Tensor = torch.func.vmap(function, randomness="same")(x, y)
            except RuntimeError as error:
                raise ValueError(
                    f"{type(self).__name__}: the particles are evaluated at once by torch.func.vmap, which could not "
                    f"take this problem's functions ({str(error).splitlines()[0]}); pass batched=False for one by one."
                ) from error
            return found

        with isolated():
            return (call() if steps is None else steps.seeded(call, t)).detach()

    def _user_step(self, steps: InnerSteps, t: int) -> Callable[[Tensor, Tensor], Tensor]:
        assert self.lower_step is not None
        given, spaces = self.lower_step, steps.spaces

        def call(x: Tensor, y: Tensor) -> Tensor:
            return spaces.y.flatten(given(spaces.x.unflatten(x), spaces.y.unflatten(y), t))

        return call

    @staticmethod
    def _value(steps: InnerSteps, name: str, x: Tensor, y: Tensor, t: int) -> Tensor:
        part = part_of(steps.data_of(t), name)
        trees = steps.spaces.x.unflatten(x), steps.spaces.y.unflatten(y)
        value: Tensor = getattr(steps.problem, name)(*trees, *(() if part is None else (part,)))
        return value.reshape(())

    def _rule(self, problem: Problem) -> UpperStep:
        return default_step(self.upper_step, problem)

    def _tolerance(self, scale: Tensor) -> Tensor:
        return self.stopping.tolerance(scale, 1e-5 if scale.dtype == torch.float64 else 3e-3)


def _named(y: Tensor) -> Status:
    return Status.DIVERGED if all_finite(y) else Status.NON_FINITE
