"""torch.compile around layers: one graph break each, the same derivatives, no recompilation, whatever finds y."""

import pytest
import torch
from compiled import COMPILED, graphs
from torch import nn

from nestopt import implicit
from nestopt.linalg import GMRES

D = torch.float64
pytestmark = COMPILED


class Map(nn.Module):
    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(0.2 * torch.randn(3, 3, dtype=D, generator=torch.Generator().manual_seed(0)))

    def forward(self, y, x):
        return torch.tanh(y @ self.W.mT) + x


class Residual(Map):
    def forward(self, y, x):
        return y - super().forward(y, x)


class Energy(Map):
    def forward(self, y, x):
        return ((y - x) ** 2).sum(-1) + torch.log(torch.cosh(y @ self.W.mT)).sum(-1) / 4


def repeated(T, y):
    for _ in range(60):
        y = T(y)
    return y


def until_it_converges(R, y):
    """A loop that looks at its numbers, which no compiler can trace."""
    for _ in range(200):
        r = R(y)
        if float(r.abs().max()) < 1e-12:
            break
        y = y - r
    return y


class Model(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.first, self.last = nn.Linear(3, 3, dtype=D), nn.Linear(3, 2, dtype=D)

    def forward(self, x):
        h = self.first(x)
        return self.last(self.layer(torch.zeros_like(h), h)).square().sum()


LAYERS = {
    "root": lambda: implicit.RootLayer(Residual(), until_it_converges, batch_dims=1),
    "fixed point": lambda: implicit.FixedPointLayer(Map(), repeated, batch_dims=1, solver=GMRES()),
    "unrolled": lambda: implicit.FixedPointLayer(Map(), repeated, batch_dims=1, solver=implicit.Unroll(5)),
    "minimiser": lambda: implicit.ArgminLayer(Energy(), implicit.NewtonCG(), batch_dims=1),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.slow
def test_a_model_with_a_layer(name, generator):
    """Other numbers, and other batch sizes once the compiler knows that they change, compile nothing anew."""
    model = Model(LAYERS[name]())
    compiled = torch.compile(model, backend="aot_eager")
    seen = []
    for size in (4, 4, 5, 6, 7, 4):
        x = torch.randn(size, 3, generator=generator, dtype=D)
        found = torch.autograd.grad(compiled(x), list(model.parameters()))
        truth = torch.autograd.grad(model(x), list(model.parameters()))
        for a, b in zip(found, truth, strict=True):
            assert torch.allclose(a, b, atol=1e-12)
        seen.append(graphs())
    assert seen[0] == seen[1] == 2  # before the layer, and after it
    assert seen[-1] == seen[2] <= 4  # the second batch size makes the graphs general


@pytest.mark.slow
def test_functions_made_anew_at_every_call(generator):
    """A lambda of this call, tensors of this call: neither is guarded."""
    W = 0.2 * torch.randn(3, 3, generator=generator, dtype=D)

    def loss(W, x):
        W = W * 1.5
        with torch.no_grad():
            y = x
            for _ in range(60):
                y = torch.tanh(W @ y) + x
        y = implicit.fixed_point(lambda y, W, x: torch.tanh(W @ y) + x, y, W, x)
        return (y.sin() ** 2).sum()

    compiled = torch.compile(loss, backend="aot_eager")
    leaf = W.clone().requires_grad_()
    for _ in range(3):
        x = torch.randn(3, generator=generator, dtype=D)
        (found,) = torch.autograd.grad(compiled(leaf, x), leaf)
        (truth,) = torch.autograd.grad(loss(leaf, x), leaf)
        assert torch.allclose(found, truth, atol=1e-12)
        assert graphs() == 2


def test_second_derivatives(generator):
    """A compiled graph has no double backward: torch says so. Where none lies on the way, second derivatives pass."""
    x = torch.randn(3, generator=generator, dtype=D)

    def layer(theta):
        return implicit.argmin(lambda y, t: (y * y * t / 2 - y * x).sum(), x / theta.detach(), theta)

    def second(function, theta):
        (first,) = torch.autograd.grad(function(theta).sum(), theta, create_graph=True)
        return torch.autograd.grad(first.sum(), theta)[0]

    theta = torch.tensor([1.0, 2.0, 3.0], dtype=D, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager")
    assert torch.allclose(second(compiled, theta), 2 * x / theta.detach() ** 3, atol=1e-10)
    inside = torch.compile(lambda theta: layer(torch.sin(theta)), backend="aot_eager")
    with pytest.raises(RuntimeError, match="double backward"):
        second(inside, theta)
    # what works is to compile inside the derivative, or to compile the linear parts alone
    (first,) = torch.autograd.grad(inside(theta).sum(), theta)
    (truth,) = torch.autograd.grad(layer(torch.sin(theta)).sum(), theta)
    assert torch.allclose(first, truth, atol=1e-12)


def test_a_compiled_finder_runs_compiled_inside(generator):
    def twelve(T, y):
        for _ in range(12):
            y = T(y)
        return y

    finder = torch.compile(twelve, backend="aot_eager")
    model = Model(implicit.FixedPointLayer(Map(), finder, batch_dims=1))
    x = torch.randn(4, 3, generator=generator, dtype=D)
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.allclose(compiled(x), Model.forward(model, x), atol=1e-12)
    assert graphs() == 3


def newton(f, y):
    """Two steps written out, with second derivatives, which no compiled graph has."""
    for_every = torch.ones(y.shape[:-1], dtype=D)
    with torch.enable_grad():
        leaf = y.detach().requires_grad_()
        (g,) = torch.autograd.grad(f(leaf), leaf, for_every, create_graph=True)
        H = torch.stack([torch.autograd.grad(g[:, i].sum(), leaf, retain_graph=True)[0] for i in range(3)], -2)
    y = y - torch.linalg.solve(H, g.detach())
    for _ in range(12):
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            (g,) = torch.autograd.grad(f(leaf), leaf, for_every)
        y = y - torch.linalg.solve(H, g)
    return y


def test_a_finder_that_differentiates_twice(generator):
    model = Model(implicit.ArgminLayer(Energy(), newton, batch_dims=1))
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(4, 3, generator=generator, dtype=D)
        found, truth = (torch.autograd.grad(m(x), list(model.parameters())) for m in (compiled, model))
        for a, b in zip(found, truth, strict=True):
            assert torch.allclose(a, b, atol=1e-9)


def test_an_error_of_the_finder_leaves_the_compiler_as_it_was(generator):
    def failing(T, y):
        if y.shape[0] == 5:
            raise ValueError("five")
        return repeated(T, y)

    model = Model(implicit.FixedPointLayer(Map(), failing, batch_dims=1))
    weight = model.layer.function.W
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(4, 3, generator=generator, dtype=D)
    compiled(x)
    with pytest.raises(ValueError, match="five"):
        compiled(torch.ones(5, 3, dtype=D))
    assert model.layer.function.W is weight
    assert torch.allclose(compiled(x), model(x), atol=1e-12)
    before = graphs()
    assert torch.allclose(compiled(2 * x), model(2 * x), atol=1e-12)
    assert graphs() == before


def test_a_whole_graph_is_refused_with_the_reason():
    model = torch.compile(Model(LAYERS["fixed point"]()), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="it looks at the residuals that it certifies"):
        model(torch.ones(2, 3, dtype=D))
