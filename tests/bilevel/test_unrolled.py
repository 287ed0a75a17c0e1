"""Methods that differentiate through the lower level's solver."""

import math
import weakref
from dataclasses import replace

import pytest
import torch
from laws_bilevel import check_method, relative, vector
from problems import DOUBLE, NOT_UNIQUE, SMOOTH, quadratic, sine

from nestopt import bilevel, constrained, implicit, linalg
from nestopt.bilevel.inner_steps import InnerSteps, PerStep
from nestopt.bilevel.problem import Spaces
from nestopt.linalg import Status, Stopping

SOON = Stopping(rtol=1e-5, max_iter=200)
CHEAP = [
    case for case in SMOOTH if any(word in case.name for word in ("(n=1,", "n=5,", "sine", "multi", "(n=4)", "logi"))
]
METHODS = [
    bilevel.Unrolled(),
    bilevel.Unrolled(mode="forward"),
    bilevel.RealTime(),
    bilevel.Replay(),
    bilevel.DARTS(),
    bilevel.BMG(),
    bilevel.BDA(),
]
ids = lambda m: m.name if hasattr(m, "name") else type(m).__name__ + ("-forward" if "'forward'" in repr(m) else "")  # noqa: E731


def reaches(method, case, xtol):
    """The known answer, or a vanishing hypergradient, and an error that is what it says."""
    res = bilevel.solve(case.problem, case.x0, case.y0, method)
    assert res.status == Status.CONVERGED, (case.name, res.status, res.residuals, res.tolerance)
    assert res.error <= res.tolerance
    assert res.error == max(res.residuals.values())
    if case.x_star is not None:
        size = max(float(vector(case.x_star).norm()), float((vector(case.x0) - vector(case.x_star)).norm()))
        assert float((vector(res.x) - vector(case.x_star)).norm()) <= xtol * size, case.name
    elif case.hypergradient is not None:
        first = float(vector(case.hypergradient(case.x0)).norm())
        assert float(vector(case.hypergradient(res.x)).norm()) <= xtol * first, case.name
    return res


def xtol(case):
    return 3e-4 if "multimodal" in case.name else 1e-5


@pytest.mark.parametrize("case", CHEAP, ids=lambda c: c.name)
def test_unrolled_needs_no_tuning(case):
    reaches(bilevel.Unrolled(), case, xtol(case))


@pytest.mark.parametrize("case", [quadratic(30, 8, 300)], ids=lambda c: c.name)
def test_unrolled_on_harder_problems(case):
    reaches(bilevel.Unrolled(stopping=SOON), case, 1e-3)


@pytest.mark.parametrize("method", METHODS, ids=ids)
@pytest.mark.parametrize("case", [quadratic(5, 3), sine(2)], ids=lambda c: c.name)
def test_every_method_needs_no_tuning(method, case):
    reaches(method, case, xtol(case))


@pytest.mark.parametrize("method", [bilevel.Unrolled()], ids=ids)
def test_laws(method):
    check_method(method, quadratic(2, 1), 1e-6)


@pytest.mark.parametrize("case", NOT_UNIQUE[::2], ids=lambda c: c.name)
def test_a_lower_level_with_many_minimisers(case):
    """BDA finds the one that is best for F; without F in the inner steps it is said that f is flat."""
    res = reaches(bilevel.BDA(), case, 1e-5)
    assert relative(res.y, case.y_star) < 1e-5
    res = bilevel.solve(case.problem, case.x0, case.y0, bilevel.Unrolled())
    assert res.status == Status.SINGULAR
    assert res.residuals["adjoint"] > 0.1


def by_hand(case, optimizer, steps, truncation=None):
    """The hypergradient of `steps` inner steps by one long graph."""
    x = case.x0.clone().requires_grad_()
    y, state = case.y0.clone(), None
    for t in range(steps):
        if truncation is not None and t == steps - truncation:
            y = y.detach()
        leaf = y if y.requires_grad else y.clone().requires_grad_()
        (slope,) = torch.autograd.grad(case.problem.lower(x, leaf), leaf, create_graph=True)
        y, state = optimizer.step(leaf, slope, optimizer.init(y.detach()) if state is None else state)
        if truncation is not None and t < steps - truncation:
            y = y.detach()
            state = type(state)(**{k: v.detach() if torch.is_tensor(v) else v for k, v in vars(state).items()})
    return torch.autograd.grad(case.problem.upper(x, y), x)[0]


