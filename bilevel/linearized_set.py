"""Projection onto a convex set cut by linear constraints, whose multipliers come with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from nestopt.constrained import NonNegative, Set
from nestopt.constrained.sets import Between
from nestopt.implicit.batched_objective import select
from nestopt.linalg import Status
from nestopt.linalg.autodiff import products
from nestopt.linalg.result import Statuses, any_of, status_of
from nestopt.linalg.tree import Ravel

from .oracle import Oracle

__all__ = [
    "CONVERGED",
    "INFEASIBLE",
    "MAX_ITER",
    "LinearizedSet",
    "Projection",
    "Rows",
    "clip_multipliers",
    "codes_of",
    "each_point",
    "times",
]

_FAR = 1e7  # no point of C within this distance, relative to max(1, |v|): the set counts as empty
_DAMPINGS = (1e-14, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the Newton steps, relative to |J|^2
_NEWTON_STEPS = 200
_RUNNING = Status.RUNNING.code
CONVERGED, MAX_ITER, INFEASIBLE = (s.code for s in (Status.CONVERGED, Status.MAX_ITER, Status.INFEASIBLE))


@dataclass(frozen=True)
class Rows:
    """The scaled constraints' linear model c(w) = J w - offset, inequalities first, with its factorisation.

    Attributes:
        jacobian: J, of shape (p, n), or (*batch, p, n) where each point has its own.
        offset: of shape (*batch, p).
        basis: Q = transform J, whose rows that are not zero are orthonormal and span J's; of shape (*batch, k, n).
        transform: of shape (*batch, k, p).
        inequalities: how many rows are <= 0; the others are = 0.
        affine: whether the model holds everywhere, as far as it was tried.
    """

    jacobian: Tensor
    offset: Tensor
    basis: Tensor
    transform: Tensor
    inequalities: int
    affine: bool

    def values(self, w: Tensor) -> Tensor:
        """J w - offset, of shape (*batch, p)."""
        return times(self.jacobian, w) - self.offset

    def each(self, change: Callable[[Tensor], Tensor]) -> Rows:
        """The models of a batch with its dimensions changed, themselves where one model serves all."""
        if self.jacobian.ndim == 2:
            return self
        return Rows(
            change(self.jacobian), change(self.offset), change(self.basis), change(self.transform), self.inequalities,
            self.affine,
        )  # fmt: skip


@dataclass(frozen=True)
class Projection:
    """A projected point, or a batch of them.

    Attributes:
        point: w, raveled, of shape (*batch, n).
        dual: multipliers of the rows, (*batch, p); where INFEASIBLE, weights with which the rows contradict each other.
        residual: the largest of |w - P_S(v - J'dual)|, the violation, and the complementarity, measured at w.
        codes: Status codes: CONVERGED; INFEASIBLE where the dual proves that no point is near; NON_FINITE; MAX_ITER.
        rows: the constraints' model at w.
        values: the scaled constraints at w: as they are, or those of the model from `onto`.
    """

    point: Tensor
    dual: Tensor
    residual: Tensor
    codes: Tensor
    rows: Rows
    values: Tensor

    @property
    def status(self) -> Status | Statuses:
        """How the projection ended, for each item of a batch."""
        return status_of(self.codes)

    def each(self, change: Callable[[Tensor], Tensor], rows: Rows) -> Projection:
        """The projections of a batch with its dimensions changed, and their models."""
        return Projection(
            change(self.point), change(self.dual), change(self.residual), change(self.codes), rows, change(self.values)
        )

    def item(self, i: int) -> Projection:
        """One of a flat batch."""
        return self.each(lambda part: part[i], self.rows.each(lambda part: part[i]))


class LinearizedSet:
    """The points of S = X x Y that meet linear rows, and the projection onto them.

    min |w - v|^2 / 2 over w in S with J w - d in K has the dual max over mu (mu_g >= 0) of D(mu),
    w(mu) = P_S(v - J'mu), D' = J w(mu) - d. Equations alone are solved by a cached factorisation; else semismooth
    Newton steps on D of the order of the active rows, J P_S' J' mu+ = ..., with a gradient step of size 1/|J|^2
    wherever they do not raise D, so that the iteration ends at the projection from anywhere.
    D > (1e7 max(1, |v|))^2 / 2, met on the way or far along mu, proves that no point is within 1e7 max(1, |v|) of v:
    INFEASIBLE.

    Args:
        oracle: of the problem.
        scales: one positive factor a row.
        inequalities: how many rows are.
        tolerance: on the residual, relative to max(1, |v|).
    """

    def __init__(self, oracle: Oracle, scales: Tensor, inequalities: int, tolerance: float | None = None) -> None:
        self.oracle, self.scales, self.inequalities = oracle, scales, inequalities
        self.sets = oracle.problem.upper_set is not None or oracle.nonsmooth.present
        self.split = oracle.spaces.x.size
        self.tolerance = torch.finfo(scales.dtype).eps ** 0.75 if tolerance is None else tolerance
        problem, spaces = oracle.problem, oracle.spaces
        self.bounds = _joined(_bounds(problem.upper_set, spaces.x), _bounds(problem.lower_set, spaces.y))

    def project_sets(self, w: Tensor) -> Tensor:
        """The nearest point of X x Y."""
        if not self.sets:
            return w
        if self.bounds is not None:
            return torch.clamp(w, *self.bounds)
        if w.ndim > 1:
            return each_point(self.project_sets, w, w.shape[-1:])
        x, y = w[: self.split], w[self.split :]
        return torch.cat([self.oracle.project(x), self.oracle.prox(y, 1.0, x)])

    def onto(self, v: Tensor, rows: Rows) -> Projection:
        """The projection onto S and the linear model of the constraints.

        Args:
            v: raveled (x, y), of shape (*batch, n).
            rows: the model, one for all points or one for each.

        Returns:
            The Projection, its residual and values measured in the model.
        """
        limit = self._limit(v)
        if not rows.offset.shape[-1]:
            none = v.new_zeros(*v.shape[:-1], 0)
            return Projection(
                self.project_sets(v), none, torch.zeros_like(limit), codes_of(0 * limit, limit), rows, none
            )
        if not self.sets and not rows.inequalities:
            gap, w = self._onto_plane(v, rows)
            values = rows.values(w)
            residual = values.norm(dim=-1)
            codes = codes_of(residual, limit)
            lost = codes == MAX_ITER  # what the normal equations leave is orthogonal to J's rows
            dual = torch.where(lost[..., None], values, _back(rows.transform, gap))
            return Projection(w, dual, residual, torch.where(lost, INFEASIBLE, codes), rows, values)
        return self._dual_newton(v, rows, limit)

    def nearest(self, v: Tensor, rows: Rows) -> Tensor:
        """The point of `onto` alone, unmeasured.

        Args:
            v: raveled (x, y), of shape (*batch, n).
            rows: the model, one for all points or one for each.

        Returns:
            Of v's shape.
        """
        if self.sets or rows.inequalities or not rows.offset.shape[-1]:
            return self.onto(v, rows).point
        return self._onto_plane(v, rows)[1]

    def _onto_plane(self, v: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        target = times(rows.transform, rows.offset)
        gap = times(rows.basis, v) - target
        w = v - _back(rows.basis, gap)
        return gap, w - _back(rows.basis, times(rows.basis, w) - target)  # a far v leaves a rounding error

    def _dual_newton(self, v: Tensor, rows: Rows, limit: Tensor) -> Projection:
        J, m = rows.jacobian, rows.inequalities
        size = J.square().sum((-2, -1)).clamp_min(torch.finfo(v.dtype).tiny)  # at least |J|^2
        reach = _FAR * v.norm(dim=-1).clamp_min(1.0)
        mu = v.new_zeros(*v.shape[:-1], J.shape[-2])
        w, slope, value = self._dual(v, rows, mu)
        codes = torch.full_like(limit, _RUNNING, dtype=torch.int64)
        for k in range(_NEWTON_STEPS + 1):
            residual = _complementarity(mu, slope, m)
            empty = value > reach.square() / 2
            if k % 20 == 19:
                empty = empty | self._empty(v, rows, mu, reach)
            ended = torch.where(empty & (residual > limit), INFEASIBLE, codes_of(residual, limit))
            running = codes == _RUNNING
            codes = torch.where(running & ((ended != MAX_ITER) | (k == _NEWTON_STEPS)), ended, codes)
            running = codes == _RUNNING
            if not any_of(running):
                break
            on = torch.ones_like(mu, dtype=torch.bool)
            on[..., :m] = mu[..., :m] + slope[..., :m] > 0
            some = on.reshape(-1, on.shape[-1]).any(0)  # the systems have the rows that are active in any item
            H, right = self._system(v, rows, mu, slope, on, some)
            eye = size[..., None, None] * torch.eye(H.shape[-1], dtype=v.dtype, device=v.device)
            after, pending = (mu, w, slope, value), running
            for damping in _DAMPINGS:
                if damping < 1:
                    trial = torch.where(on, mu, 0.0)
                    trial[..., some] += torch.linalg.solve_ex(H + damping * eye, right)[0]
                else:  # a step of at most the gradient's, which D cannot refuse
                    trial = mu + slope / size[..., None]
                trial = clip_multipliers(trial, m)
                new = (trial, *self._dual(v, rows, trial))
                gain = 1e-4 * torch.linalg.vecdot(slope, trial - mu) - 1e-14 * value.abs()
                taken = pending & ((new[3] >= value + gain) | (damping == _DAMPINGS[-1]))
                mu_, w_, slope_, value_ = (select(taken, b, a) for a, b in zip(after, new, strict=True))
                after = mu_, w_, slope_, value_
                pending = pending & ~taken
                if not any_of(pending):
                    break
            mu, w, slope, value = after
        return Projection(w, mu, residual, codes, rows, slope)

    def _system(
        self, v: Tensor, rows: Rows, mu: Tensor, slope: Tensor, on: Tensor, some: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The semismooth Newton system of the rows in `some`, with ones on the diagonal of rows that are not on."""
        J, here = rows.jacobian, on[..., some]
        C = torch.where(here[..., None], J[..., some, :], 0.0)
        moved = self._derivative(v - _back(J, mu), C)
        H = (moved @ C.mT + C @ moved.mT) / 2 + torch.diag_embed((~here).to(v.dtype))
        given_back = times(moved, _back(J, torch.where(on, 0.0, mu)))  # by the rows that leave
        return H, torch.where(here, slope[..., some] + given_back, 0.0)

    def _empty(self, v: Tensor, rows: Rows, mu: Tensor, reach: Tensor) -> Tensor:
        """Whether D grows beyond the reach along mu, by more than rounding."""
        size = mu.norm(dim=-1).clamp_min(torch.finfo(v.dtype).tiny)
        far = mu * (1e6 * reach.square() / size)[..., None]
        w, slope, value = self._dual(v, rows, far)
        terms = torch.linalg.vecdot(times(rows.jacobian.abs(), w.abs()) + rows.offset.abs(), far.abs())
        grows: Tensor = (value > reach.square() / 2) & (torch.linalg.vecdot(far, slope) > 1e-8 * terms)
        return grows

    def _dual(self, v: Tensor, rows: Rows, mu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w = self.project_sets(v - _back(rows.jacobian, mu))
        slope = rows.values(w)
        return w, slope, (w - v).square().sum(-1) / 2 + torch.linalg.vecdot(mu, slope)

    def _derivative(self, u: Tensor, C: Tensor) -> Tensor:
        """C P_S'(u)."""
        if not self.sets:
            return C
        if self.bounds is not None:
            return torch.where(((u > self.bounds[0]) & (u < self.bounds[1]))[..., None, :], C, 0.0)
        if u.ndim > 1:
            both = zip(u.reshape(-1, u.shape[-1]), C.reshape(-1, *C.shape[-2:]), strict=True)
            return torch.stack([self._derivative(*one) for one in both]).reshape(C.shape)
        leaf = u.detach().clone().requires_grad_()
        with torch.enable_grad():
            image = self.project_sets(leaf)
        return products([image], [leaf], [C], batched=True)[0]

    def _residual(self, v: Tensor, w: Tensor, mu: Tensor, rows: Rows) -> Tensor:
        stationarity = (w - self.project_sets(v - _back(rows.jacobian, mu))).norm(dim=-1)
        return torch.maximum(stationarity, _complementarity(mu, rows.values(w), rows.inequalities))

    def _limit(self, v: Tensor) -> Tensor:
        limit: Tensor = self.tolerance * v.norm(dim=-1).clamp_min(1.0)
        return limit


def times(J: Tensor, w: Tensor) -> Tensor:
    """J w, for one J or one for each w.

    Args:
        J: of shape (p, n), or (*batch, p, n).
        w: of shape (*batch, n).

    Returns:
        Of shape (*batch, p).
    """
    return w @ J.mT if J.ndim == 2 else (J @ w[..., None])[..., 0]


def _back(J: Tensor, mu: Tensor) -> Tensor:
    """J'mu, likewise."""
    return mu @ J if J.ndim == 2 else (J.mT @ mu[..., None])[..., 0]


def each_point(function: Callable[[Tensor], Tensor], w: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A function of one point at a batch of them.

    Args:
        function: of a vector.
        w: of shape (*batch, n).
        shape: of its values.

    Returns:
        Of shape (*batch, *shape).
    """
    found = [function(one) for one in w.reshape(-1, w.shape[-1])]
    return (torch.stack(found) if found else w.new_zeros(0, *shape)).reshape(*w.shape[:-1], *shape)


def _bounds(sets: Any, ravel: Ravel) -> tuple[Tensor, Tensor] | None:
    """The bounds of a pytree of boxes and Nones as two vectors; None where another set is among them."""
    shapes = ravel.shapes
    each = (
        [sets] * len(shapes) if sets is None or isinstance(sets, Set) else optree.tree_leaves(sets, none_is_leaf=True)
    )
    low, high = [], []
    for one, shape in zip(each, shapes, strict=True):
        x = torch.zeros(shape, dtype=ravel.dtype, device=ravel.device)
        if one is None:
            pair = x - torch.inf, x + torch.inf
        elif isinstance(one, NonNegative):
            pair = x, x + torch.inf
        elif isinstance(one, Between) and shape:
            pair = one._bounds(x)
        elif isinstance(one, Between):
            pair = one._bounds(x[None])
        else:
            return None
        low.append(pair[0].expand(shape or (1,)).reshape(-1))
        high.append(pair[1].expand(shape or (1,)).reshape(-1))
    return torch.cat(low), torch.cat(high)


def _joined(first: tuple[Tensor, Tensor] | None, second: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    if first is None or second is None:
        return None
    return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])


def clip_multipliers(mu: Tensor, inequalities: int, radius: float | None = None) -> Tensor:
    """P_Z, Z = [0, r]^p for inequalities, which come first, and [-r, r] for equalities.

    Args:
        mu: of shape (*batch, p).
        inequalities: how many rows are.
        radius: r; None for the signs alone.

    Returns:
        The nearest multipliers of Z.
    """
    g, h = mu[..., :inequalities], mu[..., inequalities:]
    return torch.cat([g.clamp(0, radius), h if radius is None else h.clamp(-radius, radius)], -1)


def _complementarity(mu: Tensor, c: Tensor, inequalities: int) -> Tensor:
    """|(min(mu_g, -g), h)|."""
    m = inequalities
    size: Tensor = torch.cat([torch.minimum(mu[..., :m], -c[..., :m]), c[..., m:]], -1).norm(dim=-1)
    return size


def codes_of(residual: Tensor, limit: Tensor) -> Tensor:
    """CONVERGED, MAX_ITER, or NON_FINITE for each item.

    Args:
        residual: of shape (*batch,).
        limit: what it is held against.

    Returns:
        Status codes.
    """
    codes = torch.where(residual <= limit, CONVERGED, MAX_ITER)
    return torch.where(torch.isfinite(residual) & torch.isfinite(limit), codes, Status.NON_FINITE.code)
