"""Quadratic programs inside a graph of torch.compile: two opaque operators, and the first derivative between them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nestopt.implicit.monitor import OnFailure
from nestopt.implicit.transforms import forward_mode, transformed
from nestopt.linalg.result import Status

from .interior_point import broadcast_shapes
from .qp_derivative import matrix_gradients
from .qp_factors import SPACES, Policy, substitute
from .qp_solution import Options, find_solution

__all__ = ["fits_in_graph", "solve_in_graph"]

# Tensors in front of the factors in what `find_solution` returns, and in one set of factors but codes.
FOUND, PARTS = 7, len(SPACES) - 1
SETS = {None: 0, "strong": 1, "active": 1, "mean": 2}

SOLVE = (
    "(Tensor Q, Tensor q, Tensor? A, Tensor? b, Tensor? G, Tensor? h, float rtol, int max_iter, str? degenerate, "
    "bool bounds_only, str on_failure) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
SUBSTITUTE = (
    "(Tensor v, Tensor matrices, Tensor factors, Tensor rows, Tensor codes, SymInt n, SymInt p, SymInt m, "
    "str on_failure) -> Tensor"
)


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
    """What `find_solution` finds, of which the solution and the value are differentiable, once.

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


def _capacities(items: int, n: int, p: int, m: int) -> tuple[int, int]:
    """How many numbers matrices may need, and what belongs to their rows with the count of rows in front."""
    size = n + p + m
    return items * size * size, 1 + items * (3 * size + 1)


def _pack(sets: list[tuple[Tensor, ...]], like: Tensor, capacities: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Sets of factors, whose shapes depend on the data, where a graph knows the shape: the rest stays empty."""
    matrices = _in_front([K for K, *_ in sets], like, capacities[0])
    factors = _in_front([LU.mT for _, LU, *_ in sets], like, capacities[0])  # LAPACK's factors are stored by columns
    rows = like.new_empty(len(sets), capacities[1])
    for target, (_, _, pivots, index, weights, deficient) in zip(rows, sets, strict=True):
        each = torch.cat([pivots, index, weights, deficient[..., None]], -1)
        target[0] = index.shape[-1]
        target[1 : 1 + each.numel()].view(each.shape).copy_(each)
    return matrices, factors, rows


def _in_front(parts: list[Tensor], like: Tensor, capacity: int) -> Tensor:
    """Tensors in front of rows of this length: a copy, but of a tensor that lies in front of so much memory already."""
    first = parts[0] if len(parts) == 1 else None
    if first is not None and first.is_contiguous() and not first.storage_offset():
        memory = first.untyped_storage()
        if memory.nbytes() >= capacity * first.itemsize:
            return first.new_empty(0).set_(memory, 0, (1, capacity), (capacity, 1))
    whole = like.new_empty(len(parts), capacity)
    for target, part in zip(whole, parts, strict=True):
        target[: part.numel()].view(part.shape).copy_(part)
    return whole


def _unpack(matrix: Tensor, factor: Tensor, rows: Tensor, codes: Tensor) -> tuple[Tensor, ...]:
    """The factors that `_pack` wrote."""
    size, batch = int(rows[0]), codes.shape
    K, LU = (t[: codes.numel() * size * size].view(*batch, size, size) for t in (matrix, factor))
    each = rows[1 : 1 + codes.numel() * (3 * size + 1)].view(*batch, 3 * size + 1)
    pivots, index, weights, deficient = each.split_with_sizes([size, size, size, 1], -1)
    return K, LU.mT, pivots.int(), index.long(), weights, deficient.squeeze(-1).bool(), codes


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
    options = Options(rtol, max_iter, None, degenerate, 1.0, bounds_only, None, roomy=degenerate is not None)
    w, value, codes, iterations, error, weak, deficient, *parts = find_solution(options, Q, q, A, b, G, h, None, None)
    n, p, m = _sizes(q, b, h)
    sets = [tuple(parts[k : k + PARTS]) for k in range(0, len(parts), PARTS)]
    packed = _pack(sets, error, _capacities(codes.numel(), n, p, m))
    return (*(t.contiguous() for t in (w, value, codes, iterations, error, weak, deficient)), *packed)


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
    square, rows = _capacities(math.prod(batch), n, p, m)  # numel() would fix the batch size
    packed = (error.new_empty(SETS[degenerate], capacity) for capacity in (square, square, rows))
    return w, q.new_empty(batch), whole[0], whole[1], error, whole[2], flag, *packed


def _sizes(q: Tensor, b: Tensor | None, h: Tensor | None) -> tuple[int, int, int]:
    return q.shape[-1], 0 if b is None else b.shape[-1], 0 if h is None else h.shape[-1]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    Q, q, A, b, G, h, *_, on_failure = inputs
    ctx.set_materialize_grads(False)
    ctx.shapes = [None if t is None else t.shape for t in (Q, q, A, b, G, h)]
    ctx.on_failure = on_failure
    w, _, codes, *rest = output
    ctx.save_for_backward(w, codes, *rest[FOUND - 3 :])


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
    w, codes, *packed = ctx.saved_tensors
    n, p, m = q[-1], 0 if b is None else b[-1], 0 if h is None else h[-1]
    bars: list[Tensor | None] = [None] * 6
    needed = ctx.needs_input_grad
    if v is None and s is None:
        return *bars, *((None,) * (len(needed) - 6))
    bad = w.isnan()
    point = torch.where(bad, 0, w)
    r_bar = cross = torch.zeros_like(w)
    if v is not None:
        r_bar = cross = torch.ops.nestopt.solve_qp_adjoint(v, *packed, codes, n, p, m, ctx.on_failure)
    if s is not None:
        s = s[..., None]
        scaled = torch.where(bad & (s != 0), torch.nan, s) * point  # as for w, only an item that is asked for is NaN
        r_bar, cross = r_bar - scaled, cross - 0.5 * scaled
    shapes = [shape if wanted else None for shape, wanted in zip((Q, A, G), needed[:6:2], strict=True)]
    bars[:6:2] = matrix_gradients(cross, point, n, p, shapes)
    rows = (slice(0, n), slice(n, n + p), slice(n + p, None))
    for k, (vector, part) in enumerate(zip((q, b, h), rows, strict=True)):
        if vector is not None and needed[2 * k + 1]:
            bar = r_bar[..., part] if k else -r_bar[..., part]
            bars[2 * k + 1] = bar.sum_to_size(vector)
    return *bars, *((None,) * (len(needed) - 6))


_solve_qp.register_autograd(_differentiate, setup_context=_keep)


@torch.library.custom_op("nestopt::solve_qp_adjoint", mutates_args=(), schema=SUBSTITUTE)
def _solve_qp_adjoint(
    v: Tensor,
    matrices: Tensor,
    factors: Tensor,
    rows: Tensor,
    codes: Tensor,
    n: int,
    p: int,
    m: int,
    on_failure: OnFailure,
) -> Tensor:
    policy = Policy(n, p, m, on_failure, None, sound=bool((codes == Status.CONVERGED.code).all()))
    sets = (_unpack(matrices[k], factors[k], rows[k], codes) for k in range(len(rows)))
    u = [substitute(policy, "adjoint", one, v) for one in sets]
    return (u[0] if len(u) == 1 else 0.5 * (u[0] + u[1])).contiguous()


@_solve_qp_adjoint.register_fake
def _solve_qp_adjoint_shape(
    v: Tensor,
    matrices: Tensor,
    factors: Tensor,
    rows: Tensor,
    codes: Tensor,
    n: int,
    p: int,
    m: int,
    on_failure: OnFailure,
) -> Tensor:
    return v.new_empty(v.shape)
