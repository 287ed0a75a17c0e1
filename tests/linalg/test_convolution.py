"""Convolutions under FastConvolutions: torch's values, and derivatives of the second and third order."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from nestopt.linalg import FreshGraph, Hessian, KeptGraph
from nestopt.linalg.convolution import FastConvolutions
from nestopt.linalg.guard import graph_nodes

CASES = {
    "1d": (F.conv1d, (2, 2, 6), (3, 2, 2), {}),
    "1d, strided and dilated": (F.conv1d, (2, 2, 9), (3, 2, 2), {"stride": 2, "padding": (1,), "dilation": 3}),
    "2d": (F.conv2d, (2, 2, 4, 3), (3, 2, 2, 2), {}),
    "2d, strided and padded": (F.conv2d, (2, 1, 5, 5), (2, 1, 3, 3), {"stride": (2, 1), "padding": [1, 0]}),
    "2d in groups": (F.conv2d, (1, 4, 3, 3), (4, 2, 2, 2), {"groups": 2}),
    "3d": (F.conv3d, (1, 1, 3, 3, 2), (2, 1, 2, 2, 1), {"padding": 1, "stride": (1, 2, 2)}),
    "same padding": (F.conv1d, (1, 2, 4), (2, 2, 3), {"padding": "same"}),
    "unbatched": (F.conv1d, (2, 4), (2, 2, 2), {}),
}


def tensors(shape, kernel, bias):
    parts = [torch.randn(shape), torch.randn(kernel)] + ([torch.randn(kernel[0])] if bias else [])
    return [part.double().requires_grad_() for part in parts]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_values_and_derivatives(name, bias):
    convolve, shape, kernel, options = CASES[name]
    inputs = tensors(shape, kernel, bias)

    def fast(*inputs):
        with FastConvolutions():
            return convolve(*inputs, **options)

    assert torch.equal(fast(*inputs), convolve(*inputs, **options))
    assert gradcheck(fast, inputs) and gradgradcheck(fast, inputs)
    for i in range(len(inputs)):  # one input alone: nothing is computed for the others
        fixed = [part.detach() for part in inputs]
        assert gradgradcheck(lambda part, i=i, fixed=fixed: fast(*fixed[:i], part, *fixed[i + 1 :]), inputs[i])


def test_third_derivatives():
    x, w = tensors((1, 1, 4), (1, 1, 2), bias=False)

    def slopes(x, w):
        with FastConvolutions():
            value = (F.conv1d(x, w) ** 3).sum()
        return torch.autograd.grad(value, (x, w), create_graph=True)

    assert gradgradcheck(slopes, (x, w))


def is_ours(value):
    return any("_Convolution" in node.name() for node in graph_nodes([value]))


def test_left_to_torch():
    x, w = torch.randn(1, 1, 4), torch.randn(1, 1, 3, requires_grad=True)
    with FastConvolutions():
        assert is_ours(F.conv1d(x, w)) and is_ours(nn.Conv1d(1, 1, 2)(x))
        assert not is_ours(F.conv1d(x, w, padding="same"))
        assert not F.conv1d(x, w.detach()).requires_grad
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = F.conv1d(x, w)
        assert half.dtype == torch.bfloat16 and not is_ours(half)
    assert not is_ours(F.conv1d(x, w))


@pytest.mark.parametrize("product", [KeptGraph(), KeptGraph(3), FreshGraph()], ids=repr)
def test_products_with_checkpoint_and_blocks(product):
    net = nn.Sequential(nn.Conv1d(1, 2, 2), nn.BatchNorm1d(2), nn.Tanh(), nn.Conv1d(2, 1, 2, stride=2)).double()
    x = torch.randn(3, 1, 7, dtype=torch.float64)

    def loss(p, through):
        return (through(lambda x: torch.func.functional_call(net, p, (x,)), x) ** 2).sum()

    H = Hessian(lambda p: loss(p, lambda f, x: f(x)), net, product=product)
    truth = torch.autograd.functional.hessian(
        lambda v: loss(H.into.unflatten(v), lambda f, x: f(x)), H.into.flatten(net).detach()
    )
    torch.testing.assert_close(H.to_dense(), truth, rtol=1e-10, atol=1e-10)
    assert H.looped is None
    recomputing = Hessian(lambda p: loss(p, lambda f, x: checkpoint(f, x, use_reentrant=False)), net, product=product)
    torch.testing.assert_close(recomputing.to_dense(), truth, rtol=1e-10, atol=1e-10)
