"""Calls of torch.autograd, in one typed place: evaluation of a user's function, gradients, kept graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .chunks import Blocks, ChunkSize, check_chunk_size
from .guard import graph_nodes, unbatchable
from .isolation import isolated
from .operator import LinearOperator
from .tree import Ravel

__all__ = [
    "Blocks",
    "GraphOperator",
    "captured_leaves",
    "check_chunk_size",
    "evaluate",
    "fresh_leaves",
    "gradient",
    "products",
    "reached_leaves",
]


def fresh_leaves(ravel: Ravel, tree: Any) -> list[Tensor]:
    """New leaves with the tree's values, cut from its graph and requiring grad: nobody else's `.grad` is touched."""
    with torch.inference_mode(False):  # an inference tensor cannot require grad
        return [leaf.detach().clone().requires_grad_() for leaf in ravel.leaves(tree)]


def evaluate(function: Callable[..., Any], *arguments: Any, name: str) -> Tensor:
    """The scalar that a user's objective returns, evaluated so that it can be differentiated twice.

    Attention runs by its mathematical kernel (the fused ones have no second derivative), and modules keep their
    buffers: see `isolated`.

    Args:
        function: the objective.
        arguments: what it is called with.
        name: what it is called in error messages.

    Returns:
        A 0-d tensor, with its graph.

    Raises:
        TypeError: if the value is not a real floating tensor.
        ValueError: if it has more than one element.
    """
    with isolated():
        value = function(*arguments)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must return a floating scalar tensor, but it returned {kind}; return e.g. a mean.")
        if value.numel() != 1:
            raise ValueError(
                f"{name} must return a scalar, but it returned a tensor of shape {tuple(value.shape)}; return its mean "
                "or sum."
            )
        return value.reshape(())


def gradient(value: Tensor, inputs: Sequence[Tensor], *, create_graph: bool = False, keep: bool = True) -> list[Tensor]:
    """Gradients of a scalar, zeros for inputs that it does not depend on.

    Args:
        value: scalar with its graph.
        inputs: leaves.
        create_graph: keep the gradient's own graph, for products with second derivatives.
        keep: False frees the value's graph while it is walked, where nothing else needs it.

    Returns:
        One gradient an input.
    """
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in inputs]
    return list(
        torch.autograd.grad(
            value, inputs, create_graph=create_graph, retain_graph=keep, allow_unused=True, materialize_grads=True
        )
    )


def products(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    *,
    batched: bool = False,
    keep: bool = True,
) -> list[Tensor]:
    """Vector-Jacobian products along a graph: sum over outputs of (d output / d input)' cotangent.

    Args:
        outputs: tensors with their graph; those without one are constant and add nothing.
        inputs: leaves.
        cotangents: one an output, of its shape, or of shape (k, *shape) when batched.
        batched: vmap the backward pass over the cotangents' first dimension.
        keep: False frees the graph while it is walked, where nothing else needs it.

    Returns:
        One tensor an input, zeros where nothing depends on it.
    """
    front = cotangents[0].shape[:1] if batched else ()
    live = [(output, cotangent) for output, cotangent in zip(outputs, cotangents, strict=True) if output.requires_grad]
    if not live:
        return [leaf.new_zeros((*front, *leaf.shape)) for leaf in inputs]
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        [output for output, _ in live],
        inputs,
        [cotangent for _, cotangent in live],
        retain_graph=keep,
        allow_unused=True,
        is_grads_batched=batched,
    )
    # materialize_grads would not give zeros the batch dimension
    return [
        leaf.new_zeros((*front, *leaf.shape)) if part is None else part
        for part, leaf in zip(found, inputs, strict=True)
    ]


def reached_leaves(value: Tensor) -> list[Tensor]:
    """The leaves requiring grad that a value's graph reaches."""
    if value.grad_fn is None:
        return [value] if value.requires_grad else []
    leaves = (getattr(node, "variable", None) for node in graph_nodes([value]))
    return list({id(leaf): leaf for leaf in leaves if leaf is not None}.values())


