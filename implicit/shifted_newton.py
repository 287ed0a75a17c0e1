"""Newton steps with a Hessian shifted by sqrt(M |grad|), M found on the way: the base of two minimisers."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nestopt.linalg import CG, LinearOperator, Status

from .line_search import leave_saddle, search
from .minimizer import Minimizer, MinimizerState, Objective, Point, first_length, stuck

__all__ = ["Eigenpairs", "ShiftedNewton", "ShiftedNewtonState"]


class Eigenpairs(NamedTuple):
    """A Hessian of few variables: every shifted system after the first costs 4 n^2 operations."""

    values: Tensor
    vectors: Tensor

    def solve(self, g: Tensor, shift: float) -> Tensor:
        """(H + shift I)^-1 g."""
        d: Tensor = self.vectors @ ((self.vectors.mT @ g) / (self.values + shift))
        return d


@dataclass(frozen=True, kw_only=True)
class ShiftedNewtonState(MinimizerState):
    """Where a shifted Newton method stands.

    Attributes:
        variation: M, with |H(u) - H(v)| <= 2 M |u - v| as far as it was seen; NaN before the first step.
        age: steps taken with the Hessian that is kept.
        hessian: at the newest point, along the graph of its gradient, where the next step needs it.
        kept: the Hessian that steps are made with: eigenpairs, or an operator where there are many variables.
    """

    variation: float
    age: int = 0
    hessian: LinearOperator | None = field(default=None, repr=False)
    kept: Eigenpairs | LinearOperator | None = field(default=None, repr=False)


@dataclass(frozen=True)
class ShiftedNewton(Minimizer):
    """Steps (H + (lam + s) I) d = -g with lam = sqrt(M |g|) and s >= 0 just enough for H + s I to be semidefinite.

    A step is taken when f falls by (2/3 lam + s/2) |d|^2 and the new gradient has |g+| <= 2 (lam + s) |d|, or half of
    |g|; both follow from M, so a step that fails shows that M is too small (or a Hessian of earlier steps too old).
    After a step M is a tenth of what the two gradients show, |g+ - g - H d| / |d|^2, which is the worst of all
    directions while the test asks only for this one; but not below a hundredth of the last.
    """

    max_iter: int = field(default=500, kw_only=True)
    dense_below: int = 500
    cg_max_iter: int = 1000

    State: ClassVar[type[MinimizerState]] = ShiftedNewtonState
    patience: ClassVar[int] = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("dense_below", 0), ("cg_max_iter", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{type(self).__name__}: {name} must be an integer >= {least}, but got {value!r}.")

    @property
    @abstractmethod
    def _lifetime(self) -> int:
        """Steps that are taken with one Hessian."""

    def _start(self, f: Objective, y: Tensor, previous: Any) -> tuple[Point, dict[str, Any]]:
        old = previous if isinstance(previous, ShiftedNewtonState) else None
        variation = math.nan if old is None else old.variation
        if old is not None and old.kept is not None and self._lifetime > 1:
            return f.differentiate(f.evaluate(y)), {"variation": variation, "kept": old.kept, "age": old.age}
        point, hessian = f.linearize(f.evaluate(y))
        return point, {"variation": variation, "hessian": hessian}

    def _release(self, s: ShiftedNewtonState) -> ShiftedNewtonState:
        return replace(s, hessian=None, kept=s.kept if isinstance(s.kept, Eigenpairs) else None)

    def _step(self, f: Objective, s: ShiftedNewtonState) -> Any:
        kept, age, M, size = s.kept, s.age, s.variation, float(s.error)
        if kept is None or age >= self._lifetime:
            kept, age, M = self._renew(f, s)
        growth, length, slope = 4.0, 0.0, 0.0
        for _ in range(30):
            d, lam, shift, direction = self._solve(f, s, kept, math.sqrt(M * size))
            if not bool(torch.isfinite(d).all()):
                return s.end(Status.NON_FINITE)
            if not length:
                length, slope = float(torch.linalg.vector_norm(d)), float(torch.dot(s.point.gradient, d))
            if direction is not None:
                return self._leave(f, s, kept, d, direction)
            hidden = -slope <= 10 * s.point.flat  # f cannot judge even the first step: the slopes have to
            new, hessian = self._accept(f, s, d, lam, shift, age, hidden)
            if new is not None:
                wrong = new.gradient + (lam + shift) * d  # g+ - g - H d, because g + H d = -(lam + shift) d
                far = float(torch.linalg.vector_norm(d))  # squared as a number, whose range float32 does not have
                seen = float(torch.linalg.vector_norm(wrong)) / far**2 if far else M
                M = max(0.1 * seen, 0.01 * M)
                return replace(s, point=new, hessian=hessian, kept=kept, age=age + 1, variation=M)
            if age:
                kept, age, M = self._renew(f, s)
            else:
                M, growth = growth * M, 4 * growth
        return s.end(stuck(s.point, length, -slope))

    def _renew(self, f: Objective, s: ShiftedNewtonState) -> tuple[Eigenpairs | LinearOperator, int, float]:
        """The Hessian at the newest point, its age, and M."""
        hessian = f.linearize(f.evaluate(s.point.y))[1] if s.hessian is None else s.hessian
        M = self._first_variation(f, s.point, hessian) if math.isnan(s.variation) else s.variation
        n = s.point.y.numel()
        if n > self.dense_below:
            return hessian, 0, M
        f.products += n
        matrix = hessian.to_dense()
        if not bool(torch.isfinite(matrix).all()):  # LAPACK refuses NaN: they go on to the step, which names them
            matrix = torch.full_like(matrix, torch.nan)
            return Eigenpairs(matrix[0], matrix), 0, M
        return Eigenpairs(*torch.linalg.eigh((matrix + matrix.mT) / 2)), 0, M

    def _first_variation(self, f: Objective, point: Point, hessian: LinearOperator) -> float:
        """M from one product and the gradient a little downhill."""
        d = -first_length(point) / point.error * point.gradient
        f.products += 1
        bent = hessian @ d
        for _ in range(10):
            trial = f.evaluate(point.y + d)
            if math.isfinite(trial.value):
                new = f.differentiate(trial)
                if new.finite:
                    wrong = torch.linalg.vector_norm(new.gradient - point.gradient - bent)
                    return float(wrong / torch.dot(d, d))
            d, bent = 0.1 * d, 0.1 * bent
        return float(torch.linalg.vector_norm(bent) / torch.dot(d, d))

    def _solve(
        self, f: Objective, s: ShiftedNewtonState, kept: Eigenpairs | LinearOperator, lam: float
    ) -> tuple[Tensor, float, float, Tensor | None]:
        """The step, lam, s, and a direction of curvature <= 0 where CG met one."""
        g, eps = s.point.gradient, torch.finfo(s.point.y.dtype).eps
        if isinstance(kept, Eigenpairs):
            scale = float(kept.values.abs().amax())
            longest = first_length(s.point) / eps  # where there is no curvature at all
            lam = max(lam, 10 * eps * scale, float(s.error) / longest)
            shift = max(0.0, -float(kept.values[0]))
            return -kept.solve(g, lam + shift), lam, shift, None
        size = float(s.error)
        forcing = min(0.1, math.sqrt(size / float(s.scale)))
        system = kept.shift(lam)
        solution = CG(forcing, 0.1 * float(s.tolerance) / size, self.cg_max_iter)(system, g / -size)
        f.products += solution.products
        return size * solution.x, lam, 0.0, solution.direction

    def _accept(
        self, f: Objective, s: ShiftedNewtonState, d: Tensor, lam: float, shift: float, age: int, hidden: bool
    ) -> tuple[Point | None, LinearOperator | None]:
        """The point y + d where it keeps what M promises, with its Hessian where the next step needs one."""
        point, length = s.point, float(torch.linalg.vector_norm(d))
        trial = f.evaluate(point.y + d)
        promise = (2 / 3 * lam + shift / 2) * length**2
        fall = point.value - trial.value
        if not fall >= (promise - point.flat if hidden else max(promise, point.flat)):
            return None, None
        if age + 1 >= self._lifetime and math.isfinite(trial.value):
            new, hessian = f.linearize(trial)
        else:
            new, hessian = f.differentiate(trial), None
        keeps = float(new.error) <= max(2 * (lam + shift) * length, 0.5 * float(point.error))
        keeps = keeps and -point.rise(new) >= promise
        return (new, hessian) if keeps or point.overflows_downhill(new) else (None, None)

    def _leave(
        self, f: Objective, s: ShiftedNewtonState, kept: Eigenpairs | LinearOperator, d: Tensor, p: Tensor
    ) -> Any:
        """A step with a line search from where CG met curvature <= 0."""
        assert isinstance(kept, LinearOperator)
        d = leave_saddle(f, s.point, kept, d, p)
        slope = float(torch.dot(s.point.gradient, d))
        taken = search(f, s.point, d, slope) if slope < 0 else None
        if taken is None:
            return s.end(stuck(s.point, float(torch.linalg.vector_norm(d)), -slope))
        return replace(s, point=taken[0], hessian=taken[1], kept=None, age=0)
