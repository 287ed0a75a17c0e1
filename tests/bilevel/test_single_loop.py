"""The single-loop methods where nothing is random: every answered problem, and the published iterations."""

from dataclasses import replace

import pytest
import torch
from laws_bilevel import check_method, relative, vector
from problems import DOUBLE, NOT_UNIQUE, SMOOTH, merely_convex, quadratic, ridge, sine

from nestopt import bilevel, constrained, linalg
from nestopt.bilevel import Polynomial
from nestopt.bilevel.problem import Spaces
from nestopt.linalg import Status, Stopping

TOLERANCES = {"multimodal": 3e-4}  # the answers of these have five digits
HARD = (
    "1000",
    "n=200",
    "ridge",
    "logistic",
    "adversarial (n=30)",
)  # hundreds of steps: one method of the family shows them
ONE_STEP = [bilevel.SOBA(), bilevel.SABA(), bilevel.SRBA(), bilevel.MRBO(), bilevel.TTSA()]
FAMILY = [*ONE_STEP, bilevel.BSVRB(), bilevel.AmIGO(), bilevel.StocBiO(), bilevel.BAMM()]


def name(method):
    return type(method).__name__


def xtol(case):
    return next((value for word, value in TOLERANCES.items() if word in case.name), 1e-7)


def check(method, case, tolerance=None):
    """Known answer, measured error at the point returned, and init + step equal to the call."""
    res = bilevel.solve(case.problem, case.x0, case.y0, method)
    assert res.status == Status.CONVERGED, (case.name, res.status, res.residuals)
    assert res.error == max(res.residuals.values()) <= res.tolerance
    limit = xtol(case) if tolerance is None else tolerance
    if case.x_star is not None:
        size = max(float(vector(case.x_star).norm()), float((vector(case.x0) - vector(case.x_star)).norm()))
        assert float((vector(res.x) - vector(case.x_star)).norm()) <= limit * size
    if case.value is not None:
        assert abs(res.value - case.value) <= limit * max(1.0, abs(case.value))
    if not case.unique:
        return res
    hg = bilevel.hypergradient(case.problem, res.x, res.y, linalg.Cholesky(), certificate=False)
    assert abs(hg.lower_gradient_norm - res.residuals["lower"]) <= 1e-3 * res.tolerance
    step = case.problem.project(vector(res.x) - vector(hg.value), Spaces.of(res.x, res.y)) - vector(res.x)
    assert float(step.norm()) <= 1e3 * res.tolerance  # the adjoint's residual over the curvature
    return res


@pytest.mark.parametrize("case", [c for c in SMOOTH if not any(w in c.name for w in HARD)], ids=lambda c: c.name)
def test_soba_needs_no_tuning(case):
    check(bilevel.SOBA(), case)


LONG = ("1000", "one penalty a feature")
MARKED = [pytest.param(c, marks=[pytest.mark.slow] if any(w in c.name for w in LONG) else []) for c in SMOOTH]


@pytest.mark.parametrize("case", MARKED, ids=lambda c: c.name)
def test_amigo_needs_no_tuning(case):
    check(bilevel.AmIGO(), case)


@pytest.mark.parametrize("case", [c for c in SMOOTH if not any(w in c.name for w in HARD)], ids=lambda c: c.name)
def test_bamm_needs_no_tuning(case):
    check(bilevel.BAMM(), case)


@pytest.mark.parametrize("method", FAMILY, ids=name)
def test_whole_family_converges(method):
    check_method(method, sine(2), 1e-7)


@pytest.mark.parametrize("case", NOT_UNIQUE, ids=lambda c: c.name)
def test_bamm_needs_no_unique_lower_solution(case):
    res = check(bilevel.BAMM(), case)
    assert relative(res.y, case.y_star) < 1e-7


@pytest.mark.parametrize("method", [bilevel.SOBA(), bilevel.AmIGO()], ids=name)
def test_singular_lower_level_is_named(method):
    case = merely_convex(10)
    res = bilevel.solve(case.problem, case.x0, case.y0, method)
    assert res.status == Status.SINGULAR, res.status


