"""M-FAC in the place of the inverse lower Hessian, with the samples that the empirical Fisher matrix is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nestopt.linalg import CG, MFAC, LinearOperator, LinearSolver, SingleStep
from nestopt.linalg.autodiff import GraphOperator
from nestopt.linalg.isolation import isolated
from nestopt.linalg.tree import Ravel

from .oracle import part_of
from .point_solver import PointSolver

if TYPE_CHECKING:
    from .problem import Linearization

__all__ = ["MFACInverse"]


@dataclass(frozen=True)
class MFACInverse(PointSolver):
    """v = a F^-1 F_y, with the damped empirical Fisher matrix F of the lower level's samples in the Hessian's place.

    F = damping I + (1/m) sum_i g_i g_i', g_i the gradient in y of the i-th sample's loss, made anew at each point;
    M-FAC applies its inverse exactly. The empirical Fisher matrix is NOT the Hessian, except near a minimum where the
    model interpolates its data, so that v is biased: the residual |F_y - H v| is measured with the true H, is a
    method's `residuals["adjoint"]`, and keeps an untrue answer from counting as CONVERGED. The scale a makes that
    residual the smallest, so that v is never worse than v = 0. With `solver=CG()` the inverse is CG's preconditioner
    and v is exact.

    Cost: m backward passes through the samples' losses in blocks, n m^2 operations, and 2 products (those of CG).

    Args:
        samples: (x, y), or (x, y, data) where the solve has data, -> losses of shape (m,), whose mean is the data term
            of the lower level; m = 64 to 1024 is common.
        damping: lam > 0; the weight of an l2 penalty that samples leave out. None for the mean square of the gradients'
            entries, the mean of F's diagonal without it.
        step_size: a; 1.0 for F^-1 F_y as published, None for the best one.
        solver: None for the one step; CG() for the exact answer.

    Raises:
        TypeError: if samples is not callable, or solver is no CG.

    Reference:
        Frantar, Kurtic & Alistarh 2021, M-FAC; Singh & Alistarh 2020, WoodFisher, section 2.

    Example:
        >>> from nestopt import bilevel
        >>> X, t = torch.eye(3, dtype=torch.float64), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        >>> losses = lambda x, y: (X @ y - t) ** 2
        >>> problem = bilevel.Problem(
        ...     lambda x, y: (y**2).sum(), lambda x, y: losses(x, y).mean() + x.exp() * (y**2).sum()
        ... )
        >>> x, y = torch.zeros((), dtype=torch.float64), t / 4
        >>> biased = bilevel.hypergradient(problem, x, y, bilevel.MFACInverse(losses))
        >>> exact = bilevel.hypergradient(problem, x, y, bilevel.MFACInverse(losses, solver=CG()))
        >>> biased.status.name, exact.status.name, round(float(exact.value), 6)
        ('MAX_ITER', 'CONVERGED', -1.3125)
    """

    samples: Callable[..., Tensor]
    damping: float | None = None
    step_size: float | None = None
    solver: CG | None = None

    def __post_init__(self) -> None:
        if not callable(self.samples):
            raise TypeError(
                "MFACInverse: samples must be a function (x, y) -> losses of shape (m,), one a sample of the lower "
                f"level, but got {type(self.samples).__name__}."
            )
        if self.solver is not None and not isinstance(self.solver, CG):
            raise TypeError(f"MFACInverse: solver must be CG(...) or None, but got {self.solver!r}.")

    def at(self, point: Linearization) -> LinearSolver:
        """The solver with F at this point.

        Args:
            point: the linearized, smooth lower level.

        Returns:
            A SingleStep, or CG, preconditioned by F^-1.

        Raises:
            ValueError: for a lower level that is not smooth, or samples that return something else.
        """
        if not point.hessian.symmetric:
            raise ValueError(
                "MFACInverse: a Fisher matrix stands for f_yy, but the lower level has a set, a prox or constraints; "
                "use linear_solver=None."
            )
        inverse = MFAC(*self._gradients(point)).inverse
        if self.solver is not None:
            return replace(self.solver, preconditioner=inverse)
        return SingleStep(self.step_size, inverse)

    def _gradients(self, point: Linearization) -> tuple[Tensor, float]:
        spaces, part = point.spaces, part_of(point.data, "lower")
        trees = spaces.x.build([leaf.detach() for leaf in point.x_leaves]), spaces.y.build(point.y_leaves)
        with torch.enable_grad(), isolated():
            losses = self.samples(*trees) if part is None else self.samples(*trees, part)
        if not isinstance(losses, Tensor) or losses.ndim != 1 or not losses.requires_grad:
            got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"MFACInverse: samples must return one loss a sample, of shape (m,), that depends on y, but got {got}."
            )
        rows: LinearOperator = GraphOperator(
            [losses], point.y_leaves, Ravel.of(losses.detach(), "samples"), spaces.y, chunk_size=64
        )
        gradients = (rows.T @ torch.eye(len(losses), dtype=losses.dtype, device=losses.device)).detach()
        if self.damping is not None:
            return gradients, self.damping
        square = float(gradients.double().square().mean())
        return gradients, square if square > 0 else 1.0  # every sample fits: F is a multiple of I, which a scales
