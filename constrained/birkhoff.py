"""Doubly stochastic matrices."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nestopt.implicit import ImplicitWarning
from nestopt.linalg import LinearOperator

from .sets import Set
from .spoiled_items import spoil
from .value_only import opaque

__all__ = ["Birkhoff"]

_STEPS, _HALVINGS, _GROWTH = 200, 40, 8.0


@dataclass(frozen=True)
class Birkhoff(Set):
    """{X of shape (n, n): X >= 0, every row and every column of X sums to 1}, in the last TWO dimensions.

    P(X) = max(X - u 1' - 1 v', 0), where (u, v) minimises the convex, once differentiable dual
    |max(X - u 1' - 1 v', 0)|^2 / 2 + sum u + sum v, whose gradient are the errors of the sums: semismooth Newton with
    a small shift and Armijo's rule, in float64, until no sum is off by more than 1e-12; then the equations of the
    support P(X) > 0 are solved, and X is replaced by X - u 1' - 1 v', which has the same projection, so that entries
    of 1e9 lose nothing. -inf is allowed where enough other entries are not, and gives 0. An item that does not get
    there (or has +inf) is NaN, after an ImplicitWarning, and changes no other.

    The Jacobian maps V to the nearest matrix on the support with rows and columns that sum to 0; at a kink it is the
    one of the smallest face that holds P(X). It is applied by its formula, with a pseudoinverse of 2 n rows.

    Cost: a Cholesky factorisation of 2 n rows a Newton step (10 to 30 of them), and one eigendecomposition.

    Raises:
        ValueError: when a point is projected whose last two dimensions differ.

    Reference:
        Li, Sun & Toh 2020, On the efficient computation of a projector over the Birkhoff polytope.

    Example:
        >>> Birkhoff().project(torch.tensor([[1.0, 0.0], [0.5, 1.5]]))
        tensor([[1., 0.],
                [0., 1.]])
    """

    space_dims: ClassVar[int] = 2

    def _parts(self, X: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """X moved by the dual variables, its support, the pseudoinverse of its equations, and who is solved."""
        self._need_space(X)
        if X.shape[-1] != X.shape[-2]:
            raise ValueError(f"Birkhoff: x must have shape (*batch, n, n), but it has {tuple(X.shape)}.")
        shift, support, inverse, good = opaque(_identify, X, spaces=[2])
        return X - shift, support, inverse, good

    def _project(self, X: Tensor) -> Tensor:
        moved, support, inverse, good = self._parts(X)
        p = spoil(_onto_face(torch.where(support, moved, 0), support, inverse, 1.0), good[..., None, None])
        return torch.where(X.isnan().any(-1, keepdim=True).any(-2, keepdim=True), torch.nan, p)

    def _jacobian(self, X: Tensor) -> LinearOperator:
        _, support, inverse, good = self._parts(X)
        return _FaceProjector(support, inverse, ~good | X.isnan().any(-1).any(-1))


class _FaceProjector(LinearOperator):
    """The projection onto matrices with a support whose rows and columns sum to zero."""

    def __init__(self, support: Tensor, inverse: Tensor, nan: Tensor) -> None:
        n = support.shape[-1]
        super().__init__((*support.shape[:-2], n * n, n * n), inverse.dtype, inverse.device, symmetric=True)
        self.support, self.inverse, self.nan = support, inverse, nan

    def _matvec(self, v: Tensor) -> Tensor:
        V = torch.where(self.support, v.reshape(*v.shape[:-1], *self.support.shape[-2:]), 0)
        return torch.where(self.nan[..., None], torch.nan, _onto_face(V, self.support, self.inverse, 0.0).flatten(-2))


def _onto_face(V: Tensor, support: Tensor, inverse: Tensor, total: float) -> Tensor:
    """V, zero off the support, less the u 1' + 1 v' on it that gives all rows and columns the same total."""
    n = V.shape[-1]
    for _ in range(2):  # the second time only because of rounding
        excess = torch.cat([V.sum(-1), V.sum(-2)], dim=-1) - total
        uv = (inverse @ excess[..., None])[..., 0]
        V = torch.where(support, V - uv[..., :n, None] - uv[..., None, n:], 0)
    return V


def _laplacian(support: Tensor) -> Tensor:
    """The matrix of (u, v) -> the row and column sums of u 1' + 1 v' on the support."""
    M = support.double()
    top = torch.cat([torch.diag_embed(M.sum(-1)), M], dim=-1)
    return torch.cat([top, torch.cat([M.mT, torch.diag_embed(M.sum(-2))], dim=-1)], dim=-2)


def _identify(X: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U 1' + 1 v', the support of the projection, the pseudoinverse of its Laplacian, and which items are solved."""
    dtype = X.dtype
    X = X.double()
    X = torch.where(X.isnan().any(-1, keepdim=True).any(-2, keepdim=True), 0, X)
    X = torch.where(X.isposinf(), torch.nan, X)  # which no step can mend, and every later comparison refuses
    n = X.shape[-1]
    if not X.numel():
        good = torch.ones(X.shape[:-2], dtype=torch.bool, device=X.device)
        return X.to(dtype), X > 0, X.new_zeros(*X.shape[:-2], 2 * n, 2 * n).to(dtype), good
    u = X.amax(-1)
    v = torch.zeros_like(u)
    spread = torch.where(X.isfinite(), u[..., None] - X, 0).amax((-1, -2))
    spread = spread.where(spread.isfinite(), 1)
    # from a matrix of size one to the whole of X: t X has the solution t' / t (u, v), almost, when t' X has (u, v)
    t = 1 / spread.clamp_min(1)
    y = X.new_zeros(*X.shape[:-2], 2 * n)
    while True:
        last = bool((t == 1).all())
        y, _ = _dual(t[..., None, None] * (X - u[..., None]), y, last)
        if last:
            break
        y, t = y * (torch.ones_like(t) / t).clamp_max(_GROWTH)[..., None], (t * _GROWTH).clamp_max(1)
    u, v = u + y[..., :n], v + y[..., n:]
    y, good = _dual(X - u[..., :, None] - v[..., None, :], torch.zeros_like(y), True)
    if not bool(good.all()):
        warnings.warn(
            f"Birkhoff: {int((~good).sum())} of {good.numel()} items have row or column sums that are off after "
            f"{_STEPS} Newton steps, and are NaN; rescale X, or look for infinite entries.",
            ImplicitWarning, stacklevel=2,
        )  # fmt: skip
    y = torch.where(good[..., None], y, 0)
    u, v = u + y[..., :n], v + y[..., n:]
    P = X - u[..., :, None] - v[..., None, :]
    visible = max(1e-11, 4 * torch.finfo(dtype).eps)
    support = (visible < P) & good[..., None, None]
    inverse = torch.linalg.pinv(_laplacian(support), hermitian=True, rtol=1e-11)
    shift = u[..., :, None] + v[..., None, :]
    return shift.to(dtype), support, inverse.to(dtype), good


