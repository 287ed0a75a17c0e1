"""Spectral projected gradients: laws, references, endings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from laws_first_order import BAD_INPUT, D, check_first_order, least_squares, misfit
from scipy.optimize import nnls
from torch import Tensor

from nestopt.constrained import Ball, Box, L1Ball, ProjectedGradient, Simplex
from nestopt.linalg import Status


@pytest.mark.parametrize("space", [Box(0.0, 0.5), Simplex(), Ball(0.4), L1Ball(0.5), None], ids=str)
def test_laws(space: Any, generator: torch.Generator) -> None:
    def certificate(y: Tensor, gradient: Tensor) -> Tensor:
        v = y - 0.02 * gradient
        return (y - (v if space is None else space.project(v))).norm(dim=-1) / 0.02

    solver = ProjectedGradient(space)
    check_first_order(solver, torch.full((5,), 0.2, dtype=D), certificate, generator)


def test_the_answer_is_feasible_and_exact_on_its_face(generator: torch.Generator) -> None:
    A, b = least_squares(generator, 1, 40, 20)
    reference = torch.tensor(nnls(A[0].numpy(), b[0].numpy())[0])
    res = ProjectedGradient(Box(0.0))(misfit(A[0], b[0]), -torch.ones(20, dtype=D))
    assert res.converged
    assert torch.allclose(res.x, reference, rtol=0, atol=1e-8)
    assert torch.equal(res.x == 0, reference == 0)
    assert res.value < float("inf")


def test_projections_onto_the_simplex(generator: torch.Generator) -> None:
    p = 3 * torch.randn(4, 7, generator=generator, dtype=D)
    res = ProjectedGradient(Simplex())(lambda y: ((y - p) ** 2).sum(-1) / 2, torch.zeros(4, 7, dtype=D), batch_dims=1)
    assert torch.allclose(res.x, Simplex().project(p), rtol=0, atol=1e-10)


def test_pinned_iterations() -> None:
    scale, target = torch.logspace(0, 4, 20, dtype=D), torch.linspace(-1, 2, 20, dtype=D)
    res = ProjectedGradient(Box(0.0, 1.0))(lambda w: (scale * (w - target) ** 2).sum(), torch.zeros(20, dtype=D))
    assert res.converged
    assert torch.allclose(res.x, target.clamp(0, 1), rtol=0, atol=1e-6)
    assert res.iterations == 46


def test_endings() -> None:
    slopes = torch.tensor([[-1.0, 1.0], [1.0, 1.0]], dtype=D)
    res = ProjectedGradient(Box(-1.0))(lambda y: (slopes * y).sum(-1), torch.zeros(2, 2, dtype=D), batch_dims=1)
    assert list(res.status) == [Status.DIVERGED, Status.CONVERGED]
    assert torch.equal(res.x[1], torch.full((2,), -1.0, dtype=D))
    fake = ProjectedGradient(Box(-9.0))(lambda y: ((3 * y.detach() - y) ** 2).sum() / 2, torch.ones(2, dtype=D))
    assert fake.status in (Status.LINE_SEARCH_FAILED, Status.STAGNATED)
    rounding = ProjectedGradient(Box(0.0), rtol=0.0)(lambda y: (y.exp() - 3 * y).sum(), torch.zeros(3, dtype=D))
    assert rounding.status in (Status.STAGNATED, Status.CONVERGED)
    assert rounding.error <= 1e-14


@pytest.mark.parametrize(("arguments", "options", "error", "message"), BAD_INPUT)
def test_bad_input_is_named(arguments: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ProjectedGradient(Box(0.0))(*arguments, **options)
