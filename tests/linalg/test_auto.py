import pytest
import torch
from laws import (
    DOUBLE,
    Promises,
    check_batches,
    check_linear_solver,
    check_mixed_block,
    check_names,
    check_refusals,
    check_scale,
    check_shapes,
    check_truth,
    check_warm_start,
    check_zero,
    members,
    rand,
    spd,
    symmetric,
    verify,
)

from nestopt.linalg import Auto, Dense, Diagonal, FunctionOperator, Hessian, Status

C, NEG, SING = Status.CONVERGED, Status.NEGATIVE_CURVATURE, Status.SINGULAR


def test_laws_of_small_systems(dtype):
    direct = Promises(condition=1e4, needs_symmetric=False, direct=True, directions=False)
    for law in (
        check_truth,
        check_zero,
        check_warm_start,
        check_shapes,
        check_batches,
        check_mixed_block,
        check_scale,
        check_refusals,
    ):
        law(Auto(), direct, dtype)
    check_names(Auto(), Promises(needs_symmetric=False), dtype)  # what LDL finds singular is solved all the same


def test_laws_of_large_systems(dtype):
    promises = Promises(condition=1e4, needs_symmetric=False)
    check_linear_solver(lambda: Auto(direct_size=0), promises, dtype)


def names(solution):
    """The solvers that ran."""
    return [type(solver).__name__ for solver in solution.chosen]


def matrix_free(matrix, **promises):
    """The same operator without its matrix."""
    return FunctionOperator(
        lambda v: v @ matrix.mT, tuple(matrix.shape), matrix.dtype, rmatvec=lambda v: v @ matrix, **promises
    )


def test_the_choice_follows_the_table():
    matrix, general = spd(66, 3.0), spd(66, 3.0) + 0.1 * torch.triu(rand(66, 66), 1)
    b = rand(2, 66)
    for definite, small, large in ((True, "Cholesky", "CG"), (None, "LDL", "CG"), (False, "LDL", "MINRES")):
        stored = Dense(matrix, symmetric=True, definite=definite)
        free = matrix_free(matrix, symmetric=True, definite=definite)
        for A, solver, expected in (
            (stored, Auto(), small),
            (stored, Auto(direct_size=65), large),
            (free, Auto(), large),
            (free, Auto(materialise_size=66), small),
        ):
            solution = solver(A, b)
            verify(solution, matrix, b)
            assert names(solution) == [expected]
            assert members(solution) == [C, C]
            assert solution.reason.startswith(f"{expected}: A is ")
    for A, solver, expected in (
        (Dense(general), Auto(), "LU"),
        (Dense(general), Auto(direct_size=0), "GMRES"),
        (matrix_free(general), Auto(), "GMRES"),
        (2.0 * Dense(general).shift(1.0) + Dense(matrix) @ Dense(matrix), Auto(), "LU"),
        (2.0 * Dense(general) + matrix_free(matrix), Auto(), "GMRES"),
    ):
        assert names(solver(A, b)) == [expected]


def test_the_reason_in_words():
    solution = Auto(direct_size=3)(Dense(spd(4, 2.0), symmetric=True, definite=True), rand(4))
    assert solution.reason == "CG: A is promised positive definite, and it is stored with n = 4 > direct_size = 3"


def test_negative_curvature_leads_to_minres_and_is_said():
    n = 80
    values = torch.linspace(1, 5, n, dtype=DOUBLE)
    values[0] = -3.0
    matrix = symmetric(values)
    vectors = torch.linalg.eigh(matrix).eigenvectors
    b = torch.stack([rand(n), 0 * rand(n), vectors[:, 1:5].sum(1)])  # the last does not see the negative direction
    solution = Auto()(matrix_free(matrix, symmetric=True), b)
    verify(solution, matrix, b)
    assert members(solution) == [C] * 3
    assert names(solution) == ["CG", "MINRES"]
    assert solution.reason.endswith("; MINRES: CG ended 1 as NEGATIVE_CURVATURE of 3 columns")
    assert list(solution.parts[0].status) == [NEG, C, C]
    assert torch.equal(solution.x[2], solution.parts[0].x[2])
    assert solution.products == sum(part.products for part in solution.parts)


def test_a_false_promise_of_definiteness_is_said():
    matrix = symmetric(torch.tensor([-1.0, 2.0, 3.0], dtype=DOUBLE))
    solution = Auto()(Dense(matrix, symmetric=True, definite=True), rand(3))
    assert solution.status == C
    assert names(solution) == ["Cholesky", "MINRES"]
    assert "Cholesky ended 1 as NEGATIVE_CURVATURE of 1 columns" in solution.reason


