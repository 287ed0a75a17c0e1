"""Predictors of costs trained for the decisions that they lead to, not for their squared error.

Costs depend on features by a polynomial, the predictor is linear: at a high degree it must be wrong somewhere, and what
counts is where. A knapsack and shortest paths on a 5 x 5 grid; least squares (two-stage) against SPO+ and the regret of
a regularised QP layer, which start from it. Reported: normalised regret on test data.

Run: python examples/decision_focused.py [--output FIGURE.png] [--quick]
"""

from __future__ import annotations

import argparse
import itertools
import os

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from nestopt import constrained, implicit

METHODS = {"two-stage": "0.5", "SPO+": "tab:blue", "QP layer": "tab:orange"}  # and their colours


def generate(count, degree, n, seed, features=5, noise=0.5):
    """Features x, costs c_j = (((B x)_j / sqrt(p) + 3)^degree + 1) / 3.5^degree times noise (Elmachtoub & Grigas)."""
    g = torch.Generator().manual_seed(seed)
    B = (torch.rand(n, features, generator=g) < 0.5).double()
    x = torch.randn(count, features, generator=g, dtype=torch.float64)
    factor = 1 + noise * (2 * torch.rand(count, n, generator=g, dtype=torch.float64) - 1)
    c = ((x @ B.T / features**0.5 + 3) ** degree + 1) / 3.5**degree * factor
    return torch.cat([x, x.new_ones(count, 1)], 1), c


class Grid:
    """The shortest of the 70 paths right and down through a 5 x 5 grid, by looking at all of them."""

    maximize = False

    def __init__(self, size=5):
        node = torch.arange(size * size).reshape(size, size)
        tails, heads = (torch.cat([node[:, s].flatten(), node[s].flatten()]) for s in (slice(-1), slice(1, None)))
        edge = {ends: i for i, ends in enumerate(zip(tails.tolist(), heads.tolist(), strict=True))}
        self.n, turns = len(edge), itertools.combinations(range(2 * size - 2), size - 1)
        self.paths = torch.zeros(70, self.n, dtype=torch.float64)
        for row, rights in enumerate(turns):
            stops = list(itertools.accumulate((1 if i in rights else size for i in range(2 * size - 2)), initial=0))
            self.paths[row, [edge[ends] for ends in itertools.pairwise(stops)]] = 1
        node = torch.arange(size * size - 1)[:, None]  # the last one's conservation law follows from the others
        flow = (tails == node).double() - (heads == node).double()
        self.program = {"A": flow, "b": (node[:, 0] == 0).double(), "low": 0.0}

    def __call__(self, c):
        return self.paths[(c @ self.paths.T).argmin(-1)]


class Knapsack:
    """The items of the largest total value whose integer weights fit."""

    maximize = True

    def __init__(self, n=12, seed=0):
        self.n, self.weights = n, torch.randint(3, 9, (n,), generator=torch.Generator().manual_seed(seed))
        self.capacity = int(self.weights.sum()) // 3
        limit = torch.tensor([self.capacity]).double()
        self.program = {"G": self.weights.double()[None], "h": limit, "low": 0.0, "high": 1.0}

    def __call__(self, c):
        best, taken, w = c.new_zeros(len(c), self.capacity + 1), [], torch.zeros_like(c)
        for item, weight in enumerate(self.weights.tolist()):
            with_it = torch.cat([torch.full((len(c), weight), -torch.inf), best[:, :-weight] + c[:, item, None]], 1)
            taken.append(with_it > best)
            best = torch.maximum(best, with_it)
        rows, left = range(len(c)), torch.full((len(c),), self.capacity)
        for item in reversed(range(self.n)):
            w[:, item] = taken[item][rows, left]
            left = left - (w[:, item] * self.weights[item]).long()
        return w


def train(problem, x, c, method, steps, learning_rate=0.02, regulariser=0.2):
    """A linear predictor c_hat = x W: least squares, and some steps from there."""
    W = torch.linalg.lstsq(x, c).solution.requires_grad_()
    best, sign, g = problem(c), -1.0 if problem.maximize else 1.0, torch.Generator().manual_seed(0)
    optimizer, Q = torch.optim.Adam([W], lr=learning_rate), regulariser * torch.eye(problem.n).double()
    for _ in range(steps):
        batch = torch.randperm(len(x), generator=g)[:32]
        if method == "SPO+":
            loss = implicit.spo_plus(x[batch] @ W, c[batch], problem, solution=best[batch], maximize=problem.maximize)
        else:
            w = constrained.solve_qp(Q, sign * x[batch] @ W, **problem.program).x
            loss = sign * (c[batch] * (w - best[batch])).sum(-1)
        (W.grad,) = torch.autograd.grad(loss.mean(), W)
        optimizer.step()
    return W.detach()


def compare(quick):
    """Normalised test regrets, {(problem, degree, method): one a seed}."""
    degrees, seeds = ((1, 8), range(1)) if quick else ((1, 4, 8), range(3))
    steps = {"two-stage": 0, "SPO+": 100 if quick else 200, "QP layer": 6 if quick else 20}
    cases = [(p, d, s, m) for p in (Knapsack(), Grid()) for d in degrees for s in seeds for m in METHODS]
    found = {}
    for problem, degree, seed, method in tqdm(cases, desc="training", disable=None):
        x, c = generate(600, degree, problem.n, 10 * seed + degree)
        W = train(problem, x[:200], c[:200], method, steps[method])
        regrets = implicit.regret(x[200:] @ W, c[200:], problem, maximize=problem.maximize)
        value = regrets.sum() / implicit.optimal_value(c[200:], problem).abs().sum()
        found.setdefault((type(problem).__name__, degree, method), []).append(float(value))
    return found


def report(found):
    print(("{:<10} {:>6}" + " {:>18}" * 3).format("regret", "degree", *METHODS))
    for name, degree in dict.fromkeys(key[:2] for key in found):
        row = (100 * torch.tensor(found[name, degree, method]) for method in METHODS)
        cells = (f"{r.mean():.2f} % +- {r.std(correction=0):.2f}" for r in row)
        print(("{:<10} {:>6}" + " {:>18}" * 3).format(name, degree, *cells))


def draw(output, found):
    figure, names = Figure(figsize=(10, 4), layout="constrained"), sorted({key[0] for key in found})
    for axis, name in zip(figure.subplots(1, len(names)), names, strict=True):
        degrees = sorted({key[1] for key in found if key[0] == name})
        for i, (method, colour) in enumerate(METHODS.items()):
            for d, degree in enumerate(degrees):
                values, at = [100 * v for v in found[name, degree, method]], d + 0.27 * (i - 1)
                axis.bar(at, sum(values) / len(values), 0.25, color=colour, label=None if d else method)
                axis.plot([at] * len(values), values, "k.", markersize=4)
        axis.set(xlabel="degree of the costs in the features", ylabel="normalised test regret, %", title=name)
        axis.set_xticks(range(len(degrees)), degrees)
        axis.margins(y=0.25)
        axis.legend(frameon=False, ncols=3, loc="upper center")
    figure.savefig(output, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default=os.path.join(os.environ.get("NESTOPT_OUTPUT", "."), "decisions.png"))
    parser.add_argument("--quick", action="store_true", default=bool(os.environ.get("NESTOPT_QUICK")))
    options = parser.parse_args()
    torch.set_num_threads(1)  # these tensors are small
    regrets = compare(options.quick)
    report(regrets)
    draw(options.output, regrets)
    print(f"figure: {options.output}")
