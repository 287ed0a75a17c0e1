"""Minibatches: sources of samples, estimators, and stochastic runs against the full-data answer."""

from dataclasses import replace

import pytest
import torch
from laws_bilevel import vector
from problems import DOUBLE
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from nestopt import bilevel
from nestopt.bilevel import Batches, Polynomial
from nestopt.bilevel.parts import Mapped
from nestopt.linalg import Status, Stopping


def samples(n=60, p=4, seed=1):
    """Noisy enough for the best penalty to be neither zero nor infinite."""
    g = torch.Generator().manual_seed(seed)
    X, Z = torch.randn(n, p, generator=g, dtype=DOUBLE), torch.randn(n, p, generator=g, dtype=DOUBLE)
    w = torch.randn(p, generator=g, dtype=DOUBLE)
    t, u = (P @ w + 2 * torch.randn(n, generator=g, dtype=DOUBLE) for P in (X, Z))
    return (X, t), (Z, u)


def squares(d, y):
    return ((d[0] @ y - d[1]) ** 2).mean() / 2


def logistic(d, y):
    return torch.nn.functional.softplus(-torch.sign(d[1]) * (d[0] @ y)).mean()


def hyperparameter(loss):
    """The log of a ridge penalty, learnt on other samples."""
    return bilevel.Problem(lambda x, y, d: loss(d, y), lambda x, y, d: loss(d, y) + x.exp() * (y**2).sum() / 2)


LOWER, UPPER = samples()
START = torch.tensor(-1.0, dtype=DOUBLE), torch.zeros(4, dtype=DOUBLE)
RIDGE = hyperparameter(squares)


def repr_of(method):
    return type(method).__name__


def answer(problem):
    res = bilevel.AID()(problem, *START, data=Batches(LOWER, UPPER, batch_size=None))
    assert res.converged
    return res


def limited(method, steps, rtol=None):
    return replace(method, stopping=Stopping(rtol=rtol, max_iter=steps))


