from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from laws_optim import check_derivatives, check_kink, check_set, cloud
from torch import Tensor

from nestopt.constrained import Affine, HalfSpace, Hyperplane


def tensor(*values: object, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


A = tensor((1.0, 2.0, 0.0, -1.0), (0.5, 0.0, 1.0, 1.0))
b = tensor(1.0, -0.5)
SETS = {
    "affine": lambda dtype: Affine(A.to(dtype), b.to(dtype)),
    "point": lambda dtype: Affine(torch.eye(4, dtype=dtype), torch.arange(4, dtype=dtype)),
    "half space": lambda dtype: HalfSpace(A[0].to(dtype), -0.3),
    "whole space": lambda dtype: HalfSpace(A[0].to(dtype), math.inf),
    "hyperplane": lambda dtype: Hyperplane(A[0].to(dtype), 2.0),
}


@pytest.mark.parametrize("name", SETS)
def test_laws(name: str, dtype: torch.dtype) -> None:
    s = SETS[name](dtype)
    check_set(s, cloud(4, dtype), feasible=s.project(cloud(4, dtype, 0.5).flip(0)))


def test_derivatives_in_the_tensors() -> None:
    x = cloud(4, torch.float64, 2.0, 2)
    check_derivatives(lambda x, A, b: Affine(A, b).project(x), (x, A, b))
    check_derivatives(lambda x, a, b: HalfSpace(a, b).project(x), (x, A[0], tensor(-1.0, 0.3)))
    check_derivatives(lambda x, a, b: Hyperplane(a, b).project(x), (x, A, b))


def test_third_derivative_in_the_matrix() -> None:
    x = cloud(4, torch.float64, 2.0, 1)[0]

    def plain(A: Tensor) -> Tensor:
        return x - A.mT @ torch.linalg.inv(A @ A.mT) @ (A @ x - b)

    def third(f: object) -> Tensor:
        return torch.func.jacrev(torch.func.jacfwd(torch.func.jacrev(lambda t: (f(A + t * A**2) ** 3).sum())))(b[0] * 0)

    assert torch.allclose(third(lambda A: Affine(A, b).project(x)), third(plain), rtol=1e-9)


def test_batches_of_sets() -> None:
    g = torch.Generator().manual_seed(1)
    many = torch.randn(5, 2, 4, generator=g, dtype=torch.float64)
    x = cloud(4, torch.float64, 2.0, 5)
    loop = torch.stack([Affine(one, b).project(row) for one, row in zip(many, x, strict=True)])
    assert torch.allclose(Affine(many, b).project(x), loop, atol=1e-13)
    assert torch.allclose(torch.func.vmap(lambda A, x: Affine(A, b).project(x))(many, x), loop, atol=1e-13)
    assert Affine(many, b).jacobian(x).shape == (5, 4, 4)
    assert torch.allclose(
        Affine(many, b).jacobian(x) @ x,
        torch.stack([Affine(m, b).jacobian(r) @ r for m, r in zip(many, x, strict=True)]),
    )
    grads = torch.func.vmap(torch.func.grad(lambda A, x: Affine(A, b).project(x).square().sum()))(many, x)
    leaf = many.clone().requires_grad_()
    Affine(leaf, b).project(x).square().sum().backward()
    assert torch.allclose(leaf.grad, grads, atol=1e-12)


def test_a_shared_matrix_gets_the_sum_of_gradients() -> None:
    x, leaf = cloud(4, torch.float64), A.clone().requires_grad_()
    Affine(leaf, b).project(x).pow(3).sum().backward()
    total = sum(torch.func.grad(lambda A, row: Affine(A, b).project(row).pow(3).sum())(A, row) for row in x)
    assert torch.allclose(leaf.grad, total)


def test_the_factorisation_is_kept_and_follows_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, qr = [], torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda *args: calls.append(1) or qr(*args))
    leaf = A.clone().requires_grad_()
    s, x = Affine(leaf, b), cloud(4, torch.float64)
    for _ in range(3):
        s.project(x).square().sum().backward()
        s.jacobian(x)
    assert len(calls) == 1
    with torch.no_grad():
        leaf.mul_(2.0)  # as an optimizer would
    assert torch.allclose(s.project(x), Affine(2 * A, b).project(x))
    assert len(calls) == 3
    for copied in (copy.deepcopy(s), pickle.loads(pickle.dumps(s))):
        assert torch.equal(copied.project(x), s.project(x))


def test_conditioning_and_scale() -> None:
    rows = tensor((1.0, 0.0, 0.0), (1.0, 1e-6, 0.0)) * tensor((1e150,), (1e-150,))
    x = tensor(3.0, 2.0, 1.0)
    s = Affine(rows, tensor(1e150, 1e-150))
    assert torch.allclose(s.project(x), tensor(1.0, 0.0, 1.0), atol=1e-9)
    far = Affine(A, b).project(1e9 * x.repeat(2)[:4])
    assert float((A @ far - b).abs().max()) < 1e-6  # rounding of the point itself: 1e9 eps
    assert torch.allclose(HalfSpace(tensor(3e200, 4e200), 5e200).project(tensor(3.0, 4.0)), tensor(0.6, 0.8))


def test_a_limit_of_jacobians_at_kinks() -> None:
    s = HalfSpace(tensor(1.0, 1.0), 1.0)
    check_kink(s, tensor((0.5, 0.5), (1.0, 0.0)))
    assert torch.equal(s.jacobian(tensor(0.5, 0.5)).to_dense(), torch.eye(2, dtype=torch.float64))


def test_known_answer() -> None:
    p = Affine(tensor((1.0, 1.0, 1.0)), tensor(1.0)).project(tensor(1.0, 2.0, 3.0))
    assert torch.allclose(p, tensor(-2 / 3, 1 / 3, 4 / 3), rtol=1e-15)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Affine(tensor((1.0, 1.0), (2.0, 2.0)), tensor(1.0, 3.0)), ValueError, "contradicts itself.*row 1"),
        (lambda: Affine(tensor((1.0, 1.0), (2.0, 2.0)), tensor(1.0, 2.0)), ValueError, "row 1 .*says nothing new"),
        (lambda: Affine(tensor((1.0,), (0.0,)), tensor(1.0, 2.0)), ValueError, "contradicts itself.*row 1"),
        (lambda: Affine(A, tensor(1.0)), ValueError, r"\(\*batch, m\)"),
        (lambda: Affine(A, b.float()), ValueError, "one dtype"),
        (lambda: Affine(A * math.nan, b), ValueError, "A must be finite"),
        (lambda: Affine(A, b * math.inf), ValueError, "b must be finite"),
        (lambda: Affine([[1.0]], b), TypeError, "A must be a real floating tensor"),
        (lambda: Affine(A, b).project(tensor(1.0, 2.0)), ValueError, "4 columns"),
        (lambda: Affine(A, b).project(torch.zeros(4)), ValueError, "float64"),
        (lambda: Affine(A.expand(3, 2, 4), b).project(tensor(1.0, 2.0, 3.0, 4.0)), ValueError, "does not broadcast"),
        (lambda: HalfSpace(tensor(0.0, 0.0), 1.0), ValueError, "a is zero"),
        (lambda: HalfSpace(tensor(1.0, 0.0), -math.inf), ValueError, "no x"),
        (lambda: Hyperplane(tensor(1.0, 0.0), math.inf), ValueError, "b must be finite"),
        (lambda: Hyperplane(tensor(1.0, math.nan), 1.0), ValueError, "a must be finite"),
        (lambda: HalfSpace(1.0, 1.0), TypeError, "a must be a floating tensor"),
    ],
)
def test_bad_input_is_named(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
