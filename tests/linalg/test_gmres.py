import pytest
import torch
from laws import DOUBLE, Promises, check_linear_solver, members, rand, spd, symmetric, verify

from nestopt.linalg import CG, GMRES, Dense, Diagonal, FunctionOperator, Status

C, SING, STAG = Status.CONVERGED, Status.SINGULAR, Status.STAGNATED


class LooksSeldom(GMRES):
    """GMRES as on a GPU, where claims wait for every eighth step."""

    def _look(self, b):
        return 8


@pytest.mark.parametrize("solver", [GMRES, LooksSeldom])
def test_laws(solver, dtype):
    check_linear_solver(solver, Promises(condition=1e4, needs_symmetric=False), dtype)


def triangular(n=40, dtype=DOUBLE):
    """A nonnormal matrix with eigenvalues from 1 to 100."""
    return (torch.diag(torch.logspace(0, 2, n, dtype=DOUBLE)) + 0.1 * torch.triu(rand(n, n), 1)).to(dtype)


def test_a_known_answer():
    A = Dense(torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=DOUBLE))  # a rotation: nothing symmetric about it
    solution = GMRES()(A, torch.tensor([3.0, 1.0], dtype=DOUBLE))
    torch.testing.assert_close(solution.x, torch.tensor([-1.0, 3.0], dtype=DOUBLE), rtol=1e-14, atol=0)
    assert solution.iterations == 2


@pytest.mark.parametrize("restart", [5, 12, 50])
def test_general_systems_in_cycles(restart, dtype):
    matrix = triangular(dtype=dtype)
    b = torch.stack([rand(40, dtype=dtype), matrix[:, 7], 0 * matrix[0], rand(40, seed=3, dtype=dtype)])
    solution = GMRES(restart=restart)(Dense(matrix), b)
    verify(solution, matrix, b)
    assert members(solution) == [C] * 4
    alone = [GMRES(restart=restart)(Dense(matrix), column) for column in b]
    assert [s.iterations for s in alone] == pytest.approx(solution.iterations.tolist(), abs=1 if dtype == DOUBLE else 6)


def test_a_claim_within_a_cycle_leaves_no_part_of_the_next_direction():
    matrix = triangular() * 1e6
    b = rand(40)
    for restart in range(25, 32):
        solution = GMRES(rtol=1e-9, restart=restart)(Dense(matrix), b)
        verify(solution, matrix, b)
        assert solution.status == C
        assert solution.products <= solution.iterations + 1 + solution.iterations // restart


def test_the_basis_is_orthonormal_and_the_recurrence_true():
    matrix, b = triangular(), rand(3, 40)
    solver = GMRES(max_iter=20, restart=50)
    solution = solver(Dense(matrix), b)
    V = solution.state.V[:20].movedim(0, -2)
    torch.testing.assert_close(V @ V.mT, torch.eye(20, dtype=DOUBLE).expand(3, 20, 20), rtol=0, atol=1e-14)
    torch.testing.assert_close(solution.state.error, solution.residual_norm, rtol=1e-10, atol=0)


def test_the_residual_is_minimal_over_the_krylov_space():
    matrix, b = triangular(12), rand(12)
    for k in (1, 4, 9):
        V = (b / b.norm())[:, None]  # an orthonormal basis of the space: powers of the matrix lose it to rounding
        for _ in range(k - 1):
            w = matrix @ V[:, -1]
            for _ in range(2):
                w = w - V @ (V.T @ w)
            V = torch.cat([V, (w / w.norm())[:, None]], dim=1)
        Q, _ = torch.linalg.qr(matrix @ V)
        best = b - Q @ (Q.T @ b)
        assert GMRES(max_iter=k)(Dense(matrix), b).residual_norm == pytest.approx(float(best.norm()), rel=1e-6)


def test_right_preconditioning(dtype):
    matrix = triangular(dtype=dtype)
    b = rand(2, 40, dtype=dtype)
    plain, better = (GMRES(preconditioner=M)(Dense(matrix), b) for M in (None, Diagonal(1 / matrix.diagonal())))
    verify(better, matrix, b)
    assert bool(better.converged.all())
    assert int(better.iterations.max()) < 0.3 * int(plain.iterations.min())
    exact = GMRES(preconditioner=Dense(torch.linalg.inv(matrix.double()).to(dtype)))(Dense(matrix), b)
    assert int(exact.iterations.max()) <= 2


def test_stagnation_is_named_not_waited_for():
    n = 30
    shift = Dense(torch.roll(torch.eye(n, dtype=DOUBLE), 1, 0))
    e = torch.zeros(n, dtype=DOUBLE)
    e[0] = 1
    short = GMRES(restart=10)(shift, e)  # nothing is gained before step n
    assert short.status == STAG
    assert short.iterations == 10
    assert GMRES(restart=30)(shift, e).status == C
    hopeless = GMRES(restart=3)(Dense(symmetric(torch.linspace(-10, 10, 60, dtype=DOUBLE))), rand(60))
    assert hopeless.status == STAG
    assert hopeless.iterations < 1000