OPTIMIZERS = [
    implicit.SGD(0.05, momentum=0.8), implicit.Adam(0.05), implicit.AdamW(0.05, weight_decay=0.1),
    implicit.SGD(0.05),
]  # fmt: skip


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__ + str(getattr(o, "momentum", "")))
def test_modes_agree_with_one_long_graph(optimizer):
    case, steps = quadratic(5, 3), 60
    truth = by_hand(case, optimizer, steps)
    for method in (
        bilevel.Unrolled(steps=steps, optimizer=optimizer),
        bilevel.Unrolled(steps=steps, optimizer=optimizer, mode="forward"),
        bilevel.Unrolled(steps=steps, optimizer=lambda x, t: optimizer),
        bilevel.RealTime(steps=steps, optimizer=optimizer),
    ):
        state = method.init(case.problem, case.x0, case.y0)
        assert relative(state.hypergradient, truth) < 1e-10, method
    truth = by_hand(case, optimizer, steps, truncation=7)
    state = bilevel.Unrolled(steps=steps, optimizer=optimizer, truncation=7).init(case.problem, case.x0, case.y0)
    assert relative(state.hypergradient, truth) < 1e-10
    assert int(state.pulled) == 7
    assert int(state.inner) == steps
    # the steps before the truncated ones were taken: the iterate is that of all of them
    whole = bilevel.Unrolled(steps=steps, optimizer=optimizer).init(case.problem, case.x0, case.y0)
    assert torch.equal(state.y_vector, whole.y_vector)


def test_differences_agree_with_the_graph():
    case = quadratic(5, 3)
    for optimizer in (implicit.SGD(0.05), implicit.SGD(0.05, momentum=0.8)):
        truth = by_hand(case, optimizer, 40)
        state = bilevel.DARTS(steps=40, optimizer=optimizer).init(case.problem, case.x0, case.y0)
        assert relative(state.hypergradient, truth) < 1e-7
    # one step, as published: F_x - xi (f_x(y + e d) - f_x(y - e d)) / 2e with d = F_w
    xi, x, y = 0.05, case.x0.clone().requires_grad_(), case.y0.clone().requires_grad_()
    (slope,) = torch.autograd.grad(case.problem.lower(x, y), y, create_graph=True)
    w = (y - xi * slope).detach().requires_grad_()
    F_x, d = torch.autograd.grad(case.problem.upper(x, w), [x, w])
    e = 0.01 / d.norm()
    ahead, behind = (torch.autograd.grad(case.problem.lower(x, y + s * e * d), x)[0] for s in (1, -1))
    state = bilevel.DARTS.published(xi).init(case.problem, case.x0, case.y0)
    assert relative(state.hypergradient, F_x - xi * (ahead - behind) / (2 * e)) < 1e-10
    assert float(state.residuals["adjoint"]) > 0.01  # its bias is measured


def test_the_adjoint_part_is_the_implicit_residual():
    """|dF/dy_0| of gradient steps at the lower solution is |F_y - H v|, and bounds the hypergradient's error."""
    case = quadratic(5, 3)
    y = case.lower_solution(case.x0)
    state = bilevel.Unrolled(steps=10, optimizer=implicit.SGD(0.1)).init(case.problem, case.x0, y)
    H = torch.autograd.functional.hessian(lambda v: case.problem.lower(case.x0, v), y)
    decay = torch.linalg.matrix_power(torch.eye(5, dtype=DOUBLE) - 0.1 * H, 10)
    assert float(state.residuals["adjoint"]) == pytest.approx(float((decay @ (H @ y)).norm()), rel=1e-9)


def test_too_few_steps_stagnate_at_a_measured_bias():
    case = quadratic(5, 3)
    res = bilevel.solve(case.problem, case.x0, case.y0, bilevel.Unrolled(steps=5, warm_start=False))
    assert res.status == Status.STAGNATED
    assert res.residuals["upper"] <= res.tolerance < res.residuals["adjoint"]


def test_bootstrapped_targets():
    """With M = I at the lower solution it is the hypergradient; a metric scales the direction that is matched."""
    case = quadratic(5, 3)
    y = case.lower_solution(case.x0)
    truth = case.hypergradient(case.x0)
    one = bilevel.BMG(bootstrap=3).init(case.problem, case.x0, y)
    assert relative(one.hypergradient, truth) < 1e-6
    two = bilevel.BMG(bootstrap=1, metric=lambda x, y, d: 2 * d).init(case.problem, case.x0, y)
    direct = bilevel.Unrolled().init(case.problem, case.x0, y)
    F_x = torch.autograd.grad(case.problem.upper(z := case.x0.clone().requires_grad_(), y), z)[0]
    assert relative(two.hypergradient - F_x, 2 * (direct.hypergradient - F_x)) < 1e-6


