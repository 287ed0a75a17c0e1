"""Laws of hypergradients and bilevel methods, run over problems with answers."""

from __future__ import annotations

from typing import Any

import torch
from problems import Answered
from torch import Tensor

from nestopt import bilevel, linalg
from nestopt.bilevel.problem import Spaces
from nestopt.linalg import LinearSolver, Status
from nestopt.linalg.tree import Ravel


def vector(tree: Any) -> Tensor:
    """The tree as one vector."""
    return Ravel.of(tree, "tree").flatten(tree).detach()


def relative(a: Any, b: Any) -> float:
    """|a - b| / |b| of two trees."""
    return float((vector(a) - vector(b)).norm() / vector(b).norm())


def check_hypergradient_value(case: Answered, solver: LinearSolver, rtol: float) -> bilevel.Hypergradient:
    """The hypergradient at the exact lower solution equals the closed form, converged, within its own bound."""
    y = case.lower_solution(case.x0)
    hg = bilevel.hypergradient(case.problem, case.x0, y, solver, strong_convexity=case.strong_convexity)
    assert hg.status == Status.CONVERGED, (case.name, hg.status)
    assert case.hypergradient is not None
    truth = case.hypergradient(case.x0)
    assert relative(hg.value, truth) <= rtol, (case.name, relative(hg.value, truth))
    assert float((vector(hg.value) - vector(truth)).norm()) <= hg.error_bound, case.name
    assert Ravel.of(hg.value, "x").treespec == Ravel.of(case.x0, "x").treespec
    return hg


def check_method(method: bilevel.Method, case: Answered, xtol: float) -> bilevel.BilevelResult:
    """Known answer, measured error, same numbers again, and init + step equal to the call."""
    res = bilevel.solve(case.problem, case.x0, case.y0, method)
    assert res.status == Status.CONVERGED, (case.name, res.status, res.error, res.residuals)
    assert res.error <= res.tolerance
    assert abs(res.error - max(res.residuals.values())) == 0
    if case.x_star is not None:
        error = float((vector(res.x) - vector(case.x_star)).norm())
        size = max(float(vector(case.x_star).norm()), float((vector(case.x0) - vector(case.x_star)).norm()))
        assert error <= xtol * size, (case.name, error, size)
    if case.value is not None:
        assert abs(res.value - case.value) <= xtol * max(1.0, abs(case.value)), (case.name, res.value)
    # the residuals are those of the point returned
    hg = bilevel.hypergradient(case.problem, res.x, res.y, linalg.Cholesky(), certificate=False)
    assert abs(hg.lower_gradient_norm - res.residuals["lower"]) <= 1e-3 * res.tolerance
    spaces = Spaces.of(res.x, res.y)
    step = case.problem.project(vector(res.x) - vector(hg.value), spaces) - vector(res.x)
    assert float(step.norm()) <= 1.1 * res.tolerance
    assert [record["iteration"] for record in res.history] == list(range(res.iterations + 1))
    if res.iterations > 40:  # the rest is the same for long runs, and takes three times as long
        return res
    again = bilevel.solve(case.problem, case.x0, case.y0, method)
    assert torch.equal(vector(again.x), vector(res.x))
    assert again.counts == res.counts
    state = method.init(case.problem, case.x0, case.y0)
    for _ in range(res.iterations):
        state = method.step(case.problem, state)
    assert torch.equal(state.x_vector, vector(res.x))
    assert state.counts == res.counts
    return res
