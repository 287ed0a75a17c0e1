"""Certificates, failures, batches of systems: what is measured, per item, and what a bad item does."""

import math
import pickle

import pytest
import torch
from torch.func import grad, vmap

from nestopt import implicit
from nestopt.linalg import CG, GMRES, LU, SolverError, Status

D = torch.float64
SOLVERS = [(LU(), False), (GMRES(), False), (CG(), True)]


def square(y, a):
    return y * y - a


def leaf(*values):
    return torch.tensor(values, dtype=D, requires_grad=True)


@pytest.mark.parametrize(("solver", "symmetric"), SOLVERS)
@pytest.mark.parametrize("policy", ["raise", "warn", "nan"])
def test_one_bad_item_changes_no_other(solver, symmetric, policy):
    """Item 1 has a singular Jacobian, item 3 is NaN, item 4 is no root."""
    monitor = implicit.Monitor()
    y, a = torch.tensor([2.0, 0.0, 3.0, torch.nan, 5.0], dtype=D), leaf(4.0, 0.0, 9.0, 1.0, 1.0)

    def layer(keep):
        a_kept = a[keep]
        return implicit.root(
            square, y[keep], a_kept, batch_dims=1, solver=solver, symmetric=symmetric, on_failure=policy,
            monitor=monitor,
        )  # fmt: skip

    every, roots = torch.arange(5), torch.arange(3)
    if policy == "raise":
        with pytest.raises(SolverError, match=r"not a root of residual.*1 of 5 NON_FINITE, 1 of 5 NOT_STATIONARY"):
            layer(every)
        root = layer(roots)
        with pytest.raises(SolverError, match=r"implicit.root: the adjoint system.*1 of 3 SINGULAR"):
            root.sum().backward()
        return
    if policy == "warn":
        with pytest.warns(implicit.ImplicitWarning, match="y is not a root"):
            root = layer(every)
        with pytest.warns(implicit.ImplicitWarning, match="adjoint system"):
            (found,) = torch.autograd.grad(root.sum(), a)
        assert root[4] == 5.0
        assert found[4].item() == pytest.approx(0.1)  # the derivative at what was given, certified as no root
    else:
        root = layer(every)
        (found,) = torch.autograd.grad(root.sum(), a)
        assert root[4].isnan()
        assert found[4].isnan()
    assert found[[0, 2]].tolist() == pytest.approx([1 / 4, 1 / 6], abs=1e-12)
    assert found[[1, 3]].isnan().all()  # never zeros
    point, adjoint = monitor.last("point"), monitor.last("adjoint")
    converged, non_finite = Status.CONVERGED, Status.NON_FINITE
    assert list(point.status) == [converged, converged, converged, non_finite, Status.NOT_STATIONARY]
    assert adjoint.status[1] == Status.SINGULAR
    assert adjoint.status[3] == non_finite
    assert (adjoint.status[0], adjoint.status[2]) == (converged, converged)
    assert not monitor.converged


@pytest.mark.parametrize(("solver", "symmetric"), SOLVERS)
def test_one_bad_item_under_vmap(solver, symmetric):
    monitor = implicit.Monitor()
    y, a = torch.tensor([2.0, 0.0, 3.0], dtype=D), torch.tensor([4.0, 0.0, 9.0], dtype=D)

    def slope(y, a):
        return grad(
            lambda a: implicit.root(
                square, y, a, solver=solver, symmetric=symmetric, on_failure="nan", monitor=monitor
            )
        )(a)  # fmt: skip

    found = vmap(slope)(y, a)
    assert found[[0, 2]].tolist() == pytest.approx([1 / 4, 1 / 6], abs=1e-12)
    assert found[1].isnan()
    assert [status.name for status in monitor.last("adjoint").status] == ["CONVERGED", "SINGULAR", "CONVERGED"]


def test_a_nan_cotangent_is_named():
    a = leaf(4.0)
    y = implicit.root(square, a.detach().sqrt(), a)
    with pytest.raises(SolverError, match="NON_FINITE"):
        torch.autograd.grad(y, a, torch.full_like(y, torch.nan))


def test_warn_never_returns_the_zero_that_a_solver_began_with():
    """CG meets a negative curvature at its first step: its iterate is zero, which is no derivative."""
    a = leaf(1.0, 1.0)
    y = implicit.argmin(lambda y, a: -((y - a) ** 2).sum(), a.detach(), a, solver=CG(), on_failure="warn")
    with pytest.warns(implicit.ImplicitWarning, match="NEGATIVE_CURVATURE"):
        (found,) = torch.autograd.grad(y.sum(), a)
    assert found.isnan().all()