PUBLISHED = [
    bilevel.SOBA(step_size=0.15, upper_step=0.05),
    bilevel.SOBA(step_size=0.19),
    bilevel.SOBA(upper_step=0.05),
    bilevel.SOBA(upper_step=Polynomial(power=0.1, first=0.1)),
    bilevel.MRBO(step_size=0.15, upper_step=0.05),
    bilevel.MRBO.published(step_size=0.19, upper_step=0.3),
    bilevel.TTSA(step_size=Polynomial(0.05, 0.19), upper_step=Polynomial(0.1, 0.1)),
    bilevel.AmIGO(step_size=0.19, upper_step=0.3, inner=5),
    bilevel.StocBiO(step_size=0.19, upper_step=0.3, inner=5, terms=150),
    bilevel.SOBA(upper_step=bilevel.SpectralStep()),
    bilevel.AmIGO(upper_step=bilevel.TorchOptimizer(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5))),
]


@pytest.mark.parametrize("method", PUBLISHED, ids=lambda m: repr(m)[:70])
def test_given_steps_converge_linearly(method):
    case = quadratic(5, 3)
    res = check(replace(method, stopping=Stopping(rtol=1e-7, max_iter=4000)), case, 1e-5)
    assert relative(res.x, case.x_star) < 1e-5


def test_soba_is_its_formula():
    """One step of given size, by hand."""
    case = quadratic(5, 3)
    method = bilevel.SOBA(step_size=0.1, upper_step=0.05)
    start = method.init(case.problem, case.x0, case.y0)
    state = method.step(case.problem, method.step(case.problem, start))
    x, y, v = case.x0, case.y0, torch.zeros_like(case.y0)
    for _ in range(2):
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        upper_x, upper_y = torch.autograd.grad(case.problem.upper(a, b), (a, b))
        slope = torch.autograd.grad(case.problem.lower(a, b), b, create_graph=True)[0]
        cross, product = torch.autograd.grad(slope, (a, b), v)
        x, y, v = x - 0.05 * (upper_x - cross), y - 0.1 * slope.detach(), v - 0.1 * (product - upper_y)
    assert torch.allclose(state.x, x, rtol=1e-13)
    assert torch.allclose(state.y, y, rtol=1e-13)
    assert torch.allclose(state.adjoint, v, rtol=1e-13)
    assert state.counts.products - start.counts.products == 2 * 2
    assert state.counts.upper_evaluations - start.counts.upper_evaluations == 2


def test_bamm_schedules_and_line_search():
    """The paper's schedules reduce the gap, as slowly as m falls; the exact line search is no worse."""
    case = merely_convex(3)
    gaps = []
    for method in (bilevel.BAMM.published(), replace(bilevel.BAMM.published(), line_search=True)):
        method = replace(method, stopping=Stopping(rtol=0.0, max_iter=150))
        res = bilevel.solve(case.problem, case.x0, case.y0, method)
        assert res.status == Status.MAX_ITER
        gaps.append(relative(res.x, case.x_star))
    assert gaps[0] < 0.9
    assert gaps[1] < 1.1 * gaps[0]


def test_upper_sets_and_trees():
    case = quadratic(5, 3)
    low = case.x_star + torch.tensor([0.5, -9.0, -9.0], dtype=DOUBLE)  # the first bound is active
    problem = bilevel.Problem(
        lambda x, y: case.problem.upper(torch.cat([x["a"], x["b"]]), torch.cat([y["u"][None], y["w"]])),
        lambda x, y: case.problem.lower(torch.cat([x["a"], x["b"]]), torch.cat([y["u"][None], y["w"]])),
        upper_set={"a": constrained.Box(low[:1], float("inf")), "b": None},
    )
    x0, y0 = {"a": case.x0[:1], "b": case.x0[1:]}, {"u": torch.zeros((), dtype=DOUBLE), "w": case.y0[1:]}
    reference = bilevel.solve(problem, x0, y0, bilevel.AID())
    for method in (bilevel.SOBA(), bilevel.SOBA(step_size=0.15, upper_step=0.1)):
        res = bilevel.solve(problem, x0, y0, method)
        assert res.converged, res.status
        assert float(res.x["a"]) == float(low[0])
        assert relative(res.x, reference.x) < 1e-6


