"""The last stage of any run: implicit differentiation from where another method ended, which certifies it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .aid import AID
from .method import BilevelResult
from .problem import Problem

__all__ = ["polish"]


def polish(
    problem: Problem,
    result: BilevelResult,
    method: AID | None = None,
    *,
    data: Callable[[int], Any] | None = None,
    callbacks: Iterable[Callable[[int, Any], Any]] = (),
) -> BilevelResult:
    """Run AID from the last point of another method's result: exact hypergradients, and a certificate.

    Penalty and single-loop methods end near a solution, with a bias or with the accuracy of their step sizes; a few
    quasi-Newton steps with exact hypergradients take both away. Penalty methods do the same by `debias=AID()`.

    The error and CONVERGED are AID's, with the scale taken at the result's point, so relative to gradients that are
    still there: pass a method with `Stopping(atol=...)` for an absolute tolerance.

    Cost: AID's, usually for 2 to 10 steps; its `counts` are the polish's own.

    Args:
        problem: the problem that was solved.
        result: of any method.
        method: AID with other options, None for AID().
        data: see `bilevel.solve`; the samples that the answer is meant for, all of them.
        callbacks: see `bilevel.solve`.

    Returns:
        The BilevelResult of the AID run. SINGULAR says that the lower solution is not unique, so that the point cannot
        be certified in this way.

    Raises:
        ValueError: for a problem that AID refuses.

    Example:
        >>> import torch
        >>> from nestopt import bilevel
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y: ((y - 1) ** 2).sum(), lower=lambda x, y: ((y - x) ** 2).sum() + 0.5 * (y**2).sum()
        ... )
        >>> start = torch.zeros(1, dtype=torch.float64)
        >>> rough = bilevel.HOAG(stopping=bilevel.AID().stopping)(problem, start, start.clone())
        >>> res = polish(problem, rough)
        >>> res.status.name, res.x
        ('CONVERGED', tensor([1.5000], dtype=torch.float64))
    """
    return (AID() if method is None else method)(problem, result.x, result.y, data=data, callbacks=callbacks)
