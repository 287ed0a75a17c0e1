import math

import pytest
import torch
from laws import DOUBLE, check_refusals, check_truth, check_zero, members, rand, spd, symmetric, verify
from laws import Promises as P

from nestopt.linalg import CG, Dense, Diagonal, FunctionOperator, Nystrom, NystromInverse, Status

C, LIMIT = Status.CONVERGED, Status.MAX_ITER


def decaying(n, dtype=DOUBLE, rank=10, tail=1e-6, seed=0):
    values = torch.cat([torch.logspace(2, 0, rank, dtype=DOUBLE), torch.full((n - rank,), tail, dtype=DOUBLE)])
    return symmetric(values, seed, dtype)


@pytest.mark.parametrize("c", [1e-12, 1.0, 1e12])
def test_full_rank_is_the_exact_inverse(c, dtype):
    matrix = c * spd(20, 50.0, dtype=dtype)
    A = Dense(matrix, symmetric=True)
    M = Nystrom(A, 20, shift=0.5 * c)
    tol = 1e-12 if dtype == DOUBLE else 1e-5
    exact = torch.linalg.inv(matrix.double() + 0.5 * c * torch.eye(20, dtype=DOUBLE)).to(dtype)
    for inverse in (M, M.inverse()):
        torch.testing.assert_close(c * inverse.to_dense(), c * exact, rtol=0, atol=10 * tol)
    torch.testing.assert_close(M.approximation().to_dense() / c, matrix / c, rtol=0, atol=100 * tol)
    assert M.error <= 1e3 * torch.finfo(dtype).eps * float(M.values[0])
    solution = CG(preconditioner=M, rtol=1e-10 if dtype == DOUBLE else 1e-5)(A.shift(0.5 * c), rand(20, dtype=dtype))
    assert solution.status == C and solution.iterations <= 2


def test_an_exact_low_rank_is_found():
    values = torch.tensor([5.0, 3.0, 1.0] + [0.0] * 17, dtype=DOUBLE)
    matrix = symmetric(values)
    M = Nystrom(Dense(matrix, symmetric=True), 6, shift=1e-3)
    torch.testing.assert_close(M.values[:3], values[:3], rtol=1e-12, atol=0)
    assert float(M.values[3:].abs().max()) <= 1e-13
    torch.testing.assert_close(M.approximation().to_dense(), matrix, rtol=0, atol=1e-13)
    assert M.condition_bound == pytest.approx(1, abs=1e-9)
    assert CG(preconditioner=M)(Dense(matrix, symmetric=True).shift(1e-3), rand(20)).iterations == 1
    zero = Nystrom(Dense(torch.zeros(5, 5), symmetric=True), 2, shift=2.0)
    torch.testing.assert_close(zero.to_dense(), torch.eye(5) / 2)


def test_a_pinned_value():
    A = Diagonal(torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=DOUBLE))
    M = Nystrom(A, 2, shift=0.1, generator=torch.Generator().manual_seed(5))
    W, _ = torch.linalg.qr(torch.randn(4, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(5)))
    Y = A.to_dense() @ W
    dense = Y @ torch.linalg.inv(W.T @ Y) @ Y.T
    torch.testing.assert_close(M.approximation().to_dense(), dense, rtol=1e-10, atol=1e-12)
    values, vectors = torch.linalg.eigh(dense)
    U, L = vectors[:, 2:], values[2:]
    paper = (L[0] + 0.1) * (U / (L + 0.1)) @ U.T + torch.eye(4, dtype=DOUBLE) - U @ U.T
    torch.testing.assert_close((float(M.tail) + 0.1) * M.to_dense(), paper, rtol=1e-9, atol=1e-12)
    inverse = torch.linalg.inv(dense + 0.1 * torch.eye(4, dtype=DOUBLE))
    torch.testing.assert_close(M.inverse().to_dense(), inverse, rtol=1e-9, atol=1e-12)
    assert M.error == pytest.approx(float(torch.linalg.eigvalsh(A.to_dense() - dense)[-1]), rel=1e-6)


def test_the_bound_of_the_condition_number_holds():
    for seed in range(5):
        matrix = decaying(60, tail=0.05, seed=seed)
        A = Dense(matrix, symmetric=True)
        M = Nystrom(A, 15, shift=0.01, generator=torch.Generator().manual_seed(seed), error_steps=30)
        values = torch.linalg.eigvals(M.to_dense() @ A.shift(0.01).to_dense()).real
        condition = float(values.max() / values.min())
        assert condition <= M.condition_bound * (1 + 1e-6)
        assert M.condition_bound < 0.2 * float(torch.linalg.cond(A.shift(0.01).to_dense()))
        error = torch.linalg.matrix_norm(matrix - M.approximation().to_dense(), 2)
        assert M.error == pytest.approx(float(error), rel=0.2)


def test_the_rank_doubles_until_it_is_enough():
    A = Dense(decaying(100, rank=20), symmetric=True)
    M = Nystrom(A, 5, shift=1e-2, rtol=1.0, max_rank=100)
    assert M.converged and M.rank == 40 and M.error <= 1e-2
    assert 40 < M.products <= 40 + 4 * 8
    short = Nystrom(A, 5, shift=1e-2, rtol=1.0, max_rank=12)
    assert short.converged is False and short.rank == 12 and short.error > 1e-2
    assert Nystrom(A, 5, shift=1e-2).converged is None
    bare = Nystrom(A, 5, shift=1e-2, error_steps=0)
    assert bare.error is None and bare.condition_bound is None and bare.products == 5
    batch = Dense(torch.stack([decaying(100, rank=3), decaying(100, rank=20, seed=1)]), symmetric=True)
    both = Nystrom(batch, 5, shift=1e-2, rtol=1.0, max_rank=100)
    assert both.converged and both.rank >= 20 and both.error.shape == (2,) and bool((both.error <= 1e-2).all())


