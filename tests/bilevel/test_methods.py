import gc

import pytest
import torch
from laws_bilevel import (
    check_bad_data,
    check_float32,
    check_in_dicts,
    check_method,
    check_not_unique,
    check_run,
    relative,
    vector,
)
from problems import (
    CLOSED_FORM,
    COUPLED,
    DOUBLE,
    NONSMOOTH,
    NOT_UNIQUE,
    SMOOTH,
    clipped,
    coupled_equality,
    lasso,
    merely_convex,
    quadratic,
    quadratic_equality,
    ridge,
)

from nestopt import bilevel, constrained, implicit, linalg
from nestopt.linalg import Status, Stopping

UNIQUE = [case for case in (*SMOOTH, *NONSMOOTH, *COUPLED, *CLOSED_FORM) if case.unique or case.y0.numel() == 2]


def xtol(case):
    """1e-8, but where the tolerance of the gradient and the curvature of phi say less: |x - x*| <= tol / curvature."""
    return 1e-7 if "adversarial (n=30)" in case.name else 1e-8


@pytest.mark.parametrize("case", UNIQUE, ids=lambda c: c.name)
def test_aid_needs_no_tuning(case):
    check_method(bilevel.AID(), case, xtol(case))


@pytest.mark.parametrize("case", UNIQUE, ids=lambda c: c.name)
def test_hoag_needs_no_tuning(case):
    check_run(bilevel.HOAG(), case, xtol(case))


@pytest.mark.parametrize("case", [quadratic(5, 3), clipped(7), clipped(2, "set")], ids=lambda c: c.name)
def test_hoag_repeats_and_resumes(case):
    check_method(bilevel.HOAG(), case, 1e-8)


