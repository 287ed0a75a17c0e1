"""Pruning a digits network to 95 % zeros: Optimal Brain Surgeon with M-FAC against the smallest magnitudes.

1. One shot: the trained network loses part of its weights at once, without retraining.
2. Gradual: ten prunings along the cubic schedule to 80 ... 99 % zeros, three epochs of retraining after each.
M-FAC wins, except where nothing is left (one shot at 95 %: both guess). Longer retraining narrows the gap without
closing it: with 30 epochs after each pruning, 95 % zeros test at 0.90 by magnitude and 0.94 with M-FAC (seed 0).

Run: python examples/pruning.py [--output FIGURE.png] [--quick]
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from nestopt import implicit, linalg

ROW = "{:<10} {:>8}  {:<10} {:>9} {:>9} {:>10} {:>9}"


def load():
    X, t = load_digits(return_X_y=True)
    X, t = torch.as_tensor(X / 16, dtype=torch.float32), torch.as_tensor(t)
    order = torch.randperm(len(t), generator=torch.Generator().manual_seed(0))
    return X[order[:1200]], t[order[:1200]], X[order[1200:]], t[order[1200:]]


def train(net, X, t, epochs, seed, lr=1e-3, pruner=None):
    optimizer = torch.optim.Adam(net.parameters(), lr)
    if pruner is not None:
        pruner.attach(optimizer)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(t), generator=generator).split(64):
            optimizer.zero_grad()
            cross_entropy(net(X[batch]), t[batch]).backward()
            optimizer.step()


def weights_of(net):
    """What is pruned: the matrices, not the biases."""
    return {name: p for name, p in net.named_parameters() if p.ndim > 1}


def gradients(net, X, t, samples, seed):
    """One row a training sample, at the network as it is now."""
    rows = torch.randperm(len(t), generator=torch.Generator().manual_seed(seed))[:samples]

    def loss(weights, sample):
        return cross_entropy(functional_call(net, weights, (sample[0],)), sample[1])

    return linalg.per_sample_gradients(loss, weights_of(net), (X[rows], t[rows]), chunk_size=128)


def evaluate(net, X, t):
    with torch.no_grad():
        out = net(X)
        return float(cross_entropy(out, t)), float((out.argmax(-1) == t).float().mean())


def prune(method, net, sparsities, data, quick, seed, epochs):
    """Prune a copy of the network; `epochs` of retraining follow each pruning."""
    X, t, V, v = data
    net = copy.deepcopy(net)
    pruner = implicit.Pruner(weights_of(net), lambda G: linalg.MFAC(G, damping=1e-4))
    for k, sparsity in enumerate(sparsities):
        G = gradients(net, X, t, 128 if quick else 512, seed + k) if method == "M-FAC" else None
        pruner.prune(sparsity, G)
        train(net, X, t, epochs, seed=100 * seed + k, pruner=pruner)
    return evaluate(net, X, t)[0], *evaluate(net, V, v), pruner.sparsity


def compare(quick):
    data = load()
    seeds = range(1 if quick else 3)
    one_shot = [0.3, 0.6] if quick else [0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
    gradual = [0.95] if quick else [0.8, 0.9, 0.95, 0.98, 0.99]
    steps, epochs = (2, 1) if quick else (10, 3)
    jobs = [("one shot", s, [s], 0) for s in one_shot]
    jobs += [("gradual", s, [implicit.CubicSparsity(s, steps)(k + 1) for k in range(steps)], epochs) for s in gradual]
    found = {}
    bar = tqdm(total=len(seeds) * (1 + 2 * len(jobs)), unit="run", desc="training")
    for seed in seeds:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        train(net, data[0], data[1], 10 if quick else 60, seed)
        found.setdefault(("dense", 0.0, "-"), []).append((evaluate(net, *data[:2])[0], *evaluate(net, *data[2:]), 0.0))
        bar.update()
        for kind, sparsity, path, retrain in jobs:
            for method in ("M-FAC", "magnitude"):
                bar.set_description(f"{kind} {sparsity:.0%} {method}")
                result = prune(method, net, path, data, quick, seed, retrain)
                found.setdefault((kind, sparsity, method), []).append(result)
                bar.update()
    bar.close()
    return found


def report(found):
    print(ROW.format("", "zeros", "scores", "training", "test", "accuracy", "+-"))
    for (kind, _, method), runs in found.items():
        training, test, accuracy, zeros = (statistics.mean(column) for column in zip(*runs, strict=True))
        spread = statistics.pstdev(run[2] for run in runs)
        print(
            ROW.format(
                kind, f"{zeros:.1%}", method, f"{training:.4f}", f"{test:.4f}", f"{accuracy:.4f}", f"{spread:.4f}"
            )
        )


def draw(output, found):
    figure = Figure(figsize=(10, 4), layout="constrained")
    dense = statistics.mean(run[2] for run in found["dense", 0.0, "-"])
    for axis, kind in zip(figure.subplots(1, 2), ("one shot", "gradual"), strict=True):
        for method, colour in (("M-FAC", "tab:blue"), ("magnitude", "tab:red")):
            rows = sorted(
                (s, [run[2] for run in runs]) for (k, s, m), runs in found.items() if (k, m) == (kind, method)
            )
            x, values = zip(*rows, strict=True)
            mean, spread = list(map(statistics.mean, values)), list(map(statistics.pstdev, values))
            axis.errorbar(x, mean, spread, fmt="o-", capsize=3, color=colour, label=method)
        axis.axhline(dense, color="0.6", linestyle="--", label="dense")
        axis.set(xlabel="zeros, %", ylabel="test accuracy", title=f"{kind}, digits MLP 64-64-32-10")
        axis.legend(frameon=False)
    figure.savefig(output, dpi=120)
    print(f"figure: {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default=os.path.join(os.environ.get("NESTOPT_OUTPUT", "."), "pruning.png"))
    parser.add_argument("--quick", action="store_true", default=bool(os.environ.get("NESTOPT_QUICK")))
    options = parser.parse_args()
    torch.set_num_threads(1)  # these tensors are small
    results = compare(options.quick)
    report(results)
    draw(options.output, results)
