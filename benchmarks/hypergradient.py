"""A 20-product hypergradient against peers and hand-written loops, in one run.

The lower level is an MLP 784-256-10 on 512 points, each with a weight to be learnt (512 upper variables, 203 530 lower
ones) and an l2 penalty; the upper level its loss on 512 other points. Every contender gets the same y and spends 20
products with the Hessian (or 20 unrolled steps); its seconds are medians of interleaved runs and given as multiples of
the bare products: 2 gradients with a graph and 20 backward passes along it, with no solver around them.

Run: python benchmarks/hypergradient.py [--quick] [--output FILE.json] [--device cuda]
Peers (higher, torchopt) are compared where they are installed; the table says which were not.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import platform
import statistics
import time
import warnings
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from nestopt import bilevel, implicit, linalg
from nestopt.linalg.lanczos import extreme_eigenvalues

STEPS = 20


class Task:
    """The problem and what every contender needs of it."""

    def __init__(self, quick: bool, device: str) -> None:
        g = torch.Generator().manual_seed(0)
        width, hidden, points = (64, 32, 64) if quick else (784, 256, 512)
        self.X, self.V = torch.randn(2, points, width, generator=g).to(device)
        teacher = torch.randn(width, 10, generator=g).to(device)
        self.t, self.v = (self.X @ teacher).argmax(-1), (self.V @ teacher).argmax(-1)
        sizes = {"a": (width, hidden), "b": (hidden,), "c": (hidden, 10), "d": (10,)}
        self.y = {k: (torch.randn(*s, generator=g) / s[0] ** 0.5 / 2).to(device) for k, s in sizes.items()}
        self.x = torch.zeros(points, device=device)
        self.problem = bilevel.Problem(self.upper, self.lower)
        self.step, self.products = 0.0, STEPS

    def double(self):
        """The same task in float64."""
        wide = copy.copy(self)
        wide.X, wide.V, wide.x = self.X.double(), self.V.double(), self.x.double()
        wide.y = {k: p.double() for k, p in self.y.items()}
        wide.problem = bilevel.Problem(wide.upper, wide.lower)
        return wide

    def solve(self):
        """Put y at the lower solution, and choose the step of the methods that need one from the largest eigenvalue."""
        wide = self.double()
        solved = implicit.NewtonCG(rtol=1e-6)(lambda y: wide.lower(wide.x, y), wide.y)
        wide.y = solved.unwrap()
        self.y = {k: p.float() for k, p in wide.y.items()}
        H = linalg.Hessian(lambda y: wide.lower(wide.x, y), wide.y)
        self.step = 1 / extreme_eigenvalues(H, need_lowest=False, rtol=0.1).highest_bound
        truth = bilevel.hypergradient(
            wide.problem, wide.x, wide.y, linalg.CG(rtol=1e-10, max_iter=5000), certificate=False
        )
        return truth.unwrap()

    def net(self, y, X):
        return torch.tanh(X @ y["a"] + y["b"]) @ y["c"] + y["d"]

    def upper(self, x, y):
        return cross_entropy(self.net(y, self.V), self.v)

    def lower(self, x, y):
        losses = cross_entropy(self.net(y, self.X), self.t, reduction="none")
        return (torch.sigmoid(x) * losses).mean() + 0.005 * sum((p**2).sum() for p in y.values())

    def leaves(self):
        x = self.x.clone().requires_grad_()
        return x, {k: p.clone().requires_grad_() for k, p in self.y.items()}


def bare_products(task):
    """What no solver can do without: both gradients and the products that nestopt spends, verification included."""
    x, y = task.leaves()
    ys = list(y.values())
    v = torch.autograd.grad(task.upper(x, y), ys)
    g = torch.autograd.grad(task.lower(x, y), ys, create_graph=True)
    for _ in range(task.products - 1):  # the last one is the cross product
        v = torch.autograd.grad(g, ys, v, retain_graph=True)
        scale = 1 / torch.cat([p.flatten() for p in v]).norm()
        v = [p * scale for p in v]
    return torch.autograd.grad(g, x, v)[0]


def nestopt_cg(task):
    solver = linalg.CG(rtol=0.0, max_iter=STEPS)
    hg = bilevel.hypergradient(task.problem, task.x, task.y, solver, certificate=False)
    task.products = hg.products
    return hg.value


def nestopt_certified(task):
    solver = linalg.CG(rtol=0.0, max_iter=STEPS)
    return bilevel.hypergradient(task.problem, task.x, task.y, solver).value


def fresh_cg(task):
    """The usual loop: CG by hand, each product a fresh double backward."""
    x, y = task.leaves()
    ys = list(y.values())
    b = torch.autograd.grad(task.upper(x, y), ys)

    def product(v):
        g = torch.autograd.grad(task.lower(x, y), ys, create_graph=True)
        return torch.autograd.grad(g, ys, v)

    def dot(u, w):
        return sum((a * c).sum() for a, c in zip(u, w, strict=True))

    v, r = [torch.zeros_like(p) for p in b], list(b)
    p, rr = list(r), dot(r, r)
    for _ in range(STEPS):
        q = product(p)
        alpha = rr / dot(p, q)
        v = [a + alpha * c for a, c in zip(v, p, strict=True)]
        r = [a - alpha * c for a, c in zip(r, q, strict=True)]
        rr, old = dot(r, r), rr
        p = [a + rr / old * c for a, c in zip(r, p, strict=True)]
    g = torch.autograd.grad(task.lower(x, y), ys, create_graph=True)
    return -torch.autograd.grad(g, x, v)[0]


def fixed_point_map(task):
    """hypertorch's way: the vjp of a gradient-descent map on a kept graph, 20 Neumann terms."""
    x, y = task.leaves()
    ys = list(y.values())
    step = task.step
    g = torch.autograd.grad(task.lower(x, y), ys, create_graph=True)
    mapped = [p - step * q for p, q in zip(ys, g, strict=True)]
    b = torch.autograd.grad(task.upper(x, y), ys)
    v = list(b)
    for _ in range(STEPS):
        jv = torch.autograd.grad(mapped, ys, v, retain_graph=True)
        v = [a + c for a, c in zip(jv, b, strict=True)]
    return torch.autograd.grad(mapped, x, v)[0]


