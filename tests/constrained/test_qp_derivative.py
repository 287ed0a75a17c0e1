"""Derivatives of solve_qp: the duties of a layer, the formulas of its gradients, and what failed items do to others."""

from dataclasses import replace

import pytest
import torch
from laws_layer import Case, agree, duties

from nestopt import constrained
from nestopt.constrained import QPLayer, solve_qp
from nestopt.implicit import Monitor
from nestopt.linalg import SolverError, Status

D = torch.float64


def random_program(g, n, p, m):
    """Strictly convex and feasible; a row of two bounds the same direction, so that `pinched` can contradict it."""
    M, A, G, x = (torch.randn(*s, generator=g, dtype=D) for s in ((n, n), (p, n), (m - 1, n), (n,)))
    G = torch.cat([G, -G[:1]])
    h = G @ x + 0.3 + torch.rand(m, generator=g, dtype=D)
    return M @ M.mT / n + torch.eye(n, dtype=D), 2 * torch.randn(n, generator=g, dtype=D), A, A @ x, G, h


def outputs(z):
    return z.x, z.equality_dual, z.inequality_dual, z.value, z.slack


def both(Q, q, A, b, G, h, **options):
    return outputs(solve_qp(Q, q, A, b, G, h, **options))


def pinched(item):
    *rest, h = item
    h = h.clone()
    h[..., 0], h[..., -1] = -5.0, -5.0  # g'x <= -5 and -g'x <= -5
    return (*rest, h)


def from_guess(y0, *theta):
    z = solve_qp(*theta)
    return outputs(solve_qp(*theta, warm_start=replace(z, x=y0[..., : theta[1].shape[-1]])))


