"""Fisher matrices by products: empirical, exact, by Monte Carlo; and per-sample gradients as a block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import optree
import torch
from torch import Tensor
from torch.distributions import Distribution

from .autodiff import evaluate
from .chunks import Blocks, ChunkSize, check_chunk_size
from .curvature import Jacobian, on_batch
from .data import BatchSum, check_reduction
from .isolation import RandomState, isolated
from .operator import LinearOperator
from .tree import Ravel, named_tree

__all__ = ["EmpiricalFisher", "Fisher", "MonteCarloFisher", "per_sample_gradients"]


def per_sample_gradients(
    loss: Callable[[Any, Any], Tensor], params: Any, data: Any, *, chunk_size: int | None = None
) -> Tensor:
    """The gradient of every sample's loss, as the rows of one matrix (m, n).

    loss(params, sample) is vmapped over the first dimension of the tensors of data. The rows are what `MFAC` and an
    empirical Fisher are made of: F = G' G / m. Each sample draws its own random numbers.

    Cost: m gradients; memory of m n numbers and of the graphs of chunk_size samples.

    Args:
        loss: loss(params, sample) -> scalar of ONE sample, without a batch dimension (`x[None]` for layers that want
            one).
        params: pytree of floating tensors, or a module, whose named parameters are then passed as a dict.
        data: pytree of tensors with the m samples in their first dimension.
        chunk_size: samples of a vmapped pass; None for all, 32 to 256 for networks.

    Returns:
        The gradients, (m, n), raveled in optree's order.

    Raises:
        ValueError: if chunk_size is not a positive integer, the loss no scalar, or data do not hold samples.

    Example:
        >>> x, y = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0.0, 1.0])
        >>> per_sample_gradients(lambda w, s: (w @ s[0] - s[1]) ** 2 / 2, torch.zeros(2), (x, y))
        tensor([[ 0.,  0.],
                [-3., -4.]])
    """
    if chunk_size is not None and not (isinstance(chunk_size, int) and chunk_size >= 1):
        raise ValueError(
            f"per_sample_gradients: chunk_size must be a positive integer or None, but got {chunk_size!r}; use e.g. "
            "chunk_size=64."
        )
    params = named_tree(params)
    into = Ravel.of(params, "params")
    point = [leaf.detach() for leaf in into.leaves(params)]

    counts = {leaf.shape[:1] for leaf in optree.tree_leaves(data) if isinstance(leaf, Tensor)}
    if len(counts) != 1 or counts == {torch.Size()}:
        raise ValueError(
            "per_sample_gradients: the tensors of data must have the samples in their first dimension, as many each, "
            f"but their first dimensions are {sorted(map(tuple, counts))}."
        )
    if counts == {torch.Size((0,))}:  # vmap cannot take nothing
        return torch.zeros(0, into.size, dtype=into.dtype, device=into.device)

    def slope(sample: Any) -> Tensor:
        def scalar(leaves: list[Tensor]) -> Tensor:
            return evaluate(lambda: loss(into.build(leaves), sample), name="per_sample_gradients: loss")

        return into.join(torch.func.grad(scalar)(point))

    with isolated():
        rows: Tensor = torch.func.vmap(slope, randomness="different", chunk_size=chunk_size)(data)
    return rows.detach()


class EmpiricalFisher(LinearOperator):
    """The empirical Fisher matrix F = (1/m) sum_i g_i g_i', g_i the gradient of sample i's loss, by products.

    With J the Jacobian (m, n) of the vector of losses, F = J'J / m: no gradient is stored, and any model will do that
    can be evaluated on a batch. It is not the Hessian, nor the Fisher matrix, away from a model that fits its data.
    Use `J.T @ torch.eye(m)` of `F.jacobian`, or `per_sample_gradients`, for the gradients themselves.

    Cost: two passes along a kept graph a product, about one gradient. With data: see GaussNewton.

    Args:
        losses: losses(params) -> (m,), one loss a sample (reduction="none"), of any shape; with data, losses(params,
            batch).
        params: pytree of floating tensors, or a module, whose named parameters are then passed as a dict.
        chunk_size: vectors of a block in one vmapped pass, or AutoChunk(); None for one pass a vector.
        data: iterable of batches; see Hessian.
        reduction: "mean" divides by the number of losses m, "sum" does not.
        keep_graphs: read data once and hold the graphs of every batch.
        definite: see LinearOperator; True where the gradients span the space.

    Attributes:
        jacobian: J, where there is no data.
        value: the reduced losses.
        gradient: the reduced gradient.

    Raises:
        ValueError: see Jacobian; if reduction is neither "mean" nor "sum".

    Example:
        >>> x, y = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0.0, 1.0])
        >>> EmpiricalFisher(lambda w: (x @ w - y) ** 2 / 2, torch.zeros(2)).to_dense()
        tensor([[4.5000, 6.0000],
                [6.0000, 8.0000]])
    """

    def __init__(
        self,
        losses: Callable[..., Tensor],
        params: Any,
        *,
        chunk_size: ChunkSize = None,
        data: Iterable[Any] | None = None,
        reduction: str = "mean",
        keep_graphs: bool = False,
        definite: bool | None = None,
    ) -> None:
        name = type(self).__name__
        check_reduction(name, reduction)
        params = named_tree(params)
        self.into = Ravel.of(params, "params")
        n = self.into.size
        super().__init__((n, n), self.into.dtype, self.into.device, symmetric=True, definite=definite)
        self._sum: BatchSum | None = None
        if data is not None:
            point = self.into.copy(params)

            def make(batch: Any, _: int) -> EmpiricalFisher:
                on = partial(on_batch, losses, batch)
                return EmpiricalFisher(on, point, chunk_size=chunk_size, reduction=reduction)

            self._sum = BatchSum(name, make, data, self.into, reduction=reduction, weigh=_samples, keep=keep_graphs)
            self.value, self.unused = self._sum.value, self._sum.unused
            return
        self.jacobian = Jacobian(losses, params, chunk_size=chunk_size)
        self.samples = self.jacobian.shape[0]
        self._divisor = max(1, self.samples) if reduction == "mean" else 1
        self.value, self.unused = self.jacobian.value.sum() / self._divisor, self.jacobian.unused

    @cached_property
    def gradient(self) -> Tensor:
        """The reduced gradient."""
        if self._sum is not None:
            return self._sum.gradient
        return self.jacobian._rmatvec(torch.ones_like(self.jacobian.value)) / self._divisor

    def _mark(self) -> Tensor:
        return self.gradient

    def _share(self, blocks: tuple[Blocks, ...] | None) -> tuple[Blocks, ...]:
        return self.jacobian.operator.share(blocks)

    def _matvec(self, v: Tensor) -> Tensor:
        if self._sum is not None:
            return self._sum._matvec(v)
        return self.jacobian._rmatvec(self.jacobian._matvec(v)) / self._divisor


class Fisher(LinearOperator):
    """The Fisher matrix F = (1/m) sum_i J_i' E_y[s_i(y) s_i(y)'] J_i of a model's distribution, exactly, by products.

    J_i is the Jacobian of sample i's outputs z_i = model(params)_i, s_i(y) = d log p(y | z_i) / dz_i, and y is drawn
    from p(y | z_i) itself, so that no labels enter. The expectation is the sum over the distribution's finite support;
    for others see MonteCarloFisher. Where z are natural parameters (the logits of a categorical or of Bernoulli
    variables) F is the GaussNewton matrix of the negative log likelihood.

    Every element of the distribution's batch_shape is one independent unit; m counts them.

    Cost: two passes along the model's kept graph a product; c^2 numbers a unit for c classes.

    Args:
        model: model(params) -> outputs, one tensor whose first dimensions are the distribution's batch_shape.
        distribution: distribution(outputs) -> a torch.distributions.Distribution.
        params: pytree of floating tensors, or a module, whose named parameters are then passed as a dict.
        chunk_size: vectors of a block in one vmapped pass, or AutoChunk(); None for one pass a vector.
        data: iterable of batches; then model(params, batch) and distribution(outputs). See Hessian.
        reduction: "mean" divides by the number of units m, "sum" does not.
        keep_graphs: read data once and hold the graphs of every batch.
        definite: see LinearOperator.

    Attributes:
        jacobian: of the model, where there is no data.
        value: zero: a Fisher matrix belongs to no labels, so that neither loss nor gradient is known.

    Raises:
        TypeError: if the outputs are not one tensor, distribution returns something else, or its support is infinite.
        ValueError: if the outputs do not begin with the distribution's batch_shape.

    Reference:
        Martens 2020, New insights and perspectives on the natural gradient method, equations 9 and 30.

    Example:
        >>> from torch.distributions import Categorical
        >>> F = Fisher(lambda z: z, lambda z: Categorical(logits=z), torch.zeros(1, 2))
        >>> F.to_dense()
        tensor([[ 0.2500, -0.2500],
                [-0.2500,  0.2500]])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        distribution: Callable[[Tensor], Distribution],
        params: Any,
        *,
        chunk_size: ChunkSize = None,
        data: Iterable[Any] | None = None,
        reduction: str = "mean",
        keep_graphs: bool = False,
        definite: bool | None = None,
    ) -> None:
        name = type(self).__name__
        check_reduction(name, reduction)
        check_chunk_size(name, chunk_size)
        params = named_tree(params)
        self.into = Ravel.of(params, "params")
        n = self.into.size
        super().__init__((n, n), self.into.dtype, self.into.device, symmetric=True, definite=definite)
        self._sum: BatchSum | None = None
        if data is not None:
            point = self.into.copy(params)

            def make(batch: Any, index: int) -> Fisher:
                on = partial(on_batch, model, batch)
                return self._of_batch(on, distribution, point, index, chunk_size=chunk_size, reduction=reduction)

            self._sum = BatchSum(name, make, data, self.into, reduction=reduction, weigh=_samples, keep=keep_graphs)
            self.value, self.unused = self._sum.value, self._sum.unused
            return
        self.jacobian = Jacobian(model, params, chunk_size=chunk_size)
        outputs = self.jacobian.out.unflatten(self.jacobian.value)
        if not isinstance(outputs, Tensor):
            raise TypeError(f"{name}: model must return one tensor, but it returned a {type(outputs).__name__}.")
        law, z = self._law(distribution, outputs)
        labels, weights = self._labels(law)
        units = law.batch_shape
        if z.shape[: len(units)] != units:
            raise ValueError(
                f"{name}: the outputs must begin with the distribution's batch_shape {tuple(units)}, but they have "
                f"shape {tuple(z.shape)}."
            )
        self.samples, self.value, self.unused = units.numel(), self.jacobian.value.new_zeros(()), self.jacobian.unused
        self._divisor = max(1, self.samples) if reduction == "mean" else 1
        each = z.numel() // max(1, self.samples)
        scores = torch.stack([_score(law, z, y) for y in labels]).reshape(len(labels), self.samples, each)
        self._scores = scores * weights.reshape(len(labels), self.samples, 1).sqrt()  # (S, m, c)

    def _of_batch(self, model: Any, distribution: Any, point: Any, index: int, **options: Any) -> Fisher:
        """The operator of one batch."""
        return Fisher(model, distribution, point, **options)

    def _law(self, distribution: Callable[[Tensor], Distribution], outputs: Tensor) -> tuple[Distribution, Tensor]:
        """The distribution, at outputs that require grad."""
        with torch.inference_mode(False), torch.enable_grad():
            z = outputs.detach().clone().requires_grad_()
            law = distribution(z)
        if not isinstance(law, Distribution):
            raise TypeError(
                f"{type(self).__name__}: distribution must return a torch.distributions.Distribution, but it returned "
                f"a {type(law).__name__}; use e.g. lambda z: torch.distributions.Categorical(logits=z)."
            )
        return law, z

    def _labels(self, law: Distribution) -> tuple[Tensor, Tensor]:
        """Labels (S, *units, ...) and the weight of each, (S, *units)."""
        try:
            labels = law.enumerate_support()
        except NotImplementedError as error:
            raise TypeError(
                f"Fisher: the support of {type(law).__name__} cannot be enumerated; use MonteCarloFisher, or "
                "GaussNewton with the negative log likelihood as its loss."
            ) from error
        with torch.no_grad():
            return labels, law.log_prob(labels).exp()

    @property
    def gradient(self) -> Tensor:
        """Zero: the expected score."""
        return torch.zeros(self.shape[-1], dtype=self.dtype, device=self.device)

    def _mark(self) -> Tensor:
        return self.jacobian.value

    def _share(self, blocks: tuple[Blocks, ...] | None) -> tuple[Blocks, ...]:
        return self.jacobian.operator.share(blocks)

    def _matvec(self, v: Tensor) -> Tensor:
        if self._sum is not None:
            return self._sum._matvec(v)
        u = self.jacobian._matvec(v)
        _, m, c = self._scores.shape
        weights = torch.einsum("smc,...mc->...sm", self._scores, u.reshape(*u.shape[:-1], m, c))
        w = torch.einsum("smc,...sm->...mc", self._scores, weights).reshape(u.shape)
        return self.jacobian._rmatvec(w) / self._divisor


