"""Picard's iteration, damped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .fixed_point_solver import FixedPointSolver, FixedPointState, Problem, check_positive

__all__ = ["Picard"]


@dataclass(frozen=True)
class Picard(FixedPointSolver):
    """Solve y = T(y) by y <- (1 - damping) y + damping T(y).

    Converges from anywhere where T contracts, at the rate of the contraction; where T's Jacobian has real eigenvalues
    below 1, some however negative, a small enough damping contracts. As a root solver it is y <- y - damping R(y).

    CONVERGED means |T(y) - y| <= max(rtol max(|T(y0)|, |T(y0) - y0|), atol), measured at the point returned.
    NOT_CONTRACTING comes with the observed `rate`.

    Cost: one evaluation of T a step, and memory for a few vectors.

    Args:
        damping: 1 is the plain iteration; 2 / (2 - smallest - largest eigenvalue) is the best where they are real.
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in y's units.
        max_iter: limit of steps.

    Raises:
        ValueError: for a damping that is not positive, a negative tolerance or limit.

    Reference:
        Krasnosel'skii 1955; Kelley, Iterative methods for linear and nonlinear equations, 1995, chapter 4.

    Example:
        >>> import torch
        >>> from nestopt.implicit import Picard
        >>> res = Picard()(torch.cos, torch.tensor(1.0, dtype=torch.float64))
        >>> round(float(res.x), 9), res.status.name, round(res.rate, 2)
        (0.739085133, 'CONVERGED', 0.67)
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("Picard", "damping", self.damping)

    def _start(self, problem: Problem, y: Tensor, residual: Tensor) -> dict[str, Any]:
        return {}

    def _step(self, problem: Problem, s: FixedPointState, running: Tensor) -> dict[str, Any]:
        y = s.y - self.damping * s.residual
        return {"y": y, "residual": problem.evaluate(y), "length": self.damping * s.error}
