"""Direct solves of symmetric indefinite systems, which also count the signs of the eigenvalues."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .dense import Direct, Factored, faults_of
from .operator import LinearOperator, power_of_two
from .result import scalar_or_tensor
from .solver import Solution

__all__ = ["LDL", "FactoredLDL", "Inertia", "LDLSolution", "unpack"]


class Inertia(NamedTuple):
    """How many eigenvalues of a symmetric matrix are positive, negative and zero to working precision.

    Integers, or tensors over a batch of systems. A matrix that is not finite has no inertia: its counts are all zero.
    """

    positive: Any
    negative: Any
    zero: Any


@dataclass(frozen=True, kw_only=True)
class LDLSolution(Solution):
    """A Solution of LDL, which also knows the operator's inertia.

    Attributes:
        inertia: the counts for each system of the operator's batch (not for each right-hand side).
    """

    inertia: Inertia


@dataclass(frozen=True)
class FactoredLDL(Factored):
    """A kept factorisation P'A P = L D L', with the pivots that count signs."""

    @property
    def pivots(self) -> Tensor:
        """The eigenvalues of D's blocks, zero where nothing but rounding is left, of shape (*batch, n)."""
        return self.factors[2]

    @property
    def inertia(self) -> Inertia:
        """The signs of A's eigenvalues, which by Sylvester's law are those of the pivots."""
        known, d = torch.isfinite(self.matrix).all(-1), self.pivots
        known = known.all(-1)[..., None]
        return Inertia(*(scalar_or_tensor((known & side).sum(-1)) for side in (d > 0, d < 0, d == 0)))


