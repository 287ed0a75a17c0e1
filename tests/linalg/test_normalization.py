"""Normalisation written out: torch's values, torch's running statistics, and what torch itself gets wrong."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from nestopt.linalg.normalization import PlainNormalization

D = torch.float64

LAYERS = {
    "batch": lambda: nn.BatchNorm1d(4),
    "batch, cumulative": lambda: nn.BatchNorm1d(4, momentum=None),
    "batch, bare": lambda: nn.BatchNorm1d(4, affine=False, track_running_stats=False),
    "instance": lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    "layer": lambda: nn.LayerNorm((4, 5)),
    "layer, bare": lambda: nn.LayerNorm(5, elementwise_affine=False),
    "rows": lambda: nn.LayerNorm(5),
    "group": lambda: nn.GroupNorm(2, 4),
    "weight": lambda: parametrizations.weight_norm(nn.Linear(5, 3)),
    "weight, columns": lambda: parametrizations.weight_norm(nn.Linear(5, 3), dim=1),
    "weight, whole": lambda: parametrizations.weight_norm(nn.Linear(5, 3), dim=None),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_running_statistics(name, mode, generator):
    x = torch.randn(6, 4, 5, generator=generator, dtype=D)
    plain, torchs = (LAYERS[name]().double() for _ in range(2))
    torchs.load_state_dict(plain.state_dict())
    for layer in (plain, torchs):
        for _ in range(3):
            with PlainNormalization() if layer is plain else torch.enable_grad():
                y = getattr(layer, mode)()(x)
            x = x + 1
        x = x - 3
        layer.result = y
    torch.testing.assert_close(plain.result, torchs.result, rtol=0, atol=1e-13)
    for ours, theirs in zip(plain.buffers(), torchs.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


KERNELS = {
    F.batch_norm: lambda x, w, b: torch.batch_norm(x, w, b, None, None, True, 0.1, 1e-5, False),
    F.instance_norm: lambda x, w, b: torch.instance_norm(x, w, b, None, None, True, 0.1, 1e-5, False),
    F.layer_norm: lambda x, w, b: torch.layer_norm(x.mT, (4,), w, b, 1e-5, False).mT,
}


@pytest.mark.parametrize("function", KERNELS, ids=lambda function: function.__name__)
def test_the_vmapped_second_derivative(function, generator):
    """Without the mode torch is wrong here by a part of order one."""
    X = torch.randn(2, 6, 4, 5, generator=generator, dtype=D)
    leaves = [torch.randn(4, 4, generator=generator, dtype=D), *torch.randn(2, 4, generator=generator, dtype=D)]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def outer(x, *leaves):
        def loss(S, w, b):
            return torch.tanh(KERNELS[function](torch.einsum("ncl,cd->ndl", x, S), w, b)).pow(2).sum()

        return sum(g.pow(3).sum() for g in torch.func.grad(loss, argnums=(0, 1, 2))(*leaves))

    wanted = torch.autograd.grad(sum(outer(x, *leaves) for x in X), leaves)
    with PlainNormalization():
        found = torch.autograd.grad(torch.func.vmap(outer, (0, None, None, None))(X, *leaves).sum(), leaves)
    for ours, truth in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


def test_the_second_derivative_of_weight_norm(generator):
    """torch takes the saved norms for constants."""
    v = torch.randn(3, 4, generator=generator, dtype=D)
    g = torch.randn(3, 1, generator=generator, dtype=D)

    def hessian(weight):
        return torch.autograd.functional.hessian(lambda v, g: weight(v, g).sin().sum(), (v, g))[0][0]

    with PlainNormalization():
        found = hessian(lambda v, g: torch._weight_norm(v, g, 0))
    torch.testing.assert_close(found, hessian(lambda v, g: v * g / v.norm(dim=1, keepdim=True)), rtol=0, atol=1e-12)


def test_one_value_a_channel_is_refused():
    with PlainNormalization(), pytest.raises(ValueError, match="more than one value a channel"):
        nn.BatchNorm1d(4)(torch.ones(1, 4))
