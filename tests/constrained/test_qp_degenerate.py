"""Kinks and dependent rows: the policies' formulas, counts of weakly active rows, minimum norm."""

import math

import pytest
import torch
from laws_layer import agree
from torch.func import jacfwd, jacrev, jvp, vmap

from nestopt.constrained import solve_qp
from nestopt.linalg import SolverError, Status

D = torch.float64
MU = 1e-6


def kink(t, policy):
    """min (x - t)^2/2, x <= 0."""
    one = torch.ones(1, 1, dtype=D)
    return solve_qp(one, -t[..., None], G=one, h=torch.zeros(1, dtype=D), degenerate=policy, smoothing=MU)


def smooth(t):
    return (1 - t / math.sqrt(t * t + 4 * MU)) / 2


FORMULAS = {
    "strong": {-1e-3: 1.0, 0.0: 1.0, 1e-3: 0.0},
    "active": {-1e-3: 1.0, 0.0: 0.0, 1e-3: 0.0},
    "mean": {-1e-3: 1.0, 0.0: 0.5, 1e-3: 0.0},
    "smoothed": {t: smooth(t) for t in (-1e-3, 0.0, 1e-3)},
}


@pytest.mark.parametrize("policy", FORMULAS)
def test_the_derivative_at_a_kink_is_the_policys(policy):
    t = torch.tensor(list(FORMULAS[policy]), dtype=D, requires_grad=True)
    z = kink(t, policy)
    assert z.weakly_active.tolist() == [0, 1, 0]
    agree(z.x[:, 0].detach(), t.detach().clamp_max(0), 1e-12)  # the solution is exact under every policy
    (found,) = torch.autograd.grad(z.x.sum(), t)
    wanted = torch.tensor(list(FORMULAS[policy].values()), dtype=D)
    agree(found, wanted, 1e-8)
    agree(jacfwd(lambda t: kink(t, policy).x[:, 0])(t.detach()).diagonal(), wanted, 1e-8)
    agree(vmap(jacrev(lambda t: kink(t, policy).x[0]))(t.detach()), wanted, 1e-8)


def test_the_smoothed_second_derivative_is_its_formulas():
    t = torch.tensor([-1e-3, 0.0, 2e-3], dtype=D, requires_grad=True)
    (first,) = torch.autograd.grad(kink(t, "smoothed").x.sum(), t, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), t)
    wanted = -2 * MU / (t.detach().square() + 4 * MU) ** 1.5
    assert float((second / wanted - 1).abs().max()) < 1e-6


def test_the_smoothed_derivative_of_duals_and_matrices(generator):
    M = torch.randn(4, 4, generator=generator, dtype=D)
    data = [
        M @ M.mT + torch.eye(4, dtype=D), torch.randn(4, generator=generator, dtype=D),
        torch.randn(1, 4, generator=generator, dtype=D), torch.zeros(1, dtype=D),
        torch.randn(3, 4, generator=generator, dtype=D), torch.tensor([0.0, 1.0, torch.inf], dtype=D),
    ]  # fmt: skip
    both = [
        torch.autograd.grad(
            (z := solve_qp(*leaves, degenerate=policy, smoothing=1e-10)).x.sum() + z.inequality_dual.sum(), leaves
        )
        for policy in ("strong", "smoothed")
        for leaves in [[t.clone().requires_grad_() for t in data]]
    ]
    agree(*both, 1e-6)  # away from kinks the path's derivative tends to the solution's


def test_duplicated_equalities_have_minimum_norm_duals_and_say_so():
    eye, q = torch.eye(2, dtype=D), torch.tensor([1.0, 0.0], dtype=D, requires_grad=True)
    one = torch.ones(2, 2, dtype=D)
    z = solve_qp(eye, q, one, torch.ones(2, dtype=D))
    assert z.deficient
    assert z.status == Status.CONVERGED
    agree(z.equality_dual.detach(), torch.full((2,), -0.5, dtype=D), 1e-8)
    single = solve_qp(eye, q, one[:1], torch.ones(1, dtype=D))
    assert not single.deficient
    agree(torch.autograd.grad(z.x[0], q)[0], torch.autograd.grad(single.x[0], q)[0], 1e-8)