REDUCED = [
    (bilevel.SABA(), squares),
    (bilevel.SRBA(), squares),
    pytest.param(bilevel.SABA(), logistic, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("method", "loss"), REDUCED, ids=["SABA", "SRBA", "SABA-logistic"])
def test_variance_reduction_reaches_the_full_data_answer(method, loss):
    """Linear convergence to rounding on minibatches with constant steps, as the certificate on all samples shows."""
    problem = hyperparameter(loss)
    truth = answer(problem)
    res = bilevel.solve(problem, *START, limited(method, 4000), data=Batches(LOWER, UPPER, batch_size=20, seed=1))
    assert res.status == Status.CONVERGED, (res.error, res.tolerance, res.residuals)
    assert abs(float(res.x - truth.x)) <= 1e-6 * max(1.0, abs(float(truth.x)))
    assert float((res.y - truth.y).norm()) <= 1e-7


def noise(truth):
    """What one batch's residuals are at the full-data answer, on the root mean square."""
    state, method = truth.state, bilevel.SOBA(step_size=0.1, upper_step=0.1)
    data = Batches(LOWER, UPPER, batch_size=15, seed=1)
    start = method.init(RIDGE, *START, data(0))
    there = replace(start, x_vector=state.x_vector, y_vector=state.y_vector, adjoint=state.adjoint)
    errors = [float(method.measure(RIDGE, there, data.block(i, i)).error) for i in range(4)]
    return sum(e**2 for e in errors) ** 0.5 / 2


PLAIN = [
    (bilevel.SOBA(), 200), (bilevel.TTSA(), 200), (bilevel.MRBO(), 200), (bilevel.AmIGO(), 40),
    (bilevel.StocBiO(terms=30), 40), (bilevel.BAMM(weight=0.02), 200),
]  # fmt: skip


@pytest.mark.parametrize(("method", "steps"), PLAIN, ids=lambda v: type(v).__name__ if not isinstance(v, int) else "")
def test_plain_samples_reach_a_noise_ball(method, steps):
    """Falling steps: the error on all samples ends below that of one batch at the answer, and x beside the answer."""
    truth, far = answer(RIDGE), (START[0] + 2, START[1])
    data = Batches(LOWER, UPPER, batch_size=15, seed=1)
    res = bilevel.solve(RIDGE, *far, limited(method, steps), data=data)
    assert res.status == Status.MAX_ITER
    assert res.error < noise(truth)
    assert abs(float(res.x - truth.x)) < 0.5 * abs(float(far[0] - truth.x))


def fall(method, problem, start, sources, k):
    """The error on all samples after 8 k steps to that after k: root mean squares over sources and the last fifths."""
    squares = {k: [], 8 * k: []}
    method = limited(method, 8 * k, rtol=0.0)
    for source in sources:
        whole = source.whole()

        def watch(_, state, whole=whole):
            i = int(state.iterations)
            for end, seen in squares.items():
                if 0.8 * end <= i <= end and i % (k // 20) == 0:
                    seen.append(float(method.measure(problem, state, whole).error) ** 2)

        bilevel.solve(problem, *start, method, data=lambda i, source=source: source(i), callbacks=[watch])
    first, last = ((sum(seen) / len(seen)) ** 0.5 for seen in squares.values())
    return last / first


@pytest.mark.slow
def test_momentum_lets_the_noise_vanish():
    """MRBO's error falls like k^(-1/2), to 0.35 over eight times the steps; by its steps alone, like k^(-1/4)."""
    truth = answer(RIDGE)
    start = truth.x + 0.5, truth.y
    sources = [Batches(LOWER, UPPER, batch_size=15, seed=seed) for seed in (1, 2)]
    assert fall(bilevel.MRBO(), RIDGE, start, sources, 200) < 0.5
    single = [Batches(LOWER, UPPER, batch_size=1, seed=1)]
    assert fall(bilevel.MRBO(), RIDGE, start, single, 200) < 0.5


def test_momentum_follows_the_square_of_the_step():
    data = Batches(LOWER, UPPER, batch_size=15, seed=1)
    weights = []

    class Told(bilevel.STORM):
        def weight(self, k, size):
            weights.append((size, super().weight(k, size)))
            return weights[-1][1]

    bilevel.solve(RIDGE, *START, limited(bilevel.MRBO(estimator=Told()), 12), data=data)
    assert [weight for _, weight in weights[:3]] == [1 / 2, 1 / 3, 1 / 4]  # a mean, until the step's square is larger
    bilevel.solve(RIDGE, *START, limited(bilevel.MRBO(estimator=Told(), step_size=0.3), 12), data=data)
    assert weights[-1][1] == max(weights[-1][0] ** 2 / 4, 1 / 13)
    assert 0.3 < weights[-1][0] < 2  # b L


@pytest.mark.parametrize("method", [bilevel.SOBA(), bilevel.StocBiO(terms=5), bilevel.SABA()], ids=repr_of)
def test_seeds_reproduce(method):
    runs = [
        bilevel.solve(RIDGE, *START, limited(method, 10), data=Batches(LOWER, UPPER, batch_size=15, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(runs[0].x, runs[1].x)
    assert runs[0].counts == runs[1].counts
    assert not torch.equal(runs[0].x, runs[2].x)


def test_error_is_that_of_the_point_returned_on_held_data():
    data = Batches(LOWER, UPPER, batch_size=15, seed=1)
    res = bilevel.solve(RIDGE, *START, limited(bilevel.SOBA(), 33), data=data, check_every=10)
    errors = [record["error"] for record in res.history]
    assert len(set(errors)) == 4  # at 0, 10, 20, 30; the end is measured after the last record
    whole = data.whole()
    y = res.y.clone().requires_grad_()
    slope = torch.autograd.grad(RIDGE.lower(res.x, y, whole.lower), y)[0]
    assert abs(res.residuals["lower"] - float(slope.norm())) < 1e-12
    assert abs(res.value - float(RIDGE.upper(res.x, res.y, whole.upper))) < 1e-12
    held = bilevel.Batch(upper=UPPER, lower=LOWER)
    same = bilevel.solve(RIDGE, *START, limited(bilevel.SOBA(), 33), data=lambda k: data(k), held=held, check_every=10)
    assert torch.equal(same.x, res.x)
    assert same.error == res.error


def test_any_method_takes_held_data():
    data = Batches(LOWER, UPPER, batch_size=15)
    method = bilevel.AID(upper_step=bilevel.ConstantStep(0.5), stopping=Stopping(rtol=0.0, max_iter=4))
    res = bilevel.solve(RIDGE, *START, method, data=data, check_every=2)
    y = res.y.clone().requires_grad_()
    slope = torch.autograd.grad(RIDGE.lower(res.x, y, LOWER), y)[0]
    assert abs(res.residuals["lower"] - float(slope.norm())) < 1e-12


@pytest.mark.parametrize(
    "method",
    [
        bilevel.SABA(),
        bilevel.SRBA(),
        bilevel.MRBO(),
        bilevel.AmIGO(inner=3, upper_step=bilevel.TorchOptimizer(lambda p: torch.optim.Adam(p, lr=0.01))),
    ],
    ids=repr_of,
)
def test_resume_is_exact(method, tmp_path):
    def run(limit, callbacks=()):
        data = Batches(LOWER, UPPER, batch_size=15, seed=1)
        return bilevel.solve(RIDGE, *START, limited(method, limit), data=data, callbacks=callbacks, check_every=7)

    path = tmp_path / "run.pt"
    whole = run(20)
    run(10, [bilevel.Checkpoint(path, every=4)])
    saved = torch.load(path, weights_only=True)
    saved["method"] = repr(limited(method, 20))
    torch.save(saved, path)
    res = run(20, [bilevel.Checkpoint(path)])
    assert torch.equal(vector(res.x), vector(whole.x))
    assert torch.equal(vector(res.y), vector(whole.y))


def test_samples_are_counted():
    """SOBA: F once, f once with two products, on 15 samples each."""
    data = Batches(LOWER, UPPER, batch_size=15)
    method = bilevel.SOBA(step_size=0.1, upper_step=0.1)
    state = method.init(RIDGE, *START, data(0))
    moved = method.step(RIDGE, state, data(1))
    assert moved.counts.samples - state.counts.samples == 15 + 3 * 15
    storm = bilevel.MRBO(step_size=0.1, upper_step=0.1)
    state = storm.init(RIDGE, *START, data(0))
    assert storm.step(RIDGE, state, data(1)).counts.samples - state.counts.samples == 2 * (15 + 3 * 15)


def test_estimates_of_a_full_pass_are_exact():
    """SAGA's means and SPIDER's restart equal the directions on all samples, unequal blocks included."""
    data = Batches(LOWER, UPPER, batch_size=25, upper_batch_size=40)
    assert [len(block) for block in data.lower.blocks] == [25, 25, 10]
    full = data.whole()
    method = bilevel.SOBA(step_size=0.1, upper_step=0.1)
    exact = method.init(RIDGE, *START, full).memory["estimate"]
    for estimator in (bilevel.SAGA(), bilevel.SPIDER()):
        found = replace(method, estimator=estimator).init(RIDGE, *START, data(0)).memory["estimate"]
        for key, value in exact.items():
            assert torch.allclose(found[key], value, atol=1e-12), key


def test_whole_batches_are_deterministic():
    """One batch of everything: the automatic steps without noise, and their certificate."""
    truth = answer(RIDGE)
    res = bilevel.solve(RIDGE, *START, bilevel.SOBA(), data=Batches(LOWER, UPPER, batch_size=None))
    assert res.converged
    assert abs(float(res.x - truth.x)) < 1e-7


def test_batches():
    X = torch.arange(10.0)
    data = Batches(X, X + 100, batch_size=4, seed=5)
    assert len(data) == 3
    assert all(torch.equal(data(k).lower, data(k).lower) for k in range(5))
    assert all(float(data(k).upper.min()) >= 100 for k in range(5))
    seen = torch.cat([data.block(i, i).lower for i in range(3)])
    assert torch.equal(seen.sort().values, X)
    first = data(1)
    assert not all(data(k).lower_block == data(k).upper_block for k in range(20))
    assert {first.other(i).lower_block for i in range(1, 30)} == {0, 1, 2}
    counts = torch.bincount(torch.tensor([data(k).lower_block for k in range(3000)]), minlength=3) / 3000
    assert float((counts - torch.tensor([0.4, 0.4, 0.2])).abs().max()) < 0.03  # in proportion to their sizes
    pairs = Batches(TensorDataset(X, X**2), batch_size=4)
    assert torch.equal(pairs(0).lower[0] ** 2, pairs(0).lower[1])
    with pytest.raises(ValueError, match="share their first dimension"):
        Batches((X, X[:5]), batch_size=2)
    with pytest.raises(ValueError, match="positive integer"):
        Batches(X, batch_size=0)


def test_from_loader_finds_its_place_again():
    X = torch.arange(10.0)

    def build():
        generator = torch.Generator()
        return bilevel.FromLoader(DataLoader(X, batch_size=3, shuffle=True, generator=generator), seed=3)

    whole = build()
    batches = [whole(k).lower for k in range(9)]
    assert torch.equal(torch.cat(batches[:4]).sort().values, X)
    assert not torch.equal(batches[0], batches[4])
    resumed = build()
    assert all(torch.equal(resumed(k).lower, batches[k]) for k in (6, 7, 8, 2))
    lost = bilevel.FromLoader(DataLoader(X, batch_size=3, shuffle=True))
    lost(0), lost(1)
    with pytest.raises(ValueError, match="lost its place"):
        lost(7)
    with pytest.raises(ValueError, match="draws=2"):
        build()(0).other(1)
    short = bilevel.FromLoader(DataLoader(X, batch_size=3, sampler=RandomSampler(X, num_samples=4)), draws=2)
    assert len(short) == 2
    assert short(0).other(1).lower.shape == (1,)


def test_loaders_run_with_a_held_certificate():
    generator = torch.Generator()
    lower = DataLoader(TensorDataset(*LOWER), batch_size=15, shuffle=True, generator=generator)
    upper = DataLoader(TensorDataset(*UPPER), batch_size=15, shuffle=True, generator=torch.Generator())
    held = bilevel.Batch(upper=UPPER, lower=LOWER)
    method = limited(bilevel.SOBA(step_size=Polynomial(0.1, 0.2), upper_step=Polynomial(0.3, 0.5)), 60)
    res = bilevel.solve(RIDGE, *START, method, data=bilevel.FromLoader(lower, upper), held=held, check_every=20)
    assert res.status == Status.MAX_ITER
    assert res.error < res.history[0]["error"]
    assert res.counts.samples > 60 * 15


class Passed(Mapped):
    """Another source's samples as they are."""

    def put(self, part, k):
        return part


@pytest.mark.parametrize("method", [bilevel.SABA(), bilevel.SRBA()], ids=repr_of)
def test_memories_see_through_what_maps_the_samples(method):
    data = Batches(LOWER, UPPER, batch_size=25, seed=1)
    plain, mapped = (bilevel.solve(RIDGE, *START, limited(method, 8), data=source) for source in (data, Passed(data)))
    assert torch.equal(plain.x, mapped.x)
    assert plain.error == mapped.error


@pytest.mark.parametrize(
    "method", [bilevel.SOBA(), bilevel.MRBO(), bilevel.AmIGO(inner=3), bilevel.BAMM()], ids=repr_of
)
def test_batches_of_varying_sizes(method):
    def rows(values, k):
        return tuple(part[k % 7 : k % 7 + 10 + 5 * (k % 9)] for part in values)

    held = bilevel.Batch(upper=UPPER, lower=LOWER)
    method, start = limited(method, 40), (START[0] + 2, START[1])
    draws = lambda k: bilevel.Batch(rows(UPPER, k), rows(LOWER, k))  # noqa: E731
    res = bilevel.solve(RIDGE, *start, method, data=draws, held=held, check_every=40)
    assert res.status == Status.MAX_ITER
    assert res.error < 0.7 * res.history[0]["error"]


class Killed(Exception):
    """Ends a run from outside."""


def test_a_resumed_run_whose_sampler_has_lost_its_place_is_refused(tmp_path):
    def run(callbacks, **options):
        loaders = [DataLoader(TensorDataset(*part), batch_size=15, shuffle=True, **options) for part in (LOWER, UPPER)]
        held = bilevel.Batch(upper=UPPER, lower=LOWER)
        method = limited(bilevel.SOBA(step_size=0.1, upper_step=0.1), 9)
        bilevel.solve(RIDGE, *START, method, data=bilevel.FromLoader(*loaders), held=held, callbacks=callbacks)

    def kill(_, state):
        if int(state.iterations) == 5:
            raise Killed

    path = tmp_path / "run.pt"
    with pytest.raises(Killed):
        run([bilevel.Checkpoint(path, every=3), kill])
    with pytest.raises(ValueError, match=r"batch 4 of the lower loader.*RandomSampler.*lost its place; build the Data"):
        run([bilevel.Checkpoint(path)])


def test_refusals():
    with pytest.raises(ValueError, match="SAGA memories need samples with keys"):
        bilevel.SABA()(RIDGE, *START, data=lambda k: LOWER)
    with pytest.raises(ValueError, match="SpectralStep compares values"):
        bilevel.SOBA(upper_step=bilevel.SpectralStep())(RIDGE, *START, data=Batches(LOWER, UPPER, batch_size=10))
    with pytest.raises(ValueError, match="check_every"):
        bilevel.SOBA()(RIDGE, *START, data=Batches(LOWER, UPPER, batch_size=10), check_every=0)


PLAIN_STEPS = {"step_size": 0.1, "upper_step": 0.1}
POISONED = [
    bilevel.SOBA(**PLAIN_STEPS), bilevel.MRBO(**PLAIN_STEPS), bilevel.AmIGO(inner=3, **PLAIN_STEPS),
    bilevel.StocBiO(inner=3, terms=3, **PLAIN_STEPS), bilevel.BAMM(**PLAIN_STEPS),
]  # fmt: skip


@pytest.mark.parametrize("level", ["lower", "upper"])
@pytest.mark.parametrize("method", POISONED, ids=repr_of)
def test_nan_batch_ends_the_run_with_the_last_good_point(method, level):
    bad = {"lower": (LOWER[0], LOWER[1].clone()), "upper": (UPPER[0], UPPER[1].clone())}
    data = Batches(bad["lower"], bad["upper"], batch_size=15, seed=1)
    bad[level][1][getattr(data, level).blocks[2][0]] = torch.nan
    good = next(k for k in range(9) if getattr(data(k), f"{level}_block") != 2)
    points = []

    def watch(_, state):
        points.append((state.x, state.y))

    res = bilevel.solve(RIDGE, *START, limited(method, 50), data=lambda k: data(k or good), callbacks=[watch])
    assert res.status == Status.NON_FINITE
    assert torch.equal(res.x, points[-2][0])
    assert torch.equal(res.y, points[-2][1])
    assert torch.isfinite(torch.cat([res.x[None], res.y])).all()
    assert res.iterations > 0


@pytest.mark.parametrize("method", [bilevel.SOBA(), bilevel.SABA(), bilevel.SRBA()], ids=repr_of)
def test_nan_sample_is_seen_by_the_first_certificate(method):
    bad = (LOWER[0], LOWER[1].clone())
    bad[1][7] = torch.nan
    res = bilevel.solve(RIDGE, *START, limited(method, 50), data=Batches(bad, UPPER, batch_size=15))
    assert res.status == Status.NON_FINITE
    assert float(res.x) == float(START[0])


def block_problem(m=12, n=8, p=3, seed=1):
    """Ridge regressions that share one penalty, means over the blocks at hand."""
    g = torch.Generator().manual_seed(seed)
    X, Z = torch.randn(m, n, p, generator=g, dtype=DOUBLE), torch.randn(m, n, p, generator=g, dtype=DOUBLE)
    W = 1 + torch.randn(m, 1, p, generator=g, dtype=DOUBLE) / 2
    t, u = ((P * W).sum(-1) + 2 * torch.randn(m, n, generator=g, dtype=DOUBLE) for P in (X, Z))

    def loss(d, y):
        return ((torch.einsum("bnp,bp->bn", d[0], y) - d[1]) ** 2).mean() / 2

    problem = bilevel.Problem(
        lambda x, y, d: loss(d, y), lambda x, y, d: loss(d, y) + x.exp() * (y**2).sum(1).mean() / 2
    )
    return problem, (X, t), (Z, u), (torch.tensor(0.0, dtype=DOUBLE), torch.zeros(m, p, dtype=DOUBLE))


def test_bsvrb_moves_the_drawn_blocks_alone():
    problem, lower, upper, start = block_problem()
    data = bilevel.BlockBatches(lower, upper, blocks=3, batch_size=4, seed=1)
    method = bilevel.BSVRB()
    state = method.init(problem, *start, data(0))
    for k in (1, 2, 3):
        moved = method.step(problem, state, data(k))
        others = torch.ones(12, dtype=torch.bool)
        others[data(k).blocks] = False
        assert torch.equal(moved.y[others], state.y[others])
        assert not bool((moved.y[~others] == state.y[~others]).any())
        assert moved.counts.samples - state.counts.samples == 2 * (3 * 4 + 3 * 3 * 4)  # whatever m is
        state = moved


TRACKS = ["adjoint", "hessian"]


@pytest.mark.slow
@pytest.mark.parametrize("track", TRACKS)
def test_bsvrb_lets_the_noise_vanish(track):
    problem, lower, upper, start = block_problem()
    data = [bilevel.BlockBatches(lower, upper, blocks=4, batch_size=6, seed=seed) for seed in (1, 2)]
    assert fall(bilevel.BSVRB(track=track), problem, start, data, 60) < 0.5


def test_tracked_hessians_are_exact_without_noise():
    """All blocks and samples at each step: H_i is f_i's Hessian, so that v solves its system to rounding."""
    problem, lower, upper, start = block_problem()
    data = bilevel.BlockBatches(lower, upper, blocks=12, batch_size=8)
    res = bilevel.solve(problem, *start, limited(bilevel.BSVRB(track="hessian"), 4), data=data)
    measured = res.method.measure(problem, res.state, data.whole())
    assert measured.residuals["adjoint"] < 1e-12
    assert measured.residuals["lower"] > 1e-3
    few = bilevel.BlockBatches(lower, upper, blocks=3, batch_size=4, seed=1)
    method = bilevel.BSVRB(track="hessian")
    state = method.init(problem, *start, few(0))
    moved = method.step(problem, state, few(1))
    assert moved.counts.products - state.counts.products == 4 + 2 * 3  # blocks of dimension 3
    with pytest.raises(ValueError, match='track="hessian" keeps a Hessian for every block'):
        method(problem, *start, data=lambda k: bilevel.Batch(upper=upper, lower=lower))
    with pytest.raises(ValueError, match=r"momentum must be in \(0, 1/2\].*at step 1"):
        bilevel.BSVRB(estimator=bilevel.STORM(lambda k: 1.0))(problem, *start, data=few)
    with pytest.raises(ValueError, match='track must be "adjoint" or "hessian"'):
        bilevel.BSVRB(track="both")


@pytest.mark.parametrize("track", TRACKS)
def test_bsvrb_keeps_the_last_good_point(track):
    problem, lower, upper, start = block_problem()
    bad = (lower[0], lower[1].clone())
    data = bilevel.BlockBatches(bad, upper, blocks=3, batch_size=4, seed=1)
    last = next(i for i in range(12) if i not in data(0).blocks)
    bad[1][last] = torch.nan
    res = bilevel.solve(problem, *start, limited(bilevel.BSVRB(track=track), 50), data=lambda k: data(k))
    assert res.status == Status.NON_FINITE
    assert bool(torch.isfinite(res.x).all() and torch.isfinite(res.y).all() and torch.isfinite(res.state.adjoint).all())


@pytest.mark.slow
def test_bsvrb_reaches_the_answer_of_all_blocks():
    problem, lower, upper, start = block_problem()
    truth = bilevel.AID()(problem, *start, data=lambda k: bilevel.Batch(upper=upper, lower=lower))
    assert truth.converged
    every = bilevel.BlockBatches(lower, upper, blocks=12, batch_size=8)
    res = bilevel.solve(problem, *start, limited(bilevel.BSVRB(), 200), data=every)
    assert abs(float(res.x - truth.x)) < 0.05 * abs(float(truth.x))
    some = bilevel.BlockBatches(lower, upper, blocks=4, batch_size=6)
    res = bilevel.solve(problem, *start, limited(bilevel.BSVRB(), 100), data=some)
    assert res.error < 0.5 * res.history[0]["error"]
    runs = [bilevel.solve(problem, *start, limited(bilevel.BSVRB(), 5), data=some) for _ in range(2)]
    assert torch.equal(runs[0].x, runs[1].x)
    with pytest.raises(ValueError, match="12 blocks as its first dimension"):
        bilevel.BSVRB()(problem, start[0], start[1][:5], data=some)
    with pytest.raises(ValueError, match="between 1 and 12"):
        bilevel.BlockBatches(lower, upper, blocks=13, batch_size=1)
    with pytest.raises(ValueError, match="batch_size"):
        bilevel.BlockBatches(lower, upper, blocks=3, batch_size=9)
