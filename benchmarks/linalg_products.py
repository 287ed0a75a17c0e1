"""Blocks of 16 Hessian products: automatic chunks against the loop, their memory, compiled ones, and traffic.

    python benchmarks/linalg_products.py                 all models, writes benchmarks/results/linalg_products.json
    python benchmarks/linalg_products.py --quick --output linalg_products.json
    python benchmarks/linalg_products.py --device cuda --compiled

Every contender multiplies the same 16 vectors as the loop over one kept graph; a figure is the median over the rounds
of its time over the loop's in the same round. `first` is the first block of an operator, which pays for AutoChunk's
measurement. Memory is the peak of the tensors that one block makes, in multiples of one product's, beside what was
asked. Traffic is counted on two processes over gloo: all-reduces and bytes a block.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(4 << 30))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(4 << 30))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from products import BLOCK, CLASSES, MODELS, environment
from torch import Tensor
from torch.func import functional_call

from nestopt.linalg import AutoChunk, Compiled, DataParallel, ForwardOverReverse, FreshGraph, Hessian, KeptGraph
from nestopt.linalg.chunks import PeakMemory

MEMORY = 6  # times one product's: what the bounded contender may take


def problem(name: str, device: torch.device) -> tuple[Callable[[Any], Tensor], Any]:
    torch.manual_seed(0)
    net, x = MODELS[name]()
    net, x, y = net.to(device), x.to(device), (torch.arange(len(x)) % CLASSES).to(device)
    return lambda p: F.cross_entropy(functional_call(net, p, (x,)), y), net


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def peak(function: Callable[[], Any]) -> int:
    with PeakMemory() as memory:
        function()
    return memory.peak


def measure(name: str, device: torch.device, rounds: int, compiled: bool) -> dict[str, Any]:
    """One model: each contender's block in loops, and its memory."""
    loss, net = problem(name, device)
    loop = Hessian(loss, net)
    V = torch.randn(BLOCK, loop.shape[-1], device=device)
    V = V / V.norm(dim=-1, keepdim=True)
    truth = loop @ V
    one = peak(lambda: loop @ V[0])
    result_bytes = truth.numel() * truth.element_size()
    products = {
        "KeptGraph, AutoChunk": KeptGraph(AutoChunk()),
        f"KeptGraph, AutoChunk in {MEMORY} products": KeptGraph(AutoChunk(MEMORY * one)),
        f"KeptGraph, chunks of {BLOCK}": KeptGraph(BLOCK),
        "FreshGraph, AutoChunk": FreshGraph(AutoChunk()),
        "ForwardOverReverse, loop": ForwardOverReverse(),
        "ForwardOverReverse, AutoChunk": ForwardOverReverse(AutoChunk()),
    }
    if compiled:
        products["Compiled, AutoChunk"] = Compiled(AutoChunk())
    operators = {key: Hessian(loss, net, product=product) for key, product in products.items()}
    peak(lambda: loop @ V[0])
    rows: dict[str, dict[str, Any]] = {}
    base = min(seconds(lambda: loop @ V, device) for _ in range(3))
    for key, operator in operators.items():
        first = seconds(lambda operator=operator: operator @ V, device)  # type: ignore[misc]
        if not torch.allclose(operator @ V, truth, rtol=1e-3, atol=1e-4 * float(truth.abs().max())):
            raise SystemExit(f"{key} disagrees with the loop")
        for _ in range(3):  # until the trials of a chunk are over
            operator @ V
        used = peak(lambda operator=operator: operator @ V) - result_bytes  # type: ignore[misc]
        rows[key] = {
            "first": round(first / base, 2),
            "memory": round(used / one, 2),
            "looped": operator.looped,
        }
    ratios: dict[str, list[float]] = {key: [] for key in operators}
    for _ in range(rounds):
        for key, operator in operators.items():
            before = seconds(lambda: loop @ V, device)
            mine = min(seconds(lambda operator=operator: operator @ V, device) for _ in range(2))  # type: ignore[misc]
            after = seconds(lambda: loop @ V, device)
            ratios[key].append(mine / min(before, after))
    for key, values in ratios.items():
        rows[key]["time"] = round(statistics.median(values), 3)
    return {"parameters": loop.shape[-1], "loop_seconds": base, "one_product_bytes": one, "rows": rows}


def count_traffic(rank: int, path: str, results: Any) -> None:
    """One rank of two: what DataParallel sends for a block."""
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    loss, net = problem("tiny", torch.device("cpu"))
    calls, real = [], dist.all_reduce

    def counted(v: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(v.numel() * v.element_size())
        return real(v, *args, **kwargs)

    dist.all_reduce = counted
    H = DataParallel(Hessian(loss, net))
    H @ torch.ones(BLOCK, H.shape[-1])
    if rank == 0:
        results.update(all_reduces=len(calls), bytes=sum(calls), block_bytes=4 * BLOCK * H.shape[-1])
    dist.destroy_process_group()


def traffic(directory: Path) -> dict[str, int]:
    store = directory / f".store-{os.getpid()}"
    with mp.Manager() as manager:
        results = manager.dict()
        try:
            mp.spawn(count_traffic, args=(str(store), results), nprocs=2)
        finally:
            store.unlink(missing_ok=True)
        return dict(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="two models and few rounds, to see that it runs")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--compiled", action="store_true", help="also torch.compile, which takes a minute a model")
    parser.add_argument("--models", nargs="+", default=None, choices=list(MODELS))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "linalg_products.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    names = options.models or (["softmax", "tiny"] if options.quick else list(MODELS))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    before = environment(device)
    with PeakMemory():  # its first use in a process loads a part of torch
        torch.ones(1) + 1
    models = {name: measure(name, device, 3 if options.quick else 15, options.compiled) for name in names}
    sent = traffic(options.output.parent)
    print(f"block of {BLOCK} vectors; time and first block in loops over one kept graph, memory in single products")
    print(f"{'':44}" + "".join(f"{name:^24}" for name in models))
    print(f"{'':44}" + f"{'time':>8}{'first':>8}{'memory':>8}" * len(models))
    for key in next(iter(models.values()))["rows"]:
        cells = [model["rows"][key] for model in models.values()]
        print(f"{key:44}" + "".join(f"{c['time']:8.2f}{c['first']:8.2f}{c['memory']:8.1f}" for c in cells))
    print(
        f"data-parallel, 2 processes: {sent['all_reduces']} all-reduce of {sent['bytes']} bytes for a block of "
        f"{sent['block_bytes']} bytes"
    )
    results = {"environment": before, "block": BLOCK, "memory_asked": MEMORY, "models": models, "traffic": sent}
    options.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
