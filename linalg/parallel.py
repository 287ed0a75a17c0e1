"""Operators over torch.distributed: data-parallel products, and vectors that are sharded across processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .operator import LinearOperator, power_of_two

__all__ = ["DataParallel", "Sharded", "all_reduced", "check_group", "lost"]

Group = Any  # dist.ProcessGroup, which a torch without distributed lacks


class _Collective(LinearOperator):
    """An operator of this process that belongs with those of the group's other processes.

    Attributes:
        reductions: all-reduces made so far.
        reduced_bytes: bytes that this process has put into them.
    """

    def __init__(self, operator: LinearOperator, group: Group) -> None:
        name = type(self).__name__
        if not isinstance(operator, LinearOperator):
            raise TypeError(f"{name}: operator must be a LinearOperator, but got {type(operator).__name__}.")
        check_group(name, group)
        super().__init__(
            tuple(operator.shape),
            operator.dtype,
            operator.device,
            symmetric=operator.symmetric,
            definite=operator.definite,
        )
        self.operator, self.group = operator, group
        self.reductions = self.reduced_bytes = 0

    def _gather(self, mine: tuple[Any, ...]) -> list[Any]:
        """What every rank says, in rank order."""
        said: list[Any] = [None] * dist.get_world_size(self.group)
        try:
            dist.all_gather_object(said, mine, group=self.group)
        except RuntimeError as error:
            raise lost(error, type(self).__name__, self.group) from error
        return said

    def _all_reduce(self, v: Tensor, operation: Any = None) -> Tensor:
        """The sum (or another reduction) of the ranks' tensors, in place."""
        self.reductions += 1
        self.reduced_bytes += v.numel() * v.element_size()
        return all_reduced(v, type(self).__name__, self.group, operation)


def all_reduced(v: Tensor, owner: str, group: Group = None, operation: Any = None) -> Tensor:
    """The sum (or another reduction) of the ranks' tensors, in place.

    Args:
        v: of one shape on all ranks, contiguous.
        owner: in whose name a lost rank is reported.
        group: the process group; None for all.
        operation: a dist.ReduceOp; None for the sum.

    Returns:
        v.

    Raises:
        RuntimeError: if a rank is lost.
    """
    try:
        dist.all_reduce(v, op=dist.ReduceOp.SUM if operation is None else operation, group=group)
    except RuntimeError as error:  # DistBackendError is one
        failure = lost(error, owner, group)
        raise failure from error
    return v


def lost(error: RuntimeError, owner: str, group: Group = None) -> RuntimeError:
    """What to say when a collective fails.

    Args:
        error: the backend's.
        owner: in whose name.
        group: the process group.

    Returns:
        The error to raise.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return RuntimeError(
        f"{owner}: a collective failed on rank {rank} of {size}: another rank has ended, or did not come within the "
        "process group's timeout (init_process_group(timeout=...)); look for the first error among the ranks' outputs. "
        f"The backend says: {str(error).strip().splitlines()[0][:200]}"
    )


def check_group(owner: str, group: Group = None) -> None:
    """Refuse to begin without a process group.

    Args:
        owner: in whose name.
        group: the process group; None for all.

    Raises:
        RuntimeError: if torch.distributed is not initialised.
        ValueError: if this process is not in the group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"{owner}: torch.distributed is not initialised; start the script by torchrun and call "
            'torch.distributed.init_process_group("gloo") (nccl for GPUs) first.'
        )
    if dist.get_rank(group) < 0:
        raise ValueError(f"{owner}: this process is not in the group; make the operator on the group's ranks alone.")


