"""Solutions and statuses of solve_qp: known answers, enumeration, other solvers, bad programs and bad input."""

import itertools

import pytest
import torch

from nestopt.constrained import solve_qp
from nestopt.linalg import SolverError, Status

D = torch.float64


def tensor(*values):
    return torch.tensor(values, dtype=D)


def feasible(g, batch, n, p, m, rank=None):
    M, A, G, x = (torch.randn(batch, *s, generator=g, dtype=D) for s in ((n, rank or n), (p, n), (m, n), (n, 1)))
    h = (G @ x)[..., 0] + torch.rand(batch, m, generator=g, dtype=D)
    return [M @ M.mT, torch.randn(batch, n, generator=g, dtype=D), A, (A @ x)[..., 0], G, h]


def check_kkt(z, Q, q, A, b, G, h, atol=1e-9):
    """The conditions themselves, in the program's own units."""
    nu, lam = z.equality_dual, z.inequality_dual
    gradient = (Q @ z.x[..., None])[..., 0] + q + (A.mT @ nu[..., None])[..., 0] + (G.mT @ lam[..., None])[..., 0]
    assert bool(z.codes.eq(Status.CONVERGED.code).all())
    assert float(gradient.abs().max()) < atol
    assert float(((A @ z.x[..., None])[..., 0] - b).abs().sum()) < atol
    assert (z.slack > -atol).all()
    assert (lam >= 0).all()
    assert ((lam * z.slack).abs() < atol).all()


def test_known_answers():
    Q = tensor([4.0, 1.0], [1.0, 2.0]).requires_grad_()
    q, A, b = (
        tensor(1.0, 1.0).requires_grad_(),
        torch.ones(1, 2, dtype=D).requires_grad_(),
        tensor(1.0).requires_grad_(),
    )
    z = solve_qp(Q, q, A, b, -torch.eye(2, dtype=D), torch.zeros(2, dtype=D))
    torch.testing.assert_close(z.x.detach(), tensor(0.25, 0.75), atol=1e-12, rtol=0)
    torch.testing.assert_close(z.equality_dual.detach(), tensor(-2.75), atol=1e-12, rtol=0)
    found = torch.autograd.grad(z.x, (q, Q, A, b), tensor(1.3, 0.5))
    wanted = (tensor(-0.2, 0.2), tensor([-0.05, -0.05], [-0.05, 0.15]), tensor([0.375, -1.075]), tensor(0.7))
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)

    Q = tensor([2.0, 1.0, 0.0], [1.0, 2.0, 1.0], [0.0, 1.0, 2.0])
    q, h = torch.zeros(3, dtype=D, requires_grad=True), tensor(-4.0, -1.0).requires_grad_()
    z = solve_qp(Q, q, G=-tensor([1.0, 2.0, 3.0], [1.0, 1.0, 0.0]), h=h)
    torch.testing.assert_close(7 * z.x.detach(), tensor(4.0, 3.0, 6.0), atol=1e-12, rtol=0)
    torch.testing.assert_close(7 * z.inequality_dual.detach(), tensor(5.0, 6.0), atol=1e-12, rtol=0)
    dq, dh = torch.autograd.grad(z.x.sum(), (q, h))
    torch.testing.assert_close(14 * dq, tensor(-3.0, 3.0, -1.0), atol=1e-12, rtol=0)
    torch.testing.assert_close(14 * dh, tensor(-5.0, -6.0), atol=1e-12, rtol=0)


def test_pinned(generator):
    z = solve_qp(*feasible(generator, 1, 3, 1, 4))
    assert z.value.item() == pytest.approx(1.7579902669422, abs=1e-10)


