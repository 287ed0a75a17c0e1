"""Penalties of an elastic net and of a sparse group lasso, learnt by MEHA: a nonsmooth lower level, gradients only.

diabetes, each of whose ten variables becomes a group: itself, its square, and three shuffled copies that mean nothing;
five groups are shuffled copies only. x are the logarithms of the penalties, y the 75 coefficients. The penalised
problem that MEHA descends needs the proximal operator of the penalty, and the penalty's derivative in x.

Run: python examples/sparse_penalties.py [--output FIGURE.png] [--quick]
"""

from __future__ import annotations

import argparse
import os
import time

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_diabetes
from sklearn.linear_model import ElasticNet

from nestopt import bilevel, constrained, linalg

ROW = "{:<34} {:>9} {:>8} {:>11} {:>7} {:>8} {:>6} {:>6}"
GROUPS = torch.arange(15).repeat_interleave(5)
REAL = (torch.arange(75) < 50) & (torch.arange(75) % 5 < 2)  # the others are shuffled


def load():
    """Rows to train, to validate and to test, with standardised columns and target."""
    X, t = (torch.as_tensor(a) for a in load_diabetes(return_X_y=True))
    g = torch.Generator().manual_seed(0)
    columns = []
    for group in range(15):
        feature = X[:, group % 10]
        kinds = [feature, feature**2] if group < 10 else []
        columns += kinds + [feature[torch.randperm(len(t), generator=g)] for _ in range(5 - len(kinds))]
    X, order = torch.stack(columns, 1), torch.randperm(len(t), generator=g)
    X, t = ((a - a[order[:150]].mean(0)) / a[order[:150]].std(0) for a in (X, t))
    return [(X[rows], t[rows]) for rows in (order[:150], order[150:300], order[300:])]


def penalties():
    """Each penalty's prox as a function of the logarithms x, and where x starts."""

    def elastic_net(x):
        return constrained.ElasticNet(torch.exp(x[0]), torch.exp(x[1]))

    def sparse_group(x):
        return constrained.SparseGroupLasso(GROUPS, torch.exp(x[:-1]), torch.exp(x[-1]))

    return {
        "elastic net, 2 penalties": (elastic_net, torch.full((2,), -2.0)),
        "sparse group lasso, 2 penalties": (sparse_group, torch.full((2,), -3.0)),
        "sparse group lasso, 16 penalties": (sparse_group, torch.full((16,), -3.0)),
    }


def compare(quick):
    (X, t), (V, v), (E, e) = load()

    def error(y, inputs, targets):
        return ((inputs @ y - targets) ** 2).mean()

    def row(name, solves, seconds, y):
        kept = y.abs() > 1e-6
        figures = f"{float(error(y, V, v)):.4f}", f"{float(error(y, E, e)):.4f}"
        print(
            ROW.format(
                name,
                solves,
                f"{seconds:.1f}",
                *figures,
                int(kept.sum()),
                int((kept & REAL).sum()),
                int((kept & ~REAL).sum()),
            )
        )

    print(
        ROW.format(
            "diabetes, 20 real of 75 columns", "gradients", "seconds", "validation", "test", "columns", "real", "noise"
        )
    )
    begun = time.perf_counter()
    grid = torch.logspace(-2, 0, 3 if quick else 20)
    fits = [
        torch.as_tensor(
            ElasticNet(alpha=float(a + b), l1_ratio=float(a / (a + b)), fit_intercept=False).fit(X, t).coef_
        )
        for a in grid
        for b in grid
    ]
    best = min(fits, key=lambda y: float(error(y, V, v)))
    row(f"elastic net, grid of {len(fits)}", "", time.perf_counter() - begun, best)
    runs = {}
    for name, (prox, x0) in penalties().items():
        problem = bilevel.Problem(
            upper=lambda x, y: error(y, V, v), lower=lambda x, y: error(y, X, t) / 2, lower_prox=prox,
            upper_set=constrained.Box(-8.0, 1.0),
        )  # fmt: skip
        method = bilevel.MEHA(stopping=linalg.Stopping(rtol=1e-2 if quick else 1e-4, max_iter=5 if quick else 100))
        res = bilevel.solve(problem, x0, torch.zeros(75), method, callbacks=[bilevel.ProgressBar(label=name)])
        row(name, res.counts.lower_gradients, res.history[-1]["seconds"], res.y)
        print(f"  {res.status.name}: error {res.error:.1e}")
        runs[name] = res
    return best, runs


def draw(output, best, runs):
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, res in runs.items():
        left.semilogy([r["seconds"] for r in res.history], [r["error"] for r in res.history], label=name)
    left.set(xlabel="seconds", title="certified error")
    left.legend(frameon=False)
    for i, (name, y) in enumerate([("elastic net, grid", best), *((name, res.y) for name, res in runs.items())]):
        colours = ["tab:blue" if real else "tab:red" for real in REAL]
        right.scatter(range(75), [i] * 75, s=(300 * y.abs()).tolist(), c=colours)
        right.text(0, i + 0.25, name)
    right.set(
        yticks=[], ylim=(-0.5, 3.6), xlabel="column, five a group", title="coefficients: real (blue), shuffled (red)"
    )
    figure.savefig(output, dpi=120)
    print(f"figure: {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default=os.path.join(os.environ.get("NESTOPT_OUTPUT", "."), "sparse_penalties.png"))
    parser.add_argument("--quick", action="store_true", default=bool(os.environ.get("NESTOPT_QUICK")))
    options = parser.parse_args()
    torch.set_num_threads(1)  # these tensors are small
    torch.set_default_dtype(torch.float64)
    draw(options.output, *compare(options.quick))
