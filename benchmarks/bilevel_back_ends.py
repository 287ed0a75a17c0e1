"""Every back end of the adjoint system H v = F_y: products and error; then batches of problems against loops.

First table: the hypergradient at the exact lower solution, without tuning, products with H that were spent, the
measured residual |F_y - H v|, and the error of v and of the hypergradient against a factorisation. The cheap
back ends (one step, Fisher, Nystrom, 20 terms) are biased by what the error says. The problems are those of
tests/problems.py, and a logistic regression whose samples M-FAC takes.

Second table: K folds and B seeds in one run against a loop over them: calls of the objectives (each with the whole
batch in the one, with one item in the other) and seconds.

Run: python benchmarks/bilevel_back_ends.py [--quick] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from products import environment
from torch import Tensor

from nestopt import bilevel, linalg
from nestopt.linalg import CG, LinearSolver
from nestopt.linalg.tree import Ravel

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from problems import kernel_ridge, quadratic

DOUBLE = torch.float64
ROW = "{:<34} {:<26} {:>9} {:>10} {:>10} {:>10}  {}"
RUN = "{:<44} {:>8} {:>10} {:>9} {:>9} {:>8}"


def vector(tree: Any) -> Tensor:
    return Ravel.of(tree, "tree").flatten(tree).detach()


def classifier(points: int, p: int) -> tuple[bilevel.Problem, Tensor, Tensor, Callable[..., Tensor]]:
    """A logistic regression with one log penalty a feature, its lower solution and its samples."""
    g = torch.Generator().manual_seed(0)
    X, V = torch.randn(2, points, p, generator=g, dtype=DOUBLE) * torch.logspace(0, 1, p, dtype=DOUBLE)
    w = torch.randn(p, generator=g, dtype=DOUBLE) / p**0.5
    t, v = (X @ w > 0).double(), (V @ w > 0).double()
    loss = torch.nn.functional.binary_cross_entropy_with_logits

    def samples(x: Tensor, y: Tensor) -> Tensor:
        return loss(X @ y, t, reduction="none")

    def lower(x: Tensor, y: Tensor) -> Tensor:
        return samples(x, y).mean() + (x.exp() * y**2).sum() / 2

    x = torch.full((p,), -4.0, dtype=DOUBLE)
    problem = bilevel.Problem(lambda x, y: loss(V @ y, v), lower)
    y = torch.zeros(p, dtype=DOUBLE)
    for _ in range(50):  # Newton, to the rounding level
        y.requires_grad_()
        (slope,) = torch.autograd.grad(lower(x, y), y)
        H = torch.autograd.functional.hessian(lambda z: lower(x, z), y.detach())
        y = (y - torch.linalg.solve(H, slope)).detach()
    return problem, x, y, samples


def back_ends(samples: Callable[..., Tensor] | None) -> dict[str, LinearSolver]:
    """By name, with what each is: exact, or biased."""
    found: dict[str, LinearSolver] = {
        "CG": CG(), "MINRES": linalg.MINRES(), "MINRES-QLP": linalg.MINRESQLP(), "GMRES": linalg.GMRES(),
        "BiCGStab": linalg.BiCGStab(), "LSMR": linalg.LSMR(), "Normal(CG)": linalg.Normal(),
        "Cholesky": linalg.Cholesky(), "LDL": linalg.LDL(), "LU": linalg.LU(), "Auto": linalg.Auto(),
        "Recycled(CG)": linalg.Recycled(CG()), "NystromCG": linalg.NystromCG(), "Neumann": linalg.Neumann(),
        "Neumann, 20 terms": linalg.Neumann(20), "Nystrom, rank 20": linalg.NystromInverse(),
        "one step": linalg.SingleStep(),
    }  # fmt: skip
    if samples is not None:
        found["M-FAC"] = bilevel.MFACInverse(samples)
        found["M-FAC, CG"] = bilevel.MFACInverse(samples, solver=CG())
    return found


def compare(name: str, problem: bilevel.Problem, x: Any, y: Any, samples: Any) -> list[dict[str, Any]]:
    """One row a back end."""
    exact = bilevel.hypergradient(problem, x, y, linalg.Cholesky(), certificate=False)
    rows = []
    for back_end, solver in back_ends(samples).items():
        hg = bilevel.hypergradient(problem, x, y, solver, certificate=False)
        v, gradient = vector(exact.adjoint), vector(exact.value)
        rows.append({
            "problem": name, "back end": back_end, "products": hg.products, "status": str(hg.status.name),
            "residual": hg.linear_residual, "adjoint error": float((vector(hg.adjoint) - v).norm() / v.norm()),
            "error": float((vector(hg.value) - gradient).norm() / gradient.norm()),
        })  # fmt: skip
        row = rows[-1]
        print(ROW.format(
            name, back_end, row["products"], f"{row['residual']:.1e}", f"{row['adjoint error']:.1e}",
            f"{row['error']:.1e}", row["status"],
        ))  # fmt: skip
    return rows


class Ridges:
    """B ridge regressions with one log penalty a feature: folds that share x, or seeds with an x each."""

    def __init__(self, batch: int, points: int, p: int) -> None:
        g = torch.Generator().manual_seed(1)
        self.X, self.V = torch.randn(2, batch, points, p, generator=g, dtype=DOUBLE)
        w = torch.randn(batch, p, 1, generator=g, dtype=DOUBLE)
        self.t, self.v = (
            (P @ w)[..., 0] + torch.randn(batch, points, generator=g, dtype=DOUBLE) for P in (self.X, self.V)
        )
        self.batch, self.p = batch, p

    def problem(self, rows: Any, kind: type[bilevel.Problem]) -> Any:
        def fit(P: Tensor, q: Tensor, y: Tensor) -> Tensor:
            return ((P[rows] @ y[..., None])[..., 0] - q[rows]).square().mean(-1) / 2

        return kind(
            lambda x, y: fit(self.V, self.v, y) + 1e-2 * (x**2).sum(-1),
            lambda x, y: fit(self.X, self.t, y) + ((0.01 + x.exp()) * y**2).sum(-1) / 2,
        )


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    return run(), time.perf_counter() - began


def report(name: str, counts: list[bilevel.Counts], seconds: float, difference: float) -> dict[str, Any]:
    row = {
        "run": name, "lower solves": sum(c.lower_solves for c in counts),
        "gradients": sum(c.lower_gradients + c.upper_evaluations for c in counts),
        "products": sum(c.products for c in counts), "seconds": seconds, "difference": difference,
    }  # fmt: skip
    print(RUN.format(
        name, row["lower solves"], row["gradients"], row["products"], f"{seconds:.2f}", f"{difference:.0e}"
    ))  # fmt: skip
    return row


def batches(folds: int, seeds: int, points: int, p: int) -> list[dict[str, Any]]:
    """Folds and seeds at once, against loops."""
    task = Ridges(folds, points, p)
    x, y = torch.full((p,), -2.0, dtype=DOUBLE), torch.zeros(folds, p, dtype=DOUBLE)
    problem = task.problem(slice(None), bilevel.TaskProblem)
    solved = bilevel.examine_tasks(problem, x, y).y
    at_once, first = timed(lambda: bilevel.hypergradient(problem, x, solved, certificate=False))
    loop, second = timed(
        lambda: [
            bilevel.hypergradient(task.problem(k, bilevel.Problem), x, solved[k], certificate=False)
            for k in range(folds)
        ]
    )
    off = float((at_once.value - torch.stack([h.value for h in loop]).mean(0)).norm() / at_once.value.norm())
    counts = [bilevel.Counts(1, 1, h.products) for h in (at_once, *loop)]
    rows = [
        report(f"hypergradient of {folds} folds, one run", counts[:1], first, off),
        report(f"hypergradient of {folds} folds, loop", counts[1:], second, 0.0),
    ]

    def scalar(name: str) -> Callable[[Tensor, Tensor], Tensor]:
        whole = getattr(problem, name)
        return lambda x, y: whole(x, y)

    res, first = timed(lambda: bilevel.AID()(problem, x, y))
    flat = bilevel.Problem(scalar("upper"), scalar("lower"))
    other, second = timed(lambda: bilevel.AID()(flat, x, y))
    off = float((res.x - other.x).norm() / other.x.norm())
    rows += [
        report(f"AID on {folds} folds, batched", [res.counts], first, off),
        report(f"AID on {folds} folds, as one large y", [other.counts], second, 0.0),
    ]

    many = Ridges(seeds, points, p)
    x, y = torch.full((seeds, p), -2.0, dtype=DOUBLE), torch.zeros(seeds, p, dtype=DOUBLE)
    method = bilevel.BatchedAID()
    whole = many.problem(slice(None), bilevel.Problem)
    res, first = timed(lambda: method(whole, x, y))
    parts, second = timed(
        lambda: [
            method(many.problem(slice(k, k + 1), bilevel.Problem), x[k : k + 1], y[k : k + 1]) for k in range(seeds)
        ]
    )
    off = float((res.x - torch.cat([part.x for part in parts])).norm() / res.x.norm())
    singles, third = timed(lambda: [bilevel.AID()(many.problem(k, bilevel.Problem), x[k], y[k]) for k in range(seeds)])
    apart = float((res.x - torch.stack([part.x for part in singles])).norm() / res.x.norm())
    rows += [
        report(f"BatchedAID on {seeds} seeds", [res.counts], first, 0.0),
        report(f"BatchedAID in a loop over {seeds} seeds", [part.counts for part in parts], second, off),
        report(f"AID in a loop over {seeds} seeds", [part.counts for part in singles], third, apart),
    ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(ROW.format("problem", "back end", "products", "residual", "|v| error", "error", "status"))
    rows: list[dict[str, Any]] = []
    cases = [quadratic(40, 12, 1e3), kernel_ridge()] if options.quick else [
        quadratic(200, 50, 1e2), quadratic(200, 50, 1e4), kernel_ridge(100)
    ]  # fmt: skip
    for case in cases:
        rows += compare(case.name[:34], case.problem, case.x0, case.lower_solution(case.x0), None)
    problem, x, y, samples = classifier(60, 20) if options.quick else classifier(400, 100)
    rows += compare("logistic", problem, x, y, samples)
    print()
    print(RUN.format("run", "solves", "gradients", "products", "seconds", "apart"))
    runs = batches(5, 8, 30, 6) if options.quick else batches(5, 32, 200, 20)
    if options.output is not None:
        result = {"environment": environment(torch.device("cpu")), "back ends": rows, "batches": runs}
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
