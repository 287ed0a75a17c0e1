"""Every lower solver gives AID the same answer."""

import pytest
import torch
from laws_bilevel import check_method
from problems import DOUBLE, quadratic, sine

from nestopt import bilevel, implicit, linalg
from nestopt.linalg import Stopping

SOLVERS = {
    "newton": implicit.NewtonCG(), "lbfgs": implicit.LBFGS(), "spectral": implicit.GradientDescent(),
    "regularized": implicit.RegularizedNewton(), "regularized, CG": implicit.RegularizedNewton(dense_below=0),
    "lazy": implicit.LazyNewton(), "fosi": implicit.FOSI(rank=2),
}  # fmt: skip
each = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


@each
@pytest.mark.parametrize("case", [quadratic(5, 3), sine(2)], ids=lambda c: c.name)
def test_known_answers(solver, case):
    check_method(bilevel.AID(lower_solver=solver), case, 1e-7)


@pytest.mark.slow
def test_sophia_finds_the_answer():
    case = quadratic(5, 3)
    method = bilevel.AID(lower_solver=implicit.Sophia(momentum=0.8), stopping=Stopping(rtol=1e-6, max_iter=100))
    check_method(method, case, 1e-5)


@pytest.mark.parametrize("samples", [4, 20], ids=["dual", "primal"])
def test_gauss_newton_finds_the_answer_of_a_weighted_penalty(samples):
    """One penalty a weight: f = |A y - t|^2 / 2 + sum exp(x) y^2 / 2; the hypergradient by differentiating solve."""
    g = torch.Generator().manual_seed(0)
    A, t = torch.randn(samples, 9, generator=g, dtype=DOUBLE), torch.randn(samples, generator=g, dtype=DOUBLE)
    V, s = torch.randn(6, 9, generator=g, dtype=DOUBLE), torch.randn(6, generator=g, dtype=DOUBLE)

    def upper(x, y):
        return ((V @ y - s) ** 2).mean() + 0.1 * (x**2).sum()

    def lower(x, y):
        return (implicit.mark_outputs(A @ y - t) ** 2).sum() / 2 + (x.exp() * y**2).sum() / 2

    def exact(x):
        return upper(x, torch.linalg.solve(A.T @ A + torch.diag(x.exp()), A.T @ t))

    x0, y0 = torch.zeros(9, dtype=DOUBLE), torch.zeros(9, dtype=DOUBLE)
    problem = bilevel.Problem(upper, lower)
    res = bilevel.solve(problem, x0, y0, bilevel.AID(lower_solver=implicit.LevenbergMarquardt()))
    other = bilevel.solve(problem, x0, y0, bilevel.AID(linear_solver=linalg.Cholesky()))
    assert res.converged
    x = res.x.clone().requires_grad_()
    (true,) = torch.autograd.grad(exact(x), x)
    (first,) = torch.autograd.grad(exact(x0.requires_grad_()), x0)
    assert float(true.norm()) <= 1e-8 * float(first.norm())
    assert float((res.x - other.x).norm()) <= 1e-6 * float(other.x.norm())
    assert abs(float(res.value) - float(exact(res.x))) <= 1e-10
