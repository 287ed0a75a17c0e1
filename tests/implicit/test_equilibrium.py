"""DEQ: the ten duties, the unrolled truth, the Jacobian's penalty and radius, policies, and training."""

import copy
import importlib.util
import pickle
from pathlib import Path

import pytest
import torch
from laws_layer import Case, check_bad_item, check_vmap, duties
from torch import nn

from nestopt import implicit
from nestopt.implicit import DEQ, Anderson, Broyden, Monitor, NewtonKrylov, Picard
from nestopt.linalg import GMRES, SolverError, Status

D = torch.float64
EXACT = Anderson(rtol=1e-13)


def times(W, y):
    return (W @ y[..., None])[..., 0]


class Sinh(nn.Module):
    """z = sinh(W asinh(z) + s b), whose fixed point has a closed form; all of it is input."""

    def forward(self, z, W, b, s):
        return torch.sinh(times(W, torch.asinh(z)) + s[..., None] * b)


def exact(W, b, s):
    z = times(torch.linalg.inv(torch.eye(2, dtype=W.dtype, device=W.device) - W), s[..., None] * b)
    return torch.sinh(z)


def layer_with(find, solver=None):
    def layer(*theta, z0=None, **options):
        batch = torch.broadcast_shapes(*(t.shape[: t.ndim - d] for t, d in zip(theta, (2, 1, 0), strict=True)))
        z0 = theta[0].new_zeros(*batch, 2) if z0 is None else z0
        return DEQ(Sinh(), find, solver=solver, batch_dims=len(batch), **options)(*theta, z0=z0)

    return layer


def example(g):
    def vector(n, low=-1.0):
        return low + (1 - low) * torch.rand(n, generator=g, dtype=D)

    W = 0.3 * (torch.eye(2, dtype=D) + 0.4 * torch.randn(2, 2, generator=g, dtype=D))
    return W, vector(2), vector(1, 0.5)[0]


class Cell(nn.Module):
    """A contraction with parameters and a buffer."""

    def __init__(self, n=3, scale=0.4):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        W = torch.randn(n, n, generator=g, dtype=D)
        self.W = nn.Parameter(scale * W / torch.linalg.matrix_norm(W, 2))
        self.b = nn.Parameter(torch.randn(n, generator=g, dtype=D))
        self.register_buffer("gain", torch.tensor(0.9, dtype=D))

    def forward(self, z, x):
        return torch.tanh(self.gain * z @ self.W.mT + x) + self.b


def case(name, find, solver=None, **options):
    layer = layer_with(find, solver)

    def tree(inputs):
        class OfTree(Sinh):
            def forward(self, z, inputs):
                assert inputs["none"] is None
                return super().forward(z, inputs["first"], *inputs["rest"])

        return DEQ(OfTree(), find, solver=solver, batch_dims=0)(inputs, z0=torch.zeros(2, dtype=D))

    def module():
        return DEQ(Cell(), find, solver=solver), (torch.tensor([[0.3, -0.7, 0.1]], dtype=D),)

    return Case(
        name, layer, example, exact, atol=1e-9, tree=tree, module=module,
        guess=lambda z0, *theta: layer(*theta, z0=z0), options=options,
        lacks={"check_captured": "takes a module, no function"},
    )  # fmt: skip


OTHER = case("NewtonKrylov-GMRES", NewtonKrylov(rtol=1e-13), GMRES(), warm_start=None)


@pytest.mark.parametrize(
    ("case", "law"),
    [*duties([case("Anderson-LU", EXACT)]), *duties([OTHER], [check_vmap, check_bad_item])],
)
def test_duty(case, law, generator):
    law(case, generator)


FINDS = [EXACT, Broyden(rtol=1e-13), Picard(rtol=1e-13), NewtonKrylov(rtol=1e-13)]


