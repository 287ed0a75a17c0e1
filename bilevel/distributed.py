"""Bilevel problems over torch.distributed, data-parallel: each process has its share of the samples, all of x and y."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import optree
import torch
import torch.distributed as dist
from torch import Tensor

from nestopt.linalg.autodiff import evaluate
from nestopt.linalg.parallel import all_reduced, check_group

from .block_batches import BlockDraw
from .module_loss import Term
from .parts import Mapped, Part
from .problem import Problem
from .stochastic import Batches

__all__ = ["Shards", "data_parallel"]

Group = Any  # dist.ProcessGroup, which a torch without distributed lacks
SomeProblem = TypeVar("SomeProblem", bound=Problem)
OWNER = "data_parallel"


class Total(torch.autograd.Function):
    """The sum over ranks of v; the transpose, at a cotangent that is the same on all ranks, is `Everywhere`."""

    @staticmethod
    def forward(v: Tensor, group: Group) -> Tensor:
        return all_reduced(v.detach().clone(memory_format=torch.contiguous_format), OWNER, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return Everywhere.apply(cotangents[0], ctx.group), None  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        return Total.apply(tangents[0], ctx.group)  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], v: Tensor, group: Group) -> Any:
        return Total.apply(v, group), in_dims[0]  # type: ignore[no-untyped-call]


class Everywhere(torch.autograd.Function):
    """The map v -> v, the same on all ranks, each of which goes its own way with it; the transpose is the `Total`.

    The two are each other's transposes, so that derivatives of every order of a function between them are those of the
    sum of the ranks' functions: a gradient or a product with second derivatives costs one all-reduce.
    """

    @staticmethod
    def forward(v: Tensor, group: Group) -> Tensor:
        return v.detach().clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return Total.apply(cotangents[0], ctx.group), None  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        return Everywhere.apply(tangents[0], ctx.group)  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], v: Tensor, group: Group) -> Any:
        return Everywhere.apply(v, group), in_dims[0]  # type: ignore[no-untyped-call]


class Averaged(Term):
    """The mean over ranks of a function of (x, y[, data]), each at its own data.

    Args:
        function: this rank's.
        name: upper or lower.
        group: the process group; None for all.
        compared: which of x and y were seen to be the same on all ranks.
    """

    def __init__(
        self, function: Callable[..., Tensor], name: str, group: Group = None, compared: set[str] | None = None
    ) -> None:
        self.function, self.name, self.group = function, name, group
        self._compared: set[str] = set() if compared is None else compared

    def mixed(self) -> Averaged:
        """See `Term.mixed`."""
        if not isinstance(self.function, Term) or self.function.mixed() is self.function:
            return self
        return Averaged(self.function.mixed(), self.name, self.group, self._compared)

    def move_buffers(self, x: Any, y: Any, *data: Any) -> None:
        """See `Term.move_buffers`; of this rank's modules, by its data."""
        assert isinstance(self.function, Term)
        self.function.move_buffers(x, y, *data)

    def __call__(self, x: Any, y: Any, *data: Any) -> Tensor:
        """The mean, the same on all ranks, and so are its derivatives."""
        part = Part.of(data[0] if data else None)
        passed = (part if part.step is not None else part.value,) if data else ()
        value = evaluate(self.function, self._spread(x, "x"), self._spread(y, "y"), *passed, name=self.name)
        share = part.weight / dist.get_world_size(self.group)
        return Total.apply(share * value, self.group)  # type: ignore[no-untyped-call, no-any-return]

    def _spread(self, tree: Any, name: str) -> Any:
        """The tree behind one node, so that its gradient is one all-reduce."""
        leaves, treespec = optree.tree_flatten(tree)
        flat = torch.cat([leaf.reshape(-1) for leaf in leaves])
        if name not in self._compared:
            self._compare(flat.detach(), name)
            self._compared.add(name)
        flat = Everywhere.apply(flat, self.group)  # type: ignore[no-untyped-call]
        pieces = flat.split([leaf.numel() for leaf in leaves])
        return optree.tree_unflatten(
            treespec, [piece.view(leaf.shape) for piece, leaf in zip(pieces, leaves, strict=True)]
        )

    def _compare(self, flat: Tensor, name: str) -> None:
        sizes = all_reduced(torch.tensor([len(flat), -len(flat)], device=flat.device), OWNER, self.group, _most())
        if int(sizes[0]) != -int(sizes[1]):
            raise ValueError(
                f"{OWNER}: {name} has {-int(sizes[1])} numbers on one rank and {int(sizes[0])} on another."
            )
        ends = all_reduced(torch.stack([flat, -flat]), OWNER, self.group, _most())
        if bool((ends.sum(0) > 0).any()):  # NaN passes: the method names it
            raise ValueError(
                f"{OWNER}: {name} differs between the ranks, but each must begin at the same point; make it from one "
                "seed, or call torch.distributed.broadcast(tensor, src=0)."
            )


