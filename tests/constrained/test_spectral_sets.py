from __future__ import annotations

import math

import pytest
import torch
from laws_optim import check_derivatives, check_kink_of_projection, check_set
from torch import Tensor

from nestopt.constrained import L1Ball, NuclearBall, PSDCone, Set, SpectralBall

DOUBLE = torch.float64

# torch itself warns when forward mode is first used


def noise(*shape: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=DOUBLE).to(dtype)


def symmetric(values: list[float]) -> Tensor:
    Q = torch.linalg.qr(noise(len(values), len(values)))[0]
    return Q @ torch.diag(torch.tensor(values, dtype=DOUBLE)) @ Q.mT


def general(values: list[float], m: int, n: int) -> Tensor:
    U, V = (torch.linalg.qr(noise(k, k))[0] for k in (m, n))
    return U[:, : len(values)] @ torch.diag(torch.tensor(values, dtype=DOUBLE)) @ V[:, : len(values)].mT


SETS = {
    "psd": (PSDCone(), (2, 2)),
    "spectral": (SpectralBall(1.2), (2, 3)),
    "nuclear": (NuclearBall(2.0), (2, 2)),
}


@pytest.mark.parametrize("name", SETS)
def test_laws(name: str, dtype: torch.dtype) -> None:
    s, shape = SETS[name]
    x = 2 * noise(12, *shape, dtype=dtype)
    check_set(s, x, feasible=s.project(0.5 * x.flip(0)))


@pytest.mark.parametrize("s", [PSDCone(), SpectralBall(1.2), NuclearBall(2.0)])
@pytest.mark.parametrize("n", [1, 7])
def test_laws_in_other_dimensions(s: Set, n: int) -> None:
    check_set(s, 2 * noise(12, n, n, dtype=torch.float32))


def test_psd_against_the_eigendecomposition() -> None:
    X = noise(5, 8, 8)
    values, Q = torch.linalg.eigh((X + X.mT) / 2)
    assert torch.allclose(PSDCone().project(X), Q @ torch.diag_embed(values.clamp_min(0)) @ Q.mT, atol=1e-13)
    assert torch.equal(PSDCone().project(-torch.eye(3)), torch.zeros(3, 3))
    assert torch.allclose(PSDCone().project(torch.tensor([[0.0, 2.0], [0.0, 0.0]])), torch.full((2, 2), 0.5))


def test_balls_of_diagonal_matrices() -> None:
    d = torch.tensor([3.0, -0.5, 1.0], dtype=DOUBLE)
    assert torch.allclose(SpectralBall(0.8).project(torch.diag(d)), torch.diag(d.clamp(-0.8, 0.8)), atol=1e-15)
    assert torch.allclose(NuclearBall(2.5).project(torch.diag(d)), torch.diag(L1Ball(2.5).project(d)), atol=1e-15)
    x = general([0.5, 0.2], 2, 3)
    for s in (SpectralBall(0.8), NuclearBall(0.8)):
        assert torch.equal(s.project(x), x)


@pytest.mark.parametrize(
    "x", [torch.diag(torch.tensor([2.0, 2.0, -1.0, -1.0], dtype=DOUBLE)), symmetric([1.0, 1.0, 1.0])]
)
def test_repeated_eigenvalues(x: Tensor) -> None:
    check_derivatives(PSDCone().project, x)
    D = PSDCone().jacobian(x).to_dense()
    assert torch.allclose(D, torch.func.jacrev(PSDCone().project)(x).reshape(D.shape), atol=1e-13)


def test_clustered_eigenvalues() -> None:
    # eigenvalues 1e-9 apart: an eigenvector's derivative is 1e9, and the projection's is not
    x = symmetric([1.0, 1.0 + 1e-9, -1.0]).requires_grad_()
    check_derivatives(PSDCone().project, x)


