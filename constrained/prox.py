"""Proximal operators of simple functions, and those of single entries in closed form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from nestopt.linalg import LinearOperator

from .arguments import check_weight, fit, need_floating, nonnegative
from .sets import Set
from .spoiled_items import shielded
from .structured import DiagonalPlusLowRank

__all__ = ["L1", "ElasticNet", "Huber", "Indicator", "Prox", "Separable", "SquaredL2"]


class Prox(ABC):
    """A function g known by its proximal operator, prox(x, s) = argmin over z of g(z) + |z - x|^2 / (2 s).

    The space is x's LAST `space_dims` dimensions (1 for vectors, 2 for matrices) and everything before is batch.
    Weights are numbers or tensors, which may require grad. All is differentiable in x, the step and the weights, to any
    order and in forward mode, wherever it is smooth; NaN stays NaN. A negative entry of a weight that is a tensor, and
    a step's that is not positive, make their items NaN (a number is refused). A subclass writes `_value`, `_prox` and
    `_jacobian`.
    """

    @property
    def space_dims(self) -> int:
        """How many of x's last dimensions are the space."""
        return 1

    @property
    def convex(self) -> bool:
        """Whether g is convex: then prox is unique and firmly non-expansive, and its Jacobian lies in [0, I]."""
        return True

    def value(self, x: Tensor) -> Tensor:
        """The value g(x) of each item.

        Args:
            x: shape (*batch, *space).

        Returns:
            A tensor of shape (*batch,), inf outside g's domain.

        Raises:
            TypeError: if x is not a floating tensor.
            ValueError: if its shape, dtype or device does not fit the weights.
        """
        self._check("value", x)
        return self._value(x)

    def prox(self, x: Tensor, step: float | Tensor = 1.0) -> Tensor:
        """The minimiser over z of g(z) + |z - x|^2 / (2 step).

        Args:
            x: shape (*batch, *space).
            step: positive number, or tensor that broadcasts to (*batch,): one an item.

        Returns:
            A tensor of x's shape and dtype.

        Raises:
            TypeError: if x is not a floating tensor.
            ValueError: if a shape, dtype or device does not fit, or the step is a number that is not positive.
        """
        return self._nearest(x, self._admit("prox", x, step))

    def jacobian(self, x: Tensor, step: float | Tensor = 1.0) -> LinearOperator:
        """An element D of the generalised Jacobian of z -> prox(z, step) at x, as an operator cut from every graph.

        D is the derivative where there is one, and at a kink the limit that each class names.

        Args:
            x: shape (*batch, *space).
            step: as in `prox`.

        Returns:
            An operator of shape (*batch, n, n) on the flattened space of size n, which is 1 for a 0-d x; symmetric with
            0 <= D <= I where g is convex.

        Raises:
            TypeError: see `prox`.
            ValueError: see `prox`.
        """
        step = self._admit("jacobian", x, step)
        return self._jacobian(x.detach(), step.detach())

    def conjugate_prox(self, x: Tensor, step: float | Tensor = 1.0) -> Tensor:
        """The proximal operator of the conjugate g*(u) = sup over z of u'z - g(z), by Moreau's identity.

        prox_(s g*)(x) = x - s prox_(g/s)(x / s), for convex g.

        Args:
            x: shape (*batch, *space).
            step: as in `prox`.

        Returns:
            A tensor of x's shape and dtype.

        Raises:
            TypeError: see `prox`.
            ValueError: see `prox`; also if g is not convex.
        """
        if not self.convex:
            raise ValueError(f"{type(self).__name__}.conjugate_prox: Moreau's identity needs a convex function.")
        step = self._admit("conjugate_prox", x, step)
        return x - step * self._nearest(x / step, 1 / step)

    def envelope(self, x: Tensor, step: float | Tensor = 1.0) -> Tensor:
        """The Moreau envelope, min over z of g(z) + |z - x|^2 / (2 step), of each item.

        For convex g it is differentiable everywhere in x, with the gradient of `envelope_gradient`.

        Args:
            x: shape (*batch, *space).
            step: as in `prox`.

        Returns:
            A tensor of shape (*batch,).

        Raises:
            TypeError: see `prox`.
            ValueError: see `prox`.
        """
        step = self._admit("envelope", x, step)
        p = self._prox(x, step)
        return self._least(x, step, p) + self._total((p - x) ** 2 / (2 * step))

    def envelope_gradient(self, x: Tensor, step: float | Tensor = 1.0) -> Tensor:
        """The gradient (x - prox(x, step)) / step of the Moreau envelope, which is 1/step-Lipschitz for convex g.

        Args:
            x: shape (*batch, *space).
            step: as in `prox`.

        Returns:
            A tensor of x's shape and dtype.

        Raises:
            TypeError: see `prox`.
            ValueError: see `prox`.
        """
        step = self._admit("envelope_gradient", x, step)
        return (x - self._nearest(x, step)) / step

    @abstractmethod
    def _value(self, x: Tensor) -> Tensor:
        """G of a floating tensor, of shape (*batch,)."""

    @abstractmethod
    def _prox(self, x: Tensor, step: Tensor) -> Tensor:
        """The proximal operator; the step broadcasts to x."""

    @abstractmethod
    def _jacobian(self, x: Tensor, step: Tensor) -> LinearOperator:
        """Its Jacobian at a detached x; the step, detached too, broadcasts to x."""

    def _nearest(self, x: Tensor, step: Tensor) -> Tensor:
        """`_prox`, of which NaN in x or the step spoils its own item alone, derivatives included."""
        broken = self._broken(x) | step.isnan()
        step = torch.where(step.isnan(), 1, step)
        return shielded(lambda z: self._prox(z, step), x, broken)

    def _broken(self, x: Tensor) -> Tensor:
        """The entries of prox(x) that NaN in x spoils: here all of its item."""
        dims = min(self.space_dims, x.ndim)
        return x.isnan().flatten(-dims).any(-1)[(..., *(None,) * dims)].expand_as(x) if dims else x.isnan()

    def _minimum(self, p: Tensor) -> Tensor:
        """The value at a point that `_prox` gave."""
        return self._value(p)

    def _least(self, x: Tensor, step: Tensor, p: Tensor) -> Tensor:
        """The value at p = prox(x, step); written anew where p is a kink of g, for the envelope is smooth there."""
        return self._minimum(p)

    def _total(self, terms: Tensor) -> Tensor:
        """The sum over the space."""
        dims = min(self.space_dims, terms.ndim)
        return terms.sum(tuple(range(-dims, 0))) if dims else terms

    def _need(self, method: str, x: Tensor) -> None:
        """Refuse shapes that are not of the space."""
        if x.ndim < self.space_dims:
            space = "(*batch, n)" if self.space_dims == 1 else "(*batch, m, n)"
            raise ValueError(
                f"{type(self).__name__}.{method}: x must have shape {space}, but it has shape {tuple(x.shape)}."
            )

    def _check(self, method: str, x: Tensor) -> None:
        need_floating(f"{type(self).__name__}.{method}", x)
        self._need(method, x)

    def _admit(self, method: str, x: Tensor, step: float | Tensor) -> Tensor:
        """The step as a tensor that broadcasts to x."""
        self._check(method, x)
        owner = f"{type(self).__name__}.{method}"
        check_weight(owner, "step", step, positive=True)
        dims = min(self.space_dims, x.ndim)
        fitted = fit(owner, "step", step, x, x.shape[: x.ndim - dims])
        return nonnegative(fitted, positive=True)[(..., *(None,) * dims)]


