"""Hypergradients from differences of value functions: the cure for a penalty's bias."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.linalg import Status, Stopping
from nestopt.linalg.result import all_finite

from .assumptions import Assumptions, require
from .counts import Counts
from .lipschitz import largest_curvature
from .lower_choice import LowerSolver
from .method import Method, MethodState
from .oracle import Oracle
from .penalty import penalty_tolerance
from .problem import Problem, Spaces
from .upper_step import QuasiNewtonStep, SpectralStep, StepState, UpperStep
from .value_nodes import Differences, Nodes

__all__ = ["ValueDifference", "ValueDifferenceState"]

_RUNNING = Status.RUNNING.code


@dataclass(frozen=True, kw_only=True)
class ValueDifferenceState(MethodState):
    """Where ValueDifference stands: at an accepted point with its hypergradient.

    Attributes:
        hypergradient: raveled, at x.
        nodes: y(eps_i) of the three nodes, of shape (3, n).
        duals: their multipliers, of shape (3, p).
        epsilon: the distance 1 / lambda of the nodes.
        one_sided: whether they are 0, eps, 2 eps in place of -eps, 0, eps.
        bias: as last measured.
        steps: curvature memory of the lower solves, of shape (k, n).
        changes: likewise.
        rule: the upper step rule's memory.
    """

    hypergradient: Tensor
    nodes: Tensor
    duals: Tensor
    epsilon: Tensor
    one_sided: bool
    bias: Tensor
    steps: Tensor
    changes: Tensor
    rule: StepState


@dataclass(frozen=True)
class ValueDifference(Method):
    """Descent along differences of value functions: the hypergradient by first-order information alone.

    With v(x; eps) = min over y of f + eps F + h (subject to the lower constraints) the hyperobjective is dv/deps at
    eps = 0, and by the envelope theorem v_x = f_x + eps F_x + h_x + (multipliers)' c_x at the minimiser y(eps). So with
    lambda = 1 / eps and y+- = y(+-eps)

        hypergradient = lambda/2 (f_x(x, y+) - f_x(x, y-)) + (F_x(x, y+) + F_x(x, y-)) / 2 + O(eps^2),

    the exact gradient of lambda/2 (v(x; eps) - v(x; -eps)), which the upper step rule descends. Where f - eps F has no
    minimiser, or y(eps) bends at 0 (the lower solution is not unique, or not smooth in x), the nodes are 0, eps, 2 eps
    with weights (-3/2, 2, -1/2) lambda: the optimistic selection among the lower solutions, and again O(eps^2).

    It is a method of its own, and the second stage (`debias`) of every penalty method.

    `error` is the largest of: lower, |f_y| at the returned y = y(0) (the prox or KKT residual where the lower level has
    such parts); upper, |P_X(x - g) - x|; and bias, a third of the distance between the hypergradients with eps and with
    2 eps, which is the leading term of the bias and sees the rounding as well; it is measured where the others are
    within the tolerance, and eps is shortened until it is too. CONVERGED means error <= max(rtol (|F_x| + |F_y|), atol)
    with the scale taken at the start. It ends as STAGNATED where shortening eps no longer lowers the bias, and where
    the lower level has no minimiser at x0 with the status of its solve, x0, y0 and an error of inf.

    Cost of a step: three lower solves, three gradients of F and of f; no product (but see lower_solver).

    Args:
        penalty: lambda; None for about eps_machine^(-1/4) times the ratio of the curvatures of F and f.
        one_sided: None to find out; True wherever lower solutions are known not to be unique.
        upper_step: None for QuasiNewtonStep() on the whole space and SpectralStep() on a set.
        lower_solver: None for CompactLBFGS() where the lower level is smooth, which needs gradients only (NewtonCG() is
            faster where products are cheap); for the solvers of `lower_level`, which use products, where it has a set,
            a prox or constraints.
        stopping: rtol None is 1e-7 in float64 and 1e-3 in lower precision.

    Raises:
        ValueError: if penalty is not positive.

    Reference:
        Kwon, Kwon, Wright & Nowak 2023 (the one-sided difference, as a penalty); Chen, Ma & Zhang 2023, section 4.

    Example:
        >>> from nestopt import bilevel
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y: ((y - 1) ** 2).sum(), lower=lambda x, y: ((y - x) ** 2).sum() + 0.5 * (y**2).sum()
        ... )
        >>> start = torch.zeros(2, dtype=torch.float64)
        >>> res = bilevel.ValueDifference()(problem, start, start.clone())
        >>> res.status.name, [round(v, 5) for v in res.x.tolist()], res.counts.products
        ('CONVERGED', [1.5, 1.5], 0)
    """

    penalty: float | None = None
    one_sided: bool | None = None
    upper_step: UpperStep | None = None
    lower_solver: LowerSolver | None = None
    stopping: Stopping = Stopping(rtol=None, max_iter=200)

    State: ClassVar[type[MethodState]] = ValueDifferenceState
    assumptions: ClassVar[Assumptions] = Assumptions(
        "penalty", "Kwon et al. 2023", lower_set=True, lower_prox=True, inequality=True, equality=True, unique=False
    )
    parts: ClassVar[dict[str, type]] = {"counts": Counts, "rule": StepState}

    def __post_init__(self) -> None:
        if self.penalty is not None and not self.penalty > 0:
            raise ValueError(f"ValueDifference: penalty must be positive, but got {self.penalty}; None chooses it.")

    def init(self, problem: Problem, x0: Any, y0: Any, data: Any = None) -> ValueDifferenceState:
        """Check the problem, choose lambda and evaluate at the projection of x0.

        Args:
            problem: the problem.
            x0: upper start.
            y0: where the first lower solve starts.
            data: third argument of the objectives, if they take one; the same at every step.

        Returns:
            The evaluated state.

        Raises:
            TypeError: see `hypergradient`.
            ValueError: see `hypergradient`.
        """
        require(self, problem)
        spaces = Spaces.of(x0, y0)
        oracle = problem.oracle(spaces, data)
        x, y = oracle.project(spaces.x.flatten(x0).detach()), spaces.y.flatten(y0).detach()
        oracle.check(x, y)
        upper = oracle.upper(x, y)
        scale = oracle.norm(upper.x) + oracle.norm(upper.y)
        tolerance = penalty_tolerance(self.stopping, scale)
        epsilon = self._first_epsilon(oracle, x, y, upper.y)
        side = bool(self.one_sided)
        nodes = Nodes(problem, oracle, self.lower_solver, data, y.new_zeros(0, len(y)), y.new_zeros(0, len(y)))
        d = self._difference(nodes, x, nodes.start(y), epsilon, side, tolerance)
        if d.fault is not None:  # the start is the last good point, and nothing is known there
            unknown = torch.full_like(x, torch.nan)
            d = replace(d, nodes=y.expand(3, -1), upper=upper.value, residual=d.bias, hypergradient=unknown)
        bias = d.bias if d.fault is not None else nodes.bias(x, d, _node_tolerance(tolerance, d.epsilon))
        rule = self._rule(problem).start(x, d.hypergradient, d.value)
        return self._state(nodes, d, x, bias, rule, tolerance, oracle.counts, 0)

    def step(self, problem: Problem, state: ValueDifferenceState, data: Any = None) -> ValueDifferenceState:
        """Try one upper step.

        Args:
            problem: the problem.
            state: the state.
            data: third argument of the objectives, if they take one.

        Returns:
            The next state; x is unchanged when the trial was rejected.
        """
        s, rule = state, self._rule(problem)
        oracle = problem.oracle(s.spaces, data)
        nodes = Nodes(problem, oracle, self.lower_solver, data, s.steps, s.changes)
        k, eps = int(s.iterations) + 1, torch.finfo(s.x_vector.dtype).eps
        here = Differences(
            s.nodes, s.duals, s.epsilon, s.one_sided, s.residuals["lower"], s.value, s.rule.values[-1], s.hypergradient
        )
        if float(max(s.residuals["lower"], s.residuals["upper"])) <= float(s.tolerance):  # only the bias is left
            shorter = s.epsilon * (0.1 * s.tolerance / s.bias).sqrt().clamp(0.1, 0.5)
            d = self._difference(nodes, s.x_vector, here, shorter, s.one_sided, s.tolerance)
            bias = d.bias if d.fault is not None else nodes.bias(s.x_vector, d, _node_tolerance(s.tolerance, d.epsilon))
            if d.fault is not None or (bool(bias > 0.5 * s.bias) and bool(bias > s.tolerance)):
                code = (d.fault or Status.STAGNATED).code
                return replace(
                    s, codes=torch.tensor(code), counts=s.counts + oracle.counts, iterations=s.iterations + 1
                )
            fresh = rule.start(s.x_vector, d.hypergradient, d.value)
            again = replace(s.rule, values=d.value[None]) if len(s.rule.steps) else fresh
            return self._state(nodes, d, s.x_vector, bias, again, s.tolerance, s.counts + oracle.counts, k)
        x = oracle.project(s.x_vector + s.rule.size * rule.direction(s.rule, s.hypergradient))
        dx = x - s.x_vector
        d = self._difference(nodes, x, here, s.epsilon, s.one_sided, s.tolerance)
        if d.one_sided != s.one_sided:  # found out here: values can be compared with the same nodes only
            d = self._difference(nodes, s.x_vector, here, s.epsilon, True, s.tolerance)
            if d.fault is not None:
                codes = torch.tensor(d.fault.code)
                return replace(s, codes=codes, counts=s.counts + oracle.counts, iterations=s.iterations + 1)
            fresh = rule.start(s.x_vector, d.hypergradient, d.value)
            return self._state(nodes, d, s.x_vector, s.bias, fresh, s.tolerance, s.counts + oracle.counts, k)
        noise = 10 * eps * float(d.size / d.epsilon + d.value.abs())
        if d.fault is None and rule.accepts(s.rule, dx, s.hypergradient, d.value, noise):
            after = rule.after(s.rule, dx, d.hypergradient - s.hypergradient, d.value)
            bias = s.bias
            if float(max(d.residual, _projected(oracle, x, d.hypergradient))) <= float(s.tolerance):
                bias = nodes.bias(x, d, _node_tolerance(s.tolerance, d.epsilon))
            return self._state(nodes, d, x, bias, after, s.tolerance, s.counts + oracle.counts, k)
        after = rule.after(s.rule, dx, None, d.value)
        stuck = float(after.size * rule.direction(after, s.hypergradient).norm()) <= 4 * eps * max(
            float(s.x_vector.norm()), eps
        )
        code = (d.fault or Status.LINE_SEARCH_FAILED).code if stuck else _RUNNING
        counts = s.counts + oracle.counts
        return replace(s, rule=after, codes=torch.tensor(code), counts=counts, iterations=s.iterations + 1)

    def _rule(self, problem: Problem) -> UpperStep:
        if self.upper_step is not None:
            return self.upper_step
        return QuasiNewtonStep() if problem.upper_set is None else SpectralStep()

    def _first_epsilon(self, oracle: Oracle, x: Tensor, y: Tensor, upper_y: Tensor) -> Tensor:
        """eps_machine^(1/4), over the curvature or slope of F in units of those of f."""
        if self.penalty is not None:
            return y.new_tensor(1 / self.penalty)
        size = y.norm().clamp_min(1.0)
        lower_y = oracle.lower_y(x, y)[1]
        f, _ = largest_curvature(lambda v: oracle.lower_y(x, v)[1], y, slope=lower_y)
        F, _ = largest_curvature(lambda v: oracle.upper(x, v).y, y, slope=upper_y)
        f, F = torch.maximum(f, lower_y.norm() / size), torch.maximum(F, upper_y.norm() / size)
        ratio = torch.where((f > 0) & (F > 0) & torch.isfinite(f / F), f / F, torch.ones_like(f))
        epsilon: Tensor = torch.finfo(y.dtype).eps ** 0.25 * ratio
        return epsilon

    def _difference(
        self, nodes: Nodes, x: Tensor, start: Differences, epsilon: Tensor, one_sided: bool, tolerance: Tensor
    ) -> Differences:
        d = nodes.difference(x, start, epsilon, one_sided, _node_tolerance(tolerance, epsilon))
        if self.one_sided is None and not one_sided and (d.fault is not None or d.bends):
            d = nodes.difference(x, start, epsilon, True, _node_tolerance(tolerance, epsilon))
        return d

    def _state(
        self, nodes: Nodes, d: Differences, x: Tensor, bias: Tensor, rule: StepState, tolerance: Tensor,
        counts: Counts, k: int,
    ) -> ValueDifferenceState:  # fmt: skip
        upper = _projected(nodes.oracle, x, d.hypergradient) if d.fault is None else d.bias
        residuals = {"lower": d.residual, "upper": upper, "bias": bias}
        finite = d.fault is None and all_finite(d.hypergradient)
        return ValueDifferenceState(
            x_vector=x, y_vector=d.solution, value=d.upper, error=torch.stack(list(residuals.values())).amax(),
            tolerance=tolerance, codes=torch.tensor(_RUNNING if finite else (d.fault or Status.NON_FINITE).code),
            iterations=torch.tensor(k), counts=counts, spaces=nodes.oracle.spaces, residuals=residuals,
            hypergradient=d.hypergradient, nodes=d.nodes, duals=d.duals, epsilon=d.epsilon, one_sided=d.one_sided,
            bias=bias, steps=nodes.pairs.steps, changes=nodes.pairs.changes, rule=rule,
        )  # fmt: skip


def _projected(oracle: Oracle, x: Tensor, hypergradient: Tensor) -> Tensor:
    return oracle.norm(oracle.project(x - hypergradient) - x)


def _node_tolerance(tolerance: Tensor, epsilon: Tensor) -> float:
    """What the lower solves must reach, for their errors are multiplied by lambda."""
    return float(0.05 * tolerance * epsilon.clamp_max(1.0))
