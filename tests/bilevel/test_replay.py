"""Metagradients of whole trainings."""

import gc
import math

import pytest
import torch
from laws_bilevel import relative
from problems import DOUBLE, quadratic

from nestopt import bilevel, implicit
from nestopt.bilevel.inner_steps import Carry, InnerSteps, PerStep
from nestopt.bilevel.problem import Spaces
from nestopt.linalg import Status, Stopping


def training(n=48, p=4, seed=0):
    """A small network on minibatches; x holds log learning rates of ten equal parts of the training."""
    g = torch.Generator().manual_seed(seed)
    A, Z = (torch.randn(n, p, generator=g, dtype=DOUBLE) for _ in range(2))
    w = torch.randn(p, generator=g, dtype=DOUBLE)
    a, z = torch.tanh(A @ w), torch.tanh(Z @ w)
    y0 = {"in": 0.5 * torch.randn(p, 3, generator=g, dtype=DOUBLE), "out": torch.ones(3, dtype=DOUBLE) / 3}

    def loss(y, rows, targets):
        return ((torch.tanh(rows @ y["in"]) @ y["out"] - targets) ** 2).mean() / 2

    cut = [(A[i : i + 12], a[i : i + 12]) for i in range(0, n, 12)]
    problem = bilevel.Problem(lambda x, y, batch: loss(y, *batch), lambda x, y, batch: loss(y, *batch))
    return problem, y0, PerStep(upper=(Z, z), lower=lambda t: cut[t % len(cut)])


def schedule(optimizer, steps):
    return lambda x, t: optimizer(x["lr"][10 * t // steps].exp())


def long_graph(problem, x0, y0, data, rule, steps):
    x = {"lr": x0["lr"].clone().requires_grad_()}
    y, state = {k: v.clone().requires_grad_() for k, v in y0.items()}, None
    for t in range(steps):
        optimizer = rule(x, t)
        slope = torch.autograd.grad(problem.lower(x, y, data.lower(t)), list(y.values()), create_graph=True)
        state = optimizer.init({k: v.detach() for k, v in y.items()}) if state is None else state
        y, state = optimizer.step(y, dict(zip(y, slope, strict=True)), state)
    return torch.autograd.grad(problem.upper(x, y, data.upper), x["lr"])[0]


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda lr: implicit.SGD(lr, momentum=0.9),
        lambda lr: implicit.Adam(lr),
        lambda lr: implicit.AdamW(lr, weight_decay=0.1),
    ],
    ids=["SGD", "Adam", "AdamW"],
)
def test_equal_to_one_long_graph(optimizer):
    problem, y0, data = training()
    steps, x0 = 70, {"lr": torch.full((10,), -3.0, dtype=DOUBLE)}
    rule = schedule(optimizer, steps)
    truth = long_graph(problem, x0, y0, data, rule, steps)
    for branching, segment in ((2, 7), (4, 16)):
        method = bilevel.Replay(steps=steps, optimizer=rule, branching=branching, segment=segment)
        state = method.init(problem, x0, y0, data)
        assert relative(state.hypergradient, truth) < 1e-10
        assert int(state.pulled) == steps
        assert float(state.residuals["trust"]) == 0
        assert "agrees" in method.diagnosis(state)


def test_memory_is_bounded():
    """The states held at once, counted in use, grow with the logarithm of the steps."""
    case = quadratic(5, 3)
    for steps, branching in ((32, 2), (128, 2), (128, 4)):
        method = bilevel.Replay(steps=steps, optimizer=implicit.SGD(0.05, momentum=0.5), branching=branching, segment=4)
        state = method.init(case.problem, case.x0, case.y0)
        levels = math.ceil(math.log(steps / 4, branching))
        assert int(state.stored) <= (branching - 1) * levels + 1
    # what is alive is what is counted: carries in the generators' frames
    spaces = Spaces.of(case.x0, case.y0)
    inner = InnerSteps(case.problem, spaces)
    method = bilevel.Replay(steps=128, optimizer=implicit.SGD(0.05), branching=2, segment=4)
    f = method._forward(inner, case.x0, case.y0, 0.0, torch.tensor([0.05, 0.0], dtype=DOUBLE))
    assert len(f.segments) == 1
    most = 0
    for _, held, _ in method._backwards(inner, f):
        alive = sum(isinstance(o, Carry) for o in gc.get_objects())
        most = max(most, alive)
        assert alive <= held + 2  # the one in hand
    assert most <= 2 + 1 + math.ceil(math.log2(32))


