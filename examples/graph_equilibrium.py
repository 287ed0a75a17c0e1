"""An implicit graph network: labels spread over a graph by an equilibrium, which converges by construction.

Ten labels a class of scikit-learn's digits, and a graph of nearest neighbours over all 1797 images. The network's
state z solves z = relu(A z W' + x U' + b), where A is the normalised adjacency matrix (|A|_2 = 1) and W is scaled to
|W|_2 = 0.8: a contraction whatever the training does, infinitely many layers deep, whose memory does not grow.

Run: python examples/graph_equilibrium.py [--output FIGURE.png] [--quick]
"""

from __future__ import annotations

import argparse
import os
import time

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.neighbors import kneighbors_graph
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from nestopt import implicit, linalg

CONTRACTION = 0.8
ROW = "{:<28} {:>8} {:>8} {:>10} {:>12} {:>12}"


def load(images, neighbours=8, labels=10):
    """Images, classes, the graph, and which images have a label."""
    X, t = load_digits(return_X_y=True)
    X, t = X[:images] / 16, t[:images]
    graph = kneighbors_graph(X, neighbours, include_self=True)
    graph = graph.maximum(graph.T)
    root = 1 / np.sqrt(np.asarray(graph.sum(1)).ravel())
    graph = graph.multiply(root[:, None]).multiply(root).tocoo()
    places = np.stack([graph.row, graph.col])
    A = torch.sparse_coo_tensor(places, graph.data, graph.shape, check_invariants=True).coalesce()
    rng, seen = np.random.default_rng(0), torch.zeros(images, dtype=torch.bool)
    for digit in range(10):
        seen[rng.choice(np.flatnonzero(t == digit), labels, replace=False)] = True
    return torch.as_tensor(X), torch.as_tensor(t), A, seen


class Cell(nn.Module):
    """z -> relu(A z W' + x U' + b), with |W|_2 = CONTRACTION."""

    def __init__(self, A, features, hidden):
        super().__init__()
        self.mix, self.enter = nn.Parameter(torch.eye(hidden)), nn.Linear(features, hidden)
        self.register_buffer("A", A)

    def forward(self, z, x):
        W = CONTRACTION * self.mix / torch.linalg.matrix_norm(self.mix, 2)
        return torch.relu(torch.sparse.mm(self.A, z) @ W.mT + self.enter(x))


class GraphNetwork(nn.Module):
    """The equilibrium and a linear read-out; the whole graph is one system of images * hidden unknowns."""

    def __init__(self, A, features, hidden, monitor):
        super().__init__()
        self.hidden, self.leave = hidden, nn.Linear(hidden, 10)
        self.deq = implicit.DEQ(
            Cell(A, features, hidden), implicit.Anderson(rtol=1e-5), solver=linalg.GMRES(rtol=1e-4), batch_dims=0,
            reuse=True, monitor=monitor,
        )  # fmt: skip

    def forward(self, x):
        return self.leave(self.deq(x, z0=x.new_zeros(len(x), self.hidden)))


def train(name, model, data, epochs, monitor=None):
    """Accuracies without a label, and certificates: (distance, its limit, adjoint residual, its limit) of each step."""
    X, t, _, seen = data
    begun, accuracies, certificates = time.perf_counter(), [], []
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-3)
    for _ in tqdm(range(epochs), desc=name, leave=False):
        optimizer.zero_grad()
        scores = model(X)
        cross_entropy(scores[seen], t[seen]).backward()
        optimizer.step()
        accuracies.append(float((scores.argmax(-1) == t)[~seen].double().mean()))
        if monitor is not None:
            records = monitor.last("point"), monitor.last("adjoint")
            certificates.append([float(value) for r in records for value in (r.error, r.tolerance)])
    distance, residual = (f"{max(c[i] for c in certificates):.1e}" if certificates else "" for i in (0, 2))
    seconds = f"{time.perf_counter() - begun:.1f}"
    print(ROW.format(name, epochs, seconds, f"{accuracies[-1]:.3f}", distance, residual))
    return accuracies, certificates


def compare(model, X):
    """Errors after every evaluation of the trained cell, from z = 0, and what each solver says of itself."""
    deq, z0, paths = model.deq, torch.zeros(len(X), model.hidden), {}
    with torch.no_grad():
        for find in (implicit.Picard(rtol=1e-10), implicit.Anderson(rtol=1e-10), implicit.Broyden(rtol=1e-10)):
            path = []
            watch = [lambda k, s, path=path: path.append((s.evaluations, float(s.error)))]
            res = find.fixed_point(lambda z: deq.cell(z, X), z0, callbacks=watch)
            name = type(find).__name__
            print(f"  {name:<9} {res.status.name}: {res.evaluations} evaluations, observed rate {res.rate:.3f}")
            paths[name] = path
        radius = float(deq.spectral_radius(res.x, X))
    print(f"  spectral radius of the Jacobian at the equilibrium: {radius:.3f} <= {CONTRACTION}")
    return paths, radius


def draw(output, plain, graph, certificates, paths):
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.plot(graph, color="tab:blue", label="equilibrium on the graph")
    left.plot(plain, color="0.6", label="the same without the graph")
    left.set(xlabel="epoch", ylabel="accuracy", title="digits, ten labels a class")
    left.legend(frameon=False)
    for name, path in paths.items():
        middle.semilogy(*zip(*path, strict=True), label=name)
    k, first = np.arange(len(paths["Picard"])), paths["Picard"][0][1]
    middle.semilogy(k + 1, first * CONTRACTION**k, "k:", label=f"{CONTRACTION}$^k$, by construction")
    middle.set(xlabel="evaluations of the cell", ylabel="|T(z) - z|", title="solving the trained equilibrium")
    middle.legend(frameon=False)
    labels = ("distance of z to the equilibrium", "what it may be", "adjoint residual", "what it may be")
    for i, style in enumerate(("tab:blue", "tab:blue", "tab:orange", "tab:orange")):
        right.semilogy([c[i] for c in certificates], ":" if i % 2 else "-", color=style, label=labels[i])
    right.set(xlabel="epoch", title="certificates of every step")
    right.legend(frameon=False)
    figure.savefig(output, dpi=120)
    print(f"figure: {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default=os.path.join(os.environ.get("NESTOPT_OUTPUT", "."), "graph.png"))
    parser.add_argument("--quick", action="store_true", default=bool(os.environ.get("NESTOPT_QUICK")))
    options = parser.parse_args()
    torch.set_num_threads(1)  # these tensors are small
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    data, epochs, hidden = load(600 if options.quick else 1797), 20 if options.quick else 30, 32
    features, monitor = data[0].shape[1], implicit.Monitor()
    print(ROW.format("digits, 100 labels", "epochs", "seconds", "accuracy", "distance", "residual"))
    mlp = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, 10))
    plain, _ = train("without the graph", mlp, data, epochs)
    model = GraphNetwork(data[2], features, hidden, monitor)
    graph, certificates = train("equilibrium on the graph", model, data, epochs, monitor)
    draw(options.output, plain, graph, certificates, compare(model, data[0])[0])
