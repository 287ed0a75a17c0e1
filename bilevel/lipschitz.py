"""Lipschitz constants of gradients, estimated from gradients alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["largest_curvature"]


def largest_curvature(
    gradient: Callable[[Tensor], Tensor],
    at: Tensor,
    *,
    steps: int = 10,
    seed: int = 0,
    slope: Tensor | None = None,
    norm: Callable[[Tensor], Tensor] = torch.linalg.vector_norm,
) -> tuple[Tensor, Tensor]:
    """|lambda|_max of the symmetric Jacobian of a gradient field, by power steps on differences of gradients.

    From a random u it repeats u <- (g(at + t u) - g(at)) / t normalised, with t = eps^(1/2) max(1, |at|) in units of u,
    which needs no second derivatives, and returns the largest Rayleigh norm that it saw: a lower bound of the constant,
    usually within 10 % after ten steps. Multiply by a safety factor.

    Cost: steps + 1 gradients (steps, when the slope at the point is passed).

    Args:
        gradient: v -> g(v), of v's shape.
        at: raveled point.
        steps: power steps.
        seed: of the random start.
        slope: g(at), when it is known.
        norm: of the space; an Oracle's, where vectors are spread over processes.

    Returns:
        The estimate, a 0-d tensor, and the direction where it was seen.

    Example:
        >>> scales = torch.tensor([1.0, 4.0], dtype=torch.float64)
        >>> value, _ = largest_curvature(lambda v: scales * v, torch.zeros(2, dtype=torch.float64), steps=30)
        >>> round(float(value), 4)
        4.0
    """
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(at.shape, generator=generator, dtype=torch.float64).to(at)
    u = u / norm(u).clamp_min(torch.finfo(at.dtype).tiny)
    base = gradient(at) if slope is None else slope
    t = torch.finfo(at.dtype).eps ** 0.5 * max(1.0, float(norm(at)))
    best, where = at.new_zeros(()), u
    for _ in range(steps):
        image = (gradient(at + t * u) - base) / t
        size = norm(image)
        if not bool(size > 0):  # a flat direction, or NaN, which the caller's own check names
            break
        if bool(size > best):
            best, where = size, u
        u = image / size
    return best, where
