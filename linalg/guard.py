"""The operator probe: which operation has no second derivative, where it was called, what to do; captured tensors."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.autograd.function import _SingleLevelFunction
from torch.nn.modules import module as modules
from torch.overrides import TorchFunctionMode, resolve_name

from .faults import BY_STEM, MESSAGES, REVERSE, Fault, stem_of
from .isolation import isolated

__all__ = [
    "UndifferentiableError",
    "closure_tensors",
    "describe_captured",
    "explain",
    "graph_nodes",
    "probe",
    "refusal",
    "unbatchable",
]

Node = Any  # torch.autograd.graph.Node: its saved attributes are not typed


class UndifferentiableError(TypeError):
    """A product with second derivatives met an operation that has none; the message names it, its place and the cure.

    Args:
        message: the sentence.
        operation: what failed, such as "F.ctc_loss".
        module: the path of the module that called it, or None when no module did or it is unknown.
        cure: what to do.
    """

    def __init__(self, message: str, operation: str, module: str | None, cure: str) -> None:
        super().__init__(message)
        self.operation = operation
        self.module = module
        self.cure = cure


_OPERATION = (
    re.compile(r"derivative for '?(?:aten::)?(\w+?)'? is not implemented"),
    re.compile(r"forward AD with (\w+) that does not support it"),
)


def graph_nodes(tensors: Iterable[Tensor]) -> Iterator[Node]:
    """Every node of the autograd graph of some tensors, once.

    Args:
        tensors: with or without a graph.

    Yields:
        The nodes; those with a `variable` stand for leaves.
    """
    stack = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen: set[Node] = set(stack)
    while stack:
        node = stack.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)


def probe(
    nodes: Iterable[Node], *, forward: bool = False, batched: bool = False, linear: bool = False
) -> tuple[Fault, Callable[[Node], bool]] | None:
    """The first operation in a graph that products with second derivatives cannot pass; nothing is executed.

    Args:
        nodes: of the graph, see `graph_nodes`.
        forward: whether the function will be traced in forward mode, instead of reversed twice.
        batched: whether that trace will be vmapped.
        linear: whether only the backward pass's own derivative, in its cotangent, is needed, as for a Jacobian.

    Returns:
        The fault and what tells its node, or None.
    """
    for node in nodes:
        rows = BY_STEM.get(stem_of(node.name()), ())
        fault = _function_fault(node, forward, batched) or next((row for row in rows if row.when(node)), None)
        if fault is not None and not (fault.forward if forward else fault.reverse) and not (linear and fault.linear):
            return fault, partial(_is_named, node.name())
    return None


def _is_named(name: str, node: Node) -> bool:
    return bool(node.name() == name)


def unbatchable(outputs: Sequence[Tensor]) -> str | None:
    """Why backward passes of a graph must not be vmapped, or None.

    torch 2.13 vmaps the second derivative of group_norm by a rule that is wrong: an error for most shapes, and wrong
    numbers where the shapes happen to fit, so that trying is not safe.

    Args:
        outputs: tensors with their graph.

    Returns:
        The reason.
    """
    if any(stem_of(node.name()) == "nativegroupnorm" for node in graph_nodes(outputs)):
        return "batched second derivatives of group_norm are wrong in torch"
    return None


def _function_fault(node: Node, forward: bool, batched: bool) -> Fault | None:
    """What a user's autograd.Function lacks."""
    function = getattr(node, "_forward_cls", None)
    if function is None or stem_of(node.name()) in BY_STEM:
        return None
    name = f"the autograd.Function {function.__name__}"
    if function.backward.__code__.co_qualname.startswith("once_differentiable"):
        # worse than an error: its gradient has no graph, so the product would be a silent zero
        return Fault(name, (), "write its backward with differentiable operations and drop @once_differentiable")
    if not forward:
        return None
    if function.setup_context is _SingleLevelFunction.setup_context:
        return Fault(name, (), f"give it setup_context and jvp, or {REVERSE}", reverse=True)
    if function.jvp is torch.autograd.Function.jvp:
        return Fault(name, (), f"give it jvp, or {REVERSE}", reverse=True)
    if batched and not function.generate_vmap_rule and function.vmap is torch.autograd.Function.vmap:
        return Fault(name, (), f"give it vmap or generate_vmap_rule, use chunk_size=None, or {REVERSE}", reverse=True)
    return None


