import pytest
import torch
from laws_bilevel import relative, vector
from problems import COUPLED, DOUBLE, NONSMOOTH, NOT_UNIQUE, SMOOTH, merely_convex, quadratic, sine

from nestopt import bilevel, constrained, implicit
from nestopt.linalg import Status, Stopping

LONG = ("n=40,", "n=200,", "(n=30)", "(n=100)", "kernel")  # as fast to reach, but dear on one core
CASES = [c for c in SMOOTH + NOT_UNIQUE + NONSMOOTH + COUPLED if not any(word in c.name for word in LONG)]
FIVE_DIGITS = ("multimodal", "coupled inequality")  # of the answers given


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_reaches_the_answer_without_tuning(case):
    res = bilevel.ValueDifference()(case.problem, case.x0, case.y0)
    assert res.status == Status.CONVERGED, (res.status, res.residuals)
    assert res.error == max(res.residuals.values()) <= res.tolerance
    tol = 2e-4 if any(word in case.name for word in FIVE_DIGITS) else 1e-5
    if case.x_star is not None:
        size = max(1.0, float(vector(case.x_star).norm()))
        assert float((vector(res.x) - vector(case.x_star)).norm()) <= tol * size
    if case.value is not None:
        assert abs(res.value - case.value) <= tol * max(1.0, abs(case.value))
    if case.x_star is None and case.value is None and case.problem.upper_set is None:
        first = vector(case.hypergradient(case.x0)).norm()
        assert float(vector(case.hypergradient(res.x)).norm()) <= 1e-5 * float(first)
    smooth = case.problem.lower_prox is None and case.problem.equality is None and case.problem.inequality is None
    assert res.counts.products == 0 or not smooth


@pytest.mark.parametrize("case", [quadratic(5, 3), merely_convex(3), sine(2)], ids=lambda c: c.name)
def test_init_and_step_equal_the_call(case):
    method = bilevel.ValueDifference()
    res = method(case.problem, case.x0, case.y0)
    state = method.init(case.problem, case.x0, case.y0)
    for _ in range(res.iterations):
        state = method.step(case.problem, state)
    assert torch.equal(state.x_vector, vector(res.x))
    assert state.counts == res.counts
    assert [record["iteration"] for record in res.history] == list(range(res.iterations + 1))


@pytest.mark.parametrize("penalty", [10.0, 100.0])
def test_the_bias_is_of_second_order_and_measured(penalty):
    """At lambda = 100 a one-sided difference is wrong by 1e-2, the central one by 1e-4."""
    case = quadratic(5, 3)
    truth = case.hypergradient(case.x0)
    state = bilevel.ValueDifference(penalty=penalty).init(case.problem, case.x0, case.y0)
    error = float((state.hypergradient - truth).norm())
    assert 0.5 * error <= float(state.residuals["bias"]) <= 2 * error
    assert error <= 2 / penalty**2 * float(truth.norm())
    half = bilevel.ValueDifference(penalty=2 * penalty).init(case.problem, case.x0, case.y0)
    assert 3.5 <= error / float((half.hypergradient - truth).norm()) <= 4.5
    one_sided = bilevel.ValueDifference(penalty=penalty, one_sided=True).init(case.problem, case.x0, case.y0)
    assert float((one_sided.hypergradient - truth).norm()) <= 4 / penalty**2 * float(truth.norm())


def test_a_large_bias_is_shortened_away():
    case = quadratic(5, 3)
    res = bilevel.ValueDifference(penalty=5.0)(case.problem, case.x0, case.y0)
    assert res.converged
    assert float(res.state.epsilon) < 0.1
    assert relative(res.x, case.x_star) < 1e-5


def test_where_the_lower_level_is_flat_the_difference_is_one_sided():
    case = merely_convex(2)
    res = bilevel.ValueDifference()(case.problem, case.x0, case.y0)
    assert res.state.one_sided
    assert relative(res.y, case.y_star) < 1e-5
    assert not bilevel.ValueDifference()(*(lambda c: (c.problem, c.x0, c.y0))(sine(2))).state.one_sided


def test_parts_can_be_exchanged():
    case = quadratic(5, 3)
    for method in (
        bilevel.ValueDifference(lower_solver=implicit.NewtonCG()),
        bilevel.ValueDifference(upper_step=bilevel.SpectralStep()),
        bilevel.ValueDifference(penalty=1e3, one_sided=False),
    ):
        res = method(case.problem, case.x0, case.y0)
        assert res.converged
        assert relative(res.x, case.x_star) < 1e-5


