"""The penalty methods: the published steps, the known answers with and without the second stage, faults and resume."""

import dataclasses
import re

import pytest
import torch
from laws_bilevel import relative, vector
from problems import (
    DOUBLE,
    adversarial,
    kernel_ridge,
    logistic,
    merely_convex,
    quadratic,
    ridge,
    sine,
    weighted_l1,
)

from nestopt import bilevel, constrained
from nestopt.linalg import Status, Stopping

METHODS = [
    bilevel.F2SA(), bilevel.F3SA(), bilevel.MEHA(), bilevel.VPBGD(), bilevel.GPBGD(), bilevel.BOME(), bilevel.BVFSM(),
]  # fmt: skip
BOX = constrained.Box(torch.tensor([0.8, -9.0], dtype=DOUBLE), float("inf"))


def name(value):
    return type(value).__name__ if isinstance(value, bilevel.Method) else getattr(value, "name", str(value))


def start(case):
    return case.problem, case.x0, case.y0


def check(method, case, tol=1e-5):
    res = method(*start(case))
    assert res.status == Status.CONVERGED, (case.name, res.status, res.residuals)
    assert res.error == max(res.residuals.values()) <= res.tolerance
    if case.x_star is not None:
        error = float((vector(res.x) - vector(case.x_star)).norm())
        assert error <= tol * max(1.0, float(vector(case.x_star).norm())), (case.name, error)
    if case.value is not None:
        assert abs(res.value - case.value) <= tol * max(1.0, abs(case.value))
    if case.x_star is None and case.value is None:
        first = float(vector(case.hypergradient(case.x0)).norm())
        assert float(vector(case.hypergradient(res.x)).norm()) <= tol * first, case.name
    assert [record["iteration"] for record in res.history] == list(range(res.iterations + 1))
    assert res.history[-1]["lower_gradients"] == res.counts.lower_gradients
    smooth = case.problem.lower_prox is None  # the second stage solves the others by semismooth Newton steps
    assert (res.counts.products > 0) == (isinstance(method, bilevel.GPBGD) or not smooth)
    return res


@pytest.mark.parametrize("case", [quadratic(4, 2), sine(1)], ids=name)
@pytest.mark.parametrize("method", METHODS, ids=name)
def test_debiased_to_the_answer(method, case):
    check(method, case)


LARGE = [quadratic(40, 12, 1e3), adversarial(30), ridge(), kernel_ridge(), logistic(), merely_convex(100)]
PAIRS = [(method, case) for method in METHODS for case in LARGE if case.unique or not method.assumptions.unique]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "case"), [*PAIRS, (METHODS[0], quadratic(200, 50, 1e2))], ids=name)
def test_debiased_to_the_answer_at_size(method, case):
    check(method, case)


@pytest.mark.parametrize("method", [m for m in METHODS if not m.assumptions.unique], ids=name)
def test_selects_among_lower_solutions(method):
    check(method, merely_convex(3))


@pytest.mark.parametrize("n", [2, 10])
def test_meha_on_nonsmooth_lower_levels(n):
    check(bilevel.MEHA(), weighted_l1(n))


BARE = [
    (bilevel.F2SA(steps=3, penalty=bilevel.Growth(20.0, slope=4.0)), quadratic(1, 1), 100),
    (bilevel.F3SA(penalty=bilevel.Growth(20.0, slope=4.0)), sine(1), 200),
    (bilevel.VPBGD(penalty=bilevel.Growth(20.0, slope=4.0)), sine(1), 200),
    (bilevel.GPBGD(penalty=bilevel.Growth(20.0, slope=4.0)), sine(1), 300),
    (bilevel.MEHA(penalty=bilevel.Growth(1.0, power=0.1)), merely_convex(1), 300),
    (bilevel.BOME(steps=5), merely_convex(1), 80),
    (bilevel.BVFSM(steps=5, penalty=bilevel.Growth(50.0, power=0.5)), sine(1), 60),
]


@pytest.mark.parametrize(("method", "case", "steps"), BARE, ids=name)
def test_bare_method_where_its_penalty_grows(method, case, steps):
    bare = dataclasses.replace(method, debias=None, stopping=Stopping(rtol=0.0, max_iter=steps))
    res = bare(*start(case))
    assert res.status in (Status.MAX_ITER, Status.CONVERGED)  # at F = 0 the error may be zero to the last bit
    error = float((vector(res.x) - vector(case.x_star)).norm())
    assert error <= 1e-3 * max(1.0, float(vector(case.x_star).norm())), error
    assert "bias" not in res.residuals


