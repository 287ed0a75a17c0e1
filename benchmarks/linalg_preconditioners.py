"""Equal products: CG, preconditioned CG, the Nystrom inverse and Neumann's series on five spectra.

Each contender solves (A + damping I) x = b, n = 1000, for the same b with at most the same number of products with A,
building its preconditioner included: half of them for Nystrom's sketch, half for Lanczos', a quarter for Jacobi's
diagonal. Two lines built theirs before, for an earlier right-hand side, and pay for the solve alone. Neumann has the
best safe step, 1 / lambda_max, for nothing. What counts is the true residual after so many products; the table also
says what `compare_preconditioners` finds for a solve to 1e-8.

Run: python benchmarks/linalg_preconditioners.py [--quick] [--output FILE.json] [--device cuda]
The figure preconditioners.png, beside the JSON, needs matplotlib; without it there is none, and the script says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import time
from pathlib import Path

import torch

from nestopt.linalg import CG, Deflation, FunctionOperator, Jacobi, Neumann, Nystrom, compare_preconditioners

DAMPING = 1e-4
KEPT = 40  # rank of the preconditioners that were built before


def spectra(n):
    """Eigenvalues in (0, 1], descending."""
    bulk = torch.linspace(1, 0.1, n, dtype=torch.float64)
    return {
        "flat": bulk,
        "geometric, 1e4": torch.logspace(0, -4, n, dtype=torch.float64),
        "30 outliers": torch.cat([torch.logspace(0, -1, 30, dtype=torch.float64), 1e-3 * bulk[: n - 30]]),
        "step": torch.cat([bulk[: n // 10], 1e-3 * bulk[: n - n // 10]]),
        "power law": torch.arange(1, n + 1, dtype=torch.float64) ** (-4 / 3),
    }


class System:
    """A counted operator with these eigenvalues and random eigenvectors, its right-hand side and its truth."""

    def __init__(self, values, device, seed=0):
        g = torch.Generator().manual_seed(seed)
        n = values.numel()
        Q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q
        matrix = ((Q * values) @ Q.T).to(device)
        self.matrix = (matrix + matrix.T) / 2
        self.b = torch.randn(n, generator=g, dtype=torch.float64).to(device)
        self.products, self.largest = 0, float(values[0])
        self.A = FunctionOperator(self._product, (n, n), torch.float64, device, symmetric=True, definite=True)
        self.damped = self.A.shift(DAMPING)
        self.kept = {}

    def _product(self, v):
        self.products += v[..., 0].numel()
        return v @ self.matrix

    def residual(self, x):
        r = self.b - x @ self.matrix - DAMPING * x
        return float(r.norm() / self.b.norm())


def cg(system, budget, preconditioner=None):
    """What is left of the budget, one product being the verification."""
    left = budget - system.products - 1
    return CG(rtol=0.0, max_iter=left, preconditioner=preconditioner, replace_every=10**6)(system.damped, system.b).x


def plain(system, budget):
    return cg(system, budget)


def nystrom(system, budget):
    return cg(system, budget, Nystrom(system.A, budget // 2, shift=DAMPING, error_steps=0))


def deflation(system, budget):
    return cg(system, budget, Deflation(system.A, budget // 4, shift=DAMPING, steps=budget // 2))


def jacobi(system, budget):
    return cg(system, budget, Jacobi(system.A, products=max(budget // 4, 4), shift=DAMPING, floor=1e-3))


def kept_nystrom(system, budget):
    return cg(system, budget, system.kept["Nystrom"])


def kept_deflation(system, budget):
    return cg(system, budget, system.kept["deflation"])


def nystrom_inverse(system, budget):
    return Nystrom(system.A, budget, shift=DAMPING, error_steps=0).inverse() @ system.b


def neumann(system, budget):
    step = 1 / (system.largest + DAMPING)
    return Neumann(terms=budget - 1, step_size=step, rtol=0.0, lanczos_steps=0)(system.damped, system.b).x


CONTENDERS = {
    "CG": plain,
    "CG + Nystrom": nystrom,
    "CG + deflation": deflation,
    "CG + Jacobi": jacobi,
    f"CG + Nystrom({KEPT}), built before": kept_nystrom,
    f"CG + deflation({KEPT}), built before": kept_deflation,
    "Nystrom inverse": nystrom_inverse,
    "Neumann": neumann,
}


def measure(system, budgets):
    """Residual and products of every contender at every budget, and the report of a solve to 1e-8."""
    rank = min(KEPT, system.A.shape[-1] // 4)
    system.kept = {
        "Nystrom": Nystrom(system.A, rank, shift=DAMPING),
        "deflation": Deflation(system.A, rank, shift=DAMPING, steps=2 * rank),
    }
    rows = {}
    for name, contender in CONTENDERS.items():
        rows[name] = []
        for budget in budgets:
            system.products = 0
            x = contender(system, budget)
            if system.products > budget:
                raise RuntimeError(f"{name} spent {system.products} products of {budget}")
            rows[name].append({"budget": budget, "products": system.products, "residual": system.residual(x)})
    kinds = {f"{name}({rank})": M for name, M in system.kept.items()}
    kinds["Jacobi"] = Jacobi(system.A, products=20, shift=DAMPING, floor=1e-3)
    return rows, compare_preconditioners(system.damped, system.b, kinds, solver=CG(rtol=1e-8, max_iter=5000))


def draw(results, path):
    """One panel a spectrum: residual against products."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(3.2 * len(results), 3.6), sharey=True, layout="constrained")
    styles = ["k-o", "C0-s", "C1-^", "C2-v", "C0--", "C1--", "C3-x", "C4-+"]
    for axis, (spectrum, result) in zip(axes, results.items(), strict=True):
        for style, (name, points) in zip(styles, result["rows"].items(), strict=True):
            products, residuals = zip(*((p["budget"], max(p["residual"], 1e-14)) for p in points), strict=True)
            axis.semilogy(products, residuals, style, label=name, markersize=4, linewidth=1.2)
        axis.set_title(spectrum)
        axis.set_xlabel("products with A")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("|b - (A + damping I) x| / |b|")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "linalg_preconditioners.json"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    n, budgets = (200, (16, 40, 80)) if options.quick else (1000, (20, 40, 80, 120, 160, 240, 320))
    results = {}
    for spectrum, values in spectra(n).items():
        rows, report = measure(System(values, options.device), budgets)
        results[spectrum] = {
            "rows": rows,
            "report": {
                row.name: {
                    "steps": row.iterations, "products": row.products, "building": row.building,
                    "condition": row.condition, "verdict": row.verdict,
                }
                for row in report.rows
            },
        }  # fmt: skip
        print(f"\n{spectrum}: relative residual after so many products, building included")
        print(f"{'contender':<36}" + "".join(f"{budget:>10}" for budget in budgets))
        for name, points in rows.items():
            print(f"{name:<36}" + "".join(f"{point['residual']:>10.1e}" for point in points))
        print(report)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    environment = {
        "torch": torch.__version__, "python": platform.python_version(), "threads": 1, "device": options.device,
        "load": os.getloadavg()[0], "date": time.strftime("%Y-%m-%d"), "quick": options.quick, "n": n,
        "damping": DAMPING,
    }  # fmt: skip
    options.output.write_text(json.dumps({"environment": environment, "spectra": results}, indent=1) + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no figure")
    else:
        draw(results, options.output.parent / "preconditioners.png")


if __name__ == "__main__":
    main()
