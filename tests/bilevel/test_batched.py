"""Many problems at once: folds and tasks that share x, and seeds with an x of their own."""

import functools
import math
from dataclasses import replace

import pytest
import torch
from laws_bilevel import relative, vector
from problems import DOUBLE
from torch.nn.functional import binary_cross_entropy_with_logits

from nestopt import bilevel, constrained, implicit, linalg
from nestopt.linalg import Status, Stopping

K = 5


class Folds:
    """K-fold cross-validation of a ridge or logistic regression with one log penalty a feature."""

    def __init__(self, kind="ridge", n=60, p=4, dtype=DOUBLE):
        g = torch.Generator().manual_seed(0)
        X = torch.randn(n, p, generator=g, dtype=DOUBLE)
        t = X @ torch.randn(p, generator=g, dtype=DOUBLE) + torch.randn(n, generator=g, dtype=DOUBLE)
        self.kind, self.p = kind, p
        t = t if kind == "ridge" else (t > 0).double()
        held = torch.arange(n).reshape(K, n // K)
        rest = torch.stack([torch.tensor([i for i in range(n) if i not in set(rows.tolist())]) for rows in held])
        self.train, self.t = X[rest].to(dtype), t[rest].to(dtype)
        self.test, self.u = X[held].to(dtype), t[held].to(dtype)
        self.x0, self.y0 = torch.full((p,), -2.0, dtype=dtype), torch.zeros(K, p, dtype=dtype)

    def loss(self, X, t, y):
        out = (X @ y[..., None])[..., 0]
        if self.kind == "ridge":
            return ((out - t) ** 2).mean(-1) / 2
        return binary_cross_entropy_with_logits(out, t, reduction="none").mean(-1)

    def penalty(self, x, y):
        # bounded below, so that a feature that should go or stay for good has a finite optimum
        return ((0.01 + x.exp()) * y**2).sum(-1) / 2

    def upper(self, x, y):
        return self.loss(self.test, self.u, y) + 1e-3 * (x**2).sum(-1)

    def lower(self, x, y):
        return self.loss(self.train, self.t, y) + self.penalty(x, y)

    @property
    def problem(self):
        return bilevel.TaskProblem(self.upper, self.lower)

    def fold(self, k):
        return bilevel.Problem(
            lambda x, y: self.loss(self.test[k], self.u[k], y) + 1e-3 * (x**2).sum(),
            lambda x, y: self.loss(self.train[k], self.t[k], y) + self.penalty(x, y),
        )


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_hypergradient_of_folds_is_the_mean_over_a_loop(kind):
    folds = Folds(kind)
    report = bilevel.examine_tasks(folds.problem, folds.x0, folds.y0)
    assert [status.name for status in report.status] == ["CONVERGED"] * K
    hg = bilevel.hypergradient(folds.problem, folds.x0, report.y)
    single = [bilevel.hypergradient(folds.fold(k), folds.x0, report.y[k]) for k in range(K)]
    mean = torch.stack([h.value for h in single]).mean(0)
    assert hg.converged
    assert relative(hg.value, mean) <= 1e-10
    assert float((hg.value - mean).norm()) <= hg.error_bound
    assert hg.products - hg.constants.products <= max(h.products - h.constants.products for h in single) + 2
    assert torch.allclose(report.values, torch.tensor([h.upper for h in single], dtype=DOUBLE), rtol=1e-12)
    if kind == "ridge":  # the closed form, by autograd through a dense solve
        x = folds.x0.clone().requires_grad_()
        n = folds.train.shape[1]
        H = folds.train.mT @ folds.train / n + (0.01 + x.exp()).diag()
        y = torch.linalg.solve(H, (folds.train.mT @ folds.t[..., None])[..., 0] / n)
        (truth,) = torch.autograd.grad(folds.upper(x, y).mean(), x)
        assert relative(hg.value, truth) <= 1e-9


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_cross_validation_in_one_run(kind):
    folds = Folds(kind)
    res = bilevel.solve_tasks(folds.problem, folds.x0, folds.y0)
    assert res.converged, (res.status, res.residuals)
    assert [status.name for status in res.tasks.status] == ["CONVERGED"] * K
    assert not bool(res.excluded.any())
    assert res.value == pytest.approx(float(res.tasks.values.mean()), abs=1e-12)

    # the same problem without its structure: all folds' weights as one y
    flat = bilevel.Problem(lambda x, y: folds.upper(x, y).mean(), lambda x, y: folds.lower(x, y).sum())
    other = bilevel.solve(flat, folds.x0, folds.y0)
    assert other.converged
    assert relative(res.x, other.x) <= 1e-6
    exact = bilevel.AID(warm_start=False)  # solves to the end: each fold's system ends when it is solved
    apart = bilevel.solve(folds.problem, folds.x0, folds.y0, exact)
    assert apart.counts.products < bilevel.solve(flat, folds.x0, folds.y0, exact).counts.products
    cholesky = bilevel.solve(
        folds.problem, folds.x0, folds.y0, bilevel.AID(linear_solver=bilevel.PerTask(linalg.Cholesky()))
    )
    assert relative(cholesky.x, res.x) <= 1e-6


def test_every_method_takes_tasks():
    folds = Folds(n=30, p=2)
    reference = bilevel.solve(folds.problem, folds.x0, folds.y0, bilevel.AID())
    for method in (bilevel.HOAG(stopping=Stopping(rtol=1e-2, max_iter=300)), bilevel.BAMM(stopping=Stopping(1e-2))):
        res = bilevel.solve(folds.problem, folds.x0, folds.y0, method)
        assert res.converged, (method, res.status, res.residuals)
        assert abs(res.value - reference.value) <= 1e-3
    lbfgs = bilevel.solve(folds.problem, folds.x0, folds.y0, bilevel.AID(lower_solver=implicit.LBFGS()))
    assert lbfgs.converged
    assert relative(lbfgs.x, reference.x) <= 1e-6
    boxed = replace(folds.problem, upper_set=constrained.Box(-3.0, 0.0))
    inside = bilevel.solve(boxed, folds.x0, folds.y0, bilevel.AID(stopping=Stopping(rtol=1e-4, max_iter=200)))
    assert inside.converged
    assert float(inside.x.min()) >= -3.0


def meta(tasks=16, n=10, p=4, weight=0.5):
    """Linear regressions on features of sinusoids: y_k is pulled to the shared centre x (iMAML)."""
    g = torch.Generator().manual_seed(3)
    s = 4 * torch.rand(2, tasks, n, 1, generator=g, dtype=DOUBLE)
    frequencies = torch.arange(1, p // 2 + 1, dtype=DOUBLE)
    X, V = torch.cat([torch.sin(s * frequencies), torch.cos(s * frequencies)], -1)
    phase, size = torch.rand(tasks, 1, generator=g, dtype=DOUBLE), 1 + torch.rand(tasks, 1, generator=g, dtype=DOUBLE)
    t, v = (size * torch.sin(part[..., 0] + phase) for part in s)

    def loss(X, t, y):
        return (((X @ y[..., None])[..., 0] - t) ** 2).mean(-1) / 2

    problem = bilevel.TaskProblem(
        upper=lambda x, y: loss(V, v, y), lower=lambda x, y: loss(X, t, y) + weight * ((y - x) ** 2).sum(-1) / 2
    )
    H = X.mT @ X / n + weight * torch.eye(p, dtype=DOUBLE)
    A, B = weight * torch.linalg.inv(H), torch.linalg.solve(H, X.mT @ t[..., None] / n)  # y_k = A_k x + b_k

    def hypergradient(x):
        y = (A @ x[:, None] + B)[..., 0]
        slope = V.mT @ ((V @ y[..., None])[..., 0] - v)[..., None] / n
        return (A.mT @ slope)[..., 0].mean(0)

    G = (A.mT @ V.mT @ V @ A).mean(0) / n
    r = (A.mT @ V.mT @ (v[..., None] - V @ B)).mean(0)[:, 0] / n
    return problem, hypergradient, torch.linalg.solve(G, r), torch.zeros(p, dtype=DOUBLE), B.new_zeros(tasks, p)


def test_implicit_maml_on_sixteen_tasks():
    problem, hypergradient, x_star, x0, y0 = meta()
    x = x0 + 0.3
    y = bilevel.examine_tasks(problem, x, y0).y
    hg = bilevel.hypergradient(problem, x, y)
    assert hg.converged
    assert relative(hg.value, hypergradient(x)) <= 1e-10
    res = bilevel.solve(problem, x0, y0)
    assert res.converged
    assert relative(res.x, x_star) <= 1e-7
    assert res.iterations <= 15  # pinned
    for back_end in (linalg.Neumann(), linalg.NystromCG(rank=2), linalg.MINRES(), linalg.LDL(), linalg.Auto()):
        other = bilevel.hypergradient(problem, x, y, bilevel.PerTask(back_end))
        assert relative(other.value, hypergradient(x)) <= 1e-8, back_end


def broken(fault):
    """Three quadratic tasks with the answer x = mean of what they want, the second of which has a fault."""
    centres = torch.tensor([[1.0, 0.0], [2.0, 5.0], [6.0, 2.0]], dtype=DOUBLE)
    curvature = torch.full((3, 1), 0.5, dtype=DOUBLE)
    if fault == Status.NON_FINITE:
        centres[1, 0] = math.nan
    elif fault == Status.DIVERGED:
        curvature[1] = -2.0
    problem = bilevel.TaskProblem(
        upper=lambda x, y: ((y - centres) ** 2).sum(-1),
        lower=lambda x, y: ((y - x) ** 2).sum(-1) / 2 + (curvature * (y - centres) ** 2).sum(-1),
    )
    return problem, torch.zeros(2, dtype=DOUBLE), torch.ones(3, 2, dtype=DOUBLE), (centres[0] + centres[2]) / 2


@pytest.mark.parametrize("fault", [Status.NON_FINITE, Status.DIVERGED])
def test_a_task_that_fails_stops_the_run_or_is_left_out_and_named(fault):
    problem, x0, y0, answer = broken(fault)
    stopped = bilevel.solve_tasks(problem, x0, y0)
    assert stopped.status == fault
    assert [status.name for status in stopped.tasks.status] == ["CONVERGED", fault.name, "CONVERGED"]
    assert not bool(stopped.excluded.any())

    res = bilevel.solve_tasks(problem, x0, y0, drop_failed=True)
    assert res.converged
    assert res.excluded.tolist() == [False, True, False]
    assert [status.name for status in res.tasks.status] == ["CONVERGED", fault.name, "CONVERGED"]
    assert relative(res.x, answer) <= 1e-8
    assert bool(res.y[1].isnan().all())
    assert bool(torch.isfinite(res.y[[0, 2]]).all())
    assert res.value == pytest.approx(float(res.tasks.values[[0, 2]].mean()), rel=1e-10)
    assert res.tasks.failed.tolist() == [False, True, False]

    # a loop without the task takes the same steps
    alone = bilevel.solve_tasks(problem.without(torch.tensor([False, True, False])), x0, y0)
    assert torch.equal(alone.x, res.x)


def test_all_tasks_failing_is_not_dropped():
    problem = bilevel.TaskProblem(
        upper=lambda x, y: (y**2).sum(-1), lower=lambda x, y: math.nan * ((y - x) ** 2).sum(-1)
    )
    res = bilevel.solve_tasks(problem, torch.zeros(2), torch.zeros(3, 2), drop_failed=True)
    assert res.status == Status.NON_FINITE
    assert res.tasks.failed.all()


def test_a_nan_times_x_ends_the_run():
    """The limit that solve_tasks documents: zero times NaN."""
    data = torch.tensor([[1.0], [math.nan]], dtype=DOUBLE)
    problem = bilevel.TaskProblem(
        upper=lambda x, y: (y**2).sum(-1), lower=lambda x, y: (y**2).sum(-1) - (y * data * x).sum(-1)
    )
    x0, y0 = torch.ones(1, dtype=DOUBLE), torch.zeros(2, 1, dtype=DOUBLE)
    res = bilevel.solve_tasks(problem, x0, y0, drop_failed=True)
    assert res.status == Status.NON_FINITE


def test_task_problems_refuse_what_they_cannot_mean():
    x, y = torch.zeros(2, dtype=DOUBLE), torch.zeros(3, 2, dtype=DOUBLE)
    scalar = bilevel.TaskProblem(lambda x, y: (y**2).sum(), lambda x, y: ((y - x) ** 2).sum())
    with pytest.raises(ValueError, match="one value a task"):
        bilevel.solve(scalar, x, y)
    coupled = bilevel.TaskProblem(lambda x, y: (y**2).sum(-1), lambda x, y: ((y - x - y.mean(0)) ** 2).sum(-1) + x[0])
    with pytest.raises(ValueError, match="independent"):
        bilevel.solve(coupled, x, y + torch.arange(3)[:, None])
    with pytest.raises(ValueError, match="batch_dims"):
        bilevel.TaskProblem(lambda x, y: y, lambda x, y: y, batch_dims=0)
    with pytest.raises(ValueError, match="at least one task"):
        scalar.without(torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match="TaskProblem"):
        bilevel.solve_tasks(bilevel.Problem(lambda x, y: y, lambda x, y: y), x, y)
    with pytest.raises(ValueError, match="PerTask"):
        plain = bilevel.Problem(lambda x, y: (y**2).sum(), lambda x, y: ((y - x) ** 2).sum())
        bilevel.hypergradient(plain, x, x.clone(), bilevel.PerTask())
    with pytest.raises(ValueError, match="one problem at a time"):
        good = bilevel.TaskProblem(lambda x, y: (y**2).sum(-1), lambda x, y: ((y - x) ** 2).sum(-1))
        bilevel.solve(good, x, y, bilevel.AID(lower_solver=implicit.LazyNewton()))


def test_tasks_in_dicts_with_a_scalar_a_task_and_data():
    g = torch.Generator().manual_seed(1)
    X, t = torch.randn(4, 8, 3, generator=g, dtype=DOUBLE), torch.randn(4, 8, generator=g, dtype=DOUBLE)

    def loss(y, d):
        X, t = d
        return (((X @ y["w"][..., None])[..., 0] + y["b"][:, None] - t) ** 2).mean(-1)

    problem = bilevel.TaskProblem(
        upper=lambda x, y, d: loss(y, (d[0], d[1].flip(-1))),
        lower=lambda x, y, d: loss(y, d) + x["s"].exp() * (y["w"] ** 2).sum(-1) + 0.1 * y["b"] ** 2,
    )
    x0 = {"s": torch.tensor(-1.0, dtype=DOUBLE)}
    y0 = {"w": torch.zeros(4, 3, dtype=DOUBLE), "b": torch.zeros(4, dtype=DOUBLE)}
    data = (X, t)
    y = {name: leaf.clone() for name, leaf in bilevel.examine_tasks(problem, x0, y0, data=data).y.items()}
    hg = bilevel.hypergradient(problem, x0, y, data=data)
    loop = 0.0
    for k in range(4):
        part = (X[k : k + 1], t[k : k + 1])
        yk = {name: leaf[k : k + 1] for name, leaf in y.items()}
        loop += bilevel.hypergradient(problem, x0, yk, data=part).value["s"] / 4
    assert hg.converged
    assert relative(hg.value["s"], loop) <= 1e-10
    left_out = problem.without(torch.tensor([False, True, False, False]))
    assert bilevel.hypergradient(left_out, x0, y, data=data).status == Status.NOT_STATIONARY  # its y belongs at zero


def runaway():
    """f_k = (2 - x) y^2 / 2 - y has no minimiser beyond x = 2; the answer is x = 4/3."""
    goals = torch.tensor([[1.0], [2.0]], dtype=DOUBLE)
    return bilevel.TaskProblem(lambda x, y: ((y - goals) ** 2).sum(-1), lambda x, y: ((2 - x) * y**2 / 2 - y).sum(-1))


def test_a_step_where_tasks_have_no_minimiser_is_shortened():
    x0, y0 = torch.zeros(1, dtype=DOUBLE), torch.zeros(2, 1, dtype=DOUBLE)
    method = bilevel.AID(upper_step=bilevel.QuasiNewtonStep(first=5.0))
    res = bilevel.solve_tasks(runaway(), x0, y0, method, drop_failed=True)
    assert res.converged, (res.status, res.residuals)
    assert float(res.x) == pytest.approx(4 / 3, rel=1e-8)
    assert not bool(res.excluded.any())


# independent problems


def seeds(B=8, p=3, dtype=DOUBLE, upper_set=None):
    """B ridge problems with their own data, log penalties and weights."""
    g = torch.Generator().manual_seed(7)
    X, V = (torch.randn(B, 20, p, generator=g, dtype=DOUBLE).to(dtype) for _ in range(2))
    w = torch.randn(B, p, 1, generator=g, dtype=DOUBLE).to(dtype)
    t, v = ((part @ w)[..., 0] + 0.5 * torch.randn(B, 20, generator=g, dtype=DOUBLE).to(dtype) for part in (X, V))

    def make(rows):
        def fit(P, q, y):
            return (((P[rows] @ y[..., None])[..., 0] - q[rows]) ** 2).mean(-1)

        return bilevel.Problem(
            lambda x, y: fit(V, v, y) + 0.01 * (x**2).sum(-1),
            lambda x, y: fit(X, t, y) + (x.exp() * y**2).sum(-1) + 0.1 * (torch.cos(y) * x).sum(-1) ** 2,
            upper_set=upper_set,
        )

    x0 = -1 + 0.5 * torch.randn(B, p, generator=g, dtype=DOUBLE).to(dtype)
    return make, x0, torch.zeros(B, p, dtype=dtype)


@functools.cache
def eight():
    """The answer of all eight, which many tests compare with."""
    make, x0, y0 = seeds()
    return bilevel.BatchedAID()(make(slice(None)), x0, y0)


def test_eight_seeds_are_what_a_loop_gives():
    make, x0, y0 = seeds()
    method, res = bilevel.BatchedAID(), eight()
    assert bool(res.converged.all()), res.status
    assert bool((res.error <= res.tolerance).all())
    assert torch.equal(res.error, torch.stack(list(res.residuals.values())).amax(0))
    loop = [method(make(slice(k, k + 1)), x0[k : k + 1], y0[k : k + 1]) for k in range(2)]
    assert relative(res.x[:2], torch.cat([r.x for r in loop])) <= 1e-10
    assert res.iterations[:2].tolist() == [int(r.iterations) for r in loop]
    alone = bilevel.solve(make(0), x0[0], y0[0], bilevel.AID())  # another step rule, the same answer
    assert alone.converged
    assert relative(res.x[0], alone.x) <= 1e-6
    # eight cost less than twice what the dearer of two costs alone
    assert res.counts.lower_solves <= 2 * max(r.counts.lower_solves for r in loop)
    assert int(res.iterations.max()) <= 25  # pinned


def test_residuals_of_a_batch_are_measured():
    (make, _, _), res = seeds(), eight()
    for k in range(3):
        hg = bilevel.hypergradient(make(k), res.x[k], res.y[k], linalg.Cholesky(), certificate=False)
        assert abs(hg.lower_gradient_norm - float(res.residuals["lower"][k])) <= 1e-3 * float(res.tolerance[k])
        assert float(vector(hg.value).norm()) <= 1.1 * float(res.tolerance[k])
        assert hg.upper == pytest.approx(float(res.value[k]), rel=1e-10)


def test_a_set_keeps_every_item():
    box = constrained.Box(-2.0, -1.5)
    make, x0, y0 = seeds(B=4, upper_set=box)
    res = bilevel.BatchedAID()(make(slice(None)), x0, y0)
    assert bool(res.converged.all()), (res.status, res.error)
    assert float(res.x.min()) >= -2.0
    assert float(res.x.max()) <= -1.5
    alone = bilevel.solve(make(0), x0[0], y0[0], bilevel.AID())
    assert relative(res.x[0], alone.x) <= 1e-6


def test_only_the_item_with_nan_drops_out():
    make, x0, y0 = seeds()
    x0 = x0[:3].clone()
    x0[1, 0] = math.nan
    res = bilevel.BatchedAID()(make(slice(3)), x0, y0[:3])
    assert [status.name for status in res.status] == ["CONVERGED", "NON_FINITE", "CONVERGED"]
    assert relative(res.x[[0, 2]], eight().x[[0, 2]]) <= 1e-10
    assert int(res.iterations[1]) == 0
    with pytest.raises(linalg.SolverError, match="1 of 3 NON_FINITE"):
        res.unwrap()


def test_items_without_a_lower_minimiser_are_named():
    curvature = torch.tensor([[1.0], [0.0], [-1.0]], dtype=DOUBLE)
    problem = bilevel.Problem(
        lambda x, y: ((y - 1) ** 2).sum(-1),
        lambda x, y: (curvature * (y[..., :1] - x) ** 2).sum(-1) + (y[..., 1:] ** 2).sum(-1),
    )
    res = bilevel.BatchedAID()(problem, torch.zeros(3, 1, dtype=DOUBLE), torch.full((3, 2), 0.5, dtype=DOUBLE))
    assert res.status[0] == Status.CONVERGED
    assert res.status[1] == Status.SINGULAR
    assert res.status[2] in (Status.DIVERGED, Status.NEGATIVE_CURVATURE)


def test_a_trial_without_a_lower_minimiser_is_refused():
    goals = torch.tensor([[1.0], [40.0]], dtype=DOUBLE)  # the second pulls x close to 2
    problem = bilevel.Problem(lambda x, y: ((y - goals) ** 2).sum(-1), lambda x, y: ((2 - x) * y**2 / 2 - y).sum(-1))
    start = torch.zeros(2, 1, dtype=DOUBLE)
    res = bilevel.BatchedAID()(problem, start, start.clone())
    assert bool(res.converged.all()), (res.status, res.error)
    assert torch.allclose(res.x, 2 - 1 / goals, rtol=1e-6)


def test_resume_and_the_loop_by_hand():
    (make, x0, y0), whole = seeds(), eight()
    problem = make(slice(None))
    half = bilevel.BatchedAID(stopping=Stopping(rtol=None, max_iter=3))(problem, x0, y0)
    assert bool((half.status == Status.MAX_ITER).all())
    rest = bilevel.BatchedAID()(problem, x0, y0, state=half.state)
    assert torch.equal(rest.x, whole.x)
    assert torch.equal(rest.iterations, whole.iterations)
    assert rest.counts == whole.counts
    method = bilevel.BatchedAID()
    state = method.init(problem, x0, y0)
    for _ in range(3):
        state = method.step(problem, state)
    assert torch.equal(state.points.y, half.state.points.y)
    seen = []
    bilevel.BatchedAID(stopping=Stopping(rtol=None, max_iter=1))(
        problem, x0, y0, callbacks=[lambda k, s: seen.append(k)]
    )
    assert seen == [0, 1]


class Killed(Exception):
    """Ends a run from outside."""


@pytest.mark.parametrize("upper_set", [None, constrained.Box(-2.0, -1.5)], ids=["free", "box"])
def test_solve_takes_a_batch_and_a_checkpoint_resumes_it(upper_set, tmp_path):
    make, x0, y0 = seeds(B=3, upper_set=upper_set)
    x0 = x0.clone()
    x0[1, 0] = math.nan  # an item that has ended stays as it was
    problem, method, path = make(slice(3)), bilevel.BatchedAID(), tmp_path / "run.pt"
    bar = bilevel.ProgressBar(disable=True)
    whole = bilevel.solve(problem, x0, y0, method, callbacks=[bar])
    assert [status.name for status in whole.status] == ["CONVERGED", "NON_FINITE", "CONVERGED"]
    assert whole.method == method
    assert len(whole.history) == int(whole.iterations.max()) + 1
    assert whole.history[-1]["error"][2] == float(whole.error[2])
    assert whole.history[-1]["lower_solves"] == whole.counts.lower_solves

    def kill(k, state):
        if int(state.iterations.max()) == 3:
            raise Killed

    with pytest.raises(Killed):
        bilevel.solve(problem, x0, y0, method, callbacks=[bilevel.Checkpoint(path, every=1), kill])
    rest = bilevel.solve(problem, x0, y0, method, callbacks=[bilevel.Checkpoint(path)])
    for name in ("x", "y", "error", "iterations", "codes"):
        assert torch.equal(getattr(rest, name).nan_to_num(7.0), getattr(whole, name).nan_to_num(7.0)), name
    assert rest.counts == whole.counts
    assert [r["lower_solves"] for r in rest.history] == [r["lower_solves"] for r in whole.history]
    again = bilevel.solve(problem, x0, y0, method, callbacks=[bilevel.Checkpoint(path)])
    assert again.counts == whole.counts  # the end was saved, and nothing is left to do
    with pytest.raises(ValueError, match="the saved run has a batch of"):
        bilevel.solve(make(slice(2)), x0[:2], y0[:2], method, callbacks=[bilevel.Checkpoint(path)])


def test_data_of_a_batch():
    goals = torch.tensor([[1.0], [2.0]], dtype=DOUBLE)
    problem = bilevel.Problem(
        lambda x, y, d: ((y - d) ** 2).sum(-1), lambda x, y, d: (1.5 * y**2 - x * y).sum(-1) + 0 * d.sum()
    )
    start = torch.zeros(2, 1, dtype=DOUBLE)
    res = bilevel.solve(problem, start, start.clone(), bilevel.BatchedAID(), data=lambda k: goals)
    assert torch.allclose(res.x, 3 * goals)
    with pytest.raises(TypeError, match="data must be a function k -> batch"):
        bilevel.solve(problem, start, start.clone(), bilevel.BatchedAID(), data=goals)
    with pytest.raises(ValueError, match="held and check_every are for stochastic methods"):
        bilevel.solve(problem, start, start.clone(), bilevel.BatchedAID(), data=lambda k: goals, held=goals)


def test_float32_dicts_and_other_solvers():
    make, x0, y0 = seeds(B=2, dtype=torch.float32)
    res = bilevel.BatchedAID()(make(slice(None)), x0, y0)
    assert bool(res.converged.all())
    assert res.x.dtype == torch.float32
    make, x0, y0 = seeds()
    problem, x0, y0, plain = make(slice(2)), x0[:2], y0[:2], eight().x[:2]
    loose = Stopping(rtol=1e-5, max_iter=200)
    method = bilevel.BatchedAID(lower_solver=implicit.LBFGS(), linear_solver=linalg.Cholesky(), stopping=loose)
    other = method(problem, x0, y0)
    assert bool(other.converged.all())
    assert relative(other.x, plain) <= 1e-3
    tree = bilevel.Problem(
        lambda x, y: problem.upper(torch.cat([x["a"], x["s"][:, None]], -1), y[0]),
        lambda x, y: problem.lower(torch.cat([x["a"], x["s"][:, None]], -1), y[0]),
        upper_set={"a": constrained.Box(-9.0, 9.0), "s": None},
    )
    found = bilevel.BatchedAID(stopping=loose)(tree, {"a": x0[:, :2], "s": x0[:, 2].clone()}, [y0])
    assert bool(found.converged.all())
    assert relative(torch.cat([found.x["a"], found.x["s"][:, None]], -1), plain) <= 1e-3


def test_batched_refusals():
    make, x0, y0 = seeds(B=2)
    problem = make(slice(None))
    method = bilevel.BatchedAID()
    with pytest.raises(ValueError, match="same batch"):
        method(problem, x0[:1], y0)
    with pytest.raises(ValueError, match="one value an item"):
        method(bilevel.Problem(lambda x, y: problem.upper(x, y).sum(), problem.lower), x0, y0)
    with pytest.raises(ValueError, match="independent"):
        method(bilevel.Problem(lambda x, y: problem.upper(x.flip(0), y), problem.lower), x0, y0)
    with pytest.raises(ValueError, match="lower_set"):
        method(replace(problem, lower_set=constrained.NonNegative()), x0, y0)
    with pytest.raises(ValueError, match="share one x"):
        method(bilevel.TaskProblem(problem.upper, problem.lower), x0, y0)
    with pytest.raises(ValueError, match="batch_dims"):
        bilevel.BatchedAID(batch_dims=0)
    with pytest.raises(TypeError, match=r"bilevel\.Problem"):
        method(None, x0, y0)
