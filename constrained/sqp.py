"""Sequential quadratic programming for smooth problems of up to a few hundred variables."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nestopt.linalg import Result, Status, iterate
from nestopt.linalg.autodiff import GraphOperator, gradient, products
from nestopt.linalg.result import check_stopping
from nestopt.linalg.solver import default_rtol
from nestopt.linalg.tree import Ravel

from .problem import KKT, Problem, Rows
from .quadratic_program import solve_qp
from .range_space import EqualityStep, convexity_shift, equality_step

__all__ = ["SQP", "SQPResult", "SQPState"]

_RUNNING = Status.RUNNING.code
_FAR = 1e8  # an iterate longer than this is on its way out


@dataclass(frozen=True, kw_only=True)
class SQPResult(Result):
    """A point that meets, or fails to meet, the optimality conditions of a problem.

    Attributes:
        x: in the structure of x0.
        error: |(L_x, h, min(mu, -G))|, measured at x and the multipliers below.
        tolerance: what it was held against.
        equality_dual: lam, in the structure of the equalities' value, None where the problem has none.
        inequality_dual: mu, likewise.
        bound_dual: in x's structure, positive at upper bounds; None without bounds.
        value: the objective.
        kkt: its four residuals.
        evaluations: values of the objective and the constraints.
        gradients: gradients of the objective.
        products: products with second derivatives.
    """

    tolerance: float
    equality_dual: Any
    inequality_dual: Any
    bound_dual: Any
    value: float
    kkt: KKT
    evaluations: int
    gradients: int
    products: int


@dataclass(frozen=True)
class _Values:
    """The functions at a point, and their violation."""

    v: Tensor
    f: Tensor
    h: Tensor
    G: Tensor

    @property
    def violation(self) -> Tensor:
        return self.h.abs().sum() + self.G.clamp_min(0).sum()

    @property
    def finite(self) -> bool:
        usable = torch.isfinite(self.f) & torch.isfinite(self.h).all()
        return bool(usable & (torch.isfinite(self.G) | torch.isneginf(self.G)).all())


@dataclass(frozen=True, kw_only=True)
class SQPState:
    """Where a run stands.

    Attributes:
        values: the functions at the point.
        lam: multipliers of the equalities.
        mu: multipliers of all inequalities, bounds last.
        slope: f_x.
        h_x: dense, of shape (m, n).
        G_x: dense, of shape (r, n).
        penalty: weight of the violation in the merit function.
        shift: added to W's diagonal, because steps without it were far too long.
        best: the smallest error that a full step has been taken for.
        error: |(L_x, h, min(mu, -G))|.
        codes: Status code.
        iterations: steps taken.
        evaluations: so far.
        gradients: so far.
        products: so far.
    """

    values: _Values = field(repr=False)
    lam: Tensor
    mu: Tensor
    slope: Tensor
    h_x: Tensor
    G_x: Tensor
    penalty: float
    shift: float
    best: float
    error: Tensor
    codes: Tensor
    iterations: Tensor
    evaluations: int
    gradients: int
    products: int


@dataclass(frozen=True)
class SQP:
    """Minimise f(x) subject to h(x) = 0, g(x) <= 0 and bounds, by Newton's method on the optimality conditions.

    At (x, lam, mu) the step d, and the next multipliers, come from the quadratic program

        min d'W d / 2 + f_x'd,   h + h_x d = 0,   G + G_x d <= 0,   W = L_xx,

    G the inequalities with the bounds. Its active rows are first guessed as those with mu > -G, which is right near a
    solution and makes the program one linear system (range and null space of the active rows, so that dependent rows
    and a singular W are no obstacle: steps and multipliers are then the shortest); where the guess fails `solve_qp`
    finds them. Where W is not positive on the null space it is shifted until it is, and
    after steps that had to be cut short it is shifted further. The step is halved until the merit
    f + rho (|h|_1 + |G+|_1), rho above every multiplier, falls; a full step that halves the error is taken whatever
    the merit says, so that curved constraints do not cut Newton's steps short (Maratos). A quadratic program
    that has no point is solved with slacks, whose sum it minimises; where that leads nowhere the run is INFEASIBLE.

    `error` is |(L_x, h, min(mu, -G))|, measured at the point returned; CONVERGED means error <= max(rtol scale, atol)
    with scale = max(1, |f_x|) at x0. Second-order convergence: 3 to 10 steps, 1 to 3 from a warm start.

    Cost of a step: one value and gradient of f, one backward pass a row of h and g, n products with L_xx (as one batch)
    and O(n^3) operations: for up to a few hundred variables.

    Args:
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in the units of f_x and of the constraints.
        max_iter: limit of steps.

    Raises:
        ValueError: for a negative tolerance or limit.

    Reference:
        Nocedal & Wright 2006, algorithm 18.3 and section 18.1 (active rows from a quadratic program).

    Example:
        >>> from nestopt.constrained import Problem
        >>> problem = Problem(lambda x: ((x - 2) ** 2).sum() / 2, inequality=lambda x: x.square().sum() - 2)
        >>> res = SQP()(problem, torch.zeros(2, dtype=torch.float64))
        >>> res.x, res.status.name, round(res.inequality_dual.item(), 8)
        (tensor([1.0000, 1.0000], dtype=torch.float64), 'CONVERGED', 0.5)
    """

    rtol: float | None = None
    atol: float = 0.0
    max_iter: int = 100

    def __post_init__(self) -> None:
        check_stopping("SQP", self.rtol, self.atol, self.max_iter)

    def __call__(
        self,
        problem: Problem,
        x0: Any,
        *,
        equality_dual: Any = None,
        inequality_dual: Any = None,
        bound_dual: Any = None,
        tolerance: float | None = None,
    ) -> SQPResult:
        """Solve from x0.

        Args:
            problem: smooth, its functions of x alone.
            x0: where to start, a tensor or a pytree of tensors; it need not be feasible.
            equality_dual: multipliers to start from; None for zero.
            inequality_dual: likewise.
            bound_dual: likewise.
            tolerance: absolute tolerance for the error, in place of rtol and atol.

        Returns:
            The result; a failed run is a status, never an exception.

        Raises:
            TypeError: if the objective returns no floating tensor.
            ValueError: for structures, shapes or dtypes that do not fit.
        """
        rows = Rows.of(problem, x0, (), 0)
        v, lam, mu = (part.detach() for part in rows.join(x0, equality_dual, inequality_dual, bound_dual))
        state = self._evaluate(rows, v, lam, mu)
        scale = state.slope.norm().clamp_min(1)
        rtol = default_rtol(v.dtype) if self.rtol is None else self.rtol
        limit = torch.clamp_min(rtol * scale, self.atol) if tolerance is None else v.new_tensor(tolerance)
        state = iterate(lambda s: self._step(rows, s), state, max_iter=self.max_iter, tolerance=limit)
        with torch.no_grad():
            kkt = rows.kkt(state.values.v, state.lam, state.mu, problem.bounds, ())
        x, lam_tree, mu_tree, z = rows.split(state.values.v, state.lam, state.mu)
        return SQPResult(
            x=x, codes=state.codes, iterations=int(state.iterations), error=float(state.error), state=state,
            tolerance=float(limit), equality_dual=lam_tree, inequality_dual=mu_tree, bound_dual=z,
            value=float(state.values.f), kkt=kkt, evaluations=state.evaluations, gradients=state.gradients,
            products=state.products,
        )  # fmt: skip

    def _evaluate(self, rows: Rows, v: Tensor, lam: Tensor, mu: Tensor) -> SQPState:
        leaf = v.detach().requires_grad_()
        f, h, G = rows.functions(leaf, rows.problem.bounds, ())
        (slope,) = gradient(f, [leaf])
        own = rows.g.size if rows.g else 0
        h_x, g_x = (_jacobian(part, leaf) for part in (h, G[:own]))
        eye = torch.eye(len(v), dtype=v.dtype, device=v.device)
        low, high = rows.problem.bounds or (None, None)
        G_x = torch.cat([g_x, *([] if low is None else [-eye]), *([] if high is None else [eye])])
        values = _Values(v, f.detach(), h.detach(), G.detach())
        error = _error(values, slope, h_x, G_x, lam, mu)
        running = torch.tensor(_RUNNING if values.finite else Status.NON_FINITE.code)
        return SQPState(
            values=values, lam=lam, mu=mu, slope=slope, h_x=h_x, G_x=G_x, penalty=0.0, shift=0.0, best=torch.inf,
            error=error, codes=running, iterations=torch.tensor(0), evaluations=1, gradients=1, products=0,
        )  # fmt: skip

    def _step(self, rows: Rows, s: SQPState) -> SQPState:
        n = len(s.slope)
        W = _curvature(rows, s)
        W = W + s.shift * torch.eye(n, dtype=W.dtype, device=W.device)
        s = replace(s, products=s.products + n, gradients=s.gradients + 1, evaluations=s.evaluations + 1)
        if not bool(torch.isfinite(W).all()):
            return replace(s, codes=torch.tensor(Status.NON_FINITE.code), iterations=s.iterations + 1)
        found = _direction(W, s)
        if isinstance(found, Status):
            return replace(s, codes=torch.tensor(found.code), iterations=s.iterations + 1)
        d, lam, mu, predicted = found
        largest = max((float(part.abs().amax()) for part in (lam, mu) if len(part)), default=0.0)
        penalty = s.penalty if s.penalty >= 1.1 * largest else 2 * largest
        now, before = s.values, float(s.values.violation)
        if predicted >= 0.9999 * before > 1e-9 * max(1.0, float(now.v.norm())):
            # the least violation of the linearized constraints is that of the point: it is stationary for the violation
            return replace(s, codes=torch.tensor(Status.INFEASIBLE.code), iterations=s.iterations + 1)
        if predicted > 1e-12 * max(1.0, before):  # slacks were needed: the violation has to fall first
            drop = float(s.slope @ d) + 0.5 * float(d @ W @ d).__abs__()
            penalty = max(penalty, 2 * drop / (before - predicted))
        merit = float(now.f) + penalty * before
        fall = float(s.slope @ d) - penalty * (before - predicted)
        eps = torch.finfo(d.dtype).eps
        noise = 10 * eps * (abs(float(now.f)) + penalty * (before + float(_magnitude(now))))
        size, best = 1.0, min(s.best, float(s.error))
        for _ in range(40):
            trial = self._evaluate(rows, now.v + size * d, s.lam + size * (lam - s.lam), s.mu + size * (mu - s.mu))
            s = replace(s, evaluations=s.evaluations + 1, gradients=s.gradients + 1)
            good = float(trial.values.f) + penalty * float(trial.values.violation)
            falls = good <= merit + 1e-4 * size * min(fall, 0.0) + noise
            halves = size == 1.0 and float(trial.error) <= 0.5 * best
            if trial.values.finite and (falls or halves):
                break
            size *= 0.5
        else:
            return replace(s, codes=torch.tensor(Status.LINE_SEARCH_FAILED.code), iterations=s.iterations + 1)
        tiny = float(d.norm()) * size <= 4 * eps * max(float(now.v.norm()), 1.0)
        if tiny and float(trial.error) >= 0.5 * float(s.error):  # what is left is rounding
            kept = s if float(s.error) <= float(trial.error) else trial
            return replace(
                kept, codes=torch.tensor(Status.STAGNATED.code), iterations=s.iterations + 1,
                evaluations=s.evaluations, gradients=s.gradients, products=s.products,
            )  # fmt: skip
        far = float(trial.values.v.norm()) > _FAR * max(1.0, float(trial.slope.norm()))
        return replace(
            trial, codes=torch.tensor(Status.UNBOUNDED.code) if far else trial.codes,
            penalty=penalty, shift=_next_shift(s, size), best=best, iterations=s.iterations + 1,
            evaluations=s.evaluations, gradients=s.gradients, products=s.products,
        )  # fmt: skip


def _next_shift(s: SQPState, size: float) -> float:
    """More after steps that had to be cut short, less after full ones, none in the end."""
    unit = float(s.slope.norm()) / max(1.0, float(s.values.v.norm()))
    if size <= 0.25:
        return max(10 * s.shift, 1e-2 * unit)
    shift = 0.1 * s.shift if size == 1.0 else s.shift
    return shift if shift > 1e-6 * unit else 0.0


def _error(values: _Values, slope: Tensor, h_x: Tensor, G_x: Tensor, lam: Tensor, mu: Tensor) -> Tensor:
    stationarity = slope + lam @ h_x + mu @ G_x
    size: Tensor = torch.cat([stationarity, values.h, torch.minimum(mu, -values.G)]).norm()
    return size


def _magnitude(values: _Values) -> Tensor:
    return torch.cat([values.v.new_zeros(1), values.h, values.G.clamp_min(0), values.v]).abs().amax()


def _jacobian(outputs: Tensor, leaf: Tensor) -> Tensor:
    if not len(outputs):
        return leaf.new_zeros(0, len(leaf))
    eye = torch.eye(len(outputs), dtype=leaf.dtype, device=leaf.device)
    return products([outputs], [leaf], [eye], batched=True)[0].detach()


def _curvature(rows: Rows, s: SQPState) -> Tensor:
    """L_xx, dense."""
    leaf = s.values.v.detach().requires_grad_()
    value = rows.lagrangian(leaf, s.lam, s.mu, rows.problem.bounds, ())
    ravel = Ravel.of(leaf, "x")
    operator = GraphOperator(
        gradient(value, [leaf], create_graph=True), [leaf], ravel, ravel, symmetric=True, chunk_size=64
    )
    W = operator.to_dense().detach()
    return (W + W.mT) / 2


def _direction(W: Tensor, s: SQPState) -> tuple[Tensor, Tensor, Tensor, float] | Status:
    """The step, the next multipliers, and the violation that the linearized constraints are left with."""
    h, G = s.values.h, s.values.G
    m, active = len(h), s.mu > -G
    step = equality_step(W, s.slope, torch.cat([s.h_x, s.G_x[active]]), torch.cat([h, G[active]]))
    guess = _guess(s, step, active)
    if guess is not None:
        return (*guess, 0.0)
    used = ~torch.isneginf(G)
    convex = W + convexity_shift(W) * torch.eye(len(W), dtype=W.dtype, device=W.device)
    options: Any = {"A": s.h_x if m else None, "b": -h if m else None}
    mu = torch.zeros_like(s.mu)
    for k in range(3):  # a singular W may leave the program unbounded where the problem is not
        program = solve_qp(convex, s.slope, **options, G=s.G_x[used], h=-G[used])
        if program.status is not Status.UNBOUNDED:
            break
        unit = float(s.slope.norm()) / max(1.0, float(s.values.v.norm()))
        convex = convex + 10.0 ** (k - 2) * unit * torch.eye(len(W), dtype=W.dtype, device=W.device)
    if program.status is Status.INFEASIBLE or float(program.x.norm()) > _FAR * max(1.0, float(s.values.v.norm())):
        return _relaxed(convex, s, used)
    if program.status is Status.NON_FINITE or not bool(torch.isfinite(program.x).all()):
        return Status.NON_FINITE if program.status is Status.NON_FINITE else Status.UNBOUNDED
    mu[used] = program.inequality_dual
    return program.x, program.equality_dual, mu, 0.0


def _guess(s: SQPState, step: EqualityStep, active: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """The solution of the quadratic program if the active rows are these, None if they are not."""
    if not step.solved or float(step.d.norm()) > _FAR * max(1.0, float(s.values.v.norm())):
        return None
    m, G = len(s.lam), s.values.G
    mu = torch.zeros_like(s.mu)
    mu[active] = step.dual[m:]
    after = (G + s.G_x @ step.d)[~active]
    eps = torch.finfo(mu.dtype).eps
    slack = 100 * eps * max(1.0, float(step.d.abs().amax()) * float(s.G_x.abs().amax()) if len(G) else 1.0)
    least = 100 * eps * max(1.0, float(step.dual.abs().amax()) if len(step.dual) else 1.0)
    if bool((mu < -least).any()) or bool((after > slack).any()):
        return None
    return step.d, step.dual[:m], mu.clamp_min(0)


def _relaxed(W: Tensor, s: SQPState, used: Tensor) -> tuple[Tensor, Tensor, Tensor, float] | Status:
    """The step that leaves the linearized constraints with the least violation, by a slack for every row."""
    n, m, h, G, G_x = len(s.slope), len(s.lam), s.values.h, s.values.G[used], s.G_x[used]
    r = len(G)
    rho = 10 * (1 + float(s.slope.abs().amax()) + float(W.abs().amax()))
    size = n + 2 * m + r
    Q = W.new_zeros(size, size)
    Q[:n, :n] = W + 1e-6 * float(W.abs().amax() + 1) * torch.eye(n, dtype=W.dtype, device=W.device)
    q = torch.cat([s.slope / rho, W.new_ones(2 * m + r)])
    eye_m, eye_r = (torch.eye(k, dtype=W.dtype, device=W.device) for k in (m, r))
    A = torch.cat([s.h_x, eye_m, -eye_m, W.new_zeros(m, r)], 1) if m else None
    rows = torch.cat([G_x, W.new_zeros(r, 2 * m), -eye_r], 1)
    reach = s.values.v.abs().amax().clamp_min(1).expand(n)  # a nearly dependent row asks for a step without end
    low = torch.cat([-reach, W.new_zeros(2 * m + r)])
    high = torch.cat([reach, W.new_full((2 * m + r,), torch.inf)])
    program = solve_qp(Q / rho, q, A, -h if m else None, rows, -G, low=low, high=high)
    if program.status is not Status.CONVERGED:
        return Status.NON_FINITE if program.status is Status.NON_FINITE else Status.BREAKDOWN
    mu = torch.zeros_like(s.mu)
    mu[used] = rho * program.inequality_dual
    return program.x[:n], rho * program.equality_dual[:m], mu, float(program.x[n:].sum())
