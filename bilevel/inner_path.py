"""What passes between the forward and the backward pass of the methods through the solver."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from nestopt.linalg import Status

from .counts import Counts
from .inner_steps import Segment

__all__ = ["Forward", "Path", "Pulled"]


@dataclass(frozen=True)
class Forward:
    """The inner steps of one evaluation.

    Attributes:
        x: raveled upper variable.
        y: raveled last inner iterate.
        segments: that were taken, oldest first.
        value: F(x, y).
        upper_x: F_x there.
        upper_y: F_y there.
        lower: |f_y| there.
        inner: how many steps.
        least: the smallest curvature assumed.
        top: the largest one seen.
        flat: whether f is flat in some direction.
        counts: what it cost.
        fault: why nothing can be made of it, or None.
        at: number of the step that ran away.
    """

    x: Tensor
    y: Tensor
    segments: list[Segment]
    value: Tensor
    upper_x: Tensor
    upper_y: Tensor
    lower: Tensor
    inner: int
    least: float
    top: float
    flat: bool
    counts: Counts
    fault: Status | None = None
    at: int = -1


@dataclass
class Path:
    """The inner steps while they are taken."""

    x: Tensor
    y: Tensor
    limit: float
    enough: float
    top: float
    least: float
    flat: bool = False
    t: int = 0
    segments: list[Segment] = field(default_factory=list)
    counts: Counts = Counts()
    fault: Status | None = None
    at: int = -1


@dataclass(frozen=True)
class Pulled:
    """A hypergradient, and what is known of its error.

    Attributes:
        hypergradient: raveled.
        adjoint: |dF / dy| at the first step that was differentiated: what the steps before it would still change.
        pulled: how many steps were differentiated.
        stored: most inner states held at once.
        counts: what it cost.
        extra: further residuals.
    """

    hypergradient: Tensor
    adjoint: Tensor
    pulled: int
    stored: int
    counts: Counts
    extra: dict[str, Tensor] = field(default_factory=dict)
