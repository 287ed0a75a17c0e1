"""Hessian, GaussNewton, Jacobian: the operators of a user's function at a point, over pytrees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import Any, NoReturn

import optree
from torch import Tensor

from .autodiff import GraphOperator, fresh_leaves
from .chunks import Blocks, ChunkSize
from .convolution import FastConvolutions
from .data import BatchSum
from .guard import describe_captured, explain, graph_nodes, probe, refusal
from .isolation import RandomState, isolated
from .operator import LinearOperator
from .product import FreshGraph, HessianProduct, KeptGraph, Objective
from .tree import Ravel, leaf_paths, named_tree

__all__ = ["GaussNewton", "Hessian", "Jacobian", "on_batch"]


class Hessian(LinearOperator):
    """The Hessian of a scalar function of a pytree of tensors, by products; the matrix is never formed.

    H v = d/dt grad loss(params + t v) at t = 0, exact (Pearlmutter 1994). The tree is raveled in optree's order (dicts
    by sorted key), so that v has shape (..., n); `H.into.flatten(tree)` and `H.into.unflatten(v)` go both ways. The
    loss is evaluated once, here, at a copy of params: the operator does not see later changes of params, and every
    product has the same dropout masks. Products draw nothing from torch's generators. Buffers (BatchNorm's running
    statistics) are not changed, and attention runs by its mathematical kernel: see `isolated`.

    A loss that is linear in params has the zero Hessian; so has a tensor that loss does not use (`H.unused` names
    them). A NaN in the loss is a NaN in every product, which the solvers name.

    With `data`, the Hessian of the sum over batches of loss(params, batch), or of its mean over samples. By default
    (FreshGraph) the data are read again at every product, with the memory of one batch's graph at a time; two passes at
    construction must agree, so a shuffling loader is refused. KeptGraph reads them once and holds all graphs.

    Accuracy: a product's relative error is a few roundings of the dtype of params: 1e-15 in float64, 1e-6 in float32,
    1e-2 in bfloat16, relative to the largest terms that are summed in it. Products are taken in that dtype.

    Cost: 2 to 3 gradients to construct, then about one gradient a product; other trades by `product`. With `data`, in
    gradients of the whole data: 4 to 6 to construct and 2 to 2.5 for a product with one vector plus about one for each
    further vector of a block; kept graphs as without data.

    Args:
        loss: loss(params) -> scalar tensor; with data, loss(params, batch).
        params: pytree of floating tensors of one dtype and device, or a module, whose named parameters are then passed
            to loss as a dict (for `torch.func.functional_call`).
        product: KeptGraph(), FreshGraph() or ForwardOverReverse(), each with a chunk_size for blocks, or Compiled(...);
            None for KeptGraph(), and for FreshGraph() with data.
        data: iterable of batches that can be read again and gives the same ones, such as a list, or a DataLoader with
            shuffle=False.
        reduction: "sum" over batches; "mean" weighs each batch by its samples (the first dimension of its first
            tensor) over all samples, which is the mean over data where loss is a mean over its batch.
        definite: see LinearOperator; True where the loss is strictly convex.

    Attributes:
        into: the Ravel of params.
        value: the loss, 0-d.
        gradient: its gradient, (n,).
        unused: paths of the tensors of params that the loss does not depend on.

    Raises:
        TypeError: if loss does not return a floating tensor, a leaf of params is not a floating tensor, or
            (UndifferentiableError) an operation has no second derivative, which names it, its module and the cure.
        ValueError: if the loss is not a scalar, does not depend on params, or captures tensors that require grad; if
            params is empty or of several dtypes or devices.

    Reference:
        Pearlmutter 1994, Fast exact multiplication by the Hessian.

    Example:
        >>> import torch
        >>> x = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
        >>> H = Hessian(lambda p: p["b"] * (p["a"] ** 2).sum(), x)
        >>> H @ torch.tensor([1.0, 0.0, 0.0])
        tensor([6., 0., 2.])
        >>> H.gradient
        tensor([ 6., 12.,  5.])
    """

    def __init__(
        self,
        loss: Callable[[Any], Any],
        params: Any,
        *,
        product: HessianProduct | None = None,
        data: Iterable[Any] | None = None,
        reduction: str = "sum",
        definite: bool | None = None,
    ) -> None:
        if product is None:
            product = KeptGraph() if data is None else FreshGraph()
        if not isinstance(product, HessianProduct):
            raise TypeError(
                f"Hessian: product must be KeptGraph(), FreshGraph() or ForwardOverReverse(), but got {product!r}."
            )
        params = named_tree(params)
        self.into = Ravel.of(params, "params")
        super().__init__(
            (self.into.size, self.into.size), self.into.dtype, self.into.device, symmetric=True, definite=definite
        )
        self.product = product
        self.operator: Any  # with Blocks, or a BatchSum
        if data is not None:
            self._sum(loss, params, data, reduction)
            return
        self._objective = Objective(
            loss, self.into, [leaf.detach() for leaf in fresh_leaves(self.into, params)],
            RandomState.now(self.device), "loss",
        )  # fmt: skip
        leaves = self._objective.leaves()
        value = self._objective(leaves) if product.forward else self._objective.record(leaves)
        nodes = list(graph_nodes([value]))
        self.unused = _check_graph("Hessian", "loss", loss, nodes, leaves, params)
        found = probe(nodes, forward=product.forward, batched=product.chunk_size is not None)
        if found is not None:
            raise refusal("Hessian", *found, self._objective.replay)
        self.value = value.detach()
        try:
            self.gradient, self.operator, self._blocks = product.attach(self._objective, value, leaves)
        except RuntimeError as error:  # NotImplementedError is one
            self._refuse(error, forward=False)

    @property
    def looped(self) -> str | None:
        """Why the last block went one vector at a time in spite of a chunk_size, or None.

        An operation cannot be vmapped; under AutoChunk also: the loop is as fast, or two vectors do not fit.
        """
        return self._blocks.reason

    def _sum(self, loss: Callable[..., Any], params: Any, data: Iterable[Any], reduction: str) -> None:
        """The sum over batches: each a Hessian of its own, kept or made anew."""
        product = self.product.once()
        point = self.into.copy(params)
        total = BatchSum(
            "Hessian", lambda batch, _: Hessian(partial(on_batch, loss, batch), point, product=product), data,
            self.into, reduction=reduction, keep=self.product.kept,
        )  # fmt: skip
        self.value, self.gradient, self.operator = total.value, total.gradient, total
        self.unused, (self._blocks,) = total.unused, total.blocks or ()

    def _mark(self) -> Tensor:
        return self.gradient

    def _share(self, blocks: tuple[Blocks, ...] | None) -> tuple[Blocks, ...]:
        if blocks is not None:
            self._blocks = self.operator.blocks = blocks[0].joined(self._blocks)
        return (self._blocks,)

    def _matvec(self, v: Tensor) -> Tensor:
        if isinstance(self.operator, BatchSum):  # whose parts are Hessians and speak for themselves
            return self.operator._matvec(v)
        try:
            out: Tensor = self.operator._matvec(v)
            return out
        except Exception as error:  # a compiled function that is traced in forward mode fails an assertion
            self._refuse(error, forward=self.product.forward)

    def _refuse(self, error: Exception, *, forward: bool) -> NoReturn:
        better = explain("Hessian", error, self._objective.replay, forward=forward)
        if better is None:
            raise error
        raise better from error


class Jacobian(LinearOperator):
    """The Jacobian of a function between pytrees of tensors, by products with it and with its transpose.

    J v = d/dt function(params + t v) at t = 0, of shape (..., m); J' u of shape (..., n). The function is evaluated
    once, here, at a copy of params, and its graph is kept: dropout masks are fixed, buffers are not changed.
    `J.into` ravels params and `J.out` ravels the outputs.

    Cost: one evaluation to construct; a backward pass for each product with J'; the first product with J makes the
    backward graph, which is kept, and then one pass through it a product.

    Args:
        function: function(params) -> pytree of floating tensors, of the dtype and device of params.
        params: pytree of floating tensors, or a module, whose named parameters are then passed as a dict.
        chunk_size: vectors of a block in one vmapped pass, or AutoChunk(); None for one pass a vector.

    Attributes:
        into: the Ravel of params.
        out: the Ravel of the outputs.
        value: the outputs as one vector (m,).
        unused: paths of the tensors of params that no output depends on.

    Raises:
        TypeError: if a leaf of params or of the outputs is not a floating tensor; from a product with J,
            (UndifferentiableError) if an operation's backward pass cannot be differentiated.
        ValueError: if the outputs do not depend on params, differ in dtype or device, or the function captures tensors
            that require grad.

    Example:
        >>> import torch
        >>> J = Jacobian(lambda x: {"square": x**2, "sum": x.sum()}, torch.tensor([1.0, 2.0]))
        >>> J @ torch.tensor([1.0, 1.0]), J.T @ torch.tensor([0.0, 0.0, 1.0])
        (tensor([2., 4., 2.]), tensor([1., 1.]))
    """

    def __init__(self, function: Callable[[Any], Any], params: Any, *, chunk_size: ChunkSize = None) -> None:
        params = named_tree(params)
        self.into = into = Ravel.of(params, "params")
        leaves = fresh_leaves(into, params)
        random = RandomState.now(into.device)

        def evaluate() -> Any:  # holds no reference to self: the graph is freed with the operator, not by a collection
            with isolated(), FastConvolutions():
                return function(into.build(leaves))

        tree = evaluate()
        self.out = Ravel.of(tree, "the output of function")
        if self.out.dtype != self.into.dtype or self.out.device != self.into.device:
            raise ValueError(
                f"Jacobian: the output of function must be {self.into.dtype} on {self.into.device}, like params, but "
                f"it is {self.out.dtype} on {self.out.device}; convert it with .to(...)."
            )
        super().__init__((self.out.size, self.into.size), self.into.dtype, self.into.device)
        outputs = optree.tree_leaves(tree)
        nodes = list(graph_nodes(outputs))
        self.unused = _check_graph("Jacobian", "function", function, nodes, leaves, params, outputs)
        self.operator = GraphOperator(outputs, leaves, self.out, self.into, chunk_size=chunk_size)
        self.value = self.out.join([output.detach() for output in outputs])
        self._replay = lambda: random.run(evaluate)
        self._probed = False

    def _matvec(self, v: Tensor) -> Tensor:
        if not self._probed:  # a backward pass that is differentiable once would give silent zeros
            found = probe(graph_nodes(self.operator.outputs), linear=True)
            if found is not None:
                raise refusal("Jacobian", *found, self._replay)
            self._probed = True
        return self._explained(self.operator._matvec, v)

    def _rmatvec(self, v: Tensor) -> Tensor:
        return self._explained(self.operator._rmatvec, v)

    def _explained(self, product: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        try:
            return product(v)
        except RuntimeError as error:
            better = explain("Jacobian", error, self._replay)
            if better is None:
                raise
            raise better from error


class GaussNewton(LinearOperator):
    """The generalised Gauss-Newton matrix J' L J of loss(model(params)), by products; semidefinite for convex losses.

    J is the Jacobian of model at params and L the Hessian of loss at its outputs, so that the Hessian of the
    composition is J' L J plus the curvature of model, which is left out. L is taken by autograd, so that any twice
    differentiable loss will do: cross-entropy, mse_loss, one that couples samples. Both graphs are made once and kept.

    With `data`, the sum over batches, or the mean over samples: see Hessian. Data are read again at every product, with
    the memory of one batch's graphs at a time, unless keep_graphs.

    Cost: three backward passes a product, of which two go through model: about one gradient. With data that are read
    again, two evaluations and a graph of the backward pass more: about three gradients of the whole data for one
    vector, and one for each further vector of a block.

    Args:
        model: model(params) -> pytree of floating tensors; with data, model(params, batch).
        loss: loss(outputs) -> scalar; with data, loss(outputs, batch); convex where the product should be positive
            semidefinite.
        params: pytree of floating tensors, or a module, whose named parameters are then passed as a dict.
        chunk_size: vectors of a block in one vmapped pass, or AutoChunk(); None for one pass a vector.
        data: iterable of batches; see Hessian.
        reduction: "sum" or "mean"; see Hessian.
        keep_graphs: read data once and hold the graphs of every batch.
        definite: see LinearOperator; True where J has full column rank and L is positive definite.

    Attributes:
        jacobian: J, a Jacobian, where there is no data.
        loss_hessian: L, a Hessian, likewise.
        value: loss(model(params)).
        gradient: of the composition, J' times the gradient of loss.

    Reference:
        Schraudolph 2002, Fast curvature matrix-vector products for second-order gradient descent.

    Example:
        >>> import torch
        >>> A = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
        >>> G = GaussNewton(lambda x: A @ x, lambda r: (r**2).sum() / 2, torch.zeros(2))
        >>> G.to_dense()
        tensor([[2., 2.],
                [2., 4.]])
    """

    def __init__(
        self,
        model: Callable[[Any], Any],
        loss: Callable[[Any], Any],
        params: Any,
        *,
        chunk_size: ChunkSize = None,
        data: Iterable[Any] | None = None,
        reduction: str = "sum",
        keep_graphs: bool = False,
        definite: bool | None = None,
    ) -> None:
        params = named_tree(params)
        self.into = Ravel.of(params, "params")
        super().__init__(
            (self.into.size, self.into.size), self.into.dtype, self.into.device, symmetric=True, definite=definite
        )
        self._sum: BatchSum | None = None
        if data is not None:
            point = self.into.copy(params)

            def make(batch: Any, _: int) -> GaussNewton:
                return GaussNewton(
                    partial(on_batch, model, batch), partial(on_batch, loss, batch), point, chunk_size=chunk_size
                )

            self._sum = BatchSum("GaussNewton", make, data, self.into, reduction=reduction, keep=keep_graphs)
            self.value, self.unused = self._sum.value, self._sum.unused
            return
        self.jacobian = Jacobian(model, params, chunk_size=chunk_size)
        outputs = self.jacobian.out.unflatten(self.jacobian.value)
        self.loss_hessian = Hessian(loss, outputs, product=KeptGraph(chunk_size))
        self.value, self.unused = self.loss_hessian.value, self.jacobian.unused

    @cached_property
    def gradient(self) -> Tensor:
        """The gradient of the composition."""
        return self._sum.gradient if self._sum is not None else self.jacobian._rmatvec(self.loss_hessian.gradient)

    def _mark(self) -> Tensor:
        return self.gradient

    def _share(self, blocks: tuple[Blocks, ...] | None) -> tuple[Blocks, ...]:
        first, last = (None, None) if blocks is None else (blocks[:2], blocks[2:])
        return *self.jacobian.operator.share(first), *self.loss_hessian._share(last)

    def _matvec(self, v: Tensor) -> Tensor:
        if self._sum is not None:
            return self._sum._matvec(v)
        J, L = self.jacobian, self.loss_hessian
        return J._rmatvec(L._matvec(J._matvec(v)))


def on_batch(function: Callable[..., Any], batch: Any, argument: Any) -> Any:
    """function(argument, batch), with the batch bound first."""
    return function(argument, batch)


def _check_graph(
    owner: str,
    role: str,
    function: Callable[..., Any],
    nodes: Sequence[Any],
    leaves: Sequence[Tensor],
    params: Any,
    outputs: Sequence[Tensor] = (),
) -> list[str]:
    """Refuse functions that miss params or use other tensors that require grad; the paths of what is unused."""
    # an output that is itself a leaf has no node
    ends = [*(getattr(node, "variable", None) for node in nodes), *(out for out in outputs if out.is_leaf)]
    reached = {id(leaf): leaf for leaf in ends if leaf is not None and leaf.requires_grad}
    unused = [i for i, leaf in enumerate(leaves) if reached.pop(id(leaf), None) is None]
    captured = list(reached.values())
    originals = {id(leaf) for leaf in optree.tree_leaves(params)} if captured else set()
    if captured and all(id(leaf) in originals for leaf in captured):
        raise ValueError(
            f"{owner}: {role} uses the tensors of params themselves ({describe_captured(function, captured)}) instead "
            f"of its argument; compute with the argument, for a module by functional_call(module, params, x)."
        )
    if captured:
        raise ValueError(
            f"{owner}: {role} uses tensors that require grad and are not in params: "
            f"{describe_captured(function, captured)}; put them into params, or detach them (requires_grad_(False))."
        )
    if len(unused) == len(leaves):
        raise ValueError(
            f"{owner}: {role} does not depend on params, so there is nothing to differentiate; look for .detach(), "
            ".item(), torch.no_grad() or an unused argument."
        )
    if not unused:
        return []
    paths = leaf_paths(params, "params")
    return [paths[i] for i in unused]
