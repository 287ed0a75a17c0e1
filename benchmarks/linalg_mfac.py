"""M-FAC against the published recursion: build and product, accuracy in float32, and the window's append.

    python benchmarks/linalg_mfac.py                 d to 1 000 000, writes benchmarks/results/linalg_mfac.json
    python benchmarks/linalg_mfac.py --quick --output linalg_mfac.json
    python benchmarks/linalg_mfac.py --device cuda

The recursion is the paper's, m rank-one updates of F^-1, each two matrix-vector products with the rows so far. Ratios
are within one run, the contenders taken in turn. "Reading once" is the sum of the m x d block, the fastest thing that
touches all of it. The time is the processor's on a CPU (one thread: what others run does not count).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

# before torch: idle threads must not spin, and large buffers must not be mapped anew at every use
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(4 << 30))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(4 << 30))

import torch

from nestopt.linalg import MFAC

DAMPING = 1e-5
ROW = "{:>5} {:>9}  {:<28} {:>11} {:>11} {:>9}"


class Recursion:
    """F_k^-1 x = F_{k-1}^-1 x - v_k (v_k'x) / q_k with v_k = F_{k-1}^-1 g_k, q_k = m + g_k'v_k; F_0 = damping I."""

    def __init__(self, G, damping):
        m = len(G)
        self.damping, self.rows, self.q = damping, torch.empty_like(G), G.new_empty(m)
        for k, g in enumerate(G):
            v = g / damping
            if k:
                v = v - ((self.rows[:k] @ g) / self.q[:k]) @ self.rows[:k]
            self.rows[k], self.q[k] = v, m + g @ v

    def solve(self, x):
        return x / self.damping - ((self.rows @ x) / self.q) @ self.rows


CONTENDERS = {
    "recursion": Recursion,
    "MFAC": MFAC,
    "MFAC, whitened": lambda G, damping: MFAC(G, damping, whitened=True),
}


def seconds(function, device):
    clock = time.perf_counter if device == "cuda" else time.process_time
    if device == "cuda":
        torch.cuda.synchronize()
    begun = clock()
    out = function()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - begun, out


def median_times(jobs, rounds, device):
    """The median of each job, taken in turn; the first round warms up."""
    times = {name: [] for name in jobs}
    for round_ in range(rounds + 1):
        for name, job in jobs.items():
            spent, _ = seconds(job, device)
            if round_:
                times[name].append(spent)
    return {name: statistics.median(values) for name, values in times.items()}


def static(m, d, rounds, device):
    """Build and product of each contender."""
    g = torch.Generator().manual_seed(0)
    G, x = torch.randn(m, d, generator=g).to(device), torch.randn(d, generator=g).to(device)
    found = {}
    for name, make in CONTENDERS.items():
        make(G[:, :1000], DAMPING).solve(x[:1000])
        build, F = min((seconds(lambda make=make: make(G, DAMPING), device) for _ in range(rounds)), key=lambda r: r[0])
        product = median_times({"product": lambda F=F: F.solve(x)}, 5, device)["product"]
        found[name] = {"build": build, "product": product}
        del F
    base = sum(found["recursion"].values())
    for name, row in found.items():
        row["speedup"] = base / sum(row[key] for key in ("build", "product"))
        print(ROW.format(m, d, name, f"{row['build']:.4f}", f"{row['product']:.4f}", f"{row['speedup']:.2f}x"))
    return {"m": m, "d": d, **found}


def accuracy(m, n, correlation, device):
    """Error of float32 solves of random vectors against the dense inverse in float64."""
    g = torch.Generator().manual_seed(0)
    common = torch.randn(n, generator=g, dtype=torch.float64)
    own = torch.randn(m, n, generator=g, dtype=torch.float64)
    G = (correlation**0.5 * common + (1 - correlation) ** 0.5 * own).float().to(device)
    x = torch.randn(8, n, generator=g).to(device)
    F = DAMPING * torch.eye(n, dtype=torch.float64, device=device) + G.double().T @ G.double() / m
    truth = torch.linalg.solve(F, x.double().T).T

    def error(solve):
        rows = torch.stack([solve(v) for v in x]).double()
        return float(((rows - truth).norm(dim=-1) / truth.norm(dim=-1)).max())

    def appended(G, damping):
        window = MFAC.window(m, n, damping, device=device)
        for row in G:
            window.append(row)
        return window

    makers = {**CONTENDERS, "MFAC, appended": appended}
    errors = {name: error(make(G, DAMPING).solve) for name, make in makers.items()}
    for name, value in errors.items():
        print(f"{m:>5} {n:>9}  {name:<28} correlation {correlation:<7} error {value:.1e}")
    return {"m": m, "n": n, "correlation": correlation, "errors": errors}


def dynamic(m, d, rounds, device):
    """An append and a product of a full window, in readings of the m x d block."""
    g = torch.Generator().manual_seed(0)
    block = torch.randn(m, d, generator=g).to(device)
    F = MFAC(block, DAMPING)
    x = torch.randn(d, generator=g).to(device)
    F.append(x)  # the window copies the block here, and row 0 has its float64 pass

    def append():  # with its Cholesky factor
        F.append(x)
        F._cholesky()

    jobs = {"reading once": block.sum, "append and factor": append, "product": lambda: F.solve(x)}
    times = median_times(jobs, rounds, device)
    # once in m appends row 0 is refreshed by a pass in float64
    F._slot = 0
    times["append of row 0 and factor"], _ = seconds(append, device)
    base = times["reading once"]
    for name, value in times.items():
        print(ROW.format(m, d, name, f"{value:.4f}", "", f"{value / base:.2f}"))
    return {"m": m, "d": d, "seconds": times, "readings": {name: value / base for name, value in times.items()}}


def environment(device):
    info, cpu = Path("/proc/cpuinfo"), platform.processor()
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "linalg_mfac.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device, quick = options.device, options.quick
    results = {"environment": {**environment(device), "quick": quick}, "damping": DAMPING}
    print(ROW.format("m", "d", "static", "build, s", "product, s", "speedup"))
    sizes = [(64, 2000), (64, 20_000)] if quick else [(256, 20_000), (256, 200_000), (256, 1_000_000)]
    sizes += [(32, 20_000)] if quick else [(64, 200_000), (128, 200_000), (512, 200_000)]
    results["static"] = [static(m, d, 1 if quick or d > 500_000 else 2, device) for m, d in sizes]
    print("\nerror in float32 against the dense float64 inverse")
    cases = [(64, 500)] if quick else [(256, 1000), (256, 3000), (64, 2000)]
    results["accuracy"] = [accuracy(m, n, rho, device) for m, n in cases for rho in (0.9999, 0.0)]
    print("\nwindow" + ROW.format("m", "d", "", "seconds", "", "readings")[6:])
    windows = [(256, 4000)] if quick else [(1024, 50_000), (1024, 200_000)]
    results["dynamic"] = [dynamic(m, d, 3 if quick else 7, device) for m, d in windows]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