def test_third_derivatives_of_the_psd_cone() -> None:
    x, c = symmetric([2.0, 2.0, -1.0]), noise(3, 3)

    def gradient(z: Tensor) -> Tensor:
        return torch.autograd.grad((PSDCone().project(z) * c).sum(), z, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(gradient, x.requires_grad_())
    second = [
        outer(inner(PSDCone().project))(x.detach())
        for outer in (torch.func.jacfwd, torch.func.jacrev)
        for inner in (torch.func.jacfwd, torch.func.jacrev)
    ]
    assert all(torch.allclose(second[0], other, atol=1e-12) for other in second[1:])


@pytest.mark.parametrize("make", [SpectralBall, NuclearBall])
def test_balls_at_repeated_singular_values_and_in_their_radius(make: type[Set]) -> None:
    x = torch.stack([general([2.0, 2.0], 2, 2), general([3.0], 2, 2)])
    radius = torch.tensor([1.1, 0.8], dtype=DOUBLE)
    check_derivatives(lambda z, r: make(r).project(z), (x[0], radius[0]))
    shared = torch.tensor(1.1, dtype=DOUBLE, requires_grad=True)
    (total,) = torch.autograd.grad(make(shared).project(x).sum(), shared)
    each = [torch.autograd.grad(make(shared).project(one).sum(), shared)[0] for one in x]
    assert torch.allclose(total, sum(each))


@pytest.mark.parametrize(
    ("s", "x"),
    [
        (PSDCone(), [torch.zeros(3, 3, dtype=DOUBLE), symmetric([2.0, 0.0, -1.0]), symmetric([2.0, 0.0, 0.0])]),
        (SpectralBall(2.0), [general([2.0, 1.0], 3, 3), general([3.0, 2.0, 2.0], 3, 3)]),
        (NuclearBall(2.0), [general([2.0], 3, 3), general([3.0, 1.0, 1.0], 3, 3)]),
    ],
)
def test_kinks(s: Set, x: list[Tensor]) -> None:
    check_kink_of_projection(s, torch.stack(x))


def test_far_away() -> None:
    x = 1e9 * noise(4, 3, 3)
    for s in (PSDCone(), SpectralBall(1.0), NuclearBall(1.0)):
        assert bool(s.contains(s.project(x)).all())
    assert torch.allclose(PSDCone().project(1e150 * x) / 1e150, PSDCone().project(x), rtol=1e-12)


@pytest.mark.parametrize("s", [PSDCone(), SpectralBall(1.0), NuclearBall(1.0)])
def test_a_bad_item_is_alone(s: Set) -> None:
    x = 2 * noise(3, 2, 2)
    x[1, 0, 0] = math.inf
    x.requires_grad_()
    p = s.project(x)
    assert bool(p[1].isnan().all())
    (gradient,) = torch.autograd.grad(p[[0, 2]].sum(), x)
    assert bool(gradient.isfinite().all())
    assert bool(s.jacobian(x).to_dense()[1].isnan().all())


@pytest.mark.parametrize("s", [PSDCone(), SpectralBall(1.0), NuclearBall(1.0)])
@pytest.mark.parametrize("shape", [(0, 0), (2, 0, 0), (0, 3, 3)])
def test_nothing(s: Set, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, requires_grad=True)
    assert s.project(x).shape == shape
    s.project(x).sum().backward()
    assert s.jacobian(x).to_dense().shape == (*shape[:-2], shape[-1] ** 2, shape[-1] ** 2)


def test_a_ball_of_one_point() -> None:
    x = noise(2, 2, 2)
    for s in (SpectralBall(0.0), NuclearBall(0.0)):
        assert torch.equal(s.project(x), torch.zeros_like(x))
        assert torch.equal(s.jacobian(x).to_dense(), torch.zeros(2, 4, 4, dtype=DOUBLE))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PSDCone().project(torch.zeros(2, 3)), r"\(\*batch, n, n\)"),
        (lambda: PSDCone().project(torch.zeros(3)), r"\(\*batch, m, n\)"),
        (lambda: SpectralBall(-1.0), "radius"),
        (lambda: NuclearBall(math.nan), "radius"),
        (lambda: SpectralBall(torch.ones(3)).project(torch.zeros(2, 3, 3)), "radius"),
        (lambda: NuclearBall().project(torch.zeros(3)), r"\(\*batch, m, n\)"),
    ],
)
def test_bad_input_is_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
