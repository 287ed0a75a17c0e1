"""One step of the training of a stateful module, with all that it depends on made explicit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import optree
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.dropout import _DropoutNd

from nestopt.linalg.autodiff import reached_leaves
from nestopt.linalg.guard import closure_tensors, describe_captured
from nestopt.linalg.isolation import RandomState
from nestopt.linalg.normalization import PlainNormalization

from .differentiable_optimizers import DifferentiableOptimizer
from .recomputation import recomputed
from .transforms import first_item, tracked, transformed

__all__ = ["Carry", "Dropout", "InnerStep", "Loss", "Named", "lifted", "seeded_state", "within"]

Named: TypeAlias = dict[str, Tensor]
Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]
Dropout: TypeAlias = Literal["error", "off", "same", "different"]

OWNER = "unroll_training"


@dataclass(frozen=True, eq=False)
class Carry:
    """What one step hands to the next.

    Attributes:
        parameters: that are trained, by name.
        fixed: the other parameters.
        buffers: by name.
        state: the optimizer's.
    """

    parameters: Named
    fixed: Named
    buffers: Named
    state: Any

    @classmethod
    def of(
        cls, module: nn.Module, optimizer: DifferentiableOptimizer, parameters: Any, buffers: Any, state: Any
    ) -> Carry:
        """Where training starts.

        Args:
            module: whose parameters and buffers are the default.
            optimizer: which makes the first state.
            parameters: others by name, or None.
            buffers: likewise.
            state: the optimizer's, or None.

        Returns:
            The carry.

        Raises:
            ValueError: for unknown names or other shapes, or when nothing is trained.
        """
        own: Named = dict(module.named_parameters())
        given = _overridden(own, parameters, "parameters")
        # copies, so that a forward that changes them in place is found out before it has touched the module's own
        trained = {name: given[name].clone() for name, p in own.items() if p.requires_grad}
        if not trained:
            raise ValueError(
                f"{OWNER}: {type(module).__name__} has no parameter that requires grad; call requires_grad_() on those "
                "to be trained."
            )
        fixed = {name: given[name] for name in own if name not in trained}
        kept = _overridden(dict(module.named_buffers()), buffers, "buffers")
        return cls(trained, fixed, kept, optimizer.init(trained) if state is None else state)

    def detached(self) -> Carry:
        """The same values without their graph; what is not trained keeps its own."""
        cut = _map(lambda t: t.detach(), [self.parameters, self.buffers, _fields(self.state)])
        return replace(self, parameters=cut[0], buffers=cut[1], state=_rebuilt(self.state, cut[2]))


@dataclass(frozen=True, eq=False)
class InnerStep:
    """The loss of a module, and how it draws random numbers.

    Attributes:
        module: of the user.
        loss: (module, batch) -> scalar.
        dropout: the policy.
        device: whose generators are seeded.
        seeds: one a step.
        live: buffers through which a derivative passes, found by `recomputable`.
    """

    module: nn.Module
    loss: Loss
    dropout: Dropout
    device: torch.device
    seeds: tuple[int, ...]
    live: frozenset[str] | None = None

    @classmethod
    def of(
        cls, module: nn.Module, loss: Loss, optimizer: DifferentiableOptimizer, dropout: Dropout, seed: int, steps: int
    ) -> InnerStep:
        """Check the arguments of `unroll_training`.

        Args:
            module: to be trained.
            loss: of (module, batch).
            optimizer: differentiable.
            dropout: the policy.
            seed: of "same" and "different".
            steps: how many seeds are needed.

        Returns:
            The step.

        Raises:
            TypeError: for an argument of another kind.
            ValueError: for an unknown policy.
        """
        if not isinstance(module, nn.Module):
            raise TypeError(f"{OWNER}: module must be a torch.nn.Module, but got {type(module).__name__}.")
        if not callable(loss):
            raise TypeError(f"{OWNER}: loss must be a function (module, batch), but got {type(loss).__name__}.")
        if isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"{OWNER}: optimizer is torch.optim's {type(optimizer).__name__}, which steps in place; convert it by "
                "optimizer, state = implicit.from_torch(optimizer, module)."
            )
        if not isinstance(optimizer, DifferentiableOptimizer) or not is_dataclass(optimizer):
            kind = optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__
            raise TypeError(f"{OWNER}: optimizer must be an instance such as implicit.SGD(0.1), but got {kind}.")
        if dropout not in get_args(Dropout):
            raise ValueError(f"{OWNER}: dropout must be one of {get_args(Dropout)}, but got {dropout!r}.")
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        stream = random.Random(seed)  # torch's would be a random operation, which vmap may refuse
        seeds = [stream.getrandbits(62) for _ in range(steps)]
        return cls(module, loss, dropout, device, tuple([seed] * steps if dropout == "same" else seeds))

    def run(
        self, optimizer: DifferentiableOptimizer, carry: Carry, batches: Sequence[Any], first: int
    ) -> tuple[Carry, list[Tensor]]:
        """Some steps.

        Args:
            optimizer: which steps.
            carry: where to start.
            batches: one a step.
            first: the number of the first step.

        Returns:
            The last carry, and the loss before each step.
        """
        losses = []
        with _exact(self.device):
            for t, batch in enumerate(batches, first):
                value, gradients, buffers = self._differentiate(carry, batch, t)
                parameters, state = optimizer.step(carry.parameters, gradients, carry.state)
                carry = Carry(parameters, carry.fixed, buffers, state)
                losses.append(value)
        return carry, losses

    def segment(
        self, optimizer: DifferentiableOptimizer, carry: Carry, batches: Sequence[Any], first: int
    ) -> tuple[Carry, list[Tensor]]:
        """`run`, of the same arguments, without keeping its graph: a derivative runs it again."""
        tree = [carry.parameters, carry.fixed, carry.buffers, _fields(carry.state), _fields(optimizer), list(batches)]
        tensors, build = _split(tree)
        blank_state, blank_optimizer = _blank(carry.state), _blank(optimizer)
        live = self.live or frozenset()
        rebuild: list[Callable[[Sequence[Tensor]], Any]] = []

        def function(*values: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            parameters, fixed, buffers, state, hypers, data = build(values)
            start = Carry(parameters, fixed, buffers, _rebuilt(blank_state, state))
            end, losses = self.run(_rebuilt(blank_optimizer, hypers), start, data, first)
            moving = {name: buffer for name, buffer in end.buffers.items() if name in live}
            still = [buffer for name, buffer in end.buffers.items() if name not in live]
            out, put_together = _split([end.parameters, moving, _fields(end.state), losses])
            rebuild[:] = [put_together]
            return tuple(out), tuple(still)

        outputs, constant = recomputed(function, *tensors)
        parameters, moving, state, losses = rebuild[0](outputs)
        rest = iter(constant)
        buffers = {name: moving[name] if name in live else next(rest) for name in carry.buffers}
        return Carry(parameters, carry.fixed, buffers, _rebuilt(carry.state, state)), losses

    def recomputable(self, carry: Carry, batch: Any) -> InnerStep:
        """This step with what `segment` must know: the loss captures nothing, and which buffers have a derivative.

        The loss is evaluated once at constants, outside of every transform.

        Args:
            carry: where to start.
            batch: of the first step.

        Returns:
            The step.

        Raises:
            ValueError: for captured tensors that something differentiates or maps over, with their names.
        """
        tree = [{**carry.parameters, **carry.fixed}, batch, carry.buffers]
        parameters, batch, buffers = _map(first_item, tree)
        with _exact(self.device), torch.enable_grad():
            value, _ = self._evaluate(parameters, buffers, batch, 0)
            within_reach = [f"`{name}`" for name, t in closure_tensors(self.loss) if tracked(t)]
            # random numbers may be mapped, by vmap's randomness, though nothing was captured
            seeded = transformed() and self.dropout in ("same", "different")
            if tracked(value, mapped=not seeded) or (seeded and within_reach):
                names = describe_captured(self.loss, reached_leaves(value))
                names = names or ", ".join(within_reach) or "a tensor"
                raise ValueError(
                    f"{OWNER}: with checkpoint_every the loss is computed again in backward, and it captures {names}, "
                    "whose derivative would be dropped; pass it in the batches, or detach it if it is a constant."
                )
        found: set[str] = set()

        def evaluate(values: list[Tensor]) -> Tensor:
            given_parameters, given_batch = build(values)
            value, after = self._evaluate(given_parameters, buffers, given_batch, 0)
            found.update(name for name, buffer in after.items() if buffer.requires_grad)
            return value.new_zeros(())

        inputs, build = _split([parameters, batch], lambda t: t.is_floating_point())
        if buffers:
            with _exact(self.device), torch.enable_grad():
                torch.func.grad(evaluate)(inputs) if transformed() else evaluate([t.requires_grad_() for t in inputs])
        given = {name for name, buffer in carry.buffers.items() if tracked(buffer, mapped=False)}
        return replace(self, live=frozenset(given | found))

    def _differentiate(self, carry: Carry, batch: Any, t: int) -> tuple[Tensor, dict[str, Tensor | None], Named]:
        """The loss, its gradient by name (None where nothing depends on a parameter), and the new buffers."""
        names, values = list(carry.parameters), list(carry.parameters.values())
        if transformed():
            lifted_buffers = lifted(carry.buffers, [carry.parameters, carry.fixed, batch])
            unused: list[bool] = []

            def inner(leaves: list[Tensor]) -> tuple[Tensor, Any]:
                # The gradient is taken here, and not by the transform around it, which is there for the level of
                # differentiation that it opens: it would say zero where there is none (None).
                inputs = {**dict(zip(names, leaves, strict=True)), **carry.fixed}
                value, buffers = self._evaluate(inputs, lifted_buffers, batch, t)
                found = _gradient(value, leaves, create_graph=True)
                unused[:] = [g is None for g in found]
                return value.new_zeros(()), (value, [value if g is None else g for g in found], buffers)

            _, (value, some, buffers) = torch.func.grad(inner, has_aux=True)(values)
            gradients = {n: None if skip else g for n, skip, g in zip(names, unused, some, strict=True)}
            return value, gradients, buffers
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # aliases: a batch that was computed from the parameters is a constant of this gradient
            leaves = [p.view_as(p) if p.requires_grad else p.clone().requires_grad_() for p in values]
            inputs = {**dict(zip(names, leaves, strict=True)), **carry.fixed}
            value, buffers = self._evaluate(inputs, carry.buffers, batch, t)
        found = _gradient(value, leaves, create_graph=create_graph)
        if not create_graph:
            value, buffers = value.detach(), {name: buffer.detach() for name, buffer in buffers.items()}
        return value, dict(zip(names, found, strict=True)), buffers

    def _evaluate(self, parameters: Named, buffers: Named, batch: Any, t: int) -> tuple[Tensor, Named]:
        """The loss and the buffers after it, which it changed in copies."""
        tensors = {**parameters, **{name: buffer.clone() for name, buffer in buffers.items()}}
        versions = {name: p._version for name, p in parameters.items()}

        def call() -> Any:
            with _without_dropout(self.module, self.dropout == "off"):
                return within(self.module, self.loss, tensors, batch)

        if self.dropout in ("same", "different"):
            value = seeded_state(self.device, self.seeds[t]).run(call)
        else:
            before = RandomState.now(self.device)
            value = call()
            after = RandomState.now(self.device)
            if not all(map(torch.equal, before.states, after.states)):
                before.set()
                raise ValueError(
                    f"{OWNER}: the loss draws random numbers, and dropout={self.dropout!r} does not say which; choose "
                    'dropout="same" (one mask), "different" (new ones in each step, by seed) or "off".'
                )
        for name, p in parameters.items():
            if tensors[name] is not p or p._version != versions[name]:
                raise ValueError(
                    f"{OWNER}: the module's forward changes its parameter {name!r}, so that the loss is not a function "
                    "of the parameters; make the tensor a buffer, or compute a new one without assigning it."
                )
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{OWNER}: loss must return a floating tensor, but it returned {kind}.")
        if value.ndim:
            raise ValueError(
                f"{OWNER}: loss must return a scalar, but it returned shape {tuple(value.shape)}; reduce it, e.g. by "
                ".mean(), or train many tasks by torch.func.vmap over this call."
            )
        moved = {name: tensors[name] for name in buffers}
        late = [name for name, buffer in moved.items() if buffer.requires_grad and name not in (self.live or ())]
        if late and self.live is not None:
            raise ValueError(
                f"{OWNER}: buffer {late[0]!r} has a derivative in this step and had none in the first, which "
                "checkpoint_every cannot know; leave checkpoint_every out."
            )
        return value, moved


def within(module: nn.Module, function: Callable[..., Any], tensors: Named, *arguments: Any) -> Any:
    """function(module, *arguments) while the module's tensors are others.

    Args:
        module: whose tensors are exchanged, and put back.
        function: may use the module as it likes.
        tensors: parameters and buffers by name; a value that the module replaces is replaced here as well.
        arguments: what else the function takes.

    Returns:
        What the function returns.
    """
    prefixed = {f"module.{name}": tensor for name, tensor in tensors.items()}
    try:
        with PlainNormalization():
            return torch.func.functional_call(_Within(module, function), prefixed, arguments)
    finally:
        tensors.update({name: prefixed[f"module.{name}"] for name in tensors})


class _Within(nn.Module):
    """A function of a module as the forward of a module, so that functional_call exchanges the inner tensors."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self.call = (function,)  # in a tuple, since a function that is a module would become a second child

    def forward(self, *arguments: Any) -> Any:
        return self.call[0](self.module, *arguments)


