"""Hyperparameters learnt by certified hypergradients, on real data that scikit-learn carries.

1. The penalty of a logistic regression (breast_cancer), against a grid and random search.
2. Data hyper-cleaning (digits, half the training labels resampled): one weight a training point, 800 hyperparameters.

Run: python examples/hyperparameter_optimization.py [--output FIGURE.png] [--quick]
"""

from __future__ import annotations

import argparse
import os
import time

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.metrics import f1_score
from sklearn.model_selection import train_test_split
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from nestopt import bilevel, implicit, linalg

ROW = "{:<34} {:>11} {:>8} {:>11} {:>7}"
HEAD = ("evaluations", "seconds", "validation", "test")


def row(name, evaluations, begun, validation, test):
    print(ROW.format(name, evaluations, f"{time.perf_counter() - begun:.2f}", f"{validation:.6f}", f"{test:.3f}"))


def learn_penalty(quick):
    """One hyperparameter: x is the log penalty, y the weights; the set-up is the two functions."""
    X, t = load_breast_cancer(return_X_y=True)
    X = (X - X.mean(0)) / X.std(0)
    X, X_rest, t, t_rest = train_test_split(X, t, train_size=200, random_state=0, stratify=t)
    V, E, v, e = train_test_split(X_rest, t_rest, train_size=180, random_state=0, stratify=t_rest)
    X, V, E, t, v, e = (torch.as_tensor(a, dtype=torch.float64) for a in (X, V, E, t, v, e))

    def validation(x, y):
        return binary_cross_entropy_with_logits(V @ y["weight"] + y["bias"], v)

    def training(x, y):
        loss = binary_cross_entropy_with_logits(X @ y["weight"] + y["bias"], t)
        return loss + torch.exp(x) / 2 * (y["weight"] ** 2).sum()

    def accuracy(y):
        return float(((E @ y["weight"] + y["bias"] > 0) == e).double().mean())

    y0 = {"weight": torch.zeros(30), "bias": torch.zeros(())}

    def search(name, candidates):
        begun, found = time.perf_counter(), []
        for x in candidates:
            y = implicit.NewtonCG()(lambda y, x=x: training(x, y), y0).unwrap()
            found.append((float(validation(x, y)), float(x), accuracy(y)))
        row(name, len(found), begun, min(found)[0], min(found)[2])
        return found

    print(ROW.format("penalty of a logistic regression", *HEAD))
    grid = search("grid", torch.arange(-12, 2.01, 2.0 if quick else 0.25))
    search("random search", -12 + 14 * torch.rand(4 if quick else 20, generator=torch.Generator().manual_seed(0)))

    path, begun = [], time.perf_counter()
    problem, method = bilevel.Problem(upper=validation, lower=training), bilevel.AID(linear_solver=linalg.Cholesky())
    watch = [bilevel.ProgressBar(label="penalty"), lambda k, s: path.append((float(s.x), float(s.value)))]
    res = bilevel.solve(problem, torch.tensor(0.0), y0, method, callbacks=watch)
    row("hypergradients", res.counts.lower_solves, begun, res.value, accuracy(res.y))
    hg = bilevel.hypergradient(problem, res.x, res.y, linalg.Cholesky())
    figures = f"log penalty {float(res.x):.4f}, hypergradient {float(hg.value):.1e}, certified to {hg.error_bound:.1e}"
    print(f"  {res.status.name}: {figures}\n")
    return grid, path, res