def _dual(X: Tensor, y: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """The dual solution y = (u, v), or roughly, by semismooth Newton steps from y, and which items have got there."""
    n = X.shape[-1]
    eye = torch.eye(2 * n, dtype=X.dtype, device=X.device)

    def at(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        P = (X - y[..., :n, None] - y[..., None, n:]).clamp_min(0)
        return P, P.square().sum((-1, -2)) / 2 + y.sum(-1), 1 - torch.cat([P.sum(-1), P.sum(-2)], dim=-1)

    P, value, gradient = at(y)
    error = gradient.abs().amax(-1)
    limit = (
        1e-12 + 1e-15 * torch.where(X.isfinite(), X, 0).abs().amax((-1, -2)) if exact else torch.full_like(error, 0.1)
    )
    for _ in range(_STEPS):
        busy = error > limit
        if not bool(busy.any()):
            break
        # the Laplacian is singular, at least along (1, -1); its shift vanishes with the error
        shift = 1e-3 * error.clamp(1e-9, 1.0)
        factor, _ = torch.linalg.cholesky_ex(_laplacian(P > 0) + shift[..., None, None] * eye)
        step = -torch.cholesky_solve(gradient[..., None], factor)[..., 0]
        slope = (gradient * step).sum(-1)
        length = torch.ones_like(error)
        for _ in range(_HALVINGS):
            trial = at(y + length[..., None] * step)
            # near the solution the value is all rounding: then a smaller gradient will do
            good = (trial[1] <= value + 1e-4 * length * slope) | (trial[2].abs().amax(-1) <= 0.5 * error)
            if bool((good | ~busy).all()):
                break
            length = torch.where(good | ~busy, length, length / 2)
        y = torch.where(busy[..., None], y + length[..., None] * step, y)
        P, value, gradient = at(y)
        error = gradient.abs().amax(-1)
    return y, error <= limit
