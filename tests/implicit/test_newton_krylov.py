"""Newton-Krylov: laws, quadratic convergence, classical roots, and its failures."""

import pytest
import torch

from nestopt.implicit import NewtonKrylov
from nestopt.linalg import CG, LU, Status

D = torch.float64


def rosenbrock(y):
    return torch.stack([10 * (y[..., 1] - y[..., 0] ** 2), 1 - y[..., 0]], -1)


def powell(y):
    a, b, c, d = y.unbind(-1)
    return torch.stack([a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2], -1)


def test_rosenbrock_and_its_batch():
    starts = torch.tensor([[-1.2, 1.0], [3.0, 2.0], [1.0, 1.0]], dtype=D)
    res = NewtonKrylov()(rosenbrock, starts, batch_dims=1)
    assert bool(res.converged.all())
    assert torch.allclose(res.x, torch.ones(3, 2, dtype=D), atol=1e-9)
    assert res.iterations[2] == 0
    for i in range(3):
        one = NewtonKrylov()(rosenbrock, starts[i])
        assert one.iterations == res.iterations[i]
        assert torch.allclose(one.x, res.x[i], atol=1e-12)


def test_powell_singular_root():
    res = NewtonKrylov()(powell, torch.tensor([3.0, -1.0, 0.0, 1.0], dtype=D))
    assert res.status == Status.CONVERGED
    assert float(res.x.norm()) < 1e-3


@pytest.mark.parametrize("linear_solver", [None, LU()])
def test_chandrasekhar(linear_solver):
    n, c = 100, 0.9
    mu = (torch.arange(n, dtype=D) + 0.5) / n
    K = c / (2 * n) * mu[:, None] / (mu[:, None] + mu)
    res = NewtonKrylov(linear_solver)(lambda H: H - 1 / (1 - K @ H), torch.ones(n, dtype=D))
    assert res.status == Status.CONVERGED
    assert res.iterations <= 5
    assert float(res.x.mean()) == pytest.approx(2 / c * (1 - (1 - c) ** 0.5), abs=1e-9)
    assert res.state.products > 0


def test_pinned_newton_steps():
    path = []
    NewtonKrylov(LU())(lambda y: y**3 - 8, torch.tensor([3.0], dtype=D),
                       callbacks=[lambda k, s: path.append(float(s.x)) or k == 3])  # fmt: skip
    y = [3.0]
    for _ in range(3):
        y.append(y[-1] - (y[-1] ** 3 - 8) / (3 * y[-1] ** 2))
    assert path == pytest.approx(y, abs=1e-12)
    assert path[1] == pytest.approx(3 - 19 / 27, abs=1e-14)


def test_convergence_is_superlinear():
    errors = []
    R = lambda y: torch.exp(y) - torch.arange(1, 6, dtype=D)  # noqa: E731
    NewtonKrylov(rtol=1e-13)(R, torch.zeros(5, dtype=D), callbacks=[lambda k, s: errors.append(float(s.error))])
    assert errors[-1] < 1e-12
    assert errors[-2] / errors[-3] < 0.1
    assert errors[-1] / errors[-2] < 1e-3


def test_the_forcing_of_an_item_is_its_own():
    """Items of very different difficulty, in one batch: the products differ, the paths do not."""

    def R(y):
        return torch.stack([torch.sinh(y[..., 0] * 3) - 1, y[..., 1] ** 3 - y[..., 0]], -1)

    starts = torch.tensor([[4.0, 5.0], [0.3, 0.6]], dtype=D)
    both = NewtonKrylov()(R, starts, batch_dims=1)
    assert both.iterations[0] > both.iterations[1]
    for i in range(2):
        one = NewtonKrylov()(R, starts[i])
        assert one.iterations == both.iterations[i]
        assert torch.allclose(one.x, both.x[i], atol=1e-12)


def test_failures_are_named_per_item():
    """A singular Jacobian, a local minimum of |R|, a NaN, and a root."""
    a = torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [torch.nan, 1.0, 0.0], [1.0, -4.0, 1.0]], dtype=D)

    def R(y):
        return a[:, :1] * y**2 + a[:, 1:2] + a[:, 2:] * y

    res = NewtonKrylov()(R, torch.full((4, 1), 0.9, dtype=D), batch_dims=1)
    assert res.status[0] == Status.SINGULAR
    assert res.status[1] in (Status.LINE_SEARCH_FAILED, Status.STAGNATED)
    assert res.status[2] == Status.NON_FINITE
    assert res.status[3] == Status.CONVERGED
    assert res.x[3].item() == pytest.approx((17**0.5 - 1) / 2, abs=1e-10)
    assert bool(torch.isfinite(res.x).all())


def test_bad_options():
    with pytest.raises(TypeError, match="NewtonKrylov: linear_solver must be an instance"):
        NewtonKrylov(LU)
    with pytest.raises(ValueError, match="NewtonKrylov: first_forcing must be below 1"):
        NewtonKrylov(first_forcing=1.0)
    with pytest.raises(ValueError, match="NewtonKrylov: max_linear_iter must be a number > 0"):
        NewtonKrylov(max_linear_iter=0)
    with pytest.raises(TypeError, match="CG: A must be promised symmetric"):
        NewtonKrylov(CG())(torch.cos, torch.ones(2, dtype=D))
