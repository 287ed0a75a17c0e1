"""A loss of two modules as a function of their parameters, with everything else that it depends on made explicit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import optree
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from nestopt.implicit.inner_step import Dropout, Named, seeded_state
from nestopt.implicit.recomputation import recomputed
from nestopt.implicit.transforms import transformed
from nestopt.linalg.autodiff import captured_leaves, reached_leaves
from nestopt.linalg.guard import describe_captured
from nestopt.linalg.isolation import RandomState, isolated

from .parts import Part

__all__ = ["Loss", "ModuleLoss", "Modules", "Normalization", "Policy", "Term"]

Loss: TypeAlias = Callable[..., Tensor]
Normalization: TypeAlias = Literal["error", "frozen", "batch"]
OWNER = "from_modules"


@dataclass(frozen=True)
class Policy:
    """How modules are evaluated; `from_modules` documents each.

    Attributes:
        batch_norm: "error", "frozen" or "batch".
        dropout: "error", "off", "same" or "different".
        autocast: dtype of forward passes whose first derivatives alone are taken.
        micro_batch: samples of one graph, None for all.
        seed: of the masks.
    """

    batch_norm: Normalization = "error"
    dropout: Dropout = "error"
    autocast: torch.dtype | None = None
    micro_batch: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in (("batch_norm", Normalization), ("dropout", Dropout)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{OWNER}: {name} must be one of {get_args(kind)}, but got {getattr(self, name)!r}.")
        if self.autocast not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"{OWNER}: autocast must be torch.bfloat16, torch.float16 or None, not {self.autocast!r}.")
        if self.micro_batch is not None and not (isinstance(self.micro_batch, int) and self.micro_batch >= 1):
            raise ValueError(
                f"{OWNER}: micro_batch must be a number of samples, at least 1, or None, but got {self.micro_batch!r}."
            )


class Modules(nn.Module):
    """Both modules, so that one call exchanges the parameters of either.

    Args:
        upper: whose parameters x are.
        lower: whose parameters y are.

    Raises:
        TypeError: for something else than modules.
        ValueError: where one has no trainable parameter, or they share one.
    """

    def __init__(self, upper: nn.Module, lower: nn.Module) -> None:
        super().__init__()
        for name, module in (("upper", upper), ("lower", lower)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{OWNER}: {name}_module must be a torch.nn.Module, but got {type(module).__name__}.")
            if not self.trained(module):
                raise ValueError(
                    f"{OWNER}: {name}_module has no parameter that requires grad; call requires_grad_() on those that "
                    "are the variable of its level."
                )
        names = {id(p): name for name, p in upper.named_parameters()}
        shared = [(names[id(p)], name) for name, p in lower.named_parameters() if id(p) in names]
        if shared:
            raise ValueError(
                f"{OWNER}: upper_module's {shared[0][0]!r} and lower_module's {shared[0][1]!r} are one parameter, but "
                "a variable belongs to one level; give each module its own, or freeze it by requires_grad_(False) in a "
                "copy."
            )
        self.upper, self.lower = upper, lower

    @staticmethod
    def trained(module: nn.Module) -> Named:
        """The parameters that are its level's variable: those that require grad, a tied one under its first name."""
        return {name: p for name, p in module.named_parameters() if p.requires_grad}

    def forward(self, loss: Loss, *data: Any) -> Tensor:
        """loss(upper, lower, *data)."""
        return loss(self.upper, self.lower, *data)


class Term(ABC):
    """A function of (x, y[, data]) whose forward pass may be asked for in lower precision."""

    @abstractmethod
    def mixed(self) -> Term:
        """The same function for first derivatives alone, under autocast where the policy has it; else itself."""

    @abstractmethod
    def __call__(self, x: Any, y: Any, *data: Any) -> Tensor:
        """The value."""

    @abstractmethod
    def move_buffers(self, x: Any, y: Any, *data: Any) -> None:
        """One evaluation without a graph that moves the modules' buffers, as training would."""


