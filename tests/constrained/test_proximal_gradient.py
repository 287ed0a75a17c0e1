"""FISTA with backtracking and restarts: laws, references, ill-conditioning, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import sklearn.datasets
import sklearn.linear_model
import torch
from laws_first_order import BAD_INPUT, D, check_first_order, least_squares, misfit
from scipy.optimize import nnls
from torch import Tensor
from torch.nn.functional import softplus

from nestopt.constrained import L1, Box, ElasticNet, ProximalGradient, Simplex
from nestopt.linalg import Status


@pytest.mark.parametrize("prox", [L1(0.7), ElasticNet(0.5, 0.4), Box(0.0), Simplex(), None], ids=str)
def test_laws(prox: Any, generator: torch.Generator) -> None:
    def certificate(y: Tensor, gradient: Tensor) -> Tensor:
        v = y - 0.02 * gradient
        image = v if prox is None else prox.prox(v, 0.02) if hasattr(prox, "prox") else prox.project(v)
        return (y - image).norm(dim=-1) / 0.02

    check_first_order(ProximalGradient(prox), torch.full((5,), 0.2, dtype=D), certificate, generator)


def test_the_logistic_lasso_of_sklearn() -> None:
    X, t = sklearn.datasets.make_classification(80, 8, random_state=0)
    reference = sklearn.linear_model.LogisticRegression(
        l1_ratio=1.0, C=0.25, solver="saga", fit_intercept=False, tol=1e-12, max_iter=100000
    ).fit(X, t)
    X, t = torch.tensor(X), torch.tensor(2.0 * t - 1)
    res = ProximalGradient(L1(4.0))(lambda w: softplus(-t * (X @ w)).sum(), torch.zeros(8, dtype=D))
    assert res.status == Status.CONVERGED
    assert torch.allclose(res.x, torch.tensor(reference.coef_[0]), rtol=0, atol=1e-8)
    assert bool((res.x == 0).any())
    assert res.value == pytest.approx(float(softplus(-t * (X @ res.x)).sum() + 4 * res.x.abs().sum()), rel=1e-12)


def test_nonnegative_least_squares_of_scipy(generator: torch.Generator) -> None:
    A, b = least_squares(generator, 1, 40, 20)
    reference = torch.tensor(nnls(A[0].numpy(), b[0].numpy())[0])
    res = ProximalGradient(Box(0.0))(misfit(A[0], b[0]), torch.zeros(20, dtype=D))
    assert torch.allclose(res.x, reference, rtol=0, atol=1e-8)


def test_pinned_iterations() -> None:
    X, t = sklearn.datasets.make_regression(10, 3, random_state=0)
    X, t = torch.tensor(X), torch.tensor(t)
    res = ProximalGradient(L1(10.0))(lambda w: ((X @ w - t) ** 2).mean() / 2, torch.zeros(3, dtype=D))
    assert res.iterations == 13


def test_restarts_make_it_as_fast_as_its_condition_allows() -> None:
    scale = torch.logspace(0, 3, 20, dtype=D)
    target = torch.linspace(-1, 2, 20, dtype=D)
    res = ProximalGradient(L1(0.1))(lambda w: (scale * (w - target) ** 2).sum(), torch.zeros(20, dtype=D))
    assert res.converged
    assert res.iterations < 1000
    exact = target - (0.05 / scale) * target.sign()
    assert torch.allclose(res.x, exact, rtol=0, atol=1e-5)


def test_each_item_has_its_own_weight_and_units(generator: torch.Generator) -> None:
    A, b = least_squares(generator, 3)
    weights = torch.tensor([[0.1], [1.0], [5.0]], dtype=D)
    units = torch.tensor([1e-6, 1.0, 1e6], dtype=D)
    res = ProximalGradient(L1(weights * units[:, None]))(
        lambda y: units * misfit(A, b)(y), torch.zeros(3, 5, dtype=D), batch_dims=1
    )
    assert bool(res.converged.all())
    plain = ProximalGradient(L1(weights))(misfit(A, b), torch.zeros(3, 5, dtype=D), batch_dims=1)
    assert torch.allclose(res.x, plain.x, rtol=0, atol=1e-8)


def test_endings() -> None:
    unbounded = ProximalGradient()(
        lambda y: y.sum(-1) * torch.tensor([1.0, 0.0]), torch.ones(2, 2, dtype=D), batch_dims=1
    )
    assert list(unbounded.status) == [Status.DIVERGED, Status.CONVERGED]
    nan = ProximalGradient(L1(1.0))(lambda y: y.log().sum(), torch.tensor([-1.0], dtype=D))
    assert (nan.status, nan.iterations) == (Status.NON_FINITE, 0)
    barrier = ProximalGradient(L1(1.0))(lambda y: -y.log().sum(), torch.tensor([50.0, 1e-3], dtype=D))
    assert barrier.converged
    assert torch.allclose(barrier.x, torch.ones(2, dtype=D), atol=1e-8)
    rounding = ProximalGradient(L1(1.0), rtol=0.0)(lambda y: (y.exp() - 3 * y).sum(), torch.zeros(3, dtype=D))
    assert rounding.status in (Status.STAGNATED, Status.CONVERGED)
    assert rounding.error <= 1e-14


def test_trees_with_a_term_for_each_leaf() -> None:
    y0 = {"w": torch.zeros(2, 3, dtype=D), "b": torch.tensor(0.0, dtype=D), "c": torch.zeros(2, dtype=D)}
    t = torch.tensor([3.0, -2.0, 0.5], dtype=D)

    def f(y: Any) -> Tensor:
        return (((y["w"] - t) ** 2).sum() + (y["b"] - 3) ** 2 + ((y["c"] - 3) ** 2).sum()) / 2

    res = ProximalGradient({"w": L1(1.0), "b": Box(0.0, 1.0), "c": None})(f, y0)
    assert res.converged
    assert torch.allclose(res.x["w"], torch.tensor([2.0, -1.0, 0.0], dtype=D).expand(2, 3), atol=1e-9)
    assert torch.equal(res.x["b"], torch.tensor(1.0, dtype=D))
    assert torch.allclose(res.x["c"], torch.full((2,), 3.0, dtype=D), atol=1e-9)


@pytest.mark.parametrize(("arguments", "options", "error", "message"), BAD_INPUT)
def test_bad_input_is_named(arguments: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ProximalGradient(L1(1.0))(*arguments, **options)


def test_unfit_terms_are_named() -> None:
    with pytest.raises(TypeError, match="Prox, a Set or None"):
        ProximalGradient(2.0)(lambda y: y.sum(), torch.ones(2))
    with pytest.raises(ValueError, match="structure"):
        ProximalGradient({"a": L1(1.0)})(lambda y: y.sum(), torch.ones(2))
    with pytest.raises(ValueError, match="rtol"):
        ProximalGradient(L1(1.0), rtol=-1.0)
