from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn

from nestopt.linalg.tree import Ravel

Pair = namedtuple("Pair", ["first", "second"])

TREES = [
    torch.arange(6.0).reshape(2, 3),
    torch.tensor(3.0),
    {"b": torch.ones(2), "a": torch.zeros(())},
    (torch.ones(1), [torch.zeros(2, 2), {"c": torch.full((3,), 2.0)}]),
    Pair(torch.ones(2), torch.zeros(0)),
    OrderedDict(z=torch.ones(1), a=torch.zeros(1)),
    torch.arange(12.0).reshape(3, 4).T,
]


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: type(tree).__name__)
def test_there_and_back(tree):
    ravel = Ravel.of(tree, "y")
    vector = ravel.flatten(tree)
    assert vector.shape == (ravel.size,)
    back = ravel.unflatten(vector)
    for a, b in zip(ravel.leaves(back), ravel.leaves(tree), strict=True):
        assert torch.equal(a, b)
    batch = torch.stack([vector, 2 * vector]).reshape(2, 1, -1)
    leaves = ravel.split(batch)
    assert [leaf.shape for leaf in leaves] == [(2, 1, *shape) for shape in ravel.shapes]
    assert torch.equal(ravel.join(leaves), batch)


def test_order_is_by_sorted_key():
    assert Ravel.of({"b": torch.ones(1), "a": torch.zeros(1)}, "y").flatten(
        {"b": torch.ones(1), "a": torch.zeros(1)}
    ).tolist() == [0.0, 1.0]


def test_modules_are_their_named_parameters():
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    ravel = Ravel.of(net, "y")
    assert ravel.size == sum(p.numel() for p in net.parameters())
    assert set(ravel.unflatten(torch.zeros(ravel.size))) == set(dict(net.named_parameters()))


def test_gradients_pass():
    tree = {"a": torch.ones(2, dtype=torch.float64, requires_grad=True), "b": torch.ones((), dtype=torch.float64)}
    ravel = Ravel.of(tree, "y")
    torch.autograd.gradcheck(lambda a: ravel.flatten({"a": a, "b": tree["b"]}), tree["a"])


@pytest.mark.parametrize(
    ("tree", "error", "words"),
    [
        ({}, ValueError, ["y must hold at least one tensor"]),
        ([1.0], TypeError, ["y[0]", "float"]),
        ({"k": torch.ones(2, dtype=torch.int32)}, TypeError, ["y['k']", "int32"]),
        (torch.ones(2, dtype=torch.complex64), TypeError, ["complex64"]),
        ((torch.ones(1), torch.ones(1).double()), ValueError, ["dtype", "y[0]", "y[1]", "float64"]),
        ((torch.ones(1), torch.ones(1, device="meta")), ValueError, ["device", "meta"]),
    ],
    ids=str,
)
def test_bad_trees_are_named(tree, error, words):
    with pytest.raises(error) as caught:
        Ravel.of(tree, "y")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("tree", "word"),
    [
        ({"a": torch.ones(2)}, "structure"),
        ({"a": torch.ones(3), "b": torch.ones(())}, "y['a'] must have shape (2,), but got (3,)"),
        ({"a": torch.ones(2).double(), "b": torch.ones(())}, "float64"),
        ({"a": torch.ones(2), "b": 1.0}, "float"),
    ],
    ids=str,
)
def test_trees_that_differ_from_the_example_are_refused(tree, word):
    ravel = Ravel.of({"a": torch.ones(2), "b": torch.ones(())}, "y")
    with pytest.raises(ValueError, match="y") as caught:
        ravel.flatten(tree)
    assert word in str(caught.value)
