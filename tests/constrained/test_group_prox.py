from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import Tensor

from nestopt.constrained import L1, GroupLasso, SparseGroupLasso

DOUBLE = torch.float64


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


def test_groups_shrink_by_their_factor() -> None:
    x = tensor(3.0, 0.3, 4.0, -0.4, 7.0)
    g = GroupLasso([[0, 2], [1, 3], [4]], weight=0.5)
    p = g.prox(x, 2.0)
    assert torch.allclose(p[[0, 2]], tensor(3.0, 4.0) * (1 - math.sqrt(2) / 5), rtol=1e-15)
    assert torch.equal(p[[1, 3]], tensor(0.0, 0.0))  # |x| = .5 < sqrt(2)
    assert torch.allclose(p[4], tensor(6.0)[0])
    assert torch.allclose(g.value(x), tensor(0.5 * (5.5 * math.sqrt(2) + 7))[0], rtol=1e-15)


def test_lists_and_labels_agree() -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    labels = GroupLasso(torch.tensor([1, 0, 1, 2]), 0.4)
    lists = GroupLasso([[1], [0, 2], [3]], 0.4)
    assert torch.equal(labels.prox(x), lists.prox(x))
    assert torch.equal(labels.value(x), lists.value(x))


def test_a_group_each_is_the_l1_norm() -> None:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    w = tensor(0.1, 0.5, 1.0, 0.2)
    g, h = GroupLasso(torch.arange(4), w), L1(w)
    assert torch.allclose(g.prox(x, 0.7), h.prox(x, 0.7), rtol=1e-14, atol=1e-16)
    assert torch.allclose(g.jacobian(x, 0.7).to_dense(), h.jacobian(x, 0.7).to_dense(), atol=1e-14)


def test_sparse_group_is_group_after_soft() -> None:
    # published step by step: soft(x, 1) = (2, 0, -1, 0), of norms (2, 1) in the groups, shrunk by .5 each
    g = SparseGroupLasso([[0, 1], [2, 3]], weight=0.5, sparse_weight=1.0, factors=1.0)
    assert torch.allclose(g.prox(tensor(3.0, 0.5, -2.0, 1.0)), tensor(1.5, 0.0, -0.5, 0.0), rtol=1e-15)
    assert g.value(tensor(3.0, 4.0, 0.0, -2.0)) == 0.5 * 7 + 9
    only = SparseGroupLasso([[0, 1], [2, 3]], weight=0.0, sparse_weight=1.0)
    x = tensor(3.0, 0.5, -2.0, 1.0)
    assert torch.equal(only.prox(x), L1(1.0).prox(x))


def test_a_free_group_and_an_empty_one() -> None:
    g = GroupLasso([[0], [], [1]], factors=tensor(1.0, 1.0, 0.0))
    assert torch.equal(g.prox(tensor(0.5, 0.0)), tensor(0.0, 0.0))
    assert torch.equal(g.prox(tensor(0.5, 9.0)), tensor(0.0, 9.0))


def test_huge_and_tiny() -> None:
    g = GroupLasso([[0, 1]], factors=1.0)
    assert torch.allclose(g.prox(tensor(3e200, 4e200)), tensor(3e200, 4e200))
    assert torch.allclose(g.value(tensor(3e200, 4e200)), tensor(5e200)[0])
    x = torch.zeros(2, dtype=DOUBLE, requires_grad=True)
    assert torch.equal(torch.autograd.grad(g.value(x), x)[0], tensor(0.0, 0.0))
    poisoned = g.prox(tensor(math.nan, 0.0))
    assert bool(poisoned.isnan().all())  # the norm of its group is not known


def test_pickle() -> None:
    g = pickle.loads(pickle.dumps(SparseGroupLasso([[0, 1], [2]], 0.3)))
    assert g.prox(torch.ones(3)).shape == (3,)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: GroupLasso([[0, 1], [1]]), ValueError, "exactly once"),
        (lambda: GroupLasso([[0], [2]]), ValueError, "exactly once"),
        (lambda: GroupLasso(torch.tensor([0.0, 1.0])), ValueError, "one integer a coordinate"),
        (lambda: GroupLasso(torch.tensor([0, -1])), ValueError, ">= 0"),
        (lambda: GroupLasso([[0]], -1.0), ValueError, "weight"),
        (lambda: GroupLasso([[0]], factors=-1.0), ValueError, "factors"),
        (lambda: SparseGroupLasso([[0]], sparse_weight=-1.0), ValueError, "sparse_weight"),
        (lambda: GroupLasso([[0, 1]]).prox(torch.zeros(3)), ValueError, r"shape \(\*batch, 2\)"),
        (lambda: SparseGroupLasso([[0, 1]]).value(torch.zeros(3)), ValueError, r"shape \(\*batch, 2\)"),
        (lambda: GroupLasso([[0, 1]], torch.ones(2)).prox(torch.zeros(2)), ValueError, "weight of shape"),
    ],
)
def test_bad_input_is_named(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
