"""Whether a preconditioner helped: the same systems solved without and with each, products and residuals counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
from torch import Tensor

from .cg import CG, CGSolution
from .krylov import Krylov
from .operator import LinearOperator
from .preconditioner import Preconditioner
from .result import Status
from .solver import Solution

__all__ = ["Comparison", "PreconditionerReport", "compare_preconditioners", "named_row"]


@dataclass(frozen=True)
class PreconditionerReport:
    """One line of a Comparison.

    Attributes:
        name: of the preconditioner, "none" for the solve without.
        solution: the Solution.
        iterations: steps of the slowest column.
        products: products with A that the solve took, all columns together.
        building: products with A that building took; None for an operator that does not count them.
        residual: the largest true |b - A x| over its |b|; over columns with b = 0 it is zero.
        condition: the largest condition number that CG's Ritz values show, of M A; None for other solvers.
        verdict: whether it helped, in words.
        gain: products without it over products with it, building left out; where a solve did not converge, the ratio of
            the residuals. Below 1 it made things worse.
    """

    name: str
    solution: Solution
    iterations: int
    products: int
    building: int | None
    residual: float
    condition: float | None
    verdict: str = ""
    gain: float = 1.0

    @property
    def worse(self) -> bool:
        """Whether the solve went worse than without."""
        return not self.gain >= 1


@dataclass(frozen=True)
class Comparison:
    """What `compare_preconditioners` found; printing it gives the table.

    Attributes:
        rows: a PreconditionerReport each, the solve without a preconditioner first.
    """

    rows: tuple[PreconditionerReport, ...]

    def __getitem__(self, name: str) -> PreconditionerReport:
        """The line of this name."""
        row: PreconditionerReport = named_row(self, name)
        return row

    @property
    def worse(self) -> tuple[str, ...]:
        """The names of those that made things worse."""
        return tuple(row.name for row in self.rows if row.worse)

    def __str__(self) -> str:
        width = max(len("preconditioner"), *(len(row.name) for row in self.rows))
        head = f"{'preconditioner':<{width}}  {'steps':>6} {'products':>8} {'building':>8} {'residual':>9} {'cond':>8}"
        lines = [head + "  verdict"]
        for row in self.rows:
            building = "?" if row.building is None else str(row.building)
            condition = "" if row.condition is None else f"{row.condition:.1e}"
            lines.append(
                f"{row.name:<{width}}  {row.iterations:>6} {row.products:>8} {building:>8} {row.residual:>9.1e} "
                f"{condition:>8}  {row.verdict}"
            )
        return "\n".join(lines)


def named_row(table: Any, name: str) -> Any:
    """The row of this name.

    Args:
        table: has `rows`, each with a `name`.
        name: of the row.

    Returns:
        The row.

    Raises:
        KeyError: if there is none.
    """
    rows = {row.name: row for row in table.rows}
    if name not in rows:
        raise KeyError(f"{type(table).__name__}: {name!r} was not compared; there are {', '.join(rows)}.")
    return rows[name]


def compare_preconditioners(
    A: LinearOperator,
    b: Tensor,
    preconditioners: Mapping[str, LinearOperator],
    *,
    solver: Krylov[Any] = CG(),
) -> Comparison:
    """Solve A x = b without and with each preconditioner, and say which one helped and which one made it worse.

    Cost: one solve each, and one without.

    Args:
        A: operator of shape (*batch, n, n).
        b: right-hand sides (*sides, *batch, n).
        preconditioners: operators close to the inverse of A, by name.
        solver: CG, MINRES or another that takes a preconditioner; what it has set itself is left out.

    Returns:
        The Comparison.

    Raises:
        TypeError: if solver takes no preconditioner.
        ValueError: if a preconditioner is called "none".

    Example:
        >>> from nestopt.linalg import Diagonal, Jacobi
        >>> A = Diagonal(torch.logspace(0, 4, 50, dtype=torch.float64))
        >>> bad = Diagonal(torch.logspace(0, 2, 50, dtype=torch.float64))
        >>> found = compare_preconditioners(A, torch.ones(50, dtype=torch.float64), {"jacobi": Jacobi(A), "bad": bad})
        >>> found["jacobi"].iterations, found["jacobi"].verdict[:5], found.worse
        (1, 'helps', ('bad',))
    """
    if not isinstance(solver, Krylov):
        raise TypeError(
            f"compare_preconditioners: solver must be CG, MINRES or another that takes a preconditioner, but got "
            f"{type(solver).__name__}."
        )
    if "none" in preconditioners:
        raise ValueError('compare_preconditioners: "none" is the solve without; call the preconditioner otherwise.')
    rows = [_solve(A, b, "none", None, solver)]
    for name, M in preconditioners.items():
        rows.append(_judge(_solve(A, b, name, M, solver), rows[0], solver.needs_symmetric))
    return Comparison(tuple(rows))


def _solve(
    A: LinearOperator, b: Tensor, name: str, M: LinearOperator | None, solver: Krylov[Any]
) -> PreconditionerReport:
    solution = replace(solver, preconditioner=M)(A, b)
    error, size = torch.as_tensor(solution.residual_norm), A.norm(b)
    relative = torch.where(size > 0, error.to(size) / size, 0)
    seen = solution.condition if isinstance(solution, CGSolution) else None
    values = torch.empty(0) if seen is None else torch.as_tensor(seen)
    values = values[torch.isfinite(values)]
    return PreconditionerReport(
        name=name,
        solution=solution,
        iterations=int(torch.as_tensor(solution.iterations).max()) if size.numel() else 0,
        products=solution.products,
        building=M.products if isinstance(M, Preconditioner) else 0 if M is None else None,
        residual=float(relative.max()) if size.numel() else 0.0,
        condition=float(values.max()) if values.numel() else None,
        verdict=_endings(solution),
    )


def _endings(solution: Solution) -> str:
    codes = solution.codes.flatten().tolist()
    return ", ".join(Status.from_code(code).name for code in dict.fromkeys(codes)) or "no column"


def _judge(row: PreconditionerReport, plain: PreconditionerReport, symmetric: bool) -> PreconditionerReport:
    """The verdict on a solve, against the one without a preconditioner."""
    ended, ended_plain = (bool((r.solution.codes == Status.CONVERGED.code).all()) for r in (row, plain))
    nan, nan_plain = (bool((r.solution.codes == Status.NON_FINITE.code).any()) for r in (row, plain))
    if bool((row.solution.codes == Status.BREAKDOWN.code).any()):
        cause = ", it is not positive definite" if symmetric else ""
        return replace(row, gain=0.0, verdict=f"WORSE: BREAKDOWN{cause}")
    if nan_plain:
        return replace(row, verdict=f"{_endings(row.solution)}, and NON_FINITE without it too")
    if nan:
        return replace(row, gain=0.0, verdict="WORSE: NON_FINITE, it gives NaN or inf")
    if ended and ended_plain:
        gain = plain.products / row.products if row.products else 1.0
        if gain == 1:
            return replace(row, verdict="makes no difference")
        if gain < 1:
            return replace(row, gain=gain, verdict=f"WORSE: {1 / gain:.1f} times the products")
        words = f"helps: {gain:.1f} times fewer products"
        if row.building:
            solves = ceil(row.building / (plain.products - row.products))
            words += ", building included" if solves == 1 else f", pays from {solves} such solves on"
        return replace(row, gain=gain, verdict=words)
    gain = plain.residual / row.residual if row.residual else float("inf")
    if ended != ended_plain:
        words = f"helps: converges, {_endings(plain.solution)} without" if ended else f"WORSE: {_endings(row.solution)}"
        return replace(row, gain=max(gain, 1.0) if ended else min(gain, 0.99), verdict=words)
    words = f"helps: residual {gain:.1f} times smaller" if gain >= 1 else f"WORSE: residual {1 / gain:.1f} times larger"
    return replace(row, gain=gain, verdict=f"{words} ({_endings(row.solution)})")
