"""Decision-focused losses against formulas, sampled inequalities, finite differences and closed forms in a band."""

import copy
import io
import itertools
import math
import pickle

import pytest
import torch

from nestopt import implicit

D = torch.float64
# subsets of five items of which the weights fit: a knapsack small enough to be solved by looking
WEIGHTS = torch.tensor([3.0, 2.0, 4.0, 1.0, 3.0], dtype=D)
EVERY = torch.tensor(list(itertools.product([0.0, 1.0], repeat=5)), dtype=D)
FEASIBLE = EVERY[(EVERY @ WEIGHTS <= 7) & (EVERY.sum(-1) >= 2)]


def cheapest(c):
    return FEASIBLE.to(c)[(c @ FEASIBLE.to(c).T).argmin(-1)]


def dearest(c):
    return cheapest(-c)


def vertex(c):
    """The simplex, to be maximised over."""
    return torch.nn.functional.one_hot(c.argmax(-1), c.shape[-1])


def oracle(maximize):
    return dearest if maximize else cheapest


def normal(g, *shape):
    return torch.randn(*shape, generator=g, dtype=D)


BOTH = pytest.mark.parametrize("maximize", [False, True], ids=["min", "max"])


@BOTH
def test_spo_plus_formulas(maximize, generator):
    """Its gradient is 2 (w* - w(2 c_hat - c)), its value the definition's maximum over S."""
    predicted, costs = normal(generator, 2, 20, 5)
    predicted.requires_grad_()
    loss = implicit.spo_plus(predicted, costs, oracle(maximize), maximize=maximize)
    (found,) = torch.autograd.grad(loss.sum(), predicted)
    w, sign = oracle(maximize), -1.0 if maximize else 1.0
    torch.testing.assert_close(found, sign * 2 * (w(costs) - w(2 * predicted.detach() - costs)), rtol=0, atol=0)
    c, p = sign * costs, sign * predicted.detach()
    best = cheapest(c)
    wanted = ((c - 2 * p) @ FEASIBLE.T).max(-1).values + (2 * p * best).sum(-1) - (c * best).sum(-1)
    torch.testing.assert_close(loss.detach(), wanted, rtol=0, atol=1e-12)
    known = implicit.spo_plus(predicted, costs, w, solution=w(costs), maximize=maximize)
    assert torch.equal(known, loss)


@BOTH
def test_spo_plus_is_a_convex_upper_bound_of_the_regret(maximize, generator):
    w = oracle(maximize)
    a, b, costs = normal(generator, 3, 200, 5)

    def loss(p):
        return implicit.spo_plus(p, costs, w, maximize=maximize)

    regret = implicit.regret(a, costs, w, maximize=maximize)
    assert (regret >= 0).all()
    assert (regret > 0).any()
    assert (loss(a) >= regret - 1e-12).all()
    torch.testing.assert_close(loss(costs), torch.zeros(200, dtype=D))
    for t in (0.25, 0.5, 0.9):
        assert (loss(t * a + (1 - t) * b) <= t * loss(a) + (1 - t) * loss(b) + 1e-12).all()


def test_pinned_values():
    p, c = torch.tensor([1.0, -2.0, 0.5, 1.0, -1.0], dtype=D), torch.tensor([-1.0, 2.0, 1.0, -3.0, 0.5], dtype=D)
    assert cheapest(c).tolist() == [1, 0, 0, 1, 0]
    assert cheapest(p).tolist() == [0, 1, 0, 0, 1]
    assert float(implicit.regret(p, c, cheapest)) == 6.5  # 2.5 - (-4)
    # 2 p - c = (3, -6, 0, 5, -2.5): its best is items 1 and 4, -8.5, and w* costs 8
    assert float(implicit.spo_plus(p, c, cheapest)) == 16.5


def test_the_value_function_has_the_decision_as_gradient(generator):
    costs = normal(generator, 10, 5).requires_grad_()
    value = implicit.optimal_value(costs, cheapest)
    (found,) = torch.autograd.grad(value.sum(), costs)
    torch.testing.assert_close(found, cheapest(costs.detach()), rtol=0, atol=0)
    assert torch.autograd.gradcheck(lambda c: implicit.optimal_value(c, cheapest), costs, check_forward_ad=True)


