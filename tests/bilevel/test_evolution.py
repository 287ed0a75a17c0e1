"""Evolution strategies: unbiased, of known variance, and without derivatives of the lower step."""

from dataclasses import replace

import pytest
import torch
from laws_bilevel import relative, vector
from problems import DOUBLE, adversarial, multimodal, quadratic, ridge, sine

from nestopt import bilevel, constrained, implicit
from nestopt.linalg import Status, Stopping

METHODS = [bilevel.PES(), bilevel.ESSingle()]
CASES = [
    quadratic(1, 1), quadratic(5, 3), quadratic(20, 6, 30), sine(2), adversarial(4), ridge(p=3),
    multimodal(1.2, 1.2152, 0.19991),
]  # fmt: skip
name = lambda m: m.name if hasattr(m, "name") else type(m).__name__  # noqa: E731


@pytest.mark.parametrize("case", CASES, ids=name)
def test_needs_no_tuning(case):
    for method in METHODS:  # they draw the same and are equal where an episode is one truncation
        res = bilevel.solve(case.problem, case.x0, case.y0, method)
        assert res.status == Status.CONVERGED, (res.status, res.residuals, res.tolerance)
        assert res.error == max(res.residuals.values()) <= res.tolerance
        if case.x_star is not None:
            size = max(float(vector(case.x_star).norm()), float((vector(case.x0) - vector(case.x_star)).norm()))
            assert float((vector(res.x) - vector(case.x_star)).norm()) <= 1e-3 * size
        else:
            slope, first = (float(vector(case.hypergradient(x)).norm()) for x in (res.x, case.x0))
            assert slope <= 1e-3 * first


def mean_loss_slope(case, lr, steps, truncations):
    """The slope of the mean of F at the truncations' ends, by one long graph."""
    x = case.x0.clone().requires_grad_()
    y, total = case.y0, 0.0
    for _ in range(truncations):
        for _ in range(steps):
            y = y if y.requires_grad else y.clone().requires_grad_()
            y = y - lr * torch.autograd.grad(case.problem.lower(x, y), y, create_graph=True)[0]
        total = total + case.problem.upper(x, y) / truncations
    return torch.autograd.grad(total, x)[0]


@pytest.mark.parametrize("cls", [bilevel.PES, bilevel.ESSingle])
@pytest.mark.parametrize("orthogonal", [False, True])
def test_unbiased_on_quadratics(cls, orthogonal):
    """4000 pairs: each coordinate of the mean within 4 standard errors, which chance breaks once in 5000 such tests."""
    case = quadratic(4, 3)
    method = cls(
        steps=3, truncations=4, particles=4000, sigma=0.3, optimizer=implicit.SGD(0.05), orthogonal=orthogonal,
        upper_step=bilevel.ConstantStep(1e-3), seed=7,
    )  # fmt: skip
    terms = method.episode(case.problem, case.x0, case.y0)
    truth = mean_loss_slope(case, 0.05, 3, 4)
    error = terms.std(0) / len(terms) ** 0.5
    assert bool(((terms.mean(0) - truth).abs() <= 4 * error).all()), (terms.mean(0), truth, error)
    assert float(error.norm()) < 0.1 * float(truth.norm())  # the test can tell a wrong estimate


@pytest.mark.slow
def test_the_variance_of_es_single_does_not_grow_with_the_truncations():
    case, variances = quadratic(4, 3), {}
    for cls in (bilevel.PES, bilevel.ESSingle):
        for truncations in (1, 4, 16):
            method = cls(
                steps=48 // truncations, truncations=truncations, particles=2000, sigma=0.1, orthogonal=False,
                optimizer=implicit.SGD(0.05), upper_step=bilevel.ConstantStep(1e-3),
            )  # fmt: skip
            terms = method.episode(case.problem, case.x0, case.y0)
            variances[cls.__name__, truncations] = float(terms.var(0).sum())
    assert variances["ESSingle", 16] < 1.5 * variances["ESSingle", 1]
    assert variances["ESSingle", 16] > variances["ESSingle", 1] / 1.5
    assert variances["PES", 1] == variances["ESSingle", 1]


def rounded(x, y, t):
    """A lower step without a derivative: halfway to the solution, to six digits."""
    return ((y + x) / 2 * 1e6).round() / 1e6


@pytest.mark.parametrize("cls", [bilevel.PES, bilevel.ESSingle])
def test_a_lower_step_without_a_derivative(cls):
    problem = bilevel.Problem(lambda x, y: ((y - 1) ** 2).sum() + 0.5 * (x**2).sum(), lambda x, y: ((y - x) ** 2).sum())
    start = torch.zeros(3, dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE)
    method = cls(steps=40, lower_step=rounded, sigma=0.05, stopping=Stopping(rtol=1e-3, max_iter=50))
    res = bilevel.solve(problem, *start, method)
    assert res.converged, (res.status, res.residuals, res.tolerance)
    assert relative(res.x, torch.full((3,), 2 / 3, dtype=DOUBLE)) < 1e-3


