import math

import pytest
import torch
from laws import DOUBLE, Promises, check_linear_solver, members, rand, spd, symmetric, verify

from nestopt.linalg import CG, MINRES, Dense, Diagonal, FunctionOperator, Status

C, SING = Status.CONVERGED, Status.SINGULAR


class LooksSeldom(MINRES):
    """MINRES as on a GPU, where claims wait for every eighth step."""

    def _look(self, b):
        return 8


@pytest.mark.parametrize("solver", [MINRES, LooksSeldom])
def test_laws(solver, dtype):
    check_linear_solver(solver, Promises(condition=1e4), dtype)


def test_a_known_answer():
    A = Dense(torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=DOUBLE), symmetric=True)  # CG stops here at once: p'Ap = 0
    solution = MINRES()(A, torch.tensor([3.0, 0.0], dtype=DOUBLE))
    torch.testing.assert_close(solution.x, torch.tensor([0.0, 3.0], dtype=DOUBLE), rtol=1e-15, atol=1e-15)
    assert CG()(A, torch.tensor([3.0, 0.0], dtype=DOUBLE)).status == SING


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
def test_indefinite_systems(condition):
    values = torch.logspace(0, math.log10(condition), 40, dtype=DOUBLE) * torch.tensor([1.0, -1.0] * 20)
    matrix, b = symmetric(values), rand(3, 40)
    solution = MINRES(rtol=1e-9)(Dense(matrix, symmetric=True), b)
    verify(solution, matrix, b)
    assert bool(solution.converged.all())


def test_the_residual_never_rises_and_two_eigenvalues_take_two_steps():
    matrix = symmetric(torch.tensor([-1.0] * 9 + [5.0] * 11, dtype=DOUBLE))
    A, b = Dense(matrix, symmetric=True), rand(2, 20)
    assert MINRES()(A, b).iterations.tolist() == [2, 2]
    hard = Dense(symmetric(torch.linspace(-10, 30, 60, dtype=DOUBLE)), symmetric=True)
    errors = torch.stack([MINRES(max_iter=k)(hard, rand(60)).state.error for k in range(0, 60, 5)])
    assert bool((errors.diff() < 0).all())


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kernel", [1, 4])
def test_singular_systems(seed, kernel, dtype):
    n = 30
    values = torch.linspace(1, 20, n, dtype=DOUBLE) * torch.tensor([1.0, -1.0] * 15 if seed % 2 else [1.0] * n)
    values[:kernel] = 0
    matrix = symmetric(values, seed, dtype)
    A, b = Dense(matrix, symmetric=True), rand(n, seed=seed + 20, dtype=dtype)
    consistent = MINRES()(A, (matrix.double() @ b.double()).to(dtype))
    assert consistent.status == C
    solution = MINRES()(A, b)
    assert solution.status == SING
    verify(solution, matrix, b)
    U, *_ = torch.linalg.svd(matrix.double())
    least = float((U[:, -kernel:].T @ b.double()).norm())  # the part of b outside the range
    assert solution.residual_norm == pytest.approx(least, rel=1e-5 if dtype == DOUBLE else 1e-3)
    assert float(solution.x.norm()) <= 1e3 * float(b.norm())  # no blow-up along the kernel
    null = U[:, -kernel:].T @ solution.direction.double()
    assert float(null.norm()) == pytest.approx(1, abs=1e-3)


def test_ill_conditioned_is_not_singular():
    """A residual made of small eigenvectors looks like a null vector; its Rayleigh quotient tells that it is none."""
    for condition in (1e6, 1e9):
        matrix = spd(40, condition, seed=2)
        solution = MINRES(max_iter=1500)(Dense(matrix, symmetric=True), rand(40, seed=3))
        assert solution.status in (C, Status.STAGNATED, Status.MAX_ITER), (condition, solution.status)


def test_preconditioning():
    diagonal = torch.logspace(0, 5, 40, dtype=DOUBLE)
    signs = torch.tensor([1.0, -1.0] * 20, dtype=DOUBLE)
    matrix = torch.diag(diagonal * signs) + 0.1 * spd(40, 2.0)
    A, b = Dense(matrix, symmetric=True), torch.stack([rand(40), 0 * rand(40), rand(40, seed=1)])
    plain, better = (MINRES(preconditioner=M)(A, b) for M in (None, Diagonal(1 / diagonal)))
    verify(better, matrix, b)
    assert members(better) == [C, C, C]
    assert int(better.iterations.max()) < 0.3 * int(plain.iterations.max())
    scaled = MINRES(preconditioner=Diagonal(1e8 / diagonal))(A, b)
    assert torch.equal(scaled.iterations, better.iterations)
    # the recurrence follows the Euclidean norm although it minimises another one
    early = MINRES(preconditioner=Diagonal(1 / diagonal), max_iter=5)(A, b)
    torch.testing.assert_close(early.state.error, early.residual_norm, rtol=1e-8, atol=0)


def test_an_indefinite_preconditioner_breaks_down():
    matrix, b = spd(20, 10.0), rand(20)
    for M in (-Diagonal(torch.ones(20, dtype=DOUBLE)), Diagonal(torch.cat([torch.ones(19), -torch.ones(1)]).double())):
        solution = MINRES(preconditioner=M)(Dense(matrix, symmetric=True), b)
        assert solution.status == Status.BREAKDOWN


def test_float32_claims_are_true_of_a_product_that_rounds():
    n = 50
    matrix = spd(n, 1e4, seed=1, dtype=torch.float32)
    b = rand(4, n, seed=2, dtype=torch.float32)
    A = FunctionOperator(lambda v: v @ matrix, (n, n), torch.float32, symmetric=True)
    for rtol in (1e-5, 1e-4, 1e-3):
        solution = MINRES(rtol=rtol, max_iter=400)(A, b)
        truth = (b.double() - solution.x.double() @ matrix.double()).norm(dim=-1)
        assert bool((truth <= solution.tolerance.double())[solution.converged].all())


def test_the_count_of_products():
    calls = []
    values = torch.cat([torch.zeros(2), torch.linspace(1, 3, 18)]).double()
    matrix = symmetric(values)

    def product(v):
        calls.append(v[..., 0].numel())
        return v @ matrix

    A = FunctionOperator(product, (20, 20), DOUBLE, symmetric=True)
    b = torch.stack([rand(20), 0 * rand(20), matrix[3]])
    for x0 in (None, torch.ones_like(b)):
        for solver in (MINRES(), MINRES(max_iter=7), LooksSeldom()):
            calls.clear()
            assert solver(A, b, x0).products == sum(calls)


def test_a_limit_between_two_looks_is_a_limit():
    A = Dense(
        symmetric(torch.cat([torch.zeros(2, dtype=DOUBLE), torch.linspace(1, 4, 10, dtype=DOUBLE)])), symmetric=True
    )
    names = {LooksSeldom(rtol=1e-12, max_iter=k)(A, rand(12)).status for k in range(1, 25)}
    assert Status.MAX_ITER in names
    assert names <= {Status.MAX_ITER, SING, Status.STAGNATED}
