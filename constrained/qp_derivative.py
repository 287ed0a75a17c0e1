"""The derivative of a quadratic program's solution as autograd functions, to any order, in any transform."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nestopt.implicit.monitor import Kind
from nestopt.implicit.transforms import (
    alive,
    forward_mode,
    over_batched_gradients,
    recording,
    transformed,
    within_jvp,
)

from .interior_point import broadcast_shapes
from .qp_factors import SPACES, Factors, Policy, numberless, substitute

__all__ = ["attach", "matrix_gradients", "outer", "value_of"]


class _Solve(torch.autograd.Function):
    """u with K(Q, C) u = r on the active rows and u = 0 on the others; K symmetric and linear in Q, A and G.

    The solution of a program is such a u, of r = (-q, b, h); where it is `known`, nothing is solved.
    """

    @staticmethod
    def forward(
        policy: Policy,
        kind: Kind,
        known: Tensor | None,
        Q: Tensor,
        A: Tensor | None,
        G: Tensor | None,
        r: Tensor,
        *factors: Tensor,
    ) -> Tensor:
        return known.clone() if known is not None else substitute(policy, kind, factors, r)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        policy, _, _, Q, A, G, r, *factors = inputs
        ctx.policy, ctx.given = policy, (A is not None, G is not None)
        # the OUTPUT is saved: it comes back attached to this node
        saved = [output, *(t for t in (Q, A, G) if t is not None), *factors]
        ctx.r_shape = r.shape
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None) -> Any:
        needed = ctx.needs_input_grad
        if v is None:
            return (None,) * len(needed)
        u, Q, A, G, factors = _unpack(ctx, alive(ctx.saved_tensors))
        policy = ctx.policy
        with recording([t for t in (u, Q, A, G, v) if t is not None]):
            w = _solve(policy, "adjoint", Q, A, G, v, factors)
            if not policy.sound:
                u = u.masked_fill(numberless(factors[-1])[..., None], 0)
            shapes = [t.shape if t is not None and k else None for t, k in zip((Q, A, G), needed[3:6], strict=True)]
            Q_bar, A_bar, G_bar = matrix_gradients(w, u, policy.n, policy.p, shapes)
            r_bar = None
            if needed[6]:
                r_bar = w.sum_to_size(ctx.r_shape) if w.shape != ctx.r_shape else w
        return None, None, None, Q_bar, A_bar, G_bar, r_bar, *((None,) * len(factors))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        dQ, dA, dG, dr = tangents[3:7]
        given = [t for t in (dQ, dA, dG, dr) if t is not None]
        with within_jvp(ctx, given) as saved:
            u, Q, A, G, factors = _unpack(ctx, saved)
            policy = ctx.policy
            n, p = policy.n, policy.p
            u_x, u_nu, u_lam = u[..., :n], u[..., n : n + p], u[..., n + p :]
            x, nu, lam = -torch.zeros_like(u_x), torch.zeros_like(u_nu), torch.zeros_like(u_lam)
            if dQ is not None:
                x = x - 0.5 * _times(dQ + dQ.mT, u_x)
            if dA is not None:
                x, nu = x - _times(dA.mT, u_nu), nu - _times(dA, u_x)
            if dG is not None:
                x, lam = x - _times(dG.mT, u_lam), lam - _times(dG, u_x)
            r = torch.cat([x, nu, lam], -1)
            return _solve(policy, "tangent", Q, A, G, r if dr is None else r + dr, factors)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], policy: Policy, kind: Kind, *inputs: Any
    ) -> tuple[Tensor, int]:
        known, Q, A, G, r, *factors = inputs
        d_known, d_Q, d_A, d_G, d_r, *d_factors = in_dims[2:]
        systems = factors[-1].ndim - (d_factors[-1] is not None)  # batch dimensions of the codes
        mapped = [d is not None for d in (d_known, d_Q, d_A, d_G, *d_factors)]
        if not any(mapped):  # one more right-hand side of the same systems, in front
            return _apply(policy, kind, known, Q, A, G, r.movedim(d_r, 0), *factors), 0
        sides = r.ndim - (d_r is not None) - 1 - systems
        size = info.batch_size

        def front(t: Tensor | None, d: int | None, space: int, full: bool) -> Tensor | None:
            """With the mapped dimension before `systems` batch dimensions."""
            if t is None or (d is None and not full):
                return t
            t = t.expand(size, *t.shape) if d is None else t.movedim(d, 0)
            missing = systems - (t.ndim - 1 - space)
            return t.reshape(size, *(1,) * missing, *t.shape[1:]) if missing > 0 else t

        if d_r is None:
            r = r.unsqueeze(max(sides, 0)).expand(*r.shape[: max(sides, 0)], size, *r.shape[max(sides, 0) :])
        elif sides >= 0:
            r = r.movedim(d_r, sides)
        else:
            r = front(r, d_r, 1, True)
        moved = [front(t, d, space, True) for t, d, space in zip(factors, d_factors, SPACES, strict=True)]
        Q, A, G = (front(t, d, 2, False) for t, d in ((Q, d_Q), (A, d_A), (G, d_G)))
        known = None if known is None else front(known, d_known, 1, True)
        return _apply(policy, kind, known, Q, A, G, r, *moved), max(sides, 0)


class _Value(torch.autograd.Function):
    """The optimal value, whose derivative is that of the Lagrangian at fixed x and duals: no solve."""

    @staticmethod
    def forward(value: Tensor, w: Tensor, Q: Tensor, A: Tensor | None, G: Tensor | None, r: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, w, Q, A, G, r = inputs
        ctx.shapes = [None if t is None else t.shape for t in (Q, A, G, r)]
        ctx.save_for_backward(w)
        ctx.save_for_forward(w)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        (w,) = alive(ctx.saved_tensors)
        Q, A, G, r = ctx.shapes
        n, p = Q[-1], 0 if A is None else A[-2]
        with recording([w, v]):
            bad = w[..., :1].isnan()
            v = v[..., None]
            v = torch.where(bad & (v != 0), torch.nan, v)  # a failed item poisons nothing that does not ask for it
            w = torch.where(bad, 0, w)
            x, scaled = w[..., :n], v * w
            bars: list[Tensor | None] = [0.5 * outer(scaled[..., :n], x, Q) if ctx.needs_input_grad[2] else None]
            for shape, rows in ((A, slice(n, n + p)), (G, slice(n + p, None))):
                bars.append(None if shape is None else outer(scaled[..., rows], x, shape))
            bars.append((-scaled).sum_to_size(r))
        return None, None, *bars

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        dQ, dA, dG, dr = tangents[2:6]
        with within_jvp(ctx, [t for t in tangents if t is not None]) as (w,):
            Q, A, *_ = ctx.shapes
            n, p = Q[-1], 0 if A is None else A[-2]
            x, nu, lam = w[..., :n], w[..., n : n + p], w[..., n + p :]
            total = torch.zeros_like(w[..., 0])
            for left, matrix, factor in ((x, dQ, 0.5), (nu, dA, 1.0), (lam, dG, 1.0)):
                if matrix is not None:
                    total = total + factor * (left * _times(matrix, x)).sum(-1)
            return total if dr is None else total - (w * dr).sum(-1)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], value: Tensor, w: Tensor, *rest: Any) -> tuple[Tensor, int]:
        dims = in_dims[2:]
        value = value.expand(info.batch_size, *value.shape) if in_dims[0] is None else value.movedim(in_dims[0], 0)
        w = w.expand(info.batch_size, *w.shape) if in_dims[1] is None else w.movedim(in_dims[1], 0)
        moved = []
        for t, d, space in zip(rest, dims, (2, 2, 2, 1), strict=True):
            if t is not None and d is not None:
                t = t.movedim(d, 0)
                missing = value.ndim - (t.ndim - space)
                t = t.reshape(t.shape[0], *(1,) * missing, *t.shape[1:])
            moved.append(t)
        return _Value.apply(value, w, *moved), 0  # type: ignore[no-untyped-call]


def attach(
    policy: Policy, known: Tensor, Q: Tensor, A: Tensor | None, G: Tensor | None, r: Tensor, factors: Factors
) -> Tensor:
    """The solution (x, nu, lam) with its derivative in Q, A, G and r = (-q, b, h).

    Args:
        policy: of the call.
        known: shape (*batch, n + p + m).
        Q: shape (..., n, n).
        A: shape (..., p, n), or None.
        G: shape (..., m, n), or None.
        r: shape (*batch, n + p + m).
        factors: of the active system.

    Returns:
        Of known's shape.
    """
    return _apply(policy, "point", known, Q, A, G, r, *factors)


def value_of(value: Tensor, w: Tensor, Q: Tensor, A: Tensor | None, G: Tensor | None, r: Tensor) -> Tensor:
    """The optimal value with its derivative by the envelope theorem; arguments as of `attach`."""
    return _Value.apply(value, w, Q, A, G, r)  # type: ignore[no-any-return, no-untyped-call]


def _apply(*inputs: Any) -> Tensor:
    return _Solve.apply(*inputs)  # type: ignore[no-any-return, no-untyped-call]


def _solve(
    policy: Policy, kind: Kind, Q: Tensor, A: Tensor | None, G: Tensor | None, r: Tensor, factors: Sequence[Tensor]
) -> Tensor:
    if torch.is_grad_enabled() or transformed() or forward_mode():
        return over_batched_gradients(lambda rows: _apply(policy, kind, None, Q, A, G, rows, *factors), r)
    # nothing differentiates the solve: a function of autograd would cost more than a small system
    return over_batched_gradients(partial(substitute, policy, kind, factors), r)


def _unpack(ctx: Any, saved: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, list[Tensor]]:
    u, Q, *rest = saved
    has_A, has_G = ctx.given
    A = rest.pop(0) if has_A else None
    G = rest.pop(0) if has_G else None
    return u, Q, A, G, rest


def matrix_gradients(w: Tensor, u: Tensor, n: int, p: int, shapes: Sequence[torch.Size | None]) -> list[Tensor | None]:
    """The gradients -(w_x u_x' + u_x w_x')/2, -(w_nu u_x' + u_nu w_x') and -(w_lam u_x' + u_lam w_x').

    Args:
        w: the solution of the adjoint system, shape (*batch, n + p + m).
        u: the solution, of w's shape.
        n: variables.
        p: equalities.
        shapes: of Q, A and G, None for what is not wanted.

    Returns:
        The gradients with respect to Q, A and G, None for what is not wanted.
    """
    if all(shape is None for shape in shapes):
        return [None, None, None]
    w = -w
    w_x, u_x = w[..., :n], u[..., :n]
    rows = (slice(0, n), slice(n, n + p), slice(n + p, None))
    if all(shape is not None and shape[:-2] == w.shape[:-1] for shape in shapes):  # no sums: all rows at once
        whole = w.unsqueeze(-1) * u_x.unsqueeze(-2) + u.unsqueeze(-1) * w_x.unsqueeze(-2)
        return [0.5 * whole[..., rows[0], :], whole[..., rows[1], :], whole[..., rows[2], :]]
    bars: list[Tensor | None] = [None, None, None]
    if shapes[0] is not None:
        half = outer(w_x, u_x, shapes[0])
        bars[0] = 0.5 * (half + half.mT)
    for k in (1, 2):
        shape = shapes[k]
        if shape is not None:
            bars[k] = outer(w[..., rows[k]], u_x, shape) + outer(u[..., rows[k]], w_x, shape)
    return bars


def outer(a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    """The product a b', summed over the items that share the matrix whose gradient it is.

    Args:
        a: shape (..., k).
        b: shape (..., n), broadcast with a.
        shape: (*batch, k, n), whose batch broadcasts to that of a and b.

    Returns:
        A tensor of this shape.
    """
    batch = broadcast_shapes(a.shape[:-1], b.shape[:-1])
    if len(shape) == 2 and batch:
        a, b = a.expand(*batch, a.shape[-1]), b.expand(*batch, b.shape[-1])
        return a.reshape(-1, a.shape[-1]).mT @ b.reshape(-1, b.shape[-1])
    each: Tensor = a[..., :, None] * b[..., None, :]
    return each if each.shape == shape else each.sum_to_size(shape)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    moved: Tensor = (matrix @ vector[..., None])[..., 0]
    return moved
