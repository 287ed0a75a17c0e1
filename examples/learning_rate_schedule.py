"""A learning-rate schedule by metagradients: the whole training is the lower level.

x holds the logarithms of twenty learning rates, y the network after a hundred steps of SGD with momentum on minibatches
of digits, each rate used for five of them. `Replay` pulls the validation loss back through the training, in memory for
a few of its steps, and its residual `trust` compares that metagradient with a finite difference of the whole training.
The learnt schedule has by far the lowest validation loss; its test accuracy is above that of the best constant rate,
but no higher than that rate's with a plain cosine decay.

Run: python examples/learning_rate_schedule.py [--output FIGURE.png] [--quick]
"""

from __future__ import annotations

import argparse
import os
import time

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn.functional import cross_entropy

from nestopt import bilevel, implicit, linalg

ROW = "{:<28} {:>9} {:>8} {:>9} {:>11} {:>7}"
STEPS, PIECES = 100, 20


def load():
    images, labels = load_digits(return_X_y=True)
    X, V, t, v = train_test_split(images / 16, labels, train_size=800, random_state=0, stratify=labels)
    V, E, v, e = train_test_split(V, v, train_size=400, random_state=0, stratify=v)
    return [torch.as_tensor(a) for a in (X, t, V, v, E, e)]


def start():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))
    return net, {name: p.detach().clone() for name, p in net.named_parameters()}


def sgd(x, t):
    """The optimizer of step t."""
    return implicit.SGD(torch.exp(x[t * PIECES // STEPS]), momentum=0.9)


def learn(quick):
    X, t, V, v, E, e = load()
    net, y0 = start()
    order = torch.stack([torch.randperm(800, generator=torch.Generator().manual_seed(k))[:50] for k in range(STEPS)])
    data = bilevel.PerStep(upper=(V, v), lower=lambda k: (X[order[k % STEPS]], t[order[k % STEPS]]))

    def loss(x, y, batch):
        return cross_entropy(torch.func.functional_call(net, y, (batch[0],)), batch[1])

    def train(x):
        """The same training without derivatives."""
        y, state = y0, sgd(x, 0).init(y0)
        for k in range(STEPS):
            slope = torch.func.grad(lambda y, k=k: loss(x, y, data.lower(k)))(y)
            y, state = sgd(x, k).step(y, slope, state)
        return y

    def row(name, trainings, begun, y, training=""):
        accuracy = float((torch.func.functional_call(net, y, (E,)).argmax(-1) == e).double().mean())
        value = float(loss(None, y, data.upper))
        print(
            ROW.format(
                name, trainings, f"{time.perf_counter() - begun:.1f}", training, f"{value:.4f}", f"{accuracy:.3f}"
            )
        )
        return value

    print(ROW.format(f"{STEPS} steps on digits", "trainings", "seconds", "", "validation", "test"))
    begun, rates = time.perf_counter(), torch.logspace(-2, 0.5, 4 if quick else 11)
    constants = {float(rate): train(rate.log().expand(PIECES)) for rate in rates}
    best = min(constants, key=lambda rate: float(loss(None, constants[rate], data.upper)))
    row(f"best constant rate, {best:.3f}", len(rates), begun, constants[best])
    begun, ramp = time.perf_counter(), (1 + torch.cos(torch.pi * torch.arange(PIECES) / PIECES)) / 2
    row("the same with cosine decay", 1, begun, train((best * ramp).log()))

    begun, problem = time.perf_counter(), bilevel.Problem(upper=loss, lower=loss)
    method = bilevel.Replay(
        steps=STEPS, optimizer=sgd, stopping=linalg.Stopping(rtol=1e-3, max_iter=3 if quick else 30)
    )
    path = []
    watch = [bilevel.ProgressBar(label="schedule"), lambda k, state: path.append((float(state.value), state.x.clone()))]
    x0 = torch.tensor(best).log().expand(PIECES).clone()
    res = bilevel.solve(problem, x0, y0, method, data=lambda k: data, callbacks=watch)
    row("learnt schedule", res.counts.lower_gradients // STEPS, begun, res.y)
    print(f"  {res.status.name}; {method.diagnosis(res.state)}")
    return best, ramp, path, res


def draw(output, best, ramp, path, res):
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.stairs(torch.exp(res.x), baseline=None, color="tab:blue", label="learnt")
    left.stairs(best * ramp, baseline=None, color="0.6", linestyle="--", label="cosine decay")
    left.axhline(best, color="0.6", label="best constant")
    left.set(
        xlabel="piece of the training",
        xticks=range(0, PIECES + 1, 5),
        ylabel="learning rate",
        yscale="log",
        title="schedule",
    )
    left.legend(frameon=False)
    right.semilogy([value for value, _ in path], "o-")
    right.set(xlabel="outer step", title="validation loss after the training")
    figure.savefig(output, dpi=120)
    print(f"figure: {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default=os.path.join(os.environ.get("NESTOPT_OUTPUT", "."), "schedule.png"))
    parser.add_argument("--quick", action="store_true", default=bool(os.environ.get("NESTOPT_QUICK")))
    options = parser.parse_args()
    torch.set_num_threads(1)  # these tensors are small
    torch.set_default_dtype(torch.float64)
    draw(options.output, *learn(options.quick))
