"""The derivative of further iterations, as a graph."""

from __future__ import annotations

from dataclasses import dataclass, field

from .backward_pass import StepPass

__all__ = ["Unroll"]


@dataclass(frozen=True)
class Unroll(StepPass):
    r"""Take `steps` further steps of the map from y and differentiate them all, y itself held: y_k = T^k(y, theta).

    The first derivative at a fixed point is sum_{j < k} J^j T_theta, whose error falls like rho^k for |J| <= rho < 1.
    It is the derivative of a function that is there, so that its second derivatives, and all others, are exact ones of
    T^k, which converge too (like k rho^k for the second). Reverse, forward and every transform differentiate plain
    operations: T must have the derivatives that are asked for. The value returned is y itself, and the gradient with
    respect to it is zero.

    The residual that the monitor records after a backward pass is |J'^k v|, the cotangent that arrives at y, which is
    what the solution of A'u = v lacks.

    For `argmin` and `root` T is y - step R(y, theta), as for `OneStep`.

    Cost: k evaluations of T with their graphs, and a backward pass through each. With `checkpoint=c` the memory is that
    of c of them and k / c vectors (sqrt(k) is least), for one more evaluation each.

    Args:
        steps: k; log(tolerance) / log(rho).
        checkpoint: after how many steps the graph is dropped, to be computed again when a derivative asks; None keeps
            it all. T must then give the same values again: no dropout.
        step: see `OneStep`.

    Raises:
        ValueError: for numbers out of their range.

    Reference:
        Gilbert, Automatic differentiation and iterative processes, 1992; Shaban et al., Truncated back-propagation for
        bilevel optimization, 2019, Proposition 3.1.

    Example:
        >>> import torch
        >>> from nestopt import implicit
        >>> theta = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
        >>> y = torch.tensor(0.7390851332151607, dtype=torch.float64)
        >>> T = lambda y, theta: torch.cos(y) + theta
        >>> implicit.fixed_point(T, y, theta, solver=implicit.Unroll(40)).backward()
        >>> round(theta.grad.item(), 6)
        0.59751
    """

    steps: int = field(kw_only=False)
    checkpoint: int | None = field(default=None, kw_only=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoint is not None and (not isinstance(self.checkpoint, int) or self.checkpoint < 1):
            raise ValueError(f"Unroll: checkpoint must be an integer >= 1 or None, but got {self.checkpoint!r}.")

    @property
    def plan(self) -> tuple[int, float]:
        """Whole steps."""
        return self.steps, 1.0