def explain(
    owner: str, error: Exception, function: Callable[[], Any], *, forward: bool = False
) -> UndifferentiableError | None:
    """What to raise instead of torch's error about a missing derivative: operation, place and cure in one sentence.

    Args:
        owner: who speaks.
        error: torch's (NotImplementedError is a RuntimeError).
        function: evaluates the user's function once more, to see where the operation is called.
        forward: whether the function was traced by torch.func, where any failure of a function that could be evaluated
            before is the trace's.

    Returns:
        The error to raise from torch's, or None when this one is about something else.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError | Warning):  # a warning may have been made an error
        return None
    text = str(error).strip()
    named = next((found[1] for found in (pattern.search(text) for pattern in _OPERATION) if found), None)
    stem = stem_of(named or "")
    fault = next((fault for pattern, fault in MESSAGES if re.search(pattern, text)), None)
    if fault is None and named is not None:
        ahead = "forward AD" in text
        unknown = Fault(f"the operation {named}", (), REVERSE if ahead else "replace it by other operations", ahead)
        fault = BY_STEM.get(stem, [unknown])[0]
    if fault is None and forward:
        first = text.splitlines()[0][:200] if text else type(error).__name__
        fault = Fault(f"this function (torch.func says: {first})", (), REVERSE, reverse=True)
    return None if fault is None else refusal(owner, fault, lambda node: stem_of(node.name()) == stem, function)


def refusal(
    owner: str, fault: Fault, matches: Callable[[Node], bool], function: Callable[[], Any]
) -> UndifferentiableError:
    """The error for a fault, with the place where its operation is called.

    Args:
        owner: who speaks.
        fault: what is missing.
        matches: whether a graph node is the operation's.
        function: evaluates the user's function once more.

    Returns:
        The error.
    """
    place = _locate(function, matches)
    words = "" if place is None else f", called in module {place},"
    return UndifferentiableError(fault.sentence(owner, words), fault.operation, place, fault.cure)


class _Locator(TorchFunctionMode):
    """Watches an evaluation for the first tensor whose graph holds a node, and notes the module that was running."""

    def __init__(self, matches: Callable[[Node], bool]) -> None:
        super().__init__()
        self.matches = matches
        self.seen: set[Node] = set()
        self.stack: list[nn.Module] = []
        self.place: str | None = None
        self.found = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        # backward passes inside the function have graphs of their own
        if resolve_name(func) is not None:
            self.look(out)
        return out

    def look(self, out: Any) -> None:
        """Search the part of the graph that is new."""
        if self.found:
            return
        tensors = [leaf for leaf in optree.tree_leaves(out) if isinstance(leaf, Tensor)]
        stack = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
        while stack:
            node = stack.pop()
            if node in self.seen:
                continue
            self.seen.add(node)
            if self.matches(node):
                self.found, self.place = True, self._path()
                return
            stack.extend(following for following, _ in node.next_functions if following is not None)

    def _path(self) -> str | None:
        if not self.stack:
            return None
        outer, inner = self.stack[0], self.stack[-1]
        name = next((name for name, module in outer.named_modules() if module is inner), "")
        kind = type(inner).__name__
        return f"`{name}` ({kind}) of {type(outer).__name__}" if name else kind

    def enter(self, module: nn.Module, _arguments: Any) -> None:
        self.stack.append(module)

    def leave(self, _module: nn.Module, _arguments: Any, out: Any) -> None:
        self.look(out)  # an autograd.Function is not a torch function: its output is seen here
        self.stack.pop()


def _locate(function: Callable[[], Any], matches: Callable[[Node], bool]) -> str | None:
    locator = _Locator(matches)
    hooks = (
        modules.register_module_forward_pre_hook(locator.enter),
        modules.register_module_forward_hook(locator.leave, always_call=True),
    )
    try:
        # the place is an extra: where the second evaluation fails, the refusal is raised without it
        with suppress(Exception), isolated(), locator:
            function()
    finally:
        for hook in hooks:
            hook.remove()
    return locator.place


_DEPTH, _WIDTH = 6, 1000  # how deep, and how many entries of a container, the search for names goes


def closure_tensors(function: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors that a function can reach without being given them, with a name for each.

    Closure cells, globals that it uses, defaults, the arguments of a partial, the instance of a method, modules'
    parameters and buffers, the entries of containers and the attributes of objects are searched, a few levels deep.

    Args:
        function: any callable.

    Yields:
        (name, tensor), such as ("net.0.weight", ...).

    Example:
        >>> w = torch.ones(2)
        >>> def make(scale):
        ...     return lambda y: (scale["a"] * y).sum()
        >>> [name for name, _ in closure_tensors(make({"a": w}))]
        ["scale['a']"]
    """
    yield from _search("", function, set(), _DEPTH)


