import math

import pytest
import torch
from laws import DOUBLE, check_operator, members, rand, spd, symmetric, true_residual

from nestopt.linalg import (
    CG,
    MINRES,
    BlockJacobi,
    Cholesky,
    Deflation,
    Dense,
    Diagonal,
    FunctionOperator,
    GaussNewton,
    Hessian,
    Identity,
    Jacobi,
    Nystrom,
    NystromInverse,
    Status,
    compare_preconditioners,
    leaf_blocks,
    module_blocks,
)
from nestopt.linalg.diagonal import hutchinson_diagonal, xdiag

N = 12


def hidden(matrix, symmetric=True):
    """The operator without its entries."""
    return FunctionOperator(
        lambda v: torch.einsum("...ij,...j->...i", matrix, v), tuple(matrix.shape), matrix.dtype, symmetric=symmetric
    )


KINDS = {
    "nystrom": lambda A, shift: Nystrom(A, 5, shift=shift),
    "nystrom, adaptive": lambda A, shift: Nystrom(A, 3, shift=shift, rtol=1.0, max_rank=A.shape[-1]),
    "nystrom, inverse": lambda A, shift: Nystrom(A, 5, shift=shift).inverse(),
    "deflation": lambda A, shift: Deflation(A, 4, shift=shift),
    "jacobi, given": lambda A, shift: Jacobi(A, diagonal=A.to_dense().diagonal(dim1=-2, dim2=-1), shift=shift),
    "jacobi, exact": lambda A, shift: Jacobi(A, products=A.shape[-1], shift=shift),
    "jacobi, estimated": lambda A, shift: Jacobi(A, products=8, shift=shift, floor=1e-3),
    "jacobi, xdiag": lambda A, shift: Jacobi(A, products=8, shift=shift, floor=1e-3, estimator=xdiag),
    "block jacobi": lambda A, shift: BlockJacobi(A, [5, 1, A.shape[-1] - 6], shift=shift, chunk_size=2),
}


def outliers(n, dtype=DOUBLE, seed=0, count=4):
    """A few large eigenvalues, an unequal diagonal, and a floor."""
    values = torch.cat([torch.logspace(3, 2, count, dtype=DOUBLE), torch.linspace(0.1, 0.5, n - count, dtype=DOUBLE)])
    return symmetric(values, seed, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [(), (2,), (2, 1)])
