"""The derivative of a minimiser of f + g, where g is known by its prox, or is the indicator of a set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nestopt.implicit import Monitor, WarmStart
from nestopt.implicit.attach import attach_derivative
from nestopt.implicit.backward_pass import BackwardPass
from nestopt.implicit.border import Border, Equation
from nestopt.implicit.monitor import OnFailure
from nestopt.implicit.options import Options
from nestopt.implicit.pullback import pull
from nestopt.implicit.stationary import gradient_of, total_value
from nestopt.linalg import LinearSolver

from .prox import Prox
from .sets import Set
from .terms import Terms

__all__ = ["composite_argmin"]

_OWNER = "constrained.composite_argmin"
_PRODUCTS = 6  # with the Hessian, to see the size of its largest eigenvalue


def composite_argmin(
    objective: Callable[..., Tensor],
    prox: Any,
    y: Any,
    *theta: Any,
    solver: LinearSolver | BackwardPass | None = None,
    batch_dims: int = 0,
    step_size: float | None = None,
    on_failure: OnFailure = "raise",
    monitor: Monitor | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    warm_start: WarmStart | None = None,
) -> Any:
    r"""Return y, computed by any means, with the derivative that minimising f(y, theta) + g(y, theta) gives it.

    y minimises f + g, f smooth and g known by its prox, only if y = prox(y - s f_y(y, theta), s) for any s > 0. This is
    the root of R = y - prox(y - s f_y, s), so A = I - D (I - s f_yy) with D in the generalised Jacobian of the prox;
    `nestopt.implicit.root` says how derivatives of any order, certificates, batches and failures are handled. A is NOT
    symmetric even where f_yy and D are: LU or GMRES, not CG. It is nonsingular exactly where f_yy is so on the
    coordinates (or the face) that g leaves free, whatever s; s only scales the system. It is taken as 1 / (largest
    curvature of f seen in a few products), as a constant of every derivative.

    At a kink of the prox (a coordinate that is zero and about to move: |f_i| = weight for L1; a bound that is touched
    with f_i = 0) y has no derivative, only one-sided ones. The derivative returned is that of the element D which each
    Prox and Set documents: L1 keeps such a coordinate at zero.

    Cost: as for `root`, with a graph of R that contains f's gradient, and 6 products with f_yy to choose s.

    Args:
        objective: (y, *theta) -> f, a scalar; with batch_dims, one value an item, of y's leading shape.
        prox: g: a Prox or a Set for every tensor of y, or a pytree of y's structure with a Prox, a Set or None for
            each; or a function (*theta) -> such. What requires grad must come to g through theta, by such a function.
        y: the computed minimiser: a tensor or a pytree of them.
        theta: tensors, or pytrees of tensors and constants; see `root`.
        solver: of A'u = -v, or a cheaper BackwardPass; None takes LU up to n = 512, beyond that GMRES.
        batch_dims: number of leading dimensions of y that count independent problems. A weight for each item has shape
            (*batch, 1).
        step_size: s > 0, in place of the automatic one.
        on_failure: "raise", "warn" or "nan"; see `root`.
        monitor: collects a Record of y and of every solve.
        rtol: how far y may be from a minimiser relative to |y|; None for eps^(1/4) of the dtype, 1e-4 in float64.
        atol: the same in y's units; None for eps^(1/2).
        warm_start: keep one object across the calls of a training loop.

    Returns:
        y, in its structure, dtype and device, attached to the graph of theta.

    Raises:
        TypeError: if objective does not return a floating tensor, or prox is none; see also `root`.
        ValueError: if objective does not return a scalar (an item), or step_size is not positive; see also `root`.
        SolverError: see `root`.

    Reference:
        Bertrand et al., Implicit differentiation for fast hyperparameter selection in non-smooth convex learning, 2022;
        Blondel et al., Efficient and modular implicit differentiation, 2022, section 2.2.

    Example:
        >>> from nestopt.constrained import L1, composite_argmin
        >>> weight = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        >>> b = torch.tensor([3.0, 0.5], dtype=torch.float64)
        >>> y = torch.tensor([2.0, 0.0], dtype=torch.float64)  # the soft threshold of b
        >>> y = composite_argmin(lambda y, weight: ((y - b) ** 2).sum() / 2, lambda weight: L1(weight), y, weight)
        >>> y.sum().backward()
        >>> weight.grad
        tensor(-1., dtype=torch.float64)
    """
    if not (step_size is None or step_size > 0):
        raise ValueError(f"{_OWNER}: step_size must be a positive number or None, but got {step_size}.")
    options = Options(solver, batch_dims, False, on_failure, monitor, rtol, atol, warm_start)
    options.check(_OWNER, True)
    problem = _Problem(objective, prox)
    equation = Equation(_OWNER, "a minimiser", "objective", problem.residual, is_map=True)
    size = _curvature(equation, problem, y, theta, batch_dims) if step_size is None else step_size
    return attach_derivative(equation, problem, y, (*theta, size), options)


@dataclass(frozen=True, eq=False)
class _Problem:
    """f and g as functions of (y, *theta, s); a call is f's value."""

    objective: Callable[..., Tensor]
    prox: Any

    def __call__(self, y: Any, *theta: Any) -> Tensor:
        return self.objective(y, *theta[:-1])

    def _chosen(self, _: Any, *theta: Any) -> tuple[Any, Any]:
        """The term g as the user gives it, and s."""
        fixed = isinstance(self.prox, (Prox, Set)) or not callable(self.prox)
        return self.prox if fixed else self.prox(*theta[:-1]), theta[-1]

    def residual(self, border: Border, vector: Tensor, theta: Sequence[Tensor]) -> Tensor:
        gradient = gradient_of(lambda v: total_value(border, border.call(v, theta)), vector)
        # g is evaluated here, not within f's gradient: its graph belongs to the residual
        chosen, size = replace(border, function=self._chosen).call(vector, theta)
        terms = Terms.of(_OWNER, chosen, border.ravel, len(border.batch))
        size = torch.as_tensor(size, dtype=vector.dtype, device=vector.device).expand(vector.shape[:-1])
        return vector - terms.prox(vector - size[..., None] * gradient, size)


def _curvature(equation: Equation, problem: _Problem, y: Any, theta: tuple[Any, ...], batch_dims: int) -> Tensor:
    """The size 1 / |f_yy| for every item by a few steps of the power method, as a constant; 1 where there is none."""
    border, operands = Border.of(equation, problem, y, (*theta, 1.0), batch_dims)
    constants = [tensor.detach() for tensor in operands.theta]

    def gradient(v: Tensor) -> tuple[Tensor, ...]:
        return (gradient_of(lambda w: total_value(border, border.call(w, constants)), v),)

    point = operands.y
    n = point.shape[-1]
    v = torch.cos(torch.arange(n, dtype=point.dtype, device=point.device)).expand_as(point)
    size = torch.ones_like(point[..., 0]) if n else point.new_ones(point.shape[:-1])
    with torch.no_grad():
        for _ in range(_PRODUCTS):
            norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
            v = v / torch.where(norm > 0, norm, 1)
            (v,) = pull(gradient, [point], [v])
            size = torch.linalg.vector_norm(v, dim=-1)
    usable = (size > 0) & torch.isfinite(size)
    return torch.where(usable, 1 / torch.where(usable, size, 1), 1).detach()
