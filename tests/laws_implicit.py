"""Laws of layers: what an implicitly differentiated function must share with its closed form.

A case is a layer and an explicit formula of the same function, both of the same tensors; torch's own derivatives of
the formula are the truth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from nestopt import implicit
from nestopt.linalg import CG, GMRES, LU, LinearSolver

ATOL = 1e-9


@dataclass(frozen=True)
class Layer:
    """A layer, the formula that it must equal, and where to look."""

    name: str
    layer: Callable[..., Tensor]
    exact: Callable[..., Tensor]
    example: Callable[[torch.Generator], tuple[Tensor, ...]]

    def __str__(self) -> str:
        return self.name

    @property
    def along_directions(self) -> bool:
        """Whether differences are taken along random directions, not for every entry: check_transforms has them all."""
        return self.name != "root-LU"

    def scalar(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A scalar function of the layer's output, curved in it."""
        return lambda *theta: (function(*theta) ** 3).sum()


def _matrix(g: torch.Generator, n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64) + 0.4 * torch.randn(n, n, generator=g, dtype=torch.float64)


def _vector(g: torch.Generator, n: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=g, dtype=torch.float64)


def _detached(exact: Callable[..., Tensor], theta: tuple[Tensor, ...]) -> Tensor:
    return exact(*(t.detach() for t in theta)).detach()


