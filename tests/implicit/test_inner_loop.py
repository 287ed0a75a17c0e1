"""unroll_training: against unrolls by hand, torch.optim and higher; memory, transforms, policies, refusals."""

import copy
import gc
import math
import weakref

import pytest
import torch
from torch import nn

from nestopt import implicit
from nestopt.implicit import SGD, Adam, AdamW, unroll_training

D = torch.float64


def squares(module, batch):
    return ((module(batch[0]) - batch[1]) ** 2).mean()


def network(bias=False):
    """BatchNorm takes the mean away, so that a bias before it has no gradient: Adam would blow up its rounding."""
    return nn.Sequential(nn.Linear(3, 4, bias=bias), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()


def data(g, steps, tasks=()):
    X = torch.randn(*tasks, steps, 6, 3, generator=g, dtype=D)
    Y = torch.randn(*tasks, steps, 6, 1, generator=g, dtype=D)
    return X, Y


def rows(X, Y):
    return [(X[..., i, :, :], Y[..., i, :, :]) for i in range(X.shape[-3])]


def scalar(value=0.1):
    return torch.tensor(value, dtype=D, requires_grad=True)


OPTIMIZERS = {
    "sgd": lambda lr: SGD(lr, momentum=0.9, weight_decay=lr),
    "adam": lambda lr: Adam(lr, eps_root=1e-6),
    "adamw": lambda lr: AdamW(lr, weight_decay=lr, amsgrad=True, eps_root=1e-6),
}


def test_equals_an_unroll_by_hand(generator):
    """Bit for bit: the network written out, its BatchNorm with running statistics, SGD with momentum."""
    net, (X, Y), lr = network(), data(generator, 4), scalar()
    before = copy.deepcopy(net.state_dict())
    trained = unroll_training(net, squares, rows(X, Y), SGD(lr, momentum=0.9))
    outer = trained.evaluate(squares, (X[0], Y[0]))
    found = torch.autograd.grad(outer, [lr, *net.parameters()])

    p, m = list(net.parameters()), [None] * 5
    mean, var = torch.zeros(4, dtype=D), torch.ones(4, dtype=D)

    def forward(p, x, y, mean, var):
        h = nn.functional.batch_norm(x @ p[0].T, mean, var, p[1], p[2], training=True)
        return ((torch.tanh(h) @ p[3].T + p[4] - y) ** 2).mean()

    for x, y in zip(X, Y, strict=True):
        g = torch.autograd.grad(forward(p, x, y, mean, var), p, create_graph=True)
        m = [gi if mi is None else 0.9 * mi + gi for mi, gi in zip(m, g, strict=True)]
        p = [pi - lr * mi for pi, mi in zip(p, m, strict=True)]
    torch.testing.assert_close(trained.buffers["1.running_mean"], mean, rtol=0, atol=1e-14)
    torch.testing.assert_close(trained.buffers["1.running_var"], var, rtol=0, atol=1e-14)
    assert int(trained.buffers["1.num_batches_tracked"]) == 4
    value = forward(p, X[0], Y[0], mean, var)
    wanted = torch.autograd.grad(value, [lr, *net.parameters()])
    torch.testing.assert_close([outer.detach(), *found], [value.detach(), *wanted], rtol=0, atol=1e-13)
    for key, tensor in net.state_dict().items():  # not even the running statistics moved
        assert torch.equal(tensor, before[key]), key
    trained.copy_to(net)
    assert torch.equal(net[1].running_mean, trained.buffers["1.running_mean"])
    assert net[0].weight.is_leaf
    assert net[0].weight.requires_grad


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_the_same_run_as_torch_in_place(name, generator):
    net, (X, Y) = network(bias=True), data(generator, 5)
    net[0].bias.requires_grad_(False)
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    extra = {"momentum": 0.9, "dampening": 0.1} if name == "sgd" else {"amsgrad": True}
    groups = [{"params": [net[0].weight], "lr": 0.3}, {"params": list(net[1].parameters()), "weight_decay": 0.2}]
    theirs = kind([*groups, {"params": [net[3].weight]}], lr=0.1, **extra)

    def step(x, y):
        theirs.zero_grad()
        squares(net, (x, y)).backward()
        theirs.step()

    for x, y in rows(X, Y)[:2]:
        step(x, y)
    optimizer, state = implicit.from_torch(theirs, net)
    trained = unroll_training(net, squares, rows(X, Y)[2:], optimizer, state=state)
    for x, y in rows(X, Y)[2:]:
        step(x, y)
    for key, value in net.state_dict().items():
        ours = {**trained.parameters, **trained.buffers}[key]
        torch.testing.assert_close(ours.detach(), value, rtol=1e-12, atol=1e-12)
    if name != "sgd":
        assert trained.state.steps["3.weight"] == 5
        assert trained.state.steps["3.bias"] == 3  # in no group: lr 0


def test_higher_has_the_same_gradient(generator):
    higher = pytest.importorskip("higher", reason="needs the package higher")
    net, (X, Y) = network(), data(generator, 3)
    theirs = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    with higher.innerloop_ctx(net, theirs, copy_initial_weights=False) as (fmodel, diffopt):
        for x, y in rows(X, Y):
            diffopt.step(squares(fmodel, (x, y)))
        wanted = torch.autograd.grad(squares(fmodel, (X[0], Y[0])), list(net.parameters()))
    optimizer, state = implicit.from_torch(theirs, net)
    trained = unroll_training(net, squares, rows(X, Y), optimizer, state=state)
    found = torch.autograd.grad(trained.evaluate(squares, (X[0], Y[0])), list(net.parameters()))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "every"), [("sgd", None), ("adamw", 1)])