def test_warn_returns_the_best_estimate():
    d = torch.linspace(1, 100, 50, dtype=D)
    a = torch.ones(50, dtype=D, requires_grad=True)
    monitor = implicit.Monitor()
    y = implicit.root(
        lambda y, a: d * y - a, a.detach() / d, a, solver=CG(max_iter=10), symmetric=True, on_failure="warn",
        monitor=monitor,
    )  # fmt: skip
    with pytest.warns(implicit.ImplicitWarning, match="MAX_ITER"):
        (found,) = torch.autograd.grad(y.sum(), a)
    record = monitor.last("adjoint")
    true = torch.linalg.vector_norm(d * found - 1)
    assert 1e-6 < record.residual_norm == pytest.approx(true.item(), rel=1e-6)
    assert record.residual_norm < math.sqrt(50)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("solver", [LU(), GMRES()])
def test_being_a_root_does_not_depend_on_the_residual_s_scale(scale, solver):
    a, y = leaf(4.0, 9.0), torch.tensor([2.0, 3.0], dtype=D)

    def residual(y, a):
        return scale * (y * y - a)

    monitor = implicit.Monitor()
    implicit.root(residual, y * (1 + 1e-6), a, solver=solver, monitor=monitor)
    assert monitor.last("point").error == pytest.approx(1e-6 * math.sqrt(13), rel=0.3)
    with pytest.raises(SolverError, match=r"y is not a root of residual to rtol=1\.2e-04"):
        implicit.root(residual, y * 1.01, a, solver=solver)
    assert implicit.root(residual, y * 1.01, a, solver=solver, rtol=0.1).requires_grad
    assert implicit.root(residual, y * 1.01, a, solver=solver, atol=1.0).requires_grad


def test_a_direct_solver_sees_the_distance_that_the_bound_underestimates():
    """Along a weak direction |R| is small although y is far; only the Newton step knows."""
    d, a = torch.tensor([1.0, 1e-8], dtype=D), leaf(1.0, 1e-8)
    y = torch.tensor([1.0 + 1e-9, 1.5], dtype=D)

    def residual(y, a):
        return d * y - a

    with pytest.raises(SolverError, match=r"error 5\.00e-01"):
        implicit.root(residual, y, a, solver=LU())
    monitor = implicit.Monitor()
    implicit.root(residual, y, a, solver=GMRES(), monitor=monitor)
    assert monitor.last("point").error <= 0.5  # a lower bound, as documented


def test_records_after_backward():
    monitor = implicit.Monitor(keep=3)
    a = leaf(4.0, 9.0)
    y = implicit.root(square, a.detach().sqrt(), a, monitor=monitor, batch_dims=1)
    (g,) = torch.autograd.grad(y.sum(), a, create_graph=True)
    assert [record.kind for record in monitor.records] == ["point", "adjoint"]
    assert all(record.residual_norm.shape == (2,) for record in monitor.records)
    g.sum().backward()
    assert [record.kind for record in monitor.records] == ["adjoint", "tangent", "adjoint"]
    assert monitor.converged
    assert monitor.last("point") is None
    assert "CONVERGED" in repr(monitor)
    monitor.clear()
    assert not monitor.records
    with pytest.raises(ValueError, match="keep must be at least 1"):
        implicit.Monitor(keep=0)


def test_items_take_their_own_iterations():
    """Under vmap the items are systems of one solve, each with its own count."""
    d = torch.stack([torch.ones(60, dtype=D), torch.linspace(1, 5, 60, dtype=D), torch.linspace(1, 500, 60, dtype=D)])
    b = torch.ones(60, dtype=D)
    monitor = implicit.Monitor()

    def slope(d):
        return grad(lambda d: implicit.argmin(lambda y, d: (d * y * y / 2 - y).sum(), 1 / d.detach(), d,
                                              solver=CG(rtol=1e-13), monitor=monitor).sum())(d)  # fmt: skip

    together = vmap(slope)(d)
    iterations = monitor.last("adjoint").iterations
    assert iterations[0] == 1
    assert iterations[0] < iterations[1] < iterations[2]
    assert torch.allclose(together, torch.stack([slope(row) for row in d]), atol=1e-10, rtol=0)
    assert torch.allclose(together, -b / d**2, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("solver", "symmetric"), SOLVERS)
