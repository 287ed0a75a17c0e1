"""The derivative of a point of the central path, which has no kinks, in the place of the solution's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nestopt.implicit import Monitor, root
from nestopt.implicit.monitor import OnFailure, report
from nestopt.implicit.transforms import alive, over_batched_gradients, within_jvp
from nestopt.linalg.result import Result, Status

__all__ = ["attach_smoothed"]


def attach_smoothed(
    w: Tensor,
    central: Tensor,
    codes: Tensor,
    useless: Tensor,
    data: tuple[Tensor | None, ...],
    smoothing: float,
    on_failure: OnFailure,
    monitor: Monitor | None,
) -> Tensor:
    """The solution w with the derivative of the point of the central path lam o (h - G x) = smoothing.

    Args:
        w: (x, nu, lam), shape (*batch, n + p + m).
        central: the point of the path, of w's shape.
        codes: Status codes of the batch, where a point of the path that was not reached is a failure as well.
        useless: the items for which there is no such point, shape (*batch,).
        data: Q, q, A, b, G, h.
        smoothing: mu.
        on_failure: of the derivative.
        monitor: of the derivative.

    Returns:
        w's value with that derivative.
    """
    masked = useless[..., None]
    theta = [t for t in data if t is not None]
    # an item without a point is the equation point = 0, which no data enter: what asks for more is _Guard's to answer
    spaces = tuple(space for space, t in zip((2, 1, 2, 1, 2, 1), data, strict=True) if t is not None)
    clean = [torch.where(_deep(useless, k), 0, t) for t, k in zip(theta, spaces, strict=True)]

    def residual(point: Tensor, skip: Tensor, Q: Tensor, q: Tensor, *rest: Tensor) -> Tensor:
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
        return torch.where(skip > 0, point, torch.cat([gradient, *parts], -1))

    start, skip = torch.where(masked, 0, central), masked.to(w.dtype)
    point = root(
        residual, start, skip, *clean, batch_dims=central.ndim - 1, on_failure=on_failure, monitor=monitor,
    )  # fmt: skip
    # spaces as bytes, one leaf: torch's generated vmap rule loses count of a tuple's in forward mode
    point = _Guard.apply(on_failure, bytes(spaces), codes, useless, point, *theta)  # type: ignore[no-untyped-call]
    moved: Tensor = w.detach() + (point - point.detach())
    return moved


def _four(rest: tuple[Tensor, ...], data: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    left = iter(rest)
    return [None if t is None else next(left) for t in data[2:]]


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _deep(items: Tensor, space: int) -> Tensor:
    """With so many dimensions of one behind."""
    return items.reshape(*items.shape, *(1,) * space)


class _Guard(torch.autograd.Function):
    """The point, whose derivative at failed items is what `on_failure` says, if anything asks for it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        on_failure: OnFailure, spaces: bytes, codes: Tensor, useless: Tensor, point: Tensor, *data: Tensor
    ) -> Tensor:
        return point.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.on_failure, ctx.spaces, codes, useless, _, *data = inputs
        ctx.shapes = [t.shape for t in data]
        ctx.save_for_backward(codes, useless)
        ctx.save_for_forward(codes, useless)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        codes, useless = alive(ctx.saved_tensors)
        poison = over_batched_gradients(
            lambda rows: _poison(ctx.on_failure, codes, useless, (rows != 0).any(-1), rows), v
        )
        bars = []
        for shape, space in zip(ctx.shapes, ctx.spaces, strict=True):
            each = _deep(poison, space).expand(*poison.shape, *shape[len(shape) - space :])
            bars.append(each.sum_to_size(shape) if each.shape != shape else each)
        return None, None, None, None, v.masked_fill(useless[..., None], 0), *bars

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        v, *dots = tangents[4:]
        with within_jvp(ctx, [t for t in (v, *dots) if t is not None]) as (codes, useless):
            asked = torch.zeros_like(useless)
            for dot, space in zip(dots, ctx.spaces, strict=True):
                if dot is not None:
                    nonzero = dot != 0
                    for _ in range(space):
                        nonzero = nonzero.any(-1)
                    asked = asked | nonzero
            moved: Tensor = v.masked_fill(useless[..., None], 0)
            poison = over_batched_gradients(
                lambda rows: _poison(ctx.on_failure, codes, useless, rows != 0, rows[..., None]), asked.to(v.dtype)
            )
            return moved + poison[..., None]


class _Asked(torch.autograd.Function):
    """Raises or warns where a failed item is asked, and returns NaN where it has no answer; outside of transforms."""

    @staticmethod
    def forward(on_failure: OnFailure, codes: Tensor, useless: Tensor, asked: Tensor, like: Tensor) -> Tensor:
        outcome = torch.where(asked, codes, Status.CONVERGED.code)
        bad = outcome != Status.CONVERGED.code
        if bool(bad.any()) and on_failure != "nan":
            result = Result(x=like, codes=outcome, iterations=0, error=torch.zeros_like(outcome, dtype=like.dtype))
            report("solve_qp: the smoothed derivative", result, on_failure)
            bad = bad & useless
        return torch.where(bad, torch.nan, torch.zeros_like(like[..., 0]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        return (None,) * 5

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], on_failure: OnFailure, *tensors: Tensor) -> tuple[Tensor, int]:
        moved = [
            t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip(tensors, in_dims[1:], strict=True)
        ]
        return _Asked.apply(on_failure, *moved), 0  # type: ignore[no-untyped-call]


def _poison(on_failure: OnFailure, codes: Tensor, useless: Tensor, asked: Tensor, like: Tensor) -> Tensor:
    return _Asked.apply(on_failure, codes, useless, asked, like)  # type: ignore[no-any-return, no-untyped-call]
