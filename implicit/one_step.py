"""The derivative of the last step alone."""

from __future__ import annotations

from dataclasses import dataclass

from .backward_pass import StepPass

__all__ = ["OneStep"]


@dataclass(frozen=True, kw_only=True)
class OneStep(StepPass):
    r"""Differentiate the last step of the map at y, and not the y that it started from: dy = T_theta dtheta.

    The identity stands for the inverse of A = I - J, J = dT/dy. Where |J| <= rho < 1 the error of the derivative is at
    most rho / (1 - rho) |T_theta|: little for maps that converge fast, and none for one that converges superlinearly,
    such as a step of Newton's method, where J vanishes at the solution. A second derivative is an approximation of the
    same kind.

    For `fixed_point` the map is T; for `argmin` a gradient step y - step f_y, whose rho is 1 - 1/cond(f_yy) at best;
    for `root` y - step R(y, theta).

    Cost: no product but the one that measures the residual |v - A'u|, and 20 once for a step of None.

    Args:
        step: for `argmin` and `root`, below 2 / lambda_max; None for about 1 / lambda_max, from Lanczos, where A is
            symmetric.

    Raises:
        ValueError: for a step that is not positive.

    Reference:
        Bolte, Pauwels & Vaiter, One-step differentiation of iterative algorithms, 2023, Corollary 1.

    Example:
        >>> import torch
        >>> from nestopt import implicit
        >>> a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        >>> y = a.detach().sqrt()
        >>> newton = lambda y, a: (y + a / y) / 2
        >>> implicit.fixed_point(newton, y, a, solver=implicit.OneStep()).backward()
        >>> round(float(a.grad * 2 * y), 12)  # exact
        1.0
    """

    @property
    def plan(self) -> tuple[int, float]:
        """One whole step."""
        return 1, 1.0