@pytest.mark.parametrize("cls", [bilevel.PES, bilevel.ESSingle])
def test_truncations_train_while_x_moves(cls):
    case = quadratic(5, 3)
    method = cls(
        steps=10, truncations=5, sigma=0.01, particles=30, upper_step=bilevel.ConstantStep(0.15),
        stopping=Stopping(rtol=0.0, max_iter=30),
    )  # fmt: skip
    res = bilevel.solve(case.problem, case.x0, case.y0, method)
    assert res.status == Status.MAX_ITER
    assert relative(res.x, case.x_star) < 0.5 * relative(
        case.x0, case.x_star
    )  # its loss is the mean over short episodes
    assert res.residuals["sampling"] > 0


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_resume_is_exact(method, tmp_path):
    case = quadratic(5, 3)
    truncated = replace(method, steps=6, truncations=3, upper_step=bilevel.ConstantStep(0.01))
    for part in (method, truncated):
        part = replace(part, stopping=Stopping(rtol=1e-9, max_iter=5))
        whole = bilevel.solve(case.problem, case.x0, case.y0, part)
        path = tmp_path / f"run{part.truncations}"

        def kill(k, state):
            if k == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            bilevel.solve(case.problem, case.x0, case.y0, part, callbacks=[bilevel.Checkpoint(path, every=1), kill])
        rest = bilevel.solve(case.problem, case.x0, case.y0, part, callbacks=[bilevel.Checkpoint(path, every=1)])
        assert torch.equal(rest.x, whole.x)
        assert rest.counts == whole.counts


def test_one_by_one_is_the_same_as_all_at_once():
    case = quadratic(3, 2)
    states = [bilevel.PES(batched=batched).init(case.problem, case.x0, case.y0) for batched in (True, False)]
    assert relative(states[0].hypergradient, states[1].hypergradient) < 1e-6
    problem = bilevel.Problem(case.problem.upper, lambda x, y: case.problem.lower(x, y) * float(y.sum() < 1e9))
    with pytest.raises(ValueError, match="batched=False"):
        bilevel.PES().init(problem, case.x0, case.y0)
    assert bilevel.PES(batched=False).init(problem, case.x0, case.y0).status == Status.RUNNING


def test_float32():
    case = quadratic(5, 3, dtype=torch.float32)
    res = bilevel.solve(case.problem, case.x0, case.y0, bilevel.ESSingle())
    assert res.converged, (res.status, res.residuals, res.tolerance)
    assert relative(res.x, case.x_star) < 3e-3


def test_refusals_and_faults():
    case, one = quadratic(5, 3), torch.ones(3, dtype=DOUBLE)
    for bad in (
        lambda: bilevel.PES(truncations=3),
        lambda: bilevel.PES(steps=5, truncations=3),
        lambda: bilevel.PES(lower_step=rounded),
        lambda: bilevel.PES(steps=5, lower_step=rounded, optimizer=implicit.SGD(0.1)),
        lambda: bilevel.ESSingle(sigma=0.0),
        lambda: bilevel.ESSingle(particles=0),
    ):
        with pytest.raises(ValueError, match=r"PES|ESSingle"):
            bad()
    lower = lambda x, y: ((y - x) ** 2).sum()  # noqa: E731
    upper = lambda x, y: ((y - 1) ** 2).sum()  # noqa: E731
    with pytest.raises(ValueError, match="lower_set"):
        problem = bilevel.Problem(upper, lower, lower_set=constrained.Box(0.0, 1.0))
        bilevel.solve(problem, one, one.clone(), bilevel.PES())
    with pytest.raises(ValueError, match="forgotten"):
        tree = {"used": one, "forgotten": one.clone()}
        bilevel.solve(bilevel.Problem(upper, lambda x, y: lower(x["used"], y)), tree, one.clone(), bilevel.PES())
    nan = bilevel.Problem(upper, lambda x, y: lower(x, y) * torch.nan)
    assert bilevel.solve(nan, one, 0 * one, bilevel.PES()).status == Status.NON_FINITE
    runs_away = bilevel.Problem(case.problem.upper, case.problem.lower)
    method = bilevel.PES(steps=300, optimizer=implicit.SGD(1.0))
    res = bilevel.solve(runs_away, case.x0, case.y0, method)
    assert res.status == Status.DIVERGED
    assert 0 <= int(res.state.diverged_at) < 300
    assert bool(torch.isfinite(res.y).all())
    assert [row["unique"] for row in bilevel.methods() if row["method"] in ("PES", "ESSingle")] == [True, True]