@pytest.mark.parametrize("method", [bilevel.AID(), bilevel.HOAG()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("case", [*NOT_UNIQUE, coupled_equality(10)], ids=lambda c: c.name)
def test_a_lower_solution_that_is_not_unique_is_said_to_be_singular(method, case):
    check_not_unique(method, case)


@pytest.mark.parametrize("method", [bilevel.AID(), bilevel.HOAG()], ids=lambda m: type(m).__name__)
def test_nan_in_the_data(method):
    check_bad_data(method)


@pytest.mark.parametrize("method", [bilevel.AID(), bilevel.HOAG()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize(
    "case",
    [quadratic(5, 3), quadratic(1, 1), quadratic_equality(6, 3, 2), clipped(7), clipped(1)],
    ids=lambda c: c.name,
)
def test_dicts(method, case):
    check_in_dicts(method, case, 1e-8)


@pytest.mark.parametrize("method", [bilevel.AID(), bilevel.HOAG()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize(
    "case",
    [
        quadratic(40, 12, dtype=torch.float32),
        quadratic_equality(6, 3, 2, dtype=torch.float32),
        clipped(7, dtype=torch.float32),
        clipped(7, "set", dtype=torch.float32),
        lasso(dtype=torch.float32),
    ],
    ids=lambda c: c.name,
)
def test_float32(method, case):
    check_float32(method, case)


def test_the_papers_step_rule():
    """Gradient steps of size 1/L: well-conditioned upper levels, and many steps."""
    method = bilevel.HOAG(upper_step=bilevel.LipschitzStep(), stopping=Stopping(rtol=1e-8, max_iter=1000))
    check_run(method, quadratic(5, 3), 1e-6)
    with pytest.raises(ValueError, match="LipschitzStep: lipschitz must be positive"):
        bilevel.LipschitzStep(0.0)


def test_the_learnt_penalty_of_a_lasso():
    """Few rows, so that a penalty inside its bounds is best: there the hypergradient is zero, though y* has kinks."""
    case = lasso(24, 12, seed=1)
    res = bilevel.solve(case.problem, case.x0, case.y0)
    assert res.converged
    assert -6 < float(res.x) < 0
    assert relative(res.y, case.lower_solution(res.x)) < 1e-9
    assert abs(float(case.hypergradient(res.x))) < 1e-8


@pytest.mark.parametrize(
    ("inverse", "name"),
    [(bilevel.MinimumNormInverse(), "minimum norm"), (bilevel.RidgeInverse(1e-3), "ridge (0.001)")],
)
def test_named_inverses(inverse, name):
    """y1 = x is determined and y2 stays at zero: with H^+ x minimises |x|^2/2 + |x - e|^2/2."""
    case = merely_convex(4)
    res = bilevel.solve(case.problem, case.x0, case.y0, bilevel.AID(linear_solver=inverse))
    assert res.converged
    assert res.state.inverse == name
    factor = 1 / (1 + 1e-3) if "ridge" in name else 1.0  # the ridge takes this much of d y1 / d x
    assert relative(res.x, factor / (1 + factor) * case.x_star) < 1e-8
    exact = bilevel.hypergradient(case.problem, case.x_star, case.y_star, bilevel.MinimumNormInverse())
    assert exact.status == Status.CONVERGED
    assert exact.inverse == "minimum norm"
    assert exact.error_bound == float("inf")
    assert "stand-in" in exact.bound_reason


def test_an_infeasible_lower_level_is_said_to_be():
    problem = bilevel.Problem(
        lambda x, y: ((y - 1) ** 2).sum() + (x**2).sum(),
        lambda x, y: ((y - x) ** 2).sum(),
        inequality=lambda x, y: torch.cat([y - 1, 2 - y]),
    )
    start = torch.ones(1, dtype=DOUBLE)
    assert bilevel.solve(problem, start, start.clone()).status == Status.INFEASIBLE


def test_polish_goes_on_from_another_method():
    case = clipped(7)
    rough = bilevel.solve(case.problem, case.x0, case.y0, bilevel.AID(stopping=Stopping(rtol=0.1)))
    fine = bilevel.polish(case.problem, rough)
    assert relative(rough.x, case.x_star) > 1e-6
    assert fine.converged
    assert relative(fine.x, case.x_star) < 1e-8


def test_a_solver_for_another_kind_of_lower_level_is_refused():
    case = clipped(2)
    with pytest.raises(ValueError, match="constraints, which takes SQP"):
        bilevel.solve(case.problem, case.x0, case.y0, bilevel.AID(lower_solver=implicit.NewtonCG()))


@pytest.mark.parametrize(
    "method",
    [
        bilevel.AID(linear_solver=linalg.Cholesky()),
        bilevel.AID(linear_solver=linalg.MINRES()),
        bilevel.AID(linear_solver=linalg.Neumann(250)),
        bilevel.AID(lower_solver=implicit.LBFGS()),
        bilevel.AID(lower_solver=implicit.GradientDescent(max_iter=10_000)),
        bilevel.AID(upper_step=bilevel.ConstantStep(0.1), stopping=Stopping(rtol=1e-8, max_iter=500)),
        bilevel.AID(upper_step=bilevel.SpectralStep(memory=1)),
        bilevel.AID(upper_step=bilevel.QuasiNewtonStep(memory=2)),
        bilevel.AID(warm_start=False),
    ],
    ids=lambda m: repr(m)[:70],
)
def test_every_part_can_be_exchanged(method):
    check_run(method, quadratic(5, 3), 1e-7)


def test_upper_sets():
    case = quadratic(5, 3)
    low = case.x_star + torch.tensor([0.5, -9.0, -9.0], dtype=DOUBLE)  # the first bound is active
    problem = bilevel.Problem(case.problem.upper, case.problem.lower, upper_set=constrained.Box(low, float("inf")))
    res = bilevel.solve(problem, case.x0, case.y0)
    assert res.converged
    assert float((res.x - low).min()) >= 0
    assert float(res.x[0]) == float(low[0])
    hg = case.hypergradient(res.x)
    assert float(hg[0]) > 0
    assert float(hg[1:].norm()) < 1e-6
    tree = bilevel.Problem(
        lambda x, y: case.problem.upper(torch.cat([x["a"], x["b"]]), y),
        lambda x, y: case.problem.lower(torch.cat([x["a"], x["b"]]), y),
        upper_set={"a": constrained.Box(low[:1], float("inf")), "b": None},
    )
    again = bilevel.solve(tree, {"a": case.x0[:1], "b": case.x0[1:]}, case.y0)
    assert again.converged
    assert relative(torch.cat([again.x["a"], again.x["b"]]), res.x) < 1e-7


@pytest.mark.slow
def test_inexact_solves_save_products():
    """Beyond the dimensions in which CG is a direct method."""
    case = quadratic(40, 12, 1e3)
    res = check_run(bilevel.AID(), case, 1e-8)
    exact = bilevel.solve(case.problem, case.x0, case.y0, bilevel.AID(warm_start=False))
    assert res.counts.products < 0.5 * exact.counts.products


def test_inexact_solves_cost_no_digit():
    """Solves are only as accurate as a step can use, but at the point where the run ends they are exact."""
    case = quadratic(5, 3)
    res = bilevel.solve(case.problem, case.x0, case.y0, bilevel.AID())
    assert res.residuals["lower"] <= 0.1 * res.tolerance
    far = bilevel.solve(case.problem, case.x0, case.y0 + 1e6, bilevel.AID())  # of which 1e-3 says nothing
    assert far.converged
    assert relative(far.x, case.x_star) < 1e-8
    at_once = bilevel.solve(case.problem, case.x_star, case.y0, bilevel.AID())
    assert at_once.converged
    assert at_once.residuals["lower"] <= 0.1 * at_once.tolerance
    # no step: the start is all that is asked for
    alone = bilevel.solve(case.problem, case.x0, case.y0, bilevel.AID(stopping=Stopping(rtol=None, max_iter=0)))
    assert max(alone.residuals["lower"], alone.residuals["adjoint"]) <= alone.tolerance


def test_truncated_lower_solver_is_honest():
    """Ten gradient steps a lower solve: the run may not converge, and the residual says how far it is."""
    case = quadratic(40, 12, 1e3)
    method = bilevel.AID(lower_solver=implicit.GradientDescent(max_iter=2), stopping=Stopping(rtol=1e-10, max_iter=20))
    res = bilevel.solve(case.problem, case.x0, case.y0, method)
    assert not res.converged
    assert res.error >= res.residuals["lower"] > res.tolerance


def test_history_counts_and_resume_by_state():
    case = ridge()
    whole = bilevel.solve(case.problem, case.x0, case.y0, bilevel.AID())
    method = bilevel.AID(stopping=Stopping(rtol=None, max_iter=5))
    half = bilevel.solve(case.problem, case.x0, case.y0, method)
    assert half.status == Status.MAX_ITER
    rest = bilevel.solve(case.problem, case.x0, case.y0, bilevel.AID(), state=half.state)
    assert rest.converged
    assert rest.iterations == whole.iterations
    assert torch.equal(vector(rest.x), vector(whole.x))
    assert whole.history[-1]["lower_solves"] == whole.counts.lower_solves >= whole.iterations
    assert whole.counts.products > 0


def test_data_reaches_both_objectives():
    seen = []
    problem = bilevel.Problem(
        lambda x, y, d: ((y - d) ** 2).sum(), lambda x, y, d: seen.append(float(d)) or ((y - x) ** 2).sum()
    )
    start = torch.zeros(2, dtype=DOUBLE)
    method = bilevel.AID(upper_step=bilevel.ConstantStep(0.3), stopping=Stopping(rtol=0.0, max_iter=3))
    bilevel.solve(problem, start, start.clone(), method, data=lambda k: torch.tensor(k + 1.0, dtype=DOUBLE))
    assert sorted(set(seen)) == [1.0, 2.0, 3.0, 4.0]


def test_float32_converges_to_its_own_tolerance():
    case = quadratic(40, 12, dtype=torch.float32)
    res = bilevel.solve(case.problem, case.x0, case.y0)
    assert res.converged
    assert res.x.dtype == torch.float32
    assert relative(res.x, case.x_star) < 1e-3


@pytest.mark.slow
def test_memory_is_flat_over_a_thousand_outer_steps():
    case = quadratic(2, 1, 1.0)  # one inner step a solve: what is kept from step to step is that of any size
    method = bilevel.AID(upper_step=bilevel.ConstantStep(1e-6), stopping=Stopping(rtol=0.0, max_iter=1000))
    alive = {}

    def count(k, state):
        if k in (100, 1000):
            gc.collect()
            alive[k] = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    res = bilevel.solve(case.problem, case.x0, case.y0, method, callbacks=[count])
    assert res.iterations == 1000
    assert abs(alive[1000] - alive[100]) <= 2, alive


@pytest.mark.parametrize(
    ("method", "case", "steps"),
    [
        (bilevel.AID(), quadratic(5, 3), 9),
        (bilevel.HOAG(), quadratic(5, 3), 10),
        (bilevel.AID(), clipped(7), 5),
        (bilevel.AID(), clipped(60, "set"), 6),
    ],
    ids=["AID", "HOAG", "AID, program", "AID, composite"],
)
def test_pinned(method, case, steps):
    """A change of these figures is a change of the algorithm."""
    res = bilevel.solve(case.problem, case.x0, case.y0, method)
    assert res.status == Status.CONVERGED
    assert res.iterations == steps
