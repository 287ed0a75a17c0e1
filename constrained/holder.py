"""Modules that hold named values: learnt, constant or plain."""

from __future__ import annotations

from typing import Any

import optree
from torch import Tensor, nn

__all__ = ["Holder"]


class Holder(nn.Module):
    """A module that holds values by name: the attribute `name` of each is what it was given.

    A parameter is learnt, any other tensor is a constant (a buffer, which `state_dict` and `.to` know), a module is a
    submodule, and everything else is kept as it is.

    Args:
        values: by name.

    Raises:
        ValueError: for a name that torch.nn.Module has a meaning for, or floating tensors hidden in a container.
    """

    def __init__(self, **values: Any) -> None:
        super().__init__()
        owner = type(self).__name__
        for name, value in values.items():
            if hasattr(self, name):
                raise ValueError(f"{owner}: `{name}` has a meaning for torch.nn.Module; give the value another name.")
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
                continue
            leaves = [] if isinstance(value, nn.Parameter | nn.Module) else optree.tree_leaves(value)
            if any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves):
                raise ValueError(
                    f"{owner}: {name} is a {type(value).__name__} with tensors in it, which would be neither learnt "
                    "nor moved by .to(); give one tensor, or pass it in forward."
                )
            if value is None:
                self.register_buffer(name, None)  # a parameter may take its place
            else:
                setattr(self, name, value)
        self._held = tuple(values)

    def held(self, given: dict[str, Any]) -> dict[str, Any]:
        """All values, those given in the place of the module's own.

        Args:
            given: by name; further names are added.

        Returns:
            A new dictionary.
        """
        return {**{name: getattr(self, name) for name in self._held}, **given}

    def extra_repr(self) -> str:
        """What is held, by name: tensors by shape."""
        parts = []
        for name in self._held:
            value = getattr(self, name)
            if not isinstance(value, nn.Module) and value is not None:
                shown = f"{type(value).__name__}{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                parts.append(f"{name}={shown}")
        return ", ".join(parts)
