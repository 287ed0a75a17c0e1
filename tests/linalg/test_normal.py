import pytest
import torch
from laws import DOUBLE, Promises, check_linear_solver, members, rand, spd, symmetric, true_residual, verify

from nestopt.linalg import CG, LU, MINRES, Dense, FunctionOperator, Normal, Status

C, SING = Status.CONVERGED, Status.SINGULAR


@pytest.mark.parametrize("inner", [CG(), MINRES()])
def test_laws(inner, dtype):
    check_linear_solver(lambda: Normal(inner), Promises(condition=1e2, needs_symmetric=False, steady=False), dtype)


def test_a_known_answer():
    A = Dense(
        torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]], dtype=DOUBLE)
    )  # the line through (0, 6), (1, 0), (2, 0)
    solution = Normal()(A, torch.tensor([6.0, 0.0, 0.0], dtype=DOUBLE))
    torch.testing.assert_close(solution.x, torch.tensor([5.0, -3.0], dtype=DOUBLE), rtol=1e-12, atol=0)
    assert solution.residual_norm == pytest.approx(6**0.5)
    assert solution.status == C


@pytest.mark.parametrize("shape", [(30, 10), (10, 30), (20, 20), (5, 1), (1, 5)])
@pytest.mark.parametrize("sides", [(), (3,), (2, 1, 2)])
def test_least_squares_of_any_shape(shape, sides, dtype):
    m, n = shape
    matrix, b = rand(m, n, seed=4, dtype=dtype), rand(*sides, m, seed=5, dtype=dtype)
    if m == n:
        matrix = matrix + 8 * torch.eye(n, dtype=dtype)
    solution = Normal()(Dense(matrix), b)
    assert all(member == C for member in members(solution))
    best = b.double() @ torch.linalg.pinv(matrix.double()).T  # the solution of minimum norm
    torch.testing.assert_close(solution.x.double(), best, rtol=0, atol=1e-8 if dtype == DOUBLE else 1e-3)
    truth = true_residual(matrix, solution.x, b)
    torch.testing.assert_close(
        torch.as_tensor(solution.residual_norm, dtype=DOUBLE), truth, rtol=1e-4, atol=1e-4 * float(b.norm())
    )
    gradient = (b.double() - solution.x.double() @ matrix.double().T) @ matrix.double()
    held = truth if m == n else gradient.norm(dim=-1)
    assert bool((held <= torch.as_tensor(solution.tolerance, dtype=DOUBLE) * (1 + 1e-6)).all())


def test_a_square_system_without_solution_is_singular_with_its_least_squares_solution(dtype):
    values = torch.linspace(1, 5, 20, dtype=DOUBLE)
    values[:2] = 0
    matrix = (torch.linalg.qr(rand(20, 20))[0] @ symmetric(values)).to(dtype)
    b = rand(20, seed=1, dtype=dtype)
    solution = Normal()(Dense(matrix), b)
    assert solution.status == SING
    verify(solution, matrix, b)
    best = torch.linalg.pinv(matrix.double(), rtol=1e-5) @ b.double()
    assert float((solution.x.double() - best).norm()) <= (1e-7 if dtype == DOUBLE else 1e-2) * float(best.norm())
    p = solution.direction.double()
    assert abs(float(p @ matrix.double() @ p)) <= 1e-3 if dtype == torch.float32 else 1e-7


def test_a_loose_inner_solver_is_called_again():
    matrix, b = rand(20, 20) + 6 * torch.eye(20, dtype=DOUBLE), rand(3, 20, seed=1)
    solution = Normal(CG(rtol=1e-3))(Dense(matrix), b)
    verify(solution, matrix, b)
    assert bool(solution.converged.all())


def test_the_inner_limit_is_a_limit():
    matrix, b = spd(40, 1e4), rand(40)
    solution = Normal(CG(max_iter=20))(Dense(matrix, symmetric=True), b)
    assert solution.status == Status.MAX_ITER
    assert solution.iterations == 20
    verify(solution, matrix, b)


def test_the_condition_is_squared_and_said_so():
    matrix, b = spd(30, 1e9, seed=1), rand(30)
    solution = Normal(LU())(Dense(matrix, symmetric=True), b)
    assert solution.status not in (C, Status.MAX_ITER)
    assert LU(rtol=1e-7)(Dense(matrix, symmetric=True), b).status == C


def test_products_are_counted():
    calls = []
    matrix = rand(12, 8)

    def count(right):
        def product(v):
            calls.append(v[..., 0].numel())
            return v @ right

        return product

    A = FunctionOperator(count(matrix.T), (12, 8), DOUBLE, rmatvec=count(matrix))
    for b in (rand(12), rand(3, 12)):
        calls.clear()
        assert Normal(CG(rtol=1e-4))(A, b).products == sum(calls)


def test_what_is_missing_is_said():
    A = FunctionOperator(lambda v: v, (3, 3), DOUBLE)
    with pytest.raises(TypeError, match="no product with its transpose"):
        Normal()(A, rand(3))
    with pytest.raises(TypeError, match="solver must be a LinearSolver"):
        Normal("CG")
