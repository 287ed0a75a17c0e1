from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from laws_optim import Case, check_minimizer, gradient_norm, vector
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from nestopt.implicit import LevenbergMarquardt, NewtonCG, mark_outputs
from nestopt.implicit.gauss_newton import _Dual, _Primal
from nestopt.implicit.minimizer import Objective
from nestopt.implicit.outputs import differentiate_halves, evaluate_halves
from nestopt.linalg import Status
from nestopt.linalg.tree import Ravel

DOUBLE = torch.float64
LM = LevenbergMarquardt()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


@cache
def ridge(b: int, n: int, penalty: float) -> Case:
    """Least squares with an l2 penalty that is not marked, in a dict: the answer in closed form."""
    A, t = randn(b, n), randn(b, seed=1)
    solution = torch.linalg.solve(A.T @ A + penalty * torch.eye(n, dtype=DOUBLE), A.T @ t)

    def objective(dtype: torch.dtype) -> Callable[[dict[str, Tensor]], Tensor]:
        A_, t_ = A.to(dtype), t.to(dtype)

        def f(y: dict[str, Tensor]) -> Tensor:
            flat = torch.cat([y["a"].flatten(), y["b"]])
            return (mark_outputs(A_ @ flat - t_) ** 2).sum() / 2 + penalty / 2 * (flat**2).sum()

        return f

    def tree(v: Tensor) -> dict[str, Tensor]:
        return {"a": v[:6].reshape(2, 3), "b": v[6:]}

    return Case(
        f"ridge({b}, {n}, {penalty:g})", objective, lambda dtype: tree(torch.zeros(n, dtype=dtype)),
        tree(solution), 1e-8,
    )  # fmt: skip


