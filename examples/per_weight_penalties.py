"""Millions of hyperparameters: a penalty for every weight of a network, and one for every feature of a regression.

1. digits: a network of 1 076 010 weights and as many penalties, learnt while it trains; time and memory against plain.
2. breast_cancer: 30 penalties against one; more of them than the validation points can tell apart over-fit those.

Run: python examples/per_weight_penalties.py [--output FIGURE.png] [--quick]
"""

from __future__ import annotations

import argparse
import os
import time
import weakref

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import train_test_split
from torch.func import functional_call
from torch.nn.functional import binary_cross_entropy_with_logits as logistic
from torch.nn.functional import cross_entropy, pad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nestopt import bilevel, constrained, implicit, linalg

ROW = "{:<30} {:>8} {:>6} {:>8} {:>6} {:>11} {:>7}"
HEAD = ("seconds", "ratio", "memory", "ratio", "validation", "test")


class PeakMemory(TorchDispatchMode):
    """Bytes of all tensors made inside that are alive at once, at most; on any device."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            if storage._cdata not in self.sizes and storage._cdata not in given:  # a view makes nothing
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, storage._cdata)
        return out

    def forget(self, key):
        self.now -= self.sizes.pop(key)


def split(X, t, train, validation):
    X, V, t, v = train_test_split(X, t, train_size=train, random_state=0, stratify=t)
    V, E, v, e = train_test_split(V, v, train_size=validation, random_state=0, stratify=v)
    return [torch.as_tensor(a) for a in (X, t, V, v, E, e)]


def per_weight(quick):
    images, labels = load_digits(return_X_y=True)
    rows, width, steps = (100, 400, 20) if quick else (300, 1000, 100)
    X, t, V, v, E, e = split((images / 16).astype("float32"), labels, rows, rows)
    torch.manual_seed(0)
    first, middle, last = torch.nn.Linear(64, width), torch.nn.Linear(width, width), torch.nn.Linear(width, 10)
    net = torch.nn.Sequential(first, torch.nn.Tanh(), middle, torch.nn.Tanh(), last)
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}

    def loss(y, inputs, targets):
        return cross_entropy(functional_call(net, y, (inputs,)), targets)

    problem = bilevel.Problem(
        upper=lambda x, y: loss(y, V, v),
        lower=lambda x, y: loss(y, X, t) + sum((x[name] * p * p).sum() for name, p in y.items()) / 2,
        upper_set=constrained.Box(0.0, 1.0),
    )

    def plain(steps):
        trained = {name: p.clone().requires_grad_() for name, p in weights.items()}
        optimizer = torch.optim.Adam(trained.values(), weight_decay=1e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(trained, X, t).backward()
            optimizer.step()
        return {name: p.detach() for name, p in trained.items()}

    def penalised(steps):
        """Through the last of every five steps the validation loss moves the penalties."""
        x0 = {name: torch.full_like(p, 1e-3) for name, p in weights.items()}
        stopping = linalg.Stopping(rtol=0.0, max_iter=steps // 5 - 1)
        method = bilevel.Unrolled(steps=5, truncation=1, optimizer=implicit.SGD(0.3), stopping=stopping)
        return bilevel.solve(problem, x0, weights, method, callbacks=[bilevel.ProgressBar(label="penalties")]).y

    print(ROW.format(f"digits, {sum(p.numel() for p in weights.values())} penalties", *HEAD))
    found, unit = {}, (1.0, 1)
    for name, train in (("plain training (Adam)", plain), ("through one step", penalised)):
        with PeakMemory() as memory:  # it slows down, so this is another run
            train(10)
        begun = time.process_time()
        y = train(steps)
        seconds = time.process_time() - begun
        fitted = [float((functional_call(net, y, (A,)).argmax(-1) == b).double().mean()) for A, b in ((V, v), (E, e))]
        unit = (seconds, memory.peak) if train is plain else unit
        found[name] = longer, larger = seconds / unit[0], memory.peak / unit[1]
        cost = f"{seconds:.1f}", f"{longer:.2f}x", f"{memory.peak / 2**20:.0f} MB", f"{larger:.2f}x"
        print(ROW.format(name, *cost, *(f"{share:.3f}" for share in fitted)))
    return found


def per_feature(quick):
    X, t, V, v, E, e = split(*load_breast_cancer(return_X_y=True), 200, 180)
    X, V, E = (pad((A - X.mean(0)) / X.std(0), (0, 1), value=1.0) for A in (X, V, E))  # a column for the bias
    problem = bilevel.Problem(
        upper=lambda x, y: logistic(V @ y, v.double()),
        lower=lambda x, y: logistic(X @ y, t.double()) + (torch.exp(x) * y[:-1] ** 2).sum() / 2,
        upper_set=constrained.Box(-12.0, 4.0),
    )
    print(ROW.format("\nbreast_cancer", "", "", "", "loss", "validation", "test"))
    for name, n in (("one penalty", 1), ("30 penalties, one a feature", 30)):
        method = bilevel.AID(linear_solver=linalg.Cholesky(), stopping=linalg.Stopping(max_iter=10 if quick else 60))
        x0, y0 = torch.zeros(n).double(), torch.zeros(31).double()
        res = bilevel.solve(problem, x0, y0, method, callbacks=[bilevel.ProgressBar(label=name)])
        fitted = [f"{float(((A @ res.y > 0) == b).double().mean()):.3f}" for A, b in ((V, v), (E, e))]
        print(ROW.format(name, "", "", "", f"{res.value:.4f}", *fitted))
    print("  30 penalties fit the 180 validation points better, and the test set worse: they over-fit.")
    return res


def draw(output, found, res):
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (name, (longer, larger)) in enumerate(found.items()):
        left.bar([i, i + 3], [longer, larger], label=name)
    left.set(xticks=[0.5, 3.5], xticklabels=["time", "memory"], title="one penalty a weight, against plain training")
    left.legend()
    right.bar(range(30), torch.exp(res.x).tolist(), log=True)
    right.set(xlabel="feature", title="learnt penalties, breast_cancer")
    figure.savefig(output, dpi=120)
    print(f"figure: {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default=os.path.join(os.environ.get("NESTOPT_OUTPUT", "."), "penalties.png"))
    parser.add_argument("--quick", action="store_true", default=bool(os.environ.get("NESTOPT_QUICK")))
    options = parser.parse_args()
    torch.set_num_threads(1)  # so that the times compare
    draw(options.output, per_weight(options.quick), per_feature(options.quick))