class Separable(Prox):
    """A sum of functions of single entries; x may be 0-d. A subclass writes `_entries`, `_prox` and `_slope`."""

    @abstractmethod
    def _entries(self, x: Tensor) -> Tensor:
        """The terms of the sum."""

    @abstractmethod
    def _slope(self, x: Tensor, step: Tensor) -> Tensor:
        """The derivative of each entry of `_prox`."""

    def _need(self, method: str, x: Tensor) -> None:
        return

    def _broken(self, x: Tensor) -> Tensor:
        return x.isnan()

    def _value(self, x: Tensor) -> Tensor:
        return self._total(self._entries(x))

    def _jacobian(self, x: Tensor, step: Tensor) -> LinearOperator:
        slope = self._slope(x, step).expand(x.shape).detach()
        return DiagonalPlusLowRank(slope if slope.ndim else slope[None])

    def _fit(self, name: str, value: float | Tensor, x: Tensor) -> Tensor:
        return fit(type(self).__name__, name, value, x, x.shape)


@dataclass(frozen=True)
class Indicator(Prox):
    """0 on a set and inf outside: its proximal operator is the projection, for every step.

    Args:
        set: that the point is to lie in; its `jacobian` is the operator's.

    Raises:
        TypeError: if it is not a Set.

    Example:
        >>> from nestopt.constrained import Box
        >>> g = Indicator(Box(0.0, 1.0))
        >>> g.prox(torch.tensor([-1.0, 0.5])), g.value(torch.tensor([-1.0, 0.5]))
        (tensor([0.0000, 0.5000]), tensor(inf))
    """

    set: Set

    def __post_init__(self) -> None:
        if not isinstance(self.set, Set):
            raise TypeError(f"Indicator: set must be a Set, but got {type(self.set).__name__}; use e.g. Box(0.0, 1.0).")

    @property
    def space_dims(self) -> int:
        """The set's."""
        return self.set.space_dims

    @property
    def convex(self) -> bool:
        """Whether the set is."""
        return getattr(self.set, "convex", True)

    def _need(self, method: str, x: Tensor) -> None:
        return  # the set says it

    def _broken(self, x: Tensor) -> Tensor:
        return self.set._broken(x)

    def _value(self, x: Tensor) -> Tensor:
        outside = torch.where(self.set.contains(x), 0.0, torch.inf).to(x.dtype)
        return torch.where(self._total(x).isnan(), torch.nan, outside)

    def _minimum(self, p: Tensor) -> Tensor:
        return self._total(p) * 0  # a projection lies in the set, whatever its rounding

    def _prox(self, x: Tensor, step: Tensor) -> Tensor:
        return torch.where(step.isnan(), torch.nan, self.set.project(x))

    def _jacobian(self, x: Tensor, step: Tensor) -> LinearOperator:
        return self.set.jacobian(x)


