"""Anderson acceleration of a fixed-point iteration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from nestopt.linalg import Status
from nestopt.linalg.result import any_of

from .fixed_point_solver import FixedPointSolver, FixedPointState, Problem, check_positive, dots, mix, norm, select

__all__ = ["Anderson", "AndersonState", "mixing_weights"]

_LOWEST = 2.0**-10  # of the damping that was asked for, below which a safeguarded run gives up


@dataclass(frozen=True, kw_only=True)
class AndersonState(FixedPointState):
    """Where Anderson acceleration stands.

    Attributes:
        steps: the last differences of y, of shape (*batch, memory, n), zero where there is none.
        changes: those of F.
        damping: of every item.
        accelerated: whether the last step mixed differences in.
        slot: where the next difference goes.
    """

    steps: Tensor = field(repr=False)
    changes: Tensor = field(repr=False)
    damping: Tensor
    accelerated: Tensor
    slot: int = 0


@dataclass(frozen=True)
class Anderson(FixedPointSolver):
    """Solve y = T(y) by mixing the last steps so that their residuals cancel as well as they can.

    With F = y - T(y), dY and dF the last m differences of y and F: w minimises |F - dF w|^2 + regularization |D w|^2,
    D the lengths of dF's columns, and y <- y - dY w - damping (F - dF w) (type II, Walker & Ni's equation 2.1). The
    least-squares problem is solved for columns of length 1 by its normal equations with a step of refinement, so that
    nothing depends on units. On a linear map with m at least the number of steps, y is T of GMRES' iterate: n + 1 steps
    are enough, contraction or not.

    Safeguard, per item: a mixed step that raises the smallest error by more than `growth`, or gives NaN, is taken back;
    from the best point the memory begins anew with half the damping, which recovers as the error falls.

    CONVERGED means |T(y) - y| <= max(rtol max(|T(y0)|, |T(y0) - y0|), atol), measured at the point returned.
    NOT_CONTRACTING: the damping fell below a thousandth of what was asked for.

    Cost: one evaluation of T a step, m (m + 6) n operations and memory for 2 m vectors.

    Args:
        memory: m; 3 to 10 are common, more where the error stalls.
        damping: of the mixed residual; below 1 where T is stiff.
        regularization: relative to the columns' squared lengths; None for 10 m eps of the dtype, which leaves all the
            information that it has; 1e-8 to 1e-4 calm noisy maps.
        growth: how much the error may rise above its smallest; 2 is strict, inf is no safeguard.
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in y's units.
        max_iter: limit of steps.

    Raises:
        ValueError: for a memory below 1, a damping or growth that is not positive, a negative regularization, tolerance
            or limit.

    Reference:
        Anderson 1965; Walker & Ni 2011; the safeguard in the spirit of Zhang, O'Donoghue & Boyd 2020.

    Example:
        >>> import torch
        >>> from nestopt.implicit import Anderson
        >>> res = Anderson()(torch.cos, torch.tensor(1.0, dtype=torch.float64))
        >>> round(float(res.x), 9), res.status.name, res.iterations < 10
        (0.739085133, 'CONVERGED', True)
    """

    memory: int = 5
    damping: float = 1.0
    regularization: float | None = None
    growth: float = 10.0

    State: ClassVar[type[FixedPointState]] = AndersonState

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory < 1:
            raise ValueError(f"Anderson: memory must be an integer >= 1, but got {self.memory!r}; use Picard for none.")
        check_positive("Anderson", "damping", self.damping)
        check_positive("Anderson", "growth", self.growth)
        if self.regularization is not None and not self.regularization >= 0:
            raise ValueError(f"Anderson: regularization must be >= 0 or None, but got {self.regularization}.")

    def _start(self, problem: Problem, y: Tensor, residual: Tensor) -> dict[str, Any]:
        damping = torch.full_like(norm(residual), self.damping)
        empty = y.new_zeros(*y.shape[:-1], self.memory, y.shape[-1])
        return {
            "steps": empty, "changes": empty, "damping": damping,
            "accelerated": torch.zeros_like(damping, dtype=torch.bool),
        }  # fmt: skip

    def _step(self, problem: Problem, s: AndersonState, running: Tensor) -> dict[str, Any]:
        failed = running & s.accelerated & (s.error > self.growth * s.best_error)
        base, F = select(failed, s.best, s.y), select(failed, s.best_residual, s.residual)
        keep = (running & ~failed)[..., None, None]
        dY, dF = torch.where(keep, s.steps, 0), torch.where(keep, s.changes, 0)
        regularization = self.regularization
        if regularization is None:
            regularization = 10 * self.memory * torch.finfo(F.dtype).eps
        weights = mixing_weights(dF, F, regularization)
        accelerated = (weights != 0).any(-1)
        recovered = torch.where(s.stale == 0, (2 * s.damping).clamp_max(self.damping), s.damping)
        damping = torch.where(failed, s.damping / 2, recovered)
        y = base - mix(weights, dY) - damping[..., None] * (F - mix(weights, dF))
        new = problem.evaluate(y)

        lost = running & accelerated & ~torch.isfinite(norm(new))
        damping = torch.where(lost, damping / 2, damping)
        length = norm(y - base)
        if lost.is_cuda or any_of(lost):
            y, new = select(lost, base, y), select(lost, F, new)
            dY, dF = (d.masked_fill(lost[..., None, None], 0) for d in (dY, dF))
        dY[..., s.slot, :], dF[..., s.slot, :] = y - base, new - F
        hopeless = running & (damping < _LOWEST * self.damping)
        return {
            "y": y, "residual": new, "length": torch.where(lost, torch.inf, length), "steps": dY, "changes": dF,
            "damping": damping, "accelerated": accelerated & ~lost, "slot": (s.slot + 1) % self.memory,
            "codes": torch.where(hopeless, self._runaway(problem.is_map), Status.RUNNING.code),
        }  # fmt: skip


def mixing_weights(
    changes: Float[Tensor, "*batch m n"], residual: Float[Tensor, "*batch n"], regularization: float
) -> Float[Tensor, "*batch m"]:
    """The w that minimises |F - dF w|^2 + regularization |D w|^2 per item, D the lengths of dF's columns.

    Args:
        changes: the columns of dF, as rows; those that are zero get no weight.
        residual: F.
        regularization: relative to the columns' squared lengths.

    Returns:
        The weights; zero for an item whose columns depend on each other more than the regularization can mend.
    """
    dtype = changes.dtype
    wide = torch.promote_types(dtype, torch.float32)  # LAPACK has no half precision
    changes, residual = changes.to(wide), residual.to(wide)
    size = norm(changes)
    scale = torch.where(size > 0, size, 1)
    Q = changes / scale[..., None]
    L, info = torch.linalg.cholesky_ex(Q @ Q.mT + torch.diag_embed((size == 0).to(Q.dtype) + regularization))

    def solve(projected: Tensor) -> Tensor:
        return torch.cholesky_solve(projected[..., None], L)[..., 0]

    w = solve(dots(Q, residual))
    # the normal equations square the condition number; a step from the residual gives back what that lost
    w = w + solve(dots(Q, residual - mix(w, Q)) - regularization * w)
    return torch.where((info > 0)[..., None], 0, w / scale).to(dtype)
