"""Minimisers over a batch: every item as if it were alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nestopt.implicit import (
    FOSI,
    LBFGS,
    ArgminLayer,
    GradientDescent,
    LazyNewton,
    LevenbergMarquardt,
    Minimizer,
    NewtonCG,
    RegularizedNewton,
    Sophia,
)
from nestopt.linalg import Diagonal, Status

D = torch.float64
MINIMIZERS: dict[str, Minimizer] = {"lbfgs": LBFGS(), "newton": NewtonCG(), "descent": GradientDescent(max_iter=4000)}
each = pytest.mark.parametrize("minimizer", MINIMIZERS.values(), ids=MINIMIZERS.keys())


def rosenbrock(y: Tensor) -> Tensor:
    return (100 * (y[..., 1:] - y[..., :-1] ** 2) ** 2 + (1 - y[..., :-1]) ** 2).sum(-1)


def quadratics(g: torch.Generator, batch: int = 4, n: int = 5) -> tuple[Tensor, Tensor]:
    Q, _ = torch.linalg.qr(torch.randn(batch, n, n, generator=g, dtype=D))
    scale = 10.0 ** torch.linspace(0, 2, n, dtype=D)
    return (Q * scale) @ Q.mT, torch.randn(batch, n, generator=g, dtype=D)


def quadratic(y: Tensor, A: Tensor, b: Tensor) -> Tensor:
    return (y[..., None, :] @ A @ y[..., None])[..., 0, 0] / 2 - (b * y).sum(-1)


STARTS = torch.tensor([[-1.2, 1.0], [0.0, 0.0], [2.0, 2.0], [1.0, 1.0]], dtype=D)


@each
def test_every_item_ends_where_its_own_run_does(minimizer: Minimizer) -> None:
    minimizer = replace(minimizer, rtol=1e-12)
    res = minimizer(rosenbrock, STARTS, batch_dims=1)
    singles = [minimizer(rosenbrock, y) for y in STARTS]
    assert bool(res.converged.all())
    assert res.iterations.tolist()[-1] == 0
    for i, one in enumerate(singles):
        assert torch.allclose(res.x[i], one.x, rtol=0, atol=1e-10)
        assert float(res.tolerance[i]) == pytest.approx(one.tolerance, rel=1e-12)
        alone = minimizer(rosenbrock, STARTS[i : i + 1], batch_dims=1)
        assert torch.equal(alone.x[0], res.x[i])
        assert alone.iterations[0] == res.iterations[i]
        if not isinstance(minimizer, LBFGS):  # which has torch's line search there
            assert abs(one.iterations - int(res.iterations[i])) <= 1
    leaf = res.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(rosenbrock(leaf).sum(), leaf)
    assert torch.allclose(gradient.norm(dim=-1), res.error, rtol=1e-6, atol=1e-13)
    assert torch.equal(res.value, rosenbrock(res.x))


@each
def test_quadratics_have_their_answer(minimizer: Minimizer, generator: torch.Generator) -> None:
    A, b = quadratics(generator)
    calls = []

    def f(y: Tensor) -> Tensor:
        calls.append(1)
        return quadratic(y, A, b)

    res = minimizer(f, torch.zeros(4, 5, dtype=D), batch_dims=1)
    assert bool((res.status == Status.CONVERGED).all())
    assert torch.allclose(res.x, torch.linalg.solve(A, b), rtol=0, atol=1e-8)
    assert res.evaluations == len(calls)
    assert res.codes.shape == res.iterations.shape == res.error.shape == (4,)


@pytest.mark.parametrize(("minimizer", "steps"), [(LBFGS(), 40), (NewtonCG(), 25), (GradientDescent(), 113)])
def test_pinned_iterations(minimizer: Minimizer, steps: int) -> None:
    assert int(minimizer(rosenbrock, STARTS[:1], batch_dims=1).iterations) == steps


@each
def test_a_bad_item_changes_no_other(minimizer: Minimizer) -> None:
    """A NaN in the start, an objective that is unbounded below, one whose gradient is not its own."""
    signs = torch.tensor([1.0, 1.0, -1.0, 1.0], dtype=D)

    def f(y: Tensor) -> Tensor:
        fake = ((3 * y.detach() - y) ** 2).sum(-1) / 2
        own = signs * ((y**2).sum(-1) + (y**4).sum(-1))
        return torch.where(torch.arange(4) == 3, fake, own)

    def good(y: Tensor) -> Tensor:
        return (y**2).sum(-1) + (y**4).sum(-1)

    y0 = torch.tensor([[1.0, -2.0], [torch.nan, 1.0], [1.0, 0.5], [1.0, 1.0]], dtype=D)
    res = minimizer(f, y0, batch_dims=1)
    alone = minimizer(good, y0[:1], batch_dims=1)
    assert torch.equal(res.x[0], alone.x[0])
    assert int(res.iterations[0]) == int(alone.iterations)
    wanted = [Status.CONVERGED, Status.NON_FINITE, Status.DIVERGED, Status.LINE_SEARCH_FAILED]
    assert list(res.status) == wanted
    assert bool(res.x[2].isfinite().all())
    with pytest.raises(Exception, match="1 of 4 NON_FINITE"):
        replace(minimizer)(
            f, torch.where(torch.arange(4)[:, None] == 1, y0, torch.zeros(4, 2, dtype=D)), batch_dims=1
        ).unwrap()


@each
def test_trees_batches_and_shapes(minimizer: Minimizer) -> None:
    target = torch.arange(6.0, dtype=D).reshape(2, 3)

    def f(y: Any) -> Tensor:
        return (y["a"] - target) ** 2 + ((y["b"] - target[..., None, None]) ** 2).sum((-1, -2))

    y0 = {"a": torch.zeros(2, 3, dtype=D), "b": torch.zeros(2, 3, 2, 1, dtype=D, requires_grad=True)}
    with torch.no_grad():
        res = minimizer(f, y0, batch_dims=2)
    assert bool(res.converged.all())
    assert torch.allclose(res.x["a"], target, atol=1e-9)
    assert torch.allclose(res.x["b"], target[..., None, None].expand(2, 3, 2, 1), atol=1e-9)
    assert not res.x["b"].requires_grad
    empty = minimizer(lambda y: (y**2).sum(-1), torch.zeros(0, 3, dtype=D), batch_dims=1)
    assert empty.x.shape == (0, 3)
    nothing = minimizer(lambda y: y.sum(-1), torch.zeros(2, 0, dtype=D), batch_dims=1)
    assert list(nothing.status) == [Status.CONVERGED] * 2


@each
def test_float32(minimizer: Minimizer, generator: torch.Generator) -> None:
    A, b = (t.float() for t in quadratics(generator))
    res = minimizer(lambda y: quadratic(y, A, b), torch.zeros(4, 5), batch_dims=1)
    assert res.x.dtype == res.error.dtype == res.value.dtype == torch.float32
    assert bool(res.converged.all())
    assert torch.allclose(res.x, torch.linalg.solve(A, b), atol=1e-3)


@each
def test_states_go_on(minimizer: Minimizer) -> None:
    res = minimizer(rosenbrock, STARTS, batch_dims=1)
    cut = replace(minimizer, max_iter=3)(rosenbrock, STARTS, batch_dims=1)
    assert list(cut.status) == [Status.MAX_ITER] * 3 + [Status.CONVERGED]
    again = minimizer(rosenbrock, cut.state, float(res.tolerance.max()))
    assert bool(again.converged.all())
    assert torch.allclose(again.x, torch.ones(4, 2, dtype=D), atol=1e-5)
    warm = minimizer(rosenbrock, res.state, float(res.error.max()))
    assert warm.iterations.tolist() == [0, 0, 0, 0]
    state = minimizer.init(rosenbrock, STARTS, batch_dims=1)
    before = state.points.y.clone()
    for _ in range(3):
        state, previous = minimizer.step(rosenbrock, state), state
    assert torch.equal(state.points.y[:3], cut.state.points.y[:3])
    assert torch.equal(minimizer.init(rosenbrock, STARTS, batch_dims=1).points.y, before)
    assert torch.equal(minimizer.step(rosenbrock, previous).points.y, state.points.y)
    stopped = minimizer(rosenbrock, STARTS, batch_dims=1, callbacks=[lambda k, s: k == 2])
    assert list(stopped.status)[:3] == [Status.STOPPED] * 3


@each
def test_saddles_barriers_and_wells(minimizer: Minimizer) -> None:
    wells = minimizer(
        lambda y: (y[..., 0] ** 2 - 1) ** 2 + y[..., 1] ** 2,
        torch.tensor([[1e-3, 0.5], [-3.0, 0.0], [0.0, 0.0]], dtype=D),
        batch_dims=1,
    )
    assert bool(wells.converged.all())
    assert torch.allclose(wells.x, torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]], dtype=D), atol=1e-9)
    barrier = minimizer(
        lambda y: (y - y.log()).sum(-1), torch.tensor([[50.0, 1e-4], [1.0, 2.0]], dtype=D), batch_dims=1
    )
    assert bool(barrier.converged.all())
    assert torch.allclose(barrier.x, torch.ones(2, 2, dtype=D), atol=1e-6)


@each
def test_an_unreachable_tolerance_ends_at_the_rounding_level(minimizer: Minimizer) -> None:
    if isinstance(minimizer, GradientDescent):
        minimizer = replace(minimizer, max_iter=1500)
    res = replace(minimizer, rtol=0.0)(lambda y: (y.exp() - y * 2).sum(-1), torch.zeros(2, 3, dtype=D), batch_dims=1)
    assert all(status in (Status.STAGNATED, Status.CONVERGED) for status in res.status)
    assert float(res.error.max()) <= 1e-14


def test_constant_steps_are_those_of_the_formula() -> None:
    curvature = torch.tensor([[1.0, 3.0], [0.1, 2.0], [1.0, 30.0]], dtype=D)
    res = GradientDescent(0.25, max_iter=10, rtol=0.0)(
        lambda y: (curvature * y**2).sum(-1) / 2, torch.ones(3, 2, dtype=D), batch_dims=1
    )
    assert res.iterations.tolist()[:2] == [10, 10]
    assert torch.allclose(res.x[:2], (1 - 0.25 * curvature[:2]) ** 10, rtol=1e-13, atol=0)
    long = GradientDescent(0.25)(lambda y: (curvature * y**2).sum(-1) / 2, torch.ones(3, 2, dtype=D), batch_dims=1)
    assert list(long.status) == [Status.CONVERGED, Status.CONVERGED, Status.DIVERGED]


def test_a_preconditioner_serves_every_item() -> None:
    scale = torch.logspace(0, 4, 40, dtype=D)

    def f(y: Tensor) -> Tensor:
        return (scale * (y - 1) ** 2).sum(-1) + (y - 1).cosh().sum(-1)

    y0 = torch.zeros(3, 40, dtype=D)
    plain, helped = (NewtonCG(preconditioner=M)(f, y0, batch_dims=1) for M in (None, Diagonal(1 / (2 * scale + 1))))
    assert bool(helped.converged.all())
    assert helped.products < 0.5 * plain.products


class Logistic(nn.Module):
    """One small classifier an item, with a shared penalty that is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.penalty = nn.Parameter(torch.tensor(0.3, dtype=D))

    def forward(self, w: Tensor, X: Tensor, t: Tensor) -> Tensor:
        loss = nn.functional.softplus(-t * (X @ w[..., None])[..., 0]).mean(-1)
        return loss + self.penalty / 2 * (w**2).sum(-1)


