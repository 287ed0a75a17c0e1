"""The derivative of a constrained problem's solution, found by any means."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import optree
import torch
from torch import Tensor

from nestopt.implicit import ImplicitWarning, Monitor, root
from nestopt.implicit.monitor import OnFailure, check_on_failure, report
from nestopt.linalg import LinearSolver, Result, Status
from nestopt.linalg.result import scalar_or_tensor

from .kkt import MinimumNorm, envelope, refine
from .problem import KKT, Problem, Rows
from .spoiled_items import spoil
from .value_only import opaque

__all__ = ["Degenerate", "ProblemSolution", "solution"]

Degenerate = Literal["strong", "active", "mean", "smoothed"]


@dataclass(frozen=True, kw_only=True)
class ProblemSolution(Result):
    """A solution of a constrained problem, attached to the graph of the problem's parameters.

    Attributes:
        x: in the structure that was passed in.
        equality_dual: in the structure of the equalities' value, None where the problem has none.
        inequality_dual: likewise.
        bound_dual: in x's structure, positive at the upper and negative at the lower bound; None without bounds.
        value: the objective, per item; its first derivative is that of the Lagrangian and needs no solve.
        kkt: the four residuals at the point.
        weak: per item, the number of weakly active rows: at their bound with a multiplier of zero.
        dependent: per item, how many gradients of active constraints are linear combinations of the others.
        error: the largest scaled residual, per item.
    """

    equality_dual: Any
    inequality_dual: Any
    bound_dual: Any
    value: Tensor
    kkt: KKT
    weak: Tensor
    dependent: Tensor


def solution(
    problem: Problem,
    x: Any,
    *theta: Any,
    equality_dual: Any = None,
    inequality_dual: Any = None,
    bound_dual: Any = None,
    degenerate: Degenerate = "strong",
    smoothing: float = 1e-6,
    batch_dims: int = 0,
    solver: LinearSolver | None = None,
    on_failure: OnFailure = "raise",
    monitor: Monitor | None = None,
    tolerance: float | None = None,
    active_tolerance: float | None = None,
) -> ProblemSolution:
    r"""Return a solution of min f(x, theta), h = 0, g <= 0, low <= x <= high with its derivative in theta attached.

    Let C be the rows of h and those of g and of the bounds that are active at x. With their multipliers, x solves
    L_x = 0, C = 0, whose Jacobian is the symmetric [[L_xx, C_x'], [C_x, 0]]; `implicit.root` attaches the derivative of
    x and of all multipliers, to any order, in theta and in the tensors of the problem's bounds. The value follows by
    the envelope theorem, d value = L_theta d theta. How x was found is never differentiated.

    Multipliers that are not passed are estimated by least squares from the active rows, |f_x + C_x' lam| minimal. The
    point is then certified: its largest scaled KKT residual must not exceed `tolerance`.

    A row is active if its value is at most t in size, and strongly active if its multiplier is above t as well, t
    being active_tolerance times max(1, the size of x or of the multipliers). Between the two x has no derivative, only
    one to each side; `weak` counts such rows, and `degenerate` says which number stands for it:

    - "strong": they are left out, as if they were inactive: the derivative to the side where the constraint lets go;
    - "active": they are held as equalities: the derivative to the other side (of a single such row);
    - "mean": the mean of both;
    - "smoothed": the derivative of the solution of the perturbed conditions mu s = smoothing, s = -g, for ALL rows. It
      exists everywhere and is continuous in theta; x itself, and its multipliers, are returned unperturbed. For
      min (x - t)^2 / 2, x <= 0, it is dx/dt = (1 - t / sqrt(t^2 + 4 smoothing)) / 2.

    Where gradients of active rows depend on each other (LICQ fails), the multipliers are not unique and the system is
    singular: `dependent` counts such rows, an ImplicitWarning says so, and the derivative is the shortest solution
    (dx, d lam) of the system. A solve without one is SINGULAR: in a backward pass for a single multiplier of several
    that may be exchanged, in forward mode for parameters that move the rows apart (which a backward pass cannot see).

    Cost: one evaluation and one backward pass a row of h and g for the multipliers, and one factorisation; see
    `implicit.root`.

    Args:
        problem: the problem.
        x: the computed solution: a tensor, or a pytree of them, float64 wherever more than 6 digits matter.
        theta: arguments of the problem's functions after x: tensors, or pytrees of tensors and constants.
        equality_dual: lam, None to estimate.
        inequality_dual: mu, None to estimate.
        bound_dual: z, of x's structure, None to estimate.
        degenerate: the derivative at weakly active rows.
        smoothing: the products mu s of "smoothed", in the objective's units; 1e-6 blurs sqrt(1e-6) around a kink.
        batch_dims: leading dimensions of x that count independent problems; the functions map the whole batch.
        solver: of the symmetric system; None takes LU, and for singular systems MINRES-QLP.
        on_failure: "raise", "warn" or "nan" for a point that is not KKT and for solves that fail; see `implicit.root`.
        monitor: collects the records of `implicit.root`.
        tolerance: for the largest scaled residual; None for eps^(3/8) of the dtype, 1.3e-6 in float64.
        active_tolerance: None for eps^(3/8).

    Returns:
        The solution: x, multipliers and value attached, status and counts per item.

    Raises:
        TypeError: see `implicit.root`.
        ValueError: for options that do not exist, shapes that do not fit, and captured tensors; see `implicit.root`.
        SolverError: for a point that is not KKT, with its four residuals, if on_failure says so.

    Reference:
        Fiacco, Introduction to sensitivity and stability analysis in nonlinear programming, 1983; smoothing by central
        path: Chen & Harker 1993, Kanzow 1996.

    Example:
        >>> problem = Problem(lambda x, t: ((x - t) ** 2).sum() / 2, inequality=lambda x, t: x.sum() - 1)
        >>> t = torch.tensor([2.0, 1.0], dtype=torch.float64, requires_grad=True)
        >>> sol = solution(problem, torch.tensor([1.0, 0.0], dtype=torch.float64), t)
        >>> sol.x.tolist(), round(sol.inequality_dual.item(), 12)
        ([1.0, 0.0], 1.0)
        >>> torch.autograd.grad(sol.x[0], t)[0]
        tensor([ 0.5000, -0.5000], dtype=torch.float64)
    """
    _check_options(degenerate, smoothing, tolerance, active_tolerance)
    check_on_failure("solution", on_failure)
    rows = Rows.of(problem, x, theta, batch_dims)
    fixed, bounds = _detached(theta), _detached(problem.bounds)
    with torch.no_grad():
        v, lam, mu = (part.detach() for part in rows.join(x, equality_dual, inequality_dual, bound_dual))
        given = (equality_dual is not None, inequality_dual is not None, bound_dual is not None)
        eps = torch.finfo(v.dtype).eps ** 0.375
        t = eps if active_tolerance is None else active_tolerance
        lam, mu, active, dependent = _estimate(rows, v, lam, mu, given, t, bounds, fixed)
        kkt = rows.kkt(v, lam, mu, bounds, fixed)
        strong = active & (mu > t * _size(lam, mu)[..., None])
        weak = (active & ~strong).sum(-1)
        certify = partial(_certify, on_failure=on_failure, tolerance=eps if tolerance is None else tolerance)
        codes: Tensor = opaque(certify, kkt.scaled.parts.movedim(0, -1), dependent, spaces=(1, 0))
    good = torch.ones_like(codes, dtype=torch.bool)
    if on_failure == "nan":
        good = codes == Status.CONVERGED.code
    start: tuple[Tensor, ...] = tuple(torch.where(good[..., None], part, torch.nan) for part in (v, lam, mu))
    options = _Options(batch_dims, solver or MinimumNorm(), on_failure, monitor)
    if degenerate == "smoothed":
        found = _attach_smoothed(rows, start, smoothing, theta, options)
    else:
        choices = [active] if degenerate == "active" else [strong]
        if degenerate == "mean":
            choices.append(active)
        each = [_attach(rows, start, choice, theta, options) for choice in choices]
        found = each[0] if len(each) == 1 else tuple((a + b) / 2 for a, b in zip(*each, strict=True))
    if on_failure == "nan":  # root has refused what an ill-conditioned system leaves open
        left = good & ~torch.stack([torch.isfinite(part).all(-1) for part in found]).all(0)
        good, codes = good & ~left, torch.where(left, Status.NOT_STATIONARY.code, codes)
    # a failed item's value is taken where it is a number, so that it adds no NaN to derivatives that leave it out
    numbers = [torch.where(torch.isfinite(part), part, 0) for part in (v, lam, mu)]
    safe = [torch.where(good[..., None], part, at) for part, at in zip(found, numbers, strict=True)]
    value = spoil(_value(rows, safe, theta), good)
    parts = rows.split(*found)
    return ProblemSolution(
        x=parts[0], equality_dual=parts[1], inequality_dual=parts[2], bound_dual=parts[3], codes=codes, iterations=0,
        error=kkt.error, value=value, kkt=kkt, weak=weak, dependent=dependent,
    )  # fmt: skip


def _detached(tree: Any) -> Any:
    return optree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


@dataclass(frozen=True)
class _Options:
    batch_dims: int
    solver: LinearSolver
    on_failure: OnFailure
    monitor: Monitor | None

    def root(self, residual: Callable[..., Any], y: Any, *theta: Any, symmetric: bool) -> Any:
        # the point is certified by its KKT residuals: what is left here is the consistency of the smooth equations
        return root(
            residual, y, *theta, solver=self.solver, batch_dims=self.batch_dims, symmetric=symmetric,
            on_failure=self.on_failure, monitor=self.monitor,
        )  # fmt: skip


def _check_options(degenerate: str, smoothing: float, tolerance: float | None, active_tolerance: float | None) -> None:
    if degenerate not in ("strong", "active", "mean", "smoothed"):
        raise ValueError(
            f'solution: degenerate must be "strong", "active", "mean" or "smoothed", but got {degenerate!r}.'
        )
    for name, number in (("smoothing", smoothing), ("tolerance", tolerance), ("active_tolerance", active_tolerance)):
        if number is not None and not number > 0:
            raise ValueError(f"solution: {name} must be a positive number, but got {number}.")


def _size(*vectors: Tensor) -> Tensor:
    parts = [v.abs().amax(-1) for v in vectors if v.shape[-1]]
    return torch.stack(parts).amax(0).clamp_min(1) if parts else vectors[0].new_ones(vectors[0].shape[:-1])


def _estimate(
    rows: Rows, v: Tensor, lam: Tensor, mu: Tensor, given: tuple[bool, bool, bool], t: float, bounds: Any, theta: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The multipliers, the missing ones by least squares; which inequalities are active; dependent active rows."""
    gradient, h_x, G_x = rows.jacobians(v, bounds, theta)
    G = rows.functions(v, bounds, theta)[2]
    active = -t * _size(v)[..., None] <= G
    m, p = lam.shape[-1], rows.g.size if rows.g else 0
    C = torch.cat([h_x, torch.where(active[..., None], G_x, 0)], -2)
    finite = torch.isfinite(C).all(-1).all(-1)
    C = torch.where(finite[..., None, None], C, 0)  # LAPACK refuses NaN by an exception; the residuals say what it was
    dependent = v.new_zeros(rows.batch, dtype=torch.int64)
    if not C.shape[-2]:
        return lam, mu, active, dependent
    lengths = C.square().sum(-1, keepdim=True).sqrt()
    unit = C / torch.where(lengths == 0, 1, lengths)
    held = torch.cat([torch.ones_like(lam, dtype=torch.bool), active], -1)
    sigma = torch.linalg.svdvals(unit)
    tiny = 100 * max(C.shape[-2:]) * torch.finfo(v.dtype).eps
    rank = (sigma > tiny * sigma[..., :1]).sum(-1)
    dependent = torch.where(finite, held.sum(-1) - rank, 0)
    wanted = [*[not given[0]] * m, *[not given[1]] * p, *[not given[2]] * (C.shape[-2] - m - p)]
    if any(wanted):
        mask = torch.tensor(wanted, device=v.device)
        dual = torch.cat([lam, mu], -1)
        left = gradient + torch.einsum("...ri,...r->...i", torch.cat([h_x, G_x], -2), dual)
        free = torch.where(mask[:, None], C, 0)
        estimate = -(torch.linalg.pinv(free.mT, rtol=tiny) @ left[..., None])[..., 0]
        lam, mu = torch.split(dual + estimate, [m, mu.shape[-1]], -1)
    return lam, mu, active, dependent


def _certify(error: Tensor, dependent: Tensor, on_failure: OnFailure, tolerance: float) -> Tensor:
    """Codes of the point, and a word about dependent constraints, where values can be looked at."""
    worst = error.amax(-1)
    codes = torch.where(worst <= tolerance, Status.CONVERGED.code, Status.NOT_STATIONARY.code)
    codes = torch.where(torch.isfinite(worst), codes, Status.NON_FINITE.code)
    if bool((codes != Status.CONVERGED.code).any()):
        item = error.reshape(-1, 4)[int(torch.where(torch.isfinite(worst), worst, torch.inf).flatten().argmax())]
        names = ("stationarity", "primal feasibility", "dual feasibility", "complementarity")
        four = ", ".join(f"{name} {float(part):.1e}" for name, part in zip(names, item, strict=True))
        report(
            f"solution: x is not a KKT point to tolerance={tolerance:.1e}, its scaled residuals are {four}; solve "
            "the problem further, pass its multipliers, or loosen tolerance",
            Result(x=None, codes=codes, iterations=0, error=scalar_or_tensor(worst)), on_failure,
        )  # fmt: skip
    count = int((dependent > 0).sum())
    if count:
        warnings.warn(
            f"solution: the gradients of active constraints depend on each other in {count} of "
            f"{dependent.numel()} problems: the multipliers are not unique, and derivatives are those of minimum "
            "norm; remove redundant constraints for unique ones.",
            ImplicitWarning, stacklevel=2,
        )  # fmt: skip
    return codes


def _attach(rows: Rows, start: tuple[Tensor, ...], held: Tensor, theta: Any, options: _Options) -> tuple[Tensor, ...]:
    """The derivative with the rows of `held` as equalities and every other multiplier zero."""
    problem = rows.problem

    def residual(y: tuple[Tensor, ...], *arguments: Any) -> tuple[Tensor, ...]:
        *theta, bounds, held = arguments
        v, lam, mu = y
        _, h, G = rows.functions(v, bounds, theta)
        # a multiplier that is zero stays out of L_x, so that the system is symmetric
        return rows.gradient(v, lam, torch.where(held, mu, 0), bounds, theta), h, torch.where(held, G, mu)

    y: tuple[Tensor, ...] = options.root(residual, start, *theta, problem.bounds, held, symmetric=True)
    return y


def _attach_smoothed(
    rows: Rows, start: tuple[Tensor, ...], smoothing: float, theta: Any, options: _Options
) -> tuple[Tensor, ...]:
    """The derivative of the perturbed solution, at the unperturbed one."""

    def residual(y: tuple[Tensor, ...], *arguments: Any) -> tuple[Tensor, ...]:
        *theta, bounds = arguments
        v, lam, mu = y
        _, h, G = rows.functions(v, bounds, theta)
        idle = torch.isneginf(G)
        s = -torch.where(idle, -1, G)
        # mu s = smoothing with both positive; as this root it is defined for any mu and s, and Newton converges
        product = (mu + s - torch.sqrt((mu - s) ** 2 + 4 * smoothing)) / 2
        return (
            rows.gradient(v, lam, torch.where(idle, 0, mu), bounds, theta), h, torch.where(idle, mu, product)
        )  # fmt: skip

    arguments: Any = (*theta, rows.problem.bounds)
    leaves, treespec = optree.tree_flatten(arguments)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    sizes = [part.shape[-1] for part in start]

    def flat(y: Tensor, *tensors: Tensor) -> Tensor:
        full = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            full[i] = tensor
        return torch.cat(residual(torch.split(y, sizes, -1), *optree.tree_unflatten(treespec, full)), -1)

    (near,) = refine(flat)(torch.cat(start, -1), *(leaves[i] for i in places))
    attached = options.root(residual, torch.split(near, sizes, -1), *arguments, symmetric=False)
    return tuple(part + (moved - moved.detach()) for part, moved in zip(start, attached, strict=True))


def _value(rows: Rows, found: Sequence[Tensor], theta: Any) -> Tensor:
    """The objective, differentiated as the Lagrangian."""
    arguments: Any = (*theta, rows.problem.bounds)
    leaves, treespec = optree.tree_flatten(arguments)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def lagrangian(v: Tensor, lam: Tensor, mu: Tensor, *tensors: Tensor) -> Tensor:
        full = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            full[i] = tensor
        *theta, bounds = optree.tree_unflatten(treespec, full)
        return rows.lagrangian(v, lam, mu, bounds, theta)

    return envelope(lagrangian, found, [leaves[i] for i in places])
