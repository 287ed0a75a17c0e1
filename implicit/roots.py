"""The derivative of a root of a system of equations."""

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

__all__ = ["root"]


def root(
    residual: Callable[..., Any],
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
    r"""Return y, computed by any means, with the derivative that R(y, theta) = 0 gives it.

    With A = dR/dy (n x n, nonsingular) and B = dR/dtheta at the computed y, the implicit function theorem says
    A dy = -B dtheta. A backward pass solves A'u = -v and returns B'u; forward mode solves with A itself, and gets
    B dtheta from two reverse passes. Both solves are differentiable in turn by further solves, so that derivatives of
    any order, torch.func transforms and vmap (whose items become a batch of systems) are right and certified alike. How
    y was computed is never differentiated: the gradient with respect to the y passed in, the initial guess included, is
    zero.

    Certificates: y is accepted as a root if its estimated distance to one is at most rtol |y| + atol, per item. The
    distance is the Newton step |A^{-1} R| where a direct solver has the factors at hand, else |R|^2 / |A'R|, which
    never exceeds it; both are in y's units, so that scaling the residual changes nothing. Every linear solve must reach
    its solver's own tolerance by its measured residual. `on_failure` says what happens else.

    Under torch.compile the call is a graph break: it runs as it is between compiled parts, and compiles nothing anew
    when numbers, shapes or functions change. It cannot be traced (fullgraph=True, torch.func.linearize), because it
    looks at the residuals that it certifies. A compiled part has no double backward in torch, so that second
    derivatives need a model without compiled parts around the layer.

    Cost: one evaluation of R with its graph and one backward pass through it to accept y; then, with a direct solver, n
    backward passes and one factorisation, shared by all derivatives at the point, or, with an iterative one, a
    backward pass a product (two for a product with A that is not symmetric).

    Args:
        residual: (y, *theta) -> R, a pytree of y's structure, shapes and dtype. It must be given, not capture, what is
            to be differentiated: a captured tensor that requires grad is refused by name. Dropout and the like, which
            give another R at every evaluation, make y no root.
        y: the computed solution: a tensor or a pytree of them, float64 wherever derivatives beyond 6 digits matter.
        theta: tensors, or pytrees of tensors and constants (numbers, None, text); floating tensors have y's dtype and
            device, integer ones are constants. An argument that requires grad must have a path to R.
        solver: a linear solver, e.g. `GMRES(rtol=1e-8)`, or CG where A is symmetric positive definite. None takes LU
            up to n = 512 (and 2^24 matrix entries over all systems), beyond that CG where `symmetric`, else GMRES. Or
            an inexact pass, for steps y - step R: `OneStep(step=s)`, `Phantom`, `Unroll`, or `Truncated(solver)`;
            `compare` says how far off they are.
        batch_dims: number of leading dimensions, the same in every leaf of y, that count independent systems; residual
            takes and returns the whole batch. Cheaper than vmap where residual is batched anyway.
        symmetric: promise that A is symmetric (R is a gradient in y): halves the cost of products, and admits CG.
        on_failure: "raise" SolverError (in the forward call for y, in the backward pass for a solve); "warn" and use
            the best estimate, NaN where it is no better than zero; or "nan" for the items that failed. Never zeros.
        monitor: collects a Record of y and of every solve.
        rtol: how far y may be from a root relative to |y|; None for eps^(1/4) of the dtype, 1e-4 in float64. The error
            of the derivative is of the order of this distance.
        atol: the same in y's units; None for eps^(1/2), 1.5e-8 in float64.
        warm_start: keep one object across the calls of a training loop to start iterative solves at the last adjoint.

    Returns:
        y, in its structure, dtype and device, attached to the graph of theta.

    Raises:
        TypeError: for leaves of y or R that are not real floating tensors, a module in theta, or an unfit solver.
        ValueError: for shapes, dtypes or devices that do not fit, captured tensors, an argument that requires grad and
            is not used, or items of a batch that are not independent.
        SolverError: for a y that is not a root, or, when a derivative is taken, a linear solve that did not converge.

    Reference:
        Krantz & Parks, The Implicit Function Theorem, 2003; Blondel et al., Efficient and modular implicit
        differentiation, 2022.

    Example:
        >>> import torch
        >>> from nestopt import implicit
        >>> theta = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
        >>> y = torch.tensor(0.7390851332151607, dtype=torch.float64)
        >>> x = implicit.root(lambda x, theta: x - torch.cos(x) - theta, y, theta)
        >>> (slope,) = torch.autograd.grad(x, theta, create_graph=True)
        >>> round(slope.item(), 12), round(torch.autograd.grad(slope, theta)[0].item(), 12)
        (0.597510045675, -0.157663114104)
    """
    options = Options(solver, batch_dims, symmetric, on_failure, monitor, rtol, atol, warm_start)
    return attach_derivative(_EQUATION, residual, y, theta, options)


def _residual(border: Border, vector: Tensor, theta: Sequence[Tensor]) -> Tensor:
    return border.vector(border.call(vector, theta))


_EQUATION = Equation("implicit.root", "a root", "residual", _residual)
