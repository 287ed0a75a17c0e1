"""Persistent evolution strategies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .assumptions import Assumptions
from .evolution import Evolution, EvolutionState

__all__ = ["PES"]


@dataclass(frozen=True)
class PES(Evolution):
    """Persistent evolution strategies: unbiased hypergradients through truncated inner problems, without derivatives.

    N antithetic pairs of particles run the inner problem at x + eps_i and x - eps_i, each from its own iterate of the
    truncation before. Truncation r draws new eps_i ~ N(0, sigma^2 I), adds them to the pair's sum xi_i, takes `steps`
    inner steps, and estimates

        g = 1/(2 N sigma^2) sum_i (F(x + eps_i, y_i+) - F(x - eps_i, y_i-)) xi_i,

    whose sum over an episode of `truncations` is unbiased for the smoothed losses; the sums and iterates begin anew
    with each episode. The sums make the variance depend on the number of truncations (`ESSingle`'s does not).
    Perturbations come by default in uniformly random orthogonal frames, which have the same covariance and leave no
    sampling error where a frame is full.

    Without `steps` an episode is one truncation, which goes on from the particles' last iterates until all of them
    have solved their lower levels, to what the differences of losses need; it is then a difference of F(x, y*(x)) in
    random frames, and x moves by the automatic rules. Only gradients of f are used, and with `lower_step` none.

    `error` is the largest of |f_y| at x (with a lower_step: the length of its last step), of "sampling", the standard
    error of g from its independent halves (the second has half the sigma, so that the smoothing's bias shows as well,
    unless sigma is given), and of |P_X(x - g) - x|; CONVERGED means error <= max(rtol (|F_x| + |F_y|), atol) with the
    scale taken at the start.

    Cost of an outer step: 2 N + 1 runs of the inner steps, all at once, and as many values of F.

    Args:
        steps: inner steps of a truncation; None for as many as solve the lower level.
        truncations: of an episode; each is one outer step, and the loss is the mean of F at their ends.
        particles: N, at least 2; None for twice the number of upper variables.
        sigma: of the perturbations, in units of x; None for about eps^(1/4) max(1, |x|), which suits smooth problems. A
            rough lower_step wants one above the size of its roughness.
        optimizer: the inner one; None for heavy ball of automatic coefficients.
        lower_step: (x, y, t) -> y in place of the optimizer: any map, differentiable or not.
        upper_step: None for QuasiNewtonStep() on the whole space and SpectralStep() on a set; with several truncations
            ConstantStep(size) or TorchOptimizer(...).
        stopping: rtol None is 1e-5 in float64 and 3e-3 in float32.
        seed: of all perturbations, and of the random numbers that the objectives draw, which all particles share.
        orthogonal: False for independent normal perturbations, as published.
        batched: all particles in one call by torch.func.vmap; False for functions that it cannot take.
        max_inner: limit of inner steps where `steps` is None.

    Raises:
        ValueError: for numbers out of range, truncations or lower_step without steps, or truncations without an
            upper_step.

    Reference:
        Vicol, Metz & Sohl-Dickstein 2021, Unbiased gradient estimation in unrolled computation graphs with persistent
        evolution strategies, algorithm 2.

    Example:
        >>> import torch
        >>> from nestopt import bilevel
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y: ((y - 1) ** 2).sum(), lower=lambda x, y: ((y - x) ** 2).sum() + 0.5 * (y**2).sum()
        ... )
        >>> res = bilevel.PES()(problem, torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
        >>> res.status.name, [round(v, 4) for v in res.x.tolist()]
        ('CONVERGED', [1.5, 1.5])
    """

    assumptions: ClassVar[Assumptions] = Assumptions("through the solver", "Vicol et al. 2021")

    def perturb(self, state: EvolutionState, fresh: Tensor, begins: bool) -> tuple[Tensor, Tensor]:
        """New perturbations each truncation; their sum since the episode began."""
        return fresh, fresh if begins else state.sums + fresh
