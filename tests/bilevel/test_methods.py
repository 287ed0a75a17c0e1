import gc

import pytest
import torch
from laws_bilevel import check_method, relative, vector
from problems import DOUBLE, SMOOTH, quadratic

from nestopt import bilevel, constrained, implicit, linalg
from nestopt.linalg import Status, Stopping

TOLERANCES = {"multimodal": 3e-4}  # the answers of these have five digits


def xtol(case):
    return next((value for name, value in TOLERANCES.items() if name in case.name), 1e-8)


@pytest.mark.parametrize("case", SMOOTH, ids=lambda c: c.name)
def test_aid_needs_no_tuning(case):
    check_method(bilevel.AID(), case, xtol(case))


@pytest.mark.parametrize("case", [case for case in SMOOTH if case.easy], ids=lambda c: c.name)
def test_hoag_needs_no_tuning(case):
    """Gradient steps of size 1/L: well-conditioned upper levels, a looser tolerance, and many steps."""
    check_method(bilevel.HOAG(stopping=Stopping(rtol=1e-6, max_iter=1000)), case, max(xtol(case), 1e-4))


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
    check_method(method, quadratic(5, 3), 1e-7)


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


def test_truncated_lower_solver_is_honest():
    """Ten gradient steps a lower solve: the run may not converge, and the residual says how far it is."""
    case = quadratic(40, 12, 1e3)
    method = bilevel.AID(lower_solver=implicit.GradientDescent(max_iter=2), stopping=Stopping(rtol=1e-10, max_iter=20))
    res = bilevel.solve(case.problem, case.x0, case.y0, method)
    assert not res.converged
    assert res.error >= res.residuals["lower"] > res.tolerance


def test_history_counts_and_resume_by_state():
    case = ridge()
    whole = bilevel.solve(case.problem, case.x0, case.y0)
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


def test_pinned():
    res = bilevel.solve(*(lambda c: (c.problem, c.x0, c.y0))(quadratic(5, 3)))
    assert res.status == Status.CONVERGED
    assert res.iterations <= 20
