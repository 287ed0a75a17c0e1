from __future__ import annotations

import pytest
import torch
from laws_optim import check_derivatives
from laws_prox import check_firmness, check_minimiser, check_prox
from torch import Tensor

from nestopt.constrained import L1, NuclearNorm, SpectralBall

DOUBLE = torch.float64


def noise(*shape: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=DOUBLE).to(dtype)


def rotated(values: list[float], m: int, n: int) -> Tensor:
    """A matrix with these singular values."""
    U, V = (torch.linalg.qr(noise(k, k))[0] for k in (m, n))
    return U[:, : len(values)] @ torch.diag(torch.tensor(values, dtype=DOUBLE)) @ V[:, : len(values)].mT


def test_laws(dtype: torch.dtype) -> None:
    check_prox(NuclearNorm, (torch.tensor(1.1, dtype=dtype),), 2 * noise(12, 2, 3, dtype=dtype))


@pytest.mark.parametrize("shape", [(5, 4), (1, 1), (9, 2)])
def test_other_shapes(shape: tuple[int, int]) -> None:
    x = 2 * noise(12, *shape)
    check_minimiser(NuclearNorm(1.1), x, 0.7)
    check_firmness(NuclearNorm(1.1), x, 0.7)
    check_minimiser(NuclearNorm(1.1), 1e9 * x, 0.7)


def test_of_a_diagonal_matrix() -> None:
    d = torch.tensor([3.0, -0.5, 1.0, -2.0], dtype=DOUBLE)
    p = NuclearNorm(0.5).prox(torch.diag(d), 1.5)
    assert torch.allclose(p, torch.diag(L1(0.5).prox(d, 1.5)), atol=1e-15)
    assert torch.allclose(NuclearNorm(0.5).value(torch.diag(d)), L1(0.5).value(d), rtol=1e-15)


@pytest.mark.parametrize(
    "x",
    [rotated([2.0, 2.0, 0.5], 3, 3), rotated([2.0, 2.0], 3, 2), rotated([3.0], 2, 3), torch.zeros(2, 2, dtype=DOUBLE)],
)
def test_repeated_and_zero_singular_values(x: Tensor) -> None:
    step = torch.tensor(0.8, dtype=DOUBLE)
    if x.numel() < 9:  # the largest one is differentiated below
        check_derivatives(lambda z, s: NuclearNorm().prox(z, s), (x, step))
    D = NuclearNorm().jacobian(x, step).to_dense()
    automatic = torch.func.jacrev(NuclearNorm().prox)(x, step).reshape(D.shape)
    assert torch.allclose(D, automatic, atol=1e-12)


def test_third_derivatives() -> None:
    x, c = rotated([2.0, 2.0, 0.5], 3, 3).requires_grad_(), noise(3, 3)

    def gradient(z: Tensor) -> Tensor:
        return torch.autograd.grad((NuclearNorm().prox(z) * c).sum(), z, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(gradient, x)


def test_value() -> None:
    check_derivatives(NuclearNorm(1.5).value, rotated([2.0, 2.0], 2, 3))
    low = rotated([2.0, 1.0], 3, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(NuclearNorm().value(low), low)
    U, _, Vh = torch.linalg.svd(low.detach(), full_matrices=False)
    assert torch.allclose(gradient, U[:, :2] @ Vh[:2], atol=1e-13)


def test_the_conjugate_is_the_spectral_ball() -> None:
    x = 2 * noise(5, 3, 4)
    assert torch.allclose(NuclearNorm(1.3).conjugate_prox(x, 0.6), SpectralBall(1.3).project(x), atol=1e-13)


def test_a_product_of_low_rank_is_found() -> None:
    x = rotated([9.0, 7.0, 0.3, 0.2, 0.1], 30, 20)
    assert int(torch.linalg.matrix_rank(NuclearNorm(0.5).prox(x))) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NuclearNorm(-1.0), "weight"),
        (lambda: NuclearNorm().prox(torch.zeros(3)), r"\(\*batch, m, n\)"),
        (lambda: NuclearNorm(torch.ones(3)).prox(torch.zeros(2, 3, 3)), "weight of shape"),
        (lambda: NuclearNorm().prox(torch.zeros(2, 3, 3), torch.ones(3)), "step of shape"),
    ],
)
def test_bad_input_is_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
