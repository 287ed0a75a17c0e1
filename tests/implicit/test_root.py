"""root: known answers, what it accepts, and what it refuses."""

import math

import pytest
import torch

from nestopt import implicit
from nestopt.linalg import CG, GMRES, LU, LinearSolver, SolverError

D = torch.float64


def square(y, a):
    return y * y - a


def number(value, **options):
    return torch.tensor(value, dtype=D, **options)


def second(y, x):
    """(dy/dx, d2y/dx2) of scalars."""
    (slope,) = torch.autograd.grad(y, x, create_graph=True)
    return slope.item(), torch.autograd.grad(slope, x)[0].item()


@pytest.mark.parametrize("solver", [None, LU(), GMRES()])
def test_known_answers(solver):
    t, a = number(0.7), number(2.25, requires_grad=True)
    slope, curvature = second(implicit.root(lambda x, a: a * x - t, t / a.detach(), a, solver=solver), a)
    assert slope == pytest.approx(-0.7 / 2.25**2, abs=1e-12)
    assert curvature == pytest.approx(0.12290809327846365, abs=1e-12)  # 2 t / a^3
    theta, x = number(0.0, requires_grad=True), number(0.7390851332151607)
    slope, curvature = second(implicit.root(lambda x, th: x - torch.cos(x) - th, x, theta, solver=solver), theta)
    assert slope == pytest.approx(0.5975100456753034, abs=1e-12)
    assert curvature == pytest.approx(-math.cos(float(x)) * slope**3, abs=1e-12)


def test_a_large_system_is_never_materialised():
    """Diagonal plus rank one, n = 20 000: a dense Jacobian would need 3.2 GB; Sherman and Morrison know the answer."""
    n = 20_000
    d, u = torch.linspace(1, 3, n, dtype=D), torch.ones(n, dtype=D) / math.sqrt(n)
    b = torch.linspace(-1, 1, n, dtype=D).cos()
    scale = number(2.0)

    def exact(d, scale, v):  # (diag(d) + scale u u')^{-1} v
        w = u / d
        return v / d - w * (scale * (w @ v) / (1 + scale * (w @ u)))

    monitor = implicit.Monitor()
    leaves = d.clone().requires_grad_(), scale.clone().requires_grad_()
    y = implicit.root(lambda y, d, s: d * y + s * u * (u @ y) - b, exact(d, scale, b), *leaves, monitor=monitor)
    v = torch.linspace(1, 2, n, dtype=D)
    gradients = torch.autograd.grad(y, leaves, v)
    adjoint = exact(d, scale, v)
    assert torch.allclose(gradients[0], -adjoint * y.detach(), atol=1e-8, rtol=0)
    assert float(gradients[1]) == pytest.approx(-float(adjoint @ u) * float(u @ y.detach()), abs=1e-8)
    assert monitor.converged
    assert monitor.last("adjoint").products < 100


class Spy(LinearSolver):
    """LU that remembers which matrices it met."""

    def __init__(self):
        self.factorised = []

    def prepare(self, A):
        self.factorised.append(tuple(A.shape))
        return LU().prepare(A)

    def _solve(self, A, b, x0):
        raise AssertionError("a prepared solver is asked to solve")


def test_one_factorisation_serves_every_derivative_at_a_point():
    spy = Spy()
    W = torch.tensor([[2.0, 1.0], [0.5, 3.0]], dtype=D).requires_grad_()
    y = implicit.root(lambda y, W: W @ torch.sinh(y) - 1, torch.linalg.solve(W, torch.ones(2, dtype=D)).asinh(), W,
                      solver=spy)  # fmt: skip
    for i in range(2):
        (g,) = torch.autograd.grad(y[i], W, create_graph=True)
        torch.autograd.grad(g.sum(), W, retain_graph=True)
    assert spy.factorised == [(2, 2)]
    with torch.no_grad():  # nothing can be asked of this one
        implicit.root(lambda y, W: W @ torch.sinh(y) - 1, y.detach(), W, solver=spy)
    assert spy.factorised == [(2, 2)]


