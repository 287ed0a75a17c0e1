"""Projections and proximal operators as layers of a network."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, ClassVar

from torch import Tensor, nn

from .holder import Holder
from .prox import Prox
from .sets import Set

__all__ = ["ProjectionLayer", "ProximalLayer"]


class _Builder(Holder):
    """A module that holds the fields of a Set or a Prox, and builds it anew from them at every call."""

    expected: ClassVar[tuple[type, ...]] = (Set, Prox)

    def __init__(self, kind: type, /, **fields: Any) -> None:
        owner = type(self).__name__
        names = " or a ".join(base.__name__ for base in self.expected)
        found: Any = kind
        if not (isinstance(found, type) and issubclass(found, self.expected)):
            hint = "; give its class, and its fields by name" if isinstance(found, self.expected) else ""
            shown = found.__name__ if isinstance(found, type) else f"an object of type {type(found).__name__}"
            raise TypeError(f"{owner}: kind must be a class of {names}, such as {self._such()}, but got {shown}{hint}.")
        if inspect.isabstract(kind):
            raise TypeError(f"{owner}: {kind.__name__} is abstract; give a class of its own, such as {self._such()}.")
        super().__init__(**{name: _module_of(value) for name, value in fields.items()})
        self.kind = kind
        mine = self._of_kind(self.held({}))
        self._refuse_unknown(mine)
        if not self._missing(mine):
            self.build()  # bad values are refused here, and not at the first call

    @classmethod
    def _such(cls) -> str:
        return "Ball" if Set in cls.expected else "L1"

    def build(self, **given: Any) -> Any:
        """The Set or Prox of the fields that are held and these.

        Args:
            given: fields by name, in the place of the module's own.

        Returns:
            An object of `kind`.

        Raises:
            TypeError: for a field that `kind` does not have.
            ValueError: for a field without a default that is neither held nor given, or a value that `kind` refuses.
        """
        self._refuse_unknown(given)
        fields = {name: _built(value) for name, value in self._of_kind(self.held(given)).items()}
        missing = self._missing(fields)
        if missing:
            names = ", ".join(f"`{name}`" for name in missing)
            raise ValueError(
                f"{type(self).__name__}: {self.kind.__name__} needs {names}, neither held by the layer nor given; pass "
                f"layer(x, {missing[0]}=...)."
            )
        return self.kind(**fields)

    def _of_kind(self, values: dict[str, Any]) -> dict[str, Any]:
        """Those of the values that are fields of `kind`."""
        return values

    def _missing(self, fields: dict[str, Any]) -> list[str]:
        """The fields of `kind` without a default that are not there, or None."""
        parameters = inspect.signature(self.kind).parameters.values()
        return [p.name for p in parameters if p.default is p.empty and fields.get(p.name) is None]

    def _refuse_unknown(self, given: dict[str, Any]) -> None:
        known = inspect.signature(self.kind).parameters
        unknown = [name for name in given if name not in known]
        if unknown:
            fields = f"its fields are {', '.join(known)}" if known else "it has no fields"
            raise TypeError(f"{type(self).__name__}: {self.kind.__name__} has no field `{unknown[0]}`; {fields}.")


class ProjectionLayer(_Builder):
    """A layer that projects its input onto a set whose radius, bounds, rows, ... are learnt, constant or inputs.

    The fields of the set are parameters (an nn.Parameter stays one, and is learnt), buffers (any other tensor is a
    constant) or plain numbers; a field that is a Set itself, or a sequence of them, may hold parameters too. The set is
    built anew from them at every call: a learnt field is checked as the set checks it, and a radius that training has
    made negative is refused (learn its logarithm, and pass the radius as an input). `state_dict` holds parameters and
    buffers only.

    Args:
        kind: a class of Set, such as Ball; not an object.
        fields: of the set by name; those without a default may be left to `forward`.

    Raises:
        TypeError: if kind is not a class of Set, or has no such field.
        ValueError: for values that the set refuses.

    Example:
        >>> import torch
        >>> from nestopt.constrained import Ball, ProjectionLayer
        >>> layer = ProjectionLayer(Ball, radius=torch.nn.Parameter(torch.tensor(1.0)))
        >>> layer(torch.tensor([3.0, 4.0])).sum().backward()
        >>> layer.radius.grad
        tensor(1.4000)
        >>> layer(torch.tensor([3.0, 4.0]), radius=2.5)
        tensor([1.5000, 2.0000])
    """

    expected: ClassVar[tuple[type, ...]] = (Set,)

    def forward(self, x: Tensor, /, **given: Any) -> Tensor:
        """Project.

        Args:
            x: shape (*batch, n), or (*batch, m, n) for a set of matrices.
            given: fields of the set by name, in the place of the layer's own.

        Returns:
            The projection, differentiable in x and every field.
        """
        projected: Tensor = self.build(**given).project(x)
        return projected


class ProximalLayer(_Builder):
    """A layer that applies the proximal operator of a function whose weights, and whose step, are learnt or inputs.

    Otherwise like `ProjectionLayer`: prox(x, step) = argmin over z of g(z) + |z - x|^2 / (2 step).

    Args:
        kind: a class of Prox, such as L1; for a set give Indicator, or a ProjectionLayer.
        step: positive number, or tensor that broadcasts to the batch; a parameter is learnt.
        fields: of the function by name; those without a default may be left to `forward`.

    Raises:
        TypeError: if kind is not a class of Prox, or has no such field.
        ValueError: for values that the function refuses.

    Example:
        >>> import torch
        >>> from nestopt.constrained import L1, ProximalLayer
        >>> layer = ProximalLayer(L1, weight=torch.nn.Parameter(torch.tensor(0.5)))
        >>> layer(torch.tensor([2.0, -3.0, 0.1])).sum().backward()
        >>> layer.weight.grad
        tensor(0.)
        >>> layer(torch.tensor([2.0, -3.0, 0.1]), step=2.0).detach()
        tensor([ 1., -2.,  0.])
    """

    expected: ClassVar[tuple[type, ...]] = (Prox,)

    def __init__(self, kind: type[Prox], /, step: float | Tensor = 1.0, **fields: Any) -> None:
        super().__init__(kind, step=step, **fields)

    def forward(self, x: Tensor, /, *, step: float | Tensor | None = None, **given: Any) -> Tensor:
        """Apply the proximal operator.

        Args:
            x: shape (*batch, *space).
            step: in the place of the layer's own; None for that.
            given: fields of the function by name, in the place of the layer's own.

        Returns:
            A tensor of x's shape, differentiable in x, the step and every field.
        """
        nearest: Tensor = self.build(**given).prox(x, self.step if step is None else step)
        return nearest

    def _of_kind(self, values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name != "step"}


def _module_of(value: Any) -> Any:
    """A Set or Prox, or a sequence of them, as modules that hold their tensors; anything else as it is."""
    if isinstance(value, (Set, Prox)) and dataclasses.is_dataclass(value):
        return _Builder(type(value), **{f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init})
    if isinstance(value, (list, tuple)) and value:
        modules = [_module_of(entry) for entry in value]
        if all(isinstance(module, nn.Module) for module in modules):
            return nn.ModuleList(modules)
    return value


def _built(value: Any) -> Any:
    """The other way."""
    if isinstance(value, _Builder):
        return value.build()
    return [_built(module) for module in value] if isinstance(value, nn.ModuleList) else value
