"""SGD, Adam and AdamW as functions: torch's steps, and derivatives of their trajectories."""

import functools

import pytest
import torch

from nestopt import implicit
from nestopt.implicit import SGD, Adam, AdamW

D = torch.float64


def loss(y, data):
    return ((data @ torch.tanh(y["w"]) - y["b"]) ** 2).mean() + 0.1 * torch.cosh(y["w"]).sum()


def start(g):
    return {
        "w": torch.randn(3, generator=g, dtype=D),
        "b": torch.randn((), generator=g, dtype=D),
    }, torch.randn(5, 3, generator=g, dtype=D)


def run(optimizer, y, data, steps=4):
    state = optimizer.init(y)
    for _ in range(steps):
        gradients = torch.func.grad(loss)(y, data)
        y, state = optimizer.step(y, gradients, state)
    return y, state


TORCH = {
    "sgd": (SGD, torch.optim.SGD, {"lr": 0.1}),
    "decay": (SGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.3}),
    "momentum": (SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.3}),
    "nesterov": (SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "adam": (Adam, torch.optim.Adam, {"lr": 0.1}),
    "adam-decay": (Adam, torch.optim.Adam, {"lr": 0.1, "weight_decay": 0.3, "betas": (0.8, 0.9), "eps": 1e-3}),
    "amsgrad": (Adam, torch.optim.Adam, {"lr": 0.5, "amsgrad": True, "betas": (0.1, 0.2)}),
    "adamw": (AdamW, torch.optim.AdamW, {"lr": 0.1}),
    "adamw-all": (AdamW, torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.5, "amsgrad": True, "maximize": True}),
}


@pytest.mark.parametrize("name", TORCH)
def test_the_trajectory_is_torchs(name, generator):
    ours, theirs, options = TORCH[name]
    y, data = start(generator)
    leaves = {key: value.clone().requires_grad_() for key, value in y.items()}
    reference = theirs(leaves.values(), **options)
    root = {} if ours is SGD else {"eps": 1e-8, "eps_root": 0.0}
    optimizer = ours(**{**root, **options})
    state = optimizer.init(y)
    for _ in range(25):
        reference.zero_grad()
        loss(leaves, data).backward()
        reference.step()
        y, state = optimizer.step(y, torch.func.grad(loss)(y, data), state)
        for key, value in leaves.items():
            torch.testing.assert_close(y[key], value.detach(), rtol=1e-12, atol=1e-12)


def trajectory(kind):
    """The end of a run as a function of everything that may be learnt."""

    def function(w, b, data, rates, decay, beta):
        lr = {"w": rates, "b": rates.mean()}
        if kind is SGD:
            optimizer = SGD(lr, momentum=beta, dampening=decay, weight_decay=decay, nesterov=False)
        else:
            optimizer = kind(lr, betas=(beta, 0.5 + beta / 2), weight_decay=decay, eps_root=1e-3, eps=decay / 10)
        y, _ = run(optimizer, {"w": w, "b": b}, data, steps=2)
        return y["w"], y["b"]

    return function


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_derivatives_of_the_trajectory(kind, generator):
    """Initial values, data, a learning rate an element, weight decay and betas: every mode, both orders."""
    y, data = start(generator)
    lr = 0.05 + 0.1 * torch.rand(3, generator=generator, dtype=D)
    values = (y["w"], y["b"], data, lr, torch.tensor(0.2, dtype=D), torch.tensor(0.6, dtype=D))
    inputs = tuple(value.clone().requires_grad_() for value in values)

    function = trajectory(kind)
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True, fast_mode=True)


