"""The curvature of a network before and after training: all eigenvalues at once, and the top ones exactly.

A tanh network on scikit-learn's digits. Of its Hessian and of its Gauss-Newton matrix: the density of the eigenvalues
by stochastic Lanczos quadrature (some hundred products, against one for each parameter for the dense matrix, whose
eigenvalues are drawn in grey), the top eigenpairs with certified residuals, and the trace with its error.

Run: python examples/spectrum.py [--output FIGURE.png] [--quick]
"""

from __future__ import annotations

import argparse
import dataclasses
import os

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from nestopt import linalg

UNIT = 1e-3  # eigenvalues are drawn as asinh(value / UNIT): linear below the unit, logarithmic above, both signs
ROW = "{:<28} {:>8} {:>9} {:>9} {:>8} {:>19} {:>7} {:>19} {:>7}"
HEAD = (
    "matrix",
    "highest",
    "lowest",
    "residuals",
    "products",
    "trace (30 products)",
    "exactly",
    "below -.01",
    "exactly",
)


def digits(points):
    X, t = load_digits(return_X_y=True)
    return torch.as_tensor(X[:points] / 16), torch.as_tensor(t[:points])


def network(hidden, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(64, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 10))


def train(net, X, t, steps):
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(net(X), t)
        loss.backward()
        optimizer.step()
    accuracy = (net(X).argmax(-1) == t).double().mean()
    return float(loss.detach()), float(accuracy)


def operators(net, X, t):
    """Both matrices at the network's present parameters, by products."""
    return {
        "Hessian": linalg.Hessian(lambda p: cross_entropy(functional_call(net, p, X), t), net),
        "Gauss-Newton": linalg.GaussNewton(
            lambda p: functional_call(net, p, X), lambda outputs: cross_entropy(outputs, t), net
        ),
    }


def examine(label, A, quick):
    """What products alone say of A, beside the eigenvalues of the dense matrix."""
    top = linalg.extreme_pairs(A, k=10, which="highest")
    low = linalg.extreme_pairs(A, k=1, which="lowest", rtol=1e-3)
    trace = linalg.xtrace(A, products=30)
    spectrum = linalg.spectral_density(A, probes=4, steps=40 if quick else 100, block=1)
    below = spectrum.count(high=-0.01)
    exact = torch.linalg.eigvalsh(A.to_dense())
    ends = f"{float(top.values[0]):.4f}", f"{float(low.values[0]):.4f}", f"{max(top.error, low.error):.0e}"
    sums = f"{trace.value:.2f} +- {trace.standard_error:.2f}", f"{float(exact.sum()):.2f}"
    counts = f"{below.value:.1f} +- {below.standard_error:.1f}", int((exact < -0.01).sum())
    print(ROW.format(label, *ends, top.products + low.products, *sums, *counts))
    return top, trace, spectrum, exact


def scale(values):
    return torch.asinh(values / UNIT)


def draw_panel(axes, title, result, colour):
    top, _, spectrum, exact = result
    n, grid = len(exact), torch.linspace(-7.5, 9.5, 900)
    # the quadrature of the scaled eigenvalues is that of the eigenvalues with scaled nodes
    scaled = dataclasses.replace(spectrum, nodes=scale(spectrum.nodes))
    bins = torch.linspace(-7.5, 9.5, 69)
    axes.hist(scale(exact).numpy(), bins.numpy(), weights=[4.0] * n, color="0.82", label=f"exact: {n} products")
    label = f"Lanczos quadrature: {spectrum.products} products"
    axes.plot(grid, n * scaled.density(grid, 0.18), color=colour, linewidth=1.6, label=label)
    marks = scale(top.values)
    label = f"top {len(marks)} pairs: {top.products} products"
    axes.plot(marks, torch.full_like(marks, 1.6), "v", color="black", markersize=4.5, label=label)
    ticks = torch.tensor([-1e-1, -1e-2, 0.0, 1e-2, 1e-1, 1.0])
    names = [
        "0" if tick == 0 else f"{'-' if tick < 0 else ''}$10^{{{round(float(tick.abs().log10()))}}}$" for tick in ticks
    ]
    axes.set_xticks(scale(ticks).tolist(), names)
    axes.set(title=title, yscale="log", ylim=(0.7, 30000), xlim=(-7.5, 9.5))
    axes.legend(frameon=False, fontsize=8, loc="upper right")


def main(quick):
    """Returns {stage: {matrix: (top pairs, trace, density, exact eigenvalues)}}."""
    X, t = digits(100 if quick else 1797)
    net = network(5 if quick else 32)
    print(ROW.format(*HEAD))
    results = {}
    for stage, steps in (("at the start", 0), ("after training", 60 if quick else 150)):
        title = stage
        if steps:
            loss, accuracy = train(net, X, t, steps)
            title = f"{stage}: loss {loss:.3f}, accuracy {100 * accuracy:.1f} %"
        results[title] = {name: examine(f"{name} {stage}", A, quick) for name, A in operators(net, X, t).items()}
    return results


def draw(output, results):
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for column, (stage, matrices) in enumerate(results.items()):
        for row, (name, result) in enumerate(matrices.items()):
            draw_panel(panels[row][column], f"{name} {stage}", result, ("tab:blue", "tab:red")[row])
        panels[1][column].set_xlabel("eigenvalue")
    for row in panels:
        row[0].set_ylabel("eigenvalues per unit of the axis")
    figure.savefig(output, dpi=120)
    print(f"figure: {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default=os.path.join(os.environ.get("NESTOPT_OUTPUT", "."), "spectrum.png"))
    parser.add_argument("--quick", action="store_true", default=bool(os.environ.get("NESTOPT_QUICK")))
    options = parser.parse_args()
    torch.set_num_threads(1)  # these tensors are small
    torch.set_default_dtype(torch.float64)
    draw(options.output, main(options.quick))
