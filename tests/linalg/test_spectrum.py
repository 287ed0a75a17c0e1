import math

import pytest
import torch
from laws import rand, symmetric

from nestopt.linalg import (
    Dense,
    Diagonal,
    FunctionOperator,
    Hessian,
    Identity,
    Status,
    extreme_pairs,
    log_determinant,
    spectral_density,
    trace_function,
)

DOUBLE = torch.float64
SPECTRA = {
    "even": torch.linspace(1, 50, 120, dtype=DOUBLE),
    "logarithmic": torch.logspace(0, 2, 120, dtype=DOUBLE),
    "outliers": torch.cat([torch.linspace(1, 2, 115, dtype=DOUBLE), torch.linspace(20, 60, 5, dtype=DOUBLE)]),
    "indefinite": torch.linspace(-30, 70, 120, dtype=DOUBLE),
}
POSITIVE = [name for name, values in SPECTRA.items() if bool((values > 0).all())]


def operator(values, dtype=DOUBLE):
    return Dense(symmetric(values, dtype=dtype), symmetric=True, definite=bool((values > 0).all()))


# --- stochastic Lanczos quadrature -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECTRA)
def test_the_quadrature_is_gauss(name):
    """Each probe's rule is exact for polynomials of degree 2 steps - 1, and its weights are a distribution."""
    A = operator(SPECTRA[name])
    s = spectral_density(A, probes=3, steps=6, generator=torch.Generator().manual_seed(5))
    v = torch.randn(3, 120, dtype=DOUBLE, generator=torch.Generator().manual_seed(5))
    v = v / v.norm(dim=-1, keepdim=True)
    assert s.nodes.shape == s.weights.shape == (3, 6)
    assert bool((s.weights >= 0).all())
    torch.testing.assert_close(s.weights.sum(-1), torch.ones(3, dtype=DOUBLE))
    power = v
    for degree in range(12):
        truth = (v * power).sum(-1)
        ours = (s.weights * s.nodes**degree).sum(-1)
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10 * float(SPECTRA[name].abs().max()) ** degree)
        power = A @ power
    assert float((((s.weights * s.nodes**12).sum(-1) - (v * power).sum(-1)) / truth).abs().amax()) > 1e-8


@pytest.mark.parametrize("name", POSITIVE)
def test_log_determinants_are_unbiased_with_true_errors(name):
    values = SPECTRA[name]
    A = Dense(symmetric(values).expand(100, 120, 120), symmetric=True, definite=True)
    run = log_determinant(A, probes=5, steps=50)
    errors = run.value - values.log().sum()
    assert abs(errors.mean()) <= 3.5 * errors.std() / 10
    assert 0.7 <= float(run.standard_error.square().mean().sqrt() / errors.square().mean().sqrt()) <= 1.3
    assert float(run.quadrature_error.amax()) <= 1e-2 * float(run.standard_error.mean())
    assert run.products == 100 * 5 * 50


def test_the_quadrature_error_is_measured():
    A = operator(torch.logspace(0, 4, 300, dtype=DOUBLE))
    exact = log_determinant(A, probes=4, steps=300)
    assert exact.quadrature_error <= 1e-9
    for steps in (8, 16, 32, 64):
        run = log_determinant(A, probes=4, steps=steps)  # the same probes: what differs is the quadrature
        truth = abs(run.value - exact.value)
        assert truth <= 3 * run.quadrature_error
        assert run.quadrature_error <= 30 * truth


def test_trace_functions_against_closed_forms():
    values = SPECTRA["indefinite"]
    A = operator(values)
    run = trace_function(A, lambda x: x**2, probes=60)
    assert run.value == pytest.approx(float((values**2).sum()), rel=0.1)
    assert abs(run.value - float((values**2).sum())) <= 4 * run.standard_error
    assert trace_function(Identity(9, DOUBLE), torch.exp).value == pytest.approx(9 * math.e, rel=1e-13)
    assert trace_function(A, torch.ones_like).value == pytest.approx(120, rel=1e-13)


def test_the_density_integrates_to_one_and_finds_the_bulk():
    values = torch.cat([torch.zeros(300), torch.full((100,), 2.0), torch.full((4,), 9.0)]).double()
    s = spectral_density(Diagonal(values), probes=40)
    assert s.products == 40 * 3  # three distinct eigenvalues exhaust the space
    grid = torch.linspace(-5, 15, 4001, dtype=DOUBLE)
    density = s.density(grid, 0.1)
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=1e-6)
    for value, number in ((0.0, 300), (2.0, 100), (9.0, 4)):
        count = s.count(value - 0.5, value + 0.5)
        assert abs(count.value - number) <= 4 * count.standard_error
        peak = density[(grid - value).abs().argmin()]
        assert float(peak) == pytest.approx(count.value / 404 / (0.1 * math.sqrt(2 * math.pi)), rel=1e-3)
    assert s.count().value == pytest.approx(404, rel=1e-12)
    with pytest.raises(ValueError, match="width must be positive"):
        s.density(grid, 0.0)


