import copy
import math
import pickle

import pytest
import torch
from laws import DOUBLE, rand
from torch import nn

from nestopt.implicit import MFACOptimizer

SHAPES = [(3, 2), (), (4,)]


def parameters(dtype=DOUBLE):
    values = [rand(6, seed=i, dtype=dtype) for i in range(3)]
    return [nn.Parameter(v[: math.prod(shape)].reshape(shape)) for v, shape in zip(values, SHAPES, strict=True)]


def loss_of(params, k=0):
    return sum(((p - k % 3) ** 2 * (i + 1)).sum() + p.sin().sum() for i, p in enumerate(params))


def run(optimizer, params, steps, start=0):
    for k in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(params, k).backward()
        optimizer.step()


def test_every_step_is_the_formula_of_the_docstring():
    lr, window, damping, momentum, decay = 0.3, 4, 0.2, 0.7, 0.1
    params = parameters()
    optimizer = MFACOptimizer(params, lr, window, damping, momentum, decay)
    w = torch.cat([p.detach().reshape(-1) for p in params])
    rows, u = [], torch.zeros_like(w)
    for k in range(11):  # the window turns twice
        run(optimizer, params, 1, k)
        rows = [*rows, torch.cat([p.grad.reshape(-1) for p in params])][-window:]
        F = damping * torch.eye(len(w), dtype=DOUBLE) + sum(torch.outer(g, g) for g in rows) / window
        u = momentum * u + torch.linalg.solve(F, rows[-1])
        w = w - lr * (u + decay * w)
        torch.testing.assert_close(torch.cat([p.detach().reshape(-1) for p in params]), w, rtol=1e-11, atol=1e-11)


def test_a_window_of_one_is_a_scaled_gradient_step():
    p = nn.Parameter(torch.tensor([3.0, 4.0], dtype=DOUBLE))
    optimizer = MFACOptimizer([p], lr=1.0, window=1, damping=0.5, momentum=0.0)
    (p**2).sum().div(2).backward()  # g = p, |g|^2 = 25, F^-1 g = g / 25.5
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([3.0, 4.0], dtype=DOUBLE) * (1 - 1 / 25.5), rtol=1e-15, atol=0)
    assert not optimizer.state[p]  # no buffer without momentum


def test_it_trains_a_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    X = rand(64, 2, dtype=torch.float32)
    t = (X.prod(dim=-1) > 0).float()[:, None]
    optimizer = MFACOptimizer(net.parameters(), lr=0.01, window=32, damping=1e-3, momentum=0.9)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(net(X), t)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(150)]
    assert losses[-1] < 0.01 < 0.5 < losses[0]


@pytest.mark.parametrize("how", ["state_dict", "file", "pickle", "deepcopy"])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_a_resumed_run_is_the_same_bit_for_bit(how, dtype, tmp_path):
    params = parameters(dtype)
    options = dict(lr=0.02, window=5, damping=0.1, momentum=0.9, weight_decay=0.01)
    optimizer = MFACOptimizer([{"params": params[:2]}, {"params": params[2:], "window": 3}], **options)
    run(optimizer, params, 7)
    if how in ("pickle", "deepcopy"):
        both = (optimizer, params)
        other, again = pickle.loads(pickle.dumps(both)) if how == "pickle" else copy.deepcopy(both)
    else:
        again = [nn.Parameter(p.detach().clone()) for p in params]
        other = MFACOptimizer([{"params": again[:2]}, {"params": again[2:]}], lr=9.0, window=5)
        other.param_groups[1]["window"] = 3
        state = optimizer.state_dict()
        if how == "file":
            torch.save(state, tmp_path / "state.pt")
            state = torch.load(tmp_path / "state.pt", weights_only=True)
        other.load_state_dict(state)
    run(optimizer, params, 9, 7)
    run(other, again, 9, 7)
    assert all(torch.equal(p, q) for p, q in zip(params, again, strict=True))


def test_a_state_that_was_loaded_is_a_copy():
    params = parameters()
    optimizer = MFACOptimizer(params, lr=0.1, window=4, damping=0.1)
    run(optimizer, params, 2)
    again = [nn.Parameter(p.detach().clone()) for p in params]
    other = MFACOptimizer(again)
    other.load_state_dict(optimizer.state_dict())
    before = optimizer.state_dict()["windows"][0]["rows"].clone()
    run(other, again, 3)
    assert torch.equal(optimizer.state_dict()["windows"][0]["rows"], before)


def test_a_parameter_without_a_gradient_is_left_alone():
    params = parameters()
    optimizer = MFACOptimizer(params, lr=0.1, window=3, damping=0.1, weight_decay=0.5)
    run(optimizer, params, 2)
    still = params[2].detach().clone()
    momentum = optimizer.state[params[2]]["momentum_buffer"].clone()
    optimizer.zero_grad()
    loss_of(params[:2]).backward()
    moved = params[0].detach().clone()
    optimizer.step()
    assert torch.equal(params[2], still)
    assert torch.equal(optimizer.state[params[2]]["momentum_buffer"], momentum)
    assert not torch.equal(params[0], moved)
    rows = optimizer.state_dict()["windows"][0]["rows"]
    assert torch.equal(rows[2, -4:], torch.zeros(4, dtype=DOUBLE))
    optimizer.zero_grad()
    optimizer.step()  # nothing at all: no row, no move
    assert optimizer.state_dict()["windows"][0]["slot"] == 0
    assert torch.equal(params[2], still)


def test_a_bad_gradient_moves_nothing():
    params = parameters()
    optimizer = MFACOptimizer([{"params": params[:2]}, {"params": params[2:]}], window=3)
    loss_of(params).backward()
    params[2].grad[1] = math.nan
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="group 1 has NaN"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert optimizer.state_dict()["windows"] == [None, None]
    embedding = nn.Embedding(5, 2, sparse=True)
    sparse = MFACOptimizer(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match="sparse"):
        sparse.step()


def test_bad_options():
    params = parameters()
    for options in (
        {"lr": -1.0}, {"lr": math.nan}, {"window": 0}, {"window": 2.5}, {"damping": 0.0}, {"damping": -1.0},
        {"momentum": 1.0}, {"weight_decay": -0.1},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"MFACOptimizer: {next(iter(options))} must be"):
            MFACOptimizer(params, **options)
    with pytest.raises(ValueError, match="one dtype and device"):
        MFACOptimizer([params[0], nn.Parameter(torch.zeros(2))])
    optimizer = MFACOptimizer(params)
    with pytest.raises(ValueError, match="must come from an MFACOptimizer"):
        optimizer.load_state_dict(torch.optim.SGD(parameters(), lr=0.1).state_dict())
