"""argmin: known answers, the true Hessian, and what it refuses."""

import pytest
import torch
from sklearn.datasets import make_regression

from nestopt import implicit
from nestopt.linalg import CG, LU, Cholesky, SolverError, Status

D = torch.float64
SOLVERS = [None, LU(), CG(), Cholesky()]


@pytest.mark.parametrize("solver", SOLVERS)
def test_ridge(solver):
    X, t = (torch.as_tensor(a, dtype=D) for a in make_regression(10, 3, random_state=0))

    def objective(w, lam):
        return ((X @ w - t) ** 2).mean() / 2 + lam / 2 * (w @ w)

    lam = torch.tensor(5.0, dtype=D, requires_grad=True)
    w = torch.linalg.solve(X.mT @ X / 10 + 5 * torch.eye(3, dtype=D), X.mT @ t / 10)
    assert w.tolist() == pytest.approx([16.51390727, 8.20625411, 23.62360791], abs=1e-8)
    w = implicit.argmin(objective, w, lam, solver=solver)
    slope = torch.stack([torch.autograd.grad(w[i], lam, retain_graph=True)[0] for i in range(3)])
    assert slope.tolist() == pytest.approx([-2.50171644, -1.26718286, -3.54263662], abs=1e-8)


@pytest.mark.parametrize("solver", SOLVERS)
def test_curved_residuals_need_the_true_hessian(solver):
    """Where the residual is curved and not zero, Gauss-Newton's matrix is another one, and biases the derivative."""
    # r(x) = x^2 - a, objective (r^2 + (x - 3)^2) / 2 at a residual that is not zero
    b = torch.tensor(2.0, dtype=D, requires_grad=True)

    def objective(x, b):
        return ((x * x - b) ** 2 + (x - 3) ** 2) / 2

    x = torch.tensor(1.5, dtype=D)
    for _ in range(50):  # Newton
        x = x - (2 * x**3 - 2 * b.detach() * x + x - 3) / (6 * x * x - 2 * b.detach() + 1)
    true = 2 * x / (6 * x * x - 2 * 2 + 1)
    gauss_newton = 2 * x / (4 * x * x + 1)
    found = torch.autograd.grad(implicit.argmin(objective, x, b, solver=solver), b)[0]
    assert float(found) == pytest.approx(float(true), abs=1e-12)
    assert abs(float(gauss_newton - true)) > 0.01


@pytest.mark.parametrize("gap", [1e-3, 1e-6, -1e-9])
def test_a_quartic_whose_derivative_is_one(gap):
    """err = (a - x)^2, objective err^2 / 2, x = a - gap: as near as a solver gets to a minimiser that is degenerate.

    With the true Hessian 6 gap^2, dx/da = 6 gap^2 / 6 gap^2 = 1; Gauss-Newton's (d err/dx)^2 = 4 gap^2 says 1.5.
    """
    a = torch.tensor(0.7, dtype=D, requires_grad=True)
    x = implicit.argmin(lambda x, a: ((a - x) ** 2) ** 2 / 2, a.detach() - gap, a, rtol=1e-2)
    (found,) = torch.autograd.grad(x, a)
    assert float(found) == pytest.approx(1.0, abs=1e-8)
    d = a.detach() - x.detach()
    assert float(6 * d**2 / (-2 * d) ** 2) == pytest.approx(1.5, abs=1e-8)


def test_a_degenerate_minimiser_is_named():
    """At x = a itself the Hessian is zero, and says nothing of how x moves."""
    a = torch.tensor(0.7, dtype=D, requires_grad=True)
    monitor = implicit.Monitor()
    x = implicit.argmin(lambda x, a: (a - x) ** 4, a.detach().clone(), a, monitor=monitor)
    with pytest.raises(SolverError, match="SINGULAR"):
        torch.autograd.grad(x, a)
    assert monitor.last("adjoint").status is Status.SINGULAR


def test_a_saddle_is_differentiated_by_lu_and_named_by_cg():
    a = torch.tensor(1.0, dtype=D, requires_grad=True)
    y = torch.tensor([1.0, 1.0], dtype=D)

    def saddle(y, a):
        return (y[0] - a) ** 2 - 2 * (y[1] - a * a) ** 2

    found = [float(torch.autograd.grad(implicit.argmin(saddle, y, a)[i], a)[0]) for i in range(2)]
    assert found == pytest.approx([1.0, 2.0], abs=1e-12)
    with pytest.raises(SolverError, match=r"implicit.argmin: the adjoint system.*NEGATIVE_CURVATURE"):
        implicit.argmin(saddle, y, a, solver=CG())[1].backward()


def test_one_objective_an_item(generator):
    Q = torch.rand(5, 3, generator=generator, dtype=D) + 0.5
    c = torch.randn(5, 3, generator=generator, dtype=D).requires_grad_()

    def objective(y, c):
        return (Q * (y - c) ** 2).sum(-1)

    monitor = implicit.Monitor()
    y = implicit.argmin(objective, c.detach(), c, batch_dims=1, solver=CG(), monitor=monitor)
    assert torch.allclose(torch.autograd.grad((y**2).sum(), c)[0], 2 * c, atol=1e-9)
    assert monitor.last("adjoint").residual_norm.shape == (5,)
    with pytest.raises(ValueError, match=r"one value an item, of shape \(5,\)"):
        implicit.argmin(lambda y, c: objective(y, c).sum(), c.detach(), c, batch_dims=1)


def test_bad_objectives_are_named():
    y, a = torch.ones(3, dtype=D), torch.ones(3, dtype=D, requires_grad=True)
    with pytest.raises(ValueError, match=r"objective must return a scalar, but it returned a tensor of shape \(3,\)"):
        implicit.argmin(lambda y, a: (y - a) ** 2, y, a)
    with pytest.raises(TypeError, match="floating tensor, but it returned float"):
        implicit.argmin(lambda y, a: 1.0, y, a)
    with pytest.raises(TypeError, match=r"floating tensor, but it returned torch\.int64"):
        implicit.argmin(lambda y, a: torch.tensor(1), y, a)
    with pytest.raises(SolverError, match="y is not a stationary point of objective"):
        implicit.argmin(lambda y, a: ((y - 2 * a) ** 2).sum(), y, a)
    with pytest.raises(ValueError, match=r"no path from theta\[0\]"):  # separable: the minimiser does not move
        implicit.argmin(lambda y, a: ((y - 1) ** 2).sum() + a.sum(), y, a)


def test_linear_objective_is_singular():
    y, a = torch.zeros(2, dtype=D), torch.zeros(2, dtype=D, requires_grad=True)
    with pytest.raises(SolverError, match="SINGULAR"):
        implicit.argmin(lambda y, a: (a * y).sum(), y, a).sum().backward()