def test_gradcheck_of_the_end(name, every, generator):
    """Initial values, a learning rate and the data, forward and reverse, twice."""
    net, (X, Y) = nn.Sequential(nn.Linear(2, 1), nn.Tanh()).double(), data(generator, 2)
    X = X[..., :2]
    names = [name for name, _ in net.named_parameters()]

    def function(lr, X, *values):
        start = dict(zip(names, values, strict=True))
        return unroll_training(
            net, squares, rows(X, Y), OPTIMIZERS[name](lr), parameters=start, checkpoint_every=every
        ).evaluate(squares, (X[0], Y[0]))

    values = [p.detach().clone().requires_grad_() for p in net.parameters()]
    inputs = (scalar(), X.requires_grad_(), *values)
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("every", [1, 2, 3, 10])
def test_checkpoints_change_nothing(name, every, generator):
    """Values, gradients and second derivatives, with BatchNorm and dropout in the loop."""
    net, (X, Y) = nn.Sequential(network(), nn.Dropout(0.5)), data(generator, 5)
    lr = scalar()
    X.requires_grad_()

    def everything(every):
        trained = unroll_training(
            net, squares, rows(X, Y), OPTIMIZERS[name](lr), checkpoint_every=every, dropout="different", seed=3
        )
        torch.manual_seed(0)  # the outer evaluation draws by itself
        outer = trained.evaluate(squares, (X[0], Y[0])) + trained.losses.sum()
        leaves = [lr, X, *net.parameters()]
        first = torch.autograd.grad(outer, leaves, create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), leaves)
        return [outer, trained.losses, *trained.buffers.values(), *first, *second]

    for ours, plain in zip(everything(every), everything(None), strict=True):
        scale = max(1.0, float(plain.detach().abs().max()))
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12 * scale)
        assert ours.requires_grad == plain.requires_grad


@pytest.mark.parametrize("every", [None, 2])
def test_many_tasks_by_vmap(every, generator):
    """MAML: one start, one rate, five tasks; values, statistics and the summed gradient are those of a loop."""
    net, (X, Y), lr = network(), data(generator, 3, (5,)), scalar()

    def outer(X, Y, lr, values):
        trained = unroll_training(
            net, squares, rows(X, Y), OPTIMIZERS["adamw"](lr), parameters=values, checkpoint_every=every
        )
        return trained.evaluate(squares, (X[0], Y[0])), trained.buffers

    values = dict(net.named_parameters())
    batched, buffers = torch.func.vmap(outer, in_dims=(0, 0, None, None))(X, Y, lr, values)
    loop = [outer(x, y, lr, values) for x, y in zip(X, Y, strict=True)]
    torch.testing.assert_close(batched, torch.stack([value for value, _ in loop]), rtol=0, atol=1e-10)
    for key, buffer in buffers.items():
        torch.testing.assert_close(buffer, torch.stack([b[key] for _, b in loop]), rtol=0, atol=1e-10)
    leaves = [lr, *net.parameters()]
    wanted = torch.autograd.grad(sum(value for value, _ in loop), leaves)
    torch.testing.assert_close(torch.autograd.grad(batched.sum(), leaves), wanted, rtol=0, atol=1e-10)
    each = torch.func.vmap(torch.func.grad(lambda *a: outer(*a)[0], argnums=2), in_dims=(0, 0, None, None))
    per_task = torch.stack([torch.autograd.grad(outer(x, y, lr, values)[0], lr)[0] for x, y in zip(X, Y, strict=True)])
    torch.testing.assert_close(each(X, Y, lr.detach(), values), per_task, rtol=0, atol=1e-10)


