"""Derivatives of minimisers of f + g: the ten duties, known answers, constraints, second order."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import sklearn.datasets
import torch
from laws_layer import Case, check_certificates, check_transforms, duties
from torch import Tensor, nn
from torch.func import hessian, jacfwd, jacrev, vmap

from nestopt.constrained import (
    L1,
    Box,
    CompositeArgminLayer,
    ElasticNet,
    ProjectedGradient,
    ProximalGradient,
    Simplex,
    composite_argmin,
)
from nestopt.linalg import GMRES, LU, SolverError

D = torch.float64
DIMS = (2, 1, 0)


def fit(y: Tensor, W: Tensor, b: Tensor, w: Tensor) -> Tensor:
    return (((W @ y[..., None])[..., 0] - b) ** 2).sum(-1) / 2


def lasso_exact(W: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """The lasso whose first coordinate is positive, the second negative and the third zero."""
    V = W[..., :2]
    right = (V.mT @ b[..., None])[..., 0] - w[..., None] * b.new_tensor([1.0, -1.0])
    y = (torch.linalg.inv(V.mT @ V) @ right[..., None])[..., 0]
    return torch.cat([y, torch.zeros_like(y[..., :1])], -1)


def example(g: torch.Generator) -> tuple[Tensor, ...]:
    W = torch.eye(3, dtype=D) + 0.1 * torch.randn(3, 3, generator=g, dtype=D)
    b = torch.tensor([1.5, -1.2, 0.0], dtype=D) + 0.1 * torch.rand(3, generator=g, dtype=D)
    return W, b, 0.4 + 0.2 * torch.rand((), generator=g, dtype=D)


def layer(*theta: Tensor, solver: Any = None, guess: Tensor | None = None, **options: Any) -> Any:
    batch = torch.broadcast_shapes(*(t.shape[: t.ndim - d] for t, d in zip(theta, DIMS, strict=True)))
    y = lasso_exact(*(t.detach() for t in theta))
    y = y if guess is None else y + 1e-12 * (guess - y)
    return composite_argmin(
        fit, lambda W, b, w: L1(w[..., None]), y, *theta, batch_dims=len(batch), solver=solver, **options
    )


def tree(inputs: Any) -> Any:
    theta = (inputs["first"], *inputs["rest"])
    y = {"y": lasso_exact(*(t.detach() for t in theta))}
    return composite_argmin(
        lambda y, inputs: fit(y["y"], inputs["first"], *inputs["rest"]),
        lambda inputs: {"y": L1(inputs["rest"][1])},
        y,
        inputs,
    )


def capturing(captured: Tensor) -> Any:
    y, a = torch.tensor(3.0, dtype=D), torch.tensor(4.0, dtype=D)
    return composite_argmin(lambda y, a: (y - a * captured) ** 2 / 2, L1(1.0), y, a)


class Fit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(example(torch.Generator().manual_seed(1))[0])

    def forward(self, y: Tensor, b: Tensor) -> Tensor:
        return fit(y, self.W, b, b)


class Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(-0.4, dtype=D))
        self.register_buffer("unit", torch.tensor(1.0, dtype=D))

    def forward(self, b: Tensor) -> L1:
        return L1(self.log.exp() * self.unit)


def module() -> tuple[nn.Module, tuple[Any, ...]]:
    return CompositeArgminLayer(Fit(), Weight()), (torch.zeros(3, dtype=D), torch.tensor([1.5, -1.2, 0.1], dtype=D))


def case(solver: Any) -> Case:
    return Case(
        f"lasso-{type(solver).__name__}", partial(layer, solver=solver), example, lasso_exact, shared=(0, 2), atol=1e-9,
        spoil=lambda t: (t[0], -t[1], t[2]), tree=tree, capturing=capturing,
        guess=lambda y0, *theta: layer(*theta, guess=y0), module=module,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("case", "law"), [*duties([case(LU())]), *duties([case(GMRES())], [check_transforms, check_certificates])]
)
def test_duty(case: Case, law: Any, generator: torch.Generator) -> None:
    law(case, generator)


def regression() -> tuple[Tensor, Tensor]:
    X, t = sklearn.datasets.make_regression(10, 3, random_state=0)
    return torch.tensor(X), torch.tensor(t)


def test_known_answers_of_ridge_and_lasso() -> None:
    X, t = regression()

    def f(w: Tensor, *_: Tensor) -> Tensor:
        return ((X @ w - t) ** 2).mean() / 2

    def ridge(w: Tensor, weight: Tensor) -> Tensor:
        return f(w) + weight / 2 * (w * w).sum()

    zeros = torch.zeros(3, dtype=D)
    weight = torch.tensor(5.0, dtype=D)
    y = ProximalGradient(rtol=1e-13)(lambda w: ridge(w, weight), zeros).unwrap()
    assert torch.allclose(y, torch.tensor([16.51390727, 8.20625411, 23.62360791], dtype=D), rtol=0, atol=1e-8)
    slope = jacrev(lambda weight: composite_argmin(ridge, None, y, weight))(weight)
    assert torch.allclose(slope, torch.tensor([-2.50171644, -1.26718286, -3.54263662], dtype=D), rtol=0, atol=1e-8)

    weight = torch.tensor(10.0, dtype=D)
    y = ProximalGradient(L1(10.0), rtol=1e-13)(f, zeros).unwrap()
    assert torch.allclose(y, torch.tensor([62.16485194, 29.03583355, 88.27012188], dtype=D), rtol=0, atol=1e-8)
    exact = -torch.linalg.solve(X.mT @ X / len(X), y.sign())  # no coordinate is zero; the printed digits end at 1e-7
    assert torch.allclose(exact, torch.tensor([-0.6017178, -0.69149565, -0.6104686], dtype=D), rtol=0, atol=6e-8)
    for jacobian in (jacrev, jacfwd):
        slope = jacobian(lambda weight: composite_argmin(f, L1, y, weight))(weight)
        assert torch.allclose(slope, exact, rtol=0, atol=1e-10)
    assert bool((hessian(lambda weight: composite_argmin(f, L1, y, weight).sum())(weight)).abs() <= 1e-10)


def test_the_elastic_net_has_its_formula() -> None:
    # with f = |y - b|^2 / 2 the minimiser is soft(b, r w) / (1 + (1 - r) w)
    b = torch.tensor([2.0, -1.5, 0.1], dtype=D)

    def exact(w: Tensor, r: Tensor) -> Tensor:
        return b.sign() * (b.abs() - r * w).clamp_min(0) / (1 + (1 - r) * w)

    w, r = torch.tensor(0.8, dtype=D), torch.tensor(0.4, dtype=D)

    def ours(w: Tensor, r: Tensor) -> Tensor:
        y = exact(w.detach(), r.detach())
        return composite_argmin(
            lambda y, w, r: ((y - b) ** 2).sum() / 2, lambda w, r: ElasticNet(r * w, (1 - r) * w), y, w, r
        )

    for i in (0, 1):
        assert torch.allclose(jacrev(ours, i)(w, r), jacrev(exact, i)(w, r), rtol=0, atol=1e-10)
        for outer in (jacrev, jacfwd):
            truth = jacrev(jacrev(exact, i), i)(w, r)
            assert torch.allclose(outer(jacrev(ours, i), i)(w, r), truth, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("space", "find"), [(Simplex(), ProjectedGradient), (Box(0.0, 1.0), ProximalGradient)])
def test_a_set_has_the_derivative_of_its_face(space: Any, find: Any, generator: torch.Generator) -> None:
    """On the face, y = argmin of a quadratic: its KKT system is the truth."""
    M = torch.randn(6, 4, generator=generator, dtype=D)
    H = M.mT @ M + torch.eye(4, dtype=D)
    q = torch.tensor([-3.0, 1.0, 2.0, -2.5], dtype=D)
    y = find(space, rtol=1e-13)(lambda y: y @ H @ y / 2 + q @ y, torch.full((4,), 0.25, dtype=D)).unwrap()
    slope = jacrev(lambda q: composite_argmin(lambda y, q: y @ H @ y / 2 + q @ y, space, y, q))(q)
    free = (y > 1e-9) & (y < 1 - 1e-9)
    assert 0 < int(free.sum()) < 4
    C = (
        torch.ones(int(free.sum()), 1, dtype=D)
        if isinstance(space, Simplex)
        else torch.zeros(int(free.sum()), 0, dtype=D)
    )
    K = torch.cat([torch.cat([H[free][:, free], C], 1), torch.cat([C.mT, torch.zeros(C.shape[1], C.shape[1])], 1)])
    truth = torch.zeros(4, 4, dtype=D)
    count = int(free.sum())
    inverse = torch.linalg.inv(K)[:count, :count]
    truth[free.nonzero(), free.nonzero()[:, 0]] = -inverse
    assert torch.allclose(slope, truth, rtol=0, atol=1e-9)


def test_the_size_does_not_matter(generator: torch.Generator) -> None:
    theta = example(generator)
    for i in range(3):
        truth = jacrev(lasso_exact, i)(*theta)
        for size in (1e-3, 1.0, 1e3):
            assert torch.allclose(jacrev(partial(layer, step_size=size), i)(*theta), truth, rtol=0, atol=1e-8)


def test_at_a_kink_the_coordinate_stays() -> None:
    # y = soft(b, 1) at b = 1: the derivative is 0 from the left and 1 from the right
    for b, slope in [(1.0 - 1e-3, 0.0), (1.0, 0.0), (1.0 + 1e-3, 1.0)]:
        found = jacrev(
            lambda b: composite_argmin(lambda y, b: ((y - b) ** 2).sum() / 2, L1(1.0), (b.detach() - 1).clamp_min(0), b)
        )(torch.tensor([b], dtype=D))
        assert found.item() == slope


def test_vmap_equals_a_loop_and_a_batch(generator: torch.Generator) -> None:
    theta = [torch.stack(column) for column in zip(*(example(generator) for _ in range(3)), strict=True)]
    loop = torch.stack([torch.stack(tuple(jacrev(layer, 1)(*item))) for item in zip(*theta, strict=True)])
    assert torch.allclose(vmap(jacrev(layer, 1))(*theta), loop, rtol=0, atol=1e-10)
    batch = jacrev(layer, 1)(*theta)
    assert torch.allclose(torch.stack([batch[i, :, i] for i in range(3)]), loop, rtol=0, atol=1e-10)


def test_a_batch_through_the_module() -> None:
    b = torch.tensor([[1.5, -1.2, 0.1], [2.0, -1.0, 0.0]], dtype=D, requires_grad=True)
    one = CompositeArgminLayer(Fit(), Weight(), partial(ProximalGradient, rtol=1e-13))
    many = CompositeArgminLayer(one.function, one.prox, one.find, batch_dims=1)
    y = many(torch.zeros(2, 3, dtype=D), b)
    rows = torch.stack([one(torch.zeros(3, dtype=D), row) for row in b])
    assert torch.allclose(y, rows, rtol=0, atol=1e-10)
    inputs = [b, *one.parameters()]
    for mine, truth in zip(torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(rows.sum(), inputs), strict=True):
        assert torch.allclose(mine, truth, rtol=0, atol=1e-9)
    assert sorted(many.state_dict()) == ["function.W", "prox.log", "prox.unit"]


def test_a_weight_that_is_captured_is_refused_by_name() -> None:
    weight = torch.tensor(1.0, dtype=D, requires_grad=True)
    y, b = torch.tensor([1.0], dtype=D), torch.tensor([2.0], dtype=D, requires_grad=True)
    with pytest.raises(ValueError, match=r"prox\.weight"):
        composite_argmin(lambda y, b: ((y - b) ** 2).sum() / 2, L1(weight), y, b)


def test_pytrees_with_a_term_for_each_leaf() -> None:
    y = {"a": torch.tensor(2.0, dtype=D), "b": (torch.tensor([[0.0, 1.0]], dtype=D), torch.tensor([5.0], dtype=D))}
    t = torch.tensor(3.0, dtype=D, requires_grad=True)

    def f(y: Any, t: Tensor) -> Tensor:
        return ((y["a"] - t) ** 2 + ((y["b"][0] - t) ** 2).sum() + ((y["b"][1] - 5 * t / 3) ** 2).sum()) / 2

    y["b"] = (torch.tensor([[1.0, 1.0]], dtype=D), y["b"][1])
    out = composite_argmin(f, {"a": L1(1.0), "b": (Box(0.0, 1.0), None)}, y, t)
    slopes = [torch.autograd.grad(leaf.sum(), t, retain_graph=True)[0] for leaf in (out["a"], *out["b"])]
    assert [round(float(slope), 10) for slope in slopes] == [1.0, 0.0, round(5 / 3, 10)]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda y: composite_argmin(lambda y: (y**2).sum(), L1(1.0), y, step_size=-1.0), ValueError, "step_size"),
        (lambda y: composite_argmin(lambda y: (y**2).sum(), 3.0, y), TypeError, "Prox, a Set or None"),
        (lambda y: composite_argmin(lambda y: (y**2).sum(), {"a": L1(1.0)}, y), ValueError, "structure"),
        (lambda y: composite_argmin(lambda y: y**2, L1(1.0), y), ValueError, "scalar"),
        (lambda y: composite_argmin(lambda y: (y**2).sum(), L1(1.0), y, batch_dims=-1), ValueError, "batch_dims"),
        (lambda y: composite_argmin(lambda y: ((y - 9) ** 2).sum(), L1(1.0), y), SolverError, "not a minimiser"),
        (lambda y: CompositeArgminLayer(torch.sum, L1(1.0)), TypeError, "torch.nn.Module"),  # type: ignore[arg-type]
    ],
)
def test_bad_input_is_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.ones(2, dtype=D))


def test_a_failed_search_is_in_the_note() -> None:
    layer = CompositeArgminLayer(Fit(), L1(0.1), partial(ProximalGradient, max_iter=1, rtol=0.0), rtol=1e-12, atol=0.0)
    with pytest.raises(SolverError) as caught:
        layer(torch.zeros(3, dtype=D), torch.tensor([1.0, 2.0, math.pi], dtype=D))
    assert "MAX_ITER" in "".join(caught.value.__notes__)
