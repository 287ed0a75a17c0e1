"""Broyden's good method in limited memory, with a derivative-free line search."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.linalg import Status
from nestopt.linalg.result import any_of

from .fixed_point_solver import FixedPointSolver, FixedPointState, Problem, check_positive, dots, mix, norm, select

__all__ = ["Broyden", "BroydenState"]

_SUFFICIENT = 1e-4  # a step of length t has to lower |F| by t^2 of this fraction
_SHORTEST = 0.05  # a step below this part of the direction teaches the next direction instead of being shortened
_REFUSALS = 20  # directions in a row along which no step was taken, before LINE_SEARCH_FAILED


@dataclass(frozen=True, kw_only=True)
class BroydenState(FixedPointState):
    """Where Broyden's method stands.

    Attributes:
        direction: -H F.
        t: the part of it to try next.
        left: u_j of H = beta I + sum_j u_j v_j', of shape (*batch, memory, n).
        right: v_j.
        used: how many of them every item has.
        beta: of every item.
        accepted: steps taken that moved.
        refused: directions in a row that did not.
    """

    direction: Tensor = field(repr=False)
    t: Tensor
    left: Tensor = field(repr=False)
    right: Tensor = field(repr=False)
    used: Tensor
    beta: Tensor
    accepted: Tensor
    refused: Tensor


@dataclass(frozen=True)
class Broyden(FixedPointSolver):
    """Solve R(y) = 0 (a call, `root`) or y = T(y) (`fixed_point`, with F = y - T(y)) by Broyden's good updates.

    y <- y + t p with p = -H F, where H = beta I + sum_j u_j v_j' follows the inverse Jacobian: after a step s in which
    F changed by g, u = (s - H g) / (s'H g), v = H's (Sherman-Morrison of the secant update of least change), held back
    where s'H g is nearly 0 (More & Trangenstein). The memory begins anew when it is full. No derivative is asked for.

    A step is taken if |F(y + t p)| <= (1 + allowance / (k + 1)^2 - 1e-4 t^2) |F(y)| after k steps taken: a derivative-
    free search after Li & Fukushima, scaled so that units do not matter. Else t is shortened, down to 0.05; what F did
    there then updates H, which gives a better direction from the same point.

    On a linear system of n unknowns full steps end after at most 2 n of them (with memory >= 2 n, allowance inf).

    CONVERGED means |R(y)| <= max(rtol |R(y0)|, atol), or for a fixed point
    |T(y) - y| <= max(rtol max(|T(y0)|, |T(y0) - y0|), atol), measured at the point returned. LINE_SEARCH_FAILED: twenty
    directions in a row did not lower |F|.

    Cost: one evaluation of the function a step, 6 m n operations and memory for 2 m vectors.

    Args:
        memory: m updates; 10 to 50 are common, at least 2 n for small systems.
        scale: beta, where H begins; None for 1 with fixed points (the first step is Picard's), and with roots for a
            first step of half of max(|y0|, 1) and then the secant's own length.
        allowance: how much |F| may rise at first; inf takes every full step, as Broyden 1965.
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in the units of F.
        max_iter: limit of steps, refused ones included.

    Raises:
        ValueError: for a memory below 1, a scale of 0, a negative allowance, tolerance or limit.

    Reference:
        Broyden 1965; Li & Fukushima 2000; More & Trangenstein 1976; finite termination: Gay 1979; Kelley 1995,
        chapters 7 and 8.

    Example:
        >>> import torch
        >>> from nestopt.implicit import Broyden
        >>> res = Broyden()(lambda y: y**3 - 8, torch.tensor(1.0, dtype=torch.float64))
        >>> round(float(res.x), 9), res.status.name
        (2.0, 'CONVERGED')
    """

    memory: int = 20
    scale: float | None = None
    allowance: float = 1.0

    State: ClassVar[type[FixedPointState]] = BroydenState
    solves_maps: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory < 1:
            raise ValueError(f"Broyden: memory must be an integer >= 1, but got {self.memory!r}.")
        if self.scale is not None:
            check_positive("Broyden", "abs(scale)", abs(self.scale))
        if not self.allowance >= 0:
            raise ValueError(f"Broyden: allowance must be a number >= 0, but got {self.allowance}.")

    def _start(self, problem: Problem, y: Tensor, residual: Tensor) -> dict[str, Any]:
        size = norm(residual)
        beta = 0.5 * norm(y).clamp_min(1) / torch.where(size > 0, size, 1)
        if self.scale is not None or problem.is_map:
            beta = torch.full_like(size, 1.0 if self.scale is None else self.scale)
        count, empty = torch.zeros_like(size, dtype=torch.int64), y.new_zeros(*y.shape[:-1], self.memory, y.shape[-1])
        return {
            "direction": -beta[..., None] * residual, "t": torch.ones_like(size), "left": empty, "right": empty,
            "used": count, "beta": beta, "accepted": count, "refused": count,
        }  # fmt: skip

    def _step(self, problem: Problem, s: BroydenState, running: Tensor) -> dict[str, Any]:
        step = s.t[..., None] * s.direction
        y = s.y + step
        F = problem.evaluate(y)
        size = norm(F)
        finite = torch.isfinite(size)
        bound = 1 + self.allowance / (s.accepted + 1) ** 2 - _SUFFICIENT * s.t**2
        good = running & finite & (size <= bound * s.error)
        shorten = running & ~good & ((s.t > _SHORTEST) | ~finite)
        learn = running & ~shorten
        left, right, used, beta = self._update(problem, s, learn, step, F)

        here = select(good, F, s.residual)
        fresh = -(beta[..., None] * here + mix(dots(right, here), left))
        # the parabola through |F|^2 at 0 and t with the slope of a Newton direction
        shape = size**2 + (2 * s.t - 1) * s.error**2
        best = s.t * torch.where(finite, s.t * s.error**2 / shape, 0)
        t = torch.where(shorten, best.clamp(0.1 * s.t, 0.5 * s.t), torch.where(learn, 1, s.t))
        refused = torch.where(good, 0, s.refused + learn)
        codes = torch.where(refused >= _REFUSALS, Status.LINE_SEARCH_FAILED.code, Status.RUNNING.code)
        codes = torch.where(running & (t < torch.finfo(t.dtype).eps ** 0.75), Status.NON_FINITE.code, codes)
        return {
            "y": select(good, y, s.y), "residual": here, "codes": codes,
            "length": torch.where(finite, norm(step), torch.inf), "t": t, "left": left, "right": right, "used": used,
            "direction": select(learn, fresh, s.direction), "beta": beta,
            "accepted": s.accepted + good, "refused": refused,
        }  # fmt: skip

    def _update(
        self, problem: Problem, s: BroydenState, learn: Tensor, step: Tensor, F: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """H after a step s with F, for the items that learn from it."""
        g = F - s.residual
        gg, sg = (g * g).sum(-1), (step * g).sum(-1)
        full = learn & (s.used == self.memory)
        left, right, used, beta = s.left, s.right, s.used, s.beta
        if full.is_cuda or any_of(full):
            left, right = (rows.masked_fill(full[..., None, None], 0) for rows in (left, right))
            used = torch.where(full, 0, used)
        if self.scale is None and not problem.is_map:
            secant = learn & (used == 0) & (sg != 0) & (gg > 0)
            beta = torch.where(secant, sg / gg, beta)
        Hg = beta[..., None] * g + mix(dots(right, g), left)
        Hs = beta[..., None] * step + mix(dots(left, step), right)
        ss = (step * step).sum(-1)
        gamma = (step * Hg).sum(-1) / ss
        sign = torch.where(gamma < 0, -1.0, 1.0)
        theta = torch.where(gamma.abs() >= 0.01, 1.0, (1 - 0.01 * sign) / (1 - gamma))
        u = (theta / (ss * (1 - theta + theta * gamma)))[..., None] * (step - Hg)
        sound = learn & torch.isfinite(u).all(-1) & torch.isfinite(Hs).all(-1)
        write = (sound[..., None] & (torch.arange(self.memory, device=F.device) == used[..., None]))[..., None]
        left, right = (torch.where(write, v[..., None, :], V) for v, V in ((u, left), (Hs, right)))
        return left, right, used + sound, beta
