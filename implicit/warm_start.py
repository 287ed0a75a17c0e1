"""The memory from which iterative solves of a training loop start."""

from __future__ import annotations

import torch
from torch import Tensor

from nestopt.linalg import LinearOperator

__all__ = ["WarmStart"]


class WarmStart:
    """Remembers the last solution of the adjoint system, from which an iterative solver starts in the next call.

    Pass one object to every call of a training loop. The start is scaled to be the best multiple of the remembered
    vector, and used only where it at least halves the first residual, so that it never costs more than the one product
    that measures this; the answer is certified as ever. It is forgotten by pickle and deepcopy.

    Example:
        >>> import torch
        >>> from nestopt import implicit
        >>> warm_start = implicit.WarmStart()
        >>> a = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
        >>> y = implicit.root(lambda y, a: y * y - a, a.detach().sqrt(), a, warm_start=warm_start)
    """

    def __init__(self) -> None:
        self._last: dict[bool, Tensor] = {}

    def __reduce__(self) -> tuple[type[WarmStart], tuple[()]]:
        return WarmStart, ()

    def guess(self, A: LinearOperator, b: Tensor, transposed: bool) -> Tensor | None:
        """Where to start the solution of A x = b.

        Args:
            A: the operator, or its transpose where `transposed`.
            b: right-hand sides.
            transposed: whose solutions to start from.

        Returns:
            A start for every column, zero where none helps; None where none helps any.
        """
        last = self._last.get(transposed)
        if last is None or last.shape != b.shape or last.dtype != b.dtype or last.device != b.device:
            return None
        image = A @ last
        scale = A.vecdot(b, image) / A.vecdot(image, image)
        useful = A.norm(b - scale[..., None] * image) < 0.5 * A.norm(b)  # false for NaN
        return torch.where(useful[..., None], scale[..., None] * last, 0) if bool(useful.any()) else None

    def remember(self, x: Tensor, transposed: bool) -> None:
        """Keep x for the next call."""
        self._last[transposed] = x.detach()  # x itself is about to become part of a graph, which must not live on here