def clean_labels(validation_points, quick):
    """800 hyperparameters: x is a logit for each training point, y a softmax regression on the weighted points."""
    X, t = load_digits(return_X_y=True)
    X, t = torch.as_tensor(X / 16), torch.as_tensor(t)
    order = torch.randperm(len(t), generator=torch.Generator().manual_seed(0))
    train, held, test = order[:800], order[800 : 800 + validation_points], order[1200:]
    g = torch.Generator().manual_seed(1)
    resampled = torch.rand(800, generator=g, dtype=torch.float32) < 0.5
    noisy = torch.where(resampled, torch.randint(0, 10, (800,), generator=g), t[train])
    wrong = noisy != t[train]

    def predict(y, rows):
        return X[rows] @ y["weight"] + y["bias"]

    def validation(x, y):
        return cross_entropy(predict(y, held), t[held])

    def training(x, y):
        losses = cross_entropy(predict(y, train), noisy, reduction="none")
        return (torch.sigmoid(x) * losses).mean() + 1e-3 * ((y["weight"] ** 2).sum() + (y["bias"] ** 2).sum())

    def accuracy(y):
        return float((predict(y, test).argmax(-1) == t[test]).double().mean())

    y0 = {"weight": torch.zeros(64, 10), "bias": torch.zeros(10)}
    print(ROW.format(f"cleaning, {validation_points} validation points", *HEAD))
    for name, logits in (("all labels, noisy", 20 + 0.0 * wrong), ("oracle: right labels only", 20 - 40.0 * wrong)):
        begun = time.perf_counter()
        y = implicit.NewtonCG()(lambda y, x=logits: training(x, y), y0).unwrap()
        row(name, 1, begun, float(validation(logits, y)), accuracy(y))

    begun, problem = time.perf_counter(), bilevel.Problem(upper=validation, lower=training)
    method = bilevel.AID(stopping=linalg.Stopping(rtol=3e-4, max_iter=5 if quick else 60))
    bar = bilevel.ProgressBar(label=f"cleaning, {validation_points}")
    res = bilevel.solve(problem, torch.zeros(800), y0, method, callbacks=[bar])
    row("hypergradients", res.counts.lower_solves, begun, res.value, accuracy(res.y))
    weights = torch.sigmoid(res.x)
    f1 = f1_score(wrong, weights < 0.5)
    print(f"  {res.status.name}: error {res.error:.1e}, F1 of the wrong labels found {f1:.3f}\n")
    return weights, wrong, res


def draw(output, grid, path, penalty, weights, wrong, cleaning):
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    x, loss = zip(*sorted((x, loss) for loss, x, _ in grid), strict=True)
    left.plot(x, loss, color="0.6", label=f"grid, {len(grid)} solves")
    left.plot(*zip(*path, strict=True), "o-", color="tab:blue", label=f"hypergradients, {len(path)} solves")
    left.set(xlabel="log penalty", ylabel="validation loss", title="learning a penalty", yscale="log")
    left.legend(frameon=False)
    bins = torch.linspace(0, 1, 31).numpy()
    middle.hist(weights[~wrong].numpy(), bins, alpha=0.7, color="tab:blue", label="right label")
    middle.hist(weights[wrong].numpy(), bins, alpha=0.7, color="tab:red", label="wrong label")
    middle.set(xlabel="learnt weight", ylabel="training points", title="finding wrong labels")
    middle.legend(frameon=False)
    for result, style in ((penalty, "-"), (cleaning, "--")):
        for name, colour in (("lower", "tab:green"), ("adjoint", "tab:orange"), ("upper", "tab:blue")):
            values = [max(record[name], 1e-17) for record in result.history]
            label = f"{name} residual" if style == "-" else None
            right.semilogy(values, style, color=colour, label=label)
    right.set(xlabel="outer step", title="certificate (penalty: solid, cleaning: dashed)")
    right.legend(frameon=False)
    figure.savefig(output, dpi=120)
    print(f"figure: {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default=os.path.join(os.environ.get("NESTOPT_OUTPUT", "."), "hyperparameters.png"))
    parser.add_argument("--quick", action="store_true", default=bool(os.environ.get("NESTOPT_QUICK")))
    options = parser.parse_args()
    torch.set_num_threads(1)  # these tensors are small
    torch.set_default_dtype(torch.float64)
    penalty = learn_penalty(options.quick)
    clean_labels(100, options.quick)
    draw(options.output, *penalty, *clean_labels(400, options.quick))
