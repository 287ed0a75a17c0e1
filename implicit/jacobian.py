"""The Jacobian of a batch of residuals at a point, along one kept graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nestopt.linalg import LinearOperator
from nestopt.linalg.autodiff import Blocks
from nestopt.linalg.guard import unbatchable
from nestopt.linalg.normalization import WrittenOut

__all__ = ["SystemJacobian"]

_BLOCK = 2**20  # numbers in a block of cotangents that go through the graph together


class SystemJacobian(LinearOperator):
    """A = dR/dy of shape (*systems, n, n), where R of shape (*systems, n) has a block diagonal Jacobian.

    R is evaluated once, at the point, on inputs cut from everybody else's graph; one backward pass is one product with
    A' of every system, and a product with A is a backward pass through the backward pass (the same one when A is
    symmetric). Many right-hand sides pass through the graph in blocks where vmap has rules for all of its operations,
    and one by one where not.

    Args:
        function: (y, *theta) -> R.
        y: shape (*systems, n).
        theta: tensors.
        live: which of them become leaves of the graph.
        symmetric: promise that A is, as a Hessian is.
        written_out: what is known of the function's normalisations; None for nothing yet.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        y: Tensor,
        theta: Sequence[Tensor],
        live: Sequence[bool],
        *,
        symmetric: bool,
        written_out: WrittenOut | None = None,
    ) -> None:
        super().__init__((*y.shape, y.shape[-1]), y.dtype, y.device, symmetric=symmetric)
        self.y = y.detach().requires_grad_()
        self.theta = [t.detach().requires_grad_(flag) for t, flag in zip(theta, live, strict=True)]
        with torch.enable_grad():
            self.residual_vector = (written_out or WrittenOut()).evaluate(function, self.y, *self.theta)
        self._dual: tuple[Tensor, Tensor] | None = None
        self._blocks = Blocks(max(1, _BLOCK // max(1, y.numel())), unbatchable([self.residual_vector]))

    def _rmatvec(self, v: Tensor) -> Tensor:
        return self._products(self.residual_vector, v)

    def _matvec(self, v: Tensor) -> Tensor:
        if self.symmetric:
            return self._rmatvec(v)
        if self._dual is None:  # u -> A'u is linear, so its own vector-Jacobian product is A
            with torch.enable_grad():
                u = torch.zeros_like(self.residual_vector, requires_grad=True)
                (image,) = _grad(self.residual_vector, [self.y], u, create_graph=True)
            self._dual = (image, u)
        image, u = self._dual
        return self._products(image, v, wrt=u)

    def to_dense(self) -> Tensor:
        """The matrices, of shape (*systems, n, n), by n backward passes in blocks."""
        systems, n = self.batch_shape, self.shape[-1]
        eye = torch.eye(n, dtype=self.dtype, device=self.device).reshape(n, *(1,) * len(systems), n)
        return self._rmatvec(eye.expand(n, *systems, n)).movedim(0, -2)

    def pull(self, u: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        """(dR / d theta)' u for the wanted positions of theta, along the kept graph."""
        return _grad(self.residual_vector, [self.theta[i] for i in wanted], u)

    def _products(self, output: Tensor, v: Tensor, wrt: Tensor | None = None) -> Tensor:
        """(d output / d wrt)' v for v of shape (*sides, *systems, n)."""
        into = self.y if wrt is None else wrt
        if v.numel() == 0:
            return torch.zeros_like(v)

        def product(row: Tensor) -> Tensor:
            return _grad(output, [into], row.reshape(into.shape))[0].reshape(-1)

        def block(rows: Tensor, batched: bool) -> Tensor:
            return torch.func.vmap(product)(rows) if batched else product(rows)

        sides = v.shape[: v.ndim - into.ndim]
        return self._blocks.apply(block, v.reshape(*sides, into.numel()), into.numel()).reshape(v.shape)


def _grad(output: Tensor, inputs: Sequence[Tensor], v: Tensor, *, create_graph: bool = False) -> list[Tensor]:
    found: Sequence[Tensor | None] = [None] * len(inputs)
    if output.requires_grad and inputs:
        found = torch.autograd.grad(output, inputs, v, retain_graph=True, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]