@dataclass(frozen=True, eq=False)
class L1(Separable):
    """g(x) = sum_i weight_i |x_i|, or on x >= 0 alone: the proximal operator is the soft threshold.

    prox(x, s) = sign(x) max(|x| - s weight, 0). At the kink |x_i| = s weight_i > 0 its derivative is taken as 0.

    Args:
        weight: number >= 0, or tensor that broadcasts to x: one a coordinate as (n,), or one an item as (*batch, 1).
        nonnegative: whether x >= 0 is demanded as well: prox(x, s) = max(x - s weight, 0), and inf elsewhere.

    Raises:
        TypeError: if weight is neither a number nor a floating tensor.
        ValueError: if it is a number that is negative or not finite.

    Example:
        >>> L1(weight=2.0).prox(torch.tensor([3.0, -1.0, -5.0]))
        tensor([ 1.,  0., -3.])
        >>> L1(weight=2.0, nonnegative=True).prox(torch.tensor([3.0, -1.0, -5.0]))
        tensor([1., 0., 0.])
    """

    weight: float | Tensor = 1.0
    nonnegative: bool = False

    def __post_init__(self) -> None:
        check_weight("L1", "weight", self.weight)

    def _threshold(self, x: Tensor, step: Tensor) -> Tensor:
        return step * nonnegative(self._fit("weight", self.weight, x))

    def _zeroed(self, x: Tensor, threshold: Tensor) -> Tensor:
        # a threshold of zero moves nothing: prox is the identity there, also at 0
        return x <= threshold if self.nonnegative else (x.abs() <= threshold) & (threshold > 0)

    def _entries(self, x: Tensor) -> Tensor:
        terms = nonnegative(self._fit("weight", self.weight, x)) * x.abs()
        return torch.where(x < 0, torch.inf, terms) if self.nonnegative else terms

    def _prox(self, x: Tensor, step: Tensor) -> Tensor:
        t = self._threshold(x, step)
        moved = x - t if self.nonnegative else x - t * x.sign()
        return torch.where(self._zeroed(x, t), 0, moved)

    def _slope(self, x: Tensor, step: Tensor) -> Tensor:
        t = self._threshold(x, step)
        return torch.where(self._zeroed(x, t), 0, torch.where((x - t).isnan(), torch.nan, 1.0).to(x.dtype))


