"""Nothing is kept alive: memory over a long training loop, and after a graph is dropped."""

import gc
import resource
import weakref

import pytest
import torch

from nestopt import implicit
from nestopt.linalg import GMRES, LU

D = torch.float64
N = 4


def residual(y, W, b):
    return y - torch.tanh(W @ y) - b


def solve(W, b):
    with torch.no_grad():
        y = b.clone()
        for _ in range(40):
            y = torch.tanh(W @ y) + b
    return y


@pytest.fixture
def parameters(generator):
    W = 0.1 * torch.randn(N, N, generator=generator, dtype=D)
    return W.requires_grad_(), torch.randn(N, generator=generator, dtype=D).requires_grad_()


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def live_tensors():
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("solver", [LU(), GMRES()])
@pytest.mark.parametrize("order", [1, 2])
def test_a_dropped_graph_frees_everything_without_the_collector(parameters, solver, order, no_collector):
    """Reference counts suffice: no cycle runs through the graph."""
    W, b = parameters
    y0 = solve(W, b)
    monitor, warm = implicit.Monitor(), implicit.WarmStart()

    def run():
        def watched(y, W, b):  # whatever the graph holds, it holds this
            return residual(y, W, b)

        y = implicit.root(watched, y0, W, b, solver=solver, monitor=monitor, warm_start=warm)
        if order == 2:
            (found,) = torch.autograd.grad((y**2).sum(), W, create_graph=True)
            torch.autograd.grad(found.sum(), [W, b], retain_graph=True)
        torch.autograd.grad((y**2).sum(), [W, b], create_graph=order == 2)
        return weakref.ref(watched)

    assert run()() is None


def test_a_graph_that_raised_is_freed(parameters):
    W, b = parameters
    with pytest.raises(RuntimeError) as caught:
        implicit.root(residual, solve(W, b) + 1, W, b)
    del caught
    gc.collect()
    before = live_tensors()
    for _ in range(20):
        with pytest.raises(RuntimeError):
            implicit.root(residual, solve(W, b) + 1, W, b)
    gc.collect()
    assert live_tensors() <= before


@pytest.mark.slow
@pytest.mark.slow
def test_memory_is_flat_over_1000_steps(parameters):
    W, b = parameters
    optimizer = torch.optim.SGD(parameters, lr=1e-4)
    monitor, warm = implicit.Monitor(keep=10), implicit.WarmStart()
    y0 = solve(W, b)

    def step():
        optimizer.zero_grad()
        y = implicit.root(
            residual, y0, W, b, solver=LU(), monitor=monitor, warm_start=warm, rtol=10.0
        )  # fmt: skip
        (y**2).sum().backward()
        optimizer.step()

    for _ in range(30):
        step()
    gc.collect()
    tensors, resident = live_tensors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(1000):
        step()
    gc.collect()
    assert live_tensors() <= tensors
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 8 * 1024  # kilobytes