def captured_leaves(value: Tensor, known: Sequence[Tensor]) -> list[Tensor]:
    """Leaves requiring grad that a value's graph reaches and that are not among the known ones: captured by closure."""
    ours = {id(leaf) for leaf in known}
    return [leaf for leaf in reached_leaves(value) if id(leaf) not in ours]


class GraphOperator(LinearOperator):
    """The Jacobian of outputs with respect to inputs along a graph that is kept: one backward pass a product.

    `A.T @ u` is one backward pass; so is `A @ v` when A is symmetric (a Hessian: outputs are the gradient), else it
    is a backward pass through the backward pass, whose graph is made at the first such product and kept as well.
    Nothing is evaluated anew, so dropout masks and data stay fixed.

    Args:
        outputs: tensors with their graph, raveled by `out`: the rows.
        inputs: leaves of the graph, raveled by `into`: the columns.
        out: ravel of the outputs.
        into: ravel of the inputs.
        symmetric: promise that the outputs are a gradient with respect to the inputs.
        definite: see LinearOperator.
        chunk_size: vectors of a block in one vmapped backward pass, or AutoChunk(); None for one pass a vector, which
            is as fast for all but tiny models.
    """

    def __init__(
        self,
        outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
        out: Ravel,
        into: Ravel,
        *,
        symmetric: bool = False,
        definite: bool | None = None,
        chunk_size: ChunkSize = None,
    ) -> None:
        super().__init__((out.size, into.size), into.dtype, into.device, symmetric=symmetric, definite=definite)
        self.outputs, self.inputs, self.out, self.into = list(outputs), list(inputs), out, into
        looped = None if chunk_size is None else unbatchable(self.outputs)
        self.blocks, self.forward_blocks = Blocks(chunk_size, looped), Blocks(chunk_size, looped)
        self._dual: tuple[list[Tensor], list[Tensor]] | None = None

    def share(self, blocks: tuple[Blocks, ...] | None) -> tuple[Blocks, ...]:
        """Use the Blocks of another operator of this kind: those of products with A' and those with A.

        Args:
            blocks: them, or None to keep one's own.

        Returns:
            Those in use.
        """
        if blocks is not None:
            self.blocks, self.forward_blocks = (
                other.joined(own) for other, own in zip(blocks, (self.blocks, self.forward_blocks), strict=True)
            )
        return self.blocks, self.forward_blocks

    def _rmatvec(self, v: Tensor) -> Tensor:
        return self.blocks.apply(self._backward, v, self.into.size)

    def _matvec(self, v: Tensor) -> Tensor:
        if self.symmetric:
            return self.blocks.apply(self._backward, v, self.out.size)
        if self._dual is None:
            self._dual = self._make_dual()
        return self.forward_blocks.apply(self._forward, v, self.out.size)

    def _backward(self, v: Tensor, batched: bool) -> Tensor:
        return self.into.join(products(self.outputs, self.inputs, self.out.split(v), batched=batched))

    def _make_dual(self) -> tuple[list[Tensor], list[Tensor]]:
        """The graph of u -> A'u and its input: that map is linear, and its own vjp is A."""
        with torch.enable_grad():
            u = [torch.zeros_like(output, requires_grad=True) for output in self.outputs]
            live = [(output, w) for output, w in zip(self.outputs, u, strict=True) if output.requires_grad]
            if not live:
                return [torch.zeros_like(leaf) for leaf in self.inputs], u
            dual = torch.autograd.grad(
                [output for output, _ in live],
                self.inputs,
                [w for _, w in live],
                create_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        return list(dual), u

    def _forward(self, v: Tensor, batched: bool) -> Tensor:
        assert self._dual is not None
        dual, u = self._dual
        return self.out.join(products(dual, u, self.into.split(v), batched=batched))