@pytest.mark.parametrize("seed", range(8))
def test_singular_systems(seed, dtype):
    n = 30
    values = torch.linspace(1, 20, n, dtype=DOUBLE)
    values[: 1 + seed % 3] = 0
    matrix = symmetric(values, seed, dtype)
    A, b = Dense(matrix), rand(n, seed=seed + 20, dtype=dtype)
    consistent = GMRES()(A, (matrix.double() @ b.double()).to(dtype))
    assert consistent.status == C
    solution = GMRES()(A, b)
    assert solution.status == SING
    verify(solution, matrix, b)
    least = b.double() - matrix.double() @ (torch.linalg.pinv(matrix.double(), rtol=1e-5) @ b.double())
    assert solution.residual_norm == pytest.approx(float(least.norm()), rel=1e-4)  # symmetric: least squares
    null = matrix.double() @ solution.direction.double()
    assert float(null.norm()) <= 100 * torch.finfo(dtype).eps * 20


def test_a_happy_breakdown_on_a_singular_system_is_no_convergence():
    nilpotent = torch.diag(torch.ones(5, dtype=DOUBLE), 1)  # A e_1 = 0: the space of e_1 is exhausted at once
    e = torch.eye(6, dtype=DOUBLE)
    solution = GMRES()(Dense(nilpotent), torch.stack([e[0], e[5], nilpotent @ torch.ones(6, dtype=DOUBLE)]))
    # e_1 = A e_2 has a solution, but its Krylov space does not contain it
    assert members(solution) == [SING] * 3
    assert float((nilpotent @ solution.direction[0]).norm()) == 0
    verify(solution, nilpotent, torch.stack([e[0], e[5], nilpotent @ torch.ones(6, dtype=DOUBLE)]))


def test_ill_conditioned_is_not_singular():
    for condition in (1e8, 1e12):
        solution = GMRES()(Dense(spd(40, condition, seed=2)), rand(40, seed=3))
        assert solution.status in (C, STAG), (condition, solution.status)


def test_the_count_of_products():
    calls = []
    matrix = triangular(20)

    def product(v):
        calls.append(v[..., 0].numel())
        return v @ matrix.T

    A = FunctionOperator(product, (20, 20), DOUBLE)
    b = torch.stack([rand(20), 0 * rand(20), matrix[:, 3]])
    for x0 in (None, torch.ones_like(b)):
        for solver in (GMRES(), GMRES(max_iter=7), GMRES(restart=4), LooksSeldom()):
            calls.clear()
            assert solver(A, b, x0).products == sum(calls)


def test_bad_input():
    with pytest.raises(ValueError, match="restart must be at least 1"):
        GMRES(restart=0)


def varying(A, maps):
    """A preconditioner that is another map at each application."""
    calls = []

    def apply(v):
        calls.append(len(calls) % len(maps))
        return maps[calls[-1]](v)

    return FunctionOperator(apply, tuple(A.shape), A.dtype)


def test_a_preconditioner_that_changes_at_every_step(dtype):
    matrix = triangular(dtype=dtype)
    A, b = Dense(matrix), rand(2, 40, dtype=dtype)
    d = matrix.diagonal()
    M = varying(A, [lambda v: v / d, lambda v: 3 * v, lambda v: v / d.sqrt()])
    for restart in (50, 12):
        solution = GMRES(preconditioner=M, restart=restart)(A, b)
        verify(solution, matrix, b)
        assert members(solution) == [C, C]
    # the residual is minimal over the space of the preconditioned vectors, whatever they are
    few = GMRES(preconditioner=M, max_iter=9)(A, b[0])
    Q, _ = torch.linalg.qr((few.state.Z[:9].double() @ matrix.double().T).T)
    best = b[0].double() - Q @ (Q.T @ b[0].double())
    assert few.residual_norm == pytest.approx(float(best.norm()), rel=1e-8 if dtype == DOUBLE else 1e-3)


@pytest.mark.parametrize("tolerance", [0.3, 0.03])
def test_a_solver_as_preconditioner(tolerance):
    n = 60
    hard = spd(n, 1e4)
    A = Dense(hard + 0.5 * torch.triu(rand(n, n, seed=5), 1))  # not symmetric
    near = Dense(hard, symmetric=True, definite=True)
    M = FunctionOperator(lambda v: CG(rtol=tolerance)(near, v).x, (n, n), DOUBLE)  # not linear in v
    b = rand(3, n, seed=6)
    solution = GMRES(preconditioner=M, restart=30)(A, b)
    verify(solution, A.matrix, b)
    assert members(solution) == [C] * 3
    plain = GMRES(restart=30)(A, b)
    assert int(solution.iterations.max()) < 0.5 * int(plain.iterations.min())


def test_a_preconditioner_without_rank_breaks_down():
    matrix, b = triangular(20), rand(20)
    e = rand(20, seed=8)
    M = FunctionOperator(lambda v: (v @ e)[..., None] * e, (20, 20), DOUBLE)  # one direction, whatever it is given
    solution = GMRES(preconditioner=M)(Dense(matrix), b)
    assert solution.status == Status.BREAKDOWN
    verify(solution, matrix, b)
    kernel = symmetric(torch.cat([torch.zeros(2), torch.linspace(1, 4, 18)]).double())
    solution = GMRES(preconditioner=Diagonal(torch.linspace(0.5, 2, 20, dtype=DOUBLE)))(Dense(kernel), b)
    assert solution.status == SING
    assert float((kernel @ solution.direction).norm()) <= 1e-12


def test_the_preconditioner_is_applied_once_a_step():
    calls = []
    A = Dense(triangular(20))

    def apply(v):
        calls.append(1)
        return v / A.matrix.diagonal()

    solution = GMRES(preconditioner=FunctionOperator(apply, (20, 20), DOUBLE), restart=5)(A, rand(20))
    assert solution.status == C
    assert len(calls) == solution.iterations
