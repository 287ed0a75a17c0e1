"""Hessian, GaussNewton, Jacobian: against closed forms and torch.func, for every product strategy."""

import gc
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from nestopt.linalg import (
    CG,
    Compiled,
    ForwardOverReverse,
    FreshGraph,
    GaussNewton,
    Hessian,
    Jacobian,
    KeptGraph,
    Status,
)
from nestopt.linalg.tree import Ravel

# torch's own, at the first forward-mode call of a process

STRATEGIES = [
    *(KeptGraph(size) for size in (None, 1, 3, 1000)),
    *(FreshGraph(size) for size in (None, 3)),
    *(ForwardOverReverse(size) for size in (None, 3)),
]


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)  # conftest puts it back


def module_loss(module, *inputs, loss):
    """(loss of the named parameters, the module)."""
    return (lambda p: loss(functional_call(module, p, inputs))), module


def targets(n, classes=3):
    return torch.arange(n) % classes


def quadratic():
    A, b = torch.randn(3, 3), torch.randn(3)
    params = {"x": torch.randn(3), "a": [torch.randn(2, 2), torch.randn(())]}
    return lambda p: p["x"] @ A @ p["x"] / 2 + b @ p["x"] + 3 * (p["a"][0] ** 2).sum() * p["a"][1], params


def logistic():
    X, y = torch.randn(20, 4), torch.randn(20).sign()
    return lambda w: F.softplus(-y * (X @ w)).mean(), torch.randn(4)


def mlp():
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return module_loss(net, torch.randn(12, 4), loss=lambda z: F.cross_entropy(z, targets(12)))


def cnn():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Softplus(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3))
    return module_loss(net, torch.randn(5, 1, 6, 6), loss=lambda z: F.cross_entropy(z, targets(5)))


def lstm():
    return module_loss(nn.LSTM(2, 2), torch.randn(4, 3, 2), loss=lambda out: (out[0] ** 2).mean())


def attention():
    net = nn.TransformerEncoderLayer(2, 1, 2, dropout=0.0, batch_first=True)
    return module_loss(net, torch.randn(2, 3, 2), loss=lambda z: (z**3).mean())


def batch_norm(train):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).train(train)
    return module_loss(net, torch.randn(8, 3), loss=lambda z: (z**2).mean())


def dropout():
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 1))
    return module_loss(net, torch.randn(8, 3), loss=lambda z: (z**2).mean())


PROBLEMS = {
    "quadratic": quadratic,
    "logistic": logistic,
    "mlp": mlp,
    "cnn": cnn,
    "lstm": lstm,
    "attention": attention,
    "batch_norm": partial(batch_norm, True),
    "batch_norm_eval": partial(batch_norm, False),
    "dropout": dropout,
}


def true_hessian(loss, params):
    """The matrix by torch.func; it refuses running statistics, which a BatchNorm in train mode does not use."""
    ravel = Ravel.of(params, "params")
    point = ravel.flatten(params).detach()
    buffers = [m for m in params.modules() if isinstance(m, nn.BatchNorm1d)] if isinstance(params, nn.Module) else []
    saved = [(m, m.running_mean, m.running_var) for m in buffers if m.training]
    for m, *_ in saved:
        m.running_mean = m.running_var = m.num_batches_tracked = None
    with sdpa_kernel(SDPBackend.MATH):
        slope = torch.func.grad(ravel.call(loss))
        matrix = torch.func.jacfwd(slope, randomness="same")(point)
    for m, mean, var in saved:
        m.running_mean, m.running_var, m.num_batches_tracked = mean, var, torch.tensor(0)
    return matrix


