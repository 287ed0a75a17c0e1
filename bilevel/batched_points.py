"""The hyperobjectives of many independent bilevel problems, evaluated together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import optree
import torch
from torch import Tensor

from nestopt import constrained
from nestopt.constrained import Set
from nestopt.implicit import Minimizer, NewtonCG
from nestopt.implicit.batched_objective import BatchedObjective, Points, select
from nestopt.implicit.jacobian import SystemJacobian
from nestopt.linalg import LinearSolver, Status, iterate
from nestopt.linalg.isolation import isolated
from nestopt.linalg.tree import Ravel

from .oracle import part_of
from .problem import Problem

__all__ = ["FATAL", "HyperObjective", "HyperPoints", "is_fatal"]

FATAL = (
    Status.NON_FINITE, Status.DIVERGED, Status.UNBOUNDED, Status.NEGATIVE_CURVATURE, Status.SINGULAR, Status.BREAKDOWN,
)  # fmt: skip
_RUNNING = Status.RUNNING.code


def is_fatal(codes: Tensor) -> Tensor:
    """Which items have ended without anything that could be gone on with.

    Args:
        codes: Status codes.

    Returns:
        A mask.
    """
    return torch.stack([codes == status.code for status in FATAL]).any(0)


@dataclass(frozen=True)
class HyperPoints(Points):
    """phi_k(x_k) = F_k(x_k, y_k*(x_k)) and its gradient at one x an item; `y` is x here, as in every minimiser.

    The value is F - <v, f_y>, which differs from phi by the square of what the lower solver left.

    Attributes:
        lower: y_k, shape (*batch, n).
        adjoint: v_k, likewise.
        lower_residual: |f_{k,y}|, shape (*batch,).
        linear_residual: |F_{k,y} - H_k v_k|.
        upper_residual: |P(x_k - g_k) - x_k|.
        scale: |F_{k,x}| + |f_{k,xy} v_k|.
        objective: F_k(x_k, y_k).
        fault: why an item cannot be gone on with; RUNNING where it can.
    """

    lower: Tensor
    adjoint: Tensor
    lower_residual: Tensor
    linear_residual: Tensor
    upper_residual: Tensor
    scale: Tensor
    objective: Tensor
    fault: Tensor

    def where(self, mask: Tensor, new: Points) -> HyperPoints:
        """The new points for the items of a mask, these for the others."""
        return HyperPoints(*(select(mask, getattr(new, f.name), getattr(self, f.name)) for f in fields(self)))


class HyperObjective:
    """phi of every item: one batched lower solve and one batched adjoint solve an evaluation.

    Args:
        problem: whose functions take whole batches and return one value an item.
        x: ravel of one item's x.
        y: ravel of one item's y.
        batch: the batch's shape.
        lower_solver: with a batched form; None for NewtonCG().
        linear_solver: for the batch of adjoint systems.
        data: third argument of the functions.
    """

    owner = "BatchedAID"

    def __init__(
        self,
        problem: Problem,
        x: Ravel,
        y: Ravel,
        batch: torch.Size,
        lower_solver: Minimizer | None,
        linear_solver: LinearSolver,
        data: Any = None,
    ) -> None:
        self.problem, self.ravel, self.ravel_y, self.batch, self.data = problem, x, y, batch, data
        self.kernel = (NewtonCG() if lower_solver is None else lower_solver)._batched()
        self.linear_solver = linear_solver
        self.evaluations = self.gradients = self.products = 0
        self.base: HyperPoints | None = None
        self.frozen = torch.zeros(batch, dtype=torch.bool, device=x.device)
        self.tolerance: Tensor | None = None
        self.start: Tensor | None = None

    def resume(self, base: HyperPoints, frozen: Tensor, tolerance: Tensor) -> None:
        """Where the next evaluations start from.

        Args:
            base: accepted points, whose y and v are warm starts.
            frozen: items that have ended, which cost no steps and are returned as they stand.
            tolerance: of each item's error.
        """
        self.base, self.frozen, self.tolerance = base, frozen, tolerance

    def function(self, name: str) -> Callable[[Tensor, Tensor], Tensor]:
        """An objective as a function of the batches of vectors.

        Args:
            name: upper or lower.

        Returns:
            (x, y) -> values of shape (*batch,).
        """
        call = self._call(name)
        return lambda x, y: call(self.ravel.unflatten(x), self.ravel_y.unflatten(y))

    def _call(self, name: str) -> Callable[[Any, Any], Tensor]:
        given, part = getattr(self.problem, name), part_of(self.data, name)

        def values(x: Any, y: Any) -> Tensor:
            with isolated():
                value = given(x, y) if part is None else given(x, y, part)
            if not isinstance(value, Tensor) or value.shape != self.batch:
                got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"{self.owner}: {name} must return one value an item, a tensor of shape {tuple(self.batch)}, but "
                    f"got {got}; reduce over the last dimensions only."
                )
            return value

        return values

    def project(self, x: Tensor) -> Tensor:
        """The nearest points of the upper set, item by item."""
        given = self.problem.upper_set
        if given is None:
            return x
        if isinstance(given, Set) and len(self.ravel.shapes) == 1:
            return self.ravel.join([given.project(self.ravel.split(x)[0])])
        return self.ravel.join(optree.tree_leaves(constrained.project(given, self.ravel.unflatten(x))))

    def points(self, x: Tensor) -> HyperPoints:
        """Phi and its gradient at x of shape (*batch, m); items that are frozen, or did not move, are not solved again.

        Args:
            x: one point an item.

        Returns:
            The points, cut from every graph.
        """
        base = self.base
        if base is not None:
            return self._points(x, self.frozen | (x == base.y).all(-1))
        return self._points(x, self.frozen)

    def refined(self, points: HyperPoints, tolerance: Tensor) -> HyperPoints:
        """The same points, evaluated anew where the lower or the adjoint residual is too large for a tolerance.

        Args:
            points: evaluated with the solvers' own tolerances.
            tolerance: of the error.

        Returns:
            The points.
        """
        sound = points.fault == _RUNNING
        rough = sound & ((points.lower_residual > 0.1 * tolerance) | (points.linear_residual > tolerance))
        if not bool(rough.any()):
            return points
        self.resume(points, ~rough, tolerance)
        return self._points(points.y, ~rough)

    def _points(self, x: Tensor, frozen: Tensor) -> HyperPoints:
        self.evaluations += 1
        base = self.base
        start = self.start if base is None else base.lower
        assert start is not None
        y, lower_codes = self._lower(x, start, frozen)
        found = self._differentiate(x, y, lower_codes, frozen)
        return found if base is None else base.where(~frozen, found)

    def _lower(self, x: Tensor, start: Tensor, frozen: Tensor) -> tuple[Tensor, Tensor]:
        call, x_tree, kernel = self._call("lower"), self.ravel.unflatten(x), self.kernel
        f = BatchedObjective(self.owner, lambda y_tree: call(x_tree, y_tree), self.ravel_y, self.batch)
        s = kernel.begin(f, start, None)
        limit = s.tolerance if self.tolerance is None else 0.1 * self.tolerance
        s = replace(s, tolerance=limit, codes=torch.where(frozen, Status.CONVERGED.code, s.codes))
        s = iterate(lambda t: kernel.advance(f, t), s, max_iter=kernel.max_iter, tolerance=s.tolerance)
        self.gradients += f.gradients
        self.products += -(-f.products // max(self.batch.numel(), 1))
        return s.points.y, s.codes

    def _differentiate(self, x: Tensor, y: Tensor, lower_codes: Tensor, frozen: Tensor) -> HyperPoints:
        upper, lower = self.function("upper"), self.function("lower")
        x_leaf, y_leaf = x.detach().clone().requires_grad_(), y.detach().clone().requires_grad_()
        with torch.enable_grad():
            F = upper(x_leaf, y_leaf)
        F_x, F_y = torch.autograd.grad(
            F, (x_leaf, y_leaf), torch.ones_like(F), allow_unused=True, materialize_grads=True
        )

        def slope(v: Tensor, u: Tensor) -> Tensor:
            value = lower(u, v)
            (found,) = torch.autograd.grad(value, v, torch.ones_like(value), create_graph=True, materialize_grads=True)
            return found

        H = SystemJacobian(slope, y, [x], [True], symmetric=True)
        f_y = H.residual_vector.detach()
        self.gradients += 1
        idle = frozen | is_fatal(lower_codes) | ~torch.isfinite(F_y).all(-1) | ~torch.isfinite(f_y).all(-1)
        known = None if self.base is None else select(idle, torch.zeros_like(F_y), self.base.adjoint)
        solution = self.linear_solver(H, select(idle, torch.zeros_like(F_y), F_y), known)
        self.products += -(-solution.products // max(self.batch.numel(), 1)) + 1
        v = solution.x
        gradient = F_x - H.pull(v, [0])[0]
        fault = torch.where(is_fatal(lower_codes), lower_codes, _RUNNING)
        bad = is_fatal(solution.codes) & (fault == _RUNNING) & ~idle
        fault = torch.where(bad, solution.codes, fault)
        finite = torch.isfinite(F) & torch.isfinite(gradient).all(-1) & torch.isfinite(f_y).all(-1)
        fault = torch.where(finite | (fault != _RUNNING), fault, Status.NON_FINITE.code)
        lost = fault != _RUNNING
        value = torch.where(lost, torch.nan, F.detach() - torch.linalg.vecdot(v, f_y))
        lower_residual, linear_residual = f_y.norm(dim=-1), torch.as_tensor(solution.residual_norm).to(f_y)
        upper_residual = (self.project(x - gradient) - x).norm(dim=-1)
        error = torch.stack([lower_residual, linear_residual, upper_residual]).amax(0)
        return HyperPoints(
            y=x.detach(), value=value, gradient=gradient, error=error, lower=y, adjoint=v,
            lower_residual=lower_residual, linear_residual=linear_residual, upper_residual=upper_residual,
            scale=F_x.norm(dim=-1) + (F_x - gradient).norm(dim=-1), objective=F.detach(), fault=fault,
        )  # fmt: skip