def test_an_operator_that_keeps_its_promises(kind, batch, dtype):
    count = math.prod(batch)
    matrix = torch.stack([outliers(N, dtype, seed) for seed in range(count)]).reshape(*batch, N, N)
    M = KINDS[kind](hidden(matrix), 0.1)
    assert M.symmetric and M.definite and M.shape == matrix.shape
    dense = M.to_dense()
    check_operator(M, (dense + dense.mT) / 2)
    assert (M @ rand(0, *batch, N, dtype=dtype)).shape == (0, *batch, N)
    V = rand(50, *batch, N, seed=3, dtype=dtype)
    assert bool((M.vecdot(V, M @ V) > 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_a_loop(kind):
    matrices = torch.stack([outliers(N, seed=seed) for seed in range(3)])
    shifts = torch.tensor([0.1, 1.0, 10.0], dtype=DOUBLE)
    M = KINDS[kind](hidden(matrices), shifts)
    if kind in ("jacobi, given", "jacobi, exact", "block jacobi"):  # the others draw
        for i in range(3):
            alone = KINDS[kind](hidden(matrices[i]), shifts[i])
            torch.testing.assert_close(M.to_dense()[i], alone.to_dense(), rtol=1e-10, atol=1e-12)
            assert M.products == 3 * alone.products
    solution = CG(preconditioner=M)(hidden(matrices).shift(shifts), rand(2, 3, N))
    assert bool(solution.converged.all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("c", [1e-12, 1e12])
def test_the_scale_of_the_operator_means_nothing(kind, c, dtype):
    matrix = outliers(N, dtype)
    plain, scaled = KINDS[kind](hidden(matrix), 0.1), KINDS[kind](hidden(c * matrix), 0.1 * c)
    v = rand(3, N, dtype=dtype)
    tol = 1e-9 if dtype == DOUBLE else 2e-2
    torch.testing.assert_close(c * (scaled @ v), plain @ v, rtol=tol, atol=tol)
    assert plain.products == scaled.products


@pytest.mark.parametrize("kind", KINDS)
def test_another_shift_costs_nothing(kind):
    A = hidden(outliers(N))
    M = KINDS[kind](A, 0.1)
    other = M.with_shift(3.0)
    fresh = KINDS[kind](A, 3.0) if kind != "nystrom, adaptive" else Nystrom(A, 3, shift=3.0, rtol=0.1 / 3, max_rank=N)
    torch.testing.assert_close(other.to_dense(), fresh.to_dense(), rtol=1e-9, atol=1e-12)
    assert other.products == 0 and float(other.sigma) == 3 and float(M.sigma) == pytest.approx(0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_counted(kind):
    spent = [0]
    matrix = torch.stack([outliers(40), outliers(40, seed=1)])

    def product(v):
        spent[0] += v[..., 0].numel()
        return torch.einsum("...ij,...j->...i", matrix, v)

    A = FunctionOperator(product, (2, 40, 40), DOUBLE, symmetric=True)
    if kind == "jacobi, given":
        assert Jacobi(A, diagonal=matrix.diagonal(dim1=-2, dim2=-1)).products == spent[0] == 0
        return
    M = KINDS[kind](A, 0.1)
    if kind == "nystrom, inverse":
        assert M.products == 0  # the Nystrom that it was made from has counted them
        return
    assert M.products == spent[0] > 0


@pytest.mark.parametrize("kind", ["nystrom", "deflation", "nystrom, adaptive"])
@pytest.mark.parametrize("solver", [CG(max_iter=5000), MINRES()])
def test_outliers_no_longer_count(kind, solver):
    n = 120
    A = hidden(outliers(n))
    b = rand(2, n)
    found = compare_preconditioners(A.shift(0.05), b, {kind: KINDS[kind](A, 0.05)}, solver=solver)
    plain, helped = found.rows
    assert helped.iterations < plain.iterations
    assert helped.verdict.startswith("helps") and not helped.worse and not found.worse
    truth = Cholesky()(A.shift(0.05), b).x
    for row in found.rows:
        assert float((row.solution.x - truth).norm() / truth.norm()) <= 1e-7
    tight = CG(rtol=1e-13, preconditioner=KINDS[kind](A, 0.05))(A.shift(0.05), b)
    assert float((tight.x - truth).norm() / truth.norm()) <= 1e-10


def test_jacobi_cures_scales():
    scales = torch.logspace(0, 3, 60, dtype=DOUBLE)
    matrix = scales[:, None] * spd(60, 5.0) * scales
    A, b = Dense((matrix + matrix.T) / 2, symmetric=True), rand(60)
    exact = Jacobi(A)
    assert exact.products == 0
    estimated = Jacobi(hidden(A.matrix), products=40, floor=1e-6, generator=torch.Generator().manual_seed(1))
    assert estimated.products <= 40
    found = compare_preconditioners(A, b, {"exact": exact, "estimated": estimated}, solver=CG(rtol=1e-8))
    assert found["exact"].iterations < 40 and found["exact"].verdict == f"helps: {found['exact'].gain:.1f} times " \
        "fewer products"  # fmt: skip
    assert found["exact"].condition < 1e-3 * found["none"].condition
    x = torch.linalg.solve(A.matrix, b)
    assert float((scales * (found["exact"].solution.x - x)).norm() / (scales * x).norm()) < 1e-5


def test_noise_in_the_estimate_does_little_harm():
    """All entries of the true diagonal are nearly equal: what differs is noise, and raw it is a disaster."""
    values = torch.cat([torch.linspace(1, 0.1, 20, dtype=DOUBLE), torch.linspace(1e-3, 1e-4, 180, dtype=DOUBLE)])
    A, b = hidden(symmetric(values)), rand(200)
    raw = Jacobi(A, diagonal=hutchinson_diagonal(A, 20).value, floor=1e-3)
    shrunk, better = (Jacobi(A, products=20, floor=1e-3, estimator=e) for e in (hutchinson_diagonal, xdiag))
    found = compare_preconditioners(A, b, {"raw": raw, "shrunk": shrunk, "xdiag": better}, solver=CG(rtol=1e-6))
    assert found["raw"].gain < 0.2 and min(found["shrunk"].gain, found["xdiag"].gain) > 0.6
    assert raw.raised > 0 == shrunk.raised
    pinned = hutchinson_diagonal(A, 20)
    spread = float(pinned.value.var() - (pinned.standard_error**2).mean())
    kept = max(spread, 0.0) / (max(spread, 0.0) + float(pinned.standard_error[3]) ** 2)
    mean = float(pinned.value.mean())
    assert float(shrunk.diagonal[3]) == pytest.approx(mean + kept * (float(pinned.value[3]) - mean))


def test_jacobi_reads_what_is_known():
    matrix = spd(5, 9.0)
    A = 2 * (Dense(matrix, symmetric=True) + Diagonal(torch.arange(5.0, dtype=DOUBLE))).shift(3.0)
    M = Jacobi(A)
    assert M.products == 0
    torch.testing.assert_close(M.diagonal, 2 * (matrix.diagonal() + torch.arange(5.0, dtype=DOUBLE) + 3))
    assert Jacobi(Identity(3, DOUBLE)).products == 0
    assert Jacobi(hidden(matrix).shift(1.0), products=5).products == 5


def test_an_entry_that_is_not_positive_is_refused_or_raised():
    A = Diagonal(torch.tensor([4.0, -1.0, 0.0], dtype=DOUBLE))
    with pytest.raises(ValueError, match=r"2 of 3 entries .* not positive \(least -1"):
        Jacobi(A)
    M = Jacobi(A, floor=0.25)
    assert M.raised == 2
    torch.testing.assert_close(M @ torch.ones(3, dtype=DOUBLE), torch.tensor([0.25, 1.0, 1.0], dtype=DOUBLE))
    assert Jacobi(A, shift=2.0).raised == 0
    with pytest.raises(ValueError, match="not positive"):
        Jacobi(A, shift=2.0).with_shift(0.5)
    with pytest.raises(ValueError, match="not positive"):
        Jacobi(Diagonal(-torch.ones(3, dtype=DOUBLE)), floor=0.25)
    with pytest.raises(ValueError, match="not finite"):
        Jacobi(Diagonal(torch.tensor([1.0, math.nan])), floor=0.25)


def test_block_jacobi_of_a_network():
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    X, Y = rand(30, 3), rand(30, 2, seed=1)

    def model(params):
        return torch.func.functional_call(net, params, (X,))

    A = GaussNewton(model, lambda out: ((out - Y) ** 2).mean(), net)
    blocks = module_blocks(A.into)
    assert {name: len(index) for name, index in blocks.items()} == {"0": 16, "2": 10}
    M = BlockJacobi(A, blocks, shift=1e-3)
    dense = A.shift(1e-3).to_dense()
    expected = torch.linalg.inv(torch.block_diag(dense[:16, :16], dense[16:, 16:]))
    torch.testing.assert_close(M.to_dense(), expected, rtol=1e-8, atol=1e-8)
    assert M.products == 26
    found = compare_preconditioners(A.shift(1e-3), rand(26), {"modules": M, "leaves": BlockJacobi(
        A, leaf_blocks(A.into), shift=1e-3)})  # fmt: skip
    assert found["modules"].iterations < found["none"].iterations
    assert "pays from" in found["modules"].verdict
    assert list(leaf_blocks(A.into)) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    whole = BlockJacobi(A, [26], shift=1e-3)
    torch.testing.assert_close(whole.to_dense(), torch.linalg.inv(dense), rtol=1e-8, atol=1e-8)


def test_blocks_of_any_tree():
    x = {"b": (torch.ones(2), torch.ones(1)), "a": torch.ones(3)}
    H = Hessian(lambda p: (p["a"] ** 2).sum() + (p["b"][0] ** 4).sum() + p["b"][1].exp().sum(), x)
    blocks = module_blocks(H.into)
    assert {name: index.tolist() for name, index in blocks.items()} == {"params": [0, 1, 2], "b": [3, 4, 5]}
    torch.testing.assert_close(BlockJacobi(H, blocks).to_dense(), torch.linalg.inv(H.to_dense()))
    scattered = {"even": torch.tensor([4, 0, 2]), "odd": torch.tensor([1, 3, 5])}
    torch.testing.assert_close(BlockJacobi(H, scattered).to_dense(), torch.linalg.inv(H.to_dense()))


def test_deflation_finds_the_largest():
    A = hidden(outliers(60))
    M = Deflation(A, 4)
    torch.testing.assert_close(M.values, torch.logspace(3, 2, 4, dtype=DOUBLE), rtol=1e-6, atol=0)
    assert float(M.tail) == pytest.approx(0.5, rel=0.3)
    assert bool((M.residuals <= 1e-2 * M.values).all())
    values = torch.linalg.eigvalsh(M.to_dense() @ A.to_dense() + (M.to_dense() @ A.to_dense()).mT) / 2
    assert float(values.max()) < 1.5
    two = Deflation(Diagonal(torch.tensor([1.0, 1.0, 5.0, 5.0], dtype=DOUBLE)), 3)  # only two distinct values
    assert two.products == 2 and two.rank == 2
    one = CG(preconditioner=Deflation(Identity(6, DOUBLE), 2))(Identity(6, DOUBLE), rand(6))
    assert one.iterations == 1
    mixed = torch.stack([torch.eye(20, dtype=DOUBLE), outliers(20)])  # one Krylov space ends after a step
    both = Deflation(hidden(mixed), 3)
    torch.testing.assert_close(both.to_dense()[0], mixed[0], rtol=1e-12, atol=1e-12)
    assert bool(CG(preconditioner=both)(hidden(mixed), rand(2, 20)).converged.all())
    with pytest.raises(ValueError, match="larger shift"):
        Deflation(Diagonal(torch.tensor([3.0, -1.0, -2.0], dtype=DOUBLE)), 1)


@pytest.mark.parametrize("spread", [4, 8])
def test_rounding_leaves_it_definite(spread):
    """P is 10^-spread along the largest eigenvectors, which float32 would lose in a difference with the rest."""
    values = torch.logspace(spread, -2, 40, dtype=DOUBLE)
    A = Dense(symmetric(values, dtype=torch.float32), symmetric=True)
    for M in (Nystrom(A, 20, shift=1e-2), Deflation(A, 5, shift=1e-2)):
        V = torch.cat([M.vectors, rand(100, 40, dtype=torch.float32)])
        along = M.vecdot(V, M @ V)
        assert bool((along > 0).all())
        torch.testing.assert_close(along[: M.rank], 1 / (M.values + M.sigma), rtol=1e-3, atol=0)


class Halved(FunctionOperator):
    """An operator with an inner product of its own."""

    def vecdot(self, u, v):
        return super().vecdot(u, v) / 2

    def norm(self, v):
        return self.vecdot(v, v).sqrt()


def test_an_inner_product_of_its_own():
    matrix = outliers(30)
    A = Halved(lambda v: v @ matrix, (30, 30), DOUBLE, symmetric=True)
    M = Deflation(A, 4)
    v = rand(2, 30)
    torch.testing.assert_close(M.vecdot(v, v), A.vecdot(v, v))
    torch.testing.assert_close(M @ v, Deflation(hidden(matrix), 4) @ v, rtol=1e-4, atol=1e-4)
    assert bool(CG(preconditioner=M)(A, v).converged.all())
    for refused in (lambda: Nystrom(A, 4, shift=0.1), lambda: NystromInverse(4, 0.1)(A, v)):
        with pytest.raises(ValueError, match="its own inner product"):
            refused()


@pytest.mark.parametrize("kind", KINDS)
def test_stale_it_serves_a_later_operator(kind):
    M = KINDS[kind](hidden(outliers(60)), 0.05)
    later = outliers(60) + 0.02 * spd(60, 5.0, seed=4)
    solution = CG(preconditioner=M, max_iter=3000)(hidden(later).shift(0.05), rand(2, 60))
    assert members(solution) == [Status.CONVERGED] * 2
    assert bool(
        (true_residual(later + 0.05 * torch.eye(60, dtype=DOUBLE), solution.x, rand(2, 60)) <= solution.tolerance).all()
    )
    if kind in ("nystrom", "deflation"):
        assert int(solution.iterations.max()) < int(CG(max_iter=3000)(hidden(later).shift(0.05), rand(2, 60))
                                                    .iterations.max())  # fmt: skip


# --- the report ------------------------------------------------------------------------------------------------------


def test_what_makes_it_worse_is_said():
    A, b = Dense(spd(40, 10.0), symmetric=True), rand(40)
    wild = Diagonal(torch.logspace(-2, 2, 40, dtype=DOUBLE))
    negative = Diagonal(torch.cat([torch.ones(39, dtype=DOUBLE), -torch.full((1,), 1e9, dtype=DOUBLE)]))
    poisoned = FunctionOperator(lambda v: v * math.nan, (40, 40), DOUBLE, symmetric=True)
    exact = Dense(torch.linalg.inv(A.matrix), symmetric=False)
    exact.symmetric = True
    found = compare_preconditioners(
        A, b, {"wild": wild, "negative": negative, "nan": poisoned, "same": Identity(40, DOUBLE), "exact": exact}
    )
    assert found.worse == ("wild", "negative", "nan")
    assert found["wild"].verdict.startswith("WORSE: ") and found["wild"].gain < 1
    assert found["wild"].condition > 10 * found["none"].condition
    assert found["negative"].verdict == "WORSE: BREAKDOWN, it is not positive definite"
    assert found["nan"].solution.status == Status.NON_FINITE
    assert found["same"].verdict == "makes no difference"
    assert found["exact"].iterations <= 2 and found["exact"].building is None
    doomed = compare_preconditioners(Dense(A.matrix * math.nan, symmetric=True), b, {"same": Identity(40, DOUBLE)})
    assert doomed["same"].verdict == "NON_FINITE, and NON_FINITE without it too" and not doomed.worse
    with pytest.raises(KeyError, match="'other' was not compared; there are none, wild, negative"):
        found["other"]
    table = str(found)
    assert len(table.splitlines()) == 7 and "WORSE" in table and "?" in table
    assert found["none"].condition == pytest.approx(10, rel=0.02)


def test_systems_that_do_not_converge_are_compared_by_their_residuals():
    A = hidden(outliers(80))
    b = torch.stack([rand(80), torch.zeros(80, dtype=DOUBLE)])
    good, wild = Nystrom(A, 10, shift=0.01), Diagonal(torch.logspace(-4, 0, 80, dtype=DOUBLE))
    few = compare_preconditioners(A, b, {"good": good, "wild": wild}, solver=CG(max_iter=6))
    assert few["good"].verdict.startswith("helps: residual") and few["wild"].verdict.startswith("WORSE: residual")
    assert few["none"].residual == pytest.approx(float(torch.as_tensor(few["none"].solution.error)[0] / b[0].norm()))
    more = compare_preconditioners(A, b, {"good": good, "wild": wild}, solver=CG(max_iter=40))
    assert more["good"].verdict == "helps: converges, MAX_ITER, CONVERGED without"
    plain = compare_preconditioners(A, b, {"wild": wild}, solver=CG(max_iter=100))
    assert plain["wild"].verdict == "WORSE: MAX_ITER, CONVERGED" and plain["wild"].gain < 1


def test_a_report_of_batches_and_of_nothing():
    matrices = torch.stack([outliers(20), outliers(20, seed=1)])
    A = hidden(matrices)
    found = compare_preconditioners(A, rand(3, 2, 20), {"nystrom": Nystrom(A, 6, shift=0.01)})
    assert found["nystrom"].solution.codes.shape == (3, 2)
    assert found["nystrom"].products < found["none"].products
    empty = compare_preconditioners(A, rand(0, 2, 20), {"nystrom": Nystrom(A, 6, shift=0.01)})
    assert empty["nystrom"].iterations == 0 and "no column" in str(empty)
    with pytest.raises(TypeError, match="solver must be CG, MINRES"):
        compare_preconditioners(A, rand(2, 20), {}, solver=Cholesky())
    with pytest.raises(ValueError, match='"none" is the solve without'):
        compare_preconditioners(A, rand(2, 20), {"none": Identity(20, DOUBLE)})


def test_the_condition_that_cg_met():
    matrix = spd(30, 100.0)
    A, b = Dense(matrix, symmetric=True), rand(2, 30)
    torch.testing.assert_close(CG(rtol=1e-12)(A, b).condition, torch.full((2,), 100.0, dtype=DOUBLE), rtol=1e-6, atol=0)
    M = Jacobi(A)
    scale = M._inverse.sqrt()
    values = torch.linalg.eigvalsh(scale[:, None] * matrix * scale)
    solution = CG(rtol=1e-12, preconditioner=M)(A, b[0])
    assert solution.condition == pytest.approx(float(values[-1] / values[0]), rel=1e-6)
    assert CG()(A, 0 * b).condition is None


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_fits_nothing_is_refused(kind):
    A = hidden(outliers(N))
    for shift in (-1.0, math.nan, math.inf, *([0.0] if "nystrom" in kind else [])):
        with pytest.raises(ValueError, match="shift must be finite and >"):
            KINDS[kind](A, shift)
    with pytest.raises(ValueError, match="shift must be a number or of the batch shape"):
        KINDS[kind](A, torch.ones(3))
    with pytest.raises(ValueError, match="shift must be finite"):
        KINDS[kind](A, 0.1).with_shift(-0.1)
    if kind == "jacobi, given":
        return
    with pytest.raises(TypeError, match="promised symmetric"):
        KINDS[kind](hidden(outliers(N), symmetric=False), 0.1)
    with pytest.raises(ValueError, match="not finite"):
        KINDS[kind](hidden(outliers(N) * math.nan), 0.1)
    wide = FunctionOperator(lambda v: v[..., :3], (3, N), DOUBLE)
    with pytest.raises(ValueError, match="must be square and not empty"):
        KINDS[kind](wide, 0.1)


def test_bad_arguments():
    A = hidden(outliers(N))
    with pytest.raises(TypeError, match=r"use linalg\.Dense"):
        Deflation(outliers(N), 3)
    for rank in (0, N, N + 1):
        with pytest.raises(ValueError, match="rank must be at least 1 and below n"):
            Deflation(A, rank)
    with pytest.raises(ValueError, match="steps must exceed rank"):
        Deflation(A, 3, steps=3)
    with pytest.raises(ValueError, match="floor must be between"):
        Jacobi(A, floor=1.0)
    with pytest.raises(ValueError, match="diagonal must have shape"):
        Jacobi(A, diagonal=torch.ones(N - 1, dtype=DOUBLE))
    with pytest.raises(ValueError, match="add up to n"):
        BlockJacobi(A, [5, 5])
    with pytest.raises(ValueError, match="each once"):
        BlockJacobi(A, {"a": torch.arange(N), "b": torch.tensor([0])})
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        BlockJacobi(A, [N], chunk_size=0)
    with pytest.raises(ValueError, match=r"block '1' has 11 variables, above max_size=10"):
        BlockJacobi(A, [1, 11], max_size=10)
    with pytest.raises(ValueError, match=r"smallest eigenvalue of block '0' plus shift is -"):
        BlockJacobi(hidden(-outliers(N)), [N], shift=1.0)
