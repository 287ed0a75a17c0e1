"""What PyTorch cannot differentiate twice is named with its cure; evaluations leave nothing changed."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from nestopt.linalg import ForwardOverReverse, FreshGraph, Hessian, Jacobian, KeptGraph, UndifferentiableError
from nestopt.linalg.guard import closure_tensors, describe_captured, graph_nodes

pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.:DeprecationWarning",  # torch's own, at the first forward-mode call of a process
    "ignore:Sparse CSR:UserWarning",
    "ignore:index_reduce.. is in beta:UserWarning",
)


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)  # conftest puts it back


class Cube(torch.autograd.Function):
    """Neither setup_context nor jvp."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class SetupCube(torch.autograd.Function):
    """setup_context, but no jvp."""

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class ForwardCube(SetupCube):
    """Forward mode, but no rule for vmap."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, t):
        return 3 * ctx.saved_tensors[0] ** 2 * t


class OnceCube(Cube):
    """Its gradient silently has no graph."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4).sin() * 2
Y = torch.linspace(1, -1, 18, dtype=torch.float64).reshape(6, 3).cos()
Q = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(2, 3, 4).exp()
TARGET = torch.arange(6) % 3


def module(make: Callable[[], nn.Module], name: str, train: bool = True) -> Callable[[], Callable[[Any], Any]]:
    """A loss that puts p (4, 3) into the parameter `name` of a linear module."""

    def build():
        net = make().train(train).requires_grad_(False)
        rest = {key: torch.ones_like(value) for key, value in net.named_parameters()}
        return lambda p: (functional_call(net, {**rest, name: p.mT}, (X,)) ** 4).mean()

    return build


def through(make: Callable[[], nn.Module]) -> Callable[[], Callable[[Any], Any]]:
    """A loss of the outputs of a module at inputs (2, 3, 4) that depend on p (4, 3)."""

    def build():
        frozen = make().requires_grad_(False)
        return lambda p: (frozen((Q @ p)[..., [0, 1, 2, 0]]) ** 3).mean()

    return build


def grid_sample(p):
    image = torch.ones(1, 1, 5, 5).cumsum(-1) * p.sum()
    return (F.grid_sample(image, (X @ p).tanh()[:4, :2].reshape(1, 2, 2, 2), align_corners=True) ** 2).mean()


def attend(p):
    q = (Q @ p)[:, None]
    return (F.scaled_dot_product_attention(q, q, q) ** 2).mean()


def flash(p):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return attend(p)


def recurrent(cls):
    def build():
        net = cls(4, 3).requires_grad_(False)
        return lambda p: (net(Q @ p @ p.mT)[0] ** 2).mean()

    return build


@dataclass(frozen=True)
class Row:
    """One row of the table: what works, and the words of the refusals."""

    build: Callable[[], Callable[[Any], Any]]
    operation: str = ""
    reverse: bool = True
    forward: bool = True
    cure: str = ""
    looped: bool = False


def row(loss, *args, **kwargs):
    return Row(lambda: loss, *args, **kwargs)