@pytest.mark.parametrize("product", STRATEGIES, ids=repr)
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_products_are_the_hessian_of_torch_func(problem, product):
    loss, params = problem()
    torch.manual_seed(1)
    true = true_hessian(loss, params)
    torch.manual_seed(1)
    H = Hessian(loss, params, product=product)
    assert H.shape == true.shape and H.symmetric and H.unused == []
    assert H.looped is None
    assert true.abs().max() > 1e-3
    torch.testing.assert_close(H.to_dense(), true, rtol=1e-10, atol=1e-10 * float(true.abs().max()))
    v = torch.randn(2, 3, H.shape[-1])
    torch.testing.assert_close(H @ v, v @ true, rtol=1e-10, atol=1e-10 * float((v @ true).abs().max()))
    torch.testing.assert_close(H @ v[0, 0], v[0, 0] @ true, rtol=1e-10, atol=1e-10 * float(true.abs().max()))
    assert (H @ v[:0]).shape == (0, 3, H.shape[-1])
    assert not (H @ v).requires_grad


def test_closed_form_of_a_quadratic_in_a_dict():
    loss, params = quadratic()
    H = Hessian(loss, params)
    # optree's order: a[0], a[1], x
    M, s = params["a"]
    true = torch.zeros(8, 8)
    true[:4, :4] = 6 * s * torch.eye(4)
    true[:4, 4] = true[4, :4] = 6 * M.flatten()
    basis = torch.eye(3)
    rows = [[loss({**params, "x": (basis[i] + basis[j])}) for j in range(3)] for i in range(3)]
    zero = loss({**params, "x": torch.zeros(3)})
    single = [loss({**params, "x": basis[i]}) for i in range(3)]
    true[5:, 5:] = torch.tensor([[rows[i][j] - single[i] - single[j] + zero for j in range(3)] for i in range(3)])
    torch.testing.assert_close(H.to_dense(), true, rtol=1e-10, atol=1e-10)
    tree = H.into.unflatten(H @ H.into.flatten(params))
    assert tree["a"][0].shape == (2, 2) and tree["x"].shape == (3,)


def test_closed_form_of_logistic_regression():
    X, y, w = torch.randn(20, 4), torch.randn(20).sign(), torch.randn(4)
    p = torch.sigmoid(X @ w)
    true = X.T @ ((p * (1 - p))[:, None] * X) / 20
    torch.testing.assert_close(
        Hessian(lambda w: F.softplus(-y * (X @ w)).mean(), w).to_dense(), true, rtol=1e-12, atol=1e-12
    )


