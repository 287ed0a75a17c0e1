from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws_optim import check_derivatives, check_jacobian, check_kink, check_kink_of_projection, check_set, cloud
from torch import Tensor

from nestopt.constrained import Ball, Box, Set, Simplex, WholeSpace, project
from nestopt.linalg import LinearOperator

INF = math.inf


def tensor(*values: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


SETS = {
    "space": lambda dtype: WholeSpace(),
    "box": lambda dtype: Box(-0.5, 0.25),
    "half-line": lambda dtype: Box(low=0.0),
    "box of tensors": lambda dtype: Box(
        tensor(-INF, 0.0, -1.0, 2.0, dtype=dtype), tensor(0.0, INF, 1.0, 2.0, dtype=dtype)
    ),
    "ball": lambda dtype: Ball(0.7),
    "ball elsewhere": lambda dtype: Ball(1.5, tensor(1.0, 2.0, 0.0, -1.0, dtype=dtype)),
    "point": lambda dtype: Ball(0.0, 1.0),
    "simplex": lambda dtype: Simplex(),
    "large simplex": lambda dtype: Simplex(30.0),
}


@pytest.mark.parametrize("name", SETS)
def test_laws(name: str, dtype: torch.dtype) -> None:
    s = SETS[name](dtype)
    check_set(s, cloud(4, dtype), feasible=s.project(cloud(4, dtype, 0.5).flip(0)))


@pytest.mark.parametrize("name", ["box", "ball", "simplex"])
@pytest.mark.parametrize("n", [1, 40])
def test_laws_in_other_dimensions(name: str, n: int) -> None:
    check_set(SETS[name](torch.float64), cloud(n, torch.float64))


@pytest.mark.parametrize(
    ("s", "x"),
    [
        (Box(0.0, 1.0), [(0.0, 1.0, 0.5), (-0.0, 2.0, 1.0)]),
        (Box(tensor(1.0, 0.0), tensor(1.0, 3.0)), [(1.0, 2.0), (2.0, 3.0)]),
        (Ball(1.0), [(1.0, 0.0), (0.6, 0.8)]),
        (Ball(0.0, 1.0), [(1.0, 1.0), (2.0, 1.0)]),
        (Simplex(), [(1.0, 0.0, 0.0), (0.5, 0.5, 0.0), (2.0, 1.0, 1.0)]),
    ],
)
def test_a_limit_of_jacobians_at_kinks(s: Set, x: list[tuple[float, ...]]) -> None:
    check_kink_of_projection(s, tensor(*x))


def test_jacobians_in_formulas() -> None:
    D = Simplex().jacobian(tensor(0.9, 0.6, -2.0)).to_dense()
    assert torch.allclose(D, tensor((0.5, -0.5, 0.0), (-0.5, 0.5, 0.0), (0.0, 0.0, 0.0)))
    assert torch.allclose(Ball(1.0).jacobian(tensor(0.0, 2.0)).to_dense(), tensor((0.5, 0.0), (0.0, 0.0)))
    assert torch.equal(Box(0.0).jacobian(tensor(1.0, -1.0)) @ tensor(3.0, 3.0), tensor(3.0, 0.0))
    assert bool((Simplex().jacobian(tensor(0.9, math.nan)) @ tensor(1.0, 2.0)).isnan().all())


def test_a_set_without_a_formula_gets_its_jacobian_by_autograd() -> None:
    class Shifted(Set):
        def _project(self, x: Tensor) -> Tensor:
            return Ball(1.0).project(x - 1.0) + 1.0

    x = cloud(4, torch.float64)
    check_jacobian(Shifted(), x)
    assert torch.allclose(Shifted().jacobian(x).to_dense(), Ball(1.0, 1.0).jacobian(x).to_dense(), atol=1e-14)
    with torch.inference_mode():
        assert Shifted().jacobian(x).to_dense().shape == (12, 4, 4)


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (lambda x, low, high: Box(low, high).project(x), (tensor(-1.0, 0.0, -0.3), tensor(0.5, 1.0, 0.4))),
        (lambda x, r, c: Ball(r, c).project(x), (tensor(0.5, 1.0), tensor(0.1, 0.2, 0.3))),
        (lambda x, scale: Simplex(scale).project(x), (tensor(0.5, 4.0),)),
        (lambda x, r: Ball(r).distance(x), (tensor(0.5, 0.2),)),
    ],
)
def test_derivatives_in_the_sets_own_tensors(function: Callable[..., Tensor], parameters: tuple[Tensor, ...]) -> None:
    check_derivatives(function, (cloud(3, torch.float64, 2.0, 2), *parameters))


def test_one_set_a_vmapped_item() -> None:
    x, r = cloud(3, torch.float64, 2.0, 4), tensor(0.5, 1.0, 2.0, 0.1)
    for one in (Ball, Simplex):
        assert torch.allclose(torch.func.vmap(lambda x, r: one(r).project(x))(x, r), one(r).project(x))  # noqa: B023
    with pytest.raises(ValueError, match="radius"):
        torch.func.vmap(lambda r: Ball(r).project(x))(tensor(1.0, -1.0))


def test_distance() -> None:
    x = tensor((3.0, 4.0), (0.1, 0.0), (1e300, 0.0), (math.nan, 0.0)).requires_grad_()
    d = Ball(1.0).distance(x)
    assert torch.allclose(d, tensor(4.0, 0.0, 1e300, math.nan), equal_nan=True)
    (slope,) = torch.autograd.grad(d[:2].sum(), x)
    assert torch.allclose(slope[:2], tensor((0.6, 0.8), (0.0, 0.0)))


