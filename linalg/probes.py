"""Random vectors, what is measured with them, and the sketch that leaves each of them out in turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .operator import LinearOperator
from .orthogonal import combine_all, orthonormal_rows
from .result import scalar_or_tensor

__all__ = [
    "Estimate",
    "LeaveOneOut",
    "columns",
    "estimate",
    "gaussians",
    "mean_and_error",
    "refuse_pieces",
    "require",
    "signs",
]


@dataclass(frozen=True)
class Estimate:
    """What random probes say of an operator, and how much they disagree.

    Attributes:
        value: the estimate: a number, a tensor over the operator's batch of systems, or for diagonals (*batch, n).
        standard_error: measured from the probes' disagreement, of value's shape; 0 where nothing was drawn.
        products: products with A and with A', all systems together.
    """

    value: Any
    standard_error: Any
    products: int


def estimate(A: LinearOperator, value: Tensor, error: Tensor, products: int) -> Estimate:
    """The Estimate, numbers for one system; `products` is counted per system."""
    n = scalar_or_tensor
    return Estimate(n(value), n(error), products * A.batch_shape.numel())


def require(owner: str, A: LinearOperator, products: int, least: int, *, square: bool = True) -> None:
    """Refuse what no estimator can use."""
    if not isinstance(A, LinearOperator):
        raise TypeError(f"{owner}: A must be a LinearOperator, but got {type(A).__name__}; use linalg.Dense(matrix).")
    refuse_pieces(owner, A)
    if square and A.shape[-1] != A.shape[-2]:
        raise ValueError(f"{owner}: A must be square, but it has shape {tuple(A.shape)}; frobenius_norm takes any.")
    if not isinstance(products, int) or products < least:
        raise ValueError(
            f"{owner}: products must be an integer >= {least}, because an error is measured from two probes or more, "
            f"but got {products!r}; use e.g. products={max(least, 60)}."
        )


def refuse_pieces(owner: str, A: LinearOperator) -> None:
    """Refuse an operator with its own inner product: what it calls n need not be the dimension."""
    if A._space() is not None:
        raise ValueError(
            f"{owner}: {A!r} brings its own inner product, as operators over sharded vectors do, and this estimate "
            "needs whole vectors with the Euclidean one; use e.g. DataParallel in place of Sharded."
        )


def columns(A: LinearOperator) -> Float[Tensor, "n *batch m"]:
    """A e_j for each j, by n products a system: what every estimator falls to when it may use as many."""
    n = A.shape[-1]
    eye = torch.eye(n, dtype=A.dtype, device=A.device).reshape(n, *(1,) * len(A.batch_shape), n)
    with torch.no_grad():
        return A._matvec(eye.expand(n, *A.batch_shape, n))


def signs(A: LinearOperator, count: int, generator: torch.Generator | None) -> Float[Tensor, "count *batch n"]:
    """Independent entries of -1 and 1: of all isotropic vectors, those of least variance for x'Ax."""
    generator = _generator(A, generator)
    shape = (count, *A.batch_shape, A.shape[-1])
    bits = torch.randint(0, 2, shape, generator=generator, device=generator.device)
    return (2 * bits - 1).to(A.device, A.dtype)


def gaussians(A: LinearOperator, count: int, generator: torch.Generator | None) -> Float[Tensor, "count *batch n"]:
    """Independent normal entries: directions that are uniform in every subspace."""
    generator = _generator(A, generator)
    shape = (count, *A.batch_shape, A.shape[-1])
    return torch.randn(shape, dtype=A.dtype, device=generator.device, generator=generator).to(A.device)


def _generator(A: LinearOperator, generator: torch.Generator | None) -> torch.Generator:
    return torch.Generator(A.device).manual_seed(0) if generator is None else generator


def mean_and_error(samples: Float[Tensor, "count *shape"]) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """The mean of the samples, and the standard error of that mean."""
    return samples.mean(0), samples.std(0) / samples.shape[0] ** 0.5


@dataclass(frozen=True)
class LeaveOneOut:
    """The range of A on k random vectors, and what each of them alone adds to it.

    With Y = A W = Q R, the projection on the images of all vectors but the i-th is Q (I - s_i s_i') Q', where the unit
    vector s_i is orthogonal to the other columns of R: the normalised i-th column of inv(R)'.

    Attributes:
        vectors: W, of shape (k, *batch, n).
        images: Y.
        Q: orthonormal rows, those of a dependent image zero.
        R: (k, k, *batch), upper triangular.
        S: (k, k, *batch), s_i as its i-th column.

    Reference:
        Epperly, Tropp & Webber 2024, XTrace: making the most of every sample in stochastic trace estimation.
    """

    vectors: Tensor
    images: Tensor
    Q: Tensor
    R: Tensor
    S: Tensor

    @classmethod
    def of(cls, A: LinearOperator, vectors: Float[Tensor, "k *batch n"]) -> LeaveOneOut:
        """The sketch with these vectors, by k products a system."""
        images = A._matvec(vectors)
        Q, R = orthonormal_rows(A, images)
        upper = R.movedim((0, 1), (-2, -1))
        diagonal = upper.diagonal(dim1=-2, dim2=-1)
        # A dependent image leaves a zero on the diagonal. A stand-in of sqrt(eps) |R| perturbs the projections by eps,
        # and not at all where the other images span the range, as they do when A has a rank below k.
        scale = upper.abs().amax((-2, -1), keepdim=True)[..., 0]
        stand_in = torch.finfo(R.dtype).eps ** 0.5 * torch.where(scale == 0, 1, scale)
        upper = upper + torch.diag_embed(torch.where(diagonal == 0, stand_in, 0))
        eye = torch.eye(R.shape[0], dtype=R.dtype, device=R.device).expand_as(upper)
        S = torch.linalg.solve_triangular(upper.mT, eye, upper=False)
        S = S / torch.linalg.vector_norm(S, dim=-2, keepdim=True)
        return cls(vectors, images, Q, R, S.movedim((-2, -1), (0, 1)))

    @property
    def alone(self) -> Tensor:
        """Q s_i: what the i-th image adds to the others' span, of shape (k, *batch, n)."""
        return combine_all(self.S, self.Q)

    @property
    def heights(self) -> Tensor:
        """s_i'r_i, so that the i-th image's part outside the others' span is `heights[i] * alone[i]`; (k, *batch)."""
        return (self.S * self.R).sum(0)