@pytest.mark.parametrize("every", [None, 2])
def test_transforms_of_the_whole_loop(every, generator):
    """grad, jvp, jacfwd and hessian of torch.func against plain reverse mode, BatchNorm in train mode."""
    net, (X, Y) = network(), data(generator, 3)

    def outer(lr):
        optimizer = SGD(lr[0], momentum=lr[1])
        return unroll_training(net, squares, rows(X, Y), optimizer, checkpoint_every=every).evaluate(
            squares, (X[0], Y[0])
        )

    lr = torch.tensor([0.1, 0.5], dtype=D, requires_grad=True)
    (first,) = torch.autograd.grad(outer(lr), lr, create_graph=True)
    second = torch.stack([torch.autograd.grad(g, lr, retain_graph=True)[0] for g in first])
    lr, first = lr.detach(), first.detach()
    torch.testing.assert_close(torch.func.grad(outer)(lr), first, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.func.jacfwd(outer)(lr), first, rtol=0, atol=1e-12)
    v = torch.tensor([1.0, -2.0], dtype=D)
    torch.testing.assert_close(torch.func.jvp(outer, (lr,), (v,))[1], first @ v, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.func.hessian(outer)(lr), second, rtol=0, atol=1e-10)


def test_truncation_is_the_last_steps_from_a_constant(generator):
    net, (X, Y), lr = network(), data(generator, 5), scalar()
    batches = rows(X, Y)
    for every in (None, 1):
        trained = unroll_training(net, squares, batches, Adam(lr), truncate=2, checkpoint_every=every)
        outer = trained.evaluate(squares, batches[0])
        with torch.no_grad():
            middle = unroll_training(net, squares, batches[:3], Adam(lr))
        assert not middle.losses.requires_grad
        end = unroll_training(
            net,
            squares,
            batches[3:],
            Adam(lr),
            parameters=middle.parameters,
            buffers=middle.buffers,
            state=middle.state,
        )
        wanted = torch.autograd.grad(end.evaluate(squares, batches[0]), lr)
        found = torch.autograd.grad(outer, [lr, *net.parameters()], allow_unused=True)
        torch.testing.assert_close(found[:1], wanted, rtol=0, atol=1e-14)
        assert found[1:] == (None,) * 5
        assert len(trained.losses) == 5
        torch.testing.assert_close(trained.losses[:3], middle.losses, rtol=0, atol=0)
    whole = unroll_training(net, squares, batches, Adam(lr), truncate=9)
    assert torch.autograd.grad(whole.evaluate(squares, batches[0]), net[0].weight)[0].any()
    none = unroll_training(net, squares, batches, Adam(lr), truncate=0)
    assert not none.parameters["0.weight"].requires_grad


