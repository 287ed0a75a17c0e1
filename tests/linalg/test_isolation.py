"""Evaluations leave nothing changed: buffers, hooks, flags, other threads."""

import copy
import functools
import threading

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.modules import module as modules
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from nestopt.linalg import ForwardOverReverse, FreshGraph, Hessian, KeptGraph
from nestopt.linalg.isolation import isolated

# torch's own, at the first forward-mode call of a process
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)  # conftest puts it back


def snapshot(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


def unchanged(net, before):
    return all(torch.equal(before[key], value) for key, value in net.state_dict().items())


class Counter(nn.Module):
    """Assigns its buffer anew, or updates it in place."""

    def __init__(self, in_place):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.in_place, self.seen = in_place, []

    def forward(self, x):
        if self.in_place:
            self.count += 1
        else:
            self.count = self.count + 1
        self.seen.append(int(self.count))
        return x * self.count


STATEFUL = {
    "BatchNorm": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)),
    "InstanceNorm": lambda: nn.Sequential(
        nn.Unflatten(1, (3, 1)), nn.InstanceNorm1d(3, track_running_stats=True).eval()
    ),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(3, 2)),
    "counter in place": lambda: Counter(True),
    "counter": lambda: Counter(False),
}


@pytest.mark.parametrize("product", [KeptGraph(), FreshGraph(2), ForwardOverReverse(2)], ids=repr)
@pytest.mark.parametrize("make", STATEFUL.values(), ids=STATEFUL)
def test_buffers_stay(make, product):
    net = make().double().requires_grad_(False)
    before, identities = snapshot(net), [id(buffer) for buffer in net.buffers()]
    Hessian(lambda x: (net(x) ** 3).sum(), torch.randn(8, 3), product=product) @ torch.randn(2, 24)
    assert unchanged(net, before)
    assert [id(buffer) for buffer in net.buffers()] == identities


@pytest.mark.parametrize("in_place", [True, False])
def test_a_buffer_goes_on_within_one_evaluation_and_starts_again_in_the_next(in_place):
    net = Counter(in_place)
    for _ in range(2):
        with isolated() as isolation:
            net(net(torch.ones(1)))
        assert isolation.calls == 2
    assert net.seen == [1, 2, 1, 2] and net.count == 0


def test_buffers_given_to_functional_call_stay():
    net = STATEFUL["BatchNorm"]().double()
    buffers = {key: value.clone() for key, value in net.named_buffers()}
    kept, before = copy.deepcopy(buffers), snapshot(net)
    Hessian(lambda p: (functional_call(net, {**p, **buffers}, (torch.randn(8, 3),)) ** 2).sum(), net)
    assert all(torch.equal(kept[key], buffers[key]) for key in kept) and unchanged(net, before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules_keep_their_buffers():
    net = torch.jit.script(STATEFUL["BatchNorm"]().double())
    before = snapshot(net)
    with isolated():
        net(torch.randn(8, 3))
    assert unchanged(net, before)
    net(torch.randn(8, 3))
    assert not unchanged(net, before)


def test_everything_is_put_back_after_an_error():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3), nn.LSTM(3, 2))).double()
    before = snapshot(net)
    hooks = len(modules._global_forward_hooks), len(modules._global_forward_pre_hooks)
    for place in (net[1], net[1][1]):
        handle = place.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Hessian(lambda x: net(x)[0].sum(), torch.randn(4, 3))
        handle.remove()
        assert unchanged(net, before)
        assert torch.backends.cudnn.enabled
        assert (len(modules._global_forward_hooks), len(modules._global_forward_pre_hooks)) == hooks
    with isolated():  # and the next evaluation finds nothing left open
        net[0](torch.randn(4, 3))
    assert unchanged(net, before)


def test_an_evaluation_within_an_evaluation():
    net = nn.BatchNorm1d(3).double().requires_grad_(False)
    before = snapshot(net)

    def loss(x):
        inner = Hessian(lambda y: (net(y) ** 4).sum(), x)
        return (net(x) ** 3).sum() + (inner @ torch.ones(12)).sum()

    H = Hessian(loss, torch.randn(4, 3))
    torch.testing.assert_close(H @ torch.ones(12), Hessian(lambda x: (net(x) ** 3).sum(), H.into.unflatten(
        H._objective.tensors[0].flatten())) @ torch.ones(12))  # fmt: skip
    assert unchanged(net, before)
    net(torch.randn(4, 3))
    assert not unchanged(net, before)  # the module is itself again


def test_other_threads_go_on_training():
    ours, theirs = nn.BatchNorm1d(3).double(), nn.BatchNorm1d(3).double()
    before = snapshot(theirs)

    def loss(x):
        thread = threading.Thread(target=lambda: theirs(torch.randn(4, 3)))
        thread.start()
        thread.join()
        return (ours.requires_grad_(False)(x) ** 3).sum()

    kept = snapshot(ours)
    Hessian(loss, torch.randn(4, 3))
    assert unchanged(ours, kept) and not unchanged(theirs, before)


def test_checkpointed_modules_are_guarded_in_every_product():
    net = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Unflatten(1, (1, 4)), nn.TransformerEncoderLayer(4, 2, 4)
    )
    net = net.double()
    x, before = torch.randn(6, 3), snapshot(net)
    plain = Hessian(lambda p: (functional_call(net, p, (x,)) ** 3).sum(), net)
    net_of = functools.partial(functional_call, net)
    torch.manual_seed(0)
    plain = Hessian(lambda p: (net_of(p, (x,)) ** 3).sum(), net)
    torch.manual_seed(0)
    H = Hessian(lambda p: (checkpoint(net_of, p, (x,), use_reentrant=False) ** 3).sum(), net)
    v = torch.randn(2, H.shape[-1])
    torch.testing.assert_close(H @ v, plain @ v, rtol=1e-10, atol=1e-10)
    assert unchanged(net, before)


def test_recurrent_layers_leave_cudnn():
    seen = []
    net = nn.LSTM(2, 2)
    net.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.enabled))
    with isolated():
        net(torch.randn(3, 1, 2))
        seen.append(torch.backends.cudnn.enabled)
    assert seen == [False, True]
