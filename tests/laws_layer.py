"""The ten duties of a layer, as laws over a Case: whoever writes a layer lists its cases, and gets its tests.

    CASES = [Case("projection", project, example, lacks={"check_captured": "takes no function"})]

    @pytest.mark.parametrize(("case", "law"), duties(CASES))
    def test_duty(case, law, generator):
        law(case, generator)

A law that has nothing to look at (a layer without a module form) is named in `lacks` with the reason, one that is
expected to fail in `fails`: it is then a strict xfail.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optree
import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from nestopt.implicit import ImplicitWarning, Monitor
from nestopt.linalg import SolverError, Status

D = torch.float64
Law = Callable[["Case", torch.Generator], None]


@dataclass(frozen=True)
class Case:
    """A layer and what the laws need to know of it.

    Args:
        name: of the test.
        layer: (*theta, **options) -> a tensor or a pytree of tensors. Each input may have leading batch dimensions,
            which broadcast against each other's; the options are `monitor` and `on_failure`, which only
            check_bad_item, check_failures and check_certificates pass.
        example: generator -> the inputs of one item, float64, at a point where the layer is smooth.
        exact: an explicit formula of the same function of one item, whose derivatives by torch are the truth; None
            takes the layer's own derivatives by plain autograd, which check_gradcheck certifies.
        shared: positions of inputs that check_batch and others also give without batch dimensions.
        atol: how far two ways to the same number may be apart, relative to the largest.
        thorough: whether differences are taken for every entry, not along random directions only (seconds, not tenths).
        spoil: (item's inputs) -> inputs of a bad item (infeasible, singular), all finite; None for one whose first
            input is NaN.
        status: (*batched inputs) -> codes, one an item, for layers whose result has them; None asks a Monitor.
        tree: the layer as a function of one pytree {"first": theta[0], "rest": theta[1:], "none": None}.
        capturing: captured -> calls the layer with a function that captures this tensor under the name `captured`.
        guess: (y0, *theta) -> the layer's output as found from y0.
        module: () -> (a module in float64, the inputs of a call).
        options: of `layer`, passed on every call.
        lacks: law -> why it has nothing to look at: no test is made of it.
        fails: law -> what is not there (yet): a strict xfail.
    """

    name: str
    layer: Callable[..., Any]
    example: Callable[[torch.Generator], tuple[Tensor, ...]]
    exact: Callable[..., Any] | None = None
    shared: tuple[int, ...] = (0,)
    atol: float = 1e-10
    thorough: bool = False
    spoil: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] | None = None
    status: Callable[..., Tensor] | None = None
    tree: Callable[[Any], Any] | None = None
    capturing: Callable[[Tensor], Any] | None = None
    guess: Callable[..., Any] | None = None
    module: Callable[[], tuple[nn.Module, tuple[Any, ...]]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    lacks: Mapping[str, str] = field(default_factory=dict)
    fails: Mapping[str, str] = field(default_factory=dict)
    dims: tuple[int, ...] = field(init=False)  # of each input of one item

    def __post_init__(self) -> None:
        item = self.example(torch.Generator().manual_seed(0))
        object.__setattr__(self, "dims", tuple(t.ndim for t in item))

    def __str__(self) -> str:
        return self.name

    def __call__(self, *theta: Tensor, **options: Any) -> Tensor:
        """The output's floating leaves as one vector an item, of shape (*batch, m)."""
        return self.vector(self.layer(*theta, **self.options, **options), theta)

    def truth(self, *theta: Tensor) -> Tensor:
        """Likewise of the formula, where there is one."""
        return self(*theta) if self.exact is None else self.vector(self.exact(*theta), theta)

    def vector(self, output: Any, theta: Sequence[Tensor]) -> Tensor:
        """A pytree of outputs as one vector an item; one of all of it where no inputs are given."""
        dims = len(self.batch(theta)) if theta else 0
        leaves = [leaf for leaf in optree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        return torch.cat([leaf.reshape(*leaf.shape[:dims], -1) for leaf in leaves], -1)

    def batch(self, theta: Sequence[Tensor]) -> torch.Size:
        """The batch that the inputs' leading dimensions broadcast to."""
        return torch.broadcast_shapes(*(t.shape[: t.ndim - d] for t, d in zip(theta, self.dims, strict=True)))

    def examples(self, g: torch.Generator, *batch: int) -> tuple[Tensor, ...]:
        """Inputs of a batch of items."""
        items = [self.example(g) for _ in range(torch.Size(batch).numel())]
        return tuple(torch.stack(column).reshape(*batch, *column[0].shape) for column in zip(*items, strict=True))

    def spoiled(self, theta: Sequence[Tensor], item: int) -> tuple[Tensor, ...]:
        """The same batch with one bad item; shared inputs, which have no batch dimension, stay as they are."""
        one = tuple(t[item] if t.ndim > d else t for t, d in zip(theta, self.dims, strict=True))
        bad = self.spoil(one) if self.spoil else (*(torch.full_like(t, torch.nan) for t in one[:1]), *one[1:])
        out = []
        for t, new, dims in zip(theta, bad, self.dims, strict=True):
            rows = t.clone()
            if t.ndim > dims:
                rows[item] = new
            out.append(rows)
        return tuple(out)


def curved(vector: Tensor) -> Tensor:
    """A scalar of every output, which all of them enter differently, and none linearly."""
    return torch.sin(vector + torch.linspace(0.5, 1.5, vector.shape[-1], dtype=vector.dtype)).sum()


def agree(found: Any, wanted: Any, atol: float) -> None:
    """Equal shapes and dtypes, and values that differ by no more than atol times the largest, or 1."""
    found, wanted = (x if isinstance(x, (tuple, list)) else (x,) for x in (found, wanted))
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        worst = float((a - b).abs().max()) if a.numel() else 0.0
        assert worst <= atol * max(1.0, float(b.abs().max()) if b.numel() else 0.0), worst


def leaves_of(theta: Sequence[Tensor]) -> list[Tensor]:
    """Copies that require grad."""
    return [t.detach().clone().requires_grad_() for t in theta]


def gradients(value: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """By plain autograd, zero where there is no path."""
    return torch.autograd.grad(value, inputs, materialize_grads=True, allow_unused=True)


def check_gradcheck(case: Case, g: torch.Generator) -> None:
    """First derivatives, reverse and forward, batched by torch's older vmap, against differences."""
    options = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    inputs = leaves_of(case.example(g))
    assert torch.autograd.gradcheck(case, inputs, fast_mode=not case.thorough, **options)


def check_gradgradcheck(case: Case, g: torch.Generator) -> None:
    """Second derivatives likewise, reverse over reverse and forward over reverse."""
    options = {"check_fwd_over_rev": True, "check_batched_grad": True}
    inputs = leaves_of(case.example(g))
    assert torch.autograd.gradgradcheck(case, inputs, fast_mode=not case.thorough, **options)


def check_third_order(case: Case, g: torch.Generator) -> None:
    """Third derivatives, by three nested backward passes and by torch.func."""
    theta = case.example(g)
    last = len(theta) - 1

    def thrice(function: Callable[..., Tensor]) -> Tensor:
        inputs = leaves_of(theta)
        value = curved(function(*inputs))
        for _ in range(2):
            (value,) = torch.autograd.grad(value, inputs[last], create_graph=True)
            value = (value * torch.linspace(1, 2, value.numel(), dtype=D).reshape(value.shape)).sum()
        return gradients(value, inputs[last:])[0]

    truth = thrice(case.truth)
    agree(thrice(case), truth, 1e3 * case.atol)
    weight = torch.linspace(1, 2, theta[last].numel(), dtype=D).reshape(theta[last].shape)
    first = grad(lambda *t: curved(case(*t)), last)
    second = grad(lambda *t: (first(*t) * weight).sum(), last)
    agree(grad(lambda *t: (second(*t) * weight).sum(), last)(*theta), truth, 1e3 * case.atol)


def check_transforms(case: Case, g: torch.Generator) -> None:
    """grad, vjp, jvp, jacrev, jacfwd, hessian and the compositions of two."""
    theta = case.example(g)
    every = tuple(range(len(theta)))
    inputs = leaves_of(theta)
    y = case.truth(*inputs)
    agree(case(*theta), y.detach(), case.atol)
    rows = [torch.autograd.grad(e, inputs, retain_graph=True, materialize_grads=True, allow_unused=True) for e in y]
    jacobian = tuple(torch.stack(column) for column in zip(*rows, strict=True))
    agree(jacrev(case, every)(*theta), jacobian, 10 * case.atol)
    agree(jacfwd(case, every)(*theta), jacobian, 10 * case.atol)
    v = torch.randn(y.shape, generator=g, dtype=D)
    agree(vjp(case, *theta)[1](v), tuple(torch.tensordot(v, J, 1) for J in jacobian), 10 * case.atol)
    dots = tuple(torch.randn(t.shape, generator=g, dtype=D) for t in theta)
    tangent = sum((J * d).reshape(len(y), -1).sum(-1) for J, d in zip(jacobian, dots, strict=True))
    agree(jvp(case, theta, dots)[1], tangent, 10 * case.atol)

    def value(*t: Tensor) -> Tensor:
        return curved(case(*t))

    loss = curved(case.truth(*inputs))
    first = torch.autograd.grad(loss, inputs, create_graph=True, materialize_grads=True, allow_unused=True)
    agree(grad(value, every)(*theta), tuple(f.detach() for f in first), 10 * case.atol)
    for i in every:
        rows = [
            torch.autograd.grad(e, inputs[i], retain_graph=True, materialize_grads=True, allow_unused=True)[0]
            for e in first[i].reshape(-1)
        ]
        wanted = torch.stack(rows).reshape(theta[i].shape * 2)
        for outer, inner in ((jacrev, jacrev), (jacrev, jacfwd), (jacfwd, jacfwd)):
            agree(outer(inner(value, i), i)(*theta), wanted, 100 * case.atol)
        agree(hessian(value, i)(*theta), wanted, 100 * case.atol)  # jacfwd of jacrev


def check_vmap(case: Case, g: torch.Generator) -> None:
    """vmap equals a loop, of values and of derivatives, nested, with shared tensors whose gradients are sums."""
    items = [case.example(g) for _ in range(3)]
    stacked = tuple(torch.stack(column) for column in zip(*items, strict=True))
    every, last = tuple(range(len(stacked))), len(stacked) - 1

    def value(*t: Tensor) -> Tensor:
        return curved(case(*t))

    first = grad(value, every)
    agree(vmap(case)(*stacked), torch.stack([case(*item) for item in items]), case.atol)
    loop = [first(*item) for item in items]
    agree(vmap(first)(*stacked), tuple(torch.stack(column) for column in zip(*loop, strict=True)), case.atol)
    second = hessian(value, last)
    agree(vmap(second)(*stacked), torch.stack([second(*item) for item in items]), 10 * case.atol)
    # a mapped dimension that does not come first
    moved = tuple(t.movedim(0, -1) for t in stacked)
    agree(vmap(case, in_dims=-1)(*moved), vmap(case)(*stacked), case.atol)
    for i in case.shared:
        dims = tuple(None if k == i else 0 for k in every)
        mixed = tuple(stacked[0][0] if i == 0 and k == 0 else stacked[k][0] if k == i else stacked[k] for k in every)
        rows = [tuple(mixed[k] if k == i else item[k] for k in every) for item in items]
        total = torch.stack([first(*row)[i] for row in rows]).sum(0)

        def sums(t: Tensor, i: int = i, dims: Any = dims, mixed: Any = mixed) -> Tensor:
            return vmap(value, dims)(*mixed[:i], t, *mixed[i + 1 :]).sum()

        agree(grad(sums)(mixed[i]), total, case.atol)
        (leaf,) = leaves_of([mixed[i]])
        agree(torch.autograd.grad(sums(leaf), leaf)[0], total, case.atol)
        other = next((k for k in reversed(every) if k != i), None)
        if other is not None:  # nested: two values of the shared one, each with every item
            inner, pair = vmap(grad(value, other), dims), stacked[i][:2]
            nested = vmap(lambda t, i=i, mixed=mixed, inner=inner: inner(*mixed[:i], t, *mixed[i + 1 :]))(pair)
            wanted = [
                torch.stack([grad(value, other)(*(t if k == i else item[k] for k in every)) for item in items])
                for t in pair
            ]
            agree(nested, torch.stack(wanted), case.atol)


def check_batch(case: Case, g: torch.Generator) -> None:
    """Leading batch dimensions that broadcast equal a loop, of values and gradients; a shared input's is the SUM."""
    theta = case.examples(g, 2, 3)
    patterns: list[dict[int, Any]] = [{}]
    patterns += [{i: (0, 0)} for i in case.shared]  # given once for all items
    patterns += [{i: (0,)} for i in case.shared[:1] if len(theta) > 1]  # given with the last batch dimension only
    for pattern in patterns:
        inputs = leaves_of([t[pattern[i]] if i in pattern else t for i, t in enumerate(theta)])
        if case.batch(inputs) != (2, 3):
            continue  # the one input that there is
        y = case(*inputs)
        found = gradients(curved(y), inputs)
        again = leaves_of(inputs)
        expanded = [
            t[(None,) * len(pattern[i])].expand(2, 3, *t.shape[2 - len(pattern[i]) :]) if i in pattern else t
            for i, t in enumerate(again)
        ]
        rows = [torch.stack([case(*(t[i, j] for t in expanded)) for j in range(3)]) for i in range(2)]
        truth = torch.stack(rows)
        agree(y.detach(), truth.detach(), case.atol)
        agree(found, gradients(curved(truth), again), case.atol)


def check_shared_sums(case: Case, g: torch.Generator) -> None:
    """The gradient of an input that k equal items share is k times the one of one item: no mean is taken."""
    item = case.example(g)
    one = gradients(curved(case(*(inputs := leaves_of(item)))), inputs)
    other = next(k for k in range(len(item)) if k not in case.shared or len(case.shared) == len(item))
    for i in case.shared:
        batched = [t.expand(4, *t.shape) if k == (other if other != i else (i + 1) % len(item)) else t
                   for k, t in enumerate(item)]  # fmt: skip
        inputs = leaves_of(batched)
        if case.batch(inputs) == (4,) and inputs[i].ndim == item[i].ndim:
            agree(gradients(curved(case(*inputs)), inputs)[i], 4 * one[i], case.atol)


def check_bad_item(case: Case, g: torch.Generator) -> None:
    """One bad item changes no other, has its own status, and adds nothing to shared gradients unless it is asked for.

    Its own derivative is NaN, never zero or another number.
    """
    theta = case.examples(g, 4)
    keep = torch.tensor([0, 2, 3])
    finite = case.spoil is not None
    for pattern in [{}, *({i: 0} for i in case.shared if finite and len(theta) > 1)]:
        mixed = [t[pattern[i]] if i in pattern else t for i, t in enumerate(theta)]
        clean, bad = leaves_of(mixed), leaves_of(case.spoiled(mixed, 1))
        monitor = Monitor()
        before, after = case(*clean), case(*bad, on_failure="nan", monitor=monitor)
        assert after[keep].isfinite().all()
        agree(after[keep].detach(), before[keep].detach(), case.atol)
        wanted = gradients(curved(before[keep]), clean)
        found = torch.autograd.grad(curved(after[keep]), bad, retain_graph=True, materialize_grads=True)
        for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
            agree(a if i in pattern else a[keep], b if i in pattern else b[keep], case.atol)
            if i not in pattern:
                assert not (a[1] != 0).any() or a[1].isnan().any()  # nothing, or NaN where the input itself is
        asked = torch.autograd.grad(curved(after), bad, materialize_grads=True)
        assert any(a[1].isnan().any() for i, a in enumerate(asked) if i not in pattern)
        for i, (a, b) in enumerate(zip(asked, wanted, strict=True)):
            if i not in pattern:
                agree(a[keep], b[keep], case.atol)
        if case.status is not None:
            codes = case.status(*bad)
        else:
            records = [r.codes for r in monitor.records if r.codes.shape == (4,)]
            assert records
            codes = torch.stack(records).amax(0)  # CONVERGED is the least of the endings
        assert codes[1] != Status.CONVERGED.code
        assert (codes[keep] == Status.CONVERGED.code).all()


def check_trees(case: Case, g: torch.Generator) -> None:
    """Inputs in a nested pytree with constants and None have the same values and gradients."""
    assert case.tree is not None, f"{case}: give `tree`, or name check_trees in `lacks`"
    theta = case.example(g)
    plain, nested = leaves_of(theta), leaves_of(theta)
    y = case.vector(case.tree({"first": nested[0], "rest": (*nested[1:],), "none": None}), theta)
    agree(y.detach(), case(*theta), case.atol)
    agree(gradients(curved(y), nested), gradients(curved(case(*plain)), plain), case.atol)


def check_zero_dimensions(case: Case, g: torch.Generator) -> None:
    """An input without dimensions has a gradient without dimensions, which is not zero."""
    inputs = leaves_of(case.example(g))
    scalars = [t for t in inputs if t.ndim == 0]
    assert scalars, f"{case}: no input of the example has 0 dimensions; name check_zero_dimensions in `lacks`"
    for found in gradients(curved(case(*inputs)), scalars):
        assert found.shape == ()
        assert found != 0


def check_dtype_and_device(case: Case, g: torch.Generator) -> None:
    """float32 in, float32 out, on the device of the inputs, values and gradients; close to those of float64."""
    theta = case.example(g)
    wide = leaves_of(theta)
    y = case(*wide)
    wanted = gradients(curved(y), wide)
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        inputs = leaves_of([t.to(device, torch.float32) for t in theta])
        out = case(*inputs)
        found = gradients(torch.sin(out + torch.linspace(0.5, 1.5, len(out), device=device)).sum(), inputs)
        for a, b in ((out.detach(), y.detach()), *zip(found, wanted, strict=True)):
            assert a.dtype == torch.float32
            assert a.device.type == device
            assert float((a.cpu().double() - b).abs().max()) <= 1e-2 * max(1.0, float(b.abs().max()))


def check_captured(case: Case, g: torch.Generator) -> None:
    """A captured tensor that something differentiates is refused by its name."""
    assert case.capturing is not None, f"{case}: give `capturing`, or name check_captured in `lacks`"
    one = torch.ones((), dtype=D)
    for attempt in (
        lambda: case.capturing(one.clone().requires_grad_()),
        lambda: grad(lambda t: case.vector(case.capturing(t), ()).sum())(one),
        lambda: jvp(lambda t: case.vector(case.capturing(t), ()), (one,), (one,)),
    ):
        with pytest.raises(ValueError, match="captures `captured`"):
            attempt()
    case.capturing(one)  # a constant may be


def check_certificates(case: Case, g: torch.Generator) -> None:
    """Every derivative leaves its record: residuals per item, within their tolerances."""
    theta = case.examples(g, 3)
    monitor = Monitor()
    inputs = leaves_of(theta)
    y = case(*inputs, monitor=monitor)
    assert monitor.last("point") is not None
    first = torch.autograd.grad(curved(y), inputs, create_graph=True, materialize_grads=True)
    assert monitor.last("adjoint") is not None
    adjoints = sum(record.kind == "adjoint" for record in monitor.records)
    total = sum((f**2).sum() for f in first)
    torch.autograd.grad(total, inputs, allow_unused=True)
    assert sum(record.kind == "adjoint" for record in monitor.records) > adjoints
    for record in monitor.records:
        assert record.codes.shape == (3,)
        assert (torch.as_tensor(record.error) <= torch.as_tensor(record.tolerance)).all()
        assert record.converged.all()


def check_failures(case: Case, g: torch.Generator) -> None:
    """A bad item raises, warns or gives NaN, as asked: in the forward call or in the backward pass."""
    theta = case.spoiled(case.examples(g, 3), 1)

    def derivative(policy: str) -> tuple[Tensor, ...]:
        inputs = leaves_of(theta)
        return torch.autograd.grad(case(*inputs, on_failure=policy).sum(), inputs, materialize_grads=True)

    with pytest.raises(SolverError):
        derivative("raise")
    with pytest.warns(ImplicitWarning):
        derivative("warn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = derivative("nan")
    assert any(f[1].isnan().any() for f in found)


def check_guess(case: Case, g: torch.Generator) -> None:
    """The gradient of the initial guess is zero."""
    assert case.guess is not None, f"{case}: give `guess`, or name check_guess in `lacks`"
    theta = case.example(g)
    y = case(*theta)
    inputs = leaves_of(theta)
    y0 = (y + 1e-3 * torch.randn(y.shape, generator=g, dtype=D)).requires_grad_()
    found = gradients(curved(case.vector(case.guess(y0, *inputs), theta)), [y0, *inputs])
    assert (found[0] == 0).all()
    agree(found[1:], gradients(curved(case(*(again := leaves_of(theta)))), again), 1e3 * case.atol)


def check_module(case: Case, g: torch.Generator) -> None:
    """state_dict has parameters and buffers only; copies, files and dtypes go through."""
    assert case.module is not None, f"{case}: give `module`, or name check_module in `lacks`"
    module, inputs = case.module()

    def derivative(module: nn.Module, inputs: Any = inputs) -> tuple[Tensor, ...]:
        parameters = list(module.parameters())
        y = case.vector(module(*inputs), ())
        out = torch.autograd.grad(curved(y), parameters) if parameters else ()
        return y.detach(), *out

    before = derivative(module)  # a call changes nothing that is kept
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    assert set(module.state_dict()) <= set(named)
    assert set(dict(module.named_parameters())) <= set(module.state_dict())
    agree(derivative(module), before, 1e-6)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        agree(derivative(twin), before, 1e-6)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.01)
    agree(derivative(module), before, 1e-6)
    stream = io.BytesIO()
    torch.save(module.state_dict(), stream)
    stream.seek(0)
    twin.load_state_dict(torch.load(stream))
    agree(derivative(twin), before, 1e-6)
    narrow = [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    for a, b in zip(derivative(twin.float(), narrow), before, strict=True):
        assert a.dtype == torch.float32
        assert float((a.double() - b).abs().max()) <= 1e-2 * max(1.0, float(b.abs().max()))


def check_memory(case: Case, g: torch.Generator, steps: int = 20) -> None:
    """Training keeps no tensor alive from step to step."""
    inputs = leaves_of(case.example(g))
    optimizer = torch.optim.SGD(inputs, lr=1e-6)

    def live() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    def train(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            curved(case(*inputs)).backward()
            optimizer.step()

    train(10)
    before = live()
    train(steps)
    assert live() <= before


LAWS: tuple[Law, ...] = (
    check_gradcheck, check_gradgradcheck, check_third_order, check_transforms, check_vmap, check_batch,
    check_shared_sums, check_bad_item, check_trees, check_zero_dimensions, check_dtype_and_device, check_captured,
    check_certificates, check_failures, check_guess, check_module, check_memory,
)  # fmt: skip


def duties(cases: Iterable[Case], laws: Iterable[Law] = LAWS) -> list[Any]:
    """The (case, law) pairs for pytest.mark.parametrize, without what a case lacks, and with marks where it fails."""
    laws = tuple(laws)
    names = {law.__name__ for law in LAWS}
    pairs = []
    for case in cases:
        unknown = (set(case.lacks) | set(case.fails)) - names
        assert not unknown, f"{case}: there is no law {', '.join(sorted(unknown))}"
        for law in laws:
            if law.__name__ in case.lacks:  # it says nothing of this layer, for the reason that stands there
                continue
            marks = []
            if law.__name__ in case.fails:
                marks.append(pytest.mark.xfail(strict=True, reason=case.fails[law.__name__]))
            pairs.append(pytest.param(case, law, id=f"{case}-{law.__name__[6:]}", marks=marks))
    return pairs