def test_blocks_and_batches_change_nothing():
    matrices = torch.stack([symmetric(SPECTRA["even"]), torch.eye(120, dtype=DOUBLE)])
    A = Dense(matrices, symmetric=True, definite=True)
    whole = log_determinant(A, probes=5, steps=30)
    for block in (1, 2, 7):
        parts = log_determinant(A, probes=5, steps=30, block=block)
        torch.testing.assert_close(parts.value, whole.value, rtol=1e-10, atol=1e-10)
        assert parts.products == whole.products
    assert abs(float(whole.value[1])) <= 1e-12  # the identity's, exhausted after one step
    assert float(whole.quadrature_error[1]) == 0
    s = spectral_density(A, probes=3, steps=10)
    assert s.nodes.shape == (3, 2, 10)
    assert s.density(torch.linspace(0, 1, 7), 1.0).shape == (2, 7)
    assert s.count(0.5, 2.0).value.shape == (2,)


def test_products_are_counted():
    calls = []

    def product(v):
        calls.append(v[..., 0].numel())
        return v * torch.arange(1.0, 41.0, dtype=DOUBLE)

    A = FunctionOperator(product, (40, 40), DOUBLE, symmetric=True, definite=True)
    for block in (None, 2):
        calls.clear()
        assert spectral_density(A, probes=5, steps=12, block=block).products == sum(calls) == 60
    for k, which in ((1, "highest"), (3, "lowest")):
        calls.clear()
        assert extreme_pairs(A, k, which).products == sum(calls)


def test_bad_input_to_quadrature():
    A = operator(SPECTRA["even"])
    with pytest.raises(TypeError, match="promised definite"):
        log_determinant(Dense(A.matrix, symmetric=True))
    with pytest.raises(ValueError, match="Ritz value"):
        log_determinant(Dense(symmetric(SPECTRA["indefinite"]), symmetric=True, definite=True))
    with pytest.raises(TypeError, match="promised symmetric"):
        spectral_density(Dense(rand(4, 4)))
    with pytest.raises(TypeError, match="LinearOperator"):
        trace_function(rand(4, 4), torch.exp)
    for options in ({"probes": 1}, {"steps": 3}, {"block": 0}):
        with pytest.raises(ValueError, match="but got"):
            spectral_density(A, **options)
    with pytest.raises(ValueError, match="keep the shape"):
        trace_function(A, lambda x: x.sum())
    with pytest.raises(ValueError, match="rows and columns"):
        spectral_density(Dense(torch.zeros(0, 0), symmetric=True))
    poisoned = torch.eye(6, dtype=DOUBLE)
    poisoned[2, 2] = torch.nan
    assert math.isnan(log_determinant(Dense(poisoned, symmetric=True, definite=True)).value)


def test_pinned():
    A = operator(SPECTRA["logarithmic"])
    assert log_determinant(A).value == pytest.approx(274.0919258, abs=1e-6)
    assert extreme_pairs(A, 2).products == 38


# --- extreme eigenpairs ----------------------------------------------------------------------------------------------


def wanted(values, k, which):
    key = {"highest": values, "lowest": -values, "magnitude": values.abs()}[which]
    return values[key.argsort(descending=True)][:k]


@pytest.mark.parametrize("which", ["highest", "lowest", "magnitude"])
@pytest.mark.parametrize("name", SPECTRA)
def test_pairs_are_eigenpairs(name, which):
    A = operator(SPECTRA[name])
    for k in (1, 4):
        r = extreme_pairs(A, k, which)
        assert r.status == Status.CONVERGED
        torch.testing.assert_close(r.values, wanted(SPECTRA[name], k, which), rtol=0, atol=1e-9)
        truth = (torch.einsum("ij,kj->ki", A.matrix, r.vectors) - r.values[:, None] * r.vectors).norm(dim=-1)
        torch.testing.assert_close(r.residuals, truth, rtol=1e-3, atol=1e-12)
        assert float(truth.amax()) == pytest.approx(r.error, rel=1e-3, abs=1e-12)
        assert r.error <= r.tolerance
        torch.testing.assert_close(r.vectors @ r.vectors.T, torch.eye(k, dtype=DOUBLE), rtol=0, atol=1e-12)


def test_restarts_reach_what_a_long_run_reaches():
    A = operator(SPECTRA["even"])
    long, short = extreme_pairs(A, 3, "lowest", basis=120), extreme_pairs(A, 3, "lowest", basis=12)
    assert short.status == long.status == Status.CONVERGED
    assert short.iterations > 2 * 12  # it did restart
    torch.testing.assert_close(short.values, long.values, rtol=1e-12, atol=1e-12)
    early = extreme_pairs(A, 3, "lowest", basis=12, max_iter=30)
    assert early.status == Status.MAX_ITER
    assert early.error > early.tolerance


