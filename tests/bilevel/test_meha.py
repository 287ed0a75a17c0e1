"""MEHA: terms whose weights depend on x, and the mistakes of published scripts as fixed-point conditions."""

import pytest
import torch
from laws_bilevel import vector
from problems import DOUBLE, quadratic

from nestopt import bilevel, constrained
from nestopt.linalg import Stopping


def terms(x):
    """Each prox of the family, with weights that are functions of x, on six lower variables (a 3 x 2 matrix)."""
    w = x.exp()
    groups = [[0, 1], [2, 3], [4, 5]]
    return {
        "l1": constrained.L1(w[0]),
        "elastic net": constrained.ElasticNet(w[0], w[1]),
        "group": constrained.GroupLasso(groups, w[0]),
        "sparse group": constrained.SparseGroupLasso(groups, 0.5 * w[0], w[1]),
        "nuclear norm": constrained.NuclearNorm(w[0]),
    }


def learning(kind):
    g = torch.Generator().manual_seed(3)
    shape = (3, 2) if kind == "nuclear norm" else (6,)
    a, target = torch.randn(shape, generator=g, dtype=DOUBLE), torch.randn(shape, generator=g, dtype=DOUBLE)
    a, target = a + 3 * a.sign(), 2 * a.sign() + 0.3 * target
    scale = torch.linspace(1.0, 2.0, shape[-1], dtype=DOUBLE)
    return bilevel.Problem(
        lambda x, y: ((y - target) ** 2).sum() / 2 + 0.05 * (x**2).sum(),
        lambda x, y: (scale * (y - a) ** 2).sum() / 2,
        lower_prox=lambda x: terms(x)[kind],
    ), torch.zeros(shape, dtype=DOUBLE)


@pytest.mark.parametrize("kind", ["elastic net", "group", "sparse group", "nuclear norm"])
def test_weights_that_depend_on_x(kind):
    problem, y0 = learning(kind)
    x0 = torch.tensor([-1.0, -2.0], dtype=DOUBLE)
    res = bilevel.MEHA(stopping=Stopping(rtol=None, max_iter=20))(problem, x0, y0)
    assert res.converged, res.residuals

    def phi(x):
        y = constrained.ProximalGradient(terms(x)[kind], rtol=1e-13)(lambda v: problem.lower(x, v), res.y).x
        return float(problem.upper(x, y))

    for i in range(2):
        e = torch.zeros(2, dtype=DOUBLE)
        e[i] = 1e-4
        assert abs(phi(res.x + e) - phi(res.x - e)) / 2e-4 < 1e-4


def scalar():
    """F = (y - 1)^2 / 2 + (x - 2)^2 / 2, f = (y - x)^2 / 2: y* = x, x* = 3/2."""
    return (
        lambda x, y: ((y - 1) ** 2).sum() / 2 + ((x - 2) ** 2).sum() / 2,
        lambda x, y: ((y - x) ** 2).sum() / 2,
        torch.zeros(1, dtype=DOUBLE),
    )


@pytest.mark.slow
def test_f_is_divided_by_the_penalty_and_not_multiplied():
    """The fixed point of the published update: F / c leads to x*, c F to the minimiser of F over both variables."""
    F, f, zero = scalar()

    def fixed_point(weight, alpha, steps=1500):
        x, y, th, gamma = 0.0, 0.0, 0.0, 1.0
        for _ in range(steps):
            th = th - alpha * ((th - x) + (th - y) / gamma)
            x = x - alpha * (weight * (x - 2) + (x - y) - (x - th))
            y = y - alpha * (weight * (y - 1) + (y - x) - (y - th) / gamma)
        return x, y

    c = 30.0
    right, wrong = fixed_point(1 / c, 0.3), fixed_point(c, 0.02)
    assert abs(right[0] - 1.5) < 0.05
    assert abs(right[0] - right[1]) < 0.1
    assert abs(wrong[0] - 2) < 0.05  # y* = x is forgotten
    assert abs(wrong[1] - 1) < 0.05
    method = bilevel.MEHA(c, 1.0, 0.3, 0.3, 0.3, debias=None, stopping=Stopping(rtol=0.0, max_iter=600))
    res = method(bilevel.Problem(F, f), zero, zero.clone())
    assert abs(float(res.x) - right[0]) < 1e-3
    errors = []
    for c in (10.0, 100.0):  # the bias is of the order 1 / c
        res = bilevel.MEHA(c, 1.0, debias=None, stopping=Stopping(rtol=0.0, max_iter=400))(
            bilevel.Problem(F, f), zero, zero.clone()
        )
        errors.append(abs(float(res.x) - 1.5))
    assert errors[1] < 0.2 * errors[0]


def test_the_threshold_is_eta_and_not_its_square():
    """theta's fixed point is the prox of the Moreau problem for every eta; with eta^2 it depends on eta."""
    weight, a, gamma, y = 0.7, 2.0, 2.0, 1.5

    def fixed_point(eta, threshold):
        th = torch.zeros((), dtype=DOUBLE)
        for _ in range(300):
            v = th - eta * ((th - a) + (th - y) / gamma)
            th = v.sign() * (v.abs() - threshold * weight).clamp_min(0)
        return float(th)

    exact = (a + y / gamma - weight) / (1 + 1 / gamma)
    assert abs(fixed_point(0.1, 0.1) - exact) < 1e-12
    assert abs(fixed_point(0.1, 0.01) - exact) > 0.3
    problem = bilevel.Problem(
        lambda x, y: ((y - 1) ** 2).sum(),
        lambda x, v: ((v - a) ** 2).sum() / 2,
        lower_prox=lambda x: constrained.L1(x),
    )
    # x is held by a tiny alpha, and c is huge: y and theta come to the lower solution a - weight
    method = bilevel.MEHA(1e6, gamma, 1e-12, 0.3, 0.3, debias=None, stopping=Stopping(rtol=0.0, max_iter=300))
    start = torch.full((), weight, dtype=DOUBLE), torch.full((1,), y, dtype=DOUBLE)
    res = method(problem, *start)
    assert abs(float(res.y) - (a - weight)) < 1e-4
    assert abs(float(res.state.auxiliary) - (a - weight)) < 1e-4


def test_published_constants():
    method = bilevel.MEHA.published("sparse group lasso")
    assert (method.upper_step_size, method.lower_step_size, method.auxiliary_step_size) == (1e-4, 1e-3, 1e-3)
    assert method.penalty(0) == 1.0
    assert method.penalty(99) == pytest.approx(100**0.49)
    case = quadratic(3, 2)
    method = bilevel.MEHA.published("low-rank completion", max_iter=20)
    res = method(case.problem, case.x0, case.y0)
    assert res.iterations == 20
    assert bool(torch.isfinite(vector(res.x)).all())
