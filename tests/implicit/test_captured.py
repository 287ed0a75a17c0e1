"""Tensors that the user's function captures: found whatever differentiates or maps over them, and refused by name."""

import functools

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vmap

from nestopt import implicit

# torch's own forward mode scripts a function when it is first used

D = torch.float64
TWO, FOUR, ONE = (torch.tensor(v, dtype=D) for v in (2.0, 4.0, 1.0))
GLOBAL = torch.tensor(1.0, dtype=D, requires_grad=True)


def with_factor(y, a, factor):
    return y * y - a * factor


class Model:
    def __init__(self, factor):
        self.factor = factor

    def residual(self, y, a):
        return with_factor(y, a, self.factor)


def closure(factor):
    return lambda y, a: with_factor(y, a, factor)


def through_global(y, a):
    return with_factor(y, a, GLOBAL)


def module(factor):
    net = torch.nn.Linear(1, 1, bias=False, dtype=D)
    net.weight = torch.nn.Parameter(factor.detach().reshape(1, 1))
    return lambda y, a: y * y - net(a[None])[0]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (closure, "`factor` of shape"),
        (lambda w: closure(2 * w / 2), "`factor` of shape"),
        (lambda w: functools.partial(with_factor, factor=w), "`factor` of shape"),
        (lambda w: Model(w).residual, r"`self\.factor` of shape"),
        (lambda w: through_global, "`GLOBAL` of shape"),
        (module, r"`net\.weight` of shape \(1, 1\)"),
        (lambda w: lambda y, a, d={"w": w}: with_factor(y, a, d["w"]), r"`d\['w'\]` of shape"),
    ],
)  # fmt: skip
def test_a_tensor_that_requires_grad(make, name):
    residual = make(ONE.clone().requires_grad_())
    for theta in (FOUR, FOUR.clone().requires_grad_()):
        with pytest.raises(ValueError, match=rf"implicit.root: residual captures {name}.*pass it as an argument"):
            implicit.root(residual, TWO, theta)


def layer(theta, captured):
    return implicit.root(lambda y, theta: with_factor(y, theta, captured), TWO, theta)


TRANSFORMS = {
    "grad": lambda f, x: grad(f)(x),
    "jvp": lambda f, x: jvp(f, (x,), (x,)),
    "jacrev": lambda f, x: jacrev(f)(x),
    "vmap": lambda f, x: vmap(f)(torch.stack([x, x])),
    "vmap of grad": lambda f, x: vmap(grad(f))(torch.stack([x, x])),
    "grad of vmap": lambda f, x: grad(lambda x: vmap(f)(torch.stack([x, x])).sum())(x),
    "grad of grad": lambda f, x: grad(lambda x: grad(f)(x))(x),
    "jvp of grad": lambda f, x: jvp(lambda x: grad(f)(x), (x,), (x,)),
    "jvp of jvp": lambda f, x: jvp(lambda x: jvp(f, (x,), (x,))[1], (x,), (x,)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_tensor_of_a_transform(transform):
    """Also where theta itself is of the same level, which hides the captured one."""
    apply = TRANSFORMS[transform]
    for f in (lambda x: layer(FOUR, x), lambda x: layer(4 * x, x)):
        with pytest.raises(ValueError, match="residual captures `captured` of shape"):
            apply(f, ONE)
    apply(lambda x: layer(4 * x, ONE), ONE)


@pytest.mark.parametrize("outer", ["grad", "jvp", "vmap"])
def test_a_tensor_of_an_outer_level(outer):
    """The inner level knows nothing of it."""
    f = lambda x: grad(lambda theta: layer(theta, x))(FOUR)  # noqa: E731
    with pytest.raises(ValueError, match="residual captures `captured` of shape"):
        TRANSFORMS[outer](f, ONE)


def test_a_dual_tensor():
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(ONE, ONE)
        with pytest.raises(ValueError, match="residual captures `captured` of shape"):
            layer(FOUR, dual)


def test_a_parameter_under_a_transform_of_something_else():
    parameter = ONE.clone().requires_grad_()
    with pytest.raises(ValueError, match="residual captures `captured` of shape"):
        grad(lambda theta: layer(theta, parameter))(FOUR)


def test_constants_may_be_captured():
    a = FOUR.clone().requires_grad_()
    assert torch.autograd.grad(layer(a, ONE), a)[0].item() == pytest.approx(0.25)
    assert grad(lambda theta: layer(theta, ONE))(FOUR).item() == pytest.approx(0.25)


@pytest.mark.parametrize("attach", [implicit.fixed_point, implicit.argmin])
def test_every_layer_looks(attach):
    w = ONE.clone().requires_grad_()
    functions = {implicit.fixed_point: lambda y, a: a * w + 0 * y, implicit.argmin: lambda y, a: (y - a * w) ** 2}
    role = {implicit.fixed_point: "T", implicit.argmin: "objective"}[attach]
    with pytest.raises(ValueError, match=f"{role} captures `w` of shape"):
        attach(functions[attach], TWO, TWO.clone().requires_grad_())


def test_a_layer_inside_a_layer():
    """The inner root depends on the outer unknown, which it must be given."""
    a = FOUR.clone().requires_grad_()

    def nested(y, a):  # y = sqrt(sqrt(a)) by two square roots
        inner = implicit.root(lambda z, a: z * z - a, a.detach().sqrt(), a)
        return y * y - inner

    y = implicit.root(nested, FOUR**0.25, a)
    (slope,) = torch.autograd.grad(y, a, create_graph=True)
    assert slope.item() == pytest.approx(0.25 * 4**-0.75, abs=1e-12)
    assert torch.autograd.grad(slope, a)[0].item() == pytest.approx(-0.1875 * 4**-1.75, abs=1e-12)

    def captures(y, a):
        return implicit.root(lambda z: z - y * y, (y * y).detach()) - a

    with pytest.raises(ValueError, match="residual captures `y` of shape"):
        implicit.root(captures, TWO, a)