@BOTH
@pytest.mark.parametrize("size", [0.1, 3.0, 100.0])
def test_blackbox_is_the_gradient_of_the_interpolation(maximize, size, generator):
    """f(c) = (min (c + size v)'w - min c'w) / size, by central differences along a direction."""
    costs, v, direction = normal(generator, 3, 50, 5)
    leaf = costs.clone().requires_grad_()
    w = implicit.blackbox(leaf, oracle(maximize), interpolation=size, maximize=maximize)
    assert torch.equal(w.detach(), oracle(maximize)(costs))
    (found,) = torch.autograd.grad(w, leaf, v)
    sign = -1.0 if maximize else 1.0

    def f(c):
        c = sign * c
        return (implicit.optimal_value(c + size * v, cheapest) - implicit.optimal_value(c, cheapest)) / size

    h = 1e-7
    difference = (f(costs + h * direction) - f(costs - h * direction)) / (2 * h)
    torch.testing.assert_close((found * direction).sum(-1), difference, rtol=0, atol=1e-6)
    assert found.any() == (size > 0.01)


@BOTH
def test_gumbel_noise_on_the_simplex_is_softmax(maximize, generator):
    """Value, Jacobian and Hessian, within five standard errors of closed forms."""
    scale, samples = 0.7, 40_000
    theta = torch.tensor([0.3, -0.5, 1.0], dtype=D)
    v = torch.tensor([1.0, -2.0, 0.5], dtype=D)
    sign = 1.0 if maximize else -1.0
    w = vertex if maximize else (lambda c: vertex(-c))

    def ours(c):
        return implicit.perturbed(
            c, w, scale=scale, samples=samples, noise="gumbel", maximize=maximize,
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip

    def exact(c):
        return torch.softmax(sign * c / scale, -1)

    p = exact(theta)
    band = 5 * (p * (1 - p) / samples).sqrt()
    assert ((ours(theta) - p).abs() <= band).all()
    # a sample of the Jacobian is (w - mean) (1 - exp(-z))' / scale, of a standard deviation of at most 1 / scale
    jacobian = torch.func.jacrev(ours)(theta)
    assert ((jacobian - torch.func.jacrev(exact)(theta)).abs() <= 5 / scale / math.sqrt(samples)).all()
    torch.testing.assert_close(torch.func.jacfwd(ours)(theta), jacobian, rtol=0, atol=1e-10)
    second = torch.func.hessian(lambda c: ours(c) @ v)(theta)
    truth = torch.func.hessian(lambda c: exact(c) @ v)(theta)
    # its samples are (w - mean)'v ((1 - e)(1 - e)' - diag(e)) / scale^2, e = exp(-z) exponential: deviation below 12
    assert ((second - truth).abs() <= 5 * 12 / scale**2 / math.sqrt(samples)).all()
    assert (second - truth).abs().max() < 0.5 * truth.abs().max()


@pytest.mark.parametrize("noise", ["gaussian", "multiplicative"])
@BOTH
def test_derivatives_of_noise_on_two_vertices(noise, maximize, generator):
    """w(c) for S = {0, 1} in one dimension is a step: its mean is a normal distribution function."""
    scale, samples = 0.8, 40_000
    c = torch.tensor([0.4], dtype=D)
    sign = 1.0 if maximize else -1.0

    def step(c):  # of c - 1: S = {(0, 1), (1, 0)} with the second cost fixed
        return (sign * c > sign * 1.0).to(c)

    def ours(c):
        return implicit.perturbed(
            c, step, scale=scale, samples=samples, noise=noise, maximize=maximize,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip

    def exact(c):
        if noise == "gaussian":
            return torch.special.ndtr(sign * (c - 1) / scale)
        return torch.special.ndtr(sign * (torch.log(c) - scale**2 / 2) / scale)

    factor = scale if noise == "gaussian" else scale * float(c)
    assert (ours(c) - exact(c)).abs() <= 5 * 0.5 / math.sqrt(samples)
    found, truth = torch.func.jacrev(ours)(c), torch.func.jacrev(exact)(c)
    assert (found - truth).abs().max() <= 5 / factor / math.sqrt(samples)
    found, truth = torch.func.hessian(lambda c: ours(c).sum())(c), torch.func.hessian(lambda c: exact(c).sum())(c)
    assert (found - truth).abs().max() <= 5 * 2 / factor**2 / math.sqrt(samples)


@BOTH
@pytest.mark.parametrize("noise", ["gaussian", "gumbel"])
def test_fenchel_young(maximize, noise, generator):
    """Its gradient is the mean decision less the target, so zero there; its Hessian that of `perturbed`; convex."""
    predicted = normal(generator, 4, 5)
    options = {"scale": 0.5, "samples": 200, "noise": noise, "maximize": maximize}
    sign = 1.0 if maximize else -1.0

    def mean(p):
        return implicit.perturbed(p, oracle(maximize), generator=torch.Generator().manual_seed(3), **options)

    def loss(p, target):
        g = torch.Generator().manual_seed(3)
        return implicit.fenchel_young(p, target, oracle(maximize), generator=g, **options)

    target = oracle(maximize)(normal(generator, 4, 5))
    leaf = predicted.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(leaf, target).sum(), leaf)
    torch.testing.assert_close(found, sign * (mean(predicted) - target), rtol=0, atol=1e-12)
    (found,) = torch.autograd.grad(loss(leaf, mean(predicted)).sum(), leaf)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-12)
    second = torch.func.jacrev(torch.func.grad(lambda p: loss(p, target).sum()))(predicted)
    torch.testing.assert_close(second, sign * torch.func.jacrev(mean)(predicted), rtol=0, atol=1e-10)
    forward = torch.func.jvp(lambda p: loss(p, target), (predicted,), (torch.ones_like(predicted),))[1]
    torch.testing.assert_close(forward, sign * (mean(predicted) - target).sum(-1), rtol=0, atol=1e-12)
    a, b = normal(generator, 2, 4, 5)
    assert (loss((a + b) / 2, target) <= (loss(a, target) + loss(b, target)) / 2 + 1e-12).all()
    # the value by differences: the noise is the same at both points
    h, e = 1e-6, normal(generator, 4, 5)
    difference = (loss(predicted + h * e, target) - loss(predicted - h * e, target)) / (2 * h)
    slope = torch.func.jvp(lambda p: loss(p, target), (predicted,), (e,))[1]
    torch.testing.assert_close(slope, difference, rtol=0, atol=1e-7)


