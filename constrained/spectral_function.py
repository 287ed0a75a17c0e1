"""Functions of eigenvalues and of singular values, differentiable to any order whatever the multiplicities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nestopt.implicit.pullback import pull
from nestopt.implicit.transforms import (
    alive,
    forward_mode,
    over_batched_gradients,
    recording,
    tracked,
    transformed,
    within_jvp,
)

from .symmetric_sylvester import mapped_in_front, sylvester

__all__ = [
    "differentiated",
    "dilation",
    "finite_or",
    "full_column_rank",
    "polar_factor",
    "polar_product",
    "positive_part",
    "positive_product",
    "shrink",
    "shrink_product",
    "shrunk_sum",
    "surplus",
    "with_value",
]

Derivative = Callable[..., Tensor]


def differentiated(*tensors: Tensor) -> bool:
    """Whether anything differentiates one of the tensors, so that a formula for derivatives is worth its cost."""
    recorded = torch.is_grad_enabled() or transformed() or forward_mode()
    return recorded and any(tracked(tensor, mapped=False) for tensor in tensors)


def finite_or(x: Tensor, otherwise: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices, with `otherwise` in the place of those that are not finite, which LAPACK refuses; and which are.

    Args:
        x: shape (*batch, m, n).
        otherwise: shape (m, n).

    Returns:
        The matrices, and a boolean tensor of shape (*batch, 1, 1).
    """
    finite = torch.isfinite(x).flatten(-2).all(-1)[..., None, None]
    return torch.where(finite, x, otherwise), finite


def with_value(formula: Tensor, value: Tensor) -> Tensor:
    """The formula's derivatives of every order with a value that is computed better."""
    return formula - formula.detach() + value


class _SelfAdjoint(torch.autograd.Function):
    """Y(X), computed before, with a self-adjoint derivative, `derivative(X, Y, *constants, direction)`."""

    @staticmethod
    def forward(derivative: Derivative, X: Tensor, Y: Tensor, *constants: Tensor) -> Tensor:
        return Y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.derivative, X, _, *constants = inputs
        # the OUTPUT is saved: it comes back attached to this node, so that a second derivative sees it move
        ctx.save_for_backward(X, output, *constants)
        ctx.save_for_forward(X, output, *constants)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None) -> Any:
        if v is None:
            return (None,) * len(ctx.needs_input_grad)
        saved = alive(ctx.saved_tensors)
        with recording([*saved, v]):
            pulled = over_batched_gradients(lambda rows: ctx.derivative(*saved, rows), v)
        return None, pulled, *(None,) * (len(ctx.needs_input_grad) - 2)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        direction = tangents[1]
        with within_jvp(ctx, [] if direction is None else [direction]) as saved:
            direction = torch.zeros_like(saved[1]) if direction is None else direction
            return over_batched_gradients(lambda rows: ctx.derivative(*saved, rows), direction)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], derivative: Derivative, *inputs: Tensor) -> tuple[Tensor, int]:
        return _SelfAdjoint.apply(derivative, *mapped_in_front(info, in_dims[1:], inputs)), 0  # type: ignore[no-untyped-call]


# eigenvalues


def positive_part(X: Tensor, kink: float) -> Tensor:
    """Q max(L, 0) Q' for symmetric X = Q L Q'.

    With |X| = 2 Y - X for this Y, the derivative is dY = (dX + X W + W X) / 2 with |X| W + W |X| = dX: in the
    eigenvectors, dX_ij (max(l_i, 0) + max(l_j, 0)) / (|l_i| + |l_j|).

    Args:
        X: symmetric, of shape (*batch, n, n); what is not finite becomes NaN, item by item.
        kink: the factor of dX_ij where l_i = l_j = 0 up to rounding, where there is no derivative: 1 for the limit
            from above, 0 for that from below.

    Returns:
        A tensor of X's shape.
    """
    n = X.shape[-1]
    X, finite = finite_or(X, torch.eye(n, dtype=X.dtype, device=X.device))
    values, Q = torch.linalg.eigh(X.detach())
    Y = (Q * values.clamp_min(0)[..., None, :]) @ Q.mT
    if differentiated(X):

        def derivative(X: Tensor, Y: Tensor, values: Tensor, Q: Tensor, H: Tensor) -> Tensor:
            size, _ = _sizes(values)
            W = sylvester(2 * Y - X, size, Q, H)
            return with_value((H + X @ W + W @ X) / 2, positive_product(values, Q, H, kink).detach())

        Y = _SelfAdjoint.apply(derivative, X, Y, values, Q)  # type: ignore[no-untyped-call]
    return torch.where(finite, Y, torch.nan)


def positive_product(values: Tensor, Q: Tensor, H: Tensor, kink: float) -> Tensor:
    """The derivative of `positive_part` in the direction H.

    Args:
        values: eigenvalues, of shape (*batch, n).
        Q: eigenvectors in columns, of shape (*batch, n, n).
        H: shape (*sides, *batch, n, n).
        kink: as for `positive_part`.

    Returns:
        A tensor of H's shape.
    """
    size, null = _sizes(values)
    part = torch.where(null, 0, values.clamp_min(0))
    total = size[..., :, None] + size[..., None, :]
    factor = (part[..., :, None] + part[..., None, :]) / torch.where(total == 0, 1, total)
    return Q @ (torch.where(total == 0, kink, factor) * (Q.mT @ H @ Q)) @ Q.mT


