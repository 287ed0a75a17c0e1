"""Passes that are inexact on purpose: their errors, their records, and that they work wherever the exact one does."""

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from nestopt import implicit
from nestopt.implicit import OneStep, Phantom, Truncated, Unroll
from nestopt.linalg import CG, GMRES, LU, Neumann, NystromInverse, SolverError, Status

D = torch.float64


def times(W, y):
    return (W @ y[..., None])[..., 0]


def T(y, W, b):
    return torch.tanh(times(W, y)) + b


def solved(W, b):
    with torch.no_grad():
        y = b
        for _ in range(200):
            y = T(y, W, b)
    return y


def layer(W, b, solver=None, batch_dims=0, **options):
    y = solved(W.detach(), b.detach())
    return implicit.fixed_point(T, y, W, b, solver=solver, batch_dims=batch_dims, **options)


@pytest.fixture
def inputs(generator):
    W = torch.randn(4, 4, generator=generator, dtype=D)
    return (0.5 * W / torch.linalg.matrix_norm(W, 2)).requires_grad_(), torch.randn(
        4, generator=generator, dtype=D
    ).requires_grad_()


def jacobians(W, b):
    """J = dT/dy and T_W at the fixed point."""
    y = solved(W.detach(), b.detach())
    J = jacrev(T)(y, W.detach(), b.detach())
    return J, jacrev(T, 1)(y, W.detach(), b.detach()).reshape(4, -1)


def derivative(W, b, solver):
    """dy/dW as a matrix."""
    return jacrev(lambda W: layer(W, b.detach(), solver))(W.detach()).reshape(4, -1)


def test_series_are_what_they_say(inputs):
    J, TW = jacobians(*inputs)
    eye = torch.eye(4, dtype=D)
    exact = torch.linalg.solve(eye - J, TW)
    assert torch.allclose(derivative(*inputs, None), exact, atol=1e-10)
    assert torch.allclose(derivative(*inputs, OneStep()), TW, atol=1e-12)
    M = 0.3 * eye + 0.7 * J
    assert torch.allclose(derivative(*inputs, Phantom(3, 0.7)), 0.7 * (eye + M + M @ M) @ TW, atol=1e-12)
    for pass_ in (Unroll(3), Unroll(3, checkpoint=2), Phantom(3)):
        assert torch.allclose(derivative(*inputs, pass_), (eye + J + J @ J) @ TW, atol=1e-12)


def test_one_step_keeps_its_bound(inputs):
    """|error| <= rho / (1 - rho) |T_theta|, and the bound is not idle."""
    J, TW = jacobians(*inputs)
    rho = torch.linalg.matrix_norm(J, 2)
    error = torch.linalg.matrix_norm(derivative(*inputs, OneStep()) - derivative(*inputs, None), 2)
    bound = rho / (1 - rho) * torch.linalg.matrix_norm(TW, 2)
    assert 0.05 * bound < error <= bound


def test_the_error_of_unrolling_falls_like_rho_to_the_k(inputs):
    J, _ = jacobians(*inputs)
    rho = float(torch.linalg.matrix_norm(J, 2))
    exact = derivative(*inputs, None)
    errors = [float((derivative(*inputs, Unroll(k)) - exact).norm() / exact.norm()) for k in (2, 4, 8, 16)]
    for k, error in zip((2, 4, 8, 16), errors, strict=True):
        assert error <= rho**k * 1.01 + 1e-12
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 27 * errors[3]


def test_one_step_of_a_newton_map_is_exact():
    """It converges superlinearly, so that its derivative at the solution leaves nothing."""
    a = torch.tensor([2.0, 5.0], dtype=D, requires_grad=True)
    y = a.detach().sqrt()
    (found,) = torch.autograd.grad(
        implicit.fixed_point(lambda y, a: y - (y * y - a) / (2 * y), y, a, solver=OneStep()).sum(), a
    )
    assert torch.allclose(found, 0.5 / y, atol=1e-15, rtol=0)


def test_five_damped_steps_where_one_is_far_off():
    """J = -1/4: (1 - tau + tau J)^k is 0 for tau = .8, while one step leaves a quarter; J = -1/2 leaves (-.2)^5."""
    b = torch.ones(2, dtype=D, requires_grad=True)
    slopes = torch.tensor([-0.25, -0.5], dtype=D)
    y = b.detach() / (1 - slopes)

    def error(solver):
        out = implicit.fixed_point(lambda y, b: slopes * y + b, y, b, solver=solver)
        return (torch.autograd.grad(out.sum(), b)[0] * (1 - slopes) - 1).tolist()

    assert error(OneStep()) == pytest.approx([0.25, 0.5], abs=1e-14)
    assert error(Phantom(1, 0.8)) == pytest.approx([0.0, 0.2], abs=1e-14)
    assert error(Phantom(5, 0.8)) == pytest.approx([0.0, 0.2**5], abs=1e-14)