def _most() -> Any:
    return dist.ReduceOp.MAX


class Shards(Mapped):
    """This rank's share of each step's samples, cut along their first dimension; all ranks draw the same step.

    The shares differ by one sample at most, and the means over them are weighted by their sizes: together they are the
    mean over the whole batch. Blocks of `Batches` keep their keys, so that the memories of SABA and SRBA are those of
    one process, the same on all ranks; of `BlockBatches` each rank has its samples of every drawn block.

    Args:
        source: `Batches(...)`, `FromLoader(...)`, `problem.data` or a function k -> batch, the same on all ranks.
        group: the process group; None for all.

    Raises:
        RuntimeError: if torch.distributed is not initialised.
        ValueError: if a block of the source has fewer samples than there are ranks.

    Example:
        A script that `torchrun --nproc-per-node 2` starts::

            problem = bilevel.data_parallel(bilevel.Problem(upper, lower))
            data = bilevel.Shards(bilevel.Batches((X, t), batch_size=64))
            res = bilevel.solve(problem, x0, y0, bilevel.SOBA(), data=data)
    """

    def __init__(self, source: Callable[[int], Any], group: Group = None) -> None:
        super().__init__(source)
        check_group("Shards", group)
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        origin = self.origin
        if isinstance(origin, Batches):
            least = min(len(block) for level in (origin.lower, origin.upper) for block in level.blocks)
            if least < self.size:
                raise ValueError(
                    f"Shards: the smallest block of the Batches has {least} samples, which {self.size} ranks cannot "
                    "share; choose a batch_size that leaves a larger last block, or drop the samples beyond."
                )

    def put(self, part: Any, k: int) -> Part:
        """This rank's rows, with their weight.

        Args:
            part: the samples of one level.
            k: outer step.

        Returns:
            The share.

        Raises:
            ValueError: if the tensors differ in their first dimension, or there are fewer samples than ranks.
        """
        return self._share(part, 0)

    def _mapped(self, data: Any, k: int) -> Any:
        if not isinstance(data, BlockDraw):
            return super()._mapped(data, k)
        return replace(data, upper=self._share(data.upper, 1), lower=self._share(data.lower, 1), source=self)

    def _share(self, part: Any, dim: int) -> Part:
        """This rank's samples, which the tensors count in one of their dimensions."""
        whole = Part.of(part)
        leaves = [leaf for leaf in optree.tree_leaves(whole.value) if isinstance(leaf, Tensor) and leaf.ndim > dim]
        counts = {leaf.shape[dim] for leaf in leaves}
        if len(counts) != 1:
            raise ValueError(
                f"Shards: all tensors of a batch must share their {('first', 'second')[dim]} dimension, the samples, "
                f"but they have {sorted(counts)}; give each rank its own loader with a DistributedSampler instead."
            )
        n = counts.pop()
        if n < self.size:
            raise ValueError(f"Shards: {n} samples cannot be shared by {self.size} ranks; use larger batches.")
        begin, end = self.rank * n // self.size, (self.rank + 1) * n // self.size
        rows = optree.tree_map(
            lambda t: t.narrow(dim, begin, end - begin) if isinstance(t, Tensor) and t.ndim > dim else t, whole.value
        )
        return replace(whole, value=rows, weight=(end - begin) * self.size / n)


def data_parallel(problem: SomeProblem, group: Group = None) -> SomeProblem:
    """The problem whose F and f are the means over processes of each one's, on its own samples.

    Every method then runs unchanged on every rank: values, gradients and products with second derivatives are
    all-reduced (one all-reduce each), so each rank takes the same steps, to the last bit, as one process would on all
    the samples, up to the rounding of sums. What does not depend on the samples, such as a penalty on y, is the same on
    all ranks and is counted once. Constraints, sets and prox are evaluated by each rank, on the whole.

    Samples: `Shards(source)` cuts each batch of a source that is the same on all ranks; or each rank has its own
    DataLoader with a DistributedSampler and batches of one size. With neither, objectives of (x, y) see this rank's.

    Every rank must make the same calls, with the same x0, y0 and method. A rank that ends is an error on the others
    within the process group's timeout. Give each rank a Checkpoint path of its own.

    Args:
        problem: any Problem, also one of `from_modules`.
        group: the process group; None for all.

    Returns:
        The problem, of the same kind.

    Raises:
        RuntimeError: if torch.distributed is not initialised.

    Example:
        A script that `torchrun --nproc-per-node 2` starts::

            torch.distributed.init_process_group("gloo", timeout=timedelta(minutes=2))
            problem = bilevel.data_parallel(bilevel.from_modules(hyper, model, upper_loss, lower_loss, train, valid))
            res = bilevel.solve(problem, problem.x0, problem.y0, bilevel.SOBA(), data=bilevel.Shards(problem.data))
    """
    check_group(OWNER, group)
    return replace(
        problem, upper=Averaged(problem.upper, "upper", group), lower=Averaged(problem.lower, "lower", group)
    )
