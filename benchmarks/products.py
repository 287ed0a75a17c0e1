"""What a Hessian product costs, in gradients: kept graph, fresh graph, forward over reverse, and blocks of 16.

    python benchmarks/products.py                        all models, writes benchmarks/results/products.json
    python benchmarks/products.py --quick --output products.json
    python benchmarks/products.py --device cuda

Every product is timed in turn with its own gradient (evaluation and backward pass), within one run, so that a busy
machine slows both; a figure is the median over the rounds of the ratio in each round. Data are synthetic and seeded.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# before torch: idle threads must not spin, and large buffers must not be mapped anew at every use
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(4 << 30))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(4 << 30))

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from nestopt.linalg import ForwardOverReverse, FreshGraph, GaussNewton, Hessian, KeptGraph

BLOCK = 16  # vectors
CLASSES = 10


def mlp() -> tuple[nn.Module, Tensor]:
    """784-256-10, batch 512."""
    return nn.Sequential(nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, CLASSES)), torch.randn(512, 784)


def cnn() -> tuple[nn.Module, Tensor]:
    """Two convolutions with pooling on 28 x 28, batch 128."""
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 7 * 7, CLASSES),
    )
    return net, torch.randn(128, 1, 28, 28)


def softmax() -> tuple[nn.Module, Tensor]:
    """Softmax regression, 784-10, batch 512."""
    return nn.Linear(784, CLASSES), torch.randn(512, 784)


def tiny() -> tuple[nn.Module, Tensor]:
    """8-8-10, batch 32: where blocks pay."""
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES)), torch.randn(32, 8)


MODELS = {"mlp": mlp, "cnn": cnn, "softmax": softmax, "tiny": tiny}


def contenders(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, tuple[Callable[[], Any], int]]:
    """What is timed, and how many products it makes."""

    def model(p: Any) -> Tensor:
        out: Tensor = functional_call(net, p, (x,))
        return out

    def loss(p: Any) -> Tensor:
        return F.cross_entropy(model(p), y)

    products = {
        "kept graph": KeptGraph(),
        "fresh graph": FreshGraph(),
        "forward over reverse": ForwardOverReverse(),
    }
    operators: dict[str, Any] = {name: Hessian(loss, net, product=product) for name, product in products.items()}
    operators["Gauss-Newton, kept"] = GaussNewton(model, lambda z: F.cross_entropy(z, y), net)
    blocks = {
        "kept graph, loop": operators["kept graph"],
        "kept graph, chunks of 16": Hessian(loss, net, product=KeptGraph(BLOCK)),
        "forward over reverse, chunks of 16": Hessian(loss, net, product=ForwardOverReverse(BLOCK)),
    }
    V = torch.randn(BLOCK, operators["kept graph"].shape[-1], device=x.device)
    V = V / V.norm(dim=-1, keepdim=True)
    named = dict(net.named_parameters())

    def raw() -> None:  # what the operator's own bookkeeping is measured against
        kept = operators["kept graph"].operator
        torch.autograd.grad(kept.outputs, kept.inputs, kept.into.split(V[0]), retain_graph=True)

    timed: dict[str, tuple[Callable[[], Any], int]] = {
        "gradient": (lambda: torch.autograd.grad(loss(named), list(named.values())), 1),
        "kept graph, bare autograd": (raw, 1),
        "construction of a kept graph": (lambda: Hessian(loss, net), 1),
    }
    for name, operator in operators.items():
        timed[name] = (lambda operator=operator: operator @ V[0]), 1  # type: ignore[misc]
    for name, operator in blocks.items():
        timed[f"block of {BLOCK}: {name}"] = (lambda operator=operator: operator @ V), BLOCK  # type: ignore[misc]
    truth = operators["kept graph"] @ V
    for name, operator in {**operators, **blocks}.items():
        if "Gauss" not in name and not torch.allclose(
            operator @ V, truth, rtol=1e-3, atol=1e-4 * float(truth.abs().max())
        ):
            raise SystemExit(f"{name} disagrees with the kept graph")
    return timed


def seconds(function: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Time a call: of the processor for the CPU (one thread: what others run does not count), of the wall for CUDA."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    for _ in range(repeats):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (clock() - start) / repeats


def measure(name: str, device: torch.device, rounds: int, budget: float) -> dict[str, Any]:
    """Medians for one model: seconds a gradient, and products in gradients."""
    torch.manual_seed(0)
    net, x = MODELS[name]()
    net, x, y = net.to(device), x.to(device), (torch.arange(len(x)) % CLASSES).to(device)
    timed = contenders(net, x, y)
    gradient = timed.pop("gradient")[0]
    for function in (gradient, *(function for function, _ in timed.values())):
        function()
    repeats = max(1, int(budget / seconds(gradient, 3, device)))
    baseline: list[float] = []
    ratios: dict[str, list[float]] = {key: [] for key in timed}
    for _ in range(rounds):
        for key, (function, count) in timed.items():
            before = seconds(gradient, repeats, device)
            product = seconds(function, max(1, repeats // count), device)
            after = seconds(gradient, repeats, device)
            baseline += [before, after]
            ratios[key].append(product / count / ((before + after) / 2))
    return {
        "gradient_seconds": statistics.median(baseline),
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "products": {
            key: {
                "gradients": round(statistics.median(values), 3),
                "quartiles": [round(q, 3) for q in statistics.quantiles(values, n=4)[::2]],
            }
            for key, values in ratios.items()
        },
    }


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "clock": "wall" if device.type == "cuda" else "process time",
        "load": os.getloadavg()[0],
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a few rounds, to see that it runs")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "products.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    rounds, budget = (3, 0.02) if arguments.quick else (15, 0.1)
    before = environment(device)
    models = {name: measure(name, device, rounds, budget) for name in arguments.models}
    results = {
        "environment": before,
        "unit": "gradients (evaluation and backward pass) a product",
        "rounds": rounds,
        "models": models,
    }
    print(f"{'product':54}" + "".join(f"{name:>10}" for name in models))
    print(f"{'(a gradient, ms)':54}" + "".join(f"{1e3 * m['gradient_seconds']:10.2f}" for m in models.values()))
    for key in next(iter(models.values()))["products"]:
        print(f"{key:54}" + "".join(f"{m['products'][key]['gradients']:10.2f}" for m in models.values()))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
