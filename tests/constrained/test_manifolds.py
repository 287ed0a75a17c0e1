from __future__ import annotations

import math

import pytest
import torch
from laws_optim import check_derivatives
from torch import Tensor

from nestopt.constrained import Ball, Indicator, Set, Sphere, Stiefel

DOUBLE = torch.float64

# torch itself warns when forward mode is first used


def noise(*shape: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=DOUBLE).to(dtype)


SETS = {
    "sphere": (lambda dtype: Sphere(1.5), (3,)),
    "sphere elsewhere": (lambda dtype: Sphere(0.5, torch.ones(3, dtype=dtype)), (3,)),
    "frames": (lambda dtype: Stiefel(), (3, 2)),
    "rotations": (lambda dtype: Stiefel(), (2, 2)),
}


@pytest.mark.parametrize("name", SETS)
def test_laws_without_convexity(name: str, dtype: torch.dtype) -> None:
    make, shape = SETS[name]
    s, x = make(dtype), 2 * noise(12, *shape, dtype=dtype)
    dims, eps = s.space_dims, 100 * torch.finfo(dtype).eps
    assert not s.convex
    p = s.project(x)
    assert (p.shape, p.dtype) == (x.shape, dtype)
    assert bool(s.contains(p).all())
    # no other point of the set is nearer
    others = s.project(2 * noise(200, *shape, dtype=dtype))
    distances = (others.flatten(-dims)[None] - x.flatten(-dims)[:, None]).norm(dim=-1)
    assert bool((s.distance(x)[:, None] <= distances + eps).all())
    for one, projected in zip(x, p, strict=True):
        assert float((s.project(one) - projected).abs().max()) <= eps
    assert float((torch.func.vmap(s.project)(x) - p).abs().max()) <= eps
    poisoned = x.clone()
    poisoned[(0,) * (dims + 1)] = math.nan
    assert bool(s.project(poisoned)[0].isnan().all())
    assert torch.equal(s.project(poisoned)[1:], p[1:])
    D = s.jacobian(x).to_dense()
    assert float((D - D.mT).abs().max()) <= 10 * eps
    for mode in (torch.func.jacrev, torch.func.jacfwd):
        automatic = torch.func.vmap(mode(s.project))(x).reshape(D.shape)
        assert torch.allclose(automatic, D, rtol=10 * eps, atol=10 * eps)
    if dtype == DOUBLE:
        check_derivatives(s.project, x[:2], x[0])


def test_polar_factor() -> None:
    X = noise(5, 6, 3)
    values, V = torch.linalg.eigh(X.mT @ X)
    assert torch.allclose(Stiefel().project(X), X @ V @ torch.diag_embed(values.rsqrt()) @ V.mT, atol=1e-13)
    Q = torch.linalg.qr(noise(3, 3))[0]
    assert torch.allclose(Stiefel().project(7.0 * Q), Q, atol=1e-14)
    assert torch.allclose(Stiefel().project(1e9 * X), Stiefel().project(X), atol=1e-14)


def test_frames_at_repeated_singular_values() -> None:
    Q = torch.linalg.qr(noise(3, 3))[0][:, :2]
    check_derivatives(Stiefel().project, 2.0 * Q)
    x, c = (2.0 * Q).requires_grad_(), noise(3, 2)

    def gradient(z: Tensor) -> Tensor:
        return torch.autograd.grad((Stiefel().project(z) * c).sum(), z, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(gradient, x)


def test_sphere_in_its_own_tensors() -> None:
    radius, center = torch.tensor([1.5, 0.5], dtype=DOUBLE), noise(3)
    check_derivatives(lambda z, r, c: Sphere(r, c).project(z), (noise(2, 3), radius, center))
    x = torch.tensor([3e200, 4e200], dtype=DOUBLE)
    assert torch.allclose(Sphere().project(x), torch.tensor([0.6, 0.8], dtype=DOUBLE), rtol=1e-15)
    far = 9 * noise(4, 3)
    assert torch.allclose(Sphere(2.0).project(far), Ball(2.0).project(far))  # outside, it is the ball


@pytest.mark.parametrize(("s", "shape"), [(Sphere(), (2, 3)), (Stiefel(), (2, 3, 2))])
def test_where_no_point_is_nearest(s: Set, shape: tuple[int, ...]) -> None:
    x = noise(*shape)
    x[0] = 0.0
    x.requires_grad_()
    p = s.project(x)
    assert bool(p[0].isnan().all())
    assert bool(p[1].isfinite().all())
    (gradient,) = torch.autograd.grad(p[1].sum(), x)
    assert torch.equal(gradient[0], torch.zeros_like(x[0]))
    assert not bool(s.contains(x)[0])
    D = s.jacobian(x).to_dense()
    assert bool(D[0].isnan().any())
    assert bool(D[1].isfinite().all())


def test_indicator_of_a_manifold() -> None:
    g = Indicator(Sphere(2.0))
    assert not g.convex
    assert torch.allclose(g.prox(torch.tensor([0.0, 1.0])), torch.tensor([0.0, 2.0]))
    with pytest.raises(ValueError, match="convex"):
        g.conjugate_prox(torch.ones(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Sphere(0.0), "radius"),
        (lambda: Sphere().project(torch.zeros(())), "0-d"),
        (lambda: Sphere(1.0, torch.zeros(3)).project(torch.zeros(2)), "center"),
        (lambda: Stiefel().project(torch.zeros(2, 3)), r"pass x\.mT"),
        (lambda: Stiefel().project(torch.zeros(3)), r"\(\*batch, m, n\)"),
    ],
)
def test_bad_input_is_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
