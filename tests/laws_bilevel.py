"""Laws of hypergradients and bilevel methods, run over problems with answers."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
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


def exact_adjoint(case: Answered) -> LinearSolver | None:
    """A dense solver for the adjoint system, None where the lower level has its own kind of system."""
    p = case.problem
    smooth = p.lower_prox is p.lower_set is p.inequality is p.equality is None
    return linalg.Cholesky() if smooth else None


def check_answer(res: bilevel.BilevelResult, case: Answered, xtol: float) -> None:
    """The run says CONVERGED, by an error that is the largest of its residuals, and x and value are the known ones.

    Where neither is known, as where phi falls for ever, x is held to the closed form's hypergradient: the projected
    step there may be xtol of the one at x0.
    """
    assert res.status == Status.CONVERGED, (case.name, res.status, res.error, res.residuals)
    assert res.error <= res.tolerance
    assert abs(res.error - max(res.residuals.values())) == 0
    if case.x_star is not None:
        error = float((vector(res.x) - vector(case.x_star)).norm())
        size = max(float(vector(case.x_star).norm()), float((vector(case.x0) - vector(case.x_star)).norm()))
        assert error <= xtol * size, (case.name, error, size)
    if case.y_star is not None:
        error = float((vector(res.y) - vector(case.y_star)).norm())
        assert error <= 10 * xtol * max(1.0, float(vector(case.y_star).norm())), (case.name, error)
    if case.value is not None:
        assert abs(res.value - case.value) <= xtol * max(1.0, abs(case.value)), (case.name, res.value)
    if case.x_star is None and case.value is None and case.hypergradient is not None:
        spaces = Spaces.of(res.x, res.y)
        moved = case.problem.project(vector(res.x) - vector(case.hypergradient(res.x)), spaces)
        error = float((moved - vector(res.x)).norm() / vector(case.hypergradient(case.x0)).norm())
        assert error <= xtol, (case.name, error)


def check_certificate(res: bilevel.BilevelResult, case: Answered) -> None:
    """The residuals of an implicit method are those of the point returned, as an independent hypergradient sees it."""
    hg = bilevel.hypergradient(case.problem, res.x, res.y, exact_adjoint(case), dual=res.state.dual, certificate=False)
    assert abs(hg.lower_gradient_norm - res.residuals["lower"]) <= 1e-3 * res.tolerance
    spaces = Spaces.of(res.x, res.y)
    step = case.problem.project(vector(res.x) - vector(hg.value), spaces) - vector(res.x)
    assert float(step.norm()) <= 1.1 * res.tolerance


def check_counts(res: bilevel.BilevelResult) -> None:
    """One record an outer step, and counts that only grow."""
    assert [record["iteration"] for record in res.history] == list(range(res.iterations + 1))
    names = [name for name in vars(res.counts) if name in res.history[-1]]
    assert names
    for name in names:
        column = [record[name] for record in res.history]
        assert column == sorted(column), name
        assert column[-1] == getattr(res.counts, name), name
    assert res.counts.upper_evaluations + res.counts.lower_gradients > 0


def check_same_again(method: bilevel.Method, case: Answered, res: bilevel.BilevelResult) -> None:
    """The same call gives the same numbers to the last bit; so do `init` and `step`."""
    again = bilevel.solve(case.problem, case.x0, case.y0, method)
    assert torch.equal(vector(again.x), vector(res.x))
    assert again.counts == res.counts
    state = method.init(case.problem, case.x0, case.y0)
    for _ in range(res.iterations):
        state = method.step(case.problem, state)
    assert torch.equal(state.x_vector, vector(res.x))
    assert state.counts == res.counts


class Killed(Exception):
    """Ends a run from outside, as a power cut would."""


def check_resume(method: bilevel.Method, case: Answered, res: bilevel.BilevelResult) -> None:
    """A run that was killed half way and started again from its file ends with the same bits and counts."""
    half = res.iterations // 2

    def kill(k: int, state: Any) -> None:
        if int(state.iterations) == half:
            raise Killed

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.pt"
        with contextlib.suppress(Killed):
            callbacks = [bilevel.Checkpoint(path, every=1), kill]
            bilevel.solve(case.problem, case.x0, case.y0, method, callbacks=callbacks)
        assert path.exists() or half == 0
        rest = bilevel.solve(case.problem, case.x0, case.y0, method, callbacks=[bilevel.Checkpoint(path)])
    assert torch.equal(vector(rest.x), vector(res.x)), case.name
    assert torch.equal(vector(rest.y), vector(res.y)), case.name
    assert rest.counts == res.counts
    assert rest.iterations == res.iterations
    assert [r["value"] for r in rest.history] == [r["value"] for r in res.history]


def check_run(method: bilevel.Method, case: Answered, xtol: float) -> bilevel.BilevelResult:
    """Known answer, measured error, true counts: `check_method` without its further runs."""
    res = bilevel.solve(case.problem, case.x0, case.y0, method)
    check_answer(res, case, xtol)
    if method.assumptions.family == "implicit":
        check_certificate(res, case)
    check_counts(res)
    return res


def check_method(method: bilevel.Method, case: Answered, xtol: float) -> bilevel.BilevelResult:
    """Known answer, measured error, true counts, same numbers again, init + step equal to the call, exact resume."""
    res = check_run(method, case, xtol)
    if res.iterations > 40 or vector(case.y0).numel() > 30:  # the rest is the same, and takes three times as long
        return res
    check_same_again(method, case, res)
    check_resume(method, case, res)
    return res


def in_dicts(case: Answered) -> Answered:
    """The same problem with x and y in dicts of odd shapes, a 0-d tensor among them; x and y have to be vectors."""
    n, m = case.y0.numel(), case.x0.numel()

    def pack(v: Tensor, size: int, names: tuple[str, str]) -> dict[str, Any]:
        if size == 1:
            return {names[0]: v.reshape(())}
        return {names[0]: v[0].reshape(()), names[1]: [v[1:].reshape(-1, 1)]}

    def join(tree: dict[str, Any], names: tuple[str, str]) -> Tensor:
        parts = [tree[names[0]].reshape(1)]
        if names[1] in tree:
            parts.append(tree[names[1]][0].reshape(-1))
        return torch.cat(parts)

    p, upper_names, lower_names = case.problem, ("b", "a"), ("w", "z")

    def both(function: Any) -> Any:
        return None if function is None else lambda x, y: function(join(x, upper_names), join(y, lower_names))

    assert p.upper_set is p.lower_set is p.lower_prox is None
    return replace(
        case,
        name=case.name + " in dicts",
        problem=bilevel.Problem(both(p.upper), both(p.lower), inequality=both(p.inequality), equality=both(p.equality)),
        x0=pack(case.x0, m, upper_names),
        y0=pack(case.y0, n, lower_names),
        x_star=None if case.x_star is None else pack(case.x_star, m, upper_names),
        y_star=None if case.y_star is None else pack(case.y_star, n, lower_names),
        lower_solution=lambda x: pack(case.lower_solution(join(x, upper_names)), n, lower_names),
        hypergradient=None,
    )


def check_in_dicts(method: bilevel.Method, case: Answered, xtol: float) -> bilevel.BilevelResult:
    """The same answer, in the same structure, when the variables are dicts with a 0-d tensor and a column."""
    whole = in_dicts(case)
    res = bilevel.solve(whole.problem, whole.x0, whole.y0, method)
    check_answer(res, whole, xtol)
    assert Ravel.of(res.x, "x").treespec == Ravel.of(whole.x0, "x").treespec
    assert Ravel.of(res.y, "y").shapes == Ravel.of(whole.y0, "y").shapes
    return res


def check_float32(method: bilevel.Method, case: Answered, xtol: float = 1e-3) -> bilevel.BilevelResult:
    """A float32 problem stays float32, converges to its own tolerance, and is right to that many digits."""
    assert vector(case.x0).dtype == torch.float32
    res = bilevel.solve(case.problem, case.x0, case.y0, method)
    assert vector(res.x).dtype == vector(res.y).dtype == torch.float32
    check_answer(res, case, xtol)
    return res


def check_bad_data(method: bilevel.Method) -> None:
    """A NaN in the lower level is NON_FINITE (or DIVERGED), never a number, and never CONVERGED."""
    a = torch.tensor([1.0, torch.nan], dtype=torch.float64)
    problem = bilevel.Problem(lambda x, y: ((y - 1) ** 2).sum() + (x**2).sum(), lambda x, y: ((y - a * x) ** 2).sum())
    start = torch.ones(2, dtype=torch.float64)
    res = bilevel.solve(problem, start, start.clone(), method)
    assert res.status in (Status.NON_FINITE, Status.DIVERGED), res.status


def check_not_unique(method: bilevel.Method, case: Answered) -> None:
    """A method that needs a unique lower solution says SINGULAR (or NEGATIVE_CURVATURE), and what to do instead."""
    res = bilevel.solve(case.problem, case.x0, case.y0, method)
    assert res.status in (Status.SINGULAR, Status.NEGATIVE_CURVATURE), (case.name, res.status)
    with pytest.raises(linalg.SolverError, match="MEHA"):
        res.unwrap()
