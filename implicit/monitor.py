"""What was measured where a derivative was attached and taken, and what happens when a measurement is bad."""

from __future__ import annotations

import warnings
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nestopt.linalg.result import Result, SolverError, Status, Statuses, scalar_or_tensor, status_of

__all__ = ["ImplicitWarning", "Kind", "Monitor", "OnFailure", "Record", "check_on_failure", "report"]

OnFailure = Literal["raise", "warn", "nan"]
Kind = Literal["point", "adjoint", "tangent"]


class ImplicitWarning(RuntimeWarning):
    """An implicit derivative was attached or computed although its certificate failed (`on_failure="warn"`)."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measurement; every tensor is per item of the batch (per right-hand side first, where there are several).

    Attributes:
        kind: "point" for the solution y itself, "adjoint" for a system with A', "tangent" for one with A.
        codes: Status codes.
        residual_norm: |R(y, theta)| for a point; the true |b - A u| of the linear system otherwise.
        error: what was held against the tolerance: for a point the estimated distance of y to a root, else
            residual_norm.
        tolerance: what `error` may be.
        iterations: steps of the linear solver.
        products: products with A and A' that it spent, those of a factorisation that it was the first to need included.
    """

    kind: Kind
    codes: Tensor
    residual_norm: Any
    error: Any
    tolerance: Any
    iterations: Any = 0
    products: int = 0

    @property
    def status(self) -> Status | Statuses:
        """How it ended: a Status, or Statuses over a batch."""
        return status_of(self.codes)

    @property
    def converged(self) -> Any:
        """Whether the error is within the tolerance: a bool, or a boolean tensor over a batch."""
        return scalar_or_tensor(self.codes == Status.CONVERGED.code)


class Monitor:
    """Collects the certificates of the calls that it is passed to: pass `monitor=Monitor()` and read it after backward.

    Args:
        keep: how many records are kept, the newest; so that a training loop's memory stays flat.

    Raises:
        ValueError: if keep is less than 1.

    Example:
        >>> import torch
        >>> from nestopt import implicit
        >>> a = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
        >>> monitor = implicit.Monitor()
        >>> y = implicit.root(lambda y, a: y * y - a, a.detach().sqrt(), a, monitor=monitor)
        >>> y.backward()
        >>> [(record.kind, record.status.name) for record in monitor.records], a.grad
        ([('point', 'CONVERGED'), ('adjoint', 'CONVERGED')], tensor(0.2500, dtype=torch.float64))
    """

    def __init__(self, keep: int = 100) -> None:
        if keep < 1:
            raise ValueError(f"Monitor: keep must be at least 1, but got {keep}.")
        self.records: deque[Record] = deque(maxlen=keep)

    def last(self, kind: Kind) -> Record | None:
        """The newest record of a kind.

        Args:
            kind: "point", "adjoint" or "tangent".

        Returns:
            The record, None when there is none.
        """
        return next((record for record in reversed(self.records) if record.kind == kind), None)

    @property
    def converged(self) -> bool:
        """Whether every item of every record is within its tolerance."""
        return all(bool(torch.as_tensor(record.converged).all()) for record in self.records)

    def clear(self) -> None:
        """Forget all records."""
        self.records.clear()

    def __repr__(self) -> str:
        return f"Monitor({', '.join(f'{record.kind}: {record.status!r}' for record in self.records)})"


def check_on_failure(owner: str, on_failure: str) -> None:
    """Refuse a policy that does not exist."""
    if on_failure not in ("raise", "warn", "nan"):
        raise ValueError(f'{owner}: on_failure must be "raise", "warn" or "nan", but got {on_failure!r}.')


def report(subject: str, result: Result, on_failure: OnFailure) -> None:
    """Raise or warn, as asked, when any item of a result has failed.

    Args:
        subject: the beginning of the sentence: whose result it is.
        result: the result.
        on_failure: "raise", "warn", or "nan", which says nothing because the numbers do.

    Raises:
        SolverError: if asked to.
    """
    if on_failure == "nan":
        return
    try:
        result.unwrap()
    except SolverError as error:
        message = f"{subject}: {error}"
        if on_failure == "raise":
            raise SolverError(message, error.result) from None
        warnings.warn(message, ImplicitWarning, stacklevel=4)
