"""The parts of ConvexProgram that need no cvxpy: cones, equations, refinement, singular systems, the envelope."""

import numpy as np
import pytest
import torch
from torch.func import grad, hessian, jacfwd, jvp, vmap

from nestopt.constrained import MinimumNorm
from nestopt.constrained.conic_cones import ConicCones
from nestopt.constrained.conic_derivative import ConicEquations, ConicLU, _proves, find_conic, measure_conic
from nestopt.constrained.conic_form import SparseMap, accumulate
from nestopt.constrained.kkt import envelope, refine
from nestopt.constrained.spoiled_items import spoil
from nestopt.implicit.jacobian import SystemJacobian
from nestopt.linalg import Dense, Status

D = torch.float64

CONES = ConicCones(zero=2, nonnegative=2, second_order=(3, 1), semidefinite=(2, 1, 3), exponential=2, power=(0.3, 0.8))


def tensor(*values):
    return torch.tensor(values, dtype=D)


def test_moreau_splits_every_vector(generator):
    """v = y - s with y in K*, s in K and y's = 0, and both projections idempotent."""
    v = torch.randn(50, sum(CONES.sizes), generator=generator, dtype=D)
    y = CONES.project_dual(v)
    s = y - v
    assert float((y * s).sum(-1).abs().max()) < 1e-12
    assert torch.allclose(CONES.project_dual(y), y, atol=1e-12)
    assert float(CONES.project_dual(-s).abs().max()) < 1e-12  # -s is in the polar of K*
    assert float(s[:, :2].abs().max()) == 0  # the zero cone
    # and every pair of K* and K has a nonnegative product
    assert float((y @ s.mT).min()) > -1e-12


def test_triangles_are_upper_by_columns_and_scaled(generator):
    A = torch.randn(3, 3, generator=generator, dtype=D)
    A = A + A.mT
    values, vectors = torch.linalg.eigh(A)
    P = vectors @ torch.diag(values.clamp_min(0)) @ vectors.mT

    def triangle(M):
        r = 2**0.5
        return torch.stack([M[0, 0], r * M[0, 1], M[1, 1], r * M[0, 2], r * M[1, 2], M[2, 2]])

    cone = ConicCones(semidefinite=(3,))
    assert torch.allclose(cone.project_dual(triangle(A)), triangle(P), atol=1e-13)
    assert cone.project_dual(triangle(A).float()).dtype == torch.float32


def test_no_rows_and_empty_batches():
    assert ConicCones().project_dual(torch.zeros(4, 0)).shape == (4, 0)
    assert CONES.project_dual(torch.zeros(0, sum(CONES.sizes), dtype=D)).shape == (0, sum(CONES.sizes))


def test_sparse_maps_are_matrices(generator):
    import scipy.sparse as sp

    M = torch.randn(4, 3, generator=generator, dtype=D) * (torch.rand(4, 3, generator=generator) < 0.5)
    x = torch.randn(2, 5, 3, generator=generator, dtype=D)
    assert torch.allclose(SparseMap.of(sp.csr_array(M.numpy()))(x), x @ M.mT, atol=1e-14)
    assert accumulate(tensor(1, 2, 4), torch.tensor([1, 1, 0]), 3).tolist() == [4, 3, 0]


def program(cones, P, A):
    """The equations of dense matrices, with the entries of P and A in order."""

    def at(M):
        return tuple(torch.cartesian_prod(*(torch.arange(k) for k in M.shape)).reshape(-1, 2).unbind(-1))

    return ConicEquations(cones, (A.shape[1], A.shape[0]), at(P), at(A)), P.flatten(), A.flatten()


@pytest.mark.parametrize("kind", ["smooth", "zero", "signs"])
def test_the_jacobian_written_down_is_that_of_autograd(kind, generator):
    """Also at kinks: the apex of every cone, and boundaries of the orthant and of the second-order cones."""
    n, m = 3, sum(CONES.sizes)
    equations, P, A = program(
        CONES, torch.randn(n, n, generator=generator, dtype=D), torch.randn(m, n, generator=generator, dtype=D)
    )
    z = torch.randn(2, 4, n + m, generator=generator, dtype=D)
    z = {"smooth": z, "zero": 0 * z, "signs": z.sign()}[kind]
    data = [P.expand(2, 4, -1), z[..., :n], A.expand(2, 4, -1), z[..., n:]]
    A = SystemJacobian(equations.residual, z, data, [False] * 4, symmetric=False)
    assert torch.allclose(equations.jacobian(z, *data), A.to_dense(), rtol=0, atol=1e-13)
    factors = ConicLU(equations=equations).prepare(A)
    assert torch.allclose(factors.matrix, A.to_dense(), rtol=0, atol=1e-13)
    assert equations.jacobian(z[:, :0], *(t[:, :0] for t in data)).shape == (2, 0, n + m, n + m)


