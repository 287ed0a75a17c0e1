from __future__ import annotations

import math

import pytest
import torch
from laws_optim import check_derivatives, check_jacobian, check_kink_of_projection, check_set, cloud
from torch import Tensor

from nestopt.constrained import Affine, Box, Polyhedron, Simplex
from nestopt.implicit import ImplicitWarning


def tensor(*values: object, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def random_polyhedron(m: int, n: int, equations: int = 0, dtype: torch.dtype = torch.float64) -> Polyhedron:
    g = torch.Generator().manual_seed(m + n)
    G, h = torch.randn(m, n, generator=g, dtype=torch.float64), torch.rand(m, generator=g, dtype=torch.float64)
    A = torch.randn(equations, n, generator=g, dtype=torch.float64)
    return Polyhedron(G.to(dtype), h.to(dtype), A.to(dtype), 0 * A[:, 0].to(dtype))


def box(n: int) -> Polyhedron:
    eye = torch.eye(n, dtype=torch.float64)
    return Polyhedron(torch.cat([eye, -eye]), tensor(*[0.5] * n, *[0.3] * n))


def simplex(n: int) -> Polyhedron:
    eye, one = torch.eye(n, dtype=torch.float64), torch.ones(1, n, dtype=torch.float64)
    return Polyhedron(-eye, 0 * eye[0], one, one[0, :1])


@pytest.mark.parametrize("equations", [0, 1])
def test_laws(equations: int, dtype: torch.dtype) -> None:
    s = random_polyhedron(6, 3, equations, dtype)
    check_set(s, cloud(3, dtype, 2.0, 4), feasible=s.project(cloud(3, dtype, 0.5, 4)))


def test_box_and_simplex() -> None:
    x = cloud(5, torch.float64)
    assert torch.allclose(box(5).project(x), Box(-0.3, 0.5).project(x), atol=1e-14)
    assert torch.allclose(simplex(5).project(x), Simplex().project(x), atol=1e-14)
    assert torch.allclose(simplex(5).jacobian(x).to_dense(), Simplex().jacobian(x).to_dense(), atol=1e-14)
    assert torch.allclose(simplex(3).project(tensor(1e9, 1e9 + 0.25, -1e9)), tensor(0.375, 0.625, 0.0), atol=1e-6)


def test_kkt_of_a_larger_one() -> None:
    s = random_polyhedron(40, 15, 3)
    x = cloud(15, torch.float64, 20.0)
    p = s.project(x)
    assert float((p @ s.G.mT - s.h).max()) <= 1e-12
    assert float((p @ s.A.mT).abs().max()) <= 1e-12
    active = p @ s.G.mT - s.h > -1e-10
    for i in range(len(x)):  # x - p is a combination of the active rows, with the right signs
        rows = torch.cat([s.G[active[i]], s.A])
        multipliers = torch.linalg.lstsq(rows.mT, (x[i] - p[i])[:, None], driver="gelsd").solution[:, 0]
        assert torch.allclose(rows.mT @ multipliers, x[i] - p[i], atol=1e-10)
        assert float(multipliers[:-3].min()) >= -1e-10
    check_jacobian(s, x)


def test_against_cvxpy() -> None:
    cvxpy = pytest.importorskip("cvxpy", reason="needs cvxpy, of nestopt[layers]")
    s, x = random_polyhedron(12, 5, 1), cloud(5, torch.float64, 4.0, 3)
    for point, projected in zip(x, s.project(x), strict=True):
        z = cvxpy.Variable(5)
        constraints = [s.G.numpy() @ z <= s.h.numpy(), s.A.numpy() @ z == 0]
        cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(z - point.numpy())), constraints).solve(solver="CLARABEL")
        assert torch.allclose(projected, torch.as_tensor(z.value), atol=1e-6)


def test_derivatives_in_the_tensors() -> None:
    G, h = tensor((1.0, 0.2, 0.1), (0.3, 1.0, -0.2)), tensor(0.5, 0.4)
    A, b = tensor((0.1, -0.3, 1.0)), tensor(0.2)
    x = tensor((2.0, 1.0, 0.3), (2.0, -1.0, 0.1))  # with both rows active, and with one
    rows = x @ G.mT - h
    assert bool((rows[0] > 0).all()) and not bool((rows[1] > 0).all())
    for i in range(2):
        check_derivatives(lambda x, h, b: Polyhedron(G, h, A, b).project(x), (x[i], h, b))
    check_derivatives(lambda G, A: Polyhedron(G, h, A, b).project(x[0]), (G, A))


def test_batches_of_sets() -> None:
    g = torch.Generator().manual_seed(3)
    G, h = torch.randn(4, 6, 3, generator=g, dtype=torch.float64), torch.rand(6, generator=g, dtype=torch.float64)
    x = cloud(3, torch.float64, 3.0, 4)
    loop = torch.stack([Polyhedron(one, h).project(row) for one, row in zip(G, x, strict=True)])
    assert torch.allclose(Polyhedron(G, h).project(x), loop, atol=1e-13)
    assert torch.allclose(torch.func.vmap(lambda G, x: Polyhedron(G, h).project(x))(G, x), loop, atol=1e-13)
    # every set with every point
    crossed = torch.func.vmap(lambda G: torch.func.vmap(Polyhedron(G, h).project)(x))(G)
    assert torch.allclose(crossed[1], Polyhedron(G[1], h).project(x), atol=1e-13)


