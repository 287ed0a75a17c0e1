"""Picard: laws, rates of contraction, and maps that do not contract."""

import math

import pytest
import torch

from nestopt.implicit import Anderson, Picard
from nestopt.linalg import SolverError, Status

D = torch.float64


@pytest.mark.parametrize("rate", [0.3, 0.9])
def test_the_rate_is_that_of_the_contraction(rate):
    b = torch.ones(3, dtype=D)
    res = Picard(rtol=1e-8)(lambda y: rate * y + b, torch.zeros(3, dtype=D))
    assert res.rate == pytest.approx(rate, rel=1e-6)
    assert torch.allclose(res.x, b / (1 - rate), atol=1e-6)


def test_pinned_path():
    states, y = [], [1.0]
    Picard(0.5)(torch.cos, torch.tensor(1.0, dtype=D), callbacks=[lambda k, s: states.append(float(s.x)) or k == 3])
    for _ in range(3):
        y.append((y[-1] + math.cos(y[-1])) / 2)
    assert states == pytest.approx(y, abs=1e-15)
    assert states[-1] == pytest.approx(0.7398792505064895, abs=1e-14)


def test_maps_that_do_not_contract():
    """Per item: a contraction, a rate of 3, a cycle, a translation, chaos, an overflow."""
    maps = [
        (lambda y: 0.5 * y + 1, 0.0, Status.CONVERGED),
        (lambda y: 1 - 3 * y, 0.0, Status.NOT_CONTRACTING),
        (lambda y: 1 - y, 0.0, Status.NOT_CONTRACTING),
        (lambda y: y + 1, 0.0, Status.NOT_CONTRACTING),
        (lambda y: 3.9 * y * (1 - y), 0.3, Status.NOT_CONTRACTING),
        (lambda y: torch.exp(y), 1.0, Status.NOT_CONTRACTING),
    ]

    def T(y):
        return torch.stack([f(row) for (f, _, _), row in zip(maps, y, strict=True)])

    y0 = torch.tensor([[start] for _, start, _ in maps], dtype=D)
    res = Picard()(T, y0, batch_dims=1)
    assert [s.name for s in res.status] == [status.name for _, _, status in maps]
    assert res.rate[0] == pytest.approx(0.5, rel=1e-6)
    assert res.rate[1] == pytest.approx(3.0, rel=1e-6)
    assert res.rate[2] == pytest.approx(1.0, abs=1e-6)
    assert res.rate[3] == pytest.approx(1.0, abs=1e-6)
    assert res.rate[5] > 1
    assert bool(torch.isfinite(res.x).all())
    # the error is that of the point returned, the best one
    assert torch.allclose(res.error, (res.x - T(res.x)).norm(dim=-1))
    with pytest.raises(SolverError, match=r"5 of 6 NOT_CONTRACTING.*the observed `rate` is 1 or more"):
        res.unwrap()
    # damping cures the second: eigenvalue -3 needs damping below 1/2
    assert Picard(0.25)(maps[1][0], torch.zeros(1, dtype=D)).x.item() == pytest.approx(0.25)


def test_a_slow_contraction_that_meets_the_limit_is_not_called_divergent():
    res = Picard(max_iter=50)(lambda y: 0.999 * y + 1, torch.zeros(1, dtype=D))
    assert res.status == Status.MAX_ITER
    assert res.rate == pytest.approx(0.999, rel=1e-6)
    assert Picard(max_iter=5)(lambda y: 1 - 3 * y, torch.zeros(1, dtype=D)).status == Status.NOT_CONTRACTING


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("solver", [Picard(), Anderson()], ids=lambda s: type(s).__name__)
def test_half_precision(half, solver):
    res = solver(torch.cos, torch.ones(2, dtype=half))
    assert res.status == Status.CONVERGED
    assert res.x.dtype == half
    assert res.x.tolist() == pytest.approx([0.739, 0.739], abs=0.02)


def test_a_root_that_runs_away_has_diverged():
    assert Picard().root(lambda y: 1 - 3 * y, torch.zeros(1, dtype=D)).status == Status.DIVERGED


def test_running_statistics_do_not_move():
    norm = torch.nn.BatchNorm1d(2).double()
    Picard(max_iter=3)(lambda y: 0.1 * norm(y), torch.randn(5, 2, dtype=D))
    assert norm.running_mean.tolist() == [0, 0]


def test_bad_damping():
    with pytest.raises(ValueError, match="Picard: damping must be a number > 0, but got 0"):
        Picard(0)
