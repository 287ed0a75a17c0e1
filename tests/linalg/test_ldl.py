import math

import pytest
import torch
from laws import DOUBLE, Promises, check_linear_solver, members, rand, spd, symmetric, verify

from nestopt.linalg import LDL, Dense, Hessian, Status
from nestopt.linalg.ldl import unpack

C, SING, BAD = Status.CONVERGED, Status.SINGULAR, Status.NON_FINITE


def test_laws(dtype):
    check_linear_solver(LDL, Promises(condition=1e4, direct=True, directions=False), dtype)


def random_symmetric(*shape, seed=0, dtype=DOUBLE):
    matrix = rand(*shape, shape[-1], seed=seed, dtype=dtype)
    return matrix + matrix.mT


def test_a_known_answer():
    # no pivot of one row exists; the eigenvalues are 2 and -2
    A = Dense(torch.tensor([[0.0, 2.0], [2.0, 0.0]], dtype=DOUBLE), symmetric=True)
    solution = LDL()(A, torch.tensor([2.0, 4.0], dtype=DOUBLE))
    assert solution.x.tolist() == [2.0, 1.0]
    assert tuple(solution.inertia) == (1, 1, 0)
    assert LDL().prepare(A).pivots.tolist() == [-2.0, 2.0]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 25])
def test_the_factors_multiply_to_the_matrix(n, dtype):
    matrix = random_symmetric(12, n, dtype=dtype)
    matrix.diagonal(dim1=-2, dim2=-1)[:8] = 0  # pairs are needed
    packed, swaps, _ = torch.linalg.ldl_factor_ex(matrix)
    assert n == 1 or bool((swaps < 0).any())
    L, D, off, order = unpack(packed, swaps)
    assert bool((L.diagonal(dim1=-2, dim2=-1) == 1).all())
    blocks = torch.diag_embed(D) + torch.diag_embed(off[..., :-1], 1) + torch.diag_embed(off[..., :-1], -1)
    permuted = torch.stack([one[rows][:, rows] for one, rows in zip(matrix, order, strict=True)])
    limit = 100 * n * torch.finfo(dtype).eps * float(matrix.abs().max())
    torch.testing.assert_close(L @ blocks @ L.mT, permuted, rtol=0, atol=limit)


@pytest.mark.parametrize("n", [2, 9, 40])
def test_inertia_counts_the_eigenvalues(n, dtype):
    matrix = random_symmetric(15, n, seed=n, dtype=dtype)
    matrix.diagonal(dim1=-2, dim2=-1)[:6] = 0
    values = torch.linalg.eigvalsh(matrix.double())
    inertia = LDL().prepare(Dense(matrix, symmetric=True)).inertia
    assert torch.equal(inertia.positive, (values > 0).sum(-1))
    assert torch.equal(inertia.negative, (values < 0).sum(-1))
    assert bool((inertia.zero == 0).all())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kernel", [1, 3])
def test_zero_eigenvalues_are_counted(seed, kernel, dtype):
    signs = torch.tensor([1.0, -1.0, 1.0] * 5, dtype=DOUBLE)
    values = torch.linspace(1, 8, 15, dtype=DOUBLE) * signs
    values[:kernel] = 0
    solution = LDL()(Dense(symmetric(values, seed, dtype), symmetric=True), rand(15, dtype=dtype))
    assert solution.status == SING
    assert tuple(solution.inertia) == (int((values > 0).sum()), int((values < 0).sum()), kernel)


def test_singular_pairs():
    ones = torch.ones(2, 2, dtype=DOUBLE)
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=DOUBLE)
    for matrix, expected in (
        (ones, (1, 0, 1)),
        (-ones, (0, 1, 1)),
        (0 * ones, (0, 0, 2)),
        (torch.block_diag(swap, 0 * ones, swap), (2, 2, 2)),
    ):
        assert tuple(LDL().prepare(Dense(matrix, symmetric=True)).inertia) == expected


def test_scaling_rows_and_columns_changes_no_name():
    n = 20
    matrix = symmetric(torch.linspace(1, 4, n, dtype=DOUBLE) * torch.tensor([1.0, -1.0] * 10, dtype=DOUBLE))
    scale = torch.logspace(-9, 9, n, dtype=DOUBLE)
    scaled = Dense(scale[:, None] * matrix * scale, symmetric=True)
    factor = LDL(rtol=1e-6).prepare(scaled)
    assert tuple(factor.inertia) == (10, 10, 0)
    assert factor.solve(scale * rand(n)).status == C


def test_a_saddle_point_system_has_the_inertia_of_a_minimiser():
    H, G = spd(12, 50.0), rand(4, 12, seed=3)
    corner = torch.zeros(4, 4, dtype=DOUBLE)
    matrix = torch.cat([torch.cat([H, G.T], 1), torch.cat([G, corner], 1)])
    solution = LDL()(Dense(matrix, symmetric=True), rand(16))
    assert solution.status == C
    assert tuple(solution.inertia) == (12, 4, 0)  # a constrained minimum: n positive, m negative


def test_batches_and_what_is_not_finite(dtype):
    good = torch.stack([spd(6, 4.0, dtype=dtype), -spd(6, 4.0, dtype=dtype), torch.full((6, 6), math.nan, dtype=dtype)])
    b = rand(2, 3, 6, dtype=dtype)
    factor = LDL().prepare(Dense(good, symmetric=True))
    solution = factor.solve(b)
    assert members(solution) == [C, C, BAD] * 2
    assert [count.tolist() for count in solution.inertia] == [[6, 0, 0], [0, 6, 0], [0, 0, 0]]
    again = factor.solve_transposed(b)
    assert torch.equal(again.x[:, :2], solution.x[:, :2])
    assert tuple(LDL().prepare(Dense(torch.zeros(0, 0, dtype=dtype), symmetric=True)).inertia) == (0, 0, 0)


def test_hessians_and_composed_operators(dtype):
    matrix, p = random_symmetric(8, dtype=dtype), torch.zeros(8, dtype=dtype)
    H = Hessian(lambda v: v @ matrix @ v / 2, p)
    b = rand(2, 8, dtype=dtype)
    for A, dense in ((H, matrix), (H.shift(0.3) * 2.0, 2 * (matrix + 0.3 * torch.eye(8, dtype=dtype)))):
        solution = LDL()(A, b)
        verify(solution, dense, b)
        assert members(solution) == [C, C]
        values = torch.linalg.eigvalsh(dense.double())
        assert tuple(solution.inertia) == (int((values > 0).sum()), int((values < 0).sum()), 0)