@pytest.mark.slow
def test_a_long_run():
    """2000 steps: the metagradient of a schedule, in few states, agrees with a difference of the whole training."""
    problem, y0, data = training()
    steps = 2000
    x0 = {"lr": torch.full((10,), -6.0, dtype=DOUBLE)}
    rule = schedule(lambda lr: implicit.SGD(lr, momentum=0.9), steps)
    method = bilevel.Replay(steps=steps, optimizer=rule, branching=8, segment=50)
    state = method.init(problem, x0, y0, data)
    assert int(state.pulled) == steps
    assert int(state.stored) <= 7 * math.ceil(math.log(steps / 50, 8)) + 1
    assert float(state.residuals["trust"]) == 0
    assert float(state.hypergradient.norm()) > 0


def test_a_schedule_is_learnt():
    problem, y0, data = training()
    x0 = {"lr": torch.full((10,), -6.0, dtype=DOUBLE)}
    method = bilevel.Replay(
        steps=60, optimizer=schedule(lambda lr: implicit.SGD(lr, momentum=0.9), 60), stopping=Stopping(max_iter=6)
    )
    res = bilevel.solve(problem, x0, y0, method, data=lambda k: data)
    assert res.value < 0.7 * res.history[0]["value"]


def test_chaotic_training_is_said():
    """Gradient steps on a quartic from 2/L on are chaotic: the metagradient is huge, and no difference agrees."""
    problem = bilevel.Problem(lambda x, y: ((y - 0.3) ** 2).sum(), lambda x, y: ((y**2 - 1) ** 2).sum() / 4)
    rule = lambda x, t: implicit.SGD(x.exp())  # noqa: E731
    y0 = torch.tensor([0.4, 0.7], dtype=DOUBLE)
    calm = bilevel.Replay(steps=150, optimizer=rule)
    state = calm.init(problem, torch.tensor(-2.0, dtype=DOUBLE), y0)
    assert float(state.residuals["trust"]) == 0
    state = calm.init(problem, torch.tensor(math.log(1.45), dtype=DOUBLE), y0)
    assert float(state.residuals["trust"]) > 0
    assert "chaotic" in calm.diagnosis(state)
    assert "lower it" in calm.diagnosis(state)
    assert float(state.error) > float(state.tolerance)


def test_float32_is_added_up_in_double():
    problem, y0, data = training()
    steps = 60
    x0 = {"lr": torch.full((10,), -3.0, dtype=DOUBLE)}
    rule = schedule(lambda lr: implicit.SGD(lr, momentum=0.9), steps)
    whole = bilevel.Replay(steps=steps, optimizer=rule).init(problem, x0, y0, data)
    cut = [data.lower(t) for t in range(4)]
    single = PerStep(upper=tuple(d.float() for d in data.upper), lower=lambda t: tuple(d.float() for d in cut[t % 4]))
    half = bilevel.Replay(steps=steps, optimizer=rule).init(
        problem, {"lr": x0["lr"].float()}, {k: v.float() for k, v in y0.items()}, single
    )
    assert half.hypergradient.dtype == torch.float32
    assert relative(half.hypergradient.double(), whole.hypergradient) < 1e-4


def test_refusals():
    problem, y0, data = training()
    rule = lambda x, t: implicit.SGD(x["lr"][0].exp())  # noqa: E731
    with pytest.raises(ValueError, match="forgotten"):
        bilevel.Replay(steps=3, optimizer=rule).init(
            problem, {"lr": torch.zeros(1, dtype=DOUBLE), "forgotten": torch.zeros(1, dtype=DOUBLE)}, y0, data
        )
    res = bilevel.solve(
        bilevel.Problem(lambda x, y: ((y - x) ** 2).sum(), lambda x, y: -(y**2).sum()),
        torch.ones(1, dtype=DOUBLE), torch.ones(1, dtype=DOUBLE) * 2,
        bilevel.Replay(steps=60, optimizer=implicit.SGD(0.5)),
    )  # fmt: skip
    assert res.status == Status.DIVERGED
    assert 30 <= int(res.state.diverged_at) <= 40
