import pytest
import torch
from laws import DOUBLE, Promises, check_linear_solver, members, rand, spd, symmetric, verify

from nestopt.linalg import BiCGStab, Dense, Diagonal, FunctionOperator, Hessian, Status

C, SING, STAG, BROKEN = Status.CONVERGED, Status.SINGULAR, Status.STAGNATED, Status.BREAKDOWN


class LooksSeldom(BiCGStab):
    """BiCGStab as on a GPU, where claims wait for every eighth step."""

    def _look(self, b):
        return 8


@pytest.mark.parametrize(("solver", "dtype"), [(BiCGStab, DOUBLE), (BiCGStab, torch.float32), (LooksSeldom, DOUBLE)])
def test_laws(solver, dtype):
    # rounding may decide over the last step, which is worth the tolerance: below 1e-10 for a batch to be its loop
    rtol = 1e-12 if dtype == DOUBLE else None
    promises = Promises(condition=1e3, needs_symmetric=False, singular=(SING, STAG, BROKEN), steady=False)
    check_linear_solver(lambda: solver(rtol=rtol), promises, dtype)


def triangular(n=40, dtype=DOUBLE):
    """A nonnormal matrix with eigenvalues from 1 to 100."""
    return (torch.diag(torch.logspace(0, 2, n, dtype=DOUBLE)) + 0.1 * torch.triu(rand(n, n), 1)).to(dtype)


def test_a_known_answer():
    A = Dense(torch.tensor([[4.0, 1.0], [-1.0, 2.0]], dtype=DOUBLE))
    solution = BiCGStab()(A, torch.tensor([6.0, 3.0], dtype=DOUBLE))
    torch.testing.assert_close(solution.x, torch.tensor([1.0, 2.0], dtype=DOUBLE), rtol=1e-14, atol=0)
    assert solution.iterations == 2


def test_one_step_is_the_papers():
    matrix, b = triangular(6), rand(6)
    v = matrix @ b
    alpha = (b @ b) / (b @ v)
    left = b - alpha * v
    t = matrix @ left
    omega = (t @ left) / (t @ t)
    solution = BiCGStab(max_iter=1)(Dense(matrix), b)
    torch.testing.assert_close(solution.x, alpha * b + omega * left, rtol=1e-13, atol=0)
    assert solution.status == Status.MAX_ITER


def test_general_systems(dtype):
    matrix = triangular(dtype=dtype)
    b = torch.stack([rand(40, dtype=dtype), matrix[:, 7], 0 * matrix[0], rand(40, seed=3, dtype=dtype)])
    solution = BiCGStab()(Dense(matrix), b)
    verify(solution, matrix, b)
    assert members(solution) == [C] * 4
    assert int(solution.iterations[2]) == 0


@pytest.mark.parametrize("condition", [1e2, 1e4])
def test_ill_conditioned_systems(condition):
    matrix, b = spd(60, condition), rand(3, 60)
    solution = BiCGStab()(Dense(matrix), b)
    verify(solution, matrix, b)
    assert members(solution) == [C] * 3


def test_an_operator_made_of_others(dtype):
    left, right = rand(12, 12, dtype=dtype), rand(12, 12, seed=1, dtype=dtype)
    A = Dense(left).shift(8.0) + 0.5 * Dense(right) + 0.1 * Dense(right).T @ Dense(right)
    solution = BiCGStab()(A, rand(2, 12, seed=2, dtype=dtype))
    verify(solution, A.to_dense(), rand(2, 12, seed=2, dtype=dtype))
    assert members(solution) == [C, C]


def test_a_hessian():
    data = rand(20, 6)
    H = Hessian(lambda w: (data @ w).cosh().log().sum() + w @ w, 0.1 * rand(6, seed=1))
    solution = BiCGStab()(H, rand(2, 6, seed=2))
    verify(solution, H.to_dense(), rand(2, 6, seed=2))
    assert members(solution) == [C, C]


def test_right_preconditioning(dtype):
    matrix = triangular(dtype=dtype)
    b = rand(2, 40, dtype=dtype)
    plain, better = (BiCGStab(preconditioner=M)(Dense(matrix), b) for M in (None, Diagonal(1 / matrix.diagonal())))
    verify(better, matrix, b)
    assert bool(better.converged.all())
    assert int(better.iterations.max()) < 0.3 * int(plain.iterations.min())
    exact = BiCGStab(preconditioner=Dense(torch.linalg.inv(matrix.double()).to(dtype)))(Dense(matrix), b)
    assert int(exact.iterations.max()) <= 2
    # right: the recurrence follows the residual of the system itself
    early = BiCGStab(preconditioner=Diagonal(1 / matrix.double().diagonal()), max_iter=4)(
        Dense(matrix.double()), b.double()
    )
    torch.testing.assert_close(early.state.error, early.residual_norm, rtol=1e-10, atol=0)


