"""Samples with what a loss must know of them beside their values, and sources of samples that add it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .oracle import Batch
from .stochastic import Draw, Source

__all__ = ["Mapped", "Numbered", "Part"]


@dataclass(frozen=True)
class Part:
    """One level's samples of one step, with what a loss must know of them.

    Attributes:
        value: the samples, as the user's loss takes them.
        step: the outer step, which dropout="different" seeds its masks by; None where nobody says.
        weight: in the mean over processes, 1 where all have as many samples.
    """

    value: Any
    step: int | None = None
    weight: float = 1.0

    @classmethod
    def of(cls, value: Any) -> Part:
        """The value as a Part; a Part is itself."""
        return value if isinstance(value, Part) else cls(value)


class Mapped(Source):
    """Another source's samples, each level's put through a function of the samples and the step.

    Args:
        source: a Source, or any function k -> batch.
    """

    def __init__(self, source: Callable[[int], Any]) -> None:
        if not callable(source):
            raise TypeError(
                f"{type(self).__name__}: the data must be Batches(...), FromLoader(...) or a function k -> batch, but "
                f"got {type(source).__name__}."
            )
        self.source = source

    @property
    def origin(self) -> Source:
        """The other source, or what is below it."""
        return self.source.origin if isinstance(self.source, Source) else self

    @abstractmethod
    def put(self, part: Any, k: int) -> Any:
        """One level's samples of step k, as they are passed on."""

    def draw(self, k: int, i: int = 0) -> Any:
        """The i-th draw of step k.

        Args:
            k: outer step.
            i: which draw.

        Returns:
            The other source's draw, mapped.

        Raises:
            ValueError: for a second draw from a function k -> batch.
        """
        if isinstance(self.source, Source):
            return self._mapped(self.source.draw(k, i), k)
        if i:
            raise ValueError(
                f"{type(self).__name__}: draw {i + 1} of step {k} was asked for, but a function k -> batch has one; "
                "pass Batches(...), or FromLoader(..., draws=...)."
            )
        return self._mapped(self.source(k), k)

    def whole(self) -> Any:
        """All samples, where the other source has them at hand."""
        every = self.source.whole() if isinstance(self.source, Source) else None
        return None if every is None else self._mapped(every, 0)

    def block(self, upper: int, lower: int) -> Any:
        """The samples of two given blocks, of a source that has blocks."""
        source: Any = self.source
        return self._mapped(source.block(upper, lower), 0)

    def __len__(self) -> int:
        """Of the other source; 100 steps where it is a mere function."""
        return len(self.source) if isinstance(self.source, Source) else 100

    def _mapped(self, data: Any, k: int) -> Any:
        if not isinstance(data, Batch):
            return None if data is None else self.put(data, k)
        upper, lower = self.put(data.upper, k), self.put(data.lower, k)
        if isinstance(data, Draw):
            return replace(data, upper=upper, lower=lower, source=self)
        return Batch(upper, lower)


class Numbered(Mapped):
    """Each step's samples with the step's number, for dropout="different".

    Args:
        source: a Source, or any function k -> batch.

    Example:
        >>> Numbered(lambda k: "samples")(3)
        Part(value='samples', step=3, weight=1.0)
    """

    def put(self, part: Any, k: int) -> Part:
        """The samples with k."""
        return replace(Part.of(part), step=k)
