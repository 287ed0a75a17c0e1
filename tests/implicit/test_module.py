"""Layers as modules: state, copies, training, and ensembles."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

from nestopt import implicit
from nestopt.linalg import CG, GMRES, SolverError

D = torch.float64


class Cell(nn.Module):
    """A contraction with parameters and a buffer."""

    def __init__(self, n=3):
        super().__init__()
        self.linear = nn.Linear(n, n)
        self.register_buffer("gain", torch.tensor(0.3))

    def forward(self, y, x):
        return self.gain * torch.tanh(self.linear(y)) + x


class Ridge(nn.Module):
    """An objective whose one parameter is the log of a weight."""

    def __init__(self):
        super().__init__()
        self.log_weight = nn.Parameter(torch.zeros((), dtype=D))

    def forward(self, w, X, y):
        return ((X @ w - y) ** 2).mean() / 2 + self.log_weight.exp() / 2 * (w @ w)


def iterate(function, y):
    for _ in range(60):
        y = function(y)
    return y


def layer(n=3, **options):
    return implicit.FixedPointLayer(Cell(n), iterate, batch_dims=1, **options).double()


def test_state_holds_parameters_and_buffers_only(generator):
    model = layer(solver=GMRES(), monitor=implicit.Monitor())
    x = torch.randn(4, 3, generator=generator, dtype=D)
    model(torch.zeros_like(x), x).sum().backward()
    assert sorted(model.state_dict()) == ["function.gain", "function.linear.bias", "function.linear.weight"]
    assert len(list(model.parameters())) == 2
    other = layer()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(torch.zeros_like(x), x), model(torch.zeros_like(x), x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(duplicate, generator):
    model = layer(solver=GMRES())
    x = torch.randn(4, 3, generator=generator, dtype=D)
    before = model(torch.zeros_like(x), x)
    before.sum().backward()
    twin = duplicate(model)
    assert torch.equal(twin(torch.zeros_like(x), x), before)
    with torch.no_grad():
        twin.function.linear.weight.add_(1.0)
    assert torch.equal(model(torch.zeros_like(x), x), before)
    assert twin.options["warm_start"] is not model.options["warm_start"]


def test_save_and_load(generator):
    model, other = layer(), layer()
    x = torch.randn(4, 3, generator=generator, dtype=D)
    with torch.no_grad():
        other.function.linear.weight.add_(1.0)
    before = model(torch.zeros_like(x), x)
    assert not torch.equal(other(torch.zeros_like(x), x), before)
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    other.load_state_dict(torch.load(stream))
    assert torch.equal(other(torch.zeros_like(x), x), before)


def test_to_moves_everything(generator):
    model = layer(solver=GMRES())
    x = torch.randn(4, 3, generator=generator, dtype=D)
    model(torch.zeros_like(x), x).sum().backward()
    model.float()
    out = model(torch.zeros(4, 3), x.float())
    assert out.dtype == torch.float32
    out.sum().backward()
    assert model.function.linear.weight.grad.dtype == torch.float32


def test_gradients_equal_those_of_the_unrolled_loop(generator):
    model = layer()
    x = torch.randn(4, 3, generator=generator, dtype=D, requires_grad=True)
    wanted = [*model.parameters(), x]
    ours = torch.autograd.grad((model(torch.zeros(4, 3, dtype=D), x) ** 2).sum(), wanted)
    truth = torch.autograd.grad(
        (iterate(lambda y: model.function(y, x), torch.zeros(4, 3, dtype=D)) ** 2).sum(), wanted
    )
    for a, b in zip(ours, truth, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def test_training_finds_the_cell_that_made_the_data(generator):
    torch.manual_seed(1)
    truth, model = layer(), layer()
    x = torch.randn(32, 3, generator=generator, dtype=D)
    target = truth(torch.zeros_like(x), x).detach()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = ((model(torch.zeros_like(x), x) - target) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-2 * losses[0]


def test_a_minimiser_finds_and_its_result_is_taken(generator):
    X, y = torch.randn(8, 2, generator=generator, dtype=D), torch.randn(8, generator=generator, dtype=D)
    model = implicit.ArgminLayer(Ridge(), implicit.NewtonCG(), solver=CG())
    w = model(torch.zeros(2, dtype=D), X, y)
    weight = torch.ones((), dtype=D, requires_grad=True)
    exact = torch.linalg.solve(X.mT @ X / 8 + weight * torch.eye(2, dtype=D), X.mT @ y / 8)
    assert torch.allclose(w, exact, atol=1e-9)
    w.sum().backward()
    (slope,) = torch.autograd.grad(exact.sum(), weight)
    assert model.function.log_weight.grad.item() == pytest.approx(slope.item(), abs=1e-8)  # weight = exp(0)


def test_a_search_that_stopped_early_is_refused():
    model = implicit.RootLayer(Cell(), lambda function, y: y + 1).double()
    with pytest.raises(SolverError, match="y is not a root of residual"):
        model(torch.zeros(3, dtype=D), torch.ones(3, dtype=D))


def test_running_statistics_do_not_move(generator):
    class Normalised(Cell):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, y, x):
            return 0.1 * self.norm(self.linear(y)) + x

    model = implicit.FixedPointLayer(Normalised(), iterate).double()
    x = torch.randn(8, 3, generator=generator, dtype=D)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.zeros_like(x), x).sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert torch.isfinite(model.function.norm.weight.grad).all()


def test_an_ensemble_by_vmap(generator):
    models = [layer() for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    x = torch.randn(4, 3, generator=generator, dtype=D)

    def loss(parameters, buffers):
        return (functional_call(models[0], (parameters, buffers), (torch.zeros_like(x), x)) ** 2).sum()

    found = vmap(grad(loss))(parameters, buffers)
    for i, model in enumerate(models):
        truth = torch.autograd.grad((model(torch.zeros_like(x), x) ** 2).sum(), list(model.parameters()))
        for (name, _), g in zip(model.named_parameters(), truth, strict=True):
            assert torch.allclose(found[name][i], g, atol=1e-10, rtol=0)


def test_frozen_parameters_and_pytrees():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.tensor(4.0)), nn.Parameter(torch.tensor(9.0), requires_grad=False)

        def forward(self, y, data):
            assert data["none"] is None
            return {"p": y["p"] ** 2 - self.a, "q": y["q"] ** 2 - self.b * data["scale"]}

    model = implicit.RootLayer(Pair(), lambda function, y: {"p": torch.tensor(2.0), "q": torch.tensor(3.0)})
    y = model({"p": torch.ones(()), "q": torch.ones(())}, {"scale": torch.tensor(1.0), "none": None})
    (y["p"] + y["q"]).backward()
    assert model.function.a.grad.item() == pytest.approx(0.25)
    assert model.function.b.grad is None


def test_bad_arguments_are_named():
    with pytest.raises(
        TypeError, match=r"RootLayer: function must be a torch.nn.Module.*call implicit.root itself|Type-check"
    ):
        implicit.RootLayer(lambda y: y, iterate)
