from __future__ import annotations

import math

import pytest
import torch
from laws_optim import check_derivatives, check_kink, check_set, cloud
from torch import Tensor

from nestopt.constrained import (
    Box,
    DualCone,
    ExponentialCone,
    NonNegative,
    PowerCone,
    ProductSet,
    SecondOrderCone,
    Simplex,
)


def tensor(*values: object, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


SETS = {
    "nonnegative": NonNegative(),
    "second-order": SecondOrderCone(),
    "dual of second-order": DualCone(SecondOrderCone()),
    "dual of a point": DualCone(Box(0.0, 0.0)),
}


@pytest.mark.parametrize("name", SETS)
def test_laws(name: str, dtype: torch.dtype) -> None:
    s = SETS[name]
    check_set(s, cloud(4, dtype), feasible=s.project(cloud(4, dtype, 0.5).flip(0)))


BLOCKS = {
    "exponential": ExponentialCone(),
    "power": PowerCone(0.3),
    "product": ProductSet([SecondOrderCone(), Box(0.0, 0.0), ExponentialCone()], [2, 1, 3]),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_laws_of_blocks(name: str, dtype: torch.dtype) -> None:
    s, n = BLOCKS[name], 6 if name == "product" else 3
    check_set(s, cloud(n, dtype, points=6), feasible=s.project(cloud(n, dtype, 0.5)))


def test_every_case_of_the_three_dimensional_cones() -> None:
    x = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for s in (ExponentialCone(), PowerCone(0.3)):
        p = s.project(x)
        q = s.project(-x)
        d = DualCone(s).project(x)  # = x + q
        assert float((p * (x - p)).sum(-1).abs().max()) <= 1e-14
        assert float((d * q).sum(-1).abs().max()) <= 1e-14
        assert float((p @ d.mT).min()) >= -1e-13  # x'y >= 0 for every point of a cone and of its dual
        assert bool((p == x).all(-1).any()) and bool((p == 0).all(-1).any())
        assert bool(s.contains(p).all())


@pytest.mark.parametrize("cone", ["ExpCone", "PowCone3D"])
def test_against_cvxpy(cone: str) -> None:
    cvxpy = pytest.importorskip("cvxpy", reason="needs cvxpy, of nestopt[layers]")
    x = cloud(3, torch.float64, 2.0, 6)
    s, more = (ExponentialCone(), ()) if cone == "ExpCone" else (PowerCone(0.3), (0.3,))
    for point, projected in zip(x, s.project(x), strict=True):
        z = cvxpy.Variable(3)
        problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(z - point.numpy())), [getattr(cvxpy, cone)(*z, *more)])
        problem.solve(solver="CLARABEL", tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
        assert torch.allclose(projected, torch.as_tensor(z.value), atol=1e-5)


def test_extreme_blocks() -> None:
    s = ExponentialCone()
    x = tensor((1e9, -1.0, 1.0), (1e-9, -1.0, 1.0), (-1e9, 1e-9, 1e-9), (1.0, 1e-12, 1.0), (1e-100, 1.0, -1.0))
    for scale in (1.0, 1e150, 1e-150):
        p = s.project(scale * x) / scale
        assert bool(p.isfinite().all())
        assert torch.allclose(p, s.project(x), rtol=1e-12, atol=1e-15)
        assert bool(s.contains(scale * p).all())
        assert float((p * (x - p)).sum(-1).abs().max()) <= 1e-12 * 1e18
    assert torch.allclose(s.project(tensor(-1.0, -2.0, 3.0)), tensor(-1.0, 0.0, 3.0))
    assert torch.allclose(s.project(tensor(-1.0, 0.0, -3.0)), tensor(-1.0, 0.0, 0.0))
    # a root far out, where the exponential of one side has no floating number
    assert torch.allclose(s.project(tensor(1e-4, -1.0, 1.0)), tensor(0.0, 0.0, 1.0), atol=1e-3)
    p = PowerCone(0.5).project(tensor((0.0, 0.0, 2.0), (-1.0, 3.0, 0.0), (-1e9, 1.0, 1e-9), (1e-9, 1e9, 1.0)))
    assert torch.allclose(p[:2], tensor((2 / 3, 2 / 3, 2 / 3), (0.0, 3.0, 0.0)))
    assert bool(PowerCone(0.5).contains(p).all())


def test_third_derivatives_of_the_exponential_cone() -> None:
    x, v = tensor(1.0, 0.5, 0.3), tensor(0.3, -0.2, 0.5)

    def along(t: Tensor) -> Tensor:
        return (ExponentialCone().project(x + t * v) ** 2).sum()

    t = x[0] * 0
    second = torch.func.jacfwd(torch.func.jacrev(along))
    differences = (second(t + 1e-4) - second(t - 1e-4)) / 2e-4
    for third in (torch.func.jacrev(second), torch.func.jacfwd(second)):
        assert abs(float(third(t) - differences)) <= 1e-6 * abs(float(differences))


def test_derivatives_in_alpha() -> None:
    x, alpha = cloud(3, torch.float64, 2.0, 4), tensor((0.3,), (0.5,), (0.7,), (0.2,))
    check_derivatives(lambda x, alpha: PowerCone(alpha).project(x), (x, alpha))
    one = torch.stack([PowerCone(float(a)).project(row) for row, a in zip(x, alpha, strict=True)])
    assert torch.allclose(PowerCone(alpha).project(x), one)


@pytest.mark.parametrize("n", [1, 2, 20])
def test_laws_in_other_dimensions(n: int) -> None:
    check_set(SecondOrderCone(), cloud(n, torch.float64))


def test_the_three_cases_of_the_second_order_cone() -> None:
    s = SecondOrderCone()
    x = tensor((6.0, 3.0, 4.0), (-6.0, 3.0, 4.0), (1.0, 3.0, 4.0))
    assert torch.allclose(s.project(x), tensor((6.0, 3.0, 4.0), (0.0, 0.0, 0.0), (3.0, 1.8, 2.4)), rtol=1e-15)
    D = s.jacobian(x).to_dense()
    assert torch.equal(D[0], torch.eye(3, dtype=torch.float64))
    assert torch.equal(D[1], torch.zeros(3, 3, dtype=torch.float64))
    w = tensor(0.6, 0.8)
    corner = 0.6 * torch.eye(2, dtype=torch.float64) - 0.1 * torch.outer(w, w)  # t / |z| = .2
    assert torch.allclose(
        D[2], torch.cat([torch.cat([tensor(1.0), w])[None], torch.cat([w[:, None], 2 * corner], 1)]) / 2
    )


def test_moreau() -> None:
    x = cloud(5, torch.float64)
    p = SecondOrderCone().project(x)
    q = DualCone(SecondOrderCone()).project(-x)
    assert torch.allclose(p - q, x)
    assert torch.allclose(p, DualCone(SecondOrderCone()).project(x), atol=1e-14)  # it is its own dual


def test_a_limit_of_jacobians_at_kinks() -> None:
    x = tensor((5.0, 3.0, 4.0), (-5.0, 3.0, 4.0), (0.0, 0.0, 0.0), (1.0, 0.0, 0.0))
    check_kink(SecondOrderCone(), x)
    automatic = torch.func.vmap(torch.func.jacrev(SecondOrderCone().project))(x)
    assert torch.allclose(automatic, SecondOrderCone().jacobian(x).to_dense())
    check_kink(NonNegative(), tensor((0.0, -0.0, 1.0)))


def test_scale() -> None:
    assert torch.allclose(SecondOrderCone().project(tensor(0.0, 3e200, 4e200)), tensor(2.5e200, 1.5e200, 2e200))
    assert torch.allclose(SecondOrderCone().project(tensor(0.0, 3e-200, 4e-200)), tensor(2.5e-200, 1.5e-200, 2e-200))
    assert bool(SecondOrderCone().project(tensor(0.0, math.nan, 1.0)).isnan().all())


def test_a_product_is_its_parts() -> None:
    x = cloud(5, torch.float64)
    s = ProductSet([Simplex(), SecondOrderCone()], [2, 3])
    assert torch.equal(s.project(x), torch.cat([Simplex().project(x[:, :2]), SecondOrderCone().project(x[:, 2:])], -1))
    D = s.jacobian(x).to_dense()
    assert torch.equal(D[:, :2, :2], Simplex().jacobian(x[:, :2]).to_dense())
    assert not bool(D[:, :2, 2:].any())
    assert ProductSet([], []).project(torch.zeros(3, 0)).shape == (3, 0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ExponentialCone().project(torch.zeros(4)), ValueError, "3 k"),
        (lambda: PowerCone(1.0), ValueError, "strictly between 0 and 1"),
        (lambda: PowerCone(0.5).project(torch.zeros(4)), ValueError, "3 k"),
        (lambda: ProductSet([Simplex()], [1, 2]), ValueError, "1 sets, but 2 sizes"),
        (lambda: ProductSet([3], [1]), TypeError, r"sets\[0\] must be a Set"),
        (lambda: ProductSet([Simplex()], [1.5]), TypeError, r"sizes\[0\] must be an integer"),
        (lambda: ProductSet([Simplex()], [-1]), ValueError, r"sizes\[0\] must be >= 0"),
        (lambda: ProductSet([Simplex()], [2]).project(torch.zeros(3)), ValueError, "the sum of the sizes"),
    ],
)
def test_bad_blocks_are_named(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="n >= 1"):
        SecondOrderCone().project(torch.zeros(2, 0))
    with pytest.raises(TypeError, match="must be a Set"):
        DualCone(3.0)
    with pytest.raises(ValueError, match="0-d"):
        SecondOrderCone().project(torch.zeros(()))
