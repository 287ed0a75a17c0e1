"""Two modules as a bilevel problem: each policy, each kind of layer, and the hypergradient against differences."""

import pytest
import torch
import torch.nn.functional as F
from laws import rand
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nestopt import bilevel
from nestopt.bilevel.lower_choice import lower_level
from nestopt.bilevel.problem import Linearization, Spaces
from nestopt.implicit import NewtonCG
from nestopt.linalg import Stopping

DOUBLE = torch.float64
TOKENS = torch.randint(0, 5, (12, 4), generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 3


def hyper(model, value=-3.5, spread=1.0):
    """A log penalty for every trainable weight, each another: two layers with equal ones may be rotated against."""
    g = torch.Generator().manual_seed(2)
    named = [(n.replace(".", "_"), p) for n, p in model.named_parameters() if p.requires_grad]
    return nn.ParameterDict({n: value + spread * torch.randn(p.shape, generator=g) for n, p in named})


def upper_loss(penalties, model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def lower_loss(penalties, model, batch):
    decay = [
        (penalties[n.replace(".", "_")].exp() * p**2).sum() for n, p in model.named_parameters() if p.requires_grad
    ]
    return upper_loss(penalties, model, batch) + sum(decay) / 2


class Last(nn.Module):
    """The last output of an LSTM, or of attention over the tokens' own embedding."""

    def __init__(self, kind, dropout=0.0):
        super().__init__()
        width = 2 if kind == "lstm" else 4
        self.embedding = nn.Embedding(5, width)
        if kind == "lstm":
            self.core = nn.LSTM(width, width, num_layers=1 + (dropout > 0), batch_first=True, dropout=dropout)
        else:
            self.core = nn.MultiheadAttention(width, 2, dropout=dropout, batch_first=True)
        self.head = nn.Linear(width, 3)
        self.kind = kind

    def forward(self, tokens):
        h = self.embedding(tokens)
        h = self.core(h)[0] if self.kind == "lstm" else self.core(h, h, h)[0]
        return self.head(h[:, -1])


class Tied(nn.Module):
    """Logits by the embedding's own matrix, of the first three tokens."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.out = nn.Linear(4, 5, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens):
        return self.out(torch.tanh(self.embedding(tokens).mean(1)))[:, :3]


class Frozen(nn.Module):
    """A fixed first layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Embedding(5, 4).requires_grad_(False)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(self.first(tokens).mean(1))


def vision(*layers):
    return nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(16, 4), *layers, nn.Tanh(), nn.Linear(4, 3))


MODELS = {
    "perceptron": lambda: vision(),
    "lstm": lambda: Last("lstm"),
    "attention": lambda: Last("attention"),
    "tied": Tied,
    "frozen": Frozen,
    "layer norm": lambda: nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 3)),
}


def made(model, **policies):
    torch.manual_seed(1)
    model = model().double()
    return bilevel.from_modules(hyper(model).double(), model, upper_loss, lower_loss, **policies)


SOLVER = NewtonCG(rtol=1e-10, atol=0.0, max_iter=300)


def check(problem, data):
    """The hypergradient at y*(x0), after its comparison with differences."""
    spaces = Spaces.of(problem.x0, problem.y0)
    level = lower_level(problem, spaces, data, SOLVER)
    y = level.solve(spaces.x.flatten(problem.x0), spaces.y.flatten(problem.y0)).y
    assert float(y.norm()) > 0.1  # a network that has learnt something
    y = spaces.y.unflatten(y)
    bilevel.check_hypergradient(problem, problem.x0, y, 1, data=data, lower_solver=SOLVER, step=1e-2)
    return bilevel.hypergradient(problem, problem.x0, y, data=data, certificate=False)


BATCH = (TOKENS, LABELS)


@pytest.mark.parametrize("model", MODELS)
def test_hypergradients_of_layers_agree_with_differences(model):
    problem = made(MODELS[model])
    hg = check(problem, BATCH)
    assert hg.converged
    # one variable for a tied parameter, none for a frozen one
    assert len(problem.y0) == {"tied": 1, "frozen": 2}.get(model, len(problem.y0))


@pytest.mark.parametrize("policy", ["frozen", "batch"])
def test_batch_norm(policy):
    def model():
        net = vision(nn.BatchNorm1d(4, eps=0.5))  # with a small one the layer before it has no scale
        net[3].running_mean += 0.1
        return net

    problem = made(model, batch_norm=policy)
    norm = problem.modules.lower[3]
    before = [buffer.clone() for buffer in norm.buffers()]
    hg = check(problem, BATCH)
    assert hg.converged and norm.training
    for buffer, old in zip(norm.buffers(), before, strict=True):
        assert torch.equal(buffer, old)
    # what it normalised by
    net = problem.modules.lower
    net.train(policy == "batch")
    value = upper_loss(None, net, BATCH)
    net.train()
    found = problem.upper(problem.x0, problem.y0, BATCH)
    torch.testing.assert_close(found, value, rtol=1e-12, atol=0)


