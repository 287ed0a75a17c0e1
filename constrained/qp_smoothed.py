"""The derivative of a point of the central path, which has no kinks, in the place of the solution's."""

from __future__ import annotations

import torch
from torch import Tensor

from nestopt.implicit import Monitor, root
from nestopt.implicit.monitor import OnFailure
from nestopt.linalg.result import Status

__all__ = ["attach_smoothed"]


def attach_smoothed(
    w: Tensor,
    central: Tensor,
    codes: Tensor,
    data: tuple[Tensor | None, ...],
    smoothing: float,
    on_failure: OnFailure,
    monitor: Monitor | None,
) -> Tensor:
    """The solution w with the derivative of the point of the central path lam o (h - G x) = smoothing.

    Args:
        w: (x, nu, lam), shape (*batch, n + p + m).
        central: the point of the path, of w's shape.
        codes: Status codes of the batch; an item that has not converged gets no derivative but NaN.
        data: Q, q, A, b, G, h.
        smoothing: mu.
        on_failure: of the derivative.
        monitor: of the derivative.

    Returns:
        w's value with that derivative.
    """
    failed = (codes != Status.CONVERGED.code)[..., None]

    def residual(point: Tensor, Q: Tensor, q: Tensor, *rest: Tensor) -> Tensor:
        A, b, G, h = _four(rest, data)
        n, p = q.shape[-1], 0 if b is None else b.shape[-1]
        x, nu, lam = point[..., :n], point[..., n : n + p], point[..., n + p :]
        gradient = 0.5 * _times(Q + Q.mT, x) + q
        parts = []
        if A is not None and b is not None:
            gradient = gradient + _times(A.mT, nu)
            parts.append(_times(A, x) - b)
        if G is not None and h is not None:
            gradient = gradient + _times(G.mT, lam)
            present = h < torch.inf
            slack = torch.where(present, h, 0) - _times(G, x)
            parts.append(torch.where(present, lam * slack - smoothing, lam))
        return torch.cat([gradient, *parts], -1)

    theta = [t for t in data if t is not None]
    point = root(
        residual, central, *theta, batch_dims=central.ndim - 1, on_failure=on_failure, monitor=monitor,
    )  # fmt: skip
    return torch.where(failed, torch.nan, w.detach() + (point - point.detach()))


def _four(rest: tuple[Tensor, ...], data: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    left = iter(rest)
    return [None if t is None else next(left) for t in data[2:]]


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]