def test_duplicated_inequalities_share_their_dual():
    g = torch.tensor([[1.0, 1.0], [1.0, 1.0], [2.0, 2.0]], dtype=D)
    h = torch.tensor([-2.0, -2.0, -4.0], dtype=D, requires_grad=True)
    z = solve_qp(torch.eye(2, dtype=D), torch.zeros(2, dtype=D), G=g, h=h)
    assert z.deficient
    agree(z.x.detach(), -torch.ones(2, dtype=D), 1e-10)
    agree((g.mT @ z.inequality_dual.detach()), torch.ones(2, dtype=D), 1e-8)
    (found,) = torch.autograd.grad(z.x.sum(), h)
    assert float((found * torch.tensor([1.0, 1.0, 2.0], dtype=D)).sum()) == pytest.approx(
        1.0, abs=1e-6
    )  # one plane moves


def test_a_vertex_of_too_many_rows_is_solved(generator):
    x = torch.randn(6, 3, 1, generator=generator, dtype=D)
    G = torch.randn(6, 8, 3, generator=generator, dtype=D)
    h = (G @ x)[..., 0]
    q = -(G.mT @ torch.rand(6, 8, 1, generator=generator, dtype=D))[..., 0] - x[..., 0]
    z = solve_qp(torch.eye(3, dtype=D), q, G=G, h=h)  # all eight rows meet at x, which is optimal
    assert z.converged.all()
    agree(z.x, x[..., 0], 1e-7)


def test_fixed_variables():
    low = torch.tensor([0.5, -1.0], dtype=D)
    z = solve_qp(
        torch.eye(2, dtype=D), torch.tensor([3.0, 0.2], dtype=D), low=low, high=torch.tensor([0.5, 1.0], dtype=D)
    )
    assert z.status == Status.CONVERGED
    agree(z.x, torch.tensor([0.5, -0.2], dtype=D), 1e-12)
    assert z.bound_dual is not None
    agree(z.bound_dual, torch.tensor([-3.5, 0.0], dtype=D), 1e-10)


def failing():
    """Three items of which the second has no solution, with a shared Q, and their leaves."""
    h = torch.zeros(3, 2, dtype=D)
    h[1, 0] = -torch.inf
    q = torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.0, 1.0]], dtype=D)
    return [t.requires_grad_() for t in (torch.eye(2, dtype=D), q, torch.eye(2, dtype=D), h)]


def solved(Q, q, G, h, policy, on_failure="raise"):
    return solve_qp(Q, q, G=G, h=h, degenerate=policy, on_failure=on_failure)


@pytest.mark.parametrize("policy", FORMULAS)
@pytest.mark.parametrize("on_failure", ["raise", "warn", "nan"])
@pytest.mark.filterwarnings("ignore::nestopt.implicit.ImplicitWarning")
def test_every_policy_treats_failed_items_alike(policy, on_failure):
    leaves = failing()
    z = solved(*leaves, policy, on_failure)  # the forward call raises for no item
    assert [s.name for s in z.status] == ["CONVERGED", "INFEASIBLE", "CONVERGED"]
    good = torch.autograd.grad(z.x[[0, 2]].sum(), leaves, retain_graph=True)
    keep = [leaves[0], *(t[[0, 2]] if t.ndim > 1 and len(t) == 3 else t for t in leaves[1:])]
    alone = torch.autograd.grad(solved(*keep, policy).x.sum(), leaves)
    agree(good, alone, 1e-12)
    Q, q, G, h = (t.detach() for t in leaves)
    if on_failure == "raise":
        with pytest.raises(SolverError, match="INFEASIBLE"):
            torch.autograd.grad(z.x.sum(), leaves)
        with pytest.raises(SolverError, match="INFEASIBLE"):
            jvp(lambda q: solved(Q, q, G, h, policy).x, (q,), (torch.ones_like(q),))
        return
    bad = torch.autograd.grad(z.x.sum(), leaves)
    assert bad[0].isnan().all()
    assert bad[1][1].isnan().all()
    agree(bad[1][[0, 2]], good[1][[0, 2]], 1e-12)


def test_a_central_point_that_has_no_derivative_is_a_failure_of_the_derivative_alone():
    q, one = torch.tensor([1.0, 0.0], dtype=D, requires_grad=True), torch.ones(2, 2, dtype=D)
    z = solve_qp(torch.eye(2, dtype=D), q, one, torch.ones(2, dtype=D), low=-5.0, degenerate="smoothed")
    assert z.status == Status.CONVERGED
    agree(z.x.detach(), torch.tensor([0.0, 1.0], dtype=D), 1e-10)
    with pytest.raises(SolverError, match="smoothed"):
        torch.autograd.grad(z.x[0], q)
