"""What every minimiser spends to |grad| <= 1e-6 on four lower levels: gradients, Hessian products, seconds.

Problems: softmax regression on digits with an l2 penalty (650 variables), the least squares of a small network that can
fit its data, a quadratic of condition number 1e4 with outliers, and the chained Rosenbrock function of 50 variables
(from zero). Work is gradients + products, each about the price of one gradient, which counts for more than the seconds
on these small problems; seconds are also given as multiples of NewtonCG's. A contender that does not get there is told
with the status and the |grad| that it reached.

Run: python benchmarks/linalg_lower_solvers.py [--quick] [--output FILE.json] [--device cuda]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

import sklearn.datasets
import torch
from torch.nn.functional import cross_entropy

from nestopt.implicit import (
    FOSI,
    LBFGS,
    GradientDescent,
    LazyNewton,
    LevenbergMarquardt,
    NewtonCG,
    RegularizedNewton,
    Sophia,
    mark_outputs,
)

TOLERANCE = 1e-6
DOUBLE = torch.float64


def digits(quick, device):
    X, t = sklearn.datasets.load_digits(return_X_y=True)
    points = 150 if quick else len(t)
    X, t = torch.tensor(X[:points] / 16, dtype=DOUBLE, device=device), torch.tensor(t[:points], device=device)

    def f(y):
        penalty = 1e-3 * ((y["W"] ** 2).sum() + (y["b"] ** 2).sum())
        return cross_entropy(mark_outputs(X @ y["W"] + y["b"]), t) + penalty

    return f, {"W": X.new_zeros(64, 10), "b": X.new_zeros(10)}


def network(quick, device):
    g = torch.Generator().manual_seed(0)
    points, hidden = (20, 10) if quick else (60, 40)
    X = torch.randn(points, 5, generator=g, dtype=DOUBLE).to(device)
    t = X.sum(1).sin()
    y0 = {"a": torch.randn(5, hidden, generator=g, dtype=DOUBLE), "b": torch.randn(hidden, generator=g, dtype=DOUBLE)}
    y0["c"] = torch.zeros(hidden, dtype=DOUBLE)
    y0 = {k: (v / 2).to(device) for k, v in y0.items()}
    return lambda y: (mark_outputs(torch.tanh(X @ y["a"] + y["c"]) @ y["b"] - t) ** 2).mean(), y0


def quadratic(quick, device):
    n = 60 if quick else 500
    g = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=DOUBLE))
    values = torch.cat([torch.logspace(-2, 0, n - 10, dtype=DOUBLE), torch.linspace(10, 100, 10, dtype=DOUBLE)])
    root, b = (values.sqrt()[:, None] * Q.T).to(device), torch.randn(n, generator=g, dtype=DOUBLE).to(device)
    return lambda y: (mark_outputs(root @ y) ** 2).sum() / 2 - b @ y, torch.zeros(n, dtype=DOUBLE, device=device)


def rosenbrock(quick, device):
    n = 10 if quick else 50

    def f(y):
        return (mark_outputs(torch.cat([10 * (y[1:] - y[:-1] ** 2), 1 - y[:-1]])) ** 2).sum()

    return f, torch.zeros(n, dtype=DOUBLE, device=device)


PROBLEMS = {"digits": digits, "network": network, "quadratic": quadratic, "rosenbrock": rosenbrock}


def contenders(limit):
    return {
        "GradientDescent()": GradientDescent(max_iter=limit),
        "LBFGS()": LBFGS(max_iter=limit),
        "NewtonCG()": NewtonCG(),
        "RegularizedNewton()": RegularizedNewton(),
        "RegularizedNewton(dense_below=0)": RegularizedNewton(dense_below=0),
        "LazyNewton()": LazyNewton(),
        "LevenbergMarquardt()": LevenbergMarquardt(chunk_size=32),
        "FOSI(rank=10)": FOSI(rank=10, max_iter=limit),
        "Sophia(momentum=0.8)": Sophia(momentum=0.8, max_iter=limit),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small problems, to see that it runs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "linalg_lower_solvers.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    limit = 500 if options.quick else 5000
    rows: dict[str, dict[str, dict[str, object]]] = {}
    for name, make in PROBLEMS.items():
        f, y0 = make(options.quick, options.device)
        rows[name] = {contender: measure(solver, f, y0) for contender, solver in contenders(limit).items()}
        base = rows[name]["NewtonCG()"]["seconds"]
        for row in rows[name].values():
            row["ratio"] = row["seconds"] / base
        print_table(name, rows[name])
    environment = {
        "torch": torch.__version__, "python": platform.python_version(), "threads": 1, "load": os.getloadavg()[0],
        "device": "cpu" if options.device == "cpu" else torch.cuda.get_device_name(),
        "processor": platform.processor(), "date": time.strftime("%Y-%m-%d"), "quick": options.quick,
    }  # fmt: skip
    result = {"environment": environment, "tolerance": TOLERANCE, "rows": rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")


def measure(solver, f, y0):
    """One run, after a single step that warms up."""
    solver.step(f, solver.init(f, y0, TOLERANCE))
    begun = time.perf_counter()
    res = solver(f, y0, TOLERANCE)
    return {
        "seconds": time.perf_counter() - begun, "status": res.status.name, "steps": res.iterations,
        "gradients": res.gradients, "values": res.evaluations, "products": res.products, "error": res.error,
        "value": res.value,
    }  # fmt: skip


def print_table(name, rows):
    print(f"\n{name:<34} {'steps':>6} {'gradients':>9} {'products':>9} {'work':>7} {'ratio':>7} {'|grad|':>8}")
    for contender, row in rows.items():
        work = row["gradients"] + row["products"]
        end = "" if row["status"] == "CONVERGED" else f"  {row['status']}"
        print(
            f"{contender:<34} {row['steps']:>6} {row['gradients']:>9} {row['products']:>9} {work:>7} "
            f"{row['ratio']:>7.2f} {row['error']:>8.1e}{end}"
        )


if __name__ == "__main__":
    main()
