import math
from itertools import pairwise

import pytest
import torch
from laws import (
    DOUBLE,
    Promises,
    check_batches,
    check_mixed_block,
    check_names,
    check_refusals,
    check_scale,
    check_shapes,
    check_truth,
    check_warm_start,
    check_zero,
    members,
    rand,
    spd,
    symmetric,
    true_residual,
    verify,
)

from nestopt.linalg import (
    CountSketch,
    Dense,
    FunctionOperator,
    Gaussian,
    Hessian,
    RowBlocks,
    Rows,
    SketchProject,
    Status,
)

C, SING, STAG = Status.CONVERGED, Status.SINGULAR, Status.STAGNATED
SKETCHES = [Gaussian(), CountSketch(), Rows(), Rows(weighted=True), RowBlocks()]
PROMISES = Promises(
    condition=4.0,
    singular=(STAG, Status.MAX_ITER, SING),
    needs_symmetric=False,
    directions=False,
    steady=False,
)


def test_laws(dtype):
    for law in (check_truth, check_zero, check_warm_start, check_names, check_batches, check_mixed_block, check_scale):
        law(SketchProject(max_iter=200), PROMISES, dtype)
    check_refusals(SketchProject(block=4), PROMISES, dtype)
    check_shapes(SketchProject(Rows()), PROMISES, dtype)  # a Gaussian number times its inverse is not 1 to the last bit


def matrix_free(matrix):
    """The same operator without its matrix."""
    return FunctionOperator(lambda v: v @ matrix.mT, tuple(matrix.shape), matrix.dtype, rmatvec=lambda v: v @ matrix)


@pytest.mark.parametrize("sketch", SKETCHES, ids=repr)
@pytest.mark.parametrize("shape", [(12, 12), (30, 12), (12, 30)])
def test_every_sketch_solves_every_shape(sketch, shape, dtype):
    matrix = rand(*shape, dtype=dtype)
    matrix = matrix + 6 * torch.eye(*shape, dtype=dtype)
    x = rand(2, shape[1], seed=1, dtype=dtype)
    b = (x.double() @ matrix.double().T).to(dtype)
    rtol = 1e-10 if dtype == DOUBLE else 1e-4
    solution = SketchProject(sketch, rtol=rtol, max_iter=3000)(Dense(matrix), b)
    assert members(solution) == [C, C]
    assert bool((true_residual(matrix, solution.x, b) <= rtol * b.double().norm(dim=-1) * (1 + 1e-6)).all())
    # from zero, the limit is the solution of minimum norm
    least = b.double() @ torch.linalg.pinv(matrix.double()).T
    torch.testing.assert_close(solution.x.double(), least, rtol=0, atol=1e-7 if dtype == DOUBLE else 1e-2)


@pytest.mark.parametrize("sketch", SKETCHES, ids=repr)
def test_a_sketch_compresses_what_its_image_is_made_of(sketch, generator):
    matrices = rand(3, 11, 7)
    for A in (Dense(matrices), Dense(matrices.mT.contiguous()).T, Dense(matrices[0]), matrix_free(matrices[0])):
        if A.batch_shape == () and not isinstance(A, Dense) and sketch == Rows(weighted=True):
            with pytest.raises(TypeError, match="need a stored matrix"):
                next(sketch.draws(A, 4, generator))
            continue
        draws = sketch.draws(A, 4, generator)
        for _ in range(3):
            sketched, v = next(draws), rand(2, *A.batch_shape, 7)
            size = sketched.image.shape[-2]
            assert size == 4 or (isinstance(sketch, RowBlocks) and size == 3)
            short = sketched.compress(A @ v)
            torch.testing.assert_close(short, torch.einsum("...sn,...n->...s", sketched.image, v))
    stored = {Gaussian: 4, CountSketch: 1}.get(type(sketch), 0)
    assert next(sketch.draws(Dense(matrices), 4, generator)).products == 3 * stored


