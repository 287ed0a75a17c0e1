"""The decision-focused example: its oracles against linear programs and brute force, and what its table claims."""

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch

from nestopt import constrained, implicit

D = torch.float64


@pytest.fixture
def example():
    path = Path(__file__).parents[1] / "examples" / "decision_focused.py"
    spec = importlib.util.spec_from_file_location("decision_focused", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_path_oracle_solves_its_linear_program(example, generator):
    grid = example.Grid()
    c = torch.rand(6, grid.n, generator=generator, dtype=D)
    w = grid(c)
    assert (w.sum(-1) == 8).all()
    program = {key: value for key, value in grid.program.items() if key != "low"}
    torch.testing.assert_close(w @ program["A"].T, program["b"].expand(6, -1))
    relaxed = constrained.solve_qp(torch.zeros(grid.n, grid.n, dtype=D), c, **grid.program)
    torch.testing.assert_close(relaxed.value, (c * w).sum(-1), rtol=0, atol=1e-7)  # the polytope is integral


def test_the_knapsack_oracle_against_every_subset(example, generator):
    knapsack = example.Knapsack(n=8)
    c = torch.randn(20, 8, generator=generator, dtype=D)
    subsets = torch.tensor(list(itertools.product([0.0, 1.0], repeat=8)), dtype=D)
    subsets = subsets[subsets @ knapsack.weights.double() <= knapsack.capacity]
    w = knapsack(c)
    assert (w @ knapsack.weights.double() <= knapsack.capacity).all()
    torch.testing.assert_close((c * w).sum(-1), (c @ subsets.T).max(-1).values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["Grid", "Knapsack"])
def test_spo_plus_beats_least_squares_where_the_model_is_wrong(example, name):
    problem = getattr(example, name)()
    for seed in range(3):
        x, c = example.generate(500, 8, problem.n, seed)
        value = {}
        for method, steps in (("two-stage", 0), ("SPO+", 60)):
            W = example.train(problem, x[:200], c[:200], method, steps)
            value[method] = implicit.regret(x[200:] @ W, c[200:], problem, maximize=problem.maximize).mean()
        assert value["SPO+"] < 0.8 * value["two-stage"]


def test_a_quick_figure(example, tmp_path, capsys):
    """The QP layer lowers the regret that it is trained on, and the report and figure hold every method."""
    problem = example.Grid()
    x, c = example.generate(600, 8, problem.n, 8)
    before, after = (
        implicit.regret(x[200:] @ example.train(problem, x[:200], c[:200], "QP layer", steps), c[200:], problem).mean()
        for steps in (0, 5)
    )
    assert after < before
    found = {
        (name, degree, method): [0.1, 0.2]
        for name in ("Knapsack", "Grid")
        for degree in (1, 8)
        for method in example.METHODS
    }
    example.report(found)
    example.draw(tmp_path / "figure.png", found)
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert "15.00 % +- 5.00" in capsys.readouterr().out


def test_a_two_stage_decision_rule_by_the_value_function(generator):
    """Newsvendor: order x at cost 1, sell at 4 what was ordered and asked for: the optimal order is the .75 quantile.

    The second stage is a linear program, least over s >= 0 of -4 s with s <= x and s <= demand; the gradient of its
    value in x is minus a dual variable, and no derivative of the solution is needed.
    """
    demand = 10 * torch.rand(101, generator=generator, dtype=D)

    def total(x):
        h = torch.stack([x.expand_as(demand), demand], -1)
        second = constrained.solve_qp(
            torch.zeros(1, 1, dtype=D), torch.full((1,), -4.0, dtype=D), G=torch.ones(2, 1, dtype=D), h=h, low=0.0
        )
        return x + second.value.mean(), second

    x = torch.tensor(5.0, dtype=D, requires_grad=True)
    value, second = total(x)
    (slope,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(slope, 1 - second.inequality_dual[:, 0].detach().mean(), rtol=0, atol=1e-7)
    assert float(slope) == pytest.approx(1 - 4 * float((demand > 5).double().mean()), abs=1e-7)
    quantile = demand.sort().values
    below, above = (torch.autograd.grad(total(z)[0], z)[0] for z in (
        ((quantile[k] + quantile[k + 1]) / 2).requires_grad_() for k in (74, 75)))  # fmt: skip
    assert below < 0 < above
