"""The symmetric Sylvester equation A Y + Y A = R, differentiable to any order whatever the multiplicities of A."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nestopt.implicit.transforms import alive, over_batched_gradients, recording, within_jvp

__all__ = ["sylvester"]


def sylvester(A: Tensor, a: Tensor, Q: Tensor, R: Tensor) -> Tensor:
    """The solution Y of A Y + Y A = R, as a function of A and R.

    In A's eigenvectors Y_ij = R_ij / (a_i + a_j): only sums of eigenvalues occur, never differences, so that repeated
    and clustered ones are harmless. Where a sum is zero, Y_ij is zero: the solution of least norm. Its derivatives are
    such equations again, A dY + dY A = dR - dA Y - Y dA.

    Args:
        A: symmetric and positive semidefinite, of shape (*batch, n, n).
        a: its eigenvalues, of shape (*batch, n); no derivative passes through them.
        Q: its eigenvectors, in columns, of shape (*batch, n, n); likewise.
        R: shape (*batch, n, n), or with more dimensions in front.

    Returns:
        A tensor of R's shape.
    """
    # torch.autograd.grad(is_grads_batched=True) brings a batch in disguise
    return over_batched_gradients(lambda rows: _sylvester(A, a, Q, rows), R)


def _sylvester(A: Tensor, a: Tensor, Q: Tensor, R: Tensor) -> Tensor:
    if R.ndim > A.ndim:
        more = R.shape[: R.ndim - A.ndim]
        A, a, Q = (t.expand(*more, *t.shape) for t in (A, a, Q))
    return _Sylvester.apply(A, a, Q, R)  # type: ignore[no-any-return, no-untyped-call]


class _Sylvester(torch.autograd.Function):
    @staticmethod
    def forward(A: Tensor, a: Tensor, Q: Tensor, R: Tensor) -> Tensor:
        total = a[..., :, None] + a[..., None, :]
        Y = (Q.mT @ R @ Q) / torch.where(total == 0, 1, total)
        return Q @ torch.where(total == 0, 0, Y) @ Q.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        # the OUTPUT is saved: it comes back attached to this node, so that a second derivative sees it move
        ctx.save_for_backward(output, *inputs[:3])
        ctx.save_for_forward(output, *inputs[:3])

    @staticmethod
    def backward(ctx: Any, v: Tensor | None) -> Any:
        if v is None:
            return None, None, None, None
        Y, A, a, Q = alive(ctx.saved_tensors)
        with recording([Y, A, v]):
            S = sylvester(A, a, Q, v)
            return (-(S @ Y.mT + Y.mT @ S) if ctx.needs_input_grad[0] else None), None, None, S

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        A_dot, _, _, R_dot = tangents
        with within_jvp(ctx, [t for t in (A_dot, R_dot) if t is not None]) as (Y, A, a, Q):
            right = torch.zeros_like(Y) if R_dot is None else R_dot
            if A_dot is not None:
                right = right - A_dot @ Y - Y @ A_dot
            return sylvester(A, a, Q, right)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Tensor, int]:
        return _Sylvester.apply(*mapped_in_front(info, in_dims, inputs)), 0  # type: ignore[no-untyped-call]


def mapped_in_front(info: Any, dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """The tensors of a vmap rule with the mapped dimension in front of each, also of those that do not have it.

    Args:
        info: of the rule.
        dims: where the dimension is, None for nowhere.
        tensors: the inputs.

    Returns:
        One tensor for each.
    """
    return [
        t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip(tensors, dims, strict=True)
    ]