def test_enumeration_of_active_sets_agrees(generator):
    data = feasible(generator, 12, 3, 1, 5)
    z = solve_qp(*data)
    for i in range(12):
        Q, q, A, b, G, h = (t[i] for t in data)
        best = torch.inf
        for k in range(3):
            for rows in itertools.combinations(range(5), k):
                C = torch.cat([A, G[list(rows)]])
                K = torch.cat([torch.cat([Q, C.mT], 1), torch.cat([C, torch.zeros(len(C), len(C), dtype=D)], 1)])
                x = torch.linalg.solve(K, torch.cat([-q, b, h[list(rows)]]))[:3]
                if bool((G @ x <= h + 1e-9).all()):
                    best = min(best, float(0.5 * x @ Q @ x + q @ x))
        assert float(z.value[i]) == pytest.approx(best, abs=1e-10)


@pytest.mark.parametrize(
    ("n", "p", "m"), [(1, 0, 1), (1, 1, 2), (4, 0, 30), (8, 8, 3), (10, 3, 0), (20, 5, 40), (12, 0, 0)]
)
def test_the_conditions_hold_at_every_size(n, p, m, generator):
    data = feasible(generator, 6, n, p, m)
    check_kkt(solve_qp(*data), *data)


def test_linear_and_rank_deficient_programs(generator):
    for rank in (0, 2):
        Q, q, A, b, G, h = feasible(generator, 8, 6, 2, 8, rank=2)
        eye = torch.eye(6, dtype=D).expand(8, 6, 6)
        G, h = torch.cat([G, eye, -eye], 1), torch.cat([h, torch.full((8, 12), 10.0, dtype=D)], 1)
        Q = Q if rank else 0 * Q
        check_kkt(solve_qp(Q, q, A, b, G, h), Q, q, A, b, G, h, atol=1e-8)


def test_bad_scaling_of_rows_and_columns(generator):
    Q, q, A, b, G, h = feasible(generator, 8, 5, 2, 10)
    s, rows, limits = (10 ** (12 * torch.rand(8, k, generator=generator, dtype=D) - 6) for k in (5, 2, 10))
    z = solve_qp(
        Q * s[:, None] * s[..., None], q * s, A * s[:, None] * rows[..., None], b * rows,
        G * s[:, None] * limits[..., None], h * limits,
    )  # fmt: skip
    truth = solve_qp(Q, q, A, b, G, h)
    assert z.converged.all()
    torch.testing.assert_close(z.x * s, truth.x, atol=1e-9, rtol=1e-9)


def test_clarabel_agrees(generator):
    cp = pytest.importorskip("cvxpy", reason="cvxpy is not installed")
    Q, q, A, b, G, h = (t[0].numpy() for t in feasible(generator, 1, 12, 3, 20))
    x = cp.Variable(12)
    rows = [A @ x == b, G @ x <= h]
    cp.Problem(cp.Minimize(cp.quad_form(x, cp.psd_wrap(Q)) / 2 + q @ x), rows).solve(
        solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12
    )
    z = solve_qp(*(torch.from_numpy(t) for t in (Q, q, A, b, G, h)))
    torch.testing.assert_close(z.x, torch.from_numpy(x.value), atol=1e-6, rtol=0)
    torch.testing.assert_close(z.equality_dual, torch.from_numpy(rows[0].dual_value), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.inequality_dual, torch.from_numpy(rows[1].dual_value), atol=1e-5, rtol=0)