def _sizes(values: Tensor) -> tuple[Tensor, Tensor]:
    """|l|, zero where it is nothing but rounding, and where that is."""
    size = values.abs()
    largest = size.amax(-1, keepdim=True) if size.shape[-1] else size
    null = size <= 10 * torch.finfo(size.dtype).eps * largest
    return torch.where(null, 0, size), null


# singular values


def dilation(X: Tensor) -> Tensor:
    """The symmetric [[0, X], [X', 0]], whose eigenvalues are plus and minus X's singular values, and zeros.

    Args:
        X: shape (*batch, m, n).

    Returns:
        A tensor of shape (*batch, m + n, m + n).
    """
    m, n = X.shape[-2:]
    top = torch.cat([X.new_zeros((*X.shape[:-2], m, m)), X], -1)
    return torch.cat([top, torch.cat([X.mT, X.new_zeros((*X.shape[:-2], n, n))], -1)], -2)


def shrink(X: Tensor, threshold: Tensor) -> Tensor:
    """U max(S - threshold, 0) V' for X = U S V'.

    Its derivative is `shrink_product`, and higher ones come from the dilation Z of X: this is the upper right block of
    2 max(Z - threshold, 0), because the spectrum of Z is symmetric. At the kink S_i = threshold > 0 the limit from
    below is taken.

    Args:
        X: finite, of shape (*batch, m, n).
        threshold: >= 0, of shape (*batch, 1, 1).

    Returns:
        A tensor of X's shape.
    """
    U, S, Vh = torch.linalg.svd(X.detach(), full_matrices=False)
    value = (U * (S[..., None, :] - threshold.detach()).clamp_min(0)) @ Vh
    if differentiated(X, threshold):
        t = threshold.expand(*X.shape[:-2], 1, 1)
        value = _Shrink.apply(X, t, value, U, S, Vh)  # type: ignore[no-untyped-call]
    return torch.where(threshold == 0, X, value)


class _Shrink(torch.autograd.Function):
    """Y(X, t), computed before, with dY = shrink_product(dX) - E dt, E from the singular vectors that are kept."""

    @staticmethod
    def forward(X: Tensor, t: Tensor, Y: Tensor, *factors: Tensor) -> Tensor:
        return Y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        X, t, _, *factors = inputs
        ctx.save_for_backward(X, t, *factors)
        ctx.save_for_forward(X, t, *factors)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None) -> Any:
        if v is None:
            return (None,) * 6
        X, t, U, S, Vh = alive(ctx.saved_tensors)
        with recording([X, t, v]):
            by_point = over_batched_gradients(lambda rows: _by_point(X, t, U, S, Vh, rows), v)
            wanted = ctx.needs_input_grad[1]
            by_level = -(_by_level(X, t, U, S, Vh) * v).sum((-2, -1), keepdim=True) if wanted else None
        return by_point, by_level, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        X_dot, t_dot = tangents[:2]
        with within_jvp(ctx, [dot for dot in (X_dot, t_dot) if dot is not None]) as (X, t, U, S, Vh):
            X_dot = torch.zeros_like(X) if X_dot is None else X_dot
            moved = over_batched_gradients(lambda rows: _by_point(X, t, U, S, Vh, rows), X_dot)
            return moved if t_dot is None else moved - _by_level(X, t, U, S, Vh) * t_dot

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Tensor, int]:
        return _Shrink.apply(*mapped_in_front(info, in_dims, inputs)), 0  # type: ignore[no-untyped-call]


def _by_point(X: Tensor, t: Tensor, U: Tensor, S: Tensor, Vh: Tensor, H: Tensor) -> Tensor:
    product = shrink_product(U, S, Vh, t, H)
    if not differentiated(X, t, H):
        return product
    m = X.shape[-2]
    (formula,) = pull(lambda Z: (2 * _above(Z, t)[..., :m, m:],), [X.expand(H.shape)], [H])
    return with_value(formula, product.detach())


