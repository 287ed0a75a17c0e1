"""What is particular to each second-order minimiser; the laws that all share are in test_minimizers.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from laws_optim import Case, check_minimizer, check_structure
from torch import Tensor
from torch.nn.functional import softplus

from nestopt.implicit import FOSI, GradientDescent, LazyNewton, Minimizer, NewtonCG, RegularizedNewton, Sophia
from nestopt.implicit.fosi import ritz_pairs
from nestopt.linalg import Dense, Status

DOUBLE = torch.float64
SOPHIA = Sophia(momentum=0.8)
EVERY: dict[str, Minimizer] = {
    "newton": NewtonCG(), "regularized": RegularizedNewton(), "regularized, CG": RegularizedNewton(dense_below=0),
    "lazy": LazyNewton(), "lazy, CG": LazyNewton(dense_below=0), "fosi": FOSI(rank=3), "sophia": SOPHIA,
}  # fmt: skip
each = pytest.mark.parametrize("minimizer", EVERY.values(), ids=EVERY.keys())


@cache
def matrix(eigenvalues: tuple[float, ...]) -> Tensor:
    n = len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=DOUBLE))
    A = (Q * torch.tensor(eigenvalues, dtype=DOUBLE)) @ Q.T
    return (A + A.T) / 2


def quadratic(eigenvalues: tuple[float, ...]) -> Case:
    A, b = matrix(eigenvalues), torch.ones(len(eigenvalues), dtype=DOUBLE)

    def objective(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        A_, b_ = A.to(dtype), b.to(dtype)
        return lambda y: y @ A_ @ y / 2 - b_ @ y

    start = torch.zeros(len(b), dtype=DOUBLE)
    return Case(
        "quadratic", objective, lambda dtype: start.to(dtype, copy=True), torch.linalg.solve(A, b), 1e-7
    )  # fmt: skip


def curved(dtype: torch.dtype = DOUBLE) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Strongly convex, with a Hessian that varies; 12 variables."""
    X = torch.randn(40, 12, generator=torch.Generator().manual_seed(5), dtype=DOUBLE).to(dtype)
    return lambda w: softplus(X @ w).mean() + (X[0] @ w).exp() / 10 + 1e-2 * (w**2).sum(), torch.ones(12, dtype=dtype)


def errors_of(minimizer: Minimizer, f: Callable[[Tensor], Tensor], y0: Tensor) -> list[float]:
    errors: list[float] = []
    minimizer(f, y0, callbacks=[lambda k, s: errors.append(float(s.error))])
    return [error / errors[0] for error in errors]


def order(errors: list[float], low: float, high: float) -> float:
    """The smallest exponent seen between errors a of low < a < high and their successors."""
    exponents = [math.log(max(b, 1e-300)) / math.log(a) for a, b in pairwise(errors) if low < a < high]
    assert exponents, errors
    return min(exponents)


@pytest.mark.parametrize("case", [quadratic((1.0,) * 5), quadratic((1.0, 2.0, 4.0, 8.0))], ids=["ones", "powers"])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_laws_of_sophia(case: Case, dtype: torch.dtype) -> None:
    check_minimizer(SOPHIA, case, dtype)


@pytest.mark.parametrize("minimizer", [EVERY["newton"], EVERY["regularized"], EVERY["lazy"]])
def test_an_ill_conditioned_quadratic_is_no_obstacle(minimizer: Minimizer) -> None:
    case = quadratic(tuple(torch.logspace(0, 6, 20, dtype=DOUBLE).tolist()))
    check_minimizer(minimizer, replace(case, xtol=1e-4), DOUBLE)


@each
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_no_steps(minimizer: Minimizer, dtype: torch.dtype) -> None:
    f, y0 = curved(dtype)
    res = replace(minimizer, max_iter=0)(f, y0)
    assert (res.status, res.iterations, res.evaluations, res.gradients, res.products) == (Status.MAX_ITER, 0, 1, 1, 0)
    assert torch.equal(res.x, y0)
    exact = minimizer(lambda y: ((y - 1) ** 2).sum(), y0)
    assert (exact.status, exact.iterations, exact.error, exact.products) == (Status.CONVERGED, 0, 0.0, 0)
    nan = minimizer(lambda y: (y - 2).log().sum(), y0)
    assert (nan.status, nan.iterations, nan.products) == (Status.NON_FINITE, 0, 0)


@each
def test_the_same_answer(minimizer: Minimizer) -> None:
    f, y0 = curved()
    truth = NewtonCG(rtol=1e-13)(f, y0).x
    res = minimizer(f, y0)
    assert res.converged
    assert float((res.x - truth).norm()) <= 1e-7 * float(truth.norm())
    again = minimizer(f, y0)
    assert torch.equal(again.x, res.x)
    assert again.products == res.products


def test_sophia_keeps_structure() -> None:
    case = quadratic((1.0, 2.0, 4.0, 8.0))
    check_structure(SOPHIA, case.objective(DOUBLE), case.start(DOUBLE))


def test_local_orders() -> None:
    f, y0 = curved()
    assert order(errors_of(NewtonCG(rtol=1e-14), f, y0), 1e-7, 1e-2) >= 1.7
    assert order(errors_of(RegularizedNewton(rtol=1e-14), f, y0), 1e-7, 1e-3) >= 1.3
    assert order(errors_of(LazyNewton(rtol=1e-14, refresh_every=1), f, y0), 1e-7, 1e-3) >= 1.3


@pytest.mark.parametrize(
    ("minimizer", "iterations", "products"),
    [(RegularizedNewton(), 8, 97), (LazyNewton(), 15, 61), (FOSI(rank=3), 39, 24), (SOPHIA, 220, 22)],
)
def test_pinned_counts(minimizer: Minimizer, iterations: int, products: int) -> None:
    f, y0 = curved()
    res = minimizer(f, y0)
    assert (res.iterations, res.products) == (iterations, products)