# The formulas invert matrices: torch 2.13 differentiates a jvp of torch.linalg.solve wrongly.
# root: a sinh(W y) = b, whose Jacobian diag(a cosh(W y)) W is not symmetric
def _root_exact(W: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.inv(W) @ torch.asinh(b / a)


def root_layer(solver: LinearSolver | None) -> Callable[..., Tensor]:
    def layer(W: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return implicit.root(
            lambda y, W, a, b: a * torch.sinh(W @ y) - b, _detached(_root_exact, (W, a, b)), W, a, b, solver=solver
        )

    return layer


# fixed point: y = sinh(W asinh(y) + b)
def _fixed_point_exact(W: Tensor, b: Tensor) -> Tensor:
    return torch.sinh(torch.linalg.inv(torch.eye(len(b), dtype=b.dtype) - W) @ b)


def fixed_point_layer(solver: LinearSolver | None) -> Callable[..., Tensor]:
    def layer(W: Tensor, b: Tensor) -> Tensor:
        return implicit.fixed_point(
            lambda y, W, b: torch.sinh(W @ torch.asinh(y) + b), _detached(_fixed_point_exact, (W, b)), W, b,
            solver=solver,
        )  # fmt: skip

    return layer


# argmin of sum(c cosh(W y - b)) - t'W y
def _argmin_exact(W: Tensor, b: Tensor, c: Tensor, t: Tensor) -> Tensor:
    return torch.linalg.inv(W) @ (b + torch.asinh(t / c))


def argmin_layer(solver: LinearSolver | None) -> Callable[..., Tensor]:
    def layer(W: Tensor, b: Tensor, c: Tensor, t: Tensor) -> Tensor:
        def objective(y: Tensor, W: Tensor, b: Tensor, c: Tensor, t: Tensor) -> Tensor:
            return (c * torch.cosh(W @ y - b)).sum() - t @ (W @ y)

        return implicit.argmin(objective, _detached(_argmin_exact, (W, b, c, t)), W, b, c, t, solver=solver)

    return layer


def _root_example(g: torch.Generator) -> tuple[Tensor, ...]:
    return _matrix(g, 2), _vector(g, 2, 0.5, 1.5), _vector(g, 2)


def _fixed_point_example(g: torch.Generator) -> tuple[Tensor, ...]:
    return 0.3 * _matrix(g, 2), _vector(g, 2)


def _argmin_example(g: torch.Generator) -> tuple[Tensor, ...]:
    return _matrix(g, 2), _vector(g, 2), _vector(g, 2, 0.5, 1.5), _vector(g, 2)


GENERAL, DEFINITE = GMRES(rtol=1e-13), CG(rtol=1e-13)
LAYERS = [
    Layer("root-LU", root_layer(LU()), _root_exact, _root_example),
    Layer("root-GMRES", root_layer(GENERAL), _root_exact, _root_example),
    Layer("fixed_point-LU", fixed_point_layer(LU()), _fixed_point_exact, _fixed_point_example),
    Layer("fixed_point-GMRES", fixed_point_layer(GENERAL), _fixed_point_exact, _fixed_point_example),
    Layer("argmin-LU", argmin_layer(LU()), _argmin_exact, _argmin_example),
    Layer("argmin-CG", argmin_layer(DEFINITE), _argmin_exact, _argmin_example),
]


def agree(found: Tensor | tuple[Tensor, ...], wanted: Tensor | tuple[Tensor, ...], atol: float = ATOL) -> None:
    """Equal shapes, and values that differ by no more than atol times the largest."""
    if isinstance(found, Tensor):
        found, wanted = (found,), (wanted,)
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        worst = float((a - b).abs().max())
        assert worst <= atol * max(1.0, float(b.abs().max())), worst


def check_gradcheck(case: Layer, theta: tuple[Tensor, ...], g: torch.Generator) -> None:
    """First derivatives, reverse and forward, batched by torch's older vmap, against differences."""
    inputs = tuple(t.clone().requires_grad_() for t in theta)
    options = {"check_forward_ad": True, "fast_mode": case.along_directions}
    assert torch.autograd.gradcheck(
        case.layer, inputs, check_batched_grad=True, check_batched_forward_grad=True, **options
    )


def check_gradgradcheck(case: Layer, theta: tuple[Tensor, ...], g: torch.Generator) -> None:
    """Second derivatives likewise, reverse over reverse and forward over reverse."""
    inputs = tuple(t.clone().requires_grad_() for t in theta)
    options = {"check_fwd_over_rev": True, "fast_mode": case.along_directions}
    assert torch.autograd.gradgradcheck(case.layer, inputs, check_batched_grad=not case.along_directions, **options)


def check_third_order(case: Layer, theta: tuple[Tensor, ...], g: torch.Generator) -> None:
    """Third derivatives, by three nested backward passes and by torch.func."""
    last = len(theta) - 1
    third = jacrev(jacrev(jacrev(case.scalar(case.exact), last), last), last)(*theta)
    agree(jacrev(jacrev(jacrev(case.scalar(case.layer), last), last), last)(*theta), third, 1e-7)
    inputs = [t.clone().requires_grad_() for t in theta]
    value = case.scalar(case.layer)(*inputs)
    (first,) = torch.autograd.grad(value, inputs[last], create_graph=True)
    (second,) = torch.autograd.grad(first[0], inputs[last], create_graph=True)
    agree(torch.autograd.grad(second[1], inputs[last])[0], third[0, 1], 1e-7)


def check_transforms(case: Layer, theta: tuple[Tensor, ...], g: torch.Generator) -> None:
    """grad, vjp, jvp, jacrev, jacfwd and every second-order composition equal those of the formula."""
    every = tuple(range(len(theta)))
    f, e = case.layer, case.exact
    agree(f(*theta), e(*theta))
    agree(grad(case.scalar(f), every)(*theta), grad(case.scalar(e), every)(*theta))
    v = _vector(g, len(theta[-1]))
    agree(vjp(f, *theta)[1](v), vjp(e, *theta)[1](v))
    dots = tuple(torch.randn(t.shape, generator=g, dtype=t.dtype) for t in theta)
    for ours, truth in zip(jvp(f, theta, dots), jvp(e, theta, dots), strict=True):
        agree(ours, truth)
    truth = jacrev(e, every)(*theta)
    agree(jacrev(f, every)(*theta), truth)
    agree(jacfwd(f, every)(*theta), truth)
    for i in every:
        truth = jacrev(jacrev(case.scalar(e), i), i)(*theta)
        for outer, inner in ((jacfwd, jacrev), (jacrev, jacrev), (jacrev, jacfwd), (jacfwd, jacfwd)):
            agree(outer(inner(case.scalar(f), i), i)(*theta), truth, 1e-8)


def check_vmap(case: Layer, theta: tuple[Tensor, ...], g: torch.Generator) -> None:
    """vmap equals a loop, of values and of derivatives, nested, with shared tensors whose gradients are sums."""
    batch = [case.example(g) for _ in range(3)]
    stacked = tuple(torch.stack(column) for column in zip(*batch, strict=True))
    f, h = case.layer, case.scalar(case.layer)
    every = tuple(range(len(theta)))
    agree(vmap(f)(*stacked), torch.stack([f(*item) for item in batch]), 1e-10)
    loop = [grad(h, every)(*item) for item in batch]
    agree(vmap(grad(h, every))(*stacked), tuple(torch.stack(column) for column in zip(*loop, strict=True)), 1e-10)
    last = len(theta) - 1
    agree(vmap(hessian(h, last))(*stacked), torch.stack([hessian(h, last)(*item) for item in batch]), 1e-10)
    # the first tensor shared: the gradient of the sum is the sum of the gradients
    others, dims = stacked[1:], (None, *(0,) * last)
    shared = [(theta[0], *item[1:]) for item in batch]
    total = sum(grad(h)(*item) for item in shared)
    agree(grad(lambda W: vmap(h, dims)(W, *others).sum())(theta[0]), total, 1e-10)
    leaf = theta[0].clone().requires_grad_()
    vmap(h, dims)(leaf, *others).sum().backward()
    agree(leaf.grad, total, 1e-10)
    agree(vmap(grad(h, last), dims)(theta[0], *others), torch.stack([grad(h, last)(*item) for item in shared]), 1e-10)
    # nested: every W with every other
    nested = vmap(lambda W: vmap(grad(h, last), dims)(W, *others))(stacked[0])
    wanted = [torch.stack([grad(h, last)(W, *item[1:]) for item in batch]) for W in stacked[0]]
    agree(nested, torch.stack(wanted), 1e-10)
    # the mapped dimension need not come first
    agree(
        vmap(f, in_dims=(2, *(1,) * last))(stacked[0].movedim(0, 2), *(s.mT for s in others)), vmap(f)(*stacked), 1e-10
    )


LAWS = [check_gradcheck, check_gradgradcheck, check_third_order, check_transforms, check_vmap]
