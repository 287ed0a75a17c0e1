"""Linear operators: products with a matrix that need not be stored, their algebra and their promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["LinearOperator", "power_of_two"]


def power_of_two(v: Float[Tensor, "*columns n"]) -> Float[Tensor, "*columns"]:
    """A power of two within a factor of two of each column's largest entry, 1 for a zero or non-finite column.

    Dividing by it is exact, and puts the squares of any vector in the dtype's range.

    Args:
        v: shape (..., n).

    Returns:
        The powers, of shape (...).
    """
    if v.shape[-1] == 0:
        return v.new_ones(v.shape[:-1])
    size = v.abs().amax(-1)
    mantissa = torch.frexp(size).mantissa
    return torch.where((size > 0) & (size < torch.inf), size / (2 * mantissa), 1)


class LinearOperator(ABC):
    """A matrix A of shape (*batch, m, n), known by its products.

    A vector's LAST dimension is the space; what stands before it is many right-hand sides first, then the operator's
    batch of systems: for v of shape (*sides, *batch, n), `A @ v` has shape (*sides, *batch, m). A subclass writes
    `_matvec` (and `_rmatvec` unless it is symmetric); the checks are here.

    Args:
        shape: (*batch, m, n).
        dtype: of the matrix and of every vector that it takes.
        device: likewise.
        symmetric: a promise that A equals its transpose.
        definite: True when A is promised positive definite, False when it is known not to be, None when nobody
            promises.

    Raises:
        ValueError: if symmetric or definite is promised of a rectangular matrix.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        *,
        symmetric: bool = False,
        definite: bool | None = None,
    ) -> None:
        if len(shape) < 2:
            raise ValueError(f"{type(self).__name__}: shape must be (*batch, m, n), but got {tuple(shape)}.")
        if (symmetric or definite) and shape[-1] != shape[-2]:
            raise ValueError(
                f"{type(self).__name__}: a matrix of shape {tuple(shape)} cannot be promised symmetric or definite."
            )
        if definite and not symmetric:
            raise ValueError(f"{type(self).__name__}: definite=True needs symmetric=True as well.")
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.device = torch.device(device)
        self.symmetric = symmetric
        self.definite = definite

    __array_ufunc__ = None  # so that a NumPy number times A asks A

    @abstractmethod
    def _matvec(self, v: Tensor) -> Tensor:
        """A v for a checked v of shape (*sides, *batch, n)."""

    def _rmatvec(self, v: Tensor) -> Tensor:
        """A' v for a checked v of shape (*sides, *batch, m)."""
        raise TypeError(
            f"{type(self).__name__} has no product with its transpose; write _rmatvec, or use a solver that needs "
            "none (CG or MINRES on a symmetric operator, GMRES)."
        )

    @property
    def batch_shape(self) -> torch.Size:
        """The shape of the batch of systems, () for one."""
        return self.shape[:-2]

    @property
    def T(self) -> LinearOperator:
        """The transpose; the operator itself when it is symmetric."""
        return self if self.symmetric else Transposed(self)

    def _space(self) -> LinearOperator | None:
        """The operator whose own inner product is to be used here, None for the Euclidean one."""
        return None if type(self).vecdot is LinearOperator.vecdot else self

    def vecdot(self, u: Tensor, v: Tensor) -> Tensor:
        """The inner product of the space, per column; an operator over sharded vectors reduces here and in `norm`.

        Args:
            u: shape (..., n).
            v: shape (..., n).

        Returns:
            The inner products, of shape (...).
        """
        product: Tensor = torch.linalg.vecdot(u, v)
        return product

    def vecdots(self, V: Tensor, w: Tensor) -> Tensor:
        """The inner products `vecdot` of w with a block of vectors, per column.

        Args:
            V: shape (k, ..., n).
            w: shape (..., n).

        Returns:
            The inner products, of shape (k, ...).
        """
        return torch.einsum("k...n,...n->k...", V, w) if self._space() is None else self.vecdot(V, w)

    def norm(self, v: Tensor) -> Tensor:
        """The norm of `vecdot`, per column, safe against overflow and underflow of the squares.

        Args:
            v: shape (..., n).

        Returns:
            The norms, of shape (...).
        """
        squared = self.vecdot(v, v)
        info = torch.finfo(v.dtype)
        safe = (squared > info.tiny / info.eps**2) & (squared < info.max)
        if not v.is_cuda and bool(safe.all()):  # looking is cheap on the CPU and a synchronisation on a GPU
            return squared.sqrt()
        unit = power_of_two(v)
        u = v / unit[..., None]
        return unit * self.vecdot(u, u).sqrt()

    def _check(self, v: Tensor, size: int, argument: str = "v") -> None:
        if not isinstance(v, Tensor):
            raise TypeError(f"{type(self).__name__}: {argument} must be a torch.Tensor, but got {type(v).__name__}.")
        if v.ndim < 1 or v.shape[-1] != size:
            raise ValueError(
                f"{type(self).__name__} of shape {tuple(self.shape)}: {argument} must have shape (..., {size}), the "
                f"space in the LAST dimension, but got {tuple(v.shape)}."
            )
        batch = self.batch_shape
        if batch and (v.ndim - 1 < len(batch) or v.shape[v.ndim - 1 - len(batch) : -1] != batch):
            raise ValueError(
                f"{type(self).__name__} of shape {tuple(self.shape)}: {argument} must have shape "
                f"(*sides, {', '.join(map(str, batch))}, {size}), one vector a system, but got {tuple(v.shape)}."
            )
        if v.dtype != self.dtype or v.device != self.device:
            raise ValueError(
                f"{type(self).__name__}: {argument} must be {self.dtype} on {self.device}, but it is {v.dtype} on "
                f"{v.device}; convert it with .to({self.dtype}) or move it."
            )

    def __matmul__(self, other: Any) -> Any:
        """A @ v for a tensor v (..., n), or the product of two operators."""
        if isinstance(other, LinearOperator):
            return Composed(self, other)
        self._check(other, self.shape[-1])
        return self._matvec(other)

    def __rmatmul__(self, other: Any) -> Any:
        raise TypeError(
            f"{type(self).__name__}: v @ A is not defined; write A.T @ v, with the space in v's last dimension."
        )

    def active_matvec(self, v: Float[Tensor, "*columns n"], active: Bool[Tensor, "*columns"]) -> Tensor:
        """A v where `active`, zero elsewhere: the columns that a solver has finished cost no product.

        With a batch of systems, or on a GPU where looking costs a synchronisation, all columns are multiplied.

        Args:
            v: shape (*sides, *batch, n).
            active: which columns are wanted, of shape (*sides, *batch).

        Returns:
            The product, of shape (*sides, *batch, m).
        """
        if not active.ndim or (not active.is_cuda and bool(active.all())):
            return self._matvec(v)
        if not self.skips(active):
            return torch.where(active[..., None], self._matvec(v), 0)
        out = v.new_zeros((*v.shape[:-1], self.shape[-2]))
        if bool(active.any()):
            out[active] = self._matvec(v[active])
        return out

    def skips(self, active: Bool[Tensor, "*columns"]) -> bool:
        """Whether columns that are not active cost no product: many right-hand sides of one system, on the CPU."""
        return active.ndim > 0 and not self.batch_shape and not active.is_cuda

    def residual(self, x: Tensor, b: Tensor) -> Tensor:
        """The residual b - A x, from a fresh product; a subclass that can, computes it in a higher precision.

        Args:
            x: shape (*sides, *batch, n).
            b: shape (*sides, *batch, m).

        Returns:
            The residual, of b's shape.
        """
        return b - self._matvec(x)

    def certified_residual(self, x: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The residual, and a bound of the TRUE residual's norm that a claim of convergence may rest on.

        In float64 the bound is the norm of `residual`. Below, the product's own rounding can hide a residual larger
        than the tolerance, so it is measured and added: A (x / 3) times 3 differs from A x by rounding alone, because
        the mantissas of x / 3 are not those of x. This also sees TF32 or autocast inside the operator.

        Args:
            x: shape (*sides, *batch, n).
            b: shape (*sides, *batch, m).

        Returns:
            b - A x, and the bound, of shape (*sides, *batch).
        """
        if self.dtype == torch.float64:
            r = self.residual(x, b)
            return r, self.norm(r)
        image = self._matvec(x)
        r = b - image
        noise = torch.maximum(
            self.norm(3 * self._matvec(x / 3) - image), torch.finfo(self.dtype).eps * self.norm(image)
        )
        return r, self.norm(r) + noise

    @property
    def certification_products(self) -> int:
        """How many products a column `certified_residual` takes."""
        return 1 if self.dtype == torch.float64 else 2

    def __add__(self, other: Any) -> LinearOperator:
        return Sum(self, self._operand(other, "+"))

    __radd__ = __add__

    def __sub__(self, other: Any) -> LinearOperator:
        return Sum(self, -self._operand(other, "-"))

    def _operand(self, other: Any, sign: str) -> LinearOperator:
        if isinstance(other, LinearOperator):
            return other
        raise TypeError(
            f"{type(self).__name__} {sign} takes a LinearOperator, but got {type(other).__name__}; A.shift(sigma) is "
            "for A + sigma I, or wrap a matrix in linalg.Dense."
        )

    def __neg__(self) -> LinearOperator:
        return Scaled(self, -1.0)

    def __mul__(self, factor: Any) -> LinearOperator:
        return Scaled(self, self._scalar(factor, "*"))

    __rmul__ = __mul__

    def __truediv__(self, factor: Any) -> LinearOperator:
        return Scaled(self, 1 / self._scalar(factor, "/"))

    def _scalar(self, value: Any, sign: str) -> float | Tensor:
        if isinstance(value, Tensor) and value.ndim == 0:
            return value
        if isinstance(value, Real):
            return float(value)
        kind = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(
            f"{type(self).__name__} {sign} takes a number or a 0-d tensor, but got {kind}; write A @ v for a product."
        )

    def shift(self, sigma: float | Tensor) -> LinearOperator:
        """A + sigma I.

        Args:
            sigma: a number, or a tensor of the operator's batch shape (one shift a system).

        Returns:
            The shifted operator; it is definite when A is and sigma >= 0.

        Raises:
            ValueError: if A is not square.
        """
        return Shifted(self, sigma)

    def to_dense(self) -> Tensor:
        """The matrix, of shape (*batch, m, n), by n products (in one block)."""
        n = self.shape[-1]
        eye = torch.eye(n, dtype=self.dtype, device=self.device)
        eye = eye.reshape(n, *(1,) * len(self.batch_shape), n).expand(n, *self.batch_shape, n)
        return self._matvec(eye).movedim(0, -1)

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """The same operator for SciPy, on the CPU.

        Returns:
            A `scipy.sparse.linalg.LinearOperator` with matvec, rmatvec and matmat.

        Raises:
            ValueError: if the operator is a batch of systems.
        """
        if self.batch_shape:
            raise ValueError(f"{type(self).__name__}.to_scipy: a batch {tuple(self.batch_shape)} of systems; index it.")

        def product(matvec: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
            def apply(v: Any) -> Any:
                rows = torch.as_tensor(np.ascontiguousarray(v.T), dtype=self.dtype, device=self.device)
                return matvec(rows).detach().cpu().numpy().T

            return apply

        forward, backward = product(self._matvec), product(self.T._matvec)
        return scipy.sparse.linalg.LinearOperator(
            tuple(self.shape),
            matvec=forward,
            matmat=forward,
            rmatvec=backward,
            rmatmat=backward,
            dtype=torch.empty(0, dtype=self.dtype).numpy().dtype,
        )

    def __repr__(self) -> str:
        promises = [name for name in ("symmetric", "definite") if getattr(self, name)]
        return f"{type(self).__name__}{tuple(self.shape)}[{', '.join([str(self.dtype), *promises])}]"


class Derived(LinearOperator):
    """An operator made of others; its inner product is that of the first of them that brings its own."""

    parts: tuple[LinearOperator, ...] = ()

    def _space(self) -> LinearOperator | None:
        found = (part._space() for part in self.parts)
        return next((space for space in found if space is not None), None)

    def vecdot(self, u: Tensor, v: Tensor) -> Tensor:
        """The inner product of the part that brings one."""
        space = self._space()
        return super().vecdot(u, v) if space is None else space.vecdot(u, v)

    def norm(self, v: Tensor) -> Tensor:
        """The norm of the part that brings one."""
        space = self._space()
        return super().norm(v) if space is None else space.norm(v)


class Transposed(Derived):
    """A' of an operator A that is not symmetric."""

    def __init__(self, operator: LinearOperator) -> None:
        shape = (*operator.batch_shape, operator.shape[-1], operator.shape[-2])
        super().__init__(shape, operator.dtype, operator.device)
        self.operator, self.parts = operator, (operator,)
        self.definite = operator.definite

    def _matvec(self, v: Tensor) -> Tensor:
        return self.operator._rmatvec(v)

    def _rmatvec(self, v: Tensor) -> Tensor:
        return self.operator._matvec(v)

    @property
    def T(self) -> LinearOperator:
        """The operator that was transposed."""
        return self.operator

    def to_dense(self) -> Tensor:
        """The transposed matrix."""
        return self.operator.to_dense().mT


def _agree(left: LinearOperator, right: LinearOperator, sign: str) -> None:
    if left.dtype != right.dtype or left.device != right.device:
        raise ValueError(
            f"{left!r} {sign} {right!r}: both must have one dtype and device, but got {left.dtype} on {left.device} "
            f"and {right.dtype} on {right.device}."
        )


def _batch(left: LinearOperator, right: LinearOperator, sign: str) -> torch.Size:
    """The batch of two operators: one is unbatched, or both are the same batch."""
    if left.batch_shape and right.batch_shape and left.batch_shape != right.batch_shape:
        raise ValueError(f"{left!r} {sign} {right!r}: the batches of systems must be equal.")
    return left.batch_shape or right.batch_shape


class Sum(Derived):
    """A + B."""

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        _agree(left, right, "+")
        if left.shape[-2:] != right.shape[-2:]:
            raise ValueError(f"{left!r} + {right!r}: the shapes must be equal.")
        definite = True if left.definite and right.definite else None
        super().__init__(
            (*_batch(left, right, "+"), *left.shape[-2:]),
            left.dtype,
            left.device,
            symmetric=left.symmetric and right.symmetric,
            definite=definite,
        )
        self.left, self.right, self.parts = left, right, (left, right)

    def _matvec(self, v: Tensor) -> Tensor:
        return self.left._matvec(v) + self.right._matvec(v)

    def _rmatvec(self, v: Tensor) -> Tensor:
        return self.left.T._matvec(v) + self.right.T._matvec(v)


class Scaled(Derived):
    """factor * A."""

    def __init__(self, operator: LinearOperator, factor: float | Tensor) -> None:
        definite = operator.definite if bool(factor > 0) else None
        if operator.definite and bool(factor <= 0):
            definite = False
        super().__init__(
            operator.shape, operator.dtype, operator.device, symmetric=operator.symmetric, definite=definite
        )
        self.operator, self.factor, self.parts = operator, factor, (operator,)

    def _matvec(self, v: Tensor) -> Tensor:
        return self.operator._matvec(v) * self.factor

    def _rmatvec(self, v: Tensor) -> Tensor:
        return self.operator.T._matvec(v) * self.factor


class Shifted(Derived):
    """A + sigma I."""

    def __init__(self, operator: LinearOperator, sigma: float | Tensor) -> None:
        if operator.shape[-1] != operator.shape[-2]:
            raise ValueError(f"{operator!r}.shift: only a square operator can be shifted.")
        sigma = torch.as_tensor(sigma, dtype=operator.dtype, device=operator.device)
        if sigma.shape not in (torch.Size(()), operator.batch_shape):
            raise ValueError(
                f"{operator!r}.shift: sigma must be a number or of the batch shape {tuple(operator.batch_shape)}, but "
                f"got {tuple(sigma.shape)}."
            )
        definite = True if operator.definite and bool((sigma >= 0).all()) else None
        super().__init__(
            operator.shape, operator.dtype, operator.device, symmetric=operator.symmetric, definite=definite
        )
        self.operator, self.sigma, self.parts = operator, sigma, (operator,)

    def _matvec(self, v: Tensor) -> Tensor:
        return self.operator._matvec(v) + self.sigma[..., None] * v

    def _rmatvec(self, v: Tensor) -> Tensor:
        return self.operator.T._matvec(v) + self.sigma[..., None] * v


class Composed(Derived):
    """A B, applied right to left."""

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        _agree(left, right, "@")
        if left.shape[-1] != right.shape[-2]:
            raise ValueError(f"{left!r} @ {right!r}: the inner dimensions differ.")
        gram = left is right.T or left.T is right  # A'A and AA' are symmetric by construction
        super().__init__(
            (*_batch(left, right, "@"), left.shape[-2], right.shape[-1]), left.dtype, left.device, symmetric=gram
        )
        self.left, self.right, self.parts = left, right, (left, right)

    def _matvec(self, v: Tensor) -> Tensor:
        return self.left._matvec(self.right._matvec(v))

    def _rmatvec(self, v: Tensor) -> Tensor:
        return self.right.T._matvec(self.left.T._matvec(v))
