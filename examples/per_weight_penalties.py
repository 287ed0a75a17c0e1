"""Millions of hyperparameters: a penalty for every weight of a network, and one for every feature of a regression.

1. digits: a network of 1 076 010 weights and as many penalties, learnt while it trains. Every step also pulls the
   validation loss back through the training step before it; or, from the trained network, by implicit hypergradients.
   Time and memory against plain training.
2. breast_cancer: 30 penalties against one. More hyperparameters than validation points can tell apart over-fit them.

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
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import trange

from nestopt import bilevel, implicit, linalg

ROW = "{:<30} {:>8} {:>6} {:>8} {:>6} {:>11} {:>7}"
HEAD = ("seconds", "ratio", "memory", "ratio", "validation", "test")


class PeakMemory(TorchDispatchMode):
    """Bytes of all tensors made inside that are alive at once, at most; on any device."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, storage._cdata)
        return out

    def forget(self, key):
        self.now -= self.sizes.pop(key)


def split(X, t, train, validation):
    X, rest, t, rest_t = train_test_split(X, t, train_size=train, random_state=0, stratify=t)
    V, E, v, e = train_test_split(rest, rest_t, train_size=validation, random_state=0, stratify=rest_t)
    return [torch.as_tensor(a) for a in (X, t, V, v, E, e)]


def per_weight(quick):
    images, labels = load_digits(return_X_y=True)
    X, t, V, v, E, e = split((images / 16).astype("float32"), labels, 300, 300)
    width, steps = (100, 20) if quick else (1000, 150)
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, width), torch.nn.Linear(width, width), torch.nn.Linear(width, 10)]
    net = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1], torch.nn.Tanh(), layers[2])
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    x0 = {name: torch.full_like(p, 1e-3**0.5) for name, p in weights.items()}  # roots of the penalties
    rate = 0.3

    def training(net, x):
        return cross_entropy(net(X), t) + sum(((x[name] * p) ** 2).sum() for name, p in net.named_parameters()) / 2

    def plain(steps):
        trained = {name: p.clone().requires_grad_() for name, p in weights.items()}
        optimizer = torch.optim.Adam(trained.values(), weight_decay=1e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            cross_entropy(torch.func.functional_call(net, trained, (X,)), t).backward()
            optimizer.step()
        return {name: p.detach() for name, p in trained.items()}

    def one_step(steps):
        """Each training step moves the weights; pulled back through it, the validation loss moves their penalties."""
        x = {name: p.clone().requires_grad_() for name, p in x0.items()}
        penalties, y = torch.optim.RMSprop(x.values(), lr=0.003), weights
        for _ in trange(steps, desc="one step", leave=steps > 2):
            trained = implicit.unroll_training(net, training, [x], implicit.SGD(rate), parameters=y)
            penalties.zero_grad()
            cross_entropy(trained(V), v).backward()
            penalties.step()
            y = {name: p.detach() for name, p in trained.parameters.items()}
        return y

    def implicitly(steps):
        """From the trained network: ten training steps, five of CG for the hypergradient, one step of the penalties."""
        call = torch.func.functional_call
        problem = bilevel.Problem(
            upper=lambda x, y: cross_entropy(call(net, y, (V,)), v),
            lower=lambda x, y: cross_entropy(call(net, y, (X,)), t) + sum(((x[k] * y[k]) ** 2).sum() for k in y) / 2,
        )
        method = bilevel.AID(
            upper_step=bilevel.TorchOptimizer(lambda x: torch.optim.RMSprop(x, lr=0.01)),
            lower_solver=implicit.GradientDescent(step_size=rate, max_iter=10, rtol=0.0),
            linear_solver=linalg.CG(max_iter=5),
            stopping=linalg.Stopping(rtol=1e-6, max_iter=max(1, steps // 10)),
        )
        bar = bilevel.ProgressBar(label="implicit", disable=steps <= 2)
        return bilevel.solve(problem, x0, plain(steps), method, callbacks=[bar]).y

    print(ROW.format(f"digits, {sum(p.numel() for p in weights.values())} penalties", *HEAD))
    found, unit = {}, None
    for name, train in (("plain training (Adam)", plain), ("through one step", one_step), ("implicit, 5 CG", implicitly)):
        with PeakMemory() as memory:  # it slows down, so this is another run
            train(2)
        begun = time.process_time()
        y = train(steps)
        seconds = time.process_time() - begun
        unit = unit or (seconds, memory.peak)
        accuracy = [float((torch.func.functional_call(net, y, (A,)).argmax(-1) == b).double().mean()) for A, b in ((V, v), (E, e))]
        ratios = f"{seconds / unit[0]:.2f}x", f"{memory.peak / unit[1]:.2f}x"
        print(ROW.format(name, f"{seconds:.1f}", ratios[0], f"{memory.peak / 2**20:.0f} MB", ratios[1], *(f"{a:.3f}" for a in accuracy)))
        found[name] = seconds, memory.peak / 2**20, *accuracy
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    import sys
    per_weight("--quick" in sys.argv)
