"""What derivatives of constrained solutions share: values outside the graph, singular systems, and the envelope."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.implicit.jacobian import SystemJacobian
from nestopt.implicit.pullback import pull
from nestopt.implicit.transforms import alive, recording, within_jvp
from nestopt.linalg import LSMR, LU, MINRESQLP, Dense, LinearOperator, LinearSolver, Prepared, Solution, Status, iterate
from nestopt.linalg.result import any_of, is_running, scalar_or_tensor

__all__ = ["MinimumNorm", "Outside", "envelope", "refine"]


class Outside:
    """A function of plain tensors that runs outside every graph and transform, for a batch of systems in front.

    Args:
        function: takes tensors, and returns a tuple of tensors; the systems' dimensions come first in the first
            argument and in every value.
        vmapped: from which arguments have one more dimension in front (the first always has), vmap's randomness and
            its size, the function of these.
    """

    def __init__(
        self, function: Callable[..., tuple[Tensor, ...]], vmapped: Callable[[tuple[bool, ...], str, int], Outside]
    ) -> None:
        self.function, self.vmapped = function, vmapped

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The values, which carry no derivative."""
        found: tuple[Tensor, ...] = _Outside.apply(self, *(tensor.detach() for tensor in tensors))  # type: ignore[no-untyped-call]
        return found


class _Outside(torch.autograd.Function):
    @staticmethod
    def forward(outside: Outside, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(value.clone() for value in outside.function(*tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return (None,) * len(ctx.needs_input_grad)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], outside: Outside, *tensors: Tensor) -> Any:
        first, *others = in_dims[1:]
        lead = tensors[0].expand(info.batch_size, *tensors[0].shape) if first is None else tensors[0].movedim(first, 0)
        moved = [lead, *(t if d is None else t.movedim(d, 0) for t, d in zip(tensors[1:], others, strict=True))]
        mapped = (True, *(d is not None for d in others))
        found = outside.vmapped(mapped, info.randomness, info.batch_size)(*moved)
        return found, (0,) * len(found)


@dataclass(frozen=True)
class MinimumNorm(LinearSolver):
    """Solve A x = b by LU, and the systems that are singular to working precision for the shortest least-squares x.

    The second solver is MINRES-QLP for symmetric A and LSMR for any other; its status stands for these columns:
    CONVERGED where the singular system has a solution, SINGULAR where x is only its least-squares solution.

    Cost: LU's, and the products of the second solver where it ran.

    Args:
        rtol: relative tolerance of |b - A x|; None for the dtype's.
        direct_size: largest n that is factorised; beyond it the second solver does all the work.

    Example:
        >>> from nestopt.linalg import Dense
        >>> A = Dense(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), symmetric=True)
        >>> MinimumNorm()(A, torch.tensor([2.0, 2.0])).x
        tensor([1., 1.])
    """

    rtol: float | None = None
    direct_size: int = 1024

    needs_square: ClassVar[bool] = True

    def prepare(self, A: LinearOperator) -> Prepared:
        """Factorise A where it is small enough.

        Args:
            A: square operator, of shape (*batch, n, n).

        Returns:
            An object with `solve(b, x0)` and `solve_transposed(b, x0)`.
        """
        self._check_operator(A)
        if A.shape[-1] > self.direct_size:
            return self._second(A).prepare(A)
        return _PreparedMinimumNorm(self, A, LU(self.rtol).prepare(A))

    def _second(self, A: LinearOperator) -> LinearSolver:
        return MINRESQLP(self.rtol) if A.symmetric else LSMR(self.rtol)

    def _solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None) -> Solution:
        return self.prepare(A).solve(b, x0)


@dataclass(frozen=True)
class _PreparedMinimumNorm(Prepared):
    factors: Prepared

    def solve(self, b: Tensor, x0: Tensor | None = None) -> Solution:
        return self._complete(self.operator, self.factors.solve(b), b)

    def solve_transposed(self, b: Tensor, x0: Tensor | None = None) -> Solution:
        return self._complete(self.operator.T, self.factors.solve_transposed(b), b)

    def _complete(self, A: LinearOperator, first: Solution, b: Tensor) -> Solution:
        left = first.codes == Status.SINGULAR.code
        if not any_of(left):
            return first
        second = self.solver._second(A)(A, torch.where(left[..., None], b.detach(), 0))  # type: ignore[attr-defined]

        def select(new: Any, old: Any) -> Any:
            return scalar_or_tensor(torch.where(left, torch.as_tensor(new), torch.as_tensor(old)))

        return replace(
            first, x=torch.where(left[..., None], second.x, first.x),
            codes=torch.where(left, second.codes, first.codes),
            error=select(second.residual_norm, first.error), iterations=select(second.iterations, first.iterations),
            residual_norm=select(second.residual_norm, first.residual_norm),
            products=first.products + second.products,
        )  # fmt: skip