def test_a_shift_once_diagonalised_costs_no_products() -> None:
    f, y0 = curved()
    for k in (1, 3, 100):
        res = LazyNewton(refresh_every=k)(f, y0)
        assert res.converged
        assert (res.products - 1) % 12 == 0  # a Hessian costs n, the first M one
        if k == 100:
            assert res.products <= 4 * 12 + 1  # three times a step failed with an old one
    one, regularized = LazyNewton(refresh_every=1)(f, y0), RegularizedNewton()(f, y0)
    assert (one.iterations, one.products) == (regularized.iterations, regularized.products)
    assert torch.equal(one.x, regularized.x)


def test_a_lazy_state_brings_its_hessian_along() -> None:
    f, y0 = curved()
    res = LazyNewton()(f, y0)
    assert res.state.kept is not None
    assert res.state.hessian is None
    warm = LazyNewton()(lambda w: f(w) + 1e-3 * (w**2).sum(), res.state, res.tolerance)
    assert warm.converged
    assert warm.products <= 12


def test_the_lowest_eigenvalue_is_shifted_away() -> None:
    saddle = torch.tensor([2.0, 1.0, -1.0], dtype=DOUBLE)
    for minimizer in (RegularizedNewton(), RegularizedNewton(dense_below=0), LazyNewton()):
        res = minimizer(lambda y: (saddle * y**2).sum() + (y**4).sum() / 4, torch.full((3,), 1e-3, dtype=DOUBLE))
        assert res.converged
        assert torch.allclose(res.x.abs(), torch.tensor([0.0, 0.0, math.sqrt(2)], dtype=DOUBLE), atol=1e-7)


def test_ritz_pairs_are_eigenpairs_when_the_space_is_whole() -> None:
    A = matrix((1.0, 2.0, 4.0, 8.0))
    values, vectors, products = ritz_pairs(Dense(A, symmetric=True), 4, torch.Generator().manual_seed(0))
    assert products == 4
    assert torch.allclose(values, torch.linalg.eigvalsh(A), rtol=1e-12)
    assert float((vectors @ A - values[:, None] * vectors).norm()) <= 1e-12
    assert float((vectors @ vectors.T - torch.eye(4, dtype=DOUBLE)).norm()) <= 1e-12


@pytest.mark.slow
def test_fosi_takes_outliers_away() -> None:
    case = quadratic((*torch.linspace(1, 3, 40).tolist(), 1e3, 2e3, 3e3, 4e3))
    f, y0 = case.objective(DOUBLE), case.start(DOUBLE)
    plain, helped = GradientDescent(max_iter=4000)(f, y0), FOSI(rank=4)(f, y0)
    assert plain.converged
    assert helped.converged
    assert torch.allclose(helped.x, case.solution, atol=1e-8)
    assert helped.gradients + helped.products < 0.5 * plain.gradients
    assert helped.products % 16 == 0
    low = quadratic((1e-3, 2e-3, *torch.linspace(1, 3, 30).tolist()))
    both = FOSI(rank=1, smallest=2, lanczos_steps=20)(low.objective(DOUBLE), low.start(DOUBLE))
    none = FOSI(rank=1, lanczos_steps=20)(low.objective(DOUBLE), low.start(DOUBLE))
    assert both.converged
    assert both.gradients < 0.7 * none.gradients


def test_sophia_scales_coordinates() -> None:
    scale = torch.logspace(0, 6, 7, dtype=DOUBLE)
    f: Callable[[Tensor], Tensor] = lambda y: (scale * (y - 1) ** 2).sum()  # noqa: E731
    res = SOPHIA(f, torch.zeros(7, dtype=DOUBLE))
    assert res.converged
    assert res.iterations < 200  # the condition number is 1e6
    assert res.products == math.ceil(res.iterations / 10)
    # no coordinate ever moves farther than step_size
    moves: list[Tensor] = []
    Sophia(0.01, max_iter=50)(f, torch.zeros(7, dtype=DOUBLE), callbacks=[lambda k, s: moves.append(s.point.y)])
    assert max(float((b - a).abs().max()) for a, b in pairwise(moves)) <= 0.01 * (1 + 1e-12)


def test_sophia_without_a_minimum_is_honest() -> None:
    res = Sophia(max_iter=100)(lambda y: y.sum(), torch.zeros(2, dtype=DOUBLE))
    assert res.status == Status.MAX_ITER
    assert res.error == pytest.approx(math.sqrt(2))
    res = Sophia(step_size=10.0, max_iter=1000)(lambda y: -(y.exp()).sum(), torch.zeros(2, dtype=DOUBLE))
    assert res.status == Status.DIVERGED


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RegularizedNewton(dense_below=-1), "dense_below"),
        (lambda: RegularizedNewton(cg_max_iter=0), "cg_max_iter"),
        (lambda: LazyNewton(refresh_every=0), "refresh_every"),
        (lambda: FOSI(rank=-1), "rank"),
        (lambda: FOSI(rank=0), "GradientDescent"),
        (lambda: FOSI(rank=5, lanczos_steps=4), "lanczos_steps"),
        (lambda: FOSI(refresh_every=0), "refresh_every"),
        (lambda: Sophia(step_size=0.0), "step_size"),
        (lambda: Sophia(gamma=math.inf), "gamma"),
        (lambda: Sophia(momentum=1.0), "momentum"),
        (lambda: Sophia(averaging=-0.1), "averaging"),
        (lambda: Sophia(refresh_every=1.5), "refresh_every"),
        (lambda: Sophia(max_iter=-1), "max_iter"),
    ],
)
def test_bad_input_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
