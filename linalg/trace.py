"""Traces and Frobenius norms of operators by random products, each with its measured error."""

from __future__ import annotations

import torch

from .operator import LinearOperator, power_of_two
from .orthogonal import combine_all, orthonormal_rows
from .probes import Estimate, LeaveOneOut, columns, estimate, gaussians, mean_and_error, require, signs

__all__ = ["frobenius_norm", "hutchinson_trace", "hutchpp_trace", "xtrace"]


def hutchinson_trace(A: LinearOperator, products: int = 60, *, generator: torch.Generator | None = None) -> Estimate:
    """The trace of a square A of shape (*batch, n, n), as the mean of w'Aw over random signs w.

    Unbiased, with variance 2 (|S|_F^2 - sum_i S_ii^2) / products for the symmetric part S of A: exact for diagonal
    matrices, and of an error that falls like products^(-1/2) for all others. `xtrace` is better wherever A has fast
    decaying eigenvalues, and never much worse.

    Cost: `products` products, in one block; memory for as many vectors, twice.

    Args:
        A: square operator; neither symmetry nor a product with its transpose is needed.
        products: a system, at least 2. From n on, the n unit vectors are used and the trace is exact.
        generator: of the signs; None for a new one with seed 0.

    Returns:
        The Estimate; standard_error is the sample deviation of w'Aw over the root of products.

    Raises:
        TypeError: if A is not an operator.
        ValueError: if A is not square, or products < 2.

    Reference:
        Girard 1989; Hutchinson 1990, A stochastic estimator of the trace of the influence matrix.

    Example:
        >>> from nestopt.linalg import Diagonal
        >>> hutchinson_trace(Diagonal(torch.arange(100.0)), products=2)
        Estimate(value=4950.0, standard_error=0.0, products=2)
    """
    require("hutchinson_trace", A, products, 2)
    if products >= A.shape[-1]:
        return _exact(A)
    with torch.no_grad():
        w = signs(A, products, generator)
        return estimate(A, *mean_and_error(A.vecdot(w, A._matvec(w))), products)


def hutchpp_trace(A: LinearOperator, products: int = 60, *, generator: torch.Generator | None = None) -> Estimate:
    """The trace of a square A of shape (*batch, n, n): exactly on a sketched range, by Hutchinson on the rest.

    With Q an orthonormal basis of A S, S of k = products // 3 random signs, tr(A) = tr(Q'AQ) + tr(P A P) for P = I -
    Q Q'; the second term is estimated with the products that are left. Unbiased for every square A; exact when A has
    rank <= k; for semidefinite A the error falls like 1 / products. `xtrace` uses the same products better; this one
    has independent samples, so its standard error is that of textbooks.

    Cost: `products` products and 8 k^2 n operations; memory for 6 k vectors.

    Args:
        A: square operator; neither symmetry nor a product with its transpose is needed.
        products: a system, at least 4. From n on, the n unit vectors are used and the trace is exact.
        generator: of the signs; None for a new one with seed 0.

    Returns:
        The Estimate; standard_error is that of the second term.

    Raises:
        TypeError: if A is not an operator.
        ValueError: if A is not square, or products < 4.

    Reference:
        Meyer, Musco, Musco & Woodruff 2021, Hutch++: optimal stochastic trace estimation, algorithm 1.

    Example:
        >>> from nestopt.linalg import Dense
        >>> u = torch.arange(50, dtype=torch.float64)
        >>> round(hutchpp_trace(Dense(torch.outer(u, u)), products=6).value, 6)
        40425.0
    """
    require("hutchpp_trace", A, products, 4)
    if products >= A.shape[-1]:
        return _exact(A)
    with torch.no_grad():
        k = products // 3
        w = signs(A, products - k, generator)
        Q, _ = orthonormal_rows(A, A._matvec(w[:k]))
        inside = A.vecdot(Q, A._matvec(Q)).sum(0)
        g = w[k:] - combine_all(torch.einsum("k...n,j...n->kj...", Q, w[k:]), Q)
        outside, error = mean_and_error(A.vecdot(g, A._matvec(g)))
        return estimate(A, inside + outside, error, products)


