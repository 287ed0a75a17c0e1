"""Fisher matrices: against outer products, Gauss-Newton, closed forms, and the rate of Monte Carlo."""

import pytest
import torch
import torch.nn.functional as F
from laws import check_operator, rand
from torch import nn
from torch.distributions import Bernoulli, Categorical, Independent, Normal, Poisson
from torch.func import functional_call

from nestopt.linalg import (
    CG,
    AutoChunk,
    EmpiricalFisher,
    Fisher,
    GaussNewton,
    Hessian,
    MonteCarloFisher,
    per_sample_gradients,
)

X, Y = rand(9, 4), torch.arange(9) % 3
NET = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
PARAMS = {name: p.detach() for name, p in NET.named_parameters()}


def model(p, x=X):
    return functional_call(NET, p, (x,))


def losses(p):
    return F.cross_entropy(model(p), Y, reduction="none")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def close(left, right):
    torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("chunk_size", [None, 1, 4, 100])
def test_per_sample_gradients_are_single_gradients(chunk_size):
    def loss(p, sample):
        return F.cross_entropy(model(p, sample["x"]), sample["y"])

    G = per_sample_gradients(loss, PARAMS, {"x": X, "y": Y}, chunk_size=chunk_size)
    assert G.shape == (9, 27) and not G.requires_grad
    for i in range(9):
        close(G[i], Hessian(lambda p, i=i: loss(p, {"x": X[i], "y": Y[i]}), PARAMS).gradient)
    assert per_sample_gradients(loss, NET, {"x": X[:1].float().double(), "y": Y[:1]}).shape == (1, 27)


def test_empirical_fisher_is_the_sum_of_outer_products():
    G = per_sample_gradients(lambda p, s: F.cross_entropy(model(p, s[0]), s[1]), PARAMS, (X, Y))
    for chunk_size in (None, 4, AutoChunk()):
        E = EmpiricalFisher(losses, NET, chunk_size=chunk_size)
        check_operator(E, G.T @ G / 9)
    E = EmpiricalFisher(losses, NET, reduction="sum")
    close(E.to_dense(), torch.einsum("mi,mj->ij", G, G))
    close(E.gradient, G.sum(0))
    close(E.jacobian.T.to_dense().T, G)
    assert E.value == pytest.approx(float(losses(PARAMS).sum()))


def test_fisher_is_gauss_newton_for_softmax_cross_entropy():
    true = GaussNewton(model, lambda z: F.cross_entropy(z, Y), NET).to_dense()
    A = Fisher(model, lambda z: Categorical(logits=z), NET)
    check_operator(A, true)
    close(Fisher(model, lambda z: Categorical(logits=z), NET, reduction="sum").to_dense(), 9 * true)
    batches = [X[:5], X[5:]]
    for keep in (True, False):
        B = Fisher(model, lambda z: Categorical(logits=z), NET, data=batches, keep_graphs=keep)
        close(B.to_dense(), true)
    assert float((EmpiricalFisher(losses, NET).to_dense() - true).norm()) > 0.1 * float(true.norm())


def test_fisher_is_gauss_newton_for_independent_bernoulli_outputs():
    target = torch.rand(9, 3, dtype=torch.float64).round()
    true = GaussNewton(model, lambda z: F.binary_cross_entropy_with_logits(z, target), NET)
    close(Fisher(model, lambda z: Bernoulli(logits=z), NET).to_dense(), true.to_dense())


