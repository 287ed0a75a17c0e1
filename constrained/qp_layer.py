"""A quadratic program as a layer of a network."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from .program_layer import ProgramLayer
from .quadratic_program import QPResult, solve_qp

__all__ = ["QPLayer"]


class QPLayer(ProgramLayer):
    """A layer whose output solves min x'Qx/2 + q'x, A x = b, G x <= h; what it holds is learnt or constant.

    Data and options that the layer holds are parameters (an nn.Parameter stays one, and is learnt), buffers (any other
    tensor is a constant) or plain values; the others are inputs of `forward`. A Q that is to be learnt is safest as L,
    with `square_root=True`: Q = L L' + 1e-6 I is then always positive definite. `state_dict` holds parameters and
    buffers only.

    Args:
        Q: shape (*batch, n, n), or None for an input; with square_root its factor L, shape (*batch, n, k).
        q: shape (*batch, n), or None.
        A: shape (*batch, p, n), or None.
        b: shape (*batch, p), or None.
        G: shape (*batch, m, n), or None.
        h: shape (*batch, m), or None.
        square_root: whether Q is given by its factor.
        options: further keyword arguments of `solve_qp`: low, high, degenerate, backend, on_failure, ...; tensors among
            them are held like the data.

    Raises:
        TypeError: for data that are neither tensors nor None.

    Example:
        >>> import torch
        >>> from nestopt import constrained
        >>> layer = constrained.QPLayer(Q=torch.eye(2), G=torch.nn.Parameter(torch.eye(2)), h=torch.ones(2))
        >>> z = layer(q=torch.tensor([[-2.0, 0.5], [-0.2, -3.0]]))
        >>> z.x.detach()
        tensor([[ 1.0000, -0.5000],
                [ 0.2000,  1.0000]])
        >>> z.x.sum().backward()
        >>> layer.G.grad.shape
        torch.Size([2, 2])
    """

    needed: ClassVar[tuple[str, ...]] = ("Q", "q")

    def __init__(
        self,
        Q: Tensor | None = None,
        q: Tensor | None = None,
        A: Tensor | None = None,
        b: Tensor | None = None,
        G: Tensor | None = None,
        h: Tensor | None = None,
        *,
        square_root: bool = False,
        **options: Any,
    ) -> None:
        super().__init__({"Q": Q, "q": q, "A": A, "b": b, "G": G, "h": h}, options)
        self.square_root = square_root

    def forward(self, **inputs: Any) -> QPResult:
        """Solve for these inputs and the data that the layer holds.

        Args:
            inputs: any of Q, q, A, b, G, h and the options of `solve_qp`, warm_start say, by name, in the place of the
                layer's own.

        Returns:
            The result; its x, duals and value are differentiable.

        Raises:
            ValueError: if Q or q is neither held nor given.
        """
        values = self.complete(inputs)
        if self.square_root:
            L = values["Q"]
            values["Q"] = L @ L.mT + 1e-6 * L.new_ones(L.shape[-2]).diag()
        return solve_qp(**values)
