import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
from laws import DOUBLE, Promises, check_linear_solver, members, rand, spd, symmetric, verify

from nestopt.linalg import CG, GMRES, MINRES, Dense, Diagonal, FunctionOperator, Hessian, Neumann, Recycled, Status
from nestopt.linalg.recycle import Memory
from nestopt.linalg.ritz_space import Recorder, RitzInverse, RitzSpace, refine

C, NEG, SING = Status.CONVERGED, Status.NEGATIVE_CURVATURE, Status.SINGULAR


class Forgetful(Recycled):
    """Recycled that begins anew at each call: what is left is the wrapped solver."""

    def _solve(self, A, b, x0):
        self.memory.reset()
        return super()._solve(A, b, x0)


@pytest.mark.parametrize(
    ("solver", "promises", "dtype"),
    [
        (CG, Promises(condition=1e4, indefinite=NEG), DOUBLE),
        (CG, Promises(condition=1e4, indefinite=NEG), torch.float32),
        (MINRES, Promises(condition=1e4), DOUBLE),
    ],
)
def test_laws_of_the_first_solve(solver, promises, dtype):
    check_linear_solver(lambda: Forgetful(solver(), rank=3), promises, dtype)


def sequence(n, kind, drift, systems, seed=0, indefinite=False):
    """Matrices and right-hand sides that change a little from one to the next."""
    g = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=DOUBLE))
    k = n // 30
    values = {
        "outliers": torch.cat([torch.logspace(0, 1.5, n - k), torch.logspace(2, 4, k)]),
        "small": torch.cat([torch.logspace(0, 1, k), torch.logspace(3, 3.5, n - k)]),
        "no gap": torch.logspace(0, 2.5, n),
        "unrelated": torch.cat([torch.logspace(0, 1.5, n - k), torch.logspace(2, 4, k)]),
    }[kind].double()
    if indefinite:
        values = values * torch.where(torch.arange(n) % 3 == 0, -1.0, 1.0)
    b = torch.randn(n, generator=g, dtype=DOUBLE)
    for _ in range(systems):
        matrix = (Q * values) @ Q.T
        yield (matrix + matrix.T) / 2, b
        K = torch.randn(n, n, generator=g, dtype=DOUBLE)
        Q, _ = torch.linalg.qr(K if kind == "unrelated" else Q + Q @ (K - K.T) * (drift / math.sqrt(2 * n)))
        values = values * (1 + drift * torch.randn(n, generator=g, dtype=DOUBLE))
        b = b + drift * torch.randn(n, generator=g, dtype=DOUBLE)


def run(solver, systems, promise=True):
    """Products of each solve, every one checked against the matrix, and the counts against the calls."""
    products, reports = [], []
    for matrix, b in systems:
        calls = []

        def product(v, matrix=matrix, calls=calls):
            calls.append(v[..., 0].numel())
            return v @ matrix.mT

        A = FunctionOperator(product, tuple(matrix.shape), b.dtype, symmetric=promise)
        solution = solver(A, b)
        verify(solution, matrix, b)
        assert members(solution) == [C] * solution.codes.numel()
        assert solution.products == sum(calls) == solution.recycling.products
        products.append(solution.products)
        reports.append(solution.recycling)
    return products, reports


@pytest.mark.parametrize("drift", [0.003, 0.02])
@pytest.mark.parametrize("kind", ["outliers", "small"])
def test_outliers_are_deflated_at_no_product(kind, drift):
    systems = list(sequence(300, kind, drift, 6))
    cold = [CG(rtol=1e-6)(Dense(matrix, symmetric=True), b).products for matrix, b in systems]
    warm, _ = run(Recycled(CG(rtol=1e-6), rank=0), systems)
    recycled, reports = run(Recycled(CG(rtol=1e-6), rank=10), systems)
    assert recycled[0] == cold[0] == warm[0]
    assert sum(recycled[1:]) < 0.55 * sum(warm[1:])
    assert sum(recycled[1:]) < 0.5 * sum(cold[1:])
    assert all(report.recycled and report.rank == 10 and report.warm_started for report in reports[1:])


