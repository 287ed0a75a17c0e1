"""Layers inside a model under torch.compile: forward and backward, eager against compiled, in one run.

The model is Linear -> layer -> Linear with a loss on top; "Linear-ReLU-Linear" has these three in front. "compiled" is
torch.compile(model) with its default backend, "compiled parts" the eager model whose two linear parts are compiled on
their own: what a graph break at the layer should cost at most; "find too" is the compiled model whose finder of y is
compiled as well, as the layers' docstring proposes. Models without a layer have "nothing" in its place, or
"one break", a graph break around nothing: what torch itself takes for entering the graphs that a break leaves, which a
compiled layer has to win back. Every contender trains on the same batch, in an order that changes; seconds are medians
of interleaved runs, the ratio, the median over the rounds, is to eager, "of CPU time" is the same of the time that this
thread ran, which other processes disturb less. A recompilation after the first calls would show in `graphs`, which
counts them.

Run: python benchmarks/layers_compile.py [--quick] [--output FILE.json] [--device cuda]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import random
import statistics
import time
from pathlib import Path

import torch
import torch._dynamo
from torch import nn

from nestopt import constrained, implicit
from nestopt.implicit.transforms import untraced
from nestopt.linalg import GMRES


class Cell(nn.Module):
    """A contraction of width n."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.inner = nn.Linear(n, n)
        with torch.no_grad():
            self.inner.weight.mul_(0.3)

    def forward(self, y, x):
        return torch.tanh(self.inner(y)) + x


class Residual(Cell):
    def forward(self, y, x):
        return y - super().forward(y, x)


class Energy(Cell):
    def forward(self, y, x):
        return ((y - x) ** 2).sum(-1) / 2 + torch.log(torch.cosh(self.inner(y))).sum(-1) / 4


def picard(T, y):
    for _ in range(30):
        y = T(y)
    return y


def richardson(R, y):
    for _ in range(30):
        y = y - R(y)
    return y


def descent(f, y):
    for _ in range(30):
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            (g,) = torch.autograd.grad(f(leaf).sum(), leaf)
        y = y - 0.8 * g
    return y


