"""Sequences of slowly changing systems: products a solve, all counted, with and without what the last solves knew.

Ten systems of n = 1000, to 1e-6, in which eigenvectors, eigenvalues and right-hand sides change a little from one to
the next: 30 outliers at a condition number of 1e4; a spectrum without a gap; systems that have nothing in common. Then
the adjoint systems that AID meets while it learns the penalties of a logistic regression (scikit-learn's
breast_cancer), recorded once and given to every contender.

Run: python benchmarks/linalg_recycling.py [--quick] [--output FILE.json] [--device cuda]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from nestopt import bilevel
from nestopt.linalg import CG, Dense, LinearSolver, Nystrom, Recycled, Stopping

RTOL, RANK, SYSTEMS = 1e-6, 30, 10
System = tuple[Tensor, Tensor]


def drifting(kind: str, n: int, drift: float, device: str) -> Iterator[System]:
    """Symmetric positive definite systems whose eigenvectors turn by `drift` from one to the next."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    outliers = 30 * n // 1000
    values = (
        torch.logspace(0, 3, n, dtype=torch.float64)
        if kind == "no gap"
        else torch.cat([torch.logspace(0, 1.5, n - outliers), torch.logspace(2, 4, outliers)]).double()
    )
    Q, b = torch.linalg.qr(normal(n, n))[0], normal(n)
    for _ in range(SYSTEMS):
        matrix = (Q * values) @ Q.T
        yield ((matrix + matrix.T) / 2).to(device), b.to(device)
        turn = normal(n, n)
        if kind == "unrelated":
            Q, b = torch.linalg.qr(turn)[0], normal(n)
            continue
        Q = torch.linalg.qr(Q + Q @ (turn - turn.T) * (drift / math.sqrt(2 * n)))[0]
        values, b = values * (1 + drift * normal(n)), b + drift * normal(n)


@dataclass(frozen=True)
class Recording(LinearSolver):
    """CG that keeps a copy of every system."""

    systems: list[System] = field(default_factory=list)

    def _solve(self, A: Any, b: Tensor, x0: Tensor | None) -> Any:
        matrix = A.to_dense()
        self.systems.append(((matrix + matrix.T) / 2, b.clone()))
        return CG(rtol=1e-8)(A, b, x0)


def from_an_outer_loop(quick: bool, device: str) -> list[System]:
    """The adjoint systems of AID on a penalty for each feature of a logistic regression with 150 random features."""
    X, t = load_breast_cancer(return_X_y=True)
    X = torch.as_tensor((X - X.mean(0)) / X.std(0), device=device)
    g = torch.Generator().manual_seed(0)
    lift = torch.randn(30, 40 if quick else 150, generator=g, dtype=torch.float64).to(device)
    X, t = torch.tanh(X @ lift / 5), torch.as_tensor(t, dtype=torch.float64, device=device)
    train, held = slice(0, 284), slice(284, None)

    def upper(x: Tensor, y: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(X[held] @ y, t[held])

    def lower(x: Tensor, y: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(X[train] @ y, t[train]) + (torch.exp(x) * y**2).sum() / 2

    recording, size = Recording(), lift.shape[1]
    method = bilevel.AID(linear_solver=recording, stopping=Stopping(1e-3, max_iter=3 if quick else 12))
    start = torch.full((size,), -6.0, dtype=torch.float64, device=device)
    bilevel.solve(bilevel.Problem(upper, lower), start, torch.zeros_like(start), method)
    return recording.systems


Solve = Callable[[Dense, Tensor], Any]


def contenders(n: int, rank: int) -> dict[str, Solve]:
    """One solver for each way, new for each sequence."""
    cg = CG(rtol=RTOL, max_iter=100 * n)
    warm, recycled = Recycled(cg, rank=0), Recycled(cg, rank=rank)
    return {
        "cold CG": cg,
        "warm-started CG": warm,
        "warm-started CG, stale Nystrom": stale_nystrom(cg, rank),
        "Recycled": recycled,
    }


def stale_nystrom(cg: CG, rank: int) -> Solve:
    """Warm-started CG with a Nystrom preconditioner of the first system, its products counted there."""
    solver: list[Recycled] = []

    def solve(A: Dense, b: Tensor) -> Any:
        if solver:
            return solver[0](A, b)
        shift = float(torch.linalg.eigvalsh(A.matrix)[0])  # given for free: Nystrom has to know it
        M = Nystrom(A, min(rank + 10, A.shape[-1]), shift=shift)
        solver.append(Recycled(CG(rtol=cg.rtol, max_iter=cg.max_iter, preconditioner=M), rank=0))
        first = solver[0](A, b)
        object.__setattr__(first, "products", first.products + M.products)
        return first

    return solve


def measure(systems: list[System], solve: Solve) -> dict[str, Any]:
    """The products of every solve; a residual that is not what was asked for ends the benchmark."""
    products, begun = [], time.perf_counter()
    for matrix, b in systems:
        solution = solve(Dense(matrix, symmetric=True, definite=True), b)
        residual = float((b - matrix @ solution.x).norm() / b.norm())
        if not solution.converged or residual > RTOL * (1 + 1e-6):
            raise RuntimeError(f"{solution.status}: relative residual {residual:.1e}")
        products.append(solution.products)
    later = sum(products[1:]) / max(1, len(products) - 1)
    return {"first": products[0], "later": later, "sum": sum(products), "products": products,
            "seconds": time.perf_counter() - begun}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "linalg_recycling.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    n, rank = (100, 3) if options.quick else (1000, RANK)
    kinds = [("outliers", 0.005), ("outliers", 0.02), ("no gap", 0.005), ("no gap", 0.02), ("unrelated", 1.0)]
    sequences = {f"{kind}, drift {drift}": list(drifting(kind, n, drift, options.device)) for kind, drift in kinds}
    sequences["AID, logistic regression"] = from_an_outer_loop(options.quick, options.device)
    rows: dict[str, dict[str, Any]] = {}
    print(f"products a solve, rtol {RTOL:.0e}, rank {rank}; `later` is the mean after the first")
    print(f"{'sequence':<28} {'solver':<32} {'first':>6} {'later':>8} {'sum':>7} {'of warm':>8}")
    for name, systems in sequences.items():
        rows[name] = {}
        for solver, solve in contenders(systems[0][0].shape[-1], rank).items():
            rows[name][solver] = measure(systems, solve)
        base = rows[name]["warm-started CG"]["sum"]
        for solver, row in rows[name].items():
            row["of_warm"] = row["sum"] / base
            figures = f"{row['first']:>6} {row['later']:>8.1f} {row['sum']:>7} {row['of_warm']:>8.2f}"
            print(f"{name:<28} {solver:<32} {figures}", flush=True)
    environment = {
        "torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine(), "threads": 1,
        "device": options.device, "load": os.getloadavg()[0], "date": time.strftime("%Y-%m-%d"),
        "quick": options.quick, "n": n, "rank": rank, "rtol": RTOL,
    }  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
