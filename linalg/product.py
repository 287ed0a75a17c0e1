"""Ways to multiply by a Hessian: along a kept gradient graph, along a fresh one, or forward over reverse."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import optree
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from .autodiff import GraphOperator, evaluate, gradient
from .chunks import Blocks, ChunkSize, check_chunk_size
from .convolution import FastConvolutions
from .isolation import RandomState, isolated
from .operator import LinearOperator
from .tree import Ravel

__all__ = ["Compiled", "ForwardOverReverse", "FreshGraph", "HessianProduct", "KeptGraph", "Objective"]


@dataclass(frozen=True)
class Objective:
    """A user's scalar function at a fixed point and a fixed state of torch's generators.

    Args:
        function: of the tree.
        ravel: of the tree.
        tensors: the point's leaves, detached.
        random: from which every evaluation draws.
        name: what the function is called in error messages.
    """

    function: Callable[[Any], Any]
    ravel: Ravel
    tensors: list[Tensor]
    random: RandomState
    name: str

    def leaves(self) -> list[Tensor]:
        """The point as leaves that require grad."""
        return [tensor.detach().requires_grad_() for tensor in self.tensors]

    def __call__(self, leaves: list[Tensor]) -> Tensor:
        """The value, with its graph, drawn from wherever the generators stand."""
        return evaluate(self.function, self.ravel.build(leaves), name=self.name)

    def record(self, leaves: list[Tensor]) -> Tensor:
        """The value, with a graph that is cheap to differentiate twice, but that torch.func could not trace."""
        with FastConvolutions():
            return self(leaves)

    def replay(self) -> Tensor:
        """The value once more, with the masks of the first time; the generators stay where they are."""
        value: Tensor = self.random.run(lambda: self(self.leaves()))
        return value


class Attached(NamedTuple):
    """A Hessian at a point."""

    gradient: Tensor
    operator: LinearOperator
    blocks: Blocks


@dataclass(frozen=True)
class HessianProduct(ABC):
    """How `Hessian` multiplies; see KeptGraph, FreshGraph, ForwardOverReverse."""

    chunk_size: ChunkSize = None
    forward: ClassVar[bool] = False  # traced in forward mode
    kept: ClassVar[bool] = False  # the graph lives as long as the operator

    def __post_init__(self) -> None:
        check_chunk_size(type(self).__name__, self.chunk_size)

    def once(self) -> HessianProduct:
        """The product for an operator that is dropped after one call of `@`: of one batch of many."""
        return self

    @abstractmethod
    def attach(self, objective: Objective, value: Tensor, leaves: list[Tensor]) -> Attached:
        """The Hessian, and the gradient that was needed for it.

        Args:
            objective: to evaluate again.
            value: it has been evaluated at the leaves, with its graph.
            leaves: of the graph.

        Returns:
            Both, as Attached.
        """


@dataclass(frozen=True)
class KeptGraph(HessianProduct):
    """One gradient graph, kept for the operator's life: one backward pass a product.

    The graph's memory (about that of the gradient, twice) is held until the operator is dropped. Data, dropout masks
    and values are those of the construction. Cost: 1.0 to 1.3 gradients a product, 2 where inner layers dominate.

    Args:
        chunk_size: vectors of a block in one vmapped pass: 3 to 6 times as fast for tiny models (below about 10^4
            multiplications), no gain for others; AutoChunk() to let a measurement decide; None for one pass a vector.

    Example:
        >>> from nestopt.linalg import Hessian, KeptGraph
        >>> H = Hessian(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]), product=KeptGraph(chunk_size=2))
        >>> H @ torch.eye(2)
        tensor([[ 6.,  0.],
                [ 0., 12.]])
    """

    kept: ClassVar[bool] = True

    def attach(self, objective: Objective, value: Tensor, leaves: list[Tensor]) -> Attached:
        """See HessianProduct."""
        kept = _HessianGraph(objective.ravel, value, leaves, self.chunk_size)
        return Attached(kept.gradient, kept, kept.blocks)


@dataclass(frozen=True)
class FreshGraph(HessianProduct):
    """A new gradient graph at every call of `@`, freed at its end: constant memory between products.

    A block of vectors shares one graph. Cost: 2.0 to 2.5 gradients for one vector, and 1.0 to 1.3 for each further one
    of the block.

    Args:
        chunk_size: vectors of a block in one vmapped pass, or AutoChunk(); None for one pass a vector.

    Example:
        >>> from nestopt.linalg import FreshGraph, Hessian
        >>> Hessian(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]), product=FreshGraph()) @ torch.ones(2)
        tensor([ 6., 12.])
    """

    def once(self) -> HessianProduct:
        """A graph that is kept for that one call."""
        return KeptGraph(self.chunk_size)

    def attach(self, objective: Objective, value: Tensor, leaves: list[Tensor]) -> Attached:
        """See HessianProduct."""
        with isolated():
            first = gradient(value, leaves)
        operator = _Fresh(objective, self.chunk_size)
        return Attached(objective.ravel.join(first), operator, operator.blocks)


@dataclass(frozen=True)
class ForwardOverReverse(HessianProduct):
    """The derivative of the gradient along v, in forward mode, `torch.func.jvp(grad)`: no graph outlives a product.

    Less memory than FreshGraph for deep functions, but more operations lack a forward mode than a second reverse one;
    they are refused at construction. Cost: 2.5 to 6 gradients a product, eager on a CPU.

    Args:
        chunk_size: vectors of a block in one vmapped pass, which shares the gradient's work, or AutoChunk(); None for
            one at a time.

    Example:
        >>> from nestopt.linalg import ForwardOverReverse, Hessian
        >>> Hessian(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]), product=ForwardOverReverse()) @ torch.ones(2)
        tensor([ 6., 12.])
    """

    forward: ClassVar[bool] = True

    def attach(self, objective: Objective, value: Tensor, leaves: list[Tensor]) -> Attached:
        """See HessianProduct."""
        with isolated():
            first = gradient(value, leaves)
        operator = _Forward(objective, self.chunk_size)
        return Attached(objective.ravel.join(first), operator, operator.blocks)


@dataclass(frozen=True)
class Compiled(HessianProduct):
    """A product compiled by `torch.compile`: reverse over reverse from the params to H v, the loss evaluated in it.

    Nothing is kept between products, so memory is FreshGraph's. It wins where a product is made of many small
    operations and is repeated hundreds of times: on a GPU 1.1 to 2.9 times as fast as eager products, for tiny models
    on a CPU twice; for larger models on a CPU a kept graph is faster. The first product compiles (seconds), and so does
    the first block of each new number of vectors. It is then held against an eager product, once, so that a function
    that a compiler changes is refused and not multiplied with. The function must compile as one graph.

    Not for functions that draw random numbers (compiled code draws others), change buffers (BatchNorm in train mode),
    or take `data` (each batch would be compiled anew: use FreshGraph).

    Args:
        chunk_size: vectors of a block in one vmapped pass, or AutoChunk(); None for one at a time.
        backend: of torch.compile; "inductor" needs a C++ compiler on the CPU, "aot_eager" and "eager" need none.

    Example:
        >>> from nestopt.linalg import Compiled, Hessian
        >>> H = Hessian(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]), product=Compiled(backend="eager"))
        >>> H @ torch.ones(2)
        tensor([ 6., 12.])
    """

    backend: Any = "inductor"

    def once(self) -> HessianProduct:
        """Refused: compiling again for every batch cannot be meant."""
        raise TypeError("Hessian: Compiled() cannot take data, each batch would be compiled anew; use FreshGraph().")

    def attach(self, objective: Objective, value: Tensor, leaves: list[Tensor]) -> Attached:
        """See HessianProduct."""
        now = RandomState.now(objective.random.device)
        if not all(torch.equal(a, b) for a, b in zip(now.states, objective.random.states, strict=True)):
            raise TypeError(
                f"Hessian: {objective.name} draws random numbers, and compiled code would draw others; put dropout "
                "into eval mode, or use product=KeptGraph()."
            )
        with isolated():
            first = gradient(value, leaves)
        operator = _Compiled(objective, self.chunk_size, self.backend)
        return Attached(objective.ravel.join(first), operator, operator.blocks)


class _HessianGraph(GraphOperator):
    """The Jacobian of a gradient, along its graph."""

    def __init__(self, ravel: Ravel, value: Tensor, leaves: list[Tensor], chunk_size: ChunkSize) -> None:
        with isolated() as isolation:
            before = isolation.calls
            graph = gradient(value, leaves, create_graph=True)
        super().__init__(graph, leaves, ravel, ravel, symmetric=True, chunk_size=chunk_size)
        # activation checkpointing evaluates modules in the backward pass, and will in every product
        self.recomputes = isolation.calls > before
        self.gradient = ravel.join(graph).detach()

    def _matvec(self, v: Tensor) -> Tensor:
        if self.recomputes:
            with isolated():
                return super()._matvec(v)
        return super()._matvec(v)


class _Fresh(LinearOperator):
    def __init__(self, objective: Objective, chunk_size: ChunkSize) -> None:
        ravel = objective.ravel
        super().__init__((ravel.size, ravel.size), ravel.dtype, ravel.device, symmetric=True)
        self.objective, self.blocks = objective, Blocks(chunk_size)

    def _matvec(self, v: Tensor) -> Tensor:
        def products() -> Tensor:
            leaves, blocks = self.objective.leaves(), self.blocks
            graph = _HessianGraph(self.objective.ravel, self.objective.record(leaves), leaves, blocks.chunk_size)
            blocks.looped = blocks.looped or graph.blocks.looped
            graph.blocks = blocks  # what was measured of one graph holds for the next
            return graph._matvec(v)

        product: Tensor = self.objective.random.run(products)
        return product


class _Forward(LinearOperator):
    def __init__(self, objective: Objective, chunk_size: ChunkSize) -> None:
        ravel = objective.ravel
        super().__init__((ravel.size, ravel.size), ravel.dtype, ravel.device, symmetric=True)
        self.objective, self.blocks = objective, Blocks(chunk_size)
        with warnings.catch_warnings():  # the first use in a process scripts torch's own rules, which is deprecated
            warnings.simplefilter("ignore", DeprecationWarning)
            with forward_ad.dual_level():
                forward_ad.make_dual(torch.zeros(()), torch.zeros(()))  # type: ignore[no-untyped-call]

    def _matvec(self, v: Tensor) -> Tensor:
        return self.blocks.apply(self._product, v, self.shape[-1])

    def _product(self, v: Tensor, batched: bool) -> Tensor:
        slope = torch.func.grad(self.objective)
        ravel, point = self.objective.ravel, self.objective.tensors

        def along(u: Tensor) -> Tensor:
            return ravel.join(torch.func.jvp(slope, (point,), (ravel.split(u),))[1])

        # one mask for all the vectors of a chunk
        function = torch.func.vmap(along, randomness="same") if batched else along
        product: Tensor = self.objective.random.run(lambda: function(v))
        return product.detach()


class _Compiled(LinearOperator):
    def __init__(self, objective: Objective, chunk_size: ChunkSize, backend: Any) -> None:
        ravel = objective.ravel
        super().__init__((ravel.size, ravel.size), ravel.dtype, ravel.device, symmetric=True)
        self.objective, self.blocks, self._checked = objective, Blocks(chunk_size), False
        function, places = objective.function, optree.tree_unflatten(ravel.treespec, range(len(ravel.shapes)))

        def product(point: list[Tensor], u: list[Tensor]) -> list[Tensor]:
            def value(tensors: list[Tensor]) -> Tensor:  # a compiler cannot look into optree's own structures
                out: Tensor = function(tree_map(lambda place: tensors[place], places)).reshape(())
                return out

            slope = torch.func.grad(value)
            pulled: list[Tensor] = torch.func.vjp(slope, point)[1](u)[0]
            return pulled

        # fullgraph: what cannot be compiled is an error, not an eager product in silence
        settings: dict[str, Any] = {"backend": backend, "dynamic": False, "fullgraph": True}
        self._one = torch.compile(product, **settings)
        self._many = torch.compile(torch.func.vmap(product, in_dims=(None, 0)), **settings)

    def _matvec(self, v: Tensor) -> Tensor:
        out = self.blocks.apply(self._product, v, self.shape[-1])
        if not self._checked and v.numel():
            self._check_once(v.reshape(-1, v.shape[-1])[0], out.reshape(-1, v.shape[-1])[0])
        return out

    def _product(self, v: Tensor, batched: bool) -> Tensor:
        # not `isolated`: a compiler must not trace its hooks
        with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            parts = (self._many if batched else self._one)(self.objective.tensors, self.objective.ravel.split(v))
        return self.objective.ravel.join(list(parts)).detach()

    def _check_once(self, v: Tensor, found: Tensor) -> None:
        eager = _Fresh(self.objective, None)._matvec(v)
        gap, size = (found - eager).abs().max(), eager.abs().max()
        if bool(gap > torch.finfo(self.dtype).eps ** 0.5 * size):
            raise ValueError(
                f"Hessian: the compiled product differs from the eager one by {float(gap):.1e}, where the largest "
                f"entry is {float(size):.1e}: {self.objective.name} does not survive compilation; use "
                "product=KeptGraph()."
            )
        self._checked = True