class MonteCarloFisher(Fisher):
    """The Fisher matrix with the expectation over y replaced by a mean over labels drawn from the model itself.

    Labels are drawn once, here: the operator is one fixed semidefinite matrix, an unbiased estimate of Fisher whose
    error falls as 1 / sqrt(samples). Any distribution will do that can be sampled and whose log_prob has a derivative.

    Cost: as Fisher, with `samples` in the place of the number of classes.

    Args:
        model: see Fisher.
        distribution: see Fisher.
        params: see Fisher.
        samples: labels drawn a unit; 1 is common in optimisers.
        generator: of the labels; torch's global generators are left alone.
        options: chunk_size, data, reduction, keep_graphs and definite, see Fisher. With data, each batch's labels are
            the same at every pass.

    Raises:
        TypeError: if generator is not a torch.Generator; see Fisher.
        ValueError: if samples is not a positive integer.

    Example:
        >>> from torch.distributions import Normal
        >>> g = torch.Generator().manual_seed(0)
        >>> F = MonteCarloFisher(lambda z: z, lambda z: Normal(z, 1.0), torch.zeros(1), samples=10000, generator=g)
        >>> bool((F.to_dense() - 1).abs() < 0.1)
        True
    """

    def __init__(
        self,
        model: Callable[..., Any],
        distribution: Callable[[Tensor], Distribution],
        params: Any,
        *,
        samples: int = 1,
        generator: torch.Generator,
        **options: Any,
    ) -> None:
        if not isinstance(samples, int) or samples < 1:
            raise ValueError(f"MonteCarloFisher: samples must be a positive integer, but got {samples!r}.")
        if not isinstance(generator, torch.Generator):
            raise TypeError(
                f"MonteCarloFisher: generator must be a torch.Generator, but got {type(generator).__name__}; use "
                "torch.Generator().manual_seed(0)."
            )
        self.draws = samples
        self._seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        super().__init__(model, distribution, params, **options)

    def _of_batch(self, model: Any, distribution: Any, point: Any, index: int, **options: Any) -> Fisher:
        generator = torch.Generator().manual_seed(self._seed + index)
        return MonteCarloFisher(model, distribution, point, samples=self.draws, generator=generator, **options)

    def _labels(self, law: Distribution) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), _seeded(self.device, self._seed):  # distributions take no generator
            labels = law.sample(torch.Size((self.draws,)))
        return labels, torch.full((self.draws, *law.batch_shape), 1 / self.draws, dtype=self.dtype, device=self.device)


def _score(law: Distribution, z: Tensor, y: Tensor) -> Tensor:
    """D log p(y | z) / dz, unit by unit: no unit's probability depends on another's outputs."""
    with torch.enable_grad():
        total = law.log_prob(y).sum()
    return torch.autograd.grad(total, z, retain_graph=True)[0]


def _samples(part: Any, _batch: Any) -> int:
    return int(part.samples)


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    before = RandomState.now(device)
    try:
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
    finally:
        before.set()
