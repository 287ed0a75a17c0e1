import pytest
import torch
from laws import DOUBLE, Promises, check_linear_solver, members, rand, spd, symmetric, verify

from nestopt.linalg import Dense, FunctionOperator, Neumann, Status

C, NEG, DIV = Status.CONVERGED, Status.NEGATIVE_CURVATURE, Status.DIVERGED
PROMISES = Promises(condition=4.0, indefinite=NEG, singular=(Status.MAX_ITER,))


def test_laws(dtype):
    check_linear_solver(lambda: Neumann(terms=150), PROMISES, dtype)


def series(matrix, b, a, terms):
    """The explicit sum a sum_j (I - a A)^j b."""
    total, power = torch.zeros_like(b), b
    for _ in range(terms):
        total, power = total + a * power, power - a * (matrix @ power)
    return total


@pytest.mark.parametrize("terms", [0, 1, 2, 7, 30])
def test_it_is_the_truncated_sum(terms):
    matrix, b = spd(10, 20.0), rand(10)
    solution = Neumann(terms, step_size=0.09)(Dense(matrix, symmetric=True), b)
    assert solution.status == Status.MAX_ITER
    assert solution.iterations == terms
    torch.testing.assert_close(solution.x, series(matrix, b, 0.09, terms), rtol=1e-13, atol=1e-15)
    verify(solution, matrix, b)


def test_a_pinned_value():
    A = Dense(torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=DOUBLE), symmetric=True)
    solution = Neumann(3, step_size=0.5)(A, torch.tensor([1.0, 1.0], dtype=DOUBLE))
    assert solution.x.tolist() == [0.875, 0.5]
    assert solution.residual_norm == 0.125


def test_the_chosen_step_contracts_for_every_spectrum():
    for seed in range(5):
        for condition in (1.0, 3.0, 1e3):
            matrix = spd(60, condition, seed=seed)
            solution = Neumann(5)(Dense(matrix, symmetric=True), rand(2, 60, seed=seed))
            size = solution.state.step_size
            assert bool((size * condition <= 1 + 1e-9).all()) or condition == 1.0
            assert bool((size * condition >= 0.3).all())  # and is not timid
            assert bool((solution.residual_norm < rand(2, 60, seed=seed).norm(dim=-1)).all())


@pytest.mark.parametrize("factor", [2.01, 3.0, 100.0])
def test_a_step_that_diverges_is_refused_before_the_first(factor, dtype):
    matrix, b, x0 = spd(20, 10.0, dtype=dtype), rand(2, 20, dtype=dtype), rand(2, 20, seed=1, dtype=dtype)
    A = Dense(matrix, symmetric=True)
    for start in (None, x0):
        solution = Neumann(50, step_size=factor / 10)(A, b, start)
        assert members(solution) == [DIV, DIV]
        assert solution.iterations.tolist() == [0, 0]
        assert torch.equal(solution.x, torch.zeros_like(b) if start is None else x0)
        verify(solution, matrix, b)
    assert members(Neumann(5, step_size=1.99 / 10)(A, b)) == [Status.MAX_ITER] * 2


def test_without_lanczos_a_growing_residual_ends_the_run():
    matrix, b = spd(20, 10.0), rand(20)
    solution = Neumann(500, step_size=0.3, lanczos_steps=0)(Dense(matrix, symmetric=True), b)
    assert solution.status == DIV
    assert solution.residual_norm <= float(b.norm())
    verify(solution, matrix, b)
    slightly = symmetric(torch.cat([torch.full((1,), -1e-3), torch.linspace(1, 10, 19)]).double())
    solution = Neumann(5000, step_size=0.1, lanczos_steps=0)(Dense(slightly, symmetric=True), b)
    assert solution.status == NEG
    p = solution.direction
    assert float(p @ slightly @ p) < 0
    assert solution.residual_norm <= float(b.norm())


def test_refusals_are_per_system():
    values = torch.linspace(1, 4, 10, dtype=DOUBLE)
    systems = torch.stack([symmetric(values), symmetric(3 * values), symmetric(-values), 0 * symmetric(values)])
    solution = Neumann(400, step_size=0.4)(Dense(systems, symmetric=True), rand(2, 4, 10))
    assert members(solution) == [C, DIV, NEG, Status.SINGULAR] * 2
    verify(solution, systems, rand(2, 4, 10))
    chosen = Neumann(400)(Dense(systems, symmetric=True), rand(2, 4, 10))
    assert members(chosen) == [C, C, NEG, Status.SINGULAR] * 2


def test_products_are_counted():
    calls = []
    matrix = spd(30, 10.0)

    def product(v):
        calls.append(v[..., 0].numel())
        return v @ matrix

    A = FunctionOperator(product, (30, 30), DOUBLE, symmetric=True)
    for solver in (Neumann(10), Neumann(10, step_size=0.1), Neumann(10, step_size=0.1, lanczos_steps=0), Neumann(500)):
        for x0 in (None, rand(2, 30)):
            calls.clear()
            assert solver(A, rand(2, 30), x0).products == sum(calls)
    assert Neumann(10, step_size=0.1, lanczos_steps=0)(A, rand(30)).products == 10


def test_float32_claims_are_true_of_a_product_that_rounds():
    matrix, b = spd(30, 100.0, dtype=torch.float32), rand(3, 30, dtype=torch.float32)
    A = FunctionOperator(lambda v: v @ matrix, (30, 30), torch.float32, symmetric=True)
    for rtol in (1e-6, 1e-5, 1e-3):
        solution = Neumann(1500, rtol=rtol)(A, b)
        truth = (b.double() - solution.x.double() @ matrix.double()).norm(dim=-1)
        assert bool((truth <= solution.tolerance.double())[solution.converged].all())
        assert not bool((solution.codes == NEG.code).any())


def test_bad_input():
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="step_size must be a number > 0"):
            Neumann(5, step_size=bad)
    with pytest.raises(ValueError, match="terms must be an integer >= 0"):
        Neumann(-1)
    with pytest.raises(ValueError, match="terms must be an integer >= 0"):
        Neumann(2.5)
    with pytest.raises(ValueError, match="lanczos_steps=0 needs a step_size"):
        Neumann(5, lanczos_steps=0)