def test_a_breakdown_restarts_with_another_shadow():
    A = Dense(torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=DOUBLE))  # b'Ab = 0: the first step breaks down
    solution = BiCGStab()(A, torch.tensor([3.0, 0.0], dtype=DOUBLE))
    torch.testing.assert_close(solution.x, torch.tensor([0.0, 3.0], dtype=DOUBLE), rtol=1e-14, atol=1e-14)
    assert solution.status == C


@pytest.mark.parametrize("solver", [BiCGStab, LooksSeldom])
def test_a_breakdown_that_comes_back_is_named(solver):
    skew = rand(10, 10)
    skew = skew - skew.T  # t's = 0 in every step
    good = skew + 20 * torch.eye(10, dtype=DOUBLE)
    b = rand(2, 10, seed=1)
    solution = solver()(Dense(torch.stack([skew, good])), b)
    assert members(solution) == [BROKEN, C]
    verify(solution, torch.stack([skew, good]), b)


def test_a_singular_system_names_its_null_vector():
    matrix = torch.diag(torch.tensor([0.0, 1.0, 2.0], dtype=DOUBLE))
    solution = BiCGStab()(Dense(matrix), torch.tensor([2.0, 0.0, 0.0], dtype=DOUBLE))
    assert solution.status == SING
    torch.testing.assert_close(solution.direction, torch.tensor([1.0, 0.0, 0.0], dtype=DOUBLE))
    assert solution.residual_norm == 2.0


@pytest.mark.parametrize("seed", range(6))
def test_singular_systems_never_claim(seed, dtype):
    values = torch.linspace(1, 20, 30, dtype=DOUBLE)
    values[: 1 + seed % 3] = 0
    matrix, b = symmetric(values, seed, dtype), rand(30, seed=seed + 20, dtype=dtype)
    assert BiCGStab()(Dense(matrix), (matrix.double() @ b.double()).to(dtype)).status == C
    solution = BiCGStab()(Dense(matrix), b)
    assert solution.status in (SING, STAG, BROKEN)
    assert bool(torch.isfinite(solution.x).all())
    verify(solution, matrix, b)


def test_residual_replacement_keeps_the_recurrence_true():
    matrix, b = spd(80, 1e5, seed=1), rand(80)
    gaps = []
    for every in (1000, 10):
        solution = BiCGStab(max_iter=60, replace_every=every)(Dense(matrix), b)
        gaps.append(abs(float(solution.state.error) - solution.residual_norm))
    assert gaps[1] <= 1e-15 < 1e-13 < gaps[0]


def test_float32_claims_are_true_of_a_product_that_rounds():
    n = 50
    matrix = spd(n, 1e4, seed=1, dtype=torch.float32)
    b = rand(4, n, seed=2, dtype=torch.float32)
    A = FunctionOperator(lambda v: v @ matrix.T, (n, n), torch.float32)
    for rtol in (1e-5, 1e-3):
        solution = BiCGStab(rtol=rtol, max_iter=150)(A, b)
        truth = (b.double() - solution.x.double() @ matrix.double().T).norm(dim=-1)
        assert bool((truth <= solution.tolerance.double())[solution.converged].all())


def test_the_count_of_products():
    calls = []
    matrix = triangular(20)

    def product(v):
        calls.append(v[..., 0].numel())
        return v @ matrix.T

    A = FunctionOperator(product, (20, 20), DOUBLE)
    b = torch.stack([rand(20), 0 * rand(20), matrix[:, 3]])
    for x0 in (None, torch.ones_like(b)):
        for solver in (BiCGStab(), BiCGStab(max_iter=7, replace_every=3), LooksSeldom()):
            calls.clear()
            assert solver(A, b, x0).products == sum(calls)


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(ValueError, match="replace_every must be at least 1"):
        BiCGStab(replace_every=0)
    with pytest.raises(ValueError, match="A must be square"):
        BiCGStab()(Dense(rand(3, 2)), rand(3))
