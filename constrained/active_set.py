"""The KKT system of quadratic programs whose active rows are known: its factors, and the solutions it gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .interior_point import Program, amax, product

__all__ = ["NOTHING", "ActiveSystem", "corrected", "polish"]

# A pivot of an equilibrated matrix that asks for a closer look, and an eigenvalue that is nothing.
SUSPECT, NOTHING = 1e-8, 1e-11


@dataclass(frozen=True, eq=False)
class ActiveSystem:
    """K = [[Q, C'], [C, 0]] with C the equalities and the active inequalities of each item, equilibrated and factored.

    The active rows of an item are gathered in front and padded to the largest count of the batch, so that the matrix is
    no larger than it must be; a padded row is that of -1 times its own unknown.

    Attributes:
        K: shape (*batch, n + p + k, n + p + k), scaled from both sides.
        factors: LU of K, with its null space filled where it is singular.
        pivots: of the LU.
        index: for the k gathered rows, the row of G, shape (*batch, k).
        valid: which of them are not padding, shape (*batch, k).
        deficient: whether K is singular, shape (*batch,): solutions are then of minimum norm.
    """

    K: Tensor
    factors: Tensor
    pivots: Tensor
    index: Tensor
    valid: Tensor
    deficient: Tensor

    @classmethod
    def of(cls, P: Program, active: Tensor, least: int = 0) -> ActiveSystem:
        """Gather and factorise.

        Args:
            P: equilibrated programs.
            active: which inequalities hold with equality, boolean, shape (B, m).
            least: of the rows gathered, so that systems of two calls fit together.

        Returns:
            The system.
        """
        n, p = P.q.shape[-1], P.p
        k = min(max(int(active.sum(-1).max()), least), P.m) if active.numel() else 0
        index = active.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :k]
        valid = active.gather(-1, index)
        rows = P.C[:, p:].gather(1, index[..., None].expand(-1, -1, n)) * valid[..., None]
        C = torch.cat([P.C[:, :p], rows], 1) if p else rows
        size = n + p + k
        K = _square(P, size).zero_()
        K[:, :n, :n], K[:, n:, :n], K[:, :n, n:] = P.Q, C, C.mT
        K.diagonal(dim1=-2, dim2=-1)[:, n + p :] = valid.to(K.dtype) - 1
        if P.roomy:
            pivots, info = (K.new_empty(shape, dtype=torch.int32) for shape in (K.shape[:-1], K.shape[:1]))
            factors, pivots, _ = torch.linalg.lu_factor_ex(K, out=(_square(P, size).mT, pivots, info))
        else:
            factors, pivots, _ = torch.linalg.lu_factor_ex(K)
        weakest = -amax(-factors.diagonal(dim1=-2, dim2=-1).abs(), -1.0)
        deficient = weakest <= SUSPECT
        if bool(deficient.any()):
            factors, pivots, deficient = _filled(K, factors, pivots, deficient)
        return cls(K, factors, pivots, index, valid, deficient)

    def moved(self, P: Program, active: Tensor, also: Tensor) -> ActiveSystem:
        """The system of other active rows, factorised anew only where they differ from the old.

        Args:
            P: equilibrated programs.
            active: boolean, shape (B, m).
            also: items to factorise anyhow, shape (B,).

        Returns:
            The system, this one where nothing differs.
        """
        seen = torch.zeros_like(active, dtype=torch.int8).scatter_add(-1, self.index, self.valid.to(torch.int8))
        rows = (((seen > 0) != active).any(-1) | also).nonzero()[:, 0]
        if not len(rows):
            return self
        if 2 * len(rows) > len(active):
            return ActiveSystem.of(P, active)
        part = ActiveSystem.of(P.take(rows), active[rows], self.index.shape[-1])
        old = self.padded(part.index.shape[-1])
        return ActiveSystem(*(a.index_put((rows,), b) for a, b in zip(old.parts(), part.parts(), strict=True)))

    def parts(self) -> tuple[Tensor, ...]:
        """Its tensors, in the order of the constructor."""
        return self.K, self.factors, self.pivots, self.index, self.valid, self.deficient

    def padded(self, k: int) -> ActiveSystem:
        """The same systems padded to k rows: a block -I behind K and behind its factors."""
        more = k - self.index.shape[-1]
        if not more:
            return self
        size = self.K.shape[-1]
        K, factors = (torch.nn.functional.pad(t, (0, more, 0, more)) for t in (self.K, self.factors))
        for t in (K, factors):
            t.diagonal(dim1=-2, dim2=-1)[..., size:] = -1
        identity = torch.arange(size + 1, size + more + 1, dtype=self.pivots.dtype, device=K.device)
        pivots = torch.cat([self.pivots, identity.expand(*self.pivots.shape[:-1], more)], -1)
        index, valid = (torch.nn.functional.pad(t, (0, more)) for t in (self.index, self.valid))
        return ActiveSystem(K, factors, pivots, index, valid, self.deficient)

    def gather(self, w: Tensor, p: int, n: int) -> Tensor:
        """Of a vector over all rows, the part that the system sees: (..., n + p + m) to (..., n + p + k)."""
        index = self.index.expand(*w.shape[:-1], -1)
        return torch.cat([w[..., : n + p], w[..., n + p :].gather(-1, index) * self.valid], -1)

    def scatter(self, u: Tensor, p: int, n: int, m: int) -> Tensor:
        """The vector over all rows, zero at those that are not active."""
        index = self.index.expand(*u.shape[:-1], -1)
        rest = u.new_zeros(*u.shape[:-1], m).scatter_add(-1, index, u[..., n + p :] * self.valid)
        return torch.cat([u[..., : n + p], rest], -1)

    def solve(self, r: Tensor, refinements: int = 1) -> tuple[Tensor, Tensor]:
        """K u = r by the factors, with steps of iterative refinement on K itself.

        Args:
            r: shape (*batch, n + p + k, columns).
            refinements: steps.

        Returns:
            u and r - K u.
        """
        u = torch.linalg.lu_solve(self.factors, self.pivots, r)
        rest = r - self.K @ u
        for _ in range(refinements):
            u = u + torch.linalg.lu_solve(self.factors, self.pivots, rest)
            rest = r - self.K @ u
        return u, rest


def _square(P: Program, size: int) -> Tensor:
    """Uninitialised matrices of this order for all programs."""
    B, rows = len(P.q), P.q.shape[-1] + P.p + P.m
    if not P.roomy:
        return P.q.new_empty(B, size, size)
    return P.q.new_empty(B * rows * rows)[: B * size * size].view(B, size, size)


def _filled(K: Tensor, factors: Tensor, pivots: Tensor, suspect: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The factors, with the null space of the singular matrices filled: their solutions are of minimum norm."""
    rows = suspect.nonzero()[:, 0]
    matrices = K[rows]
    values, vectors = torch.linalg.eigh(matrices)
    null = values.abs() <= NOTHING * values.abs().amax(-1, keepdim=True)
    basis = vectors * null[:, None]
    # of a right-hand side outside of the range, the solution keeps the part of it in the null space divided by 1e8
    LU, swaps, _ = torch.linalg.lu_factor_ex(matrices + 1e8 * (basis @ basis.mT))
    found = null.any(-1)
    factors, pivots = factors.clone(), pivots.clone()
    factors[rows] = torch.where(found[:, None, None], LU, factors[rows])
    pivots[rows] = torch.where(found[:, None], swaps, pivots[rows])
    return factors, pivots, torch.zeros_like(suspect).index_put((rows,), found)


def corrected(
    P: Program, system: ActiveSystem, x: Tensor, y: Tensor, refinements: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The solution of the system nearest to a point, by one solve for the difference.

    Args:
        P: equilibrated programs.
        system: of their active rows.
        x: shape (B, n).
        y: shape (B, p + m), zero at rows that are not active.
        refinements: of the difference; where it is nothing but rounding it needs none.

    Returns:
        x, the duals, the duals without negative ones, and the KKT residual of these.
    """
    n, p, m = P.q.shape[-1], P.p, P.m
    start = torch.cat([x, y], -1)
    r = system.gather(torch.cat([-P.q, P.d], -1), p, n)
    r = (r - product(system.K, system.gather(start, p, n)))[..., None]
    correction = torch.linalg.lu_solve(system.factors, system.pivots, r)
    for _ in range(refinements):
        correction = correction + torch.linalg.lu_solve(system.factors, system.pivots, r - system.K @ correction)
    w = start + system.scatter(correction[..., 0], p, n, m)
    new_y = w[:, n:]
    clipped = torch.cat([new_y[:, :p], new_y[:, p:].clamp_min(0)], -1)
    return w[:, :n], new_y, clipped, P.error(w[:, :n], clipped)


def polish(
    P: Program, x: Tensor, y: Tensor, active: Tensor, rounds: int = 6
) -> tuple[Tensor, Tensor, Tensor, ActiveSystem]:
    """Solve the KKT system of the rows that seem active, and correct the guess while that helps.

    A round is one of the primal-dual active set method: rows with a negative dual leave, violated rows enter.

    Args:
        P: equilibrated programs.
        x: shape (B, n), where the correction starts: a solution that is not unique stays near it.
        y: shape (B, p + m), the duals that are kept where nothing better is found.
        active: the first guess, shape (B, m).
        rounds: limit.

    Returns:
        x and y, improved where the KKT residual fell, that residual, and the systems of the last guesses.
    """
    p = P.p
    best, best_x, best_y = P.error(x, y), x, y
    best = torch.where(best.isnan(), torch.inf, best)
    everyone = torch.arange(len(x), device=x.device)
    here, part = everyone, P
    # with some room, so that few rows more do not mean new tensors
    system = all_of_them = ActiveSystem.of(P, active, int(active.sum(-1).max()) + 4 if active.numel() else 0)
    for k in range(rounds):
        if k:
            system = ActiveSystem.of(part, active, all_of_them.index.shape[-1])
            all_of_them = all_of_them.padded(system.index.shape[-1])
            for whole, new in zip(all_of_them.parts(), system.parts(), strict=True):
                whole[here] = new  # in place: these systems are this function's own
        near = y[here] * torch.cat([torch.ones_like(y[here, :p]), active.to(y.dtype)], -1)
        singular = bool(system.deficient.any())
        # from no duals where they are not unique: the solution is then the one of minimum norm
        start = torch.where(system.deficient[:, None], 0, near) if singular else near
        new_x, new_y, clipped, error = corrected(part, system, x[here], start, 2 if singular else 1)
        if k == 0 and singular:
            # from the interior duals: where that one has negative duals, these are near and positive
            other = corrected(part, system, x, near, 2)
            pick = system.deficient & (other[3] < 0.1 * error)
            new_x, new_y, clipped = (
                torch.where(pick[:, None], b, a) for a, b in zip((new_x, new_y, clipped), other[:3], strict=True)
            )
            error = torch.where(pick, other[3], error)
        better = error < best[here]
        rows = here[better]
        best_x, best_y, best = (
            old.index_put((rows,), new[better]) for old, new in ((best_x, new_x), (best_y, clipped), (best, error))
        )
        gap = product(part.C[:, p:], new_x) - part.d[:, p:]
        again = torch.where(active, new_y[:, p:] >= 0, gap > 0)
        left = (best[here] > 1e-13) & (again != active).any(-1)
        if not bool(left.any()):
            break
        here, part, active = here[left], part.take(left), again[left]
    return best_x, best_y, best, all_of_them