@dataclass(frozen=True, eq=False)
class ElasticNet(Separable):
    """g(x) = sum_i weight_i |x_i| + quadratic_i x_i^2 / 2, by the soft threshold, shrunk.

    prox(x, s) = sign(x) max(|x| - s weight, 0) / (1 + s quadratic). At the kink its derivative is taken as 0.

    Args:
        weight: of the absolute values: number >= 0, or tensor that broadcasts to x.
        quadratic: of the halved squares: likewise.

    Raises:
        TypeError: if a weight is neither a number nor a floating tensor.
        ValueError: if it is a number that is negative or not finite.

    Reference:
        Zou & Hastie 2005, Regularization and variable selection via the elastic net.

    Example:
        >>> ElasticNet(weight=1.0, quadratic=1.0).prox(torch.tensor([3.0, -1.0]))
        tensor([1., 0.])
    """

    weight: float | Tensor = 1.0
    quadratic: float | Tensor = 1.0

    def __post_init__(self) -> None:
        check_weight("ElasticNet", "weight", self.weight)
        check_weight("ElasticNet", "quadratic", self.quadratic)

    def _curvature(self, x: Tensor) -> Tensor:
        return nonnegative(self._fit("quadratic", self.quadratic, x))

    def _entries(self, x: Tensor) -> Tensor:
        return L1(self.weight)._entries(x) + self._curvature(x) * x**2 / 2

    def _prox(self, x: Tensor, step: Tensor) -> Tensor:
        return L1(self.weight)._prox(x, step) / (1 + step * self._curvature(x))

    def _slope(self, x: Tensor, step: Tensor) -> Tensor:
        return L1(self.weight)._slope(x, step) / (1 + step * self._curvature(x))


@dataclass(frozen=True, eq=False)
class SquaredL2(Separable):
    """g(x) = sum_i weight_i (x_i - center_i)^2 / 2, with prox(x, s) = (x + s weight center) / (1 + s weight).

    Args:
        weight: number >= 0, or tensor that broadcasts to x.
        center: number, or tensor that broadcasts to x.

    Raises:
        TypeError: if weight is neither a number nor a floating tensor.
        ValueError: if it is a number that is negative or not finite.

    Example:
        >>> SquaredL2(weight=1.0, center=1.0).prox(torch.tensor([3.0, -1.0]))
        tensor([2., 0.])
    """

    weight: float | Tensor = 1.0
    center: float | Tensor = 0.0

    def __post_init__(self) -> None:
        check_weight("SquaredL2", "weight", self.weight)

    def _weight(self, x: Tensor) -> Tensor:
        return nonnegative(self._fit("weight", self.weight, x))

    def _entries(self, x: Tensor) -> Tensor:
        return self._weight(x) * (x - self._fit("center", self.center, x)) ** 2 / 2

    def _prox(self, x: Tensor, step: Tensor) -> Tensor:
        pull = step * self._weight(x)
        center = self._fit("center", self.center, x)
        return center + (x - center) / (1 + pull)

    def _slope(self, x: Tensor, step: Tensor) -> Tensor:
        return 1 / (1 + step * self._weight(x))


@dataclass(frozen=True, eq=False)
class Huber(Separable):
    """g(x) = sum_i weight_i h(x_i) with h(x) = x^2 / (2 delta) for |x| <= delta, |x| - delta / 2 beyond.

    prox(x, s) = x - s weight x / max(|x|, delta + s weight). At its kink |x| = delta + s weight the derivative is that
    of the quadratic side, delta / (delta + s weight).

    Args:
        weight: number >= 0, or tensor that broadcasts to x.
        delta: positive number, or tensor that broadcasts to x.

    Raises:
        TypeError: if weight or delta is neither a number nor a floating tensor.
        ValueError: if it is a number out of its range.

    Reference:
        Huber 1964, Robust estimation of a location parameter.

    Example:
        >>> Huber(weight=1.0, delta=1.0).prox(torch.tensor([3.0, -1.0]))
        tensor([ 2.0000, -0.5000])
    """

    weight: float | Tensor = 1.0
    delta: float | Tensor = 1.0

    def __post_init__(self) -> None:
        check_weight("Huber", "weight", self.weight)
        check_weight("Huber", "delta", self.delta, positive=True)

    def _parameters(self, x: Tensor) -> tuple[Tensor, Tensor]:
        delta = nonnegative(self._fit("delta", self.delta, x), positive=True)
        return nonnegative(self._fit("weight", self.weight, x)), delta

    def _entries(self, x: Tensor) -> Tensor:
        weight, delta = self._parameters(x)
        size = x.abs()
        return weight * torch.where(size <= delta, size.minimum(delta) ** 2 / (2 * delta), size - delta / 2)

    def _prox(self, x: Tensor, step: Tensor) -> Tensor:
        weight, delta = self._parameters(x)
        t = step * weight
        return torch.where(x.abs() <= delta + t, x * (delta / (delta + t)), x - t * x.sign())

    def _slope(self, x: Tensor, step: Tensor) -> Tensor:
        weight, delta = self._parameters(x)
        t = step * weight
        far = torch.where((x - t).isnan(), torch.nan, 1.0).to(x.dtype)
        return torch.where(x.abs() <= delta + t, delta / (delta + t), far)
