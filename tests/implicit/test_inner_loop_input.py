"""unroll_training: what it refuses, and with which sentence; modules that it must take."""

import math

import pytest
import torch
from torch import nn

from nestopt import implicit
from nestopt.implicit import SGD, unroll_training

D = torch.float64


def squares(module, batch):
    return ((module(batch[0]) - batch[1]) ** 2).mean()


class InPlace(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.linear, self.how = nn.Linear(3, 1).double(), how

    def forward(self, x):
        if self.how == "assign":
            self.linear.weight = nn.Parameter(self.linear.weight.detach() / 2)
        else:
            with torch.no_grad():
                self.linear.weight.div_(2)
        return self.linear(x)


@pytest.mark.parametrize("how", ["assign", "div_"])
def test_a_forward_that_changes_parameters_is_refused(how):
    net = InPlace(how)
    before = net.linear.weight.detach().clone()
    with pytest.raises(ValueError, match=r"forward changes its parameter 'linear.weight'"):
        unroll_training(net, squares, [BATCH], SGD(0.1))
    assert torch.equal(net.linear.weight, before)


NET = nn.Linear(3, 1).double()
BATCH = (torch.ones(2, 3, dtype=D), torch.ones(2, 1, dtype=D))
WEIGHT = torch.ones(2, 1, dtype=D, requires_grad=True)


def captures(module, batch):
    return (WEIGHT * module(batch[0])).mean()


BAD = {
    "module": (lambda: unroll_training(lambda x: x, squares, [BATCH], SGD(0.1)), TypeError, "module must be a torch"),
    "loss": (lambda: unroll_training(NET, 3, [BATCH], SGD(0.1)), TypeError, "loss must be a function"),
    "torch": (
        lambda: unroll_training(NET, squares, [BATCH], torch.optim.SGD(NET.parameters(), lr=0.1)),
        TypeError,
        "implicit.from_torch",
    ),
    "class": (lambda: unroll_training(NET, squares, [BATCH], SGD), TypeError, "an instance such as implicit.SGD"),
    "unknown": (
        lambda: implicit.from_torch(torch.optim.Rprop(NET.parameters()), NET),
        TypeError,
        "must be torch.optim.SGD, Adam or AdamW, but got Rprop",
    ),
    "foreign": (
        lambda: implicit.from_torch(torch.optim.SGD([WEIGHT], lr=0.1), NET),
        ValueError,
        r"a parameter of shape \(2, 1\) that is none of Linear's",
    ),
    "mixed": (
        lambda: implicit.from_torch(
            torch.optim.Adam(
                [
                    {"params": [NET.weight], "decoupled_weight_decay": True},
                    {"params": [NET.bias], "decoupled_weight_decay": False},
                ]
            ),
            NET,
        ),
        ValueError,
        "decoupled_weight_decay must be the same in every parameter group",
    ),
    "vector": (
        lambda: unroll_training(NET, lambda m, b: m(b[0]), [BATCH], SGD(0.1)),
        ValueError,
        r"must return a scalar, but it returned shape \(2, 1\)",
    ),
    "number": (lambda: unroll_training(NET, lambda m, b: 1.0, [BATCH], SGD(0.1)), TypeError, "but it returned float"),
    "constant": (
        lambda: unroll_training(NET, lambda m, b: m(b[0]).detach().sum(), [BATCH], SGD(0.1)),
        ValueError,
        "does not depend on any trainable parameter",
    ),
    "names": (
        lambda: unroll_training(NET, squares, [BATCH], SGD(0.1), parameters={"wait": WEIGHT}),
        ValueError,
        r"parameters has 'wait', which the module has not; its names are \['weight', 'bias'\]",
    ),
    "shape": (
        lambda: unroll_training(NET, squares, [BATCH], SGD(0.1), parameters={"weight": WEIGHT}),
        ValueError,
        r"parameters\['weight'\] must have shape \(1, 3\), but got \(2, 1\)",
    ),
    "policy": (lambda: unroll_training(NET, squares, [BATCH], SGD(0.1), dropout="new"), ValueError, "must be one of"),
    "truncate": (lambda: unroll_training(NET, squares, [BATCH], SGD(0.1), truncate=-1), ValueError, "truncate must"),
    "every": (
        lambda: unroll_training(NET, squares, [BATCH], SGD(0.1), checkpoint_every=0),
        ValueError,
        "checkpoint_every must be an integer >= 1",
    ),
    "captured": (
        lambda: unroll_training(NET, captures, [BATCH], SGD(0.1), checkpoint_every=1),
        ValueError,
        r"it captures `WEIGHT` of shape \(2, 1\)",
    ),
    "captured under a transform": (
        lambda: torch.func.grad(
            lambda w: unroll_training(
                NET, lambda m, b: (w * m(b[0])).mean(), [BATCH], SGD(0.1), checkpoint_every=1
            ).losses.sum()
        )(WEIGHT),
        ValueError,
        "it captures `w`",
    ),
    "frozen": (
        lambda: unroll_training(nn.Linear(1, 1).requires_grad_(False), squares, [BATCH], SGD(0.1)),
        ValueError,
        "has no parameter that requires grad",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call()


def test_without_checkpoints_a_captured_tensor_counts():
    trained = unroll_training(NET, captures, [BATCH], SGD(0.1))
    (found,) = torch.autograd.grad(trained.parameters["weight"].sum(), WEIGHT)
    assert found.flatten().tolist() == pytest.approx([-0.15, -0.15])


def test_attention_inside_the_loop(generator):
    net = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).double()
    x, lr = torch.randn(2, 3, 4, generator=generator, dtype=D), torch.tensor(0.01, dtype=D, requires_grad=True)
    trained = unroll_training(net, lambda m, x: m(x).square().sum(), [x] * 2, SGD(lr))
    (found,) = torch.autograd.grad(trained(x).pow(3).sum(), lr)
    assert math.isfinite(float(found))
