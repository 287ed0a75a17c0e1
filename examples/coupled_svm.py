"""A support vector machine whose constraints couple both levels, solved by LV-HBA and by implicit differentiation.

breast_cancer, its first ten columns. The lower level is a soft-margin machine: y are its weights, bias and slacks, the
smallest weights with t_i (a_i . w + b) >= 1 - s_i and s_i <= x_i. The upper variable x bounds the slack of every
training point and so stands in the constraints; the upper objective is the smoothed hinge of a validation set, and
small bounds. Where a bound meets its slack the upper objective has a kink, at which the projected hypergradient, and so
the certified error, does not fall to zero: all methods are asked for the same absolute error of 2e-3. A bound for each
of so few points classifies test points no better than one bound for all; the example is about the constraints.

Run: python examples/coupled_svm.py [--output FIGURE.png] [--quick]
"""

from __future__ import annotations

import argparse
import os

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.svm import LinearSVC
from torch.nn.functional import softplus

from nestopt import bilevel, constrained, linalg

ROW = "{:<28} {:>6} {:>8} {:>8} {:>10} {:>9} {:>10} {:>6}  {}"
HEAD = ("steps", "seconds", "error", "violation", "objective", "validation", "test", "status")


def load(points):
    X, t = load_breast_cancer(return_X_y=True)
    X, V, t, v = train_test_split(X[:, :10], 2.0 * t - 1, train_size=points, random_state=0, stratify=t)
    V, E, v, e = train_test_split(V, v, train_size=200, random_state=0, stratify=v)
    mean, scale = X.mean(0), X.std(0)
    return [torch.as_tensor(a) for a in ((X - mean) / scale, t, (V - mean) / scale, v, (E - mean) / scale, e)]


def machine(X, t, V, v):
    def upper(x, y):
        return softplus(1 - v * (V @ y["w"] + y["b"])).mean() + 1e-3 * (x**2).sum()

    def lower(x, y):
        return (y["w"] ** 2).sum() / 2 + 1e-3 * y["b"] ** 2 / 2 + 1e-2 * (y["s"] ** 2).sum() / 2

    def coupled(x, y):
        return torch.cat([1 - y["s"] - t * (X @ y["w"] + y["b"]), y["s"] - x])

    return bilevel.Problem(upper=upper, lower=lower, inequality=coupled, upper_set=constrained.Box(0.0, 5.0))


def compare(quick):
    X, t, V, v, E, e = load(20 if quick else 40)
    problem, n = machine(X, t, V, v), len(t)
    y0 = {"w": torch.zeros(10), "b": torch.zeros(()), "s": torch.ones(n)}

    def accuracy(y, inputs, targets):
        return f"{float((torch.sign(inputs @ y['w'] + y['b']) == targets).double().mean()):.3f}"

    print(ROW.format(f"{n} points, {2 * n} constraints", *HEAD))
    for C in (0.01, 1.0, 100.0):
        svm = LinearSVC(C=C).fit(X, t)
        y = {"w": torch.as_tensor(svm.coef_[0]), "b": torch.as_tensor(svm.intercept_[0])}
        print(ROW.format(f"one bound for all, C = {C:g}", *[""] * 5, accuracy(y, V, v), accuracy(y, E, e), ""))
    stopping, runs = linalg.Stopping(rtol=0.0, atol=2e-3, max_iter=5 if quick else 100), {}
    for name, method in (
        ("LV-HBA", bilevel.LVHBA(stopping=stopping)),
        ("LV-HBA without second stage", bilevel.LVHBA(debias=None, stopping=stopping)),
        ("AID", bilevel.AID(stopping=stopping)),
    ):
        res = bilevel.solve(problem, torch.ones(n), y0, method, callbacks=[bilevel.ProgressBar(label=name)])
        violation = float(problem.inequality(res.x, res.y).clamp_min(0).max())
        figures = f"{res.error:.0e}", f"{violation:.0e}", f"{res.value:.5f}"
        end = accuracy(res.y, V, v), accuracy(res.y, E, e), res.status.name
        print(ROW.format(name, int(res.iterations), f"{res.history[-1]['seconds']:.1f}", *figures, *end))
        runs[name] = res
    return runs, X, t


def draw(output, runs, X, t):
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for name, res in runs.items():
        seconds = [record["seconds"] for record in res.history]
        left.semilogy(seconds, [max(record["error"], 1e-16) for record in res.history], label=name)
        middle.plot(seconds, [record["value"] for record in res.history], label=name)
    left.set(xlabel="seconds", title="certified error")
    middle.set(xlabel="seconds", title="upper objective")
    middle.legend(frameon=False, loc="upper right")
    res = runs["LV-HBA"]
    margins = t * (X @ res.y["w"] + res.y["b"])
    right.scatter(margins.tolist(), res.x.tolist(), c=res.y["s"].tolist(), cmap="viridis")
    right.axvline(1.0, color="0.6")
    right.set(xlabel="margin of the training point", ylabel="learnt bound of its slack", title="colour: slack")
    figure.savefig(output, dpi=120)
    print(f"figure: {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default=os.path.join(os.environ.get("NESTOPT_OUTPUT", "."), "coupled_svm.png"))
    parser.add_argument("--quick", action="store_true", default=bool(os.environ.get("NESTOPT_QUICK")))
    options = parser.parse_args()
    torch.set_num_threads(1)  # these tensors are small
    torch.set_default_dtype(torch.float64)
    draw(options.output, *compare(options.quick))
