"""Problem and KKT: residuals at known points, sign conventions, batches, trees, and what is refused."""

import pytest
import torch

from nestopt.constrained import Problem

D = torch.float64


def tensor(*values):
    return torch.tensor(values, dtype=D)


# Hock & Schittkowski 71 in this library's signs: product >= 25 as a row <= 0
HS71 = Problem(
    lambda x: x[0] * x[3] * (x[0] + x[1] + x[2]) + x[2],
    equality=lambda x: x @ x - 40,
    inequality=lambda x: 25 - x.prod(),
    bounds=(1.0, 5.0),
)
HS71_X = tensor(1.0, 4.742999637, 3.821149979, 1.379408293)


def test_hs71_with_its_published_multipliers():
    dual = torch.tensor(0.1614685642, dtype=D), torch.tensor(0.5522936595, dtype=D), tensor(-1.087871171, 0, 0, 0)
    kkt = HS71.kkt(HS71_X, *dual)
    assert float(HS71.objective(HS71_X)) == pytest.approx(17.0140173, abs=1e-6)
    assert float(kkt.error) < 1e-7
    assert float(HS71.lagrangian(HS71_X, *dual)) == pytest.approx(17.0140173, abs=1e-6)
    # every wrong sign is seen
    for k in range(3):
        wrong = [-d if i == k else d for i, d in enumerate(dual)]
        assert float(HS71.kkt(HS71_X, *wrong).stationarity) > 0.1
    assert float(HS71.kkt(HS71_X, dual[0], -dual[1], dual[2]).dual_feasibility) == pytest.approx(0.5522936595)


def test_each_part_by_itself():
    problem = Problem(
        lambda x: (x * x).sum() / 2,
        equality=lambda x: x[:1] - 3,
        inequality=lambda x: x[1] - 1,
        bounds=(tensor(-torch.inf, 0, 0), tensor(torch.inf, torch.inf, 2.0)),
    )
    kkt = problem.kkt(tensor(3.5, 3.0, -1.0), tensor(-2.0), torch.tensor(-0.25, dtype=D), tensor(4.0, -5.0, 0.5))
    assert float(kkt.stationarity) == pytest.approx(5.5)  # 3.5 - 2 + 4
    assert float(kkt.primal_feasibility) == 2.0  # x1 - 1
    assert float(kkt.dual_feasibility) == 4.0  # a multiplier of a bound that is not there
    assert float(kkt.complementarity) == 15.0  # 5 times the distance of x1 to its lower bound
    assert kkt.scaled.parts.tolist() == pytest.approx([5.5 / 5.25, 2 / 3.5, 4 / 5, 15 / (22.25 / 2)])
    assert float(kkt.error) == pytest.approx(15 / (22.25 / 2))


def test_a_batch_is_a_loop():
    problem = Problem(lambda x, t: ((x - t) ** 2).sum(-1), inequality=lambda x, t: x.sum(-1) - 1, bounds=(0.0, None))
    generator = torch.Generator().manual_seed(0)
    x, t, z = (torch.randn(2, 3, 4, dtype=D, generator=generator) for _ in range(3))
    mu = torch.randn(2, 3, dtype=D, generator=generator)
    kkt = problem.kkt(x, None, mu, z, t, batch_dims=2)
    value = problem.lagrangian(x, None, mu, z, t, batch_dims=2)
    assert kkt.stationarity.shape == value.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            one = problem.kkt(x[i, j], None, mu[i, j], z[i, j], t[i, j])
            assert torch.allclose(kkt.parts[:, i, j], one.parts, atol=1e-14)
            assert torch.allclose(kkt.scales[:, i, j], one.scales, atol=1e-14)
            single = problem.lagrangian(x[i, j], None, mu[i, j], z[i, j], t[i, j])
            assert float(value[i, j]) == pytest.approx(float(single))


def test_trees_and_numbers():
    problem = Problem(
        lambda x: x["a"] ** 2 + x["b"].sum(),
        equality=lambda x: {"p": x["a"] - 2, "q": x["b"].reshape(2, 2) - 1},
        bounds=({"a": 0.0, "b": torch.full((4,), -1.0)}, None),
    )
    x = {"a": torch.tensor(2.0), "b": torch.ones(4)}
    lam = {"p": torch.tensor(-4.0), "q": -torch.ones(2, 2)}
    assert float(problem.kkt(x, lam, None, {"a": torch.tensor(0.0), "b": torch.zeros(4)}).error) == 0
    empty = Problem(lambda x: (x * x).sum(), inequality=lambda x: x[:0])
    assert float(empty.kkt(torch.zeros(2), None, torch.zeros(0)).error) == 0
    number = Problem(lambda x: (x - 1) ** 2, bounds=(None, 0))
    assert float(number.kkt(torch.tensor(0.0), None, None, torch.tensor(2.0)).error) == 0


def test_the_gradient_of_the_lagrangian_is_its_own():
    mu = torch.tensor(0.3, dtype=D, requires_grad=True)
    x = HS71_X.clone().requires_grad_()
    L = HS71.lagrangian(x, torch.tensor(0.2, dtype=D), mu, tensor(-1.0, 0, 0, 0.5))
    slope, along_mu = torch.autograd.grad(L, [x, mu])
    (f_x,) = torch.autograd.grad(HS71.objective(x), x)
    (g_x,) = torch.autograd.grad(25 - x.prod(), x)
    assert torch.allclose(slope, f_x + 0.4 * x + 0.3 * g_x + tensor(-1.0, 0, 0, 0.5))
    assert float(along_mu) == pytest.approx(float(25 - HS71_X.prod()), abs=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Problem(None), TypeError, "objective must be a function"),
        (lambda: Problem(torch.sum, equality=3), TypeError, "equality must be a function"),
        (lambda: Problem(torch.sum, bounds=1.0), TypeError, "pair"),
        (lambda: Problem(lambda x: x).kkt(torch.ones(2)), ValueError, "must return a scalar"),
        (lambda: Problem(lambda x: 1.0).kkt(torch.ones(2)), TypeError, "floating tensor, but it returned float"),
        (lambda: Problem(torch.sum).kkt(torch.ones(2), torch.ones(2)), ValueError, "no such constraints"),
        (lambda: Problem(torch.sum, lambda x: x).kkt(torch.ones(2), torch.ones(3)), ValueError, "equality_dual"),
        (lambda: Problem(torch.sum, lambda x: x.double()).kkt(torch.ones(2)), ValueError, "float64"),
        (lambda: Problem(torch.sum, bounds=(torch.ones(3), None)).kkt(torch.ones(2)), ValueError, "broadcasts"),
        (lambda: Problem(torch.sum).kkt(torch.ones(2, dtype=torch.int64)), TypeError, "floating"),
        (lambda: Problem(torch.sum).kkt({"a": torch.ones(2), "b": torch.ones(3)}, batch_dims=1), ValueError, "begin"),
        (lambda: Problem(torch.sum).kkt(torch.ones(2), batch_dims=-1), ValueError, "batch_dims"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