class _Envelope(torch.autograd.Function):
    """L(z, theta) at a z where L_z = 0: the first derivative leaves out dz, the next ones do not."""

    generate_vmap_rule = True

    @staticmethod
    def forward(function: Callable[..., Tensor], count: int, *tensors: Tensor) -> Tensor:
        return function(*tensors).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.function, ctx.count = inputs[:2]
        ctx.save_for_backward(*inputs[2:])
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        tensors = alive(ctx.saved_tensors)
        wanted = [i for i, t in enumerate(tensors) if i >= ctx.count and t.is_floating_point()]
        with recording([*tensors, v]):
            pulled = iter(_pull(ctx.function, tensors, wanted, v))
        return None, None, *(next(pulled) if i in wanted else None for i in range(len(tensors)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        given = [i for i, t in enumerate(tangents[2:]) if i >= ctx.count and t is not None]
        dots = [t for i, t in enumerate(tangents[2:]) if i in given]
        with within_jvp(ctx, dots) as tensors:  # type: ignore[arg-type]
            value = ctx.function(*tensors)
            if not given:
                return torch.zeros_like(value)
            (moved,) = pull(
                lambda s: tuple(_pull(ctx.function, tensors, given, s)),
                [torch.zeros_like(value)],
                dots,  # type: ignore[arg-type]
            )
            return moved


def _pull(function: Callable[..., Tensor], tensors: Sequence[Tensor], wanted: Sequence[int], v: Tensor) -> list[Tensor]:
    def restricted(*inputs: Tensor) -> tuple[Tensor, ...]:
        full = list(tensors)
        for i, value in zip(wanted, inputs, strict=True):
            full[i] = value
        return (function(*full),)

    return pull(restricted, [tensors[i] for i in wanted], [v])


def envelope(function: Callable[..., Tensor], stationary: Sequence[Tensor], theta: Sequence[Tensor]) -> Tensor:
    """function(*stationary, *theta), differentiated in theta alone: no linear solve for a first derivative.

    That is exact where the function is stationary in its first arguments. They come with their own derivative attached,
    which second and higher derivatives then go through.

    Args:
        function: of both, one value an item.
        stationary: where the function's gradient in them is zero.
        theta: the tensors that it is differentiated in.

    Returns:
        The values.
    """
    found: Tensor = _Envelope.apply(function, len(stationary), *stationary, *theta)  # type: ignore[no-untyped-call]
    return found


@dataclass(frozen=True)
class _NewtonState:
    """A point of every system, its residual, and how to get the Jacobian there."""

    y: Tensor
    residual: Tensor
    jacobian: Callable[[], LinearOperator]
    codes: Tensor
    iterations: Tensor
    error: Tensor


def refine(function: Callable[..., Tensor], jacobian: Callable[..., Tensor] | None = None) -> Outside:
    """A root of function(y, *tensors) near y, by damped (semismooth) Newton steps on every system alone.

    A step is halved until |R| falls, and the run ends where it does no more: at the rounding level, if all is well.
    The caller certifies what it gets.

    Args:
        function: (y, *tensors) -> R, of y's shape (*systems, n).
        jacobian: (y, *tensors) -> dR/dy of shape (*systems, n, n); None for n backward passes.

    Returns:
        The function (y, *tensors) -> (root,).
    """

    def find(y: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        def evaluate(y: Tensor, codes: Tensor) -> _NewtonState:
            slope: Callable[[], LinearOperator]
            if jacobian is None:
                A = SystemJacobian(function, y, tensors, [False] * len(tensors), symmetric=False)
                r, slope = A.residual_vector.detach(), lambda: A
            else:
                r, slope = function(y, *tensors), lambda: Dense(jacobian(y, *tensors))
            return _NewtonState(y, r, slope, codes, torch.zeros_like(codes), torch.linalg.vector_norm(r, dim=-1))

        def step(state: _NewtonState) -> _NewtonState:
            running = is_running(state.codes)
            direction = MinimumNorm()(state.jacobian(), -state.residual).x
            direction = torch.where(running[..., None], direction, 0)
            full = evaluate(state.y + direction, state.codes)
            left, y = running & ~(full.error < 0.9999 * state.error), full.y
            if not any_of(left):  # the usual case: what belongs to the point is at hand
                return full
            for k in range(1, 12):
                trial = state.y + 0.5**k * direction
                error = torch.linalg.vector_norm(function(trial, *tensors), dim=-1)
                better = left & (error < (1 - 1e-4 * 0.5**k) * state.error)
                y, left = torch.where(better[..., None], trial, y), left & ~better
                if not any_of(left):
                    break
            # what no step improves is at the rounding level, or stuck: which of them, the caller's certificate says
            codes = torch.where(left, Status.STAGNATED.code, state.codes)
            return evaluate(torch.where(left[..., None], state.y, y), codes)

        codes = torch.zeros(y.shape[:-1], dtype=torch.int64, device=y.device)
        tolerance = 100 * torch.finfo(y.dtype).eps * (1 + torch.linalg.vector_norm(y, dim=-1))
        return (iterate(step, evaluate(y, codes), max_iter=50, tolerance=tolerance).y,)

    def vmapped(mapped: tuple[bool, ...], randomness: str, size: int) -> Outside:
        dims = tuple(0 if flag else None for flag in mapped)
        over = partial(torch.func.vmap, in_dims=dims, randomness=randomness)
        return refine(over(function), None if jacobian is None else over(jacobian))

    return Outside(find, vmapped)
