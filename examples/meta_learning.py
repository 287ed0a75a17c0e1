"""Meta-learning: features that let a new task be learnt from a few samples, all tasks of a batch solved at once.

x is a network's body and the start of its head; y holds one head a task, fitted to the task's few samples and kept near
the start: y_k = argmin loss_k(x, y) + (strength / 2) |y - x_head|^2, the lower level of iMAML. Sinusoids from ten
points (score: median squared error); digits, three classes at a time (score: accuracy), tested on new images. Other
tasks than those of the test say when to stop. Unrolled hypergradients of ever more inner steps agree with the implicit.

Run: python examples/meta_learning.py [--output FIGURE.png] [--quick]
"""

from __future__ import annotations

import argparse
import os

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from nestopt import bilevel, implicit, linalg

ROW = "{:<34} {:>6} {:>8} {:>10} {:>12} {:>10}"
STRENGTH, NEW = 0.1, 50  # NEW tasks to validate by, and as many to test


def sinusoids(tasks, seed):
    """Ten points to learn a task from, ten to judge it by: amplitude in [.1, 5], phase in [0, pi]."""
    g = torch.Generator().manual_seed(seed)
    amplitude, phase = 0.1 + 4.9 * torch.rand(tasks, 1, generator=g), torch.pi * torch.rand(tasks, 1, generator=g)
    u = 10 * torch.rand(2, tasks, 10, generator=g) - 5
    return [(points[..., None] / 5, amplitude * torch.sin(points + phase)) for points in u]


def digit_tasks(tasks, part, seed, shots=5):
    """Three classes a task; five images each to learn from, ten to judge by, drawn from a part of the images."""
    images, labels = (torch.as_tensor(a[part]) for a in load_digits(return_X_y=True))
    g, drawn = torch.Generator().manual_seed(seed), []
    for _ in range(tasks):
        rows = [torch.nonzero(labels == c)[:, 0] for c in torch.randperm(10, generator=g)[:3]]
        drawn.append(torch.stack([r[torch.randperm(len(r), generator=g)[: shots + 10]] for r in rows]))
    rows, names = torch.stack(drawn), torch.arange(3).expand(tasks, 3)
    sets = (rows[..., :shots], rows[..., shots:])
    return [(images[r.flatten(1)] / 16, names.repeat_interleave(r.shape[-1], 1)) for r in sets]


def start(inputs, outputs, width=40):
    g = torch.Generator().manual_seed(0)
    body = {"W1": torch.randn(inputs, width, generator=g) / inputs**0.5, "b1": torch.randn(width, generator=g)}
    body |= {"W2": torch.randn(width, width, generator=g) / width**0.5, "b2": torch.zeros(width)}
    return body | {"head": torch.zeros(width + 1, outputs)}


def predict(x, y, inputs):
    hidden = torch.tanh(torch.tanh(inputs @ x["W1"] + x["b1"]) @ x["W2"] + x["b2"])
    return hidden @ y[:, :-1] + y[:, -1:]


def loss(outputs, targets):
    """Of each task: squared errors of numbers, cross-entropies of classes."""
    if targets.is_floating_point():
        return ((outputs[..., 0] - targets) ** 2).mean(-1)
    return cross_entropy(outputs.transpose(1, 2), targets, reduction="none").mean(-1)


def problem_of(support, query):
    """One value a task; y is (tasks, width + 1, outputs)."""

    def lower(x, y):
        return loss(predict(x, y, support[0]), support[1]) + STRENGTH / 2 * ((y - x["head"]) ** 2).sum((1, 2))

    return bilevel.TaskProblem(upper=lambda x, y: loss(predict(x, y, query[0]), query[1]), lower=lower)