def test_noise_is_the_generators(generator):
    c = normal(generator, 3, 5)
    options = {"samples": 7, "scale": 2.0}

    def value(seed):
        g = None if seed is None else torch.Generator().manual_seed(seed)
        return implicit.perturbed(c, cheapest, generator=g, **options)

    state = torch.get_rng_state()
    assert torch.equal(value(1), value(1))
    assert not torch.equal(value(1), value(2))
    assert torch.equal(value(None), value(None))
    g = torch.Generator().manual_seed(1)
    first, second = (implicit.perturbed(c, cheapest, generator=g, **options) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    signs = implicit.perturbed(torch.tensor([1.0, -1.0, 0.0]), lambda x: x.sign(), noise="multiplicative", scale=3.0)
    assert signs.tolist() == [1, -1, 0]
    one = implicit.perturbed(c.requires_grad_(), cheapest, samples=1)
    assert torch.autograd.grad(one.sum(), c)[0].any()


def test_contrastive_losses(generator):
    predicted, costs = normal(generator, 2, 6, 5)
    predicted.requires_grad_()
    best, pool = cheapest(costs), FEASIBLE[:9]
    for maximize in (False, True):
        sign = -1.0 if maximize else 1.0
        gaps = sign * ((predicted * best).sum(-1, keepdim=True) - predicted @ pool.T)
        torch.testing.assert_close(implicit.contrastive(predicted, best, pool, maximize=maximize), gaps.mean(-1))
        found = implicit.contrastive_map(predicted, best, pool, maximize=maximize)
        torch.testing.assert_close(found, gaps.max(-1).values)
    (found,) = torch.autograd.grad(implicit.contrastive(predicted, best, pool).sum(), predicted)
    torch.testing.assert_close(found, best - pool.mean(0))
    # with the whole set as its pool it is the regret of deciding by c_hat - c, of which w* is one decision
    whole = implicit.contrastive_map(predicted, best, FEASIBLE, costs=costs)
    shifted = (predicted - costs).detach()
    torch.testing.assert_close(whole.detach(), (shifted * (best - cheapest(shifted))).sum(-1))
    perfect = implicit.contrastive_map(costs, best, FEASIBLE, costs=costs)
    assert torch.equal(perfect, torch.zeros(6, dtype=D))


def test_the_pool_grows_and_is_saved(generator):
    costs = normal(generator, 8, 5)
    pool = implicit.SolutionPool(cheapest(costs))
    size = len(pool)
    assert size == len({tuple(w) for w in cheapest(costs).tolist()})
    pool.add(torch.full((1, 5), math.nan))
    pool.add(cheapest(costs))
    assert len(pool) == size
    loss = implicit.ContrastiveLoss(cheapest, pool, solve_ratio=1.0)
    predicted = normal(generator, 30, 5).requires_grad_()
    loss(predicted[:8], costs).backward()
    assert len(pool) > size
    assert predicted.grad[:8].any()
    still = implicit.ContrastiveLoss(cheapest, implicit.SolutionPool(cheapest(costs)), solve_ratio=0.0, largest=True)
    still(predicted[:8], costs)
    assert len(still.pool) == size
    fresh = implicit.SolutionPool(torch.zeros(1, 5, dtype=D))
    fresh.load_state_dict(pool.state_dict())
    assert torch.equal(fresh.solutions, pool.solutions)
    with pytest.raises(ValueError, match="must have 5 entries"):
        pool.add(torch.ones(1, 4))


LOSSES = {
    "regret": lambda p, c: implicit.regret(p, c, cheapest),
    "spo_plus": lambda p, c: implicit.spo_plus(p, c, cheapest),
    "optimal_value": lambda p, c: implicit.optimal_value(p, cheapest) + 0 * c.sum(-1),
    "blackbox": lambda p, c: (implicit.blackbox(p, cheapest) * c).sum(-1),
    "perturbed": lambda p, c: (implicit.perturbed(p, cheapest, samples=4) * c).sum(-1),
    "fenchel_young": lambda p, c: implicit.fenchel_young(p, c, cheapest, samples=4),
    "contrastive": lambda p, c: implicit.contrastive(p, c, FEASIBLE.to(p)),
    "contrastive_map": lambda p, c: implicit.contrastive_map(p, c, FEASIBLE.to(p), costs=c),
}


@pytest.mark.parametrize("name", LOSSES)
def test_batches_transforms_dtypes_and_a_bad_item(name, generator):
    loss, (predicted, costs) = LOSSES[name], normal(generator, 2, 2, 3, 5)
    value = loss(predicted, costs)
    assert value.shape == (2, 3)
    flat = loss(predicted.reshape(6, 5), costs.reshape(6, 5))
    torch.testing.assert_close(value.reshape(6), flat, rtol=0, atol=1e-12)
    assert loss(predicted[0, 0], costs[0, 0]).shape == ()
    assert loss(predicted[:, :0], costs[:, :0]).shape == (2, 0)
    # mapped: one call for the whole batch, so the same noise as without
    for dims in (0, 1):
        mapped = torch.func.vmap(loss, (dims, dims), dims)(predicted, costs)
        if dims == 0 or name not in ("perturbed", "fenchel_young"):
            torch.testing.assert_close(mapped, value, rtol=0, atol=1e-12)
    nested = torch.func.vmap(torch.func.vmap(loss))(predicted, costs)
    torch.testing.assert_close(nested, value, rtol=0, atol=1e-12)

    def gradient(p, c):
        leaf = p.detach().clone().requires_grad_()
        out = loss(leaf, c).sum()
        return torch.autograd.grad(out, leaf)[0] if out.requires_grad else torch.zeros_like(p)

    whole = gradient(predicted, costs)
    through = torch.func.grad(lambda p: loss(p, costs).sum())(predicted)
    torch.testing.assert_close(through, whole, rtol=0, atol=1e-12)
    each = torch.func.vmap(torch.func.grad(lambda p, c: loss(p, c).sum()))(predicted, costs)
    torch.testing.assert_close(each, whole, rtol=0, atol=1e-12)
    # one item of NaN changes no other, and says so itself
    bad = predicted.clone()
    bad[0, 1, 2] = math.nan
    others = torch.ones(2, 3, dtype=torch.bool)
    others[0, 1] = False
    torch.testing.assert_close(loss(bad, costs)[others], value[others], rtol=0, atol=0)
    assert loss(bad, costs)[0, 1].isnan()
    torch.testing.assert_close(gradient(bad, costs)[others], whole[others], rtol=0, atol=0)
    single = loss(predicted.float(), costs.float())
    assert single.dtype == torch.float32


MODULES = {
    "spo": lambda: implicit.SPOPlusLoss(cheapest),
    "perturbed": lambda: implicit.PerturbedOptimizer(cheapest, seed=4, samples=3),
    "blackbox": lambda: implicit.BlackboxOptimizer(cheapest, interpolation=2.0),
    "fenchel_young": lambda: implicit.FenchelYoungLoss(cheapest, seed=4, samples=3),
    "contrastive": lambda: implicit.ContrastiveLoss(cheapest, implicit.SolutionPool(FEASIBLE[:4]), seed=4),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name, generator):
    module, (predicted, costs) = MODULES[name](), normal(generator, 2, 6, 5)
    arguments = (predicted,) if name in ("perturbed", "blackbox") else (predicted, costs)
    twins = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    values = [module(*arguments) for _ in range(3)]
    for twin in twins:  # the stream of noise goes along
        assert all(torch.equal(twin(*arguments), value) for value in values)
    assert set(module.state_dict()) == ({"pool.solutions"} if name == "contrastive" else set())
    if name in ("perturbed", "fenchel_young"):
        assert not torch.equal(values[0], values[1])
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)