@cache
def classes() -> Case:
    """Softmax regression with fewer outputs than weights, two marks, a weighted penalty; Newton's answer."""
    X, t = randn(8, 12), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])

    def objective(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        X_, weight = X.to(dtype), torch.linspace(0.01, 0.1, 12, dtype=dtype)[:, None]

        def f(W: Tensor) -> Tensor:
            first, last = mark_outputs(X_[:5] @ W), mark_outputs(X_[5:] @ W)
            return cross_entropy(torch.cat([first, last]), t) + (weight * W**2).sum()

        return f

    start = torch.zeros(12, 3, dtype=DOUBLE)
    answer = NewtonCG(rtol=1e-13)(objective(DOUBLE), start).x
    return Case("softmax", objective, lambda dtype: start.to(dtype, copy=True), answer, 1e-8)


@cache
def logistic() -> Case:
    """More outputs than variables: the primal system."""
    X, t = randn(60, 5), torch.sign(randn(60, seed=2))

    def objective(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        X_, t_ = X.to(dtype), t.to(dtype)
        return lambda w: softplus(-t_ * mark_outputs(X_ @ w)).mean() + 1e-2 * (w**2).sum()

    answer = NewtonCG(rtol=1e-13)(objective(DOUBLE), torch.zeros(5, dtype=DOUBLE)).x
    return Case("logistic", objective, lambda dtype: torch.zeros(5, dtype=dtype), answer, 1e-8)


def rosenbrock(n: int) -> Case:
    return Case(
        f"rosenbrock({n})",
        lambda dtype: lambda y: (mark_outputs(torch.cat([10 * (y[1:] - y[:-1] ** 2), 1 - y[:-1]])) ** 2).sum(),
        lambda dtype: torch.tensor([-1.2, 1.0], dtype=dtype) if n == 2 else torch.zeros(n, dtype=dtype),
        torch.ones(n, dtype=DOUBLE),
        1e-5,
    )


def network(penalty: float = 0.0) -> tuple[Callable[[dict[str, Tensor]], Tensor], dict[str, Tensor]]:
    """Twelve points, 43 weights: the data can be fitted."""
    X = randn(12, 5)
    t = X.sum(1).sin()

    def f(y: dict[str, Tensor]) -> Tensor:
        residual = torch.tanh(X @ y["a"] + y["c"]) @ y["b"] - t
        return (mark_outputs(residual) ** 2).mean() + penalty * sum((p**2).sum() for p in y.values())

    return f, {"a": randn(5, 6, seed=3) / 2, "b": randn(6, seed=4) / 2, "c": torch.zeros(6, dtype=DOUBLE)}


CASES: dict[str, Callable[[], Case]] = {
    "dual": lambda: ridge(5, 9, 0.3), "primal": lambda: ridge(12, 9, 0.3), "square": lambda: ridge(9, 9, 0.3),
    "primal, no penalty": lambda: ridge(12, 9, 0.0), "classes": classes, "logistic": logistic,
    "rosenbrock(2)": lambda: rosenbrock(2), "rosenbrock(10)": lambda: rosenbrock(10),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_laws(case: str) -> None:
    check_minimizer(LM, CASES[case](), DOUBLE)


@pytest.mark.parametrize("case", ["dual", "primal", "classes", "rosenbrock(2)"])
def test_laws_in_float32(case: str) -> None:
    check_minimizer(LM, CASES[case](), torch.float32)


@pytest.mark.parametrize("damping", [1e-13, 1e-6, 1.0, 1e8])
@pytest.mark.parametrize("penalty", [0.0, 0.05])
def test_the_dual_step_is_the_dense_one_for_any_damping(damping: float, penalty: float) -> None:
    f, y0 = network(penalty)
    objective = Objective(f, Ravel.of(y0, "y"))
    y = objective.ravel.flatten(y0)
    point, halves = differentiate_halves(objective, *evaluate_halves(objective, y, "test"))
    b, n = halves.jacobian.shape
    assert (b, n) == (12, 42)
    J = halves.jacobian.to_dense()
    matrix = 2 / 12 * J.T @ J + 2 * penalty * torch.eye(n, dtype=DOUBLE)
    dual, primal = _Dual(objective, halves), _Primal(objective, halves)
    assert objective.products == b + 2 + 2 * n
    d = dual.solve(point.gradient, damping)
    assert d is not None
    if penalty:  # without one, the dense system of 1e-13 is singular to working precision
        truth = -torch.linalg.solve(matrix + damping * torch.eye(n, dtype=DOUBLE), point.gradient)
    else:
        h = halves.loss_gradient
        truth = -J.T @ torch.linalg.solve(2 / 12 * J @ J.T + damping * torch.eye(b, dtype=DOUBLE), h)
    assert float((d - truth).norm()) <= 1e-9 * float(truth.norm())
    assert abs(dual.bend(d) - float(d @ matrix @ d)) <= 1e-10 * abs(dual.bend(d))
    if penalty:
        again = primal.solve(point.gradient, damping)
        assert again is not None
        assert float((again - truth).norm()) <= 1e-9 * float(truth.norm())


def test_a_linear_problem_takes_what_the_damping_leaves() -> None:
    res = LM(ridge(5, 9, 0.3).objective(DOUBLE), ridge(5, 9, 0.3).start(DOUBLE))
    assert res.iterations <= 5
    assert res.products == (5 + 2) * res.iterations
    assert res.gradients == res.evaluations == res.iterations + 1


def test_convergence_is_quadratic_where_the_data_can_be_fitted() -> None:
    f, y0 = network()
    errors: list[float] = []
    res = LM(f, y0, callbacks=[lambda k, s: errors.append(float(s.error))])
    assert res.converged
    assert res.value <= 1e-18
    small = [(a / errors[0], b / errors[0]) for a, b in pairwise(errors) if 1e-7 < a / errors[0] < 1e-1]
    assert len(small) >= 2
    assert all(b <= 20 * a**1.8 for a, b in small)


def test_blocks_of_products_give_the_same_steps() -> None:
    f, y0 = network()
    single, block = LM(f, y0), LevenbergMarquardt(chunk_size=5)(f, y0)
    assert single.converged
    assert single.iterations == block.iterations
    assert float((vector(single.x) - vector(block.x)).norm()) <= 1e-6 * float(vector(single.x).norm())


def test_pinned_iterations() -> None:
    case = rosenbrock(2)
    assert LM(case.objective(DOUBLE), case.start(DOUBLE)).iterations == 19


def test_marks_change_nothing_for_others() -> None:
    r = torch.ones(3, requires_grad=True)
    assert mark_outputs(r) is r
    case = classes()
    assert gradient_norm(case.objective(DOUBLE), case.solution) <= 1e-10


def test_a_state_warms_up_and_holds_no_graph() -> None:
    case = classes()
    f, y0 = case.objective(DOUBLE), case.start(DOUBLE)
    res = LM(f, y0)
    assert res.state.halves is None
    warm = LM(lambda W: f(W) + 1e-4 * (W**2).sum(), res.state, res.tolerance)
    assert warm.converged
    assert warm.iterations < res.iterations


def test_no_steps() -> None:
    f, y0 = network()
    res = replace(LM, max_iter=0)(f, y0)
    assert (res.status, res.iterations, res.evaluations, res.products) == (Status.MAX_ITER, 0, 1, 0)
    exact = LM(lambda y: (mark_outputs(y - 1) ** 2).sum(), torch.ones(3, dtype=DOUBLE))
    assert (exact.status, exact.iterations, exact.error) == (Status.CONVERGED, 0, 0.0)


@pytest.mark.parametrize("f", [lambda y: mark_outputs(y).sum(), lambda y: -mark_outputs(y.exp()).sum()])
def test_unbounded_below_is_divergence(f: Callable[[Tensor], Tensor]) -> None:
    res = LM(f, torch.full((3,), -2.0, dtype=DOUBLE))
    assert res.status == Status.DIVERGED
    assert "unbounded" in res.status.value
    assert bool(torch.isfinite(res.x).all())


def test_failures_are_named() -> None:
    res = LM(lambda y: mark_outputs(y.log()).sum(), torch.tensor([-1.0], dtype=DOUBLE))
    assert (res.status, res.iterations) == (Status.NON_FINITE, 0)
    assert math.isnan(res.value)
    res = LM(lambda y: (mark_outputs(3 * y.detach() - y) ** 2).sum() / 2, torch.ones(2, dtype=DOUBLE))
    assert res.status == Status.LINE_SEARCH_FAILED
    f, y0 = logistic().objective(DOUBLE), logistic().start(DOUBLE)
    res = replace(LM, rtol=0.0)(f, y0)
    assert res.status == Status.STAGNATED
    assert res.error <= 1e-13 * gradient_norm(f, y0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda y: LM(lambda y: (y**2).sum(), y), ValueError, "mark_outputs"),
        (lambda y: LM(lambda y: mark_outputs(mark_outputs(y) ** 2).sum(), y), ValueError, "marked outputs"),
        (lambda y: LM(lambda y: mark_outputs(y[0]) ** 2 + y.sum() ** 2, y), ValueError, "diagonal"),
        (lambda y: LM(lambda y: mark_outputs(y.sum().item()), y), TypeError, "mark_outputs"),
        (lambda y: LM(lambda y: (mark_outputs(y.float()) ** 2).sum().double(), y), ValueError, "dtype"),
        (lambda y: LevenbergMarquardt(chunk_size=0), ValueError, "chunk_size"),
        (lambda y: LevenbergMarquardt(rtol=-1.0), ValueError, "rtol"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call: Callable[[Tensor], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.ones(3, dtype=DOUBLE))
