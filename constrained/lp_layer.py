"""A linear program as a layer of a network."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from .linear_program import LPResult, solve_lp
from .program_layer import ProgramLayer

__all__ = ["LPLayer"]


class LPLayer(ProgramLayer):
    """A layer whose output solves min c'x + gamma |x|^2 / 2, A x = b, G x <= h; what it holds is learnt or constant.

    Data and options that the layer holds are parameters (an nn.Parameter stays one, and is learnt), buffers (any other
    tensor is a constant) or plain values; the others are inputs of `forward`. Mostly c comes from the network before:
    then `regularization` > 0 gives x a derivative in c, which an exact vertex has not. `state_dict` holds parameters
    and buffers only.

    Args:
        c: shape (*batch, n), or None for an input.
        A: shape (*batch, p, n), or None.
        b: shape (*batch, p), or None.
        G: shape (*batch, m, n), or None.
        h: shape (*batch, m), or None.
        options: further keyword arguments of `solve_lp`: low, high, regularization, ties, on_failure, ...; tensors
            among them are held like the data.

    Raises:
        TypeError: for data that are neither tensors nor None.

    Example:
        >>> import torch
        >>> from nestopt import constrained
        >>> row, budget = torch.ones(1, 3), torch.nn.Parameter(torch.ones(1))
        >>> layer = constrained.LPLayer(A=row, b=budget, low=0.0, regularization=1.0)
        >>> z = layer(c=torch.tensor([-0.6, -0.4, -0.5]))
        >>> z.x.detach()
        tensor([0.4333, 0.2333, 0.3333])
        >>> z.value.backward()
        >>> layer.b.grad.isclose(-z.equality_dual).all()
        tensor(True)
    """

    needed: ClassVar[tuple[str, ...]] = ("c",)

    def __init__(
        self,
        c: Tensor | None = None,
        A: Tensor | None = None,
        b: Tensor | None = None,
        G: Tensor | None = None,
        h: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__({"c": c, "A": A, "b": b, "G": G, "h": h}, options)

    def forward(self, **inputs: Any) -> LPResult:
        """Solve for these inputs and the data that the layer holds.

        Args:
            inputs: any of c, A, b, G, h and the options of `solve_lp` by name, in the place of the layer's own.

        Returns:
            The result; its x, duals and value are differentiable.

        Raises:
            ValueError: if c is neither held nor given.
        """
        return solve_lp(**self.complete(inputs))