def published_steps(x, y, z, F, f, k, method):
    """One step of each paper, written out with autograd; z is what the method calls its auxiliary."""

    def gradients(function, *at):
        at = [a.detach().requires_grad_() for a in at]
        return torch.autograd.grad(function(*at), at, materialize_grads=True)

    def lower_y(x, y):
        return gradients(f, x, y)[1]

    if isinstance(method, bilevel.F2SA):
        lam, new = method.penalty(k), method.penalty(k + 1)
        x = x - method.upper_step_size * (gradients(F, x, y)[0] + lam * (gradients(f, x, y)[0] - gradients(f, x, z)[0]))
        for _ in range(method.steps):
            z = z - method.auxiliary_step_size * lower_y(x, z)
            y = y - method.lower_step_size * (gradients(F, x, y)[1] / new + lower_y(x, y))
    elif isinstance(method, bilevel.F3SA):
        lam = method.penalty(k)
        slope = gradients(F, x, y)[0] + lam * (gradients(f, x, y)[0] - gradients(f, x, z)[0])
        y_new = y - method.lower_step_size * (gradients(F, x, y)[1] / lam + lower_y(x, y))
        x, y, z = x - method.upper_step_size * slope, y_new, z - method.auxiliary_step_size * lower_y(x, z)
    elif isinstance(method, bilevel.MEHA):
        c, g = method.penalty(k), method.gamma
        z = z - method.auxiliary_step_size * (lower_y(x, z) + (z - y) / g)
        slope = gradients(F, x, y)[0] / c + gradients(f, x, y)[0] - gradients(f, x, z)[0]
        x = x - method.upper_step_size * slope
        y = y - method.lower_step_size * (gradients(F, x, y)[1] / c + lower_y(x, y) - (y - z) / g)
    elif isinstance(method, bilevel.VPBGD):
        c = method.penalty(k)
        x_new = x - method.step_size * (gradients(F, x, y)[0] + c * (gradients(f, x, y)[0] - gradients(f, x, z)[0]))
        x, y = x_new, y - method.step_size * (gradients(F, x, y)[1] + c * lower_y(x, y))
        for _ in range(method.steps):
            z = z - method.auxiliary_step_size * lower_y(x, z)
    elif isinstance(method, bilevel.GPBGD):
        c = method.penalty(k)

        def square(x, y):
            return (torch.autograd.grad(f(x, y), y, create_graph=True)[0] ** 2).sum()

        slopes, squares = gradients(F, x, y), gradients(square, x, y)
        x = x - method.step_size * (slopes[0] + c * squares[0])
        y = y - method.step_size * (slopes[1] + c * squares[1])
    else:
        slopes, lower = gradients(F, x, y), gradients(f, x, y)
        q = lower[0] - gradients(f, x, z)[0], lower[1]
        square = (q[0] ** 2).sum() + (q[1] ** 2).sum()
        lam = (method.rate - ((slopes[0] * q[0]).sum() + (slopes[1] * q[1]).sum()) / square).clamp_min(0)
        x, y = x - method.step_size * (slopes[0] + lam * q[0]), y - method.step_size * (slopes[1] + lam * q[1])
        z = y
        for _ in range(method.steps):
            z = z - method.auxiliary_step_size * lower_y(x, z)
    return x, y, z


GROWING = bilevel.Growth(2.0, power=0.4)
FIXED = {"debias": None, "stopping": Stopping(rtol=0.0, max_iter=3)}