def _search(name: str, value: Any, seen: set[int], depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif depth and id(value) not in seen and not isinstance(value, str | bytes | type | types.ModuleType):
        seen.add(id(value))
        for part, entry in islice(_parts(name, value), _WIDTH):
            yield from _search(part, entry, seen, depth - 1)


def _parts(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What one value holds, each entry with its name."""
    dotted = f"{name}." if name else ""
    if isinstance(value, nn.Module):
        yield from ((dotted + key, tensor) for key, tensor in value.named_parameters())
        yield from ((dotted + key, tensor) for key, tensor in value.named_buffers())
    elif isinstance(value, partial):
        yield name, value.func
        yield from ((f"{name or 'partial'}.args[{i}]", entry) for i, entry in enumerate(value.args))
        yield from value.keywords.items()
    elif isinstance(value, types.MethodType):
        yield "self", value.__self__
        yield name, value.__func__
    elif isinstance(value, types.FunctionType):
        variables = inspect.getclosurevars(value)
        yield from variables.nonlocals.items()
        yield from variables.globals.items()
        defaults = {key: entry.default for key, entry in inspect.signature(value).parameters.items()}
        yield from ((key, entry) for key, entry in defaults.items() if entry is not inspect.Parameter.empty)
    elif isinstance(value, Mapping):
        yield from ((f"{name}[{key!r}]", entry) for key, entry in value.items())
    elif isinstance(value, list | tuple):
        yield from ((f"{name}[{i}]", entry) for i, entry in enumerate(value))
    elif not type(value).__module__.startswith(("torch", "numpy")):
        yield from ((dotted + key, entry) for key, entry in getattr(value, "__dict__", {}).items())


def describe_captured(function: Callable[..., Any], leaves: Sequence[Tensor]) -> str:
    """Names for leaves that a function captured, for a message.

    A captured tensor that was computed from a leaf counts as the leaf.

    Args:
        function: the callable that captured them.
        leaves: the leaves that its graph reached.

    Returns:
        Such as "`net.weight` of shape (3, 3), a tensor of shape (2,)": the shape alone where no name was found.

    Example:
        >>> w = torch.ones(2, requires_grad=True)
        >>> def make(scale):
        ...     return lambda y: (scale * y).sum()
        >>> describe_captured(make(w), [w])
        '`scale` of shape (2,)'
    """
    names: dict[int, str] = {}
    for name, tensor in closure_tensors(function):
        if not tensor.requires_grad:
            continue
        owners = [tensor, *(getattr(node, "variable", None) for node in graph_nodes([tensor]))]
        for leaf in owners:
            names.setdefault(id(leaf), f"`{name}`")
    return ", ".join(f"{names.get(id(leaf), 'a tensor')} of shape {tuple(leaf.shape)}" for leaf in leaves)
