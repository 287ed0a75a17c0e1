"""Newton's method with a Hessian that serves several steps."""

from __future__ import annotations

from dataclasses import dataclass

from .shifted_newton import ShiftedNewton

__all__ = ["LazyNewton"]


@dataclass(frozen=True)
class LazyNewton(ShiftedNewton):
    """Minimise f(y) by regularised Newton steps whose Hessian is renewed every `refresh_every` steps only.

    y+ = y + d, (H(z) + (lam + s) I) d = -grad f(y) with z the point of the last renewal and lam = sqrt(M |grad f(y)|):
    see `RegularizedNewton` for s, M and the test that a step has to pass; one that fails it with an old H has H renewed
    at once. Up to `dense_below` variables H is materialised and diagonalised once for all its steps, each of which then
    costs a gradient. Beyond, its products go along the graph of the old gradient, which saves little: use NewtonCG.

    CONVERGED means |grad| <= max(rtol |grad(y0)|, atol), measured at x; STAGNATED and LINE_SEARCH_FAILED, that no M
    gives a step, at and above the rounding level; DIVERGED, that f is unbounded below.

    Cost of a step: one gradient for each M that is tried; a renewal: n products, or those of CG for each step.

    Args:
        dense_below: most variables for which H is materialised (n products, n^2 numbers, about 10 n^3 operations).
        cg_max_iter: limit of products for one step beyond that.
        refresh_every: steps with one Hessian; the theory's best is the price of a Hessian in gradients, n where it is
            made of products; 5 to 20 in practice.
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in the units of the gradient.
        max_iter: limit of steps.

    Raises:
        ValueError: for a negative tolerance or limit, or a lifetime below 1.

    Reference:
        Doikov, Chayti & Jaggi 2023, Second-order optimization with lazy Hessians, algorithm 2; Mishchenko 2023 for M.

    Example:
        >>> import torch
        >>> res = LazyNewton()(lambda y: (y.exp() - 2 * y).sum(), torch.zeros(2, dtype=torch.float64))
        >>> res.x, res.status.name
        (tensor([0.6931, 0.6931], dtype=torch.float64), 'CONVERGED')
    """

    refresh_every: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.refresh_every, int) or self.refresh_every < 1:
            raise ValueError(f"LazyNewton: refresh_every must be an integer >= 1, but got {self.refresh_every!r}.")

    @property
    def _lifetime(self) -> int:
        return self.refresh_every
