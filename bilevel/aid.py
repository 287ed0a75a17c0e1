"""Approximate implicit differentiation: lower solve, adjoint solve, step in the upper variable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nestopt.linalg import LinearSolver, Stopping

from .assumptions import Assumptions
from .implicit_method import REJECTIONS, Accuracy, ImplicitMethod, ImplicitState, upper_tolerance
from .lower_choice import LowerSolver
from .upper_step import UpperStep

__all__ = ["AID", "upper_tolerance"]

_FIRST = 1e-3  # what the first solves have to gain on (x0, y0)
_FORCING = 0.01  # what a solve has to gain on its warm start

_AGREE, _DOUBT = 0.05, 0.2  # how far values and hypergradients may differ over a step
_TIGHTEST = 1e-8  # factor on tolerances


@dataclass(frozen=True)
class AID(ImplicitMethod):
    """Approximate implicit differentiation, for every kind of lower level with a unique solution.

    One step: try x+ = P_X(x + size * d), d = -g or a quasi-Newton direction; solve min f(x+, .) from the last y; if the
    upper step rule takes F(x+, y+), solve H v = F_y from the last v and set g+ = F_x - f_xy v; else stay at x and try a
    smaller size.

    Where NewtonCG() solves a smooth lower level and the rule searches along a line (the defaults do), both solves need
    only bring the residual at their warm start down to eta times it, eta <= 0.01: as steps shrink, so do the errors.
    What the rule compares is F - v'f_y, which has the lower solver's error to second order only. eta is divided by ten
    where the values and the hypergradients at both ends of a step disagree by more than 20 % of the trapezoidal rule,
    or a trial is rejected, and grows fourfold where they agree to 5 %; after a rejected trial x itself is evaluated
    anew to a tenth of the run's tolerance, and so is a point at which the run is to end: nothing but the upper step
    limits the accuracy of the answer. (x0, y0) is solved to 1e-3, or on, where |v'f_y| is
    above 1 % of F. Other rules and solvers, and runs without warm starts, solve everything to a tenth of the tolerance.

    A lower level with a set, a prox or constraints is solved by `CompositeLevel` or `ProgramLevel`, and its
    optimality conditions R(x, z) = 0 (see `Optimality`) take the place of f_y = 0: R_z'v = F_z, g+ = F_x - R_x'v. phi
    then has kinks where rows become active; a run that would end in one has to be stopped by max_iter.

    `error` is the largest of |f_y| (|R|), |F_y - H v| and |P_X(x - g) - x|, all measured at the point returned;
    CONVERGED means error <= max(rtol * (|F_x| + |f_xy v|), atol) with the scale taken at x0 (|F_y| where it is zero).
    A lower Hessian that is singular or indefinite ends the run as SINGULAR (at the start, or in eight trials in a row)
    or NEGATIVE_CURVATURE: y*(x), or the hypergradient, does not exist there. A lower level without a feasible point is
    INFEASIBLE.

    Cost of a step: one lower solve, one gradient of F, one of f with a graph, and, when accepted, the products of the
    adjoint solve plus one. A linear_solver that is given keeps its own tolerances.

    Args:
        upper_step: None for QuasiNewtonStep() on the whole space and SpectralStep() on a set, which need no tuning;
            ConstantStep(size) for stochastic data or to follow a paper.
        lower_solver: None for the kind's own: NewtonCG() for a smooth lower level, `ProximalGradient()` with semismooth
            Newton steps for a set or a prox, `constrained.SQP()` for constraints. Smooth ones take NewtonCG() for up to
            about 1e5 variables, LBFGS() beyond, LazyNewton() below a few hundred, LevenbergMarquardt() where f is
            loss(mark_outputs(model(y))) with few outputs, GradientDescent(max_iter=k) for k-step AID; its accuracy
            limits the hypergradient's.
        linear_solver: None for CG(), and LU() or GMRES() where the lower level is not smooth; Cholesky() below a few
            hundred lower variables; Recycled(CG(), rank=30) where its products are dear and a few dozen eigenvalues
            stand out; Neumann(terms) to follow a paper; where y*(x) is not unique, MinimumNormInverse() or
            RidgeInverse(shift), a stand-in that `state.inverse` names.
        stopping: rtol None is 1e-9 in float64 and 1e-4 in float32.
        warm_start: False to start each lower and adjoint solve anew from the first ones; where y*(x) is not unique the
            two converge to different answers (Vicol et al. 2022).

    Reference:
        Pedregosa 2016, algorithm 1; Ji, Yang & Liang 2021 (AID-BiO); Dembo, Eisenstat & Steihaug 1982 for eta.

    Example:
        >>> import torch
        >>> from nestopt import bilevel
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y: ((y - 1) ** 2).sum(), lower=lambda x, y: ((y - x) ** 2).sum() + 0.5 * (y**2).sum()
        ... )
        >>> res = bilevel.AID()(problem, torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
        >>> res.status.name, res.x
        ('CONVERGED', tensor([1.5000, 1.5000], dtype=torch.float64))
    """

    upper_step: UpperStep | None = None
    lower_solver: LowerSolver | None = None
    linear_solver: LinearSolver | None = None
    stopping: Stopping = Stopping(rtol=None, max_iter=200)
    warm_start: bool = True

    assumptions: ClassVar[Assumptions] = Assumptions(
        "implicit", "Pedregosa 2016", products=True, lower_set=True, lower_prox=True, inequality=True, equality=True
    )

    def _accuracy(self, s: ImplicitState | None, k: int, scale: float) -> Accuracy:
        if s is None:  # where no step follows, the start is the answer
            return Accuracy(None, forcing=_FIRST if self.stopping.max_iter else 0.0)
        forcing = _FORCING * s.tightening if s.rejected < REJECTIONS else 0.0
        return Accuracy(0.1 * float(s.tolerance), None, float(s.tolerance), forcing)

    def _tightened(self, tightening: float, rise: float | None = None, slopes: float = 0.0) -> float:
        # values have their error to second order, hypergradients to first: where both say the same of a step, solves
        # may be loose, and where they do not, it is these errors or a step too long for the trapezoidal rule
        less = max(0.1 * tightening, _TIGHTEST)
        if rise is None:
            return less
        off = abs(rise - slopes) / max(abs(rise), abs(slopes), 1e-300)
        return (
            min(1.0, 4 * tightening)
            if off <= _AGREE
            else tightening
            if off <= _DOUBT
            else max(0.1 * tightening, _TIGHTEST)
        )
