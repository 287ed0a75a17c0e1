import pytest
import torch
from laws import C, check_operator, members, rand, spd
from torch import nn

from nestopt.linalg import (
    CG,
    GMRES,
    LDL,
    LU,
    MINRES,
    Auto,
    Cholesky,
    Dense,
    Diagonal,
    FunctionOperator,
    GaussNewton,
    Hessian,
    Identity,
    Jacobian,
)

DOUBLE = torch.float64


def matrices(dtype):
    S, M, B = spd(5, 10.0, dtype=dtype), rand(4, 5, seed=1, dtype=dtype), rand(3, 4, 5, seed=2, dtype=dtype)
    batch = torch.stack([spd(5, 10.0, seed=s, dtype=dtype) for s in range(3)])
    sym, rect, many, systems = (
        Dense(S, symmetric=True, definite=True),
        Dense(M),
        Dense(B),
        Dense(batch, symmetric=True, definite=True),
    )
    eye = torch.eye(5, dtype=dtype)
    d = torch.linspace(1, 2, 5, dtype=dtype)
    half = torch.tensor(0.5, dtype=dtype)
    # whole numbers: the products of these matrices, which the composed operators are held against, have no rounding
    W = (3 * rand(4, 5, seed=4, dtype=dtype)).round()
    K = (3 * rand(5, 5, seed=5, dtype=dtype)).round()
    K = K + K.T
    whole, kernel = Dense(W), Dense(K, symmetric=True)
    return {
        "dense": (rect, M),
        "symmetric": (sym, S),
        "batch": (many, B),
        "one": (Dense(M[:1, :1]), M[:1, :1]),
        "diagonal": (Diagonal(d), d.diag()),
        "identity": (Identity(5, dtype), eye),
        "function": (FunctionOperator(lambda v: v @ M.T, (4, 5), dtype, rmatvec=lambda u: u @ M), M),
        "transposed": (rect.T, M.T),
        "batch transposed": (many.T, B.mT),
        "sum": (sym + Diagonal(d), S + d.diag()),
        "difference": (sym - Identity(5, dtype), S - eye),
        "negative": (-rect, -M),
        "scaled": (3 * rect / 2, 1.5 * M),
        "scaled by a tensor": (half * rect, 0.5 * M),
        "tensor on the right": (rect * half, 0.5 * M),
        "shifted": (sym.shift(2.0), S + 2 * eye),
        "batch shifted": (systems.shift(d[:3]), batch + d[:3, None, None] * eye),
        "composed": (whole @ kernel, W @ K),
        "gram": (whole.T @ whole, W.T @ W),
        "batch after one": (Dense((3 * B).round()) @ kernel, (3 * B).round() @ K),
        "deep": ((whole @ kernel.shift(1.0)).T @ (2 * whole) - Identity(5, dtype), (W @ (K + eye)).T @ (2 * W) - eye),
    }


@pytest.mark.parametrize("name", matrices(DOUBLE))
def test_laws(name, dtype):
    check_operator(*matrices(dtype)[name])


def test_promises_follow_the_algebra():
    S = Dense(spd(4, 10.0), symmetric=True, definite=True)
    assert S.T is S
    assert (S + Identity(4, DOUBLE)).definite
    assert (2 * S).definite
    assert S.shift(1.0).definite
    assert (-S).definite is False
    assert S.shift(-1.0).definite is None
    assert (S - S).definite is None
    assert (S.T @ Dense(rand(4, 4))).symmetric is False
    M = Dense(rand(3, 4))
    assert (M.T @ M).symmetric
    assert M.T.T is M


def test_second_derivatives_are_operators():
    """A Hessian, a Gauss-Newton matrix and a Jacobian obey the same laws as their dense matrices."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    X, t = rand(6, 3), rand(6, 2, seed=1)
    y = {name: parameter.detach() for name, parameter in net.named_parameters()}

    def outputs(y):
        return torch.func.functional_call(net, y, (X,))

    def loss(y):
        return ((outputs(y) - t) ** 2).mean()

    H = Hessian(loss, y)
    check_operator(H, H.to_dense())
    G = GaussNewton(outputs, lambda z: ((z - t) ** 2).mean(), y)
    J = Jacobian(outputs, y)
    check_operator(J, J.to_dense())
    check_operator(G, J.to_dense().T @ J.to_dense() * 2 / t.numel())


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Dense([[1.0]]), TypeError, "torch.Tensor"),
        (lambda: Dense(torch.ones(2, 2, dtype=torch.int64)), TypeError, "int64"),
        (lambda: Dense(torch.ones(3)), ValueError, "shape"),
        (lambda: Dense(rand(2, 3), symmetric=True), ValueError, "symmetric"),
        (lambda: Dense(rand(3, 3), symmetric=True), ValueError, "differ"),
        (lambda: Dense(rand(3, 3), definite=True), ValueError, "symmetric=True"),
        (lambda: Dense(rand(2, 3)) + Dense(rand(3, 2)), ValueError, "shapes"),
        (lambda: Dense(rand(2, 3)) @ Dense(rand(2, 3)), ValueError, "inner"),
        (lambda: Dense(rand(2, 3)) + Dense(rand(2, 3).float()), ValueError, "dtype"),
        (lambda: Dense(rand(2, 3)).shift(1.0), ValueError, "square"),
        (lambda: Dense(rand(4, 3, 3)).shift(torch.ones(3, dtype=DOUBLE)), ValueError, "sigma"),
        (lambda: Dense(rand(2, 3)) + 1.0, TypeError, "LinearOperator"),
    ],
)
def test_bad_input_is_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_finished_columns_cost_no_product():
    seen = []
    A = FunctionOperator(lambda v: seen.append(v.shape) or 2 * v, (3, 3), DOUBLE, symmetric=True)
    out = A.active_matvec(rand(4, 3), torch.tensor([True, False, True, False]))
    assert seen == [(2, 3)]
    assert torch.equal(out[1], torch.zeros(3, dtype=DOUBLE))


def test_batches_of_systems_without_unknowns(dtype):
    A = Dense(torch.zeros(3, 0, 0, dtype=dtype), symmetric=True)
    b = torch.zeros(2, 3, 0, dtype=dtype)
    assert (A @ b).shape == b.shape
    for solver in (CG(), MINRES(), GMRES(), LU(), Cholesky(), LDL(), Auto()):
        solution = solver(A, b)
        assert solution.x.shape == b.shape
        assert members(solution) == [C] * 6
