"""Laws that every operator and every linear solver keeps, run over lists of instances."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from nestopt.linalg import Dense, Diagonal, Hessian, LinearOperator, LinearSolver, Solution, Status, Statuses

DOUBLE = torch.float64
SIDES = [(), (3,), (2, 1, 3)]

C, NEG, SING = Status.CONVERGED, Status.NEGATIVE_CURVATURE, Status.SINGULAR


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    """Normal numbers, drawn in float64 so that both precisions see the same ones."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


def symmetric(eigenvalues: Tensor, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    n = eigenvalues.numel()
    Q, _ = torch.linalg.qr(rand(n, n, seed=seed))
    matrix = (Q * eigenvalues.double()) @ Q.T
    return ((matrix + matrix.T) / 2).to(dtype)


def spd(n: int, condition: float, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    """Eigenvalues from 1 to `condition`, evenly in the logarithm."""
    return symmetric(torch.logspace(0, math.log10(condition), n, dtype=DOUBLE), seed, dtype)


def true_residual(matrix: Tensor, x: Tensor, b: Tensor) -> Tensor:
    """|b - A x| per column, in float64 on the data as they are."""
    product = torch.einsum("...ij,...j->...i", matrix.double(), x.double())
    return torch.linalg.vector_norm(b.double() - product, dim=-1)


def members(solution: Solution) -> list[Status]:
    """The outcomes as a flat list."""
    status = solution.status
    return list(status) if isinstance(status, Statuses) else [status]


# --- operators -------------------------------------------------------------------------------------------------------


def check_operator(A: LinearOperator, matrix: Tensor, transpose: bool = True) -> None:
    """A is linear, is this matrix, keeps its promises, and refuses what does not fit.

    Args:
        A: the operator.
        matrix: what it must equal, of shape (*batch, m, n).
        transpose: whether A has a product with its transpose.
    """
    tol = 1e-12 if A.dtype == DOUBLE else 1e-5
    m, n, batch = A.shape[-2], A.shape[-1], tuple(A.batch_shape)
    assert tuple(A.shape) == tuple(matrix.shape)
    scale = float(matrix.abs().max()) + 1e-300

    def close(left: Tensor, right: Tensor) -> None:
        assert left.shape == right.shape and left.dtype == A.dtype and left.device == A.device
        assert float((left - right).abs().max()) <= tol * scale * math.sqrt(n) * 10

    close(A.to_dense(), matrix)
    for i, sides in enumerate(SIDES):
        v, w = rand(*sides, *batch, n, seed=i, dtype=A.dtype), rand(*sides, *batch, n, seed=9 + i, dtype=A.dtype)
        close(A @ v, torch.einsum("...ij,...j->...i", matrix, v))
        close(A @ (2 * v - 3 * w), 2 * (A @ v) - 3 * (A @ w))
        active = torch.arange(v[..., 0].numel()).reshape(v.shape[:-1]) % 2 == 0
        close(A.active_matvec(v, active), torch.where(active[..., None], A @ v, 0))
        b = A @ v + 1e-6 * rand(*sides, *batch, m, seed=20 + i, dtype=A.dtype)
        r, bound = A.certified_residual(v, b)
        truth = true_residual(matrix, v, b)
        assert r.shape == b.shape and bound.shape == b.shape[:-1]
        assert bool((bound.double() >= truth * (1 - 1e-3) - 1e-15 * scale).all()), "a certificate below the truth"
        if transpose:
            u = rand(*sides, *batch, m, seed=30 + i, dtype=A.dtype)
            left, right = A.vecdot(A @ v, u), A.vecdot(v, A.T @ u)
            assert float((left - right).abs().max()) <= tol * scale * m * n
            close(A.T @ u, torch.einsum("...ji,...j->...i", matrix, u))
    if A.symmetric:
        close(matrix, matrix.mT)
    if A.definite:
        assert bool((torch.linalg.eigvalsh(matrix) > 0).all())
    _check_refusals(A, m, n, batch)
    if not batch:
        S = A.to_scipy()
        v, V = rand(n, seed=1).numpy(), rand(n, 3, seed=2).numpy()
        dense = matrix.double().numpy()
        assert np.allclose(S @ v, dense @ v, atol=10 * tol * scale * n)
        assert np.allclose(S @ V, dense @ V, atol=10 * tol * scale * n)
        if transpose:
            assert np.allclose(
                S.T @ rand(m, seed=3).numpy(), dense.T @ rand(m, seed=3).numpy(), atol=10 * tol * scale * n
            )
    else:
        with pytest.raises(ValueError, match="batch"):
            A.to_scipy()


def _check_refusals(A: LinearOperator, m: int, n: int, batch: tuple[int, ...]) -> None:
    good = torch.zeros(*batch, n, dtype=A.dtype)
    for wrong, error in [
        (torch.zeros(*batch, n + 1, dtype=A.dtype), ValueError),
        (torch.zeros((), dtype=A.dtype), ValueError),
        (good.to(torch.float16), ValueError),
        (good.numpy(), TypeError),
        ([0.0] * n, TypeError),
    ]:
        with pytest.raises(error, match=type(A).__name__):
            A @ wrong
    if batch:
        with pytest.raises(ValueError, match="one vector a system"):
            A @ torch.zeros(n, dtype=A.dtype)


# --- linear solvers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Promises:
    """What one solver promises, beyond what all of them do.

    Args:
        condition: symmetric positive definite systems of this condition number converge in float64.
        indefinite: how indefinite and negative definite systems end.
        singular: how singular systems without a solution may end; with one, CONVERGED is possible too.
        needs_symmetric: whether it refuses matrices without that promise.
        direct: whether x0 and iterations mean nothing to it.
        directions: whether NEGATIVE_CURVATURE and SINGULAR come with their direction.
        steady: whether the number of steps depends on rounding by a step or two only.
    """

    condition: float = 1e4
    indefinite: Status = C
    singular: tuple[Status, ...] = (SING,)
    needs_symmetric: bool = True
    direct: bool = False
    directions: bool = True
    steady: bool = True

    def reach(self, dtype: torch.dtype) -> float:
        """The condition number that converges; in float32 the rounding of x itself ends it at 1e-5 / 1e-7."""
        return self.condition if dtype == DOUBLE else min(self.condition, 1e2)


def check_linear_solver(make: Callable[[], LinearSolver], promises: Promises, dtype: torch.dtype) -> None:
    """Every law below, in one precision.

    Args:
        make: builds the solver, with its default tolerances.
        promises: what it promises.
        dtype: of the systems.
    """
    for law in (
        check_truth, check_zero, check_warm_start, check_names, check_shapes, check_batches, check_mixed_block,
        check_scale, check_refusals, check_made_operators,
    ):  # fmt: skip
        law(make(), promises, dtype)


def verify(solution: Solution, matrix: Tensor, b: Tensor) -> None:
    """CONVERGED is true of the float64 residual, the reported numbers are those of x, and nothing is NaN unnamed."""
    truth = true_residual(matrix, solution.x, b)
    error, tolerance = (torch.as_tensor(value, dtype=DOUBLE) for value in (solution.error, solution.tolerance))
    assert solution.x.shape == b.shape and solution.x.dtype == b.dtype
    assert error.shape == truth.shape == solution.codes.shape
    right = solution.codes == C.code
    assert bool((truth <= tolerance * (1 + 1e-6))[right].all()), f"CONVERGED, but {truth} > {tolerance}"
    assert bool((error <= tolerance)[right].all())
    finite = torch.isfinite(truth) & torch.isfinite(error)
    assert bool((finite | ~right).all())
    size = torch.linalg.vector_norm(b.double(), dim=-1)
    eps = torch.finfo(b.dtype).eps
    scale = torch.linalg.matrix_norm(matrix.double()) * torch.linalg.vector_norm(solution.x.double(), dim=-1) + size
    assert bool(((error - truth).abs() <= 10 * eps * scale)[finite].all()), f"reported {error}, true {truth}"
    assert (solution.status == C) is solution.converged if truth.ndim == 0 else True
    limits = torch.as_tensor(solution.iterations)
    assert limits.shape == truth.shape and bool((limits >= 0).all()) and solution.products >= 0


def check_truth(solver: LinearSolver, promises: Promises, dtype: torch.dtype) -> None:
    """Easy systems converge to the solution; hard ones never claim what is not so."""
    n = 24
    for condition in (1.0, math.sqrt(promises.reach(dtype)), promises.reach(dtype), 1e6, 1e9, 1e14):
        matrix = spd(n, condition, seed=1, dtype=dtype)
        b = rand(n, seed=2, dtype=dtype)
        solution = solver(Dense(matrix, symmetric=True), b)
        verify(solution, matrix, b)
        if condition <= promises.reach(dtype):
            assert solution.status == C, (condition, solution.status, solution.error)
            x = torch.linalg.solve(matrix.double(), b.double())
            error = float(torch.linalg.vector_norm(solution.x.double() - x) / torch.linalg.vector_norm(x))
            assert error <= condition * solution.tolerance / float(torch.linalg.vector_norm(b.double())) * 1.01


def check_zero(solver: LinearSolver, promises: Promises, dtype: torch.dtype) -> None:
    """b = 0 gives x = 0, at once, from any x0 and for any finite matrix."""
    for matrix in (spd(6, 10.0, dtype=dtype), torch.zeros(6, 6, dtype=dtype)):
        b = torch.zeros(6, dtype=dtype)
        for x0 in (None, rand(6, dtype=dtype)):
            solution = solver(Dense(matrix, symmetric=True), b, x0)
            assert solution.status == C and solution.iterations == 0 and solution.residual_norm == 0
            assert torch.equal(solution.x, b)


def check_warm_start(solver: LinearSolver, promises: Promises, dtype: torch.dtype) -> None:
    """A start at the solution costs no step and comes back; any start leads to the solution; tiny b are not zero."""
    matrix = spd(12, promises.reach(dtype) ** 0.5, seed=3, dtype=dtype)
    A, x = Dense(matrix, symmetric=True), 1e3 * rand(12, seed=4, dtype=dtype)
    b = torch.einsum("ij,j->i", matrix.double(), x.double()).to(dtype)
    solution = solver(A, b, x)
    verify(solution, matrix, b)
    assert solution.status == C
    if not promises.direct:
        assert solution.iterations == 0
        assert torch.equal(solution.x, x)
    for start in (-x, 1e-3 * x, rand(12, seed=5, dtype=dtype)):
        again = solver(A, b, start)
        verify(again, matrix, b)
        assert again.status == C
    tiny = 1e-25 if dtype == torch.float32 else 1e-180
    solution = solver(A, b * tiny)
    assert solution.status == C
    assert float(torch.linalg.vector_norm(solution.x.double() / tiny - x.double())) <= 0.1 * float(x.double().norm())


def check_names(solver: LinearSolver, promises: Promises, dtype: torch.dtype) -> None:
    """Negative definite, indefinite, singular and NaN are named rightly."""
    n = 16
    b = rand(n, seed=6, dtype=dtype)
    values = torch.linspace(1, 4, n, dtype=DOUBLE)
    signs = torch.tensor([1.0, -1.0] * (n // 2), dtype=DOUBLE)
    kernel = torch.cat([torch.zeros(2, dtype=DOUBLE), values[2:]])
    for name, matrix, allowed in (
        ("negative definite", symmetric(-values, 7, dtype), (promises.indefinite,)),
        ("indefinite", symmetric(signs * values, 8, dtype), (promises.indefinite,)),
        ("singular", symmetric(kernel, 9, dtype), promises.singular),
        ("zero", torch.zeros(n, n, dtype=dtype), (SING,)),
    ):
        solution = solver(Dense(matrix, symmetric=True), b)
        assert solution.status in allowed, (name, solution.status)
        if not torch.isnan(solution.x).any():
            verify(solution, matrix, b)
        if promises.directions and solution.status in (NEG, SING):
            assert solution.direction is not None
            p = solution.direction.double()
            assert abs(float(p.norm()) - 1) <= 1e-5
            curvature = float(p @ matrix.double() @ p)
            assert curvature < 0 if solution.status == NEG else abs(curvature) <= 100 * torch.finfo(dtype).eps * 4
        if not promises.direct or solution.status == C:
            assert torch.isfinite(solution.x).all()
    consistent = symmetric(kernel, 9, dtype)
    solution = solver(Dense(consistent, symmetric=True), (consistent.double() @ b.double()).to(dtype))
    assert solution.status in ((SING,) if promises.direct else (C, Status.MAX_ITER)), solution.status
    nan = torch.full((n,), math.nan, dtype=dtype)
    good = spd(n, 4.0, dtype=dtype)
    poisoned = good.clone()
    poisoned[3, 3] = math.nan
    for matrix, right in ((poisoned, b), (good, nan), (good, torch.full_like(nan, math.inf))):
        assert solver(Dense(matrix, symmetric=True), right).status == Status.NON_FINITE


def check_shapes(solver: LinearSolver, promises: Promises, dtype: torch.dtype) -> None:
    """Any number of right-hand sides, n = 1 and n = 0; a 0-d right-hand side is refused."""
    matrix = spd(5, 4.0, dtype=dtype)
    A = Dense(matrix, symmetric=True)
    for sides in (*SIDES, (0,), (2, 0)):
        b = rand(*sides, 5, dtype=dtype)
        solution = solver(A, b)
        verify(solution, matrix, b)
        assert all(member == C for member in members(solution))
        assert isinstance(solution.iterations, int) if sides == () else solution.iterations.shape == sides
    one = solver(Dense(torch.full((1, 1), 4.0, dtype=dtype), symmetric=True), torch.full((1,), 2.0, dtype=dtype))
    assert one.status == C and float(one.x) == 0.5
    empty = solver(Dense(torch.zeros(0, 0, dtype=dtype), symmetric=True), torch.zeros(0, dtype=dtype))
    assert empty.status == C and empty.x.shape == (0,)
    with pytest.raises(ValueError, match="b must have shape"):
        solver(A, torch.tensor(1.0, dtype=dtype))


def check_batches(solver: LinearSolver, promises: Promises, dtype: torch.dtype) -> None:
    """A block, a batch of systems, and both at once are the same as one column after the other."""
    n = 10
    matrices = torch.stack(
        [spd(n, c, seed=i, dtype=dtype) for i, c in enumerate((1.0, 4.0, promises.reach(dtype) ** 0.5))]
    )
    b = rand(2, 3, n, seed=10, dtype=dtype)
    x0 = rand(2, 3, n, seed=11, dtype=dtype)
    rtol = 1e-10 if dtype == DOUBLE else 1e-3  # float32 block and column products differ by rounding
    for start in (None, x0):
        batch = solver(Dense(matrices, symmetric=True), b, start)
        verify(batch, matrices, b)
        for i in range(3):
            A = Dense(matrices[i], symmetric=True)
            block = solver(A, b[:, i], None if start is None else start[:, i])
            for s in range(2):
                alone = solver(A, b[s, i], None if start is None else start[s, i])
                size = float(torch.linalg.vector_norm(alone.x))
                for other, where in ((batch, (s, i)), (block, (s,))):
                    assert float(torch.linalg.vector_norm(other.x[where] - alone.x)) <= rtol * size
                    assert other.status[where] == alone.status
                    slack = 1 if dtype == DOUBLE else 2  # the last bit may decide over the last step
                    assert not promises.steady or abs(int(other.iterations[where]) - alone.iterations) <= slack


def check_mixed_block(solver: LinearSolver, promises: Promises, dtype: torch.dtype) -> None:
    """Columns that are easy, hard, zero and NaN, in one block and one batch of systems, each end in their own way."""
    n = 20
    matrix = spd(n, promises.reach(dtype), seed=12, dtype=dtype)
    easy = torch.linalg.eigh(matrix.double()).eigenvectors[:, -1].to(dtype)
    b = torch.stack(
        [rand(n, seed=13, dtype=dtype), 1e6 * easy, 0 * easy, math.nan * easy, rand(n, seed=14, dtype=dtype)]
    )
    solution = solver(Dense(matrix, symmetric=True), b[:3])  # a NaN would hide a mean over columns
    verify(solution, matrix, b[:3])
    assert members(solution) == [C, C, C]
    solution = solver(Dense(matrix, symmetric=True), b)
    verify(solution, matrix, b)
    assert members(solution) == [C, C, C, Status.NON_FINITE, C]
    if not promises.direct:
        counts = solution.iterations.tolist()
        assert counts[2] == counts[3] == 0
        assert 0 < counts[1] < counts[0]

    values = torch.linspace(1, 4, n, dtype=DOUBLE)
    kernel = torch.cat([torch.zeros(2, dtype=DOUBLE), values[2:]])
    systems = torch.stack(
        [symmetric(v, 15, dtype) for v in (values, -values, kernel)] + [torch.full((n, n), math.nan, dtype=dtype)]
    )
    right = torch.stack([rand(4, n, seed=16, dtype=dtype), torch.zeros(4, n, dtype=dtype)])
    solution = solver(Dense(systems, symmetric=True), right)
    first, second = members(solution)[:4], members(solution)[4:]
    assert first[0] == C and first[1] == promises.indefinite and first[2] in promises.singular
    assert first[3] == Status.NON_FINITE
    assert second[:3] == [C, C, C]
    if promises.directions and solution.direction is not None:
        named = (solution.codes == NEG.code) | (solution.codes == SING.code)
        assert bool((solution.direction[~named] == 0).all())


def check_scale(solver: LinearSolver, promises: Promises, dtype: torch.dtype) -> None:
    """c A and c b for c = 1e-12 and 1e12: the same steps up to rounding, the scaled solution, the same names."""
    n = 16
    matrix, b = spd(n, promises.reach(dtype) ** 0.5, seed=17, dtype=dtype), rand(n, seed=18, dtype=dtype)
    negative = symmetric(-torch.linspace(1, 4, n, dtype=DOUBLE), 19, dtype)
    kernel = symmetric(torch.cat([torch.zeros(2, dtype=DOUBLE), torch.linspace(1, 4, n - 2, dtype=DOUBLE)]), 20, dtype)
    plain = solver(Dense(matrix, symmetric=True), b)
    for c in (1e-12, 1e12):
        for left, right in ((c, 1.0), (1.0, c), (c, c)):
            solution = solver(Dense(left * matrix, symmetric=True), right * b)
            verify(solution, left * matrix, right * b)
            assert solution.status == C
            assert not promises.steady or abs(solution.iterations - plain.iterations) <= 2 + 0.1 * plain.iterations
            error = solution.x.double() * (left / right) - plain.x.double()
            limit = 10 * promises.reach(dtype) ** 0.5 * plain.tolerance / float(b.double().norm())
            assert float(error.norm()) <= limit * float(plain.x.double().norm())
        assert solver(Dense(c * negative, symmetric=True), b).status == promises.indefinite
        assert solver(Dense(c * kernel, symmetric=True), b).status in promises.singular


def check_refusals(solver: LinearSolver, promises: Promises, dtype: torch.dtype) -> None:
    """What cannot be meant is refused by an error that names the solver or the operator."""
    matrix, b = spd(4, 4.0, dtype=dtype), rand(4, dtype=dtype)
    A = Dense(matrix, symmetric=True)
    name = type(solver).__name__
    with pytest.raises(TypeError, match=f"{name}: A must be a LinearOperator"):
        solver(matrix, b)
    if promises.needs_symmetric:
        with pytest.raises(TypeError, match=f"{name}: A must be promised symmetric"):
            solver(Dense(matrix), b)
    else:
        general = matrix + torch.triu(rand(4, 4, dtype=dtype), 1)
        verify(solver(Dense(general), b), general, b)
        assert solver(Dense(general), b).status == C
    for wrong in (rand(5, dtype=dtype), rand(4, dtype=dtype).half()):
        with pytest.raises(ValueError, match="b must"):
            solver(A, wrong)
    with pytest.raises(ValueError, match="x0 must"):
        solver(A, b, rand(3, 4, dtype=dtype))
    with pytest.raises(ValueError, match="rtol must be a number >= 0"):
        type(solver)(**{**vars(solver), "rtol": -1.0})
    with pytest.raises(ValueError, match="atol must be a number >= 0"):
        type(solver)(**{**vars(solver), "atol": math.nan})
    loose = type(solver)(**{**vars(solver), "rtol": 0.0, "atol": 0.5})
    solution = loose(A, b)
    assert solution.status == C and solution.tolerance == 0.5


def check_made_operators(solver: LinearSolver, promises: Promises, dtype: torch.dtype) -> None:
    """A Hessian, and operators made of others, are solved like the matrices that they are."""
    n = 8
    factor = torch.linalg.cholesky(spd(n, 2.0, seed=20)).to(dtype)
    centre = rand(n, seed=21, dtype=dtype)
    H = Hessian(lambda y: (y @ factor).square().sum() + 0.1 * (y - centre).cosh().log().sum(), 0 * centre)
    half = Dense(factor.mT)
    for A in (H, half.T @ half, 2.0 * H.shift(0.5) + Diagonal(torch.linspace(1, 2, n, dtype=dtype))):
        b = rand(2, n, seed=22, dtype=dtype)
        solution = solver(A, b)
        verify(solution, A.to_dense(), b)
        assert members(solution) == [C, C]
