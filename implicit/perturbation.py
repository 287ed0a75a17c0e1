"""Perturbed optimizers: the mean decision under noise, smooth in the costs, and its Fenchel-Young loss."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from .oracles import Oracle, check_costs, check_pair, decide
from .transforms import alive, within_jvp

__all__ = ["FenchelYoungLoss", "PerturbedOptimizer", "fenchel_young", "perturbed"]

Noise: TypeAlias = Literal["gumbel", "gaussian", "multiplicative"]


def perturbed(
    costs: Tensor,
    oracle: Oracle,
    *,
    scale: float = 1.0,
    samples: int = 10,
    noise: Noise = "gaussian",
    generator: torch.Generator | None = None,
    maximize: bool = False,
) -> Tensor:
    r"""The mean decision E[w(c + scale Z)] over noise Z, estimated by samples, with estimates of its derivatives.

    The mean is smooth in c although w is piecewise constant. Its Jacobian E[w grad nu(Z)'] / scale, where Z has the
    density exp(-nu), is estimated from the same samples, each w less the mean of the others (which has no bias and
    less variance). So are its further derivatives, in reverse and forward mode: a sample is weighted by the ratio of
    its densities at c and at the point of evaluation, whose derivatives of every order are unbiased; their variance
    grows by 1 / scale^2 an order. Where w minimises, the noise is subtracted, so that with Gumbel noise and the simplex
    the mean is softmax(-c / scale), and softmax(c / scale) with maximize.

    Multiplicative noise leaves the costs' signs alone: w(c * exp(scale Z - scale^2 / 2)) with Gaussian Z, for oracles
    such as Dijkstra's that need them. A cost that is exactly zero is not perturbed then, and has no gradient.

    Cost: one call of the oracle with `samples` times the batch; memory for its decisions.

    Args:
        costs: shape (*batch, n).
        oracle: solves rows of costs, see `decide`.
        scale: standard size of the noise, in the units of costs (relative for multiplicative noise): about the gap
            between good decisions. Small means nearly w(c), and derivatives of high variance.
        samples: the error falls as 1 / sqrt(samples); 10 to 100 do for training.
        noise: "gaussian", "gumbel" (its mean is not zero, as in softmax), or "multiplicative".
        generator: of the noise, on the costs' device; None for one that is seeded with 0 in each call.
        maximize: whether the oracle maximises.

    Returns:
        The mean decision, of costs' shape; NaN for an item with NaN.

    Raises:
        ValueError: for a scale or a number of samples that is not positive, or an unknown noise.

    Reference:
        Berthet, Blondel, Teboul, Cuturi, Vert & Bach 2020, Learning with differentiable perturbed optimizers,
        proposition 3.1; Dalle, Baty, Bouvier & Parmentier 2022 for multiplicative noise.

    Example:
        >>> from nestopt import implicit
        >>> def cheapest(c):
        ...     return torch.nn.functional.one_hot(c.argmin(-1), c.shape[-1])
        >>> c = torch.tensor([0.0, math.log(3.0)], dtype=torch.float64)
        >>> w = implicit.perturbed(c, cheapest, samples=10_000, noise="gumbel")
        >>> bool((w - torch.tensor([0.75, 0.25])).abs().max() < 0.02)
        True
    """
    draw = _checked("perturbed", costs, oracle, scale, samples, noise, generator, maximize)
    z, w = _Draw.apply(draw, costs)  # type: ignore[no-untyped-call]
    return _mean(draw, costs, z, w)


def fenchel_young(
    predicted: Tensor,
    target: Tensor,
    oracle: Oracle,
    *,
    scale: float = 1.0,
    samples: int = 10,
    noise: Noise = "gaussian",
    generator: torch.Generator | None = None,
    maximize: bool = False,
) -> Tensor:
    """The loss whose gradient is the mean decision less the one wanted: train by decisions, without knowing costs.

    For decisions that minimise, l(c_hat) = c_hat'w* - E[min over w of (c_hat - scale Z)'w] is convex in c_hat and least
    where the perturbed mean is w*; its gradient w* - E[w(c_hat - scale Z)] is estimated by the decisions that
    `perturbed` takes. With maximize, l = E[max over w of (c_hat + scale Z)'w] - c_hat'w*, and the gradient turns
    around. The loss is that of Fenchel and Young up to a constant that depends on w* alone (the dual function's value
    there): its least value is not zero. The Hessian is that of `perturbed`.

    Args:
        predicted: c_hat, shape (*batch, n).
        target: w*, the decision wanted, or a mean of decisions, of the same shape; it is a constant of the samples'
            decisions, and has a derivative here.
        oracle: solves rows of costs, see `decide`.
        scale: size of the noise, in the units of costs.
        samples: 1 is enough for training.
        noise: "gaussian" or "gumbel", not "multiplicative".
        generator: of the noise; None for one that is seeded with 0 in each call.
        maximize: whether the oracle maximises.

    Returns:
        One loss an item, shape (*batch,). Take .mean().

    Raises:
        ValueError: as for `perturbed`, for shapes that differ, and for multiplicative noise, whose mean decision is no
            gradient.

    Reference:
        Berthet et al. 2020, section 4; Blondel, Martins & Niculae 2020.

    Example:
        >>> from nestopt import implicit
        >>> def cheapest(c):
        ...     return torch.nn.functional.one_hot(c.argmin(-1), c.shape[-1])
        >>> c = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        >>> loss = implicit.fenchel_young(c, torch.tensor([1.0, 0.0]).double(), cheapest, samples=1000)
        >>> bool((torch.autograd.grad(loss, c)[0] - torch.tensor([0.5, -0.5])).abs().max() < 0.1)
        True
    """
    check_pair("fenchel_young", predicted, target, ("predicted", "target"))
    draw = _checked("fenchel_young", predicted, oracle, scale, samples, noise, generator, maximize)
    if noise == "multiplicative":
        raise ValueError(
            "fenchel_young: the mean decision under multiplicative noise is not the gradient of a convex function; use "
            'noise="gaussian" or "gumbel".'
        )
    z, w = _Draw.apply(draw, predicted)  # type: ignore[no-untyped-call]
    gap = _Potential.apply(draw, predicted, z, w) - (predicted * target).sum(-1)  # type: ignore[no-untyped-call]
    return gap if maximize else -gap  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class _Sampling:
    """How decisions under noise are drawn."""

    oracle: Oracle
    scale: float
    samples: int
    noise: Noise
    generator: torch.Generator | None
    sign: float

    def points(self, costs: Tensor, z: Tensor) -> Tensor:
        """The perturbed costs, (*batch, samples, n)."""
        c = costs.unsqueeze(-2)
        if self.noise == "multiplicative":
            return c * torch.exp(self.scale * z - self.scale**2 / 2)
        return c + self.sign * self.scale * z

    def noise_like(self, costs: Tensor) -> Tensor:
        """Z, (*batch, samples, n)."""
        generator = torch.Generator(costs.device).manual_seed(0) if self.generator is None else self.generator
        shape = (*costs.shape[:-1], self.samples, costs.shape[-1])
        options: Any = {"generator": generator, "dtype": costs.dtype, "device": costs.device}
        if self.noise != "gumbel":
            return torch.randn(shape, **options)
        return -torch.log(torch.empty(shape, dtype=costs.dtype, device=costs.device).exponential_(generator=generator))

    def log_density(self, costs: Tensor, z: Tensor) -> Tensor:
        """Of the drawn points as a function of the costs, up to a constant, (*batch, samples)."""
        here, c = costs.detach().unsqueeze(-2), costs.unsqueeze(-2)
        if self.noise == "multiplicative":
            ratio = torch.where(here == 0, 1, here) / torch.where(here == 0, 1, c)
            z = z + torch.log(ratio) / self.scale
        else:
            z = z + self.sign * (here - c) / self.scale
        nu = z + torch.exp(-z) if self.noise == "gumbel" else z**2 / 2
        return -nu.sum(-1)


class _Draw(torch.autograd.Function):
    """Noise and the decisions under it: constants, drawn at once for everything that is batched or mapped."""

    @staticmethod
    def forward(draw: _Sampling, costs: Tensor) -> tuple[Tensor, Tensor]:
        z = draw.noise_like(costs)
        return z, decide(draw.oracle, draw.points(costs, z))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return None, None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        return None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], draw: _Sampling, costs: Tensor) -> Any:
        return _Draw.apply(draw, costs.movedim(in_dims[1], 0)), (0, 0)  # type: ignore[no-untyped-call]


class _Potential(torch.autograd.Function):
    """E[max over w of (c + scale Z)'w] (or the least), whose gradient is the mean decision."""

    generate_vmap_rule = True

    @staticmethod
    def forward(draw: _Sampling, costs: Tensor, z: Tensor, w: Tensor) -> Tensor:
        return (draw.points(costs, z) * w).sum(-1).mean(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.draw = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        costs, z, w = alive(ctx.saved_tensors)
        return None, v.unsqueeze(-1) * _mean(ctx.draw, costs, z, w), None, None

    @staticmethod
    def jvp(ctx: Any, _: Any, dot: Tensor, *__: Any) -> Tensor:
        with within_jvp(ctx, [dot]) as (costs, z, w):
            return (_mean(ctx.draw, costs, z, w) * dot).sum(-1)


def _mean(draw: _Sampling, costs: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """The mean of w, weighted by densities that are one here and whose derivatives are those of the expectation."""
    log = draw.log_density(costs, z)
    change = torch.expm1(log - log.detach()).unsqueeze(-1)  # zero here
    mean = w.mean(-2)
    if draw.samples == 1:
        return mean + (w * change).sum(-2)
    # w less the mean of the OTHER samples, which its own noise does not touch: no bias
    return mean + ((w - mean.unsqueeze(-2)) * change).sum(-2) / (draw.samples - 1)


def _checked(
    owner: str,
    costs: Tensor,
    oracle: Oracle,
    scale: float,
    samples: int,
    noise: Noise,
    generator: torch.Generator | None,
    maximize: bool,
) -> _Sampling:
    check_costs(owner, oracle, costs)
    if not 0 < scale < math.inf:
        raise ValueError(f"{owner}: scale must be positive and finite, but got {scale}; use about the costs' spread.")
    if not isinstance(samples, int) or samples < 1:
        raise ValueError(f"{owner}: samples must be an integer >= 1, but got {samples!r}.")
    if noise not in get_args(Noise):
        raise ValueError(f"{owner}: noise must be one of {get_args(Noise)}, but got {noise!r}.")
    return _Sampling(oracle, scale, samples, noise, generator, 1.0 if maximize else -1.0)


class _Noisy(nn.Module):
    """A module that draws new noise from its own stream in each call."""

    def __init__(self, oracle: Oracle, *, seed: int = 0, **options: Any) -> None:
        super().__init__()
        _refuse_generator(type(self).__name__, options)
        self.oracle, self.options, self.stream = oracle, options, random.Random(seed)


class PerturbedOptimizer(_Noisy):
    """`perturbed` as a layer from costs to mean decisions, with new noise in each call.

    Args:
        oracle: solves rows of costs, see `decide`.
        seed: of all the noise that the layer will draw.
        options: keyword arguments of `perturbed`: scale, samples, noise, maximize.

    Raises:
        TypeError: if a generator is among the options.
    """

    def forward(self, costs: Tensor) -> Tensor:
        """The mean decisions.

        Args:
            costs: shape (*batch, n).

        Returns:
            Likewise.
        """
        return perturbed(costs, self.oracle, generator=_next(self.stream, costs), **self.options)


class FenchelYoungLoss(_Noisy):
    """`fenchel_young` as a module, averaged over the batch, with new noise in each call.

    Args:
        oracle: solves rows of costs, see `decide`.
        seed: of all the noise that the loss will draw.
        options: keyword arguments of `fenchel_young`: scale, samples, noise, maximize.

    Raises:
        TypeError: if a generator is among the options.
    """

    def forward(self, predicted: Tensor, target: Tensor) -> Tensor:
        """The mean loss over a batch.

        Args:
            predicted: c_hat, shape (*batch, n).
            target: the decisions wanted, likewise.

        Returns:
            A scalar.
        """
        generator = _next(self.stream, predicted)
        return torch.mean(fenchel_young(predicted, target, self.oracle, generator=generator, **self.options))


def _refuse_generator(owner: str, options: dict[str, Any]) -> None:
    if "generator" in options:
        raise TypeError(f"{owner}: a generator cannot be copied with a module; pass seed instead.")


def _next(stream: random.Random, costs: Tensor) -> torch.Generator:
    return torch.Generator(costs.device).manual_seed(stream.getrandbits(62))