def test_running_statistics_move_outside_of_products_alone():
    problem = made(lambda: vision(nn.BatchNorm1d(4)), batch_norm="batch")
    norm = problem.modules.lower[3]
    few = bilevel.F2SA(debias=None, steps=2, stopping=Stopping(rtol=0.0, max_iter=3))
    data = lambda k: BATCH  # noqa: E731
    res = bilevel.solve(problem, problem.x0, problem.y0, few, data=data)
    assert int(norm.num_batches_tracked) == 0
    again = bilevel.solve(problem, problem.x0, problem.y0, few, data=data, callbacks=[problem.track_statistics(data)])
    assert torch.equal(res.state.x_vector, again.state.x_vector)  # they have no part in the run
    assert int(norm.num_batches_tracked) == 4  # at the start and after each step
    problem.update_statistics(res, [BATCH, BATCH])
    problem.copy_to(res)
    features = problem.modules.lower[:3](TOKENS)
    torch.testing.assert_close(norm.running_mean, features.mean(0).detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(norm.running_var, features.var(0).detach(), rtol=1e-10, atol=1e-12)
    assert norm.momentum == 0.1 and norm.training


@pytest.mark.parametrize("kind", ["module", "lstm", "attention"])
def test_dropout(kind):
    def model():
        return vision(nn.Dropout(0.3)) if kind == "module" else Last(kind, dropout=0.3)

    state = torch.get_rng_state()
    refused = made(model)
    with pytest.raises(ValueError, match="draws random numbers, and dropout='error'"):
        bilevel.hypergradient(refused, refused.x0, refused.y0, data=BATCH)
    off = made(model, dropout="off")
    if kind == "module":
        assert check(off, BATCH).converged
    value = off.upper(off.x0, off.y0, BATCH)
    off.modules.lower.eval()
    torch.testing.assert_close(upper_loss(None, off.modules.lower, BATCH), value, rtol=1e-12, atol=0)
    same = made(model, dropout="same", seed=3)
    torch.set_rng_state(state)
    first, second = (same.lower(same.x0, same.y0, BATCH) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, off.lower(off.x0, off.y0, BATCH))
    if kind == "module":
        check(same, BATCH)


def test_a_mask_for_each_outer_step():
    problem = made(lambda: vision(nn.Dropout(0.3)), dropout="different", seed=3)
    with pytest.raises(ValueError, match=r"pass data=problem.data, or problem.numbered"):
        problem.lower(problem.x0, problem.y0, BATCH)
    source = problem.numbered(lambda k: BATCH)
    values = [problem.lower(problem.x0, problem.y0, source(k)) for k in (1, 2, 1)]
    assert torch.equal(values[0], values[2]) and not torch.equal(values[0], values[1])
    runs = [
        bilevel.solve(
            problem,
            problem.x0,
            problem.y0,
            bilevel.F2SA(debias=None, steps=2, stopping=Stopping(rtol=0.0, max_iter=3)),
            data=source,
        )
        for _ in range(2)
    ]
    assert torch.equal(runs[0].state.x_vector, runs[1].state.x_vector)
    loader = DataLoader(TensorDataset(TOKENS, LABELS), batch_size=6)
    other = made(lambda: vision(nn.Dropout(0.3)), dropout="different", lower_loader=loader)
    assert other.data(5).lower.step == 5


def test_autocast_lowers_first_derivatives_alone():
    torch.manual_seed(1)
    model = vision()
    problems = [
        bilevel.from_modules(hyper(model), model, upper_loss, lower_loss, autocast=a) for a in (None, torch.bfloat16)
    ]
    exact = problems[0]
    spaces = Spaces.of(exact.x0, exact.y0)
    x, y = spaces.x.flatten(exact.x0), spaces.y.flatten(exact.y0)
    slopes = [problem.oracle(spaces, BATCH).lower(x, y) for problem in problems]
    gap = float((slopes[0].y - slopes[1].y).norm() / slopes[0].y.norm())
    assert 1e-5 < gap < 2e-2  # bfloat16 has 8 bits
    assert slopes[1].y.dtype == torch.float32
    points = [Linearization(problem, spaces, x, y, BATCH) for problem in problems]
    v = rand(len(y)).float()
    assert torch.equal(points[0].hessian @ v, points[1].hessian @ v)
    assert torch.equal(points[0].lower_y, points[1].lower_y)
    assert not torch.equal(points[0].upper_y, points[1].upper_y)
    with pytest.raises(ValueError, match="autocast needs float32 parameters"):
        made(vision, autocast=torch.bfloat16)


@pytest.mark.slow
def test_micro_batches_are_their_mean_with_one_graph_at_a_time():
    whole = made(MODELS["perceptron"])
    parts = made(MODELS["perceptron"], micro_batch=5)  # 5, 5 and 2 samples
    spaces = Spaces.of(whole.x0, whole.y0)
    x, y = spaces.x.flatten(whole.x0), spaces.y.flatten(whole.y0)
    one, two = (Linearization(problem, spaces, x, y, BATCH) for problem in (whole, parts))
    two.check()
    V = rand(3, len(y))
    close = {"rtol": 1e-11, "atol": 1e-13}
    for part in ("upper", "lower", "upper_x", "upper_y", "lower_y"):
        torch.testing.assert_close(getattr(two, part), getattr(one, part), **close)
    torch.testing.assert_close(two.hessian @ V, one.hessian @ V, **close)
    torch.testing.assert_close(two.cross.T @ V, one.cross.T @ V, **close)
    check(parts, BATCH)
    alive = []

    def count(module, inputs, output):
        alive.append(len(inputs[0]))

    handle = parts.modules.lower.register_forward_hook(count)
    parts.oracle(spaces, BATCH).lower(x, y)
    handle.remove()
    assert alive == [5, 5, 2] * 2 or sorted(alive) == [2, 2, 5, 5, 5, 5]  # forward, then each again for its backward
    captured = rand(3).requires_grad_()
    hidden = bilevel.from_modules(
        parts.modules.upper, parts.modules.lower, lambda h, m, b: upper_loss(h, m, b) + captured.sum(), lower_loss,
        micro_batch=5,
    )  # fmt: skip
    with pytest.raises(ValueError, match="belong to neither module"):
        hidden.upper(hidden.x0, hidden.y0, BATCH)


def test_refusals():
    model = vision().double()
    penalties = hyper(model).double()
    with pytest.raises(TypeError, match=r"upper_module must be a torch.nn.Module"):
        bilevel.from_modules({"a": rand(2)}, model, upper_loss, lower_loss)
    with pytest.raises(TypeError, match="lower_loss must be a function"):
        bilevel.from_modules(penalties, model, upper_loss, None)
    with pytest.raises(ValueError, match=r"are one parameter"):
        bilevel.from_modules(model, nn.Sequential(model[2]), upper_loss, lower_loss)
    with pytest.raises(ValueError, match="no parameter that requires grad"):
        bilevel.from_modules(nn.Tanh(), model, upper_loss, lower_loss)
    with pytest.raises(ValueError, match="batch_norm must be one of"):
        bilevel.from_modules(penalties, model, upper_loss, lower_loss, batch_norm="train")
    for size in (0, 2.5):
        with pytest.raises(ValueError, match=f"micro_batch must be .* but got {size}"):
            bilevel.from_modules(penalties, model, upper_loss, lower_loss, micro_batch=size)
    with pytest.raises(TypeError, match=r"lower_loader must be a .*DataLoader, but got list"):
        bilevel.from_modules(penalties, model, upper_loss, lower_loss, [(TOKENS, LABELS)])
    with pytest.raises(ValueError, match="upper_loader is given without lower_loader"):
        bilevel.from_modules(penalties, model, upper_loss, lower_loss, None, DataLoader(TensorDataset(TOKENS)))
    with pytest.raises(ValueError, match=r"3 has running statistics and is in train mode"):
        check(made(lambda: vision(nn.BatchNorm1d(4))), BATCH)


def test_one_penalty_a_weight_of_a_perceptron_on_digits():
    inputs, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    inputs = (inputs / 16).float()
    train, valid = (
        DataLoader(TensorDataset(inputs[rows], labels[rows]), batch_size=100, shuffle=True, generator=torch.Generator())
        for rows in (slice(0, 300), slice(300, 600))
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    penalties = hyper(model, -4.0, 0.0)
    problem = bilevel.from_modules(penalties, model, upper_loss, lower_loss, train, valid)
    assert sum(p.numel() for p in problem.x0.values()) == sum(p.numel() for p in problem.y0.values()) == 1210
    rule = bilevel.TorchOptimizer(lambda params: torch.optim.Adam(params, lr=0.05))
    method = bilevel.SOBA(step_size=0.3, upper_step=rule, stopping=Stopping(max_iter=60))
    held = bilevel.Batch(upper=(inputs[300:600], labels[300:600]), lower=(inputs[:300], labels[:300]))
    res = bilevel.solve(problem, problem.x0, problem.y0, method, data=problem.data, held=held, check_every=30)
    assert res.value < 0.5 * res.history[0]["value"]
    problem.copy_to(res)
    for name, p in model.named_parameters():
        assert torch.equal(p.detach(), res.y[name])
        assert torch.equal(penalties[name.replace(".", "_")].detach(), res.x[name.replace(".", "_")])
    accuracy = (model(inputs[600:]).argmax(1) == labels[600:]).float().mean()
    assert accuracy > 0.8
