"""Broyden's method: laws, termination on linear systems, classical roots, and its line search."""

import math

import pytest
import torch

from nestopt.implicit import Broyden
from nestopt.linalg import Status

D = torch.float64


def system(g, n, shift=3.0):
    return torch.randn(n, n, generator=g, dtype=D) + shift * torch.eye(n, dtype=D), torch.randn(n, generator=g, dtype=D)


@pytest.mark.parametrize("scale", [None, 0.2, -1.0])
def test_full_steps_end_on_a_linear_system(generator, scale):
    """At most 2 n steps (Gay 1979), wherever H begins."""
    A, b = system(generator, 5)
    res = Broyden(scale=scale, allowance=math.inf, rtol=1e-7)(lambda y: A @ y - b, torch.zeros(5, dtype=D))
    assert res.status == Status.CONVERGED
    assert res.iterations <= 11  # one more where scale is found from the first step
    assert torch.allclose(res.x, torch.linalg.solve(A, b), atol=1e-5)


def test_pinned_path():
    """In one dimension it is the secant method."""
    path = []
    Broyden(scale=0.1)(lambda y: y**3 - 8, torch.tensor(1.0, dtype=D),
                       callbacks=[lambda k, s: path.append(float(s.x)) or k == 3])  # fmt: skip
    y = [1.0, 1.7]
    for _ in range(2):
        (a, b), (fa, fb) = y[-2:], (v**3 - 8 for v in y[-2:])
        y.append(b - fb * (b - a) / (fb - fa))
    assert path == pytest.approx(y, abs=1e-12)
    assert path[-1] == pytest.approx(1.9618016609165791, abs=1e-12)


def rosenbrock(y):
    return torch.stack([10 * (y[..., 1] - y[..., 0] ** 2), 1 - y[..., 0]], -1)


def powell(y):
    a, b, c, d = y.unbind(-1)
    return torch.stack([a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2], -1)


def chandrasekhar(n=100, c=0.9):
    """The H-equation of radiative transfer, by the midpoint rule."""
    mu = (torch.arange(n, dtype=D) + 0.5) / n
    K = c / (2 * n) * mu[:, None] / (mu[:, None] + mu)
    return lambda H: H - 1 / (1 - H @ K.mT)


def test_rosenbrock():
    res = Broyden()(rosenbrock, torch.tensor([-1.2, 1.0], dtype=D))
    assert res.status == Status.CONVERGED
    assert torch.allclose(res.x, torch.ones(2, dtype=D), atol=1e-9)


def test_powell_singular_root():
    """The Jacobian at the root has rank 2: convergence is linear at best."""
    res = Broyden(memory=100, rtol=1e-6)(powell, torch.tensor([3.0, -1.0, 0.0, 1.0], dtype=D))
    assert res.status == Status.CONVERGED
    assert float(res.x.norm()) < 1e-2


def test_chandrasekhar():
    res = Broyden()(chandrasekhar(), torch.ones(100, dtype=D))
    assert res.status == Status.CONVERGED
    assert res.iterations <= 15
    # the mean of the exact H is (2 / c)(1 - sqrt(1 - c)), which the midpoint rule keeps
    assert float(res.x.mean()) == pytest.approx(2 / 0.9 * (1 - 0.1**0.5), abs=1e-9)


def test_wrong_signs_and_scales_are_learnt(generator):
    for factor in (-1.0, 1e6, -1e-6):
        A, b = system(generator, 4)
        res = Broyden()(lambda y, A=A, b=b, factor=factor: factor * (A @ y - b), torch.zeros(4, dtype=D))
        assert res.status == Status.CONVERGED
        assert torch.allclose(res.x, torch.linalg.solve(A, b), atol=1e-7)


def test_a_memory_that_fills_begins_anew(generator):
    A, b = system(generator, 12, 6.0)
    res = Broyden(memory=3)(lambda y: A @ y - b, torch.zeros(12, dtype=D))
    assert res.status == Status.CONVERGED
    assert int(res.state.used) <= 3
    assert torch.allclose(res.x, torch.linalg.solve(A, b), atol=1e-8)


def test_without_a_root_the_line_search_says_so():
    res = Broyden()(lambda y: y * y + 1, torch.full((2,), 0.7, dtype=D))
    assert res.status in (Status.LINE_SEARCH_FAILED, Status.STAGNATED)
    assert res.error >= 2**0.5
    nan = Broyden()(lambda y: torch.where(y == 1, y, torch.nan), torch.ones(1, dtype=D))
    assert nan.status == Status.NON_FINITE


def test_a_map_without_a_fixed_point_does_not_converge():
    """Rounding swallows the 1 where y has run away: T(y) == y there, which is no fixed point."""
    assert Broyden().fixed_point(lambda y: y + 1, torch.ones(3, dtype=D)).status == Status.NOT_CONTRACTING


@pytest.mark.parametrize(
    ("options", "message"),
    [({"memory": 0}, "memory must be an integer >= 1"), ({"scale": 0.0}, "scale"), ({"allowance": -1.0}, "allowance")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"Broyden: .*{message}"):
        Broyden(**options)
