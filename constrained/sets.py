"""Closed convex sets with projections in closed form."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import optree
import torch
from torch import Tensor

from nestopt.implicit.jacobian import SystemJacobian
from nestopt.linalg import LinearOperator
from nestopt.linalg.tree import leaf_paths, named_tree

from .arguments import fit, need_floating
from .spoiled_items import shielded
from .structured import DiagonalPlusLowRank
from .value_only import check_every

__all__ = [
    "Ball",
    "Between",
    "Box",
    "Set",
    "Simplex",
    "WholeSpace",
    "check_number",
    "clamp",
    "kept_nan",
    "project",
    "simplex_support",
]


class Set(ABC):
    """A closed convex set C, known by its projection P(x) = argmin over z in C of |z - x|.

    The space is x's LAST dimension (the last TWO where `space_dims` is 2, for sets of matrices) and everything before
    it is batch. Projections are differentiable to any order in x, and in the set's own tensors, wherever they are
    smooth; NaN stays NaN. A tensor of the set with one value an item (a radius, a level) has shape (*batch,).

    P has a generalised Jacobian everywhere, `jacobian`: symmetric, with eigenvalues in [0, 1]. A subclass writes
    `_project`, and `_jacobian` where a formula beats automatic differentiation.
    """

    space_dims: ClassVar[int] = 1
    convex: ClassVar[bool] = True

    def project(self, x: Tensor) -> Tensor:
        """The nearest point of the set.

        Args:
            x: shape (*batch, n), or (*batch, m, n) for a set of matrices.

        Returns:
            A tensor of x's shape and dtype.

        Raises:
            TypeError: if x is not a floating tensor.
            ValueError: if its shape, dtype or device does not fit the set.
        """
        self._check(x, "project")
        return shielded(self._project, x, self._broken(x))

    def distance(self, x: Tensor) -> Tensor:
        """|x - P(x)|, for each item of the batch, differentiable outside the set; NaN is far from every set.

        Args:
            x: as for `project`.

        Returns:
            The Euclidean distances, of shape (*batch,).

        Raises:
            TypeError: see `project`.
            ValueError: see `project`.
        """
        gap = x - self.project(x)
        flat = gap.flatten(-self.space_dims) if gap.ndim >= self.space_dims else gap[None]
        unit = flat.detach().abs().amax(-1, keepdim=True) if flat.shape[-1] else flat.new_zeros((*flat.shape[:-1], 1))
        apart = unit > 0
        unit = torch.where(unit == 0, 1, unit)  # so that nothing overflows
        # a norm of ones where the point is inside: the norm has no derivative at zero
        norm = torch.linalg.vector_norm(torch.where(apart, flat / unit, 1), dim=-1)
        return torch.where(flat.isnan().any(-1), torch.nan, torch.where(apart[..., 0], unit[..., 0] * norm, 0))

    def contains(self, x: Tensor, atol: float | None = None) -> Tensor:
        """Whether |x - P(x)| <= atol, for each item of the batch; NaN is in no set.

        Args:
            x: as for `project`.
            atol: tolerated distance; None for 10 eps max(1, |x|).

        Returns:
            A boolean tensor of shape (*batch,).

        Raises:
            TypeError: see `project`.
            ValueError: see `project`.
        """
        distance = self.distance(x)
        if atol is not None:
            return distance <= atol
        flat = x.flatten(-self.space_dims) if x.ndim >= self.space_dims else x[None]
        size: Tensor = torch.linalg.vector_norm(flat, dim=-1)
        return distance <= 10 * torch.finfo(x.dtype).eps * size.clamp_min(1.0)

    def jacobian(self, x: Tensor) -> LinearOperator:
        """An element D of the generalised Jacobian of P at x, as an operator that is cut from every graph.

        D is dP/dx where P is smooth, and at a kink one of its limits: which one, the set documents. It is symmetric,
        and 0 <= D <= I, because P is the gradient of a convex function and non-expansive.

        Args:
            x: shape (*batch, n), or (*batch, m, n) for a set of matrices.

        Returns:
            An operator of shape (*batch, n, n); for a set of matrices (*batch, m n, m n), on matrices flattened by
            rows.

        Raises:
            TypeError: see `project`.
            ValueError: see `project`, and if x is 0-d.
        """
        self._check(x, "jacobian")
        self._need_space(x)
        return self._jacobian(x.detach())

    @abstractmethod
    def _project(self, x: Tensor) -> Tensor:
        """The projection of a floating tensor."""

    def _broken(self, x: Tensor) -> Tensor:
        """The entries of P(x) that NaN in x spoils: here all of its item."""
        if x.ndim < self.space_dims:
            return x.isnan()  # `_project` refuses it
        item = x.isnan().flatten(-self.space_dims).any(-1)
        return item[(..., *(None,) * self.space_dims)].expand_as(x)

    def _jacobian(self, x: Tensor) -> LinearOperator:
        """The generalised Jacobian at a detached x: here by automatic differentiation of `_project`."""
        space = x.shape[x.ndim - self.space_dims :]

        def flat(y: Tensor) -> Tensor:
            return self._project(y.reshape(*y.shape[:-1], *space)).flatten(-self.space_dims)

        with torch.inference_mode(False):
            return SystemJacobian(flat, x.flatten(-self.space_dims).clone(), (), (), symmetric=True)

    def _check(self, x: Tensor, method: str) -> None:
        need_floating(f"{type(self).__name__}.{method}", x)

    def _fit(self, value: float | Tensor, x: Tensor, name: str, shape: Sequence[int] | None = None) -> Tensor:
        """A number or tensor of the set as a tensor that broadcasts to x, or an error that says why it does not.

        Args:
            value: the number or tensor.
            x: the point.
            name: of the value.
            shape: that the value must broadcast to, None for x's.

        Returns:
            The value as a tensor of x's dtype and device.

        Raises:
            ValueError: for another dtype or device, or a shape that does not broadcast.
        """
        return fit(type(self).__name__, name, value, x, x.shape if shape is None else torch.Size(shape))

    def _fit_item(self, value: float | Tensor, x: Tensor, name: str) -> Tensor:
        """A number, or a tensor with one value an item of the batch, with dimensions of size 1 for the space."""
        fitted = self._fit(value, x, name, x.shape[: x.ndim - self.space_dims])
        return fitted[(..., *(None,) * self.space_dims)] if fitted.ndim else fitted

    def _need_space(self, x: Tensor) -> None:
        if x.ndim < self.space_dims:
            if self.space_dims == 1:
                raise ValueError(f"{type(self).__name__}: x must have shape (*batch, n), but it is 0-d; use x[None].")
            raise ValueError(
                f"{type(self).__name__}: x must have shape (*batch, m, n), but it has shape {tuple(x.shape)}."
            )


def check_number(owner: str, name: str, value: float | Tensor, *, positive: bool = False) -> None:
    """Refuse a radius or scale, a number or a tensor of them, that is not finite and >= 0 (or > 0).

    Args:
        owner: the set's name.
        name: of the value.
        value: number or floating tensor.
        positive: whether zero is refused as well.

    Raises:
        ValueError: if it is not.
    """
    bound = "> 0" if positive else ">= 0"
    if isinstance(value, Tensor):
        v = value.detach()
        valid = ((v > 0) if positive else (v >= 0)) & (v < math.inf)
        check_every(valid, f"{owner}: every {name} must be a finite number {bound}; look for NaN and signs.")
    elif not (0 < value < math.inf if positive else 0 <= value < math.inf):
        raise ValueError(f"{owner}: {name} must be a finite number {bound}, but got {value}.")


def kept_nan(x: Tensor, mask: Tensor) -> Tensor:
    """The mask as numbers of x's dtype, NaN where x is NaN."""
    return torch.where(x.isnan(), torch.nan, mask.to(x.dtype))