def test_damping_where_the_eigenvalues_are_imaginary():
    """J = .068 times a rotation by 90 degrees: one step is off by 6.8 %, five damped ones by |.2 + .8 .068 i|^5."""
    J = 0.068 * torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=D)
    b = torch.ones(2, dtype=D)
    y = torch.linalg.solve(torch.eye(2, dtype=D) - J, b)

    def gradient(solver):
        return grad(lambda b: implicit.fixed_point(lambda y, b: J @ y + b, y, b, solver=solver)[0])(b)

    exact = gradient(LU())
    errors = [float((gradient(solver) - exact).norm() / exact.norm()) for solver in (OneStep(), Phantom(5, 0.8))]
    assert errors == pytest.approx([0.068, abs(0.2 + 0.8j * 0.068) ** 5], rel=1e-9)
    assert errors[1] == pytest.approx(0.0004, rel=0.05)


# every pass on argmin, with the estimated step and with a given one
@pytest.mark.parametrize(
    ("solver", "expected"),
    [
        (OneStep(step=0.1), lambda H: 0.1 * torch.eye(3, dtype=D)),
        (Phantom(2, 0.5, step=0.2), lambda H: 0.2 * torch.eye(3, dtype=D) - 0.01 * H),
        (Unroll(2, step=0.1), lambda H: 0.2 * torch.eye(3, dtype=D) - 0.01 * H),
        (Truncated(Neumann(2, step_size=0.1)), lambda H: 0.2 * torch.eye(3, dtype=D) - 0.01 * H),
        (Truncated(NystromInverse(3, shift=1e-14)), torch.linalg.inv),
        (Truncated(CG(max_iter=3)), torch.linalg.inv),
    ],
    ids=["OneStep", "Phantom", "Unroll", "Neumann", "Nystrom", "CG"],
)
def test_argmin(solver, expected):
    H = torch.tensor([[4.0, 1.0, 0.0], [1.0, 3.0, 0.5], [0.0, 0.5, 2.0]], dtype=D)
    b = torch.tensor([1.0, -2.0, 0.5], dtype=D)
    found = jacrev(
        lambda b: implicit.argmin(
            lambda y, b: y @ H @ y / 2 - b @ y, torch.linalg.solve(H, b.detach()), b, solver=solver
        )
    )(b)
    assert torch.allclose(found, expected(H), atol=1e-10)


@pytest.mark.parametrize("solver", [OneStep(), Unroll(1), Phantom(1)])
def test_the_estimated_step_is_below_the_inverse_of_the_largest_eigenvalue(solver):
    d = torch.tensor([[1.0, 2.0, 10.0], [1.0, 2.0, 40.0]], dtype=D)
    b = torch.ones(2, 3, dtype=D, requires_grad=True)
    y = implicit.argmin(lambda y, b: (d * y * y / 2 - b * y).sum(-1), b.detach() / d, b, solver=solver, batch_dims=1)
    (found,) = torch.autograd.grad(y.sum(), b)
    assert torch.allclose(found, (1 / d[:, -1:]).expand(2, 3), rtol=1e-6)


PASSES = [OneStep(), Phantom(4, 0.8), Unroll(4), Unroll(5, checkpoint=2), Truncated(GMRES(max_iter=2))]


@pytest.mark.parametrize("solver", PASSES, ids=str)
def test_everywhere(solver, inputs, generator):
    """Reverse and forward mode agree, vmap and batch_dims equal a loop, of values, gradients and second derivatives."""
    W, b = (t.detach() for t in inputs)
    B = torch.randn(3, 4, generator=generator, dtype=D)
    symmetric = not isinstance(solver, Truncated)  # GMRES for A' and for A stop at different polynomials
    if symmetric:
        assert torch.allclose(
            jacrev(layer, (0, 1))(W, b, solver)[0], jacfwd(layer, (0, 1))(W, b, solver)[0], atol=1e-12
        )

    def value(W, b):
        return (layer(W, b, solver) ** 3).sum()

    loop = torch.stack([grad(value, 1)(W, row) for row in B])
    assert torch.allclose(vmap(grad(value, 1), (None, 0))(W, B), loop, atol=1e-10)
    shared, leaf = W.clone().requires_grad_(), B.clone().requires_grad_()
    total = (layer(shared, leaf, solver, batch_dims=1) ** 3).sum()
    found = torch.autograd.grad(total, (shared, leaf))
    assert torch.allclose(found[1], loop, atol=1e-10)
    assert torch.allclose(found[0], sum(grad(value)(W, row) for row in B), atol=1e-10)
    mapped = vmap(hessian(value, 1), (None, 0))(W, B)
    assert torch.allclose(mapped, torch.stack([hessian(value, 1)(W, row) for row in B]), atol=1e-9)


