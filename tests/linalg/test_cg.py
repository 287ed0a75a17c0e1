import math

import pytest
import torch
from laws import DOUBLE, Promises, check_linear_solver, members, rand, spd, symmetric, true_residual, verify

from nestopt.linalg import CG, Dense, Diagonal, FunctionOperator, Status
from nestopt.linalg.result import iterate

PROMISES = Promises(condition=1e4, indefinite=Status.NEGATIVE_CURVATURE)
C = Status.CONVERGED


class LooksSeldom(CG):
    """CG as on a GPU, where claims wait for every eighth step."""

    def _look(self, b):
        return 8


@pytest.mark.parametrize("solver", [CG, lambda: CG(preconditioner=None, replace_every=1)])
def test_laws(solver, dtype):
    check_linear_solver(solver, PROMISES, dtype)


def test_looking_seldom_changes_no_column(dtype):
    values = torch.linspace(1, 4, 20, dtype=DOUBLE)
    systems = [spd(20, c, seed=i, dtype=dtype) for i, c in enumerate((1.0, 10.0, 100.0))]
    systems += [symmetric(-values, 5, dtype), torch.full((20, 20), math.nan, dtype=dtype)]
    matrix = torch.stack(systems)
    b = rand(2, 5, 20, dtype=dtype)
    b[1, :4] = 0
    often, seldom = (solver(Dense(matrix, symmetric=True), b) for solver in (CG(), LooksSeldom()))
    verify(seldom, matrix, b)
    assert members(often) == members(seldom)
    assert torch.equal(often.iterations, seldom.iterations)
    assert float((often.x - seldom.x).abs().max()) <= (1e-10 if dtype == DOUBLE else 1e-4)


def test_looking_seldom_never_passes_the_limit():
    A, b = Dense(spd(30, 1e4), symmetric=True), rand(3, 30)
    for limit in (0, 1, 5, 8, 13):
        solution = LooksSeldom(max_iter=limit)(A, b)
        assert solution.iterations.tolist() == [limit] * 3
        assert members(solution) == [Status.MAX_ITER] * 3
        torch.testing.assert_close(solution.x, CG(max_iter=limit)(A, b).x, rtol=1e-10, atol=0)


def test_a_wrong_claim_restarts_while_others_wait():
    matrix = spd(30, 1e3, seed=3, dtype=torch.float32)
    b = rand(6, 30, seed=4, dtype=torch.float32)
    solution = LooksSeldom(replace_every=1000, rtol=3e-6)(Dense(matrix, symmetric=True), b)
    verify(solution, matrix, b)
    assert not bool((solution.codes == Status.NON_FINITE.code).any())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rtol", [1e-5, 1e-3, 1e-2, 1e-1])
def test_float32_at_condition_1e6_never_claims_what_is_not_so(seed, rtol):
    n = 50
    matrix = spd(n, 1e6, seed=seed, dtype=torch.float32)
    b = rand(3, n, seed=seed + 50, dtype=torch.float32)
    product = FunctionOperator(lambda v: v @ matrix, (n, n), torch.float32, symmetric=True)
    for A in (Dense(matrix, symmetric=True), product, Dense(matrix, symmetric=True).shift(0.0)):
        solution = CG(rtol=rtol, max_iter=300)(A, b)
        truth = true_residual(matrix, solution.x, b)
        claimed = solution.codes == C.code
        assert bool((truth <= rtol * b.double().norm(dim=-1))[claimed].all())
        assert bool((truth <= solution.residual_norm.double() * 1.01).all())


def test_a_known_answer_to_the_last_digit():
    A = Dense(torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=DOUBLE), symmetric=True, definite=True)
    solution = CG()(A, torch.tensor([1.0, 2.0], dtype=DOUBLE))
    torch.testing.assert_close(solution.x, torch.tensor([1.0, 7.0], dtype=DOUBLE) / 11, rtol=1e-14, atol=0)
    assert solution.iterations == 2
    assert solution.products == 3  # one a step, one to verify


def test_the_count_of_products():
    calls = []
    matrix = spd(20, 100.0)

    def product(v):
        calls.append(v[..., 0].numel())
        return v @ matrix

    A = FunctionOperator(product, (20, 20), DOUBLE, symmetric=True)
    b = torch.stack([rand(20), 0 * rand(20), matrix[3]])
    for x0 in (None, torch.ones_like(b)):
        for solver in (CG(), CG(max_iter=7), CG(replace_every=4), LooksSeldom()):
            calls.clear()
            assert solver(A, b, x0).products == sum(calls)


def test_two_distinct_eigenvalues_take_two_steps():
    matrix = symmetric(torch.tensor([1.0] * 9 + [5.0] * 11, dtype=DOUBLE))
    solution = CG()(Dense(matrix, symmetric=True), rand(4, 20))
    assert solution.iterations.tolist() == [2] * 4


def test_ritz_values_are_the_eigenvalues_in_the_end():
    values = torch.tensor([1.0, 2.0, 5.0, 7.0], dtype=DOUBLE)
    solution = CG(rtol=1e-13)(Dense(symmetric(values), symmetric=True), rand(3, 4))
    low, high = solution.curvature
    torch.testing.assert_close(low, values[0].expand(3), rtol=1e-9, atol=0)
    torch.testing.assert_close(high, values[-1].expand(3), rtol=1e-9, atol=0)
    jacobi = Diagonal(1 / torch.arange(1.0, 5.0, dtype=DOUBLE))
    assert CG(preconditioner=jacobi)(Dense(symmetric(values), symmetric=True), rand(4)).curvature is None
    early = CG(max_iter=2)(Dense(symmetric(values), symmetric=True), rand(4)).curvature
    assert 1 <= early[0] <= early[1] <= 7
    assert CG()(Dense(symmetric(values), symmetric=True), torch.zeros(4, dtype=DOUBLE)).curvature is None