@pytest.mark.parametrize(
    "method",
    [
        bilevel.F2SA(2, GROWING, 0.01, 0.05, 0.05, **FIXED),
        bilevel.F3SA(0.3, GROWING, 0.01, 0.05, 0.05, **FIXED),
        bilevel.MEHA(GROWING, 2.0, 0.01, 0.05, 0.05, **FIXED),
        bilevel.VPBGD(2, GROWING, 100, 0.01, 0.05, **FIXED),
        bilevel.GPBGD(GROWING, 100, 1e-3, **FIXED),
        bilevel.BOME(2, 0.5, 0.01, 0.05, **FIXED),
    ],
    ids=name,
)
def test_numbers_reproduce_the_published_steps(method):
    case = quadratic(4, 2)
    state = method.init(case.problem, case.x0, case.y0)
    for k in range(3):
        z = getattr(state, "auxiliary", state.y_vector)
        expected = published_steps(state.x_vector, state.y_vector, z, case.problem.upper, case.problem.lower, k, method)
        state = method.step(case.problem, state)
        for found, truth in zip(
            (state.x_vector, state.y_vector, getattr(state, "auxiliary", None)), expected, strict=True
        ):
            assert found is None or float((found - truth).norm()) <= 1e-12 * max(1.0, float(truth.norm()))


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_resume_is_exact_in_either_stage(method, tmp_path):
    case = quadratic(3, 2)
    method = dataclasses.replace(method, stopping=Stopping(rtol=None, max_iter=6))
    whole = method(*start(case))
    assert whole.converged
    for steps in (3, 8):  # in the first and in the second stage
        path = tmp_path / f"{steps}.pt"
        stop = [lambda k, state, steps=steps: int(state.iterations) >= steps]
        half = method(*start(case), callbacks=[bilevel.Checkpoint(path, every=1), *stop])
        assert (half.state.second is None) == (steps == 3)
        rest = method(*start(case), callbacks=[bilevel.Checkpoint(path, every=1)])
        assert torch.equal(rest.x, whole.x)
        assert rest.counts == whole.counts
        assert len(rest.history) == len(whole.history)
    state = method.init(*start(case))
    for _ in range(whole.iterations):
        state = method.step(case.problem, state)
    assert torch.equal(state.x_vector, whole.x)
    assert state.counts == whole.counts


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_upper_set_and_float32(method):
    case = quadratic(2, 2)
    problem = bilevel.Problem(case.problem.upper, case.problem.lower, upper_set=BOX)
    quick = dataclasses.replace(method, stopping=Stopping(rtol=None, max_iter=10))
    res = quick(problem, case.x0, case.y0)
    assert res.converged
    assert relative(res.x, bilevel.AID()(problem, case.x0, case.y0).x) < 1e-5
    low = quadratic(2, 1, dtype=torch.float32)
    res = quick(*start(low))
    assert res.converged
    assert res.x.dtype == torch.float32
    assert relative(res.x, low.x_star) < 5e-3


@pytest.mark.parametrize("method", [bilevel.F2SA(), bilevel.MEHA()], ids=name)
def test_trees_of_tensors(method):
    case = ridge(20, 3)
    res = method(*start(case))
    assert res.converged
    assert set(res.x) == {"log_penalty"}
    first = float(vector(case.hypergradient(case.x0)).norm())
    assert float(vector(case.hypergradient(res.x)).norm()) <= 1e-4 * first


def test_the_second_stage_can_be_exchanged():
    case = quadratic(5, 3)
    res = bilevel.F2SA(debias=bilevel.AID(), stopping=Stopping(rtol=1e-10, max_iter=20))(*start(case))
    assert res.converged
    assert relative(res.x, case.x_star) < 1e-8
    assert set(res.residuals) >= {"lower", "adjoint", "upper"}
    with pytest.raises(ValueError, match="BOME does not take"):
        bilevel.MEHA(debias=bilevel.BOME())(*start(weighted_l1(2)))


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_faults_keep_the_last_good_state(method):
    case = quadratic(3, 2)
    calls = []

    def lower(x, y):
        calls.append(0)
        return case.problem.lower(x, y) * (float("nan") if len(calls) > 120 else 1.0)

    res = method(bilevel.Problem(case.problem.upper, lower), case.x0, case.y0)
    assert res.status == Status.NON_FINITE
    assert bool(torch.isfinite(res.x).all())
    nan = bilevel.Problem(lambda x, y: case.problem.upper(x, y) * float("nan"), case.problem.lower)
    assert method(nan, case.x0, case.y0).status == Status.NON_FINITE


SIZES = [
    (bilevel.F2SA(penalty=10.0), "lower_step_size", 2 / (10 + 10 / 10)),  # A has the curvature 10, in F and in f
    (bilevel.F2SA(), "auxiliary_step_size", 2 / 10),
    (bilevel.F3SA(penalty=10.0), "lower_step_size", 2 / (10 + 10 / 10)),
    (bilevel.F3SA(), "auxiliary_step_size", 2 / 10),
    (bilevel.MEHA(gamma=0.1), "auxiliary_step_size", 2 / (10 + 10)),
    (bilevel.VPBGD(penalty=10.0), "step_size", 2 / (10 + 10 * 10)),
    (bilevel.VPBGD(), "auxiliary_step_size", 2 / 10),
    (bilevel.GPBGD(penalty=10.0), "step_size", 2 / (10 + 2 * 10 * 10**2)),
    (bilevel.BOME(), "step_size", 2 / 10),
    (bilevel.BOME(), "auxiliary_step_size", 2 / 10),
    (bilevel.BVFSM(), "auxiliary_step_size", 2 / 10),
]


