import math

import pytest
import torch
from laws import DOUBLE, Promises, check_linear_solver, members, rand, spd, symmetric, verify

from nestopt.linalg import CG, LSMR, Dense, FunctionOperator, Hessian, Jacobian, Normal, Status

C, SING, STAG = Status.CONVERGED, Status.SINGULAR, Status.STAGNATED


class LooksSeldom(LSMR):
    """LSMR as on a GPU, where claims wait for every eighth step."""

    def _look(self, b):
        return 8


@pytest.mark.parametrize(("solver", "dtype"), [(LSMR, DOUBLE), (LSMR, torch.float32), (LooksSeldom, DOUBLE)])
def test_laws(solver, dtype):
    check_linear_solver(solver, Promises(condition=1e3, needs_symmetric=False, steady=False), dtype)


def solve_least_squares(matrix, b, damping=0.0, rtol=None):
    """The closed form in float64, of minimum length."""
    matrix, b = matrix.double(), b.double()
    if damping:
        eye = torch.eye(matrix.shape[-1], dtype=DOUBLE)
        matrix = torch.cat([matrix, damping * eye])
        b = torch.cat([b, b.new_zeros(*b.shape[:-1], eye.shape[0])], dim=-1)
    return b @ torch.linalg.pinv(matrix, **({} if rtol is None else {"rtol": rtol})).T


def check_least_squares(solution, matrix, b, damping=0.0, truth=None, limit=1e-8):
    """CONVERGED by a gradient that is small in float64, both residuals those of x, and x the closed form."""
    assert all(member == C for member in members(solution)), solution.status
    matrix, b, x = matrix.double(), b.double(), solution.x.double()
    r = b - x @ matrix.T
    gradient = (r @ matrix - damping**2 * x).norm(dim=-1)
    tolerance, error, length, slope = (
        torch.as_tensor(value, dtype=DOUBLE)
        for value in (solution.tolerance, solution.error, solution.residual_norm, solution.normal_residual_norm)
    )
    fitted = error == length
    assert bool((torch.where(fitted, r.norm(dim=-1), gradient) <= tolerance * (1 + 1e-6)).all())
    assert bool((fitted | (error == slope)).all())
    assert bool((error <= tolerance).all())
    scale = torch.linalg.matrix_norm(matrix, 2) * x.norm(dim=-1) + b.norm(dim=-1)
    eps = torch.finfo(solution.x.dtype).eps
    assert bool(((length - r.norm(dim=-1)).abs() <= 10 * eps * scale).all())
    assert bool(((slope - gradient).abs() <= 20 * eps * scale * torch.linalg.matrix_norm(matrix, 2)).all())
    truth = solve_least_squares(matrix, b, damping) if truth is None else truth
    assert float((x - truth).norm()) <= limit * float(truth.norm())


def test_a_known_answer():
    A = Dense(torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]], dtype=DOUBLE))
    solution = LSMR()(A, torch.tensor([6.0, 0.0, 0.0], dtype=DOUBLE))
    torch.testing.assert_close(solution.x, torch.tensor([5.0, -3.0], dtype=DOUBLE), rtol=1e-12, atol=0)
    assert solution.residual_norm == pytest.approx(6**0.5)
    assert solution.iterations == 2


@pytest.mark.parametrize("shape", [(30, 10), (10, 30), (5, 1), (1, 5), (40, 39)])
@pytest.mark.parametrize("sides", [(), (2, 1, 2)])
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_least_squares_of_any_shape(shape, sides, damping, dtype):
    matrix, b = rand(*shape, seed=4, dtype=dtype), rand(*sides, shape[0], seed=5, dtype=dtype)
    matrix[:, 0] *= 3
    limit = 1e-8 if dtype == DOUBLE else (2e-3 if shape[0] != 40 or damping else 0.5)
    check_least_squares(LSMR(damping=damping)(Dense(matrix), b), matrix, b, damping, limit=limit)


