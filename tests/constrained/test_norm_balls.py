from __future__ import annotations

import math

import pytest
import torch
from laws_optim import check_derivatives, check_kink_of_projection, check_set, cloud
from torch import Tensor

from nestopt.constrained import L1Ball, LinfBall, Set, Simplex


def tensor(*values: object, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


SETS = {
    "l1": lambda dtype: L1Ball(1.5),
    "l1 elsewhere": lambda dtype: L1Ball(0.7, tensor(1.0, 2.0, 0.0, -1.0, dtype=dtype)),
    "l1 point": lambda dtype: L1Ball(0.0, 1.0),
    "linf": lambda dtype: LinfBall(0.8),
    "linf point": lambda dtype: LinfBall(0.0, tensor(1.0, 2.0, 0.0, -1.0, dtype=dtype)),
}


@pytest.mark.parametrize("name", SETS)
def test_laws(name: str, dtype: torch.dtype) -> None:
    s = SETS[name](dtype)
    check_set(s, cloud(4, dtype), feasible=s.project(cloud(4, dtype, 0.5).flip(0)))


@pytest.mark.parametrize("one", [L1Ball, LinfBall])
def test_derivatives_in_radius_and_center(one: type[L1Ball | LinfBall]) -> None:
    x, radius, center = cloud(3, torch.float64, 2.0, 3), tensor(0.5, 1.0, 20.0), tensor(0.1, 0.2, 0.3)
    check_derivatives(lambda x, r, c: one(r, c).project(x), (x, radius, center))
    loop = torch.stack([one(r, center).project(row) for row, r in zip(x, radius, strict=True)])
    assert torch.allclose(torch.func.vmap(lambda x, r: one(r, center).project(x))(x, radius), loop)
    assert torch.allclose(one(radius, center).project(x), loop)


@pytest.mark.parametrize(
    ("s", "x"),
    [
        (L1Ball(1.0), [(1.0, 0.0, 0.0), (0.5, -0.5, 0.0), (2.0, 1.0, 1.0)]),
        (L1Ball(0.0), [(0.0, 0.0), (1.0, 0.0)]),
        (LinfBall(1.0), [(1.0, -1.0), (3.0, 1.0)]),
    ],
)
def test_a_limit_of_jacobians_at_kinks(s: Set, x: list[tuple[float, ...]]) -> None:
    check_kink_of_projection(s, tensor(*x))


def test_the_l1_ball_is_signed_simplices() -> None:
    x = cloud(50, torch.float64, 3.0)
    assert torch.allclose(L1Ball(2.0).project(x), x.sign() * Simplex(2.0).project(x.abs()), atol=1e-14)


def test_the_l1_ball_against_bisection() -> None:
    x = cloud(50, torch.float64, 1e3)
    low, high = torch.zeros_like(x[:, :1]), x.abs().amax(-1, keepdim=True)
    for _ in range(200):
        middle = (low + high) / 2
        above = (x.abs() - middle).clamp_min(0).sum(-1, keepdim=True) > 7.0
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    assert torch.allclose(L1Ball(7.0).project(x), x.sign() * (x.abs() - low).clamp_min(0), atol=1e-11)


def test_known_answers() -> None:
    assert torch.equal(L1Ball(1.0).project(tensor(1e9, -1e9 - 0.25, 1.0)), tensor(0.375, -0.625, 0.0))
    assert torch.allclose(L1Ball(1.0).project(tensor(3.0, -2.5)), tensor(0.75, -0.25))
    assert torch.equal(L1Ball(1.0).project(tensor(0.0, -0.5)), tensor(0.0, -0.5))
    assert torch.equal(LinfBall(1.0, 1e9).project(tensor(-5.0, 1e9 + 0.5)), tensor(1e9 - 1, 1e9 + 0.5))
    D = L1Ball(1.0).jacobian(tensor(3.0, -2.5, 0.1)).to_dense()
    assert torch.allclose(D, tensor((0.5, 0.5, 0.0), (0.5, 0.5, 0.0), (0.0, 0.0, 0.0)))


@pytest.mark.parametrize("one", [L1Ball, LinfBall])
@pytest.mark.parametrize("radius", [-1.0, math.nan, math.inf, torch.tensor([1.0, -1.0])])
def test_bad_radii_are_named(one: type[Set], radius: float | Tensor) -> None:
    with pytest.raises(ValueError, match=f"{one.__name__}: .*radius"):
        one(radius)


def test_empty_spaces_and_batches() -> None:
    for s in (L1Ball(1.0), LinfBall(1.0)):
        assert s.project(torch.zeros(3, 0)).shape == (3, 0)
        assert s.project(torch.zeros(0, 3)).shape == (0, 3)
        with pytest.raises(ValueError, match="0-d"):
            s.project(torch.zeros(()))
