"""Roots, fixed points and minimisers as layers of a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import optree
import torch
from torch import Tensor, nn

from nestopt.linalg.result import Result

from .fixed_points import fixed_point
from .roots import root
from .stationary import argmin
from .warm_start import WarmStart

__all__ = ["ArgminLayer", "FixedPointLayer", "RootLayer"]


class RootLayer(nn.Module):
    """A layer whose output y solves R(y, *inputs) = 0, where R is a module and its parameters are learnt.

    The forward pass finds y without recording anything, so memory does not grow with its iterations; the derivative
    with respect to parameters and inputs is that of `root`, with iterative solves started at the last step's adjoint.
    The module's buffers are constants: an evaluation gets copies, and what it writes into them is dropped (running
    statistics of BatchNorm do not move; normalise by GroupNorm or LayerNorm instead). `state_dict` holds the module's
    parameters and buffers only, under `function.`.

    Args:
        function: module whose forward(y, *inputs) returns R, of y's structure and shapes.
        find: (function of y, y0) -> y, or a Result with it; a minimiser for `ArgminLayer`, e.g. `NewtonCG()`. Its own
            status is not asked: y is certified as a root, by `root`'s rtol and atol.
        options: keyword arguments of `root`: solver, batch_dims, on_failure, monitor, ...

    Raises:
        TypeError: if function is not a module.

    Example:
        >>> import torch
        >>> from nestopt import implicit
        >>> class Cell(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = torch.nn.Linear(3, 3)
        ...     def forward(self, y, x):
        ...         return torch.tanh(self.linear(y) / 2 + x)
        >>> def iterate(function, y):
        ...     for _ in range(50):
        ...         y = function(y)
        ...     return y
        >>> layer = implicit.FixedPointLayer(Cell(), iterate, batch_dims=1)
        >>> x = torch.randn(5, 3)
        >>> layer(torch.zeros(5, 3), x).sum().backward()
        >>> layer.function.linear.weight.grad.shape
        torch.Size([3, 3])
    """

    attach: ClassVar[Callable[..., Any]] = staticmethod(root)

    def __init__(self, function: nn.Module, find: Callable[[Callable[[Any], Any], Any], Any], **options: Any) -> None:
        super().__init__()
        if not isinstance(function, nn.Module):
            raise TypeError(
                f"{type(self).__name__}: function must be a torch.nn.Module, but got {type(function).__name__}; for a "
                f"plain function call implicit.{self.attach.__name__} itself."
            )
        self.function = function
        self.find = find
        self.options = {"warm_start": WarmStart(), **options}

    def forward(self, y0: Any, *inputs: Any) -> Any:
        """Find y from y0 and attach its derivative.

        Args:
            y0: where to start, a pytree of tensors; the gradient with respect to it is zero.
            inputs: the further arguments of the module's forward.

        Returns:
            y, of y0's structure.
        """
        theta: Any = (dict(self.function.named_parameters()), dict(self.function.named_buffers()), *inputs)
        with torch.no_grad():
            fixed = optree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, theta)
            found = self.find(lambda y: self._evaluate(y, *fixed), y0)
        y = found.x if isinstance(found, Result) else found
        return self.attach(self._evaluate, y, *theta, **self.options)

    def _evaluate(self, y: Any, parameters: dict[str, Tensor], buffers: dict[str, Tensor], *inputs: Any) -> Any:
        copies = {name: buffer.clone() for name, buffer in buffers.items()}
        return torch.func.functional_call(self.function, {**parameters, **copies}, (y, *inputs))


class FixedPointLayer(RootLayer):
    """A layer whose output solves y = T(y, *inputs), where T is a module: a deep equilibrium model.

    Otherwise like `RootLayer`, with the derivative of `fixed_point`.

    Args:
        function: module whose forward(y, *inputs) returns T, of y's structure and shapes.
        find: (T as a function of y, y0) -> y, or a Result with it.
        options: keyword arguments of `fixed_point`.
    """

    attach: ClassVar[Callable[..., Any]] = staticmethod(fixed_point)


class ArgminLayer(RootLayer):
    """A layer whose output minimises f(y, *inputs) over y, where f is a module.

    Otherwise like `RootLayer`, with the derivative of `argmin`.

    Args:
        function: module whose forward(y, *inputs) returns f: a scalar, or one value an item with batch_dims.
        find: a minimiser, e.g. `NewtonCG()`: (f as a function of y, y0) -> y, or a Result with it.
        options: keyword arguments of `argmin`.

    Example:
        >>> import torch
        >>> from nestopt import implicit
        >>> class Ridge(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.tensor(1.0))
        ...     def forward(self, w, X, y):
        ...         return ((X @ w - y) ** 2).mean() / 2 + self.weight / 2 * (w * w).sum()
        >>> layer = implicit.ArgminLayer(Ridge(), lambda f, w: torch.tensor([0.5]))
        >>> layer(torch.zeros(1), torch.ones(2, 1), torch.ones(2)).sum().backward()
        >>> layer.function.weight.grad
        tensor(-0.2500)
    """

    attach: ClassVar[Callable[..., Any]] = staticmethod(argmin)