def test_square_with_damping_is_least_squares():
    matrix, b = rand(12, 12), rand(3, 12, seed=1)
    check_least_squares(LSMR(damping=0.1)(Dense(matrix), b), matrix, b, 0.1)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_any_start_leads_to_the_same_minimum(damping, dtype):
    matrix, b, x0 = rand(20, 8, dtype=dtype), rand(3, 20, seed=1, dtype=dtype), rand(3, 8, seed=2, dtype=dtype)
    solution = LSMR(damping=damping)(Dense(matrix), b, x0)
    check_least_squares(solution, matrix, b, damping, limit=1e-8 if dtype == DOUBLE else 1e-3)
    again = LSMR(damping=damping, rtol=1e-4)(Dense(matrix), b, solution.x)
    assert again.iterations.tolist() == [0, 0, 0]
    assert torch.equal(again.x, solution.x)


@pytest.mark.parametrize("shape", [(30, 12), (12, 30)])
def test_rank_deficient_gives_minimum_length(shape):
    matrix = rand(shape[0], 5) @ rand(5, shape[1], seed=1)
    matrix[:, 3] = 0
    b = rand(3, shape[0], seed=2)
    b[1] = 0
    solution = LSMR()(Dense(matrix), b)
    check_least_squares(solution, matrix, b, truth=solve_least_squares(matrix, b, rtol=1e-10))
    assert bool((solution.x[:, 3] == 0).all())
    assert int(solution.iterations[1]) == 0
    assert int(solution.iterations.max()) <= 10


def test_a_zero_matrix_and_a_right_hand_side_outside_the_range():
    solution = LSMR()(Dense(torch.zeros(3, 2, dtype=DOUBLE)), rand(3))
    assert (solution.status, solution.iterations, float(solution.x.norm())) == (C, 0, 0.0)
    A = Dense(torch.tensor([[1.0], [0.0]], dtype=DOUBLE))
    solution = LSMR()(A, torch.tensor([0.0, 2.0], dtype=DOUBLE), torch.ones(1, dtype=DOUBLE))
    assert (solution.status, float(solution.x), solution.residual_norm) == (C, 0.0, 2.0)


@pytest.mark.parametrize("consistent", [True, False])
def test_ill_conditioned_against_the_dense_answer(consistent):
    U, _ = torch.linalg.qr(rand(60, 20))
    V, _ = torch.linalg.qr(rand(20, 20, seed=1))
    matrix = U * torch.logspace(0, -6, 20, dtype=DOUBLE) @ V.T
    truth = rand(20, seed=2)
    b = matrix @ truth
    b = b if consistent else b + 1e-3 * (torch.eye(60, dtype=DOUBLE) - U @ U.T) @ rand(60, seed=3)
    solution = LSMR()(Dense(matrix), b)
    assert solution.status == C
    r = b - matrix @ solution.x
    if consistent:
        assert float(r.norm()) <= 1e-10 * float(b.norm())
    else:
        assert float((matrix.T @ r).norm()) <= 1e-10 * float(r.norm())
    dense = torch.linalg.lstsq(matrix, b[:, None]).solution[:, 0]
    best = LSMR(rtol=0.0)(Dense(matrix), b)  # as far as rounding allows: the condition is not squared
    assert best.status == STAG
    assert float((best.x - dense).norm()) <= 1e-8 * float(dense.norm())


def test_agrees_with_normal():
    matrix, b = rand(30, 12), rand(4, 30, seed=1)
    one, other = LSMR()(Dense(matrix), b), Normal(CG())(Dense(matrix), b)
    torch.testing.assert_close(one.x, other.x, rtol=0, atol=1e-9)
    torch.testing.assert_close(one.residual_norm, other.residual_norm, rtol=1e-12, atol=0)


