"""Digits hyper-cleaning against higher, torchopt and boat-torch, to equal validation loss, in one run.

800 training points of scikit-learn's digits (half the labels resampled), 400 validation and 597 test points; x holds a
logit for each training point, y a softmax regression on the weighted points. Every contender records its x with the
seconds that it has spent; afterwards the lower level is solved to 1e-10 at each x, so that all are judged by the same
validation loss. The figure is the seconds until it is within `--margin` of what AID ends at. The peers' outer Adam runs
at several learning rates, and their best one counts; nestopt runs with its defaults. Each contender first runs for half
a second that does not count, so that imports and first calls are nobody's cost.

Run: python benchmarks/bilevel_peers.py [--quick] [--process] [--limit SECONDS] [--output FILE.json]
Peers are compared where they are installed; the table says which were not. boat-torch wants numpy <= 1.26, an
environment of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.metrics import f1_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nestopt import bilevel, implicit

ROW = "{:<34} {:>9} {:>9} {:>8} {:>10} {:>7} {:>6}"
INNER = 100
Path_ = list[tuple[float, Tensor]]


class Task:
    """The problem in the forms that the contenders want."""

    def __init__(self) -> None:
        X, t = load_digits(return_X_y=True)
        X, t = torch.as_tensor(X / 16), torch.as_tensor(t)
        order = torch.randperm(len(t), generator=torch.Generator().manual_seed(0))
        train, held, test = order[:800], order[800:1200], order[1200:]
        g = torch.Generator().manual_seed(1)
        resampled = torch.rand(800, generator=g, dtype=torch.float32) < 0.5
        self.t = torch.where(resampled, torch.randint(0, 10, (800,), generator=g), t[train])
        self.wrong = self.t != t[train]
        self.X, self.V, self.E, self.v, self.e = X[train], X[held], X[test], t[held], t[test]
        self.x0 = torch.zeros(800)
        self.y0 = {"weight": torch.zeros(64, 10), "bias": torch.zeros(10)}
        self.problem = bilevel.Problem(self.upper, self.lower)
        self.step = 4.0  # about 1 / L of the lower level, whose features are at most 8 long

    def upper(self, x, y):
        return cross_entropy(self.V @ y["weight"] + y["bias"], self.v)

    def lower(self, x, y):
        losses = cross_entropy(self.X @ y["weight"] + y["bias"], self.t, reduction="none")
        return (torch.sigmoid(x) * losses).mean() + 1e-3 * ((y["weight"] ** 2).sum() + (y["bias"] ** 2).sum())

    def judge(self, x: Tensor, y: Any = None) -> tuple[Any, float]:
        """The lower solution at x, and the validation loss there."""
        y = implicit.NewtonCG(rtol=1e-10)(lambda y: self.lower(x, y), self.y0 if y is None else y).x
        return y, float(self.upper(x, y))


class Clock:
    """Records x with the seconds spent."""

    timer = staticmethod(time.perf_counter)

    def __init__(self, limit: float) -> None:
        self.limit, self.path, self.begun = limit, [], self.timer()

    def __call__(self, x: Tensor) -> bool:
        seconds = self.timer() - self.begun
        self.path.append((seconds, x.detach().clone()))
        return seconds > self.limit


def ours(method: Callable[[], Any]) -> Callable[[Task, Clock, float], None]:
    def run(task: Task, clock: Clock, _: float) -> None:
        task_method = method()
        bilevel.solve(task.problem, task.x0, task.y0, task_method, callbacks=[lambda k, s: clock(s.x_vector)])

    return run


def parameters(task: Task) -> dict[str, Tensor]:
    return {name: tensor.clone().requires_grad_() for name, tensor in task.y0.items()}


class Softmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(64, 10)), nn.Parameter(torch.zeros(10))

    def forward(self, features, params=None):
        return features @ self.weight + self.bias


def higher_unrolled(task: Task, clock: Clock, rate: float) -> None:
    """100 differentiable SGD steps from the last weights, outer Adam."""
    import higher

    x, net = task.x0.clone().requires_grad_(), Softmax()
    outer, inner = torch.optim.Adam([x], rate), torch.optim.SGD(net.parameters(), task.step)
    while not clock(x):
        with higher.innerloop_ctx(net, inner) as (model, optimizer):
            for _ in range(INNER):
                optimizer.step(task.lower(x, dict(model.named_parameters())))
            last = dict(model.named_parameters())
            (x.grad,) = torch.autograd.grad(task.upper(x, last), x)
            net.load_state_dict({name: tensor.detach() for name, tensor in last.items()})
        outer.step()


def torchopt_implicit(task: Task, clock: Clock, rate: float) -> None:
    """100 SGD steps from the last weights, custom_root with its CG, outer Adam."""
    from torchopt.diff.implicit import custom_root
    from torchopt.linear_solve import solve_cg

    x, y = task.x0.clone().requires_grad_(), parameters(task)
    outer = torch.optim.Adam([x], rate)
    names = list(y)

    def slope(y, x):
        with torch.enable_grad():
            y = tuple(t if t.requires_grad else t.requires_grad_() for t in y)
            return torch.func.grad(lambda y: task.lower(x, dict(zip(names, y, strict=True))))(y)

    @custom_root(slope, argnums=1, solve=solve_cg(maxiter=50, atol=1e-6))
    def solve(y, x):
        leaves = [t.detach().clone().requires_grad_() for t in y]
        optimizer = torch.optim.SGD(leaves, task.step)
        with torch.enable_grad():
            for _ in range(INNER):
                optimizer.zero_grad()
                task.lower(x.detach(), dict(zip(names, leaves, strict=True))).backward()
                optimizer.step()
        return tuple(t.detach() for t in leaves)

    while not clock(x):
        found = solve(tuple(y.values()), x)
        y = dict(zip(names, (t.detach() for t in found), strict=True))
        outer.zero_grad()
        task.upper(x, dict(zip(names, found, strict=True))).backward()
        outer.step()


def boat_lower(feed, upper_model, lower_model, params=None, **_):
    weights = list(lower_model.parameters()) if params is None else params
    return feed["task"].lower(upper_model.x, dict(zip(("weight", "bias"), weights, strict=True)))


def boat_upper(feed, upper_model, lower_model, params=None, **_):
    weights = list(lower_model.parameters()) if params is None else params
    return feed["task"].upper(upper_model.x, dict(zip(("weight", "bias"), weights, strict=True)))


class Logits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(800))


def boat(**operations: Any) -> Callable[[Task, Clock, float], None]:
    def run(task: Task, clock: Clock, rate: float) -> None:
        import boat_torch

        x, net = Logits(), Softmax()
        with tempfile.TemporaryDirectory() as folder:
            config = {
                "fo_op": None, "gm_op": None, "na_op": None, **operations, "device": "cpu", "lower_iters": INNER,
                "lower_level_model": net, "upper_level_model": x, "lower_level_var": list(net.parameters()),
                "upper_level_var": list(x.parameters()), "loss_log_path": str(Path(folder) / "losses.json"),
                "lower_level_opt": torch.optim.SGD(net.parameters(), task.step if operations["fo_op"] is None else 1.0),
                "upper_level_opt": torch.optim.Adam(x.parameters(), rate), "accumulate_grad": False,
                "fo_ol_batch_input": False, "copy_last_param": True, "return_grad": False,
                "GDA": {"alpha_init": 0.0, "alpha_decay": 1.0}, "RGT": {"truncate_iter": 0},
                "CG": {"tolerance": 1e-6, "k": 50}, "NS": {"tolerance": 1e-6, "k": 50},
                "MESO": {"eta": 1.0, "gamma_1": 0.1, "c0": 1.0, "y_hat_lr": 1.0},
            }  # fmt: skip
            losses = {"function": "__main__.boat_lower"}, {"function": "__main__.boat_upper"}
            solver = boat_torch.Problem(
                config, dict(zip(("lower_level_loss", "upper_level_loss"), losses, strict=True))
            )
            solver.build_ll_solver().build_ul_solver()
            feed, k = {"task": task}, 0
            while not clock(x.x):
                solver.run_iter(dict(feed), dict(feed), current_iter=k)
                k += 1

    return run


CONTENDERS: dict[str, tuple[Callable[[Task, Clock, float], None], str | None]] = {
    "nestopt AID": (ours(bilevel.AID), None),
    "nestopt, no method given": (ours(lambda: None), None),
    "higher, 100 unrolled steps": (higher_unrolled, "higher"),
    "torchopt custom_root, CG": (torchopt_implicit, "torchopt"),
    "boat NGD + CG": (boat(fo_op=None, gm_op=["NGD"], na_op=["CG"]), "boat_torch"),
    "boat NGD + NS": (boat(fo_op=None, gm_op=["NGD"], na_op=["NS"]), "boat_torch"),
    "boat NGD + RAD": (boat(fo_op=None, gm_op=["NGD"], na_op=["RAD"]), "boat_torch"),
    "boat MESO": (boat(fo_op="MESO"), "boat_torch"),
}


def judged(task: Task, path: Path_, points: int) -> Iterator[tuple[int, float, Tensor, Any]]:
    """(index, validation loss, x, y) at some points of a path."""
    y = None
    keep = sorted({round(i * (len(path) - 1) / max(points - 1, 1)) for i in range(points)})
    for i in keep:
        y, loss = task.judge(path[i][1], y)
        yield i, loss, path[i][1], y


def first_below(task: Task, path: Path_, steps: list[tuple[int, float, Tensor, Any]], target: float) -> float:
    """Seconds until the target: between the judged points on both sides of it, by bisection; inf if never."""
    at = next((k for k, (_, loss, _, _) in enumerate(steps) if loss <= target), None)
    if at is None:
        return float("inf")
    low, high, y = steps[at - 1][0] if at else -1, steps[at][0], steps[at][3]
    while high - low > 1:
        middle = (low + high) // 2
        if task.judge(path[middle][1], y)[1] <= target:
            high = middle
        else:
            low = middle
    return path[high][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="five seconds and one learning rate each")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds a contender and learning rate")
    parser.add_argument("--process", action="store_true", help="process time, for a machine that others use as well")
    parser.add_argument("--margin", type=float, default=1.05, help="times AID's validation loss counts as equal")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "bilevel_peers.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.filterwarnings("ignore")  # the peers' deprecations
    if options.process:
        Clock.timer = staticmethod(time.process_time)
    task, rows, target = Task(), {}, None
    limit = 5.0 if options.quick else options.limit
    print(ROW.format("contender", "rate", "seconds", "to", "reached", "test", "F1"))
    for name, (run, package) in CONTENDERS.items():
        if package is not None and importlib.util.find_spec(package) is None:
            print(f"{name:<34} not installed")
            continue
        best: dict[str, Any] | None = None
        for rate in (0.0,) if package is None else (0.3,) if options.quick else (0.03, 0.3, 3.0):
            try:
                run(task, Clock(0.5), rate)
                clock = Clock(limit)
                run(task, clock, rate)
            except Exception as problem:
                print(f"{name:<34} {rate:>9} {type(problem).__name__}: {str(problem)[:80]}")
                continue
            steps = list(judged(task, clock.path, 10 if options.quick else 60))
            if target is None:
                target = options.margin * steps[-1][1]
            seconds = first_below(task, clock.path, steps, target)
            _, loss, x, y = min(steps, key=lambda step: step[1])
            test = float(((task.E @ y["weight"] + y["bias"]).argmax(-1) == task.e).double().mean())
            found = {
                "rate": rate, "seconds": seconds, "reached": loss, "test": test, "steps": len(clock.path),
                "f1": float(f1_score(task.wrong, torch.sigmoid(x) < 0.5)),
                "path": [(clock.path[i][0], loss) for i, loss, _, _ in steps],
            }  # fmt: skip
            if best is None or (seconds, loss) < (best["seconds"], best["reached"]):
                best = found
        if best is not None:
            rows[name] = best
            figures = f"{best['seconds']:.2f}", f"{target:.4f}", f"{best['reached']:.4f}", f"{best['test']:.3f}"
            print(ROW.format(name, best["rate"], *figures, f"{best['f1']:.3f}"), flush=True)
    environment = {
        "torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine(), "threads": 1,
        "load": os.getloadavg()[0], "date": time.strftime("%Y-%m-%d"), "limit": limit, "margin": options.margin,
        "clock": "process" if options.process else "wall",
    }  # fmt: skip
    options.output.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