def test_batch_dims_equal_a_loop_and_vmap(solver, symmetric, generator):
    """Two batch dimensions, leaves of several shapes, a shared parameter."""
    y = {
        "p": torch.rand(2, 3, generator=generator, dtype=D) + 1,
        "q": torch.rand(2, 3, 4, generator=generator, dtype=D) + 1,
    }
    shared = torch.rand((), generator=generator, dtype=D) + 1

    def residual(y, b, s):  # its Jacobian is symmetric
        mean = y["q"].mean(-1)
        return {"p": s * y["p"] ** 2 + mean - b["p"], "q": y["q"] ** 3 + y["p"][..., None] / 4 - b["q"]}

    b = residual(y, {"p": 0, "q": 0}, shared)
    leaves = [b["p"].requires_grad_(), b["q"].requires_grad_(), shared.requires_grad_()]

    def attached(y, p, q, s, **options):
        out = implicit.root(residual, y, {"p": p, "q": q}, s, solver=solver, symmetric=symmetric, **options)
        return (out["p"] ** 2).sum() + (out["q"] ** 3).sum()

    together = torch.autograd.grad(attached(y, *leaves, batch_dims=2), leaves)
    loop = [torch.zeros_like(t) for t in leaves]
    for i in range(2):
        for j in range(3):
            parts = [t if t.ndim == 0 else t[i, j] for t in leaves]
            found = torch.autograd.grad(attached({k: v[i, j] for k, v in y.items()}, *parts), leaves)
            loop = [total + g for total, g in zip(loop, found, strict=True)]
    mapped = vmap(vmap(attached, (0, 0, 0, None)), (0, 0, 0, None))(y, *leaves).sum()
    for ours, theirs, truth in zip(together, torch.autograd.grad(mapped, leaves), loop, strict=True):
        assert torch.allclose(ours, truth, atol=1e-9, rtol=0)
        assert torch.allclose(theirs, truth, atol=1e-9, rtol=0)


def test_vmap_over_a_batch(generator):
    """vmap outside, batch_dims inside."""
    a = torch.rand(3, 4, generator=generator, dtype=D) + 1

    def slope(a):
        return grad(lambda a: implicit.root(square, a.detach().sqrt(), a, batch_dims=1).sum())(a)

    assert torch.allclose(vmap(slope)(a), 0.5 / a.sqrt(), atol=1e-12, rtol=0)


def test_items_that_are_not_independent_are_refused():
    a = leaf(1.0, 2.0, 3.0)
    with pytest.raises(ValueError, match="independent systems, but in residual the first one"):
        implicit.root(lambda y, a: y - a + (y - y.mean()) - (a - a.mean()), a.detach(), a, batch_dims=1)
    with pytest.raises(ValueError, match="must begin with the same 1 dimensions"):
        implicit.root(lambda y, a: y, (torch.ones(2), torch.ones(3)), batch_dims=1)


def test_an_empty_batch():
    a = leaf(4.0)
    y = implicit.root(square, torch.zeros(0, 1, dtype=D), a, batch_dims=1)
    assert torch.autograd.grad(y.sum(), a)[0].tolist() == [0.0]


def test_warm_starts_save_steps_and_change_no_answer():
    d = torch.linspace(1, 50, 200, dtype=D)
    warm, monitor = implicit.WarmStart(), implicit.Monitor()

    def slope(shift, start):
        a = (torch.ones(200, dtype=D) + shift).requires_grad_()
        y = implicit.root(lambda y, a: d * y * y - a, (a.detach() / d).sqrt(), a, solver=CG(), symmetric=True,
                          monitor=monitor, warm_start=start)  # fmt: skip
        (found,) = torch.autograd.grad(y.sum(), a)
        assert torch.allclose(found, 0.5 / (d * a.detach()).sqrt(), atol=1e-9, rtol=0)
        return monitor.last("adjoint").iterations

    cold = slope(0.0, warm)
    assert slope(0.0, warm) == 0  # the very same system
    assert slope(1e-3, warm) < 0.8 * cold
    assert slope(1e-3, None) == pytest.approx(cold, abs=3)
    slope(torch.linspace(0, 9, 200, dtype=D), warm)  # a start that is of little use is not taken
    assert isinstance(pickle.loads(pickle.dumps(warm)), implicit.WarmStart)


def test_a_repeated_backward_pass_gives_the_same_bits():
    a = leaf(*range(1, 30))
    y = implicit.root(square, a.detach().sqrt(), a, solver=GMRES())
    first = torch.autograd.grad(y.sum(), a, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y.sum(), a)[0], first)
