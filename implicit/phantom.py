"""The phantom gradient: a few damped steps, differentiated at the solution."""

from __future__ import annotations

from dataclasses import dataclass, field

from .backward_pass import StepPass

__all__ = ["Phantom"]


@dataclass(frozen=True)
class Phantom(StepPass):
    r"""Differentiate `steps` damped steps y <- (1 - damping) y + damping T(y, theta), all at the solution y.

    The truncated series P = tau sum_{j < k} ((1 - tau) I + tau J)^j stands for the inverse of A = I - J, J = dT/dy,
    k = steps, tau = damping. The error is P A - I = -((1 - tau) I + tau J)^k: damping helps where J has eigenvalues
    near -1, and costs where they are near 1. `Phantom(k, 1.0)` is the Neumann series of k terms for any J, symmetric
    or not. A second derivative is an approximation of the same kind; `Unroll` has the exact one of its steps.

    For `argmin` and `root` T is y - step R(y, theta), as for `OneStep`.

    Cost: steps products with A', the one that measures the residual included.

    Args:
        steps: k; 5 in the paper.
        damping: tau, in (0, 1]; 0.5 to 0.9 in the paper.
        step: see `OneStep`.

    Raises:
        ValueError: for numbers out of their range.

    Reference:
        Geng et al., On training implicit models, 2021, equation 9 (Neumann-series-based phantom gradient).

    Example:
        >>> import torch
        >>> from nestopt import implicit
        >>> a = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        >>> T = lambda y, a: a - y / 2  # y = 2 a / 3
        >>> implicit.fixed_point(T, 2 * a.detach() / 3, a, solver=implicit.Phantom(5, 0.8)).backward()
        >>> round(float(a.grad) * 1.5, 6)
        1.00032
    """

    steps: int = field(kw_only=False)
    damping: float = field(default=1.0, kw_only=False)

    @property
    def plan(self) -> tuple[int, float]:
        """The steps and their damping."""
        return self.steps, self.damping
