"""Laws of solvers of y = T(y) and R(y) = 0."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import optree
import pytest
import torch
from torch import Tensor

from nestopt import implicit
from nestopt.implicit import FixedPointResult, FixedPointSolver
from nestopt.linalg import SolverError, Status

D = torch.float64
COSINE = 0.7390851332151607


@dataclass(frozen=True)
class Solve:
    """A solver, and which of its two problems is posed."""

    solver: FixedPointSolver
    is_map: bool = True

    def __str__(self) -> str:
        return f"{type(self.solver).__name__}-{'map' if self.is_map else 'root'}"

    def __call__(self, T: Callable[[Any], Any], y0: Any, *arguments: Any, **options: Any) -> FixedPointResult:
        """Solve y = T(y), posed as that or as a root."""
        if self.is_map:
            return self.solver.fixed_point(T, y0, *arguments, **options)
        return self.solver.root(self.residual(T), y0, *arguments, **options)

    def residual(self, T: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """R = y - T(y)."""
        return lambda y: optree.tree_map(torch.sub, y, T(y))

    def evaluated(self, T: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """What this solver is given."""
        return T if self.is_map else self.residual(T)


def contraction(g: torch.Generator, *batch: int, n: int = 6, dtype: torch.dtype = D) -> tuple[Tensor, Tensor]:
    """W and b of T(y) = tanh(W y + b), with |W| from 0.2 to 0.8 over the batch."""
    W = torch.randn(*batch, n, n, generator=g, dtype=D)
    size = torch.linspace(0.2, 0.8, max(1, torch.Size(batch).numel()), dtype=D).reshape(*batch, 1, 1)
    W = size * W / torch.linalg.matrix_norm(W, 2)[..., None, None]
    return W.to(dtype), torch.randn(*batch, n, generator=g, dtype=D).to(dtype)


def tanh_map(W: Tensor, b: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda y: torch.tanh((W @ y[..., None])[..., 0] + b)


def check_known_answer(solve: Solve, dtype: torch.dtype) -> None:
    """The cosine's fixed point; the error is measured at x, the counts are true, the caller's start is untouched."""
    seen, states, y0 = [], [], torch.tensor(1.0, dtype=dtype, requires_grad=True)

    def T(y: Tensor) -> Tensor:
        seen.append(1)
        return torch.cos(y)

    res = solve(T, y0, callbacks=[lambda k, s: states.append((k, float(s.error)))])
    assert res.status == Status.CONVERGED
    assert res.converged
    assert float(res.x) == pytest.approx(COSINE, abs=1e-9 if dtype == D else 1e-4)
    assert (res.x.dtype, res.x.shape, res.x.requires_grad) == (dtype, (), False)
    assert res.error == float((res.x - torch.cos(res.x)).abs()) <= res.tolerance
    rtol = 1e-10 if dtype == D else 1e-5
    scale = math.cos(1.0) if solve.is_map else 1 - math.cos(1.0)
    assert res.tolerance == pytest.approx(rtol * scale, rel=1e-4)
    assert res.evaluations == len(seen)
    assert res.iterations == states[-1][0] == len(states) - 1
    assert states[-1][1] == res.error
    assert 0 <= res.rate < 1
    assert y0.item() == 1.0
    assert y0.grad is None
    # step by step
    state, function = solve.solver.init(solve.evaluated(torch.cos), y0), solve.evaluated(torch.cos)
    if solve.is_map == solve.solver.solves_maps:
        while state.codes == Status.RUNNING.code:
            state = solve.solver.step(function, state)
        assert torch.equal(state.x, res.x)
        assert (int(state.iterations), state.evaluations) == (res.iterations, res.evaluations)
    # from the answer, nothing is left to do
    again = solve(torch.cos, res.x, 2 * res.tolerance)
    assert (again.status, again.iterations, again.evaluations) == (Status.CONVERGED, 0, 1)
    assert torch.equal(again.x, res.x)
    # a run cut short says so
    if res.iterations > 2:
        cut = replace(solve, solver=replace(solve.solver, max_iter=2))(torch.cos, y0)
        assert (cut.status, cut.iterations) == (Status.MAX_ITER, 2)
        assert cut.error > cut.tolerance
        with pytest.raises(SolverError, match="MAX_ITER"):
            cut.unwrap()


def check_batch(solve: Solve, g: torch.Generator, dtype: torch.dtype) -> None:
    """Items that end at different steps equal a loop; one NaN item changes no other."""
    W, b = contraction(g, 2, 3, dtype=dtype)
    W = W * torch.logspace(-2, 0, 6, dtype=dtype).reshape(2, 3, 1, 1)
    y0 = torch.zeros_like(b)
    res = solve(tanh_map(W, b), y0, batch_dims=2)
    assert res.codes.shape == res.error.shape == res.rate.shape == res.iterations.shape == (2, 3)
    assert bool(res.converged.all())
    assert len(set(res.iterations.flatten().tolist())) > 1
    assert (res.x - tanh_map(W, b)(res.x)).norm(dim=-1).le(res.tolerance * 1.001).all()
    for i in range(2):
        for j in range(3):
            one = solve(tanh_map(W[i, j], b[i, j]), y0[i, j])
            assert one.iterations == res.iterations[i, j]
            assert (one.x - res.x[i, j]).abs().max() <= (1e-10 if dtype == D else 1e-6)
    bad = b.clone()
    bad[1, 0, 2] = torch.nan
    other = solve(tanh_map(W, bad), y0, batch_dims=2)
    assert other.codes[1, 0] == Status.NON_FINITE.code
    assert bool(other.error.isnan()[1, 0])
    keep = torch.ones(2, 3, dtype=torch.bool)
    keep[1, 0] = False
    assert torch.equal(other.x[keep], res.x[keep])
    assert torch.equal(other.iterations[keep], res.iterations[keep])
    assert torch.equal(other.codes[keep], res.codes[keep])


def check_structure(solve: Solve, g: torch.Generator) -> None:
    """A dict, with and without a batch, takes the steps of the flat vector; so do 0-d leaves."""
    W, b = contraction(g, 4)
    flat = solve(tanh_map(W, b), torch.zeros_like(b), batch_dims=1)

    def T(tree: dict[str, Any]) -> dict[str, Any]:
        y = torch.cat([tree["a"][..., None], tree["b"][0].flatten(-2), tree["c"]], -1)
        y = tanh_map(W[: len(y)] if y.ndim > 1 else W[1], b if y.ndim > 1 else b[1])(y)
        return {"a": y[..., 0], "b": (y[..., 1:5].unflatten(-1, (2, 2)),), "c": y[..., 5:]}

    start = {"a": torch.zeros(4, dtype=D), "b": (torch.zeros(4, 2, 2, dtype=D),), "c": torch.zeros(4, 1, dtype=D)}
    tree = solve(T, start, batch_dims=1)
    assert torch.equal(tree.iterations, flat.iterations)
    assert torch.allclose(tree.x["a"], flat.x[:, 0], atol=1e-12)
    assert torch.allclose(tree.x["b"][0].flatten(-2), flat.x[:, 1:5], atol=1e-12)
    one = solve(T, optree.tree_map(lambda leaf: leaf[1], start))
    assert one.x["a"].shape == ()
    assert torch.allclose(one.x["c"], flat.x[1, 5:], atol=1e-10)


def check_edges(solve: Solve) -> None:
    """Nothing to solve, an exact start, a start of NaN, a constant map, huge and tiny units."""
    for shape, dims in (((0,), 0), ((3, 0), 1), ((0, 3), 1), ((0, 0), 2)):
        res = solve(lambda y: 0.5 * y, torch.ones(shape, dtype=D), batch_dims=dims)
        assert res.codes.shape == shape[:dims]
        assert bool((res.codes == Status.CONVERGED.code).all())
        assert res.x.shape == shape
    exact = solve(lambda y: 0.5 * y, torch.zeros(3, dtype=D))
    assert (exact.status, exact.iterations, exact.error) == (Status.CONVERGED, 0, 0.0)
    assert solve(torch.cos, torch.full((2,), torch.nan, dtype=D)).status == Status.NON_FINITE
    assert solve(lambda y: y.new_tensor([2.0, 3.0]), torch.zeros(2, dtype=D)).x.tolist() == pytest.approx([2, 3])
    reference = solve(lambda y: torch.cos(y) / 2 + 1, torch.ones(2, dtype=D))
    for unit in (1e-60, 1e60):
        res = solve(lambda y, unit=unit: unit * (torch.cos(y / unit) / 2 + 1), torch.full((2,), unit, dtype=D))
        assert res.status == Status.CONVERGED
        if solve.is_map:  # a root's first step has the size of max(|y0|, 1)
            assert abs(res.iterations - reference.iterations) <= 1
    stopped = solve(torch.cos, torch.ones(1, dtype=D), callbacks=[lambda k, s: k == 2])
    assert (stopped.status, stopped.iterations) == (Status.STOPPED, 2)


def check_rounding(solve: Solve) -> None:
    """A tolerance below the rounding level: the best point, and not CONVERGED unless it is exact."""
    solver = replace(solve.solver, rtol=0.0)
    W, b = contraction(torch.Generator().manual_seed(3), n=20)
    res = replace(solve, solver=solver)(tanh_map(W, b), torch.zeros_like(b))
    assert res.status in (Status.STAGNATED, Status.CONVERGED)
    assert (res.status == Status.CONVERGED) == (res.error == 0)
    assert res.error <= 1e-14
    assert res.error == pytest.approx(float((res.x - tanh_map(W, b)(res.x)).norm()), abs=1e-15)


def check_bad_arguments(solve: Solve) -> None:
    """Every message names the solver."""
    name, kind, y = type(solve.solver).__name__, "T" if solve.is_map else "R", torch.ones(2, dtype=D)
    run = solve.solver.fixed_point if solve.is_map else solve.solver.root
    with pytest.raises(TypeError, match=f"{name}: {kind} must be a function"):
        run(3, y)
    with pytest.raises(TypeError, match="floating dtype"):
        run(torch.cos, torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"{name}: batch_dims must be an integer >= 0, but got -1"):
        run(torch.cos, y, batch_dims=-1)
    with pytest.raises(ValueError, match=f"{name}: with batch_dims=2 every leaf"):
        run(torch.cos, y, batch_dims=2)
    with pytest.raises(ValueError, match=f"{name}: tolerance must be a number >= 0"):
        run(torch.cos, y, -1.0)
    with pytest.raises(ValueError, match=rf"{name}: {kind}\(y\) must have the shape of y, \(2,\)"):
        run(lambda y: y[None], y)
    with pytest.raises(ValueError, match=f"{name}: {kind} must return the structure"):
        run(lambda y: {"a": y}, y)
    with pytest.raises(ValueError, match=rf"{name}: {kind}\(y\) must be torch.float64"):
        run(lambda y: y.float(), y)
    with pytest.raises(RuntimeError, match=f"{name}: under a transform of torch.func"):
        torch.func.vmap(lambda y: run(torch.cos, y).x)(torch.ones(3, 2, dtype=D))
    for bad in ({"rtol": -1.0}, {"atol": float("nan")}, {"max_iter": -1}):
        with pytest.raises(ValueError, match=f"{name}: {next(iter(bad))} must be"):
            replace(solve.solver, **bad)


def check_layer(solve: Solve, g: torch.Generator) -> None:
    """As `find` of a layer: gradients of the unrolled loop, vmap equal to the batch, failures raised with the rate."""

    class Cell(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W = torch.nn.Parameter(contraction(g)[0])

        def forward(self, y: Tensor, x: Tensor) -> Tensor:
            value = torch.tanh(y @ self.W.mT + x)
            return value if solve.is_map else y - value

    kind = implicit.FixedPointLayer if solve.is_map else implicit.RootLayer
    layer = kind(Cell(), solve.solver, batch_dims=1)
    single = kind(layer.function, solve.solver)
    x = torch.randn(4, 6, generator=g, dtype=D, requires_grad=True)
    y0 = torch.zeros(4, 6, dtype=D, requires_grad=True)
    y = layer(y0, x)
    W, unrolled = layer.function.W, torch.zeros_like(x)
    for _ in range(200):
        unrolled = torch.tanh(unrolled @ W.mT + x)
    assert torch.allclose(y, unrolled, atol=1e-9)
    for ours, truth in zip(
        torch.autograd.grad(y.square().sum(), [x, W]), torch.autograd.grad(unrolled.square().sum(), [x, W]), strict=True
    ):
        assert torch.allclose(ours, truth, atol=1e-8)
    assert torch.autograd.grad(layer(y0, x).sum(), y0, allow_unused=True)[0] is None
    mapped = torch.func.vmap(single, in_dims=(None, 0))(y0.detach()[0], x)
    assert torch.allclose(mapped, y, atol=1e-10)
    bad = x.detach().clone()
    bad[2] = torch.nan
    with pytest.raises(SolverError, match="NON_FINITE") as caught:
        layer(y0, bad)
    assert type(solve.solver).__name__ in caught.value.__notes__[0]
    assert "observed rate" in caught.value.__notes__[0]
    # a solver that ends too early is not taken at its word
    lazy = kind(layer.function, replace(solve.solver, max_iter=0), batch_dims=1)
    with pytest.raises(SolverError, match="NOT_STATIONARY") as caught:
        lazy(y0, x)
    assert "MAX_ITER" in caught.value.__notes__[0]
