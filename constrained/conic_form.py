"""A parametrised cvxpy problem as sparse affine maps from its parameters to the data of one conic program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from .conic_cones import ConicCones

__all__ = ["ConicData", "ConicForm", "SparseMap"]


@dataclass(frozen=True)
class SparseMap:
    """A fixed sparse matrix that acts on the last dimension, by its entries (row, column, value)."""

    rows: Tensor
    columns: Tensor
    values: Tensor
    size: int

    @classmethod
    def of(cls, matrix: Any) -> SparseMap:
        """From a scipy matrix.

        Args:
            matrix: any sparse format.

        Returns:
            The map.
        """
        coo = matrix.tocoo()
        row, column = (torch.as_tensor(np.asarray(i, dtype=np.int64)) for i in (coo.row, coo.col))
        return cls(row, column, torch.as_tensor(np.asarray(coo.data, dtype=np.float64)), coo.shape[0])

    def to(self, device: torch.device) -> SparseMap:
        """The map on a device."""
        return SparseMap(self.rows.to(device), self.columns.to(device), self.values.to(device), self.size)

    def __call__(self, x: Tensor) -> Tensor:
        """The product with x of shape (*batch, columns)."""
        return accumulate(self.values * x[..., self.columns], self.rows, self.size)


def accumulate(terms: Tensor, rows: Tensor, size: int) -> Tensor:
    """The sums of terms (*batch, entries) that belong to the same row, of shape (*batch, size)."""
    return terms.new_zeros(*terms.shape[:-1], size).index_add(-1, rows, terms)


@dataclass(frozen=True)
class ConicData:
    """The numbers of min x'P x / 2 + c'x + d subject to A x + s = b, s in K, for a batch.

    Attributes:
        P: the entries of P that the form knows, of shape (*batch, entries); both triangles.
        c: shape (*batch, n).
        d: shape (*batch,).
        A: the entries of A, likewise.
        b: shape (*batch, m).
    """

    P: Tensor
    c: Tensor
    d: Tensor
    A: Tensor
    b: Tensor


class ConicForm:
    """What is extracted once from a cvxpy problem: sparse maps p -> (P, c, d, A, b), the cones, and the way back.

    cvxpy reduces a disciplined parametrised problem to a conic one whose data are affine in the parameters; this keeps
    that map as tensors, and nothing of cvxpy. The canonical form is the one that cvxpy hands to Clarabel.

    Args:
        problem: a cvxpy.Problem that is DPP.
        parameters: the parameters that values will come for, in order.
        variables: those whose values are wanted.
        constraints: those whose multipliers are.

    Raises:
        ValueError: for cones that have no projection here.
    """

    def __init__(
        self, problem: Any, parameters: Sequence[Any], variables: Sequence[Any], constraints: Sequence[Any] = ()
    ) -> None:
        held = {parameter: parameter.value for parameter in parameters}
        for parameter in parameters:  # cvxpy needs some value; the maps do not depend on it
            if parameter.value is None:
                parameter.save_value(_placeholder(parameter))
        try:
            data, chain, inverse = problem.get_problem_data("CLARABEL", enforce_dpp=True)
        finally:
            for parameter, value in held.items():
                if value is None:
                    parameter.save_value(None)
        program, dims = data["param_prob"], data["dims"]
        if getattr(dims, "pnd", ()):  # older versions of cvxpy write them as three-dimensional ones themselves
            raise ValueError(
                "ConvexProgram: the problem needs power cones of more than three dimensions (PowConeND), whose "
                "projection is not available; write them as several PowCone3D."
            )
        self.cones = ConicCones(
            int(dims.zero), int(dims.nonneg), tuple(map(int, dims.soc)), tuple(map(int, dims.psd)), int(dims.exp),
            tuple(map(float, dims.p3d)),
        )  # fmt: skip
        self.n = int(program.x.size)
        self.m = program.A.shape[0] // (self.n + 1)  # constr_size may count both triangles of a matrix
        self.sign = -1.0 if type(problem.objective).__name__ == "Maximize" else 1.0
        self.size = int(program.total_param_size) + 1
        self.shapes = [torch.Size(parameter.shape) for parameter in parameters]
        self.columns = _columns(chain, program, parameters)
        self.symmetric = [any(parameter.attributes[a] for a in ("symmetric", "PSD", "NSD")) for parameter in parameters]
        self.domains = [_domain(parameter) for parameter in parameters]
        self.recovery = [(torch.Size(v.shape), *_recovery(chain, program, v)) for v in variables]
        self.duals = _duals(chain, inverse, (self.n, self.m), constraints)
        self._maps_on = {torch.device("cpu"): self._maps(program)}

    def _maps(self, program: Any) -> dict[str, Any]:
        n, m, size = self.n, self.m, self.size
        q = sp.csr_array(program.q if hasattr(program, "q") else program.c).reshape(n + 1, size)
        tensor = sp.coo_array(program.A) if m else sp.coo_array((0, size))
        row, column = tensor.row % max(m, 1), tensor.row // max(m, 1)
        constant = column == n
        b = sp.coo_array((tensor.data[constant], (row[constant], tensor.col[constant])), shape=(m, size))
        # cvxpy has A x + b in K, the solvers A x + s = b
        entries, inverse = np.unique(tensor.row[~constant], return_inverse=True)
        A = sp.coo_array((-tensor.data[~constant], (inverse, tensor.col[~constant])), shape=(len(entries), size))
        P = sp.coo_array((n * n, size)) if program.P is None else sp.coo_array(program.P)
        P.sum_duplicates()
        places, inverse_P = np.unique(P.row, return_inverse=True)
        P = sp.coo_array((P.data, (inverse_P, P.col)), shape=(len(places), size))
        return {
            "P": SparseMap.of(P), "c": SparseMap.of(q[:n]), "d": SparseMap.of(q[n:]), "A": SparseMap.of(A),
            "b": SparseMap.of(b),
            "P_at": (torch.as_tensor(places % n), torch.as_tensor(places // n)),
            "A_at": (torch.as_tensor(entries % max(m, 1)), torch.as_tensor(entries // max(m, 1))),
        }  # fmt: skip

    def on(self, device: torch.device) -> dict[str, Any]:
        """The maps and the places of entries, on a device."""
        if device not in self._maps_on:
            self._maps_on[device] = {
                name: kept.to(device) if isinstance(kept, SparseMap) else tuple(i.to(device) for i in kept)
                for name, kept in self._maps_on[torch.device("cpu")].items()
            }
        found: dict[str, Any] = self._maps_on[device]
        return found

    def data(self, p: Tensor) -> ConicData:
        """The program's numbers.

        Args:
            p: the stacked parameters with a last entry of one, shape (*batch, size).

        Returns:
            The data, differentiable in p.
        """
        maps = self.on(p.device)
        return ConicData(maps["P"](p), maps["c"](p), maps["d"](p)[..., 0], maps["A"](p), maps["b"](p))

    def stack(self, values: Sequence[Tensor], batch: torch.Size) -> Tensor:
        """Parameter values as the vector that the maps act on; of a symmetric parameter the symmetric part counts.

        Args:
            values: for each parameter a tensor of shape (*some batch, *parameter.shape).
            batch: what their batches broadcast to.

        Returns:
            Shape (*batch, size), in float64.
        """
        p = torch.zeros(*batch, self.size, dtype=torch.float64, device=values[0].device)
        p[..., -1] = 1
        for value, shape, symmetric, columns in zip(values, self.shapes, self.symmetric, self.columns, strict=True):
            value = value.double()
            if symmetric:
                value = (value + value.mT) / 2
            source, target = (torch.as_tensor(i, device=value.device) for i in columns)
            flat = value.reshape(*value.shape[: value.ndim - len(shape)], shape.numel())[..., source]
            p = p.index_add(-1, target, flat.expand(*batch, -1))
        return p

    def inside(self, values: Sequence[Tensor], batch: torch.Size) -> Tensor:
        """Which items have every parameter within the sign and definiteness that it was declared with."""
        found = torch.ones(batch, dtype=torch.bool, device=values[0].device)
        for value, shape, (sign, definite) in zip(values, self.shapes, self.domains, strict=True):
            value = value.detach()
            flat = value.reshape(*value.shape[: value.ndim - len(shape)], shape.numel())
            if sign:
                found = found & (sign * flat >= 0).all(-1)
            if definite:
                matrix = definite * (value + value.mT) / 2
                eigenvalues = torch.linalg.eigvalsh(torch.where(torch.isfinite(matrix), matrix, 0))
                tiny = 100 * torch.finfo(value.dtype).eps * eigenvalues.abs().amax(-1)
                found = found & (eigenvalues[..., 0] >= -tiny)
        return found

    def recover(self, x: Tensor, index: int) -> Tensor:
        """The value of a variable, of shape (*batch, *variable.shape), from the conic program's x."""
        shape, place, factor = self.recovery[index]
        place, factor = (torch.as_tensor(i, device=x.device) for i in (place, factor))
        return (x[..., place] * factor).reshape(x.shape[:-1] + shape)

    def recover_dual(self, y: Tensor, index: int) -> Tensor:
        """The multiplier of a constraint, as cvxpy shapes and signs it, from the conic program's y."""
        shape, dual = self.duals[index]
        return dual.to(y.device)(y).reshape(y.shape[:-1] + shape)


