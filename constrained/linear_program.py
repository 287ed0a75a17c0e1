"""Linear programs: the vertex or the centre of the optimal face, or a smooth approximation, differentiable."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from nestopt.implicit.transforms import transformed, untraced
from nestopt.linalg.result import scalar_or_tensor

from .quadratic_program import QPResult, solve_qp

__all__ = ["LPResult", "Ties", "solve_lp"]

SHARED = tuple(field.name for field in fields(QPResult))

Ties = Literal["centre", "vertex"]


@dataclass(frozen=True, kw_only=True)
class LPResult(QPResult):
    """Solutions of linear programs; see `QPResult` for all that is not here.

    Attributes:
        vertex: whether x is a vertex: the rows that hold with equality at x have rank n.
        deficient: whether x or the duals are one choice of many: x where it is no vertex, the duals where more than n
            independent rows meet or some are repeated.
    """

    vertex: Any


def solve_lp(
    c: Tensor,
    A: Tensor | None = None,
    b: Tensor | None = None,
    G: Tensor | None = None,
    h: Tensor | None = None,
    *,
    low: Tensor | float | None = None,
    high: Tensor | float | None = None,
    regularization: Tensor | float = 0.0,
    ties: Ties = "centre",
    **options: Any,
) -> LPResult:
    r"""Minimise c'x + gamma |x|^2 / 2 subject to A x = b, G x <= h and low <= x <= high, as a function of all data.

    `solve_qp` with Q = gamma I, of which see statuses, certificate and duals; c is (*batch, n), A (*batch, p, n),
    G (*batch, m, n), and leading dimensions broadcast.

    With gamma = 0 the solution is exact. At a unique vertex where no more than n rows meet, x does not move with c
    (dx/dc = 0) and moves with the other data as the solution of its active rows' equations; the duals move with c, and
    the value's derivative is (x, -nu, ...) without a solve: two-stage decision rules want that one. Where an optimal
    face has more than one point, x is by `ties`

    - "centre": a point between its vertices, near its analytic centre;
    - "vertex": the vertex of that face that is lowest in a fixed direction. All rows that meet at it are active in the
      derivative (`degenerate="active"`). `vertex` says for each item whether there is one.

    With gamma > 0 the solution is unique and moves with c: the derivative that a predictor of costs can learn from. It
    is the projection of -c / gamma, and equals the LP's solution of least norm once gamma is small enough.

    Under torch.compile it stays in the graph as `solve_qp` does, but for "vertex" and a tensor of regularization.

    Cost: as for `solve_qp`; "vertex" solves twice more, the last time from the answer.

    Args:
        c: costs, float32 or float64.
        A: equality rows; with b.
        b: their right-hand sides.
        G: inequality rows; with h.
        h: their limits.
        low: lower bounds.
        high: upper bounds.
        regularization: gamma >= 0: a number, or a tensor that broadcasts to the batch and may require grad; |c| / 10
            spreads the solution over several vertices where x is of order 1, |c| / 1000 over few.
        ties: "centre" or "vertex"; only where gamma is 0.
        options: further keyword arguments of `solve_qp`: degenerate, smoothing, backend, rtol, on_failure, ...

    Returns:
        The result; its `value` is that of c'x + gamma |x|^2 / 2.

    Raises:
        TypeError: see `solve_qp`.
        ValueError: for a negative regularization, ties that do not exist or come with a regularization or a
            `degenerate` of their own, and as `solve_qp`.

    Reference:
        Mangasarian & Meyer 1979, "Nonlinear perturbation of linear programs" (gamma); Wilder, Dilkina & Tambe 2019.

    Example:
        >>> import torch
        >>> from nestopt import constrained
        >>> c, row = torch.tensor([-1.0, -1.0, 0.0]), torch.ones(1, 3)
        >>> constrained.solve_lp(c, row, torch.ones(1), low=0.0).x
        tensor([0.5000, 0.5000, 0.0000])
        >>> z = constrained.solve_lp(c, row, torch.ones(1), low=0.0, ties="vertex")
        >>> sorted(z.x.tolist()), z.vertex
        ([0.0, 0.0, 1.0], True)
    """
    if torch.compiler.is_compiling() and (ties != "centre" or isinstance(regularization, Tensor)):
        return _solve_lp_untraced(
            c, A, b, G, h, low=low, high=high, regularization=regularization, ties=ties, **options
        )
    if not isinstance(c, Tensor) or c.ndim < 1 or not c.is_floating_point():
        kind = f"{c.dtype} of shape {tuple(c.shape)}" if isinstance(c, Tensor) else type(c).__name__
        raise TypeError(f"solve_lp: c must be a floating tensor of shape (*batch, n), but got {kind}.")
    gamma = torch.as_tensor(regularization, dtype=c.dtype, device=c.device)
    # a number is judged as one: a graph cannot look into a tensor
    numeric = not isinstance(regularization, Tensor)
    if not (regularization >= 0 if numeric else transformed() or bool((gamma >= 0).all())):
        raise ValueError(f"solve_lp: regularization must be >= 0, but got {regularization}; 0 for the exact program.")
    if ties not in ("centre", "vertex"):
        raise ValueError(f'solve_lp: ties must be "centre" or "vertex", but got {ties!r}.')
    Q = gamma[..., None, None] * torch.eye(c.shape[-1], dtype=c.dtype, device=c.device)

    def solve(costs: Tensor, **more: Any) -> QPResult:
        return solve_qp(Q, costs, A, b, G, h, low=low, high=high, **{**options, **more})

    if ties == "centre":
        return _named(solve(c), A, G, low, high)
    if isinstance(regularization, Tensor) or regularization != 0 or "degenerate" in options:
        raise ValueError(
            'solve_lp: ties="vertex" is for regularization=0 and sets degenerate="active" itself; leave out '
            "regularization and degenerate, or ties."
        )
    with torch.no_grad():
        corner = _corner(solve(c.detach()), c, A, b, G, h, low, high, options)
    return _named(solve(c, warm_start=corner, degenerate="active"), A, G, low, high)


_solve_lp_untraced = untraced(solve_lp)


def _corner(
    z: QPResult,
    c: Tensor,
    A: Tensor | None,
    b: Tensor | None,
    G: Tensor | None,
    h: Tensor | None,
    low: Any,
    high: Any,
    options: dict[str, Any],
) -> QPResult:
    """The vertex of z's face that is optimal for a fixed direction, to start from: all rows at it with a dual."""
    eye = torch.eye(c.shape[-1], dtype=c.dtype, device=c.device)
    rows, limits = ([] if A is None or b is None else [A]), ([] if A is None or b is None else [b])
    # after polishing, the dual of a row that does not bind the whole face is zero, and no more than rounding elsewhere
    bound = torch.zeros_like(z.x) if z.bound_dual is None else z.bound_dual
    floor = 1e-9 * torch.cat([z.inequality_dual, bound.abs(), torch.ones_like(z.value)[..., None] * 1e-30], -1).amax(-1)
    floor = floor[..., None]
    if G is not None and h is not None:
        strong = z.inequality_dual > floor
        rows.append(torch.where(strong[..., None], G, 0))
        limits.append(torch.where(strong, h, 0))
        h = torch.where(strong, torch.inf, h)
    for sign, side in ((-1, low), (1, high)):
        if side is None:
            continue
        edge = torch.as_tensor(side, dtype=c.dtype, device=c.device)
        strong = sign * bound > floor
        rows.append(torch.where(strong[..., None], eye, 0))
        limits.append(torch.where(strong, edge, 0))
        if sign < 0:
            low = torch.where(strong, -torch.inf, edge)
        else:
            high = torch.where(strong, torch.inf, edge)
    batch = z.x.shape[:-1]
    rows = [row.expand(*batch, *row.shape[-2:]) for row in rows]
    limits = [limit.expand(*batch, limit.shape[-1]) for limit in limits]
    face = solve_qp(
        torch.zeros_like(eye), _direction(c), torch.cat(rows, -2) if rows else None,
        torch.cat(limits, -1) if rows else None, G, h, low=low, high=high, **options,
    )  # fmt: skip
    # the start's rows are those whose dual exceeds their slack: at the vertex, all that meet there
    lift = 1e-6 * (1 + floor)
    lifted = bound
    if z.bound_dual is not None:
        for sign, side in ((-1, low), (1, high)):
            if side is not None:
                lifted = torch.where((bound == 0) & _tight(side - face.x, face.x.abs()), sign * lift, lifted)
    dual = z.inequality_dual
    if G is not None and h is not None:
        room = (G * face.x[..., None, :]).abs().sum(-1)
        dual = torch.where((dual <= floor) & _tight(face.slack, room), lift, dual)
    return replace(z, x=face.x, inequality_dual=dual, bound_dual=None if z.bound_dual is None else lifted)


