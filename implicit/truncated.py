"""A linear solver that is allowed to be inexact."""

from __future__ import annotations

from dataclasses import dataclass

from nestopt.linalg import LinearOperator, LinearSolver

from .backward_pass import Approximation, BackwardPass

__all__ = ["Truncated"]


@dataclass(frozen=True)
class Truncated(BackwardPass):
    """Use what a linear solver has when it stops, at its limit or where it stagnates: the user accepts the residual.

    `solver=CG(max_iter=5)` fails where five steps do not reach the tolerance; `solver=Truncated(CG(max_iter=5))` uses
    what they have reached, and the monitor records the residual. The usual ones of hypergradient papers are
    `Truncated(Neumann(5))`, for a symmetric A (`Phantom(5)` is the same series for any), `Truncated(CG(max_iter=5))`
    and `Truncated(NystromInverse(10, shift=1e-2))`. At an equal number of products CG has the smallest error.
    A proof of negative curvature, of divergence or of a singular matrix is still a failure.

    Args:
        solver: a LinearSolver, with its limit.

    Raises:
        TypeError: if it is none.

    Reference:
        Pedregosa, Hyperparameter optimization with approximate gradient, 2016; Lorraine, Vicol & Duvenaud 2020 for
        Neumann; Hataya & Yamada 2023 for Nystrom.

    Example:
        >>> import torch
        >>> from nestopt import implicit
        >>> from nestopt.linalg import CG
        >>> d = torch.linspace(1, 50, 20, dtype=torch.float64)
        >>> b, monitor = torch.ones(20, dtype=torch.float64, requires_grad=True), implicit.Monitor()
        >>> y = implicit.argmin(lambda y, b: (d * y * y / 2 - b * y).sum(), b.detach() / d, b,
        ...     solver=implicit.Truncated(CG(max_iter=5)), monitor=monitor)
        >>> y.sum().backward()
        >>> monitor.last("adjoint").status.name, monitor.last("adjoint").iterations
        ('MAX_ITER', 5)
    """

    solver: LinearSolver

    def __post_init__(self) -> None:
        if not isinstance(self.solver, LinearSolver):
            kind = self.solver.__name__ if isinstance(self.solver, type) else type(self.solver).__name__
            raise TypeError(f"Truncated: solver must be a LinearSolver such as CG(max_iter=5), but got {kind}.")

    def check(self, owner: str, is_map: bool, symmetric: bool) -> None:
        """Refuse a symmetric solver where no symmetry is promised; see BackwardPass."""
        if self.solver.needs_symmetric and not symmetric:
            name = type(self.solver).__name__
            raise ValueError(
                f"{owner}: Truncated({name}) needs a symmetric dR/dy; promise it by symmetric=True where it holds, or "
                "use Phantom(steps), the series for any dR/dy, or Truncated(GMRES(max_iter=...))."
            )

    def prepare(self, A: LinearOperator, is_map: bool) -> Approximation:
        """The solver, prepared; see BackwardPass."""
        return self.solver.prepare(A)