def test_a_factorisation_is_never_used_at_another_point():
    spy = Spy()
    values = []
    for a in (4.0, 9.0, 4.0):
        leaf = number(a, requires_grad=True)
        values.append(
            float(torch.autograd.grad(implicit.root(square, leaf.detach().sqrt(), leaf, solver=spy), leaf)[0])
        )
    assert values == pytest.approx([1 / 4, 1 / 6, 1 / 4], abs=1e-12)
    assert len(spy.factorised) == 3
    # the same memory with other numbers is refused by torch itself, as for any graph
    leaf = number(4.0, requires_grad=True)
    y = implicit.root(square, number(2.0), leaf, solver=spy)
    with torch.no_grad():
        leaf.fill_(9.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize(("solver", "symmetric"), [(LU(), False), (GMRES(), False), (CG(), True)])
def test_pytrees_of_tensors_constants_and_none(solver, symmetric):
    theta = {"a": number(3.0, requires_grad=True), "none": None, "kind": "square", "power": 2}
    scale = [number([1.0, 2.0], requires_grad=True), (torch.tensor([True, False]), 0.5)]
    y0 = {"p": number(math.sqrt(3)), "q": (number([2.0, 1.0]),)}

    def residual(y, theta, scale):
        assert theta["none"] is None
        assert theta["kind"] == "square"
        mask, half = scale[1]
        factor = torch.where(mask, scale[0], 2 * half * scale[0])
        return {"p": y["p"] ** theta["power"] - theta["a"], "q": (factor * y["q"][0] - 2,)}

    y = implicit.root(residual, y0, theta, scale, solver=solver, symmetric=symmetric)
    assert y["p"].shape == ()
    assert torch.equal(y["q"][0], y0["q"][0])
    assert y["q"][0] is not y0["q"][0]
    (y["p"] + y["q"][0].sum()).backward()
    assert float(theta["a"].grad) == pytest.approx(0.5 / math.sqrt(3), abs=1e-9)
    assert scale[0].grad.tolist() == pytest.approx([-2.0, -0.5], abs=1e-9)


def test_parameters_without_dimensions_have_gradients():
    a = number(4.0, requires_grad=True)
    implicit.root(square, number(2.0), a).backward()
    assert float(a.grad) == pytest.approx(0.25, abs=1e-12)


def test_a_number_is_a_constant():
    y = implicit.root(square, number(2.0), 4.0)
    assert not y.requires_grad


def test_the_initial_guess_has_no_gradient():
    start, a = number(2.5, requires_grad=True), number(4.0, requires_grad=True)
    y = start
    for _ in range(6):
        y = (y + a / y) / 2
    root = implicit.root(square, y, a)
    found = torch.autograd.grad(root, (start, a), allow_unused=True)
    assert found[0] is None
    assert float(found[1]) == pytest.approx(0.25, abs=1e-12)


@pytest.mark.parametrize("solver", [LU(), GMRES()])
def test_float32_in_float32_out(solver):
    W = torch.tensor([[2.0, 1.0], [0.5, 3.0]]).requires_grad_()
    y = implicit.root(lambda y, W: W @ y - 1, torch.linalg.solve(W, torch.ones(2)), W, solver=solver)
    (g,) = torch.autograd.grad(y.sum(), W, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), W)
    assert y.dtype == g.dtype == h.dtype == torch.float32
    double = W.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(torch.linalg.inv(double).sum(), double)
    assert torch.allclose(g.double(), exact, atol=1e-5)


