from __future__ import annotations

import math

import pytest
import torch
from laws_layer import (
    Case,
    check_batch,
    check_dtype_and_device,
    check_shared_sums,
    check_third_order,
    check_transforms,
    check_vmap,
    duties,
)
from laws_optim import check_kink
from laws_prox import AsSet, check_firmness, check_minimiser, check_prox
from torch import Tensor

from nestopt.constrained import (
    L1,
    Ball,
    Box,
    ElasticNet,
    GroupLasso,
    Huber,
    Indicator,
    NuclearNorm,
    Prox,
    Simplex,
    SparseGroupLasso,
    SquaredL2,
    TotalVariation1D,
    prox_tree,
    value_tree,
)

# torch itself warns when forward mode is first used

INF = math.inf


def tensor(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def cloud(*space: int, dtype: torch.dtype = torch.float64, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(space))
    return (scale * torch.randn(12, *space, generator=generator, dtype=torch.float64)).to(dtype)


WEIGHTS = (0.5, 1.0, 0.05, 2.0)
GROUPS = [[0, 3], [1], [2]]
CASES = {
    "l1": (L1, [WEIGHTS]),
    "l1, nonnegative": (lambda w: L1(w, nonnegative=True), [WEIGHTS]),
    "elastic net": (ElasticNet, [WEIGHTS, (0.3,)]),
    "squared l2": (SquaredL2, [WEIGHTS, (1.0, 2.0, -3.0, 0.0)]),
    "huber": (Huber, [WEIGHTS, (1.0, 2.0, 0.3, 0.4)]),
    "group": (lambda w: GroupLasso(GROUPS, w), [(0.5, 1.0, 0.2)]),
    "sparse group": (lambda w, v: SparseGroupLasso(GROUPS, w, v), [(0.5, 1.0, 0.2), WEIGHTS]),
    "total variation": (TotalVariation1D, [(0.5, 1.0, 0.2)]),
    "ball": (lambda: Indicator(Ball(1.3)), []),
}


@pytest.mark.parametrize("name", CASES)
def test_laws(name: str, dtype: torch.dtype) -> None:
    make, weights = CASES[name]
    check_prox(make, tuple(tensor(*w, dtype=dtype) for w in weights), cloud(4, dtype=dtype))


@pytest.mark.parametrize("name", CASES)
def test_far_away(name: str) -> None:
    make, weights = CASES[name]
    g = make(*(tensor(*w) for w in weights))
    check_minimiser(g, 1e9 * cloud(4), 0.7)
    check_firmness(g, 1e9 * cloud(4), 0.7)


@pytest.mark.parametrize(
    ("g", "x", "step", "expected"),
    [
        (L1(2.0), (3.0, -1.0, -5.0), 0.5, (2.0, 0.0, -4.0)),
        (L1(tensor(0.0, 2.0, INF)), (3.0, -3.0, 9.0), 1.0, (3.0, -1.0, 0.0)),
        (L1(1.0, nonnegative=True), (3.0, -9.0, 0.5), 1.0, (2.0, 0.0, 0.0)),
        (L1(1.0), (1e300, -INF, 0.0), 1.0, (1e300, -INF, 0.0)),
        (ElasticNet(1.0, 3.0), (5.0, -2.0, 0.5), 1.0, (1.0, -0.25, 0.0)),
        (SquaredL2(3.0, tensor(1.0, 0.0, 2.0)), (5.0, -2.0, 2.0), 1.0, (2.0, -0.5, 2.0)),
        (Huber(1.0, 0.5), (5.0, -1.5, 0.6), 1.0, (4.0, -0.5, 0.2)),
        (Indicator(Box(0.0, 1.0)), (5.0, -2.0, 0.5), 1.0, (1.0, 0.0, 0.5)),
    ],
)
def test_known_answers(g: Prox, x: tuple[float, ...], step: float, expected: tuple[float, ...]) -> None:
    assert torch.allclose(g.prox(tensor(*x), step), tensor(*expected), rtol=1e-15, atol=1e-16)


def test_values() -> None:
    x = tensor(3.0, -0.25)
    assert L1(tensor(1.0, 2.0)).value(x) == 3.5
    assert L1(1.0, nonnegative=True).value(x) == INF
    assert ElasticNet(1.0, 2.0).value(x) == 3.25 + 9.0625
    assert SquaredL2(2.0, 1.0).value(x) == 4 + 1.25**2
    assert Huber(2.0, 0.5).value(x) == 2 * (2.75 + 0.0625)
    assert torch.equal(Indicator(Box(0.0, 1.0)).value(torch.stack([x, x.clamp(0, 1)])), tensor(INF, 0.0))
    # the envelope of |x| is Huber's function
    assert torch.allclose(L1(1.0).envelope(x, 0.5), Huber(1.0, 0.5).value(x), rtol=1e-15)
    # that of a set is half the squared distance
    assert torch.allclose(Indicator(Ball(1.0)).envelope(tensor(3.0, 4.0), 2.0), tensor(4.0)[0], rtol=1e-15)


def test_conjugates_known() -> None:
    x = tensor(3.0, -0.25, 1.5)
    assert torch.allclose(L1(1.0).conjugate_prox(x, 0.3), x.clamp(-1, 1))  # of the indicator of [-1, 1]
    u = SquaredL2(2.0).conjugate_prox(x, 0.3)  # of |u|^2 / 4
    assert torch.allclose(u, x / (1 + 0.3 / 2))


@pytest.mark.parametrize(
    ("g", "x"),
    [
        (L1(0.5), tensor(0.5, -0.5, 2.0)),
        (L1(0.5, nonnegative=True), tensor(0.5, -0.5, 2.0)),
        (ElasticNet(0.5, 1.0), tensor(0.5, -0.5, 2.0)),
        (Huber(0.5, 1.0), tensor(1.5, -1.5, 2.0)),
        (GroupLasso([[0, 2], [1]], factors=0.5), tensor(0.3, 0.5, 0.4)),
        (SparseGroupLasso([[0, 2], [1]], 0.5, 0.5, factors=1.0), tensor(0.8, 1.0, 0.9)),
        (TotalVariation1D(0.5), tensor(0.0, 1.0, 2.5)),
        (NuclearNorm(0.5), torch.diag(tensor(0.5, 0.5))),
    ],
)
def test_kinks(g: Prox, x: Tensor) -> None:
    check_kink(AsSet(g, 1.0), x[None])
    automatic = torch.func.jacrev(g.prox)(x).reshape(x.numel(), x.numel())
    assert torch.allclose(automatic, g.jacobian(x).to_dense(), atol=1e-12)


@pytest.mark.parametrize("make", [L1, NuclearNorm, TotalVariation1D, lambda w: GroupLasso([[0, 1], [2]], w)])
def test_no_weight_moves_nothing(make: object) -> None:
    x = tensor(3.0, 0.0, 0.0).expand(2, 3).clone().requires_grad_()
    p = make(0.0).prox(x)
    assert torch.equal(p, x)
    assert torch.equal(torch.autograd.grad(p.sum(), x)[0], torch.ones_like(x))
    one = x.detach() if isinstance(make(0.0), NuclearNorm) else x[0].detach()
    assert torch.allclose(make(0.0).jacobian(one).to_dense(), torch.eye(one.numel(), dtype=x.dtype))


def test_shared_weights_get_sums_and_a_bad_item_spoils_none() -> None:
    w = tensor(0.5, 1.0).requires_grad_()
    x = torch.stack([tensor(3.0, -3.0), tensor(4.0, 0.1), tensor(math.nan, 2.0)])
    p = L1(w).prox(x)
    (gradient,) = torch.autograd.grad(p[:2].sum(), w)
    assert torch.equal(gradient, tensor(-2.0, 1.0))
    w = tensor(0.5, -1.0)[:, None]
    p = L1(w).prox(x[:2])
    assert torch.equal(p[0], tensor(2.5, -2.5))
    assert bool(p[1].isnan().all())


def test_zero_dimensional() -> None:
    x = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    p = L1(w).prox(x, 2.0)
    assert p.shape == ()
    assert [float(g) for g in torch.autograd.grad(p, (x, w))] == [1.0, -2.0]
    assert L1(w).value(x) == 1.5
    assert torch.equal(L1(w).jacobian(x).to_dense(), torch.ones(1, 1, dtype=torch.float64))
    assert torch.autograd.gradgradcheck(lambda x, w: L1(w).envelope(x), (x, w))


def test_trees() -> None:
    tree = {"a": tensor(3.0, -1.0), "b": [tensor(2.0), tensor(2.0)[0]]}
    everywhere = prox_tree(L1(1.0), tree, step=0.5)
    assert torch.equal(everywhere["a"], tensor(2.5, -0.5))
    assert everywhere["b"][1] == 1.5
    some = prox_tree({"a": Simplex(), "b": [None, L1(1.0)]}, tree)
    assert torch.equal(some["a"], tensor(1.0, 0.0))
    assert torch.equal(some["b"][0], tensor(2.0))
    assert some["b"][1] == 1
    assert value_tree({"a": L1(2.0), "b": [Box(0.0), None]}, tree) == 8
    assert value_tree({"a": L1(2.0), "b": [Box(5.0), None]}, tree) == INF
    assert prox_tree(None, tree)["a"] is tree["a"]
    module = torch.nn.Linear(2, 1)
    assert sorted(prox_tree(L1(), module)) == ["bias", "weight"]


def with_weight(*shape: int) -> object:
    return lambda g: (
        2 * torch.randn(shape, generator=g, dtype=torch.float64),
        torch.rand(shape[-1], generator=g, dtype=torch.float64) + 0.1,
    )


LAYERS = [
    Case("l1", lambda x, w: L1(w).prox(x), with_weight(3), shared=(1,)),
    Case("groups", lambda x, w: SparseGroupLasso([[0, 1], [2]], 0.3, w).prox(x), with_weight(3), shared=(1,)),
    Case("variation", lambda x, w: TotalVariation1D(w[..., 1:]).prox(x), with_weight(4), shared=(1,)),
    Case("nuclear", lambda x, w: NuclearNorm(w.sum(-1)).prox(x), with_weight(2, 2), shared=(1,)),
]
LAWS = [check_transforms, check_vmap, check_batch, check_shared_sums, check_third_order, check_dtype_and_device]


@pytest.mark.parametrize(("case", "law"), duties(LAYERS, LAWS))
def test_duty(case: Case, law: object, generator: torch.Generator) -> None:
    law(case, generator)


def test_a_wrong_prox_breaks_the_laws() -> None:
    class Scaled(L1):
        def _prox(self, x: Tensor, step: Tensor) -> Tensor:
            return super()._prox(x, step**2)

    class Steep(L1):
        def _slope(self, x: Tensor, step: Tensor) -> Tensor:
            return super()._slope(x, 0.9 * step)

    for wrong in (Scaled, Steep):
        with pytest.raises(AssertionError):
            check_prox(wrong, (tensor(*WEIGHTS),), cloud(4))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: L1(-1.0), ValueError, "weight must be finite and >= 0"),
        (lambda: L1(INF), ValueError, "finite"),
        (lambda: L1("a"), TypeError, "number or a floating tensor"),
        (lambda: L1(torch.ones(2, dtype=torch.int64)), TypeError, "int64"),
        (lambda: Huber(1.0, 0.0), ValueError, "delta must be finite and > 0"),
        (lambda: ElasticNet(1.0, -1.0), ValueError, "quadratic"),
        (lambda: Indicator(3.0), TypeError, "must be a Set"),
        (lambda: L1().prox(torch.zeros(2, dtype=torch.int64)), TypeError, "L1.prox: x must be a real floating"),
        (lambda: L1().prox(torch.zeros(2), 0.0), ValueError, "step must be finite and > 0"),
        (lambda: L1().prox(torch.zeros(3, 2), torch.ones(2)), ValueError, "step of shape"),
        (lambda: L1().prox(torch.zeros(2), tensor(1.0)[0]), ValueError, "step is torch.float64"),
        (lambda: L1(torch.zeros(3)).prox(torch.zeros(2)), ValueError, "weight of shape"),
        (lambda: L1(torch.zeros(2, 1)).value(torch.zeros(3)), ValueError, "does not broadcast"),
        (lambda: L1(torch.zeros(2)).jacobian(tensor(0.0, 1.0)), ValueError, "float32"),
        (lambda: TotalVariation1D().prox(torch.zeros(())), ValueError, "shape"),
        (lambda: prox_tree({"a": L1()}, {"b": tensor(1.0)}), ValueError, "structure"),
        (lambda: prox_tree({"a": 1.0}, {"a": tensor(1.0)}), TypeError, r"proxes\['a'\]"),
        (lambda: value_tree(L1(), {}), ValueError, "empty"),
    ],
)
def test_bad_input_is_named(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
