import pytest
import torch
from laws import rand, symmetric

from nestopt.linalg import Dense, Diagonal, FunctionOperator, hutchinson_diagonal, xdiag
from nestopt.linalg.probes import LeaveOneOut

DOUBLE = torch.float64
METHODS = [hutchinson_diagonal, xdiag]
n = 50
MATRICES = {
    "geometric": symmetric(0.6 ** torch.arange(n, dtype=DOUBLE)),
    "dominant": torch.diag(torch.linspace(1, 9, n, dtype=DOUBLE)) + 0.05 * symmetric(rand(n)),
    "nonsymmetric": torch.triu(rand(n, n)),
}


def runs(method, matrix, products, count=150):
    """Independent estimates of one matrix: a batch of systems, each with its own random vectors."""
    run = method(Dense(matrix.expand(count, *matrix.shape)), products)
    return run.value, run.standard_error


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("method", METHODS)
def test_unbiased_and_the_claimed_error_is_the_true_one(method, name):
    values, claims = runs(method, MATRICES[name], 20)
    errors = values - MATRICES[name].diagonal()
    scores = errors.mean(0) / (errors.std(0) / 150**0.5).clamp_min(1e-13)
    assert float(scores.square().mean().sqrt()) <= 1.5
    assert 0.6 <= float(claims.square().mean().sqrt() / errors.square().mean().sqrt()) <= 1.3


def test_each_has_its_case():
    def error(method, name):
        values, _ = runs(method, MATRICES[name], 20)
        return float((values - MATRICES[name].diagonal()).square().mean().sqrt())

    assert error(xdiag, "geometric") < 0.1 * error(hutchinson_diagonal, "geometric")
    assert error(hutchinson_diagonal, "dominant") < error(xdiag, "dominant")


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_xdiag_is_exact_for_low_rank(rank, dtype):
    matrix = (rand(n, rank, seed=1) @ rand(rank, n, seed=2)).to(dtype)  # not symmetric
    run = xdiag(Dense(matrix), 12)
    tolerance = 1e-11 if dtype == DOUBLE else 1e-3
    torch.testing.assert_close(run.value, matrix.diagonal(), rtol=0, atol=tolerance)
    assert float(run.standard_error.amax()) <= tolerance


def test_repeated_probes_leave_the_rest_right():
    """Of few signs in a small space some are equal: their images depend on each other while A has full rank."""
    matrix = symmetric(torch.linspace(1, 4, 5, dtype=DOUBLE))
    values, _ = runs(xdiag, matrix, 4, 20_000)
    bias = (values.mean(0) - matrix.diagonal()) / (values.std(0) / 20_000**0.5)
    assert float(bias.abs().amax()) <= 3.5


def test_hutchinson_is_exact_for_diagonal_matrices():
    d = rand(3, 70)
    run = hutchinson_diagonal(Diagonal(d), 2)
    torch.testing.assert_close(run.value, d, rtol=1e-14, atol=0)
    assert not run.standard_error.any()


@pytest.mark.parametrize("method", METHODS)
def test_batches_counts_and_as_many_products_as_columns(method):
    matrices = torch.stack([MATRICES[name] for name in MATRICES])
    calls = []

    def counted(M):
        def product(v):
            calls.append(v[..., 0].numel())
            return torch.einsum("...ij,...j->...i", M, v)

        return product

    A = FunctionOperator(counted(matrices), (3, n, n), DOUBLE, rmatvec=counted(matrices.mT))
    for products in (20, 21, n, 1000):
        calls.clear()
        run = method(A, products)
        assert run.value.shape == run.standard_error.shape == (3, n)
        assert run.products == sum(calls) <= 3 * min(products, n)
    torch.testing.assert_close(run.value, matrices.diagonal(dim1=-2, dim2=-1), rtol=1e-15, atol=0)
    assert not run.standard_error.any()


def test_pinned():
    A = Dense(MATRICES["geometric"])
    assert xdiag(A, 30).value[:3].tolist() == pytest.approx([0.0945199, 0.0833010, 0.0138282], abs=1e-6)
    assert hutchinson_diagonal(A, 30).value[:3].tolist() == pytest.approx([0.0585434, 0.0675349, -0.0061053], abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_nan_empty_and_refusals(method):
    poisoned = torch.eye(n, dtype=DOUBLE)
    poisoned[3, 3] = torch.nan
    assert bool(torch.isnan(method(Dense(poisoned), 10).value[3]))
    assert method(Diagonal(torch.zeros(2, 0))).value.shape == (2, 0)
    with pytest.raises(ValueError, match="products must be an integer"):
        method(Dense(poisoned), 1)
    with pytest.raises(TypeError, match="LinearOperator"):
        method(poisoned)
    with pytest.raises(ValueError, match="must be square"):
        method(Dense(torch.zeros(3, 4)))


def test_xdiag_needs_the_transpose():
    A = FunctionOperator(lambda v: v, (n, n), DOUBLE)
    with pytest.raises(TypeError, match="transpose"):
        xdiag(A, 10)


def test_what_a_vector_adds_alone_is_right_where_others_depend_on_each_other():
    matrix = symmetric(torch.linspace(1, 4, 12, dtype=DOUBLE))
    v = rand(3, 12)
    sketch = LeaveOneOut.of(Dense(matrix), torch.stack([v[0], v[1], v[0], v[2]]))
    images, alone = sketch.images, sketch.alone
    for i in (1, 3):  # nothing else spans these
        others = images[[j for j in range(4) if j != i]]
        assert float((others @ alone[i]).abs().amax()) <= 1e-6
        assert float(alone[i].norm()) == pytest.approx(1, abs=1e-12)
    assert float(alone[[0, 2]].norm()) <= 1e-6  # each is spanned by the other
    torch.testing.assert_close(sketch.heights[1] * alone[1] @ alone[1], alone[1] @ images[1], rtol=1e-8, atol=0)