def _domain(parameter: Any) -> tuple[int, int]:
    """The sign and the definiteness that a parameter is declared with: 1, -1, or 0 for none."""
    has = parameter.attributes
    sign = 1 if has["nonneg"] or has["pos"] else -1 if has["nonpos"] or has["neg"] else 0
    return sign, 1 if has["PSD"] else -1 if has["NSD"] else 0


def _placeholder(parameter: Any) -> Any:
    """Some value of the parameter's shape, inside its sign and definiteness."""
    value = np.ones(parameter.shape)
    if len(parameter.shape) == 2 and parameter.shape[0] == parameter.shape[1]:
        value = np.eye(parameter.shape[0])
    value = parameter.project(value)
    return value.toarray() if hasattr(value, "toarray") else value


def _columns(chain: Any, program: Any, parameters: Sequence[Any]) -> list[tuple[Any, Any]]:
    """For each parameter, which of its entries (by rows) go to which entries of the stacked vector."""
    found = []
    for parameter in parameters:
        numbers = np.arange(1.0, 1 + int(np.prod(parameter.shape))).reshape(parameter.shape)
        if parameter.attributes["diag"]:  # what else is passed does not count
            numbers = np.diag(np.diag(numbers))
        deltas: dict[int, Any] = {parameter.id: numbers}
        for reduction in chain.reductions:
            if hasattr(reduction, "param_forward"):  # else cvxpy lowers variables alone, and no parameter
                deltas = reduction.param_forward(deltas)
        source, target = [], []
        for identity, value in deltas.items():
            start = program.param_id_to_col.get(identity)
            if start is not None:
                flat = np.asarray(value).flatten(order="F")
                known = np.flatnonzero(flat)
                source.append(flat[known].astype(np.int64) - 1)
                target.append(start + known)
        none = np.zeros(0, dtype=np.int64)
        found.append((np.concatenate([none, *source]), np.concatenate([none, *target])))
    return found