def xtrace(A: LinearOperator, products: int = 60, *, generator: torch.Generator | None = None) -> Estimate:
    """The trace of a square A of shape (*batch, n, n), each random vector testing the range of all others.

    For k = products // 2 vectors w_i, tr_i = tr(Q_i'AQ_i) + m_i'A m_i with Q_i a basis of the images A w_j of the
    others and m_i = (I - Q_i Q_i') w_i, in the units in which |m_i|^2 is its expectation n - k + 1; the estimate is
    their mean. Unbiased for every square A; exact when A has rank < k; for eigenvalues that decay geometrically the
    error does so too, and for flat ones it is that of Hutchinson with k vectors.

    Cost: 2 k products and 14 k^2 n operations; memory for 6 k vectors.

    Args:
        A: square operator; neither symmetry nor a product with its transpose is needed.
        products: a system, at least 4; an odd one is not used. From n on, the n unit vectors give the exact trace.
        generator: of the normal vectors; None for a new one with seed 0.

    Returns:
        The Estimate; standard_error is the deviation of the tr_i over the root of k, as the paper proposes: the tr_i
        depend on each other, so it is a guide and no bound.

    Raises:
        TypeError: if A is not an operator.
        ValueError: if A is not square, or products < 4.

    Reference:
        Epperly, Tropp & Webber 2024, XTrace: making the most of every sample in stochastic trace estimation;
        with the paper's normalisation of the projected vectors.

    Example:
        >>> from nestopt.linalg import Diagonal
        >>> spectrum = 0.5 ** torch.arange(200, dtype=torch.float64)
        >>> trace = xtrace(Diagonal(spectrum), products=60)
        >>> abs(trace.value - 2) < 1e-6, trace.standard_error < 1e-6
        (True, True)
    """
    require("xtrace", A, products, 4)
    n = A.shape[-1]
    if products >= n:
        return _exact(A)
    with torch.no_grad():
        k = products // 2
        sketch = LeaveOneOut.of(A, gaussians(A, k, generator))
        w, Q, S = sketch.vectors, sketch.Q, sketch.S
        Z = A._matvec(Q)
        u = sketch.alone
        inside = A.vecdot(Q, Z).sum(0) - A.vecdot(u, combine_all(S, Z))  # tr(Q'AQ) - s_i'Q'AQ s_i
        x = torch.einsum("k...n,j...n->kj...", Q, w)
        x = x - S * (S * x).sum(0)
        m = w - combine_all(x, Q)
        image = sketch.images - combine_all(x, Z)
        # the direction of m_i is uniform in its subspace: its length adds nothing but variance
        outside = (n - k + 1) * A.vecdot(m, image) / A.vecdot(m, m)
        return estimate(A, *mean_and_error(inside + outside), 2 * k)


def frobenius_norm(A: LinearOperator, products: int = 60, *, generator: torch.Generator | None = None) -> Estimate:
    """The Frobenius norm of A of shape (*batch, m, n), as the root of the mean of |A w|^2 over random signs w.

    The square is unbiased, with a relative deviation of at most sqrt(2 / products) and of about sqrt(2 / (products r))
    for r equal singular values; the root is biased by less than that squared.

    Cost: `products` products, in one block; memory for as many vectors, twice.

    Args:
        A: any operator; no product with its transpose is needed.
        products: a system, at least 2. From n on, the n unit vectors are used and the norm is exact.
        generator: of the signs; None for a new one with seed 0.

    Returns:
        The Estimate; standard_error is that of the square divided by twice the value.

    Raises:
        TypeError: if A is not an operator.
        ValueError: if products < 2.

    Reference:
        Hutchinson 1990, on A'A.

    Example:
        >>> from nestopt.linalg import Dense
        >>> frobenius_norm(Dense(torch.tensor([[3.0, 0.0], [0.0, 4.0]])))
        Estimate(value=5.0, standard_error=0.0, products=2)
    """
    require("frobenius_norm", A, products, 2, square=False)
    n = A.shape[-1]
    with torch.no_grad():
        images = columns(A) if products >= n else A._matvec(signs(A, products, generator))
        sizes = A.norm(images)
        unit = power_of_two(sizes.movedim(0, -1))  # the squares stay in range
        squares = (sizes / unit) ** 2
        if products >= n:
            value = squares.sum(0).sqrt()
            return estimate(A, unit * value, torch.zeros_like(value), n)
        mean, error = mean_and_error(squares)
        value = mean.sqrt()
        spread = torch.where(error == 0, 0, error / (2 * value))
        return estimate(A, unit * value, unit * spread, products)


def _exact(A: LinearOperator) -> Estimate:
    value = columns(A).diagonal(dim1=0, dim2=-1).sum(-1)
    return estimate(A, value, torch.zeros_like(value), A.shape[-1])
