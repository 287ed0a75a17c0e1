"""The derivative of a root as autograd functions: any order, forward and reverse, under vmap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .border import Border, Equation, Operands
from .options import Options
from .pullback import pairing, pull, restrict
from .recomputation import recomputed
from .system import System
from .transforms import (
    alive,
    forward_mode,
    over_batched_gradients,
    recording,
    tracked,
    transformed,
    untraced,
    within_jvp,
)
from .unroll import Unroll

__all__ = ["attach_derivative"]


class _Root(torch.autograd.Function):
    """y as a function of theta by R(y, theta) = 0: with A = dR/dy and B = dR/dtheta, dy = -A^{-1} B dtheta."""

    @staticmethod
    def forward(system: System, y: Tensor, *theta: Tensor) -> Tensor:
        return system.admit(y.clone(), theta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)  # what has no tangent is not differentiated
        ctx.system = inputs[0]
        # the OUTPUT is saved: it comes back attached to this node, so that a second derivative sees y move with theta
        ctx.save_for_backward(output, *inputs[2:])
        ctx.save_for_forward(output, *inputs[2:])

    @staticmethod
    def backward(ctx: Any, v: Tensor | None) -> Any:
        if v is None:
            return (None,) * len(ctx.needs_input_grad)
        system, (y, *theta) = ctx.system, alive(ctx.saved_tensors)
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        with recording([y, *theta, v]):
            u = _solve(system, True, -v, y, *theta)  # A'u = -v
            if not transformed() and not torch.is_grad_enabled():
                pulled = system.at(y, theta).jacobian.pull(u, wanted)
            else:
                residual = restrict(system.residual, [y, *theta], [i + 1 for i in wanted])
                pulled = pull(residual, [theta[i] for i in wanted], [u])
        return None, None, *_scatter(pulled, wanted, len(theta))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        given, dots = _given((None, *tangents[2:]))
        with within_jvp(ctx, dots) as operands:
            residual = restrict(ctx.system.residual, operands, given)
            # B theta_dot, as the transpose of s -> B's: many operations have no forward mode
            inputs = [operands[i] for i in given]
            (moved,) = pull(lambda s: tuple(pull(residual, inputs, [s])), [torch.zeros_like(operands[0])], dots)
            return _solve(ctx.system, False, -moved, *operands)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], system: System, y: Tensor, *theta: Tensor
    ) -> tuple[Tensor, int]:
        return _apply(_Root, *_more_systems(info, in_dims[1:], system, y, theta)), 0


class _LinearSolve(torch.autograd.Function):
    """u with A(y, theta) u = b, or with A' for A; its derivatives are again such solves."""

    @staticmethod
    def forward(system: System, transposed: bool, b: Tensor, y: Tensor, *theta: Tensor) -> Tensor:
        return system.solve(transposed, b, y, theta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.system, ctx.transposed = inputs[:2]
        ctx.save_for_backward(output, *inputs[3:])
        ctx.save_for_forward(output, *inputs[3:])

    @staticmethod
    def backward(ctx: Any, v: Tensor | None) -> Any:
        if v is None:
            return (None,) * len(ctx.needs_input_grad)
        system, transposed, (u, *operands) = ctx.system, ctx.transposed, alive(ctx.saved_tensors)
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[3:]) if needed]
        with recording([u, *operands, v]):
            w = _solve(system, not transposed, v, *operands)
            # v'du = w'(db - dA u), and u'(db - dA w) for the transpose
            left, right = (u, w) if transposed else (w, u)
            pulled = pairing(system.residual, operands, wanted, left, -right)
        return None, None, w, *_scatter(pulled, wanted, len(operands))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        system, transposed, (given, dots) = ctx.system, ctx.transposed, _given(tangents[3:])
        with within_jvp(ctx, dots if tangents[2] is None else [*dots, tangents[2]]) as (u, *operands):
            b_dot = torch.zeros_like(u) if tangents[2] is None else tangents[2]

            def transpose(s: Tensor) -> tuple[Tensor, ...]:  # of (y_dot, theta_dot) -> A_dot u
                left, right = (u, s) if transposed else (s, u)
                return tuple(pairing(system.residual, operands, given, left, right))

            if given:
                b_dot = b_dot - pull(transpose, [torch.zeros_like(u)], dots)[0]
            return _solve(system, transposed, b_dot, *operands)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        system: System,
        transposed: bool,
        b: Tensor,
        y: Tensor,
        *theta: Tensor,
    ) -> tuple[Tensor, int]:
        b_dim, *dims = in_dims[2:]
        sides = b.ndim - (b_dim is not None) - (y.ndim - (dims[0] is not None))
        same = all(dim is None for dim in dims)  # then it is one more right-hand side of the same systems, in front
        place = 0 if same else sides
        if b_dim is None:
            b = b.unsqueeze(place).expand(*b.shape[:place], info.batch_size, *b.shape[place:])
        else:
            b = b.movedim(b_dim, place)
        batched, *operands = [system, y, *theta] if same else _more_systems(info, dims, system, y, theta)
        return _apply(_LinearSolve, batched, transposed, b, *operands), place


class _Held(torch.autograd.Function):
    """y as the start of unrolled steps: nothing passes it, but what arrives is measured.

    theta is an input for one reason: a node that needs no gradient is not visited by a backward pass.
    """

    @staticmethod
    def forward(system: System, y: Tensor, *theta: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.system = inputs[0]
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None) -> Any:
        if v is not None:
            with torch.no_grad():
                over_batched_gradients(lambda rows: _apply(_Noted, ctx.system, rows), v.detach())
        return (None,) * len(ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        return torch.zeros_like(alive(ctx.saved_tensors)[0])

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], system: System, y: Tensor, *theta: Tensor
    ) -> tuple[Tensor, int]:
        return _apply(_Held, *_more_systems(info, in_dims[1:], system, y, theta)), 0