EYE = torch.eye(2, dtype=D)
ONE = torch.ones(1, 2, dtype=D)
BAD = {
    "infeasible": (
        (EYE, tensor(0.0, 0.0), None, None, tensor([-1.0, 0.0], [0.0, -1.0], [1.0, 1.0]), tensor(-6.0, -6.0, 11.0)),
        "INFEASIBLE",
    ),
    "nearly feasible": (
        (EYE, tensor(0.0, 0.0), None, None, tensor([-1.0, 0.0], [1.0, 0.0]), tensor(-1.0, 0.9999)), "INFEASIBLE",
    ),
    "contradictory equalities": (
        (EYE, tensor(0.0, 0.0), torch.ones(2, 2, dtype=D), tensor(1.0, 2.0)), "INFEASIBLE",
    ),
    "an empty row": ((EYE, tensor(1.0, 0.0), None, None, torch.zeros(1, 2, dtype=D), tensor(-1.0)), "INFEASIBLE"),
    "a limit of -inf": ((EYE, tensor(1.0, 0.0), None, None, ONE, tensor(-torch.inf)), "INFEASIBLE"),
    "unbounded": ((0 * EYE, tensor(1.0, 0.0), None, None, tensor([0.0, 1.0]), tensor(3.0)), "UNBOUNDED"),
    "unbounded, no constraint": ((0 * EYE, tensor(1.0, 0.0)), "UNBOUNDED"),
    "unbounded in the kernel": ((tensor([1.0, 1.0], [1.0, 1.0]), tensor(1.0, -1.0)), "UNBOUNDED"),
    "not convex": ((-EYE, tensor(1.0, 0.0), None, None, torch.cat([EYE, -EYE]), torch.ones(4, dtype=D)), "NOT_CONVEX"),
    "NaN": ((EYE, tensor(torch.nan, 0.0)), "NON_FINITE"),
    "infinite Q": ((torch.inf * EYE, tensor(1.0, 0.0)), "NON_FINITE"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_program_without_solution_has_a_status_and_no_numbers(name):
    program, status = BAD[name]
    z = solve_qp(*program)
    assert z.status.name == status
    for numbers in (z.x, z.value, z.equality_dual, z.inequality_dual, z.slack):
        assert numbers.isnan().all()
    with pytest.raises(SolverError, match=status):
        z.unwrap()


def test_bad_items_change_no_other(generator):
    data = feasible(generator, 4, 3, 1, 3)
    truth = solve_qp(*data)
    Q, q, A, b, G, h = (t.clone() for t in data)
    q[1, 0] = torch.nan
    Q[2] = -Q[2]
    z = solve_qp(Q, q, A, b, G, h)
    assert [s.name for s in z.status] == ["CONVERGED", "NON_FINITE", "NOT_CONVEX", "CONVERGED"]
    torch.testing.assert_close(z.x[[0, 3]], truth.x[[0, 3]], atol=1e-13, rtol=0)
    assert z.x[[1, 2]].isnan().all()


def test_broadcasting_equals_a_loop(generator):
    Q, q, A, b, G, h = feasible(generator, 6, 3, 1, 4)
    q = q.reshape(3, 2, 3)
    z = solve_qp(Q[0], q, A[:1], b[0], G[0], h[0] + 1)
    assert z.x.shape == (3, 2, 3)
    assert z.codes.shape == z.error.shape == z.iterations.shape == (3, 2)
    for i, j in itertools.product(range(3), range(2)):
        one = solve_qp(Q[0], q[i, j], A[0], b[0], G[0], h[0] + 1)
        torch.testing.assert_close(z.x[i, j], one.x, atol=1e-12, rtol=0)


def test_only_the_symmetric_part_counts(generator):
    Q, q, *rest = feasible(generator, 1, 3, 1, 3)
    skew = torch.randn(1, 3, 3, generator=generator, dtype=D)
    torch.testing.assert_close(solve_qp(Q + skew - skew.mT, q, *rest).x, solve_qp(Q, q, *rest).x, atol=1e-12, rtol=0)


def test_empty_batches_and_empty_constraints():
    z = solve_qp(EYE, torch.zeros(0, 2, dtype=D), G=ONE, h=tensor(1.0))
    assert z.x.shape == (0, 2)
    assert z.codes.shape == (0,)
    none = solve_qp(EYE, tensor(1.0, 0.0), *(no := (torch.zeros(0, 2, dtype=D), torch.zeros(0, dtype=D))), *no)
    torch.testing.assert_close(none.x, tensor(-1.0, 0.0))
    assert none.slack.shape == none.inequality_dual.shape == none.equality_dual.shape == (0,)


def test_bounds_take_no_interior_point_steps(generator):
    Q, q = feasible(generator, 8, 6, 0, 0)[:2]
    z = solve_qp(Q + torch.eye(6, dtype=D), 5 * q, low=-0.1, high=torch.linspace(0.1, 0.2, 6, dtype=D))
    assert z.converged.all()
    assert int(z.iterations.max()) == 0
    assert ((z.x >= -0.1 - 1e-12) & (z.x <= 0.2 + 1e-12)).all()
    diagonal = solve_qp(2 * torch.eye(6, dtype=D), 5 * q, low=-0.1, high=0.1)
    torch.testing.assert_close(diagonal.x, (-2.5 * q).clamp(-0.1, 0.1), atol=1e-14, rtol=0)


def test_warm_start_at_the_solution_takes_no_step(generator):
    data = feasible(generator, 5, 6, 2, 9)
    z = solve_qp(*data, low=-9.0)
    assert int(z.iterations.min()) > 0
    Q, q, *rest = data
    again = solve_qp(Q, q + 1e-6, *rest, low=-9.0, warm_start=z)
    assert int(again.iterations.max()) == 0
    assert again.converged.all()
    far = solve_qp(Q, -50 * q, *rest, low=-9.0, warm_start=z)
    torch.testing.assert_close(far.x, solve_qp(Q, -50 * q, *rest, low=-9.0).x, atol=1e-9, rtol=1e-9)


def test_the_limit_of_steps_is_a_status(generator):
    z = solve_qp(*feasible(generator, 3, 6, 2, 9), max_iter=1, rtol=0.0)
    assert not z.converged.all()
    assert (z.codes[z.codes != Status.CONVERGED.code] == Status.MAX_ITER.code).all()
    assert (z.error[z.codes == Status.MAX_ITER.code] > 0).all()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((EYE, tensor(1.0, 2.0, 3.0)), {}, ValueError, r"Q must have shape \(\*batch, n, n\)"),
        ((EYE, torch.tensor(1.0, dtype=D)), {}, ValueError, "q must have shape"),
        ((EYE[:0, :0], EYE[0, :0]), {}, ValueError, "at least one variable"),
        ((EYE, tensor(1.0, 2.0), ONE), {}, ValueError, "A is given without b"),
        ((EYE, tensor(1.0, 2.0), None, tensor(1.0)), {}, ValueError, "b is given without A"),
        ((EYE, tensor(1.0, 2.0), ONE, tensor(1.0, 2.0)), {}, ValueError, "A must have shape"),
        ((EYE, tensor(1.0, 2.0), None, None, EYE, tensor(1.0)), {}, ValueError, "G must have shape"),
        ((EYE, tensor(1.0, 2.0).float()), {}, ValueError, "q is torch.float32"),
        ((EYE.half(), tensor(1.0, 2.0).half()), {}, TypeError, "Q must be a float32 or float64"),
        ((EYE, [1.0, 2.0]), {}, TypeError, "q must be a float32 or float64 tensor, but got list"),
        ((EYE.expand(3, 2, 2), torch.ones(2, 2, dtype=D)), {}, ValueError, "do not broadcast"),
        ((EYE, tensor(1.0, 2.0)), {"low": torch.ones(3, dtype=D)}, ValueError, "low must be"),
        ((EYE, tensor(1.0, 2.0)), {"degenerate": "weak"}, ValueError, "degenerate must be"),
        ((EYE, tensor(1.0, 2.0)), {"smoothing": 0.0}, ValueError, "smoothing must be"),
        ((EYE, tensor(1.0, 2.0)), {"rtol": -1.0}, ValueError, "rtol must be"),
        ((EYE, tensor(1.0, 2.0)), {"on_failure": "zero"}, ValueError, "on_failure must be"),
        ((EYE, tensor(1.0, 2.0)), {"backend": "osqp"}, TypeError, "backend must be"),
        ((EYE, tensor(1.0, 2.0)), {"warm_start": solve_qp(EYE, tensor(1.0, 2.0), low=0.0)}, ValueError, "warm_start"),
    ],
)
def test_bad_input(arguments, options, error, match):
    with pytest.raises(error, match=match):
        solve_qp(*arguments, **options)