def test_a_limit_of_jacobians_at_kinks() -> None:
    s = Polyhedron(tensor((-1.0, 0.0), (0.0, -1.0), (1.0, 1.0), (1.0, 1.0)), tensor(0.0, 0.0, 1.0, 1.0))
    x = tensor((0.5, 0.5), (1.0, 0.0), (1.5, 0.5), (1.0, 1.0), (0.0, 0.0), (-1.0, 0.0))
    check_kink_of_projection(s, x)
    # two rows whose normals cancel leave nothing to move in: the point is a corner of a flat wedge
    wedge = Polyhedron(tensor((0.0, 1.0), (1.0, -1.0), (-1.0, -1.0)), tensor(0.0, 0.0, 0.0))
    assert torch.equal(wedge.jacobian(tensor(0.0, 3.0)).to_dense(), torch.zeros(2, 2, dtype=torch.float64))


def test_an_item_without_a_certificate_is_nan_and_changes_no_other() -> None:
    g = torch.Generator().manual_seed(80)  # rows that are parallel up to 1e-6 leave a sliver
    G = torch.randn(8, 4, generator=g, dtype=torch.float64)
    G[1], G[2] = G[0] + 1e-6 * G[1], 1e-6 * G[2] - G[0]
    h = (torch.rand(8, generator=g, dtype=torch.float64) * 1e-8).requires_grad_()
    x = 3 * torch.randn(5, 4, generator=g, dtype=torch.float64)
    with pytest.warns(ImplicitWarning, match="Polyhedron: 1 of 5 items"):
        p = Polyhedron(G, h).project(x)
    assert p.isnan().all(-1).tolist() == [False] * 4 + [True]
    with pytest.warns(ImplicitWarning, match="Polyhedron: 1 of 5 items"):
        D = Polyhedron(G, h).jacobian(x).to_dense()
    assert D.isnan().any(-1).all(-1).tolist() == [False] * 4 + [True]
    alone = Polyhedron(G, h).project(x[:4])
    assert torch.allclose(p[:4], alone, rtol=0, atol=1e-14)
    (slope,), (wanted,) = (torch.autograd.grad((q[:4] * x[:4]).sum(), h) for q in (p, alone))
    assert torch.allclose(slope, wanted, rtol=1e-9)


def test_rows_that_say_the_same_or_nothing() -> None:
    G = tensor((1.0, 1.0), (2.0, 2.0), (0.0, 0.0), (1.0, 0.0))
    x = tensor((2.0, 2.0), (0.0, 0.0))
    assert torch.allclose(Polyhedron(G, tensor(1.0, 2.0, 0.0, math.inf)).project(x), tensor((0.5, 0.5), (0.0, 0.0)))
    both = Polyhedron(torch.cat([G[:1], -G[:1]]), tensor(1.0, -1.0))  # an equation as two inequalities
    assert torch.allclose(both.project(x), Affine(G[:1], tensor(1.0)).project(x))
    assert torch.equal(Polyhedron(torch.zeros(0, 2), torch.zeros(0)).project(torch.ones(2)), torch.ones(2))
    assert Polyhedron(G, tensor(1.0, 2.0, 0.0, 1.0)).project(torch.zeros(0, 2, dtype=torch.float64)).shape == (0, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Polyhedron(tensor((1.0, 0.0), (-1.0, 0.0)), tensor(-1.0, 0.5)), ValueError, "the set is empty"),
        (lambda: Polyhedron(tensor((0.0, 0.0)), tensor(-1.0)), ValueError, "the set is empty"),
        (lambda: Polyhedron(-torch.eye(2), torch.zeros(2), torch.ones(1, 2), -torch.ones(1)), ValueError, "is empty"),
        (
            lambda: Polyhedron(torch.eye(2), torch.zeros(2), torch.ones(2, 2), torch.arange(2.0)),
            ValueError,
            "Polyhedron: A x = b contradicts itself",
        ),
        (lambda: Polyhedron(torch.eye(2), torch.zeros(3)), ValueError, r"G must have shape"),
        (lambda: Polyhedron(torch.eye(2), torch.zeros(2), torch.ones(1, 2)), ValueError, "belong together"),
        (lambda: Polyhedron(torch.eye(2), torch.zeros(2), torch.ones(1, 3), torch.ones(1)), ValueError, "columns"),
        (lambda: Polyhedron(torch.eye(2) * math.nan, torch.zeros(2)), ValueError, "G must be finite"),
        (lambda: Polyhedron(torch.eye(2), torch.zeros(2) * math.nan), ValueError, "h must not hold NaN"),
        (lambda: box(2).project(torch.zeros(3, dtype=torch.float64)), ValueError, "G's columns"),
        (lambda: box(2).project(torch.zeros(2)), ValueError, "float64"),
    ],
)
def test_bad_input_is_named(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