@dataclass(frozen=True)
class LDL(Direct):
    """Solve A x = b for symmetric A, indefinite too, by Bunch and Kaufman's factors P'A P = L D L'.

    L is unit lower triangular and D has blocks of one and two rows, so that no positive definiteness is needed and the
    signs of A's eigenvalues can be read off D: `inertia` on the solution, and on what `prepare` returns, says how many
    are positive, negative and zero. CONVERGED means |b - A x| <= max(rtol |b|, atol), measured, after at most
    `refinements` steps of iterative refinement. A matrix with a pivot that is nothing but the rounding of what it was
    summed from is SINGULAR, and x is then NaN; the test does not change when rows and columns are scaled.

    Cost: n products to materialise A, n^3/3 to factorise; `prepare(A)` keeps the factors for many solves.

    Args:
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in b's units.
        refinements: limit of refinement steps.

    Raises:
        ValueError: for a negative tolerance or limit.

    Reference:
        Bunch & Kaufman 1977; inertia by Sylvester's law: Higham, Accuracy and Stability of Numerical Algorithms, 11.

    Example:
        >>> from nestopt.linalg import LDL, Dense
        >>> A = Dense(torch.tensor([[0.0, 2.0], [2.0, 0.0]]), symmetric=True)
        >>> sol = LDL()(A, torch.tensor([2.0, 4.0]))
        >>> sol.x, sol.inertia
        (tensor([2., 1.]), Inertia(positive=1, negative=1, zero=0))
    """

    needs_symmetric: ClassVar[bool] = True

    def prepare(self, A: LinearOperator) -> FactoredLDL:
        """Materialise A by n products and factorise it.

        Args:
            A: symmetric operator, of shape (*batch, n, n).

        Returns:
            The factors, with solve, solve_transposed and inertia.
        """
        return FactoredLDL(**vars(super().prepare(A)))

    def _factorise(self, matrix: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        # a matrix that is not finite is replaced for LAPACK, which may refuse it by an exception; its code tells
        finite = torch.isfinite(matrix).all(-1).all(-1)
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        unit = power_of_two(matrix.flatten(-2))[..., None, None]  # products of pivots are formed below
        factors, swaps, _ = torch.linalg.ldl_factor_ex(torch.where(finite[..., None, None], matrix / unit, eye))
        pivots, strength = _pivots(factors, swaps)
        return (factors, swaps, pivots * unit[..., 0], unit), faults_of(matrix, strength), strength

    def _back(self, factors: tuple[Tensor, ...], b: Tensor, transposed: bool) -> Tensor:
        x: Tensor = torch.linalg.ldl_solve(factors[0], factors[1], b)
        return x / factors[3]

    def _substitute(self, f: Factored, b: Tensor, transposed: bool) -> LDLSolution:
        assert isinstance(f, FactoredLDL)
        return LDLSolution(**vars(super()._substitute(f, b, transposed)), inertia=f.inertia)


def unpack(
    factors: Float[Tensor, "*batch n n"], swaps: Tensor
) -> tuple[Float[Tensor, "*batch n n"], Float[Tensor, "*batch n"], Float[Tensor, "*batch n"], Tensor]:
    """L and D of LAPACK's packed factors: P'A P = L D L'.

    Args:
        factors: the lower triangle that `torch.linalg.ldl_factor` returns.
        swaps: its pivots: from 1, negative where a block of two rows was taken.

    Returns:
        L, unit lower triangular; D's diagonal; D's subdiagonal, of which entry k stands below entry k of the diagonal;
        and the rows of A in the order that P puts them in.
    """
    n = factors.shape[-1]
    pair = swaps < 0
    first = pair & (pair.cumsum(-1) % 2 == 1)  # the rows of a pair follow each other, so that odd ones begin it
    below = torch.where(first[..., :-1], factors.diagonal(-1, -2, -1), 0) if n else factors[..., 0]
    D, off = factors.diagonal(dim1=-2, dim2=-1), torch.nn.functional.pad(below, (0, min(n, 1)))
    L = factors.tril(-1)
    if n:
        L = L - torch.diag_embed(below, -1)
    order, rows = _interchanges(swaps.cpu(), first.cpu())
    L = L.gather(-2, rows.to(L.device)) + torch.eye(n, dtype=L.dtype, device=L.device)
    return L, D, off, order.to(L.device)


def _interchanges(swaps: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """The order of A's rows, and for every entry of L the row where LAPACK has left it."""
    # LAPACK interchanges the rows that are left, but not those of the columns that it has done: a column needs all the
    # interchanges that came after it
    n, batch = swaps.shape[-1], swaps.shape[:-1]
    each = torch.arange(batch.numel())
    target = torch.where(first, torch.arange(n), swaps.abs().long() - 1).reshape(len(each), n)
    order = torch.arange(n).repeat(len(each), 1)
    place = torch.empty(n + 1, len(each), n, dtype=torch.int64)  # of the original rows, after so many interchanges
    place[0] = order
    for k in range(n):
        place[k + 1] = place[k]
        other = target[:, k]
        here, there = order[:, k].clone(), order[each, other]
        order[each, other], order[:, k] = here, there
        place[k + 1, each, here], place[k + 1, each, there] = other, k
    done = torch.arange(1, n + 1) + first.reshape(len(each), n).long()  # a pair is done after its second interchange
    rows = place[done[:, None, :], each[:, None, None], order[:, :, None]]
    return order.reshape(*batch, n), rows.reshape(*batch, n, n)


def _pivots(factors: Tensor, swaps: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues of D's blocks, and the strength of the weakest: its size in units of its own rounding."""
    n = factors.shape[-1]
    if not n:
        return factors.new_zeros(swaps.shape), factors.new_full(swaps.shape[:-1], torch.inf)
    L, D, off, _ = unpack(factors, swaps)
    pair = swaps < 0
    first = pair & (pair.cumsum(-1) % 2 == 1)
    # T = |L| |D| |L'| is what the entries of a block were summed from; only three of its diagonals are needed
    size = L.abs()
    left = size * D.abs()[..., None, :]
    left[..., :-1] += size[..., 1:] * off[..., None, :-1].abs()
    left[..., 1:] += size[..., :-1] * off[..., None, :-1].abs()
    summands = (left * size).sum(-1)
    beside = (left[..., :-1, :] * size[..., 1:, :]).sum(-1)
    beside, next_D, next_summands = (
        torch.nn.functional.pad(value, (0, 1)) for value in (beside, D[..., 1:], summands[..., 1:])
    )
    eps = n * torch.finfo(D.dtype).eps
    noise, next_noise, off_noise = eps * summands, eps * next_summands, eps * beside
    determinant_noise = D.abs() * next_noise + (next_D.abs() + next_noise) * noise
    determinant_noise = determinant_noise + (2 * off.abs() + off_noise) * off_noise
    single = torch.where(noise == 0, 0, D.abs() / noise)  # summed from nothing: the weakest pivot there is
    block = torch.where(determinant_noise == 0, 0, (D * next_D - off.square()).abs() / determinant_noise)
    strength = torch.where(pair, torch.where(first, block, torch.inf), single)

    mean, half = (D + next_D) / 2, torch.hypot((D - next_D) / 2, off)
    low, high, weak = mean - half, mean + half, block <= 1
    # a singular block has one eigenvalue that is zero, the smaller one, or two where all of its entries are rounding
    nothing = weak & (D.abs() <= noise) & (next_D.abs() <= next_noise) & (off.abs() <= off_noise)
    low_is_small = low.abs() <= high.abs()
    low = torch.where(nothing | (weak & low_is_small), 0, low)
    high = torch.where(nothing | (weak & ~low_is_small), 0, high)
    pivots = torch.where(single <= 1, 0, D)
    pivots = torch.where(pair, high.roll(1, -1), pivots)
    return torch.where(first, low, pivots), strength.amin(-1)
