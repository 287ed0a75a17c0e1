"""The system R(y, theta) = 0 behind a derivative: its Jacobian at the point, its certificates and its linear solves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from nestopt.linalg import Solution
from nestopt.linalg.autodiff import reached_leaves
from nestopt.linalg.dense import Factored
from nestopt.linalg.guard import closure_tensors, describe_captured
from nestopt.linalg.normalization import WrittenOut
from nestopt.linalg.nystrom import SketchedInverse
from nestopt.linalg.result import Result, Status, all_finite, scalar_or_tensor

from .backward_pass import Approximation, Series
from .border import Border, Operands
from .jacobian import SystemJacobian
from .monitor import Kind, Record, report
from .options import Options
from .transforms import dual, first_item, forward_mode, tracked, transformed

__all__ = ["System"]


class _Point:
    """The Jacobian at one point, the solver prepared for it, and the tensors that the point consists of."""

    def __init__(self, system: System, y: Tensor, theta: Sequence[Tensor]) -> None:
        self.jacobian = SystemJacobian(
            system.evaluated, y, theta, system.live, symmetric=system.options.symmetric, written_out=system.written_out
        )
        self.tensors = [tensor.detach() for tensor in (y, *theta)]
        self._prepare = partial(system.options.prepare, is_map=system.border.equation.is_map)
        self._unbilled = 0

    @cached_property
    def prepared(self) -> Approximation:
        """The solver with what it does once for this matrix."""
        prepared = self._prepare(self.jacobian)
        if isinstance(prepared, Series):
            self._unbilled = prepared.spent
        elif isinstance(prepared, (Factored, SketchedInverse)):
            columns = prepared.sketch.rank if isinstance(prepared, SketchedInverse) else self.jacobian.shape[-1]
            self._unbilled = columns * self.jacobian.batch_shape.numel()
        return prepared

    def bill(self) -> int:
        """The products that the preparation took, once."""
        products, self._unbilled = self._unbilled, 0
        return products

    @property
    def restarts(self) -> bool:
        """Whether a solve may start elsewhere than at zero, and gains by it."""
        return not isinstance(self.prepared, (Factored, Series))

    def is_at(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same memory, which is held here, so that an address names nothing else."""
        # They come out of a graph's saved tensors: what was modified in place since then, torch has refused already.
        return len(tensors) == len(self.tensors) and all(
            new.layout == torch.strided
            and new.data_ptr() == old.data_ptr()
            and (new.shape, new.stride(), new.dtype, new.device) == (old.shape, old.stride(), old.dtype, old.device)
            for new, old in zip(tensors, self.tensors, strict=True)
        )