def _by_level(X: Tensor, t: Tensor, U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
    E = (U * (surplus(S, t) > 0)[..., None, :]) @ Vh
    if not differentiated(X, t):
        return E
    trace = torch.ones(X.shape[:-2], dtype=X.dtype, device=X.device)
    (formula,) = pull(lambda Z: (_above(Z, t).diagonal(dim1=-2, dim2=-1).sum(-1),), [X], [trace])
    return with_value(formula, E)


def shrunk_sum(X: Tensor, threshold: Tensor) -> Tensor:
    """The sum of max(S - threshold, 0), from the eigenvalues of the dilation above the threshold.

    Args:
        X: finite, of shape (*batch, m, n).
        threshold: > 0, of shape (*batch, 1, 1): at 0 the dilation's own zeros are kinks.

    Returns:
        A tensor of shape (*batch, 1, 1).
    """
    S = torch.linalg.svdvals(X.detach())
    value: Tensor = (S[..., None, :] - threshold.detach()).clamp_min(0).sum(-1, keepdim=True)
    if not differentiated(X, threshold):
        return value
    trace: Tensor = _above(X, threshold).diagonal(dim1=-2, dim2=-1).sum(-1)
    return with_value(trace[..., None, None], value)


def _above(X: Tensor, threshold: Tensor) -> Tensor:
    """The positive part of the dilation less the threshold."""
    Z = dilation(X)
    return positive_part(Z - threshold * torch.eye(Z.shape[-1], dtype=X.dtype, device=X.device), 0.0)


def surplus(S: Tensor, threshold: Tensor) -> Tensor:
    """max(S - threshold, 0), zero where it is nothing but rounding.

    Args:
        S: descending, of shape (*batch, k).
        threshold: shape (*batch, 1, 1), or a number.

    Returns:
        A tensor of S's shape.
    """
    t = threshold[..., 0] if threshold.ndim else threshold
    over = S - t
    return torch.where(over <= 10 * torch.finfo(S.dtype).eps * (S[..., :1] + t), 0, over)


def shrink_product(U: Tensor, S: Tensor, Vh: Tensor, threshold: Tensor, H: Tensor) -> Tensor:
    """The derivative of `shrink` in the direction H.

    Args:
        U: shape (*batch, m, k), with k = min(m, n).
        S: shape (*batch, k).
        Vh: shape (*batch, k, n).
        threshold: shape (*batch, 1, 1).
        H: shape (*sides, *batch, m, n).

    Returns:
        A tensor of H's shape.
    """
    over = surplus(S, threshold)
    kept = over > 0
    i, j = (..., slice(None), None), (..., None, slice(None))
    # (f(s) - f(r)) / (s - r), and (f(s) + f(r)) / (s + r) for the skew part, with f(s) = max(s - t, 0)
    apart = (S[i] - S[j]).abs()
    slope = (over[i] - over[j]).abs() / torch.where(apart == 0, 1, apart)
    one = torch.where(kept[i] == kept[j], kept[i].to(S.dtype), slope)
    total = S[i] + S[j]
    other = (over[i] + over[j]) / torch.where(total == 0, 1, total)
    ratio = over / torch.where(S == 0, 1, S)
    M = U.mT @ H @ Vh.mT
    inside = (one * (M + M.mT) + other * (M - M.mT)) / 2
    left = (H @ Vh.mT - U @ M) * ratio[j]  # what stands outside U's range, or outside V's
    right = ratio[i] * (U.mT @ H - M @ Vh)
    return torch.where(threshold == 0, H, (U @ inside + left) @ Vh + U @ right)


def polar_factor(X: Tensor) -> Tensor:
    """U V' for X = U S V' of full column rank: the nearest matrix with orthonormal columns; NaN without full rank.

    With Y this and K = Y'X positive definite, dY = Y W + (I - Y Y') dX K^-1 with K W + W K = Y'dX - dX'Y.

    Args:
        X: shape (*batch, m, n), m >= n; what is not finite becomes NaN, item by item.

    Returns:
        A tensor of X's shape.
    """
    X, finite = finite_or(X, torch.eye(*X.shape[-2:], dtype=X.dtype, device=X.device))
    U, S, Vh = torch.linalg.svd(X.detach(), full_matrices=False)
    Y = U @ Vh
    if differentiated(X):
        Y = _SelfAdjoint.apply(_polar_derivative, X, Y, S, Vh.mT)  # type: ignore[no-untyped-call]
    return torch.where(finite & full_column_rank(X, S), Y, torch.nan)


def full_column_rank(X: Tensor, S: Tensor) -> Tensor:
    """Whether no singular value is zero up to rounding.

    Args:
        X: shape (*batch, m, n).
        S: its singular values, in descending order.

    Returns:
        A boolean tensor of shape (*batch, 1, 1).
    """
    return (X.shape[-2] * torch.finfo(S.dtype).eps * S[..., :1] < S).all(-1)[..., None, None]


def _polar_derivative(X: Tensor, Y: Tensor, S: Tensor, V: Tensor, H: Tensor) -> Tensor:
    K = Y.mT @ X
    K = (K + K.mT) / 2
    inverse = 2 * sylvester(K, S, V, torch.eye(S.shape[-1], dtype=S.dtype, device=S.device).expand(K.shape))
    inner = Y.mT @ H
    W = sylvester(K, S, V, inner - inner.mT)
    return Y @ W + (H - Y @ inner) @ inverse


def polar_product(X: Tensor, U: Tensor, S: Tensor, Vh: Tensor, H: Tensor) -> Tensor:
    """The derivative of `polar_factor` in the direction H.

    Args:
        X: shape (*batch, m, n), of full column rank.
        U: of its thin singular value decomposition, of shape (*batch, m, n).
        S: likewise, of shape (*batch, n).
        Vh: likewise, of shape (*batch, n, n).
        H: shape (*sides, *batch, m, n).

    Returns:
        A tensor of H's shape.
    """
    return _polar_derivative(X, U @ Vh, S, Vh.mT, H)
