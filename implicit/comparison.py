"""What each backward pass costs, and how far off it is, at the user's own point."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from nestopt.linalg import CG, GMRES, LU, MINRES, LinearSolver, Neumann, Normal, Status, Statuses
from nestopt.linalg.comparison import named_row
from nestopt.linalg.result import scalar_or_tensor, status_of
from nestopt.linalg.tree import Ravel

from .backward_pass import BackwardPass
from .fixed_points import fixed_point
from .monitor import Monitor
from .one_step import OneStep
from .phantom import Phantom
from .roots import root
from .stationary import argmin
from .truncated import Truncated
from .unroll import Unroll

__all__ = ["PassComparison", "PassReport", "compare"]


@dataclass(frozen=True)
class PassReport:
    """One line of a PassComparison.

    Attributes:
        name: of the pass.
        solver: the pass.
        error: |g - g_exact| / |g_exact| of the gradient g of all parameters together, the largest over the cotangents.
        errors: the same of the adjoint u alone, per item of the batch: a number, or a tensor over the batch.
        residual: the largest |v - A'u| / |v|, measured; NaN where there is none.
        codes: the worst ending of each item's systems.
        products: products with A and A', or backward passes through a step, all items and cotangents together, with
            those that certified y and built a factorisation.
        seconds: for the call and its backward passes, once: an indication.
    """

    name: str
    solver: LinearSolver | BackwardPass
    error: float
    errors: Any
    residual: float
    codes: Tensor
    products: int
    seconds: float

    @property
    def status(self) -> Status | Statuses:
        """How it ended: a Status, or Statuses over a batch."""
        return status_of(self.codes)


@dataclass(frozen=True)
class PassComparison:
    """What `compare` found; printing it gives the table.

    Attributes:
        rows: a PassReport each, the exact one first.
    """

    rows: tuple[PassReport, ...]

    def __getitem__(self, name: str) -> PassReport:
        """The line of this name."""
        row: PassReport = named_row(self, name)
        return row

    def __str__(self) -> str:
        width = max(len("pass"), *(len(row.name) for row in self.rows))
        lines = [f"{'pass':<{width}}  {'error':>9} {'residual':>9} {'products':>8} {'seconds':>9}  status"]
        for row in self.rows:
            codes = row.codes.flatten().tolist()
            ended = ", ".join(
                Status.from_code(code).name + (f" {codes.count(code)}/{len(codes)}" if row.codes.ndim else "")
                for code in dict.fromkeys(codes)
            )
            lines.append(
                f"{row.name:<{width}}  {row.error:>9.1e} {row.residual:>9.1e} {row.products:>8} "
                f"{row.seconds:>9.1e}  {ended}"
            )
        return "\n".join(lines)


def compare(
    layer: Callable[..., Any],
    function: Callable[..., Any],
    y: Any,
    *theta: Any,
    passes: Mapping[str, LinearSolver | BackwardPass] | None = None,
    exact: LinearSolver | None = None,
    cotangent: Any = None,
    samples: int = 3,
    generator: torch.Generator | None = None,
    **options: Any,
) -> PassComparison:
    """Take the derivative of root, fixed_point or argmin at a point by every backward pass, against the exact one.

    For cotangents v, given or random ones, each pass computes the gradient of <v, y> with respect to the parameters:
    how far it is from the exact gradient, the residual |v - A'u| of its adjoint system, and what it cost. A pass whose
    error is below the noise of the training's own gradients is good enough.

    Args:
        layer: implicit.root, implicit.fixed_point or implicit.argmin.
        function: as in its call.
        y: as in its call: the solution.
        theta: as in its call; what requires grad is differentiated, or every floating tensor where none does.
        passes: name -> `solver=`; None for those that fit, with usual numbers: GMRES, Normal(CG), for a symmetric A
            CG, MINRES and Neumann, and for a map (or a symmetric A) OneStep, Phantom and Unroll. NystromInverse is not
            among them, for its shift is in A's units.
        exact: what to compare with; None for LU.
        cotangent: a tree like y, or None for random ones.
        samples: how many random ones.
        generator: of the cotangents; None for a new one with seed 0.
        options: of the layer: batch_dims, symmetric, rtol, atol.

    Returns:
        The comparison.

    Raises:
        ValueError: for another layer, a pass called "exact", or no sample.
        SolverError: if y is no solution, or the exact pass fails.

    Example:
        >>> import torch
        >>> from nestopt import implicit
        >>> W = torch.tensor([[0.2, 0.1], [-0.3, 0.1]], dtype=torch.float64)
        >>> y = torch.linalg.solve(torch.eye(2, dtype=torch.float64) - W, torch.ones(2, dtype=torch.float64))
        >>> found = implicit.compare(implicit.fixed_point, lambda y, W: W @ y + 1, y, W)
        >>> found["OneStep()"].error > found["Phantom(5, 0.8)"].error > found["GMRES()"].error
        True
    """
    if layer not in (root, fixed_point, argmin):
        raise ValueError(f"compare: layer must be implicit.root, fixed_point or argmin, but got {layer!r}.")
    for name in ("solver", "monitor", "warm_start", "on_failure"):
        if name in options:
            raise ValueError(f"compare: {name} is set by compare itself; leave it out.")
    if samples < 1:
        raise ValueError(f"compare: samples must be at least 1, but got {samples}.")
    if passes is None:
        passes = _applicable(layer is fixed_point, bool(options.get("symmetric", layer is argmin)))
    if "exact" in passes:
        raise ValueError('compare: "exact" is the pass that all are compared with; call yours otherwise.')
    trial = _Trial(layer, function, y, theta, options)
    cotangents = [trial.ravel.leaves(cotangent)] if cotangent is not None else trial.draw(samples, generator)
    truth = trial.run(LU() if exact is None else exact, cotangents, "raise")
    rows = [trial.report("exact", LU() if exact is None else exact, truth, truth)]
    for name, solver in passes.items():
        rows.append(trial.report(name, solver, trial.run(solver, cotangents, "nan"), truth))
    return PassComparison(tuple(rows))


def _applicable(is_map: bool, symmetric: bool) -> dict[str, LinearSolver | BackwardPass]:
    found: dict[str, LinearSolver | BackwardPass] = {"GMRES()": GMRES(), "Normal(CG())": Normal(CG())}
    if symmetric:
        found |= {"CG()": CG(), "MINRES()": MINRES()}
        found |= {"Truncated(CG(max_iter=5))": Truncated(CG(max_iter=5))}
        found |= {"Truncated(Neumann(5))": Truncated(Neumann(5))}
    if is_map or symmetric:
        found |= {"OneStep()": OneStep(), "Phantom(5, 0.8)": Phantom(5, 0.8), "Unroll(10)": Unroll(10)}
    return found


@dataclass(frozen=True)
class _Run:
    """What one pass gave: per cotangent, the gradients of the parameters and the adjoint."""

    cotangents: list[Tensor]
    gradients: list[Tensor]
    adjoints: list[Tensor]
    monitor: Monitor
    seconds: float


class _Trial:
    """The user's call, repeated with one solver after another."""

    def __init__(
        self, layer: Callable[..., Any], function: Callable[..., Any], y: Any, theta: tuple[Any, ...], options: Any
    ) -> None:
        self.layer, self.function, self.y, self.options = layer, function, y, options
        self.ravel = Ravel.of(y, "y")
        self.batch = options.get("batch_dims", 0)
        tree: Any = theta
        leaves, self.treespec = optree.tree_flatten(tree)
        floating = [isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves]
        some = any(f and leaf.requires_grad for f, leaf in zip(floating, leaves, strict=True))
        self.wanted = [f and (leaf.requires_grad or not some) for f, leaf in zip(floating, leaves, strict=True)]
        self.leaves = leaves
        if not any(self.wanted):
            raise ValueError("compare: theta holds no floating tensor, so there is nothing to differentiate.")

    def draw(self, samples: int, generator: torch.Generator | None) -> list[list[Tensor]]:
        """Normal random cotangents."""
        g = torch.Generator().manual_seed(0) if generator is None else generator
        leaves = self.ravel.leaves(self.y)
        return [
            [torch.randn(t.shape, generator=g, dtype=t.dtype, device=g.device).to(t.device) for t in leaves]
            for _ in range(samples)
        ]

    def vector(self, leaves: Sequence[Tensor]) -> Tensor:
        """Leaves like y's as one vector an item."""
        return torch.cat([t.reshape(*t.shape[: self.batch], -1) for t in leaves], -1)

    def shifted(self, y: Any, shift: Any, *theta: Any) -> Any:
        """The function with a shift of the residual, whose gradient is the adjoint itself (up to the sign)."""
        value = self.function(y, *theta)
        if self.layer is not argmin:
            return optree.tree_map(torch.add, value, shift)
        products = zip(self.ravel.leaves(y), self.ravel.leaves(shift), strict=True)
        return value + sum((a * b).flatten(self.batch).sum(-1) if a.ndim else a * b for a, b in products)

    def run(self, solver: LinearSolver | BackwardPass, cotangents: list[list[Tensor]], policy: str) -> _Run:
        """Differentiate by one pass."""
        fresh = [
            leaf.detach().requires_grad_(wanted) if isinstance(leaf, Tensor) else leaf
            for leaf, wanted in zip(self.leaves, self.wanted, strict=True)
        ]
        theta: Any = optree.tree_unflatten(self.treespec, fresh)
        shift = [torch.zeros_like(leaf).requires_grad_() for leaf in self.ravel.leaves(self.y)]
        inputs = [*shift, *(leaf for leaf, wanted in zip(fresh, self.wanted, strict=True) if wanted)]
        monitor = Monitor(keep=2 + len(cotangents))
        gradients, adjoints = [], []
        start = _now(shift[0])
        out = self.layer(
            self.shifted, self.y, self.ravel.build(shift), *theta, solver=solver, monitor=monitor, on_failure=policy,
            **self.options,
        )  # fmt: skip
        for v in cotangents:
            found = torch.autograd.grad(
                optree.tree_leaves(out), inputs, v, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            adjoints.append(self.vector(found[: len(shift)]))
            gradients.append(torch.cat([t.reshape(-1) for t in found[len(shift) :]]))
        return _Run([self.vector(v) for v in cotangents], gradients, adjoints, monitor, _now(shift[0]) - start)

    def report(self, name: str, solver: LinearSolver | BackwardPass, run: _Run, truth: _Run) -> PassReport:
        """The line of a run."""
        norm = torch.linalg.vector_norm
        pairs = zip(run.gradients, truth.gradients, strict=True)
        error = torch.stack([_ratio(norm(a - b), norm(b)) for a, b in pairs]).amax()
        pairs = zip(run.adjoints, truth.adjoints, strict=True)
        errors = torch.stack([_ratio(norm(a - b, dim=-1), norm(b, dim=-1)) for a, b in pairs]).amax(0)
        records = [record for record in run.monitor.records if record.kind == "adjoint"]
        residuals = [
            _ratio(torch.as_tensor(record.residual_norm, dtype=v.dtype, device=v.device), norm(v, dim=-1))
            for record, v in zip(records, run.cotangents, strict=True)
        ]
        return PassReport(
            name=name, solver=solver, error=float(error), errors=scalar_or_tensor(errors),
            residual=float(torch.stack(residuals).amax()),
            codes=torch.stack([record.codes for record in records]).amax(0),
            products=sum(record.products for record in run.monitor.records), seconds=run.seconds,
        )  # fmt: skip


def _ratio(error: Tensor, size: Tensor) -> Tensor:
    return torch.where(error == 0, 0, error / size)


def _now(like: Tensor) -> float:
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter()
