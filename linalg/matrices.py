"""Operators made from a matrix, its diagonal, or a function that multiplies."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from .operator import LinearOperator

__all__ = ["Dense", "Diagonal", "FunctionOperator", "Identity", "dense_product"]


class Dense(LinearOperator):
    """An operator from its matrix.

    Args:
        matrix: shape (*batch, m, n), floating.
        symmetric: promise that the matrix equals its transpose; checked here, because looking is cheap.
        definite: True, False, or None when nobody promises.

    Raises:
        TypeError: if matrix is not a floating tensor.
        ValueError: if it has fewer than two dimensions, or a promise of symmetry is false.

    Example:
        >>> A = Dense(torch.tensor([[2.0, 1.0], [1.0, 3.0]]), symmetric=True)
        >>> A @ torch.tensor([1.0, 0.0])
        tensor([2., 1.])
        >>> (2 * A.shift(1.0)).to_dense()
        tensor([[6., 2.],
                [2., 8.]])
    """

    def __init__(self, matrix: Tensor, symmetric: bool = False, definite: bool | None = None) -> None:
        if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
            kind = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
            raise TypeError(f"Dense: matrix must be a floating torch.Tensor, but got {kind}; use matrix.double().")
        super().__init__(tuple(matrix.shape), matrix.dtype, matrix.device, symmetric=symmetric, definite=definite)
        self.matrix = matrix
        if symmetric:
            gap = (matrix - matrix.mT).abs().amax() if matrix.numel() else torch.zeros(())
            size = matrix.abs().amax() if matrix.numel() else torch.zeros(())
            if bool(gap > 100 * torch.finfo(matrix.dtype).eps * size):  # NaN compares false: solvers name it
                raise ValueError(
                    f"Dense: symmetric=True was promised, but matrix and its transpose differ by {float(gap):.1e}; "
                    "pass (matrix + matrix.mT) / 2 or drop the promise."
                )

    def _matvec(self, v: Tensor) -> Tensor:
        return dense_product(self.matrix, v)

    def _rmatvec(self, v: Tensor) -> Tensor:
        return dense_product(self.matrix.mT, v)

    def residual(self, x: Tensor, b: Tensor) -> Tensor:
        """B - A x, in float64 whatever the dtype, so that a float32 solve is judged by its true residual."""
        if self.dtype == torch.float64:
            return b - self._matvec(x)
        exact = b.double() - dense_product(self.matrix.double(), x.double())
        return exact.to(self.dtype)

    def certified_residual(self, x: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The residual and its norm, which a float64 product leaves no doubt about."""
        r = self.residual(x, b)
        return r, self.norm(r)

    @property
    def certification_products(self) -> int:
        """One."""
        return 1

    def to_dense(self) -> Tensor:
        """The matrix itself."""
        return self.matrix


def dense_product(matrix: Tensor, v: Tensor) -> Tensor:
    """A v for a matrix (*batch, m, n) and v of shape (*sides, *batch, n), one product a system."""
    if matrix.ndim == 2:
        return v @ matrix.mT
    sides = v.ndim - matrix.ndim + 1  # many right-hand sides become the columns of one product a system
    if sides == 0:
        return (matrix @ v[..., None])[..., 0]
    flat = v.flatten(0, sides - 1)
    out = (matrix @ flat.movedim(0, -1)).movedim(-1, 0)
    return out.reshape(*v.shape[:sides], *out.shape[1:])


class Diagonal(LinearOperator):
    """diag(d): the cheapest operator and, with d = 1 / diag(A), the Jacobi preconditioner.

    Args:
        diagonal: shape (*batch, n).

    Example:
        >>> Diagonal(torch.tensor([1.0, 2.0])) @ torch.ones(2)
        tensor([1., 2.])
    """

    def __init__(self, diagonal: Float[Tensor, "*batch n"]) -> None:
        shape = (*diagonal.shape, diagonal.shape[-1])
        definite = bool((diagonal > 0).all()) if diagonal.numel() else True
        super().__init__(shape, diagonal.dtype, diagonal.device, symmetric=True, definite=definite)
        self.diagonal = diagonal

    def _matvec(self, v: Tensor) -> Tensor:
        return self.diagonal * v


class Identity(LinearOperator):
    """The identity of n dimensions.

    Args:
        n: dimension.
        dtype: of the vectors.
        device: of the vectors.

    Example:
        >>> Identity(2, torch.float32) @ torch.ones(2)
        tensor([1., 1.])
    """

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        super().__init__((n, n), dtype, torch.device(device), symmetric=True, definite=True)

    def _matvec(self, v: Tensor) -> Tensor:
        return v


class FunctionOperator(LinearOperator):
    """An operator from a function that computes A v for v of shape (*sides, *batch, n).

    Args:
        matvec: v -> A v, linear, of the shapes above.
        shape: (*batch, m, n).
        dtype: of the vectors.
        device: of the vectors.
        rmatvec: v -> A' v; not needed when symmetric.
        symmetric: promise that A equals its transpose.
        definite: True, False, or None when nobody promises.

    Example:
        >>> A = FunctionOperator(lambda v: 3 * v, (2, 2), torch.float32, symmetric=True, definite=True)
        >>> A @ torch.ones(2)
        tensor([3., 3.])
    """

    def __init__(
        self,
        matvec: Callable[[Tensor], Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        rmatvec: Callable[[Tensor], Tensor] | None = None,
        symmetric: bool = False,
        definite: bool | None = None,
    ) -> None:
        super().__init__(shape, dtype, torch.device(device), symmetric=symmetric, definite=definite)
        self._forward = matvec
        self._backward = matvec if symmetric else rmatvec

    def _matvec(self, v: Tensor) -> Tensor:
        return self._forward(v)

    def _rmatvec(self, v: Tensor) -> Tensor:
        return super()._rmatvec(v) if self._backward is None else self._backward(v)