def test_a_pinned_value():
    A = Dense(torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=DOUBLE))
    b = torch.tensor([25.0, 3.0], dtype=DOUBLE)
    solution = SketchProject(RowBlocks(), block=1, max_iter=2)(A, b)
    # onto the second line, (3, 0), and from there onto the first: (3, 0) + 16 (3, 4) / 25
    assert solution.x.tolist() == pytest.approx([4.92, 2.56], rel=1e-14)
    one = SketchProject(block=2, stored=None, max_iter=20)(A, b)  # all rows at once
    assert one.iterations <= 2
    assert one.x.tolist() == pytest.approx([3.0, 4.0], rel=1e-9)


@pytest.mark.parametrize("block", [1, 6])
def test_the_rate_on_an_orthogonal_matrix_is_that_of_theory(block):
    n = 12
    Q, _ = torch.linalg.qr(rand(n, n))
    A, b = Dense(Q), Q.T.contiguous()  # the solutions are the columns of I: their sum has no bias
    for sketch, steps, seeds, rel in ((Gaussian(), 3, 60, 0.12), (Rows(), 1, 1, 1e-12)):
        left = 0.0
        for seed in range(seeds):
            solution = SketchProject(sketch, block=block, stored=None, max_iter=steps, seed=seed)(A, b)
            left += float((solution.x - torch.eye(n, dtype=DOUBLE)).square().sum())
        assert left / (seeds * n) == pytest.approx((1 - block / n) ** steps, rel=rel)


def test_one_weighted_row_has_the_rate_of_strohmer_and_vershynin():
    matrix, x = rand(8, 5) * torch.logspace(0, 1, 8, dtype=DOUBLE)[:, None], rand(5, seed=1)
    A, b = Dense(matrix), matrix @ x
    expected = float(x.square().sum() - b.square().sum() / matrix.square().sum())
    for weighted in (True, False):
        sketch = Rows(weighted=weighted)
        errors = [
            (SketchProject(sketch, block=1, stored=None, max_iter=1, seed=seed)(A, b).x - x).square().sum()
            for seed in range(200)
        ]
        mean = float(torch.stack(errors).mean())
        if weighted:
            assert mean == pytest.approx(expected, rel=0.08)
        else:  # uniform rows: the mean over rows
            uniform = (b.square() / matrix.square().sum(-1)).mean()
            assert mean == pytest.approx(float(x.square().sum() - uniform), rel=0.08)


def test_without_momentum_the_error_never_grows():
    matrix, x = spd(20, 1e3), rand(20, seed=2)
    A, b = Dense(matrix), matrix @ x
    errors = [float((SketchProject(max_iter=k)(A, b).x - x).norm()) for k in range(0, 40, 3)]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(errors))


def test_blocks_and_momentum_save_steps_and_stored_sketches_products():
    n = 16
    matrix = spd(n, 4.0, seed=4)
    A, b = matrix_free(matrix), rand(n, seed=5)
    steps = [SketchProject(block=s, stored=None, rtol=1e-3)(A, b).iterations for s in (1, 4, 8)]
    assert steps[0] > 4 * steps[1] > 8 * steps[2]
    plain = SketchProject()(A, b)
    assert plain.converged
    fresh = SketchProject(stored=None)(A, b)
    assert fresh.converged
    assert fresh.sketches == fresh.iterations
    assert plain.sketches == 16
    assert plain.products < 0.5 * fresh.products
    assert SketchProject(RowBlocks(), block=6)(A, b).sketches == 3


def test_momentum_helps_where_it_is_hard_and_diverges_where_it_is_too_much():
    A, b = Dense(spd(40, 30.0, seed=4)), rand(40, seed=5)
    plain, heavy = (SketchProject(momentum=beta, rtol=1e-6)(A, b) for beta in (0.0, 0.4))
    assert members(plain) == members(heavy) == [C]
    assert heavy.iterations < 0.7 * plain.iterations
    wild = SketchProject(momentum=0.9, rtol=1e-6)(A, b)
    assert wild.status == Status.DIVERGED
    assert math.isfinite(wild.error)


