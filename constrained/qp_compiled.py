"""Quadratic programs inside a graph of torch.compile: two opaque operators, and the first derivative between them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nestopt.implicit.monitor import OnFailure
from nestopt.implicit.transforms import forward_mode, transformed

from .interior_point import broadcast_shapes
from .qp_derivative import Policy, _substitute, outer

__all__ = ["fits_in_graph", "solve_in_graph"]

# Tensors in front of the factors in what `_solve` of quadratic_program returns, and in one set of factors but codes.
FOUND, PARTS = 7, 7
SETS = {None: 0, "strong": 1, "active": 1, "mean": 2}

SOLVE = (
    "(Tensor Q, Tensor q, Tensor? A, Tensor? b, Tensor? G, Tensor? h, float rtol, int max_iter, str? degenerate, "
    "bool bounds_only, str on_failure) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
SUBSTITUTE = "(Tensor v, Tensor packed, Tensor codes, SymInt n, SymInt p, SymInt m, int sets, str on_failure) -> Tensor"


def fits_in_graph(degenerate: str, *objects: Any) -> bool:
    """Whether a call can stay in a graph.

    Args:
        degenerate: of the call; "smoothed" solves another system, that of a root.
        objects: backend, warm_start and monitor: Python objects that no graph holds.

    Returns:
        Whether it can; where it cannot, and within a transform of torch.func, a graph break is the way.
    """
    plain = degenerate != "smoothed" and all(thing is None for thing in objects)
    return plain and not transformed() and not forward_mode()


def solve_in_graph(
    data: tuple[Tensor | None, ...],
    rtol: float,
    max_iter: int,
    degenerate: str,
    bounds_only: bool,
    on_failure: OnFailure,
) -> tuple[Tensor, ...]:
    """What `_solve` of quadratic_program finds, of which the solution and the value are differentiable, once.

    Args:
        data: Q, q, A, b, G, h.
        rtol: of the certificate.
        max_iter: limit of interior-point steps.
        degenerate: "strong", "active" or "mean".
        bounds_only: whether every row is a bound.
        on_failure: of the derivative.

    Returns:
        (x, nu, lam), value, codes, iterations, error, weakly active, deficient.
    """
    live = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in data)
    found = torch.ops.nestopt.solve_qp(*data, rtol, max_iter, degenerate if live else None, bounds_only, on_failure)
    return (*found[:2], *(t.detach() for t in found[2:FOUND]))


def _capacity(items: int, n: int, p: int, m: int) -> int:
    """How many numbers a set of factors may need, and how many rows are active in front of it."""
    size = n + p + m
    return 1 + items * (2 * size * size + 2 * size + 2 * m + 1)


def _pack(parts: list[Tensor], packed: Tensor) -> None:
    """Write a set of factors, whose shapes depend on the data, where a graph knows the shape: the rest stays empty."""
    K, factors, pivots, index, *rest = parts
    packed[0] = index.shape[-1]
    begin = 1
    for t in (K, factors.mT, pivots, index, *rest):  # LAPACK's factors are stored by columns
        packed[begin : begin + t.numel()].view(t.shape).copy_(t)
        begin += t.numel()


def _unpack(packed: Tensor, batch: torch.Size, n: int, p: int, m: int) -> list[Tensor]:
    """The factors that `_pack` wrote."""
    k, begin, parts = int(packed[0]), 1, []
    size = n + p + k
    kinds = [torch.float64, torch.float64, torch.int32, torch.int64, torch.bool, torch.bool, torch.float64]
    shapes = [(size, size), (size, size), (size,), (k,), (k,), (), (n + p + m,)]
    for kind, shape in zip(kinds, shapes, strict=True):
        whole = torch.Size((*batch, *shape))
        parts.append(packed[begin : begin + whole.numel()].view(whole).to(kind))
        begin += whole.numel()
    parts[1] = parts[1].mT
    return parts


@torch.library.custom_op("nestopt::solve_qp", mutates_args=(), schema=SOLVE)
def _solve_qp(
    Q: Tensor,
    q: Tensor,
    A: Tensor | None,
    b: Tensor | None,
    G: Tensor | None,
    h: Tensor | None,
    rtol: float,
    max_iter: int,
    degenerate: Any,
    bounds_only: bool,
    on_failure: str,
) -> tuple[Tensor, ...]:
    from .quadratic_program import _Options, _solve  # which imports this file

    options = _Options(rtol, max_iter, None, degenerate, 1.0, bounds_only, None)
    w, *found = _solve(options, Q, q, A, b, G, h, None, None)
    n, p, m = _sizes(q, b, h)
    sets = SETS[degenerate]
    packed = w.new_empty(sets, _capacity(w[..., 0].numel(), n, p, m), dtype=torch.float64)
    for k in range(sets):
        _pack(found[FOUND - 1 + k * PARTS :][:PARTS], packed[k])
    return (*(t.contiguous() for t in (w, *found[: FOUND - 1])), packed)


@_solve_qp.register_fake
def _solve_qp_shapes(
    Q: Tensor,
    q: Tensor,
    A: Tensor | None,
    b: Tensor | None,
    G: Tensor | None,
    h: Tensor | None,
    rtol: float,
    max_iter: int,
    degenerate: Any,
    bounds_only: bool,
    on_failure: str,
) -> tuple[Tensor, ...]:
    n, p, m = _sizes(q, b, h)
    given = [(t, space) for t, space in zip((Q, q, A, b, G, h), (2, 1, 2, 1, 2, 1), strict=True) if t is not None]
    batch = broadcast_shapes(*(t.shape[: t.ndim - space] for t, space in given))
    w = q.new_empty(*batch, n + p + m)
    whole = [w.new_empty(batch, dtype=torch.int64) for _ in range(3)]
    error, flag = (w.new_empty(batch, dtype=kind) for kind in (torch.float64, torch.bool))
    capacity = _capacity(math.prod(batch), n, p, m)  # numel() would fix the batch size
    packed = w.new_empty(SETS[degenerate], capacity, dtype=torch.float64)
    return w, q.new_empty(batch), whole[0], whole[1], error, whole[2], flag, packed


def _sizes(q: Tensor, b: Tensor | None, h: Tensor | None) -> tuple[int, int, int]:
    return q.shape[-1], 0 if b is None else b.shape[-1], 0 if h is None else h.shape[-1]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    Q, q, A, b, G, h, _, _, degenerate, _, on_failure = inputs
    ctx.set_materialize_grads(False)
    ctx.shapes = [None if t is None else t.shape for t in (Q, q, A, b, G, h)]
    ctx.sets, ctx.on_failure = SETS[degenerate], on_failure
    w, _, codes, *_, packed = output
    ctx.save_for_backward(h, w, codes, packed)


def _differentiate(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    """The gradients that `solve_qp` documents, of solution and value in one.

    With v for w, u solves K u = v; dQ = -(u_x x' + x u_x')/2, dA and dG alike, dq = -u_x, db = u_nu, dh = u_lam. The
    value's, s for it, are those of the Lagrangian: u = -s w / 2 in dQ, dA and dG, and u = -s w in dq, db and dh.

    Args:
        ctx: of the operator.
        cotangents: of its outputs.

    Returns:
        The gradients of its arguments.
    """
    v, s = cotangents[:2]
    Q, q, A, b, G, h = ctx.shapes
    limits, w, codes, packed = ctx.saved_tensors
    n, p, m = q[-1], 0 if b is None else b[-1], 0 if h is None else h[-1]
    bars: list[Tensor | None] = [None] * 6
    needed = ctx.needs_input_grad
    if v is None and s is None:
        return *bars, *((None,) * (len(needed) - 6))
    bad = w.isnan()
    point = torch.where(bad, 0, w)
    r_bar = cross = torch.zeros_like(w)
    if v is not None:
        r_bar = cross = torch.ops.nestopt.solve_qp_adjoint(v, packed, codes, n, p, m, ctx.sets, ctx.on_failure)
    if s is not None:
        s = s[..., None]
        scaled = torch.where(bad & (s != 0), torch.nan, s) * point  # as for w, only an item that is asked for is NaN
        r_bar, cross = r_bar - scaled, cross - 0.5 * scaled
    u_x, x = cross[..., :n], point[..., :n]
    rows = (slice(0, n), slice(n, n + p), slice(n + p, None))
    for k, (matrix, vector, part) in enumerate(zip((Q, A, G), (q, b, h), rows, strict=True)):
        if matrix is None:
            continue
        if needed[2 * k]:
            product = outer(cross[..., part], x, matrix) + outer(point[..., part], u_x, matrix)
            bars[2 * k] = -product if k else -0.5 * product
        if needed[2 * k + 1]:
            bar = r_bar[..., part] if k else -r_bar[..., part]
            bar = torch.where(limits == torch.inf, 0, bar) if k == 2 else bar  # such a row is none
            bars[2 * k + 1] = bar.sum_to_size(vector)
    return *bars, *((None,) * (len(needed) - 6))


_solve_qp.register_autograd(_differentiate, setup_context=_keep)


@torch.library.custom_op("nestopt::solve_qp_adjoint", mutates_args=(), schema=SUBSTITUTE)
def _solve_qp_adjoint(
    v: Tensor, packed: Tensor, codes: Tensor, n: int, p: int, m: int, sets: int, on_failure: OnFailure
) -> Tensor:
    policy = Policy(n, p, m, on_failure, None)
    u = [_substitute(policy, "adjoint", [*_unpack(t, codes.shape, n, p, m), codes], v) for t in packed]
    return (u[0] if sets == 1 else 0.5 * (u[0] + u[1])).contiguous()


@_solve_qp_adjoint.register_fake
def _solve_qp_adjoint_shape(
    v: Tensor, packed: Tensor, codes: Tensor, n: int, p: int, m: int, sets: int, on_failure: OnFailure
) -> Tensor:
    return v.new_empty(v.shape)
