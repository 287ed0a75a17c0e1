"""What a quadratic program's derivatives solve with: the factors of its active rows, and the certified solve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nestopt.implicit.monitor import Kind, Monitor, OnFailure, Record, report
from nestopt.linalg.result import Result, Status, scalar_or_tensor

__all__ = ["SPACES", "Factors", "Policy", "numberless", "substitute"]

# K, its LU and pivots; of each of its rows, the entry of (x, nu, lam) and the scale (0 for padding); whether K is
# singular; the codes of the programs: (*batch, s, s), the same, then (*batch, s) three times, (*batch,) twice
Factors = tuple[Tensor, ...]
SPACES = (2, 2, 1, 1, 1, 0, 0)

# Of a residual, relative to its right-hand side: what is exact, and what is no solution.
EXACT, LIMIT = 1e-13, 1e-9


@dataclass(frozen=True, eq=False)
class Policy:
    """What does not change from one item to another.

    Attributes:
        n: variables.
        p: equalities.
        m: inequalities.
        on_failure: "raise", "warn" or "nan".
        monitor: collects records, or None.
        sound: whether every item is known to have CONVERGED; within a transform nobody knows.
    """

    n: int
    p: int
    m: int
    on_failure: OnFailure
    monitor: Monitor | None
    sound: bool = False


def substitute(policy: Policy, kind: Kind, factors: Sequence[Tensor], r: Tensor) -> Tensor:
    """The certified solve, in float64, whatever the dtype of r.

    Args:
        policy: of the call.
        kind: of the record.
        factors: see `Factors`.
        r: shape (*sides, *batch, n + p + m).

    Returns:
        Of r's shape: zero at rows that are not active.
    """
    K, LU, pivots, rows, weights, deficient, codes = factors
    sides = r.ndim - 1 - codes.ndim
    wide = r.to(weights.dtype)
    if sides:
        rows = rows.expand(*wide.shape[:-1], -1)
    seen = wide.gather(-1, rows) * weights
    columns = seen.flatten(0, sides - 1).movedim(0, -1) if sides else seen.unsqueeze(-1)
    u = torch.linalg.lu_solve(LU, pivots, columns)
    rest = columns - K @ u
    size, error = _norm(columns), _norm(rest)
    exact = bool((error <= EXACT * size).all())
    if not exact:
        u, error = _refined(K, LU, pivots, columns, u, rest)
    if sides:
        u, error, size = (t.movedim(-1, 0).reshape(*r.shape[:sides], *t.shape[:-1]) for t in (u, error, size))
    else:
        u, error, size = u.squeeze(-1), error.squeeze(-1), size.squeeze(-1)
    found = torch.zeros_like(wide).scatter_add_(-1, rows, u * weights)
    # a finite sum proves finite entries, those of rows that are not active included
    if exact and policy.sound and policy.monitor is None and math.isfinite(float(wide.sum())):
        return found.to(r.dtype)
    tolerance = LIMIT * size
    # of a singular system only the part of r in its range can be met, and minimum norm is what was promised
    good = (error <= tolerance) | deficient
    outcome = torch.where(good, Status.CONVERGED.code, Status.STAGNATED.code)
    asked = (wide != 0).any(-1)
    failed = codes != Status.CONVERGED.code
    outcome = torch.where(failed, codes, outcome)
    outcome = torch.where(asked, outcome, Status.CONVERGED.code)
    outcome = torch.where(asked & ~torch.isfinite(wide).all(-1), Status.NON_FINITE.code, outcome)
    if policy.monitor is not None:
        record = Record(
            kind=kind, codes=outcome, residual_norm=scalar_or_tensor(error), error=scalar_or_tensor(error),
            tolerance=scalar_or_tensor(tolerance), iterations=0, products=0,
        )  # fmt: skip
        policy.monitor.records.append(record)
    bad = outcome != Status.CONVERGED.code
    if bool(bad.any()):
        if policy.on_failure != "nan":
            result = Result(x=found, codes=outcome, iterations=0, error=scalar_or_tensor(error))
            report("solve_qp: the system of the derivative", result, policy.on_failure)
            bad = bad & (numberless(codes) | ~torch.isfinite(error))
        found = torch.where(bad[..., None], torch.nan, found)
    return found.to(r.dtype)


def _refined(K: Tensor, LU: Tensor, pivots: Tensor, columns: Tensor, u: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """The solution after steps of iterative refinement as long as they help, and the norm of its residual."""
    for _ in range(8):
        trial = u + torch.linalg.lu_solve(LU, pivots, rest)
        fresh = columns - K @ trial
        better = (_norm(fresh) < 0.5 * _norm(rest))[..., None, :]
        u, rest = torch.where(better, trial, u), torch.where(better, fresh, rest)
        if not bool(better.any()) or bool((_norm(rest) <= EXACT * _norm(columns)).all()):
            break
    return u, _norm(rest)


def numberless(codes: Tensor) -> Tensor:
    """Which items have a status and no numbers."""
    named = (Status.INFEASIBLE, Status.UNBOUNDED, Status.NOT_CONVEX, Status.NON_FINITE)
    return torch.stack([codes == status.code for status in named]).any(0)


def _norm(columns: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(columns, dim=-2)
    return norm
