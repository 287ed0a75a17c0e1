"""The ten duties of what is inexact on purpose or solves no equation: backward passes, unrolled training, decisions.

Each case names in `lacks` the duties that mean nothing for it, and why.
"""

import pytest
import torch
from laws_layer import Case, duties
from torch import nn
from torch.func import vmap

from nestopt import implicit
from nestopt.implicit import OneStep, Phantom, Unroll
from nestopt.implicit.transforms import tracked
from nestopt.linalg import Status

D = torch.float64


def times(W, y):
    return (W @ y[..., None])[..., 0]


def contraction(y, W, b, s):
    return torch.tanh(times(W, y) + s[..., None] * b)


def example(g):
    W = torch.tensor([[0.4, 0.2], [-0.3, 0.1]], dtype=D) + 0.1 * torch.randn(2, 2, generator=g, dtype=D)
    return W, torch.randn(2, generator=g, dtype=D), 0.5 + torch.rand((), generator=g, dtype=D)


def iterate(T, y, steps=80):
    for _ in range(steps):
        y = T(y)
    return y


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        W, self.s = example(torch.Generator().manual_seed(3))[::2]
        self.W = nn.Parameter(W)
        self.register_buffer("unit", torch.ones((), dtype=D))

    def forward(self, y, b):
        return contraction(y, self.W, b, self.unit)


def by_pass(solver):
    """The fixed point of a contraction, with this backward pass."""

    def layer(W, b, s, guess=None, **options):
        batch = torch.broadcast_shapes(W.shape[:-2], b.shape[:-1], s.shape)
        W0, b0, s0 = W.detach(), b.detach(), s.detach()
        y = iterate(lambda y: contraction(y, W0, b0, s0), torch.zeros(*batch, 2, dtype=W.dtype, device=W.device))
        y = torch.where((b0.abs() < 100).all(-1, keepdim=True), y, torch.nan)  # as from a solver that gives up
        y = y if guess is None else y + 1e-12 * (guess - y)
        return implicit.fixed_point(contraction, y, W, b, s, batch_dims=len(batch), solver=solver, **options)

    def tree(inputs):
        y = layer(*(t.detach() for t in (inputs["first"], *inputs["rest"])))

        def of_tree(y, inputs):
            return contraction(y, inputs["first"], *inputs["rest"])

        return implicit.fixed_point(of_tree, y, inputs, solver=solver)

    def capturing(captured):
        y = torch.zeros((), dtype=D)
        return implicit.fixed_point(lambda y, a: y / 2 + a * (captured - captured), y, y + 1, solver=solver)

    def status(*theta):
        monitor = implicit.Monitor()
        layer(*theta, on_failure="nan", monitor=monitor)
        return monitor.last("point").codes  # an adjoint's is MAX_ITER on purpose

    def module():
        find = implicit.FixedPointLayer(Cell(), iterate, solver=solver)
        return find, (torch.zeros(2, dtype=D), torch.tensor([0.3, -0.7], dtype=D))

    return Case(
        str(solver), layer, example, shared=(0, 2), atol=1e-9, tree=tree, capturing=capturing, module=module,
        status=status, spoil=lambda t: (t[0], t[1] + 200, t[2]),
        guess=lambda y0, *theta: layer(*theta, guess=y0), lacks=INEXACT,
    )  # fmt: skip


INEXACT = {
    "check_gradcheck": "the derivative is inexact on purpose: test_backward_passes has its error",
    "check_gradgradcheck": "the derivative is inexact on purpose: test_backward_passes has its error",
    "check_certificates": "its residual is recorded, and above the tolerance on purpose",
}
PASSES = [by_pass(OneStep()), by_pass(Phantom(3, 0.8)), by_pass(Unroll(3)), by_pass(Unroll(4, checkpoint=2))]


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, dtype=D))

    def forward(self, x):
        return torch.tanh(x @ self.w)


MODELS = {dtype: Linear().to(dtype) for dtype in (torch.float32, D)}


def trained(w, x, rate, monitor=None, on_failure=None):
    """The weights after two steps of SGD with momentum, by torch.func.vmap for every item of a batch."""
    batch = torch.broadcast_shapes(w.shape[:-1], x.shape[:-2], rate.shape)
    module = MODELS[w.dtype]

    def one(w, x, rate):
        optimizer = implicit.SGD(rate, momentum=0.9)
        loss = lambda model, x: ((model(x) - 1) ** 2).mean()  # noqa: E731
        return implicit.unroll_training(module, loss, [x, 2 * x], optimizer, parameters={"w": w}).parameters["w"]

    found = nested(one, len(batch))(w.expand(*batch, 2), x.expand(*batch, 3, 2), rate.expand(batch))
    # the trained module's parameters are a function of where it began, which nobody asks for here
    return found if any(tracked(t) for t in (w, x, rate)) else found.detach()