@pytest.mark.parametrize("checkpoint", [None, 3])
def test_unrolled_steps_are_a_function_with_all_its_derivatives(inputs, checkpoint):
    """Of T^k from a start that is held: what gradcheck differentiates must be that."""
    W, b = inputs
    y = solved(W.detach(), b.detach())

    def unrolled(W, b):
        z = y
        for _ in range(4):
            z = T(z, W, b)
        return z

    def ours(W, b):
        return implicit.fixed_point(T, y, W, b, solver=Unroll(4, checkpoint=checkpoint), rtol=10.0)

    for f in (lambda f: f, lambda f: lambda *t: grad(lambda *t: (f(*t) ** 3).sum())(*t)):
        for ours_, truth in zip(
            jacrev(f(ours), (0, 1))(W.detach(), b.detach()), jacrev(f(unrolled), (0, 1))(W.detach(), b.detach()),
            strict=True,
        ):  # fmt: skip
            assert torch.allclose(ours_, truth, atol=1e-12)
    first = torch.autograd.grad((ours(W, b) ** 3).sum(), W, create_graph=True)[0]
    second = torch.autograd.grad((unrolled(W, b) ** 3).sum(), W, create_graph=True)[0]
    for a, c in zip(torch.autograd.grad(first.sum(), inputs), torch.autograd.grad(second.sum(), inputs), strict=True):
        assert torch.allclose(a, c, atol=1e-12)


def test_second_derivatives_of_unrolled_steps_converge(inputs):
    W, b = (t.detach() for t in inputs)
    exact = hessian(lambda b: layer(W, b).sum())(b)
    errors = [float((hessian(lambda b, k=k: layer(W, b, Unroll(k)).sum())(b) - exact).norm()) for k in (4, 12, 40)]
    assert errors[0] > 10 * errors[1]
    assert errors[2] < 1e-9


def test_a_checkpoint_keeps_fewer_tensors(inputs):
    counts = []
    for checkpoint in (None, 5):
        packed = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, packed=packed: packed.append(1) or t, lambda t: t):
            layer(*inputs, Unroll(25, checkpoint=checkpoint))
        counts.append(len(packed))
    assert counts[1] < counts[0] / 2


@pytest.mark.parametrize(("solver", "power"), [(OneStep(), 1), (Phantom(3), 3), (Unroll(3), 3)])
def test_the_residual_is_measured(solver, power, inputs):
    """It is that of the adjoint system, |v - A'u|, per item; being above the tolerance is no failure."""
    J, _ = jacobians(*inputs)
    monitor = implicit.Monitor()
    v = torch.linspace(1, 2, 4, dtype=D)
    torch.autograd.grad(layer(*inputs, solver, monitor=monitor), inputs, v)
    record = monitor.last("adjoint")
    left = torch.linalg.vector_norm(torch.linalg.matrix_power(J.mT, power) @ v)
    assert float(record.residual_norm) == pytest.approx(float(left), rel=1e-10)
    assert record.status is Status.MAX_ITER
    assert record.products == power
    assert monitor.last("point").status is Status.CONVERGED


@pytest.mark.parametrize("solver", [OneStep(), Unroll(3), Phantom(2), Truncated(Neumann(3))])
def test_negative_curvature_is_a_failure(solver):
    """y - s f_y does not contract at a saddle, whatever s: its steps approximate nothing."""
    a = torch.tensor([1.0, 1.0], dtype=D, requires_grad=True)
    d = torch.tensor([1.0, -2.0], dtype=D)
    with pytest.raises(SolverError, match="NEGATIVE_CURVATURE"):
        implicit.argmin(lambda y, a: (d * (y - a) ** 2).sum(), a.detach(), a, solver=solver).sum().backward()


