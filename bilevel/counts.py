"""What a run has cost: gradients and products, counted where they are spent."""

from __future__ import annotations

from dataclasses import dataclass
from operator import add

__all__ = ["Counts"]


@dataclass(frozen=True)
class Counts:
    """What a run has cost so far.

    Attributes:
        upper_evaluations: values of F with a gradient.
        lower_gradients: gradients of f.
        products: products with second derivatives of f.
        lower_solves: runs of the lower solver.
        constraint_evaluations: values of the constraints.
        samples: samples that all of these saw together, where the data say how many a batch has.
    """

    upper_evaluations: int = 0
    lower_gradients: int = 0
    products: int = 0
    lower_solves: int = 0
    constraint_evaluations: int = 0
    samples: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*map(add, vars(self).values(), vars(other).values()))  # `fields` would take much longer