@pytest.mark.parametrize("method", [bilevel.SOBA(), bilevel.AmIGO(), bilevel.BAMM()], ids=name)
def test_float32(method):
    case = quadratic(40, 12, dtype=torch.float32)
    res = bilevel.solve(case.problem, case.x0, case.y0, method)
    assert res.converged, (res.status, res.residuals, res.tolerance)
    assert res.x.dtype == torch.float32
    assert relative(res.x, case.x_star) < 1e-3


@pytest.mark.parametrize(
    "method", [bilevel.SOBA(), bilevel.BAMM(), bilevel.SOBA(step_size=0.1)], ids=lambda m: repr(m)[:30]
)
def test_bad_lower_levels_are_named(method):
    one = torch.ones(2, dtype=DOUBLE)
    saddle = bilevel.Problem(
        lambda x, y: ((y - 1) ** 2).sum() + (x**2).sum(), lambda x, y: y[0] ** 2 - y[1] ** 2 + x @ y
    )
    res = bilevel.solve(saddle, one, one.clone(), method)
    assert res.status in (Status.NEGATIVE_CURVATURE, Status.DIVERGED), res.status
    broken = bilevel.Problem(lambda x, y: (y**2).sum(), lambda x, y: ((y - x) ** 2).sum() * (x.sum() - 3).sqrt())
    res = bilevel.solve(broken, one, one.clone(), method)
    assert res.status == Status.NON_FINITE
    assert bool(torch.isfinite(res.x).all())


def test_nan_on_the_way_is_stepped_over_or_named():
    """log x: a trial with x < 0 gives NaN; automatic steps shorten, given ones stop and keep the last good point."""
    problem = bilevel.Problem(lambda x, y: (y + 3) ** 2 + x, lambda x, y: (y - torch.log(x)) ** 2)
    x0, y0 = torch.tensor(2.0, dtype=DOUBLE), torch.tensor(0.0, dtype=DOUBLE)
    res = bilevel.solve(problem, x0, y0, bilevel.SOBA())
    assert res.converged, res.status
    given = bilevel.solve(problem, x0, y0, bilevel.SOBA(step_size=0.3, upper_step=5.0))
    assert given.status in (Status.NON_FINITE, Status.DIVERGED)
    assert torch.isfinite(given.x)
    assert given.iterations > 0


def test_refusals():
    case = quadratic(5, 3)
    with pytest.raises(ValueError, match=r"run away from 0\.2 on"):
        bilevel.SOBA(step_size=0.3)(case.problem, case.x0, case.y0)
    with pytest.raises(ValueError, match="step_size must be positive"):
        bilevel.SOBA(step_size=-1.0)
    with pytest.raises(ValueError, match="inner"):
        bilevel.AmIGO(inner=0)
    with pytest.raises(ValueError, match="terms"):
        bilevel.StocBiO(terms=0)
    with pytest.raises(ValueError, match="weight"):
        bilevel.BAMM(weight=1.0)
    with pytest.raises(ValueError, match="SpectralStep compares values"):
        bilevel.SOBA(step_size=0.1, upper_step=bilevel.SpectralStep())(case.problem, case.x0, case.y0)
    constrained_problem = replace(case.problem, lower_set=constrained.Box(0.0, 1.0))
    with pytest.raises(ValueError, match="does not take a lower set"):
        bilevel.SOBA()(constrained_problem, case.x0, case.y0)