def test_going_on_is_going_through(generator):
    net, (X, Y), lr = network(), data(generator, 4), scalar()
    batches = rows(X, Y)
    whole = unroll_training(net, squares, batches, Adam(lr))
    half = unroll_training(net, squares, batches[:2], Adam(lr))
    rest = unroll_training(
        net, squares, batches[2:], Adam(lr), parameters=half.parameters, buffers=half.buffers, state=half.state
    )
    for key, value in whole.parameters.items():
        assert torch.equal(rest.parameters[key], value)
    wanted = torch.autograd.grad(whole(X[0]).sum(), lr)
    torch.testing.assert_close(torch.autograd.grad(rest(X[0]).sum(), lr), wanted, rtol=0, atol=1e-12)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(3, 3, bias=False)
        self.decode = nn.Linear(3, 3, bias=False)
        self.decode.weight = self.encode.weight
        self.scale = nn.Parameter(torch.ones(3), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.decode(torch.tanh(self.encode(x))) * self.scale


@pytest.mark.parametrize("transformed", [False, True])
def test_tied_frozen_and_unused_parameters(transformed, generator):
    net, x = Tied().double(), torch.randn(4, 3, generator=generator, dtype=D)
    scale = torch.full((3,), 2.0, dtype=D, requires_grad=True)  # learnt outside, not trained inside

    def run(scale):
        trained = unroll_training(
            net, lambda m, x: (m(x) ** 2).mean(), [x] * 3, AdamW(0.1, weight_decay=0.5, eps_root=1e-6),
            parameters={"scale": scale},
        )  # fmt: skip
        return trained(x).square().sum(), trained.parameters

    (slope, parameters) = torch.func.grad(run, has_aux=True)(scale) if transformed else run(scale)
    if not transformed:
        (slope,) = torch.autograd.grad(slope, scale)
    assert list(parameters) == ["scale", "unused", "encode.weight"]
    assert torch.equal(parameters["unused"], net.unused)  # no gradient: not even decayed
    assert torch.equal(parameters["scale"], scale)
    assert not torch.equal(parameters["encode.weight"], net.encode.weight)
    h = 1e-6
    for i in range(3):
        e = h * torch.eye(3, dtype=D)[i]
        difference = (run(scale.detach() + e)[0] - run(scale.detach() - e)[0]) / (2 * h)
        assert slope[i].item() == pytest.approx(difference.item(), rel=1e-6)


def test_copying_into_a_tied_module(generator):
    net, x = Tied().double(), torch.randn(4, 3, generator=generator, dtype=D)
    other = copy.deepcopy(net)
    trained = unroll_training(net, lambda m, x: (m(x) ** 2).mean(), [x] * 2, SGD(0.1))
    trained.copy_to(other)
    assert other.decode.weight is other.encode.weight
    assert torch.equal(other(x), trained(x))
    assert not torch.equal(net(x), other(x))


def test_train_and_eval_mode(generator):
    net, (X, Y) = network().eval(), data(generator, 2)
    trained = unroll_training(net, squares, rows(X, Y), SGD(0.1))
    assert torch.equal(trained.buffers["1.running_mean"], torch.zeros(4, dtype=D))
    assert not net.training
    net[1].train()
    trained = unroll_training(net, squares, rows(X, Y), SGD(0.1))
    assert trained.buffers["1.running_mean"].all()


def test_dropout_policies(generator):
    net, (X, Y) = nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.5)).double(), data(generator, 3)
    batches = [(X[0], Y[0])] * 3
    lr = 1e-9  # nearly nothing moves: a loss tells the mask

    def losses(**options):
        return unroll_training(net, squares, batches, SGD(lr), **options).losses.detach()

    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="draws random numbers, and dropout='error'"):
        losses()
    same, different = losses(dropout="same"), losses(dropout="different")
    assert float(same.std()) < 1e-7
    assert float(different.std()) > 1e-3
    assert torch.equal(losses(dropout="different"), different)
    assert not torch.equal(losses(dropout="different", seed=1), different)
    net.eval()
    plain = losses()
    net.train()
    assert torch.equal(losses(dropout="off"), plain)
    assert net[1].training
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="dropout='off'"):
        unroll_training(net, lambda m, b: squares(m, b) + torch.rand(()), batches, SGD(lr), dropout="off")


@pytest.mark.parametrize("every", [None, 2])
def test_dropout_over_tasks(every, generator):
    """One mask for all tasks or one for each, as vmap's randomness says; derivatives are those of the same masks."""
    net, (X, Y) = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1)).double(), data(generator, 3, (4,))
    X, Y = X[:1].expand_as(X), Y[:1].expand_as(Y)  # the same task four times: what differs is the mask

    def outer(X, Y, lr):
        options = {"dropout": "different", "checkpoint_every": every}
        return unroll_training(net, squares, rows(X, Y), SGD(lr), **options).losses.sum()

    for randomness in ("same", "different"):
        tasks = torch.func.vmap(outer, (0, 0, None), randomness=randomness)
        values = tasks(X, Y, scalar())
        assert (float(values.detach().std()) < 1e-12) == (randomness == "same")
        lr, h = scalar(), 1e-6
        (slope,) = torch.autograd.grad(tasks(X, Y, lr).sum(), lr)
        with torch.no_grad():
            difference = (tasks(X, Y, lr + h) - tasks(X, Y, lr - h)).sum() / (2 * h)
        assert slope.item() == pytest.approx(difference.item(), rel=1e-6)


def test_the_loss_may_do_anything_with_the_module(generator):
    net, x = network(), torch.randn(6, 3, generator=generator, dtype=D)
    seen = []

    def loss(module, x):
        seen.append(module)
        twice = module(x) + module(x + 1)
        return (twice**2).mean() + sum((p**2).sum() for p in module.parameters()) + module[1](module[0](x)).sum()

    trained = unroll_training(net, loss, [x] * 2, SGD(0.01))
    assert seen[0] is net
    assert int(trained.buffers["1.num_batches_tracked"]) == 6
    assert int(net[1].num_batches_tracked) == 0
    end = trained.evaluate(loss, x)
    assert end < trained.losses[0]