class ModuleLoss(Term):
    """loss(upper_module, lower_module[, batch]) as a function of (x, y[, batch]), x and y dicts of parameters.

    Args:
        modules: both modules.
        loss: the user's.
        policy: of evaluation.
        autocast: whether the policy's autocast is on.
    """

    def __init__(self, modules: Modules, loss: Loss, policy: Policy, *, autocast: bool = False) -> None:
        self.modules, self.loss, self.policy = modules, loss, policy
        self.autocast = policy.autocast if autocast else None
        self._used: list[int] | None = None

    def mixed(self) -> ModuleLoss:
        """See `Term.mixed`."""
        return self if self.policy.autocast is None else ModuleLoss(self.modules, self.loss, self.policy, autocast=True)

    def __call__(self, x: Any, y: Any, *data: Any) -> Tensor:
        """The value, with a graph; the modules stay as they are."""
        part = Part.of(data[0] if data else None)
        batch = (part.value,) if data else ()
        if self.policy.micro_batch is None or not data:
            return self._value(self._named(x, y), batch, self._seed(part.step))
        return self._accumulated(x, y, part)

    def move_buffers(self, x: Any, y: Any, *data: Any) -> None:
        """See `Term.move_buffers`."""
        part = Part.of(data[0] if data else None)
        batch = (part.value,) if data else ()
        with torch.no_grad():
            call = partial(functional_call, self.modules, self._named(x, y), (self.loss, *batch))
            self._guarded(call, self._seed(part.step or 0), None, moving=True)

    def in_place(self, *data: Any, moving: bool = False) -> Tensor:
        """The loss of the modules as they are, under the policy: for parameters that cannot be exchanged.

        Args:
            data: the batch.
            moving: whether running statistics shall move.

        Returns:
            The value.
        """
        part = Part.of(data[0] if data else None)
        call = partial(self.modules, self.loss, *((part.value,) if data else ()))
        return self._guarded(call, self._seed(part.step), next(self.modules.parameters()).dtype, moving=moving)

    def _seed(self, step: int | None) -> int | None:
        """Of the masks, None where there are none."""
        if self.policy.dropout == "same":
            return self.policy.seed
        if self.policy.dropout == "different":
            if step is None:
                raise ValueError(
                    f'{OWNER}: dropout="different" draws new masks at each outer step, but the data do not say which '
                    "step they belong to; pass data=problem.data, or problem.numbered(...) of your own source."
                )
            return (self.policy.seed * 1_000_003 + step) * 1009
        return None

    @staticmethod
    def _named(x: Any, y: Any) -> Named:
        return {**{f"upper.{n}": t for n, t in x.items()}, **{f"lower.{n}": t for n, t in y.items()}}

    def _value(self, tensors: Named, batch: tuple[Any, ...], seed: int | None) -> Tensor:
        dtype = next(iter(tensors.values())).dtype
        # where only the value is wanted too, a loss over "parameters that require grad" must find them
        tensors = {n: marked(t) if n.startswith("lower.") else t for n, t in tensors.items()}
        return self._guarded(partial(functional_call, self.modules, tensors, (self.loss, *batch)), seed, dtype)

    def _guarded(
        self, call: Callable[[], Any], seed: int | None, dtype: torch.dtype | None, *, moving: bool = False
    ) -> Tensor:
        device = next(self.modules.parameters()).device
        cast = nullcontext() if self.autocast is None else torch.autocast(device.type, self.autocast)

        def run() -> Any:
            with evaluation_mode(self._still(moving)), cast:
                return call()

        if seed is not None:
            value = seeded_state(device, seed).run(run)
        else:
            before = RandomState.now(device)
            value = run()
            after = RandomState.now(device)
            if not all(map(torch.equal, before.states, after.states)):
                before.set()
                raise ValueError(
                    f"{OWNER}: a loss draws random numbers, and dropout={self.policy.dropout!r} does not say which; "
                    'choose dropout="same" (one mask for the whole run), "different" (a new one at each outer step) or '
                    '"off" (dropout modules in eval mode).'
                )
        low = self.autocast is not None and isinstance(value, Tensor) and dtype is not None
        return value.to(dtype) if low else value  # type: ignore[no-any-return]

    def _still(self, moving: bool) -> list[nn.Module]:
        """The modules that the policy puts into eval mode; refuses those that it does not decide about."""
        if self.policy.batch_norm == "error" and not moving:
            live = [
                name
                for name, m in self.modules.named_modules()
                if isinstance(m, _NormBase) and m.training and m.running_mean is not None
            ]
            if live:
                raise ValueError(
                    f"{OWNER}: {', '.join(live)} has running statistics and is in train mode, and batch_norm='error' "
                    'does not say what to normalise by; choose batch_norm="frozen" (the running statistics, as '
                    'constants) or "batch" (each batch\'s own; see update_statistics).'
                )
        kinds: tuple[type, ...] = ()
        if self.policy.dropout == "off":
            kinds += (_DropoutNd, nn.RNNBase, nn.MultiheadAttention)
        if self.policy.batch_norm == "frozen" and not moving:
            kinds += (_NormBase,)
        return [m for m in self.modules.modules() if isinstance(m, kinds) and m.training]

    # Gradient accumulation: every micro-batch is a node of its own that keeps its inputs only.
    def _accumulated(self, x: Any, y: Any, part: Part) -> Tensor:
        pieces = split_batch(part.value, self.policy.micro_batch or 1)
        tensors, seed = self._named(x, y), self._seed(part.step)
        names, leaves = list(tensors), list(tensors.values())
        used = self._used = self._reached(tensors, pieces[0][0]) if self._used is None else self._used
        total = leaves[0].new_zeros(())
        for i, (piece, share) in enumerate(pieces):

            def value(*given: Tensor, piece: Any = piece, i: int = i) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
                full = {**tensors, **{names[j]: marked(t) for j, t in zip(used, given, strict=True)}}
                with isolated():  # backward passes come here from outside
                    return (self._value(full, (piece,), None if seed is None else seed + i),), ()

            total = total + share * recomputed(value, *(leaves[j] for j in used))[0][0].reshape(())
        return total

    def _reached(self, tensors: Named, piece: Any) -> list[int]:
        """Which parameters the loss depends on; what else it depends on would lose its derivative in silence."""
        leaves = [t if t.requires_grad else t.detach().requires_grad_() for t in tensors.values()]
        with torch.enable_grad():
            seed = None if self.policy.dropout in ("error", "off") else 0
            value = self._value(dict(zip(tensors, leaves, strict=True)), (piece,), seed)
        captured = captured_leaves(value, leaves)
        if captured:
            raise ValueError(
                f"{OWNER}: a loss uses tensors that require grad and belong to neither module: "
                f"{describe_captured(self.loss, captured)}; their gradient would be dropped. Make them parameters of a "
                "module, or detach them."
            )
        found = {id(leaf) for leaf in reached_leaves(value)}
        return [j for j, leaf in enumerate(leaves) if id(leaf) in found]


