"""Newton steps of equality-constrained problems, where rows may depend on each other and curvature may vanish."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["EqualityStep", "convexity_shift", "equality_step"]


@dataclass(frozen=True)
class EqualityStep:
    """The solution of min d'W d / 2 + g'd, C d = -c.

    Attributes:
        d: the step, the shortest where W is singular on the null space of C.
        dual: multipliers of C, the shortest where its rows depend on each other.
        solved: whether C d = -c, and stationarity, hold to rounding, with W nonnegative on the null space.
        free: the dimension of the null space of C on which W vanishes: directions that nothing determines.
    """

    d: Tensor
    dual: Tensor
    solved: bool
    free: int


def equality_step(W: Tensor, g: Tensor, C: Tensor, c: Tensor) -> EqualityStep:
    """Solve min d'W d / 2 + g'd, C d = -c by the range and the null space of C.

    Args:
        W: symmetric, (n, n).
        g: (n,).
        C: (r, n).
        c: (r,).

    Returns:
        The EqualityStep.

    Example:
        >>> step = equality_step(torch.eye(2), torch.zeros(2), torch.ones(1, 2), -torch.ones(1))
        >>> step.d, step.dual, step.solved
        (tensor([0.5000, 0.5000]), tensor([-0.5000]), True)
    """
    n, eps = len(g), torch.finfo(g.dtype).eps
    lengths = C.norm(dim=-1).clamp_min(torch.finfo(g.dtype).tiny)
    U, sigma, V = torch.linalg.svd(C / lengths[:, None], full_matrices=True)
    cutoff = 100 * max(C.shape) * eps
    rank = int((sigma > cutoff * sigma[:1]).sum()) if len(sigma) else 0
    Y, Z, U, sigma = V[:rank].mT, V[rank:].mT, U[:, :rank], sigma[:rank]
    scaled = c / lengths
    d = -Y @ ((U.mT @ scaled) / sigma)
    missed = (C @ d + c) / lengths
    solved = float(missed.norm()) <= 1e4 * eps * max(1.0, float(scaled.norm()))
    reduced = Z.mT @ W @ Z
    values, vectors = torch.linalg.eigh((reduced + reduced.mT) / 2)
    largest = max(float(W.abs().amax()) if n else 0.0, torch.finfo(g.dtype).tiny)
    flat = values.abs() <= cutoff * n * largest
    solved &= bool((values > -cutoff * n * largest).all())
    slope = Z.mT @ (g + W @ d)
    weights = vectors.mT @ slope
    # along a flat direction a slope means that the program has no least value
    scale = max(1.0, float(g.norm()), float((W @ d).norm()))
    solved &= float(torch.where(flat, weights, 0).norm()) <= 1e4 * eps * scale
    d = d - Z @ (vectors @ torch.where(flat, 0, weights / torch.where(flat, 1, values)))
    dual = -(U @ ((Y.mT @ (g + W @ d)) / sigma)) / lengths
    return EqualityStep(d, dual, bool(solved) and bool(torch.isfinite(d).all()), int(flat.sum()))


def convexity_shift(W: Tensor) -> float:
    """What has to be added to W's diagonal to make it positive semidefinite.

    Args:
        W: symmetric.

    Returns:
        Zero where it is so already.
    """
    values = torch.linalg.eigvalsh(W)
    largest, lowest = float(values.abs().amax()), float(values[0])
    return 0.0 if lowest >= -1e-12 * largest else 1e-8 * largest - lowest
