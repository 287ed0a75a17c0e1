"""Traces, diagonals, log-determinants and extreme eigenpairs: errors and products, against theory and against SciPy.

1. The error of trace and diagonal estimators at equal numbers of products, for four spectra; beside each error what
   the estimator itself claimed (root mean squares over the runs).
2. Log-determinants by stochastic Lanczos quadrature, with both errors that they claim.
3. Products until the ten highest eigenpairs are within 1e-8 |A|: thick-restart Lanczos, SciPy's eigsh (ARPACK) and
   lobpcg, the residuals of all measured alike.

Run: python benchmarks/linalg_spectrum.py [--quick] [--output FILE.json] [--device cuda]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

import numpy as np
import scipy
import scipy.sparse.linalg
import torch

from nestopt import linalg

DOUBLE = torch.float64


def spectra(n):
    i = torch.arange(n, dtype=DOUBLE)
    return {
        "flat": 1 + 2 * i / n,
        "polynomial": (1 + i) ** -2,
        "geometric": 0.9**i,
        "outliers": torch.where(i < 20, 100 - 4 * i, 1e-2 * (1 + i / n)),
    }


def matrix(values, device):
    g = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=g, dtype=DOUBLE))
    A = (Q * values) @ Q.T
    return ((A + A.T) / 2).to(device)


def estimators(n, runs, device):
    """Relative root mean square errors, true and claimed, of `runs` independent estimates in one batch."""
    rows = {}
    print(f"{'errors of estimates, n = ' + str(n):<34} {'products':>8} " + f"{'true':>9} {'claimed':>9}")
    for name, values in spectra(n).items():
        M = matrix(values, device)
        A = linalg.Dense(M.expand(runs, n, n), symmetric=True)
        for method in ("hutchinson_trace", "hutchpp_trace", "xtrace", "hutchinson_diagonal", "xdiag"):
            truth = M.diagonal() if "diag" in method else M.trace()
            for products in (12, 48):
                run = getattr(linalg, method)(A, products)
                true, claimed = (
                    float(e.square().mean().sqrt() / truth.square().mean().sqrt())
                    for e in (run.value - truth, run.standard_error)
                )
                rows[f"{name}, {method}, {products}"] = {"error": true, "claimed": claimed}
                print(f"{name + ', ' + method:<34} {products:>8} {true:>9.1e} {claimed:>9.1e}")
    return rows


def determinants(n, device):
    rows = {}
    print(f"\n{'log-determinant, 10 probes':<34} {'products':>8} {'error':>9} {'probes':>9} {'quadrature':>10}")
    for name, values in spectra(n).items():
        values = values + 1e-3
        A = linalg.Dense(matrix(values, device), symmetric=True, definite=True)
        for steps in (10, 40):
            run = linalg.log_determinant(A, probes=10, steps=steps)
            error = abs(run.value - float(values.log().sum()))
            claims = {"standard_error": run.standard_error, "quadrature_error": run.quadrature_error}
            rows[f"{name}, {steps}"] = {"error": error, "products": run.products, **claims}
            row = f"{run.products:>8} {error:>9.1e} {run.standard_error:>9.1e} {run.quadrature_error:>10.1e}"
            print(f"{name + f', {steps} steps':<34} {row}")
    return rows


def counted(M):
    """M for SciPy, and the count of its products."""
    count = [0]

    def product(v):
        count[0] += 1 if v.ndim == 1 else v.shape[1]
        return M @ v

    n = len(M)
    return scipy.sparse.linalg.LinearOperator((n, n), matvec=product, matmat=product, dtype=np.float64), count


def pairs(n, k, device):
    rows = {}
    print(f"\n{f'{k} highest pairs to 1e-8 |A|, n = {n}':<34} {'products':>8} {'residual':>9} {'seconds':>9}")
    for name, values in spectra(n).items():
        M = matrix(values, device)
        host, top = M.cpu().numpy(), float(values.max())
        for method in ("extreme_pairs", "eigsh", "lobpcg"):
            begun = time.perf_counter()
            if method == "extreme_pairs":
                r = linalg.extreme_pairs(linalg.Dense(M, symmetric=True), k)
                found, vectors, products = r.values.cpu().numpy(), r.vectors.cpu().numpy().T, r.products
            else:
                A, count = counted(host)
                start = np.random.default_rng(0).standard_normal((n, k))
                if method == "eigsh":  # its tolerance is relative to each eigenvalue
                    found, vectors = scipy.sparse.linalg.eigsh(
                        A, k, which="LA", tol=1e-8, v0=start[:, 0], ncv=2 * k + 30
                    )
                else:
                    found, vectors = scipy.sparse.linalg.lobpcg(A, start, tol=1e-8 * top, maxiter=200)[:2]
                products = count[0]
            seconds = time.perf_counter() - begun
            residual = float(np.linalg.norm(host @ vectors - vectors * found, axis=0).max()) / top
            rows[f"{name}, {method}"] = {"products": products, "residual": residual, "seconds": seconds}
            print(f"{name + ', ' + method:<34} {products:>8} {residual:>9.1e} {seconds:>9.3f}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "linalg_spectrum.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    n = 200 if options.quick else 1000
    rows = {
        "estimators": estimators(min(n, 300), 20 if options.quick else 100, options.device),
        "log_determinants": determinants(n, options.device),
        "pairs": pairs(n, 10, options.device),
    }
    environment = {
        "torch": torch.__version__, "scipy": scipy.__version__, "python": platform.python_version(),
        "processor": processor(), "threads": 1, "load": os.getloadavg()[0], "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if options.device != "cpu" else "cpu", "quick": options.quick, "n": n,
    }  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
