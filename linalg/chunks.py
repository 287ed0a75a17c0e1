"""How products with many vectors are formed: one at a time, or in chunks of a given or a measured size."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optree
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["AutoChunk", "Blocks", "ChunkSize", "PeakMemory", "check_chunk_size", "free_memory"]

_UNKNOWN = 1 << 30  # bytes taken as free where neither a GPU nor Linux tells
_LARGE = 1 << 28  # blocks below are never asked whether they fit
_TRIALS = 3  # the first ones fault in the pages that later ones reuse
_MARGIN = 0.9  # a chunk has to win by more than clocks err


@dataclass(frozen=True)
class AutoChunk:
    """Chunks as large as memory allows, where they are faster than one vector at a time; both are measured.

    The first block of vectors pays for the measurement with products that it needs anyway: the memory of one product,
    two timed products, the memory of a chunk of two, then chunks as large as fit, which are timed and kept only where
    they beat the loop by a tenth. Blocks of another size (by powers of two) are judged anew, thrice. A chunk that does
    not fit on the device after all is halved. The numbers of chunk and loop differ by rounding, and a clock decides
    between them: pass an integer chunk_size where every bit has to be repeatable.

    The memory of a pass is that of the tensors it makes and the results it returns, at their peak; not the kept graph,
    which is there before, nor workspaces inside one kernel. Torch loads the machinery that weighs it at its first use
    in a process, which takes 1 to 2 s.

    Args:
        memory: bytes that one pass may take; None for half of what is free at the first block (for a GPU, what the
            driver and torch's cache have; else Linux's MemAvailable under the cgroup's limit; else 1 GiB is assumed).

    Raises:
        ValueError: if memory is not a positive integer.

    Example:
        >>> from nestopt.linalg import AutoChunk, Hessian, KeptGraph
        >>> product = KeptGraph(chunk_size=AutoChunk(memory=10_000_000))
        >>> H = Hessian(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]), product=product)
        >>> H @ torch.eye(2)
        tensor([[ 6.,  0.],
                [ 0., 12.]])
    """

    memory: int | None = None

    def __post_init__(self) -> None:
        if self.memory is not None and (not isinstance(self.memory, int) or self.memory < 1):
            raise ValueError(
                f"AutoChunk: memory must be a positive number of bytes or None, but got {self.memory!r}; use e.g. "
                "memory=2**30."
            )


ChunkSize = int | AutoChunk | None


def check_chunk_size(owner: str, chunk_size: ChunkSize) -> None:
    """Refuse chunks that no block can mean."""
    good = chunk_size is None or isinstance(chunk_size, AutoChunk) or (isinstance(chunk_size, int) and chunk_size >= 1)
    if not good:
        raise ValueError(
            f"{owner}: chunk_size must be a positive integer, AutoChunk() or None, but got {chunk_size!r}; use e.g. "
            "chunk_size=16."
        )


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device.

    Args:
        device: a GPU is asked; any other device counts as the machine's memory.

    Returns:
        The bytes; 1 GiB where the system does not tell.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        return _UNKNOWN
    group = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            found.append(int((group / limit).read_text()) - int((group / used).read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return max(0, min(found)) if found else _UNKNOWN


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is active, counts the bytes of the tensors that torch makes, on any device.

    The storages of tensors that existed before are not counted, nor is what a kernel takes for itself.

    Attributes:
        peak: the most bytes that were alive at once.

    Example:
        >>> with PeakMemory() as memory:
        ...     _ = (torch.ones(1000) + 1).sum()
        >>> memory.peak >= 8000
        True
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._meet((args, kwargs or {}), new=False)
        out = func(*args, **(kwargs or {}))
        self._meet(out, new=True)
        return out

    def _meet(self, tree: Any, *, new: bool) -> None:
        for leaf in optree.tree_leaves(tree, none_is_leaf=True):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            key, size = storage._cdata, storage.nbytes() if new else 0
            if key in self._known:
                continue
            self._known.add(key)
            self._now += size
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


Product = Callable[[Tensor, bool], Tensor]


@dataclass
class Tuning:
    """What AutoChunk has measured of one operator so far.

    Args:
        budget: bytes of one pass.
        asked: whether the user named them.
    """

    budget: int
    asked: bool
    single: int | None = None  # bytes of one product
    each: int | None = None  # bytes a vector of a chunk
    loop: list[float] = field(default_factory=list)  # seconds a vector
    chunks: dict[int, list[float]] = field(default_factory=dict)  # the same, by the chunk's size in powers of two
    reason: str | None = None  # why the last block went one at a time

    @property
    def fit(self) -> int:
        """The most vectors of a pass."""
        return max(1, self.budget // max(1, self.each or 1))

    def plan(self, left: int) -> tuple[int, bool, bool]:
        """What to do with some of the vectors that are left: how many, in one pass or not, measured or not."""
        if self.single is None or len(self.loop) < 2:
            return 1, False, True
        if self.each is None:
            if 2 * self.single > self.budget:
                self.reason = f"two products do not fit in {self.budget} bytes"
                return left, False, False
            return (2, True, True) if left >= 2 else (1, False, False)
        width = min(left, self.fit)
        if width < 2:
            if left > 1:
                self.reason = f"two products do not fit in {self.budget} bytes"
            return left, False, False
        timed = self.chunks.setdefault(width.bit_length(), [])
        alone = min(self.loop)
        if len(timed) < _TRIALS and not (timed and timed[0] > 3 * alone):  # no clock errs that much: no further trial
            return width, True, True
        best = min(timed)
        if best < _MARGIN * alone:
            self.reason = None
            return width, True, False
        self.reason = f"the loop is as fast: {alone:.1e} s a vector, and {best:.1e} s in chunks of {width}"
        return left, False, False

    def measure(self, product: Product, part: Tensor, batched: bool) -> Tensor:
        """One planned pass, weighed at the first time and timed at the others.

        Args:
            product: see Blocks.
            part: vectors (k, n); one, when not batched.
            batched: in one pass.

        Returns:
            The products.

        Raises:
            MemoryError: if even one product takes more than the bytes that were asked for.
        """
        vectors = part if batched else part[0]
        if (self.each if batched else self.single) is None:
            with PeakMemory() as memory:
                out = product(vectors, batched)
            if batched:
                self.each = -(-memory.peak // len(part))
                return out
            self.single = memory.peak
            if self.asked and self.single > self.budget:
                raise MemoryError(
                    f"AutoChunk: one product takes {self.single} bytes, more than memory={self.budget}; raise memory, "
                    "use smaller batches (data=...), or memory=None to take what is free."
                )
            return out if out.ndim > 1 else out[None]
        begun = _clock(part.device)
        out = product(vectors, batched)
        seconds = (_clock(part.device) - begun) / len(part)
        (self.chunks[len(part).bit_length()] if batched else self.loop).append(seconds)
        return out if batched else out[None]


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass
class Blocks:
    """How products with many vectors are formed: one at a time, or a chunk in one vmapped pass.

    Args:
        chunk_size: vectors a pass; peak memory grows with it. None for one at a time.
        looped: why chunks cannot be vmapped (an operation has no rule for it): then every product is formed one at a
            time, which gives the same numbers. None while chunks work.

    Raises:
        ValueError: if chunk_size is neither a positive integer, AutoChunk() nor None.
    """

    chunk_size: ChunkSize = None
    looped: str | None = None
    tuning: Tuning | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        check_chunk_size("Blocks", self.chunk_size)

    @property
    def reason(self) -> str | None:
        """Why the last block went one vector at a time in spite of a chunk_size, or None."""
        return self.looped or (None if self.tuning is None else self.tuning.reason)

    def joined(self, other: Blocks) -> Blocks:
        """These Blocks, for another operator of the same kind as well.

        Args:
            other: the Blocks that it had.

        Returns:
            These, which now also know why the other's chunks cannot be vmapped.
        """
        self.looped = self.looped or other.looped
        return self

    def apply(self, product: Product, v: Tensor, size: int) -> Tensor:
        """The products with every vector.

        Args:
            product: (vector, False) -> vector, or (vectors of shape (k, n), True) -> vectors.
            v: shape (..., n).
            size: of the results.

        Returns:
            Shape (..., size).

        Raises:
            torch.OutOfMemoryError: if a chunk of a given size is too large.
            MemoryError: if the block of results does not fit, or one product not in AutoChunk's memory.
        """
        if v.ndim == 1:
            return product(v, False)
        rows = v.reshape(v.shape[:-1].numel(), v.shape[-1])  # -1 is ambiguous where the space is empty
        _check_room(rows, size)
        out = rows.new_empty(rows.shape[0], size)
        start = 0
        while start < len(rows):
            count, batched, measured = self._plan(len(rows) - start, v.device)
            part = rows[start : start + count]
            if measured or batched:
                found = self._pass(product, part, batched, measured)
                if found is None:
                    continue  # planned anew, without that chunk
                out[start : start + count] = found
                del found  # its memory is the next pass'
            else:
                for i, row in enumerate(part, start):
                    out[i] = product(row, False)
            start += count
        return out.reshape(*v.shape[:-1], size)

    def _plan(self, left: int, device: torch.device) -> tuple[int, bool, bool]:
        if self.chunk_size is None or self.looped is not None:
            return left, False, False
        if isinstance(self.chunk_size, int):
            return min(left, self.chunk_size), True, False
        if self.tuning is None:
            asked = self.chunk_size.memory
            self.tuning = Tuning(free_memory(device) // 2 if asked is None else asked, asked is not None)
        return self.tuning.plan(left)

    def _pass(self, product: Product, part: Tensor, batched: bool, measured: bool) -> Tensor | None:
        """One pass; None for a chunk that failed and has been taken out of the plan."""
        try:
            if measured and self.tuning is not None:
                return self.tuning.measure(product, part, batched)
            return product(part, batched)
        except RuntimeError as error:
            exhausted = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
            if not batched or (exhausted and self.tuning is None):
                raise
            if exhausted and self.tuning is not None:
                self.tuning.each = self.tuning.budget // max(1, len(part) // 2) + 1 if len(part) > 3 else None
                self.tuning.budget = self.tuning.budget if len(part) > 3 else 0  # not even two: one at a time
            else:
                self.looped = str(error)
        return None


def _check_room(rows: Tensor, size: int) -> None:
    need = rows.shape[0] * size * rows.element_size()
    if need > _LARGE and need > (free := free_memory(rows.device)):
        raise MemoryError(
            f"the products with {rows.shape[0]} vectors take {need} bytes, but {free} are free on {rows.device}; "
            "multiply fewer vectors at a time."
        )
