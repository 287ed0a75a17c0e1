"""Where an objective is cut into model and loss: `mark_outputs`, and the two halves at a point."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from nestopt.linalg import LinearOperator
from nestopt.linalg.autodiff import GraphOperator, gradient, reached_leaves
from nestopt.linalg.tree import Ravel

from .minimizer import Objective, Point, Trial

__all__ = ["Cuts", "Halves", "differentiate_halves", "evaluate_halves", "mark_outputs"]

Cuts: TypeAlias = list[tuple[Tensor, Tensor]]

_CUTS: ContextVar[Cuts | None] = ContextVar("cuts", default=None)


def mark_outputs(outputs: Tensor) -> Tensor:
    """Tell a Gauss-Newton method that an objective is loss(outputs) here: the loss's curvature counts, the model's not.

    Everywhere else this is the identity, so that one objective serves every solver. An objective may mark several
    tensors; what it adds without a mark (a penalty on y) keeps its own curvature.

    Args:
        outputs: what the model returns, or the residuals of a least-squares problem: any shape, depending on y.

    Returns:
        The same values.

    Raises:
        TypeError: if outputs is not a floating tensor.

    Example:
        >>> from nestopt.implicit import LevenbergMarquardt, mark_outputs
        >>> def f(y):
        ...     return (mark_outputs(y**2 - 4) ** 2).sum() + 1e-3 * (y**2).sum()
        >>> LevenbergMarquardt()(f, torch.ones(1, dtype=torch.float64)).x
        tensor([1.9999], dtype=torch.float64)
    """
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        kind = outputs.dtype if isinstance(outputs, Tensor) else type(outputs).__name__
        raise TypeError(f"mark_outputs: outputs must be a floating tensor, but got {kind}; mark each tensor by itself.")
    cuts = _CUTS.get()
    if cuts is None:
        return outputs
    inside = outputs.detach().requires_grad_()
    cuts.append((outputs, inside))
    return inside


@dataclass(frozen=True)
class Halves:
    """An objective loss(outputs(y)) + rest(y) at a point.

    Attributes:
        jacobian: of the b marked outputs, (b, n).
        loss_hessian: (b, b), at the outputs.
        rest_hessian: (n, n), without what goes through the outputs.
        loss_gradient: (b,).
        rest_gradient: (n,).
    """

    jacobian: LinearOperator
    loss_hessian: LinearOperator
    rest_hessian: LinearOperator
    loss_gradient: Tensor
    rest_gradient: Tensor


def evaluate_halves(f: Objective, y: Tensor, owner: str) -> tuple[Trial, Cuts]:
    """F at y, its graph cut where it marks its outputs.

    Args:
        f: the objective.
        y: the point.
        owner: who asks, for the messages.

    Returns:
        The trial, and for each mark the outputs with the model's graph and the leaf that stands for them in the loss.

    Raises:
        ValueError: if the objective marks nothing, marks what was computed from marked outputs, or marks another
            dtype than y's.
    """
    with _recording() as cuts:
        trial = f.evaluate(y)
    if not cuts:
        raise ValueError(
            f"{owner}: the objective marks no outputs, so there is nothing to linearize; write "
            "loss(implicit.mark_outputs(model(y))), or use NewtonCG, which needs no marks."
        )
    kinds = {leaf.dtype for _, leaf in cuts} - {f.ravel.dtype}
    if kinds:
        raise ValueError(
            f"{owner}: marked outputs must have the dtype of y, {f.ravel.dtype}, but got {kinds.pop()}; convert before "
            "the mark."
        )
    inside = {id(leaf) for _, leaf in cuts}
    if any(id(leaf) in inside for outputs, _ in cuts for leaf in reached_leaves(outputs)):
        raise ValueError(f"{owner}: the objective marks what it computed from marked outputs; keep the last mark only.")
    return trial, cuts


def differentiate_halves(f: Objective, trial: Trial, cuts: Cuts, chunk_size: int | None = None) -> tuple[Point, Halves]:
    """The trial with its gradient and the operators of both halves.

    Args:
        f: the objective, which counts one gradient.
        trial: from `evaluate_halves`.
        cuts: likewise.
        chunk_size: vectors of a block in one vmapped pass.

    Returns:
        The point, and its halves.
    """
    f.gradients += 1
    outputs, inside = [cut[0] for cut in cuts], [cut[1] for cut in cuts]
    out, leaves = Ravel.of(inside, "the marked outputs"), trial.leaves
    parts = gradient(trial.graph, [*inside, *leaves], create_graph=True)
    head, rest = parts[: len(inside)], parts[len(inside) :]
    jacobian = GraphOperator(outputs, leaves, out, f.ravel, chunk_size=chunk_size)
    loss = GraphOperator(head, inside, out, out, symmetric=True, chunk_size=chunk_size)
    own = GraphOperator(rest, leaves, f.ravel, f.ravel, symmetric=True, chunk_size=chunk_size)
    h, q = out.join(head).detach(), f.ravel.join(rest).detach()
    g = q + jacobian.T @ h
    return Point(trial.y, trial.value, g, torch.linalg.vector_norm(g)), Halves(jacobian, loss, own, h, q)


@contextmanager
def _recording() -> Iterator[Cuts]:
    cuts: Cuts = []
    token = _CUTS.set(cuts)
    try:
        yield cuts
    finally:
        _CUTS.reset(token)