@pytest.mark.parametrize("solver", [OneStep(), Unroll(3), Truncated(GMRES(max_iter=2))])
def test_a_failed_item_is_nan_where_asked_and_adds_nothing_where_not(solver):
    s = torch.tensor(0.5, dtype=D, requires_grad=True)
    b = torch.tensor([1.0, 2.0, 3.0], dtype=D, requires_grad=True)
    y = 2 * b.detach()
    y[1] = torch.nan
    out = implicit.fixed_point(lambda y, s, b: s * y + b, y, s, b, solver=solver, batch_dims=1, on_failure="nan")
    found = torch.autograd.grad(out[[0, 2]].sum(), (s, b), retain_graph=True)
    assert found[0].isfinite()
    assert found[1][1] == 0
    shared, own = torch.autograd.grad(out.sum(), (s, b))
    assert shared.isnan()
    assert own[1].isnan()
    assert own[[0, 2]].isfinite().all()


@pytest.mark.parametrize("solver", [OneStep(), Unroll(3), Unroll(3, checkpoint=2), Truncated(Neumann(3))], ids=str)
def test_an_item_without_a_step_is_nan_where_asked_and_adds_nothing_where_not(solver):
    """Item 1 is a saddle, along which no gradient step contracts."""
    d = torch.tensor([[1.0, 2.0], [1.0, -2.0], [3.0, 4.0]], dtype=D)
    s, c = torch.tensor(1.5, dtype=D, requires_grad=True), torch.ones(3, 2, dtype=D, requires_grad=True)
    y = implicit.argmin(
        lambda y, s, c: (d * (y - s * c) ** 2).sum(-1), (s * c).detach(), s, c, solver=solver, batch_dims=1,
        on_failure="nan",
    )  # fmt: skip
    shared, own = torch.autograd.grad(y[[0, 2]].sum(), (s, c), retain_graph=True)
    assert float(shared) == pytest.approx(float(own[[0, 2]].sum()) / 1.5, abs=1e-12)
    assert (own[1] == 0).all()
    shared, own = torch.autograd.grad(y.sum(), (s, c))
    assert shared.isnan()
    assert own[1].isnan().all()
    assert own[[0, 2]].isfinite().all()


A = torch.tensor(4.0, dtype=D, requires_grad=True)
Y = torch.tensor(2.0, dtype=D)
BAD = {
    "a class": (lambda: implicit.root(lambda y, a: y * y - a, Y, A, solver=OneStep), "must be an instance"),
    "no map": (lambda: implicit.root(lambda y, a: y * y - a, Y, A, solver=OneStep()), "give the step of y - step"),
    "two maps": (
        lambda: implicit.fixed_point(lambda y, a: a / y, Y, A, solver=Unroll(3, step=0.1)),
        "means nothing for a fixed point",
    ),
    "no symmetry": (
        lambda: implicit.fixed_point(lambda y, a: a / y, Y, A, solver=Truncated(Neumann(3))),
        r"Phantom\(steps\)",
    ),
    "no solver": (lambda: Truncated(5), "must be a LinearSolver"),
    "no steps": (lambda: Unroll(0), "steps must be an integer >= 1"),
    "steps of a half": (lambda: Phantom(2.5), "steps must be an integer >= 1"),
    "damping": (lambda: Phantom(2, 1.5), r"damping must be in \(0, 1\]"),
    "step": (lambda: OneStep(step=0.0), "step must be a number > 0"),
    "checkpoint": (lambda: Unroll(3, checkpoint=0), "checkpoint must be an integer >= 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, message = BAD[name]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_root_with_a_step():
    """y - s (y^2 - a) at y = 2: dT/dy = 1 - 4 s, so that one step with s = 1/4 is exact."""
    for solver, truth in ((OneStep(step=0.25), 0.25), (OneStep(step=0.1), 0.1), (Unroll(2, step=0.1), 0.16)):
        y = implicit.root(lambda y, a: y * y - a, Y, A, solver=solver)
        assert float(torch.autograd.grad(y, A)[0]) == pytest.approx(truth, abs=1e-12)


def test_float32_stays():
    a = torch.tensor([4.0, 9.0], requires_grad=True)
    for solver in (OneStep(step=0.1), Phantom(3, step=0.1), Unroll(3, step=0.1), Truncated(LU())):
        y = implicit.root(lambda y, a: y * y - a, a.detach().sqrt(), a, solver=solver, batch_dims=1)
        assert torch.autograd.grad(y.sum(), a)[0].dtype == y.dtype == torch.float32
