import math

import pytest
import torch
from laws import DOUBLE, Promises, check_linear_solver, members, rand, spd, symmetric, verify

from nestopt.linalg import MINRES, MINRESQLP, Dense, FunctionOperator, Hessian, Status

C, SING, STAG = Status.CONVERGED, Status.SINGULAR, Status.STAGNATED


class LooksSeldom(MINRESQLP):
    """MINRESQLP as on a GPU, where claims wait for every eighth step."""

    def _look(self, b):
        return 8


@pytest.mark.parametrize(("solver", "dtype"), [(MINRESQLP, DOUBLE), (MINRESQLP, torch.float32), (LooksSeldom, DOUBLE)])
def test_laws(solver, dtype):
    check_linear_solver(solver, Promises(condition=1e4), dtype)


def test_a_known_answer():
    A = Dense(torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=DOUBLE), symmetric=True)
    solution = MINRESQLP()(A, torch.tensor([3.0, 0.0], dtype=DOUBLE))
    torch.testing.assert_close(solution.x, torch.tensor([0.0, 3.0], dtype=DOUBLE), rtol=1e-15, atol=1e-15)
    one = Dense(torch.ones(2, 2, dtype=DOUBLE), symmetric=True)
    solution = MINRESQLP()(one, torch.tensor([3.0, 1.0], dtype=DOUBLE))
    torch.testing.assert_close(solution.x, torch.ones(2, dtype=DOUBLE), rtol=1e-14, atol=0)
    assert solution.status == SING
    assert solution.residual_norm == pytest.approx(2**0.5)


