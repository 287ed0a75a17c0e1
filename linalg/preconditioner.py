"""Preconditioners: what all of them share, spectral ones, and deflation by Lanczos."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from .operator import Derived, LinearOperator
from .orthogonal import combine_all
from .tridiagonal import LanczosState, eigenpairs, random_start, tridiagonalise

__all__ = ["Deflation", "Preconditioner", "Spectral"]

Self = TypeVar("Self", bound="Preconditioner")


class Preconditioner(Derived):
    """A symmetric positive definite operator close to the INVERSE of A + shift I.

    It is an operator like any other, and is handed to a solver as `preconditioner=`. It keeps no reference to A: it may
    serve, stale, for any later operator of the same shape. A subclass keeps what does not depend on the shift, so that
    `with_shift` costs no product.

    Args:
        A: what is preconditioned; its shape, dtype, device and inner product are taken over.
        shift: of shape () or of the batch of systems, finite and not negative.
        positive: whether a shift of zero is refused too.

    Attributes:
        sigma: the shift, as a tensor.
        products: products with A spent in building, all systems together; 0 for a copy with another shift.

    Raises:
        TypeError: if A is not a LinearOperator.
        ValueError: if A is not square or has no dimension, or the shift does not fit.
    """

    def __init__(self, A: LinearOperator, shift: float | Tensor, *, positive: bool = False) -> None:
        name = type(self).__name__
        if not isinstance(A, LinearOperator):
            raise TypeError(
                f"{name}: A must be a LinearOperator, but got {type(A).__name__}; use linalg.Dense(matrix)."
            )
        if A.shape[-1] != A.shape[-2] or 0 in A.shape:
            raise ValueError(f"{name}: A must be square and not empty, but it has shape {tuple(A.shape)}.")
        if not A.symmetric:
            raise TypeError(f"{name}: A must be promised symmetric, but {A!r} is not; build it with symmetric=True.")
        super().__init__(tuple(A.shape), A.dtype, A.device, symmetric=True, definite=True)
        space = A._space()
        self.parts = () if space is None else (space,)
        self.products = 0
        self._positive = positive
        self.sigma = self._checked(shift)

    def with_shift(self: Self, shift: float | Tensor) -> Self:
        """The preconditioner of A + shift I for another shift, at the cost of no product.

        Args:
            shift: a number, or a tensor of the batch shape.

        Returns:
            A new preconditioner that shares what this one has built.

        Raises:
            ValueError: if the shift does not fit, or leaves nothing definite.
        """
        other = copy.copy(self)
        other.products, other.sigma = 0, self._checked(shift)
        other._prepare()
        return other

    @abstractmethod
    def _prepare(self) -> None:
        """Look at the shift: refuse it where A + shift I would not be definite."""

    def _checked(self, shift: float | Tensor) -> Tensor:
        name, rule = type(self).__name__, "> 0" if self._positive else ">= 0"
        value = torch.as_tensor(shift, dtype=self.dtype, device=self.device).detach()
        if value.shape not in (torch.Size(()), self.batch_shape):
            raise ValueError(
                f"{name}: shift must be a number or of the batch shape {tuple(self.batch_shape)}, but got "
                f"{tuple(value.shape)}."
            )
        good = ((value > 0) if self._positive else (value >= 0)) & (value < torch.inf)
        if not bool(good.all()):
            raise ValueError(f"{name}: shift must be finite and {rule}, but got {value.tolist()}; use e.g. shift=1e-3.")
        return value

    def _curved(self, lowest: Tensor, what: str) -> None:
        """Refuse what would not be positive definite."""
        if not bool((lowest > 0).all()):
            raise ValueError(
                f"{type(self).__name__}: {what} is {float(lowest.min()):.2e}, so the preconditioner would not be "
                "positive definite; add a larger shift (and solve A.shift(shift)), or use MINRES without it."
            )


class Spectral(Preconditioner):
    """P v = U (L + shift)^-1 U'v + (v - U U'v) / (tail + shift): exact on some eigenvectors, a constant on the rest.

    Args:
        A: what is preconditioned.
        shift: see Preconditioner.
        positive: see Preconditioner.
        vectors: orthonormal rows U' (k, *batch, n).
        values: L, the curvatures along them, (k, *batch).
        tail: the curvature that stands for all other directions, (*batch).
    """

    def __init__(
        self,
        A: LinearOperator,
        shift: float | Tensor,
        vectors: Float[Tensor, "k *batch n"],
        values: Float[Tensor, "k *batch"],
        tail: Float[Tensor, "*batch"],
        *,
        positive: bool = False,
    ) -> None:
        super().__init__(A, shift, positive=positive)
        self._hold(vectors, values, tail)

    def _hold(self, vectors: Tensor, values: Tensor, tail: Tensor) -> None:
        """Take the pairs over, for a subclass that finds them itself."""
        self.vectors, self.values, self.tail = vectors, values, tail
        self._prepare()

    @property
    def rank(self) -> int:
        """How many eigenvectors it holds."""
        return self.values.shape[0]

    def _prepare(self) -> None:
        lowest = torch.minimum(self.values.amin(0), self.tail) + self.sigma
        self._curved(lowest, "the smallest curvature plus shift")

    def _matvec(self, v: Tensor) -> Tensor:
        along = self.coefficients(v)
        rest = v - self.combination(along)
        again = self.coefficients(rest)  # what rounding left along U would be divided by the tail, which may be tiny
        rest = rest - self.combination(again)
        along = along + again
        weighted = along / self._aligned(self.values + self.sigma, along)
        return self.combination(weighted) + rest / (self.tail + self.sigma)[..., None]

    def coefficients(self, v: Float[Tensor, "*columns n"]) -> Float[Tensor, "k *columns"]:
        """U'v, in A's inner product.

        Args:
            v: shape (*sides, *batch, n).

        Returns:
            Shape (k, *sides, *batch).
        """
        sides = (1,) * (v.ndim - 1 - len(self.batch_shape))
        return self.vecdots(self.vectors.reshape(self.rank, *sides, *self.vectors.shape[1:]), v)

    def combination(self, weights: Float[Tensor, "k *columns"]) -> Float[Tensor, "*columns n"]:
        """U weights.

        Args:
            weights: shape (k, *sides, *batch).

        Returns:
            Shape (*sides, *batch, n).
        """
        sides = (1,) * (weights.ndim - 1 - len(self.batch_shape))
        U = self.vectors.reshape(self.rank, *sides, *self.vectors.shape[1:])
        return torch.einsum("k...,k...n->...n", weights, U)

    def _aligned(self, weights: Tensor, along: Tensor) -> Tensor:
        """Numbers per eigenvector and system, with a place for the right-hand sides."""
        return weights.reshape(self.rank, *(1,) * (along.ndim - weights.ndim), *self.batch_shape)


class Deflation(Spectral):
    """Deflate the largest eigenvalues of a symmetric A of shape (*batch, n, n) found by Lanczos.

    With the Ritz pairs (theta_i, u_i), i <= rank, of the largest values, P = sum_i u_i u_i' / (theta_i + shift) +
    (I - U U') / (theta_{rank+1} + shift): the top of the spectrum is scaled down to the next value, so that CG sees a
    condition number of theta_{rank+1} / lambda_min. Ritz vectors are orthonormal before they have converged, so P is
    positive definite in any case; `residuals` says how far they are. Useful where a few eigenvalues stand out.

    Cost: `products`, at most `steps` a system, to build; 10 n rank operations to apply.

    Args:
        A: operator promised symmetric.
        rank: number of eigenvectors, below n; as many as stand out.
        shift: P is for A + shift I.
        steps: limit of Lanczos steps, at least rank + 1; None for 2 rank + 10.
        rtol: Lanczos stops early when |A u_i - theta_i u_i| <= rtol theta_i for all i.
        generator: of the random start; None for a new one with seed 0.

    Attributes:
        values: theta, descending, (rank, *batch).
        vectors: u, (rank, *batch, n).
        tail: theta_{rank+1}.
        residuals: |A u_i - theta_i u_i|, (rank, *batch).
        products: spent in building.

    Raises:
        TypeError: if A is not promised symmetric.
        ValueError: if rank or steps is out of range, A is not finite, or theta_{rank+1} + shift is not positive.

    Reference:
        Frank & Vuik 2001, On the construction of deflation-based preconditioners; Erhel & Guyomarc'h 2000.

    Example:
        >>> from nestopt.linalg import CG, Diagonal
        >>> A = Diagonal(torch.tensor([1.0, 1.0, 1.0, 50.0, 90.0], dtype=torch.float64))
        >>> M = Deflation(A, rank=2)
        >>> CG(preconditioner=M)(A, torch.ones(5, dtype=torch.float64)).iterations, M.products
        (1, 3)
    """

    def __init__(
        self,
        A: LinearOperator,
        rank: int,
        *,
        shift: float | Tensor = 0.0,
        steps: int | None = None,
        rtol: float = 1e-2,
        generator: torch.Generator | None = None,
    ) -> None:
        Preconditioner.__init__(self, A, shift)
        n = A.shape[-1]
        steps = min(2 * rank + 10, n) if steps is None else steps
        if not 1 <= rank < n:
            raise ValueError(f"Deflation: rank must be at least 1 and below n = {n}, but got {rank}.")
        if not steps > rank or not rtol > 0:
            raise ValueError(f"Deflation: steps must exceed rank = {rank} and rtol be > 0, but got {steps} and {rtol}.")

        def gap(s: LanczosState) -> Tensor:
            values, _, residuals = _ritz(s)
            top, distance = values[..., -rank:].abs(), residuals[..., -rank:]
            floor = 10 * torch.finfo(A.dtype).eps * values.abs().amax(-1, keepdim=True)
            error = (distance / torch.maximum(rtol * top, floor).clamp_min(1e-300)).amax(-1)
            return error if s.k > rank else torch.full_like(error, torch.finfo(error.dtype).max)

        state = tridiagonalise(A, random_start(A, 1, generator)[0], steps, gap)
        theta, weights, residuals = _ritz(state)
        if not bool(torch.isfinite(theta).all()):
            raise ValueError("Deflation: a product with A is not finite; look for NaN or inf in A.")
        found = min(rank, state.k)  # fewer where the Krylov space was exhausted: there are no further values
        top = weights[..., -found:].flip(-1).movedim((-2, -1), (0, 1)).to(A.dtype)
        vectors = combine_all(top, state.basis[: state.k])
        values, self.residuals = (
            part[..., -found:].flip(-1).movedim(-1, 0).to(A.dtype).contiguous() for part in (theta, residuals)
        )
        tail = theta[..., -found - 1 if state.k > found else 0].to(A.dtype)
        self._hold(vectors, values, tail)
        self.products = state.k * A.batch_shape.numel()


def _ritz(s: LanczosState) -> tuple[Tensor, Tensor, Tensor]:
    """Ritz values, ascending, vectors in the basis, and residuals."""
    alpha, beta = s.matrix
    values, weights = eigenpairs(alpha, beta)
    return values, weights, beta[..., -1:] * weights[..., -1, :].abs()
