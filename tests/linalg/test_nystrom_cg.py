import pytest
import torch
from laws import DOUBLE, Promises, check_linear_solver, rand, spd, verify

from nestopt.linalg import CG, Dense, NystromCG, Status

PROMISES = Promises(condition=1e4, indefinite=Status.NEGATIVE_CURVATURE, singular=(Status.SINGULAR,))


def test_laws(dtype):
    check_linear_solver(NystromCG, PROMISES, dtype)


def test_outlying_eigenvalues_cost_their_rank():
    g = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(200, 200, generator=g, dtype=DOUBLE))
    values = torch.cat([torch.linspace(1, 2, 180), torch.logspace(2, 5, 20)]).double()
    matrix, b = (Q * values) @ Q.T, rand(200)
    A = Dense((matrix + matrix.T) / 2, symmetric=True)
    plain, sketched = CG()(A, b), NystromCG(30)(A, b)
    verify(sketched, A.to_dense(), b)
    assert sketched.converged
    assert sketched.products < 0.5 * plain.products
    assert torch.equal(sketched.x, NystromCG(30)(A, b).x)  # the seed decides
    with pytest.raises(ValueError, match="rank"):
        NystromCG(0)


def test_systems_of_a_batch():
    batch = torch.stack([spd(6, 10.0, seed=s) for s in range(3)])
    sol = NystromCG(rank=4)(Dense(batch, symmetric=True), rand(3, 6))
    assert bool(sol.converged.all())
