import pytest
import torch
from laws import rand, symmetric

from nestopt.linalg import CG, Dense, Diagonal, extreme_eigenvalues, operator_norm

DOUBLE = torch.float64
SPECTRA = {
    "even": torch.linspace(1, 50, 120, dtype=DOUBLE),
    "logarithmic": torch.logspace(0, 6, 150, dtype=DOUBLE),
    "outliers": torch.cat([torch.linspace(1, 2, 100, dtype=DOUBLE), torch.tensor([50.0, 900.0], dtype=DOUBLE)]),
    "indefinite": torch.linspace(-30, 70, 101, dtype=DOUBLE),
    "repeated": torch.tensor([2.0] * 40 + [7.0] * 40, dtype=DOUBLE),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("steps", [1, 3, 10, 40, 200])
def test_ritz_values_are_inside_and_bounds_outside(name, steps):
    values = SPECTRA[name]
    A = Dense(symmetric(values), symmetric=True)
    rounding = 1e-12 * float(values.abs().max())
    for seed in range(4):
        s = extreme_eigenvalues(A, steps=steps, generator=torch.Generator().manual_seed(seed))
        low, high = float(values.min()), float(values.max())
        assert s.lowest_bound - rounding <= low <= s.lowest + rounding
        assert s.highest - rounding <= high <= s.highest_bound + rounding
        assert s.products <= steps
        if s.highest_converged:
            assert s.highest_bound - s.highest <= 0.0101 * abs(s.highest) + rounding
        u = s.highest_vector
        assert float((A @ u - s.highest * u).norm()) == pytest.approx(s.highest_residual, abs=1e-9 * high)


@pytest.mark.parametrize("name", SPECTRA)
def test_an_exhausted_space_is_exact(name):
    values = SPECTRA[name]
    s = extreme_eigenvalues(Dense(symmetric(values), symmetric=True), steps=200, rtol=1e-10)
    assert s.lowest_converged
    assert s.highest_converged
    assert s.lowest == pytest.approx(float(values.min()), rel=1e-9)
    assert s.highest == pytest.approx(float(values.max()), rel=1e-9)
    if name == "repeated":
        assert s.products <= 3


@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (50, 3), (40, 40)])
def test_operator_norm_is_bracketed(shape):
    matrix = rand(*shape)
    truth = float(torch.linalg.matrix_norm(matrix, 2))
    for rtol in (0.2, 1e-2, 1e-6):
        norm = operator_norm(Dense(matrix), rtol=rtol)
        assert norm.converged
        assert norm.value <= truth * (1 + 1e-12)
        assert truth <= norm.bound * (1 + 1e-12)
        assert norm.bound - norm.value <= 1.01 * rtol * norm.value + 1e-12 * truth


def test_batch_equals_loop_and_scale_changes_nothing():
    matrices = torch.stack([symmetric(SPECTRA["even"]), 1e-9 * symmetric(SPECTRA["even"].flip(0), seed=3)])
    both = extreme_eigenvalues(Dense(matrices, symmetric=True), steps=200, rtol=1e-8)
    assert both.highest.tolist() == pytest.approx([50.0, 50e-9], rel=1e-8)
    assert both.lowest.tolist() == pytest.approx([1.0, 1e-9], rel=1e-7)
    for factor in (1e-12, 1e12):
        norm = operator_norm(Dense(factor * rand(20, 30)))
        assert norm.value == pytest.approx(factor * operator_norm(Dense(rand(20, 30))).value, rel=1e-10)


def test_zero_nan_and_bad_input():
    assert operator_norm(Dense(torch.zeros(4, 3, dtype=DOUBLE))).value == 0
    poisoned = torch.eye(4, dtype=DOUBLE)
    poisoned[1, 1] = float("nan")
    s = extreme_eigenvalues(Dense(poisoned, symmetric=True))
    assert s.highest != s.highest
    assert not s.highest_converged
    with pytest.raises(TypeError, match="symmetric"):
        extreme_eigenvalues(Dense(rand(3, 3)))
    with pytest.raises(ValueError, match="steps"):
        extreme_eigenvalues(Diagonal(torch.ones(3)), steps=0)
    with pytest.raises(TypeError, match="LinearOperator"):
        operator_norm(torch.ones(3, 3))


def test_float32_keeps_its_dtype_and_its_promise():
    values = SPECTRA["outliers"].float()
    s = extreme_eigenvalues(Dense(symmetric(values.double()).float(), symmetric=True))
    assert s.highest_vector.dtype == torch.float32
    assert s.highest == pytest.approx(900.0, rel=1e-4)


def test_agrees_with_the_ritz_values_of_cg():
    A = Dense(symmetric(SPECTRA["outliers"]), symmetric=True)
    low, high = CG(rtol=1e-12)(A, rand(102)).curvature
    s = extreme_eigenvalues(A, rtol=1e-6)
    assert high == pytest.approx(s.highest, rel=1e-6)
    assert low == pytest.approx(s.lowest, rel=1e-2)


def test_a_system_that_is_exhausted_waits_without_inventing_eigenvalues():
    matrices = torch.stack([3 * torch.eye(120, dtype=DOUBLE), symmetric(SPECTRA["even"])])
    s = extreme_eigenvalues(Dense(matrices, symmetric=True), steps=60)
    assert s.products > 2 * 10
    assert [float(s.lowest[0]), float(s.highest[0])] == pytest.approx([3, 3], rel=1e-12)
