"""Anderson acceleration: laws, GMRES on linear maps, what Picard cannot do, and its safeguards."""

import math

import pytest
import torch

from nestopt.implicit import Anderson, Picard
from nestopt.implicit.anderson import mixing_weights
from nestopt.linalg import GMRES, Dense, Status

D = torch.float64


def linear_map(g, n, radius):
    """M with complex eigenvalues of this radius, I - M well conditioned, and b."""
    M = torch.randn(n, n, generator=g, dtype=D)
    M = radius * M / torch.linalg.eigvals(M).abs().max()
    return M, torch.randn(n, generator=g, dtype=D)


def test_on_a_linear_map_it_is_gmres(generator):
    """With y_k from GMRES on (I - M) y = b, Anderson's next iterate is T(y_k)."""
    M, b = linear_map(generator, 8, 0.9)
    path = []
    Anderson(memory=8)(lambda y: M @ y + b, torch.zeros(8, dtype=D), callbacks=[lambda k, s: path.append(s.x)])
    A = Dense(torch.eye(8, dtype=D) - M)
    for k in range(1, 8):
        y = GMRES(rtol=1e-14, max_iter=k)(A, b).x
        assert torch.allclose(path[k + 1], M @ y + b, atol=1e-9), k


@pytest.mark.parametrize("radius", [0.99, 1.5, 5.0])
def test_n_plus_one_steps_end_on_a_linear_map(generator, radius):
    M, b = linear_map(generator, 6, radius)
    res = Anderson(memory=6, growth=float("inf"), rtol=1e-9)(lambda y: M @ y + b, torch.zeros(6, dtype=D))
    assert res.status == Status.CONVERGED
    assert res.iterations <= 8
    assert torch.allclose(res.x, torch.linalg.solve(torch.eye(6, dtype=D) - M, b), atol=1e-7)


def test_pinned_first_mixed_step():
    """One dimension: the second step is the secant's."""
    path = []
    Anderson()(torch.cos, torch.tensor(1.0, dtype=D), callbacks=[lambda k, s: path.append(float(s.x)) or k == 2])
    y0, y1 = path[:2]
    f0, f1 = math.cos(y0) - y0, math.cos(y1) - y1
    assert path[2] == pytest.approx(y1 - f1 * (y1 - y0) / (f1 - f0), abs=1e-10)
    assert path[2] == pytest.approx(0.7280103614676172, abs=1e-10)


def test_many_fewer_steps_than_picard(generator):
    W = torch.randn(50, 50, generator=generator, dtype=D)
    W = 0.97 * (W + W.mT) / torch.linalg.matrix_norm(W + W.mT, 2)
    b = 0.1 * torch.randn(50, generator=generator, dtype=D)
    y0 = torch.zeros(50, dtype=D)
    slow, fast = (s(lambda y: torch.tanh(W @ y) + b, y0) for s in (Picard(), Anderson(memory=10)))
    assert fast.status == slow.status == Status.CONVERGED
    assert 3 * fast.evaluations < slow.evaluations
    assert fast.rate < slow.rate
    assert torch.allclose(fast.x, slow.x, atol=1e-7)


@pytest.mark.parametrize("regularization", [None, 1e-6])
def test_weights_do_not_depend_on_units(generator, regularization, dtype):
    dF = torch.randn(2, 3, 7, generator=generator, dtype=D)
    F = torch.randn(2, 7, generator=generator, dtype=D)
    units = torch.tensor([1e-8, 1.0, 1e6], dtype=D)
    lam = 10 * 3 * torch.finfo(dtype).eps if regularization is None else regularization
    found = mixing_weights((units[:, None] * dF).to(dtype), F.to(dtype), lam).double() * units
    truth = torch.linalg.lstsq(dF.mT, F[..., None]).solution[..., 0]
    assert torch.allclose(found, truth, atol=1e-10 if dtype == D and regularization is None else 1e-4)


def test_dependent_columns_get_finite_weights(generator, dtype):
    column = torch.randn(7, generator=generator, dtype=D).to(dtype)
    F = torch.randn(7, generator=generator, dtype=D).to(dtype)
    dF = torch.stack([column, 2 * column, torch.zeros_like(column)])
    w = mixing_weights(dF, F, 10 * 3 * torch.finfo(dtype).eps)
    best = column * (column @ F) / (column @ column)
    assert torch.allclose(torch.einsum("i,in->n", w, dF), best, atol=1e-5 if dtype == torch.float32 else 1e-9)
    assert w[2] == 0


def test_a_map_that_is_not_finite_everywhere_is_taken_back():
    """log is NaN where the secant overshoots to; the safeguard goes back and damps."""

    def T(y):
        seen.append(float(y))
        return torch.log(y + 0.9) * 0.95

    seen = []
    res = Anderson()(T, torch.tensor([5.0], dtype=D))
    assert min(seen) < -0.9  # an iterate left the domain of T
    assert bool(torch.isfinite(res.x).all())
    assert res.error <= float((T(torch.tensor(5.0)) - 5).abs())


def test_safeguard_ends_a_hopeless_run():
    """No fixed point: |F| >= 1 everywhere, and nothing but a status can come."""
    res = Anderson(max_iter=300)(lambda y: y + 1 + y * y, torch.full((3,), 0.5, dtype=D))
    assert res.status == Status.NOT_CONTRACTING
    assert res.error >= 1
    assert torch.isfinite(res.x).all()


def test_memory_of_many_items_is_independent(generator):
    """A restart of one item leaves the memories of the others alone."""
    theta = torch.tensor([0.0, 40.0, 0.3], dtype=D)
    res = Anderson(growth=2.0)(lambda y: torch.cos(y) + theta[:, None] * torch.sin(y), torch.ones(3, 1, dtype=D),
                               batch_dims=1)  # fmt: skip
    for i in range(3):
        one = Anderson(growth=2.0)(lambda y, i=i: torch.cos(y) + theta[i] * torch.sin(y), torch.ones(1, dtype=D))
        assert one.status == res.status[i]
        assert one.iterations == res.iterations[i]
        assert torch.allclose(one.x, res.x[i], atol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"memory": 0}, "memory must be an integer >= 1"), ({"damping": -1.0}, "damping must be a number > 0"),
     ({"growth": 0.0}, "growth must be"), ({"regularization": -1.0}, "regularization must be >= 0")],
)  # fmt: skip
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"Anderson: {message}"):
        Anderson(**options)
