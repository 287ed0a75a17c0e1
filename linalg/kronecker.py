"""Kronecker-factored curvature of a network's linear and convolutional layers (K-FAC), as a preconditioner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .isolation import RandomState, isolated
from .matrices import Identity
from .operator import LinearOperator
from .preconditioner import Preconditioner
from .tree import Ravel

__all__ = ["Kronecker", "KroneckerFactors"]


@dataclass(frozen=True)
class KroneckerFactors:
    """The two factors of one layer, whose block of the Fisher matrix is approximated by their Kronecker product.

    Attributes:
        inputs: A, the second moment of the layer's inputs (with a last coordinate of 1 for a bias), summed over
            positions and averaged over samples.
        outputs: G, the second moment of the losses' gradients by the layer's outputs, averaged over samples and
            positions.
    """

    inputs: Tensor
    outputs: Tensor

    @property
    def balance(self) -> Tensor:
        """pi, the square root of (tr A / dim A) / (tr G / dim G); 1 where a factor is zero."""
        mean_inputs, mean_outputs = self.inputs.diagonal().mean(), self.outputs.diagonal().mean()
        dead = (mean_inputs <= 0) | (mean_outputs <= 0)
        return torch.where(dead, 1, (mean_inputs / torch.where(dead, 1, mean_outputs)).sqrt())


class Kronecker(Preconditioner):
    """Precondition F + shift I, F the Fisher or Gauss-Newton matrix of a network, by K-FAC's Kronecker factors.

    For a linear layer with inputs a (and 1 for the bias) and gradients g of a sample's loss by its outputs, the block
    E[aa' (x) gg'] of F is replaced by A (x) G = E[aa'] (x) E[gg'], and blocks between layers by zero; a convolution
    sums aa' over the positions of its kernel and averages gg' over them. It is exact for one sample of a linear layer,
    and wherever inputs and gradients are independent. One eigendecomposition of each factor gives (A (x) G + shift
    I)^-1, and with another shift for nothing. With `split=True` it is (A + pi sqrt(shift) I)^-1 (x) (G + sqrt(shift) /
    pi I)^-1 instead, Martens & Grosse's split of the damping, which damps directions of small curvature too much: for
    parity with papers. Vectors are a module's parameters, raveled in optree's order as in `Hessian(loss, model)`.

    With the labels of the data, F is the EMPIRICAL Fisher matrix, which is not the Hessian away from a good fit; with
    labels drawn from the model's own predictions it is a Monte-Carlo estimate of the Fisher (Gauss-Newton) matrix,
    better for preconditioning. The blocks between layers that are left out may be as large as those kept (40 % of the
    norm, for a small MLP), and then CG is no faster with it than without: see `compare_preconditioners`. Samples must
    not see each other: put BatchNorm in eval mode.

    Cost: one gradient, and (in^3 + out^3) operations a layer; 2 in out (in + out) to apply. No product with F.

    Args:
        losses: losses(params) -> the loss of each sample, of shape (samples,), where params is the dict of the model's
            named parameters, for `torch.func.functional_call(model, params, x)`; every layer has to be called exactly
            once, with samples in its first dimension.
        model: a module of nn.Linear and nn.Conv2d layers (any stride, padding and dilation, groups=1).
        shift: > 0; the damping.
        split: False for shift I itself, True for Martens & Grosse's split of it over the factors.
        others: None to refuse parameters that belong to no such layer, by name; a number >= 0 that stands for their
            curvature, so that they are divided by others + shift.

    Attributes:
        into: the Ravel of the parameters.
        factors: KroneckerFactors by layer name.
        uncovered: names of the parameters that `others` stands for.

    Raises:
        TypeError: if model is not a module, or losses does not return a tensor.
        ValueError: if shift <= 0, losses does not return one loss a sample, a layer is called twice or not at all or
            not with samples first, a parameter is not covered, or a factor is not finite.

    Reference:
        Martens & Grosse 2015, Optimizing neural networks with Kronecker-factored approximate curvature, 6.3; Grosse &
        Martens 2016, A Kronecker-factored approximate Fisher matrix for convolution layers.

    Example:
        >>> from torch.func import functional_call
        >>> model, x = torch.nn.Linear(2, 1), torch.tensor([[1.0, 2.0]])
        >>> M = Kronecker(lambda p: functional_call(model, p, x).square().sum(-1) / 2, model, shift=1e-2)
        >>> M.factors[""].inputs
        tensor([[1., 2., 1.],
                [2., 4., 2.],
                [1., 2., 1.]])
    """

    def __init__(
        self,
        losses: Callable[[dict[str, Tensor]], Tensor],
        model: nn.Module,
        *,
        shift: float | Tensor,
        split: bool = False,
        others: float | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Kronecker: model must be a torch.nn.Module, but got {type(model).__name__}.")
        self.into = Ravel.of(model, "params")
        super().__init__(Identity(self.into.size, self.into.dtype, self.into.device), shift, positive=True)
        if others is not None and not 0 <= others < float("inf"):
            raise ValueError(f"Kronecker: others must be a number >= 0, or None, but got {others}.")
        self.split, self.others = split, others
        parameters = dict(model.named_parameters())
        owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
        layers = {
            name: layer
            for name, layer in model.named_modules()
            if (isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1))
            and f"{name}.weight".lstrip(".") in parameters  # it may be computed, as by weight_norm
            and all(owners[id(p)] == 1 for p in layer.parameters(recurse=False))  # or tied to another layer's
        }
        covered = {id(p) for layer in layers.values() for p in layer.parameters(recurse=False)}
        names = sorted(parameters)  # optree's order
        self.uncovered = [name for name in names if id(parameters[name]) not in covered]
        if self.uncovered and others is None:
            raise ValueError(
                f"Kronecker: no Kronecker factors for the parameters {', '.join(self.uncovered)}, which do not "
                "belong to just one nn.Linear, or nn.Conv2d with groups=1; give others=, a number that stands for "
                "their curvature."
            )
        self.factors = _collect(losses, model, layers, self.into)
        self._where = {name: i for i, name in enumerate(names)}
        self._pairs = {
            name: (*torch.linalg.eigh(f.inputs), *torch.linalg.eigh(f.outputs)) for name, f in self.factors.items()
        }
        self._prepare()

    def _prepare(self) -> None:
        """Factors are positive semidefinite by construction; with shift > 0 that is enough."""

    def fisher(self) -> LinearOperator:
        """The approximation of F itself: A (x) G for each layer, `others` for what they leave out."""
        return _Fisher(self)

    def _matvec(self, v: Tensor) -> Tensor:
        rest: Tensor = self.sigma + (0.0 if self.others is None else self.others)
        return self._apply(v, self._inverse_eigenvalues, rest.reciprocal())

    def _inverse_eigenvalues(self, name: str, a: Tensor, g: Tensor) -> Tensor:
        if not self.split:
            return (a * g + self.sigma).reciprocal()
        pi, root = self.factors[name].balance, self.sigma.sqrt()
        return ((a + pi * root) * (g + root / pi)).reciprocal()

    def _apply(self, v: Tensor, function: Callable[[str, Tensor, Tensor], Tensor], rest: Tensor) -> Tensor:
        """The function of each layer's eigenvalues, a along its inputs and g along its outputs; `rest` elsewhere."""
        leaves = self.into.split(v)
        out = [leaf * rest for leaf in leaves]
        for name, (a, inputs, g, outputs) in self._pairs.items():
            prefix = f"{name}." if name else ""
            weight, bias = self._where[f"{prefix}weight"], self._where.get(f"{prefix}bias")
            V = leaves[weight].reshape(*v.shape[:-1], g.shape[-1], a.shape[-1] - (bias is not None))
            if bias is not None:
                V = torch.cat([V, leaves[bias][..., None]], -1)
            image = outputs @ (function(name, a, g[:, None]) * (outputs.mT @ V @ inputs)) @ inputs.mT
            if bias is not None:
                image, out[bias] = image[..., :-1], image[..., -1]
            out[weight] = image.reshape(leaves[weight].shape)
        return self.into.join(out)