@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_resume_is_exact(method, tmp_path):
    case = quadratic(5, 3)
    part = replace(method, stopping=Stopping(rtol=1e-6, max_iter=4))
    whole = bilevel.solve(case.problem, case.x0, case.y0, part)
    path = tmp_path / "run"

    def kill(k, state):
        if k == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bilevel.solve(case.problem, case.x0, case.y0, part, callbacks=[bilevel.Checkpoint(path, every=1), kill])
    rest = bilevel.solve(case.problem, case.x0, case.y0, part, callbacks=[bilevel.Checkpoint(path, every=1)])
    assert torch.equal(vector(rest.x), vector(whole.x))
    assert rest.counts == whole.counts
    assert rest.error == whole.error


@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_float32(method):
    case = quadratic(5, 3, dtype=torch.float32)
    res = bilevel.solve(case.problem, case.x0, case.y0, method)
    assert res.converged, (res.status, res.residuals, res.tolerance)
    assert res.x.dtype == torch.float32
    assert relative(res.x, case.x_star) < 1e-3


def test_sets_and_trees():
    case = quadratic(5, 3)
    low = case.x_star + torch.tensor([0.5, -9.0, -9.0], dtype=DOUBLE)
    tree = bilevel.Problem(
        lambda x, y: case.problem.upper(torch.cat([x["a"], x["b"]]), y),
        lambda x, y: case.problem.lower(torch.cat([x["a"], x["b"]]), y),
        upper_set={"a": constrained.Box(low[:1], float("inf")), "b": None},
    )
    for method in (bilevel.Unrolled(), bilevel.RealTime()):
        res = bilevel.solve(tree, {"a": case.x0[:1], "b": case.x0[1:].clone()}, case.y0, method)
        assert res.converged
        assert float(res.x["a"]) == float(low[0])
        slope = case.hypergradient(torch.cat([res.x["a"], res.x["b"]]))
        assert float(slope[0]) > 0
        assert float(slope[1:].norm()) < 1e-5


one = torch.ones(3, dtype=DOUBLE)


@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_refusals(method):
    def upper(x, y):
        return ((y - 1) ** 2).sum()

    def lower(x, y):
        return ((y - x) ** 2).sum()

    with pytest.raises(ValueError, match="forgotten"):
        tree = {"used": one, "forgotten": one.clone()}
        bilevel.solve(bilevel.Problem(upper, lambda x, y: lower(x["used"], y)), tree, one.clone(), method)
    captured = torch.tensor(0.5, dtype=DOUBLE, requires_grad=True)
    with pytest.raises(ValueError, match="captured"):
        bilevel.solve(
            bilevel.Problem(upper, lambda x, y: lower(x, y) + captured * (y**2).sum()), one, one.clone(), method
        )
    with pytest.raises(ValueError, match=r"lower_set.*bilevel\.AID"):
        bilevel.solve(bilevel.Problem(upper, lower, lower_set=constrained.Box(0.0, 1.0)), one, one.clone(), method)
    with pytest.raises(ValueError, match="share memory"):
        bilevel.solve(bilevel.Problem(upper, lower), one, one, method)
    res = bilevel.solve(bilevel.Problem(upper, lambda x, y: lower(x, y) * math.nan), one, 0 * one, method)
    assert res.status == Status.NON_FINITE