def nested(function, count):
    for _ in range(count):
        function = vmap(function)
    return function


def trained_by_hand(w, x, rate):
    """The same two steps as plain operations."""
    velocity = 0
    for data in (x, 2 * x):
        p = torch.tanh(data @ w)
        gradient = 2 * ((p - 1) * (1 - p * p)) @ data / 3
        velocity = 0.9 * velocity + gradient
        w = w - rate * velocity
    return w


def training_example(g):
    return torch.randn(2, generator=g, dtype=D), torch.randn(3, 2, generator=g, dtype=D), torch.tensor(0.3, dtype=D)


TRAINING = Case(
    "unroll-training", trained, training_example, trained_by_hand, shared=(0, 2),
    lacks={
        "check_captured": "what the loss captures is differentiated, which is wanted",
        "check_trees": "its parameters and batches are trees: test_inner_loop",
        "check_bad_item": "plain operations: a NaN spoils what it is multiplied with, as anywhere in torch",
        "check_failures": "nothing is solved: Trained.finite says what became of it",
        "check_certificates": "nothing is solved",
        "check_guess": "where it begins is what it is differentiated in",
        "check_module": "a function of a module: test_inner_loop has copies and files",
        "check_memory": "test_inner_loop counts tensors over outer steps",
    },
)  # fmt: skip


VERTICES = torch.eye(3, dtype=D)


def cheapest(costs):
    return VERTICES.to(costs)[costs.argmin(-1)]


def separated(g):
    """Costs whose cheapest entry is far from the others' (as is 2 c_hat - c's): the losses are smooth there."""
    first = torch.tensor([0.0, 1.0, 2.0], dtype=D)[torch.randperm(3, generator=g)]
    second = torch.tensor([0.0, 1.0, 2.0], dtype=D)[torch.randperm(3, generator=g)]
    noise = 0.05 * torch.randn(2, 3, generator=g, dtype=D)
    return 3 * first + noise[0], second + noise[1]


def decision(name, function, example, module=None, **lacks):
    """A layer of decisions, whose oracle is a black box."""

    def layer(*theta, monitor=None, on_failure=None):
        out = function(*theta)
        return out if name == "perturbed" else out[..., None]

    def status(*theta):
        good = layer(*theta).isfinite().all(-1)
        return torch.where(good, Status.CONVERGED.code, Status.NON_FINITE.code)

    return Case(
        name, layer, example, shared=(), status=status, module=module,
        lacks={
            "check_captured": "its function, the oracle, is not differentiated: what it captures is a constant",
            "check_trees": "takes tensors, not pytrees",
            "check_zero_dimensions": "costs have a dimension",
            "check_certificates": "the oracle solves, and has no certificate",
            "check_failures": "the oracle's failures are the oracle's",
            "check_guess": "there is no guess",
            **lacks,
        },
    )  # fmt: skip


NOISE = "one draw for the whole batch: items have other noise than alone, see test_decision_losses"
ESTIMATE = "values and derivatives are estimates from samples: test_decision_losses has their means"
DECISIONS = [
    decision(
        "spo-plus", lambda p, c: implicit.spo_plus(p, c, cheapest), separated,
        check_module="its module averages over the batch: test_decision_losses has it",
        check_shared_sums="predicted and true costs must have one shape, so that nothing is shared",
    ),
    decision(
        "perturbed", lambda c: implicit.perturbed(c, cheapest, samples=20), lambda g: separated(g)[:1],
        lambda: (implicit.PerturbedOptimizer(cheapest, samples=4), (separated(torch.Generator())[0][None],)),
        check_gradcheck=ESTIMATE, check_gradgradcheck=ESTIMATE, check_vmap=NOISE, check_batch=NOISE,
        check_shared_sums="has one input", check_dtype_and_device="float32 draws other noise: test_decision_losses",
        check_module="its module draws new noise at each call: test_decision_losses",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("case", "law"), duties([*PASSES, TRAINING, *DECISIONS]))
def test_duty(case, law, generator):
    law(case, generator)