def learn(name, train, valid, test, outputs, score, steps):
    """The features that are best on the validation tasks, which also end the run; none of the test tasks is seen."""
    x0, count = start(train[0][0].shape[-1], outputs), len(train[0][0])
    problem, watched, held = (problem_of(*tasks) for tasks in (train, valid, test))

    def fitted(tasks, x):
        y = implicit.NewtonCG()(lambda y: tasks.lower(x, y).sum(), x["head"].expand(NEW, -1, -1).clone()).unwrap()
        return y, float(tasks.upper(x, y).mean())

    def row(label, x, seconds, value):
        y, new = fitted(held, x)
        figure = float(score(predict(x, y, test[1][0]), test[1][1]))
        print(ROW.format(label, count, f"{seconds:.1f}", value, f"{new:.4f}", f"{figure:.3f}"))
        return x, y

    print(ROW.format(name, "tasks", "seconds", "training", "new tasks", "score"))
    row("untrained features", x0, 0.0, "")
    method, y0 = bilevel.AID(stopping=linalg.Stopping(rtol=1e-4, max_iter=steps)), torch.zeros(count, *x0["head"].shape)
    stop = bilevel.EarlyStopping(lambda state: fitted(watched, state.x)[1])
    res = bilevel.solve(problem, x0, y0, method, callbacks=[bilevel.ProgressBar(label=name), stop])
    new = row("meta-learnt (iMAML)", stop.best.x, res.history[-1]["seconds"], f"{float(stop.best.value):.4f}")
    print(f"  {res.status.name}, best at step {int(stop.best.iterations)}: {res.counts.products} products\n")
    return problem, stop.best, res.history, new


def agreement(problem, best, counts):
    """The hypergradient through k inner steps against the implicit one, at the learnt features."""
    solved = bilevel.solve(problem, best.x, best.y, bilevel.AID(stopping=linalg.Stopping(rtol=None, max_iter=0)))
    y0, exact = best.x["head"].expand_as(best.y).clone(), solved.state.hypergradient
    print("relative difference of unrolled and implicit hypergradients")
    found = []
    for k in counts:
        unrolled = bilevel.Unrolled(steps=k).init(problem, best.x, y0).hypergradient
        found.append(float((unrolled - exact).norm() / exact.norm()))
        print(f"  {k:>3} inner steps {found[-1]:>10.1e}")
    return counts, found


def draw(output, waves, test, digits, agreed):
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    grid = torch.linspace(-5, 5, 100)
    curves = predict(*waves[3], (grid / 5)[:, None])[..., 0]
    for k, colour in enumerate(("tab:blue", "tab:orange", "tab:green")):
        left.plot(grid, curves[k], color=colour)
        for (points, heights), mark in zip(test, "ox", strict=True):
            left.plot(5 * points[k, :, 0], heights[k], mark, color=colour)
    left.set(title="new sinusoids: learnt from o, judged by x")
    for label, run in (("sinusoids", waves), ("digits", digits)):
        middle.semilogy([r["seconds"] for r in run[2]], [r["value"] for r in run[2]], label=label)
    middle.set(xlabel="seconds", title="mean loss of the training tasks")
    middle.legend(frameon=False)
    right.loglog(*agreed, "o-")
    right.set(xlabel="inner steps", title="unrolled against implicit hypergradient")
    figure.savefig(output, dpi=120)
    print(f"figure: {output}")


def main(output, quick):
    steps, test = 8 if quick else 100, sinusoids(NEW, 1)
    median, accuracy = lambda p, t: loss(p, t).median(), lambda p, t: (p.argmax(-1) == t).double().mean()
    waves = learn("sinusoids, 10 points", sinusoids(25 if quick else 100, 0), sinusoids(NEW, 2), test, 1, median, steps)
    parts = (10 if quick else 60, slice(0, 800), 0), (NEW, slice(800, 1100), 2), (NEW, slice(1100, None), 1)
    digits = learn("digits, 3 classes, 5 shots", *(digit_tasks(*part) for part in parts), 3, accuracy, steps)
    draw(output, waves, test, digits, agreement(*digits[:2], [2, 8, 32] if quick else [1, 2, 4, 8, 16, 32, 64, 128]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default=os.path.join(os.environ.get("NESTOPT_OUTPUT", "."), "meta_learning.png"))
    parser.add_argument("--quick", action="store_true", default=bool(os.environ.get("NESTOPT_QUICK")))
    options = parser.parse_args()
    torch.set_num_threads(1)  # these tensors are small
    torch.set_default_dtype(torch.float64)
    main(options.output, options.quick)