@dataclass(eq=False)
class System:
    """What the two autograd functions share: the residual, how to solve with its Jacobian, and where that was done.

    The Jacobian and its factorisation at the point are kept here, for every product, right-hand side and order of
    derivative, and die with the graph that holds this object.

    Args:
        border: of the call.
        arguments: for each tensor of theta, which argument of the call it belongs to.
        function: (y, *theta) -> R, y and R of shape (*vmaps, *batch, n).
        options: of the call.
        live: which tensors of theta may be differentiated.
        differentiated: whether any derivative may be asked for.
        written_out: whether the function's normalisations are.
    """

    border: Border
    arguments: list[int]
    function: Callable[..., Tensor]
    options: Options
    live: list[bool]
    differentiated: bool
    written_out: WrittenOut = field(default_factory=WrittenOut)  # one object, whatever is mapped
    _point: _Point | None = field(default=None, init=False)
    _vmapped: dict[Any, System] = field(default_factory=dict, init=False)

    @property
    def evaluated(self) -> Callable[..., Tensor]:
        """The function; where failed items are NaN, they are evaluated at a good item's y.

        Then nothing but their own cotangent makes their part of a derivative NaN: one of zero adds zero to what the
        items share.
        """
        return partial(_at_finite_points, self.function) if self.options.on_failure == "nan" else self.function

    @property
    def residual(self) -> Callable[..., Tensor]:
        """The same for derivatives of any order, in every transform: with what torch gets wrong written out.

        Whether that is needed is known once y is certified.
        """
        return self.written_out.guarded(self.evaluated)

    def vmapped(self, mapped: tuple[bool, ...], randomness: str) -> System:
        """The system of one more dimension of systems, in front, over which y and the `mapped` tensors of theta run."""
        key = (mapped, randomness)
        if key not in self._vmapped:
            dims = tuple(0 if flag else None for flag in mapped)
            function = torch.func.vmap(self.function, in_dims=(0, *dims), randomness=randomness)
            self._vmapped[key] = replace(self, function=function)
        return self._vmapped[key]

    def at(self, y: Tensor, theta: Sequence[Tensor]) -> _Point:
        """The Jacobian at a point of plain tensors: the kept one if it is of this point, else a new one.

        Args:
            y: shape (*systems, n).
            theta: tensors.

        Returns:
            The point.
        """
        tensors = [y, *theta]
        if self._point is None or not self._point.is_at(tensors):
            self._point = _Point(self, y, theta)
        return self._point

    def guard(self, operands: Operands) -> None:
        """Refuse captured tensors that a transform of torch.func or forward mode differentiates or maps over.

        The residual is evaluated, under the transforms but on inputs outside of them: whatever the value then carries
        was captured.

        Args:
            operands: of the call.
        """
        theta = [first_item(tensor) for tensor in operands.theta]
        with torch.enable_grad():
            value = self.residual(first_item(operands.y), *theta)
        if transformed() and tracked(value):
            self._refuse_captured(_names(self.border.function, tracked))
        if forward_mode() and dual(value):
            self._refuse_captured(_names(self.border.function, dual))

    def admit(self, y: Tensor, theta: Sequence[Tensor]) -> Tensor:
        """Certify y as a root, per item, and return it (NaN where it is refused and on_failure says so).

        Args:
            y: shape (*systems, n).
            theta: tensors.

        Returns:
            y.

        Raises:
            SolverError: for a y that is not a root, if on_failure says so.
        """
        point = self.at(y, theta)
        A = point.jacobian
        self._check_graph(A)
        r = A.residual_vector.detach()
        size = A.norm(r)
        if self.options.on_failure == "nan":  # elsewhere the residual has the NaN of its y
            size = torch.where(torch.isfinite(y).all(-1), size, torch.nan)
        distance, spent = self._distance(point, r, size)
        rtol, atol = self.options.limits(A.dtype)
        tolerance = rtol * A.norm(y) + atol
        codes = torch.where(distance <= tolerance, Status.CONVERGED.code, Status.NOT_STATIONARY.code)
        codes = torch.where(torch.isfinite(size) & torch.isfinite(tolerance), codes, Status.NON_FINITE.code)
        self._record("point", codes, size, distance, tolerance, 0, spent + point.bill())
        bad = codes != Status.CONVERGED.code
        if bool(bad.any()):
            result = Result(x=y, codes=codes, iterations=0, error=scalar_or_tensor(distance))
            words = self.border.equation
            subject = (
                f"{words.owner}: y is not {words.solution} of {words.role} to rtol={rtol:.1e}, "
                f"atol={atol:.1e} (the error is its estimated distance to one); compute y further, or loosen rtol"
            )
            report(subject, result, self.options.on_failure)
            if self.options.on_failure == "nan":
                y = torch.where(bad[..., None], torch.nan, y)
        return y

    def solve(self, transposed: bool, b: Tensor, y: Tensor, theta: Sequence[Tensor]) -> Tensor:
        """Solve A u = b, or A'u = b, at a point, and certify the solution.

        Args:
            transposed: which of the two.
            b: shape (*sides, *systems, n).
            y: shape (*systems, n).
            theta: tensors.

        Returns:
            u; NaN for an item that failed where on_failure is "nan", or where it is no better than zero.
        """
        kind: Kind = "adjoint" if transposed else "tangent"
        point = self.at(y, theta)
        prepared, A = point.prepared, point.jacobian.T if transposed else point.jacobian
        memory = self.options.warm_start if point.restarts else None
        start = None if memory is None else memory.guess(A, b, transposed)
        solution: Solution = (prepared.solve_transposed if transposed else prepared.solve)(b, start)
        size = torch.as_tensor(solution.error, dtype=b.dtype, device=b.device)
        u: Tensor = solution.x
        codes, nan = solution.codes, self.options.on_failure == "nan"
        idle = ~(b != 0).any(-1) if nan else None
        if idle is not None:  # nothing is asked of such an item, whether it failed or not
            codes = torch.where(idle | torch.isfinite(y).all(-1), codes, Status.NON_FINITE.code)
        spent = solution.products + point.bill()
        self._record(kind, codes, size, size, solution.tolerance, solution.iterations, spent)
        failed = codes != Status.CONVERGED.code
        if self.options.inexact:
            failed = failed & (codes != Status.MAX_ITER.code) & (codes != Status.STAGNATED.code)
        if bool(failed.any()):
            report(
                f"{self.border.equation.owner}: the {kind} system of the derivative", solution, self.options.on_failure
            )
            useless = failed if nan else failed & ~(size < A.norm(b))
            u = torch.where(useless[..., None], torch.nan, u)
            u = u if idle is None else torch.where(idle[..., None], 0, u)
        if memory is not None:
            memory.remember(u, transposed)
        return u

    def step_sizes(self, y: Tensor, theta: Sequence[Tensor]) -> Tensor:
        """The steps of a StepPass at a point, per system; NaN, after a report, where there is none.

        Args:
            y: shape (*systems, n).
            theta: tensors.

        Returns:
            Shape (*systems,).
        """
        series: Any = self.at(y, theta).prepared  # a Series, since the solver is a StepPass
        if bool((series.faults != Status.RUNNING.code).any()):
            codes = torch.where(series.faults == Status.RUNNING.code, Status.CONVERGED.code, series.faults)
            result = Result(x=y, codes=codes, iterations=0, error=torch.nan)
            report(f"{self.border.equation.owner}: the step of the unrolled map", result, self.options.on_failure)
        sizes: Tensor = series.sizes
        return sizes

    def note(self, left: Tensor) -> None:
        """Record what the adjoint of unrolled steps leaves of a cotangent: what its solution lacks.

        Args:
            left: shape (*sides, *systems, n).
        """
        solver: Any = self.options.solver
        steps = solver.plan[0]
        size = torch.linalg.vector_norm(left, dim=-1)
        codes = torch.where(size == 0, Status.CONVERGED.code, Status.MAX_ITER.code)
        codes = torch.where(torch.isfinite(size), codes, Status.NON_FINITE.code)
        self._record("adjoint", codes, size, size, 0.0, steps, steps * size.numel())

    def _distance(self, point: _Point, r: Tensor, size: Tensor) -> tuple[Tensor, int]:
        """How far y is from a root, and the products it took to see."""
        A, step, spent = point.jacobian, torch.full_like(size, torch.nan), size.numel()
        prepared = point.prepared if self.differentiated else None
        if isinstance(prepared, Factored):  # which the derivative will need: the Newton step is at hand
            step = A.norm(prepared.estimate(r))
            if all_finite(step):
                return step, 0
        # a lower bound of it by Cauchy-Schwarz: R'R = (A'R)' A^{-1} R <= |A'R| |A^{-1} R|
        bound = torch.where(size == 0, 0, size * (size / A.norm(A._rmatvec(r))))
        return torch.where(torch.isfinite(step), step, bound), spent

    def _check_graph(self, A: SystemJacobian) -> None:
        """Refuse captured tensors, arguments that nothing uses, and systems that are not independent."""
        words, leaves = self.border.equation, reached_leaves(A.residual_vector)
        known = {id(leaf) for leaf in (A.y, *A.theta)}
        captured = [leaf for leaf in leaves if id(leaf) not in known]
        if captured:
            self._refuse_captured(describe_captured(self.border.function, captured))
        reached = {id(leaf) for leaf in leaves}
        used = {i for i, leaf in zip(self.arguments, A.theta, strict=True) if id(leaf) in reached}
        for argument, live in zip(self.arguments, self.live, strict=True):
            if live and argument not in used:
                raise ValueError(
                    f"{words.owner}: {words.role} has no path from theta[{argument}], so its derivative would "
                    f"silently be zero; use it in {words.role} without detach() or item(), or, if zero is meant, pass "
                    "it detached."
                )
        self._check_independent(A)

    def _check_independent(self, A: SystemJacobian) -> None:
        batch, words = self.border.batch, self.border.equation
        if batch.numel() < 2:
            return
        front = A.y.shape[: A.y.ndim - 1 - len(batch)]
        probe = torch.zeros(*front, batch.numel(), A.shape[-1], dtype=A.dtype, device=A.device)
        probe[..., 0, :] = torch.arange(1.0, A.shape[-1] + 1, dtype=A.dtype, device=A.device).cos()
        image = A._rmatvec(probe.reshape(A.y.shape)).reshape(probe.shape)[..., 1:, :]
        if bool((image.isfinite() & (image != 0)).any()):
            raise ValueError(
                f"{words.owner}: batch_dims={len(batch)} says that the items of y are independent systems, but "
                f"in {words.role} the first one and others do depend on each other; let it act on every item alone, or "
                "use batch_dims=0."
            )

    def _refuse_captured(self, names: str) -> None:
        words = self.border.equation
        raise ValueError(
            f"{words.owner}: {words.role} captures {names}, whose derivative would be dropped; "
            f"pass it as an argument after y, {words.role}(y, *theta), or detach it if it is a "
            "constant."
        )

    def _record(
        self, kind: Kind, codes: Tensor, residual: Any, error: Any, tolerance: Any, steps: Any, spent: int
    ) -> None:
        if self.options.monitor is not None:
            residual, error, tolerance = (_number(value) for value in (residual, error, tolerance))
            record = Record(
                kind=kind, codes=codes, residual_norm=residual, error=error, tolerance=tolerance, iterations=steps,
                products=spent,
            )  # fmt: skip
            self.options.monitor.records.append(record)


def _at_finite_points(function: Callable[..., Tensor], y: Tensor, *theta: Tensor) -> Tensor:
    """R at y, and at another item's where y is not finite."""
    if not y.numel():
        return function(y, *theta)
    finite = torch.isfinite(y).all(-1, keepdim=True)
    first = finite.reshape(-1).to(torch.int8).argmax(0, keepdim=True)
    other = y.detach().reshape(-1, y.shape[-1]).index_select(0, first).reshape(y.shape[-1])
    return function(torch.where(finite, y, torch.where(torch.isfinite(other).all(), other, 0)), *theta)


def _names(function: Callable[..., Any], which: Callable[[Tensor], bool]) -> str:
    named = (f"`{name}` of shape {tuple(t.shape)}" for name, t in closure_tensors(function) if which(t))
    return ", ".join(dict.fromkeys(named)) or "a tensor"


def _number(value: Any) -> Any:
    return scalar_or_tensor(value) if isinstance(value, Tensor) else value