class _Fisher(LinearOperator):
    """A (x) G for each layer."""

    def __init__(self, factored: Kronecker) -> None:
        super().__init__(tuple(factored.shape), factored.dtype, factored.device, symmetric=True)
        self.factored = factored

    def _matvec(self, v: Tensor) -> Tensor:
        others = 0.0 if self.factored.others is None else self.factored.others
        rest = torch.full((), others, dtype=self.dtype, device=self.device)
        return self.factored._apply(v, lambda _, a, g: a.clamp_min(0) * g.clamp_min(0), rest)


def _collect(
    losses: Callable[[dict[str, Tensor]], Tensor], model: nn.Module, layers: Mapping[str, nn.Module], into: Ravel
) -> dict[str, KroneckerFactors]:
    """One evaluation with hooks on every layer, one backward pass, and the moments of what they saw."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def hook(_module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
            seen[name].append((arguments[0].detach(), output))
            return output.clone()  # a later operation in place must not change what was seen

        return hook

    def evaluate() -> Any:
        params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        with torch.enable_grad(), isolated():
            return losses(params)

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        values = RandomState.now(into.device).run(evaluate)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(values, Tensor):
        raise TypeError(f"Kronecker: losses must return a tensor, but got {type(values).__name__}.")
    if values.ndim != 1:
        raise ValueError(
            f"Kronecker: losses must return one loss a sample, of shape (samples,), but got {tuple(values.shape)}; use "
            "reduction='none', not a mean."
        )
    samples = values.shape[0]
    for name, calls in seen.items():
        if len(calls) != 1:
            raise ValueError(
                f"Kronecker: layer {name!r} must be called exactly once by losses, but was called {len(calls)} times."
            )
        if calls[0][1].ndim < 2 or calls[0][1].shape[0] != samples:
            raise ValueError(
                f"Kronecker: layer {name!r} must have the {samples} samples in its first dimension, but its output "
                f"has shape {tuple(calls[0][1].shape)}."
            )
    outputs = [calls[0][1] for calls in seen.values()]
    gradients = torch.autograd.grad(values.sum(), outputs, materialize_grads=True) if outputs else ()
    factors = {}
    for (name, calls), gradient in zip(seen.items(), gradients, strict=True):
        factors[name] = _moments(layers[name], calls[0][0], gradient)
        if not bool(torch.isfinite(factors[name].inputs).all() & torch.isfinite(factors[name].outputs).all()):
            raise ValueError(f"Kronecker: a factor of layer {name!r} is not finite; look for NaN or inf in the losses.")
    return factors


def _moments(layer: nn.Module, inputs: Tensor, gradient: Tensor) -> KroneckerFactors:
    """A and G of one layer from its inputs and the gradients by its outputs, samples first."""
    samples = inputs.shape[0]
    if isinstance(layer, nn.Conv2d):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
        a = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride).mT
        g = gradient.flatten(2).mT
    else:
        a, g = inputs, gradient
    a, g = a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])
    if layer.bias is not None:
        a = torch.cat([a, a.new_ones(len(a), 1)], -1)
    return KroneckerFactors(inputs=a.mT @ a / max(samples, 1), outputs=g.mT @ g / max(len(g), 1))
