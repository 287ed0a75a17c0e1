"""Automatic chunk sizes: the decision by a clock that the test owns, memory within what was asked, refusals."""

import pytest
import torch
import torch.nn.functional as F
from laws import rand
from torch import nn
from torch.func import functional_call

from nestopt.linalg import AutoChunk, ForwardOverReverse, FreshGraph, GaussNewton, Hessian, Jacobian, KeptGraph, chunks
from nestopt.linalg.chunks import Blocks, PeakMemory, free_memory


class Clock:
    """Time passes only in the products of `Machine`."""

    now = 0.0

    def __call__(self, device):
        return self.now


class Machine:
    """A diagonal product that takes a second alone and `cost` seconds a vector in a chunk, and notes its calls."""

    def __init__(self, cost, monkeypatch, limit=None):
        self.cost, self.limit, self.calls, self.clock = cost, limit, [], Clock()
        monkeypatch.setattr(chunks, "_clock", self.clock)

    def __call__(self, v, batched):
        self.calls.append(len(v) if batched else 1)
        if self.limit is not None and batched and len(v) > self.limit:
            raise torch.OutOfMemoryError("too large")
        self.clock.now += self.cost * len(v) if batched else 1.0
        return v * torch.arange(1.0, 9.0)


def apply(blocks, machine, k):
    machine.calls.clear()
    v = rand(k, 8, dtype=torch.float32)
    assert torch.equal(blocks.apply(machine, v, 8), v * torch.arange(1.0, 9.0))
    return list(machine.calls)


def test_a_chunk_that_wins_is_kept(monkeypatch):
    blocks, machine = Blocks(AutoChunk()), Machine(0.3, monkeypatch)
    # one weighed, two timed, two weighed in a chunk; the others are the trial: no product is made twice
    assert apply(blocks, machine, 16) == [1, 1, 1, 2, 11]
    assert apply(blocks, machine, 16) == [16]
    assert apply(blocks, machine, 5) == [5]
    assert blocks.reason is None


@pytest.mark.parametrize("cost", [0.95, 4.0])
def test_a_chunk_that_loses_gives_way_to_the_loop(cost, monkeypatch):
    blocks, machine = Blocks(AutoChunk()), Machine(cost, monkeypatch)
    apply(blocks, machine, 16)
    trials = apply(blocks, machine, 13)
    assert trials == ([13] if cost < 3 else [1] * 13)  # a narrow loss is tried thrice, a clear one is not
    apply(blocks, machine, 13)
    assert apply(blocks, machine, 13) == [1] * 13
    assert "the loop is as fast: 1.0e+00 s a vector" in blocks.reason


def test_a_chunk_too_large_for_the_device_is_halved(monkeypatch):
    blocks, machine = Blocks(AutoChunk()), Machine(0.1, monkeypatch, limit=4)
    calls = apply(blocks, machine, 40)
    assert calls[:5] == [1, 1, 1, 2, 35] and max(calls[calls.index(35) + 1 :]) <= 17
    calls = apply(blocks, machine, 40)
    assert sum(size for size in calls if size <= 4) == 40 and max(calls) <= 4
    blocks, machine = Blocks(AutoChunk()), Machine(0.1, monkeypatch, limit=1)
    assert apply(blocks, machine, 6) == [1, 1, 1, 2, 1, 1, 1]
    assert "do not fit" in blocks.reason
    with pytest.raises(torch.OutOfMemoryError):
        Blocks(8).apply(machine, rand(8, 8, dtype=torch.float32), 8)


def test_an_operation_without_a_rule_is_looped(monkeypatch):
    blocks, machine = Blocks(AutoChunk()), Machine(0.1, monkeypatch)

    def product(v, batched):
        if batched:
            raise RuntimeError("no batching rule")
        return machine(v, batched)

    v = rand(5, 8, dtype=torch.float32)
    assert torch.equal(blocks.apply(product, v, 8), v * torch.arange(1.0, 9.0))
    assert blocks.reason == blocks.looped == "no batching rule"


NET = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 4)).double()
X, Y = rand(64, 20), torch.arange(64) % 4


def loss(p):
    return F.cross_entropy(functional_call(NET, p, (X,)), Y)


