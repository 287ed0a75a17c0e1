"""Newton's method regularised by the root of the gradient's norm."""

from __future__ import annotations

from dataclasses import dataclass

from .shifted_newton import ShiftedNewton

__all__ = ["RegularizedNewton"]


@dataclass(frozen=True)
class RegularizedNewton(ShiftedNewton):
    """Minimise f(y) by y+ = y + d, (H + (lam + s) I) d = -grad f, lam = sqrt(M |grad f|), without a line search.

    For convex f whose Hessian varies by at most 2 M |u - v| this lowers f to its minimum at Newton's rate 1/k^2 from
    any start, and near a strict minimum |g+| = O(|g|^1.5). M need not be known: it starts from a tenth of what the last
    two gradients show, |g+ - g - H d| / |d|^2, and is raised until f falls by (2/3 lam + s/2) |d|^2 and
    |g+| <= max(2 (lam + s) |d|, |g| / 2). s is 0, or the size of the lowest eigenvalue where that is negative. Up to
    `dense_below` variables H is materialised and diagonalised, so that another M costs no product; beyond, CG solves to
    |residual| <= min(0.1, sqrt(|g| / |g0|)) |g|, and where it meets curvature <= 0 a line search leaves the saddle.

    CONVERGED means |grad| <= max(rtol |grad(y0)|, atol), measured at x; STAGNATED and LINE_SEARCH_FAILED, that no M
    gives a step, at and above the rounding level; DIVERGED, that f is unbounded below.

    Cost of a step: one gradient with a graph for each M that is tried, and n products, or those of CG.

    Args:
        dense_below: most variables for which H is materialised (n products, n^2 numbers, about 10 n^3 operations).
        cg_max_iter: limit of products for one step beyond that.
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in the units of the gradient.
        max_iter: limit of Newton steps; 10 to 50 are common.

    Raises:
        ValueError: for a negative tolerance or limit.

    Reference:
        Mishchenko 2023, Regularized Newton method with global O(1/k^2) convergence, algorithm 3 (AdaN).

    Example:
        >>> import torch
        >>> res = RegularizedNewton()(lambda y: (y.exp() - 2 * y).sum(), torch.zeros(2, dtype=torch.float64))
        >>> res.x, res.status.name
        (tensor([0.6931, 0.6931], dtype=torch.float64), 'CONVERGED')
    """

    @property
    def _lifetime(self) -> int:
        return 1
