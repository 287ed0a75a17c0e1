import math

import pytest
import torch
from laws import rand, symmetric

from nestopt.linalg import (
    Dense,
    Diagonal,
    FunctionOperator,
    frobenius_norm,
    hutchinson_trace,
    hutchpp_trace,
    xtrace,
)

DOUBLE = torch.float64
TRACES = [hutchinson_trace, hutchpp_trace, xtrace]
n = 60
MATRICES = {
    "geometric": symmetric(0.6 ** torch.arange(n, dtype=DOUBLE)),
    "flat": symmetric(torch.linspace(1, 3, n, dtype=DOUBLE)),
    "indefinite": symmetric(torch.linspace(-2, 3, n, dtype=DOUBLE)),
    "nonsymmetric": torch.triu(rand(n, n)) + torch.eye(n, dtype=DOUBLE),
}


def runs(method, matrix, products, count=150):
    """Independent estimates of one matrix: a batch of systems, each with its own random vectors."""
    run = method(Dense(matrix.expand(count, *matrix.shape)), products)
    return run.value, run.standard_error


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("method", TRACES)
def test_unbiased_and_the_claimed_error_is_the_true_one(method, name):
    values, claims = runs(method, MATRICES[name], 20, 1000)
    errors = values - MATRICES[name].trace()
    assert abs(errors.mean()) <= 3.5 * errors.std() / math.sqrt(1000)
    assert 0.6 <= float(claims.square().mean().sqrt() / errors.square().mean().sqrt()) <= 1.3


@pytest.mark.parametrize("method", TRACES)
def test_the_errors_fall_as_theory_says(method):
    def error(products):
        values, _ = runs(method, MATRICES["geometric"], products)
        return float((values - MATRICES["geometric"].trace()).square().mean().sqrt())

    ratio = error(10) / error(40)
    if method is hutchinson_trace:
        assert 1.5 <= ratio <= 2.7  # the root of 4
    if method is hutchpp_trace:
        assert ratio >= 4
    if method is xtrace:
        assert ratio >= 0.6**-13  # geometric, with half the products


def test_xtrace_beats_the_others_on_fast_decay():
    truth = MATRICES["geometric"].trace()
    worst = [float((runs(method, MATRICES["geometric"], 30)[0] - truth).abs().amax()) for method in TRACES]
    assert worst[2] < 0.3 * worst[1] < 0.1 * worst[0]


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_exact_for_low_rank(rank, dtype):
    matrix = (rand(n, rank, seed=1) @ rand(rank, n, seed=2)).to(dtype)  # not symmetric
    tolerance = 1e-12 if dtype == DOUBLE else 2e-4
    for method, products in ((hutchpp_trace, 15), (xtrace, 12)):
        run = method(Dense(matrix), products)
        assert run.value == pytest.approx(float(matrix.trace()), abs=tolerance * n)
        assert run.standard_error <= tolerance * n


@pytest.mark.parametrize("method", [*TRACES, frobenius_norm])
def test_as_many_products_as_columns_are_exact(method):
    matrix = MATRICES["nonsymmetric"]
    truth = float(matrix.norm() if method is frobenius_norm else matrix.trace())
    for products in (n, 10 * n):
        run = method(Dense(matrix), products)
        assert run.value == pytest.approx(truth, rel=1e-13)
        assert run.standard_error == 0
        assert run.products == n


def test_hutchinson_is_exact_for_diagonal_matrices():
    d = rand(500)
    run = hutchinson_trace(Diagonal(d), 2)
    assert run.value == pytest.approx(float(d.sum()), abs=1e-12)
    assert run.standard_error <= 1e-12
    assert frobenius_norm(Diagonal(d), 3).value == pytest.approx(float(d.norm()), rel=1e-12)


@pytest.mark.parametrize("method", [*TRACES, frobenius_norm])
def test_a_batch_of_systems_counts_and_keeps_its_shape(method):
    matrices = torch.stack([MATRICES[name] for name in MATRICES]).reshape(2, 2, n, n)
    calls = []

    def product(v):
        calls.append(v[..., 0].numel())
        return torch.einsum("...ij,...j->...i", matrices, v)

    A = FunctionOperator(product, (2, 2, n, n), DOUBLE)
    for products in (20, 21, n):
        calls.clear()
        run = method(A, products, generator=torch.Generator().manual_seed(4))
        assert run.value.shape == run.standard_error.shape == (2, 2)
        assert run.products == sum(calls) <= 4 * products
    truth = matrices.square().sum((-2, -1)).sqrt() if method is frobenius_norm else torch.einsum("bcii->bc", matrices)
    assert bool(((run.value - truth).abs() <= 1e-12 * n).all())


def test_frobenius_norm_of_any_shape_and_size():
    for shape in ((40, 30), (30, 40), (1, 200)):
        matrix = rand(*shape)
        values, claims = runs(frobenius_norm, matrix, 20)
        errors = values**2 - matrix.square().sum()
        assert abs(errors.mean()) <= 3.5 * errors.std() / math.sqrt(150)
        assert 0.7 <= float(claims.mean() / (values - matrix.norm()).std()) <= 1.3 or shape[1] <= 20
    run = frobenius_norm(Dense(rand(40, 40)), 20)
    for factor in (1e-200, 1e200):
        scaled = frobenius_norm(Dense(factor * rand(40, 40)), 20)
        assert scaled.value == pytest.approx(factor * run.value, rel=1e-12)
        assert scaled.standard_error == pytest.approx(factor * run.standard_error, rel=1e-10)
    assert frobenius_norm(Dense(torch.zeros(40, 40)), 4).standard_error == 0


def test_pinned():
    A = Dense(MATRICES["geometric"])
    assert xtrace(A, 30).value == pytest.approx(2.5011643, abs=1e-6)
    assert hutchpp_trace(A, 30).value == pytest.approx(2.5081210, abs=1e-6)
    assert hutchinson_trace(A, 30).value == pytest.approx(2.3001576, abs=1e-6)


@pytest.mark.parametrize("method", [*TRACES, frobenius_norm])
def test_nan_empty_and_refusals(method):
    poisoned = torch.eye(n, dtype=DOUBLE)
    poisoned[3, 3] = torch.nan
    run = method(Dense(poisoned), 10)
    assert run.value != run.value
    assert method(Dense(torch.zeros(0, 0))).value == 0
    assert method(Diagonal(torch.zeros(3, 0))).value.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="products must be an integer"):
        method(Dense(poisoned), 1)
    with pytest.raises(TypeError, match="LinearOperator"):
        method(poisoned)
    if method is not frobenius_norm:
        with pytest.raises(ValueError, match="must be square"):
            method(Dense(torch.zeros(3, 4)))


class Weighted(Dense):
    def vecdot(self, u, v):
        return 2 * super().vecdot(u, v)


@pytest.mark.parametrize("method", [*TRACES, frobenius_norm])
def test_pieces_of_vectors_are_refused(method):
    with pytest.raises(ValueError, match="inner product"):
        method(Weighted(torch.eye(9)), 4)


def test_the_global_generator_is_not_touched():
    before = torch.get_rng_state()
    for method in (*TRACES, frobenius_norm):
        assert method(Dense(MATRICES["flat"]), 10) == method(Dense(MATRICES["flat"]), 10)
    assert torch.equal(before, torch.get_rng_state())
