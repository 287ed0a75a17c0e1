"""Diagonals of operators by random products, each entry with its measured error."""

from __future__ import annotations

import torch

from .operator import LinearOperator
from .orthogonal import combine_all
from .probes import Estimate, LeaveOneOut, columns, mean_and_error, require, signs

__all__ = ["hutchinson_diagonal", "xdiag"]


def hutchinson_diagonal(A: LinearOperator, products: int = 60, *, generator: torch.Generator | None = None) -> Estimate:
    """The diagonal of a square A of shape (*batch, n, n), as the mean of w * (A w) over random signs w.

    Unbiased; entry i has variance sum_(j != i) A_ij^2 / products: exact for diagonal matrices, good for dominant
    diagonals. It need not be positive where the diagonal is.

    Cost: `products` products, in one block; memory for as many vectors, twice.

    Args:
        A: square operator; neither symmetry nor a product with its transpose is needed.
        products: a system, at least 2. From n on, the n unit vectors are used and the diagonal is exact.
        generator: of the signs; None for a new one with seed 0.

    Returns:
        The Estimate, value and standard_error of shape (*batch, n).

    Raises:
        TypeError: if A is not an operator.
        ValueError: if A is not square, or products < 2.

    Reference:
        Bekas, Kokiopoulou & Saad 2007, An estimator for the diagonal of a matrix; for signs their quotient has the
        denominator 1.

    Example:
        >>> from nestopt.linalg import Diagonal
        >>> hutchinson_diagonal(Diagonal(torch.arange(4.0)), products=2).value
        tensor([0., 1., 2., 3.])
    """
    require("hutchinson_diagonal", A, products, 2)
    if products >= A.shape[-1]:
        return _exact(A)
    with torch.no_grad():
        w = signs(A, products, generator)
        value, error = mean_and_error(w * A._matvec(w))
        return Estimate(value, error, products * A.batch_shape.numel())


def xdiag(A: LinearOperator, products: int = 60, *, generator: torch.Generator | None = None) -> Estimate:
    """The diagonal of a square A of shape (*batch, n, n), each random vector testing the range of all others.

    For k = products // 2 sign vectors w_i, d_i = diag(Q_i Q_i'A) + w_i * ((I - Q_i Q_i') A w_i) with Q_i a basis of
    the images A w_j of the others; the estimate is their mean. Unbiased for every square A; exact when A has rank < k;
    for fast decaying singular values far better than `hutchinson_diagonal`, for flat ones no better than that with k
    vectors: a matrix that is nearly diagonal is Hutchinson's case.

    Cost: k products with A and k with A', and 8 k^2 n operations; memory for 6 k vectors.

    Args:
        A: square operator, symmetric or with a product with its transpose.
        products: a system, at least 4; an odd one is not used. From n on, the n unit vectors give the exact diagonal.
        generator: of the signs; None for a new one with seed 0.

    Returns:
        The Estimate, value and standard_error of shape (*batch, n); the error is the deviation of the d_i over the
        root of k, which is a guide and no bound, because the d_i depend on each other.

    Raises:
        TypeError: if A is not an operator, or is neither symmetric nor has a product with its transpose.
        ValueError: if A is not square, or products < 4.

    Reference:
        Epperly, Tropp & Webber 2024, XTrace: making the most of every sample in stochastic trace estimation.

    Example:
        >>> from nestopt.linalg import Dense
        >>> u = torch.arange(50, dtype=torch.float64) / 10
        >>> diagonal = xdiag(Dense(torch.outer(u, u), symmetric=True), products=4)
        >>> torch.allclose(diagonal.value, u**2), diagonal.products
        (True, 4)
    """
    require("xdiag", A, products, 4)
    if products >= A.shape[-1]:
        return _exact(A)
    with torch.no_grad():
        sketch = LeaveOneOut.of(A, signs(A, products // 2, generator))
        Q, u = sketch.Q, sketch.alone
        Z = A.T._matvec(Q)
        inside = (Q * Z).sum(0) - u * combine_all(sketch.S, Z)
        value, error = mean_and_error(inside + sketch.vectors * u * sketch.heights[..., None])
        return Estimate(value, error, 2 * (products // 2) * A.batch_shape.numel())


def _exact(A: LinearOperator) -> Estimate:
    value = columns(A).diagonal(dim1=0, dim2=-1).clone()
    return Estimate(value, torch.zeros_like(value), A.shape[-1] * A.batch_shape.numel())
