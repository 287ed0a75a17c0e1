"""Quadratic programs as layers: time and accuracy of both passes, ours and those of the peers.

    python benchmarks/layers.py                  writes benchmarks/results/layers.json
    python benchmarks/layers.py --quick --output layers.json --device cuda

Dense random programs min x'Qx/2 + q'x, A x = b, G x <= h in float64: Q = MM'/n + I/10, A and G Gaussian, n/5 equalities
and n/2 inequalities, b = A x0 and h = G x0 + uniform(0, 1), every item with matrices of its own and q three times
Gaussian, so that some rows are active. Each contender (qpth, ProxQP, cvxpylayers, moreau, where they are installed)
solves the batch and then takes the gradient of sum(v x) in all six tensors; seconds are medians of interleaved
repetitions, on one thread. Errors are the largest, relative to the largest entry, against a reference: the KKT system
of the active rows of a certified solution, for x and for the closed-form gradients, solved by NumPy with refinement in
long double precision. `nestopt compiled` is ours under torch.compile. The second table is a model, Linear -> solve_qp
-> Linear, eager and compiled with the default backend, one training step each; `recompiled` counts the graphs that were
compiled after the two calls that warm up, and must be zero.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

for name, value in (
    ("OMP_WAIT_POLICY", "passive"), ("OMP_NUM_THREADS", "1"), ("MALLOC_MMAP_THRESHOLD_", str(2**32)),
    ("MALLOC_TRIM_THRESHOLD_", str(2**32)),
):  # fmt: skip
    os.environ.setdefault(name, value)

import numpy as np
import torch
import torch._dynamo
from products import environment
from torch import Tensor

from nestopt.constrained import solve_qp

D = torch.float64


def programs(n: int, batch: int, device: str) -> list[Tensor]:
    g = torch.Generator().manual_seed(n + batch)
    p, m = n // 5, n // 2

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=g, dtype=D)

    M, A, G, x = normal(n, n), normal(p, n), normal(m, n), normal(n, 1)
    h = (G @ x)[..., 0] + torch.rand(batch, m, generator=g, dtype=D)
    data = [M @ M.mT / n + 0.1 * torch.eye(n, dtype=D), 3 * normal(n), A, (A @ x)[..., 0], G, h]
    return [t.to(device) for t in data]


def reference(data: list[Tensor], v: Tensor) -> tuple[np.ndarray, list[np.ndarray]]:
    """x, and the gradient of v'x in all data, by the KKT system of the active rows with refinement in long double."""
    z = solve_qp(*data, rtol=1e-12)
    z.unwrap()
    arrays = [t.cpu().numpy() for t in data]
    xs, grads = [], [np.zeros_like(a) for a in arrays]
    for i, (Q, q, A, b, G, h) in enumerate(zip(*arrays, strict=True)):
        active = z.inequality_dual[i].cpu().numpy() > 1e-8
        n, p = len(q), len(b)
        C = np.concatenate([A, G[active]])
        K = np.block([[Q, C.T], [C, np.zeros((len(C), len(C)))]])

        def solve(r: np.ndarray, K: np.ndarray = K) -> np.ndarray:
            wide, K_wide = r.astype(np.longdouble), K.astype(np.longdouble)
            u = np.zeros_like(wide)
            for _ in range(4):
                u = u + np.linalg.solve(K, (wide - K_wide @ u).astype(np.float64))
            return u.astype(np.float64)

        w = solve(np.concatenate([-q, b, h[active]]))
        dw = solve(np.concatenate([v[i].cpu().numpy(), np.zeros(len(C))]))
        x, dx, nu, dnu = w[:n], -dw[:n], w[n : n + p], -dw[n : n + p]
        lam, dlam = np.zeros(len(h)), np.zeros(len(h))
        lam[active], dlam[active] = w[n + p :], -dw[n + p :]
        parts = (
            (np.outer(dx, x) + np.outer(x, dx)) / 2, dx, np.outer(dnu, x) + np.outer(nu, dx), -dnu,
            np.outer(dlam, x) + np.outer(lam, dx), -dlam,
        )  # fmt: skip
        xs.append(x)
        for total, part in zip(grads, parts, strict=True):
            total[i] = part
    return np.stack(xs), grads


class Ours:
    def __init__(self, data: list[Tensor], compiled: bool = False) -> None:
        def layer(*data: Tensor) -> Tensor:
            return solve_qp(*data).x

        self.layer = torch.compile(layer, dynamic=False) if compiled else layer

    def forward(self, leaves: list[Tensor]) -> Tensor:
        return self.layer(*leaves)