def higher_unrolled(task):
    """20 differentiable SGD steps by higher, then reverse."""
    import higher

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.p = torch.nn.ParameterDict({k: torch.nn.Parameter(v.clone()) for k, v in task.y.items()})

        def forward(self, X):
            return task.net(self.p, X)

    net, x = Net(), task.x.clone().requires_grad_()
    with higher.innerloop_ctx(net, torch.optim.SGD(net.parameters(), lr=task.step)) as (model, optimizer):
        for _ in range(STEPS):
            losses = cross_entropy(model(task.X), task.t, reduction="none")
            optimizer.step((torch.sigmoid(x) * losses).mean() + 0.005 * sum((p**2).sum() for p in model.parameters()))
        return torch.autograd.grad(cross_entropy(model(task.V), task.v), x)[0]


def torchopt_implicit(task):
    """torchopt's custom_root with 20 steps of its CG."""
    from torchopt.diff.implicit import custom_root
    from torchopt.linear_solve import solve_cg

    names = list(task.y)

    def optimality(params, x):
        return torch.func.grad(lambda p: task.lower(x, dict(zip(names, p, strict=True))))(params)

    @custom_root(optimality, argnums=1, solve=solve_cg(maxiter=STEPS, rtol=0.0, atol=0.0))
    def solved(params, x):
        return tuple(p.clone() for p in params)

    x = task.x.clone().requires_grad_()
    y = solved(tuple(task.y.values()), x)
    return torch.autograd.grad(task.upper(x, dict(zip(names, y, strict=True))), x)[0]


CONTENDERS = {
    "bare products": (bare_products, None),
    "nestopt hypergradient, CG": (nestopt_cg, None),
    "the same with its error bound": (nestopt_certified, None),
    "hand-written CG, fresh products": (fresh_cg, None),
    "hypertorch-style fixed-point map": (fixed_point_map, None),
    "higher, 20 unrolled steps": (higher_unrolled, "higher"),
    "torchopt custom_root, CG": (torchopt_implicit, "torchopt"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "hypergradient.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # torchopt calls functorch by its old name
    task = Task(options.quick, options.device)
    truth = task.solve()
    nestopt_cg(task)  # counts its products, for the bare ones
    rows, seconds, values = {}, {}, {}
    present = {k: f for k, (f, need) in CONTENDERS.items() if need is None or importlib.util.find_spec(need)}
    for name in CONTENDERS.keys() - present.keys():
        rows[name] = {"status": "not installed"}
    for round_ in range((2 if options.quick else options.rounds) + 1):
        for name, contender in present.items():
            begun = time.perf_counter()
            try:
                values[name] = contender(task)
            except Exception as error:  # a peer that fails is a row of the table, never a reason to stop
                if name.startswith(("nestopt", "bare", "hand")):
                    raise
                rows[name] = {"status": f"failed: {type(error).__name__}: {str(error)[:80]}"}
            if task.x.is_cuda:
                torch.cuda.synchronize()
            if round_:  # the first round warms up
                seconds.setdefault(name, []).append(time.perf_counter() - begun)
    base = statistics.median(seconds["bare products"])
    for name in present:
        if name in rows:
            continue
        median = statistics.median(seconds[name])
        error = float((values[name].double() - truth).norm() / truth.norm())
        rows[name] = {"seconds": median, "ratio": median / base, "relative_error": error}
    rows["bare products"].pop("relative_error")
    environment = {
        "torch": torch.__version__, "python": platform.python_version(), "processor": processor(), "threads": 1,
        "device": torch.cuda.get_device_name() if task.x.is_cuda else "cpu", "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"), "quick": options.quick,
        "products": task.products,
        "lower_variables": sum(p.numel() for p in task.y.values()),
    }  # fmt: skip
    print(f"{task.products} products each: {STEPS} steps, the verification of the residual, the cross product")
    print(f"{'contender':<36} {'ratio':>7} {'seconds':>9} {'error':>9}")
    for name in CONTENDERS:
        row = rows[name]
        if "status" in row:
            print(f"{name:<36} {row['status']}")
            continue
        error = f"{row['relative_error']:.1e}" if "relative_error" in row else ""
        print(f"{name:<36} {row['ratio']:>7.2f} {row['seconds']:>9.4f} {error:>9}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"environment": environment, "steps": STEPS, "rows": rows}, indent=1) + "\n")


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
