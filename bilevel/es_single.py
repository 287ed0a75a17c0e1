"""ES-Single: one perturbation a particle for the whole inner problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .assumptions import Assumptions
from .evolution import Evolution, EvolutionState

__all__ = ["ESSingle"]


@dataclass(frozen=True)
class ESSingle(Evolution):
    """ES-Single: evolution strategies whose particles keep one perturbation for the whole inner problem.

    As `PES`, but the pair's eps_i is drawn once an episode and held through its truncations,

        g = 1/(2 N sigma^2) sum_i (F(x + eps_i, y_i+) - F(x - eps_i, y_i-)) eps_i,

    which is simpler, has a variance that does not grow with the number of truncations, and is unbiased for the smoothed
    losses where x is held during an episode (on quadratics for the losses themselves); while x moves it lags.

    Without `steps`, `error`, cost, and all arguments: see `PES`; the two coincide where an episode is one truncation,
    as it is by default. CONVERGED means error <= max(rtol (|F_x| + |F_y|), atol) with the scale taken at the start.

    Args:
        steps: inner steps of a truncation; None for as many as solve the lower level.
        truncations: of an episode; each is one outer step.
        particles: N, at least 2; None for twice the number of upper variables.
        sigma: of the perturbations; None for about eps^(1/4) max(1, |x|).
        optimizer: the inner one; None for heavy ball of automatic coefficients.
        lower_step: (x, y, t) -> y in place of the optimizer: any map, differentiable or not.
        upper_step: None for QuasiNewtonStep() or SpectralStep(); with several truncations ConstantStep(size) or
            TorchOptimizer(...).
        stopping: rtol None is 1e-5 in float64 and 3e-3 in float32.
        seed: of all perturbations, and of the random numbers that the objectives draw.
        orthogonal: False for independent normal perturbations, as published.
        batched: all particles in one call by torch.func.vmap; False for functions that it cannot take.
        max_inner: limit of inner steps where `steps` is None.

    Raises:
        ValueError: as `PES`.

    Reference:
        Vicol 2023, Low-variance gradient estimation in unrolled computation graphs with ES-Single, algorithm 1.

    Example:
        >>> import torch
        >>> from nestopt import bilevel
        >>> problem = bilevel.Problem(
        ...     lambda x, y: ((y - 1) ** 2).sum(), lambda x, y: ((y - x) ** 2).sum(), upper_set=None
        ... )
        >>> step = lambda x, y, t: ((y + x) / 2 * 1e6).round() / 1e6  # no derivative
        >>> method = bilevel.ESSingle(steps=30, lower_step=step, sigma=0.1)
        >>> state = method.init(problem, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
        >>> round(state.hypergradient.item(), 3)
        -2.0
    """

    assumptions: ClassVar[Assumptions] = Assumptions("through the solver", "Vicol 2023")

    def perturb(self, state: EvolutionState, fresh: Tensor, begins: bool) -> tuple[Tensor, Tensor]:
        """One perturbation a pair for the whole episode."""
        kept = fresh if begins else state.noise
        return kept, kept