def test_the_same_seed_is_the_same_preconditioner_and_leaves_torchs_generator_alone():
    A = Dense(decaying(30), symmetric=True)
    before = torch.get_rng_state()
    one, two = (Nystrom(A, 5, shift=0.1, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    other = Nystrom(A, 5, shift=0.1, generator=torch.Generator().manual_seed(2))
    assert torch.equal(one.to_dense(), two.to_dense()) and not torch.equal(one.to_dense(), other.to_dense())
    assert torch.equal(before, torch.get_rng_state())


def test_negative_curvature_is_refused_unless_the_shift_makes_up_for_it():
    values = torch.tensor([5.0, 2.0, 1.0, -0.5, 0.2, 0.1, 0.1, 0.1], dtype=DOUBLE)
    A = Dense(symmetric(values), symmetric=True)
    with pytest.raises(ValueError, match="negative curvature"):
        Nystrom(A, 8, shift=0.1)
    M = Nystrom(A, 8, shift=1.0)
    assert bool((torch.linalg.eigvalsh(M.to_dense()) > 0).all())
    assert M.error == pytest.approx(0.5)  # what it leaves out, the negative direction, is seen
    assert CG(preconditioner=M)(A.shift(1.0), rand(8)).status == C


def test_float32_at_twenty_times_the_size():
    n = 800
    matrix = decaying(n, torch.float32, rank=25, tail=1e-4)
    A = Dense(matrix, symmetric=True)
    M = Nystrom(A, 30, shift=0.1)
    b = rand(3, n, dtype=torch.float32)
    plain, helped = CG(rtol=1e-3)(A.shift(0.1), b), CG(rtol=1e-3, preconditioner=M)(A.shift(0.1), b)
    verify(helped, matrix + 0.1 * torch.eye(n), b)
    assert members(helped) == [C] * 3 and helped.products < 0.5 * plain.products


def test_bad_arguments():
    A = Dense(spd(6, 4.0), symmetric=True)
    for wrong in ({"rank": 0}, {"rank": 7}, {"rank": 3, "max_rank": 2}, {"rank": 3, "max_rank": 7}):
        with pytest.raises(ValueError, match=r"1 <= rank <= max_rank <= n = 6"):
            Nystrom(A, **wrong, shift=0.1)
    for wrong in ({"rtol": 0.0}, {"rtol": math.nan}, {"rtol": 1.0, "error_steps": 0}, {"error_steps": -1}):
        with pytest.raises(ValueError, match="rtol must be > 0"):
            Nystrom(A, 2, shift=0.1, **wrong)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        NystromInverse(0, 1.0)
    with pytest.raises(ValueError, match="shift > 0"):
        NystromInverse(2, 0.0)


# --- the solver ------------------------------------------------------------------------------------------------------


def test_the_inverse_as_a_solver_keeps_the_laws_of_solvers(dtype):
    """With every column and hardly a shift it is a direct solver, as good as its sketch."""
    solver, promises = NystromInverse(1000, 1e-13 if dtype == DOUBLE else 1e-6, rtol=1e-6), P(condition=10, direct=True)
    if dtype == DOUBLE:
        check_truth(solver, promises, dtype)
        check_refusals(solver, promises, dtype)
    check_zero(solver, promises, dtype)


def test_the_solver_says_that_it_did_not_converge():
    matrix = decaying(40, tail=0.3)
    A, b = Dense(matrix, symmetric=True), rand(2, 40)
    calls = []

    def product(v):
        calls.append(v[..., 0].numel())
        return v @ matrix

    counted = FunctionOperator(product, (40, 40), DOUBLE, symmetric=True)
    solution = NystromInverse(15, 0.1)(counted, b)
    verify(solution, matrix, b)
    assert members(solution) == [LIMIT] * 2 and solution.products == sum(calls) == 15 + 2
    M = Nystrom(A, 15, shift=0.1)
    torch.testing.assert_close(solution.x, M.inverse() @ b, rtol=1e-10, atol=1e-12)
    x0 = torch.linalg.solve(matrix, b.T).T
    calls.clear()
    assert members(NystromInverse(15, 0.1)(counted, b, x0)) == [C] * 2
    prepared = NystromInverse(15, 0.1).prepare(counted)
    calls.clear()
    again = prepared.solve(b)
    assert torch.equal(again.x, solution.x) and again.products == sum(calls) == 2
    assert torch.equal(prepared.solve_transposed(b).x, solution.x)


def test_the_solver_names_what_is_wrong():
    n = 16
    values = torch.linspace(1, 4, n, dtype=DOUBLE)
    systems = torch.stack(
        [symmetric(values), symmetric(-values), torch.full((n, n), math.nan, dtype=DOUBLE), symmetric(values, 1)]
    )
    solution = NystromInverse(n, 1e-12)(Dense(systems, symmetric=True), rand(4, n))
    assert members(solution) == [C, Status.NEGATIVE_CURVATURE, Status.NON_FINITE, C]
    p = solution.direction[1]
    assert float(p @ systems[1] @ p) < 0 and float(p.norm()) == pytest.approx(1)
    assert bool((solution.direction[[0, 2, 3]] == 0).all())