@pytest.mark.parametrize(("method", "field", "bound"), SIZES, ids=name)
def test_step_sizes_that_cannot_work_are_refused_with_the_bound(method, field, bound):
    case = quadratic(3, 2)
    with pytest.raises(ValueError, match=f"{name(method)}: {field} must be below 2 / L") as caught:
        dataclasses.replace(method, **{field: 1.3 * bound}).init(*start(case))
    said = float(re.search(r"2 / L = ([\d.e+-]+),", str(caught.value))[1])
    assert bound <= 1.01 * said <= 1.2 * bound  # power steps see a lower bound of L
    dataclasses.replace(method, **{field: 0.9 * bound}).init(*start(case))


def test_a_step_in_x_that_is_too_long_diverges():
    res = bilevel.F2SA(upper_step_size=50.0, debias=None)(*start(quadratic(3, 2)))
    assert res.status == Status.DIVERGED
    assert "step size" in Status.DIVERGED.value


def test_a_penalty_that_overflows_or_is_none():
    """The step that did it is counted, and the state before it is kept."""
    case = quadratic(3, 2)
    for method in METHODS:
        if "penalty" not in {f.name for f in dataclasses.fields(method)}:
            continue
        res = dataclasses.replace(method, penalty=lambda k: 10.0 ** (400 if k == 3 else 1))(*start(case))
        assert res.status == Status.NON_FINITE, name(method)
        assert res.iterations == 3
        assert res.error == res.history[2]["error"] < float("inf")
        assert bool(torch.isfinite(res.x).all())
        with pytest.raises(ValueError, match=r"positive numbers, but at step 2 it returned -1\.0"):
            dataclasses.replace(method, penalty=lambda k: 1.0 - k * (k - 1))(*start(case))
    low = quadratic(3, 2, dtype=torch.float32)
    res = bilevel.F2SA(penalty=lambda k: 1e39 if k == 2 else 10.0)(*start(low))
    assert res.status == Status.NON_FINITE
    assert res.iterations == 2


@pytest.mark.parametrize("method", [*METHODS, bilevel.ValueDifference()], ids=name)
def test_a_lower_level_without_a_minimiser_diverges(method):
    """In the first stage or at the begin of the second: the last good state is kept."""
    one = torch.ones(2, dtype=DOUBLE)
    problem = bilevel.Problem(lambda x, y: ((y - 1) ** 2).sum(), lambda x, y: (x * y).sum() - (y**2).sum())
    seen = {}
    res = method(problem, one, 0.5 * one, callbacks=[lambda k, s: seen.update({int(s.iterations): s})])
    assert res.status == Status.DIVERGED
    before = seen[max(res.iterations - 1, 0)]
    assert torch.equal(res.x, before.x)
    assert torch.equal(res.y, before.y)
    assert res.value == float(before.value)
    assert float(res.y.norm()) < 1e12


CONSTRAINED = {
    "lower_set": constrained.Box(0.0, 1.0), "lower_prox": lambda x: constrained.L1(x.exp()),
    "inequality": lambda x, y: y - x, "equality": lambda x, y: y.sum()[None] - x.sum()[None],
}  # fmt: skip


@pytest.mark.parametrize("part", CONSTRAINED)
@pytest.mark.parametrize("method", METHODS, ids=name)
def test_what_a_method_does_not_take_is_refused_with_those_that_do(method, part):
    if getattr(method.assumptions, part):
        return
    zero = torch.zeros(2, dtype=DOUBLE)
    problem = bilevel.Problem(
        lambda x, y: ((y - 1) ** 2).sum(), lambda x, y: ((y - x) ** 2).sum(), **{part: CONSTRAINED[part]}
    )
    with pytest.raises(ValueError, match=f"{name(method)} does not take .* has {part}; use bilevel") as caught:
        method(problem, zero, zero.clone())
    offered = re.findall(r"bilevel\.(\w+)\(\)", str(caught.value))
    assert "AID" in offered
    assert all(getattr(getattr(bilevel, other).assumptions, part) for other in offered)


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_automatic_sizes_do_not_depend_on_how_sums_are_formed(method):
    """As between one process and two that have a part of the samples each: differences at the rounding level only."""
    X, Z, t, u = (
        torch.randn(*n, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)
        for n in ((26, 4), (18, 4), (26,), (18,))
    )

    def mean(r, cut):
        n = len(r)
        return r.mean() if not cut else (r[:cut].mean() * (2 * cut / n) + r[cut:].mean() * (2 * (n - cut) / n)) / 2

    def path(cut):
        problem = bilevel.Problem(
            lambda x, y: mean((Z @ y - u) ** 2, cut) / 2,
            lambda x, y: mean((X @ y - t) ** 2, cut) / 2 + x.exp() @ y**2 / 2,
        )
        points, bare = [], dataclasses.replace(method, debias=None, stopping=Stopping(rtol=0.0, max_iter=30))
        keep = [lambda k, s: points.append(torch.cat([s.x_vector, s.y_vector, s.value[None]]))]
        bare(problem, torch.full((4,), -1.0, dtype=DOUBLE), torch.zeros(4, dtype=DOUBLE), callbacks=keep)
        return torch.stack(points)

    whole = path(0)
    assert float((path(7) - whole).abs().max()) <= 1e-12 * float(whole.abs().max())


