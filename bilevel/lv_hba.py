"""LV-HBA: the proximal Lagrangian value function, for lower levels with coupled constraints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.linalg import Status, Stopping

from .assumptions import Assumptions
from .coupled import CoupledMethod, CoupledState, Gap, Moved
from .inner_minimizer import Inner, keep_dual
from .joint_projection import JointSet, Rows
from .oracle import Oracle

__all__ = ["LVHBA"]


@dataclass(frozen=True)
class LVHBA(CoupledMethod):
    """LV-HBA: the lower level's proximal Lagrangian value function as a penalty, (x, y) kept in the coupled set.

    For min F(x, y), y in argmin {f(x, y): y in Y, g(x, y) <= 0, h(x, y) = 0} with f and g convex in y, it solves
    min F / c + f - v over (x, y) in C and z in Z, C = {x in X, y in Y, g <= 0, h = 0}, with
    v(x, y, z) = min over th in Y, max over lam in Z of f(x, th) + <lam, (g, h)(x, th)> + |th - y|^2 / (2 gamma1)
    - |lam - z|^2 / (2 gamma2), whose gradient is that of the Lagrangian at (th, lam). One iteration of the paper:

    th+ = P_Y(th - eta (f_y(x, th) + g_y(x, th)'lam + (th - y) / gamma1))
    lam+ = P_Z(lam + eta (g(x, th) - (lam - z) / gamma2)), both from the old pair
    dx = F_x / c_k + f_x(x, y) - f_x(x, th+) - g_x(x, th+)'lam+,  dy = F_y / c_k + f_y(x, y) - (y - th+) / gamma1
    (x, y)+ = P_C((x, y) - alpha (dx, dy)),  z+ = P_Z(z + beta (lam+ - z) / gamma2),  c_k = c0 (k + 1)^power.

    That is what runs when the three step sizes are given. Without them (th, lam) is solved to what the stationarity
    still needs, (x, y, z) takes quasi-Newton steps along C, with an Armijo test on F / c + f - v, and c grows where F
    outruns the gap, and, without a second stage, until the bias is below the tolerance. P_C needs no modelling
    language: see `JointSet`; constraints count as affine when a numerical test says so, which every projection repeats.
    Automatic steps end on a curved C at a point that is as near as P_C's to second order, by Gauss-Newton steps.

    `error` is the largest of "upper", the projected step of F + c (f - v) on the linearised C, "inner", c times the
    residual of th, "dual", c |lam - z| / gamma2, "lower", |y - th| / gamma1, which is zero exactly where y solves the
    lower level and else is the penalty's bias, and "feasibility", |(g_+, h)|, all measured at the point returned, rows
    scaled; CONVERGED means error <= max(rtol (|F_x| + |F_y|), atol), with the scale at the start. A start from which
    no point of C is found ends as INFEASIBLE; a multiplier at its clip for 100 steps as DIVERGED, with `state.advice`.

    Cost of a step: a gradient of F, two of f and of the constraints (a handful without step sizes, one for each
    accelerated inner step), and a projection.

    Args:
        gamma1: proximal parameter of th, below 1 / rho where f is rho-weakly convex in y.
        gamma2: of lam.
        c0: first penalty; the paper's examples take 1 to 5.
        power: growth of c_k with the iterations, in [0, 1/2); only with step sizes.
        c_max: c_k grows no further.
        radius: r of Z = [0, r]^p for inequalities and [-r, r] for equalities, for scaled rows.
        step_size: alpha; None for automatic steps, then all three are None.
        inner_step_size: eta, below 2 / L for the inner gradient's Lipschitz constant L.
        dual_step_size: beta, below 2 gamma2, as eta is.
        scale_rows: divide each constraint by the norm of its gradient at the start.
        debias: the second stage, which removes the penalty's bias; None for the bare method.
        stopping: rtol None is 1e-7 in float64 and 1e-3 in float32.

    Raises:
        ValueError: for parameters that cannot work, by `init` for a step size beyond its bound.

    Reference:
        Yao, Yu, Zeng & Zhang 2024, Constrained bi-level optimization: proximal Lagrangian value function approach and
        Hessian-free algorithm.

    Example:
        >>> import torch
        >>> from nestopt import bilevel
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y: (x - 2).square().sum() + y.square().sum(),
        ...     lower=lambda x, y: (y - 2 * x).square().sum(),
        ...     inequality=lambda x, y: y - x,
        ... )
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> res = bilevel.LVHBA()(problem, one, one.clone())
        >>> res.status.name, [round(float(v), 4) for v in (res.x, res.y, res.state.inequality_dual)]
        ('CONVERGED', [1.0, 1.0, 2.0])
    """

    assumptions: ClassVar[Assumptions] = Assumptions(
        "penalty", "Yao, Yu, Zeng & Zhang 2024", lower_set=True, inequality=True, equality=True, unique=False
    )
    stays_feasible: ClassVar[bool] = True

    @classmethod
    def published(cls, **changes: Any) -> LVHBA:
        """The single loop of the paper, with constants that converge on its linearly coupled example.

        The paper's own constants let the multiplier run to its clip there, because the constraint's row is not scaled.

        Args:
            changes: other fields.

        Returns:
            The method.

        Example:
            >>> LVHBA.published(c0=1.0).step_size
            0.1
        """
        constants: dict[str, Any] = {
            "step_size": 0.1, "inner_step_size": 0.3, "dual_step_size": 1.0, "c0": 5.0, "power": 0.3, "debias": None,
            "stopping": Stopping(rtol=1e-4, max_iter=50_000),
        }  # fmt: skip
        return cls(**{**constants, **changes})

    def _check_steps(self, curvature: Tensor) -> None:
        super()._check_steps(curvature)
        for name in ("inner_step_size", "dual_step_size"):
            size = getattr(self, name)
            if size is not None and size >= 2 * self.gamma2:
                raise ValueError(
                    f"LVHBA: {name} must be below 2 gamma2 = {2 * self.gamma2:g}, beyond which the multipliers run "
                    f"away, but got {size}; lower it, or pass no step sizes."
                )

    def published_step(
        self, oracle: Oracle, joint: JointSet, s: CoupledState, c: Tensor
    ) -> tuple[Moved, Tensor, Inner]:
        """One iteration of the paper."""
        assert self.step_size is not None
        assert self.inner_step_size is not None
        assert self.dual_step_size is not None
        x, y, eta, m = s.x_vector, s.y_vector, self.inner_step_size, s.inequalities
        seen: dict[str, Tensor] = {}
        old = oracle.weighted(x, s.theta, lower=1.0, dual=keep_dual(seen, s.scales, s.multiplier))
        theta = oracle.prox(s.theta - eta * (old.y + (s.theta - y) / self.gamma1), eta, x)
        lam = self.clip(s.multiplier + eta * (seen["values"] - (s.multiplier - s.anchor) / self.gamma2), m)
        here = oracle.weighted(x, y, upper=1 / c, lower=1.0)
        there = oracle.weighted(x, theta, lower=1.0, dual=keep_dual(seen, s.scales, lam))
        dx, dy = here.x - there.x, here.y - (y - theta) / self.gamma1
        w = torch.cat([x, y]) - self.step_size * torch.cat([dx, dy])
        found = joint.project(w, s.rows)
        z = self.clip(s.anchor + self.dual_step_size * (lam - s.anchor) / self.gamma2, m)
        residual = (theta - s.theta).norm() / eta
        moved = Moved(found.point, found.rows, found.values)
        return moved, z, Inner(theta, lam, seen["values"], there, residual, s.curvature)

    def inner_dual(self, z: Tensor, inequalities: int) -> Callable[[Tensor], Tensor]:
        """Lam = P_Z(z + gamma2 c), the maximiser."""
        return partial(self._augmented, z, inequalities)

    def evaluate_gap(self, oracle: Oracle, joint: JointSet, w: Tensor, z: Tensor, inner: Inner) -> Gap:
        """F - v with v = f(x, th) + <lam, c> - |lam - z|^2/(2 gamma2) + |th - y|^2/(2 gamma1)."""
        x, y = w[: joint.split], w[joint.split :]
        lower = oracle.lower(x, y)
        away, pull = (y - inner.theta) / self.gamma1, (inner.multiplier - z) / self.gamma2
        v = inner.slopes.value + self.gamma1 * away.square().sum() / 2 - self.gamma2 * pull.square().sum() / 2
        slope = torch.cat([lower.x - inner.slopes.x, lower.y - away, -pull])
        return Gap(lower.value - v, slope, away.norm(), pull.norm())

    def move(self, joint: JointSet, w: Tensor, rows: Rows) -> Moved | None:
        """P_C where C is affine, else the point of C that Gauss-Newton steps from the linearised P_C lead to."""
        found = joint.retract(w, rows)
        return Moved(found.point, found.rows, found.values) if found.status == Status.CONVERGED else None

    def tangent(self, joint: JointSet, v: Tensor, rows: Rows) -> Tensor:
        """The projection onto the linearised C."""
        return joint.nearest(v, rows)
