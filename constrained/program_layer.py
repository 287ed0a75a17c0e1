"""What layers that solve a program share: data that are held or given."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from .holder import Holder

__all__ = ["ProgramLayer"]


class ProgramLayer(Holder):
    """A module that holds some of a program's data and options, and gets the rest at each call.

    Args:
        data: tensors or None, by name.
        options: of the solver, by name; tensors among them are held like the data.

    Raises:
        TypeError: for data that are neither tensors nor None.
    """

    needed: ClassVar[tuple[str, ...]]

    def __init__(self, data: dict[str, Tensor | None], options: dict[str, Any]) -> None:
        for name, value in data.items():
            given: Any = value
            if not (given is None or isinstance(given, Tensor)):
                raise TypeError(
                    f"{type(self).__name__}: {name} must be a tensor, a parameter or None, but got "
                    f"{type(value).__name__}."
                )
        super().__init__(**data, **options)

    def complete(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Data and options, those given in the place of the layer's own.

        Args:
            inputs: by name.

        Returns:
            All of them.

        Raises:
            ValueError: if one that is needed is neither held nor given.
        """
        values = self.held(inputs)
        for name in self.needed:
            if values[name] is None:
                raise ValueError(
                    f"{type(self).__name__}: {name} is neither held by the layer nor given; pass layer({name}=...)."
                )
        return values
