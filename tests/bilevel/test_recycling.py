import pytest
import torch
from problems import DOUBLE
from torch.nn.functional import binary_cross_entropy_with_logits

from nestopt import bilevel, implicit
from nestopt.linalg import CG, Recycled, Stopping


def penalties():
    """A logistic regression with one log penalty for each group of features, some of them a hundred times larger."""
    g = torch.Generator().manual_seed(0)
    n, points = 30, 50
    scale = torch.cat([torch.ones(n - 6), torch.linspace(8, 20, 6)]).double()
    X, V = (torch.randn(points, n, generator=g, dtype=DOUBLE) * scale for _ in range(2))
    w = torch.randn(n, generator=g, dtype=DOUBLE) / scale
    t, v = ((part @ w + torch.randn(points, generator=g, dtype=DOUBLE) > 0).double() for part in (X, V))
    groups = torch.arange(n) % 4

    def upper(x, y):
        return binary_cross_entropy_with_logits(V @ y, v)

    def lower(x, y):
        return binary_cross_entropy_with_logits(X @ y, t) + (torch.exp(x[groups]) * y**2).sum() / 2

    return bilevel.Problem(upper, lower), torch.full((4,), -4.0, dtype=DOUBLE), torch.zeros(n, dtype=DOUBLE)


@pytest.mark.parametrize(
    "make",
    [
        lambda solver: bilevel.AID(linear_solver=solver, stopping=Stopping(1e-4, max_iter=5)),
        lambda solver: bilevel.HOAG(
            bilevel.Polynomial(3.0), bilevel.LipschitzStep(), linear_solver=solver, stopping=Stopping(1e-2, max_iter=5)
        ),
    ],
    ids=["AID", "HOAG"],
)
def test_outer_loops_carry_it(make):
    problem, x0, y0 = penalties()
    solver = Recycled(CG(), rank=10)
    plain = bilevel.solve(problem, x0, y0, make(CG()))
    recycled = bilevel.solve(problem, x0, y0, make(solver))
    assert recycled.status == plain.status
    assert recycled.value == pytest.approx(plain.value, rel=1e-3)
    each = [res.counts.products / len(res.history) for res in (plain, recycled)]
    assert each[1] < each[0]  # the lower solver's products, which do not change, are among them
    assert solver.memory.solves >= 4
    assert solver.memory.space.W.shape == (10, y0.numel())


def test_hypergradients_along_a_path():
    problem, x, y = penalties()
    solver, spent = Recycled(CG(rtol=1e-8), rank=10), []
    for i in range(4):
        y = implicit.NewtonCG()(lambda y, x=x: problem.lower(x, y), y).x
        plain = bilevel.hypergradient(problem, x, y, CG(rtol=1e-8), certificate=False)
        recycled = bilevel.hypergradient(problem, x, y, solver, certificate=False)
        torch.testing.assert_close(recycled.value, plain.value, rtol=1e-5, atol=1e-8)
        spent.append((plain.products, recycled.products))
        x = x + 0.05 * (i + 1)
    assert spent[0][0] == spent[0][1]
    assert all(recycled < 0.8 * plain for plain, recycled in spent[1:])
