"""The value function v(x; eps) = min over y of f + eps F + h at a few eps, and its differences in eps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nestopt.linalg import Status
from nestopt.linalg.result import all_finite

from .counts import Counts
from .curvature_pairs import Pairs
from .lower_choice import SmoothLevel, lower_level
from .oracle import Oracle
from .problem import Problem
from .quasi_newton import CompactLBFGS, CompactState

__all__ = ["Differences", "Nodes"]

_CENTRAL, _ONE_SIDED = (-1.0, 0.0, 1.0), (0.0, 1.0, 2.0)
_WEIGHTS = {_CENTRAL: (-0.5, 0.0, 0.5), _ONE_SIDED: (-1.5, 2.0, -0.5)}
_SOLVED = (Status.CONVERGED, Status.STAGNATED)


@dataclass(frozen=True)
class Differences:
    """The three nodes at one x, and what follows from them.

    Attributes:
        nodes: y(eps_i), of shape (3, n).
        duals: their multipliers, of shape (3, p).
        epsilon: the distance of the nodes.
        one_sided: whether they are 0, eps, 2 eps in place of -eps, 0, eps.
        residual: of the lower level at y(0).
        upper: F(x, y(0)).
        value: the difference of v, whose gradient the hypergradient is.
        hypergradient: the difference of v_x.
        size: |v|, which rounding is relative to.
        fault: why a node has no minimiser, or None.
        bends: whether y(eps) is not smooth at 0.
        bias: infinite, until it is measured.
    """

    nodes: Tensor
    duals: Tensor
    epsilon: Tensor
    one_sided: bool
    residual: Tensor
    upper: Tensor
    value: Tensor
    hypergradient: Tensor
    size: Tensor | float = 0.0
    fault: Status | None = None
    bends: bool = False

    @property
    def zero(self) -> int:
        """The position of the node eps = 0."""
        return 0 if self.one_sided else 1

    @property
    def solution(self) -> Tensor:
        """y(0)."""
        return self.nodes[self.zero]

    @property
    def bias(self) -> Tensor:
        """Of a difference whose bias was not measured."""
        return torch.full_like(self.value, torch.inf)

    def at(self, offset: float) -> Tensor:
        """The nodes' y(offset * eps) by quadratic interpolation: where a solve starts."""
        where = _ONE_SIDED if self.one_sided else _CENTRAL
        a, b, c = (offset - w for w in where)
        return self.nodes[0] * (b * c / 2) - self.nodes[1] * (a * c) + self.nodes[2] * (a * b / 2)


