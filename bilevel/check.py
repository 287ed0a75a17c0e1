"""The gradient check: a hypergradient against central differences of a re-solved hyperobjective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nestopt.implicit import NewtonCG
from nestopt.linalg import LinearSolver

from .estimate import hypergradient
from .lower_choice import LowerSolver, SmoothLevel, lower_level
from .problem import Problem, Spaces

__all__ = ["HypergradientCheck", "HypergradientError", "check_hypergradient"]


class HypergradientError(AssertionError):
    """The estimator and the central differences disagree; the message holds the table."""


@dataclass(frozen=True)
class HypergradientCheck:
    """Directional derivatives, estimator against differences.

    Attributes:
        estimated: <hypergradient, d>, one a direction.
        differences: central differences of phi along d, extrapolated (Richardson).
        uncertainty: of the differences themselves: truncation and rounding.
        errors: |estimated - differences| over the larger of |hypergradient| and |differences|.
        passed: per direction.
    """

    estimated: Tensor
    differences: Tensor
    uncertainty: Tensor
    errors: Tensor
    passed: Tensor

    def __str__(self) -> str:
        head = f"{'direction':>9} {'estimated':>18} {'differences':>18} {'uncertainty':>12} {'error':>9}  passed"
        rows = zip(self.estimated, self.differences, self.uncertainty, self.errors, self.passed, strict=True)
        body = [
            f"{i:>9} {float(a):>18.10e} {float(b):>18.10e} {float(u):>12.1e} {float(e):>9.1e}  {'yes' if ok else 'NO'}"
            for i, (a, b, u, e, ok) in enumerate(rows)
        ]
        return "\n".join([head, *body])


def check_hypergradient(
    problem: Problem,
    x: Any,
    y: Any,
    directions: int = 5,
    *,
    linear_solver: LinearSolver | None = None,
    lower_solver: LowerSolver | None = None,
    data: Any = None,
    rtol: float | None = None,
    step: float | None = None,
    seed: int = 0,
) -> HypergradientCheck:
    """Compare the hypergradient at (x, y) with central differences of phi(x) = F(x, y*(x)), re-solved at each point.

    For random unit directions d, (phi(x + h d) - phi(x - h d)) / 2h is formed at h and h / 2 and extrapolated; both
    solves start from y. A wrong estimator, a y that is not the lower solution, an objective that is not smooth, or a
    function that hides a variable from autograd all show up here.

    Cost: one hypergradient and 4 lower solves a direction.

    Args:
        problem: the problem; where a constraint becomes active, or a prox has a kink, within h of x, the differences
            disagree with every one-sided derivative, and say so.
        x: upper variable.
        y: the computed lower solution whose hypergradient is to be checked.
        directions: how many random directions.
        linear_solver: of the hypergradient.
        lower_solver: of the re-solves; it must be accurate, as the kind's own (None) is.
        data: third argument of the objectives, when they take one.
        rtol: allowed error relative to |hypergradient|, beyond the differences' own uncertainty; None for 1e-5 in
            float64 and 2e-2 in float32.
        step: h; None for eps^(1/5) * max(1, |x|), which balances truncation and rounding after extrapolation.
        seed: of the directions.

    Returns:
        The table, when every direction passes.

    Raises:
        HypergradientError: with the table, when a direction fails or anything is not finite.
        ValueError: if directions is below 1.

    Example:
        >>> from nestopt import bilevel
        >>> problem = bilevel.Problem(lambda x, y: (y**2).sum() / 2, lambda x, y: (y**2).sum() - (x * y).sum())
        >>> x = torch.tensor([2.0, 4.0], dtype=torch.float64)
        >>> bool(bilevel.check_hypergradient(problem, x, x / 2).passed.all())
        True
    """
    if directions < 1:
        raise ValueError(f"check_hypergradient: directions must be at least 1, but got {directions}.")
    hg = hypergradient(problem, x, y, linear_solver, data=data, certificate=False)
    spaces = Spaces.of(x, y)
    x_vector, y_vector = spaces.x.flatten(x).detach(), spaces.y.flatten(y).detach()
    eps = torch.finfo(x_vector.dtype).eps
    h = eps**0.2 * max(1.0, float(x_vector.norm())) if step is None else step
    rtol = (1e-5 if x_vector.dtype == torch.float64 else 2e-2) if rtol is None else rtol
    level = lower_level(problem, spaces, data, lower_solver)
    if isinstance(level, SmoothLevel) and lower_solver is None:
        level = lower_level(problem, spaces, data, NewtonCG(rtol=0.0, atol=0.0))

    def phi(point: Tensor) -> Tensor:
        found = level.solve(point, y_vector, hg.dual if len(hg.dual) else None)
        return problem.oracle(spaces, data).values(point, found.y)[0]

    generator = torch.Generator().manual_seed(seed)
    vector = spaces.x.flatten(hg.value)
    estimated, differences, uncertainty = [], [], []
    for _ in range(directions):
        d = torch.randn(spaces.x.size, generator=generator, dtype=torch.float64).to(x_vector)
        d = d / d.norm()
        values = [phi(x_vector + factor * h * d) for factor in (1.0, -1.0, 0.5, -0.5)]
        coarse, fine = (values[0] - values[1]) / (2 * h), (values[2] - values[3]) / h
        estimated.append(torch.dot(vector, d))
        differences.append((4 * fine - coarse) / 3)
        uncertainty.append((fine - coarse).abs() * h**2 + 8 * eps * torch.stack(values).abs().amax() / h)
    e, f, u = torch.stack(estimated), torch.stack(differences), torch.stack(uncertainty)
    scale = torch.maximum(vector.norm(), f.abs()).clamp_min(torch.finfo(f.dtype).tiny)
    table = HypergradientCheck(e, f, u, (e - f).abs() / scale, (e - f).abs() <= rtol * scale + u)
    if not bool(table.passed.all()):  # NaN fails
        raise HypergradientError(
            f"check_hypergradient: the hypergradient ({hg.status}) disagrees with central differences (h = {h:.1e}) "
            f"in {int((~table.passed).sum())} of {directions} directions:\n{table}\n|f_y| at the given y is "
            f"{hg.lower_gradient_norm:.1e}, the adjoint residual {hg.linear_residual:.1e}. Solve the lower level "
            "further if the first is large, the adjoint system if the second is; otherwise look for .detach(), "
            "torch.no_grad(), kinks, or randomness in the objectives."
        )
    return table
