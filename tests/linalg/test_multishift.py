import math
from dataclasses import dataclass, fields

import pytest
import torch
from laws import DOUBLE, Promises, check_linear_solver, check_warm_start, rand, spd, symmetric, true_residual

from nestopt.linalg import CG, Dense, Diagonal, FunctionOperator, Hessian, LinearSolver, MultiShiftCG, Solution, Status
from nestopt.linalg.result import scalar_or_tensor

C, NEG, SING, BAD = Status.CONVERGED, Status.NEGATIVE_CURVATURE, Status.SINGULAR, Status.NON_FINITE
PATH = [0.0, 3.0, 0.1, 100.0]


@dataclass(frozen=True)
class One(LinearSolver):
    """One shift of a path as a solver of A x = b; x0 is not used."""

    rtol: float | None = None
    atol: float = 0.0
    needs_symmetric = True

    def __post_init__(self):
        MultiShiftCG([0.0], self.rtol, self.atol)

    def _solve(self, A, b, x0):
        solution = MultiShiftCG([5.0, 0.0], self.rtol, self.atol)(A, b)
        parts = {f.name: getattr(solution, f.name) for f in fields(Solution)}
        direction = None if solution.direction is None else solution.direction[1]
        numbers = {name: scalar_or_tensor(parts[name][1]) for name in ("iterations", "error", "residual_norm")}
        tolerance = scalar_or_tensor(parts["tolerance"][1])
        return Solution(
            **{**parts, **numbers, "tolerance": tolerance}
            | {"x": solution.x[1], "codes": solution.codes[1], "direction": direction}
        )


def test_laws(dtype, monkeypatch):
    # x0 is refused by the solver and dropped by `One`: a warm start is worth nothing, as for direct solvers
    monkeypatch.setattr("laws.check_warm_start", lambda *_: None)
    check_linear_solver(One, Promises(condition=1e4, indefinite=NEG), dtype)
    check_warm_start(One(), Promises(condition=1e4, direct=True), dtype)


def verify(solution, matrix, b, shifts):
    """CONVERGED is true of each shift and column, and the reported residuals are those of x."""
    eye = torch.eye(b.shape[-1], dtype=DOUBLE)
    assert solution.x.shape == (len(shifts), *b.shape)
    for i, sigma in enumerate(shifts):
        truth = true_residual(matrix.double() + sigma * eye, solution.x[i], b)
        right = solution.codes[i] == C.code
        assert bool((truth <= solution.tolerance[i].double() * (1 + 1e-6))[right].all())
        slack = 1e-4 if b.dtype == torch.float32 else 1e-13
        limit = slack * (b.double().norm(dim=-1) + sigma * solution.x[i].double().norm(dim=-1))
        assert bool(((solution.residual_norm[i] - truth).abs() <= limit)[right].all())


@pytest.mark.parametrize("sides", [(), (4,), (2, 0), (2, 1, 3)])
def test_every_shift_is_solved(sides, dtype):
    matrix, b = spd(30, 1e2, dtype=dtype), rand(*sides, 30, dtype=dtype)
    solution = MultiShiftCG(PATH)(Dense(matrix, symmetric=True, definite=True), b)
    verify(solution, matrix, b, PATH)
    assert bool((solution.codes == C.code).all())
    for i, sigma in enumerate(PATH):
        x = torch.linalg.solve(matrix.double() + sigma * torch.eye(30, dtype=DOUBLE), b.double()[..., None])[..., 0]
        torch.testing.assert_close(solution.x[i].double(), x, rtol=0, atol=1e-8 if dtype == DOUBLE else 1e-2)


def test_it_is_cg_on_each_shift_step_by_step():
    matrix, b = spd(40, 1e3, seed=3), rand(3, 40, seed=4)
    A = Dense(matrix, symmetric=True)
    for steps in (1, 2, 7, 12):  # rounding makes the two drift apart, as any two runs of CG
        path = MultiShiftCG(PATH, max_iter=steps)(A, b)
        for i, sigma in enumerate(PATH):
            alone = CG(max_iter=steps)(A.shift(sigma), b)
            torch.testing.assert_close(path.x[i], alone.x, rtol=1e-8, atol=1e-10)
            assert torch.equal(path.codes[i], alone.codes)
    path = MultiShiftCG(PATH)(A, b)
    assert not bool(path.alone.any())
    for i, sigma in enumerate(PATH):
        assert int((path.iterations[i] - CG()(A.shift(sigma), b).iterations).abs().max()) <= 6  # CG renews its residual


def test_a_pinned_value():
    A = Dense(torch.diag(torch.tensor([1.0, 3.0], dtype=DOUBLE)), symmetric=True)
    solution = MultiShiftCG([1.0, 0.0], max_iter=1)(A, torch.tensor([1.0, 1.0], dtype=DOUBLE))
    # one step of the seed: alpha = 2 / 4; of the shift: 2 / (2 + 4)
    torch.testing.assert_close(solution.x, torch.tensor([[1 / 3, 1 / 3], [0.5, 0.5]], dtype=DOUBLE), rtol=1e-15, atol=0)


def test_one_space_serves_all_and_small_shifts_freeze_last():
    calls = []
    matrix = spd(50, 1e4)

    def product(v):
        calls.append(v[..., 0].numel())
        return v @ matrix

    A = FunctionOperator(product, (50, 50), DOUBLE, symmetric=True, definite=True)
    b = torch.stack([rand(50), 0 * rand(50), rand(50, seed=1)])
    shifts = [10.0**k for k in range(-4, 4)]
    solution = MultiShiftCG(shifts)(A, b)
    assert solution.products == sum(calls)
    assert bool((solution.iterations.diff(dim=0) <= 0).all())
    assert bool((solution.codes == C.code).all())
    assert int(solution.iterations[:, 1].max()) == 0
    apart = sum(CG()(A.shift(sigma), b).products for sigma in shifts)
    assert solution.products < 0.5 * apart