def test_float32():
    case = quadratic(5, 3, dtype=torch.float32)
    res = bilevel.ValueDifference()(case.problem, case.x0, case.y0)
    assert res.converged
    assert res.x.dtype == torch.float32
    assert relative(res.x, case.x_star) < 3e-3


def test_upper_set_and_lower_set():
    low = constrained.Box(torch.tensor([0.8, -9.0, -9.0], dtype=DOUBLE), float("inf"))
    case = quadratic(5, 3)
    problem = bilevel.Problem(case.problem.upper, case.problem.lower, upper_set=low)
    res = bilevel.ValueDifference()(problem, case.x0, case.y0)
    reference = bilevel.AID()(problem, case.x0, case.y0)
    assert res.converged
    assert relative(res.x, reference.x) < 1e-5
    # y = min(x, 1): phi = (y - 2)^2 + (x - 1/2)^2 / 10 is least where y is as large as it can be
    clipped = bilevel.Problem(
        lambda x, y: ((y - 0.5) ** 2).sum() + 0.1 * (x**2).sum(),
        lambda x, y: ((y - x) ** 2).sum() / 2,
        lower_set=constrained.Box(0.0, 1.0),
    )
    res = bilevel.ValueDifference()(clipped, torch.full((2,), 0.2, dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE))
    assert res.converged
    assert float((res.x - 0.5 / 1.1).abs().max()) < 1e-5


def test_faults_are_named():
    case = quadratic(3, 2)
    problem = bilevel.Problem(case.problem.upper, lambda x, y: case.problem.lower(x, y) * float("nan"))
    res = bilevel.ValueDifference()(problem, case.x0, case.y0)
    assert res.status == Status.NON_FINITE
    unbounded = bilevel.Problem(case.problem.upper, lambda x, y: -(y**2).sum() + (x.sum() * y).sum())
    res = bilevel.ValueDifference()(unbounded, case.x0, case.y0)
    assert res.status == Status.DIVERGED
    assert res.error == float("inf")  # nothing is known at the start, which is kept
    assert torch.equal(res.y, case.y0)
    with pytest.raises(ValueError, match="penalty must be positive"):
        bilevel.ValueDifference(penalty=0.0)
    with pytest.raises(ValueError, match="used by no function"):
        bilevel.ValueDifference()(
            bilevel.Problem(lambda x, y: (y**2).sum(), lambda x, y: (y**2).sum()), case.x0, case.y0
        )


def test_rounding_ends_as_stagnated():
    case = quadratic(2, 1)
    method = bilevel.ValueDifference(stopping=Stopping(rtol=1e-15, max_iter=12))
    res = method(case.problem, case.x0, case.y0)
    assert res.status in (Status.STAGNATED, Status.LINE_SEARCH_FAILED, Status.MAX_ITER)
    assert res.error > res.tolerance
    assert relative(res.x, case.x_star) < 1e-5


def test_quasi_newton_equals_newton_with_all_pairs():
    g = torch.Generator().manual_seed(0)
    M = torch.randn(12, 12, generator=g, dtype=DOUBLE)
    A, b = M @ M.T + torch.eye(12, dtype=DOUBLE), torch.randn(12, generator=g, dtype=DOUBLE)
    solver = bilevel.CompactLBFGS(rtol=1e-12)
    res = solver(lambda y: y @ A @ y / 2 - b @ y, torch.zeros(12, dtype=DOUBLE))
    assert res.converged
    assert relative(res.x, torch.linalg.solve(A, b)) < 1e-10
    pairs = res.state.pairs
    limited = pairs
    for _ in range(3):
        limited = limited.append(pairs.steps[0], pairs.changes[0], len(pairs.steps))
    again = type(pairs).of(limited.steps, limited.changes)
    assert float((again.cross - limited.cross).abs().max()) < 1e-12 * float(again.cross.abs().max())
    # the newest secant equation holds: H t = s
    assert relative(-pairs.direction(pairs.changes[-1]), pairs.steps[-1]) < 1e-8


def test_pinned():
    res = bilevel.ValueDifference()(*(lambda c: (c.problem, c.x0, c.y0))(quadratic(5, 3)))
    assert res.iterations <= 12
    assert res.counts.lower_gradients <= 250