def clamp(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Clamp x, without the derivative that torch.clamp passes on at x = low = high, where there is nothing to move."""
    return torch.where((low == high) & ~x.isnan(), (low + high) / 2, torch.clamp(x, low, high))


@dataclass(frozen=True)
class WholeSpace(Set):
    """All of the space: the projection is the identity, and so is its Jacobian.

    Example:
        >>> WholeSpace().project(torch.ones(2))
        tensor([1., 1.])
    """

    def _project(self, x: Tensor) -> Tensor:
        return x

    def _broken(self, x: Tensor) -> Tensor:
        return x.isnan()

    def _jacobian(self, x: Tensor) -> LinearOperator:
        return DiagonalPlusLowRank(torch.ones_like(x))


class Between(Set):
    """The x between two bounds, elementwise, which a subclass writes as `_bounds`."""

    @abstractmethod
    def _bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The lower and the upper bound, which broadcast to x."""

    def _project(self, x: Tensor) -> Tensor:
        return clamp(x, *self._bounds(x))

    def _broken(self, x: Tensor) -> Tensor:
        return x.isnan()

    def _jacobian(self, x: Tensor) -> LinearOperator:
        low, high = self._bounds(x)
        return DiagonalPlusLowRank(kept_nan(x, (low <= x) & (x <= high) & (low < high)))


@dataclass(frozen=True, eq=False)
class Box(Between):
    """{x: low <= x <= high}, elementwise; x may have any shape that the bounds broadcast to, 0-d included.

    The Jacobian is diagonal, 1 for an entry within its bounds and 0 outside. At a kink: a free entry on its bound
    counts as within; where low = high the entry is fixed, and its derivative goes to both bounds in halves.

    Args:
        low: number or tensor; -inf for none.
        high: number or tensor; inf for none.

    Raises:
        ValueError: if low <= high does not hold everywhere (NaN included).

    Example:
        >>> Box(0.0, torch.tensor([1.0, torch.inf])).project(torch.tensor([[2.0, 2.0], [-1.0, 0.5]]))
        tensor([[1.0000, 2.0000],
                [0.0000, 0.5000]])
    """

    low: float | Tensor = -math.inf
    high: float | Tensor = math.inf

    def __post_init__(self) -> None:
        low, high = (
            b if isinstance(b, Tensor) else torch.tensor(b, dtype=torch.float64) for b in (self.low, self.high)
        )
        try:
            valid = low.detach().double() <= high.detach().double()
        except RuntimeError as error:
            raise ValueError(
                f"Box: low and high must broadcast, but they have shapes {tuple(low.shape)} and {tuple(high.shape)}."
            ) from error
        check_every(
            valid, "Box: low <= high must hold in every entry, and it does not; look for NaN and swapped bounds."
        )

    def _bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._fit(self.low, x, "low"), self._fit(self.high, x, "high")


@dataclass(frozen=True, eq=False)
class Ball(Set):
    """{x: |x - center|_2 <= radius}.

    With d = x - center, the Jacobian is I inside, and (radius / |d|)(I - d d' / |d|^2) outside. At a kink, |d| =
    radius, the point counts as inside.

    Args:
        radius: number >= 0, or a tensor of shape (*batch,) of them.
        center: number, or tensor of shape (n,) or (*batch, n).

    Raises:
        ValueError: if radius is negative or not finite.

    Example:
        >>> Ball(1.0).project(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """

    radius: float | Tensor = 1.0
    center: float | Tensor = 0.0

    def __post_init__(self) -> None:
        check_number("Ball", "radius (WholeSpace() is the ball without one)", self.radius)

    def _outward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The center, the radius, whether x is outside, x's direction from the center, and its distance / radius."""
        self._need_space(x)
        center, radius = self._fit(self.center, x, "center"), self._fit_item(self.radius, x, "radius")
        d = x - center
        largest = d.detach().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        size = torch.linalg.vector_norm(d.detach() / largest, dim=-1, keepdim=True)
        outside = (size > radius.detach() / largest) | (radius == 0)
        # where twice: inside, the norm may be zero, and its derivative must not be asked for
        scaled = torch.where(outside & (size != 0), d / largest, 1.0)
        direction = scaled / torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
        return center, radius, outside, direction, radius.detach() / largest / size

    def _project(self, x: Tensor) -> Tensor:
        center, radius, outside, direction, _ = self._outward(x)
        return torch.where(outside, center + radius * direction, x)

    def _jacobian(self, x: Tensor) -> LinearOperator:
        _, radius, outside, direction, ratio = self._outward(x)
        shrunk = torch.where(outside, torch.where(radius == 0, 0.0, ratio), 1.0)
        shrunk = torch.where(x.isnan().any(-1, keepdim=True), torch.nan, shrunk)
        weight = torch.where(outside, -shrunk, 0.0)
        return DiagonalPlusLowRank(shrunk.expand_as(x), direction.detach()[..., None, :], weight)


def simplex_support(x: Tensor, scale: Tensor) -> Tensor:
    """Where max(x - theta, 0) is positive for the theta that makes its sum equal to scale: a constant.

    Args:
        x: shape (*batch, n), the largest entry of the order of zero.
        scale: positive, of shape (*batch, 1) or a number.

    Returns:
        A boolean tensor of x's shape; all False for an item with NaN.
    """
    x, scale = x.detach(), scale.detach()
    u = x.sort(dim=-1, descending=True).values
    count = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    size = (u * count > u.cumsum(-1) - scale).sum(-1, keepdim=True)
    return (x >= u.gather(-1, (size - 1).clamp_min(0))) & (size > 0)


@dataclass(frozen=True, eq=False)
class Simplex(Set):
    """{x: x >= 0, sum x = scale}, in the last dimension.

    P(x) = max(x - theta, 0), theta found exactly from the sorted entries; the largest entry is subtracted first, so
    that entries of 1e9 lose nothing. -inf is allowed and gives 0. With s the indicator of the support P(x) > 0, the
    Jacobian is diag(s) - s s' / sum(s); at a kink, entries with x = theta are not in the support.

    Args:
        scale: positive number, or a tensor of shape (*batch,) of them.

    Raises:
        ValueError: if scale is not positive and finite.

    Reference:
        Held, Wolfe & Crowder 1974.

    Example:
        >>> Simplex().project(torch.tensor([0.0, 0.0, -torch.inf]))
        tensor([0.5000, 0.5000, 0.0000])
    """

    scale: float | Tensor = 1.0

    def __post_init__(self) -> None:
        check_number("Simplex", "scale", self.scale, positive=True)

    def _supported(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self._need_space(x)
        if x.shape[-1] == 0:
            raise ValueError("Simplex: x has no entries, and none can sum to a positive scale.")
        scale = self._fit_item(self.scale, x, "scale")
        x = x - x.detach().amax(-1, keepdim=True)  # the projection does not change along (1, ..., 1)
        return x, scale, simplex_support(x, scale)

    def _project(self, x: Tensor) -> Tensor:
        x, scale, support = self._supported(x)
        theta = (torch.where(support, x, 0).sum(-1, keepdim=True) - scale) / support.sum(-1, keepdim=True)
        return torch.where(support | x.isnan(), (x - theta).clamp_min(0), 0)

    def _jacobian(self, x: Tensor) -> LinearOperator:
        x, _, support = self._supported(x)
        s = kept_nan(x, support)
        return DiagonalPlusLowRank(s, s[..., None, :], -1 / s.sum(-1, keepdim=True))


def project(sets: Any, tree: Any) -> Any:
    """The nearest point to a pytree.

    Args:
        sets: None for the whole space; a Set, which each tensor of the tree is projected onto; or a pytree of the
            tree's structure that holds a Set or None for each tensor.
        tree: pytree of tensors, or a module for its parameters.

    Returns:
        The projected tree (for a module, the dict of its parameters).

    Raises:
        TypeError: if an entry of sets is neither a Set nor None.
        ValueError: if sets has another structure than the tree.

    Example:
        >>> project({"a": Box(0.0, 1.0), "b": None}, {"a": torch.tensor(3.0), "b": torch.tensor(3.0)})
        {'a': tensor(1.), 'b': tensor(3.)}
    """
    tree = named_tree(tree)
    if sets is None:
        return tree
    leaves, treespec = optree.tree_flatten(tree)
    if isinstance(sets, Set):
        each: Sequence[Any] = [sets] * len(leaves)
    else:
        # the tree is flattened again, because None is a leaf here
        each, given = optree.tree_flatten(sets, none_is_leaf=True)
        expected = optree.tree_structure(tree, none_is_leaf=True)
        if given != expected:
            raise ValueError(f"sets must have the structure of the variable, {expected}, but it has {given}.")
    for path, one in zip(leaf_paths(tree, "sets"), each, strict=True):
        if one is not None and not isinstance(one, Set):
            raise TypeError(f"{path} must be a Set or None, but got {type(one).__name__}; use e.g. Box(0.0, 1.0).")
    projected = [leaf if one is None else one.project(leaf) for one, leaf in zip(each, leaves, strict=True)]
    return optree.tree_unflatten(treespec, projected)