def kernel_system(seed, kernel, dtype=DOUBLE, n=30):
    values = torch.linspace(1, 20, n, dtype=DOUBLE) * torch.tensor([1.0, -1.0] * (n // 2) if seed % 2 else [1.0] * n)
    values[:kernel] = 0
    matrix = symmetric(values, seed, dtype)
    return matrix, rand(n, seed=seed + 20, dtype=dtype), torch.linalg.pinv(matrix.double(), rtol=1e-5)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kernel", [1, 4])
def test_singular_systems_give_the_solution_of_minimum_length(seed, kernel, dtype):
    matrix, b, inverse = kernel_system(seed, kernel, dtype)
    A, limit = Dense(matrix, symmetric=True), 1e-9 if dtype == DOUBLE else 2e-3
    image = (matrix.double() @ b.double()).to(dtype)
    for right, status in ((b, SING), (image, C)):
        solution, best = MINRESQLP()(A, right), inverse @ right.double()
        assert solution.status == status
        verify(solution, matrix, right)
        assert float((solution.x.double() - best).norm()) <= limit * float(best.norm())
    r = b.double() - matrix.double() @ MINRESQLP()(A, b).x.double()
    assert float((matrix.double() @ r).norm()) <= (1e-9 if dtype == DOUBLE else 1e-3) * 20 * float(r.norm())


def test_minres_alone_is_not_of_minimum_length():
    matrix, b, inverse = kernel_system(0, 1)
    A, best = Dense(matrix, symmetric=True), inverse @ b
    assert float((MINRES()(A, b).x - best).norm()) > 0.1 * float(best.norm())


def test_of_many_solutions_the_one_closest_to_x0():
    matrix, b, inverse = kernel_system(1, 3)
    A, x0 = Dense(matrix, symmetric=True), rand(30, seed=9)
    for right in (b, matrix @ b):
        best = x0 + inverse @ (right - matrix @ x0)
        torch.testing.assert_close(MINRESQLP()(A, right, x0).x, best, rtol=0, atol=1e-8)


def test_direction_and_residual_of_an_inconsistent_block():
    matrix, b, inverse = kernel_system(2, 2)
    block = torch.stack([b, matrix @ b, 0 * b, rand(30, seed=50)])
    solution = MINRESQLP()(Dense(matrix, symmetric=True), block)
    assert members(solution) == [SING, C, C, SING]
    verify(solution, matrix, block)
    least = (block - block @ inverse @ matrix).norm(dim=-1)
    torch.testing.assert_close(solution.residual_norm[[0, 3]], least[[0, 3]], rtol=1e-10, atol=0)
    p = solution.direction
    torch.testing.assert_close(p.norm(dim=-1), torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=DOUBLE))
    assert float((p @ matrix).norm(dim=-1).max()) <= 1e-6


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
def test_indefinite_systems(condition):
    values = torch.logspace(0, math.log10(condition), 40, dtype=DOUBLE) * torch.tensor([1.0, -1.0] * 20)
    matrix, b = symmetric(values), rand(3, 40)
    solution = MINRESQLP(rtol=1e-9)(Dense(matrix, symmetric=True), b)
    verify(solution, matrix, b)
    assert bool(solution.converged.all())


def test_iterates_are_those_of_minres():
    matrix, b = symmetric(torch.linspace(-10, 30, 60, dtype=DOUBLE)), rand(2, 60)
    A = Dense(matrix, symmetric=True)
    for k in (1, 2, 3, 10, 30):
        one, other = MINRESQLP(max_iter=k)(A, b), MINRES(max_iter=k)(A, b)
        torch.testing.assert_close(one.x, other.x, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(one.state.error, one.residual_norm, rtol=1e-9, atol=0)


def test_ill_conditioned_is_not_singular():
    for condition in (1e6, 1e9):
        matrix = spd(40, condition, seed=2)
        solution = MINRESQLP(max_iter=1500)(Dense(matrix, symmetric=True), rand(40, seed=3))
        assert solution.status in (C, STAG, Status.MAX_ITER), (condition, solution.status)


def test_a_hessian_and_an_operator_made_of_others(dtype):
    data = rand(8, 6)  # the loss does not see the direction (1, ..., 1)
    data = data - data.mean(dim=1, keepdim=True)
    H = Hessian(lambda w: (data @ w).cosh().log().sum(), 0.1 * rand(6, seed=1))
    b = rand(2, 6, seed=2)
    solution = MINRESQLP()(H, b)
    torch.testing.assert_close(solution.x, b @ torch.linalg.pinv(H.to_dense(), rtol=1e-8), rtol=0, atol=1e-8)
    assert members(solution) == [SING, SING]
    left = Dense(rand(5, 12, dtype=dtype))
    A = left.T @ left + 0.5 * Dense(symmetric(torch.linspace(-3, 3, 12), dtype=dtype), symmetric=True)
    b = rand(2, 12, seed=3, dtype=dtype)
    solution = MINRESQLP()(A.shift(-0.25), b)
    verify(solution, A.shift(-0.25).to_dense(), b)
    assert members(solution) == [C, C]


def test_a_batch_of_systems_is_its_loop():
    parts = [kernel_system(seed, kernel) for seed, kernel in ((0, 0), (1, 2), (2, 1))]
    matrices, b = torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])
    solution = MINRESQLP()(Dense(matrices, symmetric=True), b)
    assert members(solution) == [C, SING, SING]
    for i, (matrix, right, _) in enumerate(parts):
        alone = MINRESQLP()(Dense(matrix, symmetric=True), right)
        torch.testing.assert_close(solution.x[i], alone.x, rtol=0, atol=1e-8)


def test_the_count_of_products():
    calls = []
    matrix, b, _ = kernel_system(0, 2)

    def product(v):
        calls.append(v[..., 0].numel())
        return v @ matrix

    A = FunctionOperator(product, (30, 30), DOUBLE, symmetric=True)
    b = torch.stack([b, 0 * b, matrix[3]])
    for x0 in (None, torch.ones_like(b)):
        for solver in (MINRESQLP(), MINRESQLP(max_iter=7), LooksSeldom()):
            calls.clear()
            assert solver(A, b, x0).products == sum(calls)


def test_a_preconditioner_is_refused():
    with pytest.raises(ValueError, match="preconditioner must be None"):
        MINRESQLP(preconditioner=Dense(torch.eye(2), symmetric=True))