@pytest.mark.parametrize("drift", [0.003, 0.03])
def test_without_a_gap_it_costs_what_warm_started_cg_does(drift):
    systems = list(sequence(240, "no gap", drift, 7, seed=1))
    warm, _ = run(Recycled(CG(rtol=1e-6), rank=0), systems)
    recycled, _ = run(Recycled(CG(rtol=1e-6), rank=8), systems)
    assert sum(recycled) <= 1.02 * sum(warm)  # the trial, a few products


@pytest.mark.parametrize("solver", [CG, MINRES, GMRES])
def test_unrelated_systems_cost_one_trial_and_then_a_pause(solver):
    systems = list(sequence(100, "unrelated", 0.0, 6))
    promise = solver is not GMRES
    wrapped = solver(rtol=1e-6) if promise else GMRES(rtol=1e-6, restart=100)
    plain, _ = run(Recycled(wrapped, rank=0), systems, promise)
    recycled, reports = run(Recycled(wrapped, rank=5), systems, promise)
    assert sum(recycled) <= sum(plain) + max(plain) + 2
    assert not any(report.recycled for report in reports)
    assert "given up" in reports[1].reason
    assert all("tried again" in report.reason for report in reports[2:5])
    assert sum(recycled[2:5]) <= 1.05 * sum(plain[2:5])


def test_indefinite_sequences():
    systems = list(sequence(90, "outliers", 0.002, 4, indefinite=True))
    warm, _ = run(Recycled(MINRES(rtol=1e-4), rank=0), systems)
    recycled, _ = run(Recycled(MINRES(rtol=1e-4), rank=8), systems)
    assert sum(recycled[1:]) < 0.85 * sum(warm[1:])


def test_nonsymmetric_sequences():
    g = torch.Generator().manual_seed(0)
    n = 150
    upper = 0.3 * torch.triu(torch.randn(n, n, generator=g, dtype=DOUBLE), 1) / 3
    systems = [(matrix + upper, b) for matrix, b in sequence(n, "small", 0.005, 4)]
    warm, _ = run(Recycled(GMRES(rtol=1e-6, restart=40, max_iter=3000), rank=0), systems, promise=False)
    recycled, _ = run(Recycled(GMRES(rtol=1e-6, restart=40, max_iter=3000), rank=10), systems, promise=False)
    assert sum(recycled[1:]) < 0.75 * sum(warm[1:])


@pytest.mark.parametrize("sides", [(), (3,), (2, 1)])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_blocks_and_batches_of_systems(sides, batch, dtype):
    n, kinds = 90, ["outliers", "small"]
    pairs = [list(sequence(n, kind, 0.005, 5)) for kind in kinds[: len(batch) + 1]]
    solver = Recycled(CG(rtol=1e-5 if dtype == DOUBLE else 1e-3), rank=4)
    start = rand(*sides, *batch, n, seed=4, dtype=dtype)
    spent = []
    for i in range(5):
        matrix = torch.stack([pair[i][0] for pair in pairs]) if batch else pairs[0][i][0]
        matrix = matrix.to(dtype)
        solution = solver(Dense(matrix, symmetric=True), start + 0.01 * i)
        verify(solution, matrix, start + 0.01 * i)
        assert solution.x.shape == start.shape
        assert all(member == C for member in members(solution))
        spent.append(solution.products)
    assert solver.memory.space.W.shape == (4, *batch, n)
    assert spent[-1] < 0.75 * spent[0]