def test_square_without_solution_is_singular_with_its_least_squares_solution(dtype):
    values = torch.linspace(1, 5, 20, dtype=DOUBLE)
    values[:2] = 0
    matrix = (torch.linalg.qr(rand(20, 20))[0] @ symmetric(values)).to(dtype)
    b = rand(2, 20, seed=1, dtype=dtype)
    solution = LSMR()(Dense(matrix), b)
    assert members(solution) == [SING, SING]
    verify(solution, matrix, b)
    best = solve_least_squares(matrix, b, rtol=1e-5)
    assert float((solution.x.double() - best).norm()) <= (1e-11 if dtype == DOUBLE else 1e-3) * float(best.norm())
    assert float((solution.direction.double() @ matrix.double()).norm(dim=-1).max()) <= 1e3 * torch.finfo(dtype).eps


def test_the_recurrence_is_true_and_monotone():
    matrix, b = rand(30, 20), rand(2, 30, seed=1)
    slopes, lengths = [], []
    for k in range(1, 15):
        solution = LSMR(max_iter=k)(Dense(matrix), b)
        torch.testing.assert_close(solution.state.error, solution.normal_residual_norm, rtol=1e-9, atol=0)
        slopes.append(solution.normal_residual_norm)
        lengths.append(solution.residual_norm)
    assert bool((torch.stack(slopes).diff(dim=0) < 0).all())
    assert bool((torch.stack(lengths).diff(dim=0) < 0).all())
    square = matrix[:20] + 5 * torch.eye(20, dtype=DOUBLE)
    for k in (1, 2, 5, 12):
        solution = LSMR(max_iter=k)(Dense(square), b[:, :20])
        torch.testing.assert_close(solution.state.error, solution.residual_norm, rtol=1e-9, atol=0)


def test_each_step_minimises_the_gradient_over_the_krylov_space():
    matrix, b = rand(12, 8), rand(12, seed=1)
    gram, target = matrix.T @ matrix, matrix.T @ b
    for k in (1, 2, 4):
        V, _ = torch.linalg.qr(torch.stack([torch.linalg.matrix_power(gram, j) @ target for j in range(k)], dim=1))
        Q, _ = torch.linalg.qr(gram @ V)
        best = float((target - Q @ (Q.T @ target)).norm())
        assert LSMR(max_iter=k)(Dense(matrix), b).normal_residual_norm == pytest.approx(best, rel=1e-9)


def test_a_batch_of_rectangular_systems_is_its_loop():
    matrices, b = rand(3, 15, 6), rand(2, 3, 15, seed=1)
    b[1, 2] = math.nan
    for damping in (0.0, 0.2):
        solution = LSMR(damping=damping)(Dense(matrices), b)
        assert members(solution) == [C] * 5 + [Status.NON_FINITE]
        for i in range(3):
            alone = LSMR(damping=damping)(Dense(matrices[i]), b[:, i])
            torch.testing.assert_close(solution.x[0, i], alone.x[0], rtol=1e-10, atol=1e-10)
            check_least_squares(LSMR(damping=damping)(Dense(matrices[i]), b[0, i]), matrices[i], b[0, i], damping)


def test_scale():
    matrix, b = rand(15, 6), rand(15, seed=1)
    plain = LSMR()(Dense(matrix), b)
    for left, right in ((1e-12, 1.0), (1e12, 1e-12), (1e-100, 1e100)):
        solution = LSMR()(Dense(left * matrix), right * b)
        assert solution.status == C
        assert abs(solution.iterations - plain.iterations) <= 1
        torch.testing.assert_close(solution.x * (left / right), plain.x, rtol=1e-8, atol=0)