@pytest.mark.parametrize(
    "method",
    [
        bilevel.SOBA(),
        bilevel.BAMM(),
        bilevel.SOBA(step_size=0.1, upper_step=Polynomial(0.2, 0.1)),
        bilevel.AID(upper_step=bilevel.TorchOptimizer(lambda p: torch.optim.RMSprop(p, lr=0.05))),
        bilevel.AmIGO(upper_step=bilevel.TorchOptimizer(
            lambda p: torch.optim.Adam(p, lr=0.05), lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 9]))),
    ],
    ids=lambda m: repr(m)[:60],
)  # fmt: skip
def test_resume_is_exact(method, tmp_path):
    case = ridge()
    whole = bilevel.solve(case.problem, case.x0, case.y0, replace(method, stopping=Stopping(rtol=0.0, max_iter=12)))
    path = tmp_path / "run.pt"
    for limit in (5, 12):
        limited = replace(method, stopping=Stopping(rtol=0.0, max_iter=limit))
        checkpoint = bilevel.Checkpoint(path)
        if limit == 5:
            bilevel.solve(case.problem, case.x0, case.y0, limited, callbacks=[checkpoint])
            saved = torch.load(path, weights_only=True)
            saved["method"] = repr(replace(method, stopping=Stopping(rtol=0.0, max_iter=12)))
            torch.save(saved, path)
    res = bilevel.solve(case.problem, case.x0, case.y0, limited, callbacks=[checkpoint])
    assert torch.equal(vector(res.x), vector(whole.x))
    assert torch.equal(vector(res.y), vector(whole.y))
    assert res.counts == whole.counts
    assert [r["value"] for r in res.history] == [r["value"] for r in whole.history]


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=0.05),
        lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.0),
        lambda p: torch.optim.RMSprop(p, lr=0.02),
        lambda p: torch.optim.Adagrad(p, lr=0.5),
    ],
    ids=["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"],
)
def test_torch_optimizers_move_x_as_by_hand(build):
    """AID with an optimizer gives the numbers of the plain torch loop on the exact hypergradient."""
    case = quadratic(5, 3)
    scheduler = lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9)  # noqa: E731
    method = bilevel.AID(
        upper_step=bilevel.TorchOptimizer(build, scheduler), stopping=Stopping(rtol=1e-13, max_iter=15)
    )
    res = bilevel.solve(case.problem, case.x0, case.y0, method)
    x = torch.nn.Parameter(case.x0.clone())
    optimizer = build([x])
    plan = scheduler(optimizer)
    for _ in range(15):
        x.grad = case.hypergradient(x.detach())
        optimizer.step()
        plan.step()
    assert relative(res.x, x) < 1e-9


def test_torch_optimizer_refusals_and_words():
    rule = bilevel.TorchOptimizer(lambda p: torch.optim.Adam(p, lr=0.05))
    assert repr(rule).startswith("TorchOptimizer(Adam(lr=0.05")
    with pytest.raises(ValueError, match="LBFGS"):
        bilevel.TorchOptimizer(lambda p: torch.optim.LBFGS(p))
    with pytest.raises(TypeError, match="must build a torch"):
        bilevel.TorchOptimizer(lambda p: 3)
    with pytest.raises(TypeError, match="must build a scheduler"):
        bilevel.TorchOptimizer(lambda p: torch.optim.Adam(p), lambda o: 3)


def test_pinned():
    case, same = quadratic(5, 3), sine(2)
    methods = (bilevel.SOBA(), bilevel.AmIGO(), bilevel.BAMM())
    steps = [bilevel.solve(case.problem, case.x0, case.y0, method).iterations for method in methods]
    assert steps[0] <= 80
    assert steps[1] <= 12
    assert steps[2] <= 200
    # without samples the estimators are exact, and these are one method
    assert len({bilevel.solve(same.problem, same.x0, same.y0, method).iterations for method in ONE_STEP}) == 1


def test_given_steps_need_no_lower_minimiser_at_the_start():
    """f_yy < 0 at y0, as in a network that has not been trained; y* = sqrt(x), and F is least at x = 2.25."""
    problem = bilevel.Problem(
        lambda x, y: ((y - 1.5) ** 2).sum() / 2, lambda x, y: (y**4).sum() / 4 - (x * y**2).sum() / 2
    )
    x0, y0 = torch.ones(2, dtype=torch.float64), torch.full((2,), 0.1, dtype=torch.float64)
    res = bilevel.solve(problem, x0, y0, bilevel.SOBA(step_size=0.1, upper_step=0.1))
    assert res.status == Status.CONVERGED
    torch.testing.assert_close(res.x, torch.full_like(x0, 2.25), rtol=1e-6, atol=0)
