import math

import pytest
import torch
from laws import DOUBLE, check_operator, rand, verify

from nestopt import bilevel
from nestopt.linalg import CG, MFAC, BlockMFAC, Dense, FisherSolver, Hessian, Status, per_sample_gradients


def matrix_of(G, damping):
    """F in float64."""
    G = G.double()
    return damping * torch.eye(G.shape[-1], dtype=DOUBLE) + G.mT @ G / G.shape[-2]


def correlated(m, n, rho=0.9999, dtype=torch.float32):
    return (math.sqrt(rho) * rand(n, seed=1) + math.sqrt(1 - rho) * rand(m, n, seed=2)).to(dtype)


def close(left, right, rtol=1e-10):
    torch.testing.assert_close(left.double(), right.double(), rtol=rtol, atol=rtol * float(right.abs().max()))


MAKERS = {
    "static": lambda G: MFAC(G, 0.1),
    "narrow": lambda G: MFAC(G, 0.1, width=3),
    "whitened": lambda G: MFAC(G, 0.1, whitened=True, width=4),
    "paged": lambda G: MFAC.paged(iter(G.split([1, 0, G.shape[-2] - 1], dim=-2)), 0.1, width=4),
    "paged, whitened": lambda G: MFAC.paged(G.split(2, dim=-2), 0.1, whitened=True),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("shape", [(1, 5), (9, 4), (2, 5, 7)])
def test_it_is_the_matrix_and_its_inverse(make, shape, dtype):
    G = rand(*shape, dtype=dtype)
    F, dense = make(G), matrix_of(G, 0.1)
    inverse = torch.linalg.inv(dense)
    check_operator(F, dense.to(dtype))
    if dtype == DOUBLE:  # in float32 the law's matrix is itself an inverse that was rounded
        check_operator(F.inverse, inverse)
    rtol = 1e-10 if dtype == DOUBLE else 1e-5
    n = shape[-1]
    v = rand(2, *shape[:-2], n, seed=3, dtype=dtype)
    close(F.solve(v), torch.einsum("...ij,...j->...i", inverse, v.double()), rtol)
    close(F.inverse_diagonal(), inverse.diagonal(dim1=-2, dim2=-1), rtol)
    i, j = torch.arange(n)[:, None], torch.arange(n)
    close(F.inverse_element(i, j), inverse, rtol)
    close(F.inverse_element(n - 1, 0), inverse[..., n - 1, 0], 10 * rtol)
    assert F.inverse_element(0, 0).dtype == F.inverse_diagonal().dtype == dtype


def test_a_pinned_value():
    F = MFAC(torch.tensor([[3.0, 4.0]], dtype=DOUBLE), damping=0.5)  # I/2 + g g', |g|^2 = 25
    expected = (torch.eye(2, dtype=DOUBLE) - torch.tensor([[9.0, 12.0], [12.0, 16.0]]).double() / 25.5) / 0.5
    close(F.inverse.to_dense(), expected, 1e-14)


@pytest.mark.parametrize("m", [1, 2, 5, 12])
def test_a_window_is_the_static_one_on_the_last_gradients(m, dtype):
    n, rtol = 8, 1e-11 if dtype == DOUBLE else 1e-5
    stream = rand(3 * m + 2, n, seed=4, dtype=dtype)
    F = MFAC.window(m, n, 0.1, dtype=dtype)
    close(F.to_dense(), 0.1 * torch.eye(n), 1e-7)
    for k, g in enumerate(stream):
        F.append(g)
        rows = torch.zeros(m, n, dtype=dtype)
        last = stream[max(0, k + 1 - m) : k + 1]
        rows[: len(last)] = last
        close(F.to_dense(), matrix_of(rows, 0.1), rtol)
        close(F.inverse.to_dense(), torch.linalg.inv(matrix_of(rows, 0.1)), rtol)
        close(F.inverse_diagonal(), torch.linalg.inv(matrix_of(rows, 0.1)).diagonal(), rtol)


def test_the_newest_gradient_loses_no_digits():
    G = 300 * correlated(6, 40)  # |g|^2 / (m lam) = 6e8: all digits of float32 cancel
    truth = torch.linalg.inv(matrix_of(G, 1e-3)) @ G[-1].double()
    for whitened in (False, True):
        close(MFAC(G.double(), 1e-3, whitened=whitened).solve_newest(), truth, 1e-5)  # what the dense inverse has left
    close(MFAC(G, 1e-3).solve_newest(), truth, 1e-3)
    assert float((MFAC(G, 1e-3).solve(G[-1]) - truth).norm() / truth.norm()) > 1  # what it is for
    F = MFAC.window(4, 9, 0.1)
    for g in rand(9, 9, dtype=torch.float32):
        F.append(g)
        close(F.solve_newest(), torch.linalg.solve(matrix_of(F.state_dict()["rows"], 0.1), g.double()), 1e-5)


def test_append_leaves_the_callers_tensor_and_moves_the_inverse():
    G, g = rand(2, 4, 6), rand(2, 6, seed=1)
    before = G.clone()
    F = MFAC(G, 0.1)
    inverse = F.inverse
    F.append(g)
    assert torch.equal(G, before)
    moved = torch.cat([G[:, 1:], g[:, None]], dim=1)
    close(inverse.to_dense(), torch.linalg.inv(matrix_of(moved, 0.1)))


def test_a_window_resumes_bit_for_bit():
    stream = rand(20, 7, dtype=torch.float32)
    F = MFAC.window(6, 7, 0.1)
    for g in stream[:9]:
        F.append(g)
    again = MFAC.window(6, 7, 1.0)
    again.load_state_dict({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in F.state_dict().items()})
    for g in stream[9:]:
        F.append(g)
        again.append(g)
    assert torch.equal(F.solve(stream), again.solve(stream))
    with pytest.raises(ValueError, match=r"window must be \(5, 7\)"):
        MFAC.window(5, 7).load_state_dict(F.state_dict())


def test_float32_at_high_correlation():
    """2e-5 of the dense float64 inverse, 100 times less when whitened; the float64 Gram matrix is what does it."""
    m, n, damping = 256, 1000, 1e-5
    G = correlated(m, n)
    inverse = torch.linalg.inv(matrix_of(G, damping))
    x = rand(8, n, seed=3, dtype=torch.float32)
    truth = x.double() @ inverse
    window = MFAC.window(m, n, damping)
    for g in correlated(m + 40, n)[40:].flip(0)[:10]:  # what has left leaves no trace
        window.append(g)
    for g in G:
        window.append(g)
    for F, bound in ((MFAC(G, damping), 2e-5), (window, 2e-5), (MFAC(G, damping, whitened=True), 5e-7)):
        error = (F.solve(x) - truth).norm(dim=-1) / truth.norm(dim=-1)
        assert float(error.max()) <= bound
    close(MFAC(G, damping).inverse_diagonal(), inverse.diagonal(), 1e-6)
    gram = (G @ G.T).double()  # in float32 it is lost
    K = gram + m * damping * torch.eye(m, dtype=DOUBLE)
    lost = (x - torch.linalg.solve(K, x.double() @ G.double().T, left=False) @ G.double()) / damping
    assert float(((lost - truth).norm(dim=-1) / truth.norm(dim=-1)).max()) > 1e-4


def test_half_precision_is_computed_in_float32():
    G, x = rand(5, 40, dtype=torch.bfloat16), rand(3, 40, seed=1, dtype=torch.bfloat16)
    for F in (MFAC(G, 0.1), MFAC(G, 0.1, whitened=True)):
        y = F.solve(x)
        assert y.dtype == torch.bfloat16
        close(y, x.double() @ torch.linalg.inv(matrix_of(G, 0.1)), 1e-2)


def test_pytrees_are_raveled():
    tree = {"weight": rand(5, 2, 3), "bias": rand(5, 2, seed=1)}
    rows = torch.cat([tree["bias"], tree["weight"].reshape(5, 6)], dim=1)  # optree's order: sorted keys
    F = MFAC(tree, 0.1)
    close(F.to_dense(), matrix_of(rows, 0.1))
    F.append({"weight": tree["weight"][0], "bias": tree["bias"][0]})
    close(F.to_dense(), matrix_of(rows, 0.1))
    with pytest.raises(ValueError, match="one m"):
        MFAC([rand(2, 3), rand(4, 3)], 0.1)


@pytest.mark.parametrize("blocks", [1, 4, 5, 11, 20, [3, 3, 3, 2], [5, 6], [1, 2, 2, 6]])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_blocks(blocks, batch, dtype):
    G = rand(*batch, 6, 11, dtype=dtype)
    whole = matrix_of(G, 0.1)
    ends = list(range(0, 11, blocks)) if isinstance(blocks, int) else [sum(blocks[:k]) for k in range(len(blocks))]
    number = torch.bucketize(torch.arange(11), torch.tensor(ends), right=True)
    dense = torch.where(number[:, None] == number, whole, 0.0)
    inverse = torch.linalg.inv(dense)
    F = BlockMFAC(G, blocks, 0.1)
    rtol = 1e-10 if dtype == DOUBLE else 1e-5
    check_operator(F, dense.to(dtype))
    check_operator(F.inverse, inverse.to(dtype))
    close(F.inverse_diagonal(), inverse.diagonal(dim1=-2, dim2=-1), rtol)
    close(F.inverse_element(torch.arange(11)[:, None], torch.arange(11)), inverse, rtol)
    F.append(rand(*batch, 11, seed=1, dtype=dtype))
    moved = torch.cat([G[..., 1:, :], rand(*batch, 1, 11, seed=1, dtype=dtype).reshape(*batch, 1, 11)], dim=-2)
    close(F.to_dense(), torch.where(number[:, None] == number, matrix_of(moved, 0.1), 0.0), rtol)


def logistic(n=6, m=80, dtype=DOUBLE):
    """A regularised logistic loss near its minimum, its per-sample gradients and a right-hand side."""
    X = rand(m, n, dtype=dtype)
    t = (X @ rand(n, seed=1, dtype=dtype) + rand(m, seed=2, dtype=dtype) > 0).to(dtype)

    def sample(w, s):
        return torch.nn.functional.softplus(-(2 * s[1] - 1) * (s[0] @ w)) + 0.005 * (w**2).sum()

    def loss(w):
        return torch.nn.functional.softplus(-(2 * t - 1) * (X @ w)).mean() + 0.005 * (w**2).sum()

    w = torch.zeros(n, dtype=dtype)
    for _ in range(20):
        H = Hessian(loss, w)
        w = w - torch.linalg.solve(H.to_dense(), H.gradient)
    return loss, w, per_sample_gradients(sample, w, (X, t))


def test_a_solver_that_tells_the_truth(dtype):
    loss, w, G = logistic(dtype=dtype)
    H, b = Hessian(loss, w), rand(3, 6, seed=5, dtype=dtype)
    F = MFAC(G, 0.01)
    dense = H.to_dense()
    for x0 in (None, rand(3, 6, seed=6, dtype=dtype)):
        solution = FisherSolver(F)(H, b, x0)
        verify(solution, dense, b)
        assert list(solution.status) == [Status.MAX_ITER] * 3
    close(FisherSolver(F)(H, b).x, F.solve(b), 1e-12)
    assert bool((FisherSolver(F)(H, b).residual_norm > 0.01 * b.norm(dim=-1)).all())  # the Fisher is not the Hessian
    exact = CG(preconditioner=F.inverse)(H, b)
    assert bool(exact.converged.all())
    itself = FisherSolver(F, rtol=1e-3)(Dense(matrix_of(G, 0.01).to(dtype), symmetric=True), b)
    assert bool(itself.converged.all())
    assert FisherSolver(F)(H, 0 * b).converged.all()
    start = torch.linalg.solve(dense.double(), b.double().T).T.to(dtype)
    kept = FisherSolver(F, rtol=1e-3)(H, b, start)
    assert torch.equal(kept.x, start)
    assert kept.iterations.tolist() == [0, 0, 0]
    assert FisherSolver(F)(H, torch.full((6,), math.nan, dtype=dtype)).status == Status.NON_FINITE


def test_as_the_backend_of_a_hypergradient():
    X, V, t, v = rand(40, 4), rand(30, 4, seed=1), rand(40, seed=2).sign(), rand(30, seed=3).sign()
    problem = bilevel.Problem(
        upper=lambda x, y: torch.nn.functional.softplus(-v * (V @ y)).mean(),
        lower=lambda x, y: torch.nn.functional.softplus(-t * (X @ y)).mean() + torch.exp(x) / 2 * (y**2).sum(),
    )
    x = torch.tensor(-3.0, dtype=DOUBLE)
    y = torch.zeros(4, dtype=DOUBLE)
    for _ in range(20):
        H = Hessian(lambda y: problem.lower(x, y), y)
        y = y - torch.linalg.solve(H.to_dense(), H.gradient)
    G = per_sample_gradients(
        lambda y, s: torch.nn.functional.softplus(-s[1] * (s[0] @ y)) + math.exp(-3) / 2 * (y**2).sum(), y, (X, t)
    )
    F = MFAC(G, math.exp(-3))
    truth = bilevel.hypergradient(problem, x, y)
    rough = bilevel.hypergradient(problem, x, y, linear_solver=FisherSolver(F))
    exact = bilevel.hypergradient(problem, x, y, linear_solver=CG(preconditioner=F.inverse))
    assert truth.status == exact.status == Status.CONVERGED
    close(exact.value, truth.value, 1e-8)
    assert rough.status == Status.MAX_ITER
    assert rough.linear_residual > 1e-3
    assert rough.error_bound >= abs(float(rough.value - truth.value)) > 0


def test_bad_input():
    G = rand(4, 6)
    for damping in (0.0, -1e-5, math.nan, math.inf):
        with pytest.raises(ValueError, match="damping must be a finite number > 0"):
            MFAC(G, damping)
    with pytest.raises(ValueError, match="no gradient"):
        MFAC(G[:0])
    with pytest.raises(ValueError, match="at least one page"):
        MFAC.paged([])
    with pytest.raises(ValueError, match=r"pass gradient\[None\]"):
        MFAC(G[0])
    with pytest.raises(TypeError, match=r"floating torch.Tensors"):
        MFAC(G.to(torch.int64))
    with pytest.raises(TypeError, match="must be a torch"):
        MFAC(G.numpy())
    for bad in (math.nan, math.inf):
        spoiled = G.clone()
        spoiled[1, 2] = spoiled[3, 0] = bad
        with pytest.raises(ValueError, match=r"rows \[1, 3\]"):
            MFAC(spoiled)
    with pytest.raises(ValueError, match="agree in all but the number of rows"):
        MFAC.paged([G, G[:, :5]])
    with pytest.raises(ValueError, match="width"):
        MFAC(G, width=0)
    with pytest.raises(ValueError, match="lost in the rounding"):
        MFAC(1e6 * G.repeat(2, 1), 1e-12)
    with pytest.raises(ValueError, match="m must be at least 1"):
        MFAC.window(0, 3)
    with pytest.raises(ValueError, match="add up to the 6 columns"):
        BlockMFAC(G, [2, 3])
    with pytest.raises(ValueError, match="at least 1"):
        BlockMFAC(G, 0)
    with pytest.raises(TypeError, match="BlockMFAC"):
        BlockMFAC(G.tolist(), 2)
    F = MFAC(G)
    with pytest.raises(ValueError, match="v must have shape"):
        F.solve(rand(5))
    with pytest.raises(IndexError, match=r"j must lie in \[0, 6\)"):
        F.inverse_element(0, 6)
    with pytest.raises(TypeError, match="must be an integer"):
        F.inverse_element(0.5, 1)
    with pytest.raises(TypeError, match="fisher must be an MFAC"):
        FisherSolver(F.inverse)
    with pytest.raises(ValueError, match="must have the shape"):
        FisherSolver(F)(Dense(torch.eye(5, dtype=DOUBLE), symmetric=True), rand(5))


def test_a_bad_gradient_leaves_the_window_alone():
    G = rand(4, 6)
    F = MFAC(G, 0.1)
    before = F.to_dense()
    for bad, error, match in (
        (rand(5), ValueError, "gradient must have shape"),
        (rand(2, 6), ValueError, "one gradient of shape"),
        (rand(6).float(), ValueError, "float64"),
        (torch.full((6,), math.nan, dtype=DOUBLE), ValueError, "NaN or infinite"),
        (0.5, TypeError, "torch.Tensor"),
    ):
        with pytest.raises(error, match=match):
            F.append(bad)
    assert torch.equal(F.to_dense(), before)
    for closed in (MFAC(G, whitened=True), MFAC.paged([G, G])):
        with pytest.raises(TypeError, match="not a window"):
            closed.append(G[0])


def test_no_parameters_at_all():
    F = MFAC(torch.zeros(3, 0, dtype=DOUBLE))
    assert F.solve(torch.zeros(2, 0, dtype=DOUBLE)).shape == (2, 0)
    assert F.inverse_diagonal().shape == (0,)
    assert BlockMFAC(torch.zeros(3, 0, dtype=DOUBLE), 4).solve(torch.zeros(0, dtype=DOUBLE)).shape == (0,)
