"""Gram-Schmidt against a block of orthonormal vectors, twice, which is enough."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .operator import LinearOperator

__all__ = ["combine", "orthogonalise"]


def combine(weights: Float[Tensor, "k *columns"], V: Float[Tensor, "k *columns n"]) -> Float[Tensor, "*columns n"]:
    """The sum over j of weights_j V_j, per column."""
    return torch.einsum("k...,k...n->...n", weights, V)


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
