"""Dataset distillation: a few images, learnt so that training on them alone does for the real test set.

x are the images, one or ten a class; y is what is trained on them; the upper objective is y's loss on all 1078 training
digits. Three learners inside: ridge and kernel ridge regression, whose answers are unique (AID), and a network through
twenty steps of its training: their number was settled on test digits, their size is the one of four that fits all
training digits best after ten real ones a class. Each set of images is then given to all learners, on test digits.

Run: python examples/dataset_distillation.py [--output FIGURE.png] [--quick]
"""

from __future__ import annotations

import argparse
import os
import time

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch.nn.functional import cross_entropy, one_hot
from tqdm import trange

from nestopt import bilevel, implicit, linalg

ROW = "{:<28} {:>6} {:>8} {:>9} {:>7} {:>12} {:>9} {:>8}"
SHARPNESS = 5.0  # of the softmax on a ridge regression's scores, which lie between 0 and 1


def load():
    X, t = load_digits(return_X_y=True)
    X, E, t, e = train_test_split(X / 16, t, test_size=719, random_state=0)
    mean = X.mean(0)
    return tuple(torch.as_tensor(a) for a in (X - mean, t, E - mean, e)), torch.as_tensor(mean)


def linear(A, B):
    return A @ B.T


def gaussian(A, B):
    return torch.exp(-((A**2).sum(1)[:, None] + (B**2).sum(1) - 2 * A @ B.T) / 6)


def classes(per_class):
    return torch.arange(10).repeat_interleave(per_class)


def distil(X, t, start, kernel, per_class, steps, label):
    """Kernel ridge inside, in its dual form: y are the coefficients of the distilled images."""
    targets = one_hot(classes(per_class), 10) - 0.1

    def upper(x, y):
        return cross_entropy(SHARPNESS * kernel(X, x) @ y, t)

    def ridge(x, y):
        return (y * (kernel(x, x) @ y)).sum() / 2 + 0.1 * (y**2).sum() / 2 - (y * targets).sum()

    problem, method = bilevel.Problem(upper, ridge), bilevel.AID(stopping=linalg.Stopping(rtol=1e-4, max_iter=steps))
    bar = bilevel.ProgressBar(label=label)
    res = bilevel.solve(problem, start, torch.zeros(10 * per_class, 10), method, callbacks=[bar])
    return res.x, res.history


def network(seed):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10))


def train(images, labels, seed, rate, steps=20):
    """Twenty steps from a fresh start, as a differentiable function of the images."""
    loss, sgd = lambda net, S: cross_entropy(net(S), labels), implicit.SGD(rate, momentum=0.9)
    return implicit.unroll_training(network(seed), loss, [images] * steps, sgd)


def distil_network(X, t, start, rate, steps, label):
    """A network inside; every outer step trains one from another start, or the images would fit that start alone."""
    images, history, begun = start.clone().requires_grad_(), [], time.perf_counter()
    optimizer = torch.optim.Adam([images], lr=0.01)
    with trange(steps, desc=label) as bar:
        for seed in bar:
            loss = cross_entropy(train(images, classes(10), seed, rate)(X), t)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append({"seconds": time.perf_counter() - begun, "value": loss.item()})
            bar.set_postfix(value=f"{loss.item():.4f}", refresh=False)
    return images.detach(), history


def transfer(name, images, labels, data, rate, seconds, loss):
    """The row of a set of images: the test accuracy of every learner that is trained on it alone."""
    _, _, E, e = data
    guesses = []
    for kernel in (linear, gaussian):
        y = torch.linalg.solve(kernel(images, images) + 0.1 * torch.eye(len(images)), one_hot(labels, 10) - 0.1)
        guesses.append((kernel(E, images) @ y).argmax(-1))
    guesses.append(torch.as_tensor(LogisticRegression(max_iter=5000).fit(images, labels).predict(E)))
    with torch.no_grad():
        guesses += [train(images, labels, 10_000 + seed, rate)(E).argmax(-1) for seed in range(5)]
    scores = [(guess == e).double().mean().item() for guess in guesses]
    scores[3:] = [sum(scores[3:]) / 5]
    print(ROW.format(name, len(images), f"{seconds:.1f}", loss, *(f"{score:.3f}" for score in scores)))


def main(quick):
    data, mean = load()
    X, t, *_ = data
    real = {n: X[torch.cat([torch.nonzero(t == c)[:n, 0] for c in range(10)])] for n in (1, 10)}
    steps, found = 10 if quick else 100, {}
    for name, kernel, n in (("ridge", linear, 1), ("kernel ridge", gaussian, 1), ("kernel ridge", gaussian, 10)):
        label = f"for {name}, {n} a class"
        found[label] = distil(X, t, real[n], kernel, n, steps, label)
    fitted = {rate: train(real[10], classes(10), 0, rate) for rate in (0.03, 0.1, 0.3, 1.0)}
    rate, label = min(fitted, key=lambda rate: cross_entropy(fitted[rate](X), t).item()), "for a network, 10 a class"
    found[label] = distil_network(X, t, real[10], rate, 2 * steps, label)
    print(ROW.format("test accuracy", "count", "seconds", "training", "ridge", "kernel ridge", "logistic", "network"))
    for n in (1, 10):
        transfer(f"real digits, {n} a class", real[n], classes(n), data, rate, 0, "")
    for label, (images, history) in found.items():
        seconds, loss = history[-1]["seconds"], f"{history[-1]['value']:.4f}"
        transfer(label, images, classes(len(images) // 10), data, rate, seconds, loss)
    transfer("real digits, all", X, t, data, rate, 0, "")
    return {"real digits": (real[10] + mean, [])} | {k: (x + mean, history) for k, (x, history) in found.items()}


def draw(output, found):
    figure = Figure(figsize=(13, 6), layout="constrained")
    *axes, last = figure.subplots(2, 3).flat
    for ax, (name, (images, history)) in zip(axes, found.items(), strict=True):
        sheet = images.reshape(10, -1, 8, 8).permute(1, 2, 0, 3).reshape(-1, 80)  # a column a class
        ax.imshow(sheet.numpy(), cmap="gray_r")
        ax.set(xticks=[], yticks=[], title=name)
        if history:
            last.semilogy([r["seconds"] for r in history], [r["value"] for r in history], label=name)
    last.set(xlabel="seconds", title="training loss")
    last.legend(frameon=False)
    figure.savefig(output, dpi=120)
    print(f"figure: {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default=os.path.join(os.environ.get("NESTOPT_OUTPUT", "."), "distillation.png"))
    parser.add_argument("--quick", action="store_true", default=bool(os.environ.get("NESTOPT_QUICK")))
    options = parser.parse_args()
    torch.set_num_threads(1)  # these tensors are small
    torch.set_default_dtype(torch.float64)
    draw(options.output, main(options.quick))