def _tight(gap: Tensor, size: Tensor) -> Tensor:
    """Whether a row holds with equality, in units of what its left-hand side is summed from."""
    return gap.abs() <= (1e-7 if gap.dtype == torch.float64 else 1e-4) * (1 + size)


def _direction(c: Tensor) -> Tensor:
    """Numbers in [1/2, 1] without any relation between them: fractions of multiples of the golden ratio."""
    return 0.5 + 0.5 * torch.remainder(0.6180339887498949 * torch.arange(1, c.shape[-1] + 1, device=c.device), 1).to(c)


def _named(z: QPResult, A: Tensor | None, G: Tensor | None, low: Any, high: Any) -> LPResult:
    """The result of the quadratic program, and whether x is a vertex."""
    with torch.no_grad():
        x = z.x.detach()
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        batch = x.shape[:-1]
        rows = [] if A is None else [A.detach().expand(*batch, *A.shape[-2:])]
        if G is not None:
            tight = _tight(z.slack.detach(), (G.detach() * x[..., None, :]).abs().sum(-1))
            rows.append(torch.where(tight[..., None], G.detach(), 0))
        for bound in (low, high):
            if bound is not None:
                gap = x - torch.as_tensor(bound, dtype=x.dtype, device=x.device).detach()
                rows.append(torch.where(_tight(gap, x.abs())[..., None], eye, 0))
        together = torch.cat(rows, -2) if rows else x.new_zeros(*batch, 1, x.shape[-1])
        together = torch.where(together.isnan(), 0, together)  # of a program without numbers: no rank is asked of NaN
        vertex = (torch.linalg.matrix_rank(together, rtol=1e-9) == x.shape[-1]) & ~x.isnan().any(-1)
    shown = vertex if transformed() or torch.compiler.is_compiling() else scalar_or_tensor(vertex)
    return LPResult(**{name: getattr(z, name) for name in SHARED}, vertex=shown)