class Qpth:
    def __init__(self, data: list[Tensor]) -> None:
        from qpth.qp import QPFunction

        self.layer = QPFunction(verbose=-1, eps=1e-12, check_Q_spd=False, maxIter=30)

    def forward(self, leaves: list[Tensor]) -> Tensor:
        Q, q, A, b, G, h = leaves
        return self.layer(Q, q, G, h, A, b)


class Proxsuite:
    def __init__(self, data: list[Tensor]) -> None:
        from proxsuite.torch.qplayer import QPFunction

        self.layer = QPFunction(structural_feasibility=True, eps=1e-9)
        self.low = torch.full_like(data[5], -1e20)

    def forward(self, leaves: list[Tensor]) -> Tensor:
        Q, q, A, b, G, h = leaves
        return self.layer(Q, q, A, b, G, self.low, h)[0]


class Cvxpylayers:
    def __init__(self, data: list[Tensor]) -> None:
        import cvxpy as cp
        from cvxpylayers.torch import CvxpyLayer

        n, p, m = data[1].shape[-1], data[3].shape[-1], data[5].shape[-1]
        x = cp.Variable(n)
        L, q, A, b, G, h = (cp.Parameter(shape) for shape in ((n, n), n, (p, n), p, (m, n), m))
        objective = cp.Minimize(0.5 * cp.sum_squares(L.T @ x) + q @ x)
        self.layer = CvxpyLayer(cp.Problem(objective, [A @ x == b, G @ x <= h]), [L, q, A, b, G, h], [x])

    def forward(self, leaves: list[Tensor]) -> Tensor:
        Q, *rest = leaves
        return self.layer(torch.linalg.cholesky(Q), *rest)[0]


class MoreauLayer:
    def __init__(self, data: list[Tensor]) -> None:
        import moreau.torch
        from moreau import Cones, Settings

        n, p, m = data[1].shape[-1], data[3].shape[-1], data[5].shape[-1]
        rows = p + m
        settings = Settings(device="cpu", batch_size=len(data[1]), enable_grad=True)
        self.solver = moreau.torch.Solver(
            n=n, m=rows, P_row_offsets=torch.arange(0, n * n + 1, n), P_col_indices=torch.arange(n).repeat(n),
            A_row_offsets=torch.arange(0, rows * n + 1, n), A_col_indices=torch.arange(n).repeat(rows),
            cones=Cones(num_zero_cones=p, num_nonneg_cones=m), settings=settings,
        )  # fmt: skip

    def forward(self, leaves: list[Tensor]) -> Tensor:
        Q, q, A, b, G, h = leaves
        batch = len(q)
        values = torch.cat([A, G], 1).reshape(batch, -1)
        return self.solver.solve(Q.reshape(batch, -1), values, q, torch.cat([b, h], 1)).x


class Model(torch.nn.Module):
    """Linear -> solve_qp -> Linear, the program's matrices shared by the batch."""

    def __init__(self, n: int) -> None:
        super().__init__()
        Q, _, A, b, G, h = (t[0] for t in programs(n, 1, "cpu"))
        for name, t in (("Q", Q), ("A", A), ("b", b), ("G", G), ("h", h)):
            self.register_buffer(name, t)
        self.first, self.last = torch.nn.Linear(n, n, dtype=D), torch.nn.Linear(n, 1, dtype=D)

    def forward(self, inputs: Tensor) -> Tensor:
        z = solve_qp(self.Q, self.first(inputs), self.A, self.b, self.G, self.h)
        return self.last(z.x).square().mean()


def compiled_model(n: int, batch: int, device: str, repetitions: int) -> dict[str, Any]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = Model(n).to(device)
    compiled = torch.compile(eager)
    inputs = 3 * torch.randn(batch, n, dtype=D).to(device)
    leaves = list(eager.parameters())

    def step(model: Any) -> tuple[float, list[Tensor]]:
        synchronize(device)
        start = time.perf_counter()
        grads = torch.autograd.grad(model(inputs), leaves)
        synchronize(device)
        return time.perf_counter() - start, list(grads)

    start = time.perf_counter()
    _, found = step(compiled)
    first = time.perf_counter() - start
    wanted = step(eager)[1]
    step(compiled)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    times = [(step(eager)[0], step(compiled)[0]) for _ in range(repetitions)]
    eager_s, compiled_s = (statistics.median(t) for t in zip(*times, strict=True))
    return {
        "eager_ms": 1e3 * eager_s, "compiled_ms": 1e3 * compiled_s, "first_call_s": first, "graphs": graphs,
        "recompiled": torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs,
        "gradient_error": max(worst(f, w.cpu().numpy()) for f, w in zip(found, wanted, strict=True)),
    }  # fmt: skip