class Nodes:
    """Solves for y(eps) at one step.

    Args:
        problem: the problem.
        oracle: of the step, which counts.
        solver: None for the kind's own.
        data: third argument of the objectives, or None.
        steps: curvature memory of earlier solves, of shape (k, n).
        changes: likewise.
    """

    def __init__(
        self, problem: Problem, oracle: Oracle, solver: Any, data: Any, steps: Tensor, changes: Tensor
    ) -> None:
        kind = lower_level(problem, oracle.spaces, data)
        smooth = isinstance(kind, SmoothLevel)
        self.level = kind if solver is None or smooth else lower_level(problem, oracle.spaces, data, solver)
        self.oracle, self.solver = oracle, CompactLBFGS() if solver is None else solver
        self.pairs = Pairs.of(steps, changes)

    def start(self, y: Tensor) -> Differences:
        """Nothing but y, as what a first solve starts from."""
        zero, none = y.new_zeros(()), y.new_zeros(3, 0)
        return Differences(y.expand(3, -1), none, zero, False, zero, zero, zero, y.new_zeros(0))

    def difference(
        self, x: Tensor, start: Differences, epsilon: Tensor, one_sided: bool, tolerance: float
    ) -> Differences:
        """Solve for the three nodes and take the differences.

        Args:
            x: raveled upper variable.
            start: a nearby evaluation.
            epsilon: the distance of the nodes.
            one_sided: which nodes.
            tolerance: absolute, of the lower solves.

        Returns:
            The Differences; with a fault, as far as they were found.
        """
        oracle, offsets = self.oracle, _ONE_SIDED if one_sided else _CENTRAL
        ratio = float(epsilon / start.epsilon) if float(start.epsilon) > 0 else 0.0
        same = start.one_sided == one_sided
        found: dict[float, tuple[Tensor, Tensor, Tensor, Status | None]] = {}
        fault = None
        # one-sided: from eps, which selects among the lower solutions, towards 0
        for offset in (1.0, 2.0, 0.0) if one_sided else (0.0, 1.0, -1.0):
            y = start.at(offset * ratio) if same or offset >= 0 else start.solution
            if found:
                near = 1.0 if one_sided else 0.0
                y = y + found[near][0] - start.at(near * ratio)
            dual = start.duals[start.zero] if start.duals.numel() else None
            found[offset] = node = self._solve(x, y, dual, float(offset * epsilon), tolerance, one_sided)
            if node[3] is not None:
                fault = node[3]
                break
        filled = [found.get(offset, next(iter(found.values()))) for offset in offsets]
        values, slopes = [], []
        for offset, (y, dual, _, _) in zip(offsets, filled, strict=True):
            v = oracle.weighted(x, y, upper=float(offset * epsilon) if offset else None, lower=1.0, dual=dual)
            values.append(v.value + oracle.term(x, y))
            slopes.append(v.x + oracle.term_x(x, y))
        weights = values[0].new_tensor(_WEIGHTS[offsets])
        nodes = torch.stack([node[0] for node in filled])
        zero = filled[offsets.index(0.0)]
        d = Differences(
            nodes, torch.stack([node[1] for node in filled]), epsilon, one_sided, zero[2],
            oracle.values(x, zero[0])[0], weights @ torch.stack(values) / epsilon,
            weights @ torch.stack(slopes) / epsilon, torch.stack(values).abs().amax(), fault,
        )  # fmt: skip
        if fault is None and not (all_finite(d.hypergradient) and all_finite(d.value)):
            return replace(d, fault=Status.NON_FINITE)
        first, second = nodes[2] - nodes[0], nodes[2] - 2 * nodes[1] + nodes[0]
        floor = torch.finfo(x.dtype).eps ** 0.6 * (1 + oracle.norm(zero[0]))
        return replace(d, bends=bool(oracle.norm(second) > 0.1 * oracle.norm(first) + floor))

    def bias(self, x: Tensor, d: Differences, tolerance: float) -> Tensor:
        """A third of the distance between the hypergradients with eps and with 2 eps.

        Args:
            x: raveled upper variable.
            d: evaluated there.
            tolerance: absolute, of the lower solves.

        Returns:
            A 0-d tensor.
        """
        wide = self.difference(x, d, 2 * d.epsilon, d.one_sided, tolerance)
        if wide.fault is not None:
            return d.bias
        return self.oracle.norm(wide.hypergradient - d.hypergradient) / 3

    def _solve(
        self, x: Tensor, y: Tensor, dual: Tensor | None, epsilon: float, tolerance: float, one_sided: bool
    ) -> tuple[Tensor, Tensor, Tensor, Status | None]:
        """The minimiser of f + eps F + h from y: itself, its multipliers, its residual, and a fault or None."""
        oracle, spaces = self.oracle, self.oracle.spaces
        solver = self.solver
        if not isinstance(self.level, SmoothLevel):
            s = self.level.solve(x, y, dual=dual, upper_weight=epsilon, tolerance=tolerance)
            oracle.counts += s.counts
            return s.y, s.dual, s.residual, None if s.status in _SOLVED else s.status
        objective, start = self.level.objective(x, epsilon), spaces.y.unflatten(y)
        # pairs of f + eps F have large inverses where f is flat: they would move y within the set of lower solutions
        keeps = isinstance(solver, CompactLBFGS) and not (one_sided and not epsilon)
        if keeps and len(self.pairs.steps):
            start = replace(solver.init(objective, start), pairs=self.pairs)
        solved = solver(objective, start, tolerance)
        oracle.counts += Counts(int(epsilon != 0) * solved.gradients, solved.gradients, solved.products, 1)
        status = solved.status
        assert isinstance(status, Status)
        if keeps and status in _SOLVED:
            assert isinstance(solved.state, CompactState)
            self.pairs = solved.state.pairs
        residual = torch.as_tensor(solved.error, dtype=y.dtype, device=y.device)
        found = spaces.y.flatten(solved.x).detach()
        return found, y.new_zeros(0), residual, None if status in _SOLVED else status
