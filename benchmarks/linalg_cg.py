"""CG on the same products: ours against curvlinops' and linear_operator's, by the TRUE residual, down to 1e-12.

    python benchmarks/linalg_cg.py                 writes benchmarks/results/linalg_cg.json
    python benchmarks/linalg_cg.py --quick --output linalg_cg.json

Every solver gets the same counted function v -> A v, the same right-hand side, the same relative tolerance and the same
limit of products, and returns x. Judged is |b - A x| / |b| with the float64 matrix; `met` says whether that is within
the tolerance asked, and the status is what the solver itself says, where it says something. Systems: spectra with
condition numbers 1e2 to 1e6, one scaled by 1e-8, one with outliers, one negative definite (which has to be refused, not
answered), and the damped Gauss-Newton matrix of a network. Peers are compared where they are installed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from products import environment
from torch import Tensor, nn
from torch.func import functional_call

from nestopt.linalg import CG, FunctionOperator, GaussNewton

DOUBLE = torch.float64
TOLERANCES = [1e-4, 1e-8, 1e-12]


def spectral(values: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=DOUBLE))
    matrix = (Q * values) @ Q.T
    return (matrix + matrix.T) / 2


def network() -> Tensor:
    """Gauss-Newton matrix of a small network plus 1e-3."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 5)).double()
    x, y = torch.randn(64, 10, dtype=DOUBLE), torch.arange(64) % 5
    G = GaussNewton(lambda p: functional_call(net, p, (x,)), lambda z: F.cross_entropy(z, y), net)
    return G.shift(1e-3).to_dense()


def systems(n: int) -> dict[str, Tensor]:
    outliers = torch.cat([torch.ones(n - 10, dtype=DOUBLE), torch.logspace(2, 4, 10, dtype=DOUBLE)])
    return {
        "condition 1e2": spectral(torch.logspace(0, 2, n, dtype=DOUBLE)),
        "condition 1e4": spectral(torch.logspace(0, 4, n, dtype=DOUBLE)),
        "condition 1e6": spectral(torch.logspace(0, 6, n, dtype=DOUBLE)),
        "1e-8 times condition 1e2": 1e-8 * spectral(torch.logspace(0, 2, n, dtype=DOUBLE)),
        "10 outliers": spectral(outliers),
        "negative definite": -spectral(torch.logspace(0, 2, n, dtype=DOUBLE)),
        "network, damped": network(),
    }


class Product:
    """v -> A v for vectors in rows or columns, counted a vector."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.count = matrix, 0

    def rows(self, v: Tensor) -> Tensor:
        self.count += v.numel() // v.shape[-1]
        return v @ self.matrix

    def columns(self, v: Tensor) -> Tensor:
        self.count += 1 if v.ndim == 1 else v.shape[-1]
        return self.matrix @ v


def ours(product: Product, b: Tensor, rtol: float, limit: int) -> tuple[Tensor, str]:
    n = len(b)
    A = FunctionOperator(product.rows, (n, n), DOUBLE, symmetric=True)
    solution = CG(rtol=rtol, max_iter=limit)(A, b)
    return solution.x, solution.status.name


def by_linear_operator(product: Product, b: Tensor, rtol: float, limit: int) -> tuple[Tensor, str]:
    from linear_operator import settings
    from linear_operator.utils.linear_cg import linear_cg

    with settings.cg_tolerance(rtol), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x = linear_cg(product.columns, b[:, None], tolerance=rtol, max_iter=limit, max_tridiag_iter=0)
    return x[:, 0], "warned" if caught else "-"


def by_curvlinops(product: Product, b: Tensor, rtol: float, limit: int) -> tuple[Tensor, str]:
    from curvlinops import CGInverseLinearOperator
    from curvlinops._torch_base import PyTorchLinearOperator

    class Counted(PyTorchLinearOperator):
        SELF_ADJOINT = True

        @property
        def dtype(self) -> torch.dtype:
            return DOUBLE

        @property
        def device(self) -> torch.device:
            return b.device

        def _matmat(self, M: list[Tensor]) -> list[Tensor]:
            return [product.columns(M[0])]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        A = Counted([(len(b),)], [(len(b),)])
        inverse = CGInverseLinearOperator(A, tolerance=rtol, max_iter=limit, max_tridiag_iter=0)
        x = inverse @ b
    return x, "warned" if caught else "-"


SOLVERS: dict[str, tuple[Callable[..., tuple[Tensor, str]], str | None, str]] = {
    "nestopt CG": (ours, None, ""),
    "linear_operator linear_cg": (by_linear_operator, "linear_operator", "linear_operator"),
    "curvlinops CGInverse": (by_curvlinops, "curvlinops", "curvlinops-for-pytorch"),
}


def judge(solver: Callable[..., tuple[Tensor, str]], matrix: Tensor, rtol: float, limit: int) -> dict[str, Any]:
    b = torch.randn(len(matrix), generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    product, begun = Product(matrix), time.perf_counter()
    try:
        x, status = solver(product, b, rtol, limit)
    except Exception as error:  # a peer that fails is a row of the table, never a reason to stop
        if solver is ours:
            raise
        return {"status": f"failed: {type(error).__name__}: {str(error)[:80]}"}
    residual = float((b - matrix @ x).norm() / b.norm())
    return {
        "residual": residual,
        "met": residual <= rtol,
        "products": product.count,
        "status": status,
        "seconds": time.perf_counter() - begun,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="small systems, to see that it runs")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "linalg_cg.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    if device.type != "cpu":
        parser.error("the judgement is one of float64 arithmetic, which a GPU does not change: use --device cpu")
    n, limit = (60, 600) if options.quick else (500, 20_000)
    present = {
        name: importlib.util.find_spec(need) is not None if need else True for name, (_, need, _) in SOLVERS.items()
    }
    rows: list[dict[str, Any]] = []
    for system, matrix in systems(n).items():
        for rtol in TOLERANCES:
            for name, (solver, _, _) in SOLVERS.items():
                if present[name]:
                    rows.append({"system": system, "rtol": rtol, "solver": name, **judge(solver, matrix, rtol, limit)})
    print(f"{'system':26}{'asked':>8}  {'solver':28}{'residual':>10}{'products':>10}  met    status")
    for row in rows:
        if "residual" not in row:
            print(f"{row['system']:26}{row['rtol']:8.0e}  {row['solver']:28}{row['status']}")
            continue
        print(
            f"{row['system']:26}{row['rtol']:8.0e}  {row['solver']:28}{row['residual']:10.1e}{row['products']:10d}  "
            f"{'yes' if row['met'] else 'NO':6} {row['status']}"
        )
    versions = {}
    for name, (_, need, distribution) in SOLVERS.items():
        solved = [row for row in rows if row["solver"] == name and row["system"] != "negative definite"]
        if not present[name]:
            print(f"{name}: not installed")
        else:
            print(f"{name}: {sum(row.get('met', False) for row in solved)} of {len(solved)} tolerances met")
        if need and present[name]:
            versions[name] = importlib.metadata.version(distribution)
    results = {
        "environment": environment(device), "n": n, "limit": limit, "rows": rows, "versions": versions,
        "not_installed": [name for name, there in present.items() if not there],
    }  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
