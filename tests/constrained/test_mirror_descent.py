"""Mirror descent: laws, the duality gap, answers inside and on the boundary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from laws_first_order import BAD_INPUT, D, check_first_order, least_squares, misfit
from torch import Tensor

from nestopt.constrained import Ball, Box, MirrorDescent, ProjectedGradient, Simplex
from nestopt.linalg import Status


@pytest.mark.parametrize("space", [Simplex(2.0), Box(-1.0, 1.0)], ids=str)
def test_laws(space: Any, generator: torch.Generator) -> None:
    def certificate(y: Tensor, gradient: Tensor) -> Tensor:
        if isinstance(space, Simplex):
            return (gradient * y).sum(-1) - 2 * gradient.amin(-1)
        low, high = (-torch.inf, torch.inf) if space is None else (space.low, space.high)
        down = torch.where(gradient > 0, gradient * (y - low).clamp_max(1), 0)
        return (down - torch.where(gradient < 0, gradient * (high - y).clamp_max(1), 0)).sum(-1)

    start = torch.full((5,), 0.4, dtype=D)
    check_first_order(MirrorDescent(space), start, certificate, generator, atol=1e-4, warm_steps=60)


@pytest.mark.parametrize("space", [Simplex(), Box(0.0, 0.1)], ids=str)
def test_it_agrees_with_projected_gradients(space: Any, generator: torch.Generator) -> None:
    A, b = least_squares(generator, 2)
    y0 = torch.full((2, 5), 0.05, dtype=D)
    mine, other = (m(space)(misfit(A, b), y0, batch_dims=1) for m in (MirrorDescent, ProjectedGradient))
    assert bool(mine.converged.all())
    assert torch.allclose(mine.x, other.x, rtol=0, atol=1e-6)
    assert torch.allclose(mine.value, other.value, rtol=1e-9)
    if isinstance(space, Simplex):  # the gap bounds f - min f
        cut = MirrorDescent(space, max_iter=3)(misfit(A, b), y0, batch_dims=1)
        assert bool((cut.value - other.value <= cut.error * (1 + 1e-9)).all())
        assert torch.allclose(cut.x.sum(-1), torch.ones(2, dtype=D), atol=1e-12)
        assert bool((cut.x > 0).all())


def test_a_linear_objective_goes_to_its_vertex() -> None:
    cost = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0]], dtype=D)
    scale = torch.tensor([1.0, 4.0], dtype=D)
    res = MirrorDescent(Simplex(scale))(lambda y: (cost * y).sum(-1), torch.ones(2, 3, dtype=D), batch_dims=1)
    assert list(res.status) == [Status.CONVERGED] * 2
    assert torch.allclose(res.x, torch.tensor([[0.0, 1.0, 0.0], [4.0, 0.0, 0.0]], dtype=D), atol=1e-8)
    assert torch.allclose(res.value, torch.tensor([1.0, 0.0], dtype=D), atol=1e-8)


def test_a_start_on_the_boundary_leaves_it() -> None:
    target = torch.tensor([0.2, 0.3, 0.5], dtype=D)
    res = MirrorDescent(Simplex())(lambda y: ((y - target) ** 2).sum(), torch.tensor([1.0, 0.0, 0.0], dtype=D))
    assert res.converged
    assert torch.allclose(res.x, target, atol=1e-6)


def test_pinned_iterations() -> None:
    target = torch.tensor([0.2, 0.3, 0.5], dtype=D)
    res = MirrorDescent(Simplex())(lambda y: ((y - target) ** 2).sum(), torch.full((3,), 1 / 3, dtype=D))
    assert res.iterations == 20


def test_one_bound_or_none_and_leaves_of_their_own() -> None:
    target = torch.tensor([-2.0, 0.25, 3.0], dtype=D)
    spaces = {"above": Box(-torch.inf, 0.5), "below": Box(0.0), "free": None, "point": Box(0.0, 1.0)}
    y0 = {name: torch.full((3,), 0.4, dtype=D) for name in ("above", "below", "free")}
    y0["point"] = torch.tensor(0.4, dtype=D)
    res = MirrorDescent(spaces)(
        lambda y: sum(((leaf - target) ** 2).sum() for leaf in y.values()) / 2,
        y0,  # type: ignore[arg-type,return-value]
    )
    assert res.converged
    for name, wanted in [("above", target.clamp(max=0.5)), ("below", target.clamp(min=0)), ("free", target)]:
        assert torch.allclose(res.x[name], wanted, atol=1e-6)
    assert float(res.x["point"]) == pytest.approx(float(target.mean()), abs=1e-6)


def test_endings() -> None:
    res = MirrorDescent(Box(0.0))(
        lambda y: torch.tensor([-1.0, 1.0]) * y.sum(-1), torch.ones(2, 2, dtype=D), batch_dims=1
    )
    assert list(res.status) == [Status.DIVERGED, Status.CONVERGED]
    with pytest.raises(TypeError, match="Simplex or a Box, but got Ball"):
        MirrorDescent(Ball(1.0))(lambda y: y.sum(), torch.ones(2))


@pytest.mark.parametrize(("arguments", "options", "error", "message"), BAD_INPUT)
def test_bad_input_is_named(arguments: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MirrorDescent(Box(0.0))(*arguments, **options)
