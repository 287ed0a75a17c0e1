"""Functions with normalisations inside, whose kernels torch differentiates wrongly: as right as written out by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap

from nestopt import implicit
from nestopt.linalg.guard import UndifferentiableError

D = torch.float64


def by_hand(h, axes, w, b):
    mean, var = h.mean(axes, keepdim=True), h.var(axes, keepdim=True, correction=0)
    return (h - mean) / (var + 1e-5).sqrt() * w + b


def groups_by_hand(h, w, b):
    return by_hand(h.reshape(3, 2, 2), [-1], 1, 0).reshape(3, 4) * w + b


# name: (torch's layer, the same by hand), of h (3, 4), w (4,) and b (4,)
LAYERS = {
    "layer": (lambda h, w, b: F.layer_norm(h, (4,), w, b), lambda h, w, b: by_hand(h, [-1], w, b)),
    "bias alone": (lambda h, w, b: F.layer_norm(h, (4,), None, b) * w, lambda h, w, b: by_hand(h, [-1], 1, b) * w),
    "batch": (lambda h, w, b: F.batch_norm(h, None, None, w, b, True), lambda h, w, b: by_hand(h, [0], w, b)),
    "instance": (
        lambda h, w, b: F.instance_norm(h.T[None], None, None, w, b)[0].T,
        lambda h, w, b: by_hand(h, [0], w, b),
    ),
    "group": (lambda h, w, b: F.group_norm(h, 2, w, b), groups_by_hand),
    "weight": (
        lambda h, w, b: h @ torch._weight_norm(torch.outer(w, b.exp()) + torch.eye(4), w[:, None], 0),
        lambda h, w, b: h @ F.normalize(torch.outer(w, b.exp()) + torch.eye(4), dim=1).mul(w[:, None]),
    ),
}


def attached(kind, norm, y0, theta0):
    """theta -> the solution, which is y0 at theta0 by construction."""

    def h(y, W, w, b):
        return torch.tanh(norm(y @ W, w, b))

    if kind == "root":
        value = h(y0, *theta0)
        return lambda *theta: implicit.root(lambda y, *t: y - y0 + 0.2 * (h(y, *t) - value), y0, *theta)

    def g(y, *theta):
        return (y**2).sum() + 0.2 * (h(y, *theta) * (1 + y)).sum()

    slope = torch.func.grad(g)(y0, *theta0)
    return lambda *theta: implicit.argmin(lambda y, *t: g(y, *t) - (slope * y).sum(), y0, *theta)


def score(gradients):
    return sum((1 + g**2).sqrt().sum() for g in gradients)


def third(solve, theta, _):
    value = score([solve(*theta)])
    for _ in range(3):
        gradients = torch.autograd.grad(value, theta, create_graph=True)
        value = score(gradients)
    return gradients


def vmapped_gradient(solve, theta, probes):
    def one(probe, *theta):
        return score(torch.func.grad(lambda *t: (probe * solve(*t)).sum().square(), argnums=(0, 1, 2))(*theta))

    value = vmap(one, (0, None, None, None))(probes, *theta).sum()
    gradients = torch.autograd.grad(value, theta, create_graph=True)
    return [*gradients, *torch.autograd.grad(score(gradients), theta)]


def vmapped_cotangents(solve, theta, probes):
    y = solve(*theta)
    rows = vmap(lambda u: torch.autograd.grad(y, theta, u, create_graph=True))(probes)
    return [*rows, *torch.autograd.grad(score(rows), theta)]


def batched_gradients(solve, theta, probes):
    y = solve(*theta)
    rows = torch.autograd.grad(y, theta, probes, create_graph=True, is_grads_batched=True)
    return [*rows, *torch.autograd.grad(score(rows), theta)]


def forward_twice(solve, theta, _):
    direction = tuple(t.detach().cos() for t in theta)

    def along(*theta):
        return torch.func.jvp(lambda *t: solve(*t).square().sum(), theta, direction)[1]

    return [torch.func.jvp(along, tuple(t.detach() for t in theta), direction)[1]]


WAYS = [third, vmapped_gradient, vmapped_cotangents, batched_gradients, forward_twice]


@pytest.fixture
def point(generator):
    y0, W = torch.randn(3, 4, generator=generator, dtype=D), torch.randn(4, 4, generator=generator, dtype=D) / 2
    w, b = 1 + 0.3 * torch.randn(2, 4, generator=generator, dtype=D)
    theta = [t.clone().requires_grad_() for t in (W, w, b - 1)]
    return y0, theta, torch.randn(2, 3, 4, generator=generator, dtype=D)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize(("kind", "name"), [("root", "layer"), *(("argmin", name) for name in LAYERS)])
def test_as_by_hand(name, kind, way, point):
    """Each way is wrong without an error, or fails, for at least one of the layers by torch's own kernels."""
    y0, theta, probes = point
    fixed = [t.detach() for t in theta]
    found, wanted = (way(attached(kind, norm, y0, fixed), theta, probes) for norm in LAYERS[name])
    for ours, truth in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


def test_a_batch_and_a_step(point):
    """The items of batch_dims and the unrolled pass see the same functions."""
    y0, theta, _ = point
    for options in ({"batch_dims": 1}, {"solver": implicit.Unroll(3)}):
        results = []
        for norm in LAYERS["layer"]:
            W, w, b = (t.detach() for t in theta)
            value = torch.tanh(norm(y0 @ W, w, b))

            def step(y, W, w, b, norm=norm, value=value):
                return y0 + 0.2 * (torch.tanh(norm(y @ W, w, b)) - value)

            results.append(third(lambda *t, step=step, o=options: implicit.fixed_point(step, y0, *t, **o), theta, None))
        for ours, truth in zip(*results, strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 3 * g * ctx.saved_tensors[0] ** 2


def test_an_objective_without_second_derivatives_is_refused():
    """Its gradient has no graph: the derivative would lack that part, and say nothing."""
    a = torch.tensor(1.0, dtype=D, requires_grad=True)
    with pytest.raises(UndifferentiableError, match=r"implicit.argmin: the autograd.Function Once.*once_diff"):
        implicit.argmin(lambda y, a: y**2 * a + Once.apply(y * a), torch.zeros((), dtype=D), a)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit is on its way out
def test_a_scripted_kernel_is_refused_beyond_the_first_derivative(point):
    y0 = point[0]
    scripted = torch.jit.script(nn.LayerNorm(4, dtype=D).requires_grad_(False))
    value = scripted(y0)

    def slope(norm, create_graph):
        a = torch.ones(4, dtype=D, requires_grad=True)
        y = implicit.root(lambda y, w: y - y0 + 0.2 * (w * norm(y) - value), y0, a)
        return torch.autograd.grad(y.square().sum(), a, create_graph=create_graph)[0]

    wanted = slope(lambda y: by_hand(y, [-1], 1, 0), False)
    torch.testing.assert_close(slope(scripted, False), wanted, rtol=1e-10, atol=1e-10)
    with pytest.raises(UndifferentiableError, match=r"kernel NativeLayerNorm.*scripted"):
        slope(scripted, True)