DISTRIBUTIONS = {
    "categorical": (lambda z: Categorical(logits=z), lambda z: F.cross_entropy(z, Y)),
    "normal": (lambda z: Normal(z, 1.0), lambda z: F.mse_loss(z, 0 * z.detach()) / 2),
    "independent normal": (lambda z: Independent(Normal(z, 1.0), 1), lambda z: (z**2).sum(-1).mean() / 2),
    "poisson": (lambda z: Poisson(z.exp()), lambda z: z.exp().mean()),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_monte_carlo_converges_to_it_as_one_over_the_root_of_samples(name):
    distribution, loss = DISTRIBUTIONS[name]
    true = GaussNewton(model, loss, NET).to_dense()

    def mean_error(samples):
        gaps = [
            MonteCarloFisher(
                model, distribution, NET, samples=samples, generator=generator(seed), chunk_size=27
            ).to_dense()
            - true
            for seed in range(6)
        ]
        return float(torch.stack(gaps).square().sum((1, 2)).mean().sqrt() / true.norm())

    few, many = mean_error(10), mean_error(1000)
    assert 5 < few / many < 20  # sqrt(100) = 10
    assert many < 0.2


def test_monte_carlo_is_one_fixed_semidefinite_matrix_and_draws_only_from_its_generator():
    make = lambda seed: MonteCarloFisher(  # noqa: E731
        model, lambda z: Categorical(logits=z), NET, samples=2, generator=generator(seed)
    )
    state = torch.get_rng_state()
    A = make(0)
    matrix = A.to_dense()
    assert torch.equal(torch.get_rng_state(), state)
    check_operator(A, matrix)
    assert torch.equal(make(0).to_dense(), matrix) and not torch.equal(make(1).to_dense(), matrix)
    assert float(torch.linalg.eigvalsh(matrix)[0]) > -1e-15
    assert CG()(A.shift(0.1), rand(27)).converged


def test_monte_carlo_over_batches_keeps_its_labels():
    def make(**options):
        law = lambda z: Categorical(logits=z)  # noqa: E731
        return MonteCarloFisher(model, law, NET, samples=3, generator=generator(), data=[X[:5], X[5:]], **options)

    close(make().to_dense(), make(keep_graphs=True).to_dense())
    with pytest.raises(ValueError, match="shuffling"):
        loader = torch.utils.data.DataLoader(X, batch_size=3, shuffle=True)
        MonteCarloFisher(model, lambda z: Categorical(logits=z), NET, generator=generator(), data=loader)


def test_pinned_values():
    w = torch.tensor([0.5, -0.25], dtype=torch.float64)
    A = Fisher(lambda w: X[:2, :2] @ w, lambda z: Bernoulli(logits=z), w)
    p = torch.sigmoid(X[:2, :2] @ w)
    close(A.to_dense(), X[:2, :2].T @ ((p * (1 - p) / 2)[:, None] * X[:2, :2]))


HEADS = {
    "cross-entropy": lambda z: F.cross_entropy(z, Y),
    "mse": lambda z: F.mse_loss(z, rand(9, 3, seed=5)),
    "huber": lambda z: F.huber_loss(z, rand(9, 3, seed=5)),
    "logistic": lambda z: F.softplus(-z).mean(),
    "poisson": lambda z: F.poisson_nll_loss(z, Y[:, None].expand(9, 3).double()),
    "coupled over samples": lambda z: torch.logsumexp(z.flatten(), 0) + (z.mean() ** 4),
}


@pytest.mark.parametrize("name", HEADS)
def test_gauss_newton_of_any_convex_head(name):
    loss = HEADS[name]
    A = GaussNewton(model, loss, NET)
    point = A.into.flatten(NET).detach()
    flat = lambda v: model(A.into.unflatten(v)).flatten()  # noqa: E731
    J = torch.func.jacrev(flat)(point)
    L = torch.autograd.functional.hessian(lambda z: loss(z.reshape(9, 3)), flat(point))
    assert float(L.abs().max()) > 1e-3
    torch.testing.assert_close(A.to_dense(), J.T @ L @ J, rtol=1e-10, atol=1e-13)
    assert float(torch.linalg.eigvalsh(A.to_dense())[0]) > -1e-13


def test_float32_and_bfloat16_products():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        params = {name: p.to(dtype) for name, p in PARAMS.items()}
        x = X.to(dtype)
        v = rand(27)
        wide = lambda p: functional_call(NET, p, (x.double(),))  # noqa: B023, E731
        narrow = lambda p: functional_call(NET, p, (x,))  # noqa: B023, E731
        double = {name: p.double() for name, p in params.items()}
        for make in (
            lambda f, p: Hessian(lambda q: F.cross_entropy(f(q), Y), p),
            lambda f, p: GaussNewton(f, lambda z: F.cross_entropy(z, Y), p),
            lambda f, p: EmpiricalFisher(lambda q: F.cross_entropy(f(q), Y, reduction="none"), p),
        ):
            truth, found = make(wide, double) @ v.to(dtype).double(), make(narrow, params) @ v.to(dtype)
            assert found.dtype == dtype
            assert float((found.double() - truth).norm()) <= tolerance * float(truth.norm())


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: Fisher(model, lambda z: z, NET), TypeError, "must return a torch.distributions.Distribution"),
        (lambda: Fisher(model, lambda z: Normal(z, 1.0), NET), TypeError, r"support of Normal.*MonteCarloFisher"),
        (lambda: Fisher(lambda p: (model(p),), Categorical, NET), TypeError, "model must return one tensor"),
        (
            lambda: Fisher(model, lambda z: Categorical(logits=z.T), NET),
            ValueError,
            r"begin with the distribution's batch_shape \(3,\)",
        ),
        (lambda: EmpiricalFisher(losses, NET, reduction="none"), ValueError, "EmpiricalFisher: reduction must be"),
        (
            lambda: MonteCarloFisher(model, Categorical, NET, samples=0, generator=generator()),
            ValueError,
            "samples must be a positive integer",
        ),
        (lambda: MonteCarloFisher(model, Categorical, NET, generator=3), TypeError, "must be a torch.Generator"),
        (
            lambda: per_sample_gradients(losses, NET, (X, Y[:4])),
            ValueError,
            r"samples in their first dimension.*\(4,\)",
        ),
        (lambda: per_sample_gradients(lambda p, s: s, rand(3), rand(2, 3)), ValueError, "loss must return a scalar"),
        (lambda: per_sample_gradients(losses, NET, X, chunk_size=0), ValueError, "chunk_size must be a positive"),
    ],
)
def test_bad_input_is_refused_by_name(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_no_samples_make_no_curvature():
    x = rand(0, 3)
    assert torch.equal(EmpiricalFisher(lambda w: (x @ w) ** 2, rand(3)).to_dense(), torch.zeros(3, 3).double())
    assert per_sample_gradients(lambda w, s: w @ s, rand(3), x).shape == (0, 3)
    A = Fisher(lambda w: x @ w, lambda z: Bernoulli(logits=z), rand(3))  # Categorical itself refuses none
    assert torch.equal(A.to_dense(), torch.zeros(3, 3).double())
