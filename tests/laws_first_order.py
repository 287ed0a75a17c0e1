"""Laws of the first-order methods for f + g, over small problems with answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nestopt.constrained import FirstOrder
from nestopt.linalg import Status

D = torch.float64


def least_squares(g: torch.Generator, batch: int, rows: int = 12, n: int = 5) -> tuple[Tensor, Tensor]:
    """Matrices and right-hand sides of a batch."""
    A = torch.randn(batch, rows, n, generator=g, dtype=D)
    return A, 2 * torch.randn(batch, rows, generator=g, dtype=D)


def misfit(A: Tensor, b: Tensor) -> Callable[[Tensor], Tensor]:
    """|A y - b|^2 / 2 of each item."""
    return lambda y: (((A @ y[..., None])[..., 0] - b) ** 2).sum(-1) / 2


def check_first_order(
    solver: FirstOrder,
    start: Tensor,
    certificate: Callable[[Tensor, Tensor], Tensor],
    g: torch.Generator,
    atol: float = 1e-8,
    warm_steps: int = 2,
) -> None:
    """Batch = loop, certified error, counters, warm starts, callbacks, isolation, structure, float32.

    Args:
        solver: with a g for vectors of 5.
        start: shape (5,), in the domain.
        certificate: (y, gradient) -> the error, zero only at minimisers.
        g: generator.
        atol: how far two runs to the tolerance may end apart.
        warm_steps: that a start at the answer may take.
    """
    A, b = least_squares(g, 3)
    A = A + 2 * torch.eye(12, 5, dtype=D)  # well conditioned: these are laws, not races
    f, calls = misfit(A, b), []

    def counted(y: Tensor) -> Tensor:
        calls.append(1)
        return f(y)

    y0 = start.expand(3, 5)
    res = solver(counted, y0, batch_dims=1)
    assert list(res.status) == [Status.CONVERGED] * 3, (res.status, res.error, res.tolerance)
    assert bool((res.error <= res.tolerance).all())
    assert res.evaluations == len(calls)
    assert not res.x.requires_grad
    leaf = res.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(leaf).sum(), leaf)
    assert bool((certificate(res.x, gradient) <= 1e3 * res.tolerance).all())
    ends: list[int] = []
    for i in range(3):
        one = solver(misfit(A[i], b[i]), start)
        assert one.status == Status.CONVERGED
        assert isinstance(one.error, float)
        assert isinstance(one.iterations, int)
        assert torch.allclose(one.x, res.x[i], rtol=0, atol=atol)
        ends.append(one.iterations)
    assert max(abs(a - int(k)) for a, k in zip(ends, res.iterations, strict=True)) <= 0.1 * max(ends) + 2
    # a NaN in one item changes no other, to the last bit
    bad = b.clone()
    bad[1, 0] = torch.nan
    spoiled = solver(misfit(A, bad), y0, batch_dims=1)
    assert list(spoiled.status) == [Status.CONVERGED, Status.NON_FINITE, Status.CONVERGED]
    assert torch.equal(spoiled.x[::2], res.x[::2])
    # warm starts, from the point and from the state; a state that was cut goes on; a callback stops
    for start_again in (res.x, res.state):
        warm = solver(f, start_again, float(2 * res.error.max() + 1e-9), batch_dims=1)
        assert int(warm.iterations.max()) <= warm_steps
    cut = replace(solver, max_iter=2)(f, y0, batch_dims=1)
    assert Status.MAX_ITER in list(cut.status)
    assert bool(solver(f, cut.state).converged.all())
    assert Status.STOPPED in list(solver(f, y0, batch_dims=1, callbacks=[lambda k, s: k == 1]).status)
    state = solver.init(f, y0, batch_dims=1)
    again = solver.step(f, solver.step(f, state))
    assert torch.equal(again.points.y, cut.state.points.y)
    # a rounding level is said, and the default tolerance of float32 is reached
    low = solver(misfit(A.float(), b.float()), y0.float(), batch_dims=1)
    assert low.x.dtype == low.error.dtype == torch.float32
    assert bool(low.converged.all()), (low.status, low.error, low.tolerance)
    assert torch.allclose(low.x.double(), res.x, atol=3e-3)
    empty = solver(misfit(A[:0], b[:0]), y0[:0], batch_dims=1)
    assert empty.x.shape == (0, 5)
    # a dict of parts with one term for all
    parts: Any = solver(lambda y: f(y["a"]), {"a": y0}, batch_dims=1)
    assert torch.equal(parts.x["a"], res.x)


BAD_INPUT = [
    ((3, torch.ones(2)), {}, TypeError, "objective"),
    ((lambda y: y, torch.ones(2)), {}, ValueError, "scalar"),
    ((lambda y: y.sum(), torch.ones(2, 2)), {"batch_dims": 1}, ValueError, "one value an item"),
    ((lambda y: 1.0, torch.ones(2)), {}, TypeError, "floating tensor"),
    ((lambda y: y.sum(), torch.ones(2), -1.0), {}, ValueError, "tolerance"),
    ((lambda y: y.sum(), torch.ones(2, dtype=torch.int64)), {}, TypeError, "y0"),
    ((lambda y: y.sum(), torch.ones(2)), {"batch_dims": 2}, ValueError, "batch_dims"),
]
