"""Proximal operators of norms of groups of coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nestopt.linalg import FunctionOperator, LinearOperator

from .arguments import check_weight, fit, nonnegative
from .prox import L1, Prox

__all__ = ["GroupLasso", "SparseGroupLasso"]


@dataclass(frozen=True, eq=False)
class GroupLasso(Prox):
    """g(x) = sum over groups G of weight_G factor_G |x_G|_2, for groups that part the coordinates.

    prox(x, s) scales each group by max(1 - s weight_G factor_G / |x_G|, 0). At the kink |x_G| = s weight_G factor_G > 0
    its derivative is taken as 0. The gradient of the value is 0 in a group of zeros.

    Args:
        groups: a list of lists of indices that holds each of 0, ..., n - 1 once, of any sizes; or an integer tensor of
            shape (n,), the number of each coordinate's group.
        weight: number >= 0, or tensor that broadcasts to (*batch, groups).
        factors: number >= 0, or tensor that broadcasts to (groups,); None for the square roots of the groups' sizes,
            which treat large groups and small ones alike. A group with 0 is free.

    Raises:
        TypeError: if weight or factors is neither a number nor a floating tensor.
        ValueError: if the groups do not part the coordinates, or a number is negative or not finite.

    Reference:
        Yuan & Lin 2006, Model selection and estimation in regression with grouped variables.

    Example:
        >>> GroupLasso([[0, 2], [1]], factors=1.0).prox(torch.tensor([3.0, 0.5, 4.0]))
        tensor([2.4000, 0.0000, 3.2000])
    """

    groups: Sequence[Sequence[int]] | Tensor
    weight: float | Tensor = 1.0
    factors: float | Tensor | None = None

    def __post_init__(self) -> None:
        check_weight("GroupLasso", "weight", self.weight)
        if self.factors is not None:
            check_weight("GroupLasso", "factors", self.factors)
        _ = self.labels  # so that bad groups are named here

    @cached_property
    def labels(self) -> Tensor:
        """The number of each coordinate's group, of shape (n,)."""
        if isinstance(self.groups, Tensor):
            if self.groups.ndim != 1 or self.groups.is_floating_point() or self.groups.dtype == torch.bool:
                raise ValueError(
                    "GroupLasso: groups as a tensor must hold one integer a coordinate, of shape (n,), but got "
                    f"{self.groups.dtype} of shape {tuple(self.groups.shape)}."
                )
            if self.groups.numel() and int(self.groups.min()) < 0:
                raise ValueError("GroupLasso: groups as a tensor must hold numbers >= 0; a free group has factor 0.")
            return self.groups.long()
        indices = [int(i) for group in self.groups for i in group]
        if sorted(indices) != list(range(len(indices))):
            raise ValueError(
                "GroupLasso: groups must hold each index 0, ..., n - 1 exactly once; coordinates that are not "
                "penalised belong in a group whose factor is 0."
            )
        labels = torch.empty(len(indices), dtype=torch.long)
        for number, group in enumerate(self.groups):
            labels[torch.tensor(list(group), dtype=torch.long)] = number
        return labels

    @cached_property
    def sizes(self) -> Tensor:
        """The number of coordinates of each group."""
        return torch.bincount(self.labels, minlength=0 if isinstance(self.groups, Tensor) else len(self.groups))

    def _need(self, method: str, x: Tensor) -> None:
        super()._need(method, x)
        if x.shape[-1] != self.labels.numel():
            raise ValueError(
                f"{type(self).__name__}.{method}: x must have shape (*batch, {self.labels.numel()}), as the groups "
                f"say, but it has shape {tuple(x.shape)}."
            )

    def _sum(self, x: Tensor) -> Tensor:
        """The sums over groups, of shape (..., groups)."""
        return x.new_zeros((*x.shape[:-1], self.sizes.numel())).index_add(-1, self.labels.to(x.device), x)

    def _spread(self, values: Tensor) -> Tensor:
        """Values of groups at each of their coordinates."""
        return values.index_select(-1, self.labels.to(values.device))

    def _norms(self, x: Tensor) -> Tensor:
        unit = x.detach().abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_ones((*x.shape[:-1], 1))
        unit = torch.where(unit == 0, 1, unit)  # so that no square overflows
        squares = self._sum((x / unit) ** 2)
        empty = squares == 0
        return torch.where(empty, 0, unit * torch.where(empty, 1, squares).sqrt())

    def _weights(self, x: Tensor) -> Tensor:
        groups = torch.Size((*x.shape[:-1], self.sizes.numel()))
        weight = nonnegative(fit("GroupLasso", "weight", self.weight, x, groups))
        if self.factors is None:
            return weight * self.sizes.to(x).sqrt()
        return weight * nonnegative(fit("GroupLasso", "factors", self.factors, x, groups[-1:]))

    def _value(self, x: Tensor) -> Tensor:
        return (self._weights(x) * self._norms(x)).sum(-1)

    def _factor(self, x: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """What each group is scaled by, and t / |x_G| of the groups that are kept, 0 for the others."""
        norms, t = self._norms(x), step * self._weights(x)
        zeroed = norms <= t
        ratio = t / torch.where(zeroed, 1, norms)
        # a threshold of zero moves nothing: prox is the identity there, also at 0
        return torch.where(zeroed, (t == 0).to(x.dtype), 1 - ratio), torch.where(zeroed, 0, ratio)

    def _prox(self, x: Tensor, step: Tensor) -> Tensor:
        return x * self._spread(self._factor(x, step)[0])

    def _jacobian(self, x: Tensor, step: Tensor) -> LinearOperator:
        factor, ratio = (self._spread(values).detach() for values in self._factor(x, step))
        norms = self._norms(x)
        u = x / self._spread(torch.where(norms == 0, 1, norms))

        def matvec(v: Tensor) -> Tensor:
            return factor * v + ratio * u * self._spread(self._sum(u * v))

        return FunctionOperator(matvec, (*x.shape, x.shape[-1]), x.dtype, x.device, symmetric=True)


@dataclass(frozen=True, eq=False)
class SparseGroupLasso(Prox):
    """g(x) = sum_i sparse_weight_i |x_i| + sum over groups G of weight_G factor_G |x_G|_2.

    The proximal operator is that of the group lasso after the soft threshold. At both kinks the derivative is taken as
    0.

    Args:
        groups: as for `GroupLasso`.
        weight: of the groups' norms: as for `GroupLasso`.
        sparse_weight: of the absolute values: number >= 0, or tensor that broadcasts to x.
        factors: as for `GroupLasso`.

    Raises:
        TypeError: if a weight is neither a number nor a floating tensor.
        ValueError: if the groups do not part the coordinates, or a number is negative or not finite.

    Reference:
        Simon, Friedman, Hastie & Tibshirani 2013, A sparse-group lasso, equation 12.

    Example:
        >>> g = SparseGroupLasso([[0, 2], [1]], weight=1.0, sparse_weight=1.0, factors=1.0)
        >>> g.prox(torch.tensor([4.0, 1.5, 5.0]))
        tensor([2.4000, 0.0000, 3.2000])
    """

    groups: Sequence[Sequence[int]] | Tensor
    weight: float | Tensor = 1.0
    sparse_weight: float | Tensor = 1.0
    factors: float | Tensor | None = None

    def __post_init__(self) -> None:
        check_weight("SparseGroupLasso", "sparse_weight", self.sparse_weight)
        _ = self.grouped

    @cached_property
    def grouped(self) -> GroupLasso:
        """The part with the groups."""
        return GroupLasso(self.groups, self.weight, self.factors)

    @cached_property
    def sparse(self) -> L1:
        """The part with the absolute values."""
        return L1(self.sparse_weight)

    def _need(self, method: str, x: Tensor) -> None:
        self.grouped._need(method, x)

    def _value(self, x: Tensor) -> Tensor:
        return self.grouped._value(x) + self.sparse._value(x)

    def _prox(self, x: Tensor, step: Tensor) -> Tensor:
        return self.grouped._prox(self.sparse._prox(x, step), step)

    def _jacobian(self, x: Tensor, step: Tensor) -> LinearOperator:
        outer = self.grouped._jacobian(self.sparse._prox(x, step).detach(), step)
        mask = self.sparse._slope(x, step).detach()  # zeros and ones, which commute with the outer Jacobian

        def matvec(v: Tensor) -> Tensor:
            return mask * outer._matvec(mask * v)

        return FunctionOperator(matvec, tuple(outer.shape), x.dtype, x.device, symmetric=True)
