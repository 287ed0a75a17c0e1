"""Other solvers behind solve_qp: the same answers, certificates and derivatives; a missing package is named."""

import sys

import pytest
import torch
from laws_layer import agree

from nestopt.constrained import OSQP, Moreau, ProxQP, solve_qp
from nestopt.linalg import Status

D = torch.float64
BACKENDS = {"proxsuite": ProxQP(), "osqp": OSQP(), "moreau": Moreau()}


def program(g, batch=3, n=5, p=2, m=6):
    M, A, G, x = (torch.randn(batch, *s, generator=g, dtype=D) for s in ((n, n), (p, n), (m, n), (n, 1)))
    h = (G @ x)[..., 0] + torch.rand(batch, m, generator=g, dtype=D)
    return M @ M.mT + torch.eye(n, dtype=D), 3 * torch.randn(batch, n, generator=g, dtype=D), A, (A @ x)[..., 0], G, h


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the packages' own
@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
@pytest.mark.parametrize("package", BACKENDS)
def test_same_answers_and_derivatives(package, generator):
    pytest.importorskip(package, reason=f"{package} is not installed")
    theta = [t.requires_grad_() for t in program(generator)]
    ours, z = solve_qp(*theta), solve_qp(*theta, backend=BACKENDS[package])
    assert z.converged.all()
    assert (z.iterations > 0).all()
    agree(z.x.detach(), ours.x.detach(), 1e-10)
    agree(z.inequality_dual.detach(), ours.inequality_dual.detach(), 1e-9)
    weights = z.x.detach().cos()
    agree(torch.autograd.grad(z.x, theta, weights), torch.autograd.grad(ours.x, theta, weights), 1e-9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
@pytest.mark.parametrize("package", BACKENDS)
def test_an_infeasible_program_is_infeasible(package):
    pytest.importorskip(package, reason=f"{package} is not installed")
    G, h = torch.tensor([[1.0], [-1.0]], dtype=D), torch.tensor([-1.0, -1.0], dtype=D)
    z = solve_qp(torch.ones(1, 1, dtype=D), torch.zeros(1, dtype=D), G=G, h=h, backend=BACKENDS[package])
    assert z.status == Status.INFEASIBLE
    assert z.x.isnan().all()


@pytest.mark.parametrize("package", BACKENDS)
def test_a_missing_package_is_named(package, monkeypatch, generator):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ImportError, match=f"{type(BACKENDS[package]).__name__}: the package {package} is not installed"
    ):
        solve_qp(*program(generator), backend=BACKENDS[package])
