"""Linear optimisation over a set, given as a function that solves it: the call, its regret and its value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = ["Oracle", "check_costs", "check_pair", "decide", "optimal_value", "regret"]

Oracle: TypeAlias = Callable[[Tensor], Tensor]


def decide(oracle: Oracle, costs: Tensor) -> Tensor:
    """The decisions w(c) of an oracle, for any leading dimensions, inside every transform, without a derivative.

    w(c) is piecewise constant: its derivative is zero wherever it has one.

    Args:
        oracle: costs of shape (batch, n) -> decisions of shape (batch, n), one w in S of least c'w for each row. It
            always gets two dimensions and finite costs without a graph, and may use NumPy.
        costs: shape (*batch, n).

    Returns:
        w, of the shape, dtype and device of costs; NaN for an item whose costs are not finite.

    Raises:
        TypeError: for an oracle that is no function or returns no tensor, or costs that are not floating.
        ValueError: if the oracle returns another shape.

    Example:
        >>> from nestopt import implicit
        >>> def cheapest(c):
        ...     return torch.nn.functional.one_hot(c.argmin(-1), c.shape[-1])
        >>> implicit.decide(cheapest, torch.tensor([2.0, 1.0, 3.0]))
        tensor([0., 1., 0.])
    """
    check_costs("decide", oracle, costs)
    return _Decision.apply(oracle, costs)  # type: ignore[no-any-return, no-untyped-call]


def regret(predicted: Tensor, costs: Tensor, oracle: Oracle, *, maximize: bool = False) -> Tensor:
    """What it costs to decide by predicted costs: c'w(c_hat) - c'w(c) >= 0, for each item.

    Divide the sum by that of |c'w(c)| for the normalised regret of a test set. It has no useful derivative with respect
    to the prediction (zero or none): train by `spo_plus` and others.

    Args:
        predicted: c_hat, shape (*batch, n).
        costs: c, of the same shape.
        oracle: see `decide`; of the largest c'w with maximize.
        maximize: whether c are gains.

    Returns:
        Shape (*batch,).

    Raises:
        ValueError: if the shapes differ.

    Reference:
        Elmachtoub & Grigas 2022, definition 1.

    Example:
        >>> from nestopt import implicit
        >>> def cheapest(c):
        ...     return torch.nn.functional.one_hot(c.argmin(-1), c.shape[-1])
        >>> implicit.regret(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.5]), cheapest)
        tensor(0.5000)
    """
    check_pair("regret", predicted, costs)
    gap = _dot(costs, decide(oracle, predicted)) - _dot(costs, decide(oracle, costs))
    return -gap if maximize else gap


def optimal_value(costs: Tensor, oracle: Oracle) -> Tensor:
    """The value phi(c) = min over S of c'w, whose derivative is the decision: d phi / dc = w(c), without a solve.

    The envelope theorem; where several w are optimal, w(c) is a supergradient (phi is concave), and the second
    derivative is zero wherever it exists. With an oracle that maximises it is the convex support function.

    Args:
        costs: shape (*batch, n).
        oracle: see `decide`.

    Returns:
        Shape (*batch,).

    Example:
        >>> from nestopt import implicit
        >>> def cheapest(c):
        ...     return torch.nn.functional.one_hot(c.argmin(-1), c.shape[-1])
        >>> c = torch.tensor([2.0, 1.0], requires_grad=True)
        >>> torch.autograd.grad(implicit.optimal_value(c, cheapest), c)
        (tensor([0., 1.]),)
    """
    return _dot(costs, decide(oracle, costs))


class _Decision(torch.autograd.Function):
    """The oracle, called once for everything that is batched or mapped."""

    @staticmethod
    def forward(oracle: Oracle, costs: Tensor) -> Tensor:
        rows = costs.detach().reshape(-1, costs.shape[-1])
        finite = rows.isfinite().all(-1, keepdim=True)
        with torch.no_grad():
            found = oracle(torch.where(finite, rows, 0))  # an item that has failed must not upset the solver
        if not isinstance(found, Tensor):
            raise TypeError(
                f"decide: the oracle must return a tensor, but it returned {type(found).__name__}; use "
                "torch.as_tensor(...)."
            )
        if found.shape != rows.shape:
            raise ValueError(
                f"decide: the oracle must return shape {tuple(rows.shape)}, one decision a row of costs, but it "
                f"returned {tuple(found.shape)}."
            )
        return torch.where(finite, found.to(rows), torch.nan).reshape(costs.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return None, None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], oracle: Oracle, costs: Tensor) -> tuple[Tensor, int]:
        assert in_dims[1] is not None
        return decide(oracle, costs.movedim(in_dims[1], 0)), 0


def _dot(u: Tensor, v: Tensor) -> Tensor:
    return (u * v).sum(-1)


def check_costs(owner: str, oracle: Any, costs: Any) -> None:
    """Refuse what is no oracle, and costs that are not vectors of floats."""
    if not callable(oracle):
        raise TypeError(f"{owner}: oracle must be a function of costs (batch, n), but got {type(oracle).__name__}.")
    if not isinstance(costs, Tensor) or not costs.is_floating_point():
        kind = costs.dtype if isinstance(costs, Tensor) else type(costs).__name__
        raise TypeError(f"{owner}: costs must be a floating tensor, but got {kind}.")
    if not costs.ndim:
        raise ValueError(f"{owner}: costs must have shape (*batch, n), but got a tensor without dimensions.")


def check_pair(owner: str, first: Tensor, second: Tensor, names: tuple[str, str] = ("predicted", "costs")) -> None:
    """Refuse two tensors of different shapes: broadcasting would hide a mistake."""
    for name, tensor in zip(names, (first, second), strict=True):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{owner}: {name} must be a floating tensor, but got {kind}.")
    if first.shape != second.shape:
        raise ValueError(
            f"{owner}: {names[0]} and {names[1]} must have one shape (*batch, n), but got {tuple(first.shape)} and "
            f"{tuple(second.shape)}."
        )