def test_columns_that_fail_are_named_and_do_not_spoil_the_next_solve():
    n = 30
    matrix = symmetric(torch.cat([torch.linspace(1, 2, 26), torch.tensor([50.0, 90.0, 200.0, 400.0])]).double())
    b = torch.stack([rand(n), math.nan * rand(n), 0 * rand(n)])
    solver = Recycled(CG(), rank=4)
    for _ in range(3):
        solution = solver(Dense(matrix, symmetric=True), b)
        assert members(solution) == [C, Status.NON_FINITE, C]
    assert torch.isfinite(solver.memory.solution).all()
    assert torch.isfinite(solver.memory.space.W).all()
    b = rand(3, n, seed=5)
    assert members(solver(Dense(matrix, symmetric=True), b)) == [C, C, C]
    for wrong, status in (
        (symmetric(-torch.linspace(1, 2, n).double()), NEG),
        (matrix - 1.5 * torch.eye(n).double(), NEG),
        (0 * matrix, SING),
        (math.nan * matrix, Status.NON_FINITE),
    ):
        solution = solver(Dense(wrong, symmetric=True), b)
        assert members(solution) == [status] * 3
        if status is NEG:
            curvature = torch.einsum("si,ij,sj->s", solution.direction, wrong, solution.direction)
            assert bool((curvature < 0).all())
    assert members(solver(Dense(matrix, symmetric=True), b)) == [C, C, C]


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_scale(factor, dtype):
    systems = list(sequence(90, "outliers", 0.005, 4))
    rtol = 1e-6 if dtype == DOUBLE else 1e-3

    def steps(c):
        solver = Recycled(CG(rtol=rtol), rank=3)
        return [solver(Dense((c * M).to(dtype), symmetric=True), b.to(dtype)).iterations for M, b in systems]

    plain, scaled = steps(1.0), steps(factor)
    assert all(abs(p - s) <= 2 + 0.2 * p for p, s in zip(plain, scaled, strict=True))


def test_the_memory_can_be_copied_saved_and_forgotten():
    systems = list(sequence(90, "outliers", 0.005, 4))
    solver = Recycled(CG(rtol=1e-8), rank=3)
    run(solver, systems[:3])
    state = pickle.loads(pickle.dumps(solver.memory.state_dict()))
    restored = Recycled(CG(rtol=1e-8), rank=3)
    restored.memory.load_state_dict(state)
    others = [copy.deepcopy(solver), pickle.loads(pickle.dumps(solver)), restored]
    expected, _ = run(solver, systems[3:])
    for other in others:
        assert other.memory is not solver.memory
        assert run(other, systems[3:])[0] == expected
    looser = replace(solver, rtol=1e-2)
    assert looser.memory is solver.memory
    assert looser(Dense(systems[3][0], symmetric=True), systems[3][1]).tolerance == pytest.approx(
        1e-2 * float(systems[3][1].norm())
    )
    with pytest.raises(ValueError, match="state_dict"):
        restored.memory.load_state_dict({"W": None})
    solver.memory.reset()
    assert solver.memory == Memory()
    assert run(solver, systems[3:])[0] == [CG(rtol=1e-8)(Dense(systems[3][0], symmetric=True), systems[3][1]).products]


def test_another_shape_or_dtype_is_forgotten_openly():
    solver = Recycled(CG(), rank=2)
    for n, dtype in ((12, DOUBLE), (13, DOUBLE), (13, torch.float32), (13, torch.float32)):
        solution = solver(Dense(spd(n, 10.0, dtype=dtype), symmetric=True), rand(n, dtype=dtype))
        assert solution.converged
    assert solver.memory.resets == 2
    assert "nothing to do" not in solution.recycling.reason
    other = solver(Dense(spd(5, 10.0), symmetric=True), rand(5))
    assert "forgot" in other.recycling.reason
    assert solver.memory.solves == 1


def test_a_start_is_used_only_where_it_helps():
    A, b = Dense(spd(20, 100.0), symmetric=True), rand(2, 20)
    for wrapped in (CG(), MINRES(), GMRES()):
        solver = Recycled(wrapped, rank=3)
        plain = solver(A, b)
        again = solver(A, b)
        assert again.iterations.tolist() == [0, 0]
        assert torch.equal(again.x, plain.x)
        opposite = solver(A, -b)  # the last solution is worse than zero
        assert members(opposite) == [C, C]
        given = solver(A, b, plain.x)
        assert given.iterations.tolist() == [0, 0]
        assert not given.recycling.warm_started