CONTENDERS: dict[str, tuple[Any, str | None]] = {
    "nestopt": (Ours, None),
    "nestopt compiled": (lambda data: Ours(data, compiled=True), None),
    "qpth": (Qpth, "qpth"),
    "ProxQP": (Proxsuite, "proxsuite"),
    "cvxpylayers": (Cvxpylayers, "cvxpylayers"),
    "moreau": (MoreauLayer, "moreau"),
}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def once(layer: Any, data: list[Tensor], v: Tensor, device: str) -> tuple[float, float, Tensor, list[Tensor]]:
    leaves = [t.clone().requires_grad_() for t in data]
    synchronize(device)
    start = time.perf_counter()
    x = layer.forward(leaves)
    synchronize(device)
    middle = time.perf_counter()
    grads = torch.autograd.grad(x, leaves, v, allow_unused=True)
    synchronize(device)
    return middle - start, time.perf_counter() - middle, x.detach(), list(grads)


def worst(found: Any, wanted: np.ndarray) -> float:
    if found is None:
        return float("nan")
    return float(np.abs(found.cpu().numpy() - wanted).max() / max(np.abs(wanted).max(), 1e-300))


def measure(n: int, batch: int, device: str, repetitions: int, skip: set[str]) -> dict[str, Any]:
    data = programs(n, batch, device)
    v = torch.randn(batch, n, generator=torch.Generator().manual_seed(1), dtype=D).to(device)
    x, grads = reference(data, v)
    layers: dict[str, Any] = {}
    rows: dict[str, Any] = {}
    for name, (make, package) in CONTENDERS.items():
        if package is not None and importlib.util.find_spec(package) is None:
            rows[name] = {"skipped": f"{package} is not installed"}
        elif name in skip:
            rows[name] = {"skipped": "left out for its time"}
        else:
            try:
                layers[name] = make(data)
                *_, found, found_grads = once(layers[name], data, v, device)  # warms up as well
            except Exception as error:
                layers.pop(name, None)
                rows[name] = {"skipped": f"{type(error).__name__}: {str(error)[:120]}"}
                continue
            # another solver's dQ may be spread over the two triangles in another way: its symmetric part is compared
            if found_grads[0] is not None:
                found_grads[0] = 0.5 * (found_grads[0] + found_grads[0].mT)
            errors = [worst(f, w) for f, w in zip(found_grads, grads, strict=True)]
            rows[name] = {"x_error": worst(found, x), "gradient_error": max(errors)}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}
    for _ in range(repetitions):
        for name, layer in layers.items():
            times[name].append(once(layer, data, v, device)[:2])
    for name, pairs in times.items():
        rows[name]["forward_ms"], rows[name]["backward_ms"] = (
            1e3 * statistics.median(t) for t in zip(*pairs, strict=True)
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="n = 10 and few repetitions, to see that it runs")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--sizes", type=int, nargs="+", default=None)
    parser.add_argument("--repetitions", type=int, default=None)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "layers.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sizes = options.sizes or ([10] if options.quick else [10, 50, 100])
    cases = []
    print(f"{'n, batch':>10} {'':18} {'forward ms':>11} {'backward ms':>12} {'x error':>9} {'gradient error':>15}")
    for n in sizes:
        for batch in (1, 64):
            repetitions = options.repetitions or (3 if options.quick else 15)
            # cvxpylayers takes minutes for dense 50 x 64
            rows = measure(n, batch, options.device, repetitions, {"cvxpylayers"} if n * batch > 1000 else set())
            cases.append({"n": n, "batch": batch, "equalities": n // 5, "inequalities": n // 2, "layers": rows})
            for name, row in rows.items():
                if "skipped" in row:
                    print(f"{f'{n}, {batch}':>10} {name:18} {row['skipped']}")
                else:
                    print(
                        f"{f'{n}, {batch}':>10} {name:18} {row['forward_ms']:11.2f} {row['backward_ms']:12.2f} "
                        f"{row['x_error']:9.1e} {row['gradient_error']:15.1e}",
                        flush=True,
                    )
    models = []
    print(
        f"{'n, batch':>10} {'eager ms':>11} {'compiled ms':>12} {'graphs':>7} {'recompiled':>11} {'gradient error':>15}"
    )
    for n in sizes:
        row = compiled_model(n, 64, options.device, options.repetitions or (3 if options.quick else 15))
        models.append({"n": n, "batch": 64, **row})
        print(
            f"{f'{n}, 64':>10} {row['eager_ms']:11.2f} {row['compiled_ms']:12.2f} {row['graphs']:7} "
            f"{row['recompiled']:11} {row['gradient_error']:15.1e}",
            flush=True,
        )
    results = {
        "environment": environment(torch.device(options.device)), "quick": options.quick, "cases": cases,
        "models": models,
    }  # fmt: skip
    results["environment"]["clock"] = "wall"
    options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