class DataParallel(_Collective):
    """The sum over processes of operators, each of its own shard of the data; vectors are the same on every process.

    A v = sum_r A_r v: one local product and ONE all-reduce for a block of vectors, however many. Every solver works
    unchanged and takes the same steps on every rank, because what it decides from is the same there to the last bit.
    So b and x0 must be, too: broadcast them. For the mean over all data of a loss that is a mean over its shard, give
    each rank (m_r / m) * A_r.

    Every rank must multiply as often. A rank that dies is an error on the others within the process group's timeout.

    Args:
        operator: this process' A_r, such as a Hessian over its shard; all of one shape and dtype.
        group: the process group; None for all.

    Attributes:
        reductions: all-reduces made so far.
        reduced_bytes: bytes that this process has put into them.

    Raises:
        TypeError: if operator is no LinearOperator.
        RuntimeError: if torch.distributed is not initialised, or a rank is lost.
        ValueError: if the ranks' operators differ in shape, dtype or promised symmetry.

    Example:
        A script that `torchrun --nproc-per-node 2` starts::

            torch.distributed.init_process_group("gloo", timeout=timedelta(minutes=2))
            H = DataParallel(Hessian(loss, params, data=my_shard))
            g = H.all_reduce(H.operator.gradient)
            step = CG(max_iter=50)(H.shift(1e-3), -g)
    """

    def __init__(self, operator: LinearOperator, group: Group = None) -> None:
        super().__init__(operator, group)
        said = self._gather((tuple(self.shape), str(self.dtype), self.symmetric, self.definite))
        if any(other[:3] != said[0][:3] for other in said):
            raise ValueError(
                "DataParallel: the operators of all ranks must have one shape, dtype and symmetry, but they are "
                f"{', '.join(f'{shape} {kind} symmetric={promise}' for shape, kind, promise, _ in said)} in rank order."
            )
        self.definite = True if all(other[3] for other in said) else None  # a sum of definite matrices is definite

    def all_reduce(self, v: Tensor) -> Tensor:
        """The sum over ranks of something that each has for its shard, such as a gradient.

        Args:
            v: of one shape on all ranks.

        Returns:
            The sum; v is left as it was.
        """
        return self._all_reduce(v.detach().clone(memory_format=torch.contiguous_format))

    def _matvec(self, v: Tensor) -> Tensor:
        return self.all_reduce(self.operator._matvec(v))

    def _rmatvec(self, v: Tensor) -> Tensor:
        return self.all_reduce(self.operator.T._matvec(v))


class Sharded(_Collective):
    """An operator over vectors of which every process holds a piece: inner products and norms are summed over ranks.

    `operator` maps this rank's piece of v to its piece of A v, communicating as it must (a block-diagonal matrix need
    not). Here `vecdot`, `vecdots` and `norm` all-reduce, and solvers take theirs from the operator: so CG, MINRES and
    the others work unchanged, and every rank sees the same residuals, statuses and counts. Operators made from it
    (A.shift(s), A + B) inherit the inner product. Preconditioners map pieces to pieces, too.

    Cost: one all-reduce of one number a column for an inner product; CG has three a step.

    Args:
        operator: piece (..., n_r) -> piece; symmetric and definite are promises about the whole matrix.
        group: the process group; None for all.

    Attributes:
        reductions: all-reduces made so far.
        reduced_bytes: bytes that this process has put into them.

    Raises:
        TypeError: if operator is no LinearOperator.
        RuntimeError: if torch.distributed is not initialised, or a rank is lost.
        ValueError: if the ranks' pieces differ in size (pad the last with zeros) or dtype.

    Example:
        Diagonal blocks, one a rank; b is this rank's piece::

            A = Sharded(Dense(my_block, symmetric=True, definite=True))
            piece = CG()(A, b).x
    """

    def __init__(self, operator: LinearOperator, group: Group = None) -> None:
        super().__init__(operator, group)
        said = self._gather((tuple(self.shape), str(self.dtype), self.symmetric, self.definite))
        if any(other != said[0] for other in said):  # solvers' limits depend on the size: ranks must not part ways
            raise ValueError(
                "Sharded: the pieces of all ranks must have one size and dtype and the same promises, but they are "
                f"{', '.join(f'{shape} {kind} symmetric={s} definite={d}' for shape, kind, s, d in said)} in rank "
                "order; pad the last piece with zeros (and the operator with an identity there)."
            )

    def _matvec(self, v: Tensor) -> Tensor:
        return self.operator._matvec(v)

    def _rmatvec(self, v: Tensor) -> Tensor:
        return self.operator.T._matvec(v)

    def vecdot(self, u: Tensor, v: Tensor) -> Tensor:
        """The inner products of the whole vectors, per column."""
        product: Tensor = torch.linalg.vecdot(u, v)
        return self._all_reduce(product)

    def norm(self, v: Tensor) -> Tensor:
        """The norms of the whole vectors, per column, safe against overflow and underflow of the squares."""
        size = v.abs().amax(-1) if v.shape[-1] else v.new_zeros(v.shape[:-1])
        unit = power_of_two(self._all_reduce(size, dist.ReduceOp.MAX)[..., None])  # one unit for all pieces
        u = v / unit[..., None]
        return unit * self.vecdot(u, u).sqrt()