def lifted(buffers: Named, tree: Any) -> Named:
    """Buffers with every dimension that torch.func.vmap maps in the tree, so that they may be changed in place.

    Args:
        buffers: by name.
        tree: pytree of what the loss sees.

    Returns:
        The same values.
    """
    leaves = [leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    mark = sum(leaf.detach().flatten()[:1].isnan().sum() for leaf in leaves) == 0
    return {name: torch.where(torch.as_tensor(mark), buffer, buffer) for name, buffer in buffers.items()}


def _gradient(value: Tensor, leaves: list[Tensor], *, create_graph: bool) -> Sequence[Tensor | None]:
    found: Sequence[Tensor | None] = [None] * len(leaves)
    if value.requires_grad:
        found = torch.autograd.grad(value, leaves, create_graph=create_graph, allow_unused=True)
    if all(g is None for g in found):
        raise ValueError(
            f"{OWNER}: the loss does not depend on any trainable parameter; use the module that it is given, without "
            "detach() or item(), and not another copy."
        )
    return found


def _overridden(own: Named, given: Any, name: str) -> Named:
    for key, value in (given or {}).items():
        if key not in own:
            raise ValueError(f"{OWNER}: {name} has {key!r}, which the module has not; its names are {list(own)}.")
        if not isinstance(value, Tensor) or value.shape != own[key].shape:
            came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{OWNER}: {name}[{key!r}] must have shape {tuple(own[key].shape)}, but got {came}.")
    return {**own, **(given or {})}


def seeded_state(device: torch.device, seed: int) -> RandomState:
    """The state that the generators have after torch.manual_seed.

    Args:
        device: whose generator is seeded beside the CPU's.
        seed: of all.

    Returns:
        The state.
    """
    devices = [torch.device("cpu"), *([device] if device.type == "cuda" else [])]
    return RandomState(device, tuple(torch.Generator(d).manual_seed(seed).get_state() for d in devices))


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """Numbers that a backward pass outside of autocast finds again, and attention that can be differentiated twice."""
    with torch.autocast(device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def _without_dropout(module: nn.Module, off: bool) -> Iterator[None]:
    active = [part for part in module.modules() if isinstance(part, _DropoutNd) and part.training] if off else []
    try:
        for part in active:
            part.training = False
        yield
    finally:
        for part in active:
            part.training = True


def _map(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    return optree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def _split(
    tree: Any, which: Callable[[Tensor], bool] = lambda _: True
) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """The tensors of a tree, or some of them, and the function that puts others in their places."""
    leaves, treespec = optree.tree_flatten(tree)
    places = [isinstance(leaf, Tensor) and which(leaf) for leaf in leaves]
    constants = [None if place else leaf for place, leaf in zip(places, leaves, strict=True)]

    def build(tensors: Sequence[Tensor]) -> Any:
        rest = iter(tensors)
        full = [next(rest) if place else c for place, c in zip(places, constants, strict=True)]
        return optree.tree_unflatten(treespec, full)

    return [leaf for leaf, place in zip(leaves, places, strict=True) if place], build


def _fields(thing: Any) -> Any:
    """A dataclass as the dict of its fields, a pytree; anything else itself."""
    return {f.name: getattr(thing, f.name) for f in fields(thing)} if is_dataclass(thing) else thing


def _blank(thing: Any) -> Any:
    """A dataclass without its values, for `_rebuilt`: a closure that outlives the call must not hold tensors."""
    return replace(thing, **_map(lambda t: t.detach(), _fields(thing))) if is_dataclass(thing) else None  # type: ignore[type-var]


def _rebuilt(like: Any, tree: Any) -> Any:
    return replace(like, **tree) if is_dataclass(like) else tree  # type: ignore[type-var]
