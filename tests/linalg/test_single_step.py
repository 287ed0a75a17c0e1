import pytest
import torch
from laws import DOUBLE, Promises, check_batches, rand, spd, verify

from nestopt.linalg import Dense, Diagonal, Neumann, SingleStep, Status

MAX = Status.MAX_ITER


def test_it_is_the_best_multiple_and_says_how_good():
    matrix, b = spd(8, 30.0), rand(8)
    A = Dense(matrix, symmetric=True)
    sol = SingleStep()(A, b)
    verify(sol, matrix, b)
    assert sol.status == MAX
    assert sol.products == 2
    a = float(sol.x[0] / b[0])
    for other in (0.9 * a, 1.1 * a, 0.0):
        assert sol.residual_norm < float((b - other * matrix @ b).norm())
    fixed = SingleStep(0.01)(A, b)
    torch.testing.assert_close(fixed.x, Neumann(1, step_size=0.01)(A, b).x)


def test_a_sequence_of_steps_converges(dtype):
    matrix, b = spd(6, 5.0).to(dtype), rand(6).to(dtype)
    A, x = Dense(matrix, symmetric=True), None
    for _ in range(200):
        sol = SingleStep()(A, b, x)
        verify(sol, matrix, b)
        x = sol.x
    assert sol.converged
    assert sol.iterations == 0


def test_endings():
    b = torch.ones(2, dtype=DOUBLE)
    saddle = SingleStep()(Dense(torch.diag(torch.tensor([1.0, -2.0], dtype=DOUBLE)), symmetric=True), b)
    assert saddle.status == Status.NEGATIVE_CURVATURE
    assert float(saddle.direction @ (torch.tensor([1.0, -2.0], dtype=DOUBLE) * saddle.direction)) < 0
    assert SingleStep()(Dense(torch.zeros(2, 2, dtype=DOUBLE), symmetric=True), b).status == Status.SINGULAR
    A = Dense(torch.eye(2, dtype=DOUBLE), symmetric=True)
    assert SingleStep()(A, b).converged
    assert SingleStep()(A, 0 * b).converged
    assert SingleStep()(A, torch.nan * b).status == Status.NON_FINITE
    far = SingleStep(3.0)(A, b, 0.5 * b)
    assert far.status == Status.DIVERGED
    assert torch.equal(far.x, 0.5 * b)
    for bad in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="step_size"):
            SingleStep(bad)


def test_a_preconditioner_that_is_the_inverse_is_exact():
    scales = torch.tensor([1.0, 4.0, 9.0], dtype=DOUBLE)
    sol = SingleStep(preconditioner=Diagonal(1 / scales))(Diagonal(scales), torch.ones(2, 3, dtype=DOUBLE))
    assert bool(sol.converged.all())


def test_batch_is_loop(dtype):
    check_batches(SingleStep(), Promises(condition=1.0, indefinite=Status.NEGATIVE_CURVATURE), dtype)