def test_a_stale_preconditioner_stays_definite_and_exact_images_deflate():
    matrix = spd(40, 1e4, seed=1)
    A = Dense(matrix, symmetric=True, definite=True)
    recorder = Recorder(A, None, rank=5, window=100, definite=True)
    CG(rtol=1e-10)(recorder, rand(40))
    space = recorder.harvest()
    M = RitzInverse(A, space)
    values = torch.linalg.eigvals(M.to_dense() @ matrix).real
    assert int(((values - 1).abs() < 1e-6).sum()) >= 5
    eye = torch.eye(5, dtype=DOUBLE)
    torch.testing.assert_close(space.W @ space.W.T, eye, rtol=0, atol=1e-8)
    torch.testing.assert_close(space.image, space.W @ matrix, rtol=1e-6, atol=1e-6)
    wild = RitzSpace(space.W, space.image + 100 * rand(5, 40), space.theta, space.centre, True)
    for base in (None, Diagonal(1 / matrix.diagonal())):
        dense = RitzInverse(A, wild, base).to_dense()
        assert float(torch.linalg.eigvalsh((dense + dense.T) / 2)[0]) > 0
        assert float((dense - dense.T).abs().max()) < 1e-9 * float(dense.abs().max())


def test_the_pairs_taken_leave_the_smallest_condition_number():
    values = torch.cat([torch.tensor([1e-3, 1e-2]), torch.linspace(1, 2, 16), torch.tensor([50.0, 800.0])]).double()
    A, eye = Dense(torch.diag(values), symmetric=True), torch.eye(20, dtype=DOUBLE)
    for rank, expected in ((1, [800.0]), (2, [1e-3, 1e-2]), (3, [1e-3, 1e-2, 800.0]), (4, [1e-3, 1e-2, 50.0, 800.0])):
        space = refine(A, None, eye, A @ eye, rank, definite=True)
        torch.testing.assert_close(space.theta.sort().values, torch.tensor(expected, dtype=DOUBLE))


def test_a_preconditioner_of_the_solver_acts_on_the_rest():
    diagonal = torch.logspace(0, 5, 60, dtype=DOUBLE)
    low = rand(60, 3, seed=1)
    matrix = torch.diag(diagonal) + 1e4 * low @ low.T
    M = Diagonal(1 / diagonal)
    b, totals = rand(60), []
    for rank in (0, 3):
        solver = Recycled(CG(rtol=1e-8, preconditioner=M), rank=rank)
        totals.append([solver(Dense(matrix * (1 + 0.01 * i), symmetric=True), b).products for i in range(4)])
    assert sum(totals[1]) <= sum(totals[0])


def test_a_hessian_that_changes():
    X, t = rand(80, 30), (rand(80, seed=1) > 0).double()
    X[:, :4] *= 20
    solver = Recycled(CG(rtol=1e-8), rank=6)
    spent = []
    for i in range(5):
        w = 0.01 * (i + 1) * rand(30, seed=3)
        H = Hessian(lambda w: torch.nn.functional.binary_cross_entropy_with_logits(X @ w, t) + 5e-3 * (w**2).sum(), w)
        solution = solver(H, rand(30, seed=2))
        assert solution.converged
        spent.append(solution.products)
    assert max(spent[1:]) < spent[0]


@pytest.mark.parametrize("limit", [0, 1, 3])
@pytest.mark.parametrize("kind", ["outliers", "unrelated"])
def test_the_limit_of_steps_holds_over_both_legs(limit, kind):
    solver = Recycled(CG(rtol=1e-6), rank=3)
    systems = list(sequence(90, kind, 0.005, 3))
    run(solver, systems[:1])
    short = replace(solver, solver=CG(rtol=1e-6, max_iter=limit))
    for matrix, b in systems[1:]:
        solution = short(Dense(matrix, symmetric=True), b)
        assert solution.iterations <= limit
        assert solution.status == Status.MAX_ITER
        verify(solution, matrix, b)


def test_bad_input():
    with pytest.raises(TypeError, match="Recycled: solver must be a Krylov solver"):
        Recycled(Neumann(5))
    for name in ("rank", "window"):
        with pytest.raises(ValueError, match=f"Recycled: {name} must be an integer"):
            Recycled(CG(), **{name: -1})
    with pytest.raises(TypeError, match="CG: A must be positive definite"):
        Recycled(CG())(Dense(-spd(4, 2.0), symmetric=True, definite=False), rand(4))


def test_a_pinned_value():
    products, _ = run(Recycled(CG(rtol=1e-6), rank=10), sequence(120, "outliers", 0.01, 4))
    assert products == [62, 34, 37, 33]