def test_half_precision_by_a_solver_that_can():
    a = torch.tensor([4.0, 9.0], dtype=torch.bfloat16, requires_grad=True)
    y = implicit.root(square, a.detach().sqrt(), a, solver=CG(), symmetric=True)
    (found,) = torch.autograd.grad(y.sum(), a)
    assert found.dtype == torch.bfloat16
    assert found.tolist() == pytest.approx([1 / 4, 1 / 6], rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize(("solver", "symmetric"), [(LU(), False), (GMRES(), False), (CG(), True)])
def test_the_device_is_kept(solver, symmetric):
    a = torch.tensor([4.0, 9.0], dtype=D, device="cuda", requires_grad=True)
    y = implicit.root(square, a.detach().sqrt(), a, solver=solver, symmetric=symmetric, batch_dims=1)
    (found,) = torch.autograd.grad(y.sum(), a, create_graph=True)
    assert y.device == found.device == a.device
    assert found.tolist() == pytest.approx([1 / 4, 1 / 6], abs=1e-12)
    assert torch.autograd.grad(found.sum(), a)[0].tolist() == pytest.approx([-1 / 32, -1 / 108], abs=1e-12)


def test_no_grad_and_inference_mode_certify_and_attach_nothing():
    a = number(4.0, requires_grad=True)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert not implicit.root(square, number(2.0), a).requires_grad
            with pytest.raises(SolverError, match="y is not a root of residual"):
                implicit.root(square, number(3.0), a)


def test_autocast_changes_no_derivative():
    W = torch.tensor([[2.0, 1.0], [0.5, 3.0]]).requires_grad_()
    y = torch.linalg.solve(W, torch.ones(2)).detach()
    residual = lambda y, W: W @ y - 1  # noqa: E731
    (plain,) = torch.autograd.grad(implicit.root(residual, y, W).sum(), W)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = implicit.root(residual, y, W)
    assert torch.equal(torch.autograd.grad(inside.sum(), W)[0], plain)


def test_an_empty_unknown():
    a = number(4.0, requires_grad=True)
    y = implicit.root(lambda y, a: a * y, torch.zeros(0, dtype=D), a)
    assert y.shape == (0,)
    assert torch.autograd.grad(y.sum(), a)[0] == 0


A = torch.tensor(4.0, dtype=D, requires_grad=True)
Y = torch.tensor(2.0, dtype=D)
BAD = {
    "residual of another shape": (lambda: implicit.root(lambda y, a: (y * y - a)[None], Y, A), "shape of y"),
    "residual of another structure": (lambda: implicit.root(lambda y, a: (y * y - a,), Y, A), "structure of y"),
    "residual of another dtype": (lambda: implicit.root(lambda y, a: (y * y - a).float(), Y, A), "torch.float64"),
    "residual is no tensor": (lambda: implicit.root(lambda y, a: 0.0, Y, A), "must be a torch.Tensor"),
    "residual is no function": (lambda: implicit.root(3, Y, A), "residual must be a function"),
    "integer y": (lambda: implicit.root(square, torch.tensor(2), A), "real floating dtype"),
    "y is a number": (lambda: implicit.root(square, 2.0, A), "y must be a torch.Tensor"),
    "y of two dtypes": (lambda: implicit.root(lambda y: y, (Y, Y.float())), "share one dtype"),
    "theta of another dtype": (lambda: implicit.root(square, Y.float(), A), r"theta\[0\] must be torch.float32"),
    "theta on another device": (
        lambda: implicit.root(square, Y, torch.ones((), device="meta", dtype=D)),
        "on cpu like y",
    ),
    "complex theta": (lambda: implicit.root(square, Y, A.detach() + 0j), "must be real"),
    "a module": (lambda: implicit.root(square, Y, torch.nn.Linear(1, 1)), "named_parameters"),
    "solver is a class": (lambda: implicit.root(square, Y, A, solver=LU), "must be an instance"),
    "solver needs a promise": (lambda: implicit.root(square, Y, A, solver=CG()), "promised symmetric"),
    "unknown policy": (lambda: implicit.root(square, Y, A, on_failure="zero"), '"raise", "warn" or "nan"'),
    "negative tolerance": (lambda: implicit.root(square, Y, A, rtol=-1.0), "rtol must be"),
    "too many batch_dims": (lambda: implicit.root(square, Y, A, batch_dims=1), "must begin with the same 1"),
    "negative batch_dims": (lambda: implicit.root(square, Y, A, batch_dims=-1), "batch_dims must be"),
    "half precision": (lambda: implicit.root(square, Y.bfloat16(), A.bfloat16()), "no automatic solver"),
    "unused argument": (lambda: implicit.root(lambda y, a, b: y * y - a, Y, A, A * 2), r"no path from theta\[1\]"),
    "detached argument": (lambda: implicit.root(lambda y, a: y * y - a.detach(), Y, A), r"no path from theta\[0\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, message = BAD[name]
    # the suite may check annotations as well, and then speaks first
    with pytest.raises((TypeError, ValueError), match=f"{message}|Type-check error"):
        call()


def test_an_unused_constant_and_an_unused_leaf_are_no_error():
    """Zero is right for one leaf of a used argument, as for a frozen layer of a network."""
    b = number(1.0, requires_grad=True)
    implicit.root(lambda y, theta, c: y * y - theta[0], Y, (A, b), b.detach()).backward()
    assert float(b.grad) == 0
