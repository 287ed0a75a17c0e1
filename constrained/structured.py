"""Jacobians of projections as operators: a diagonal with few outer products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nestopt.linalg import LinearOperator
from nestopt.linalg.matrices import dense_product

__all__ = ["BlockDiagonal", "DiagonalPlusLowRank", "block_jacobian"]


class DiagonalPlusLowRank(LinearOperator):
    """diag(d) + sum_i w_i u_i u_i', symmetric and never stored: two thin products an application.

    Args:
        diagonal: d, of shape (*batch, n).
        rows: the u_i, of shape (*batch, k, n), or (k, n) for all; None for a diagonal alone.
        weights: the w_i, of shape (*batch, k); None for -1 each, as in I - Q Q'.

    Example:
        >>> import torch
        >>> (DiagonalPlusLowRank(torch.ones(2), torch.tensor([[0.6, 0.8]])) @ torch.tensor([3.0, 4.0])).abs() < 1e-6
        tensor([True, True])
    """

    def __init__(self, diagonal: Tensor, rows: Tensor | None = None, weights: Tensor | None = None) -> None:
        super().__init__((*diagonal.shape, diagonal.shape[-1]), diagonal.dtype, diagonal.device, symmetric=True)
        self.diagonal, self.rows, self.weights = diagonal, rows, weights

    def _matvec(self, v: Tensor) -> Tensor:
        out = self.diagonal * v
        if self.rows is None:
            return out
        inner = dense_product(self.rows, v)
        inner = -inner if self.weights is None else self.weights * inner
        return out + dense_product(self.rows.mT, inner)


class BlockDiagonal(LinearOperator):
    """Small symmetric blocks along the diagonal.

    Args:
        blocks: shape (*batch, k, size, size); the operator has shape (*batch, k size, k size).

    Example:
        >>> BlockDiagonal(torch.ones(2, 2, 2)) @ torch.arange(4.0)
        tensor([1., 1., 5., 5.])
    """

    def __init__(self, blocks: Tensor) -> None:
        n = blocks.shape[-3] * blocks.shape[-1]
        super().__init__((*blocks.shape[:-3], n, n), blocks.dtype, blocks.device, symmetric=True)
        self.blocks = blocks

    def _matvec(self, v: Tensor) -> Tensor:
        parts = v.reshape(*v.shape[:-1], *self.blocks.shape[-3:-1])
        return (self.blocks @ parts[..., None])[..., 0].reshape(v.shape)


def block_jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> BlockDiagonal:
    """The Jacobian of a function of independent blocks, by one backward pass for each place in a block.

    Args:
        function: of blocks (*batch, k, size) to as many, each a function of its own with a symmetric Jacobian.
        x: the blocks, detached.

    Returns:
        The operator, of shape (*batch, k size, k size).
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.clone().requires_grad_()
        value = function(leaf)
        rows = [
            torch.autograd.grad(value[..., i].sum(), leaf, retain_graph=True, materialize_grads=True)[0]
            for i in range(x.shape[-1])
        ]
    blocks = torch.stack(rows, dim=-2).detach()
    return BlockDiagonal((blocks + blocks.mT) / 2)
