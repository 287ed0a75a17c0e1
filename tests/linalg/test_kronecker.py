import math

import pytest
import torch
from laws import DOUBLE, check_operator, rand
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy, unfold

from nestopt.linalg import CG, Dense, GaussNewton, Hessian, Kronecker, Status, compare_preconditioners


def nll(outputs, targets):
    return cross_entropy(outputs, targets, reduction="none")


def per_sample(model, X, T, loss=nll):
    return lambda params: loss(functional_call(model, params, (X,)), T)


def empirical_fisher(model, X, T, loss=nll):
    """The mean of the samples' gg', by definition, in optree's order."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    slopes = vmap(
        grad(lambda p, x, t: loss(functional_call(model, p, (x[None],)), t[None])[0]), (None, 0, 0), randomness="same"
    )(params, X, T)
    G = torch.cat([slopes[name].flatten(1) for name in sorted(slopes)], 1)
    return G.T @ G / len(X)


def linear(dtype=DOUBLE, bias=True):
    torch.manual_seed(0)
    return nn.Linear(4, 3, bias=bias).to(dtype)


def small_cnn(dtype=DOUBLE):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(3, 2, 2, padding="same", padding_mode="circular", bias=False), nn.Tanh(),
        nn.Flatten(), nn.Linear(18, 3),
    ).to(dtype)  # fmt: skip


IMAGES, LABELS = rand(8, 2, 6, 6, seed=2), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


@pytest.mark.parametrize("bias", [True, False])
def test_exact_for_one_sample_of_a_linear_layer(bias):
    model, X, T = linear(bias=bias), rand(1, 4), torch.tensor([1])
    F = empirical_fisher(model, X, T)
    M = Kronecker(per_sample(model, X, T), model, shift=0.1)
    torch.testing.assert_close(M.fisher().to_dense(), F, rtol=1e-12, atol=1e-14)
    exact = torch.linalg.inv(F + 0.1 * torch.eye(len(F), dtype=DOUBLE))
    torch.testing.assert_close(M.to_dense(), exact, rtol=1e-10, atol=1e-12)
    assert M.products == 0 and M.into.size == 12 + 3 * bias


def test_exact_where_inputs_and_gradients_are_independent():
    """Every input with every gradient: a loss linear in the outputs, whose slopes are given."""
    inputs, slopes = rand(5, 4), rand(3, 3, seed=1)
    X, T = inputs.repeat_interleave(3, 0), slopes.repeat(5, 1)
    model = linear()

    def loss(outputs, targets):
        return (outputs * targets).sum(-1)

    M = Kronecker(per_sample(model, X, T, loss), model, shift=0.1)
    F = empirical_fisher(model, X, T, loss)
    torch.testing.assert_close(M.fisher().to_dense(), F, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(M.factors[""].outputs, slopes.T @ slopes / 3, rtol=1e-12, atol=1e-14)
    homogeneous = torch.cat([inputs, torch.ones(5, 1, dtype=DOUBLE)], 1)
    torch.testing.assert_close(M.factors[""].inputs, homogeneous.T @ homogeneous / 5, rtol=1e-12, atol=1e-14)


def test_the_gauss_newton_matrix_of_least_squares():
    """Gradients that are random signs have the identity, the Hessian of the loss, as their second moment."""
    X = rand(50, 4)
    model = linear()
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=DOUBLE)] * 3)
    every, drawn = X.repeat_interleave(8, 0), signs.repeat(50, 1)
    M = Kronecker(per_sample(model, every, drawn, lambda out, t: (out * t).sum(-1)), model, shift=1e-3)
    G = GaussNewton(
        lambda p: functional_call(model, p, (X,)), lambda out: (out**2).sum() / 2 / 50, model, definite=True
    )
    torch.testing.assert_close(M.fisher().to_dense(), G.to_dense(), rtol=1e-10, atol=1e-12)
    exact = Kronecker(per_sample(model, every, drawn, lambda out, t: (out * t).sum(-1)), model, shift=1e-3)
    assert CG(preconditioner=exact)(G.shift(1e-3), rand(15)).iterations == 1


def test_the_split_of_the_damping():
    model, X, T = linear(), rand(20, 4), torch.randint(3, (20,), generator=torch.Generator().manual_seed(0))
    M = Kronecker(per_sample(model, X, T), model, shift=0.04, split=True)
    A, G = M.factors[""].inputs, M.factors[""].outputs
    pi = math.sqrt(float(A.trace() / 5) / float(G.trace() / 3))
    assert float(M.factors[""].balance) == pytest.approx(pi)
    eye = lambda n: torch.eye(n, dtype=DOUBLE)  # noqa: E731
    block = torch.kron(torch.linalg.inv(G + 0.2 / pi * eye(3)), torch.linalg.inv(A + 0.2 * pi * eye(5)))
    order = [4, 9, 14, *(5 * i + j for i in range(3) for j in range(4))]  # bias first, then the weight's rows
    torch.testing.assert_close(M.to_dense(), block[order][:, order], rtol=1e-10, atol=1e-12)
    other = M.with_shift(1.0)
    fresh = Kronecker(per_sample(model, X, T), model, shift=1.0, split=True)
    torch.testing.assert_close(other.to_dense(), fresh.to_dense(), rtol=1e-12, atol=1e-14)


def test_the_factors_of_a_convolution():
    """For one sample the gradient of the weight is sum_t g_t a_t'; the factors are E[sum aa'] and E[mean gg']."""
    model = small_cnn()
    M = Kronecker(per_sample(model, IMAGES, LABELS), model, shift=0.1)
    assert list(M.factors) == ["0", "2", "5"]
    a = unfold(IMAGES, 3, padding=1, stride=2)
    a = torch.cat([a, torch.ones(8, 1, 9, dtype=DOUBLE)], 1)
    torch.testing.assert_close(M.factors["0"].inputs, torch.einsum("nit,njt->ij", a, a) / 8, rtol=1e-12, atol=1e-14)
    hidden = model[1](model[0](IMAGES)).detach()
    padded = torch.nn.functional.pad(hidden, (0, 1, 0, 1), mode="circular")
    h = unfold(padded, 2)
    torch.testing.assert_close(M.factors["2"].inputs, torch.einsum("nit,njt->ij", h, h) / 8, rtol=1e-12, atol=1e-14)
    out = model[0](IMAGES).detach().requires_grad_()
    g = torch.autograd.grad(nll(model[1:](out.clone()), LABELS).sum(), out)[0].flatten(2)
    torch.testing.assert_close(M.factors["0"].outputs, torch.einsum("nit,njt->ij", g, g) / 72, rtol=1e-10, atol=1e-14)


def test_a_convolution_that_is_a_linear_layer():
    conv = nn.Sequential(nn.Conv2d(4, 3, 1), nn.Flatten()).double()
    model = linear()
    with torch.no_grad():
        conv[0].weight.copy_(model.weight[:, :, None, None])
        conv[0].bias.copy_(model.bias)
    X, T = rand(10, 4), torch.randint(3, (10,), generator=torch.Generator().manual_seed(1))
    one = Kronecker(per_sample(conv, X[:, :, None, None], T), conv, shift=0.1)
    two = Kronecker(per_sample(model, X, T), model, shift=0.1)
    torch.testing.assert_close(one.to_dense(), two.to_dense(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("split", [True, False])
def test_an_operator_that_keeps_its_promises(split, dtype):
    model = small_cnn(dtype)
    M = Kronecker(per_sample(model, IMAGES.to(dtype), LABELS), model, shift=0.1, split=split)
    dense = M.to_dense()
    check_operator(M, (dense + dense.mT) / 2)
    assert (M @ dense[:0]).shape == (0, len(dense))
    fisher = M.fisher()
    check_operator(fisher, (fisher.to_dense() + fisher.to_dense().mT) / 2)
    if not split:
        eye = torch.eye(len(dense), dtype=DOUBLE)
        product = dense.double() @ (fisher.to_dense().double() + 0.1 * eye)
        torch.testing.assert_close(product, eye, rtol=0, atol=1e-10 if dtype == DOUBLE else 1e-3)


@pytest.mark.parametrize("c", [1e-6, 1e6])
def test_the_scale_of_the_loss_means_nothing(c, dtype):
    model = small_cnn(dtype)
    X = IMAGES.to(dtype)
    plain = Kronecker(per_sample(model, X, LABELS), model, shift=0.1)
    scaled = Kronecker(per_sample(model, X, LABELS, lambda o, t: c * nll(o, t)), model, shift=0.1 * c**2)
    v = rand(2, plain.into.size, dtype=dtype)
    tol = 1e-10 if dtype == DOUBLE else 1e-3
    torch.testing.assert_close(c**2 * (scaled @ v), plain @ v, rtol=tol, atol=tol)


def test_it_helps_where_theory_says_so():
    """Inputs of very different scales, which the outputs do not depend on: K-FAC knows them, CG has to find out."""
    torch.manual_seed(4)
    scales = torch.logspace(0, 2, 10, dtype=DOUBLE)
    X = rand(400, 10, seed=5) * scales
    model = nn.Linear(10, 4).double()
    with torch.no_grad():
        model.weight.mul_(0.1 / scales)
    labels = torch.multinomial(model(X).softmax(-1), 1)[:, 0]
    H = Hessian(lambda p: cross_entropy(functional_call(model, p, (X,)), labels), model, definite=True)
    kinds = {
        "exact": Kronecker(per_sample(model, X, labels), model, shift=1e-2),
        "split": Kronecker(per_sample(model, X, labels), model, shift=1e-2, split=True),
    }
    found = compare_preconditioners(H.shift(1e-2), rand(44), kinds, solver=CG(rtol=1e-8))
    assert all(row.solution.status == Status.CONVERGED for row in found.rows) and not found.worse
    assert found["exact"].iterations < 0.2 * found["none"].iterations
    assert found["exact"].condition < 2 < found["split"].condition < 0.01 * found["none"].condition
    assert found["exact"].verdict.endswith("times fewer products") and found["exact"].building == 0


def test_positions_of_a_sequence_count_as_a_convolutions():
    X = rand(6, 5, 4)
    model = linear()
    M = Kronecker(lambda p: (functional_call(model, p, (X,)) ** 2).sum((1, 2)), model, shift=0.1)
    a = torch.cat([X, torch.ones(6, 5, 1, dtype=DOUBLE)], -1)
    torch.testing.assert_close(M.factors[""].inputs, torch.einsum("nti,ntj->ij", a, a) / 6)
    g = 2 * model(X)
    torch.testing.assert_close(M.factors[""].outputs, torch.einsum("nti,ntj->ij", g, g) / 30)


def test_nothing_of_the_model_changes_and_nothing_is_drawn_from_torchs_generator():
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    X, T = rand(6, 4), LABELS[:6]
    before, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
    one, two = (Kronecker(per_sample(model, X, T), model, shift=0.1) for _ in range(2))
    assert torch.equal(one.to_dense(), two.to_dense()) and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(model.parameters(), before, strict=True))
    assert not model[0]._forward_hooks
    frozen = nn.Sequential(nn.Linear(4, 3)).double().requires_grad_(False)
    assert Kronecker(per_sample(frozen, X, T), frozen, shift=0.1).definite


def test_other_parameters_are_refused_by_name_or_stood_for():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv1d(2, 2, 1), nn.Flatten(), nn.Linear(8, 3)).double()
    X, T = rand(8, 2, 4), LABELS
    with pytest.raises(ValueError, match=r"parameters 1\.bias, 1\.weight, 2\.bias, 2\.weight, which"):
        Kronecker(per_sample(model, X, T), model, shift=0.1)
    M = Kronecker(per_sample(model, X, T), model, shift=0.1, others=0.4)
    assert M.uncovered == ["1.bias", "1.weight", "2.bias", "2.weight"]
    out = M.into.unflatten(M @ torch.ones(M.into.size, dtype=DOUBLE))
    for name in M.uncovered:
        torch.testing.assert_close(out[name], torch.full_like(out[name], 2.0))
    out = M.with_shift(0.6).into.unflatten(M.with_shift(0.6) @ torch.ones(M.into.size, dtype=DOUBLE))
    torch.testing.assert_close(out["1.bias"], torch.ones(4, dtype=DOUBLE))
    grouped = nn.Sequential(nn.Conv2d(2, 2, 1, groups=2), nn.Flatten()).double()
    with pytest.raises(ValueError, match=r"parameters 0\.bias, 0\.weight, which"):
        Kronecker(lambda p: functional_call(grouped, p, (IMAGES,)).sum(1), grouped, shift=0.1)
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).double()
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"parameters 0\.weight, which"):
        Kronecker(per_sample(tied, rand(8, 4), LABELS), tied, shift=0.1)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))).double()
    assert len(Kronecker(per_sample(normed, rand(8, 4), LABELS), normed, shift=0.1, others=1.0).uncovered) == 3


