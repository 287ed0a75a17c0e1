from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nestopt.constrained import TotalVariation1D

DOUBLE = torch.float64


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[-1]), dtype=DOUBLE)


def dual(x: Tensor, t: Tensor, sweeps: int = 2000) -> Tensor:
    """x - D'u for the u that minimises |x - D'u|^2 over |u| <= t, by exact coordinate descent."""
    n = x.shape[-1]
    u, r = [0.0] * (n - 1), x.tolist()
    for _ in range(sweeps):
        for i in range(n - 1):
            new = min(max(u[i] + (r[i + 1] - r[i]) / 2, -float(t[i])), float(t[i]))
            r[i], r[i + 1], u[i] = r[i] + (new - u[i]), r[i + 1] - (new - u[i]), new
    return tensor(*r)


@pytest.mark.parametrize(
    ("x", "weight", "expected"),
    [
        ((0.0, 4.0), 1.0, (1.0, 3.0)),  # two points: they approach each other by the weight
        ((4.0, 0.0), 1.0, (3.0, 1.0)),
        ((0.0, 4.0), 3.0, (2.0, 2.0)),  # and meet in their mean
        ((0.0, 0.0, 0.0, 8.0, 8.0), 3.0, (1.0, 1.0, 1.0, 6.5, 6.5)),  # each segment by weight / length
        ((0.0, 0.0, 9.0, 0.0, 0.0), 1.0, (0.5, 0.5, 7.0, 0.5, 0.5)),  # a peak loses it on both sides
        ((5.0, 5.0, 5.0), 2.0, (5.0, 5.0, 5.0)),
        ((1.0, 2.0, 3.0, 4.0), 100.0, (2.5, 2.5, 2.5, 2.5)),
        ((3.0,), 1.0, (3.0,)),
        ((1e9, 1e9 + 4.0), 1.0, (1e9 + 1, 1e9 + 3)),
    ],
)
def test_known_answers(x: tuple[float, ...], weight: float, expected: tuple[float, ...]) -> None:
    assert torch.allclose(TotalVariation1D(weight).prox(tensor(*x)), tensor(*expected), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_against_the_dual(n: int) -> None:
    for x in noise(4, n):
        t = noise(n)[1:].abs()
        t[n // 2 - 1] *= 0.01
        assert torch.allclose(TotalVariation1D(t).prox(x), dual(x, t), atol=1e-10)


def test_optimality_of_long_signals() -> None:
    # u = cumsum(x - p) is the dual: |u| <= weight, u_n = 0, and u = -weight * sign of the jump where there is one
    x, w = noise(3, 2000).cumsum(-1), 5.0
    p = TotalVariation1D(w).prox(x)
    u = (x - p).cumsum(-1)
    assert float(u[..., -1].abs().max()) <= 1e-9
    assert float(u.abs().max()) <= w + 1e-9
    jumps = p.diff(dim=-1)
    assert float((u[..., :-1] + w * jumps.sign())[jumps != 0].abs().max()) <= 1e-9
    assert 10 < int((jumps[0] != 0).sum()) < 1900


def test_against_cvxpy() -> None:
    cvxpy = pytest.importorskip("cvxpy", reason="cvxpy is not installed")
    x = noise(60).cumsum(-1)
    z = cvxpy.Variable(60)
    cost = cvxpy.sum_squares(z - x.numpy()) / 2 + 1.5 * cvxpy.norm1(cvxpy.diff(z))
    cvxpy.Problem(cvxpy.Minimize(cost)).solve(solver="CLARABEL", tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    assert torch.allclose(TotalVariation1D(1.5).prox(x), torch.from_numpy(z.value), atol=1e-7)


def test_the_jacobian_averages_over_segments() -> None:
    D = TotalVariation1D(3.0).jacobian(tensor(0.0, 0.1, 0.0, 8.0, 8.0)).to_dense()
    expected = torch.block_diag(torch.full((3, 3), 1 / 3, dtype=DOUBLE), torch.full((2, 2), 0.5, dtype=DOUBLE))
    assert torch.allclose(D, expected, rtol=1e-15)


def test_each_item_has_its_weight_and_its_fault() -> None:
    x = noise(4, 9)
    w = tensor(0.1, 0.5, math.nan, 2.0)[:, None]
    p = TotalVariation1D(w).prox(x)
    for i in (0, 1, 3):
        assert torch.equal(p[i], TotalVariation1D(float(w[i])).prox(x[i]))
    assert bool(p[2].isnan().all())
    assert bool(TotalVariation1D(w).jacobian(x).to_dense()[2].isnan().all())
    over_weights = torch.func.vmap(lambda w: TotalVariation1D(w).prox(x[0]))(tensor(0.1, 0.5))
    assert torch.allclose(over_weights[1], TotalVariation1D(0.5).prox(x[0]))


def test_an_edge_without_weight_parts_the_signal() -> None:
    x, w = tensor(1.0, 3.0, 3.0, 3.0, 7.0), tensor(0.5, 0.5, 0.0, 0.5)
    p = TotalVariation1D(w).prox(x)
    assert torch.allclose(p[:3], TotalVariation1D(0.5).prox(x[:3]))
    assert torch.allclose(p[3:], TotalVariation1D(0.5).prox(x[3:]))
    D = TotalVariation1D(w).jacobian(tensor(3.0, 3.0, 3.0, 3.0, 3.0)).to_dense()
    assert float(D[:3, 3:].abs().max()) == 0  # equal values, and yet nothing binds them


def test_pinned() -> None:
    x = tensor(0.3, -1.2, 0.8, 2.1, 1.9, -0.5, -0.4, 3.0)
    expected = tensor(-0.2, -0.2, 0.8, 1.5, 1.5, 0.05, 0.05, 2.5)
    assert torch.allclose(TotalVariation1D(0.5).prox(x), expected, atol=1e-15)