def test_training_by_decisions_alone(generator):
    """Fenchel-Young recovers which items are cheap without seeing a cost."""
    costs = normal(generator, 5)
    c = torch.zeros(5, dtype=D, requires_grad=True)
    loss = implicit.FenchelYoungLoss(cheapest, samples=20, scale=0.3)
    optimizer = torch.optim.SGD([c], lr=0.2)
    for _ in range(60):
        optimizer.zero_grad()
        loss(c, cheapest(costs)).backward()
        optimizer.step()
    assert implicit.regret(c.detach(), costs, cheapest) == 0


ONE = torch.ones(2, 5)
BAD = {
    "oracle": (lambda: implicit.decide(3, ONE), TypeError, "oracle must be a function"),
    "integers": (lambda: implicit.decide(cheapest, ONE.long()), TypeError, "floating tensor, but got torch.int64"),
    "0-d": (lambda: implicit.decide(cheapest, torch.ones(())), ValueError, "without dimensions"),
    "answer": (lambda: implicit.decide(lambda c: c[0], ONE), ValueError, r"return shape \(2, 5\), .*returned \(5,\)"),
    "kind": (lambda: implicit.decide(lambda c: 1.0, ONE), TypeError, "the oracle must return a tensor"),
    "shapes": (
        lambda: implicit.spo_plus(ONE, ONE[0], cheapest),
        ValueError,
        r"spo_plus: predicted and costs must have one shape \(\*batch, n\), but got \(2, 5\) and \(5,\)",
    ),
    "solution": (
        lambda: implicit.spo_plus(ONE, ONE, cheapest, solution=ONE[:1]),
        ValueError,
        "solution and costs must have one shape",
    ),
    "interpolation": (lambda: implicit.blackbox(ONE, cheapest, interpolation=0.0), ValueError, "must be positive"),
    "scale": (lambda: implicit.perturbed(ONE, cheapest, scale=-1.0), ValueError, "perturbed: scale must be positive"),
    "samples": (lambda: implicit.fenchel_young(ONE, ONE, cheapest, samples=0), ValueError, "fenchel_young: samples"),
    "noise": (lambda: implicit.perturbed(ONE, cheapest, noise="uniform"), ValueError, "noise must be one of"),
    "multiplicative": (
        lambda: implicit.fenchel_young(ONE, ONE, cheapest, noise="multiplicative"),
        ValueError,
        "is not the gradient of a convex function",
    ),
    "generator": (
        lambda: implicit.PerturbedOptimizer(cheapest, generator=torch.Generator()),
        TypeError,
        "pass seed instead",
    ),
    "pool": (lambda: implicit.contrastive(ONE, ONE, ONE[:0]), ValueError, "at least one decision"),
    "ratio": (
        lambda: implicit.ContrastiveLoss(cheapest, implicit.SolutionPool(ONE), solve_ratio=2.0),
        ValueError,
        "solve_ratio must lie in",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call()