def test_a_small_or_degenerate_space_is_found_whole():
    for values in ([2.0, 2.0, 2.0], [0.0, 0.0], [5.0], [1.0, 1.0, 3.0, 3.0, 3.0]):
        values = torch.tensor(values, dtype=DOUBLE)
        r = extreme_pairs(operator(values), len(values))
        assert r.status == Status.CONVERGED
        torch.testing.assert_close(r.values, values.sort(descending=True).values, rtol=0, atol=1e-12)
        torch.testing.assert_close(r.vectors @ r.vectors.T, torch.eye(len(values), dtype=DOUBLE), rtol=0, atol=1e-12)


@pytest.mark.parametrize("which", ["highest", "lowest", "magnitude"])
def test_all_copies_of_few_distinct_eigenvalues_are_found(which):
    values = torch.tensor([-9.0] * 2 + [2.0] * 40 + [7.0] * 40 + [8.0], dtype=DOUBLE)
    for k in (1, 4, 50):
        r = extreme_pairs(operator(values), k, which)
        assert r.status == Status.CONVERGED
        torch.testing.assert_close(r.values, wanted(values, k, which), rtol=0, atol=1e-10)
    both = Dense(torch.stack([symmetric(values), symmetric(torch.linspace(1, 9, 83).double())]), symmetric=True)
    r = extreme_pairs(both, 4, which)
    torch.testing.assert_close(r.values[0], wanted(values, 4, which), rtol=0, atol=1e-10)
    assert bool((r.status == Status.CONVERGED).all())


def test_a_batch_of_pairs_equals_its_loop_and_scale_changes_nothing():
    matrices = torch.stack([symmetric(SPECTRA["even"]), 1e-9 * symmetric(SPECTRA["outliers"], seed=3)])
    both = extreme_pairs(Dense(matrices, symmetric=True), 3)
    assert both.vectors.shape == (2, 3, 120)
    assert bool((both.status == Status.CONVERGED).all())
    for i in range(2):
        alone = extreme_pairs(Dense(matrices[i], symmetric=True), 3)
        torch.testing.assert_close(both.values[i], alone.values, rtol=1e-9, atol=0)
    poisoned = matrices.clone()
    poisoned[1, 0, 0] = torch.nan
    half = extreme_pairs(Dense(poisoned, symmetric=True), 3)
    assert list(half.status) == [Status.CONVERGED, Status.NON_FINITE]
    torch.testing.assert_close(half.values[0], both.values[0], rtol=1e-9, atol=0)
    lost = extreme_pairs(Dense(poisoned[1], symmetric=True), 3)
    assert lost.status == Status.NON_FINITE
    assert lost.values.isnan().all()


def test_float32_claims_what_is_true():
    values = SPECTRA["outliers"]
    matrix = symmetric(values, dtype=torch.float32)
    r = extreme_pairs(Dense(matrix, symmetric=True), 5)
    assert r.status == Status.CONVERGED
    assert r.vectors.dtype == r.values.dtype == torch.float32
    vectors = r.vectors.double()
    truth = (vectors @ matrix.double() - r.values.double()[:, None] * vectors).norm(dim=-1)
    assert bool((truth <= r.residuals).all())
    assert extreme_pairs(Dense(matrix, symmetric=True), 5, rtol=1e-9).status == Status.STAGNATED


def test_pairs_of_a_hessian():
    scales = torch.tensor([1.0, 4.0, 9.0, 16.0], dtype=DOUBLE)
    H = Hessian(lambda p: (scales * torch.cosh(p["w"])).sum(), {"w": torch.zeros(4, dtype=DOUBLE)})
    r = extreme_pairs(H, 2)
    torch.testing.assert_close(r.values, torch.tensor([16.0, 9.0], dtype=DOUBLE))
    assert float(H.into.unflatten(r.vectors[0])["w"][3].abs()) == pytest.approx(1, abs=1e-8)


def test_bad_input_to_pairs():
    A = operator(SPECTRA["even"])
    for options in ({"k": 0}, {"k": 121}, {"which": "top"}, {"rtol": 0.0}, {"k": 3, "max_iter": 2}, {"basis": 2}):
        with pytest.raises(ValueError, match=f"extreme_pairs: {list(options)[-1]} must"):
            extreme_pairs(A, **options)
    with pytest.raises(TypeError, match="promised symmetric"):
        extreme_pairs(Dense(rand(4, 4)))
    with pytest.raises(TypeError, match="LinearOperator"):
        extreme_pairs(rand(4, 4))