@pytest.mark.parametrize("find", FINDS, ids=lambda f: type(f).__name__)
def test_gradients_equal_those_of_many_layers(find, generator):
    model = DEQ(Cell(), find)
    x = torch.randn(5, 3, generator=generator, dtype=D, requires_grad=True)
    z = torch.zeros_like(x)
    for _ in range(100):
        z = model.cell(z, x)
    wanted = [*model.parameters(), x]
    ours = torch.autograd.grad((model(x) ** 3).sum(), wanted, create_graph=True)
    truth = torch.autograd.grad((z**3).sum(), wanted, create_graph=True)
    for a, b in zip(ours, truth, strict=True):
        assert torch.allclose(a, b, atol=1e-10)
    ours, truth = (torch.autograd.grad(sum((g**2).sum() for g in first), wanted) for first in (ours, truth))
    for a, b in zip(ours, truth, strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def test_an_ensemble_by_vmap(generator):
    models = [DEQ(Cell(scale=scale), EXACT) for scale in (0.1, 0.4, 0.9)]
    parameters, buffers = torch.func.stack_module_state(models)
    x = torch.randn(4, 3, generator=generator, dtype=D)

    def loss(parameters, buffers):
        return (torch.func.functional_call(models[0], (parameters, buffers), (x,)) ** 2).sum()

    found = torch.func.vmap(torch.func.grad(loss))(parameters, buffers)
    for i, model in enumerate(models):
        truth = torch.autograd.grad((model(x) ** 2).sum(), list(model.parameters()))
        for (name, _), g in zip(model.named_parameters(), truth, strict=True):
            assert torch.allclose(found[name][i], g, atol=1e-10, rtol=0)


def jacobians(model, z, x):
    return torch.stack(
        [torch.func.jacrev(lambda v, r=row: model.cell(v, r))(point) for point, row in zip(z, x, strict=True)]
    )


def test_the_penalty_is_the_jacobians_norm(generator):
    """Signs of n = 1 have no variance; in general the mean over many probes is |J|_F^2 / n, and so is its gradient."""
    x = torch.randn(4, 3, generator=generator, dtype=D)
    model = DEQ(Cell(), EXACT)
    z = model(x)
    parameters = list(model.parameters())[:1]
    exact = jacobians(model, z, x).square().sum() / z.numel()
    found = model.jacobian_penalty(z, x, probes=500, generator=generator)
    assert float(found.detach()) == pytest.approx(float(exact.detach()), rel=0.1)
    truth = torch.autograd.grad(exact, parameters, retain_graph=True)
    ours = torch.autograd.grad(found, parameters)
    for a, b in zip(ours, truth, strict=True):
        assert float((a - b).norm()) <= 0.2 * float(b.norm())
    one = DEQ(Cell(1), EXACT)
    z = one(x[:, :1])
    exact = jacobians(one, z, x[:, :1]).square().sum() / 4
    penalty = one.jacobian_penalty(z, x[:, :1])
    assert float(penalty.detach()) == pytest.approx(float(exact.detach()), rel=1e-12)
    ours, truth = (torch.autograd.grad(p, list(one.parameters()), retain_graph=True) for p in (penalty, exact))
    for a, b in zip(ours, truth, strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    again = [model.jacobian_penalty(model(x), x, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*again)
    with pytest.raises(ValueError, match="DEQ: probes must be an integer >= 1"):
        model.jacobian_penalty(z, x, probes=0)


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_the_spectral_radius(generator, batch_dims):
    x = torch.randn(4, 3, generator=generator, dtype=D)
    model = DEQ(Cell(scale=2.0), Broyden(rtol=1e-12), batch_dims=batch_dims)
    z = model(x)
    exact = torch.linalg.eigvals(jacobians(model, z, x)).abs().amax(-1)
    found = model.spectral_radius(z, x, steps=400)
    assert found.shape == (4,) * batch_dims
    assert not found.requires_grad
    assert torch.allclose(found, exact if batch_dims else exact.max(), rtol=0.02)
    with pytest.raises(ValueError, match="DEQ: steps must be an integer >= 2"):
        model.spectral_radius(z, x, steps=1)


def test_the_penalty_makes_a_cell_contract(generator):
    model = DEQ(Cell(scale=0.95), Anderson(rtol=1e-9))
    x = torch.randn(16, 3, generator=generator, dtype=D)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = float(model.spectral_radius(model(x), x).max())
    for _ in range(20):
        z = model(x).detach()
        optimizer.zero_grad()
        model.jacobian_penalty(z, x, generator=generator).backward()
        optimizer.step()
    assert float(model.spectral_radius(model(x), x).max()) < 0.7 * before


def test_a_cell_that_does_not_contract_is_named_with_its_rate():
    cell = Cell(1)
    with torch.no_grad():
        cell.W.fill_(-5.0)
    with pytest.raises(SolverError, match="y is not a fixed point") as caught:
        DEQ(cell, Picard(max_iter=100))(torch.zeros(2, 1, dtype=D))
    assert "Picard ended as" in caught.value.__notes__[0]
    assert "NOT_CONTRACTING" in caught.value.__notes__[0]
    assert torch.isfinite(DEQ(cell, Broyden())(torch.zeros(2, 1, dtype=D))).all()


def test_a_bad_item_is_nan_and_alone(generator):
    x = torch.randn(4, 3, generator=generator, dtype=D)
    good = DEQ(Cell(), EXACT)(x)
    x[1, 0] = torch.nan
    monitor = Monitor()
    z = DEQ(Cell(), EXACT, on_failure="nan", monitor=monitor)(x)
    assert z[1].isnan().all()
    assert torch.equal(z[[0, 2, 3]], good[[0, 2, 3]])
    assert monitor.last("point").status[1] == Status.NON_FINITE


def test_the_last_equilibrium_is_where_the_next_search_begins(generator):
    seen = []

    class Counted(Cell):
        def forward(self, z, x):
            seen.append(1)
            return super().forward(z, x)

    model, x = DEQ(Counted(), Picard(), reuse=True), torch.randn(4, 3, generator=generator, dtype=D)
    cold = model(x)
    steps = len(seen)
    seen.clear()
    assert torch.allclose(model(x), cold, atol=1e-9)
    assert len(seen) < steps / 3
    twin = pickle.loads(pickle.dumps(DEQ(Cell(), reuse=True)))
    assert twin.memory._last is None
    assert copy.deepcopy(model).memory._last is None
    assert sorted(model.state_dict()) == [f"layer.function.{name}" for name in ("W", "b", "gain")]
    assert model(x[:2]).shape == (2, 3)  # another shape begins at zero
    assert model.float()(x.float()).dtype == torch.float32
    bad = DEQ(Cell(), EXACT, reuse=True, on_failure="nan")
    bad(torch.where(torch.arange(4)[:, None] == 1, torch.nan, x))
    assert torch.isfinite(bad(x)).all()  # NaN is not begun from


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.dropout = Cell(20), nn.Dropout(0.5)

    def forward(self, z, x):
        return self.cell(self.dropout(z), x)


def test_dropout_keeps_one_mask_a_call(generator):
    x = torch.randn(4, 20, generator=generator, dtype=D)
    model = DEQ(Masked(), EXACT)
    state = torch.get_rng_state()
    first, second = model(x), model(x)
    assert not torch.allclose(first, second)
    torch.set_rng_state(state)
    assert torch.equal(model(x), first)
    # the backward pass sees the mask of its own call, whatever came between
    torch.set_rng_state(state)
    z = model(x)
    model(x)
    ours = torch.autograd.grad(z.sum(), model.cell.cell.W)[0]
    torch.set_rng_state(state)
    mask = nn.functional.dropout(torch.ones_like(x), 0.5)
    unrolled = torch.zeros_like(x)
    for _ in range(100):
        unrolled = model.cell.cell(mask * unrolled, x)
    assert torch.allclose(z, unrolled, atol=1e-10)
    assert torch.allclose(ours, torch.autograd.grad(unrolled.sum(), model.cell.cell.W)[0], atol=1e-10)
    model.eval()
    assert torch.equal(model(x), model(x))


class Normed(Cell):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3).double()

    def forward(self, z, x):
        return self.norm(super().forward(z, x)) * 0.3


def test_batch_norm(generator):
    x = torch.randn(8, 3, generator=generator, dtype=D)
    with pytest.raises(ValueError, match="depend on each other"):
        DEQ(Normed(), EXACT)(x)
    model = DEQ(Normed(), EXACT, batch_dims=0)
    model(x).sum().backward()
    assert model.cell.norm.num_batches_tracked == 0
    assert model.cell.norm.running_mean.tolist() == [0, 0, 0]
    assert torch.isfinite(model.cell.norm.weight.grad).all()
    assert torch.isfinite(DEQ(Normed(), EXACT).eval()(x)).all()


def test_trees_and_other_starts(generator):
    class Pair(Cell):
        def forward(self, z, x):
            return {"a": super().forward(z["b"][0], x), "b": (0.5 * z["a"],)}

    x = torch.randn(4, 3, generator=generator, dtype=D)
    start = {"a": torch.zeros_like(x), "b": (torch.zeros_like(x),)}
    model = DEQ(Pair(), EXACT)
    z = model(x, z0=start)
    assert torch.allclose(z["b"][0], z["a"] / 2, atol=1e-10)
    assert model.jacobian_penalty(z, x, generator=generator).shape == ()
    assert (model.spectral_radius(z, x) < 1).all()
    with pytest.raises(TypeError, match="pass a z0"):
        model({"x": x})
    assert model(x[:0], z0={"a": x[:0], "b": (x[:0],)})["a"].shape == (0, 3)


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"DEQ: cell must be a torch.nn.Module"):
        DEQ(torch.tanh)
    captured = torch.ones(3, dtype=D, requires_grad=True)

    class Capturing(Cell):
        def forward(self, z, x):
            return super().forward(z, x) * captured

    with pytest.raises(ValueError, match="captures"):
        DEQ(Capturing(), EXACT)(torch.zeros(2, 3, dtype=D))


def test_training_keeps_memory_flat_and_learns(generator):
    truth, model = DEQ(Cell(scale=0.9), EXACT), DEQ(Cell(scale=0.1), solver=GMRES(rtol=1e-8), reuse=True)
    x = torch.randn(16, 3, generator=generator, dtype=D)
    target = truth(x).detach()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


def test_the_layer_takes_a_batched_minimiser(generator):
    class Parabola(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(2.0, dtype=D))

        def forward(self, y, x):
            return (self.w * (y - x).square()).sum(-1) + y.square().sum(-1)

    x = torch.randn(5, 3, generator=generator, dtype=D)
    y = implicit.ArgminLayer(Parabola(), implicit.LBFGS(), batch_dims=1)(torch.zeros_like(x), x)
    assert torch.allclose(y, 2 / 3 * x, atol=1e-8)


@pytest.mark.slow
def test_the_graph_example(tmp_path, capsys):
    """A contraction by construction: certified at every step, and better than the same network without the graph."""
    path = Path(__file__).parents[2] / "examples" / "graph_equilibrium.py"
    spec = importlib.util.spec_from_file_location("graph_equilibrium", path)
    graph = importlib.util.module_from_spec(spec)
    torch.set_default_dtype(D)
    spec.loader.exec_module(graph)
    data, monitor = graph.load(250), Monitor()
    model = graph.GraphNetwork(data[2], 64, 16, monitor)
    accuracies, certificates = graph.train("graph", model, data, 10, monitor)
    assert accuracies[-1] > accuracies[0] + 0.2
    assert all(distance <= limit and residual <= most for distance, limit, residual, most in certificates)
    paths, radius = graph.compare(model, data[0])
    assert radius <= graph.CONTRACTION
    assert len(paths["Anderson"]) < len(paths["Picard"])
    first = paths["Picard"][0][1]
    assert all(error <= 1.001 * first * graph.CONTRACTION**k for k, (_, error) in enumerate(paths["Picard"]))
    graph.draw(tmp_path / "graph.png", accuracies, accuracies, certificates, paths)
    assert (tmp_path / "graph.png").stat().st_size > 1000
    assert "spectral radius" in capsys.readouterr().out
