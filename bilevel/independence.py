"""Whether the items of a batch are independent, as every batched solver takes for granted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["check_independent"]


def check_independent(owner: str, name: str, values: Callable[[Tensor], Tensor], y: Tensor) -> None:
    """Refuse a function whose k-th value depends on another item's variables.

    Of a weighted sum of half of the values, the gradient in the variables of the other half is exactly zero, at any
    point; a random half and the rest tell, by two gradients. Items whose gradients are not finite say nothing.

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
    order = torch.randperm(value.numel(), generator=generator)
    half = (order < value.numel() // 2).reshape(value.shape).to(value.device)
    weights = (0.5 + torch.rand(value.shape, generator=generator, dtype=torch.float64)).to(value)
    for chosen in (half, ~half):
        (slope,) = torch.autograd.grad(value, leaf, chosen * weights, retain_graph=True)
        others = slope[~chosen]
        if bool((torch.isfinite(others) & (others != 0)).any()):
            raise ValueError(
                f"{owner}: the values of {name} must be independent, the k-th one a function of the k-th item alone, "
                "but one item's value changes with another's variables; reduce over the last dimensions only, and look "
                "for means or normalisations over the batch."
            )