KEEP = "product=KeptGraph"
ROWS = {
    "mse_loss": row(lambda p: F.mse_loss(X @ p, Y), "F.mse_loss", forward=False, cure=r"\(\(a - b\)\*\*2\).mean\(\)"),
    "mse by hand": row(lambda p: ((X @ p - Y) ** 2).mean()),
    "attention": row(attend),
    "forced flash": row(flash, "fused F.scaled_dot_product", reverse=False, forward=False, cure="drop the sdpa_kernel"),
    "encoder layer": Row(through(lambda: nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True))),
    "encoder layer in eval mode": Row(through(lambda: nn.TransformerEncoderLayer(4, 2, 6, batch_first=True).eval())),
    "cdist": row(lambda p: torch.cdist(X @ p, Y).mean(), "torch.cdist", reverse=False, forward=False, cure="by hand"),
    "cdist by products": row(
        lambda p: torch.cdist(X @ p, Y, compute_mode="use_mm_for_euclid_dist").mean(), "cdist", forward=False, cure=KEEP
    ),
    "pdist": row(lambda p: F.pdist(X @ p).mean(), "F.pdist", reverse=False, forward=False, cure="by hand"),
    "embedding_bag": row(
        lambda p: (F.embedding_bag(torch.tensor([[0, 2], [1, 3]]), p) ** 2).mean(),
        "F.embedding_bag", reverse=False, forward=False, cure="F.embedding and sum",
    ),
    "embedding": row(lambda p: (F.embedding(torch.tensor([0, 2, 1, 0]), p) ** 2).mean()),
    "ctc_loss": row(
        lambda p: F.ctc_loss((Q.reshape(3, 2, 4) @ p).log_softmax(-1), torch.tensor([[1], [2]]), (3, 3), (1, 1)),
        "F.ctc_loss", reverse=False, forward=False, cure="logsumexp",
    ),
    "linear_cross_entropy": row(
        lambda p: F.linear_cross_entropy(X, p.mT, TARGET, options=nn.LinearCrossEntropyOptions(batch_chunk_size=2)),
        "F.linear_cross_entropy in chunks", reverse=False, forward=False, cure="options",
    ),
    "multi_margin": row(
        lambda p: F.multi_margin_loss(X @ p, TARGET, p=2), "F.multi_margin", reverse=False, forward=False, cure="relu"
    ),
    "multilabel_margin": row(
        lambda p: F.multilabel_margin_loss((X @ p) ** 2, torch.tensor([[0, -1, 1]] * 6)),
        "F.multilabel_margin", reverse=False, forward=False, cure="relu",
    ),
    "segment_reduce": row(
        lambda p: (torch.segment_reduce(X @ p, "sum", lengths=torch.tensor([2, 4])) ** 2).mean(),
        "segment_reduce", reverse=False, forward=False, cure="scatter_add",
    ),
    "zeta": row(
        lambda p: torch.special.zeta((X @ p).abs() + 2, torch.ones(6, 3)).mean(),
        "zeta", reverse=False, forward=False, cure="polygamma",
    ),
    "huber": row(lambda p: F.huber_loss((X @ p) ** 2, Y), "F.huber_loss", forward=False, cure="smooth_l1_loss"),
    "smooth_l1": row(lambda p: F.smooth_l1_loss((X @ p) ** 2, Y)),
    "soft_margin": row(lambda p: F.soft_margin_loss(X @ p, Y.sign()), "F.soft_margin", forward=False, cure="softplus"),
    "grid_sample": row(grid_sample, "F.grid_sample", forward=False, cure=KEEP),
    "sparse.mm": row(
        lambda p: (torch.sparse.mm(torch.eye(6).to_sparse(), X @ p) ** 2).mean(),
        "torch.sparse.mm", forward=False, cure=KEEP, looped=True,
    ),
    "sparse CSR": row(
        lambda p: ((torch.eye(6).to_sparse_csr() @ (X @ p)) ** 2).mean(),
        "torch.func says", forward=False, cure=KEEP, looped=True,
    ),
    "weight_norm": Row(  # torch's reverse products are silently wrong
        module(lambda: parametrizations.weight_norm(nn.Linear(4, 3)), "parametrizations.weight.original1"),
        "weight_norm", reverse=False, forward=False, cure=r"g \* v / v.norm",
    ),
    "layer_norm with a bias alone": row(  # silent zeros
        lambda p: (F.layer_norm(X @ p, (3,), None, p[0]) ** 4).mean(), "bias and without", reverse=False, cure="ones"
    ),
    "batch_norm with a bias alone": row(
        lambda p: (F.batch_norm(X @ p, None, None, None, p[0], True) ** 4).mean(),
        "bias and without", reverse=False, cure="ones",
    ),
    "hardsigmoid": row(
        lambda p: F.hardsigmoid(X @ p).square().mean(), "hardsigmoid", reverse=False, forward=False, cure="clamp"
    ),
    "spectral_norm": Row(
        module(lambda: parametrizations.spectral_norm(nn.Linear(4, 3)), "parametrizations.weight.original"),
        "spectral_norm", forward=False, cure=r"eval\(\)",
    ),
    "spectral_norm in eval mode": Row(
        module(lambda: parametrizations.spectral_norm(nn.Linear(4, 3)), "parametrizations.weight.original", train=False)
    ),
    "igamma": row(
        lambda p: torch.special.gammainc(torch.tensor(2.0), (X @ p) ** 2 + 1).mean(),
        "gammainc", forward=False, cure=KEEP,
    ),
    "index_reduce": row(
        lambda p: (torch.ones(2, 3).index_reduce(0, TARGET % 2, X @ p, "mean") ** 2).mean(),
        "index_reduce", forward=False, cure=KEEP,
    ),
    "scatter_reduce by products": row(
        lambda p: (torch.ones(2, 3).scatter_reduce(0, (TARGET % 2)[:, None].expand(6, 3), X @ p, "prod") ** 2).mean(),
        "scatter_reduce", forward=False, cure=KEEP,
    ),
    "scatter_reduce by sums": row(
        lambda p: (torch.ones(2, 3).scatter_reduce(0, (TARGET % 2)[:, None].expand(6, 3), X @ p, "sum") ** 2).mean()
    ),
    "BatchNorm in train mode": Row(module(lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), "0.weight")),
    "BatchNorm in eval mode": Row(module(lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), "0.weight", False)),
    "running statistics of a bare function": row(
        lambda p: (F.batch_norm(X @ p, torch.zeros(3), torch.ones(3), training=True) ** 4).mean()
    ),
    "group_norm": Row(module(lambda: nn.Sequential(nn.Linear(4, 3), nn.GroupNorm(1, 3)), "0.weight"), looped=True),
    "layer_norm": Row(module(lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), "0.weight")),
    "checkpoint": row(
        lambda p: (checkpoint(lambda p: (X @ p).tanh(), p, use_reentrant=False) ** 2).mean(),
        "activation checkpointing", forward=False, cure=KEEP,
    ),
    "checkpoint of dropout": row(
        lambda p: (checkpoint(lambda p: F.dropout((X @ p).tanh()), p, use_reentrant=False) ** 2).mean(),
        "activation checkpointing", forward=False, cure=KEEP, looped=True,
    ),
    "reentrant checkpoint": row(
        lambda p: (checkpoint(lambda p: (X @ p).tanh(), p, use_reentrant=True) ** 2).mean(),
        "reentrant", reverse=False, forward=False, cure="use_reentrant=False",
    ),
    "dropout": row(lambda p: (F.dropout((X @ p).tanh()) ** 2).mean()),
    "linear": row(lambda p: 2 * p.sum()),
    "Function": row(lambda p: Cube.apply(p).sum(), "Function Cube", forward=False, cure="setup_context and jvp"),
    "Function without jvp": row(lambda p: SetupCube.apply(p).sum(), "SetupCube", forward=False, cure="give it jvp"),
    "Function differentiable once": row(
        lambda p: OnceCube.apply(p).sum(), "OnceCube", reverse=False, forward=False, cure="drop @once_differentiable"
    ),
    "LSTM": Row(recurrent(nn.LSTM)),
    "GRU": Row(recurrent(nn.GRU)),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_every_row_works_or_is_refused_with_its_cure(name):
    case, p = ROWS[name], X[:4, :3].clone()
    loss = case.build()
    v = torch.randn(5, 12)
    true = None
    for product in (
        KeptGraph(),
        KeptGraph(2),
        FreshGraph(),
        FreshGraph(2),
        ForwardOverReverse(),
        ForwardOverReverse(2),
    ):
        torch.manual_seed(3)
        if not (case.forward if product.forward else case.reverse):
            with pytest.raises(UndifferentiableError, match=f"Hessian: .*{case.operation}.*{case.cure}") as caught:
                Hessian(loss, p, product=product) @ v
            assert case.operation in caught.value.operation
            continue
        H = Hessian(loss, p, product=product)
        result = H @ v
        true = result if true is None else true
        torch.testing.assert_close(result, true, rtol=1e-10, atol=1e-11 * float(true.abs().max()))
        assert (H.looped is not None) == (case.looped and product.chunk_size is not None and not product.forward)
    if true is not None and name != "linear":
        assert true.abs().max() > 1e-6


