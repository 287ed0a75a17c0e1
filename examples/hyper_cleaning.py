"""Data hyper-cleaning by every family of bilevel methods: the same problem, their errors against time.

Digits, half of the 800 training labels resampled. x is a logit for each training point, y a softmax regression on the
points so weighted, the upper objective its loss on 400 clean validation points and a small ridge on x, which keeps
points that the validation set says nothing about near weight 1/2. The ridge's strength is the one whose models classify
best those halves of the validation points that they were not cleaned by; neither test points nor true labels choose it.

Run: python examples/hyper_cleaning.py [--output FIGURE.png] [--quick]
"""

from __future__ import annotations

import argparse
import os

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.metrics import f1_score
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from nestopt import bilevel, implicit, linalg

ROW = "{:<26} {:>6} {:>8} {:>8} {:>9} {:>9} {:>11} {:>6} {:>6}  {}"
HEAD = ("steps", "seconds", "error", "gradients", "products", "validation", "test", "F1", "status")


def load():
    images, labels = load_digits(return_X_y=True)
    X, t = torch.as_tensor(images / 16), torch.as_tensor(labels)
    order = torch.randperm(len(t), generator=torch.Generator().manual_seed(0))
    train, held, test = order[:800], order[800:1200], order[1200:]
    g = torch.Generator().manual_seed(1)
    resampled = torch.rand(800, generator=g, dtype=torch.float32) < 0.5
    noisy = torch.where(resampled, torch.randint(0, 10, (800,), generator=g), t[train])
    return (X[train], noisy, noisy != t[train]), (X[held], t[held]), (X[test], t[test])


def predict(y, X):
    return X @ y["weight"] + y["bias"]


def cleaning(train, held, strength):
    X, noisy, _ = train
    V, v = held

    def validation(x, y):
        return cross_entropy(predict(y, V), v) + strength * (x**2).sum()

    def training(x, y):
        losses = cross_entropy(predict(y, X), noisy, reduction="none")
        return (torch.sigmoid(x) * losses).mean() + 1e-3 * ((y["weight"] ** 2).sum() + (y["bias"] ** 2).sum())

    return bilevel.Problem(upper=validation, lower=training)


def best_strength(train, held, x0, y0):
    """Each is judged by the half that did not clean: by the accuracy, and by the loss where that ties."""

    def judged(strength):
        right, loss = 0, 0.0
        for mine, other in ((0, 1), (1, 0)):
            half, (V, v) = [a[mine::2] for a in held], [a[other::2] for a in held]
            y = bilevel.AID(stopping=linalg.Stopping(rtol=1e-3))(cleaning(train, half, strength), x0, y0).y
            right += int((predict(y, V).argmax(-1) == v).sum())
            loss += float(cross_entropy(predict(y, V), v))
        return -right, loss

    return min(tqdm((3e-6, 1e-5, 3e-5, 1e-4), desc="strength"), key=judged)


def methods(quick):
    def at_most(steps, rtol=1e-3):
        return linalg.Stopping(rtol=rtol, max_iter=max(2, steps // 50) if quick else steps)

    return {
        "AID (implicit)": bilevel.AID(stopping=at_most(60)),
        "HOAG (implicit, inexact)": bilevel.HOAG(stopping=at_most(100)),
        "Unrolled (reverse)": bilevel.Unrolled(stopping=at_most(60)),
        "SOBA (single loop)": bilevel.SOBA(stopping=at_most(500)),
        "BAMM (single loop)": bilevel.BAMM(stopping=at_most(300)),
        "MEHA (Moreau envelope)": bilevel.MEHA(stopping=at_most(30)),
        "F2SA (first order)": bilevel.F2SA(stopping=at_most(30)),
    }


def compare(quick):
    train, (V, v), (E, e) = load()
    wrong = train[2]
    x0, y0 = torch.zeros(800), {"weight": torch.zeros(64, 10), "bias": torch.zeros(10)}
    strength = 3e-5 if quick else best_strength(train, (V, v), x0, y0)
    problem = cleaning(train, (V, v), strength)
    print(f"strength of the ridge: {strength:g}")

    def accuracy(y):
        return float((predict(y, E).argmax(-1) == e).double().mean())

    print(ROW.format("method", *HEAD))
    for name, logits in (("all labels, noisy", x0 + 20), ("oracle: right labels only", 20 - 40.0 * wrong)):
        y = implicit.NewtonCG()(lambda y, x=logits: problem.lower(x, y), y0).unwrap()
        print(
            ROW.format(name, *[""] * 5, f"{float(cross_entropy(predict(y, V), v)):.4f}", f"{accuracy(y):.3f}", "", "")
        )
    runs = {}
    for name, method in methods(quick).items():
        res = bilevel.solve(problem, x0, y0, method, callbacks=[bilevel.ProgressBar(label=name)])
        f1, counts = f1_score(wrong, torch.sigmoid(res.x) < 0.5), res.counts
        gradients = counts.lower_gradients + counts.upper_evaluations
        validation = float(cross_entropy(predict(res.y, V), v))
        end = f"{validation:.4f}", f"{accuracy(res.y):.3f}", f"{f1:.3f}", res.status.name
        last = res.history[-1]
        figures = last["iteration"], f"{last['seconds']:.1f}", f"{res.error:.0e}", gradients, counts.products
        print(ROW.format(name, *figures, *end))
        runs[name] = res, f1
    return runs, wrong


def draw(output, runs, wrong):
    figure = Figure(figsize=(14, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    best = min((res for res, _ in runs.values()), key=lambda res: res.error).value
    for name, (res, _) in runs.items():
        seconds = [record["seconds"] for record in res.history]
        left.loglog(seconds, [abs(record["value"] - best) for record in res.history], label=name)
        middle.loglog(seconds, [record["error"] for record in res.history], label=name)
    left.set(xlabel="seconds", title="distance from the best upper objective")
    middle.set(xlabel="seconds", title="certified error")
    figure.legend(*middle.get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=8, frameon=False)
    weights, bins = torch.sigmoid(next(iter(runs.values()))[0].x), torch.linspace(0, 1, 31).numpy()
    right.hist([weights[~wrong], weights[wrong]], bins, stacked=True, label=["right label", "wrong label"])
    right.set(xlabel="learnt weight", ylabel="training points", title="finding wrong labels")
    right.legend(frameon=False)
    figure.savefig(output, dpi=120)
    print(f"figure: {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default=os.path.join(os.environ.get("NESTOPT_OUTPUT", "."), "hyper_cleaning.png"))
    parser.add_argument("--quick", action="store_true", default=bool(os.environ.get("NESTOPT_QUICK")))
    options = parser.parse_args()
    torch.set_num_threads(1)  # these tensors are small
    torch.set_default_dtype(torch.float64)
    draw(options.output, *compare(options.quick))