def test_the_counts(dtype):
    calls = []
    matrix = spd(12, 4.0, dtype=dtype)

    def product(v):
        calls.append(v[..., 0].numel())
        return v @ matrix

    A = FunctionOperator(product, (12, 12), dtype, symmetric=True)
    b = torch.stack([rand(12, dtype=dtype), torch.zeros(12, dtype=dtype), matrix[3]])
    for x0 in (None, torch.ones_like(b)):
        for solver in (SketchProject(), SketchProject(CountSketch(), block=4, max_iter=5, stored=None)):
            calls.clear()
            solution = solver(A, b, x0)
            assert solution.products == sum(calls)
            assert solution.sketches == min(solver.stored or 99, int(solution.iterations.max()))


def test_seeds():
    A, b = Dense(spd(15, 8.0)), rand(15)
    first, same, other = (SketchProject(seed=seed)(A, b) for seed in (1, 1, 2))
    torch.manual_seed(7)
    assert torch.equal(first.x, same.x)
    assert not torch.equal(first.x, other.x)
    state = torch.get_rng_state()
    SketchProject()(A, b)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not touched


def test_batches_of_systems_are_each_their_own(dtype):
    systems = torch.stack([spd(10, 8.0, seed=i, dtype=dtype) for i in range(3)])
    b = rand(2, 3, 10, dtype=dtype)
    for sketch in SKETCHES:
        solver = SketchProject(sketch, block=5, max_iter=4)
        together = solver(Dense(systems), b)
        for i in range(3):
            alone = solver(Dense(systems[i]), b[:, i])
            torch.testing.assert_close(
                together.x[:, i], alone.x, rtol=1e-3 if dtype == torch.float32 else 1e-9, atol=1e-5
            )


def test_systems_without_a_solution(dtype):
    tall = rand(30, 10, dtype=dtype)
    solution = SketchProject()(Dense(tall), rand(30, seed=3, dtype=dtype))
    assert solution.status in (STAG, Status.MAX_ITER)
    rows = torch.eye(6, dtype=dtype)
    rows[2] = 0
    b = torch.ones(2, 6, dtype=dtype)
    b[1, 2] = 0
    solution = SketchProject(Rows(), block=1, stored=None)(Dense(rows), b)
    assert members(solution) == [SING, C]  # 0 = 1 is proof; 0 = 0 is none


def test_dependent_rows():
    matrix = torch.cat([rand(8, 10)] * 3)  # every block of more than eight rows is singular
    b = matrix @ rand(10, seed=1)
    for sketch in SKETCHES:
        solution = SketchProject(sketch, block=10, rtol=1e-8)(Dense(matrix), b)
        assert solution.status == C
        torch.testing.assert_close(solution.x, torch.linalg.pinv(matrix) @ b, rtol=0, atol=1e-6)


def test_indefinite_hessians_and_composed_operators(dtype):
    values = torch.tensor([1.0, -2.0, 1.5, -1.0, 2.0, 1.2], dtype=DOUBLE)
    matrix = symmetric(values, dtype=dtype)
    H = Hessian(lambda v: v @ matrix @ v / 2, torch.zeros(6, dtype=dtype))
    b = rand(2, 6, dtype=dtype)
    for A in (H, 2.0 * H.shift(0.1), Dense(matrix) @ Dense(matrix).shift(0.5)):
        solution = SketchProject()(A, b)
        verify(solution, A.to_dense(), b)
        assert members(solution) == [C, C]


def test_bad_input():
    A, b = Dense(spd(10, 2.0)), rand(10)
    with pytest.raises(TypeError, match="sketch must be a Sketch"):
        SketchProject("gaussian")
    for wrong in ({"block": 0}, {"stored": 0}, {"momentum": 1.0}, {"block": 2.5}):
        with pytest.raises(ValueError, match=f"SketchProject: {next(iter(wrong))} must be"):
            SketchProject(**wrong)
    with pytest.raises(ValueError, match="block must be at most the 10 rows"):
        SketchProject(block=11)(A, b)
    with pytest.raises(ValueError, match="stored=3 sketches of block=2 reach 6 of the 10"):
        SketchProject(block=2, stored=3)(A, b)
