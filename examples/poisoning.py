"""Finding poisoned training points by learning one weight for each, from a few points that can be trusted.

breast_cancer. The attacker relabels malignant training points as benign, those that a model is surest of: training then
learns to miss tumours. x is a logit for each of the 300 training points, y a logistic regression on the points so
weighted, the upper objective its loss on 40 trusted points. A low weight says: poisoned.

Run: python examples/poisoning.py [--output FIGURE.png] [--quick]
"""

from __future__ import annotations

import argparse
import os

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import train_test_split
from torch.nn.functional import binary_cross_entropy_with_logits, pad

from nestopt import bilevel, implicit, linalg

ROW = "{:<30} {:>9} {:>8} {:>10} {:>7} {:>7}"


def load():
    X, t = load_breast_cancer(return_X_y=True)
    t = 1 - t  # 1 is malignant
    X, V, t, v = train_test_split(X, t, train_size=300, random_state=0, stratify=t)
    V, E, v, e = train_test_split(V, v, train_size=40, random_state=0, stratify=v)
    mean, scale = X.mean(0), X.std(0)
    X, V, E = (pad(torch.as_tensor((A - mean) / scale), (0, 1), value=1.0) for A in (X, V, E))
    return X, torch.as_tensor(t).double(), V, torch.as_tensor(v).double(), E, torch.as_tensor(e).double()


def training(X, t, weights, y):
    losses = binary_cross_entropy_with_logits(X @ y, t, reduction="none")
    return (weights * losses).mean() + 1e-2 * (y**2).sum() / 2


def fit(X, t, weights):
    return implicit.NewtonCG()(lambda y: training(X, t, weights, y), torch.zeros(31)).unwrap()


def attack(X, t, share):
    """The labels after the attack, and which of them are poisoned."""
    scores = torch.where(t == 1, X @ fit(X, t, torch.ones(len(t))), -torch.inf)
    poisoned = torch.zeros(len(t), dtype=torch.bool)
    poisoned[scores.topk(int(share * len(t))).indices] = True
    return torch.where(poisoned, 0.0, t), poisoned


def detect(share, data, steps):
    X, clean, V, v, E, e = data
    t, poisoned = attack(X, clean, share)

    def row(name, y, auc=""):
        guess = (E @ y > 0).double()
        recall = float(guess[e == 1].mean())
        loss = float(binary_cross_entropy_with_logits(V @ y, v))
        print(
            ROW.format(
                name,
                int(poisoned.sum()),
                f"{loss:.4f}",
                f"{float((guess == e).double().mean()):.3f}",
                f"{recall:.3f}",
                auc,
            )
        )
        return recall

    one = torch.ones(len(t))
    found = [row("as poisoned", fit(X, t, one)), row("poison taken out by an oracle", fit(X, t, 1.0 - 1.0 * poisoned))]
    problem = bilevel.Problem(
        upper=lambda x, y: binary_cross_entropy_with_logits(V @ y, v),
        lower=lambda x, y: training(X, t, torch.sigmoid(x), y),
    )
    method = bilevel.AID(linear_solver=linalg.Cholesky(), stopping=linalg.Stopping(rtol=1e-3, max_iter=steps))
    bar = bilevel.ProgressBar(label=f"{share:.0%} poisoned")
    res = bilevel.solve(problem, torch.zeros(len(t)), torch.zeros(31), method, callbacks=[bar])
    auc = roc_auc_score(poisoned, -res.x)
    found.append(row("weights learnt", res.y, f"{auc:.3f}"))
    print(f"  {res.status.name}: error {res.error:.1e}, {res.counts.lower_solves} lower solves\n")
    return found, torch.sigmoid(res.x), poisoned, auc


def main(quick):
    data = load()
    print(ROW.format("breast_cancer", "poisoned", "loss", "accuracy", "recall", "AUC"))
    return {share: detect(share, data, 5 if quick else 40) for share in ((0.15,) if quick else (0.05, 0.1, 0.15, 0.2))}


def draw(output, runs):
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for i, name in enumerate(("as poisoned", "oracle", "weights learnt")):
        left.plot(list(runs), [run[0][i] for run in runs.values()], "o-", label=name)
    left.set(xlabel="share of training points poisoned", title="tumours found in the test set")
    left.legend(frameon=False)
    _, weights, poisoned, _ = list(runs.values())[-1]
    bins = torch.linspace(0, 1, 31).numpy()
    middle.hist([weights[~poisoned], weights[poisoned]], bins, stacked=True, label=["clean", "poisoned"])
    middle.set(xlabel="learnt weight", ylabel="training points", yscale="log")
    middle.legend(frameon=False)
    for share, (_, weights, poisoned, auc) in runs.items():
        false, true, _ = roc_curve(poisoned, -weights)
        right.plot(false, true, label=f"{share:.0%} poisoned, AUC {auc:.3f}")
    right.set(xlabel="clean points suspected", ylabel="poisoned points found")
    right.legend(frameon=False)
    figure.savefig(output, dpi=120)
    print(f"figure: {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default=os.path.join(os.environ.get("NESTOPT_OUTPUT", "."), "poisoning.png"))
    parser.add_argument("--quick", action="store_true", default=bool(os.environ.get("NESTOPT_QUICK")))
    options = parser.parse_args()
    torch.set_num_threads(1)  # these tensors are small
    torch.set_default_dtype(torch.float64)
    draw(options.output, main(options.quick))