def test_reverse_products_of_the_forward_only_rows_are_right():
    """Central differences of the gradient, for what the strategies cannot check against each other."""
    for name, case in ROWS.items():
        # spectral_norm in train mode takes its power iteration for a constant, which differences do not
        if not case.reverse or case.forward or name == "spectral_norm" or "dropout" in name:
            continue
        loss, p, v = case.build(), X[:4, :3].clone(), torch.randn(12)
        slopes = [Hessian(loss, p + s * 1e-5 * v.reshape(4, 3)).gradient for s in (1, -1)]
        difference = (slopes[0] - slopes[1]) / 2e-5
        torch.testing.assert_close(Hessian(loss, p) @ v, difference, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("groups, channels, length", [(1, 2, 2), (2, 2, 2), (1, 4, 4), (3, 3, 3)])
def test_group_norm_is_right_in_blocks_where_torch_is_silently_wrong(groups, channels, length):
    x, weight = torch.randn(1, channels, length), torch.randn(channels)
    loss = lambda x: (F.group_norm(x, groups, weight) ** 4).sum()  # noqa: E731
    assert torch.equal(Hessian(loss, x, product=KeptGraph(4)).to_dense(), Hessian(loss, x).to_dense())


def test_a_function_without_a_vmap_rule_is_refused_in_chunks_only():
    loss, x = (lambda x: ForwardCube.apply(x).sum()), torch.ones(3)
    assert torch.equal(Hessian(loss, x, product=ForwardOverReverse()) @ x, 6 * x)
    with pytest.raises(UndifferentiableError, match=r"ForwardCube.*chunk_size=None"):
        Hessian(loss, x, product=ForwardOverReverse(2))


def test_mse_loss_is_never_traced_in_forward_mode(monkeypatch):
    monkeypatch.setattr(torch.func, "jvp", lambda *_: pytest.fail("traced"))
    with pytest.raises(UndifferentiableError, match=r"F.mse_loss"):
        Hessian(lambda x: F.mse_loss(x, torch.zeros(2)), torch.ones(2), product=ForwardOverReverse())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_module_is_refused():
    net = torch.compile(nn.Sequential(nn.Linear(2, 2), nn.Tanh()).double().requires_grad_(False), backend="aot_eager")
    with pytest.raises(UndifferentiableError, match=r"torch.compile.*compile the product, not the module") as caught:
        Hessian(lambda x: (net(x) ** 2).sum(), torch.ones(3, 2))
    assert "OptimizedModule" in caught.value.module
    torch.compiler.reset()


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.EmbeddingBag(3, 2)

    def forward(self, index):
        return self.embed(index)


def test_the_module_is_named():
    net = nn.ModuleDict({"layers": nn.Sequential(nn.Identity(), Head())}).double()
    net.forward = lambda index: net["layers"](index)
    with pytest.raises(UndifferentiableError) as caught:
        Hessian(lambda p: (functional_call(net, p, (torch.tensor([[0, 1]]),)) ** 2).sum(), net)
    assert caught.value.module == "`layers.1.embed` (EmbeddingBag) of ModuleDict"
    assert "F.embedding_bag, called in module `layers.1.embed` (EmbeddingBag) of ModuleDict, has no" in str(
        caught.value
    )
    assert isinstance(caught.value, TypeError)


def test_the_module_of_an_autograd_function_is_named():
    class Layer(nn.Module):
        def forward(self, x):
            return OnceCube.apply(x)

    net = nn.Sequential(nn.Tanh(), Layer())
    with pytest.raises(UndifferentiableError, match=r"OnceCube, called in module `1` \(Layer\) of Sequential,"):
        Hessian(lambda x: net(x).sum(), torch.ones(2))


def test_an_operation_outside_the_table_is_named_when_the_product_fails():
    def backward_only(x):
        return torch.ops.aten.multilabel_margin_loss_backward(x.sum(), x, torch.tensor([0, -1]), 1, torch.ones(2)).sum()

    with pytest.raises(UndifferentiableError, match=r"F.multilabel_margin_loss.*by hand") as caught:
        Hessian(lambda x: (x**2).sum() + backward_only(x), torch.ones(2)) @ torch.ones(2)
    assert isinstance(caught.value.__cause__, RuntimeError)
    index = torch.tensor([0, 1])
    with pytest.raises(UndifferentiableError, match=r"the operation index_reduce_?|torch.index_reduce"):
        Hessian(
            lambda x: (x * 1).index_reduce(0, index, x, "amax").square().sum(),
            torch.ones(2),
            product=ForwardOverReverse(),
        ) @ torch.ones(2)


def test_a_jacobian_names_it_at_the_first_product_that_fails():
    J = Jacobian(lambda x: torch.cdist(x, torch.zeros(1, 2)), torch.ones(3, 2))
    assert (J.T @ torch.ones(3)).shape == (6,)  # one backward pass is no second derivative
    with pytest.raises(UndifferentiableError, match=r"Jacobian: torch\.cdist"):
        J @ torch.ones(6)
    J = Jacobian(lambda x: OnceCube.apply(x), torch.ones(2))
    with pytest.raises(UndifferentiableError, match=r"Jacobian: .*once_differentiable"):
        J @ torch.ones(2)


class Model:
    def __init__(self):
        self.net = nn.Linear(2, 1)

    def loss(self, y):
        return self.net(y).sum()


def test_captured_tensors_are_named():
    w, data = torch.ones(2, requires_grad=True), {"a": [torch.ones(1), torch.ones(3, requires_grad=True)]}
    scaled = 2 * w
    model = Model()
    hidden = torch.ones(4, requires_grad=True)

    def loss(y, default=data["a"][1]):
        return (w * y).sum() + default.sum()

    assert describe_captured(loss, [w]) == "`w` of shape (2,)"
    assert describe_captured(loss, [data["a"][1]]) == "`default` of shape (3,)"
    assert describe_captured(lambda y: scaled * y, [w]) == "`scaled` of shape (2,)"
    assert describe_captured(lambda y: data["a"], [data["a"][1]]) == "`data['a'][1]` of shape (3,)"
    assert describe_captured(functools.partial(loss, w), [w]) == "`w` of shape (2,)"
    assert describe_captured(functools.partial(max, w), [w]) == "`partial.args[0]` of shape (2,)"
    assert describe_captured(functools.partial(max, key=w), [w]) == "`key` of shape (2,)"
    assert describe_captured(model.loss, [model.net.bias]) == "`self.net.bias` of shape (1,)"
    assert describe_captured(lambda y: model.loss(y), [model.net.bias]) == "`model.net.bias` of shape (1,)"
    assert describe_captured(loss, [hidden, w]) == "a tensor of shape (4,), `w` of shape (2,)"
    assert "weight" in dict(closure_tensors(model.net))


def test_graph_nodes_are_visited_once():
    x = torch.ones(2, requires_grad=True)
    y = x
    for _ in range(60):
        y = y + y  # 2^60 paths
    assert len(list(graph_nodes([y, y * 1]))) == 62
    assert list(graph_nodes([torch.ones(1)])) == []