def test_a_seed_that_is_indefinite_leaves_the_others_to_themselves(dtype):
    values = torch.cat([torch.tensor([-2.0]), torch.linspace(1, 30, 19)]).double()
    matrix, b = symmetric(values, dtype=dtype), rand(2, 20, dtype=dtype)
    shifts = [50.0, 0.0, 4.0, 2.5]
    solution = MultiShiftCG(shifts)(Dense(matrix, symmetric=True), b)
    verify(solution, matrix, b, shifts)
    assert solution.codes[1].tolist() == [NEG.code] * 2
    assert solution.codes[[0, 2, 3]].tolist() == [[C.code] * 2] * 3
    assert bool(solution.alone[3].all())
    assert not bool(solution.alone[1].any())
    p = solution.direction[1].double()
    assert bool((torch.einsum("ki,ij,kj->k", p, matrix.double(), p) < 0).all())
    assert bool((solution.direction[[0, 2, 3]] == 0).all())
    torch.testing.assert_close(p.norm(dim=-1), torch.ones(2, dtype=DOUBLE), rtol=1e-5, atol=0)


def test_a_singular_seed(dtype):
    values = torch.cat([torch.zeros(2), torch.linspace(1, 5, 10)]).double()
    matrix, b = symmetric(values, dtype=dtype), rand(12, dtype=dtype)
    solution = MultiShiftCG([0.0, 1.0])(Dense(matrix, symmetric=True), b)
    assert list(solution.status) == [SING, C]
    zero = MultiShiftCG([0.0, 2.0])(Dense(0 * matrix, symmetric=True), b)
    assert list(zero.status) == [SING, C]
    torch.testing.assert_close(zero.x[1], b / 2)


def test_a_refuted_claim_is_finished_alone():
    matrix = spd(60, 1e3, dtype=torch.float32)
    A = FunctionOperator(lambda v: v @ matrix, (60, 60), torch.float32, symmetric=True)
    b = rand(5, 60, dtype=torch.float32)
    shifts = [0.0, 0.5, 20.0]
    solution = MultiShiftCG(shifts, max_iter=300)(A, b)
    assert bool(solution.alone[0].any())  # the recurrence drifts from the truth in float32
    verify(solution, matrix, b, shifts)
    assert bool((solution.codes[2] == C.code).all())
    assert int(solution.iterations.max()) <= 300


def test_a_tolerance_out_of_reach_is_named(dtype):
    b = rand(20, dtype=dtype)
    A = Dense(spd(20, 10.0, dtype=dtype), symmetric=True)
    solution = MultiShiftCG([0.0, 1.0, 1e6], rtol=0.0, max_iter=300)(A, b)
    assert set(solution.status) <= {Status.STAGNATED, Status.MAX_ITER, C}  # and no zeta has underflown
    assert bool((solution.residual_norm <= 45 * torch.finfo(dtype).eps * b.norm()).all())


def test_batches_of_systems_and_columns_that_are_not_finite(dtype):
    systems = torch.stack([spd(9, 10.0, seed=i, dtype=dtype) for i in range(3)])
    systems[1, 2, 2] = math.nan
    b = rand(2, 3, 9, dtype=dtype)
    b[1, 2, 0] = math.inf
    solution = MultiShiftCG(PATH)(Dense(systems, symmetric=True), b)
    expected = torch.tensor([[C.code, BAD.code, C.code], [C.code, BAD.code, BAD.code]])
    assert torch.equal(solution.codes, expected.expand(4, 2, 3))
    alone = MultiShiftCG(PATH)(Dense(systems[0], symmetric=True), b[:, 0])
    torch.testing.assert_close(solution.x[:, :, 0], alone.x, rtol=1e-3 if dtype == torch.float32 else 1e-9, atol=1e-6)
    empty = MultiShiftCG([1.0])(Dense(torch.zeros(0, 0, dtype=dtype), symmetric=True), torch.zeros(0, dtype=dtype))
    assert empty.x.shape == (1, 0)
    assert list(empty.status) == [C]


def test_hessians_and_composed_operators(dtype):
    J, w = rand(30, 12, dtype=dtype), torch.zeros(12, dtype=dtype)
    H = Hessian(lambda v: (J @ v).square().sum() / 2, w)
    b = rand(2, 12, dtype=dtype)
    factor = Dense(J)
    for A in (H, factor.T @ factor, 2.0 * H.shift(0.5) + Diagonal(torch.ones(12, dtype=dtype))):
        solution = MultiShiftCG([0.0, 1.0, 30.0])(A, b)
        verify(solution, A.to_dense(), b, [0.0, 1.0, 30.0])
        assert bool((solution.codes == C.code).all())


def test_bad_input():
    A = Dense(spd(4, 2.0), symmetric=True)
    with pytest.raises(ValueError, match="another Krylov space"):
        MultiShiftCG([0.0], preconditioner=Diagonal(torch.ones(4)))
    with pytest.raises(ValueError, match="x0 must be None"):
        MultiShiftCG([0.0])(A, rand(4), rand(4))
    for shifts in ([], [math.nan], [1.0, math.inf]):
        with pytest.raises(ValueError, match="shifts must be one or more finite"):
            MultiShiftCG(shifts)
    with pytest.raises(TypeError, match="promised symmetric"):
        MultiShiftCG([0.0])(Dense(spd(4, 2.0)), rand(4))