class Learnt(torch.nn.Module):
    """QPLayer with its inputs by position."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(3)
        Q, _, A, b, G, h = random_program(g, 3, 1, 4)
        keep = torch.nn.Parameter
        self.layer = QPLayer(Q=keep(torch.linalg.cholesky(Q)), A=A, b=b, G=keep(G), h=h, square_root=True)

    def forward(self, q):
        return self.layer(q=q).x


def learnt():
    return Learnt(), (torch.tensor([0.3, -2.0, 1.0], dtype=D),)


def inverted(Q, q, A, b):
    """The equality-constrained program by the inverse of its KKT matrix (torch differentiates inv rightly)."""
    n, p = len(q), len(b)
    K = torch.cat([torch.cat([0.5 * (Q + Q.mT), A.mT], 1), torch.cat([A, torch.zeros(p, p, dtype=D)], 1)])
    w = torch.linalg.inv(K) @ torch.cat([-q, b])
    x = w[:n]
    return x, w[n:], 0.5 * x @ Q @ x + q @ x


def equalities(Q, q, A, b, **options):
    z = solve_qp(Q, q, A, b, **options)
    return z.x, z.equality_dual, z.value


def boxed(Q, q, low, high, **options):
    z = solve_qp(Q, q, low=low, high=high, **options)
    return z.x, z.bound_dual, z.value


def box_example(g):
    M = torch.randn(3, 3, generator=g, dtype=D)
    low = -0.1 - torch.rand(3, generator=g, dtype=D)
    return M @ M.mT + torch.eye(3, dtype=D), 3 * torch.randn(3, generator=g, dtype=D), low, -low


TAKES = {
    "check_trees": "solve_qp takes tensors, not pytrees",
    "check_zero_dimensions": "a program has no 0-d data",
    "check_captured": "solve_qp takes no function",
}
MORE = dict.fromkeys(("check_guess", "check_module", "check_memory"), "seen with the first case")
CASES = [
    Case(
        "equalities-and-inequalities", both, lambda g: random_program(g, 4, 1, 4), shared=(0, 2, 4), spoil=pinched,
        status=lambda *t: solve_qp(*t).codes, guess=from_guess, module=learnt, lacks=TAKES, atol=1e-9,
    ),
    Case(
        "equalities", equalities, lambda g: random_program(g, 4, 2, 3)[:4], exact=inverted, shared=(0, 2),
        lacks={**TAKES, **MORE}, atol=1e-9,
    ),
    Case("bounds", boxed, box_example, shared=(0, 2, 3), lacks={**TAKES, **MORE}, atol=1e-9),
]  # fmt: skip


@pytest.mark.parametrize(("case", "law"), duties(CASES))
def test_duty(case, law, generator):
    law(case, generator)


def test_gradients_equal_the_formulas(generator):
    items = [random_program(generator, 5, 2, 6) for _ in range(3)]
    theta = [torch.stack(column).requires_grad_() for column in zip(*items, strict=True)]
    z = solve_qp(*theta)
    v = torch.randn(3, 5, generator=generator, dtype=D)
    found = torch.autograd.grad(z.x, theta, v)
    Q, _, A, _, G, _ = (t.detach() for t in theta)
    for i in range(3):
        active = z.inequality_dual[i] > 1e-6
        C = torch.cat([A[i], G[i][active]])
        K = torch.cat([torch.cat([Q[i], C.mT], 1), torch.cat([C, torch.zeros(len(C), len(C), dtype=D)], 1)])
        w = -torch.linalg.solve(K, torch.cat([v[i], torch.zeros(len(C), dtype=D)]))
        dz, dnu, dlam = w[:5], w[5:7], torch.zeros(6, dtype=D).masked_scatter(active, w[7:])
        x, nu, lam = (t[i].detach() for t in (z.x, z.equality_dual, z.inequality_dual))
        wanted = (
            (torch.outer(dz, x) + torch.outer(x, dz)) / 2, dz,
            torch.outer(dnu, x) + torch.outer(nu, dz), -dnu,
            torch.outer(dlam, x) + torch.outer(lam, dz), -dlam,
        )  # fmt: skip
        agree(tuple(f[i] for f in found), wanted, 1e-11)


def test_the_value_needs_no_solve_and_is_the_lagrangians(generator):
    theta = [t.requires_grad_() for t in random_program(generator, 4, 1, 4)]
    monitor = Monitor()
    z = solve_qp(*theta, monitor=monitor)
    found = torch.autograd.grad(z.value, theta)
    assert [record.kind for record in monitor.records] == ["point"]
    x, nu, lam = (t.detach() for t in outputs(z)[:3])
    wanted = (torch.outer(x, x) / 2, x, torch.outer(nu, x), -nu, torch.outer(lam, x), -lam)
    agree(found, wanted, 1e-12)


def test_a_failed_item_raises_only_where_it_is_asked_for(generator):
    good, bad = random_program(generator, 3, 1, 3), pinched(random_program(generator, 3, 1, 3))
    theta = [torch.stack(pair).requires_grad_() for pair in zip(good, bad, strict=True)]
    z = solve_qp(*theta)
    assert [s.name for s in z.status] == ["CONVERGED", "INFEASIBLE"]
    found = torch.autograd.grad(z.x[0].sum() + z.value[0], theta, retain_graph=True)
    assert all(f.isfinite().all() and (f[1] == 0).all() for f in found)
    with pytest.raises(SolverError, match="INFEASIBLE"):
        torch.autograd.grad(z.x.sum(), theta)


def test_a_record_changes_no_gradient(generator):
    items = [random_program(generator, 5, 2, 6) for _ in range(3)]
    theta = [torch.stack(column).requires_grad_() for column in zip(*items, strict=True)]
    v = torch.randn(3, 5, generator=generator, dtype=D)
    monitor = Monitor()
    measured = torch.autograd.grad(solve_qp(*theta, monitor=monitor).x, theta, v)
    plain = torch.autograd.grad(solve_qp(*theta).x, theta, v)
    assert monitor.converged and monitor.last("adjoint").error.shape == (3,)
    assert all(torch.equal(a, b) for a, b in zip(measured, plain, strict=True))


def test_gradients_of_some_matrices_are_those_of_all(generator):
    items = [random_program(generator, 5, 2, 6) for _ in range(3)]
    theta = [torch.stack(column) for column in zip(*items, strict=True)]
    every = [t.clone().requires_grad_() for t in theta]
    whole = torch.autograd.grad(solve_qp(*every).x.sin().sum(), every)
    assert torch.equal(whole[0], whole[0].mT)
    for k in (0, 2, 4):
        some = [t.clone().requires_grad_(i == k) for i, t in enumerate(theta)]
        (found,) = torch.autograd.grad(solve_qp(*some).x.sin().sum(), some[k])
        agree(found, whole[k], 1e-13)


@pytest.mark.parametrize("wrong", [torch.inf, torch.nan])
def test_a_cotangent_that_is_no_number_is_named(wrong, generator):
    """Also where no active row would see it."""
    theta = [t.requires_grad_() for t in random_program(generator, 4, 1, 4)]
    z = solve_qp(*theta)
    v = torch.zeros(4, dtype=D)
    v[z.inequality_dual.detach().argmin()] = wrong
    assert z.inequality_dual.min() == 0
    with pytest.raises(SolverError, match="NON_FINITE"):
        torch.autograd.grad(z.inequality_dual, theta, v)


def test_bounds_are_rows_of_both_signs(generator):
    Q, q, low, high = box_example(generator)
    eye = torch.eye(3, dtype=D)
    z = solve_qp(Q, q, low=low, high=high)
    rows = solve_qp(Q, q, G=torch.cat([eye, -eye]), h=torch.cat([high, -low]))
    agree(z.x, rows.x, 1e-12)
    agree(z.bound_dual, rows.inequality_dual[:3] - rows.inequality_dual[3:], 1e-12)
    agree(Q @ z.x + q + z.bound_dual, torch.zeros(3, dtype=D), 1e-12)


def test_an_absent_limit_has_gradient_zero():
    h = torch.tensor([1.0, torch.inf], dtype=D, requires_grad=True)
    high = torch.tensor([torch.inf, 0.5], dtype=D, requires_grad=True)
    q = -torch.tensor([3.0, 2.0], dtype=D)
    z = solve_qp(torch.eye(2, dtype=D), q, G=torch.eye(2, dtype=D), h=h, high=high)
    agree(z.x.detach(), torch.tensor([1.0, 0.5], dtype=D), 1e-12)
    found = torch.autograd.grad(z.x.sum() + z.value, (h, high))
    agree(found, (torch.tensor([-1.0, 0.0], dtype=D), torch.tensor([0.0, -0.5], dtype=D)), 1e-12)


@pytest.mark.parametrize("policy", ["strong", "active", "mean"])
def test_an_absent_limit_is_never_weakly_active(policy):
    """However large the unit is in which slacks are measured."""
    h = torch.tensor([1e9, torch.inf], dtype=D, requires_grad=True)
    q = torch.tensor([-2e9, 1.0], dtype=D)
    z = solve_qp(torch.eye(2, dtype=D), q, G=torch.eye(2, dtype=D), h=h, degenerate=policy)
    assert (z.weakly_active, z.deficient) == (0, False)
    (found,) = torch.autograd.grad(z.x.sum() + z.value + z.inequality_dual.sum(), h)
    agree(found, torch.tensor([1.0 - 1e9 - 1.0, 0.0], dtype=D), 1e-12 * 1e9)


def test_no_graph_without_grad_and_inference_mode(generator):
    theta = [t.requires_grad_() for t in random_program(generator, 3, 1, 3)]
    with torch.no_grad():
        assert not solve_qp(*theta).x.requires_grad
    with torch.inference_mode():
        agree(solve_qp(*theta).x, solve_qp(*(t.detach() for t in theta)).x, 1e-12)


def test_float32_is_solved_in_float64_and_rounded(generator):
    theta = random_program(generator, 6, 2, 8)
    narrow = [t.float().requires_grad_() for t in theta]
    z = solve_qp(*narrow)
    wide = [t.detach().double().requires_grad_() for t in narrow]
    truth = solve_qp(*wide)
    assert z.x.dtype == z.value.dtype == torch.float32
    assert float((z.x - truth.x).detach().abs().max()) < 1e-6
    for a, b in zip(torch.autograd.grad(z.x.sum(), narrow), torch.autograd.grad(truth.x.sum(), wide), strict=True):
        assert float((a - b).abs().max()) < 1e-5 * max(1.0, float(b.abs().max()))


def test_layer_refuses_what_it_does_not_have():
    with pytest.raises(TypeError, match="QPLayer: h must be"):
        QPLayer(h=1.0)
    with pytest.raises(ValueError, match="Q is neither held"):
        QPLayer()(q=torch.ones(2))
    layer = constrained.QPLayer(Q=torch.eye(2), q=torch.ones(2), low=0.0)
    assert layer(warm_start=layer()).status == Status.CONVERGED
