"""The ten duties of root, fixed_point and argmin, each with a direct and a matrix-free solver."""

import pytest
import torch
from laws_layer import Case, check_memory, duties
from torch import nn

from nestopt import implicit
from nestopt.linalg import CG, GMRES, LU, Normal

D = torch.float64


def times(W, y):
    """W y for every item."""
    return (W @ y[..., None])[..., 0]


def attached(attach, function, exact, dims, solver, **more):
    """The layer that finds y by the formula, for any batch that the inputs' leading dimensions broadcast to."""

    def layer(*theta, guess=None, **options):
        batch = torch.broadcast_shapes(*(t.shape[: t.ndim - d] for t, d in zip(theta, dims, strict=True)))
        y = exact(*(t.detach() for t in theta))
        if guess is not None:
            y = y + 1e-12 * (guess - y)
        return attach(function, y, *theta, batch_dims=len(batch), solver=solver, **more, **options)

    return layer


def matrix(g, n=2):
    return torch.eye(n, dtype=D) + 0.4 * torch.randn(n, n, generator=g, dtype=D)


def vector(g, n=2, low=-1.0, high=1.0):
    return low + (high - low) * torch.rand(n, generator=g, dtype=D)


# The formulas invert matrices: torch 2.13 differentiates a jvp of torch.linalg.solve wrongly. Jacobians are not
# symmetric, for else A would pass for A'.
def root_residual(y, W, a, b, s):
    return a * torch.sinh(times(W, y)) - s[..., None] * b


def root_exact(W, a, b, s):
    return times(torch.linalg.inv(W), torch.asinh(s[..., None] * b / a))


def root_example(g):
    return matrix(g), vector(g, low=0.5, high=1.5), vector(g), vector(g, 1, 0.5, 1.5)[0]


def map_once(y, W, b, s):
    return torch.sinh(times(W, torch.asinh(y)) + s[..., None] * b)


def map_exact(W, b, s):
    z = times(torch.linalg.inv(torch.eye(2, dtype=W.dtype, device=W.device) - W), s[..., None] * b)
    return torch.where(z.abs() < 100, torch.sinh(z), torch.nan)  # as from a solver that gives up


def map_example(g):
    return 0.3 * matrix(g), vector(g), vector(g, 1, 0.5, 1.5)[0]


def objective(y, W, b, c, s):
    z = times(W, y)
    return (c * torch.cosh(z - b)).sum(-1) - s * z.sum(-1)


def argmin_exact(W, b, c, s):
    return times(torch.linalg.inv(W), b + torch.asinh(s[..., None] / c))


def argmin_example(g):
    return matrix(g), vector(g), vector(g, low=0.5, high=1.5), vector(g, 1, 0.5, 1.5)[0]


class Residual(nn.Module):
    """R = y + tanh(W y) - x - b."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.W, self.b = nn.Parameter(0.3 * matrix(g)), nn.Parameter(vector(g))
        self.register_buffer("gain", torch.tensor(0.3, dtype=D))

    def forward(self, y, x):
        return y + self.gain * torch.tanh(times(self.W, y)) - x - self.b


class Map(Residual):
    def forward(self, y, x):
        return y - super().forward(y, x)


class Objective(Residual):
    def forward(self, y, x):
        return (super().forward(y, x) ** 2).sum() + (y * y).sum()


def richardson(residual, y):
    for _ in range(60):
        y = y - residual(y)
    return y


def iterated(T, y):
    for _ in range(60):
        y = T(y)
    return y


def module_of(kind, function, find, solver):
    x = torch.tensor([0.3, -0.7], dtype=D)
    return lambda: (kind(function(), find, solver=solver), (torch.zeros(2, dtype=D), x))


def square(captured):
    return implicit.root(lambda y, a: y * y - a * captured, torch.tensor(2.0, dtype=D), torch.tensor(4.0, dtype=D))


def halving(captured):
    return implicit.fixed_point(
        lambda y, a: (y + a * captured) / 2, torch.tensor(4.0, dtype=D), torch.tensor(4.0, dtype=D)
    )


def parabola(captured):
    return implicit.argmin(lambda y, a: (y - a * captured) ** 2, torch.tensor(4.0, dtype=D), torch.tensor(4.0, dtype=D))


def case(name, solver, **options):
    """One of the three functions with a solver."""
    attach, function, exact, example, dims, spoil, capturing, module = {
        "root": (implicit.root, root_residual, root_exact, root_example, (2, 1, 1, 0),
                 lambda t: (t[0], 0 * t[1], *t[2:]), square, (implicit.RootLayer, Residual, richardson)),
        "fixed_point": (implicit.fixed_point, map_once, map_exact, map_example, (2, 1, 0),
                        lambda t: (t[0], t[1] + 200, t[2]), halving, (implicit.FixedPointLayer, Map, iterated)),
        "argmin": (implicit.argmin, objective, argmin_exact, argmin_example, (2, 1, 1, 0),
                   lambda t: (t[0], t[1], 0 * t[2], t[3]), parabola,
                   (implicit.ArgminLayer, Objective, implicit.NewtonCG())),
    }[name]  # fmt: skip
    layer = attached(attach, function, exact, dims, solver, **options)

    def tree(inputs):
        theta = (inputs["first"], *inputs["rest"])

        def of_tree(y, inputs):
            assert inputs["none"] is None
            return function(y, inputs["first"], *inputs["rest"])

        return attach(of_tree, exact(*(t.detach() for t in theta)), inputs, solver=solver, **options)

    return Case(
        f"{name}-{type(solver).__name__}", layer, example, exact, shared=(0, len(dims) - 1), atol=1e-9,
        thorough=isinstance(solver, LU), spoil=spoil, tree=tree, capturing=capturing,
        guess=lambda y0, *theta: layer(*theta, guess=y0), module=module_of(*module, solver),
    )  # fmt: skip


CASES = [
    case("root", LU()),
    case("root", GMRES()),
    case("fixed_point", Normal(CG(rtol=1e-4))),
    case("argmin", CG()),
]


@pytest.mark.parametrize(("case", "law"), duties(CASES))
def test_duty(case, law, generator):
    law(case, generator)


@pytest.mark.parametrize("case", CASES[1:], ids=str)
def test_the_example_is_not_symmetric(case, generator):
    """A law over symmetric Jacobians would not see A taken for A'."""
    W = case.example(generator)[0]
    assert float((W - W.mT).abs().max()) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[1:2], ids=str)  # root with LU: test_memory.py, with a monitor and a warm start
@pytest.mark.slow
def test_memory_over_1000_steps(case, generator):
    check_memory(case, generator, steps=1000)