def test_refusals():
    case = quadratic(3, 2)
    with pytest.raises(ValueError, match=r"pass F2SA\(debias=None\), and afterwards run ValueDifference\(\)"):
        bilevel.F2SA()(*start(case), data=lambda k: None if k < 0 else 1)
    with pytest.raises(ValueError, match="F2SA does not take a lower prox"):
        bilevel.F2SA()(*start(weighted_l1(2)))
    with pytest.raises(ValueError, match="upper_step_size must be positive"):
        bilevel.F2SA(upper_step_size=-1.0)
    with pytest.raises(ValueError, match="momentum must be in"):
        bilevel.F3SA(momentum=2.0)
    with pytest.raises(ValueError, match="power >= 0"):
        bilevel.Growth(1.0, power=-1.0)
    with pytest.raises(ValueError, match="must be one of 'elastic net'"):
        bilevel.MEHA.published("ridge")
    with pytest.raises(ValueError, match="does not depend on y"):
        bilevel.BOME()(bilevel.Problem(lambda x, y: (x**2).sum(), case.problem.lower), case.x0, case.y0)


@pytest.mark.parametrize("method", [bilevel.F2SA(steps=3, debias=None), bilevel.F3SA(debias=None)], ids=name)
def test_minibatches(method):
    """Noisy targets, one draw a step: the same draws give the same run, and x comes near the answer of the mean."""
    case = quadratic(3, 2, 3.0)

    def noisy(k):
        g = torch.Generator().manual_seed(k)
        return bilevel.Batch(*(0.3 * torch.randn(n, generator=g, dtype=DOUBLE) for n in (2, 3)))

    problem = bilevel.Problem(
        lambda x, y, d: case.problem.upper(x, y) + d @ x, lambda x, y, d: case.problem.lower(x, y) + d @ y
    )
    method = dataclasses.replace(method, stopping=Stopping(rtol=0.0, max_iter=200))
    res = method(problem, case.x0, case.y0, data=noisy)
    assert res.status == Status.MAX_ITER
    assert float((res.x - case.x_star).norm()) < 0.15 * float((case.x0 - case.x_star).norm())
    short = dataclasses.replace(method, stopping=Stopping(rtol=0.0, max_iter=20))
    runs = [short(problem, case.x0, case.y0, data=noisy).x for _ in range(2)]
    assert torch.equal(*runs)


def test_only_the_oracle_is_asked():
    """F2SA and F3SA reach the problem, its inner products and its sets through `Problem.oracle` alone."""

    class Counting(bilevel.Problem):
        def oracle(self, spaces, data=None):
            found = super().oracle(spaces, data)
            inner = found.norm
            found.norm = lambda v: asked.append(1) or inner(v)
            return found

    asked = []
    case = quadratic(3, 2)
    for method in (bilevel.F2SA(debias=None), bilevel.F3SA(debias=None)):
        asked.clear()
        short = dataclasses.replace(method, stopping=Stopping(rtol=None, max_iter=5))
        short(Counting(case.problem.upper, case.problem.lower), case.x0, case.y0)
        assert len(asked) > 20


def test_the_barrier_blocks():
    """At every step y stays where f is below the regularised value plus its slack."""
    case = merely_convex(2)
    gaps = []
    method = dataclasses.replace(bilevel.BVFSM(debias=None), stopping=Stopping(rtol=None, max_iter=30))
    method(*start(case), callbacks=[lambda k, s: gaps.append(float(s.slack - s.gap))])
    assert min(gaps) > 0


def test_pinned():
    res = bilevel.F2SA()(*start(quadratic(5, 3)))
    assert res.iterations <= 80
    assert res.counts.products == 0
