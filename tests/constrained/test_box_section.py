from __future__ import annotations

import math

import pytest
import torch
from laws_optim import check_derivatives, check_kink_of_projection, check_set, cloud
from torch import Tensor

from nestopt.constrained import BoxSection, Hyperplane, Simplex, capped_simplex

INF = math.inf


def tensor(*values: object, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


SETS = {
    "simplex": lambda dtype: BoxSection(),
    "capped": lambda dtype: capped_simplex(2.0),
    "knapsack": lambda dtype: BoxSection(0.0, 1.0, tensor(1.0, 2.0, 0.5, 0.3, dtype=dtype), 1.5),
    "signs": lambda dtype: BoxSection(
        tensor(-INF, -1.0, 0.5, -0.2, dtype=dtype), tensor(0.7, INF, 0.5, 0.3, dtype=dtype),
        tensor(1.0, -2.0, 3.0, 0.0, dtype=dtype), 0.4,
    ),
    "plane": lambda dtype: BoxSection(-INF, INF, tensor(1.0, -2.0, 3.0, 0.0, dtype=dtype), 0.4),
    "corner": lambda dtype: BoxSection(0.0, 1.0, 1.0, 4.0),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_laws(name: str, dtype: torch.dtype) -> None:
    s = SETS[name](dtype)
    check_set(s, cloud(4, dtype, points=6), feasible=s.project(cloud(4, dtype, 0.5, 6)))


def test_special_cases() -> None:
    x = cloud(30, torch.float64, 5.0)
    assert torch.allclose(BoxSection(b=3.0).project(x), Simplex(3.0).project(x), atol=1e-14)
    a = cloud(30, torch.float64, 1.0, 1)[0]
    plane = BoxSection(-INF, INF, a, 2.0)
    assert torch.allclose(plane.project(x), Hyperplane(a, 2.0).project(x), atol=1e-12)
    assert torch.allclose(plane.jacobian(x) @ x, Hyperplane(a, 2.0).jacobian(x) @ x, atol=1e-12)


def test_against_bisection() -> None:
    x, a = cloud(40, torch.float64, 10.0), cloud(40, torch.float64, 1.0, 1)[0]
    low, high = torch.full((12, 1), -1e3, dtype=torch.float64), torch.full((12, 1), 1e3, dtype=torch.float64)
    for _ in range(200):
        middle = (low + high) / 2
        above = (a * (x - middle * a).clamp(-0.5, 2.0)).sum(-1, keepdim=True) > 3.0
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    p = BoxSection(-0.5, 2.0, a, 3.0).project(x)
    assert torch.allclose(p, (x - low * a).clamp(-0.5, 2.0), atol=1e-11)
    assert float(((p * a).sum(-1) - 3).abs().max()) <= 1e-13


def test_known_answers() -> None:
    assert torch.equal(BoxSection().project(tensor(0.0, 0.0, -INF)), tensor(0.5, 0.5, 0.0))
    assert torch.equal(BoxSection().project(tensor(1e9, 1e9 + 0.25, -1e9)), tensor(0.375, 0.625, 0.0))
    assert torch.allclose(capped_simplex(2.0).project(tensor(3.0, 1.0, 0.5, -1.0)), tensor(1.0, 0.75, 0.25, 0.0))
    assert torch.equal(capped_simplex(2.0).project(1e9 * tensor(3.0, 1.0, 2.0, -1.0)), tensor(1.0, 0.0, 1.0, 0.0))
    assert torch.equal(BoxSection(0.0, 1.0, 1.0, 0.0).project(tensor(3.0, 1.0)), tensor(0.0, 0.0))


def test_derivatives_in_the_sets_tensors() -> None:
    def function(x: Tensor, low: Tensor, high: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return BoxSection(low, high, a, b).project(x)

    x = tensor((2.0, 0.3, -1.5, 0.1), (-1.0, 0.5, 0.3, 0.2))
    low, high, a, b = (
        tensor(-0.5, -0.4, -0.3, -0.2),
        tensor(1.0, 1.1, 1.2, 1.3),
        tensor(1.0, 2.0, -0.7, 0.5),
        tensor(0.5, 0.6),
    )
    check_derivatives(function, (x, low, high, a, b))
    loop = torch.stack([function(row, low, high, a, one) for row, one in zip(x, b, strict=True)])
    assert torch.allclose(function(x, low, high, a, b), loop)
    assert torch.allclose(torch.func.vmap(function, (0, None, None, None, 0))(x, low, high, a, b), loop)


def test_a_limit_of_jacobians_at_kinks() -> None:
    x = tensor((1.0, 0.0, 0.0), (0.5, 0.5, 0.0), (2.0, 1.0, 1.0), (1.0, 1.0, 1.0))
    for s in (BoxSection(), capped_simplex(1.0)):
        check_kink_of_projection(s, x)
    # one entry leaves its upper bound where two arrive at their lower ones: nothing can move
    assert not bool(capped_simplex(1.0).jacobian(tensor(1.0, 0.0, 0.0)).to_dense().any())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: BoxSection(1.0, 0.0), ValueError, "BoxSection: low <= high"),
        (lambda: BoxSection(a=math.nan), ValueError, "a must be finite"),
        (lambda: BoxSection(b=INF), ValueError, "b must be finite"),
        (lambda: capped_simplex(3.0).project(torch.zeros(2)), ValueError, "the set is empty.* 0 and 2 "),
        (lambda: BoxSection(b=-1.0).project(torch.zeros(2)), ValueError, "the set is empty"),
        (lambda: BoxSection().project(torch.zeros(0)), ValueError, "the set is empty"),
        (lambda: BoxSection().project(torch.zeros(())), ValueError, "0-d"),
        (lambda: BoxSection(a=torch.ones(3)).project(torch.zeros(2)), ValueError, "does not broadcast"),
    ],
)
def test_bad_input_is_named(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