class Model(nn.Module):
    """Linear -> layer -> Linear -> loss, or with Linear -> ReLU -> Linear in front."""

    def __init__(self, layer: nn.Module, n: int, width: int, deep: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.first, self.last = nn.Linear(width, n), nn.Linear(n, width)
        if deep:
            self.first = nn.Sequential(nn.Linear(width, width), nn.ReLU(), self.first)

    def forward(self, x):
        h = self.first(x)
        return self.last(self.layer(torch.zeros_like(h), h)).square().mean()


class Nothing(nn.Module):
    """The second input."""

    def forward(self, y, x):
        return x.clone()


class Break(Nothing):
    """The same as one graph break."""

    _call_impl = untraced(nn.Module._call_impl)


class Program(nn.Module):
    """The quadratic program with an input as its linear term, general rows and bounds."""

    def __init__(self, n: int) -> None:
        super().__init__()
        G = torch.randn(n, n, generator=torch.Generator().manual_seed(0))
        self.program = constrained.QPLayer(Q=torch.eye(n), G=nn.Parameter(G), h=torch.ones(n), low=-1.0)

    def forward(self, y, q):
        return self.program(q=q).x


def models(quick: bool) -> dict[str, tuple[nn.Module, int]]:
    """The models by name, with the batch that each gets."""
    n, width, batch = (8, 16, 8) if quick else (32, 256, 64)
    options = {"batch_dims": 1, "rtol": 1e-2}
    wide = width if quick else 64
    return {
        "nothing": (Model(Nothing(), n, width), batch),
        "nothing, one break": (Model(Break(), n, width), batch),
        "Linear-ReLU-Linear-nothing": (Model(Nothing(), n, wide, deep=True), batch),
        "Linear-ReLU-Linear-one break": (Model(Break(), n, wide, deep=True), batch),
        "Linear-ReLU-Linear-RootLayer": (
            Model(implicit.RootLayer(Residual(n), richardson, **options), n, wide, deep=True), batch,
        ),
        "tiny RootLayer": (Model(implicit.RootLayer(Residual(8), richardson, **options), 8, 16), 8),
        "RootLayer, LU": (Model(implicit.RootLayer(Residual(n), richardson, **options), n, width), batch),
        "FixedPointLayer, LU": (Model(implicit.FixedPointLayer(Cell(n), picard, **options), n, width), batch),
        "FixedPointLayer, GMRES": (
            Model(implicit.FixedPointLayer(Cell(n), picard, solver=GMRES(rtol=1e-4), **options), n, width), batch,
        ),
        "FixedPointLayer, one step": (
            Model(implicit.FixedPointLayer(Cell(n), picard, solver=implicit.OneStep(), **options), n, width), batch,
        ),
        "ArgminLayer, LU": (Model(implicit.ArgminLayer(Energy(n), descent, **options), n, width), batch),
        "QPLayer": (Model(Program(10), 10, width), batch),
    }  # fmt: skip


def step(model, x, parameters):
    """One forward and backward pass."""
    return torch.autograd.grad(model(x), parameters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "layers_compile.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 7 if options.quick else options.rounds
    rows = {}
    order = random.Random(0)
    heads = f"{'compiled':>9} {'find too':>9} {'of least':>9} {'of CPU time':>12} {'parts':>7} {'graphs':>7}"
    print(f"{'model':<28} {'eager ms':>9} {heads} {'difference':>11}")
    for name, (model, batch) in models(options.quick).items():
        torch.manual_seed(0)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        eager = model.to(options.device)
        compiled, parts = copy.deepcopy(eager), copy.deepcopy(eager)
        compiled.compile()
        parts.first.compile()
        parts.last.compile()
        contenders = {"eager": eager, "compiled": compiled, "parts": parts}
        if hasattr(eager.layer, "find"):
            contenders["find too"] = copy.deepcopy(eager)
            contenders["find too"].layer.find = torch.compile(eager.layer.find)
            contenders["find too"].compile()
        x = torch.randn(batch, eager.last.out_features, device=options.device)
        seconds: dict[str, list[float]] = {key: [] for key in contenders}
        running: dict[str, list[float]] = {key: [] for key in contenders}
        values = {}
        first = 0.0
        for round_ in range(rounds + 3):
            for key in order.sample(list(contenders), len(contenders)):
                contender = contenders[key]
                parameters = list(contender.parameters())
                begun, ran = time.perf_counter(), time.thread_time()
                values[key] = step(contender, x, parameters)
                if x.is_cuda:
                    torch.cuda.synchronize()
                spent, ran = time.perf_counter() - begun, time.thread_time() - ran
                if round_ >= 3:  # the first rounds compile
                    seconds[key].append(spent)
                    running[key].append(ran)
                elif key == "compiled" and round_ == 0:
                    first = spent
            if round_ == 2:
                graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        again = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
        difference = max(
            float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))
            for a, b in zip(values["compiled"], values["eager"], strict=True)
        )
        median = {key: statistics.median(value) for key, value in seconds.items()}
        ratios = {
            key: statistics.median(a / b for a, b in zip(seconds[key], seconds["eager"], strict=True))
            for key in contenders
        }
        least = {key: min(value) for key, value in seconds.items()}
        cpu = {key: statistics.median(value) for key, value in running.items()}
        rows[name] = {
            "seconds": median, "ratio": ratios["compiled"], "ratio_find_too": ratios.get("find too"),
            "ratio_of_least": least["compiled"] / least["eager"],
            "ratio_of_cpu_time": cpu["compiled"] / cpu["eager"], "ratio_parts": median["parts"] / median["eager"],
            "graphs": graphs, "graphs_later": again, "first_call_seconds": first, "relative_difference": difference,
        }  # fmt: skip
        print(
            f"{name:<28} {1e3 * median['eager']:>9.2f} {ratios['compiled']:>9.2f} "
            f"{ratios.get('find too', float('nan')):>9.2f} {rows[name]['ratio_of_least']:>9.2f} "
            f"{rows[name]['ratio_of_cpu_time']:>12.2f} {rows[name]['ratio_parts']:>7.2f} "
            f"{graphs:>4}+{again:<2} {difference:>11.1e}"
        )
    environment = {
        "torch": torch.__version__, "python": platform.python_version(), "threads": 1, "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu", "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"), "quick": options.quick, "rounds": rounds,
    }  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
