"""The search for a layer's solution: outside of every graph and, with this library's solvers, whole under vmap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .border import Border, Equation
from .fixed_point_solver import FixedPointResult

__all__ = ["Run", "search"]

Run = Callable[[Callable[[Tensor], Tensor], Tensor, int], FixedPointResult]


def search(
    run: Run, owner: str, function: Callable[..., Any], y0: Any, theta: tuple[Any, ...], batch_dims: int
) -> tuple[Any, FixedPointResult]:
    """The solution that a solver finds from y0, in its structure, and the solver's result.

    Under vmap the mapped dimensions are further items of the solver's batch: it looks at its errors, which a mapped
    tensor would not show.

    Args:
        run: (function of the vectors, the first ones, batch_dims) -> the result.
        owner: whose function it is, for messages.
        function: (y, *theta) -> T or R.
        y0: pytree.
        theta: pytrees.
        batch_dims: leading dimensions of y0 that count independent items.

    Returns:
        The solution, cut from every graph, and the result, of all items.
    """
    if torch.compiler.is_compiling():  # it looks at its errors: a graph break
        return torch.compiler.disable(search)(run, owner, function, y0, theta, batch_dims)  # type: ignore[no-untyped-call, no-any-return]
    equation = Equation(owner, "a solution", "function", lambda border, y, t: border.vector(border.call(y, t)))
    border, operands = Border.of(equation, function, y0, theta, batch_dims)
    results: list[FixedPointResult] = []

    def solve(evaluate: Callable[..., Tensor], y: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        result = run(lambda vector: evaluate(vector, *tensors), y, y.ndim - 1)
        results.append(result)
        x: Tensor = result.x
        return x

    with torch.no_grad():
        y = _Search.apply(solve, border.residual, operands.y, *(t.detach() for t in operands.theta))  # type: ignore[no-untyped-call]
    return border.ravel.unflatten(y), results[-1]


class _Search(torch.autograd.Function):
    """y as found: it has no derivative."""

    @staticmethod
    def forward(solve: Callable[..., Tensor], evaluate: Callable[..., Tensor], y: Tensor, *theta: Tensor) -> Tensor:
        return solve(evaluate, y, theta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        return (None,) * len(ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        return None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        solve: Callable[..., Tensor],
        evaluate: Callable[..., Tensor],
        y: Tensor,
        *theta: Tensor,
    ) -> tuple[Tensor, int]:
        place, *dims = in_dims[2:]
        y = y.expand(info.batch_size, *y.shape) if place is None else y.movedim(place, 0)
        mapped = torch.func.vmap(evaluate, in_dims=(0, *dims), randomness=info.randomness)
        return _Search.apply(solve, mapped, y, *theta), 0  # type: ignore[no-untyped-call]