def test_a_good_preconditioner_saves_steps_and_a_bad_one_is_named():
    diagonal = torch.logspace(0, 6, 40, dtype=DOUBLE)
    matrix = torch.diag(diagonal) + 0.1 * spd(40, 2.0)
    A, b = Dense(matrix, symmetric=True), rand(3, 40)
    plain, better = CG()(A, b), CG(preconditioner=Diagonal(1 / diagonal))(A, b)
    verify(better, matrix, b)
    assert bool(better.converged.all())
    assert int(better.iterations.max()) < 0.2 * int(plain.iterations.max())
    indefinite = CG(preconditioner=-Diagonal(1 / diagonal))(A, b)
    assert members(indefinite) == [Status.BREAKDOWN] * 3
    assert not bool((indefinite.x != 0).any())
    mixed = Diagonal(torch.cat([torch.ones(39, dtype=DOUBLE), -torch.full((1,), 1e9, dtype=DOUBLE)]))
    assert CG(preconditioner=mixed)(Dense(spd(40, 10.0), symmetric=True), rand(40)).status == Status.BREAKDOWN
    with pytest.raises(ValueError, match=r"preconditioner .* must have the shape"):
        CG(preconditioner=Diagonal(diagonal[1:]))(A, b)
    with pytest.raises(TypeError, match="promised symmetric"):
        CG(preconditioner=Dense(matrix))(A, b)
    with pytest.raises(TypeError, match="preconditioner must be a LinearOperator"):
        CG(preconditioner=matrix)(A, b)


def test_a_residual_that_rises_for_long_is_no_stagnation():
    """At 1e10 the residual exceeds |b| for hundreds of steps, while the energy falls: CG goes on, and gets there."""
    matrix = spd(40, 1e8, seed=8)
    b = rand(40, seed=9)
    few, many = (CG(rtol=1e-6, max_iter=limit)(Dense(matrix, symmetric=True), b) for limit in (100, 4000))
    assert few.status == Status.MAX_ITER
    assert few.residual_norm > float(b.norm())
    assert many.status == C
    assert many.iterations > 150


def test_a_tolerance_below_rounding_is_stagnation(dtype):
    matrix = spd(30, 1e3, dtype=dtype)
    solution = CG(rtol=1e-3 * torch.finfo(dtype).eps)(Dense(matrix, symmetric=True), rand(30, dtype=dtype))
    assert solution.status == Status.STAGNATED
    assert solution.residual_norm <= 1e4 * torch.finfo(dtype).eps * 1e3


def test_a_state_can_go_on():
    A, b = Dense(spd(30, 1e3), symmetric=True), rand(30)
    solver = CG(max_iter=10)
    first = solver(A, b)
    assert first.status == Status.MAX_ITER
    state = iterate(lambda s: solver.step(A, b, s), first.state, max_iter=1000)
    whole = CG(max_iter=1000)(A, b)
    assert int(state.iterations) == whole.iterations
    torch.testing.assert_close(state.x, whole.x, rtol=1e-12, atol=0)
    assert first.state.k == 10  # the old state is as it was


def test_a_negative_direction_is_a_descent_direction_of_the_quadratic():
    matrix = symmetric(torch.tensor([-1.0, 1.0, 2.0, 3.0], dtype=DOUBLE))
    solution = CG()(Dense(matrix, symmetric=True), rand(4))
    p = solution.direction
    assert float(p @ matrix @ p) < 0
    assert float(p.norm()) == pytest.approx(1)


def test_bad_input():
    with pytest.raises(ValueError, match="replace_every must be at least 1"):
        CG(replace_every=0)
    with pytest.raises(ValueError, match="max_iter must be an integer >= 0"):
        CG(max_iter=-1)
    with pytest.raises(TypeError, match="known not to be"):
        CG()(Dense(spd(3, 2.0), symmetric=True, definite=False), rand(3))


def test_a_residual_of_nothing_but_rounding_is_stagnated():
    # the residual in float32 is exactly zero, its bound is not: there is nothing to restart from
    b = rand(20, dtype=torch.float32)
    A = Dense(spd(20, 10.0, dtype=torch.float32), symmetric=True).shift(1e6)
    for start in (None, CG(rtol=1e-6)(A, b).x):
        solution = CG(rtol=1e-12)(A, b, start)
        assert solution.status == Status.STAGNATED
        assert solution.residual_norm <= 1e-6


@pytest.mark.parametrize("seed", [1, 3, 4])
def test_a_tolerance_near_the_rounding_level_is_met(seed):
    n = 400
    matrix = spd(n, 1e4)
    A = FunctionOperator(lambda v: v @ matrix, (n, n), DOUBLE, symmetric=True)
    b = rand(n, seed=seed)
    solution = CG(rtol=1e-12, max_iter=5000)(A, b)
    assert solution.status == Status.CONVERGED
    assert float(true_residual(matrix, solution.x, b)) <= 1.5e-12 * float(b.norm())


def test_what_no_arithmetic_can_reach_ends_at_the_rounding_level():
    n = 200
    matrix, b = spd(n, 1e6), rand(n, seed=1)
    solution = CG(rtol=1e-12, max_iter=20000)(Dense(matrix, symmetric=True), b)
    floor = torch.finfo(DOUBLE).eps * 1e6 * float(torch.linalg.solve(matrix, b).norm())
    assert solution.status == Status.STAGNATED
    assert float(true_residual(matrix, solution.x, b)) <= 10 * floor
