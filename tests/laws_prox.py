"""Laws of proximal operators, over clouds of points."""

from __future__ import annotations

from collections.abc import Callable

import torch
from laws_optim import check_derivatives, check_jacobian
from torch import Tensor

from nestopt.constrained import Prox, Set
from nestopt.linalg import LinearOperator


class AsSet(Set):
    """A proximal operator at one step as if it were a projection, for the laws that both keep."""

    def __init__(self, g: Prox, step: float | Tensor) -> None:
        self.g, self.step, self.space_dims = g, step, g.space_dims

    def _project(self, x: Tensor) -> Tensor:
        return self.g.prox(x, self.step)

    def _jacobian(self, x: Tensor) -> LinearOperator:
        return self.g.jacobian(x, self.step)


def check_prox(make: Callable[..., Prox], weights: tuple[Tensor, ...], x: Tensor) -> None:
    """All laws of a convex g.

    Args:
        make: g from tensors of weights, of x's dtype.
        weights: the tensors, each of which broadcasts to one item.
        x: a cloud of points (points, *space), at which the proximal operators of the steps below are smooth.
    """
    g, step = make(*weights), 0.7
    check_minimiser(g, x, step)
    check_firmness(g, x, step)
    check_conjugate(g, x, step)
    check_items(g, x)
    poisoned = x.clone()
    poisoned[(0,) * x.ndim] = torch.nan
    check_jacobian(AsSet(g, step), x, poisoned)
    if x.dtype == torch.float64:
        check_envelope(g, x, step)
        check_smoothness(make, weights, x)


def check_minimiser(g: Prox, x: Tensor, step: float) -> None:
    """prox(x) costs no more than any point nearby or far away, and the envelope is that cost."""
    p = g.prox(x, step)
    assert (p.shape, p.dtype) == (x.shape, x.dtype)
    assert g.value(x).shape == g.envelope(x, step).shape == x.shape[: x.ndim - g.space_dims]
    scale = max(1.0, float(x.abs().max()))

    def cost(z: Tensor) -> Tensor:
        return (g.value(z) + ((z - x) ** 2).flatten(-g.space_dims).sum(-1) / (2 * step)).double()

    best = cost(p)
    slack = 100 * torch.finfo(x.dtype).eps * scale * (scale + best.abs())
    assert bool(((g.envelope(x, step).double() - best).abs() <= slack).all())
    generator = torch.Generator().manual_seed(1)
    for size in (0.0, 1e-4, 1e-2, 0.1, 1.0, 10.0):
        for _ in range(5):
            noise = size * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
            for z in (p + noise, p * (1 + noise), x + noise, 0 * x + noise):
                assert bool((cost(z) >= best - slack).all())


def check_firmness(g: Prox, x: Tensor, step: float) -> None:
    """<p - q, x - y> >= |p - q|^2 for all pairs of points."""
    p, flat = (t.flatten(-g.space_dims).double() for t in (g.prox(x, step), x))
    moved, given = p[:, None] - p, flat[:, None] - flat
    scale = max(1.0, float(flat.norm(dim=-1).max()))
    gap = (moved * (given - moved)).sum(-1)
    assert float(gap.min()) >= -100 * torch.finfo(x.dtype).eps * scale**2


def check_conjugate(g: Prox, x: Tensor, step: float) -> None:
    """q = prox of s g* at x is a subgradient of g at (x - q) / s, which is what its optimality says."""
    q = g.conjugate_prox(x, step)
    r = (x - q) / step
    generator = torch.Generator().manual_seed(2)
    r = g.prox(r, 1e-12) if x.dtype == torch.float64 else r  # back into g's domain, where rounding left it
    scale = max(1.0, float(x.abs().max()))
    for size in (1e-2, 1.0, 10.0):
        for _ in range(5):
            z = r + size * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
            rise = g.value(z) - g.value(r) - (q * (z - r)).flatten(-g.space_dims).sum(-1)
            assert float(rise.min()) >= -(1e-9 if x.dtype == torch.float64 else 1e-3) * scale**2


def check_items(g: Prox, x: Tensor) -> None:
    """Batch = loop = vmap, one step an item, and NaN stays in its item, in values too."""
    eps = 100 * torch.finfo(x.dtype).eps * max(1.0, float(x.abs().max()))
    steps = torch.linspace(0.1, 2.0, x.shape[0], dtype=x.dtype)
    p, values = g.prox(x, steps), g.value(x)
    for one, step, mine, value in zip(x, steps, p, values, strict=True):
        assert float((g.prox(one, step) - mine).abs().max()) <= eps
        assert float((g.prox(one, float(step)) - mine).abs().max()) <= eps
        assert torch.allclose(g.value(one), value, rtol=1e-5 if x.dtype == torch.float32 else 1e-12)
    for function in (g.prox, g.envelope, g.envelope_gradient, g.conjugate_prox):
        assert float((torch.func.vmap(function)(x, steps) - function(x, steps)).abs().max()) <= eps
    half = x.reshape(2, -1, *x.shape[1:])
    assert float((g.prox(half, steps.reshape(2, -1)) - p.reshape(half.shape)).abs().max()) <= eps
    poisoned = x.clone()
    poisoned[(0,) * x.ndim] = torch.nan
    answer, value = g.prox(poisoned, steps), g.value(poisoned)
    assert bool(answer[(0,) * x.ndim].isnan())
    assert bool(value[0].isnan())
    assert torch.equal(answer[1:], p[1:])
    assert torch.equal(value[1:], values[1:])
    wrong = steps.clone()
    wrong[0] = -1.0
    answer = g.prox(x, wrong)
    assert torch.equal(answer[1:], p[1:])
    assert bool(answer[0].isnan().any())


def check_envelope(g: Prox, x: Tensor, step: float) -> None:
    """The envelope's gradient is (x - prox) / step, by differences and automatically; its value is below g's."""
    assert bool((g.envelope(x, step) <= g.value(x) + 1e-12).all())
    gradient = g.envelope_gradient(x, step)
    assert torch.allclose(gradient, (x - g.prox(x, step)) / step, rtol=1e-10, atol=1e-10)
    y = x.clone().requires_grad_()
    (automatic,) = torch.autograd.grad(g.envelope(y, step).sum(), y)
    assert float((automatic - gradient).abs().max()) <= 1e-9
    h = 1e-5
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    differences = (g.envelope(x + h * direction, step) - g.envelope(x - h * direction, step)) / (2 * h)
    exact = (gradient * direction).flatten(-g.space_dims).sum(-1)
    assert torch.allclose(differences, exact, rtol=1e-6, atol=1e-6)


def check_smoothness(make: Callable[..., Prox], weights: tuple[Tensor, ...], x: Tensor) -> None:
    """First and second derivatives in the point, the step and the weights, in both modes."""
    steps = torch.tensor([0.7, 0.4], dtype=x.dtype)
    check_derivatives(lambda z, s, *w: make(*w).prox(z, s), (x[:2], steps, *weights), (x[0], steps[0], *weights))
    envelope = (x[0], steps[0], *weights)
    check_derivatives(lambda z, s, *w: make(*w).envelope(z, s), envelope)
