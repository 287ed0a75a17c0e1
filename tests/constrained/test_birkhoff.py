from __future__ import annotations

import math

import pytest
import torch
from laws_optim import check_kink, check_set, cloud
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from nestopt.constrained import Birkhoff
from nestopt.implicit import ImplicitWarning


def matrices(n: int, dtype: torch.dtype = torch.float64, scale: float = 1.0, points: int = 4) -> Tensor:
    return cloud(n * n, dtype, scale, points).reshape(points, n, n)


@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_laws(dtype: torch.dtype, scale: float) -> None:
    x = matrices(3, dtype, scale)
    check_set(Birkhoff(), x, feasible=Birkhoff().project(matrices(3, dtype, 0.1)))


def test_two_by_two_in_closed_form() -> None:
    X = matrices(2, points=20)
    t = ((X[:, 0, 0] + X[:, 1, 1] - X[:, 0, 1] - X[:, 1, 0]) / 4 + 0.5).clamp(0, 1)
    P = torch.stack([t, 1 - t, 1 - t, t], dim=-1).reshape(20, 2, 2)
    assert torch.allclose(Birkhoff().project(X), P, atol=1e-14)
    inside = ((t > 0) & (t < 1))[:, None, None]
    sign = torch.tensor([0.5, -0.5, -0.5, 0.5], dtype=torch.float64)
    assert torch.allclose(
        Birkhoff().jacobian(X).to_dense(), torch.where(inside, torch.outer(sign, sign), 0), atol=1e-14
    )


def test_kkt_of_larger_ones() -> None:
    for n, scale in ((12, 0.05), (12, 3.0)):
        X = matrices(n, scale=scale)
        P = Birkhoff().project(X)
        assert float((P.sum(-1) - 1).abs().max()) <= 1e-14
        assert float((P.sum(-2) - 1).abs().max()) <= 1e-14
        assert float(P.min()) >= 0
        # optimal over all permutations: <X - P, Q - P> <= 0 at its maximiser Q
        for x, p in zip(X, P, strict=True):
            rows, columns = linear_sum_assignment((p - x).numpy())
            best = (x - p)[rows, columns].sum() - ((x - p) * p).sum()
            assert float(best) <= 1e-11 * n


def test_against_cvxpy() -> None:
    cvxpy = pytest.importorskip("cvxpy", reason="needs cvxpy, of nestopt[layers]")
    for x in matrices(5, points=2):
        Z = cvxpy.Variable((5, 5), nonneg=True)
        constraints = [cvxpy.sum(Z, axis=0) == 1, cvxpy.sum(Z, axis=1) == 1]
        problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(Z - x.numpy())), constraints)
        problem.solve(solver="CLARABEL", tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
        assert torch.allclose(Birkhoff().project(x), torch.as_tensor(Z.value), atol=1e-6)


def test_far_away_it_is_an_assignment() -> None:
    X = matrices(8, scale=1e9)
    P = Birkhoff().project(X)
    for x, p in zip(X, P, strict=True):
        rows, columns = linear_sum_assignment(-x.numpy())
        wanted = torch.zeros_like(x)
        wanted[rows, columns] = 1
        assert torch.allclose(p, wanted, atol=1e-12)
    near = matrices(3).mul(2**10).round() / 2**10
    assert torch.allclose(Birkhoff().project(near + 2.0**30), Birkhoff().project(near), atol=1e-13)


def test_forbidden_entries() -> None:
    X = torch.tensor([[0.0, -math.inf, 0.0], [0.0, 0.0, -math.inf], [0.0, 0.0, 0.0]], dtype=torch.float64)
    P = Birkhoff().project(X)
    assert P[0, 1] == P[1, 2] == 0
    assert torch.allclose(P.sum(-1), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(Birkhoff().project(X.clamp_min(-1e6)), P, atol=1e-9)


def test_an_item_without_a_projection_is_nan_and_changes_no_other() -> None:
    X = matrices(3, points=3)
    bad, want = X.clone(), Birkhoff().project(X)
    for row in (torch.tensor([math.inf, 0.0, 0.0]), torch.full((3,), -math.inf)):
        bad[1, 0] = row
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        with pytest.warns(ImplicitWarning, match="Birkhoff: 1 of 3 items"):
            P = Birkhoff().project(torch.where(bad.isinf(), bad, X * scale))
        assert P.isnan().all(-1).all(-1).tolist() == [False, True, False]
        assert torch.equal(P[[0, 2]], want[[0, 2]])
        (slope,) = torch.autograd.grad((P[[0, 2]] * X[[0, 2]]).sum(), scale)
        (wanted,) = torch.autograd.grad((Birkhoff().project(X[[0, 2]] * scale) * X[[0, 2]]).sum(), scale)
        assert torch.equal(slope, wanted)
        with pytest.warns(ImplicitWarning, match="NaN"):
            D = Birkhoff().jacobian(bad).to_dense()
        assert D.isnan().all(-1).all(-1).tolist() == [False, True, False]


def test_a_limit_of_jacobians_at_kinks() -> None:
    X = torch.eye(3, dtype=torch.float64) + torch.tensor([[[0.0]], [[1.0]]])  # two steps along (1 1')
    check_kink(Birkhoff(), X)
    half = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    check_kink(Birkhoff(), half[None])
    assert int(torch.linalg.matrix_rank(Birkhoff().jacobian(half).to_dense())) == 1


def test_shapes_and_bad_input() -> None:
    assert torch.allclose(Birkhoff().project(torch.tensor([[5.0]])), torch.ones(1, 1))
    assert Birkhoff().project(torch.zeros(2, 0, 3, 3)).shape == (2, 0, 3, 3)
    assert Birkhoff().project(torch.zeros(2, 0, 0)).shape == (2, 0, 0)
    with pytest.raises(ValueError, match=r"\(\*batch, n, n\)"):
        Birkhoff().project(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"\(\*batch, m, n\)"):
        Birkhoff().project(torch.zeros(3))
