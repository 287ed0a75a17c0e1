"""ConvexProgram: known answers, the ten duties, statuses, and what is refused."""

import copy
import pickle

import pytest
import torch
from laws_layer import Case, duties
from sklearn.datasets import make_regression
from torch.func import hessian, jacfwd, jacrev, vmap

from nestopt.constrained import ConvexProgram, MinimumNorm
from nestopt.implicit import ImplicitWarning, Monitor
from nestopt.linalg import GMRES, SolverError, Status

cp = pytest.importorskip("cvxpy", reason="ConvexProgram writes its problems in cvxpy")
pytest.importorskip("clarabel", reason="clarabel is ConvexProgram's default solver")

D = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def tensor(*values):
    return torch.tensor(values, dtype=D)


def close(a, b, atol=1e-8):
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= atol, (a, b)


def leaves(*values):
    return [torch.tensor(v, dtype=D, requires_grad=True) for v in values]


def entropy(n=3):
    """max t'x + entropy(x) on the simplex: x = softmax(t), value = logsumexp(t)."""
    x, t = cp.Variable(n, name="x"), cp.Parameter(n, name="t")
    return ConvexProgram(cp.Problem(cp.Maximize(t @ x + cp.sum(cp.entr(x))), [cp.sum(x) == 1]))


def ball(n=3):
    """The distance to a ball from outside of it, by its second-order cone."""
    x, t, r = cp.Variable(n, name="x"), cp.Parameter(n, name="t"), cp.Parameter(name="r", nonneg=True)
    return ConvexProgram(cp.Problem(cp.Minimize(cp.sum_squares(x - t)), [cp.norm(x) <= r]))


def semidefinite(n=2):
    """The nearest semidefinite matrix."""
    X, C = cp.Variable((n, n), symmetric=True, name="X"), cp.Parameter((n, n), name="C")
    return ConvexProgram(cp.Problem(cp.Minimize(cp.sum_squares(X - C)), [X >> 0]))


def quadratic():
    """min x'x / 2 + q'x on x >= 0, sum x = b."""
    x, q, b = cp.Variable(3, name="x"), cp.Parameter(3, name="q"), cp.Parameter(name="b")
    return ConvexProgram(cp.Problem(cp.Minimize(cp.sum_squares(x) / 2 + q @ x), [x >= 0, cp.sum(x) == b]))


def solves(program, name):
    """The layer as a function that the laws call with a monitor and a policy."""

    def layer(*theta, monitor=None, on_failure="nan"):
        program.monitor, program.on_failure = monitor, on_failure
        solution = program(*theta)
        return solution[name], solution.value[..., None]

    return layer


def ball_exact(t, r):
    x = r * t / t.square().sum().sqrt()
    return x, ((x - t) ** 2).sum()[None]


def quadratic_exact(q, b):
    """With the last entry at its bound."""
    x = torch.cat([(b + q[:2].sum()) / 2 - q[:2], torch.zeros(1, dtype=D)])
    return x, (x @ x / 2 + q @ x)[None]


def semidefinite_exact(C):
    """Of a symmetrised 2 x 2 matrix with one negative eigenvalue: that part of its spectrum."""
    S = (C + C.mT) / 2
    half, gap = S.trace() / 2, torch.sqrt((S[0, 0] - S[1, 1]) ** 2 / 4 + S[0, 1] ** 2)
    X = (half + gap) * (S - (half - gap) * torch.eye(2, dtype=D)) / (2 * gap)
    return X, ((X - C) ** 2).sum()[None]


class Outer(torch.nn.Module):
    """A network that ends in a program."""

    def __init__(self):
        super().__init__()
        self.scale, self.program = torch.nn.Parameter(torch.tensor(1.5, dtype=D)), entropy()

    def forward(self, t):
        return self.program(self.scale * t)["x"]


def module():
    return Outer(), (tensor(0.3, -0.2, 0.5),)


NOT_HERE = {
    "check_captured": "takes no function",
    "check_guess": "has no initial guess",
}
NO_SCALAR = {**NOT_HERE, "check_zero_dimensions": "its parameters have dimensions"}
BALL, ENTROPY, SEMIDEFINITE, QUADRATIC = ball(), entropy(), semidefinite(), quadratic()
CASES = [
    Case(
        "exponential", solves(ENTROPY, "x"), lambda g: (torch.randn(3, generator=g, dtype=D),),
        exact=lambda t: (t.softmax(-1), t.logsumexp(-1)[None]), status=lambda *t: ENTROPY(*t).codes,
        tree=lambda p: solves(ENTROPY, "x")({"t": p["first"]}), module=module, lacks=NO_SCALAR, shared=(), atol=1e-9,
    ),
    Case(
        "second-order", solves(BALL, "x"),
        lambda g: (1.5 + torch.rand(3, generator=g, dtype=D), 1 + torch.rand((), generator=g, dtype=D)),
        exact=ball_exact, status=lambda *t: BALL(*t).codes, spoil=lambda item: (item[0], torch.tensor(-1.0, dtype=D)),
        tree=lambda p: solves(BALL, "x")({"t": p["first"], "r": p["rest"][0]}), lacks=NOT_HERE, atol=1e-9,
    ),
    Case(
        "semidefinite", solves(SEMIDEFINITE, "X"),
        lambda g: (tensor([1.0, 0.4], [0.7, -1.0]) + 0.3 * torch.randn(2, 2, generator=g, dtype=D),),
        exact=semidefinite_exact, status=lambda *t: SEMIDEFINITE(*t).codes, lacks=NO_SCALAR, shared=(), atol=1e-9,
        tree=lambda p: solves(SEMIDEFINITE, "X")({"C": p["first"]}),
    ),
    Case(
        "quadratic", solves(QUADRATIC, "x"),
        lambda g: (
            tensor(0.0, 0.2, 3.0) + 0.1 * torch.randn(3, generator=g, dtype=D),
            1 + torch.rand((), generator=g, dtype=D),
        ),
        exact=quadratic_exact, status=lambda *t: QUADRATIC(*t).codes,
        spoil=lambda item: (item[0], torch.tensor(-1.0, dtype=D)),
        tree=lambda p: solves(QUADRATIC, "x")({"q": p["first"], "b": p["rest"][0]}), lacks=NOT_HERE, atol=1e-9,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("case", "law"), duties(CASES))
def test_duty(case, law, generator):
    law(case, generator)
