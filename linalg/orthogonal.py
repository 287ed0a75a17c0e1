"""Gram-Schmidt against a block of orthonormal vectors, twice, which is enough."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .operator import LinearOperator

__all__ = ["combine", "combine_all", "normalise", "orthogonalise", "orthonormal_rows"]


def combine(weights: Float[Tensor, "k *columns"], V: Float[Tensor, "k *columns n"]) -> Float[Tensor, "*columns n"]:
    """The sum over j of weights_j V_j, per column."""
    return torch.einsum("k...,k...n->...n", weights, V)


def combine_all(
    weights: Float[Tensor, "k j *columns"], V: Float[Tensor, "k *columns n"]
) -> Float[Tensor, "j *columns n"]:
    """The j combinations of the rows of V at once, as one matrix product a column."""
    return torch.einsum("kj...,k...n->j...n", weights, V)


def orthogonalise(
    A: LinearOperator, V: Float[Tensor, "k *columns n"], w: Float[Tensor, "*columns n"]
) -> tuple[Float[Tensor, "*columns n"], Float[Tensor, "k *columns"]]:
    """Split w into its part orthogonal to the rows of V and its coefficients along them, in A's inner product.

    Classical Gram-Schmidt, repeated once: the result is orthogonal to the rounding level, as with Householder's
    reflections, in two passes over V instead of one inner product after the other.

    Args:
        A: whose inner product is meant.
        V: orthonormal rows, or rows of zeros.
        w: what is split.

    Returns:
        The orthogonal part, and the coefficients.

    Reference:
        Giraud, Langou & Rozloznik 2005.
    """
    h = A.vecdots(V, w)
    w = w - combine(h, V)
    again = A.vecdots(V, w)
    return w - combine(again, V), h + again


def normalise(
    A: LinearOperator, w: Float[Tensor, "*columns n"], scale: Float[Tensor, "*columns"]
) -> tuple[Float[Tensor, "*columns n"], Float[Tensor, "*columns"]]:
    """W as a unit vector with its norm; both zero where w is nothing but the rounding of a vector of size `scale`.

    Args:
        A: whose norm is meant.
        w: what an orthogonalisation has left.
        scale: the norm before it.

    Returns:
        The unit vector, or zero, or NaN where w is not finite; and the norm.
    """
    size = A.norm(w)
    size = torch.where(size <= 10 * torch.finfo(w.dtype).eps * scale, 0, size)
    unit = w / size[..., None]
    return torch.where((size > 0)[..., None], unit, torch.where(size == 0, 0, torch.nan)[..., None]), size


def orthonormal_rows(
    A: LinearOperator, Y: Float[Tensor, "k *columns n"]
) -> tuple[Float[Tensor, "k *columns n"], Float[Tensor, "k k *columns"]]:
    """The QR factorisation Y_j = sum_i R_ij Q_i, in A's inner product; a dependent row of Y leaves a row of zeros.

    Cost: 4 k^2 n operations a column, in matrix-vector products.

    Args:
        A: whose inner product is meant.
        Y: the rows; for any dependence between them, Q Q' projects on their span.

    Returns:
        Q and the upper triangular R.
    """
    Q, R = torch.zeros_like(Y), Y.new_zeros(Y.shape[0], *Y.shape[:-1])
    for j, y in enumerate(Y):
        w, R[:j, j] = orthogonalise(A, Q[:j], y)
        Q[j], R[j, j] = normalise(A, w, A.norm(y))
    return Q, R