def marked(t: Tensor) -> Tensor:
    """The tensor, or a leaf with its value that requires grad, as a module's parameter would."""
    return t if t.requires_grad or transformed() else t.detach().requires_grad_()


@contextmanager
def evaluation_mode(modules: list[nn.Module]) -> Iterator[None]:
    """Put modules (not their children) into eval mode for the time of a call."""
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module in modules:
            module.training = True


def split_batch(batch: Any, size: int) -> list[tuple[Any, float]]:
    """A batch as micro-batches with their shares of the samples.

    Args:
        batch: pytree whose tensors have the samples first.
        size: of a micro-batch; the last may be smaller.

    Returns:
        Pairs of a micro-batch and its share.

    Raises:
        ValueError: if the batch's tensors differ in their first dimension.
    """
    counts = {len(leaf) for leaf in optree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim}
    if len(counts) != 1:
        raise ValueError(
            f"{OWNER}: micro_batch splits a batch along its tensors' first dimension, but they have sizes "
            f"{sorted(counts)} there; collate them alike, or pass micro_batch=None."
        )
    n = counts.pop()

    def rows(begin: int, end: int) -> Any:
        return optree.tree_map(lambda t: t[begin:end] if isinstance(t, Tensor) and t.ndim else t, batch)

    return [(rows(i, i + size), (min(i + size, n) - i) / n) for i in range(0, n, size)]