def test_right_preconditioning():
    matrix = rand(60, 30) * torch.logspace(0, 4, 30, dtype=DOUBLE)
    b = rand(2, 60, seed=1)
    R = torch.linalg.qr(matrix).R + 1e-3 * rand(30, 30, seed=2).triu()
    M = Dense(torch.linalg.inv(R))
    plain, better = (LSMR(preconditioner=P, max_iter=3000)(Dense(matrix), b) for P in (None, M))
    check_least_squares(better, matrix, b, limit=1e-5)
    assert int(better.iterations.max()) < 0.3 * int(plain.iterations.min())
    square = spd(30, 1e4)
    system = LSMR(preconditioner=Dense(torch.linalg.inv(square)))(Dense(square), b[:, :30])
    assert members(system) == [C, C]
    assert int(system.iterations.max()) <= 3


def test_hessian_jacobian_and_operators_made_of_others():
    data, b = rand(20, 6), rand(2, 6, seed=2)
    H = Hessian(lambda w: (data @ w).cosh().log().sum() + w @ w, 0.1 * rand(6, seed=1))
    solution = LSMR()(H, b)
    verify(solution, H.to_dense(), b)
    assert members(solution) == [C, C]
    J = Jacobian(lambda w: (data @ w).tanh(), 0.1 * rand(6, seed=1))
    side = rand(2, 20, seed=3)
    check_least_squares(LSMR(damping=0.1)(J, side), J.to_dense(), side, 0.1)
    made = Dense(data) + 0.5 * Dense(rand(20, 6, seed=4))
    check_least_squares(LSMR()(made, side), made.to_dense(), side)
    wide = (Dense(data).T @ Dense(data)).shift(1.0) @ Dense(rand(6, 9, seed=5))
    check_least_squares(LSMR()(wide, b), wide.to_dense(), b)


def test_float32_claims_are_true_of_a_product_that_rounds():
    matrix, b = rand(60, 30, dtype=torch.float32), rand(4, 60, seed=2, dtype=torch.float32)
    A = FunctionOperator(lambda v: v @ matrix.T, (60, 30), torch.float32, rmatvec=lambda v: v @ matrix)
    for rtol in (1e-6, 1e-5, 1e-3):
        solution = LSMR(rtol=rtol)(A, b)
        r = b.double() - solution.x.double() @ matrix.double().T
        gradient = (r @ matrix.double()).norm(dim=-1)
        assert bool((gradient <= solution.tolerance.double())[solution.converged].all())
    assert bool(solution.converged.all())


def test_products_are_counted():
    calls = []

    def count(right):
        def product(v):
            calls.append(v[..., 0].numel())
            return v @ right

        return product

    for shape in ((12, 8), (8, 12), (8, 8)):
        matrix = rand(*shape)
        A = FunctionOperator(count(matrix.T), shape, DOUBLE, rmatvec=count(matrix))
        b = torch.stack([rand(shape[0]), 0 * matrix[:, 0], matrix[:, 3]])
        for x0 in (None, torch.ones(3, shape[1], dtype=DOUBLE)):
            for solver in (LSMR(), LSMR(max_iter=4), LSMR(damping=0.5), LooksSeldom()):
                calls.clear()
                assert solver(A, b, x0).products == sum(calls)


def test_bad_input():
    for damping in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="damping must be a number >= 0"):
            LSMR(damping=damping)
    M = Dense(torch.eye(2, dtype=DOUBLE))
    with pytest.raises(ValueError, match="exclude each other"):
        LSMR(damping=1.0, preconditioner=M)
    with pytest.raises(ValueError, match="preconditioner"):
        LSMR(preconditioner=M)(Dense(rand(4, 3)), rand(4))
    with pytest.raises(TypeError, match="no product with its transpose"):
        LSMR()(FunctionOperator(lambda v: v, (3, 3), DOUBLE), rand(3))
    for shape in ((0, 3), (3, 0), (0, 0)):
        solution = LSMR()(Dense(rand(*shape)), rand(shape[0]))
        assert (solution.status, solution.x.shape) == (C, (shape[1],))
    poisoned = rand(4, 3)
    poisoned[1, 1] = math.nan
    assert LSMR()(Dense(poisoned), rand(4)).status == Status.NON_FINITE
