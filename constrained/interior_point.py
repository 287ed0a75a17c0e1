"""A primal-dual interior-point method for batches of dense quadratic programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from nestopt.linalg.result import Status, all_of, evolve, is_running, iterate

__all__ = ["InteriorPoint", "PathState", "Program", "Scaling", "amax", "broadcast_shapes", "product"]


@dataclass(frozen=True, eq=False)
class Scaling:
    """What equilibration did: x = self.x * scaled x, y = self.y * scaled y, scaled d = self.d * d.

    Attributes:
        x: shape (B, n).
        y: shape (B, p + m).
        d: shape (B, p + m).
        columns: S in the scaled KKT matrix S K S, for x: shape (B, n).
        rows: the same for the rows, shape (B, p + m).
    """

    x: Tensor
    y: Tensor
    d: Tensor
    columns: Tensor
    rows: Tensor


@dataclass(frozen=True, eq=False)
class Program:
    """A flat batch of programs min x'Qx/2 + q'x, C x = d in the first p rows and C x <= d in the others.

    Attributes:
        Q: shape (B, n, n), symmetric.
        q: shape (B, n).
        C: shape (B, p + m, n), equalities first.
        d: shape (B, p + m).
        p: number of equalities.
        roomy: whether an active system's matrix and factors lie in front of memory that would hold all rows.
    """

    Q: Tensor
    q: Tensor
    C: Tensor
    d: Tensor
    p: int
    roomy: bool = False

    @property
    def m(self) -> int:
        """Number of inequalities."""
        return self.C.shape[-2] - self.p

    def take(self, rows: Tensor) -> Program:
        """The programs with these indices."""
        return replace(self, Q=self.Q[rows], q=self.q[rows], C=self.C[rows], d=self.d[rows])

    def error(self, x: Tensor, y: Tensor) -> Tensor:
        """The largest residual of the KKT conditions, each in units of what it is summed from, or of 1.

        Args:
            x: shape (B, n).
            y: duals, shape (B, p + m).

        Returns:
            Shape (B,): the largest of stationarity, feasibility, the sign of the duals, and complementarity.
        """
        Qx, Cx, Cy = product(self.Q, x), product(self.C, x), product(self.C.mT, y)
        dual = amax((Qx + self.q + Cy).abs()) / torch.maximum(amax(Qx.abs()), amax(Cy.abs())).clamp_min(1)
        gap, lam = Cx - self.d, y[:, self.p :]
        slack = -gap[:, self.p :]
        broken = torch.cat([gap[:, : self.p].abs(), (-slack).clamp_min(0)], -1) / self.d.abs().clamp_min(1)
        size = (x * (0.5 * Qx + self.q)).sum(-1).abs().clamp_min(1)
        complementarity = (lam * slack).abs().sum(-1) / size
        signs = amax(-lam) / amax(y.abs()).clamp_min(1)
        return torch.stack([dual, amax(broken), complementarity, signs]).amax(0).where(~dual.isnan(), torch.nan)

    def equilibrate(self) -> tuple[Program, Scaling]:
        """The same programs with rows and columns of their KKT matrices near 1, and solutions near 1.

        Returns:
            The scaled programs and how they are scaled.
        """
        P, C = self.Q.abs(), self.C.abs()
        # Ruiz, two sweeps: the square root of the largest entry, in turn for all rows and columns
        column, row = _fit(P.amax(-1), amax(C), C)
        largest = (P * column[:, None]).amax(-1) * column
        rows = C.mul_(column[:, None])
        shrink, fit = _fit(largest, amax(rows) * row, rows.mul_(row[..., None]))
        column, row = column * shrink, row * fit
        Q = (self.Q * column[:, None]).mul_(column[..., None])
        C = torch.mul(self.C, column[:, None], out=C).mul_(row[..., None])
        q, d = self.q * column, self.d * row
        # objective and right-hand sides in units of the solution: x of the order of b, of h, or of the free minimiser
        size_q, size_d = amax(q.abs()), d.abs()
        size_Q = torch.maximum(Q.amax(-1), -Q.amin(-1)).amax(-1)
        free = torch.where(size_Q > 0, size_q / size_Q, torch.inf)
        unit = torch.maximum(amax(size_d[:, : self.p]), torch.minimum(amax(size_d[:, self.p :]), free))
        unit = torch.where(
            (unit > 0) & torch.isfinite(unit), unit, torch.where((free > 0) & (free < torch.inf), free, 1)
        )
        cost = torch.maximum(size_Q, size_q / unit)
        cost = torch.where(cost > 0, cost, 1).reciprocal()
        unit, cost = unit[:, None], cost[:, None]
        scaled = replace(self, Q=Q.mul_(cost[..., None]), q=q * (cost / unit), C=C, d=d / unit)
        root = cost.sqrt()
        return scaled, Scaling(column * unit, row * (unit / cost), row / unit, column * root, row / root)


@dataclass(frozen=True, eq=False)
class PathState:
    """A point of every program, the products at it, and what is known of it.

    Attributes:
        x: shape (B, n).
        y: duals of the rows, shape (B, p + m).
        s: slack of the inequalities, shape (B, m), positive.
        Qx: Q x.
        Cx: C x.
        Cy: C'y.
        shift: of the normal matrix, relative to its diagonal.
        codes: Status codes.
        iterations: steps taken.
        error: the largest relative KKT residual.
        steps: taken by the batch.
    """

    x: Tensor
    y: Tensor
    s: Tensor
    Qx: Tensor
    Cx: Tensor
    Cy: Tensor
    shift: Tensor
    codes: Tensor
    iterations: Tensor
    error: Tensor
    steps: int = 0


@dataclass(frozen=True)
class InteriorPoint:
    """Mehrotra's predictor-corrector method on equilibrated programs, all items of a batch in step.

    Args:
        program: equilibrated.
        target: complementarity lam s to aim at: 0 for the solution, a tensor (B, m) for a point of the central path.
        floor: the smallest complementarity of any item and row that a step aims at.

    Reference:
        Mehrotra 1992; Vandenberghe 2010, "The CVXOPT linear and quadratic cone program solvers" (starting point).
    """

    program: Program
    target: float | Tensor = 0.0
    floor: float = 1e-10

    @cached_property
    def quadratic(self) -> Tensor:
        """Q + A'A: A dx is known in each step, so A'A changes no solution, and makes definite what A makes so."""
        P = self.program
        A = P.C[:, : P.p]
        return torch.baddbmm(P.Q, A.mT, A) if P.p else P.Q

    @cached_property
    def weights(self) -> Tensor:
        """Of the rows' residuals."""
        return self.program.d.abs().clamp_min(1).reciprocal()

    def solve(
        self,
        tolerance: float,
        max_iter: int,
        start: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> PathState:
        """Run from the starting point.

        Args:
            tolerance: of the relative KKT residual.
            max_iter: limit of steps.
            start: (x, y, s) with positive slack and inequality duals; None for the method's own.

        Returns:
            The last state; no item RUNNING.
        """
        state = self.init() if start is None else self.evaluate(*start)
        limit = torch.full_like(state.error, tolerance)
        return iterate(self.step, state, max_iter=max_iter, tolerance=limit)

    def init(self) -> PathState:
        """The least-squares slack of CVXOPT's starting point, shifted into the interior."""
        P = self.program
        ones = P.d.new_ones(P.d.shape[0], P.m)
        solve = self._factorise(ones, P.d.new_full(P.d.shape[:1], 100 * _least_shift(P.d)))[0]
        G, h = P.C[:, P.p :], P.d[:, P.p :]
        x, nu = solve(product(G.mT, h) - P.q, P.d[:, : P.p])
        gap = h - product(G, x)
        low, high = amax(-gap, -torch.inf)[:, None], amax(gap, -torch.inf)[:, None]
        s = torch.where(low < 0, gap, gap + (1 + low))
        lam = torch.where(high < 0, -gap, -gap + (1 + high))
        # at least 1e-3: an entry that starts at the boundary stays there
        floor = 1e-3
        return self.evaluate(x, torch.cat([nu, lam.clamp_min(floor)], -1), s.clamp_min(floor))

    def evaluate(self, x: Tensor, y: Tensor, s: Tensor, before: PathState | None = None) -> PathState:
        """The state at a point.

        Args:
            x: shape (B, n).
            y: shape (B, p + m).
            s: shape (B, m).
            before: the state before, whose codes and shift go on.

        Returns:
            The state.
        """
        P = self.program
        Qx, Cx, Cy = product(P.Q, x), product(P.C, x), product(P.C.mT, y)
        residual = torch.stack([Qx + P.q + Cy, Qx, Cy]).abs_()
        sizes = residual.amax(-1) if residual.shape[-1] else residual.sum(-1)
        dual = sizes[0] / sizes[1:].amax(0).clamp_min(1)
        gap = Cx - P.d
        gap[:, P.p :] += s
        primal = amax((gap * self.weights).abs_())
        products = y[:, P.p :] * s
        value = (x * (0.5 * Qx + P.q)).sum(-1)
        size = value.abs().clamp_min(1)
        if isinstance(self.target, Tensor):
            complementarity = amax((products - self.target).abs() / self.target)
        else:
            complementarity = products.sum(-1) / size
        error = torch.maximum(torch.maximum(dual, primal), complementarity)
        if before is None:
            zeros = torch.zeros_like(error, dtype=torch.int64)
            return PathState(x, y, s, Qx, Cx, Cy, torch.full_like(error, _least_shift(error)), zeros, zeros, error)
        codes, steps = before.codes, before.steps + 1
        if steps >= 8 and steps % 4 == 0:  # a program with a solution has mostly ended by then
            codes = self._certify(codes, x, y, Qx, Cx, Cy, primal, dual)
        return evolve(before, x=x, y=y, s=s, Qx=Qx, Cx=Cx, Cy=Cy, codes=codes, error=error, steps=steps)

    def _certify(
        self, codes: Tensor, x: Tensor, y: Tensor, Qx: Tensor, Cx: Tensor, Cy: Tensor, primal: Tensor, dual: Tensor
    ) -> Tensor:
        """Name the items whose iterates run off along a certificate: Farkas' y, or a direction x of recession."""
        P = self.program
        farkas, descent = -(P.d * y).sum(-1), -(P.q * x).sum(-1)
        infeasible = (farkas > 0) & (amax(Cy.abs()) <= CERTIFICATE * farkas) & (primal > CERTIFICATE)
        leak = torch.maximum(amax(Qx.abs()), amax(Cx[:, : P.p].abs()))
        leak = torch.maximum(leak, amax(Cx[:, P.p :]))
        unbounded = (descent > 0) & (leak <= CERTIFICATE * descent) & (dual > CERTIFICATE)
        running = is_running(codes)
        codes = torch.where(running & infeasible, Status.INFEASIBLE.code, codes)
        return torch.where(running & ~infeasible & unbounded, Status.UNBOUNDED.code, codes)

    def step(self, state: PathState) -> PathState:
        """Move, then evaluate.

        Args:
            state: a state.

        Returns:
            The next one; items that are not RUNNING stand still.
        """
        P = self.program
        p = P.p
        lam = state.y[:, p:]
        s, running = state.s, is_running(state.codes)
        W = lam / s
        solve, broken = self._factorise(W, state.shift)
        G = P.C[:, p:]
        stationarity = state.Qx + P.q + state.Cy
        r_eq, r_in = (P.d - state.Cx)[:, :p], state.Cx[:, p:] + s - P.d[:, p:]
        mu = (lam * s).mean(-1, keepdim=True)

        def direction(excess: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            """The Newton direction that removes all residuals and this much of the products lam s."""
            offset = W * r_in - excess / s
            dx, dnu = solve(-stationarity - product(G.mT, offset), r_eq)
            Gdx = product(G, dx)
            return dx, dnu, offset + W * Gdx, -r_in - Gdx

        products = lam * s
        if isinstance(self.target, Tensor):
            dx, dnu, dlam, ds = direction(products - self.target)
        else:
            _, _, dlam, ds = direction(products)
            length = _longest(s, ds, lam, dlam, 1.0)
            ahead = ((s + length * ds) * (lam + length * dlam)).mean(-1, keepdim=True)
            sigma = (ahead / mu).clamp(0, 1) ** 3
            # the second-order term of a step that is not taken in full is no estimate: in full it makes some runs cycle
            second = length.square() * (ds * dlam)
            # no deeper than the tolerance asks: lam / s grows as 1 / mu, and its rounding is what limits the accuracy
            dx, dnu, dlam, ds = direction(products + second - (sigma * mu).clamp_min(self.floor))
        length = _longest(s, ds, lam, dlam, (1 - mu).clamp(0.99, 0.999))
        fit = ~broken & torch.isfinite(length[:, 0])
        length = torch.where((running & fit)[:, None], length, 0)
        shift, before = state.shift, state
        if not all_of(fit):  # a larger shift, and another attempt
            dx, dnu, dlam, ds = (torch.where(fit[:, None], v, 0) for v in (dx, dnu, dlam, ds))
            shift = torch.where(running & ~fit, shift * 100, shift)
            before = evolve(state, shift=shift)
        x, s = torch.addcmul(state.x, length, dx), torch.addcmul(s, length, ds)
        dy = torch.cat([dnu, dlam], -1) if p else dlam
        moved = self.evaluate(x, torch.addcmul(state.y, length, dy), s, before)
        stuck = running & is_running(moved.codes) & ((shift > 1e-3) | (fit & (length[:, 0] < 1e-9)))
        return evolve(moved, codes=torch.where(stuck, Status.STAGNATED.code, moved.codes))

    def _factorise(self, W: Tensor, shift: Tensor) -> tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], Tensor]:
        """A solver of (Q + G'WG) dx + A'dnu = r, A dx = t, and the items whose factorisation failed."""
        P = self.program
        A, G = P.C[:, : P.p], P.C[:, P.p :]
        normal = torch.baddbmm(self.quadratic, G.mT * W[:, None], G) if P.m else self.quadratic.clone()
        diagonal = normal.diagonal(dim1=-2, dim2=-1)
        diagonal += shift[:, None]
        L, info = torch.linalg.cholesky_ex(normal)
        broken = info > 0
        if not P.p:
            return lambda r, t: (torch.cholesky_solve(r[..., None], L)[..., 0], t), broken
        V = torch.linalg.solve_triangular(L, A.mT, upper=False)
        schur = V.mT @ V
        diagonal = schur.diagonal(dim1=-2, dim2=-1)
        diagonal += shift[:, None]
        L_schur, info = torch.linalg.cholesky_ex(schur)

        def solve(r: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            front = torch.linalg.solve_triangular(L, (r + product(A.mT, t))[..., None], upper=False)
            nu = torch.cholesky_solve(V.mT @ front - t[..., None], L_schur)
            dx = torch.linalg.solve_triangular(L.mT, front - V @ nu, upper=True)
            return dx[..., 0], nu[..., 0]

        return solve, broken | (info > 0)


CERTIFICATE = 1e-9


def _fit(largest: Tensor, heights: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """What brings the largest entries of columns and rows to one, half of the way."""
    if rows.shape[-2]:
        largest = torch.maximum(largest, rows.amax(-2))
    return tuple(torch.where(v > 0, v, 1).rsqrt() for v in (largest, heights))  # type: ignore[return-value]


def _least_shift(like: Tensor) -> float:
    """Of the normal matrix, whose entries are near 1 at the start."""
    return 1e-11 if like.dtype == torch.float64 else 1e-6


def broadcast_shapes(*shapes: torch.Size) -> torch.Size:
    """The shape that all broadcast to."""
    return torch.broadcast_shapes(*shapes)  # type: ignore[no-any-return, no-untyped-call]


def product(matrix: Tensor, vector: Tensor) -> Tensor:
    """Matrices times vectors, item by item."""
    return torch.bmm(matrix, vector.unsqueeze(-1)).squeeze(-1)


def amax(values: Tensor, empty: float = 0.0) -> Tensor:
    """The largest entry of the last dimension; `empty` where it has none."""
    return values.amax(-1) if values.shape[-1] else values.new_full(values.shape[:-1], empty)


def _longest(s: Tensor, ds: Tensor, lam: Tensor, dlam: Tensor, fraction: float | Tensor) -> Tensor:
    """The step, at most 1, that goes this fraction of the way to the boundary; shape (B, 1)."""
    steepest = -torch.minimum(ds / s, dlam / lam).amin(-1, keepdim=True)
    return fraction / torch.clamp(steepest, min=fraction)  # NaN where a direction is