def test_certificates_are_measured():
    """x >= 1 and x <= 0 by y = (1, 1); min -x on x >= 0 by the direction x = 1."""
    cones, zero = ConicCones(nonnegative=2), np.zeros((1, 1))
    program = (zero, np.array([0.0]), np.array([[-1.0], [1.0]]), np.array([-1.0, 0.0]))
    for y, truth in (([1, 1], True), ([1, 1 + 1e-7], True), ([1, 1.1], False), ([1, -1], False), ([-1, -1], False)):
        assert _proves(Status.INFEASIBLE, program, cones, np.zeros(1), np.array(y, dtype=float)) is truth
    cones, program = ConicCones(nonnegative=1), (zero, np.array([-1.0]), np.array([[-1.0]]), np.array([0.0]))
    for x, truth in ((1.0, True), (1e-9, True), (-1.0, False), (0.0, False), (np.nan, False)):
        assert _proves(Status.UNBOUNDED, program, cones, np.array([x]), np.zeros(1)) is truth
    curved = (zero + 1e-3, *program[1:])
    assert not _proves(Status.UNBOUNDED, curved, cones, np.array([1.0]), np.zeros(1))


def test_a_linear_program_by_hand():
    """min x subject to x >= 2, as s = x - 2: y = 1, v = 1 at the root, and the residual measures what is off."""
    equations, P, A = program(ConicCones(nonnegative=1), torch.zeros(1, 1, dtype=D), -torch.ones(1, 1, dtype=D))
    c, b = tensor(1.0), tensor(-2.0)
    assert equations.residual(tensor(2.0, 1.0), P, c, A, b).tolist() == [0, 0]
    assert float(measure_conic(equations, tensor(2.0, 1.0), P, c, A, b)) == 0
    assert float(measure_conic(equations, tensor(3.0, 1.0), P, c, A, b)) == pytest.approx(1 / 4)
    assert float(equations.lagrangian(tensor(2.0, 1.0), P, c, tensor(0.0)[0], A, b)) == 2
    pytest.importorskip("clarabel", reason="clarabel is the default solver of find_conic")
    z, code, error = find_conic(equations, None, {}, 1e-9, P, c, A, b, torch.tensor(True))
    assert Status.from_code(int(code)) is Status.CONVERGED
    assert float(error) < 1e-14
    assert torch.allclose(z, tensor(2.0, 1.0), atol=1e-13)
    batch = [t.expand(3, -1).clone() for t in (P, c, A, b)]
    batch[1][1] = -1  # unbounded
    z, code, error = find_conic(equations, None, {}, 1e-9, *batch, torch.tensor([True, True, False]))
    assert [Status.from_code(k) for k in code.tolist()] == [Status.CONVERGED, Status.UNBOUNDED, Status.NOT_CONVEX]
    assert z.isnan().all(-1).tolist() == error.isnan().tolist() == [False, True, True]


def test_what_the_solver_cannot_do_is_said(generator):
    pytest.importorskip("clarabel", reason="clarabel is the default solver of find_conic")
    n = 6
    M = torch.randn(n, n, generator=generator, dtype=D)
    equations, P, A = program(ConicCones(nonnegative=n), M @ M.mT, -torch.eye(n, dtype=D))
    c, b = torch.randn(n, generator=generator, dtype=D), torch.zeros(n, dtype=D)
    strict = find_conic(equations, None, {}, 1e-9, P, c, A, b, torch.tensor(True))
    z, code, error = find_conic(equations, None, {"max_iter": 1}, 1e-300, P, c, A, b, torch.tensor(True))
    assert Status.from_code(int(strict[1])) is Status.CONVERGED
    assert Status.from_code(int(code)) is Status.MAX_ITER
    assert z.isnan().all()
    assert float(error) >= 0