def test_bad_input():
    model, X, T = linear(), rand(6, 4), LABELS[:6]
    losses = per_sample(model, X, T)
    for shift in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"shift must be finite and > 0"):
            Kronecker(losses, model, shift=shift)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        Kronecker(losses, dict(model.named_parameters()), shift=0.1)
    with pytest.raises(ValueError, match="one loss a sample"):
        Kronecker(lambda p: losses(p).mean(), model, shift=0.1)
    with pytest.raises(TypeError, match="must return a tensor"):
        Kronecker(lambda p: 1.0, model, shift=0.1)
    with pytest.raises(ValueError, match=r"layer '' must be called exactly once by losses, but was called 2 times"):
        Kronecker(lambda p: losses(p) + losses(p), model, shift=0.1)
    with pytest.raises(ValueError, match="called 0 times"):
        Kronecker(lambda p: p["bias"] * 1.0, model, shift=0.1)
    with pytest.raises(ValueError, match="6 samples in its first dimension"):
        Kronecker(lambda p: functional_call(model, p, (X.repeat(2, 1),)).sum(1)[:6], model, shift=0.1)
    with pytest.raises(ValueError, match="factor of layer '' is not finite"):
        Kronecker(per_sample(model, X * math.nan, T), model, shift=0.1)
    with pytest.raises(ValueError, match="others must be a number >= 0"):
        Kronecker(losses, model, shift=0.1, others=-1.0)
    assert not model._forward_hooks
    dead = Kronecker(lambda p: 0 * losses(p), model, shift=0.1)
    torch.testing.assert_close(dead @ torch.ones(15, dtype=DOUBLE), Dense(dead.to_dense()) @ torch.ones(15).double())
    assert bool((torch.linalg.eigvalsh(dead.to_dense()) > 0).all())
