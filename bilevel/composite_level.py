"""Lower levels with a set or a prox."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nestopt.constrained import Prox, ProximalGradient
from nestopt.linalg import LinearOperator, Status
from nestopt.linalg.result import all_finite
from nestopt.linalg.solver import default_rtol

from .counts import Counts
from .lipschitz import largest_curvature
from .lower_kinds import LowerLevel, LowerSolution, outcome
from .nonsmooth import NonsmoothTerm
from .optimality import Optimality

Pull = tuple[float, Tensor]  # rho and centre of a term rho |y - centre|^2 / 2

__all__ = ["CompositeLevel"]


class CompositeLevel(LowerLevel):
    """A lower level with a set or a prox: semismooth Newton steps, and slower ones where they fail.

    A Newton step solves R_z d = -R, R = (y - prox(y - s f_y, s)) / s with s = 1 / (curvature of f), and is taken,
    perhaps halved, where it shrinks |R|, or where f + h after a proximal gradient step from it is less than after one
    from y. Where that ends before the solution, as it does with badly scaled f, proximal point steps follow the path of
    solutions with a further term rho |. - y|^2 / 2, rho falling to nothing. Where these fail too, `ProximalGradient`
    runs between two phases of Newton steps, each time for longer, so that the method converges wherever that does, and
    ends fast once the piece of the prox is the right one.
    """

    def solve(
        self,
        x: Tensor,
        y: Tensor,
        dual: Tensor | None = None,
        upper_weight: float = 0.0,
        tolerance: float | None = None,
    ) -> LowerSolution:
        """See `LowerLevel.solve`."""
        term = NonsmoothTerm(self.problem, self.spaces)
        objective, counts = self.objective(x, upper_weight), Counts(lower_solves=1)
        whole = ProximalGradient() if self.solver is None else self.solver
        if self.problem.lower_set is not None:  # f may not be defined elsewhere
            y = term.prox(y, 1.0, x)
        none, spent, step, target = y.new_zeros(0), 30, 0.0, tolerance
        while True:
            if not step:
                step, more = self._step(x, y, upper_weight)
                counts += more
            y, more = self._newton(x, y, upper_weight, step, 0.0 if target is None else target)
            counts += more + Counts(1, 1)
            point = self._point(x, y, upper_weight, 1.0)
            if target is None:
                target = default_rtol(y.dtype) * max(1.0, float(y.norm()))
            # where y and f_y are rounded to this, no kind of step can get any further
            rounding = 30 * torch.finfo(y.dtype).eps * (1 + float(y.norm())) / step
            if spent == 30 and point.finite() and float(point.residual) > max(target, rounding):
                y, more = self._follow(x, y, upper_weight, step, max(target, rounding))
                counts += more + Counts(1, 1)
                point = self._point(x, y, upper_weight, 1.0)
            size = point.residual
            if not point.finite() or float(size) <= max(target, rounding) or spent > whole.max_iter:
                break
            run = ProximalGradient(_Term(term, x), max_iter=spent)
            found = run(lambda v: objective(self.spaces.y.unflatten(v)), y, 0.1 * target)
            counts += Counts(found.gradients if upper_weight else 0, found.gradients)
            ended = outcome(found)
            if ended in (Status.NON_FINITE, Status.DIVERGED, Status.LINE_SEARCH_FAILED):
                return LowerSolution(y, none, size, ended, counts)
            if ended in (Status.STAGNATED, Status.CONVERGED):  # no first-order step gets further
                spent = whole.max_iter
            y, spent, step = found.x, 3 * spent, 0.0
        status = Status.CONVERGED if float(size) <= target else Status.MAX_ITER
        if not point.finite():
            status = Status.NON_FINITE
        elif status is Status.MAX_ITER and float(size) <= 30 * rounding:
            status = Status.STAGNATED
        return LowerSolution(y, none, size, status, counts)

    def linearize(self, x: Tensor, y: Tensor, dual: Tensor) -> Optimality:
        """See `LowerLevel.linearize`."""
        return Optimality(self.problem, self.spaces, x, y, dual, self.data)

    def _follow(self, x: Tensor, y: Tensor, weight: float, step: float, target: float) -> tuple[Tensor, Counts]:
        """Proximal point steps by Newton steps, where Newton steps alone jump to and fro between pieces of the prox.

        y+ = argmin f + h + rho |. - y|^2 / 2, with rho from 1 / step down to nothing: each problem is better
        conditioned than the one without rho and starts at the solution of the one before, so that a few Newton steps
        do. Where they do not, rho has fallen by too much and goes back.

        Args:
            x: raveled upper variable.
            y: raveled start.
            weight: of F.
            step: 1 / (curvature of f).
            target: for |R|.

        Returns:
            The last y, and what it cost.

        Reference:
            Li, Sun & Toh 2018, of the same combination for the lasso's dual.
        """
        counts, rho, factor = Counts(), 0.1 / step, 10.0
        for _ in range(60):
            size = 1 / (1 / step + rho)
            found, more = self._newton(x, y, weight, size, target, (rho, y), limit=12)
            counts += more + Counts(1, 1)
            left = float(self._point(x, found, weight, size, (rho, y)).residual)
            if not left <= max(target, 0.1 * rho * float((found - y).norm())):  # too far at once
                rho, factor = factor * rho, factor**0.5
                if not rho <= 100 / step:
                    break
                continue
            y = found
            counts += Counts(1, 1)
            if float(self._point(x, y, weight, 1.0).residual) <= target:
                break
            rho, factor = rho / factor, min(factor**2, 10.0)
        found, more = self._newton(x, y, weight, step, 0.1 * target)
        return found, counts + more

    def _point(self, x: Tensor, y: Tensor, weight: float, step: float, pull: Pull | None = None) -> Optimality:
        return Optimality(self.problem, self.spaces, x, y, y.new_zeros(0), self.data, weight, step, pull)

    def _step(self, x: Tensor, y: Tensor, weight: float) -> tuple[float, Counts]:
        """1 / (curvature of f at y), at most 1: then |R| is no less than with the step 1 of the certificate."""
        oracle = self.problem.oracle(self.spaces, self.data)

        def slope(v: Tensor) -> Tensor:
            return oracle.weighted(x, v, upper=weight or None, lower=1.0).y

        curvature = 1.2 * float(largest_curvature(slope, y, steps=6)[0])
        return (1 / curvature if 1 < curvature < torch.inf else 1.0), oracle.counts

    def _newton(
        self,
        x: Tensor,
        y: Tensor,
        weight: float,
        step: float,
        target: float,
        pull: Pull | None = None,
        limit: int = 100,
    ) -> tuple[Tensor, Counts]:
        """Newton steps from y, and a proximal gradient step where one fails, while they help."""
        counts, point, failed = Counts(1, 1), self._point(x, y, weight, step, pull), 0
        ahead = self._value(x, point, weight)
        target = target or default_rtol(y.dtype) * max(1.0, float(y.norm()))
        for _ in range(limit):
            if not float(point.residual) > 0.5 * target or failed > 3:  # NaN ends it too
                break
            solution = self.default_linear_solver()(point.hessian, -point.lower_y)
            counts += Counts(products=solution.products + point.products)
            best, value, shrinks = None, torch.inf, False
            noise = 100 * torch.finfo(y.dtype).eps * (1 + abs(ahead))
            for k in range(7 if all_finite(solution.x) else 0):
                size = 0.5**k
                best = self._point(x, point.y_leaves[0].detach() + size * solution.x, weight, step, pull)
                counts += Counts(1, 1)
                value = self._value(x, best, weight)
                shrinks = float(best.residual) <= (1 - 0.25 * size) * float(point.residual) and value <= ahead + noise
                if shrinks or value < ahead - noise:
                    break
            if not shrinks:  # from another piece, or from none, the next step starts where the prox leads
                failed = 0 if value < ahead - noise else failed + 1
                best = self._point(x, self._image(point if failed or best is None else best), weight, step, pull)
                counts += Counts(1, 1)
                value = self._value(x, best, weight)
            assert best is not None
            point, ahead = best, value
        return point.y_leaves[0].detach(), counts

    def _image(self, point: Optimality) -> Tensor:
        """The proximal gradient step from a point."""
        return point.y_leaves[0].detach() - point.step * point.lower_y

    def _value(self, x: Tensor, point: Optimality, weight: float) -> float:
        """The objective after a proximal gradient step, inf where it is not finite."""
        with torch.no_grad():
            x_tree, y_tree = self.spaces.x.unflatten(x), self.spaces.y.unflatten(self._image(point))
            total = self.objective(x, weight)(y_tree) + NonsmoothTerm(self.problem, self.spaces).value(x_tree, y_tree)
            if point.pull is not None:
                total = total + point.pull[0] * (self._image(point) - point.pull[1]).square().sum() / 2
            return float(total) if bool(torch.isfinite(total)) else torch.inf


@dataclass(frozen=True)
class _Term(Prox):
    """h(x, .) of a problem on raveled vectors, at a fixed x."""

    term: NonsmoothTerm
    x: Tensor

    def _value(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            spaces = self.term.spaces
            return self.term.value(spaces.x.unflatten(self.x), spaces.y.unflatten(x))

    def _prox(self, x: Tensor, step: Tensor) -> Tensor:
        return self.term.prox(x, step.reshape(()), self.x)

    def _jacobian(self, x: Tensor, step: Tensor) -> LinearOperator:
        raise TypeError(
            "CompositeLevel: the term of a bilevel problem has no Jacobian here, where its prox takes steps alone; "
            "Optimality differentiates it along the graph of R, by `hessian`."
        )
