"""solve_lp: against HiGHS, the derivatives at vertices, faces and under regularisation, and bad input."""

import pytest
import torch
from scipy.optimize import linprog

from nestopt.constrained import solve_lp, solve_qp
from nestopt.linalg import Status

D = torch.float64


def tensor(*values, **options):
    return torch.tensor(values, dtype=D, **options)


def polytope(g, batch, n, p, m):
    """A x = b, G x <= h, 0 <= x <= 1 around a point inside."""
    A, G = (torch.randn(batch, k, n, generator=g, dtype=D) for k in (p, m))
    inside = 0.1 + 0.8 * torch.rand(batch, n, 1, generator=g, dtype=D)
    return A, (A @ inside)[..., 0], G, (G @ inside)[..., 0] + 0.1


@pytest.mark.parametrize("ties", ["centre", "vertex"])
@pytest.mark.parametrize(("n", "p", "m"), [(1, 0, 1), (6, 2, 3), (20, 5, 30)])
def test_against_the_simplex_method(generator, n, p, m, ties):
    A, b, G, h = polytope(generator, 8, n, p, m)
    c = torch.randn(8, n, generator=generator, dtype=D)
    z = solve_lp(c, A, b, G, h, low=0.0, high=1.0, ties=ties)
    assert bool((z.status == Status.CONVERGED).all())
    assert bool(z.vertex.all())
    for i in range(8):
        rows = {"A_eq": A[i].numpy(), "b_eq": b[i].numpy()} if p else {}
        found = linprog(c[i].numpy(), G[i].numpy(), h[i].numpy(), **rows, bounds=(0, 1), method="highs")
        assert float(z.value[i]) == pytest.approx(found.fun, abs=1e-9)
        assert torch.allclose(z.x[i], torch.from_numpy(found.x), atol=1e-8)


def test_at_a_vertex_x_stands_still_and_the_duals_move(generator):
    A, b, G, h = polytope(generator, 2, 3, 1, 1)
    c = torch.randn(2, 3, generator=generator, dtype=D)

    def x_duals_value(c, A, b, G, h):
        z = solve_lp(c, A, b, G, h, low=0.0, high=1.0)
        return z.x, z.equality_dual, z.value

    leaves = [t.clone().requires_grad_() for t in (c, A, b, G, h)]
    assert torch.autograd.gradcheck(x_duals_value, leaves, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(x_duals_value, leaves, fast_mode=True)
    x, nu, value = x_duals_value(*leaves)
    (moved,) = torch.autograd.grad(x.sum(), leaves[0], retain_graph=True)
    assert float(moved.abs().max()) < 1e-12
    slopes = torch.autograd.grad(value.sum(), leaves[:3])
    torch.testing.assert_close(slopes[0], x.detach(), atol=1e-10, rtol=0)
    torch.testing.assert_close(slopes[2], -nu.detach(), atol=1e-10, rtol=0)


def test_a_face_has_a_centre_and_vertices():
    c, row, one = tensor(-1.0, -1.0, -1.0, 0.5), torch.ones(1, 4, dtype=D), torch.ones(1, dtype=D)
    middle = solve_lp(c, row, one, low=0.0)
    torch.testing.assert_close(middle.x, tensor(1 / 3, 1 / 3, 1 / 3, 0.0), atol=1e-6, rtol=0)
    assert not middle.vertex
    assert middle.deficient
    b = one.clone().requires_grad_()
    corner = solve_lp(c, row, b, low=0.0, ties="vertex")
    assert corner.vertex
    assert sorted(corner.x.detach().tolist()) == pytest.approx([0.0, 0.0, 0.0, 1.0], abs=1e-12)
    assert corner.value.item() == pytest.approx(-1.0, abs=1e-12)
    assert float(corner.error) < 1e-12
    (slope,) = torch.autograd.grad(corner.x.sum(), b)
    assert float(slope) == pytest.approx(1.0, abs=1e-12)


def test_regularised_costs_move_the_solution(generator):
    """gamma |x|^2 / 2 over the simplex is its projection of -c / gamma; small gamma gives the LP's own vertex."""
    c = torch.randn(4, 6, generator=generator, dtype=D)
    row, one = torch.ones(1, 6, dtype=D), torch.ones(1, dtype=D)
    gamma = tensor(0.5, 1.0, 2.0, 4.0).requires_grad_()
    z = solve_lp(c, row, one, low=0.0, regularization=gamma)
    reference = solve_qp(torch.eye(6, dtype=D), c / gamma[:, None], row, one, low=0.0)
    torch.testing.assert_close(z.x, reference.x, atol=1e-10, rtol=0)
    leaf = c.clone().requires_grad_()
    f = lambda c, gamma: solve_lp(c, row, one, low=0.0, regularization=gamma).x  # noqa: E731
    assert torch.autograd.gradcheck(f, (leaf, gamma), check_forward_ad=True)
    small = solve_lp(c, row, one, low=0.0, regularization=1e-6)
    torch.testing.assert_close(small.x, solve_lp(c, row, one, low=0.0).x, atol=1e-9, rtol=0)


def test_vmap_is_a_loop(generator):
    A, b, G, h = polytope(generator, 3, 4, 1, 6)
    c = torch.randn(3, 4, generator=generator, dtype=D)
    for ties in ("centre", "vertex"):
        f = lambda c, A, b, G, h: solve_lp(c, A, b, G, h, low=0.0, high=1.0, ties=ties).x  # noqa: B023, E731
        loop = torch.stack([f(*item) for item in zip(c, A, b, G, h, strict=True)])
        torch.testing.assert_close(torch.func.vmap(f)(c, A, b, G, h), loop, atol=1e-10, rtol=0)


def test_statuses_are_each_items_own():
    c = tensor([1.0, 1.0], [-1.0, 0.0], [1.0, 1.0], [torch.nan, 0.0])
    G, h = torch.eye(2, dtype=D).expand(4, 2, 2).clone(), torch.ones(4, 2, dtype=D)
    G[1] = -G[1]
    h[2] = -1.0
    z = solve_lp(c, G=G, h=h, low=0.0)
    assert [s.name for s in z.status] == ["CONVERGED", "UNBOUNDED", "INFEASIBLE", "NON_FINITE"]
    assert z.vertex.tolist() == [True, False, False, False]
    assert z.x.isnan().all(-1).tolist() == [False, True, True, True]


def test_float32_stays():
    z = solve_lp(torch.tensor([1.0, -1.0]), low=0.0, high=1.0)
    assert z.x.dtype == torch.float32
    assert z.x.tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: solve_lp(1.0), TypeError, "c must be a floating tensor"),
        (lambda: solve_lp(tensor(1.0), low=0.0, regularization=-1.0), ValueError, "regularization"),
        (lambda: solve_lp(tensor(1.0), low=0.0, ties="first"), ValueError, "ties"),
        (lambda: solve_lp(tensor(1.0), low=0.0, ties="vertex", regularization=1.0), ValueError, "ties"),
        (lambda: solve_lp(tensor(1.0), low=0.0, ties="vertex", degenerate="mean"), ValueError, "degenerate"),
        (lambda: solve_lp(tensor(1.0), torch.ones(1, 2, dtype=D), tensor(1.0)), ValueError, "A must have shape"),
        (lambda: solve_lp(tensor(1.0), torch.ones(1, 1, dtype=D)), ValueError, "without b"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
