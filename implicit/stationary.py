"""The derivative of a minimiser, or of any stationary point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nestopt.linalg import LinearSolver
from nestopt.linalg.faults import stem_of
from nestopt.linalg.guard import graph_nodes, probe, refusal
from nestopt.linalg.normalization import WRITTEN_OUT

from .attach import attach_derivative
from .backward_pass import BackwardPass
from .border import Border, Equation, objective_values
from .monitor import Monitor, OnFailure
from .options import Options
from .transforms import transformed
from .warm_start import WarmStart

__all__ = ["argmin", "gradient_of", "total_value"]


def argmin(
    objective: Callable[..., Tensor],
    y: Any,
    *theta: Any,
    solver: LinearSolver | BackwardPass | None = None,
    batch_dims: int = 0,
    on_failure: OnFailure = "raise",
    monitor: Monitor | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    warm_start: WarmStart | None = None,
) -> Any:
    r"""Return y, computed by any means, with the derivative that f_y(y, theta) = 0 gives it.

    The root of R = f_y, the gradient of the objective in y, so A = f_yy is the true Hessian (not a Gauss-Newton matrix,
    which is biased wherever residuals are curved) and B = f_y_theta: see `root`, which says how derivatives,
    certificates, batches and failures are handled. A is symmetric, and at a strict minimiser positive definite; at a
    saddle the derivative is right too, but CG says NEGATIVE_CURVATURE: use LU or MINRES.

    The objective must be smooth near y. For a term that is not, or constraints, write y = prox(y - s f_y) and use
    `fixed_point`.

    Cost: as for `root`, a product with A being one backward pass through the gradient's graph.

    Args:
        objective: (y, *theta) -> f, a scalar; with batch_dims, one value an item, of y's leading shape.
        y: the computed minimiser: a tensor or a pytree of them.
        theta: tensors, or pytrees of tensors and constants; see `root`.
        solver: of f_yy u = -v; None takes LU, which needs no definiteness, up to n = 512, beyond that CG. Or an
            inexact pass, for gradient steps whose size Lanczos finds: `OneStep()`, `Phantom(10)`, `Unroll(20)`,
            `Truncated(Neumann(5))`; see `compare`.
        batch_dims: number of leading dimensions of y that count independent problems.
        on_failure: "raise", "warn" or "nan"; see `root`.
        monitor: collects a Record of y and of every solve.
        rtol: how far y may be from stationary relative to |y|; None for eps^(1/4) of the dtype, 1e-4 in float64.
        atol: the same in y's units; None for eps^(1/2).
        warm_start: keep one object across the calls of a training loop.

    Returns:
        y, in its structure, dtype and device, attached to the graph of theta.

    Raises:
        TypeError: if objective does not return a floating tensor, or (UndifferentiableError) an operation of it has no
            second derivative; see also `root`.
        ValueError: if it does not return a scalar (an item); see also `root`.
        SolverError: see `root`.

    Reference:
        Bengio, Gradient-based optimization of hyper-parameters, 2000; Blondel et al. 2022.

    Example:
        >>> import torch
        >>> from nestopt import implicit
        >>> t = torch.tensor(0.7, dtype=torch.float64)
        >>> a = torch.tensor(2.25, dtype=torch.float64, requires_grad=True)
        >>> x = implicit.argmin(lambda x, a: a * x**2 / 2 - t * x, t / a, a)
        >>> (slope,) = torch.autograd.grad(x, a, create_graph=True)
        >>> round(torch.autograd.grad(slope, a)[0].item(), 8)  # 2 t / a^3
        0.12290809
    """
    options = Options(solver, batch_dims, True, on_failure, monitor, rtol, atol, warm_start)
    return attach_derivative(_EQUATION, objective, y, theta, options)


def _residual(border: Border, vector: Tensor, theta: Sequence[Tensor]) -> Tensor:
    def total(v: Tensor) -> Tensor:
        value = total_value(border, border.call(v, theta))
        # where the graph is the objective's alone, as when y is certified
        if not transformed() and all(tensor.grad_fn is None for tensor in (vector, *theta)):
            # A and B hold second derivatives, and what has none may say zero; normalisations are written out by System
            nodes = (node for node in graph_nodes([value]) if stem_of(node.name()) not in WRITTEN_OUT)
            found = probe(nodes)
            if found is not None:
                raise refusal(border.equation.owner, *found, lambda: border.call(v, theta))
        return value

    return gradient_of(total, vector)


_EQUATION = Equation("implicit.argmin", "a stationary point", "objective", _residual)


def total_value(border: Border, value: Any) -> Tensor:
    """The sum of the objective over the items, whose gradient is each item's own.

    Args:
        border: of the call.
        value: that the objective returned.

    Returns:
        A 0-d tensor.

    Raises:
        TypeError: if the value is no floating tensor.
        ValueError: if it is not one value an item.
    """
    return objective_values(border.equation.owner, value, border.batch).sum()


def gradient_of(total: Callable[[Tensor], Tensor], vector: Tensor) -> Tensor:
    """The gradient of a scalar function, differentiable again inside every transform of torch.func and outside.

    Args:
        total: vector -> 0-d tensor.
        vector: where.

    Returns:
        A tensor of the vector's shape.
    """
    if transformed():
        return torch.func.grad(total)(vector)  # type: ignore[no-any-return]
    with torch.enable_grad():  # outside transforms plain autograd has fewer restrictions
        inner = vector.view_as(vector) if vector.requires_grad else vector.detach().requires_grad_()
        value = total(inner)
        if not value.requires_grad:
            return torch.zeros_like(vector)
        (gradient,) = torch.autograd.grad(value, inner, create_graph=True, materialize_grads=True)
    return gradient