def test_step_sizes_that_cannot_work():
    case = quadratic(5, 3)  # curvatures from 1 to 10
    for method in (
        bilevel.Unrolled(steps=10, optimizer=implicit.SGD(0.21)), bilevel.DARTS(steps=1, optimizer=implicit.SGD(0.21)),
        bilevel.Replay(steps=10, optimizer=implicit.SGD(0.4, momentum=0.9)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"below 0\.\d+"):
            bilevel.solve(case.problem, case.x0, case.y0, method)
    for bad in (
        lambda: bilevel.Unrolled(mode="sideways"),
        lambda: bilevel.Unrolled(truncation=0),
        lambda: bilevel.Unrolled(truncation=3, mode="forward"),
        lambda: bilevel.Unrolled(steps=0),
        lambda: bilevel.BDA(weight=1.0),
        lambda: bilevel.BMG(bootstrap=0),
        lambda: bilevel.DARTS(epsilon=0.0),
        lambda: bilevel.DARTS(optimizer=implicit.SGD(0.1, weight_decay=0.1)),
        lambda: bilevel.RealTime(steps=None),
        lambda: bilevel.Replay(branching=1),
    ):
        with pytest.raises(ValueError, match=r"\w+: "):
            bad()
    for wrong in (implicit.Adam(0.1), torch.optim.SGD([torch.ones(1)], 0.1)):
        with pytest.raises(TypeError, match="optimizer"):
            bilevel.DARTS(optimizer=wrong)


def test_divergence_names_the_step_and_keeps_the_last_good_state():
    problem = bilevel.Problem(lambda x, y: ((y - x) ** 2).sum(), lambda x, y: -(y**2).sum() / 2 + x @ y)
    start = torch.ones(2, dtype=DOUBLE), 2 * torch.ones(2, dtype=DOUBLE)
    method = bilevel.Unrolled(steps=100, optimizer=implicit.SGD(0.5))  # grows by 1.5 a step: 1e10 after 57
    res = bilevel.solve(problem, *start, method)
    assert res.status == Status.DIVERGED
    assert 50 <= int(res.state.diverged_at) <= 60
    assert bool(torch.isfinite(res.y).all())
    assert torch.equal(res.x, start[0])
    res = bilevel.solve(problem, *start, bilevel.Unrolled())
    assert not res.converged


def test_divergence_along_the_way_keeps_the_last_good_state():
    """The upper level drives the lower curvature exp(x) beyond 2 / lr = 4."""
    problem = bilevel.Problem(lambda x, y: -x.sum() + 0 * y.sum(), lambda x, y: (x.exp() * y**2).sum() / 2)
    start = torch.zeros(1, dtype=DOUBLE), torch.ones(1, dtype=DOUBLE)
    method = bilevel.Unrolled(
        steps=120, optimizer=implicit.SGD(0.5), upper_step=bilevel.ConstantStep(0.3), warm_start=False
    )
    res = bilevel.solve(problem, *start, method)
    assert res.status == Status.DIVERGED
    assert abs(float(res.x) - 1.2) < 1e-12  # the last multiple of 0.3 with exp(x) < 4
    assert abs(float(res.y)) < 1e-6
    assert 0 < int(res.state.diverged_at) < 120
    with pytest.raises(linalg.SolverError, match=rf"Inner step {int(res.state.diverged_at)} ran away.*last good"):
        res.unwrap()


BIASED = [
    bilevel.Unrolled(truncation=3, stopping=Stopping(rtol=None, max_iter=5)),
    bilevel.DARTS.published(0.1),
    bilevel.BMG(
        metric=lambda x, y, d: d * torch.tensor([1.0, 3.0, 1.0, 1.0, 1.0], dtype=DOUBLE),
        stopping=Stopping(rtol=1e-3, max_iter=15),
    ),
]


@pytest.mark.parametrize("method", BIASED, ids=["truncated", "one step", "metric"])
def test_a_bias_is_measured_and_said(method):
    case = quadratic(5, 3)
    res = bilevel.solve(case.problem, case.x0, case.y0, method)
    said = Status.STAGNATED, Status.MAX_ITER, Status.LINE_SEARCH_FAILED
    assert res.status in said, (res.status, res.residuals, res.tolerance)
    assert relative(res.x, case.x_star) > 1e-4
    assert max(value for name, value in res.residuals.items() if name != "upper") > res.tolerance
    with pytest.raises(linalg.SolverError, match="none that steps in x lower"):
        res.unwrap()


@pytest.mark.parametrize(
    "sgd",
    [
        implicit.SGD(1.0), implicit.SGD(1.0, momentum=0.9), implicit.SGD(1.0, momentum=0.9, nesterov=True),
        implicit.SGD(1.0, momentum=0.5, dampening=0.5), implicit.SGD(1.0, weight_decay=3.0),
    ],
    ids=["plain", "momentum", "nesterov", "dampening", "weight decay"],
)  # fmt: skip
def test_the_bound_of_step_sizes_is_the_last_that_works(sgd):
    case = quadratic(5, 3)
    with pytest.raises(ValueError, match="must be below") as caught:
        bilevel.Unrolled(steps=1, optimizer=sgd).init(case.problem, case.x0, case.y0)
    bound = float(str(caught.value).split("must be below ")[1].split(",")[0])
    ends = []
    for lr in (0.97 * bound, 1.03 * bound):
        y, state = torch.ones(1, dtype=DOUBLE), sgd.init(torch.ones(1, dtype=DOUBLE))
        for _ in range(1000):
            y, state = replace(sgd, lr=lr).step(y, 10 * y, state)
        ends.append(abs(float(y)))
    assert ends[0] < 1e-3
    assert ends[1] > 1e3


def test_the_start_is_not_held_through_the_run():
    """Neither its vectors, nor the graphs of any evaluation, nor y0 where it is not needed again."""
    case, seen, alive = quadratic(5, 3), [], []

    def watch(k, state):
        seen.append(weakref.ref(state.hypergradient))
        alive.append(len({id(ref()) for ref in seen if ref() is not None}))

    method = bilevel.Unrolled(steps=5, truncation=2, optimizer=implicit.SGD(0.1))
    res = bilevel.solve(case.problem, case.x0, case.y0, method, callbacks=[watch])
    assert res.iterations > 5
    assert max(alive) == 1  # that of the state at hand
    assert res.state.y_first.numel() == 0
    # nothing is spent on f's curvature but what the refusal of a step size needs
    counts = method.init(case.problem, case.x0, case.y0).counts
    assert (counts.products, counts.lower_gradients) == (2, 11 + 1 + 5 + 1 + 2)


def test_each_inner_step_has_its_batch():
    g = torch.Generator().manual_seed(0)
    A = torch.randn(64, 3, generator=g, dtype=DOUBLE)
    b = A @ torch.ones(3, dtype=DOUBLE) + 0.1 * torch.randn(64, generator=g, dtype=DOUBLE)

    def lower(x, y, batch):
        rows, t = batch
        return ((rows @ y - t) ** 2).mean() / 2 + x.exp() * (y**2).sum() / 2

    problem = bilevel.Problem(lambda x, y, batch: ((batch[0] @ y - batch[1]) ** 2).mean(), lower)
    x0, y0 = torch.tensor(0.0, dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE)
    cut = [(A[i : i + 16], b[i : i + 16]) for i in range(0, 64, 16)]
    data = PerStep(upper=(A, b), lower=lambda t: cut[t % 4])
    sgd = implicit.SGD(0.1)
    state = bilevel.Unrolled(steps=30, optimizer=sgd).init(problem, x0, y0, data)
    x = x0.clone().requires_grad_()
    y = y0
    for t in range(30):
        y = y if y.requires_grad else y.clone().requires_grad_()
        (slope,) = torch.autograd.grad(lower(x, y, cut[t % 4]), y, create_graph=True)
        y = y - 0.1 * slope
    truth = torch.autograd.grad(problem.upper(x, y, (A, b)), x)[0]
    assert relative(state.hypergradient, truth) < 1e-10
    # draws of a source: every inner step another block
    batches = bilevel.Batches((A, b), batch_size=16, seed=3)
    method = bilevel.Unrolled(
        steps=20, optimizer=sgd, upper_step=bilevel.ConstantStep(0.5), stopping=Stopping(max_iter=3)
    )
    runs = [bilevel.solve(problem, x0, y0, method, data=batches) for _ in range(2)]
    assert torch.equal(runs[0].x, runs[1].x)
    assert float(runs[0].x) < 0  # less ridge fits better


def test_random_objectives_are_the_same_in_every_pass():
    """Noise drawn in f: each inner step has its own, and steps that are computed again draw the same."""
    problem = bilevel.Problem(
        lambda x, y: ((y - 1) ** 2).sum(),
        lambda x, y: ((y - x) ** 2 * (1 + 0.5 * torch.rand(3, dtype=DOUBLE))).sum() / 2,
    )
    method = bilevel.Unrolled(steps=40, optimizer=implicit.SGD(0.1), warm_start=False)
    before = torch.get_rng_state()
    state = method.init(problem, 0.3 * one, 0 * one)
    assert torch.equal(before, torch.get_rng_state())
    spaces = Spaces.of(0.3 * one, 0 * one)
    assert int(state.seed) == 0
    steps = InnerSteps(problem, spaces, seed=0)
    h, d = 1e-5, torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE)
    values = []
    for sign in (1, -1):
        f = method._forward(steps, 0.3 * one + sign * h * d, 0 * one, 0.0, state.coefficients)
        values.append(float(f.value))
    assert (values[0] - values[1]) / (2 * h) == pytest.approx(float(state.hypergradient @ d), rel=1e-6)


def test_counts_and_assumptions():
    case = quadratic(5, 3)
    state = bilevel.Unrolled(steps=30, optimizer=implicit.SGD(0.05)).init(case.problem, case.x0, case.y0)
    assert state.counts.products >= 30
    assert state.counts.lower_gradients >= 60
    rows = {row["method"]: row for row in bilevel.methods()}
    for method in METHODS:
        assert rows[type(method).__name__]["family"] == "through the solver"
    assert not rows["BDA"]["unique"]


def test_pinned():
    res = bilevel.solve(*(lambda c: (c.problem, c.x0, c.y0))(quadratic(5, 3)), bilevel.Unrolled())
    assert res.iterations == 8
    hg = bilevel.hypergradient(quadratic(5, 3).problem, res.x, res.y, linalg.Cholesky(), certificate=False)
    assert float(vector(hg.value).norm()) < 1e-6
