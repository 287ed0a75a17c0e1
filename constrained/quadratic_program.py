"""Quadratic programs as a batched, differentiable function of their data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nestopt.implicit.monitor import Monitor, OnFailure, check_on_failure
from nestopt.implicit.transforms import forward_mode, tracked, transformed, untraced
from nestopt.linalg.result import Result, Status, check_stopping, scalar_or_tensor

from .interior_point import broadcast_shapes
from .qp_backends import Backend
from .qp_compiled import fits_in_graph, solve_in_graph
from .qp_derivative import attach, value_of
from .qp_factors import SPACES, Factors, Policy
from .qp_smoothed import attach_smoothed
from .qp_solution import Degenerate, Options, find_solution

__all__ = ["Degenerate", "QPResult", "solve_qp"]

OWNER = "solve_qp"


@dataclass(frozen=True, kw_only=True)
class QPResult(Result):
    """Solutions of quadratic programs; every field has the batch's shape in front.

    `x`, the duals, `value` and `slack` are differentiable. An item that is INFEASIBLE, UNBOUNDED, NOT_CONVEX or
    NON_FINITE has NaN in place of numbers.

    Attributes:
        equality_dual: nu, shape (*batch, p).
        inequality_dual: lam >= 0, shape (*batch, m).
        bound_dual: of `low` and `high` together, shape (*batch, n): positive where `high` holds x, negative where `low`
            does, and part of the Lagrangian's gradient; None without bounds.
        value: x'Qx/2 + q'x, shape (*batch,).
        slack: h - G x, shape (*batch, m).
        weakly_active: how many inequalities (bounds included) of an item hold with equality and a zero dual: there the
            solution has no derivative, and the policy `degenerate` chose one.
        deficient: whether the KKT matrix of an item's active rows is singular (the rows are linearly dependent, or x is
            not unique): derivatives are then solutions of minimum norm, and duals one choice of many.

    Example:
        >>> import torch
        >>> from nestopt import constrained
        >>> z = constrained.solve_qp(torch.eye(2), -torch.tensor([2.0, 0.5]), G=torch.eye(2), h=torch.ones(2))
        >>> z.x, z.inequality_dual, z.status.name
        (tensor([1.0000, 0.5000]), tensor([1., 0.]), 'CONVERGED')
    """

    equality_dual: Tensor
    inequality_dual: Tensor
    bound_dual: Tensor | None
    value: Tensor
    slack: Tensor
    weakly_active: Any
    deficient: Any


def solve_qp(
    Q: Tensor,
    q: Tensor,
    A: Tensor | None = None,
    b: Tensor | None = None,
    G: Tensor | None = None,
    h: Tensor | None = None,
    *,
    low: Tensor | float | None = None,
    high: Tensor | float | None = None,
    backend: Backend | None = None,
    degenerate: Degenerate = "strong",
    smoothing: float = 1e-6,
    rtol: float | None = None,
    max_iter: int = 100,
    warm_start: QPResult | None = None,
    on_failure: OnFailure = "raise",
    monitor: Monitor | None = None,
) -> QPResult:
    r"""Minimise x'Qx/2 + q'x subject to A x = b, G x <= h and low <= x <= high, as a differentiable function of all.

    Q (*batch, n, n) is positive semidefinite (only its symmetric part counts; zero makes a linear program); A is
    (*batch, p, n), G (*batch, m, n), q, low, high (*batch, n), b (*batch, p), h (*batch, m). Leading batch dimensions
    broadcast, each item is a program of its own, and the gradient of what items share is the sum over them. With
    L = x'Qx/2 + q'x + nu'(A x - b) + lam'(G x - h), lam >= 0, the duals returned are nu and lam.

    The programs are equilibrated. Strictly convex ones with m <= 2n (m counts bounds on both sides) are solved first by
    block principal pivoting on their dual, which ends at the active rows within a few Cholesky factorisations. For the
    items that it leaves (a singular Q, dependent rows, weakly active rows, more inequalities) Mehrotra's
    predictor-corrector interior-point method runs, all items in step: in float32 and to 1e-3, then in float64 and to
    1e-6, then to rtol, each only for the items whose polished solution does not pass. Polishing tries the active rows:
    the KKT system K = [[Q, C'], [C, 0]], C = A and the active rows of G, is solved by LU with refinement, rows with a
    negative dual leave and violated rows enter, for a few rounds, and the solution is exact to rounding once the rows
    are right. With bounds only, a warm start, or no inequalities it comes first. Everything but the first interior
    point is float64, whatever the data are. An item's path does not depend on the others of its batch; its numbers do
    not either, but for rounding (matrices are padded to the batch's largest count of active rows).

    CONVERGED means that the relative KKT residual at x is at most rtol: the largest, in the equilibrated program, of
    |Qx + q + A'nu + G'lam| / max(|Qx|, |A'nu + G'lam|, 1), |Ax - b| and (Gx - h)_+ relative to the row's right-hand
    side or 1, |lam'(Gx - h)| / max(|value|, 1), and (-lam)_+. INFEASIBLE and UNBOUNDED are said of other items, on the
    strength of a certificate that a linear program finds in the equilibrated data: multipliers, |nu|_1 + |lam|_1 = 1
    and lam >= 0, with f = -(b'nu + h'lam) > 0 and |A'nu + G'lam| <= 1e-7 f, so that no x with |x|_1 < 1e7 is feasible;
    or a direction, |v| <= 1, with f = -q'v > 0 and |Qv|, |Av| and (Gv)_+ all at most 1e-7 f; f itself is at least 1e-8
    of what it is summed from, or of 1. Then, and for an indefinite Q (NOT_CONVEX) and for NaN in the data (NON_FINITE),
    the item's numbers are NaN. Duplicated rows are no fault; the duals are then those of minimum norm in the
    equilibrated program where these are >= 0.

    Derivatives. With active rows fixed the solution is K^{-1} (-q, b, h): a backward pass with v = (v_x, v_nu, v_lam)
    solves K w = v with the factors at hand and returns dq = -w_x, dQ = -(w_x x' + x w_x')/2, db = w_nu,
    dA = -(w_nu x' + nu w_x'), dh = w_lam, dG = -(w_lam x' + lam w_x'), where inactive rows have w_lam = 0. Each is such
    a solve again, so that derivatives of any order, forward mode and torch.func's transforms are right. The value needs
    no solve. Each solve's residual is measured. A row with a zero dual that holds with equality (`weakly_active`
    counts them) is a kink; for min (x - t)^2/2, x <= 0, with dx/dt = 1 for t < 0 and 0 for t > 0, t = 0 gives by
    `degenerate`:

    - "strong": only rows with positive duals are active: dx/dt = 1;
    - "active": all rows that hold with equality are: dx/dt = 0;
    - "mean": the mean of these two derivatives: 1/2;
    - "smoothed": that of the point of the central path with lam_i (h - Gx)_i = smoothing, at every t:
      dx/dt = (1 - t/sqrt(t^2 + 4 smoothing))/2. The solution itself stays exact.

    Under torch.compile the call stays in the graph as one opaque operator, and its first derivative as another; second
    derivatives through a compiled graph are torch's to refuse. What the result has as Python numbers (`iterations`,
    `error`, ... of a single program) are 0-d tensors there. A `backend`, a `warm_start`, a `monitor`, "smoothed" and
    torch.func's transforms make it a graph break, in which it runs as it is. The factors for the derivative take the
    memory of those with all rows active. The gradient with respect to `warm_start` is zero.

    Cost: pivoting factorises Q and forms G H G', n^3/3 + (m + p) n^2 + m^2 n operations, and each of its rounds, about
    5, a matrix of the order of the active rows; an interior-point step forms and factorises an n x n matrix,
    m n^2 + n^3/3 + p n^2, about 10 steps; each round of polishing, mostly one, factorises K of order
    n + p + (active rows); a derivative solves with those factors.

    Args:
        Q: positive semidefinite, float32 or float64; -1e-9 of its largest entry (equilibrated) is taken for rounding.
        q: linear term.
        A: equality rows; with b.
        b: their right-hand sides.
        G: inequality rows; with h.
        h: their limits; inf for a row that is absent.
        low: lower bounds, -inf for none.
        high: upper bounds, inf for none.
        backend: `ProxQP()`, `OSQP()` or `Moreau()` to find the active rows instead of the interior-point method; the
            solution is polished and certified, and differentiated, in the same way.
        degenerate: the derivative at weakly active rows, see above.
        smoothing: mu of "smoothed", in units of the objective: derivatives bend over a distance of 2 sqrt(smoothing).
        rtol: of the certificate; None for 1e-9 in float64 and 1e-5 in float32.
        max_iter: limit of interior-point steps; 8 to 15 are usual, none where pivoting found the rows (`iterations`
            counts these steps).
        warm_start: the result of a program nearby, of the same shapes: where its active rows are still the right ones
            no interior-point step is taken.
        on_failure: what a derivative does at an item that has not CONVERGED, or whose own linear solve fails: "raise"
            SolverError, "warn" and use the best estimate, NaN where there is none, or "nan". A zero cotangent asks
            nothing of an item. The forward call never raises for an item: ask `status`, or call `unwrap()`.
        monitor: collects a Record of every solve for a derivative.

    Returns:
        The result, with x in the data's dtype and on its device.

    Raises:
        TypeError: for data that are not float32 or float64 tensors.
        ValueError: for shapes that do not fit, or options that mean nothing.

    Reference:
        Judice & Pires 1994 (block principal pivoting); Mehrotra 1992, "On the implementation of a primal-dual interior
        point method"; Amos & Kolter 2017, "OptNet"; Bergounioux, Ito & Kunisch 1999 (primal-dual active sets).

    Example:
        >>> import torch
        >>> from nestopt import constrained
        >>> Q, q = torch.tensor([[4.0, 1.0], [1.0, 2.0]]), torch.ones(2, requires_grad=True)
        >>> z = constrained.solve_qp(Q, q, torch.ones(1, 2), torch.ones(1), low=0.0)
        >>> z.x.detach(), z.equality_dual.detach()
        (tensor([0.2500, 0.7500]), tensor([-2.7500]))
        >>> (z.x @ torch.tensor([1.3, 0.5])).backward()
        >>> q.grad
        tensor([-0.2000,  0.2000])
    """
    tracing = torch.compiler.is_compiling()
    if tracing and not fits_in_graph(degenerate, backend, warm_start, monitor):
        return _solve_qp_untraced(
            Q, q, A, b, G, h, low=low, high=high, backend=backend, degenerate=degenerate, smoothing=smoothing,
            rtol=rtol, max_iter=max_iter, warm_start=warm_start, on_failure=on_failure, monitor=monitor,
        )  # fmt: skip
    _check_options(degenerate, smoothing, rtol, max_iter, on_failure, backend)
    _check_data(Q, q, A, b, G, h)
    n, m_rows = q.shape[-1], 0 if h is None else h.shape[-1]
    G, h = _with_bounds(Q, q, G, h, low, high)
    if b is not None and not b.shape[-1]:
        A = b = None
    if h is not None and not h.shape[-1]:
        G = h = None
    data = [t for t in (Q, q, A, b, G, h) if t is not None]
    batch = broadcast_shapes(Q.shape[:-2], q.shape[:-1], *(t.shape[:-2] for t in (A, G) if t is not None),
                                   *(t.shape[:-1] for t in (b, h) if t is not None))  # fmt: skip
    p, m = 0 if b is None else b.shape[-1], 0 if h is None else h.shape[-1]
    warm = _warm(warm_start, batch, n, p, m, m_rows)
    differentiated = (
        not tracing
        and any(tracked(t, mapped=False) for t in data)
        and (torch.is_grad_enabled() or transformed() or forward_mode())
    )
    rtol = (1e-9 if q.dtype == torch.float64 else 1e-5) if rtol is None else rtol
    bounds_only = m_rows == p == 0 and backend is None
    options = Options(rtol, max_iter, backend, degenerate if differentiated else None, smoothing, bounds_only, monitor)
    if tracing:
        found: tuple[Tensor, ...] = solve_in_graph(
            (Q, q, A, b, G, h), rtol, max_iter, degenerate, bounds_only, on_failure
        )
    else:
        with torch.no_grad():
            inputs = (options, Q, q, A, b, G, h, *warm)
            found = _Solution.apply(*inputs) if transformed() or forward_mode() else find_solution(*inputs)  # type: ignore[no-untyped-call]
    w, value, codes, iterations, error, weak, deficient, *rest = found
    if differentiated:
        sound = not transformed() and bool((codes == Status.CONVERGED.code).all())
        policy = Policy(n, p, m, on_failure, monitor, sound)
        known = (-q, *(t for t in (b, h) if t is not None))
        r = torch.cat([t.expand(*batch, t.shape[-1]) for t in known], -1) if len(known) > 1 else known[0]
        if r.shape != w.shape:
            r = r.expand(w.shape)
        if degenerate == "smoothed":
            w = attach_smoothed(w, rest[0], rest[1], rest[2], (Q, q, A, b, G, h), smoothing, on_failure, monitor)
        else:
            parts = len(SPACES) - 1
            sets: list[Factors] = [(*rest[k : k + parts], codes) for k in range(0, len(rest), parts)]
            solutions = [attach(policy, w, Q, A, G, r, factors) for factors in sets]
            w = solutions[0] if len(solutions) == 1 else 0.5 * (solutions[0] + solutions[1])
        value = value_of(value, w, Q, A, G, r)
    x, nu, lam = w[..., :n], w[..., n : n + p], w[..., n + p :]
    slack = q.new_zeros(*batch, 0) if G is None or h is None else _slack(G, h, x, m_rows)
    bound_dual = None
    if m > m_rows:
        lam, upper, lower = lam[..., :m_rows], lam[..., m_rows : m_rows + n], lam[..., m_rows + n :]
        bound_dual = upper - lower
    if tracing:  # a compiled graph wants cotangents in the strides of its outputs, and they come without gaps
        x, nu, lam = x.contiguous(), nu.contiguous(), lam.contiguous()
    return QPResult(
        x=x, codes=codes, iterations=_number(iterations), error=_number(error), equality_dual=nu, inequality_dual=lam,
        bound_dual=bound_dual, value=value, slack=slack, weakly_active=_number(weak), deficient=_number(deficient),
    )  # fmt: skip


_solve_qp_untraced = untraced(solve_qp)


class _Solution(torch.autograd.Function):
    """`find_solution` under transforms: not differentiated, and a mapped dimension is one more of the batch."""

    @staticmethod
    def forward(options: Options, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return find_solution(options, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)
        ctx.count = len(output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return (None,) * len(ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return (None,) * ctx.count

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], options: Options, *tensors: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        spaces = (2, 1, 2, 1, 2, 1, 1, 1)
        pairs = [(t, d, k) for t, d, k in zip(tensors, in_dims[1:], spaces, strict=True) if t is not None]
        deepest = max(t.ndim - (d is not None) - k for t, d, k in pairs)
        moved: list[Tensor | None] = []
        for t, d, k in zip(tensors, in_dims[1:], spaces, strict=True):
            if t is not None and d is not None:
                t = t.movedim(d, 0)
                t = t.reshape(t.shape[0], *(1,) * (deepest + 1 + k - t.ndim), *t.shape[1:])
            moved.append(t)
        found = _Solution.apply(options, *moved)  # type: ignore[no-untyped-call]
        return found, (0,) * len(found)


def _number(value: Tensor) -> Any:
    return value if transformed() or torch.compiler.is_compiling() else scalar_or_tensor(value)


def _slack(G: Tensor, h: Tensor, x: Tensor, rows: int) -> Tensor:
    """The slack h - G x of the first rows, where an item's NaN reaches no gradient of G that does not ask for it."""
    bad = x.isnan()
    slack = h[..., :rows] - (G[..., :rows, :] @ torch.where(bad, 0, x)[..., None])[..., 0]
    return slack + torch.where(bad, x, 0).sum(-1, keepdim=True)


def _check_options(
    degenerate: str, smoothing: float, rtol: float | None, max_iter: int, on_failure: str, backend: Any
) -> None:
    if degenerate not in ("strong", "active", "mean", "smoothed"):
        raise ValueError(
            f'{OWNER}: degenerate must be "strong", "active", "mean" or "smoothed", but got {degenerate!r}.'
        )
    if not 0 < smoothing < float("inf"):
        raise ValueError(f"{OWNER}: smoothing must be a positive number, but got {smoothing}; use e.g. 1e-6.")
    check_stopping(OWNER, rtol, 0.0, max_iter)
    check_on_failure(OWNER, on_failure)
    if backend is not None and not isinstance(backend, Backend):
        kind = backend.__name__ if isinstance(backend, type) else type(backend).__name__
        raise TypeError(f"{OWNER}: backend must be an instance such as ProxQP(), but got {kind}.")


def _check_data(Q: Tensor, q: Tensor, A: Tensor | None, b: Tensor | None, G: Tensor | None, h: Tensor | None) -> None:
    """Refuse what is no program, by the argument's name."""
    given = {"Q": Q, "q": q, "A": A, "b": b, "G": G, "h": h}
    for name, t in given.items():
        if t is None and name not in ("Q", "q"):
            continue
        if not isinstance(t, Tensor) or t.dtype not in (torch.float32, torch.float64):
            kind = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{OWNER}: {name} must be a float32 or float64 tensor, but got {kind}.")
        if t.dtype != Q.dtype or t.device != Q.device:
            raise ValueError(
                f"{OWNER}: {name} is {t.dtype} on {t.device}, but Q is {Q.dtype} on {Q.device}; convert one with .to()."
            )
    if q.ndim < 1:
        raise ValueError(f"{OWNER}: q must have shape (*batch, n), but it is 0-d; use q[None].")
    n = q.shape[-1]
    if not n:
        raise ValueError(f"{OWNER}: q must have at least one variable, but it has shape {tuple(q.shape)}.")
    _check_shape("Q", Q, (n, n), "(*batch, n, n)", f"n = {n} of q")
    for row, limit, names in ((A, b, ("A", "b")), (G, h, ("G", "h"))):
        if (row is None) != (limit is None):
            given_name, missing = names if limit is None else names[::-1]
            raise ValueError(f"{OWNER}: {given_name} is given without {missing}; pass both, or neither.")
        if row is not None and limit is not None:
            if limit.ndim < 1:
                raise ValueError(f"{OWNER}: {names[1]} must have shape (*batch, rows), but it is 0-d.")
            rows = limit.shape[-1]
            _check_shape(names[0], row, (rows, n), "(*batch, rows, n)", f"n = {n} of q and {rows} rows of {names[1]}")
    batches = {name: t.shape[: t.ndim - (2 if name in "QAG" else 1)] for name, t in given.items() if t is not None}
    try:
        broadcast_shapes(*batches.values())
    except RuntimeError as error:
        shapes = ", ".join(f"{name}: {tuple(shape)}" for name, shape in batches.items())
        raise ValueError(f"{OWNER}: the batch dimensions do not broadcast: {shapes}.") from error


def _check_shape(name: str, t: Tensor, expected: tuple[int, int], form: str, reason: str) -> None:
    if t.ndim < 2 or tuple(t.shape[-2:]) != expected:
        raise ValueError(f"{OWNER}: {name} must have shape {form} with {reason}, but it has shape {tuple(t.shape)}.")


def _with_bounds(
    Q: Tensor, q: Tensor, G: Tensor | None, h: Tensor | None, low: Any, high: Any
) -> tuple[Tensor | None, Tensor | None]:
    """The inequalities with rows for the bounds behind them: x <= high, -x <= -low."""
    if low is None and high is None:
        return G, h
    n = q.shape[-1]
    limits = []
    for name, bound, absent in (("high", high, torch.inf), ("low", low, -torch.inf)):
        t = q.new_full((n,), absent) if bound is None else bound
        if not isinstance(t, Tensor):
            t = q.new_tensor(t)
        if t.dtype != q.dtype or t.device != q.device:
            raise ValueError(f"{OWNER}: {name} is {t.dtype} on {t.device}, but Q is {q.dtype} on {q.device}.")
        if t.ndim and t.shape[-1] not in (1, n):
            raise ValueError(
                f"{OWNER}: {name} must be a number or have shape (*batch, n) with n = {n} of q, but it has shape "
                f"{tuple(t.shape)}."
            )
        t = t.expand(*t.shape[:-1], n)
        limits.append(t if name == "high" else -t)
    eye = torch.eye(n, dtype=q.dtype, device=q.device)
    rows = torch.cat([eye, -eye])
    if G is not None and h is not None:
        rows = torch.cat([G, rows.expand(*G.shape[:-2], 2 * n, n)], -2)
        limits = [h, *limits]
    batch = broadcast_shapes(*(t.shape[:-1] for t in limits))
    return rows, torch.cat([t.expand(*batch, t.shape[-1]) for t in limits], -1)


def _warm(
    warm_start: QPResult | None, batch: torch.Size, n: int, p: int, m: int, m_rows: int
) -> tuple[Tensor | None, Tensor | None]:
    if warm_start is None:
        return None, None
    bound = warm_start.bound_dual
    parts: Sequence[Tensor] = [warm_start.equality_dual, warm_start.inequality_dual]
    shapes = [tuple(t.shape) for t in (warm_start.x, *parts)]
    expected = [(*batch, n), (*batch, p), (*batch, m_rows)]
    if shapes != expected or (bound is None) != (m == m_rows):
        raise ValueError(
            f"{OWNER}: warm_start must be a result of the same shapes, x, nu and lam {expected} and bounds alike, but "
            f"it has {shapes}; leave it out."
        )
    if bound is not None:
        parts = [*parts, bound.clamp_min(0), (-bound).clamp_min(0)]
    return warm_start.x.detach(), torch.cat([t.detach() for t in parts], -1)
