"""Levenberg-Marquardt with exact Gauss-Newton steps, through the smaller of the b x b and the n x n system."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.linalg import Status
from nestopt.linalg.autodiff import check_chunk_size

from .minimizer import ARMIJO, Minimizer, MinimizerState, Objective, Point, first_length, stuck
from .outputs import Halves, differentiate_halves, evaluate_halves

__all__ = ["LevenbergMarquardt", "LevenbergMarquardtState"]


@dataclass(frozen=True, kw_only=True)
class LevenbergMarquardtState(MinimizerState):
    """Where Levenberg-Marquardt stands.

    Attributes:
        damping: mu, in lam = mu |grad|; NaN before the first step.
        growth: factor by which the next rejected step raises it.
        halves: of the objective at the newest point; None in a state that a result holds.
    """

    damping: float
    growth: float = 2.0
    halves: Halves | None = field(default=None, repr=False)


@dataclass(frozen=True)
class LevenbergMarquardt(Minimizer):
    """Minimise f(y) = loss(outputs(y)) + rest(y) by Gauss-Newton steps, (J'LJ + R + lam I) d = -grad f.

    J (b, n) is the Jacobian of the outputs that the objective marks with `mark_outputs`, L (b, b) the Hessian of a
    convex loss at them, R that of the rest; the curvature of the model is left out. Steps are exact for any lam: with
    L = S S', M = S'J and D = R + lam I, the b x b system (I + M D^-1 M') u = ... gives d by Woodbury's identity where
    b < n, which needs a diagonal R (a weighted l2 penalty; its negative entries are left out); else the n x n one is
    factorised. lam = mu |grad f|, and mu follows the ratio of f's fall to what the quadratic model promised: times
    max(0.1, 1 - (2 ratio - 1)^3) after a step, times 2, 4, 8, ... after a rejected one. Convergence is quadratic where
    the outputs can fit their data, else linear with the size of what they cannot fit.

    CONVERGED means |grad| <= max(rtol |grad(y0)|, atol), measured at x. STAGNATED and LINE_SEARCH_FAILED, that no lam
    gives a step, at and above the rounding level; DIVERGED, that f is unbounded below.

    Cost of a step: one gradient with a graph, min(b + 2, 2 n) products with J' or J and R (products with L, which do
    not go through the model, are not counted), memory for b n numbers; a value and a factorisation for each lam.

    Args:
        chunk_size: products in one vmapped pass; None for one pass each. 16 to 64 pay for small models.
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in the units of the gradient.
        max_iter: limit of steps; 10 to 50 are common, more where the data cannot be fitted.

    Raises:
        ValueError: for a negative tolerance or limit; from a call, for an objective without marks, or whose unmarked
            part has a Hessian that is not diagonal while b < n.

    Reference:
        Levenberg 1944, Marquardt 1963; lam ~ |grad|: Fan & Yuan 2005; the ratio's rule: Nielsen 1999; the b x b system
        for networks: Ren & Goldfarb 2019.

    Example:
        >>> from nestopt.implicit import LevenbergMarquardt, mark_outputs
        >>> t = torch.linspace(0, 1, 9, dtype=torch.float64)
        >>> def f(y):
        ...     return (mark_outputs(y[0] * (y[1] * t).exp() - 2 * (-3 * t).exp()) ** 2).sum()
        >>> LevenbergMarquardt()(f, torch.tensor([1.0, 0.0], dtype=torch.float64)).x
        tensor([ 2.0000, -3.0000], dtype=torch.float64)
    """

    max_iter: int = field(default=200, kw_only=True)
    chunk_size: int | None = None

    State: ClassVar[type[MinimizerState]] = LevenbergMarquardtState
    patience: ClassVar[int] = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_chunk_size("LevenbergMarquardt", self.chunk_size)

    def _start(self, f: Objective, y: Tensor, previous: Any) -> tuple[Point, dict[str, Any]]:
        point, halves = differentiate_halves(f, *evaluate_halves(f, y, type(self).__name__), self.chunk_size)
        old = previous.damping if isinstance(previous, LevenbergMarquardtState) else math.nan
        return point, {"damping": old, "halves": halves}

    def _release(self, s: LevenbergMarquardtState) -> LevenbergMarquardtState:
        return replace(s, halves=None)

    def _step(self, f: Objective, s: LevenbergMarquardtState) -> Any:
        point, halves = s.point, s.halves
        if halves is None:
            _, halves = differentiate_halves(f, *evaluate_halves(f, point.y, type(self).__name__), self.chunk_size)
        b, n = halves.jacobian.shape
        model: _Model = (_Dual if b < n else _Primal)(f, halves)
        size, mu, growth = float(s.error), s.damping, s.growth
        if not math.isfinite(model.scale):
            return s.end(Status.NON_FINITE)
        if math.isnan(mu):
            mu = (1e-3 * model.scale or size / first_length(point)) / size
        floor = 10 * torch.finfo(point.y.dtype).eps * model.scale
        first: tuple[float, float] | None = None
        for _ in range(60):
            d = model.solve(point.gradient, max(mu * size, floor))
            if d is not None:
                promise = -float(torch.dot(point.gradient, d)) - 0.5 * model.bend(d)
                first = first or (float(torch.linalg.vector_norm(d)), promise)
                hidden = first[1] <= 10 * point.flat  # f cannot judge even the first step: the slopes have to
                trial, cuts = evaluate_halves(f, point.y + d, type(self).__name__)
                rise = trial.value - point.value
                if promise > 0 and (rise <= point.flat if hidden else -rise > max(ARMIJO * promise, point.flat)):
                    new, halves = differentiate_halves(f, trial, cuts, self.chunk_size)
                    ratio = -(point.trapezoid(new) if hidden else rise) / promise
                    if ratio > ARMIJO:
                        mu *= max(0.1, 1 - (2 * min(ratio, 1.0) - 1) ** 3)
                        return replace(s, point=new, halves=halves, damping=mu, growth=2.0)
                if promise <= point.flat:
                    break
            mu, growth = growth * max(mu, floor / size), 2 * growth
        return s.end(Status.BREAKDOWN if first is None else stuck(point, *first))


class _Model(ABC):
    """The quadratic model of f at a point: J'LJ + R, and d = -(J'LJ + R + lam I)^-1 g."""

    scale: float  # mean eigenvalue of J'LJ, of those that can differ from zero

    @abstractmethod
    def solve(self, g: Tensor, lam: float) -> Tensor | None:
        """The step; None where the matrix is not positive definite."""

    @abstractmethod
    def bend(self, d: Tensor) -> float:
        """d'(J'LJ + R)d."""


class _Primal(_Model):
    def __init__(self, f: Objective, halves: Halves) -> None:
        J = halves.jacobian.to_dense()
        curved = halves.loss_hessian @ J.mT
        outer = curved @ J
        matrix = outer + halves.rest_hessian.to_dense()
        f.products += 2 * J.shape[1]
        self.matrix = (matrix + matrix.mT) / 2
        self.scale = float(outer.trace().abs()) / J.shape[1]

    def solve(self, g: Tensor, lam: float) -> Tensor | None:
        shifted = self.matrix.clone()
        shifted.diagonal().add_(lam)
        L, info = torch.linalg.cholesky_ex(shifted)
        return None if bool(info > 0) else -torch.cholesky_solve(g[:, None], L)[:, 0]

    def bend(self, d: Tensor) -> float:
        return float(torch.dot(d, self.matrix @ d))


class _Dual(_Model):
    def __init__(self, f: Objective, halves: Halves) -> None:
        b, n = halves.jacobian.shape
        h = halves.loss_gradient
        J = halves.jacobian.T @ torch.eye(b, dtype=h.dtype, device=h.device)
        L = halves.loss_hessian.to_dense()
        f.products += b + 2
        finite = bool(torch.isfinite(L).all()) and bool(torch.isfinite(J).all())
        values, U = torch.linalg.eigh((L + L.mT) / 2 if finite else torch.eye(b, dtype=h.dtype, device=h.device))
        positive = values > 10 * b * torch.finfo(h.dtype).eps * values.abs().amax()
        root = torch.where(positive, values, 0).sqrt()
        self.M = root[:, None] * (U.mT @ J)
        self.c = torch.where(positive, (U.mT @ h) / torch.where(positive, root, 1), 0)
        self.q = halves.rest_gradient + (h - U @ (root * self.c)) @ J  # g = M'c + q
        self.diagonal = _diagonal(halves, n)
        self.scale = float(self.M.square().sum()) / b if finite else math.nan

    def solve(self, g: Tensor, lam: float) -> Tensor | None:
        # (M'M + D)^-1 M' = D^-1 M' K^-1, with which the part of g in the range of M' keeps its accuracy as lam -> 0
        D = self.diagonal + lam
        if not bool((D > 0).all()):
            return None
        W, z = self.M / D, self.q / D
        K = W @ self.M.mT
        K.diagonal().add_(1)
        L, info = torch.linalg.cholesky_ex(K)
        if bool(info > 0):
            return None
        d: Tensor = z + torch.cholesky_solve((self.c - self.M @ z)[:, None], L)[:, 0] @ W
        return -d

    def bend(self, d: Tensor) -> float:
        return float((self.M @ d).square().sum() + torch.dot(d, self.diagonal * d))


def _diagonal(halves: Halves, n: int) -> Tensor:
    """The diagonal of R without its negative entries, after a look at whether R is diagonal."""
    R, g = halves.rest_hessian, halves.rest_gradient
    probe = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=g.dtype).to(g.device)
    diagonal: Tensor = R @ torch.ones_like(g)
    gap = torch.linalg.vector_norm(R @ probe - diagonal * probe)
    if bool(gap > 1e3 * torch.finfo(g.dtype).eps * torch.linalg.vector_norm(diagonal * probe)):
        raise ValueError(
            "LevenbergMarquardt: what the objective adds to its marked outputs must have a diagonal Hessian (a "
            "weighted l2 penalty) while there are fewer outputs than variables; mark that part too, or use NewtonCG."
        )
    return diagonal.clamp_min(0)
