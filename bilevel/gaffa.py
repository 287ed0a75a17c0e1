"""BiC-GAFFA: a gap function without projections onto the coupled set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.linalg import Stopping

from .assumptions import Assumptions
from .coupled import CoupledMethod, CoupledState, Gap, Moved
from .inner_minimizer import Inner, keep_dual
from .joint_projection import JointSet, Projection, Rows
from .linearized_set import clip_multipliers
from .oracle import Oracle

__all__ = ["BiCGAFFA"]


@dataclass(frozen=True)
class BiCGAFFA(CoupledMethod):
    """BiC-GAFFA: a doubly regularised gap function as a penalty, with projections onto the plain sets X and Y only.

    For min F(x, y), y in argmin {f(x, y): y in Y, g(x, y) <= 0, h(x, y) = 0} with f and g convex in y, it solves
    min F / c + G over x in X, y in Y and z in [0, R]^p (z in [-R, R] for equalities),
    G(x, y, z) = f(x, y) + (|lam|^2 - |z|^2) / (2 gamma2) - min over th in Y of
    f(x, th) + <z, g(x, th)> + |th - y|^2 / (2 gamma1), with lam = (z + gamma2 g(x, y))_+ (for equalities
    without (.)_+): G >= 0, and G = 0 exactly where y solves the lower level and z is its multiplier. One iteration of
    the paper:

    th+ = P_Y(th - eta (f_y(x, th) + g_y(x, th)'z + (th - y) / gamma1))
    dx = F_x / c_k + f_x(x, y) + g_x(x, y)'lam - f_x(x, th+) - g_x(x, th+)'z
    dy = F_y / c_k + f_y(x, y) + g_y(x, y)'lam - (y - th+) / gamma1
    x+ = P_X(x - alpha dx),  y+ = P_Y(y - alpha dy),  z+ = P_Z(z - beta ((lam - z) / gamma2 - g(x, th+)))

    That is what runs when the three step sizes are given. Without them th is solved to what the stationarity still
    needs, (x, y, z) takes quasi-Newton steps along the sets, with an Armijo test on F / c + G, and c grows as in
    `LVHBA`.

    `error` is the largest of "upper", the projected step of F + c G in (x, y), "dual", the same in z but as c times
    that of G, "inner", c times the residual of th, and "lower", |(y - th) / gamma1, (lam - z) / gamma2|, which is zero
    exactly where y is feasible and solves the lower level, and else is the penalty's bias, all measured at the point
    returned, rows scaled; CONVERGED means error <= max(rtol (|F_x| + |F_y|), atol), with the scale at the start. A
    multiplier at its clip for 100 steps ends the run as DIVERGED, with `state.advice`: constraints that no y can meet
    do so, where the start does not prove them INFEASIBLE.

    Cost of a step: a gradient of F, two of f and of the constraints (a handful without step sizes, one for each
    accelerated inner step).

    Args:
        gamma1: proximal parameter of th, below 1 / rho where f is rho-weakly convex in y.
        gamma2: of the multipliers.
        c0: first penalty.
        power: growth of c_k with the iterations, in [0, 1/2); only with step sizes.
        c_max: c_k grows no further.
        radius: R, for scaled rows.
        step_size: alpha; None for automatic steps, then all three are None.
        inner_step_size: eta, below 2 / L for the inner gradient's Lipschitz constant L.
        dual_step_size: beta.
        scale_rows: divide each constraint by the norm of its gradient at the start.
        debias: the second stage, which removes the penalty's bias; None for the bare method.
        stopping: rtol None is 1e-7 in float64 and 1e-3 in float32.

    Raises:
        ValueError: for parameters that cannot work, by `init` for a step size beyond its bound.

    Reference:
        Yao, Yin, Zeng & Zhang 2024, Overcoming lower-level constraints in bilevel optimization: a novel approach with
        regularized gap functions.

    Example:
        >>> import torch
        >>> from nestopt import bilevel
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y: (x - 2).square().sum() + y.square().sum(),
        ...     lower=lambda x, y: (y - 2 * x).square().sum(),
        ...     inequality=lambda x, y: y - x,
        ... )
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> res = bilevel.BiCGAFFA()(problem, one, one.clone())
        >>> res.status.name, [round(float(v), 4) for v in (res.x, res.y, res.state.inequality_dual)]
        ('CONVERGED', [1.0, 1.0, 2.0])
    """

    assumptions: ClassVar[Assumptions] = Assumptions(
        "penalty", "Yao, Yin, Zeng & Zhang 2024", lower_set=True, inequality=True, equality=True, unique=False
    )
    stays_feasible: ClassVar[bool] = False

    @classmethod
    def published(cls, **changes: Any) -> BiCGAFFA:
        """The single loop of the paper with the constants of its synthetic example.

        Args:
            changes: other fields.

        Returns:
            The method.

        Example:
            >>> BiCGAFFA.published().gamma1
            10.0
        """
        constants: dict[str, Any] = {
            "step_size": 1e-3, "inner_step_size": 1e-2, "dual_step_size": 1e-3, "gamma1": 10.0, "power": 0.3,
            "c_max": 10.0, "radius": 1.0, "scale_rows": False, "debias": None,
            "stopping": Stopping(rtol=1e-4, max_iter=50_000),
        }  # fmt: skip
        return cls(**{**constants, **changes})

    def published_step(
        self, oracle: Oracle, joint: JointSet, s: CoupledState, c: Tensor
    ) -> tuple[Moved, Tensor, Inner]:
        """One iteration of the paper."""
        assert self.step_size is not None
        assert self.inner_step_size is not None
        assert self.dual_step_size is not None
        x, y, z, eta, seen = s.x_vector, s.y_vector, s.anchor, self.inner_step_size, dict[str, Tensor]()
        old = oracle.weighted(x, s.theta, lower=1.0, dual=keep_dual(seen, s.scales, z))
        theta = oracle.prox(s.theta - eta * (old.y + (s.theta - y) / self.gamma1), eta, x)
        there = oracle.weighted(x, theta, lower=1.0, dual=keep_dual(seen, s.scales, z))
        lam = self._multiplier(z, s.values, s.inequalities)
        here = oracle.weighted(x, y, upper=1 / c, lower=1.0, dual=s.scales * lam)
        dx, dy = here.x - there.x, here.y - (y - theta) / self.gamma1
        w = joint.project_sets(torch.cat([x, y]) - self.step_size * torch.cat([dx, dy]))
        slope = (lam - z) / self.gamma2 - seen["values"]
        z = self.clip(z - self.dual_step_size * slope, s.inequalities)
        residual = (theta - s.theta).norm() / eta
        return Moved(w, s.rows), z, Inner(theta, s.anchor, seen["values"], there, residual, s.curvature)

    def inner_dual(self, z: Tensor, inequalities: int) -> Callable[[Tensor], Tensor]:
        """The anchor itself."""
        return lambda c: z

    def evaluate_gap(self, oracle: Oracle, joint: JointSet, w: Tensor, z: Tensor, inner: Inner) -> Gap:
        """G(x, y, z)."""
        x, y = w[: joint.split], w[joint.split :]
        seen = {"multiplier": z, "values": z}

        def dual(c: Tensor) -> Tensor:
            seen["values"] = joint.scales * c
            seen["multiplier"] = self._multiplier(z, seen["values"], joint.inequalities)
            return joint.scales * seen["multiplier"]

        here = oracle.weighted(x, y, lower=1.0, dual=dual)
        lam = seen["multiplier"]
        away, pull = (y - inner.theta) / self.gamma1, (lam - z) / self.gamma2
        # here.value holds f + <lam, g>, of which |lam - z|^2 / (2 gamma2) goes off for the maximum over lam
        v = inner.slopes.value + self.gamma1 * away.square().sum() / 2
        slope_z = pull - inner.values
        slope = torch.cat([here.x - inner.slopes.x, here.y - away, slope_z])
        step = z - self.clip(z - slope_z, joint.inequalities)
        value = here.value - self.gamma2 * pull.square().sum() / 2 - v
        lower = (away.square().sum() + pull.square().sum()).sqrt()
        return Gap(value, slope, lower, step.norm(), seen["values"])

    def move(self, joint: JointSet, w: Tensor, rows: Rows) -> Moved | None:
        """P_X and P_Y."""
        return Moved(joint.project_sets(w), rows)

    def tangent(self, joint: JointSet, v: Tensor, rows: Rows) -> Tensor:
        """P_X and P_Y."""
        return joint.project_sets(v)

    def _first_point(self, joint: JointSet, w: Tensor, found: Projection) -> Moved:
        # the point of C serves to name an empty set
        w = joint.project_sets(w)
        n, p = len(w), len(joint.scales)
        none = Rows(w.new_zeros(0, n), w.new_zeros(0), w.new_zeros(0, n), w.new_zeros(0, p), joint.inequalities, False)
        return Moved(w, none)

    def _multiplier(self, z: Tensor, c: Tensor, inequalities: int) -> Tensor:
        return clip_multipliers(z + self.gamma2 * c, inequalities)