def test_pinned_value():
    H = Hessian(lambda x: torch.sin(x[0]) * x[1] ** 2, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(H @ torch.tensor([1.0, -1.0]), torch.tensor([-5.527093161995, 0.478267253839]))


def test_value_and_gradient_come_with_the_operator():
    loss, params = mlp()
    named = dict(sorted(params.named_parameters()))
    true = torch.cat([g.flatten() for g in torch.autograd.grad(loss(named), list(named.values()))])
    for product in STRATEGIES:
        H = Hessian(loss, params, product=product)
        torch.testing.assert_close(H.gradient, true, rtol=1e-12, atol=1e-14)
        assert float(H.value) == pytest.approx(loss(named).item(), rel=1e-14)
        assert not H.gradient.requires_grad and not H.value.requires_grad
    assert all(parameter.grad is None for parameter in params.parameters())


@pytest.mark.parametrize("product", STRATEGIES, ids=repr)
def test_the_operator_stays_at_the_point_where_it_was_made(product):
    x = torch.tensor([1.0, 2.0])
    H = Hessian(lambda x: (x**3).sum(), x, product=product)
    x.mul_(10)
    torch.testing.assert_close(H.to_dense(), torch.diag(torch.tensor([6.0, 12.0])))


@pytest.mark.parametrize("product", STRATEGIES, ids=repr)
def test_masks_are_fixed_and_generators_are_left_alone(product):
    loss, params = dropout()
    before = torch.get_rng_state()
    H = Hessian(loss, params, product=product)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    loss(dict(params.named_parameters()))
    assert torch.equal(torch.get_rng_state(), after)  # construction draws what one evaluation draws
    v = torch.randn(H.shape[-1])
    first = H @ v
    torch.rand(7)
    state = torch.get_rng_state()
    assert torch.equal(H @ v, first)
    H.to_dense()
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.allclose(Hessian(loss, params, product=product) @ v, first)  # another operator, another mask


@pytest.mark.parametrize("product", STRATEGIES, ids=repr)
def test_linear_and_unused(product):
    H = Hessian(lambda p: p["a"].sum() * 2, {"a": torch.ones(2), "b": torch.ones(3)}, product=product)
    assert torch.equal(H @ torch.ones(4, 5), torch.zeros(4, 5))
    assert H.unused == ["params['b']"]
    H = Hessian(lambda p: (p["a"] ** 2).sum() + p["c"].sum(), {k: torch.ones(2) for k in "abc"}, product=product)
    assert torch.equal(H.to_dense(), torch.diag(torch.tensor([2.0, 2, 0, 0, 0, 0])))
    assert H.unused == ["params['b']"]


@pytest.mark.parametrize("product", STRATEGIES, ids=repr)
def test_float32_inference_mode_and_no_grad(product):
    x = torch.ones(3, dtype=torch.float32)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            H = Hessian(lambda x: (x**3).sum(), x + 0, product=product)
            assert torch.equal(H @ torch.ones(2, 3, dtype=torch.float32), torch.full((2, 3), 6, dtype=torch.float32))


def test_solvers_take_it():
    loss, params = logistic()
    H = Hessian(lambda w: loss(w) + 0.1 * w @ w, params, definite=True)
    b = torch.randn(3, 4)
    solution = CG(rtol=1e-12)(H, b)
    assert solution.converged.all()
    torch.testing.assert_close(solution.x, torch.linalg.solve(H.to_dense(), b.mT).mT, rtol=1e-9, atol=1e-9)


def test_nan_is_kept_and_named():
    H = Hessian(lambda x: (x**3).sum() * torch.nan, torch.ones(2))
    assert H.value.isnan() and (H @ torch.ones(2)).isnan().all()
    assert CG()(H, torch.ones(2)).status == Status.NON_FINITE


def count_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("product", [KeptGraph(), KeptGraph(4), FreshGraph(), ForwardOverReverse()], ids=repr)
def test_two_hundred_products_leave_nothing_behind(product):
    loss, params = mlp()
    H, v = Hessian(loss, params, product=product), torch.randn(4, 43)
    H @ v
    before = count_tensors()
    for _ in range(200 if isinstance(product, KeptGraph) else 20):
        H @ v
    assert count_tensors() <= before  # fewer, where other tests' rubbish was collected


def test_dropping_the_operator_frees_its_graph_at_once():
    loss, params = mlp()
    J = Jacobian(lambda p: functional_call(params, p, torch.randn(3, 4)), params)
    J @ torch.randn(43)
    H = Hessian(loss, params)
    H @ torch.randn(43)
    leaves = [weakref.ref(H.operator.inputs[0]), weakref.ref(H.operator.outputs[0]), weakref.ref(J.operator.inputs[0])]
    gc.disable()
    try:
        del H, J
        assert [leaf() for leaf in leaves] == [None] * 3  # no cycle keeps them until the next collection
    finally:
        gc.enable()


def test_kept_graph_survives_training_of_the_module():
    loss, net = batch_norm(True)
    H = Hessian(loss, net)
    v = torch.randn(H.shape[-1])
    first = H @ v
    net(torch.randn(8, 3))  # moves the running statistics in place
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    assert torch.equal(H @ v, first)


def tree_function(p):
    return {"out": p["w"] @ p["x"], "norm": [(p["x"] ** 2).sum()]}


def tree_point():
    return {"w": torch.randn(3, 2), "x": torch.randn(2), "idle": torch.randn(2)}


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 100])
def test_jacobian_over_pytrees(chunk_size):
    params = tree_point()
    J = Jacobian(tree_function, params, chunk_size=chunk_size)
    assert J.shape == (4, 10) and J.unused == ["params['idle']"]
    true = torch.func.jacrev(lambda v: J.out.flatten(tree_function(J.into.unflatten(v))))(J.into.flatten(params))
    torch.testing.assert_close(J.to_dense(), true, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(J.T.to_dense(), true.mT, rtol=1e-12, atol=1e-12)
    v, u = torch.randn(5, 2, 10), torch.randn(5, 2, 4)
    torch.testing.assert_close(J.vecdot(J @ v, u), J.vecdot(v, J.T @ u), rtol=1e-12, atol=1e-12)
    assert torch.equal(J.value, J.out.flatten(tree_function(params)))
    assert J.out.unflatten(J @ v)["out"].shape == (5, 2, 3)


def test_jacobian_of_simple_functions():
    x = torch.randn(3)
    assert torch.equal(Jacobian(lambda x: x, x).to_dense(), torch.eye(3))
    assert torch.equal(Jacobian(lambda x: (x, torch.ones(2)), x).to_dense(), torch.eye(5, 3))
    assert torch.equal(Jacobian(lambda x: x[:0] * 1, x).T @ torch.ones(0), torch.zeros(3))


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_gauss_newton_is_its_product(name, chunk_size):
    net, x = {
        "mlp": (nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(12, 4)),
        "cnn": (
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.Softplus(), nn.Flatten(), nn.Linear(8, 3)),
            torch.randn(5, 1, 4, 4),
        ),
    }[name]
    y = targets(len(x))
    model, loss = (lambda p: functional_call(net, p, (x,))), (lambda z: F.cross_entropy(z, y))
    G = GaussNewton(model, loss, net, chunk_size=chunk_size)
    point = G.into.flatten(net).detach()
    flat = lambda v: model(G.into.unflatten(v))  # noqa: E731
    J = torch.func.jacrev(flat)(point).reshape(-1, G.shape[-1])
    L = torch.func.hessian(lambda z: loss(z.reshape(-1, 3)))(flat(point).flatten())
    torch.testing.assert_close(G.to_dense(), J.T @ L @ J, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(G.gradient, torch.func.grad(lambda v: loss(flat(v)))(point), rtol=1e-10, atol=1e-12)
    assert G.symmetric and torch.linalg.eigvalsh(G.to_dense()).min() > -1e-12
    v = torch.randn(2, 5, G.shape[-1])
    torch.testing.assert_close(G @ v, v @ (J.T @ L @ J), rtol=1e-10, atol=1e-11)


def test_gauss_newton_of_a_linear_model_is_the_hessian():
    X, y, w = torch.randn(9, 4), targets(9), torch.randn(4, 3)
    G = GaussNewton(lambda w: {"logits": X @ w}, lambda out: F.cross_entropy(out["logits"], y), w)
    H = Hessian(lambda w: F.cross_entropy(X @ w, y), w)
    torch.testing.assert_close(G.to_dense(), H.to_dense(), rtol=1e-12, atol=1e-14)


CAPTURED = torch.ones(2, requires_grad=True)
NET = nn.Linear(2, 1).double()


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: Hessian(lambda x: x, torch.ones(2)), ValueError, r"loss must return a scalar.*\(2,\)"),
        (lambda: Hessian(lambda x: x.sum() > 0, torch.ones(2)), TypeError, "floating scalar.*bool"),
        (lambda: Hessian(lambda x: 1.0, torch.ones(2)), TypeError, "floating scalar.*float"),
        (lambda: Hessian(lambda x: x.sum(), torch.ones(2, dtype=torch.int64)), TypeError, "params must have a real"),
        (lambda: Hessian(lambda x: x.sum(), {}), ValueError, "params must hold at least one tensor"),
        (lambda: Hessian(sum, [torch.ones(2), torch.ones(2).float()]), ValueError, "share one dtype"),
        (lambda: Hessian(sum, [torch.ones(2), torch.ones(2, device="meta")]), ValueError, "share one device"),
        (lambda: Hessian(sum, [torch.ones(2), 3.0]), TypeError, r"params\[1\] must be a torch.Tensor"),
        (lambda: Hessian(lambda x: x.detach().sum(), torch.ones(2)), ValueError, "does not depend on params.*detach"),
        (
            lambda: Hessian(lambda x: (x * CAPTURED).sum(), torch.ones(2)),
            ValueError,
            r"require grad and are not in params: `CAPTURED` of shape \(2,\)",
        ),
        (lambda: Hessian(lambda p: NET(torch.ones(2)).sum(), NET), ValueError, "`NET.weight`.*functional_call"),
        (lambda: Hessian(lambda x: x.sum(), torch.ones(2), product="kept"), TypeError, "KeptGraph|HessianProduct"),
        (lambda: KeptGraph(0), ValueError, "KeptGraph: chunk_size must be a positive integer"),
        (lambda: ForwardOverReverse(-1), ValueError, "chunk_size must be a positive integer"),
        (lambda: Jacobian(lambda x: x.float(), torch.ones(2)), ValueError, "must be torch.float64.*like params"),
        (lambda: Jacobian(lambda x: x > 0, torch.ones(2)), TypeError, "the output of function must have a real"),
        (lambda: Jacobian(lambda x: torch.ones(2), torch.ones(2)), ValueError, "function does not depend on params"),
        (lambda: Jacobian(lambda x: x * CAPTURED, torch.ones(2)), ValueError, "Jacobian.*`CAPTURED`"),
        (lambda: GaussNewton(lambda x: x, lambda z: z, torch.ones(2)), ValueError, "loss must return a scalar"),
        (lambda: Hessian(lambda x: x.sum(), torch.ones(2)) @ torch.ones(3), ValueError, "LAST dimension"),
    ],
)
def test_bad_input_is_refused_by_name(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_errors_of_the_function_itself_are_not_dressed_up():
    with pytest.raises(KeyError, match="missing"):
        Hessian(lambda p: p["missing"], {"a": torch.ones(2)})
    with pytest.raises(RuntimeError, match="shape"):
        Hessian(lambda x: x.reshape(3).sum(), torch.ones(2))


@pytest.mark.parametrize("problem, size", [(mlp, None), (mlp, 3), (attention, None)])
def test_compiled_products_are_the_eager_ones(problem, size):
    loss, params = problem()
    H, plain = Hessian(loss, params, product=Compiled(size, backend="aot_eager")), Hessian(loss, params)
    v = torch.randn(3, H.shape[-1])
    for _ in range(2):
        torch.testing.assert_close(H @ v, plain @ v, rtol=1e-10, atol=1e-12)
    assert H.looped is None and torch.equal(H.gradient, plain.gradient)


def test_what_cannot_be_compiled_is_refused():
    loss, params = dropout()
    with pytest.raises(TypeError, match=r"loss draws random numbers.*compiled code would draw others"):
        Hessian(loss, params, product=Compiled(backend="eager"))

    def breaks(x):
        torch._dynamo.graph_break()
        return (x**3).sum()

    with pytest.raises(RuntimeError, match="graph_break"):  # never an eager product in silence
        Hessian(breaks, torch.ones(2), product=Compiled(backend="eager")) @ torch.ones(2)

    def fickle(x):
        return (x**3).sum() if torch.compiler.is_compiling() else (x**2).sum()

    with pytest.raises(ValueError, match="compiled product differs from the eager one by"):
        Hessian(fickle, torch.ones(2), product=Compiled(backend="eager")) @ torch.ones(2)


def test_the_accuracy_of_products_below_float64():
    _, params = mlp()
    named = {name: p.detach() for name, p in params.named_parameters()}
    x, y = torch.randn(12, 4), targets(12)

    def at(dtype):
        cast = {name: p.to(torch.bfloat16).to(dtype) for name, p in named.items()}
        return Hessian(lambda p: F.cross_entropy(functional_call(params, p, (x.bfloat16().to(dtype),)), y), cast)

    v = torch.randn(43).bfloat16()
    truth = at(torch.float64) @ v.double()
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 5e-2)):
        found = at(dtype) @ v.to(dtype)
        assert found.dtype == dtype
        assert float((found.double() - truth).norm() / truth.norm()) < tolerance
