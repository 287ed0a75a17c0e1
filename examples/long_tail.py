"""Re-weighting a long-tailed training set by a small network, in the manner of Meta-Weight-Net.

digits, thinned out so that each class has fewer images than the one before, 100 down to 4. x are the weights of a
network that corrects a training point's weight, the inverse frequency of its class, by that frequency and by the loss
of the point under plain training; y is a softmax regression on the points so weighted, the upper objective its loss on
ten images of each class. That loss falls well below the one of inverse frequencies, but so few images do not say more
than the frequencies do: test accuracy, far above that of plain training, is not above theirs.

Run: python examples/long_tail.py [--output FIGURE.png] [--quick]
"""

from __future__ import annotations

import argparse
import os

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy, softplus

from nestopt import bilevel, implicit, linalg

ROW = "{:<28} {:>11} {:>9} {:>10} {:>12}"
COUNTS = torch.logspace(2, 0.6, 10).round().long()


def load():
    """Class c has COUNTS[c] training images; ten of each class to validate, the rest, balanced, to test."""
    images, labels = load_digits(return_X_y=True)
    X, t = torch.as_tensor(images / 16), torch.as_tensor(labels)
    g, parts = torch.Generator().manual_seed(0), ([], [], [])
    for c in range(10):
        rows = torch.nonzero(t == c)[:, 0]
        rows = rows[torch.randperm(len(rows), generator=g)]
        for part, chosen in zip(parts, (rows[: COUNTS[c]], rows[100:110], rows[110:170]), strict=True):
            part.append(chosen)
    return [(X[torch.cat(part)], t[torch.cat(part)]) for part in parts]


def predict(y, X):
    return X @ y["weight"] + y["bias"]


def training(y, weights, X, t):
    losses = cross_entropy(predict(y, X), t, reduction="none")
    return (weights * losses).mean() + 1e-3 * ((y["weight"] ** 2).sum() + (y["bias"] ** 2).sum())


def weigh(x, features, frequency):
    """The weights of the training points, one in the mean: what the network makes of the inverse frequencies."""
    weights = softplus(torch.tanh(features @ x["in"] + x["shift"]) @ x["out"]) / frequency
    return weights / weights.mean()


def compare(quick):
    (X, t), (V, v), (E, e) = load()
    y0 = {"weight": torch.zeros(64, 10), "bias": torch.zeros(10)}

    def fit(weights):
        return implicit.NewtonCG()(lambda y: training(y, weights, X, t), y0).unwrap()

    def row(name, y):
        right = (predict(y, E).argmax(-1) == e).double().reshape(10, -1).mean(1)
        loss = float(cross_entropy(predict(y, V), v))
        shares = right.mean(), right[:5].mean(), right[5:].mean()
        print(ROW.format(name, f"{loss:.4f}", *(f"{float(share):.3f}" for share in shares)))
        return right

    print(
        ROW.format(
            f"digits, {int(COUNTS[0])} to {int(COUNTS[-1])} a class", "validation", "test", "frequent 5", "rare 5"
        )
    )
    plain = fit(torch.ones(len(t)))
    found = {"plain": row("plain training", plain)}
    frequency = COUNTS[t] / COUNTS.sum()
    found["inverse frequency"] = row("inverse frequency", fit(0.1 / frequency))
    with torch.no_grad():
        features = torch.stack([frequency.log(), cross_entropy(predict(plain, X), t, reduction="none")], 1)
        features = (features - features.mean(0)) / features.std(0)

    g = torch.Generator().manual_seed(0)
    x0 = {"in": torch.randn(2, 16, generator=g), "shift": torch.randn(16, generator=g), "out": torch.zeros(16)}
    problem = bilevel.Problem(
        upper=lambda x, y: cross_entropy(predict(y, V), v),
        lower=lambda x, y: training(y, weigh(x, features, frequency), X, t),
    )
    method = bilevel.AID(stopping=linalg.Stopping(rtol=1e-3, max_iter=5 if quick else 40))
    res = bilevel.solve(problem, x0, y0, method, callbacks=[bilevel.ProgressBar(label="weights")])
    found["weights learnt"] = row("weights learnt", res.y)
    print(f"  {res.status.name}: error {res.error:.1e}, {res.counts.lower_solves} lower solves")
    return found, weigh(res.x, features, frequency), t, res


def draw(output, found, weights, t, res):
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for i, (name, shares) in enumerate(found.items()):
        left.bar([c + 0.27 * (i - 1) for c in range(10)], shares.tolist(), width=0.27, label=name)
    left.set(
        xticks=range(10),
        xticklabels=COUNTS.tolist(),
        xlabel="training images of the class",
        title="test accuracy",
        ylim=(0, 1.4),
    )
    left.legend(frameon=False, loc="upper left")
    middle.loglog(COUNTS[t], weights, ".", alpha=0.3, label="learnt, a point each")
    middle.loglog(COUNTS, COUNTS.sum() / (10 * COUNTS), color="0.6", label="inverse frequency")
    middle.set(xlabel="training images of the class", title="weights")
    middle.legend(frameon=False)
    right.plot([record["value"] for record in res.history])
    right.set(xlabel="outer step", title="validation loss")
    figure.savefig(output, dpi=120)
    print(f"figure: {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default=os.path.join(os.environ.get("NESTOPT_OUTPUT", "."), "long_tail.png"))
    parser.add_argument("--quick", action="store_true", default=bool(os.environ.get("NESTOPT_QUICK")))
    options = parser.parse_args()
    torch.set_num_threads(1)  # these tensors are small
    torch.set_default_dtype(torch.float64)
    draw(options.output, *compare(options.quick))