@pytest.mark.parametrize("product", [KeptGraph, ForwardOverReverse], ids=lambda p: p.__name__)
def test_memory_stays_within_what_was_asked(product, monkeypatch):
    monkeypatch.setattr(chunks, "_MARGIN", float("inf"))  # every chunk wins: memory alone decides
    plain = Hessian(loss, NET)
    V = rand(16, plain.shape[-1])
    with PeakMemory() as alone:
        Hessian(loss, NET, product=product())._matvec(V[0])
    budget = 6 * alone.peak
    H = Hessian(loss, NET, product=product(AutoChunk(budget)))
    torch.testing.assert_close(H @ V, plain @ V, rtol=1e-10, atol=1e-14)
    passes = []
    real = H.operator.blocks._pass

    def watched(function, part, batched, measured):
        with PeakMemory() as memory:
            out = real(function, part, batched, measured)
        passes.append((len(part), memory.peak))
        return out

    H.operator.blocks._pass = watched
    torch.testing.assert_close(H @ V, plain @ V, rtol=1e-10, atol=1e-14)
    assert max(peak for _, peak in passes) <= budget
    assert 2 <= max(width for width, _ in passes) < 16


@pytest.mark.parametrize("product", [KeptGraph, FreshGraph, ForwardOverReverse], ids=lambda p: p.__name__)
def test_one_product_that_exceeds_the_memory_is_refused_by_a_sentence(product):
    H = Hessian(loss, NET, product=product(AutoChunk(memory=100)))
    with pytest.raises(
        MemoryError, match=r"AutoChunk: one product takes \d+ bytes, more than memory=100; raise memory"
    ):
        H @ rand(3, H.shape[-1])
    H @ rand(H.shape[-1])  # a single vector is no block


def test_a_block_of_results_larger_than_memory_is_refused(monkeypatch):
    monkeypatch.setattr(chunks, "_LARGE", 100)
    monkeypatch.setattr(chunks, "free_memory", lambda device: 1000)
    H = Hessian(loss, NET)
    with pytest.raises(MemoryError, match=r"the products with 3 vectors take .* bytes, but 1000 are free on cpu"):
        H @ rand(3, H.shape[-1])


def test_jacobian_and_gauss_newton_take_it():
    model = lambda p: functional_call(NET, p, (X[:4],))  # noqa: E731
    J = Jacobian(model, NET, chunk_size=AutoChunk())
    plain = Jacobian(model, NET)
    for _ in range(2):
        torch.testing.assert_close(J.T.to_dense(), plain.T.to_dense(), rtol=1e-12, atol=1e-14)
        V = rand(20, J.shape[-1])
        torch.testing.assert_close(J @ V, plain @ V, rtol=1e-12, atol=1e-12)
    G = GaussNewton(model, lambda z: F.cross_entropy(z, Y[:4]), NET, chunk_size=AutoChunk())
    torch.testing.assert_close(G @ V, V @ G.to_dense(), rtol=1e-10, atol=1e-13)


def test_free_memory_and_peak():
    assert 0 < free_memory(torch.device("cpu")) < 2**60
    with PeakMemory() as memory:
        kept = torch.ones(1000)
        for _ in range(3):
            (kept + 1).sum()
    assert 8000 <= memory.peak < 12000  # what was dropped is not counted twice


@pytest.mark.gpu
def test_on_a_gpu():
    device = torch.device("cuda")
    assert 0 < free_memory(device) <= torch.cuda.get_device_properties(device).total_memory
    net, x, y = nn.Linear(20, 4).to(device), X.float().to(device), Y.to(device)
    H, plain = (
        Hessian(lambda p: F.cross_entropy(functional_call(net, p, (x,)), y), net, product=KeptGraph(size))
        for size in (AutoChunk(), None)
    )
    V = rand(16, 84, dtype=torch.float32).to(device)
    for _ in range(3):
        torch.testing.assert_close(H @ V, plain @ V, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("memory", [0, -1, 1.5, "all"])
def test_bad_input_is_refused_by_name(memory):
    with pytest.raises(ValueError, match="AutoChunk: memory must be a positive number of bytes"):
        AutoChunk(memory)
    with pytest.raises(ValueError, match="KeptGraph: chunk_size must be a positive integer, AutoChunk"):
        KeptGraph("auto")
