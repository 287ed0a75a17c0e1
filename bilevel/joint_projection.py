"""Projection onto C = {(x, y): x in X, y in Y, g(x, y) <= 0, h(x, y) = 0}, the set that couples both levels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nestopt.linalg import Status
from nestopt.linalg.result import any_of

from .linearized_set import (
    INFEASIBLE,
    MAX_ITER,
    LinearizedSet,
    Projection,
    Rows,
    clip_multipliers,
    codes_of,
    each_point,
    times,
)  # fmt: skip

__all__ = ["JointSet", "Projection", "Rows"]

_HALVINGS = 30
_NAMED = 5  # rows that an error message names one by one


class JointSet(LinearizedSet):
    """C and its projection, first order only: the user's constraints are differentiated, no model is written.

    Affine constraints have one linear model; curved ones are linearised at the last w until nothing moves: the rate is
    |mu| |c''|, so that short steps take a few rounds.

    `project` and `onto` take one point, (n,), or a batch of them, (*batch, n), whose items end by themselves: one that
    has no projection, or a NaN, changes no other.

    Cost: one backward pass a row for each linearisation (one in all for affine constraints), p^2 n operations and two
    projections onto S a Newton step.
    """

    def values(self, w: Tensor) -> Tensor:
        """The scaled constraints at w."""
        if w.ndim > 1:
            return each_point(self.values, w, self.scales.shape)
        return self.scales * self.oracle.constraints(w[: self.split], w[self.split :])

    def jacobian(self, w: Tensor) -> Tensor:
        """That of the scaled constraints and, in a last column, their values."""
        if w.ndim > 1:
            return each_point(self.jacobian, w, (len(self.scales), w.shape[-1] + 1))
        c, c_x, c_y = self.oracle.constraint_jacobian(w[: self.split], w[self.split :])
        return self.scales[:, None] * torch.cat([c_x, c_y, c[:, None]], 1)

    def linearize(self, w: Tensor) -> Rows:
        """The model of the constraints at w."""
        both = self.jacobian(w)
        J, c = both[..., :-1], both[..., -1]
        p, n = J.shape[-2:]
        if self.sets or self.inequalities or not p:  # the factorisation serves equations alone
            basis, transform = J.new_zeros(*J.shape[:-2], 0, n), J.new_zeros(*J.shape[:-2], 0, p)
        else:
            finite = torch.isfinite(J).all(-1).all(-1)[..., None, None]
            U, s, basis = torch.linalg.svd(torch.where(finite, J, 0.0), full_matrices=False)
            kept = s > 1e-10 * s.amax(-1, keepdim=True).clamp_min(torch.finfo(s.dtype).tiny)
            basis = torch.where(kept[..., None], basis, 0.0)
            transform = torch.where(kept, 1 / s, 0.0)[..., None] * U.mT
        return Rows(J, times(J, w) - c, basis, transform, self.inequalities, False)

    def is_affine(self, rows: Rows, w: Tensor, values: Tensor | None = None) -> Tensor:
        """Whether the model holds at w to rounding, which affine constraints must pass at every point.

        Args:
            rows: the model.
            w: point, or batch of points.
            values: the scaled constraints there, if they are known.

        Returns:
            A boolean for each point.
        """
        eps = torch.finfo(w.dtype).eps
        values = self.values(w) if values is None else values
        size = times(rows.jacobian.abs(), w.abs()) + rows.offset.abs() + 1
        fits: Tensor = ((values - rows.values(w)).abs() <= 100 * w.shape[-1] ** 0.5 * eps * size).all(-1)
        return fits

    def probe(self, w: Tensor) -> Rows:
        """The model at w, called affine if it holds at two random points, near and a thousand times as far."""
        rows = self.linearize(w)
        g = torch.Generator().manual_seed(0)
        for size in (1.0, 1e3):
            u = torch.randn(len(w), generator=g, dtype=torch.float64).to(w) * size * w.abs().amax().clamp_min(1.0)
            if not bool(self.is_affine(rows, w + u)):
                return rows
        return replace(rows, affine=True)

    def violation(self, c: Tensor) -> Tensor:
        """|(g_+, h)|, the distance of the constraints' values from what they must be."""
        size: Tensor = clip_multipliers(c, self.inequalities).norm(dim=-1)
        return size

    def project(self, v: Tensor, rows: Rows, rounds: int = 30) -> Projection:
        """The projection of v, with the constraints' model at a nearby point to begin with.

        Args:
            v: raveled (x, y), of shape (*batch, n).
            rows: the model, one for all points or one for each.
            rounds: linearisations of curved constraints.

        Returns:
            The Projection, whose residual is measured with the constraints as they are.
        """
        found = self.onto(v, rows)
        if not rows.offset.shape[-1]:
            return found
        if not rows.affine:
            return self._curved(v, found, torch.ones_like(found.codes, dtype=torch.bool), rounds)
        values = self.values(found.point)
        found = replace(found, values=values)
        bent = ~self.is_affine(rows, found.point, values) & (found.codes != INFEASIBLE)
        bent = bent & torch.isfinite(found.point).all(-1)
        if not any_of(bent):
            return found
        return self._curved(v, replace(found, rows=replace(rows, affine=False)), bent, rounds)

    def _curved(self, v: Tensor, found: Projection, bent: Tensor, rounds: int) -> Projection:
        """The projection of the items whose constraints are bent, linearised again and again; others as they are."""
        batch = v.shape[:-1]

        def flat(part: Tensor) -> Tensor:
            return part.reshape(-1, *part.shape[len(batch) :])

        now, v, on, last = found.each(flat, found.rows.each(flat)), flat(v), flat(bent), v.new_tensor(torch.inf)
        items = list(range(len(on)))
        ended: dict[int, Projection] = {}
        for k in range(rounds + 1):
            ended |= {items[j]: now.item(j) for j in (~on).nonzero()[:, 0].tolist()}
            if not any_of(on):
                break
            items = [items[j] for j in on.nonzero()[:, 0].tolist()]
            v, last = v[on], last[on] if last.ndim else last
            rows = now.rows.each(_taking(on))
            now = self.onto(v, rows) if k else now.each(_taking(on), rows)
            lost = now.codes == INFEASIBLE  # the linear model only: a curved set may have points
            rows, limit = self.linearize(now.point), self._limit(v)
            residual = self._residual(v, now.point, now.dual, rows)
            values = rows.values(now.point)
            now = replace(now, residual=residual, codes=codes_of(residual, limit), rows=rows, values=values)
            on = (residual > limit) & ~lost & ~(residual > 10 * last) & torch.tensor(k < rounds - 1, device=v.device)
            last = torch.minimum(last, residual)
        every = [ended[i] for i in range(len(ended))]

        def joined(name: str, of: list[Any]) -> Tensor:
            parts = [getattr(one, name) for one in of]
            return torch.stack(parts).reshape(batch + parts[0].shape)

        models = [one.rows for one in every]
        names = "jacobian", "offset", "basis", "transform"
        jacobian, offset, basis, transform = (joined(name, models) for name in names)
        return Projection(
            joined("point", every), joined("dual", every), joined("residual", every), joined("codes", every),
            Rows(jacobian, offset, basis, transform, self.inequalities, False), joined("values", every),
        )  # fmt: skip

    def retract(self, v: Tensor, rows: Rows, rounds: int = 20) -> Projection:
        """P_C(v) for affine constraints; for curved ones a point of C that is as near to second order.

        Gauss-Newton steps from the projection onto the model at hand: they converge quadratically, where those of
        `project` converge at the rate |mu| |c''|.

        Args:
            v: raveled (x, y), one point.
            rows: the model at a nearby point of C.
            rounds: steps.

        Returns:
            The Projection; MAX_ITER where a full step does not lower the violation, as v is too far for the model.
        """
        found = self.onto(v, rows)
        if not rows.offset.shape[-1]:
            return found
        if rows.affine:
            values = self.values(found.point)
            if found.status != Status.CONVERGED or bool(self.is_affine(rows, found.point, values)):
                return replace(found, values=values)
        w, limit = found.point, self._limit(v)
        w, rows, size = self._gauss_newton(w, self.linearize(w), limit, rounds, 0)
        return Projection(w, found.dual, size, codes_of(size, limit), rows, rows.values(w))

    def feasible(self, v: Tensor, rounds: int = 100) -> Projection:
        """A point of C near v: the projection for affine constraints, Gauss-Newton steps onto curved ones.

        Args:
            v: raveled (x, y), one point.
            rounds: steps.

        Returns:
            The Projection; INFEASIBLE where the violation stops falling at a point that is no solution, with the
            violations there as its dual.
        """
        w = self.project_sets(v)
        rows = self.probe(w)
        if rows.affine:
            found = self.onto(v, rows)
            values = self.values(found.point)
            ended = found.status in (Status.CONVERGED, Status.INFEASIBLE)
            if ended and bool(self.is_affine(rows, found.point, values)):
                return replace(found, values=values)
            rows = replace(rows, affine=False)
        limit = self._limit(v)
        w, rows, size = self._gauss_newton(w, rows, limit, rounds, _HALVINGS)
        values, codes = rows.values(w), codes_of(size, limit)
        codes = torch.where(codes == MAX_ITER, INFEASIBLE, codes)
        return Projection(w, clip_multipliers(values, self.inequalities), size, codes, rows, values)

    def _gauss_newton(
        self, w: Tensor, rows: Rows, limit: Tensor, rounds: int, halvings: int
    ) -> tuple[Tensor, Rows, Tensor]:
        """Steps of w in S onto its linearised C until the violation is within the limit, or no longer falls."""
        size = self.violation(rows.values(w))
        for _ in range(rounds):
            if not bool(size > limit):
                break
            step, t = self.nearest(w, rows) - w, 1.0
            for _ in range(halvings + 1):  # S is convex, so every point of the segment stays in it
                trial = w + t * step
                model = None if halvings else self.linearize(trial)
                after = self.violation(self.values(trial) if model is None else model.values(trial))
                if bool(after <= (1 - 1e-4 * t) * size):
                    break
                t = t / 2
            if not bool(after < size):
                break
            w, rows, size = trial, self.linearize(trial) if model is None else model, after
        return w, rows, size

    def conflict(self, found: Projection) -> str:
        """The rows that contradict each other, by name, of a Projection that is INFEASIBLE.

        Args:
            found: of one point.

        Returns:
            A part of a sentence.
        """
        weights = found.dual.abs()
        on = (weights > 1e-6 * weights.amax()).nonzero()[:, 0].tolist()
        names = self.oracle.constraint_names(found.point[: self.split], found.point[self.split :])
        rest = f" and {len(on) - _NAMED} more" if len(on) > _NAMED else ""
        within = " within the sets of x and y" if self.sets else ""
        return f"{', '.join(names[i] for i in on[:_NAMED])}{rest}{within}"


def _taking(items: Tensor) -> Callable[[Tensor], Tensor]:
    """Some items of a batch, as a change of its tensors."""
    return lambda part: part[items]
