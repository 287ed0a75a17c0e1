"""The derivative of a fixed point of a map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from nestopt.linalg import LinearSolver

from .attach import attach_derivative
from .backward_pass import BackwardPass
from .border import Border, Equation
from .monitor import Monitor, OnFailure
from .options import Options
from .warm_start import WarmStart

__all__ = ["fixed_point"]


def fixed_point(
    T: Callable[..., Any],
    y: Any,
    *theta: Any,
    solver: LinearSolver | BackwardPass | None = None,
    batch_dims: int = 0,
    symmetric: bool = False,
    on_failure: OnFailure = "raise",
    monitor: Monitor | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    warm_start: WarmStart | None = None,
) -> Any:
    r"""Return y, computed by any means, with the derivative that y = T(y, theta) gives it.

    The root of R = y - T(y, theta), so A = I - J with J = dT/dy, and the adjoint solves u = v + J'u: see `root`, which
    says how derivatives, certificates, batches and failures are handled. T need not be a contraction: I - J must be
    nonsingular. Where it is one and J is symmetric, `Neumann` sums the powers of J; CG needs fewer products.

    For y = prox(y - s f_y) and projections, J = D(I - s H) is not symmetric even where H is: not CG. A step of plain
    gradient descent has a symmetric J.

    Cost: as for `root`, a product with J' being one backward pass through T.

    Args:
        T: (y, *theta) -> the next y, a pytree of y's structure, shapes and dtype.
        y: the computed fixed point: a tensor or a pytree of them.
        theta: tensors, or pytrees of tensors and constants; see `root`.
        solver: of (I - J') u = v; None takes LU up to n = 512, beyond that GMRES, or CG where `symmetric`. Or an
            inexact pass: `OneStep()`, `Phantom(5, 0.8)`, `Unroll(20)`, `Truncated(GMRES(max_iter=5))`; see `compare`.
        batch_dims: number of leading dimensions of y that count independent systems.
        symmetric: promise that J is symmetric.
        on_failure: "raise", "warn" or "nan"; see `root`.
        monitor: collects a Record of y and of every solve.
        rtol: how far y may be from a fixed point relative to |y|; None for eps^(1/4) of the dtype, 1e-4 in float64.
        atol: the same in y's units; None for eps^(1/2).
        warm_start: keep one object across the calls of a training loop.

    Returns:
        y, in its structure, dtype and device, attached to the graph of theta.

    Raises:
        TypeError: see `root`.
        ValueError: see `root`.
        SolverError: see `root`.

    Reference:
        Christianson, Reverse accumulation and attractive fixed points, 1994; Bai, Kolter & Koltun, Deep equilibrium
        models, 2019.

    Example:
        >>> import torch
        >>> from nestopt import implicit
        >>> theta = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
        >>> y = torch.tensor(0.7390851332151607, dtype=torch.float64)
        >>> implicit.fixed_point(lambda x, theta: torch.cos(x) + theta, y, theta).backward()
        >>> round(theta.grad.item(), 12)
        0.597510045675
    """
    options = Options(solver, batch_dims, symmetric, on_failure, monitor, rtol, atol, warm_start)
    return attach_derivative(_EQUATION, T, y, theta, options)


def _residual(border: Border, vector: Tensor, theta: Sequence[Tensor]) -> Tensor:
    return vector - border.vector(border.call(vector, theta))


_EQUATION = Equation("implicit.fixed_point", "a fixed point", "T", _residual, is_map=True)
