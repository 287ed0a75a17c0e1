"""Roots, fixed points and minimisers as layers of a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import optree
import torch
from torch import Tensor, nn

from nestopt.linalg.result import Result, SolverError

from .fixed_point_solver import FixedPointResult, FixedPointSolver
from .fixed_points import fixed_point
from .layer_search import search
from .minimizer import Minimizer
from .roots import root
from .stationary import argmin
from .transforms import untraced
from .warm_start import WarmStart

__all__ = ["ArgminLayer", "FixedPointLayer", "RootLayer"]


class RootLayer(nn.Module):
    """A layer whose output y solves R(y, *inputs) = 0, where R is a module and its parameters are learnt.

    The forward pass finds y without recording anything, so memory does not grow with its iterations; the derivative
    with respect to parameters and inputs is that of `root`, with iterative solves started at the last step's adjoint.
    The module's buffers are constants: an evaluation gets copies, and what it writes into them is dropped (running
    statistics of BatchNorm do not move; normalise by GroupNorm or LayerNorm instead). `state_dict` holds the module's
    parameters and buffers only, under `function.`.

    Under torch.compile the layer is one graph break, and runs as it is; where it pays, compile what finds y yourself,
    `find=torch.compile(iterate)`.

    Args:
        function: module whose forward(y, *inputs) returns R, of y's structure and shapes.
        find: (function of y, y0) -> y, or a Result with it; e.g. `NewtonKrylov()` or `Broyden()`, `Anderson()` for a
            `FixedPointLayer`, which are given `batch_dims` and run whole under vmap; a minimiser for `ArgminLayer`. Its
            own status does not decide: y is certified as a root, by `root`'s rtol and atol. It is in a note of the
            SolverError for a y that is none.
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
        >>> layer = implicit.FixedPointLayer(Cell(), implicit.Anderson(), batch_dims=1)
        >>> x = torch.randn(5, 3)
        >>> layer(torch.zeros(5, 3), x).sum().backward()
        >>> layer.function.linear.weight.grad.shape
        torch.Size([3, 3])
    """

    attach: ClassVar[Callable[..., Any]] = staticmethod(root)
    _call_impl = untraced(nn.Module._call_impl)  # not `forward`: torch.compile looks into this first
    solves_maps: ClassVar[bool] = False  # which of a FixedPointSolver's two problems this layer's module poses

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

        Raises:
            SolverError: for a y that the certificate refuses, if `on_failure` says so.
        """
        theta: Any = (dict(self.function.named_parameters()), dict(self.function.named_buffers()), *inputs)
        evaluate = self._bind(y0)
        y, found = self._find(evaluate, y0, theta)
        try:
            return self.attach(evaluate, y, *theta, **self.options)
        except SolverError as error:
            if isinstance(found, Result):
                rate = f", with the observed rate {found.rate}" if isinstance(found, FixedPointResult) else ""
                error.add_note(f"{type(self).__name__}: {type(self.find).__name__} ended as {found.status}{rate}.")
            raise

    def _bind(self, y0: Any) -> Callable[..., Any]:
        """(y, parameters, buffers, *inputs) -> the module's value, the same one at every evaluation of this call."""
        return self._evaluate

    def _find(self, evaluate: Callable[..., Any], y0: Any, theta: tuple[Any, ...]) -> tuple[Any, Any]:
        """The computed y, and what `find` returned."""
        find, batch_dims = self.find, self.options.get("batch_dims", 0)
        if isinstance(find, FixedPointSolver):
            run = find.fixed_point if self.solves_maps else find.root
            owner = type(self).__name__
            return search(lambda f, y, dims: run(f, y, batch_dims=dims), owner, evaluate, y0, theta, batch_dims)
        with torch.no_grad():
            tree: Any = theta
            fixed: Any = optree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)
            parameters, buffers, *inputs = fixed
            dims = {"batch_dims": batch_dims} if isinstance(find, Minimizer) and batch_dims else {}
            if buffers or evaluate != self._evaluate:  # every evaluation starts from the same buffers or random numbers
                found = find(lambda y: evaluate(y, *fixed), y0, **dims)
            else:

                def searched(function: nn.Module) -> Any:
                    return find(lambda y: function(y, *inputs), y0, **dims)

                held = {f"function.{name}": tensor for name, tensor in parameters.items()}
                found = torch.func.functional_call(_Holder(self.function), held, searched)
        return (found.x if isinstance(found, Result) else found), found

    def _evaluate(self, y: Any, parameters: dict[str, Tensor], buffers: dict[str, Tensor], *inputs: Any) -> Any:
        copies = {name: buffer.clone() for name, buffer in buffers.items()}
        return torch.func.functional_call(self.function, {**parameters, **copies}, (y, *inputs))


class _Holder(nn.Module):
    """A module whose parameters are exchanged once for a whole search: it costs more than a small evaluation."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, run: Callable[[nn.Module], Any]) -> Any:
        return run(self.function)


class FixedPointLayer(RootLayer):
    """A layer whose output solves y = T(y, *inputs), where T is a module: a deep equilibrium model.

    Otherwise like `RootLayer`, with the derivative of `fixed_point`.

    Args:
        function: module whose forward(y, *inputs) returns T, of y's structure and shapes.
        find: (T as a function of y, y0) -> y, or a Result with it; e.g. `Anderson()`, `Picard()` or `Broyden()`.
        options: keyword arguments of `fixed_point`.
    """

    attach: ClassVar[Callable[..., Any]] = staticmethod(fixed_point)
    solves_maps: ClassVar[bool] = True


class ArgminLayer(RootLayer):
    """A layer whose output minimises f(y, *inputs) over y, where f is a module.

    Otherwise like `RootLayer`, with the derivative of `argmin`.

    Args:
        function: module whose forward(y, *inputs) returns f: a scalar, or one value an item with batch_dims.
        find: a minimiser, e.g. `NewtonCG()`, which is given `batch_dims`; or any (f as a function of y, y0) -> y, or a
            Result with it.
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