def test_known_answers():
    """SGD on y^2/2: y_k = (1 - lr)^k; the first step of Adam is lr g / sqrt(g^2 + eps_root)."""
    lr = torch.tensor(0.1, dtype=D, requires_grad=True)
    y, state = torch.ones(1, dtype=D), None
    sgd = SGD(lr)
    state = sgd.init(y)
    for _ in range(5):
        y, state = sgd.step(y, y, state)
    (slope,) = torch.autograd.grad(y, lr, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, lr)
    assert y.item() == pytest.approx(0.9**5, abs=1e-14)
    assert slope.item() == pytest.approx(-5 * 0.9**4, abs=1e-14)
    assert curvature.item() == pytest.approx(20 * 0.9**3, abs=1e-13)
    g = torch.tensor([2.0, -1e-9, 0.0], dtype=D, requires_grad=True)
    adam = Adam(0.1, eps_root=1e-16)
    y, _ = adam.step(torch.zeros(3, dtype=D), g, adam.init(torch.zeros(3, dtype=D)))
    (found,) = torch.autograd.grad(y.sum(), g)
    s = (g.detach() ** 2 + 1e-16) ** 0.5
    torch.testing.assert_close(y.detach(), -0.1 * g.detach() / s, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found, -0.1 * 1e-16 / s**3, rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("options", [{}, {"eps": 1e-8, "eps_root": 0.0}])
def test_a_zero_gradient_has_a_derivative(options):
    """torch's denominator would give NaN; where v = 0 the step is linear in the gradient."""
    g, lr = torch.zeros(2, dtype=D, requires_grad=True), torch.tensor(0.1, dtype=D, requires_grad=True)
    adam = Adam(lr, **options)
    y, state = torch.ones(2, dtype=D), adam.init(torch.ones(2, dtype=D))
    y, state = adam.step(y, g, state)
    assert y.tolist() == [1.0, 1.0]
    found = torch.autograd.grad(y.sum(), [g, lr], retain_graph=True)
    torch.testing.assert_close(found[0], torch.full((2,), -0.1 / 1e-8, dtype=D))
    assert float(found[1]) == 0
    y, state = adam.step(y, torch.tensor([1.0, 0.0], dtype=D), state)
    assert all(value.isfinite().all() for value in torch.autograd.grad(y.sum(), [g, lr]))


def test_one_rate_a_tensor_or_an_element(generator):
    y, data = start(generator)
    gradients = torch.func.grad(loss)(y, data)
    rates = {"w": torch.tensor([0.1, 0.0, 0.3], dtype=D), "b": 0.2}
    new, _ = SGD(rates).step(y, gradients, SGD(rates).init(y))
    for key, rate in rates.items():
        torch.testing.assert_close(new[key], y[key] - rate * gradients[key])
    flags = {"w": True, "b": False}
    new, _ = SGD(0.1, maximize=flags).step(y, gradients, SGD(0.1).init(y))
    torch.testing.assert_close(new["w"], y["w"] + 0.1 * gradients["w"])
    torch.testing.assert_close(new["b"], y["b"] - 0.1 * gradients["b"])
    adam = Adam(0.1, amsgrad=flags)
    assert adam.init(y).largest["b"] is None


@pytest.mark.parametrize("optimizer", [SGD(0.1, momentum=0.9, weight_decay=0.1), AdamW(0.1), Adam(0.1, amsgrad=True)])
def test_a_parameter_without_a_gradient_is_left_alone(optimizer):
    y = {"a": torch.ones(2), "b": torch.ones(3)}
    state = optimizer.init(y)
    for _ in range(2):
        new, state = optimizer.step(y, {"a": torch.ones(2), "b": None}, state)
    assert new["b"] is y["b"]
    assert not torch.equal(new["a"], y["a"])
    if isinstance(optimizer, Adam):
        assert state.steps == {"a": 2, "b": 0}
        assert not state.mean["b"].any()
    else:
        assert state.momentum["b"] is None
    new, state = optimizer.step(y, {"a": None, "b": torch.ones(3)}, state)  # the first of b
    fresh, _ = optimizer.step({"b": y["b"]}, {"b": torch.ones(3)}, optimizer.init({"b": y["b"]}))
    assert torch.equal(new["b"], fresh["b"])


@pytest.mark.parametrize("optimizer", [SGD(0.1, momentum=0.9), AdamW(0.1, amsgrad=True)])
def test_any_pytree_any_dtype_nothing_in_place(optimizer, dtype):
    for y in (torch.ones(2, dtype=dtype), (torch.ones((), dtype=dtype), [torch.ones(0, 3, dtype=dtype)]), {}):
        before = torch.utils._pytree.tree_map(torch.clone, y)
        new, _ = optimizer.step(y, y, optimizer.init(y))
        torch.testing.assert_close(y, before, rtol=0, atol=0)
        assert all(leaf.dtype == dtype for leaf in torch.utils._pytree.tree_leaves(new))


def test_vmap_over_rates(generator):
    y, data = start(generator)
    rates = torch.tensor([0.05, 0.1, 0.2], dtype=D)
    batched = torch.func.vmap(lambda lr: run(Adam(lr), y, data)[0])(rates)
    for i, lr in enumerate(rates):
        for key, value in run(Adam(lr), y, data)[0].items():
            torch.testing.assert_close(batched[key][i], value, rtol=0, atol=1e-12)


BAD = {
    "lr": (lambda: SGD(-0.1), ValueError, r"SGD: lr must lie in \[0.0, inf\), but got -0.1"),
    "nan": (lambda: Adam(float("nan")), ValueError, "Adam: lr must lie in"),
    "beta": (lambda: AdamW(0.1, betas=(0.9, 1.0)), ValueError, r"AdamW: betas\[1\] must lie in"),
    "betas": (lambda: Adam(betas=0.9), ValueError, "must be a pair"),
    "kind": (lambda: SGD("fast"), TypeError, "number or a tensor, but got str"),
    "integer": (lambda: SGD(torch.tensor(1)), TypeError, "floating tensor, but it is torch.int64"),
    "nesterov": (lambda: SGD(0.1, nesterov=True), ValueError, "nesterov needs a momentum"),
    "tree": (
        lambda: SGD({"a": 0.1}).step({"b": torch.ones(1)}, {"b": torch.ones(1)}, SGD(0.1).init({"b": torch.ones(1)})),
        ValueError,
        "SGD: lr must be a number, a tensor, or a pytree of the parameters' structure",
    ),
    "gradients": (
        lambda: SGD(0.1).step({"b": torch.ones(1)}, torch.ones(1), SGD(0.1).init({"b": torch.ones(1)})),
        ValueError,
        "SGD: gradients must be a pytree",
    ),
    "broadcast": (
        lambda: SGD(torch.ones(3)).step(torch.ones(()), torch.ones(()), SGD(0.1).init(torch.ones(()))),
        ValueError,
        r"became torch.float32 of shape \(3,\): a hyper-parameter must broadcast",
    ),
    "dtype": (
        lambda: SGD(torch.ones(1).double()).step(torch.ones(1), torch.ones(1), SGD(0.1).init(torch.ones(1))),
        ValueError,
        "parameters, torch.float32 .* became torch.float64",
    ),
    "shape": (
        lambda: SGD(0.1).step(torch.ones(2), torch.ones(1), SGD(0.1).init(torch.ones(2))),
        ValueError,
        r"gradients must have shape \(2,\), but it has \(1,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call()


def test_a_subclass_writes_mathematics_only():
    """What the base class promises to those who bring their own optimizer."""
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class SignDescent(implicit.DifferentiableOptimizer):
        lr: float

        def init(self, parameters):
            return ()

        def _step(self, leaves, gradients, state, parameters):
            return [p if g is None else p - self.lr * g.sign() for p, g in zip(leaves, gradients, strict=True)], state

    step = functools.partial(SignDescent(0.5).step, state=())
    assert step({"a": torch.ones(2)}, {"a": torch.tensor([3.0, -1.0])})[0]["a"].tolist() == [0.5, 1.5]
