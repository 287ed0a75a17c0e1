"""Operators of mini-batched data: the sum and the mean over batches, and loaders that cannot be multiplied with."""

import gc

import pytest
import torch
import torch.nn.functional as F
from laws import check_operator, rand
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from nestopt.linalg import (
    CG,
    AutoChunk,
    Compiled,
    EmpiricalFisher,
    ForwardOverReverse,
    FreshGraph,
    GaussNewton,
    Hessian,
    KeptGraph,
)

PRODUCTS = [None, KeptGraph(), FreshGraph(), FreshGraph(3), FreshGraph(AutoChunk()), ForwardOverReverse()]
X, Y = rand(11, 4), torch.arange(11) % 3
BATCHES = [(X[:4], Y[:4]), (X[4:8], Y[4:8]), (X[8:], Y[8:])]  # the last one is smaller
NET = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()


def model(params, batch):
    return functional_call(NET, params, (batch[0],))


def mean_loss(params, batch):
    return F.cross_entropy(model(params, batch), batch[1])


def sum_loss(params, batch):
    return F.cross_entropy(model(params, batch), batch[1], reduction="sum")


def same(A, matrix):
    """A is this matrix, one vector at a time and in blocks."""
    torch.testing.assert_close(A.to_dense(), matrix, rtol=1e-11, atol=1e-12)
    v = rand(A.shape[-1])
    torch.testing.assert_close(A @ v, matrix @ v, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("product", PRODUCTS, ids=repr)
def test_hessian_of_batches_is_the_hessian_of_all_data(product):
    whole = Hessian(lambda p: sum_loss(p, (X, Y)), NET)
    for loss, reduction, scale in ((sum_loss, "sum", 1), (mean_loss, "mean", 11)):
        H = Hessian(loss, NET, product=product, data=BATCHES, reduction=reduction)
        torch.testing.assert_close(H.gradient, whole.gradient / scale, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(H.value, whole.value / scale, rtol=1e-12, atol=1e-12)
        same(H, whole.to_dense() / scale)
        assert H.unused == []


@pytest.mark.parametrize(
    "options", [{}, {"keep_graphs": True}, {"chunk_size": 4}, {"chunk_size": AutoChunk()}], ids=repr
)
def test_gauss_newton_and_empirical_fisher_of_batches(options):
    for reduction in ("sum", "mean"):
        check_batches_of(reduction, options)


def check_batches_of(reduction, options):
    def outer(z, batch):
        return F.cross_entropy(z, batch[1], reduction=reduction)

    def losses(p, batch):
        return F.cross_entropy(model(p, batch), batch[1], reduction="none")

    whole = GaussNewton(lambda p: model(p, (X, Y)), lambda z: outer(z, (X, Y)), NET)
    G = GaussNewton(model, outer, NET, data=BATCHES, reduction=reduction, **options)
    torch.testing.assert_close(G.gradient, whole.gradient, rtol=1e-11, atol=1e-12)
    same(G, whole.to_dense())
    E = EmpiricalFisher(losses, NET, data=BATCHES, reduction=reduction, **options)
    same(E, EmpiricalFisher(lambda p: losses(p, (X, Y)), NET, reduction=reduction).to_dense())


def test_laws_of_an_operator():
    A = rand(3, 5)
    loss = lambda w, x: ((x @ w) ** 2).sum() / 2  # noqa: E731
    check_operator(Hessian(loss, rand(5), data=[A[:2], A[2:]]), A.T @ A)


def test_a_solver_takes_it_and_pinned_value():
    loss = lambda w, batch: ((batch * w) ** 2).sum() / 2  # noqa: E731
    H = Hessian(loss, torch.ones(2).double(), data=[torch.tensor([1.0, 2.0]).double(), torch.ones(2).double()])
    assert (H @ torch.ones(2).double()).tolist() == [2.0, 5.0]
    assert CG()(H, torch.tensor([2.0, 5.0]).double()).converged


def test_memory_is_that_of_one_batch():
    """Between products no graph is alive, and the batches of a loader are not held."""
    alive = []

    class Loader:
        def __iter__(self):
            for i in range(6):
                alive.append(sum(type(t) is torch.Tensor and t.shape == (500, 7) for t in gc.get_objects()))
                yield rand(500, 7, seed=i)

    H = Hessian(lambda w, x: torch.tanh(x @ w).sum(), rand(7), data=Loader())
    H @ rand(3, 7)
    assert max(alive) <= 2  # the last batch, until its successor replaces it


def test_dropout_masks_are_fixed_batch_by_batch():
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    loss = lambda p, b: F.cross_entropy(functional_call(net, p, (b[0],)), b[1], reduction="sum")  # noqa: E731
    torch.manual_seed(3)
    kept = Hessian(loss, net, product=KeptGraph(), data=BATCHES)
    torch.manual_seed(3)
    read = Hessian(loss, net, data=BATCHES)
    v = rand(2, read.shape[-1])
    first = read @ v
    torch.rand(5)
    state = torch.get_rng_state()
    assert torch.equal(read @ v, first) and torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(kept @ v, first, rtol=1e-12, atol=1e-12)


def loader(**options):
    return DataLoader(TensorDataset(X, Y), batch_size=4, **options)


def test_a_data_loader():
    H = Hessian(sum_loss, NET, data=loader())
    torch.testing.assert_close(
        H.to_dense(), Hessian(lambda p: sum_loss(p, (X, Y)), NET).to_dense(), rtol=1e-11, atol=1e-12
    )
    assert Hessian(sum_loss, NET, data=loader(shuffle=True), product=KeptGraph()).shape == H.shape  # read once


class Changing:
    """Gives one batch fewer at every pass from the third one."""

    def __init__(self, passes):
        self.passes = passes

    def __iter__(self):
        self.passes -= 1
        return iter(BATCHES if self.passes >= 0 else BATCHES[:-1])


class Longer(Changing):
    def __iter__(self):
        self.passes -= 1
        return iter(BATCHES if self.passes >= 0 else BATCHES * 2)


class Smaller(Changing):
    def __iter__(self):
        self.passes -= 1
        return iter(BATCHES if self.passes >= 0 else [*BATCHES[:-1], (X[8:10], Y[8:10])])


class Reordered:
    flip = False

    def __iter__(self):
        self.flip = not self.flip
        return iter(BATCHES if self.flip else BATCHES[::-1])


@pytest.mark.parametrize(
    "make", [Hessian, lambda loss, p, data: GaussNewton(model, lambda z, b: z.exp().sum(), p, data=data)]
)
def test_loaders_that_shuffle_or_change_length_are_named(make):
    with pytest.raises(ValueError, match="shuffling"):
        make(sum_loss, NET, data=loader(shuffle=True))
    with pytest.raises(ValueError, match=r"disagree, first at batch 0.*shuffling"):
        make(sum_loss, NET, data=Reordered())
    with pytest.raises(ValueError, match=r"3 batches at first and 2 batches now.*changes length"):
        make(sum_loss, NET, data=Changing(1))
    H = make(sum_loss, NET, data=Changing(2))
    with pytest.raises(ValueError, match="changes length"):
        H @ rand(H.shape[-1])
    H = make(sum_loss, NET, data=Longer(2))
    with pytest.raises(ValueError, match="3 batches at first and more now"):
        H @ rand(H.shape[-1])


def test_a_batch_that_shrinks_is_named_by_its_samples():
    H = Hessian(mean_loss, NET, data=Smaller(2), reduction="mean")
    with pytest.raises(ValueError, match="11 samples at first and 10 now"):
        H @ rand(H.shape[-1])


def test_unused_parameters_are_those_that_no_batch_uses():
    params = {"a": rand(2), "b": rand(2), "c": rand(2)}
    H = Hessian(lambda p, key: (p[key] ** 2).sum(), params, data=["a", "c"])
    assert H.unused == ["params['b']"]


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"data": (b for b in BATCHES)}, TypeError, "can be read only once"),
        ({"data": 3}, TypeError, "data must be an iterable of batches, but got int"),
        ({"data": X}, TypeError, "but got Tensor; wrap it in a list"),
        ({"data": []}, ValueError, "data must give at least one batch"),
        ({"data": BATCHES, "reduction": "average"}, ValueError, '"sum" or "mean", but got \'average\''),
        ({"data": [3, 4], "reduction": "mean"}, ValueError, "first dimension of its first tensor"),
        ({"data": BATCHES, "product": Compiled()}, TypeError, "Compiled.*cannot take data"),
    ],
)
def test_bad_input_is_refused_by_name(options, error, words):
    loss = (lambda p, b: sum(q.sum() ** 2 for q in p.values())) if options["data"] == [3, 4] else sum_loss
    with pytest.raises(error, match=words):
        Hessian(loss, NET, **options)


def test_an_iterator_is_enough_when_graphs_are_kept():
    H = Hessian(sum_loss, NET, data=iter(BATCHES), product=KeptGraph())
    torch.testing.assert_close(H @ rand(H.shape[-1]), Hessian(sum_loss, NET, data=BATCHES) @ rand(H.shape[-1]))


def test_not_a_number_is_kept():
    H = Hessian(
        lambda w, b: (w * b).pow(2).sum(), rand(2), data=[torch.ones(2).double(), torch.full((2,), torch.nan).double()]
    )
    assert (H @ rand(2)).isnan().all()