class _Noted(torch.autograd.Function):
    """Records a cotangent's size, outside of every transform."""

    @staticmethod
    def forward(system: System, v: Tensor) -> Tensor:
        system.note(v)
        return torch.zeros_like(v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], system: System, v: Tensor) -> tuple[Tensor, int]:
        return _apply(_Noted, system, v.movedim(in_dims[1] or 0, 0)), 0


class _Sizes(torch.autograd.Function):
    """The step sizes at a point of plain tensors; they have no derivative."""

    @staticmethod
    def forward(system: System, y: Tensor, *theta: Tensor) -> Tensor:
        return system.step_sizes(y, theta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], system: System, y: Tensor, *theta: Tensor
    ) -> tuple[Tensor, int]:
        return _apply(_Sizes, *_more_systems(info, in_dims[1:], system, y, theta)), 0


class _Replaced(torch.autograd.Function):
    """y with the derivative of z; where `usable` is not finite, the derivative of whatever asks for it is NaN."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, usable: Tensor, z: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        return None, None, _blanked(alive(ctx.saved_tensors)[0], v)

    @staticmethod
    def jvp(ctx: Any, y_dot: Tensor | None, usable_dot: Tensor | None, z_dot: Tensor) -> Tensor:
        with within_jvp(ctx, [z_dot]) as (usable,):
            return _blanked(usable, z_dot)


def _blanked(usable: Tensor, v: Tensor) -> Tensor:
    return torch.where(torch.isfinite(usable) | (v == 0), v, torch.nan)


def _unrolled(system: System, operands: Operands, unroll: Unroll) -> Tensor:
    """y, certified, with the derivative of further steps from it."""
    held = [tensor.detach() for tensor in operands.theta]
    y = _apply(_Root, system, operands.y, *held)
    is_map = system.border.equation.is_map
    sizes = y.new_ones(y.shape[:-1]) if is_map else _apply(_Sizes, system, operands.y, *held)
    usable = (sizes + 0 * y.detach().sum(-1))[..., None]
    sizes = torch.where(torch.isfinite(sizes), sizes, 0)
    z = _apply(_Held, system, y.detach(), *operands.theta)

    def run(z: Tensor, sizes: Tensor, *theta: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            z = z - sizes[..., None] * system.residual(z, *theta)
        return z

    segment = unroll.checkpoint or unroll.steps
    for done in range(0, unroll.steps, segment):
        steps = partial(run, steps=min(segment, unroll.steps - done))
        if unroll.checkpoint is None:
            z = steps(z, sizes, *operands.theta)
        else:
            ((z,), _) = recomputed(lambda *tensors, steps=steps: ((steps(*tensors),), ()), z, sizes, *operands.theta)
    return _apply(_Replaced, y, usable, z)


def _apply(function: type[torch.autograd.Function], *inputs: Any) -> Tensor:
    return function.apply(*inputs)  # type: ignore[no-any-return, no-untyped-call]


def _solve(system: System, transposed: bool, b: Tensor, *operands: Tensor) -> Tensor:
    return over_batched_gradients(lambda rows: _apply(_LinearSolve, system, transposed, rows, *operands), b)


def _more_systems(
    info: Any, dims: Sequence[int | None], system: System, y: Tensor, theta: Sequence[Tensor]
) -> list[Any]:
    """[system, y, *theta] with the mapped dimension in front of y and of the tensors of theta that have it."""
    mapped = system.vmapped(tuple(dim is not None for dim in dims[1:]), info.randomness)
    y = y.expand(info.batch_size, *y.shape) if dims[0] is None else y.movedim(dims[0], 0)
    return [mapped, y, *(t if dim is None else t.movedim(dim, 0) for t, dim in zip(theta, dims[1:], strict=True))]


def _scatter(values: Sequence[Tensor], positions: Sequence[int], length: int) -> list[Tensor | None]:
    out: list[Tensor | None] = [None] * length
    for position, value in zip(positions, values, strict=True):
        out[position] = value
    return out


def _given(tangents: Sequence[Tensor | None]) -> tuple[list[int], list[Tensor]]:
    pairs = [(i, tangent) for i, tangent in enumerate(tangents) if tangent is not None]
    return [i for i, _ in pairs], [tangent for _, tangent in pairs]


@untraced
def attach_derivative(
    equation: Equation, function: Callable[..., Any], y: Any, theta: tuple[Any, ...], options: Options
) -> Any:
    """Attach to y the derivative that R(y, theta) = 0 gives it.

    Args:
        equation: of the public function.
        function: the user's.
        y: pytree.
        theta: pytrees.
        options: of the call.

    Returns:
        y as its tree.
    """
    options.check(equation.owner, equation.is_map)
    if torch.is_inference_mode_enabled():  # where nothing is recorded, but y is certified all the same
        with torch.inference_mode(False), torch.no_grad():
            return attach_derivative(equation, function, y, theta, options)
    border, operands = Border.of(equation, function, y, theta, options.batch_dims)
    live = [tensor.is_floating_point() and tracked(tensor, mapped=False) for tensor in operands.theta]
    differentiated = any(live) and (torch.is_grad_enabled() or transformed() or forward_mode())
    system = System(
        border=border, arguments=operands.arguments, function=border.residual, options=options, live=live,
        differentiated=differentiated,
    )  # fmt: skip
    if transformed() or forward_mode():
        system.guard(operands)
    if isinstance(options.solver, Unroll) and differentiated:
        return border.ravel.unflatten(_unrolled(system, operands, options.solver))
    return border.ravel.unflatten(_apply(_Root, system, operands.y, *operands.theta))
