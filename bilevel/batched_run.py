"""How callbacks see a run over many independent problems."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from torch import Tensor

from nestopt.linalg import Status

from .callbacks import Callback, History
from .per_task import worst
from .problem import Spaces

__all__ = ["BatchHistory", "WholeBatch", "watched"]


class WholeBatch:
    """A batch's state as that of one run, for callbacks that ask for numbers; all else is the state's own.

    Args:
        state: of the batch.
    """

    def __init__(self, state: Any) -> None:
        self.state = state

    def __getattr__(self, name: str) -> Any:
        return getattr(self.state, name)

    @property
    def iterations(self) -> Tensor:
        """Steps of the batch: those of the item with most."""
        most: Tensor = self.state.iterations.max()
        return most

    @property
    def value(self) -> Tensor:
        """The mean over the items, NaN where one is."""
        mean: Tensor = self.state.value.mean()
        return mean

    @property
    def error(self) -> Tensor:
        """The largest, NaN where one is."""
        largest: Tensor = self.state.error.amax()
        return largest

    @property
    def status(self) -> Status:
        """The gravest."""
        return worst(self.state.codes)

    @property
    def x_vector(self) -> Tensor:
        """Every item's raveled upper variable."""
        x: Tensor = self.state.points.y
        return x

    @property
    def y_vector(self) -> Tensor:
        """Every item's raveled lower variable."""
        y: Tensor = self.state.points.lower
        return y

    @property
    def spaces(self) -> Spaces:
        """Those of an item."""
        return Spaces(self.state.ravel, self.state.ravel_y)


class BatchHistory(History):
    """One record a step of the batch, with lists over its items.

    Example:
        >>> BatchHistory().records
        []
    """

    def __call__(self, iteration: int, state: Any) -> None:
        """Append a record, unless this step has one already."""
        s = state.state
        step = int(state.iterations)
        if self.records and self.records[-1]["iteration"] == step:
            return
        figures = {"value": s.value, "error": s.error, **s.residuals}
        self.records.append(
            {
                "iteration": step,
                "seconds": time.perf_counter() - self._begun,
                **{name: figure.flatten().tolist() for name, figure in figures.items()},
                **asdict(s.counts),
            }
        )


def watched(callbacks: Iterable[Callable[[int, Any], Any]]) -> list[Callable[[int, Any], Any]]:
    """The callbacks, those of the library shown the batch as one run.

    Args:
        callbacks: functions of (iteration, state), or Callbacks.

    Returns:
        Functions of (iteration, state of the batch).
    """

    def shown(callback: Callable[[int, Any], Any]) -> Callable[[int, Any], Any]:
        return (lambda k, s: callback(k, WholeBatch(s))) if isinstance(callback, Callback) else callback

    return [shown(callback) for callback in callbacks]