class Memory(nn.Module):
    """A buffer that a derivative passes through, and one of integers, both assigned anew."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, dtype=D))
        self.register_buffer("h", torch.zeros(2, dtype=D))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x):
        self.h = torch.tanh(self.h + self.w * x)
        self.count = self.count + 1
        return self.h


@pytest.mark.parametrize("every", [None, 1, 2])
def test_a_buffer_with_a_derivative(every, generator):
    net, x = Memory(), torch.randn(3, 2, generator=generator, dtype=D)
    lr = scalar()
    trained = unroll_training(net, lambda m, x: m(x).square().sum(), list(x), SGD(lr), checkpoint_every=every)
    found = torch.autograd.grad(trained.buffers["h"].sum(), [lr, net.w])
    rate, start = scalar(), torch.ones(2, dtype=D, requires_grad=True)
    h, w = torch.zeros(2, dtype=D), start
    for row in x:
        alias = w.view_as(w)  # the inner gradient is that of this step alone
        h = torch.tanh(h + alias * row)
        (g,) = torch.autograd.grad(h.square().sum(), alias, create_graph=True)
        w = w - rate * g
    wanted = torch.autograd.grad(h.sum(), [rate, start])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert int(trained.buffers["count"]) == 3
    assert int(net.count) == 0


@pytest.mark.parametrize("every", [None, 2])
def test_float32_stays(every, generator):
    net, (X, Y) = network().float(), data(generator, 2)
    batches = [(x.float(), y.float()) for x, y in rows(X, Y)]
    lr = torch.tensor(0.1, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trained = unroll_training(net, squares, batches, SGD(lr, momentum=0.9), checkpoint_every=every)
    assert {p.dtype for p in trained.parameters.values()} == {torch.float32} == {trained.losses.dtype}
    (found,) = torch.autograd.grad(trained.evaluate(squares, batches[0]), lr)
    assert found.dtype == torch.float32
    double = network()
    double.load_state_dict({k: v.double() if v.is_floating_point() else v for k, v in net.state_dict().items()})
    rate = scalar()
    exact = unroll_training(double, squares, rows(X, Y), SGD(rate, momentum=0.9)).evaluate(squares, (X[0], Y[0]))
    assert float(found) == pytest.approx(torch.autograd.grad(exact, rate)[0].item(), rel=1e-3)


def test_a_nan_batch_is_seen(generator):
    net, (X, Y) = network(), data(generator, 3)
    X[1, 0, 0] = math.nan
    trained = unroll_training(net, squares, rows(X, Y), SGD(0.1))
    assert trained.losses.isfinite().tolist() == [True, False, False]
    assert trained.finite is False


def test_no_steps(generator):
    net = network()
    trained = unroll_training(net, squares, [], SGD(0.1))
    assert trained.losses.shape == (0,)
    assert torch.equal(trained.parameters["0.weight"], net[0].weight)
    assert torch.autograd.grad(trained.parameters["0.weight"].sum(), net[0].weight)[0].all()


def live_tensors():
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize(("outer_steps", "options"), [(60, {}), (20, {"checkpoint_every": 1})])
def test_memory_is_flat_over_outer_steps(outer_steps, options, generator):
    net, (X, Y), lr = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1)).double(), data(generator, 2), scalar(0.01)
    batches = rows(X, Y)
    meta = torch.optim.SGD([lr, *net.parameters()], lr=1e-4)

    def step():
        meta.zero_grad()
        unroll_training(net, squares, batches, SGD(lr, momentum=0.9), **options).evaluate(
            squares, batches[0]
        ).backward()
        meta.step()

    for _ in range(3):
        step()
    gc.collect()
    gc.disable()  # reference counts suffice: no cycle runs through the graph
    try:
        before = live_tensors()
        for _ in range(outer_steps):
            step()
        assert live_tensors() <= before
    finally:
        gc.enable()


def test_checkpoints_bound_what_the_graph_keeps(generator):
    net, (X, Y), lr = network(), data(generator, 36), scalar()

    class Box:
        def __init__(self, tensor):
            self.tensor = tensor

    def kept(**options):
        boxes = weakref.WeakSet()

        def pack(tensor):
            box = Box(tensor)
            boxes.add(box)
            return box

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
            trained = unroll_training(net, squares, rows(X, Y), SGD(lr, momentum=0.9), **options)
            return sum(box.tensor.nbytes for box in boxes), trained

    assert kept(checkpoint_every=6)[0] < kept()[0] / 4
