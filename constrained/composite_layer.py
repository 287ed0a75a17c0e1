"""Minimisers of f + g as layers of a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor, nn

from nestopt.implicit import WarmStart
from nestopt.linalg import Result, SolverError

from .composite import composite_argmin
from .proximal_gradient import ProximalGradient

__all__ = ["CompositeArgminLayer"]


class CompositeArgminLayer(nn.Module):
    """A layer whose output minimises f(y, *inputs) + g(y) over y: f is a module, and g a Prox, a Set or a module.

    The forward pass finds y without recording anything, so memory does not grow with its iterations; the derivative
    with respect to parameters and inputs is that of `composite_argmin`. Buffers are constants: an evaluation gets
    copies. `state_dict` holds the parameters and buffers of f and g only, under `function.` and `prox.`. A batch is
    counted by `batch_dims`; under vmap call `composite_argmin` at a computed y.

    Args:
        function: module whose forward(y, *inputs) returns f: a scalar, or one value an item with batch_dims.
        prox: g: a constant Prox, Set or pytree of them, or a module whose forward(*inputs) returns one, with learnt
            weights.
        find: g -> a solver of (f as a function of y, y0), such as `ProximalGradient` (the class itself), or
            `ProjectedGradient` for a Set; functools.partial(ProximalGradient, rtol=1e-12) sets its options.
        options: keyword arguments of `composite_argmin`: solver, batch_dims, on_failure, monitor, ...

    Raises:
        TypeError: if function is not a module.

    Example:
        >>> import torch
        >>> from nestopt.constrained import L1, CompositeArgminLayer
        >>> class Weight(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.log = torch.nn.Parameter(torch.tensor(0.0))
        ...     def forward(self, X, t):
        ...         return L1(self.log.exp())
        >>> class LeastSquares(torch.nn.Module):
        ...     def forward(self, w, X, t):
        ...         return ((X @ w - t) ** 2).sum() / 2
        >>> lasso = CompositeArgminLayer(LeastSquares(), Weight())
        >>> lasso(torch.zeros(2), torch.eye(2), torch.tensor([3.0, 0.5])).sum().backward()
        >>> lasso.prox.log.grad
        tensor(-1.)
    """

    def __init__(
        self,
        function: nn.Module,
        prox: Any,
        find: Callable[[Any], Callable[..., Any]] = ProximalGradient,
        **options: Any,
    ) -> None:
        super().__init__()
        if not isinstance(function, nn.Module):
            raise TypeError(
                f"CompositeArgminLayer: function must be a torch.nn.Module, but got {type(function).__name__}; for a "
                "plain function call composite_argmin itself."
            )
        self.function = function
        self.prox = prox
        self.find = find
        self.options = {"warm_start": WarmStart(), **options}

    def forward(self, y0: Any, *inputs: Any) -> Any:
        """Find y from y0 and attach its derivative.

        Args:
            y0: where to start, a pytree of tensors; the gradient with respect to it is zero.
            inputs: the further arguments of the modules' forward.

        Returns:
            y, of y0's structure.

        Raises:
            SolverError: for a y that the certificate refuses, if `on_failure` says so.
        """
        theta: Any = (_tensors(self.function), _tensors(self.prox), *inputs)
        with torch.no_grad():
            fixed: Any = optree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, theta)
            solve = self.find(self._prox(*fixed))
            found = solve(lambda y: self._objective(y, *fixed), y0, batch_dims=self.options.get("batch_dims", 0))
        y = found.x if isinstance(found, Result) else found
        try:
            return composite_argmin(self._objective, self._prox, y, *theta, **self.options)
        except SolverError as error:
            if isinstance(found, Result):
                error.add_note(f"CompositeArgminLayer: {type(solve).__name__} ended as {found.status}.")
            raise

    def _objective(self, y: Any, tensors: Any, _: Any, *inputs: Any) -> Any:
        return torch.func.functional_call(self.function, _copied(tensors), (y, *inputs))

    def _prox(self, _: Any, tensors: Any, *inputs: Any) -> Any:
        if not isinstance(self.prox, nn.Module):
            return self.prox
        return torch.func.functional_call(self.prox, _copied(tensors), inputs)


def _tensors(module: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    if not isinstance(module, nn.Module):
        return {}, {}
    return dict(module.named_parameters()), dict(module.named_buffers())


def _copied(tensors: tuple[dict[str, Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
    return {**tensors[0], **{name: buffer.clone() for name, buffer in tensors[1].items()}}