def test_refine_is_newton_for_every_item_alone(generator):
    def residual(y, a):
        return y**3 + y - a

    a = torch.randn(5, 2, generator=generator, dtype=D)
    (y,) = refine(residual)(torch.zeros(5, 2, dtype=D), a)
    assert float(residual(y, a).abs().max()) < 1e-12
    for i in range(5):
        assert torch.equal(refine(residual)(torch.zeros(2, dtype=D), a[i])[0], y[i])
    (mapped,) = vmap(lambda a: refine(residual)(torch.zeros(2, dtype=D), a))(a)
    assert torch.allclose(mapped, y, atol=1e-12)
    slope = refine(residual, lambda y, a: torch.diag_embed(3 * y**2 + 1))
    assert torch.allclose(slope(torch.zeros(5, 2, dtype=D), a)[0], y, atol=1e-12)
    assert torch.allclose(vmap(lambda a: slope(torch.zeros(2, dtype=D), a)[0])(a), y, atol=1e-12)
    # where there is no root it stops, and hands back where it stood
    (none,) = refine(lambda y: y * y + 1)(tensor(0.5))
    assert none.isfinite().all()


def test_minimum_norm(generator):
    M = torch.randn(4, 4, generator=generator, dtype=D)
    S = M + M.mT
    singular = S.clone()
    singular[3], singular[:, 3] = singular[0], singular[:, 0]
    singular[3, 3] = singular[0, 3] = singular[3, 0] = singular[0, 0]
    b = torch.randn(4, generator=generator, dtype=D)
    for symmetric, A in ((True, singular), (False, torch.cat([M[:3], M[:1]]))):
        batch = Dense(torch.stack([S, A]), symmetric=symmetric)
        rhs = torch.stack([b, A @ b])
        for solution, matrix in (
            (MinimumNorm()(batch, rhs), batch.to_dense()),
            (MinimumNorm().prepare(batch).solve_transposed(torch.stack([b, A.mT @ b])), batch.to_dense().mT),
        ):
            assert solution.converged.all()
            wanted = torch.stack([b, matrix[1] @ b])
            exact = (torch.linalg.pinv(matrix, rtol=1e-10) @ wanted[..., None])[..., 0]
            assert torch.allclose(solution.x, exact, atol=1e-7)
        # a system without a solution has a least-squares one, which is not CONVERGED
        off = MinimumNorm()(Dense(A, symmetric=symmetric), b)
        assert off.status is Status.SINGULAR
        assert torch.allclose(off.x, torch.linalg.pinv(A, rtol=1e-10) @ b, atol=1e-6)
    large = MinimumNorm(direct_size=3)(Dense(S, symmetric=True), b)
    assert torch.allclose(large.x, torch.linalg.solve(S, b), atol=1e-7)


def test_an_envelope_leaves_out_the_first_derivative_of_its_argument():
    """f(z, t) = z^2 / 2 - t^2 z at z = t^2: the value is -t^4 / 2, whatever derivative z carries."""

    def value(t):
        return envelope(lambda z, t: z**2 / 2 - t**2 * z, [t**2], [t])

    def detached(t):
        return envelope(lambda z, t: z**2 / 2 - t**2 * z, [(t**2).detach()], [t])

    t = torch.tensor(1.3, dtype=D)
    for function in (value, detached):
        assert float(grad(function)(t)) == pytest.approx(-2 * 1.3**3)
        assert float(jvp(function, (t,), (torch.tensor(1.0, dtype=D),))[1]) == pytest.approx(-2 * 1.3**3)
    for second in (hessian(value), grad(grad(value)), jacfwd(jacfwd(value))):
        assert float(second(t)) == pytest.approx(-6 * 1.3**2)
    assert float(hessian(detached)(t)) != pytest.approx(-6 * 1.3**2)  # then z is a constant
    assert np.allclose(vmap(grad(value))(torch.stack([t, 2 * t])), -2 * np.array([1.3, 2.6]) ** 3)


def test_what_failed_is_nan_and_so_is_its_derivative_where_it_is_asked_for():
    x, good = tensor(1.0, 2.0, 3.0).requires_grad_(), torch.tensor([True, False, False])
    y = spoil(x, good)
    assert y.isnan().tolist() == [False, True, True]
    (found,) = torch.autograd.grad(y, x, tensor(5.0, 0.0, 1.0))
    assert found[:2].tolist() == [5.0, 0.0]
    assert found[2].isnan()
    assert jvp(lambda x: spoil(x, good), (x.detach(),), (tensor(1.0, 1.0, 0.0),))[1].isnan().tolist() == [0, 1, 1]
