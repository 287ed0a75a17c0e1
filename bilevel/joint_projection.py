"""Projection onto C = {(x, y): x in X, y in Y, g(x, y) <= 0, h(x, y) = 0}, the set that couples both levels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import optree
import torch
from torch import Tensor

from nestopt.constrained import NonNegative, Set
from nestopt.constrained.sets import Between
from nestopt.linalg import Status
from nestopt.linalg.autodiff import products
from nestopt.linalg.tree import Ravel

from .oracle import Oracle

__all__ = ["JointSet", "Projection", "Rows"]

_FAR = 1e7  # no point of C within this distance, relative to max(1, |v|): the set counts as empty
_HALVINGS = 30
_DAMPINGS = (1e-14, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the Newton steps, relative to |J|^2


@dataclass(frozen=True)
class Rows:
    """The scaled constraints' linear model c(w) = J w - offset, inequalities first, with its factorisation.

    Attributes:
        jacobian: J, of shape (p, n).
        offset: of shape (p,).
        basis: Q = transform J with orthonormal rows, which span J's.
        transform: of shape (rank, p).
        inequalities: how many rows are <= 0; the others are = 0.
        affine: whether the model holds everywhere, as far as it was tried.
    """

    jacobian: Tensor
    offset: Tensor
    basis: Tensor
    transform: Tensor
    inequalities: int
    affine: bool


@dataclass(frozen=True)
class Projection:
    """A projected point.

    Attributes:
        point: w, raveled.
        dual: multipliers of the rows.
        residual: the largest of |w - P_S(v - J'dual)|, the violation, and the complementarity, measured at w.
        status: CONVERGED; INFEASIBLE where the dual proves that no point is near; MAX_ITER otherwise.
        rows: the constraints' model at w.
    """

    point: Tensor
    dual: Tensor
    residual: Tensor
    status: Status
    rows: Rows


class JointSet:
    """C and its projection, first order only: the user's constraints are differentiated, no model is written.

    With the constraints linear, min |w - v|^2 / 2 over w in S = X x Y with J w - d in K has the dual
    max over mu (mu_g >= 0) of D(mu), w(mu) = P_S(v - J'mu), D' = J w(mu) - d. Equations alone are solved by a cached
    factorisation; else semismooth Newton steps on D of the order of the active rows, J P_S' J' mu+ = ..., with a
    gradient step of size 1/|J|^2 wherever they do not raise D, so that the iteration ends at the projection from
    anywhere. D > (1e7 max(1, |v|))^2 / 2, met on the way or far along mu, proves that no point of C is within
    1e7 max(1, |v|) of v: INFEASIBLE. Curved constraints are linearised at the last w until
    nothing moves: the rate is |mu| |c''|, so that short steps take a few rounds.

    Cost: one backward pass a row for each linearisation (one in all for affine constraints), p^2 n operations and two
    projections onto S a Newton step.

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
        x, y = w[: self.split], w[self.split :]
        return torch.cat([self.oracle.project(x), self.oracle.prox(y, 1.0, x)])

    def values(self, w: Tensor) -> Tensor:
        """The scaled constraints at w."""
        return self.scales * self.oracle.constraints(w[: self.split], w[self.split :])

    def linearize(self, w: Tensor, *, affine: bool = False) -> Rows:
        """The model of the constraints at w."""
        c, c_x, c_y = self.oracle.constraint_jacobian(w[: self.split], w[self.split :])
        J = self.scales[:, None] * torch.cat([c_x, c_y], 1)
        U, s, V = torch.linalg.svd(J, full_matrices=False)
        keep = s > 1e-10 * s.amax().clamp_min(torch.finfo(s.dtype).tiny) if len(s) else s > 0
        return Rows(J, J @ w - self.scales * c, V[keep], (U / s.clamp_min(torch.finfo(s.dtype).tiny)).T[keep],
                    self.inequalities, affine)  # fmt: skip

    def is_affine(self, rows: Rows, w: Tensor) -> bool:
        """Whether the model holds at w to rounding, which affine constraints must pass at every point."""
        eps = torch.finfo(w.dtype).eps
        size = rows.jacobian.abs() @ w.abs() + rows.offset.abs() + 1
        return bool(
            ((self.values(w) - (rows.jacobian @ w - rows.offset)).abs() <= 100 * len(w) ** 0.5 * eps * size).all()
        )

    def probe(self, w: Tensor) -> Rows:
        """The model at w, called affine if it holds at two random points, near and a thousand times as far."""
        rows = self.linearize(w)
        g = torch.Generator().manual_seed(0)
        for size in (1.0, 1e3):
            u = torch.randn(len(w), generator=g, dtype=torch.float64).to(w) * size * w.abs().amax().clamp_min(1.0)
            if not self.is_affine(rows, w + u):
                return rows
        return replace(rows, affine=True)

    def violation(self, c: Tensor) -> Tensor:
        """|(g_+, h)|, the distance of the constraints' values from what they must be."""
        size: Tensor = torch.cat([c[: self.inequalities].clamp_min(0), c[self.inequalities :]]).norm()
        return size

    def project(self, v: Tensor, rows: Rows, rounds: int = 30) -> Projection:
        """The projection of v, with the constraints' model at a nearby point to begin with.

        Args:
            v: raveled (x, y).
            rows: the model.
            rounds: linearisations of curved constraints.

        Returns:
            The Projection, whose residual is measured with the constraints as they are.
        """
        found = self.onto(v, rows)
        if found.status == Status.INFEASIBLE or not len(rows.offset):
            return found
        if rows.affine and self.is_affine(rows, found.point):
            return found
        limit = self.tolerance * max(1.0, float(v.norm()))
        last = torch.inf
        for _ in range(rounds):
            rows = self.linearize(found.point)
            residual = self._residual(v, found.point, found.dual, rows)
            if not bool(residual > limit) or residual > 10 * last:
                return Projection(found.point, found.dual, residual, _code(residual, limit), rows)
            last = min(last, float(residual))
            found = self.onto(v, rows)
            if found.status == Status.INFEASIBLE:  # of the linear model only: a curved set may have points
                return replace(found, status=Status.MAX_ITER)
        return found

    def feasible(self, v: Tensor, rounds: int = 100) -> Projection:
        """A point of C near v: the projection for affine constraints, Gauss-Newton steps onto curved ones.

        Args:
            v: raveled (x, y).
            rounds: steps.

        Returns:
            The Projection; INFEASIBLE where the violation stops falling at a point that is no solution.
        """
        w = self.project_sets(v)
        rows = self.probe(w)
        found = self.onto(v if rows.affine else w, rows)
        if rows.affine and found.status == Status.CONVERGED and self.is_affine(rows, found.point):
            return found
        rows = replace(rows, affine=False)
        limit, before = self.tolerance * max(1.0, float(v.norm())), self.violation(self.values(w))
        for _ in range(rounds):
            step, t = found.point - w, 1.0
            while True:  # S is convex, so every point of the segment stays in it
                trial = w + t * step
                after = self.violation(self.values(trial))
                if bool(after <= (1 - 1e-4 * t) * before) or t < 2.0**-_HALVINGS:
                    break
                t = t / 2
            if not bool(after < before):
                break
            w, before = trial, after
            rows = self.linearize(w)
            if before <= limit:
                return Projection(w, found.dual, before, Status.CONVERGED, rows)
            found = self.onto(w, rows)
        code = _code(before, limit)
        return Projection(w, found.dual, before, code if code == Status.CONVERGED else Status.INFEASIBLE, rows)

    def onto(self, v: Tensor, rows: Rows) -> Projection:
        """The projection onto S and the linear model of the constraints.

        Args:
            v: raveled (x, y).
            rows: the model.

        Returns:
            The Projection, its residual measured in the model.
        """
        limit = self.tolerance * max(1.0, float(v.norm()))
        if not len(rows.offset):
            return Projection(self.project_sets(v), rows.offset, v.new_zeros(()), Status.CONVERGED, rows)
        if not self.sets and not rows.inequalities:
            target = rows.transform @ rows.offset
            gap = rows.basis @ v - target
            w = v - rows.basis.T @ gap
            w = w - rows.basis.T @ (rows.basis @ w - target)  # a far v leaves a rounding error
            residual = (rows.jacobian @ w - rows.offset).norm()
            code = _code(residual, limit)
            return Projection(w, rows.transform.T @ gap, residual, code if code == Status.CONVERGED else
                              Status.INFEASIBLE, rows)  # fmt: skip
        return self._dual_newton(v, rows, limit)

    def _dual_newton(self, v: Tensor, rows: Rows, limit: float) -> Projection:
        J, m = rows.jacobian, rows.inequalities
        size = (J @ J.T).diagonal().sum().clamp_min(torch.finfo(v.dtype).tiny)  # at least |J|^2
        reach = _FAR * max(1.0, float(v.norm()))
        mu = v.new_zeros(len(J))
        w, slope, value = self._dual(v, rows, mu)
        for k in range(200):
            residual = _complementarity(mu, slope, m)
            if not bool(residual > limit):
                return Projection(w, mu, residual, _code(residual, limit), rows)
            if bool(value > reach**2 / 2) or (k % 20 == 19 and self._empty(v, rows, mu, reach)):
                return Projection(w, mu, residual, Status.INFEASIBLE, rows)
            on = torch.ones(len(J), dtype=torch.bool, device=v.device)
            on[:m] = mu[:m] + slope[:m] > 0
            C, base = J[on], torch.where(on, mu, 0.0)
            moved = self._derivative(v - J.T @ mu, C)
            H = (moved @ C.T + C @ moved.T) / 2
            right = slope[on] + moved @ (J[~on].T @ mu[~on])  # what the rows that leave give back
            eye = size * torch.eye(len(C), dtype=v.dtype, device=v.device)
            for damping in _DAMPINGS:  # the last is a step of at most the gradient's, which D cannot refuse
                trial = base.clone()
                trial[on] += torch.linalg.solve(H + damping * eye, right)
                trial = _signed(trial if damping < 1 else mu + slope / size, m)
                w_, slope_, value_ = self._dual(v, rows, trial)
                gain = 1e-4 * torch.dot(slope, trial - mu) - 1e-14 * value.abs()
                if bool(value_ >= value + gain):
                    break
            mu, w, slope, value = trial, w_, slope_, value_
        residual = _complementarity(mu, slope, m)
        return Projection(w, mu, residual, _code(residual, limit), rows)

    def _empty(self, v: Tensor, rows: Rows, mu: Tensor, reach: float) -> bool:
        """Whether D grows beyond the reach along mu, by more than rounding."""
        far = mu * (1e6 * reach**2 / mu.norm().clamp_min(torch.finfo(v.dtype).tiny))
        w, slope, value = self._dual(v, rows, far)
        terms = (rows.jacobian.abs() @ w.abs() + rows.offset.abs()) @ far.abs()
        return bool(value > reach**2 / 2) and bool(torch.dot(far, slope) > 1e-8 * terms)

    def _dual(self, v: Tensor, rows: Rows, mu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w = self.project_sets(v - rows.jacobian.T @ mu)
        slope = rows.jacobian @ w - rows.offset
        return w, slope, (w - v).square().sum() / 2 + torch.dot(mu, slope)

    def _derivative(self, u: Tensor, C: Tensor) -> Tensor:
        """C P_S'(u)."""
        if not self.sets:
            return C
        if self.bounds is not None:
            return torch.where((u > self.bounds[0]) & (u < self.bounds[1]), C, 0.0)
        leaf = u.detach().clone().requires_grad_()
        with torch.enable_grad():
            image = self.project_sets(leaf)
        return products([image], [leaf], [C], batched=True)[0]

    def _residual(self, v: Tensor, w: Tensor, mu: Tensor, rows: Rows) -> Tensor:
        stationarity = (w - self.project_sets(v - rows.jacobian.T @ mu)).norm()
        return torch.maximum(stationarity, _complementarity(mu, rows.jacobian @ w - rows.offset, rows.inequalities))


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


def _signed(mu: Tensor, inequalities: int) -> Tensor:
    return torch.cat([mu[:inequalities].clamp_min(0), mu[inequalities:]])


def _complementarity(mu: Tensor, c: Tensor, inequalities: int) -> Tensor:
    """|(min(mu_g, -g), h)|."""
    size: Tensor = torch.cat([torch.minimum(mu[:inequalities], -c[:inequalities]), c[inequalities:]]).norm()
    return size


def _code(residual: Tensor, limit: float) -> Status:
    return Status.CONVERGED if bool(residual <= limit) else Status.MAX_ITER
