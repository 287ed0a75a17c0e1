"""fixed_point: known answers and models of some size."""

import pytest
import torch
from sklearn.datasets import make_regression

from nestopt import implicit
from nestopt.linalg import GMRES, LU

D = torch.float64


def test_cosine():
    theta = torch.zeros((), dtype=D, requires_grad=True)
    x = torch.tensor(0.7390851332151607, dtype=D)
    y = implicit.fixed_point(lambda x, theta: torch.cos(x) + theta, x, theta)
    (slope,) = torch.autograd.grad(y, theta, create_graph=True)
    assert slope.item() == pytest.approx(0.5975100456753034, abs=1e-12)
    curvature = -x.item() * slope.item() ** 3  # -cos(x) / (1 + sin(x))^3
    assert torch.autograd.grad(slope, theta)[0].item() == pytest.approx(curvature, abs=1e-12)


@pytest.mark.parametrize("solver", [None, LU(), GMRES(rtol=1e-12)])
def test_lasso_by_proximal_gradient(solver):
    X, t = (torch.as_tensor(a, dtype=D) for a in make_regression(10, 3, random_state=0))
    step = 0.5

    def T(w, lam):
        z = w - step * X.mT @ (X @ w - t) / len(t)
        return torch.sign(z) * torch.relu(z.abs() - step * lam)

    lam = torch.tensor(10.0, dtype=D, requires_grad=True)
    w = torch.zeros(3, dtype=D)
    for _ in range(500):
        w = T(w, lam.detach())
    assert w.tolist() == pytest.approx([62.16485194, 29.03583355, 88.27012188], abs=1e-8)
    w = implicit.fixed_point(T, w, lam, solver=solver)
    slope = torch.stack([torch.autograd.grad(w[i], lam, retain_graph=True)[0] for i in range(3)])
    assert slope.tolist() == pytest.approx([-0.6017178, -0.69149565, -0.6104686], abs=1e-8)


def test_a_map_that_does_not_contract(generator):
    """T has derivative -3 at its fixed point: what cannot be iterated can be differentiated."""
    a = torch.tensor(2.0, dtype=D, requires_grad=True)
    y = implicit.fixed_point(lambda y, a: a - 3 * y, torch.tensor(0.5, dtype=D), a)
    assert float(torch.autograd.grad(y, a)[0]) == pytest.approx(0.25, abs=1e-12)


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_an_equilibrium_model_equals_its_unrolled_self(generator, batch_dims):
    """A batch of states: as independent systems, or as one system of all of them."""
    W = 0.2 * torch.randn(6, 6, generator=generator, dtype=D)
    x = torch.randn(4, 6, generator=generator, dtype=D)

    def T(y, W, x):
        return torch.tanh(y @ W.mT) + x

    def unrolled(W, x):
        y = torch.zeros_like(x)
        for _ in range(80):
            y = T(y, W, x)
        return y

    def layer(W, x):
        return implicit.fixed_point(
            T, unrolled(W.detach(), x.detach()), W, x, batch_dims=batch_dims, solver=GMRES(1e-12)
        )

    inputs = W.clone().requires_grad_(), x.clone().requires_grad_()
    for ours, truth in zip(
        torch.autograd.grad((layer(*inputs) ** 2).sum(), inputs),
        torch.autograd.grad((unrolled(*inputs) ** 2).sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(ours, truth, atol=1e-10)


def test_bad_maps_are_named():
    y, a = torch.ones(2, dtype=D), torch.ones(2, dtype=D, requires_grad=True)
    with pytest.raises(ValueError, match=r"implicit.fixed_point: T\(y\) must have the shape of y"):
        implicit.fixed_point(lambda y, a: a[None], y, a)
    with pytest.raises(RuntimeError, match="y is not a fixed point of T"):
        implicit.fixed_point(lambda y, a: a + 1, y, a)