def test_singular_systems_get_what_can_be_had(dtype):
    values = torch.cat([torch.zeros(2), torch.linspace(1, 4, 10)]).double()
    matrix = symmetric(values, dtype=dtype)
    b = torch.stack([rand(12, dtype=dtype), (matrix.double() @ rand(12)).to(dtype)])
    for A, expected in ((Dense(matrix, symmetric=True), ["LDL", "MINRES"]), (Dense(matrix), ["LU", "GMRES"])):
        solution = Auto()(A, b)
        verify(solution, matrix, b)
        assert members(solution) == [SING, C]
        assert names(solution) == expected
        assert float((matrix @ solution.direction[0]).norm()) <= (1e-6 if dtype == DOUBLE else 1e-2)
        least = torch.linalg.pinv(matrix.double(), rtol=1e-4) @ b[0].double()
        residual = b[0].double() - matrix.double() @ least
        assert float(solution.residual_norm[0]) == pytest.approx(float(residual.norm()), rel=1e-3)


def test_prepared_solves_and_transposes(dtype):
    matrix = spd(9, 4.0, dtype=dtype) + torch.triu(rand(9, 9, dtype=dtype), 1)
    b, calls = rand(2, 9, dtype=dtype), []

    def product(v):
        calls.append(v[..., 0].numel())
        return v @ matrix.mT

    A = FunctionOperator(product, (9, 9), dtype, rmatvec=lambda v: v @ matrix)
    for solver, expected in ((Auto(), "LU"), (Auto(materialise_size=0), "GMRES")):
        prepared = solver.prepare(A)
        calls.clear()
        forward, backward = prepared.solve(b), prepared.solve_transposed(b)
        verify(forward, matrix, b)
        verify(backward, matrix.mT, b)
        assert members(forward) == members(backward) == [C, C]
        assert names(forward) == names(backward) == [expected]
        if expected == "LU":  # the factors are kept: what is left are products that certify
            assert sum(calls) == forward.products <= 2 * 2 * 2


@pytest.mark.parametrize("shape", [(20, 8), (8, 20)])
def test_rectangular_systems_are_least_squares(shape, dtype):
    matrix = rand(*shape, dtype=dtype)
    b, c = rand(2, shape[0], dtype=dtype), rand(shape[1], seed=1, dtype=dtype)
    A, limit = Dense(matrix), 1e-7 if dtype == DOUBLE else 1e-3
    inverse = torch.linalg.pinv(matrix.double())
    prepared = Auto().prepare(A)
    for solution in (Auto()(A, b), prepared.solve(b)):
        assert members(solution) == [C, C]
        assert solution.reason == f"LSMR: A is not square but {shape[0]} x {shape[1]}, a least-squares problem"
        torch.testing.assert_close(solution.x.double(), b.double() @ inverse.T, rtol=0, atol=limit)
    transposed = prepared.solve_transposed(c)
    assert transposed.status == C
    torch.testing.assert_close(transposed.x.double(), inverse.T @ c.double(), rtol=0, atol=limit)


def test_batches_are_completed_column_by_column(dtype):
    values = torch.linspace(1, 3, 6, dtype=DOUBLE)
    systems = torch.stack([symmetric(values, 1, dtype), symmetric(-values, 2, dtype)])
    b = rand(3, 2, 6, dtype=dtype)
    solution = Auto()(Dense(systems, symmetric=True, definite=None), b)
    assert names(solution) == ["LDL"]
    large = Auto(direct_size=0)(Dense(systems, symmetric=True), b, rand(3, 2, 6, dtype=dtype))
    verify(large, systems, b)
    assert members(large) == [C] * 6
    assert "CG ended 3 as NEGATIVE_CURVATURE of 6 columns" in large.reason


def test_hessians_and_composed_operators(dtype):
    J, w = rand(30, 12, dtype=dtype), torch.zeros(12, dtype=dtype)
    H = Hessian(lambda v: (J @ v).square().sum() / 2, w)
    factor, b = Dense(J), rand(2, 12, dtype=dtype)
    for solver in (Auto(), Auto(direct_size=0, materialise_size=0)):
        for A in (H, factor.T @ factor, 2.0 * H.shift(0.5) + Diagonal(torch.ones(12, dtype=dtype))):
            solution = solver(A, b)
            verify(solution, A.to_dense(), b)
            assert members(solution) == [C, C]


def test_what_cg_saw_is_kept():
    matrix = spd(80, 10.0)
    low, high = Auto()(matrix_free(matrix, symmetric=True, definite=True), rand(80)).curvature
    assert low == pytest.approx(1.0, rel=1e-2)
    assert high == pytest.approx(10.0, rel=1e-3)
    assert Auto()(Dense(matrix, symmetric=True), rand(80)).curvature is None


def test_bad_input():
    with pytest.raises(ValueError, match="direct_size must be an integer >= 0"):
        Auto(direct_size=-1)
    with pytest.raises(ValueError, match="materialise_size must be an integer >= 0"):
        Auto(materialise_size=2.5)
