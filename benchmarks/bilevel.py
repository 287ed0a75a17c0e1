"""Every bilevel method on every problem that meets its assumptions, without tuning: error against time and counts.

The problems and their answers are those of tests/problems.py. Where an answer is known the error is the relative
distance of x to it (of F, where minimisers are not unique); elsewhere it is the closed form's hypergradient at x,
relative to the one at the start.

Run: python benchmarks/bilevel.py [--quick] [--limit SECONDS] [--methods AID MEHA ...] [--problems quadratic ...]
     [--output FILE.json]; --join FILE.json ... puts the rows of earlier runs together.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from optree import tree_map
from torch import Tensor

from nestopt import bilevel, constrained
from nestopt.linalg.tree import Ravel

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from problems import COUPLED, NONSMOOTH, NOT_UNIQUE, SMOOTH, Answered

ROW = "{:<12} {:<44} {:>13} {:>9} {:>9} {:>8} {:>8} {:>8} {:>9}"
GROUPS = {"smooth": SMOOTH, "not unique": NOT_UNIQUE, "nonsmooth": NONSMOOTH, "coupled": COUPLED}


def vector(tree: Any) -> Tensor:
    return Ravel.of(tree, "tree").flatten(tree).detach()


def error_of(case: Answered, x: Any, value: float) -> float:
    """How far x is from the answer."""
    if case.x_star is not None:
        answer = vector(case.x_star)
        size = max(float(answer.norm()), float((vector(case.x0) - answer).norm()))
        return float((vector(x) - answer).norm()) / size
    if case.value is not None:
        return abs(value - case.value) / max(abs(case.value), 1.0)
    assert case.hypergradient is not None
    first = vector(case.hypergradient(case.x0))
    moved = constrained.project(case.problem.upper_set, tree_map(torch.sub, x, case.hypergradient(x)))
    return float((vector(x) - vector(moved)).norm() / first.norm())


def suits(method: type[bilevel.Method], case: Answered) -> bool:
    """Whether the problem meets the method's assumptions."""
    asked, problem = method.assumptions, case.problem
    parts = ("upper_set", "lower_set", "lower_prox", "inequality", "equality")
    present = [part for part in parts if getattr(problem, part) is not None]
    return all(getattr(asked, part) for part in present) and (case.unique or not asked.unique)


def measure(method: type[bilevel.Method], case: Answered, limit: float) -> dict[str, Any]:
    """One run with the method's defaults, ended as STOPPED after `limit` seconds, and its path."""
    path: list[dict[str, float]] = []
    begun, outside = time.perf_counter(), 0.0

    def watch(_: int, state: Any) -> bool:
        nonlocal outside
        now = time.perf_counter()
        if not path or int(state.iterations) >= 1.02 * path[-1]["iteration"] + 1:
            path.append(
                {
                    "iteration": int(state.iterations),
                    "seconds": now - begun - outside,
                    "error": error_of(case, state.x, float(state.value)),
                    "gradients": state.counts.upper_evaluations + state.counts.lower_gradients,
                    "products": state.counts.products,
                }
            )
        outside += time.perf_counter() - now
        return now - begun - outside > limit

    result = bilevel.solve(case.problem, case.x0, case.y0, method(), callbacks=[watch])
    counts = result.counts
    return {
        "status": result.status.name,
        "error": error_of(case, result.x, result.value),
        "certified": result.error,
        "tolerance": result.tolerance,
        "seconds": time.perf_counter() - begun - outside,
        "steps": int(result.iterations),
        "gradients": counts.upper_evaluations + counts.lower_gradients,
        "products": counts.products,
        "path": path,
    }


def environment() -> dict[str, Any]:
    info, cpu = Path("/proc/cpuinfo"), platform.processor()
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }


def draw(rows: list[dict[str, Any]], output: Path) -> None:
    """Error against seconds and against gradients plus products, for one problem of each group."""
    figure = Figure(figsize=(17, 7), layout="constrained")
    axes = figure.subplots(2, len(GROUPS))
    names = sorted({row["method"] for row in rows})
    looks = {
        name: {"color": f"C{i % 10}", "linestyle": ("-", "--", ":", "-.")[i // 10]} for i, name in enumerate(names)
    }
    lines = {}
    for column, (group, cases) in enumerate(GROUPS.items()):
        problem = cases[min(1, len(cases) - 1)].name
        for row in (row for row in rows if row["problem"] == problem and row["path"]):
            points = [*row["path"], row]  # the last one is of the result
            error = [max(point["error"], 1e-16) for point in points]
            work = [point["gradients"] + point["products"] for point in points]
            look = looks[row["method"]]
            axes[0][column].loglog([point["seconds"] for point in points], error, **look)
            (lines[row["method"]],) = axes[1][column].loglog(work, error, **look)
        axes[0][column].set_title(f"{group}: {problem}", fontsize=10)
        axes[0][column].set(xlabel="seconds", ylabel="relative error")
        axes[1][column].set(xlabel="gradients and products", ylabel="relative error")
    known = sorted(lines)
    figure.legend([lines[name] for name in known], known, loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(output, dpi=100)


def write(rows: list[dict[str, Any]], environment: dict[str, Any], output: Path) -> None:
    for row in rows:  # the paths fill most of the file
        row["path"] = [{key: float(f"{value:.4g}") for key, value in point.items()} for point in row["path"]]
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    output.write_text(f'{{"environment": {json.dumps(environment)}, "rows": [\n{lines}\n]}}\n')
    draw(rows, output.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    names = sorted(row["method"] for row in bilevel.methods() if not row["batched"])
    parser.add_argument("--quick", action="store_true", help="two problems of each group")
    parser.add_argument("--methods", nargs="+", default=names, choices=names)
    parser.add_argument("--problems", nargs="+", default=[""], help="beginnings of problems' names")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds a run")
    parser.add_argument("--join", nargs="+", type=Path, help="draw and write the rows of these files, run nothing")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "bilevel.json")
    options = parser.parse_args()
    if options.join is not None:
        parts = [json.loads(file.read_text()) for file in options.join]
        write([row for part in parts for row in part["rows"]], parts[0]["environment"], options.output)
        return
    torch.set_num_threads(1)
    print(ROW.format("method", "problem", "status", "error", "certified", "seconds", "steps", "grads", "products"))
    rows = []
    for name in options.methods:
        method = getattr(bilevel, name)
        for group, cases in GROUPS.items():
            for case in cases[:2] if options.quick else cases:
                if not suits(method, case) or not case.name.startswith(tuple(options.problems)):
                    continue
                try:
                    found = measure(method, case, options.limit)
                except Exception as problem:
                    found = {"status": type(problem).__name__, "message": str(problem), "path": []}
                rows.append({"method": name, "group": group, "problem": case.name, **found})
                figures = [found.get(key, float("nan")) for key in ("error", "certified")]
                counts = [found.get(key, 0) for key in ("steps", "gradients", "products")]
                seconds = f"{found.get('seconds', 0.0):.2f}"
                head = (name, case.name[:44], found["status"])
                print(ROW.format(*head, *(f"{figure:.1e}" for figure in figures), seconds, *counts), flush=True)
    write(rows, environment(), options.output)


if __name__ == "__main__":
    main()
