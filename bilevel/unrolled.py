"""Unrolled differentiation: the hypergradient through the steps of the lower level's solver."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .assumptions import Assumptions
from .counts import Counts
from .inner_path import Forward, Pulled
from .inner_steps import InnerSteps
from .problem import Linearization
from .through_solver import ThroughSolver

__all__ = ["Unrolled", "tangent_residual"]


@dataclass(frozen=True)
class Unrolled(ThroughSolver):
    """The hypergradient of F(x, y_T(x)), differentiated through y_{t+1} = Phi_t(y_t, x), T steps of an inner optimizer.

    With A_t = dPhi_t/dy and B_t = dPhi_t/dx, the optimizer's memory counted with y, the modes are

        reverse (RHG):      a = F_y,  for t = T-1 .. 0:  g += B_t' a,  a <- A_t' a,    from g = F_x;
        truncated (T-RHG):  the same for the last `truncation` steps; the earlier ones are taken, without a graph;
        forward:            Z <- A_t Z + B_t for t = 0 .. T-1, then g = F_x + Z' F_y.

    Without numbers the inner steps are heavy ball with the coefficients of the curvatures that Lanczos sees, as many as
    bring |f_y| below a tenth of the tolerance, and the reverse pass goes back until the rest no longer matters.

    `error` is the largest of |f_y(x, y_T)|, of the hypergradient's own bias and of |P_X(x - g) - x|, at the point
    returned. The bias is in reverse |a| = |dF / dy_t| at the first step t that was differentiated, which is |F_y - H v|
    of the implicit method: near y*(x) the hypergradient is wrong by (dy*/dx)' a; in forward mode |F_y| |f_yy Z + f_yx|
    / m, m the smallest curvature, which bounds it. CONVERGED means error <= max(rtol (|F_x| + |g - F_x|), atol) with
    the scale taken at x0; where a given number of steps leaves more bias than that, the run ends as STAGNATED at the
    minimiser of F(x, y_T(x)), and where f is flat as SINGULAR. A truncated g is no function's gradient: with more bias
    than the tolerance such a run may also end at its limit or as LINE_SEARCH_FAILED. `unwrap()` names the bias that is
    left. A run of the inner iterates to infinity is DIVERGED, with the step in `state.diverged_at`.

    Cost of an evaluation: T gradients of f, then one gradient and one product for each of the steps pulled back
    (reverse), or one gradient and as many products as there are upper variables for each step (forward). Memory beside
    x, y and g at two points: one inner state in 25 steps and the graph of 25 steps (reverse), those of the truncated
    steps alone where both numbers are given; Z (forward).

    Args:
        steps: T, the inner steps of each evaluation; None for as many as the certificate asks for.
        optimizer: the inner one: implicit.SGD(lr, momentum=...), Adam, AdamW, or a function (x, t) -> optimizer whose
            hyper-parameters x holds (an object with a repr of its own, where a checkpoint is to be resumed in another
            process); None for heavy ball of automatic coefficients.
        upper_step: None for QuasiNewtonStep() on the whole space, which keeps 40 vectors like x, and SpectralStep() on
            a set, which keeps none: for millions of upper variables.
        stopping: rtol None is 1e-7 in float64 and 1e-4 in float32.
        warm_start: whether the inner steps begin at the last y, or always at y0; where y*(x) is not unique the two
            lead to different answers (Vicol et al. 2022).
        max_inner: limit of inner steps where `steps` is None.
        seed: of the random numbers that the objectives draw; each inner step has its own, the same in every evaluation.
        truncation: inner steps that are differentiated, the last ones; None for all that matter.
        mode: "reverse", or "forward" for few upper variables.

    Raises:
        TypeError: for an optimizer of another kind.
        ValueError: for numbers out of range, another mode, or a truncation in forward mode.

    Reference:
        Franceschi, Donini, Frasconi & Pontil 2017, Forward and reverse gradient-based hyperparameter optimization;
        Shaban, Cheng, Hatch & Boots 2019, Truncated back-propagation for bilevel optimization.

    Example:
        >>> from nestopt import bilevel
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y: ((y - 1) ** 2).sum(), lower=lambda x, y: ((y - x) ** 2).sum() + 0.5 * (y**2).sum()
        ... )
        >>> res = bilevel.Unrolled()(problem, torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
        >>> res.status.name, [round(v, 6) for v in res.x.tolist()]
        ('CONVERGED', [1.5, 1.5])
    """

    truncation: int | None = None
    mode: Literal["reverse", "forward"] = "reverse"

    assumptions: ClassVar[Assumptions] = Assumptions("through the solver", "Franceschi et al. 2017", products=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("reverse", "forward"):
            raise ValueError(f'Unrolled: mode must be "reverse" or "forward", but got {self.mode!r}.')
        if self.truncation is not None and (self.truncation < 1 or self.mode == "forward"):
            raise ValueError(
                f"Unrolled: truncation is a positive number of steps of the reverse pass, but got {self.truncation} "
                f"with mode={self.mode!r}; the forward mode differentiates all steps."
            )

    @property
    def _truncation(self) -> int | None:
        return self.truncation

    @property
    def _needs_curvature(self) -> bool:
        return super()._needs_curvature or self.mode == "forward"

    def _needed(self, steps: InnerSteps, x: Tensor, y: Tensor, rate: float, enough: float) -> int:
        if self.mode == "forward":  # the bound is larger than the error by up to the condition number
            enough = enough * ((1 - rate) / (1 + rate)) ** 2
        return super()._needed(steps, x, y, rate, enough)

    def _backward(self, steps: InnerSteps, f: Forward, tolerance: float) -> Pulled:
        if self.mode == "reverse":
            return super()._backward(steps, f, tolerance)
        n, m = steps.spaces.y.size, steps.spaces.x.size
        tangent = f.x.new_zeros(m, n)
        for segment in f.segments:
            carry = segment.carry
            tangent = tangent[:, :n] if segment.fresh else tangent
            for t in range(segment.first, segment.first + segment.count):
                one = replace(segment, first=t, count=1, carry=carry)
                carry, tangent, _ = steps.push(one, f.x, tangent)
        tangent = tangent[:, :n]
        point = steps.linearize(f.x, f.y, f.inner)
        counts = Counts(1, 1 + f.inner, m * (f.inner + 2))
        return Pulled(f.upper_x + tangent @ f.upper_y, tangent_residual(point, tangent, f.least), f.inner, 1, counts)


def tangent_residual(point: Linearization, tangent: Tensor, least: float) -> Tensor:
    """|F_y| |f_yy Z + f_yx| / m, a bound of |(Z - dy*/dx)' F_y| in the lower solution.

    Args:
        point: both objectives at (x, y).
        tangent: Z', of shape (upper variables, lower variables).
        least: m, the smallest curvature.

    Returns:
        The bound.
    """
    eye = torch.eye(len(tangent), dtype=tangent.dtype, device=tangent.device)
    residual = point.hessian @ tangent + point.cross @ eye
    bound: Tensor = point.upper_y.norm() * residual.norm() / least
    return bound
