"""Programs that need no interior point, and what the items of a mixed batch see of each other."""

import pytest
import torch
from laws_layer import agree

from nestopt.constrained import solve_qp
from nestopt.constrained.interior_point import Program
from nestopt.constrained.qp_fast_paths import pivoting
from nestopt.linalg import Status

D = torch.float64


def dense(g, batch, n, p, m, shared=0.0):
    """Strictly convex; with `shared` the rows are nearly parallel, so that exchanges in blocks go wrong often."""
    M, A, G, x = (torch.randn(batch, *s, generator=g, dtype=D) for s in ((n, n), (p, n), (m, n), (n, 1)))
    G = G + shared * torch.randn(batch, 1, n, generator=g, dtype=D)
    h = (G @ x)[..., 0] + 0.1 * torch.rand(batch, m, generator=g, dtype=D)
    Q = M @ M.mT / n + 0.1 * torch.eye(n, dtype=D)
    return [Q, 3 * torch.randn(batch, n, generator=g, dtype=D), A, (A @ x)[..., 0], G, h]


@pytest.mark.parametrize(("n", "p", "m", "shared"), [(1, 0, 1, 0), (6, 2, 3, 0), (30, 4, 26, 5), (20, 0, 12, 20)])
def test_pivoting_ends_at_the_solution(n, p, m, shared, generator):
    Q, q, A, b, G, h = dense(generator, 40, n, p, m, shared)
    program = Program(Q, q, torch.cat([A, G], 1), torch.cat([b, h], 1), p)
    x, y, active, fit = pivoting(program, torch.linalg.cholesky(Q))
    assert fit.all()
    assert active.any()
    assert (y[:, p:] >= 0).all()
    assert ((y[:, p:] > 0) == active).all()
    assert float(program.error(x, y).max()) < 1e-11


def test_pivoting_is_pinned(generator):
    Q, q, A, b, G, h = dense(generator, 1, 3, 1, 2)
    x, *_ = pivoting(Program(Q, q, torch.cat([A, G], 1), torch.cat([b, h], 1), 1), torch.linalg.cholesky(Q))
    assert x[0, 0].item() == pytest.approx(-1.419490020223564, abs=1e-10)


def test_pivoting_leaves_what_is_not_regular_to_others():
    eye, one, two = torch.eye(2, dtype=D), torch.ones(1, 2, dtype=D), torch.ones(2, 2, dtype=D)
    minus = -torch.ones(2, dtype=D)

    def fit(Q, q, C, d, p):
        program = Program(Q[None], q[None], C[None], d[None], p)
        x, y, _, good = pivoting(program, torch.linalg.cholesky_ex(Q[None])[0])
        assert x.isfinite().all()
        assert y.isfinite().all()
        return bool(good)

    assert fit(eye, minus, one, -minus[:1], 0)
    assert not fit(eye, minus, two, -minus, 0)  # the same row twice
    assert not fit(eye, minus, one, -2 * minus[:1], 0)  # a row that holds with equality and has no dual
    assert not fit(eye, minus, torch.cat([two, one]), torch.ones(3, dtype=D), 2)
    assert not fit(0 * eye, minus, one, -minus[:1], 0)


def test_dense_programs_and_simplices_take_no_interior_point_step(generator):
    data = dense(generator, 8, 10, 2, 5)
    assert int(solve_qp(*data).iterations.max()) == 0
    z = solve_qp(data[0], data[1], torch.ones(1, 10, dtype=D), torch.ones(1, dtype=D), low=0.0)
    assert int(z.iterations.max()) == 0
    assert z.converged.all()
    assert (z.x >= -1e-12).all()
    agree(z.x.sum(-1), torch.ones(8, dtype=D), 1e-12)


def test_the_path_of_an_item_does_not_depend_on_the_others(generator):
    Q, q, A, b, G, h = dense(generator, 6, 8, 2, 6)
    M = torch.randn(8, 3, generator=generator, dtype=D)
    Q[1] = M @ M.T  # for the interior point
    G[1:4, 4:], h[1:4, 4:] = torch.stack([torch.ones(8, dtype=D), -torch.ones(8, dtype=D)]), 5.0
    h[2, 0] = h[2, 0] - 50  # some way off
    G[3, 1], h[3, 1] = -G[3, 0], -h[3, 0] - 1  # infeasible
    G[4, 1], h[4, 1] = G[4, 0], h[4, 0]  # a row twice
    q[5, 0] = torch.nan
    data = (Q, q, A, b, G, h)
    z = solve_qp(*data)
    named = {s.name for s in z.status}
    assert {"CONVERGED", "INFEASIBLE", "NON_FINITE"} <= named
    assert int(z.iterations.max()) > 0
    for i in range(6):
        one = solve_qp(*(t[i] for t in data))
        assert one.status == z.status[i]
        assert one.iterations == int(z.iterations[i])
        torch.testing.assert_close(one.x, z.x[i], atol=1e-10, rtol=1e-10, equal_nan=True)
        torch.testing.assert_close(one.inequality_dual, z.inequality_dual[i], atol=1e-10, rtol=1e-10, equal_nan=True)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_certificates_know_no_units(scale, generator):
    Q, q, A, b, G, h = dense(generator, 3, 4, 1, 3)
    G[0, 1], h[0, 1] = -G[0, 0], -h[0, 0] - 0.01
    Q[1], G[1] = 0.0, torch.randn(3, 4, generator=generator, dtype=D).abs()
    q[1] = 1.0
    A[1], b[1] = torch.tensor([1.0, -1.0, 0.0, 0.0], dtype=D), 0.0
    z = solve_qp(Q, q * scale, A, b * scale, G, h * scale)
    assert [s.name for s in z.status] == ["INFEASIBLE", "UNBOUNDED", "CONVERGED"]
    agree(solve_qp(Q[2], q[2], A[2], b[2], G[2], h[2]).x * scale, z.x[2], 1e-9 * scale)
    assert z.status[2] == Status.CONVERGED
