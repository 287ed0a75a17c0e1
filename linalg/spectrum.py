"""Stochastic Lanczos quadrature: densities of states, log-determinants and traces of functions of operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .operator import LinearOperator
from .probes import Estimate, mean_and_error, refuse_pieces
from .result import scalar_or_tensor
from .tridiagonal import eigenpairs, random_start, tridiagonalise

__all__ = ["FunctionTrace", "SpectralDensity", "log_determinant", "spectral_density", "trace_function"]


@dataclass(frozen=True)
class FunctionTrace(Estimate):
    """An estimate of tr f(A), with both of its errors.

    Attributes:
        quadrature_error: how far the mean moves when a quarter of the steps is left out; 0 where the Krylov spaces were
            exhausted, so that the quadrature is exact. Well above the standard error, it asks for more steps; well
            below, for more probes.
    """

    quadrature_error: Any


@dataclass(frozen=True)
class SpectralDensity:
    """The spectrum of a symmetric A as one Gauss quadrature a probe: tr f(A) / n is the mean of sum_j w_j f(node_j).

    Attributes:
        nodes: Ritz values, float64, of shape (probes, *batch, steps).
        weights: of the same shape, not negative, summing to 1 along the last dimension.
        dimension: n.
        products: products with A, all systems together.
    """

    nodes: Tensor
    weights: Tensor
    dimension: int
    products: int
    _alpha: Tensor = field(repr=False)
    _beta: Tensor = field(repr=False)

    def density(self, grid: Float[Tensor, "points"], width: float) -> Float[Tensor, "*batch points"]:
        """The density of eigenvalues, each smeared to a normal curve; it integrates to 1.

        Args:
            grid: where.
            width: standard deviation of the curve, in the units of the eigenvalues: 1 % of the spectrum's length shows
                a bulk; far below the distance of the nodes the curve falls apart into the nodes.

        Returns:
            The values, float64.

        Raises:
            ValueError: if width is not positive.
        """
        if not width > 0:
            raise ValueError(f"SpectralDensity.density: width must be positive, but got {width}; use e.g. 0.01 * |A|.")
        where = grid.to(self.nodes).reshape(-1, *(1,) * self.nodes.ndim)
        curves = torch.exp(-(((where - self.nodes) / width) ** 2) / 2) / (width * math.sqrt(2 * math.pi))
        return (self.weights * curves).sum(-1).mean(1).movedim(0, -1)

    def count(self, low: float = -math.inf, high: float = math.inf) -> Estimate:
        """How many eigenvalues lie in [low, high), with the probes' standard error.

        Args:
            low: lower end.
            high: upper end; at a distance from both ends the quadrature is blunt by about the distance of its nodes.

        Returns:
            The Estimate, of n times the weight inside.
        """
        inside = (self.nodes >= low) & (self.nodes < high)
        share = torch.where(torch.isnan(self.nodes), torch.nan, torch.where(inside, self.weights, 0)).sum(-1)
        value, error = mean_and_error(self.dimension * share)
        return Estimate(scalar_or_tensor(value), scalar_or_tensor(error), self.products)

    def trace(self, f: Callable[[Tensor], Tensor]) -> FunctionTrace:
        """The trace of f(A), of the products that were made for the density.

        Args:
            f: a function of each eigenvalue, from a float64 tensor to one of the same shape; smooth on the spectrum for
                a quadrature that converges fast.

        Returns:
            The FunctionTrace; NaN where f is NaN at a node.

        Raises:
            ValueError: if f changes the shape.
        """
        samples = self.dimension * _apply(f, self.nodes, self.weights)
        value, error = mean_and_error(samples)
        k = self.nodes.shape[-1]
        shorter = self.dimension * _apply(f, *_rule(self._alpha[..., : k - k // 4], self._beta[..., : k - k // 4]))
        exhausted = (self._beta == 0).any(-1)
        moved = torch.where(exhausted, 0, samples - shorter).mean(0).abs()
        n = scalar_or_tensor
        return FunctionTrace(n(value), n(error), self.products, n(torch.where(torch.isnan(value), value, moved)))


def spectral_density(
    A: LinearOperator,
    probes: int = 10,
    steps: int = 80,
    *,
    block: int | None = None,
    generator: torch.Generator | None = None,
) -> SpectralDensity:
    """The density of the eigenvalues of a symmetric A of shape (*batch, n, n).

    From each of `probes` random unit vectors v, Lanczos with full reorthogonalisation (without it converged eigenvalues
    come back as ghosts): v'f(A)v is the sum of w_j f(node_j) over the Ritz values with the squared first entries of
    their eigenvectors as weights, exactly for polynomials f of degree 2 steps - 1. The mean of v'f(A)v over all
    directions is tr f(A) / n.

    Cost: probes * steps products at most (fewer where a Krylov space is exhausted) and 4 steps^2 n operations a probe;
    memory for block * steps vectors.

    Args:
        A: operator promised symmetric.
        probes: random vectors a system, at least 2. The standard error falls with the root of probes * n: 10 do for n
            of thousands, 1 or 2 show the shape of a network's spectrum.
        steps: at least 4; isolated eigenvalues stand out after 10 to 30, the bulk's shape takes 50 to 100.
        block: how many probes go at once; None for all of them, 1 for the least memory.
        generator: of the start vectors; None for a new one with seed 0.

    Returns:
        The SpectralDensity; NaN where A is not finite.

    Raises:
        TypeError: if A is not an operator promised symmetric.
        ValueError: if A is empty, or probes, steps or block is too small.

    Reference:
        Ubaru, Chen & Saad 2017, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature; Ghorbani, Krishnan &
        Xiao 2019, An investigation into neural net optimization via Hessian eigenvalue density.

    Example:
        >>> from nestopt.linalg import Diagonal
        >>> A = Diagonal(torch.cat([torch.zeros(90), torch.full((10,), 3.0)]).double())
        >>> spectrum = spectral_density(A, probes=50)
        >>> spectrum.products, abs(spectrum.count(low=1.0).value - 10) < 1.5
        (100, True)
    """
    _check("spectral_density", A, probes, steps, block)
    states, products = [], 0
    for start in torch.split(random_start(A, probes, generator), probes if block is None else block):
        state = tridiagonalise(A, start, steps)
        states.append(_padded(*state.matrix, steps=min(steps, A.shape[-1])))
        products += state.k * start.shape[0] * A.batch_shape.numel()
    alpha, beta = (torch.cat(parts) for parts in zip(*states, strict=True))
    return SpectralDensity(*_rule(alpha, beta), A.shape[-1], products, alpha, beta)


def trace_function(
    A: LinearOperator,
    f: Callable[[Tensor], Tensor],
    probes: int = 10,
    steps: int = 40,
    *,
    block: int | None = None,
    generator: torch.Generator | None = None,
) -> FunctionTrace:
    """The trace of f(A) for a symmetric A of shape (*batch, n, n), by stochastic Lanczos quadrature.

    n times the mean of the quadratures of `spectral_density`, which says how they are made; several functions of one
    operator are cheaper as `spectral_density(A).trace(f)`.

    Cost: probes * steps products at most; memory for block * steps vectors.

    Args:
        A: operator promised symmetric.
        f: a function of each eigenvalue, from a float64 tensor to one of the same shape.
        probes: random vectors a system, at least 2.
        steps: at least 4; for a smooth f about the root of the condition number, times the digits wanted.
        block: how many probes go at once; None for all of them.
        generator: of the start vectors; None for a new one with seed 0.

    Returns:
        The FunctionTrace, with the errors of the probes and of the quadrature.

    Raises:
        TypeError: if A is not an operator promised symmetric.
        ValueError: if A is empty, probes, steps or block is too small, or f changes the shape.

    Reference:
        Ubaru, Chen & Saad 2017, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature.

    Example:
        >>> from nestopt.linalg import Identity
        >>> round(trace_function(Identity(7, torch.float64), torch.exp).value, 6)  # 7 e
        19.027973
    """
    _check("trace_function", A, probes, steps, block)
    return spectral_density(A, probes, steps, block=block, generator=generator).trace(f)


def log_determinant(
    A: LinearOperator,
    probes: int = 10,
    steps: int = 40,
    *,
    block: int | None = None,
    generator: torch.Generator | None = None,
) -> FunctionTrace:
    """The log-determinant, tr log A, of a symmetric positive definite A of shape (*batch, n, n).

    Stochastic Lanczos quadrature, see `spectral_density`; the error of the quadrature falls like rho^(-2 steps) for rho
    = (sqrt(kappa) + 1) / (sqrt(kappa) - 1). Up to n of some thousands `A.to_dense().logdet()` is exact and cheaper.

    Cost: probes * steps products at most; memory for block * steps vectors.

    Args:
        A: operator promised symmetric and definite.
        probes: random vectors a system, at least 2.
        steps: at least 4; the root of the condition number does for about 2 digits of the quadrature.
        block: how many probes go at once; None for all of them.
        generator: of the start vectors; None for a new one with seed 0.

    Returns:
        The FunctionTrace, with the errors of the probes and of the quadrature.

    Raises:
        TypeError: if A is not an operator promised symmetric and definite.
        ValueError: if A is empty, probes, steps or block is too small, or a Ritz value proves that A is not definite.

    Reference:
        Ubaru, Chen & Saad 2017, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature.

    Example:
        >>> from nestopt.linalg import Diagonal
        >>> A = Diagonal(torch.linspace(1, 9, 400, dtype=torch.float64))
        >>> result = log_determinant(A)
        >>> abs(result.value - float(A.diagonal.log().sum())) < 3 * result.standard_error
        True
        >>> result.quadrature_error < 1e-6
        True
    """
    _check("log_determinant", A, probes, steps, block)
    if A.definite is not True:
        raise TypeError(
            f"log_determinant: A must be promised definite, but {A!r} is not; add a shift, or use "
            "trace_function(A, lambda x: x.abs().log()) for log |det A|."
        )
    spectrum = spectral_density(A, probes, steps, block=block, generator=generator)
    lowest = torch.where(spectrum.weights > 0, spectrum.nodes, torch.inf).amin()
    if bool(lowest <= 0):  # NaN compares false, and is NaN in the value
        raise ValueError(
            f"log_determinant: A was promised definite, but it has the Ritz value {float(lowest):.1e}, below which is "
            "an eigenvalue; use A.shift(sigma), or float64 if the value is at the rounding level."
        )
    return spectrum.trace(torch.log)


def _check(owner: str, A: LinearOperator, probes: int, steps: int, block: int | None) -> None:
    if not isinstance(A, LinearOperator):
        raise TypeError(f"{owner}: A must be a LinearOperator, but got {type(A).__name__}; use linalg.Dense(matrix).")
    refuse_pieces(owner, A)
    if not A.symmetric:
        raise TypeError(f"{owner}: A must be promised symmetric, but {A!r} is not; use A.T @ A for singular values.")
    if 0 in A.shape:
        raise ValueError(f"{owner}: A must have rows and columns, but it has shape {tuple(A.shape)}.")
    if probes < 2 or steps < 4:
        raise ValueError(
            f"{owner}: errors are measured from at least 2 probes and 4 steps, but got probes={probes}, steps={steps}."
        )
    if block is not None and block < 1:
        raise ValueError(f"{owner}: block must be a positive number of probes, or None for all, but got {block}.")


def _padded(alpha: Tensor, beta: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The tridiagonals of a block that was exhausted early, as long as those of the others; the rest has weight 0."""
    more = (*alpha.shape[:-1], steps - alpha.shape[-1])
    return torch.cat([alpha, alpha[..., :1].expand(more)], -1), torch.cat([beta, beta.new_zeros(more)], -1)


def _rule(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the Gauss quadrature of each tridiagonal."""
    nodes, vectors = eigenpairs(alpha, beta)
    return nodes, vectors[..., 0, :] ** 2


def _apply(f: Callable[[Tensor], Tensor], nodes: Tensor, weights: Tensor) -> Tensor:
    values = f(nodes)
    if values.shape != nodes.shape:
        raise ValueError(
            f"trace_function: f must keep the shape {tuple(nodes.shape)} of what it is given, but returned "
            f"{tuple(values.shape)}; apply it to each entry."
        )
    return torch.where(weights == 0, 0, weights * values).sum(-1)
