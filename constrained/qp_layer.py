"""A quadratic program as a layer of a network."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .quadratic_program import QPResult, solve_qp

__all__ = ["QPLayer"]

NAMES = ("Q", "q", "A", "b", "G", "h")


class QPLayer(nn.Module):
    """A layer whose output solves min x'Qx/2 + q'x, A x = b, G x <= h; what it holds is learnt or constant.

    Data that the layer holds are parameters (an nn.Parameter stays one, and is learnt) or buffers (a tensor is a
    constant); the others are inputs of `forward`. A Q that is to be learnt is safest as L, with `square_root=True`:
    Q = L L' + 1e-6 I is then always positive definite. `state_dict` holds parameters and buffers only.

    Args:
        Q: shape (*batch, n, n), or None for an input; with square_root its factor L, shape (*batch, n, k).
        q: shape (*batch, n), or None.
        A: shape (*batch, p, n), or None.
        b: shape (*batch, p), or None.
        G: shape (*batch, m, n), or None.
        h: shape (*batch, m), or None.
        square_root: whether Q is given by its factor.
        options: further keyword arguments of `solve_qp`: low, high, degenerate, backend, on_failure, ...

    Raises:
        TypeError: for data that are neither tensors nor None.

    Example:
        >>> import torch
        >>> from nestopt import constrained
        >>> layer = constrained.QPLayer(Q=torch.eye(2), G=torch.nn.Parameter(torch.eye(2)), h=torch.ones(2))
        >>> z = layer(q=torch.tensor([[-2.0, 0.5], [0.0, -3.0]]))
        >>> z.x.detach()
        tensor([[ 1.0000, -0.5000],
                [ 0.0000,  1.0000]])
        >>> z.x.sum().backward()
        >>> layer.G.grad.shape
        torch.Size([2, 2])
    """

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
        super().__init__()
        for name, value in zip(NAMES, (Q, q, A, b, G, h), strict=True):
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            elif value is None or isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                raise TypeError(
                    f"QPLayer: {name} must be a tensor, a parameter or None, but got {type(value).__name__}."
                )
        self.square_root = square_root
        self.options = options

    def forward(self, **inputs: Tensor) -> QPResult:
        """Solve for these inputs and the data that the layer holds.

        Args:
            inputs: any of Q, q, A, b, G, h by name, in the place of the layer's own; options of `solve_qp` such as low,
                high and warm_start as well.

        Returns:
            The result; its x, duals and value are differentiable.

        Raises:
            ValueError: if Q or q is neither held nor given.
        """
        data = {name: inputs.pop(name, getattr(self, name)) for name in NAMES}
        for name in ("Q", "q"):
            if data[name] is None:
                raise ValueError(f"QPLayer: {name} is neither held by the layer nor given; pass layer({name}=...).")
        L = data["Q"]
        if self.square_root:
            eye = L.new_ones(L.shape[-2]).diag()
            data["Q"] = L @ L.mT + 1e-6 * eye
        options: dict[str, Any] = {**self.options, **inputs}
        return solve_qp(**data, **options)
