"""BLOCC: a penalty made of two max-min problems, for lower levels with coupled constraints."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from nestopt.linalg import Status, Stopping

from .assumptions import Assumptions
from .counts import Counts
from .inner_minimizer import accelerated_dual, row_scales
from .joint_projection import JointSet
from .lipschitz import largest_curvature
from .method import Method, MethodState
from .multipliers import MultiplierState, clip_code, probe_rows, refuse_changed_rows
from .oracle import Oracle
from .penalty import PenaltyMethod, error_of, refuse_sizes
from .upper_step import QuasiNewtonStep, SpectralStep, StepState, UpperStep
from .value_difference import ValueDifference

__all__ = ["BLOCC", "BLOCCState"]

_AT_CLIP = 3  # steps in a row, each with two solved problems, after which a multiplier at its clip ends the run


@dataclass(frozen=True, kw_only=True)
class BLOCCState(MultiplierState):
    """Where BLOCC stands: at an accepted x with both max-min problems solved.

    `theta` is y_g, of the lower level alone; `y_vector` is y_F, of the penalised one, and `multiplier` belongs to it.

    Attributes:
        theta_dual: multipliers of theta, scaled.
        hypergradient: of the penalised objective, raveled.
    """

    theta_dual: Tensor
    hypergradient: Tensor


@dataclass(frozen=True)
class BLOCC(PenaltyMethod):
    """BLOCC: descent on a penalty made of two max-min problems, with an accelerated dual inside.

    For min F(x, y), y in argmin {f(x, y): y in Y, g(x, y) <= 0, h(x, y) = 0}, f, F and g convex in y and constraints
    that some y meets at every x of X, it solves min over x in X of

    phi(x) = max over mu, min over y in Y of F + gamma (f + <mu, (g, h)>) - gamma max over mu, min over y in Y of
    f + <mu, (g, h)>,

    whose gradient is F_x + gamma (f_x + <mu_F, (g, h)_x>)(x, y_F) - gamma (f_x + <mu_g, (g, h)_x>)(x, y_g), by
    quasi-Newton or projected spectral steps with an Armijo test on phi. Where y*(x) is not unique y_F is the one that
    F likes best. gamma stays as it is with a second stage, and grows tenfold without one until the bias is below the
    tolerance. The max-min problems are solved by `accelerated_dual` to what the stationarity still needs.

    `error` is the largest of "upper", |P_X(x - phi') - x|, "inner", gamma times the residuals of both max-min
    problems, and "lower", the residual of the lower level's conditions at the returned (y_F, mu_F), which is the
    penalty's bias, all measured; rows scaled; CONVERGED means error <= max(rtol (|F_x| + |F_y|), atol), with the scale
    at the start. A start from which no point meets all constraints ends as INFEASIBLE, and a multiplier at its clip for
    three steps as DIVERGED, with `state.advice`.

    Cost of a step: two max-min problems, each tens of gradients of f and the constraints (one of them also of F).

    Args:
        penalty: gamma; the bias falls and the cost of the inner problems grows with it, in proportion to its root.
        radius: of the multipliers, for scaled rows.
        upper_step: None for QuasiNewtonStep() on the whole space and SpectralStep() on a set.
        scale_rows: divide each constraint by the norm of its gradient at the start.
        debias: the second stage, which removes the penalty's bias; None for the bare method.
        stopping: rtol None is 1e-7 in float64 and 1e-3 in float32.

    Raises:
        ValueError: if penalty or radius is not positive and finite; by `init` for data without an upper_step.

    Reference:
        Jiang, Shen, Chen & Yang 2024, A primal-dual-assisted penalty approach to bilevel optimization with coupled
        constraints; Guler 1992 for the dual's acceleration.

    Example:
        >>> from nestopt import bilevel
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y: (x - 2).square().sum() + y.square().sum(),
        ...     lower=lambda x, y: (y - 2 * x).square().sum(),
        ...     inequality=lambda x, y: y - x,
        ... )
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> res = bilevel.BLOCC()(problem, one, one.clone())
        >>> res.status.name, round(res.x.item(), 4), round(res.y.item(), 4), round(res.state.inequality_dual.item(), 4)
        ('CONVERGED', 1.0, 1.0, 2.0)
    """

    penalty: float = 10.0
    radius: float = 1e4
    upper_step: UpperStep | None = None
    scale_rows: bool = True
    debias: Method | None = ValueDifference()
    stopping: Stopping = Stopping(rtol=None, max_iter=300)

    State: ClassVar[type[MethodState]] = BLOCCState
    assumptions: ClassVar[Assumptions] = Assumptions(
        "penalty", "Jiang et al. 2024", lower_set=True, inequality=True, equality=True, unique=False
    )
    parts: ClassVar[dict[str, type]] = {"counts": Counts, "rule": StepState}

    def __post_init__(self) -> None:
        refuse_sizes(self, "penalty", "radius")

    def _begin(self, oracle: Oracle, x: Tensor, y: Tensor) -> BLOCCState:
        if oracle.data is not None and self.upper_step is None:
            raise ValueError(
                "BLOCC: automatic steps compare phi from step to step, which data that change do not allow; give "
                "upper_step=ConstantStep(size), or put all data into the objectives."
            )
        count, scales = row_scales(oracle, x, y, self.scale_rows)
        joint = JointSet(oracle, scales, count)
        found = joint.feasible(torch.cat([x, y]))
        status = found.status
        assert isinstance(status, Status)
        upper = oracle.upper(x, y)
        shared = self._fields(oracle, x, y, upper)
        zero = torch.zeros_like(scales)
        curvature = 1.2 * largest_curvature(
            lambda th: oracle.weighted(x, th, lower=1.0, dual=lambda c: scales.square() * c).y, y
        )[0].clamp_min(1e-3)
        s = BLOCCState(
            **shared, error=upper.value.new_tensor(torch.inf), theta=y, theta_dual=zero, multiplier=zero,
            penalty=upper.value.new_tensor(self.penalty), curvature=curvature, scales=scales, inequalities=count,
            hypergradient=upper.x, rule=SpectralStep().start(x, upper.x, upper.value), at_clip=torch.tensor(0),
            probe=probe_rows(joint), conflict=joint.conflict(found) if status is Status.INFEASIBLE else "",
        )  # fmt: skip
        if status is not Status.CONVERGED:
            return replace(s, codes=torch.tensor(status.code))
        if int(s.codes) != Status.RUNNING.code:
            return s
        s, value = self._solve(oracle, s, x, 1e-2 * float(s.scale))
        return replace(s, rule=self._rule(oracle).start(x, s.hypergradient, value))

    def _advance(self, oracle: Oracle, s: BLOCCState) -> BLOCCState:
        step, x = self._rule(oracle), s.x_vector
        if oracle.data is not None:
            refuse_changed_rows("BLOCC", JointSet(oracle, s.scales, s.inequalities), s.probe)
        rest = float(max(s.residuals["upper"], s.residuals["inner"]))
        lower, tolerance = float(s.residuals["lower"]), float(s.tolerance)
        if self.debias is None and lower > tolerance and rest <= max(0.1 * lower, 0.5 * tolerance):
            raised = replace(s, penalty=s.penalty * min(10.0, 2 * lower / tolerance))  # the bias falls like 1 / gamma
            new, value = self._solve(oracle, raised, x, max(0.5 * tolerance, 0.1 * rest))
            return replace(new, rule=replace(s.rule, values=value[None]))
        enough = 0.1 * max(tolerance, rest)
        trial = oracle.project(x + s.rule.size * step.direction(s.rule, s.hypergradient))
        new, value = self._solve(oracle, s, trial, enough)
        noise = float((new.residuals["inner"] + s.residuals["inner"]).square() / s.penalty) + 1e-15 * float(
            s.penalty * (value.abs() + s.value.abs())
        )
        if step.accepts(s.rule, trial - x, s.hypergradient, value, noise):
            return replace(new, rule=step.after(s.rule, trial - x, new.hypergradient - s.hypergradient, value))
        rule = step.after(s.rule, trial - x, None, value)
        stuck = float(rule.size * s.hypergradient.norm()) <= torch.finfo(x.dtype).eps * max(1.0, float(x.norm()))
        codes = torch.tensor(Status.STAGNATED.code) if stuck else clip_code(new.at_clip, _AT_CLIP)
        return replace(s, rule=rule, codes=codes, at_clip=new.at_clip)

    def _rule(self, oracle: Oracle) -> UpperStep:
        if self.upper_step is not None:
            return self.upper_step
        return QuasiNewtonStep() if oracle.problem.upper_set is None else SpectralStep()

    def _solve(self, oracle: Oracle, s: BLOCCState, x: Tensor, enough: float) -> tuple[BLOCCState, Tensor]:
        """Both max-min problems at x, and phi."""
        gamma = float(s.penalty)
        solve = partial(
            accelerated_dual, oracle, s.scales, s.inequalities, x, gamma=max(1.0, gamma), radius=self.radius,
            tolerance=0.1 * enough / gamma,
        )  # fmt: skip
        lower = solve(s.theta, s.theta_dual, curvature=s.curvature)
        both = solve(s.y_vector, s.multiplier, weight=1 / gamma, curvature=lower.curvature)
        upper = oracle.upper(x, both.y)
        slope = gamma * (both.slopes.x - lower.slopes.x)
        # the conditions of the lower level at y_F: what F and the dual's residual leave
        y = both.y - (both.slopes.y - upper.y / gamma)
        bias = (both.y - oracle.prox(y, 1.0, x)).norm() + both.residual
        residuals = {
            "upper": (oracle.project(x - slope) - x).norm(),
            "inner": gamma * (lower.residual + both.residual),
            "lower": bias,
        }
        held = [d.abs().amax() >= self.radius for d in (lower.dual, both.dual) if len(d)]
        at_clip = s.at_clip + 1 if any(held) else torch.zeros_like(s.at_clip)
        new = replace(
            s, x_vector=x, y_vector=both.y, value=upper.value, error=error_of(residuals), residuals=residuals,
            theta=lower.y, theta_dual=lower.dual, multiplier=both.dual, curvature=both.curvature, hypergradient=slope,
            codes=clip_code(at_clip, _AT_CLIP), at_clip=at_clip,
        )  # fmt: skip
        return new, gamma * (both.slopes.value - lower.slopes.value)
