"""solve without a method: what is chosen, why, and that it reaches the answer."""

from pathlib import Path

import pytest
import torch
from laws_bilevel import relative, vector
from problems import (
    DOUBLE,
    coupled,
    coupled_equality,
    coupled_inequality,
    kernel_ridge,
    lasso,
    merely_convex,
    quadratic,
    sine,
    weighted_l1,
)

from nestopt import bilevel
from nestopt.bilevel.choice import choose

EXPECTED = [
    (quadratic(5, 3), "AID", "smooth lower level has a unique"),
    (sine(20), "AID", "smooth"),
    (kernel_ridge(), "AID", "2 upper and 30 lower"),
    (merely_convex(10), "BAMM", "not unique"),
    (weighted_l1(10), "AID", "composite"),
    (lasso(), "AID", "composite"),
    (coupled_inequality(1.2, 1.1627, 3.5850), "AID", "constrained"),
    (coupled(10), "LVHBA", "not unique"),
    (coupled_equality(10), "LVHBA", "not unique"),
]


@pytest.mark.parametrize(("case", "name", "words"), EXPECTED, ids=lambda v: getattr(v, "name", None))
def test_the_choice_solves_the_problem_and_says_why(case, name, words):
    res = bilevel.solve(case.problem, case.x0, case.y0)
    assert type(res.method).__name__ == name
    assert res.reason.startswith(f"{name}: ")
    assert words in res.reason
    assert "\n" not in res.reason
    assert res.converged, (case.name, res.status, res.residuals)
    if case.x_star is not None and "inequality" not in case.name:  # whose answer has five digits
        assert float((vector(res.x) - vector(case.x_star)).norm()) <= 1e-5 * max(1, float(vector(case.x_star).norm()))
    if case.value is not None:
        assert abs(res.value - case.value) <= 1e-4 * max(1.0, abs(case.value))


def test_a_given_method_has_no_reason_and_choosing_is_counted():
    case = quadratic(5, 3)
    given = bilevel.solve(case.problem, case.x0, case.y0, bilevel.AID())
    chosen = bilevel.solve(case.problem, case.x0, case.y0)
    assert given.reason == ""
    assert given.method == bilevel.AID()
    looked = choose(case.problem, case.x0, case.y0).counts
    assert looked.lower_solves == 1
    assert looked.products > 0
    started = bilevel.AID()(case.problem, case.x0, case.lower_solution(case.x0))
    assert chosen.counts.lower_solves == started.counts.lower_solves + 1
    assert relative(chosen.x, given.x) < 1e-8


def test_minibatches_change_the_choice():
    g = torch.Generator().manual_seed(0)
    X = torch.randn(32, 3, generator=g, dtype=DOUBLE)
    t = X @ torch.ones(3, dtype=DOUBLE) + 0.1 * torch.randn(32, generator=g, dtype=DOUBLE)
    problem = bilevel.Problem(
        lambda x, y, d: ((d[0] @ y - d[1]) ** 2).mean() / 2,
        lambda x, y, d: ((d[0] @ y - d[1]) ** 2).mean() / 2 + x.exp() * (y**2).sum() / 2,
    )
    x0, y0 = torch.zeros((), dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE)
    keyed = choose(problem, x0, y0, bilevel.Batches((X, t), batch_size=8))
    assert type(keyed.method).__name__ == "SABA"
    free = choose(problem, x0, y0, lambda k: (X[k : k + 8], t[k : k + 8]))
    assert type(free.method).__name__ == "SOBA"
    bent = bilevel.Problem(problem.upper, lambda x, y, d: ((d[0] @ torch.sin(3 * y) - d[1]) ** 2).mean() + x**2)
    not_convex = choose(bent, x0, torch.full_like(y0, 2.0), lambda k: (X[k : k + 8], t[k : k + 8]))
    assert type(not_convex.method).__name__ == "F2SA"
    assert not_convex.counts.products > 0
    full = choose(problem, x0, y0, bilevel.Batches((X, t), batch_size=None))
    same = choose(problem, x0, y0, lambda k: (X, t))
    broken = choose(problem, x0, y0, lambda k: (X, t * torch.nan))
    assert type(full.method) is type(same.method) is type(broken.method) is bilevel.AID
    constrained = bilevel.Problem(problem.upper, problem.lower, equality=lambda x, y, d: (y.sum() - 1)[None])
    with pytest.raises(ValueError, match="data change from step to step"):
        choose(constrained, x0, y0, bilevel.Batches((X, t), batch_size=8))


def test_a_lower_level_that_cannot_be_solved_is_left_to_its_status():
    problem = bilevel.Problem(
        lambda x, y: ((y - x) ** 2).sum(),
        lambda x, y: (y**2).sum(),
        equality=lambda x, y: torch.stack([y.sum() - 1, y.sum() - 2]),
    )
    res = bilevel.solve(problem, torch.zeros(2, dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE))
    assert res.status.name == "INFEASIBLE"
    assert "INFEASIBLE" in res.reason


def test_the_table_of_methods_is_the_readme_s():
    assert str(bilevel.methods()) in (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_table_of_methods():
    table = {row["method"]: row for row in bilevel.methods()}
    assert set(table) <= set(bilevel.__all__)
    expected = (
        "AID HOAG Unrolled Replay PES ESSingle DARTS MEHA LVHBA BiCGAFFA BLOCC F2SA F3SA VPBGD GPBGD BOME BVFSM BAMM "
        "SOBA SABA SRBA AmIGO StocBiO MRBO TTSA BSVRB BDA BMG"
    )
    assert set(expected.split()) <= set(table)
    for name, row in table.items():
        assert row["family"] in ("implicit", "through the solver", "penalty", "single loop"), name
        assert row["reference"], name
        assert isinstance(getattr(bilevel, name)(), bilevel.Method), name
