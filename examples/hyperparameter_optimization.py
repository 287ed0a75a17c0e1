"""Hyperparameters learnt by certified hypergradients, on real data that scikit-learn carries.

1. The penalty of a logistic regression (breast_cancer), against a grid and random search.
2. Data hyper-cleaning (digits, half the training labels resampled): one weight a training point, 800 hyperparameters.

Run: python examples/hyperparameter_optimization.py [--output FIGURE.png] [--quick]
"""

from __future__ import annotations

import argparse
import os
import time

import matplotlib as mpl
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.metrics import f1_score
from sklearn.model_selection import train_test_split
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from nestopt import bilevel, implicit, linalg

mpl.use("Agg")
import matplotlib.pyplot as plt

ROW = "{:<34} {:>11} {:>8} {:>11} {:>7}"


def tensors(*arrays):
    return [torch.as_tensor(a, dtype=torch.float64 if a.dtype.kind == "f" else torch.int64) for a in arrays]


def learn_penalty(quick):
    """1-D: x is the log penalty, y the weights; the whole set-up is the two functions."""
    X, t = load_breast_cancer(return_X_y=True)
    X = (X - X.mean(0)) / X.std(0)
    X, X_rest, t, t_rest = train_test_split(X, t, train_size=200, random_state=0, stratify=t)
    V, E, v, e = train_test_split(X_rest, t_rest, train_size=180, random_state=0, stratify=t_rest)
    X, t, V, v, E, e = tensors(X, t, V, v, E, e)

    def loss(y, features, labels):
        return binary_cross_entropy_with_logits(features @ y["weight"] + y["bias"], labels.double())

    def validation(x, y):
        return loss(y, V, v)

    def training(x, y):
        return loss(y, X, t) + torch.exp(x) / 2 * (y["weight"] ** 2).sum()

    def accuracy(y):
        return float(((E @ y["weight"] + y["bias"] > 0) == e).double().mean())

    y0 = {"weight": torch.zeros(30, dtype=torch.float64), "bias": torch.zeros((), dtype=torch.float64)}
    problem = bilevel.Problem(upper=validation, lower=training)

    def search(name, candidates):
        begun, found = time.perf_counter(), []
        for x in candidates:
            y = implicit.NewtonCG()(lambda y, x=x: training(x, y), y0).unwrap()
            found.append((float(validation(x, y)), float(x), accuracy(y)))
        best = min(found)
        print(ROW.format(name, len(found), f"{time.perf_counter() - begun:.2f}", f"{best[0]:.6f}", f"{best[2]:.3f}"))
        return found

    print(ROW.format("penalty of a logistic regression", "evaluations", "seconds", "validation", "test"))
    grid = search("grid", torch.arange(-12, 2.01, 2.0 if quick else 0.25, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    search("random", -12 + 14 * torch.rand(4 if quick else 20, generator=generator, dtype=torch.float64))

    path, begun = [], time.perf_counter()
    res = bilevel.solve(
        problem, torch.tensor(0.0, dtype=torch.float64), y0, bilevel.AID(linear_solver=linalg.Cholesky()),
        callbacks=[bilevel.ProgressBar(label="penalty"), lambda k, s: path.append((float(s.x), float(s.value)))],
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    hg = bilevel.hypergradient(problem, res.x, res.y, linalg.Cholesky())
    print(ROW.format("hypergradients", len(path), f"{seconds:.2f}", f"{res.value:.6f}", f"{accuracy(res.y):.3f}"))
    print(
        f"  {res.status.name}: log penalty {float(res.x):.4f}, hypergradient {float(hg.value):.1e}, certified to "
        f"{hg.error_bound:.1e}\n"
    )
    return grid, path, res


def clean_labels(validation_points, quick):
    """Data hyper-cleaning: x is a logit for each training point, y a softmax regression on the weighted points."""
    X, t = load_digits(return_X_y=True)
    X, t = tensors(X / 16, t)
    order = torch.randperm(len(t), generator=torch.Generator().manual_seed(0))
    train, held, test = order[:800], order[800 : 800 + validation_points], order[1200:]
    g = torch.Generator().manual_seed(1)
    resampled = torch.rand(800, generator=g) < 0.5
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

    y0 = {"weight": torch.zeros(64, 10, dtype=torch.float64), "bias": torch.zeros(10, dtype=torch.float64)}
    problem = bilevel.Problem(upper=validation, lower=training)

    def row(name, evaluations, begun, y):
        figures = f"{time.perf_counter() - begun:.2f}", f"{float(validation(None, y)):.4f}", f"{accuracy(y):.3f}"
        print(ROW.format(name, evaluations, *figures))

    print(ROW.format(f"cleaning, {validation_points} validation points", "evaluations", "seconds", "validation", "test"))
    for name, logits in (("all labels, noisy", torch.full((800,), 20.0)), ("oracle: clean labels only", 40.0 * ~wrong - 20)):
        begun = time.perf_counter()
        row(name, 1, begun, implicit.NewtonCG()(lambda y, x=logits.double(): training(x, y), y0).x)
    begun = time.perf_counter()
    method = bilevel.AID(stopping=linalg.Stopping(rtol=1e-3, max_iter=5 if quick else 60))
    bar = bilevel.ProgressBar(label=f"cleaning ({validation_points})")
    res = bilevel.solve(problem, torch.zeros(800, dtype=torch.float64), y0, method, callbacks=[bar])
    row("hypergradients", res.counts.lower_solves, begun, res.y)
    f1 = f1_score(wrong, torch.sigmoid(res.x) < 0.5)
    print(f"  {res.status.name}: error {res.error:.1e}, F1 of the wrong labels found {f1:.3f}\n")
    return torch.sigmoid(res.x), wrong, res


def draw(output, grid, path, penalty, weights, wrong, cleaning):
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
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
    os.makedirs(os.path.dirname(os.path.abspath(output)), exist_ok=True)
    figure.savefig(output, dpi=120)
    print(f"figure: {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default=os.path.join(os.environ.get("NESTOPT_OUTPUT", "."), "hyperparameters.png"))
    parser.add_argument("--quick", action="store_true", default=bool(os.environ.get("NESTOPT_QUICK")))
    options = parser.parse_args()
    torch.set_num_threads(1)  # these tensors are small
    penalty = learn_penalty(options.quick)
    clean_labels(100, options.quick)
    draw(options.output, *penalty, *clean_labels(400, options.quick))
