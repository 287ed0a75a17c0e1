"""Whether the items of a batch are independent, as every batched solver takes for granted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["check_independent"]


def check_independent(owner: str, name: str, values: Callable[[Tensor], Tensor], y: Tensor) -> None:
    """Refuse a function whose k-th value depends on another item's variables.

    The gradient of sum_k s_k f_k in y_k is s_k times that of f_k alone, for random weights s; two gradients tell.

    Args:
        owner: in whose name the error is raised.
        name: what the function is called.
        values: of y, shape (*batch,).
        y: shape (*batch, n); x or y of all items.

    Raises:
        ValueError: if it does.
    """
    leaf = y.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = values(leaf)
    if not value.requires_grad or value.numel() < 2:
        return
    generator = torch.Generator().manual_seed(0)
    weights = (0.5 + torch.rand(value.shape, generator=generator, dtype=torch.float64)).to(value)
    (plain,) = torch.autograd.grad(value, leaf, torch.ones_like(value), retain_graph=True)
    (weighted,) = torch.autograd.grad(value, leaf, weights)
    expected = weights[..., None] * plain
    size = plain.norm(dim=-1)
    sound = torch.isfinite(size)
    limit = torch.finfo(y.dtype).eps ** 0.5 * size[sound].amax() if bool(sound.any()) else 0.0
    wrong = sound & ~((weighted - expected).norm(dim=-1) <= limit)
    if bool(wrong.any()):
        raise ValueError(
            f"{owner}: the values of {name} must be independent, the k-th one a function of the k-th item alone, but "
            "the weight of one item's value changes another's gradient; reduce over the last dimensions only, and look "
            "for means or normalisations over the batch."
        )