@each
def test_an_argmin_layer_passes_its_batch_on(minimizer: Minimizer, generator: torch.Generator) -> None:
    X, t = torch.randn(3, 8, 2, generator=generator, dtype=D), torch.randn(3, 8, generator=generator, dtype=D).sign()
    many = ArgminLayer(Logistic(), minimizer, batch_dims=1)
    one = ArgminLayer(many.function, minimizer)
    y = many(torch.zeros(3, 2, dtype=D), X, t)
    loop = torch.stack([one(torch.zeros(2, dtype=D), *item) for item in zip(X, t, strict=True)])
    assert torch.allclose(y, loop, atol=1e-8)
    slopes = [torch.autograd.grad(out.sin().sum(), many.function.penalty)[0] for out in (y, loop)]
    assert torch.allclose(*slopes, atol=1e-8)


@pytest.mark.parametrize(
    "minimizer",
    [FOSI(), LazyNewton(), LevenbergMarquardt(), RegularizedNewton(), Sophia(0.1)],
    ids=lambda m: type(m).__name__,
)
def test_methods_without_a_batched_form_say_so(minimizer: Minimizer) -> None:
    with pytest.raises(ValueError, match=f"{type(minimizer).__name__}: it minimises one problem at a time"):
        minimizer(rosenbrock, STARTS, batch_dims=1)


@each
@pytest.mark.parametrize(
    ("f", "y0", "options", "error", "message"),
    [
        (rosenbrock, STARTS, {"batch_dims": -1}, ValueError, "batch_dims"),
        (rosenbrock, STARTS, {"batch_dims": 1, "tolerance": -1.0}, ValueError, "tolerance"),
        (3, STARTS, {"batch_dims": 1}, TypeError, "objective"),
        (lambda y: y.sum(), STARTS, {"batch_dims": 1}, ValueError, "one value an item, of shape"),
        (lambda y: 1.0, STARTS, {"batch_dims": 1}, TypeError, "floating tensor"),
        (rosenbrock, {"a": STARTS, "b": STARTS[:2]}, {"batch_dims": 1}, ValueError, "begin with the same 1"),
        (rosenbrock, {"a": STARTS, "b": torch.tensor(0.0, dtype=D)}, {"batch_dims": 1}, ValueError, "begin with"),
    ],
)
def test_bad_input_is_named(
    minimizer: Minimizer, f: Any, y0: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        minimizer(f, y0, **options)