def _recovery(chain: Any, program: Any, variable: Any) -> tuple[Any, Any]:
    """For each entry of a variable (by rows) which entry of the conic x it is, and zero for a structural zero."""
    values: dict[int, Any] = program.split_solution(np.arange(1.0, 1 + program.x.size))
    for reduction in reversed(chain.reductions):
        if hasattr(reduction, "var_forward"):  # else split_solution has restored what cvxpy lowered
            values = reduction.var_forward(values)
    value = values[variable.id]
    flat = np.asarray(value.toarray() if hasattr(value, "toarray") else value).reshape(-1)
    return np.maximum(flat.astype(np.int64) - 1, 0), (flat > 0).astype(np.float64)


def _duals(chain: Any, inverse: Any, sizes: tuple[int, int], constraints: Sequence[Any]) -> list[tuple[Any, SparseMap]]:
    """For each constraint the shape of its multiplier, and the matrix that takes the conic y to it."""
    n, m = sizes
    if not constraints:
        return []
    if getattr(inverse[-1], "solver_options", {}) is None:
        inverse[-1].solver_options = {}
    columns = []
    for unit in np.eye(m):  # cvxpy's way back is linear, but known only as code
        found = SimpleNamespace(status="Solved", x=np.zeros(n), z=unit, obj_val=0.0, solve_time=0.0, iterations=0)
        columns.append(chain.invert(found, inverse).dual_vars)
    out = []
    for constraint in constraints:
        rows = [np.ravel(np.asarray(column[constraint.id], dtype=np.float64)) for column in columns]
        matrix = sp.coo_array(np.stack(rows, axis=1))
        shapes = [tuple(variable.shape) for variable in constraint.dual_variables]
        out.append((torch.Size(shapes[0] if len(shapes) == 1 else matrix.shape[:1]), SparseMap.of(matrix)))
    return out
