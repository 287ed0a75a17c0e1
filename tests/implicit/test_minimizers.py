from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import sklearn.datasets
import torch
from laws_optim import Case, check_minimizer, check_structure, gradient_norm, vector
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from nestopt.implicit import FOSI, LBFGS, GradientDescent, LazyNewton, Minimizer, NewtonCG, RegularizedNewton
from nestopt.linalg import Diagonal, Status

DOUBLE = torch.float64


@cache
def quadratic(condition: float, n: int = 30) -> Case:
    g = torch.Generator().manual_seed(n)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=DOUBLE))
    A = (Q * torch.logspace(0, math.log10(condition), n, dtype=DOUBLE)) @ Q.T
    b = torch.randn(n, generator=g, dtype=DOUBLE)

    def objective(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        A_, b_ = A.to(dtype), b.to(dtype)
        return lambda y: y @ A_ @ y / 2 - b_ @ y

    return Case(
        f"quadratic({condition:g})",
        objective,
        lambda dtype: torch.zeros(n, dtype=dtype),
        torch.linalg.solve(A, b),
        1e-9,
    )


def logistic_objective(dtype: torch.dtype, penalty: float = 1e-3) -> Callable[[Tensor], Tensor]:
    X, t = sklearn.datasets.load_breast_cancer(return_X_y=True)
    X, t = torch.tensor((X - X.mean(0)) / X.std(0), dtype=dtype), torch.tensor(2.0 * t - 1, dtype=dtype)
    return lambda w: softplus(-t * (X @ w)).mean() + penalty / 2 * (w**2).sum()


@cache
def logistic() -> Case:
    # the reference: full Newton steps with the dense Hessian
    f, w = logistic_objective(DOUBLE), torch.zeros(30, dtype=DOUBLE)
    for _ in range(12):
        hessian, gradient = torch.autograd.functional.hessian(f, w), torch.autograd.functional.jacobian(f, w)
        w = w - torch.linalg.solve(hessian, gradient)
    return Case("logistic", logistic_objective, lambda dtype: torch.zeros(30, dtype=dtype), w, 1e-7)


@cache
def softmax() -> Case:
    X, t = sklearn.datasets.load_digits(return_X_y=True)
    X, t = torch.tensor(X[:200] / 16, dtype=DOUBLE), torch.tensor(t[:200])

    def objective(dtype: torch.dtype) -> Callable[[dict[str, Tensor]], Tensor]:
        X_ = X.to(dtype)
        return lambda y: cross_entropy(X_ @ y["W"] + y["b"], t) + 5e-3 * ((y["W"] ** 2).sum() + (y["b"] ** 2).sum())

    def start(dtype: torch.dtype) -> dict[str, Tensor]:
        return {"W": torch.zeros(64, 10, dtype=dtype), "b": torch.zeros(10, dtype=dtype)}

    return Case("softmax", objective, start, None, 1e-7)


def rosenbrock(n: int) -> Case:
    # for n >= 4 there is a second minimiser near (-1, 1, ..., 1), to which no run from zero goes
    return Case(
        f"rosenbrock({n})",
        lambda dtype: lambda y: (100 * (y[1:] - y[:-1] ** 2) ** 2 + (1 - y[:-1]) ** 2).sum(),
        lambda dtype: torch.tensor([-1.2, 1.0], dtype=dtype) if n == 2 else torch.zeros(n, dtype=dtype),
        torch.ones(n, dtype=DOUBLE),
        1e-5,
    )


@cache
def least_squares() -> Case:
    g = torch.Generator().manual_seed(0)
    X, t = torch.randn(40, 7, generator=g, dtype=DOUBLE), torch.randn(40, generator=g, dtype=DOUBLE)
    full = torch.linalg.lstsq(torch.cat([torch.ones(40, 1, dtype=DOUBLE), X], 1), t[:, None]).solution[:, 0]

    def objective(dtype: torch.dtype) -> Callable[[dict[str, Any]], Tensor]:
        X_, t_ = X.to(dtype), t.to(dtype)
        return lambda y: ((X_ @ torch.cat([y["w"][0].reshape(6), y["w"][1][0]]) + y["bias"] - t_) ** 2).mean()

    def start(dtype: torch.dtype) -> dict[str, Any]:
        zeros = (torch.zeros(2, 1, 3, dtype=dtype), torch.zeros(1, 1, dtype=dtype))
        return {"w": zeros, "bias": torch.tensor(0.5, dtype=dtype)}

    solution = {"w": (full[1:7].reshape(2, 1, 3), full[7:].reshape(1, 1)), "bias": full[0]}
    return Case("least squares in a dict", objective, start, solution, 1e-8)


MINIMIZERS: dict[str, Minimizer] = {
    "newton": NewtonCG(),
    "lbfgs": LBFGS(),
    "spectral": GradientDescent(max_iter=4000),
    "regularized": RegularizedNewton(),
    "regularized, CG": RegularizedNewton(dense_below=0),
    "lazy": LazyNewton(),
    "fosi": FOSI(rank=3, max_iter=4000),
}
CASES = {
    "quadratic(1)": lambda: quadratic(1.0),
    "quadratic(100)": lambda: quadratic(1e2),
    "quadratic(1e4)": lambda: quadratic(1e4, 5),
    "logistic": logistic,
    "rosenbrock(2)": lambda: rosenbrock(2),
    "rosenbrock(10)": lambda: rosenbrock(10),
    "least squares": least_squares,
}
each = pytest.mark.parametrize("minimizer", MINIMIZERS.values(), ids=MINIMIZERS.keys())


# of hundreds of short steps, each a diagonalisation or a run of CG, one example is enough
SLOW = {"regularized": {"rosenbrock(10)"}, "regularized, CG": {"rosenbrock(2)", "rosenbrock(10)"}}
SLOW |= {"lazy": {"rosenbrock(10)"}, "fosi": {"rosenbrock(10)"}}


def pairs(cases: Iterable[str]) -> list[Any]:
    """Every minimiser with every case that is not slow for it."""
    return [
        pytest.param(minimizer, case, id=f"{name}-{case}")
        for name, minimizer in MINIMIZERS.items()
        for case in cases
        if case not in SLOW.get(name, set())
    ]


@pytest.mark.parametrize(("minimizer", "case"), pairs(CASES))
def test_laws(minimizer: Minimizer, case: str) -> None:
    check_minimizer(minimizer, CASES[case](), DOUBLE)


@pytest.mark.parametrize(("minimizer", "case"), pairs(["quadratic(100)", "logistic", "rosenbrock(2)", "least squares"]))
def test_laws_in_float32(minimizer: Minimizer, case: str) -> None:
    check_minimizer(minimizer, CASES[case](), torch.float32)


@pytest.mark.parametrize("case", [quadratic(10.0), least_squares()], ids=lambda case: case.name)
@pytest.mark.parametrize("step_size", [0.15])
def test_laws_of_a_constant_step(case: Case, step_size: float) -> None:
    check_minimizer(GradientDescent(step_size, max_iter=3000), case, DOUBLE)


@each
def test_structure_changes_nothing(minimizer: Minimizer) -> None:
    case = quadratic(10.0)
    check_structure(minimizer, case.objective(DOUBLE), case.start(DOUBLE))


@each
def test_units_of_the_objective_and_of_the_variable_change_nothing(minimizer: Minimizer) -> None:
    f, y0 = logistic_objective(DOUBLE), torch.zeros(30, dtype=DOUBLE)
    plain = minimizer(f, y0)
    for factor in (2.0**-40, 2.0**40):
        scaled = minimizer(lambda y: factor * f(y), y0)  # noqa: B023
        assert scaled.status == Status.CONVERGED
        assert abs(scaled.iterations - plain.iterations) <= 0.2 * plain.iterations
        assert scaled.error <= 1e-10 * factor * gradient_norm(f, y0)
    stretched = minimizer(lambda y: f(1e-6 * y), y0)
    assert stretched.status == Status.CONVERGED
    assert torch.allclose(1e-6 * stretched.x, plain.x, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("minimizer", "case"),
    [(NewtonCG(), logistic), (NewtonCG(), softmax), (LBFGS(), softmax), (GradientDescent(max_iter=4000), logistic)],
)
def test_an_unreachable_tolerance_ends_at_the_rounding_level(minimizer: Minimizer, case: Callable[[], Case]) -> None:
    f, y0 = case().objective(DOUBLE), case().start(DOUBLE)
    res = replace(minimizer, rtol=0.0)(f, y0)
    assert res.status == Status.STAGNATED
    assert res.error <= 1e-14 * gradient_norm(f, y0)
    assert abs(gradient_norm(f, res.x) - res.error) <= 1e-6 * res.error
    # and a warm start there is told so at once
    again = minimizer(f, res.x)
    assert again.status in (Status.STAGNATED, Status.CONVERGED)
    assert again.evaluations <= 3 * minimizer.patience + 50
    assert again.error <= res.error


def test_newton_converges_superlinearly() -> None:
    errors: list[float] = []
    NewtonCG(rtol=1e-14)(
        softmax().objective(DOUBLE), softmax().start(DOUBLE), callbacks=[lambda k, s: errors.append(float(s.error))]
    )
    relative = [error / errors[0] for error in errors]
    small = [(a, b) for a, b in pairwise(relative) if 1e-10 < a < 1e-2]
    assert len(small) >= 2
    assert all(b <= 2 * a**1.8 for a, b in small)


@pytest.mark.parametrize(
    ("minimizer", "case", "iterations"),
    [
        (NewtonCG(), rosenbrock(2), 25),
        (LBFGS(), rosenbrock(2), 36),
        (GradientDescent(), rosenbrock(2), 113),
    ],
)
def test_pinned_iterations(minimizer: Minimizer, case: Case, iterations: int) -> None:
    assert minimizer(case.objective(DOUBLE), case.start(DOUBLE)).iterations == iterations


def test_k_constant_steps_are_the_k_steps_of_the_formula() -> None:
    curvature = torch.tensor([1.0, 3.0, 0.1], dtype=DOUBLE)
    res = GradientDescent(0.25, max_iter=10, rtol=0.0)(
        lambda y: (curvature * y**2).sum() / 2, torch.ones(3, dtype=DOUBLE)
    )
    assert (res.status, res.iterations, res.gradients, res.evaluations) == (Status.MAX_ITER, 10, 11, 11)
    assert torch.allclose(res.x, (1 - 0.25 * curvature) ** 10, rtol=1e-14, atol=0)


@pytest.mark.parametrize("power", [2, 4])
def test_a_step_that_is_too_long_is_named(power: int) -> None:
    res = GradientDescent(step_size=3.0)(lambda y: (y**power).sum() / power, torch.full((2,), 1.5, dtype=DOUBLE))
    assert res.status == Status.DIVERGED
    assert "step size" in res.status.value
    assert bool(torch.isfinite(res.x).all())
    assert math.isfinite(res.error)
    assert math.isfinite(res.value)


UNBOUNDED: list[Callable[[Tensor], Tensor]] = [
    lambda y: y.sum(),
    lambda y: -(y**2).sum(),
    lambda y: -y.exp().sum(),
    lambda y: (y**3).sum() - y.sum(),
]


@each
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("f", UNBOUNDED)
def test_unbounded_below_is_divergence(minimizer: Minimizer, dtype: torch.dtype, f: Callable[[Tensor], Tensor]) -> None:
    # exp overflows only after hundreds of steps of size 2 or less: start on the way
    start = 0.4 * math.log(torch.finfo(dtype).max) if f is UNBOUNDED[2] else -2.0
    res = minimizer(f, torch.full((3,), start, dtype=dtype))
    assert res.status == Status.DIVERGED
    assert bool(torch.isfinite(res.x).all())


@each
def test_nan_is_named(minimizer: Minimizer) -> None:
    res = minimizer(lambda y: y.log().sum(), torch.tensor([-1.0], dtype=DOUBLE))
    assert (res.status, res.iterations) == (Status.NON_FINITE, 0)
    assert math.isnan(res.value)
    # a value that is fine, with a gradient that is not: the last finite point is kept
    res = minimizer(lambda y: torch.where(y < 0.5, y * torch.nan, y**2).sum(), torch.ones(1, dtype=DOUBLE))
    assert res.status != Status.CONVERGED
    assert bool(torch.isfinite(res.x).all())


@each
def test_the_domain_of_a_barrier_is_kept(minimizer: Minimizer) -> None:
    res = minimizer(lambda y: (y - y.log()).sum(), torch.tensor([50.0, 1e-4], dtype=DOUBLE))
    assert res.status == Status.CONVERGED
    assert torch.allclose(res.x, torch.ones(2, dtype=DOUBLE), atol=1e-6)


@each
def test_indefinite_starts_converge(minimizer: Minimizer) -> None:
    # a double well beside its saddle, the flat tail of a bell, the top of a sine
    well = minimizer(lambda y: (y[0] ** 2 - 1) ** 2 + y[1] ** 2, torch.tensor([1e-3, 0.5], dtype=DOUBLE))
    assert well.status == Status.CONVERGED
    assert torch.allclose(well.x.abs(), torch.tensor([1.0, 0.0], dtype=DOUBLE), atol=1e-9)
    bell = minimizer(lambda y: -torch.exp(-(y**2).sum() / 2), torch.tensor([5.0, 1.0], dtype=DOUBLE))
    assert bell.status == Status.CONVERGED
    assert abs(bell.value + 1) <= 1e-12
    sine = minimizer(lambda y: y.sin().sum(), torch.full((2,), math.pi / 2 + 1e-3, dtype=DOUBLE), 1e-9)
    assert sine.status == Status.CONVERGED
    assert abs(sine.value + 2) <= 1e-12


@each
def test_a_saddle_is_stationary(minimizer: Minimizer) -> None:
    res = minimizer(lambda y: y[0] ** 2 - y[1] ** 2, torch.zeros(2, dtype=DOUBLE))
    assert (res.status, res.iterations, res.error) == (Status.CONVERGED, 0, 0.0)


@each
def test_a_gradient_that_is_not_the_objectives_is_a_failing_line_search(minimizer: Minimizer) -> None:
    res = minimizer(lambda y: ((3 * y.detach() - y) ** 2).sum() / 2, torch.ones(2, dtype=DOUBLE))
    assert res.status == Status.LINE_SEARCH_FAILED


@each
def test_scalars_modules_and_unused_variables(minimizer: Minimizer) -> None:
    assert float(minimizer(lambda y: (y - 3) ** 2, torch.tensor(0.0, dtype=DOUBLE)).x) == pytest.approx(3.0, abs=1e-9)
    res = minimizer(lambda y: (y["a"] ** 2).sum(), {"a": torch.ones(2, dtype=DOUBLE), "b": torch.ones(3, dtype=DOUBLE)})
    assert res.status == Status.CONVERGED
    assert torch.equal(res.x["b"], torch.ones(3, dtype=DOUBLE))
    module = torch.nn.Linear(3, 1).double()
    X, t = torch.randn(20, 3, dtype=DOUBLE), torch.randn(20, 1, dtype=DOUBLE)
    res = minimizer(lambda p: ((torch.func.functional_call(module, p, X) - t) ** 2).mean(), module)
    assert res.status == Status.CONVERGED
    assert sorted(res.x) == ["bias", "weight"]


@each
def test_it_works_in_no_grad_with_a_captured_upper_variable(minimizer: Minimizer) -> None:
    x = torch.tensor(2.0, dtype=DOUBLE, requires_grad=True)
    with torch.no_grad():
        res = minimizer(lambda y: ((y - x) ** 2).sum(), torch.zeros(2, dtype=DOUBLE))
    assert torch.allclose(res.x, torch.full((2,), 2.0, dtype=DOUBLE))
    assert x.grad is None
    assert not res.x.requires_grad


@each
def test_a_callback_can_stop_it(minimizer: Minimizer) -> None:
    case = logistic()
    res = minimizer(case.objective(DOUBLE), case.start(DOUBLE), callbacks=[lambda k, state: k == 2])
    assert (res.status, res.iterations) == (Status.STOPPED, 2)


@each
def test_states_are_not_modified(minimizer: Minimizer) -> None:
    case = logistic()
    f = case.objective(DOUBLE)
    state = minimizer.init(f, case.start(DOUBLE))
    for _ in range(4):
        previous, state = state, minimizer.step(f, state)
    assert torch.equal(minimizer.step(f, previous).point.y, state.point.y)


@each
def test_a_state_warms_up_a_changed_objective(minimizer: Minimizer) -> None:
    case = logistic()
    cold = minimizer(case.objective(DOUBLE), case.start(DOUBLE))
    f = logistic_objective(DOUBLE, 1.1e-3)
    reference = minimizer(f, case.start(DOUBLE), cold.tolerance)
    warm = minimizer(f, cold.state, cold.tolerance)
    assert warm.status == Status.CONVERGED
    assert warm.gradients + warm.products < reference.gradients + reference.products
    assert torch.allclose(warm.x, reference.x, atol=1e-6)


def test_a_preconditioner_saves_products() -> None:
    scale = torch.logspace(0, 4, 60, dtype=DOUBLE)

    def f(y: Tensor) -> Tensor:
        return (scale * (y - 1) ** 2).sum() + (y - 1).cosh().sum()

    plain = NewtonCG()(f, torch.zeros(60, dtype=DOUBLE))
    helped = NewtonCG(preconditioner=Diagonal(1 / (2 * scale + 1)))(f, torch.zeros(60, dtype=DOUBLE))
    assert plain.converged
    assert helped.converged
    assert helped.products < 0.25 * plain.products
    assert torch.allclose(helped.x, torch.ones(60, dtype=DOUBLE), atol=1e-8)


def test_truncated_inner_solves_still_converge() -> None:
    case = logistic()
    res = NewtonCG(cg_max_iter=3, max_iter=500)(case.objective(DOUBLE), case.start(DOUBLE))
    assert res.converged
    assert torch.allclose(res.x, case.solution, atol=1e-6)


def test_a_result_holds_no_graph() -> None:
    res = NewtonCG()(lambda y: (y**4).sum(), torch.ones(2, dtype=DOUBLE))
    assert res.state.hessian is None
    assert not vector(res.x).requires_grad


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f, y: NewtonCG(rtol=-1.0), ValueError, "rtol"),
        (lambda f, y: NewtonCG(cg_max_iter=0), ValueError, "cg_max_iter"),
        (lambda f, y: LBFGS(max_iter=-1), ValueError, "max_iter"),
        (lambda f, y: LBFGS(history_size=0), ValueError, "history_size"),
        (lambda f, y: GradientDescent(0.0), ValueError, "step_size"),
        (lambda f, y: GradientDescent(math.nan), ValueError, "step_size"),
        (lambda f, y: LBFGS()(f, y, -1.0), ValueError, "tolerance"),
        (lambda f, y: LBFGS()(3, y), TypeError, "objective"),
        (lambda f, y: LBFGS()(lambda y: y, y), ValueError, "scalar"),
        (lambda f, y: LBFGS()(lambda y: 1.0, y), TypeError, "floating scalar tensor"),
        (lambda f, y: LBFGS()(f, 1.0), TypeError, "y0"),
        (lambda f, y: LBFGS()(f, torch.ones(2, dtype=torch.int64)), TypeError, "y0"),
        (lambda f, y: LBFGS()(f, {}), ValueError, "y0"),
        (lambda f, y: LBFGS()(f, {"a": y, "b": y.float()}), ValueError, "dtype"),
        (lambda f, y: NewtonCG(preconditioner=Diagonal(torch.ones(5)))(f, y), ValueError, "preconditioner"),
    ],
)
def test_bad_input_is_named(call: Callable[[Any, Tensor], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(lambda y: (y**2).sum(), torch.ones(2, dtype=DOUBLE))
