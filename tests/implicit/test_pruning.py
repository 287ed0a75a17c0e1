import math

import pytest
import torch
from laws import DOUBLE, rand
from torch import nn

from nestopt.implicit import CubicSparsity, MFACOptimizer, Pruner
from nestopt.linalg import MFAC, BlockMFAC


def fisher(G, damping, blocks=None):
    """F in float64, block-diagonal where blocks is a size."""
    F = damping * torch.eye(G.shape[-1], dtype=DOUBLE) + G.double().T @ G.double() / len(G)
    number = torch.arange(G.shape[-1]) // (blocks or G.shape[-1])
    return torch.where(number[:, None] == number, F, 0.0)


MAKERS = {
    None: lambda G: MFAC(G, 0.1),
    4: lambda G: BlockMFAC(G, 4, 0.1),
}


@pytest.mark.parametrize("blocks", MAKERS)
def test_it_is_optimal_brain_surgeon(blocks):
    w, G = rand(10), rand(7, 10, seed=1)
    weights = {"b": w[6:].clone(), "a": w[:6].clone().reshape(2, 3)}  # optree's order: a, then b
    pruner = Pruner(weights, MAKERS[blocks])
    inverse = torch.linalg.inv(fisher(G, 0.1, blocks))
    score = w**2 / (2 * inverse.diagonal())
    gone = score.argsort()[:4]
    expected = w - inverse[:, gone] @ (w[gone] / inverse.diagonal()[gone])
    expected[gone] = 0
    step = pruner.prune(0.4, G)
    torch.testing.assert_close(torch.cat([weights["a"].reshape(-1), weights["b"]]), expected, rtol=1e-12, atol=1e-12)
    assert (step.removed, step.sparsity) == (4, 0.4)
    assert step.predicted_increase == pytest.approx(float(score[gone].sum()), rel=1e-12)
    assert pruner.sparsity == pytest.approx(0.4)
    assert [mask.shape for mask in pruner.masks] == [(2, 3), (4,)]


def test_removing_one_weight_is_optimal():
    """On a quadratic whose Hessian is F the loss rises by exactly the score, the least of any w with w_p = 0."""
    w, G = rand(8), rand(5, 8, seed=1)
    F = fisher(G, 0.1)
    pruned = w.clone()
    step = Pruner(pruned, MAKERS[None]).prune(1 / 8, G)
    rise = float((pruned - w) @ F @ (pruned - w)) / 2
    assert rise == pytest.approx(step.predicted_increase, rel=1e-12)
    others = []
    for p in range(8):
        rest = [q for q in range(8) if q != p]
        d = torch.zeros(8, dtype=DOUBLE)
        d[p] = -w[p]
        d[rest] = torch.linalg.solve(F[rest][:, rest], F[rest][:, p] * w[p])
        others.append(float(d @ F @ d) / 2)
    assert min(others) == pytest.approx(rise, rel=1e-10)


def test_what_is_pruned_stays_pruned_and_no_row_is_dropped():
    w, G = rand(12), rand(7, 12, seed=1)
    pruner = Pruner(w, MAKERS[None])
    pruner.prune(0.25, G)
    gone = ~pruner.masks[0]
    before = w.clone()
    pruner.prune(0.5, G)  # with the gradients of all weights: the pruned ones must not pull on the others
    assert torch.equal(w[gone], torch.zeros(3, dtype=DOUBLE))
    left = (~gone).nonzero()[:, 0]
    inverse = torch.linalg.inv(fisher(G[:, left], 0.1))  # all 7 rows
    new = (before[left] ** 2 / inverse.diagonal()).argsort()[:3]
    expected = before[left] - inverse[:, new] @ (before[left][new] / inverse.diagonal()[new])
    expected[new] = 0
    torch.testing.assert_close(w[left], expected, rtol=1e-11, atol=1e-11)
    assert pruner.prune(0.5, G).removed == 0
    assert pruner.prune(1.0).removed == 6
    assert torch.equal(w, torch.zeros_like(w))


def test_magnitude_pruning_changes_no_other_weight():
    w = torch.tensor([0.1, -3.0, 0.2, -0.05])
    step = Pruner(w).prune(0.5)
    assert w.tolist() == [0.0, -3.0, pytest.approx(0.2), 0.0]
    assert step.predicted_increase is None


@pytest.mark.parametrize("make", [lambda p: torch.optim.Adam(p, 0.1), lambda p: MFACOptimizer(p, 0.1, window=3)])
def test_masks_hold_through_retraining(make):
    net = nn.Linear(5, 3)
    pruner = Pruner({"weight": net.weight})
    pruner.prune(0.6)
    optimizer = make(net.parameters())
    handle = pruner.attach(optimizer)
    bias = net.bias.detach().clone()

    def train():
        for k in range(4):
            optimizer.zero_grad()
            (net(rand(8, 5, seed=k, dtype=torch.float32)) ** 2).sum().backward()
            optimizer.step()

    train()
    assert torch.equal(net.weight[~pruner.masks[0]], torch.zeros(9))
    assert not bool((net.weight[pruner.masks[0]] == 0).any())
    assert not torch.equal(net.bias, bias)
    handle.remove()
    train()
    assert bool((net.weight[~pruner.masks[0]] != 0).any())
    pruner.apply()
    assert torch.equal(net.weight[~pruner.masks[0]], torch.zeros(9))


def test_the_schedule():
    schedule = CubicSparsity(0.9, steps=3, initial=0.3)
    assert [schedule(t) for t in (-1, 0, 3, 7)] == [pytest.approx(s) for s in (0.3, 0.3, 0.9, 0.9)]
    assert schedule(1) == pytest.approx(0.9 - 0.6 * (2 / 3) ** 3, rel=1e-12)
    for bad in ({"final": 1.1, "steps": 1}, {"final": 0.5, "steps": 0}, {"final": 0.5, "steps": 1, "initial": 0.6}):
        with pytest.raises(ValueError, match="CubicSparsity"):
            CubicSparsity(**bad)


def test_bad_input():
    pruner = Pruner(rand(4), MAKERS[None])
    pruner.prune(0.5)
    for bad in (0.25, 1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"present 0\.5000 and 1"):
            pruner.prune(bad)
    for bad in (rand(3, 5), rand(4), [1.0]):
        with pytest.raises(ValueError, match=r"shape \(m, 4\)"):
            pruner.prune(0.75, bad)
    with pytest.raises(ValueError, match="no gradient"):
        pruner.prune(0.75, rand(0, 4))
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        pruner.prune(0.75, torch.tensor([[0.0] * 4, [math.nan] * 4], dtype=DOUBLE))
    assert pruner.sparsity == 0.5
    with pytest.raises(TypeError, match="floating dtype"):
        Pruner(torch.arange(3))