def test_box_takes_any_shape() -> None:
    assert Box(0.0, 3.0).project(tensor(-1.0)[0]) == 0
    assert bool(Box(0.0, 3.0).contains(tensor(1.0)[0]))
    high = tensor(1.0, 2.0)[:, None]
    assert torch.equal(Box(0.0, high).project(torch.full((4, 2, 3), 9.0, dtype=torch.float64)), high.expand(4, 2, 3))


def test_box_is_differentiable_in_its_bounds() -> None:
    low = tensor(0.0, 0.0).requires_grad_()
    Box(low, 5.0).project(tensor(-1.0, 1.0)).sum().backward()
    assert torch.equal(low.grad, tensor(1.0, 0.0))


def test_ball_is_safe_at_its_center_and_at_huge_points() -> None:
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    Ball(1.0).project(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(3, dtype=torch.float64))
    far = Ball(2.0).project(tensor(1e300, 0.0, -1e300))
    assert torch.allclose(far, tensor(math.sqrt(2), 0.0, -math.sqrt(2)), rtol=1e-15)


@pytest.mark.parametrize(
    ("scale", "x", "expected"),
    [
        (1.0, (0.0, 0.0, -INF), (0.5, 0.5, 0.0)),
        (1.0, (1e9, 1e9 + 0.25, -1e9), (0.375, 0.625, 0.0)),
        (1.0, (3.0,), (1.0,)),
        (2.0, (0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5)),
        (3.0, (5.0, 1.0, 1.0), (3.0, 0.0, 0.0)),
        (1e9, (0.0, 1.0, -1e12), (5e8 - 0.5, 5e8 + 0.5, 0.0)),
    ],
)
def test_simplex_known_answers(scale: float, x: tuple[float, ...], expected: tuple[float, ...]) -> None:
    p = Simplex(scale).project(tensor(*x))
    assert torch.allclose(p, tensor(*expected), rtol=1e-15, atol=0)


def test_simplex_loses_nothing_far_away() -> None:
    x = tensor(1e9 + 0.1, 1e9 - 0.2, 1e9 + 0.3)
    near = x - 1e9  # exact
    assert torch.allclose(Simplex().project(x), near - (near.sum() - 1) / 3, rtol=0, atol=1e-15)


def test_simplex_against_bisection() -> None:
    x = cloud(50, torch.float64, 1e3)
    low, high = x.amin(-1, keepdim=True) - 1, x.amax(-1, keepdim=True)
    for _ in range(200):
        middle = (low + high) / 2
        above = (x - middle).clamp_min(0).sum(-1, keepdim=True) > 7.0
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    assert torch.allclose(Simplex(7.0).project(x), (x - low).clamp_min(0), atol=1e-11)


def test_project_follows_the_tree() -> None:
    tree = {"a": tensor(3.0, -3.0), "b": [tensor(2.0), tensor(2.0)[0]]}
    everywhere = project(Box(0.0, 1.0), tree)
    assert torch.equal(everywhere["a"], tensor(1.0, 0.0))
    assert everywhere["b"][1] == 1
    some = project({"a": Simplex(), "b": [None, Box(high=-1.0)]}, tree)
    assert torch.equal(some["a"], tensor(1.0, 0.0))
    assert torch.equal(some["b"][0], tensor(2.0))
    assert some["b"][1] == -1
    assert project(None, tree) is tree
    assert torch.equal(project(Ball(1.0), tensor(3.0, 4.0)), tensor(0.6, 0.8))
    module = torch.nn.Linear(2, 1)
    assert sorted(project(Box(0.0), module)) == ["bias", "weight"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Box(1.0, 0.0), ValueError, "low <= high"),
        (lambda: Box(math.nan, 0.0), ValueError, "low <= high"),
        (lambda: Box(torch.zeros(2), torch.ones(3)), ValueError, "broadcast"),
        (lambda: Ball(-1.0), ValueError, "radius"),
        (lambda: Ball(INF), ValueError, "WholeSpace"),
        (lambda: Simplex(0.0), ValueError, "scale"),
        (lambda: Simplex().project(torch.zeros(())), ValueError, "0-d"),
        (lambda: Box(torch.zeros(3)).project(torch.zeros(2)), ValueError, "does not broadcast"),
        (lambda: Box(torch.zeros(2, 1)).project(torch.zeros(3)), ValueError, "does not broadcast"),
        (lambda: Box(torch.zeros(2)).project(tensor(0.0, 1.0)), ValueError, "float32"),
        (lambda: Box(0.0).project(torch.zeros(2, dtype=torch.int64)), TypeError, "floating"),
        (lambda: project({"a": Box(0.0)}, {"b": tensor(1.0)}), ValueError, "structure"),
        (lambda: project({"a": 1.0}, {"a": tensor(1.0)}), TypeError, r"sets\['a'\]"),
    ],
)
def test_bad_input_is_named(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_wrong_projection_breaks_the_laws() -> None:
    class Shrunk(Set):
        def _project(self, x: Tensor) -> Tensor:
            return Box(-1.0, 1.0).project(0.9 * x)

    with pytest.raises(AssertionError):
        check_set(Shrunk(), cloud(4, torch.float64))


def test_a_wrong_jacobian_breaks_the_laws() -> None:
    class Forgetful(Simplex):
        def _jacobian(self, x: Tensor) -> LinearOperator:
            return Box(0.0).jacobian(self._project(x) - 1e-12)

    with pytest.raises(AssertionError):
        check_jacobian(Forgetful(), cloud(4, torch.float64))
    with pytest.raises(AssertionError):
        check_kink(Forgetful(), tensor((2.0, 1.0, 1.0), (0.5, 0.5, 0.0)))
