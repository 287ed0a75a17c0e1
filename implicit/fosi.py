"""FOSI: Newton's step in the space of the extreme eigenvectors, spectral gradient steps beside it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.linalg import LinearOperator, Status
from nestopt.linalg.tridiagonal import eigenpairs, random_start, tridiagonalise

from .line_search import MEMORY, nonmonotone_search, spectral_size
from .minimizer import Minimizer, MinimizerState, Objective, Point, first_length, stuck

__all__ = ["FOSI", "FOSIState", "ritz_pairs"]


@dataclass(frozen=True, kw_only=True)
class FOSIState(MinimizerState):
    """Where FOSI stands.

    Attributes:
        size: of the next gradient step in the complement.
        last: the last accepted values, newest last.
        age: steps taken with the eigenpairs.
        hessian: at the newest point, where the next step renews the eigenpairs.
        eigenvalues: (rank,), absolute values.
        eigenvectors: (rank, n), orthonormal rows.
    """

    size: float
    last: tuple[float, ...]
    age: int = 0
    hessian: LinearOperator | None = field(default=None, repr=False)
    eigenvalues: Tensor | None = field(default=None, repr=False)
    eigenvectors: Tensor | None = field(default=None, repr=False)


@dataclass(frozen=True)
class FOSI(Minimizer):
    """Minimise f(y) by d = -V' |Lambda|^-1 V g - size (g - V'V g), (Lambda, V) the extreme eigenpairs of the Hessian.

    Every `refresh_every` steps `lanczos_steps` products give Ritz pairs, of which the `rank` of largest |value| and the
    `smallest` lowest are kept. Newton's step is taken in their space; beside it, where the largest eigenvalues no
    longer limit the size, the base optimiser is gradient descent with spectral steps, its curvature seen in that
    complement alone. Of the step t d, t = 1 is tried first, and f has to fall below the largest of the last 10 values.

    CONVERGED means |grad| <= max(rtol |grad(y0)|, atol), measured at x. 100 steps that change f by rounding only and
    lower |grad| no more, or a line search that fails there, end the run as STAGNATED; one that fails while the slope
    promises a decrease, as LINE_SEARCH_FAILED; f unbounded below, as DIVERGED.

    Cost of a step: one gradient, and lanczos_steps / refresh_every products on average; memory for lanczos_steps
    vectors.

    Args:
        rank: eigenpairs of largest |eigenvalue|: as many as stand out of the spectrum.
        smallest: eigenpairs of the lowest eigenvalues; they converge late, and pay only where they stand out too.
        refresh_every: steps with the same eigenpairs.
        lanczos_steps: products for a refresh; None for 4 (rank + smallest), at most n.
        seed: of Lanczos' random start.
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in the units of the gradient.
        max_iter: limit of steps.

    Raises:
        ValueError: for a negative tolerance, limit or rank.

    Reference:
        Sivan, Gabel & Schuster 2024, FOSI: hybrid first and second order optimization, algorithm 2; its base optimiser:
        see GradientDescent.

    Example:
        >>> scale = torch.tensor([1.0, 2.0, 3.0, 1e4], dtype=torch.float64)
        >>> res = FOSI(rank=1)(lambda y: (scale * (y - 1) ** 2).sum(), torch.zeros(4, dtype=torch.float64))
        >>> res.x, res.status.name
        (tensor([1.0000, 1.0000, 1.0000, 1.0000], dtype=torch.float64), 'CONVERGED')
    """

    rank: int = 10
    smallest: int = 0
    refresh_every: int = 20
    lanczos_steps: int | None = None
    seed: int = 0

    State: ClassVar[type[MinimizerState]] = FOSIState
    patience: ClassVar[int] = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        pairs = self.rank + self.smallest
        for name, least in (("rank", 0), ("smallest", 0), ("refresh_every", 1), ("lanczos_steps", max(pairs, 1))):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"FOSI: {name} must be an integer >= {least}, but got {value!r}.")
        if pairs < 1:
            raise ValueError("FOSI: rank + smallest must be at least 1; without eigenpairs use GradientDescent().")

    def _start(self, f: Objective, y: Tensor, previous: Any) -> tuple[Point, dict[str, Any]]:
        trial = f.evaluate(y)
        if isinstance(previous, FOSIState) and previous.eigenvectors is not None:
            point = f.differentiate(trial)
            kept = {name: getattr(previous, name) for name in ("size", "age", "eigenvalues", "eigenvectors")}
            return point, {**kept, "last": (point.value,)}
        point, hessian = f.linearize(trial)
        size = first_length(point) / max(float(point.error), torch.finfo(torch.float64).tiny)
        return point, {"size": size, "last": (point.value,), "hessian": hessian}

    def _release(self, s: FOSIState) -> FOSIState:
        return replace(s, hessian=None)

    def _step(self, f: Objective, s: FOSIState) -> Any:
        if s.eigenvectors is None or s.age >= self.refresh_every:
            s = self._refresh(f, s)
        assert s.eigenvectors is not None
        assert s.eigenvalues is not None
        point, V = s.point, s.eigenvectors
        if not bool(torch.isfinite(V).all()):
            return s.end(Status.NON_FINITE)
        inside = V @ point.gradient
        d = -((inside / s.eigenvalues) @ V) - s.size * (point.gradient - inside @ V)
        slope = float(torch.dot(point.gradient, d))
        found = nonmonotone_search(f, point, d, slope, max(s.last))
        if found is None:
            return s.end(stuck(point, float(torch.linalg.vector_norm(d)), -slope))
        trial, t = found
        due = s.age + 1 >= self.refresh_every
        new, hessian = f.linearize(trial) if due else (f.differentiate(trial), None)
        step, change = new.y - point.y, new.gradient - point.gradient
        step, change = step - (V @ step) @ V, change - (V @ change) @ V
        size = spectral_size(step, change, t * s.size) if bool(step.any()) else s.size
        last = (*s.last, new.value)[-MEMORY:]
        return replace(s, point=new, hessian=hessian, age=s.age + 1, size=size, last=last)

    def _refresh(self, f: Objective, s: FOSIState) -> FOSIState:
        """The state with eigenpairs of the Hessian at its point."""
        hessian = f.linearize(f.evaluate(s.point.y))[1] if s.hessian is None else s.hessian
        n = s.point.y.numel()
        steps = min(self.lanczos_steps or 4 * (self.rank + self.smallest), n)
        generator = torch.Generator(s.point.y.device).manual_seed(self.seed)
        values, vectors, products = ritz_pairs(hessian, steps, generator)
        f.products += products
        order = values.abs().argsort(descending=True)[: self.rank]
        lowest = [j for j in range(len(values)) if j not in set(order.tolist())][: self.smallest]
        kept = torch.cat([order, order.new_tensor(lowest)])
        # a zero eigenvalue has no Newton step: such a direction is the base optimiser's
        size = values.abs()[kept]
        kept = kept[~(size <= 1e3 * torch.finfo(size.dtype).eps * size.amax())]
        return replace(s, age=0, hessian=None, eigenvalues=values[kept].abs(), eigenvectors=vectors[kept])


def ritz_pairs(A: LinearOperator, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    """All Ritz pairs of a Krylov space.

    Args:
        A: symmetric.
        steps: its dimension.
        generator: of the random start.

    Returns:
        Values (k,) in ascending order, orthonormal vectors (k, n), and the products spent; NaN where A is not finite.
    """
    run = tridiagonalise(A, random_start(A, 1, generator)[0], steps)
    values, weights = eigenpairs(*run.matrix)
    vectors = weights.mT.to(A.dtype) @ run.basis[: run.k]
    return values.to(A.dtype), torch.where(torch.isfinite(values)[:, None], vectors, torch.nan), run.k
