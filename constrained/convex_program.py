"""A convex program written in cvxpy as a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from nestopt.implicit import Monitor, root
from nestopt.implicit.monitor import OnFailure, check_on_failure, report
from nestopt.linalg import LinearSolver, Result, Status
from nestopt.linalg.result import scalar_or_tensor

from .conic_derivative import ConicEquations, ConicLU, find_conic
from .conic_form import ConicData, ConicForm
from .kkt import envelope
from .spoiled_items import spoil
from .value_only import opaque

__all__ = ["ConvexProgram", "ConvexSolution"]


@dataclass(frozen=True, kw_only=True)
class ConvexSolution(Result):
    """The solution of a convex program, attached to the graph of its parameters.

    `solution["x"]` is the value of the variable with this name.

    Attributes:
        x: a dict of the variables' values by name, of shape (*batch, *variable.shape); NaN for an item that failed.
        duals: the multipliers of the constraints that were asked for, in cvxpy's shapes and signs; of a cone of several
            arguments one vector, as the solvers order it.
        value: the problem's objective, of shape (*batch,); its first derivative needs no solve.
        error: the measured relative residual of the optimality conditions, per item; NaN where there is no point.
    """

    value: Tensor
    duals: tuple[Tensor, ...]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.x:
            raise KeyError(f"ConvexSolution: {name!r} is no variable of the solution; it has {list(self.x)}.")
        value: Tensor = self.x[name]
        return value


class ConvexProgram(nn.Module):
    r"""A convex problem written in cvxpy, as a layer from the values of its parameters to those of its variables.

    cvxpy turns the problem, once, into min x'P x / 2 + c'x subject to A x + s = b, s in K, whose data are affine in the
    parameters; those maps are kept as tensors. A call solves each item by the solver, refines the answer by semismooth
    Newton steps in float64, and attaches the derivative of the root of

        R(x, v) = (P x + c + A'y, A x + s - b),  y = P_K*(v),  s = y - v,

    by `implicit.root`: of any order, in reverse and forward mode, under torch.func's grad, jvp, vmap and their
    compositions. K is a product of zero, nonnegative, second-order, semidefinite, exponential and (three-dimensional)
    power cones.

    An item is CONVERGED where the residual of both parts of R, each relative to one plus its largest summand, is
    measured at or below `tolerance`. It is INFEASIBLE or UNBOUNDED where a certificate by Clarabel (asked again after
    another solver) is measured to hold to 1e-6 of its gain, else STAGNATED. A parameter outside of the sign or
    definiteness that it was declared with makes the problem NOT_CONVEX. Failed items are NaN and change nothing for the
    others: a cotangent of zero for them adds zero to the gradients of shared parameters.

    Where strict complementarity fails, the projection has a kink and the derivative is that of one side. Where
    solutions or multipliers are not unique (redundant constraints), R's Jacobian is singular: derivatives are then NaN
    (or raise), unless linear_solver=MinimumNorm() is chosen, which gives the shortest one.

    The module has no parameters and no buffers; it computes in float64 and returns the dtype that it was given.

    Cost: a solve an item, some Newton steps for the batch, and one factorisation of order n + m for all derivatives.

    Args:
        problem: a cvxpy.Problem that obeys the rules of disciplined parametrised programming (`is_dpp()`).
        parameters: the order in which values will come; None for that of problem.parameters().
        variables: whose values to return; None for all of problem.variables().
        constraints: of the problem, whose multipliers to return.
        solver: the name of a solver that cvxpy has installed and that can do the problem's cones; None for Clarabel.
        solver_options: its settings: for Clarabel such as {"max_iter": 100}, for others arguments of cvxpy's solve.
        tolerance: of the certificate, at least 1e-12.
        linear_solver: of the derivative's systems; None takes LU, and GMRES beyond n + m = 512.
        on_failure: "nan"; "warn" in the call as soon as one item fails, NaN in a backward pass; or "raise" in both.
        monitor: collects the records of `implicit.root`.

    Raises:
        ImportError: if cvxpy is not installed.
        TypeError: if problem is not a cvxpy.Problem, or its parameters or variables are complex or integer.
        ValueError: for a problem that is not DPP, with the part that is not; parameters or variables that are missing,
            foreign or share a name; cones that are not supported; a tolerance out of range.

    Reference:
        Agrawal, Amos, Barratt, Boyd, Diamond & Kolter 2019, Differentiable convex optimization layers; Agrawal,
        Barratt, Boyd, Busseti & Moursi 2019, Differentiating through a cone program (the residual map).

    Example:
        >>> import cvxpy as cp
        >>> x, t = cp.Variable(2, name="x"), cp.Parameter(2, name="t")
        >>> layer = ConvexProgram(cp.Problem(cp.Minimize(cp.sum_squares(x - t)), [x >= 0, cp.sum(x) == 1]))
        >>> t = torch.tensor([[0.3, 0.1], [2.0, 0.0]], dtype=torch.float64, requires_grad=True)
        >>> solution = layer(t)
        >>> solution.status, [[round(float(e), 8) + 0.0 for e in row] for row in solution["x"].detach()]
        (Statuses(CONVERGED: 2), [[0.6, 0.4], [1.0, 0.0]])
        >>> torch.autograd.grad(solution["x"][0, 0], t)[0][0]
        tensor([ 0.5000, -0.5000], dtype=torch.float64)
    """

    def __init__(
        self,
        problem: Any,
        parameters: Sequence[Any] | None = None,
        variables: Sequence[Any] | None = None,
        solver: str | None = None,
        solver_options: Mapping[str, Any] | None = None,
        *,
        constraints: Sequence[Any] = (),
        tolerance: float = 1e-9,
        linear_solver: LinearSolver | None = None,
        on_failure: OnFailure = "nan",
        monitor: Monitor | None = None,
    ) -> None:
        super().__init__()
        parameters, variables = _check_problem(problem, parameters, variables, solver)
        check_on_failure("ConvexProgram", on_failure)
        if not tolerance >= 1e-12:
            raise ValueError(f"ConvexProgram: tolerance must be at least 1e-12, but got {tolerance}; use e.g. 1e-9.")
        known = {id(one) for one in problem.constraints}
        if any(id(one) not in known for one in constraints):
            raise ValueError("ConvexProgram: constraints must be those of the problem, the same objects.")
        self.form = ConicForm(problem, parameters, variables, constraints)
        self.parameter_names = tuple(parameter.name() for parameter in parameters)
        self.variable_names = tuple(variable.name() for variable in variables)
        self.solver, self.solver_options, self.tolerance = solver, dict(solver_options or {}), tolerance
        self.linear_solver, self.on_failure, self.monitor = linear_solver, on_failure, monitor

    def forward(self, *values: Any, **named: Tensor) -> ConvexSolution:
        """Solve the problem at the values of its parameters.

        Args:
            values: a tensor for each parameter, in order, or one dict of tensors by name. Each has shape (*batch,
                *parameter.shape); leading batch dimensions broadcast, and a parameter without them is shared.
            named: tensors by name, in the place of `values`.

        Returns:
            The solution, per item of the batch.

        Raises:
            TypeError: for values that are not real floating tensors.
            ValueError: for parameters that are missing or unknown, and shapes, dtypes or devices that do not fit.
            SolverError: for an item that failed, if on_failure says so.
        """
        tensors, batch = self._check_values(values, named)
        dtype, form = tensors[0].dtype, self.form
        p = form.stack(tensors, batch)
        equations = ConicEquations.of(form, p.device)
        data = form.data(p)
        numbers = (data.P, data.c, data.A, data.b)
        spaces = (1, 1, 1, 1, 0)
        found: tuple[Tensor, Tensor, Tensor] = opaque(
            partial(self._find, equations), *numbers, form.inside(tensors, batch), spaces=spaces
        )
        z, codes, error = found
        attached = root(
            equations.residual, z, *numbers, solver=self._solver(equations, z), batch_dims=len(batch),
            on_failure=self.on_failure if self.on_failure != "warn" else "nan", monitor=self.monitor,
        )  # fmt: skip
        # root measures the distance by a Newton step, and has refused what an ill-conditioned Jacobian leaves open
        good = torch.isfinite(attached).all(-1)
        codes = torch.where(good | (codes != Status.CONVERGED.code), codes, Status.NOT_STATIONARY.code)
        value = self._value(equations, attached, good, data)
        x = attached[..., : form.n]
        by_name = {name: form.recover(x, i).to(dtype) for i, name in enumerate(self.variable_names)}
        y = form.cones.project_dual(attached[..., form.n :]) if form.duals else attached
        return ConvexSolution(
            x=by_name, codes=codes, iterations=0, error=error, value=value.to(dtype),
            duals=tuple(form.recover_dual(y, i).to(dtype) for i in range(len(form.duals))),
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The names, for the module's representation."""
        return f"parameters={list(self.parameter_names)}, variables={list(self.variable_names)}"

    def _solver(self, equations: ConicEquations, z: Tensor) -> LinearSolver | None:
        small = z.shape[-1] <= 512 and z.numel() * z.shape[-1] <= 2**24  # root's own limits of a factorisation
        return ConicLU(equations=equations) if self.linear_solver is None and small else self.linear_solver

    def _find(self, equations: ConicEquations, *data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, codes, error = find_conic(equations, self.solver, self.solver_options, self.tolerance, *data)
        result = Result(x=None, codes=codes, iterations=0, error=scalar_or_tensor(error))
        report("ConvexProgram: the problem", result, self.on_failure)
        return z, codes, error

    def _value(self, equations: ConicEquations, z: Tensor, good: Tensor, data: ConicData) -> Tensor:
        # failed items at zero, so that they add no NaN to derivatives that leave them out
        safe = torch.where(good[..., None], z, 0)
        value = envelope(equations.lagrangian, [safe], [data.P, data.c, data.d, data.A, data.b])
        return self.form.sign * spoil(value, good)

    def _check_values(self, values: tuple[Any, ...], named: dict[str, Tensor]) -> tuple[list[Tensor], torch.Size]:
        names = self.parameter_names
        if len(values) == 1 and isinstance(values[0], Mapping) and not named:
            named, values = dict(values[0]), ()
        if values and named:
            raise ValueError("ConvexProgram: pass parameters either in order or by name, but got both.")
        if values:
            if len(values) != len(names):
                raise ValueError(
                    f"ConvexProgram: expected {len(names)} parameters, {', '.join(names)}, but got {len(values)}."
                )
            named = dict(zip(names, values, strict=True))
        for wrong, what in ((set(names) - set(named), "are missing"), (set(named) - set(names), "do not exist")):
            if wrong:
                raise ValueError(
                    f"ConvexProgram: the parameters {', '.join(sorted(wrong))} {what}; pass {list(names)}."
                )
        tensors = [named[name] for name in names]
        batches = []
        for name, tensor, shape in zip(names, tensors, self.form.shapes, strict=True):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"ConvexProgram: {name} must be a real floating tensor, but got {kind}.")
            if tensor.dtype != tensors[0].dtype or tensor.device != tensors[0].device:
                raise ValueError(
                    f"ConvexProgram: all parameters must share one dtype and device, but {names[0]} is "
                    f"{tensors[0].dtype} on {tensors[0].device} and {name} is {tensor.dtype} on {tensor.device}."
                )
            lead = tensor.ndim - len(shape)
            if lead < 0 or tensor.shape[lead:] != shape:
                raise ValueError(
                    f"ConvexProgram: {name} must have shape (*batch, *{tuple(shape)}), but got {tuple(tensor.shape)}."
                )
            batches.append(tensor.shape[:lead])
        try:
            return tensors, torch.broadcast_shapes(*batches)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            shapes = ", ".join(f"{name} {tuple(b)}" for name, b in zip(names, batches, strict=True))
            raise ValueError(f"ConvexProgram: the batch dimensions do not broadcast: {shapes}.") from error


def _check_problem(
    problem: Any, parameters: Sequence[Any] | None, variables: Sequence[Any] | None, solver: str | None
) -> tuple[list[Any], list[Any]]:
    try:
        cp = import_module("cvxpy")
    except ImportError as error:
        raise ImportError("ConvexProgram needs cvxpy, which is not installed; pip install cvxpy.") from error
    if not isinstance(problem, cp.Problem):
        raise TypeError(f"ConvexProgram: problem must be a cvxpy.Problem, but got {type(problem).__name__}.")
    lists = []
    for role, given, known in (
        ("parameters", parameters, problem.parameters()), ("variables", variables, problem.variables())
    ):  # fmt: skip
        kept = list(known) if given is None else list(given)
        here, there = {id(one) for one in known}, {id(one) for one in kept}  # to compare expressions is to constrain
        foreign = [one.name() if hasattr(one, "name") else repr(one) for one in kept if id(one) not in here]
        if foreign:
            raise ValueError(f"ConvexProgram: the {role} {', '.join(foreign)} are not in the problem.")
        missing = [one.name() for one in known if id(one) not in there]
        if missing and role == "parameters":
            raise ValueError(
                f"ConvexProgram: the parameters {', '.join(missing)} of the problem were not passed; list all of "
                "them, or make them constants."
            )
        names = [one.name() for one in kept]
        if len(set(names)) < len(names):
            raise ValueError(f"ConvexProgram: {role} need names of their own, but there are {names}; pass name=...")
        lists.append(kept)
    if not lists[0]:
        raise ValueError("ConvexProgram: the problem has no cvxpy.Parameter, so nothing to be differentiated in.")
    if problem.is_mixed_integer() or any(leaf.is_complex() for leaf in (*problem.variables(), *problem.parameters())):
        raise TypeError("ConvexProgram: variables and parameters must be real and continuous.")
    if not problem.is_dpp():
        parts = [("objective", problem.objective), *(("constraint", c) for c in problem.constraints)]
        named = "; ".join(f"the {role} {part}" for role, part in parts if not part.is_dcp(dpp=True))
        convex = "" if problem.is_dcp() else " (and not convex by cvxpy's rules either)"
        raise ValueError(
            f"ConvexProgram: the problem is not DPP{convex}: {named}. Parameters may enter only so that no product of "
            "two of them, and no convex function of one, meets a variable; make a new parameter of such a term."
        )
    if solver is not None and solver.upper() not in cp.installed_solvers():
        raise ValueError(
            f"ConvexProgram: solver must be one of {', '.join(cp.installed_solvers())}, but got {solver!r}."
        )
    return lists[0], lists[1]
