"""solution: derivatives of constrained minimisers, multipliers and values, against closed forms and re-solving."""

import warnings

import numpy as np
import pytest
import scipy.optimize
import torch
from laws_layer import LAWS, Case, check_memory, duties
from torch.func import grad, hessian, jacrev, jvp, vmap

from nestopt.constrained import Problem, solution
from nestopt.implicit import ImplicitWarning
from nestopt.linalg import MINRES, SolverError, Status

D = torch.float64

# torch's own warning about the first forward-mode derivative of a process


def tensor(*values):
    return torch.tensor(values, dtype=D)


# Each with its start and optimal value; right-hand sides are parameters, whose derivative of f* is the multiplier.
CASES = {
    "HS71": (
        Problem(
            lambda x, r: x[0] * x[3] * (x[0] + x[1] + x[2]) + x[2],
            equality=lambda x, r: x @ x - 40 - r[0],
            inequality=lambda x, r: 25 - x.prod() - r[1],
            bounds=(1.0, 5.0),
        ),
        [1.0, 5, 5, 1], 2, 17.0140173,
    ),
    "HS35": (
        Problem(
            lambda x, r: 9 - 8 * x[0] - 6 * x[1] - 4 * x[2] + 2 * x[0] ** 2 + 2 * x[1] ** 2 + x[2] ** 2
            + 2 * x[0] * x[1] + 2 * x[0] * x[2],
            inequality=lambda x, r: x[0] + x[1] + 2 * x[2] - 3 - r[0],
            bounds=(0.0, None),
        ),
        [0.5] * 3, 1, 1 / 9,
    ),
    "HS76": (
        Problem(
            lambda x, r: x[0] ** 2 + x[1] ** 2 / 2 + x[2] ** 2 + x[3] ** 2 / 2 - x[0] * x[2] + x[2] * x[3] - x[0]
            - 3 * x[1] + x[2] - x[3],
            inequality=lambda x, r: torch.stack(
                [x[0] + 2 * x[1] + x[2] + x[3] - 5, 3 * x[0] + x[1] + 2 * x[2] - x[3] - 4, 1.5 - x[1] - 4 * x[2]]
            ) - r,
            bounds=(0.0, None),
        ),
        [0.5] * 4, 3, -4.681818181818,
    ),
    "HS43": (
        Problem(
            lambda x, r: x[0] ** 2 + x[1] ** 2 + 2 * x[2] ** 2 + x[3] ** 2 - 5 * x[0] - 5 * x[1] - 21 * x[2] + 7 * x[3],
            inequality=lambda x, r: torch.stack(
                [
                    x @ x + x[0] - x[1] + x[2] - x[3] - 8,
                    x[0] ** 2 + 2 * x[1] ** 2 + x[2] ** 2 + 2 * x[3] ** 2 - x[0] - x[3] - 10,
                    2 * x[0] ** 2 + x[1] ** 2 + x[2] ** 2 + 2 * x[0] - x[1] - x[3] - 5,
                ]
            ) - r,
        ),
        [0.0] * 4, 3, -44.0,
    ),
}  # fmt: skip


def solve(problem, x0, *theta):
    """SLSQP, then Newton on the active rows."""

    def of(function):
        return lambda x: np.atleast_1d(function(torch.as_tensor(x, dtype=D), *theta).numpy())

    def slope(function):
        return lambda x: jacrev(lambda v: torch.atleast_1d(function(v, *theta)))(torch.as_tensor(x, dtype=D)).numpy()

    constraints = []
    if problem.equality is not None:
        constraints.append({"type": "eq", "fun": of(problem.equality), "jac": slope(problem.equality)})
    if problem.inequality is not None:
        g = problem.inequality
        constraints.append({"type": "ineq", "fun": lambda x: -of(g)(x), "jac": lambda x: -slope(g)(x)})
    bounds = None if problem.bounds is None else [problem.bounds] * len(x0)
    found = scipy.optimize.minimize(
        lambda x: of(problem.objective)(x)[0], x0, jac=lambda x: slope(problem.objective)(x)[0], method="SLSQP",
        constraints=constraints, bounds=bounds, options={"ftol": 1e-14, "maxiter": 200},
    )  # fmt: skip
    return polish(problem, torch.as_tensor(found.x, dtype=D), *theta)


def polish(problem, x, *theta):
    low, high = problem.bounds or (None, None)

    def inequalities(x):
        parts = [] if problem.inequality is None else [torch.atleast_1d(problem.inequality(x, *theta))]
        parts += ([] if low is None else [low - x]) + ([] if high is None else [x - high])
        return torch.cat(parts)

    active = inequalities(x) > -1e-5

    def rows(x):
        h = [] if problem.equality is None else [torch.atleast_1d(problem.equality(x, *theta))]
        return torch.cat([*h, inequalities(x)[active]])

    lam = -torch.linalg.lstsq(jacrev(rows)(x).mT, grad(problem.objective)(x, *theta)[:, None]).solution[:, 0]
    for _ in range(4):
        K = hessian(lambda x, lam: problem.objective(x, *theta) + lam @ rows(x))(x, lam)
        C = jacrev(rows)(x)
        K = torch.cat([torch.cat([K, C.mT], 1), torch.cat([C, C.new_zeros(len(C), len(C))], 1)])
        step = -torch.linalg.solve(K, torch.cat([grad(problem.objective)(x, *theta) + C.mT @ lam, rows(x)]))
        x, lam = x + step[: len(x)], lam + step[len(x) :]
    return x


@pytest.mark.parametrize("name", CASES)
def test_hock_schittkowski(name):
    problem, x0, m, value = CASES[name]
    r = torch.zeros(m, dtype=D, requires_grad=True)
    x = solve(problem, x0, r.detach())
    sol = solution(problem, x, r)
    assert sol.status is Status.CONVERGED
    assert float(sol.kkt.error) < 1e-11
    assert sol.value.item() == pytest.approx(value, abs=1e-6)
    assert (int(sol.weak), int(sol.dependent)) == (0, 0)
    # d f* / d r = -multiplier, with rows h - r and g - r
    duals = torch.cat([torch.atleast_1d(d) for d in (sol.equality_dual, sol.inequality_dual) if d is not None])
    (slope,) = torch.autograd.grad(sol.value, r, retain_graph=True)
    assert torch.allclose(slope, -duals, atol=1e-9)
    if name == "HS71":
        assert duals.tolist() == pytest.approx([0.1614685642, 0.5522936595], abs=1e-8)
        assert sol.bound_dual.tolist() == pytest.approx([-1.0878712287, 0, 0, 0], abs=1e-8)
    # x*, the multipliers and the second derivative of f*, against re-solving; through the objective alike
    J = torch.stack([torch.autograd.grad(e, r, retain_graph=True)[0] for e in sol.x])
    J_dual = torch.stack([torch.autograd.grad(e, r, retain_graph=True)[0] for e in duals])
    (direct,) = torch.autograd.grad(problem.objective(sol.x, r), r, retain_graph=True)
    assert torch.allclose(direct, slope, atol=1e-9)
    (again,) = torch.autograd.grad(sol.value, r, create_graph=True)
    second = torch.stack([torch.autograd.grad(e, r, retain_graph=True)[0] for e in again])
    assert torch.allclose(second, -J_dual, atol=1e-8)
    for k in range(m):
        e = torch.zeros(m, dtype=D)
        e[k] = 1e-4
        up, down = (solution(problem, solve(problem, x0, s * e), s * e) for s in (1, -1))
        assert torch.allclose((up.x - down.x) / 2e-4, J[:, k], atol=1e-5)
        difference = torch.cat(
            [
                torch.atleast_1d(a - b)
                for a, b in ((up.equality_dual, down.equality_dual), (up.inequality_dual, down.inequality_dual))
                if a is not None
            ]
        )
        assert torch.allclose(difference / 2e-4, J_dual[:, k], atol=1e-4)


def nearest(t, radius, captured=None, **options):
    """The nearest points of spheres with x0 >= 0, to points outside of both: (x, multipliers, value)."""
    batch = torch.broadcast_shapes(t.shape[:-1], radius.shape)
    problem = Problem(
        lambda x, t, radius: ((x - t) ** 2).sum(-1) * (1 if captured is None else captured),
        equality=lambda x, t, radius: (x * x).sum(-1) - radius**2,
        bounds=(tensor(0.0, -torch.inf, -torch.inf).to(t), None),
    )
    x = torch.cat([torch.zeros_like(t[..., :1]), t[..., 1:]], -1).detach()
    x = (radius.detach()[..., None] * x / x.square().sum(-1, keepdim=True).sqrt()).expand(*batch, 3)
    sol = solution(problem, x, t, radius, batch_dims=len(batch), **options)
    return sol.x, sol.equality_dual, sol.bound_dual, sol.value


def nearest_exact(t, radius):
    size = t[1:].square().sum().sqrt()
    x = torch.cat([torch.zeros(1, dtype=t.dtype), radius * t[1:] / size])
    z = torch.cat([2 * t[:1], torch.zeros(2, dtype=t.dtype)])  # f_x = -2 t_0 at the bound, minus z
    return x, (size / radius - 1)[None], z, ((x - t) ** 2).sum()[None]


CASE = Case(
    "nearest", nearest,
    lambda g: (tensor(-1.0, 2.0, 2.0) + torch.rand(3, generator=g, dtype=D), 1 + torch.rand((), generator=g, dtype=D)),
    exact=nearest_exact, tree=lambda p: nearest(p["first"], p["rest"][0]),
    capturing=lambda captured: nearest(tensor(-1.0, 2.0, 2.0), torch.tensor(1.5, dtype=D), captured),
    atol=1e-9,
    lacks={"check_guess": "x is found outside; its gradient is not attached", "check_module": "is a function"},
)  # fmt: skip


@pytest.mark.parametrize(("case", "law"), duties([CASE], [law for law in LAWS if law is not check_memory]))
def test_duty(case, law, generator):
    law(case, generator)


def quadratic(inequality=True):
    """min x'Q x / 2 + q'x, A x = b, G x <= h."""
    return Problem(
        lambda x, Q, q, A, b, G, h: x @ Q @ x / 2 + q @ x,
        equality=lambda x, Q, q, A, b, G, h: A @ x - b,
        inequality=(lambda x, Q, q, A, b, G, h: G @ x - h) if inequality else None,
    )


def leaves(*values):
    return [torch.tensor(v, dtype=D, requires_grad=True) for v in values]


def test_quadratic_program_on_the_simplex():
    theta = leaves([[4.0, 1], [1, 2]], [1.0, 1], [[1.0, 1]], [1.0], [[-1.0, 0], [0, -1]], [0.0, 0])
    sol = solution(quadratic(), tensor(0.25, 0.75), *theta)
    assert sol.equality_dual.tolist() == pytest.approx([-2.75])
    dQ, dq, dA, db, *_ = torch.autograd.grad(sol.x @ tensor(1.3, 0.5), theta)
    assert dq.tolist() == pytest.approx([-0.2, 0.2], abs=1e-12)
    assert ((dQ + dQ.mT) / 2).flatten().tolist() == pytest.approx([-0.05, -0.05, -0.05, 0.15], abs=1e-12)
    assert dA.flatten().tolist() == pytest.approx([0.375, -1.075], abs=1e-12)
    assert db.tolist() == pytest.approx([0.7], abs=1e-12)


def test_quadratic_program_with_two_active_rows():
    problem = Problem(
        lambda x, q, h: x[0] ** 2 + x[0] * x[1] + x[1] ** 2 + x[1] * x[2] + x[2] ** 2 + q @ x,
        inequality=lambda x, q, h: torch.stack([4 - x[0] - 2 * x[1] - 3 * x[2], 1 - x[0] - x[1]]) - h,
    )
    q, h = leaves([0.0, 0, 0], [0.0, 0])
    sol = solution(problem, tensor(4 / 7, 3 / 7, 6 / 7), q, h)
    assert sol.inequality_dual.tolist() == pytest.approx([5 / 7, 6 / 7], abs=1e-12)
    dq, dh = torch.autograd.grad(sol.x.sum(), [q, h])
    assert dq.tolist() == pytest.approx([-3 / 14, 3 / 14, -1 / 14], abs=1e-12)
    assert dh.tolist() == pytest.approx([-5 / 14, -3 / 7], abs=1e-12)


CLIP = Problem(lambda x, t: ((x - t) ** 2).sum(-1) / 2, inequality=lambda x, t: x)


@pytest.mark.parametrize("t0", [-1e-3, 0.0, 1e-3])
@pytest.mark.parametrize("policy", ["strong", "active", "mean", "smoothed"])
def test_policies_at_a_kink(t0, policy):
    t = torch.tensor([t0], dtype=D, requires_grad=True)
    sol = solution(CLIP, t.detach().clamp(max=0), t, degenerate=policy, smoothing=1e-6)
    slope, dual_slope = (torch.autograd.grad(e.sum(), t, create_graph=True)[0] for e in (sol.x, sol.inequality_dual))
    side = {-1e-3: 1.0, 1e-3: 0.0}
    at_kink = {"strong": 1.0, "active": 0.0, "mean": 0.5, "smoothed": 0.5}[policy]
    exact = (1 - t0 / np.sqrt(t0**2 + 4e-6)) / 2 if policy == "smoothed" else side.get(t0, at_kink)
    assert slope.item() == pytest.approx(exact, abs=1e-12)
    assert dual_slope.item() == pytest.approx(1 - exact, abs=1e-12)
    assert sol.x.item() == min(t0, 0.0)
    assert int(sol.weak) == (t0 == 0)
    curvature = -2e-6 / (t0**2 + 4e-6) ** 1.5 if policy == "smoothed" else 0.0
    assert float(torch.autograd.grad(slope.sum(), t)[0]) == pytest.approx(curvature, rel=1e-9, abs=1e-12)


def project(t, radius, policy="strong"):
    """The projection onto a ball that the point is outside of, as a constrained problem."""
    problem = Problem(
        lambda x, t, radius: ((x - t) ** 2).sum() / 2, inequality=lambda x, t, radius: (x * x).sum() - radius**2
    )
    with torch.no_grad():
        x = radius.detach() * t.detach() / torch.linalg.vector_norm(t.detach())
    return solution(problem, x, t, radius, degenerate=policy, smoothing=1e-13)


@pytest.mark.parametrize("policy", ["strong", "active", "mean", "smoothed"])
def test_vmap_is_a_loop_and_shared_gradients_are_sums(policy, generator):
    t, radius = 2 + torch.rand(4, 3, generator=generator, dtype=D), torch.tensor(1.5, dtype=D)

    def total(t, radius):
        sol = project(t, radius, policy)
        return (sol.x**3).sum() + sol.inequality_dual

    loop = [grad(total, (0, 1))(row, radius) for row in t]
    found = vmap(grad(total, (0, 1)), (0, None))(t, radius)
    assert torch.allclose(found[0], torch.stack([a for a, _ in loop]), atol=1e-10)
    assert torch.allclose(found[1], torch.stack([b for _, b in loop]), atol=1e-10)
    shared = grad(lambda r: vmap(total, (0, None))(t, r).sum())(radius)
    assert float(shared) == pytest.approx(float(sum(b for _, b in loop)), abs=1e-9)


def test_a_batch_with_weak_rows_and_the_tensors_of_the_bounds():
    problem = Problem(lambda x, t: ((x - t) ** 2).sum(-1), bounds=(None, torch.ones(3, dtype=D, requires_grad=True)))
    high = problem.bounds[1]
    t = tensor([0.5, 1.0, 2.0], [3.0, 3.0, 0.0]).requires_grad_()
    sol = solution(problem, t.detach().clamp(max=1), t, batch_dims=1)
    assert sol.weak.tolist() == [1, 0]
    assert sol.bound_dual.tolist() == [[0, 0, 2], [4, 4, 0]]
    dt, dhigh = torch.autograd.grad(sol.x.sum(), [t, high], retain_graph=True)
    assert dt.tolist() == [[1, 1, 0], [0, 0, 1]]
    assert dhigh.tolist() == [1, 1, 1]
    assert torch.autograd.grad(sol.value.sum(), high)[0].tolist() == [-4, -4, -2]


def test_dependent_constraints_are_said_and_solved_for_the_minimum_norm():
    problem = Problem(
        lambda x, t: ((x - t) ** 2).sum() / 2, equality=lambda x, t: torch.stack([x.sum() - 1, 2 * x.sum() - 2])
    )
    t = tensor(1.0, 3.0).requires_grad_()
    with pytest.warns(ImplicitWarning, match="depend on each other in 1 of 1"):
        sol = solution(problem, tensor(-0.5, 1.5), t)
    assert int(sol.dependent) == 1
    assert sol.equality_dual.tolist() == pytest.approx([0.3, 0.6])  # of all (a, b) with a + 2 b = 1.5, the shortest
    J = torch.stack([torch.autograd.grad(e, t, retain_graph=True)[0] for e in sol.x])
    assert torch.allclose(J, tensor([0.5, -0.5], [-0.5, 0.5]), atol=1e-10)
    # one multiplier of two that may be exchanged has no derivative; forward mode knows that they stay exchangeable
    with pytest.raises(SolverError, match="SINGULAR"):
        sol.equality_dual[0].backward()
    with pytest.warns(ImplicitWarning, match="depend on each other"):
        dual_dot = jvp(lambda t: solution(problem, tensor(-0.5, 1.5), t).equality_dual, (t.detach(),), (tensor(1, 3),))
    assert torch.allclose(dual_dot[1], tensor(0.4, 0.8), atol=1e-10)


def test_rows_that_move_apart_have_no_derivative():
    problem = Problem(lambda x, t: (x * x).sum(), equality=lambda x, t: torch.stack([x.sum() - 1, x.sum() - t]))
    t = torch.tensor(1.0, dtype=D)
    with pytest.warns(ImplicitWarning, match="depend"), pytest.raises(SolverError, match="SINGULAR"):
        jvp(lambda t: solution(problem, tensor(0.5, 0.5), t).x, (t,), (t,))


def test_a_point_that_is_not_kkt_is_refused_with_four_residuals():
    t = tensor(1.0, 2.0).requires_grad_()
    ball = Problem(lambda x, t: ((x - t) ** 2).sum(-1), inequality=lambda x, t: (x * x).sum(-1) - 1)
    message = r"stationarity .*primal feasibility .*dual feasibility .*complementarity .*NOT_STATIONARY"
    with pytest.raises(SolverError, match=message):
        solution(ball, tensor(1.0, 0.0), t)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solution(ball, tensor(0.0, 0.0), t, on_failure="warn")
    assert "not a KKT point" in str(caught[0].message)
    # a maximiser on the sphere is stationary, with a multiplier of the wrong sign
    with pytest.raises(SolverError, match=r"dual feasibility [1-9]"):
        solution(ball, -t.detach() / t.detach().norm(), t)
    good = t.detach() / t.detach().norm()
    points = torch.stack([good, tensor(1.0, 0.0), good, torch.full((2,), torch.nan, dtype=D)])
    shared = t.detach().clone().requires_grad_()
    sol = solution(ball, points, shared, batch_dims=1, on_failure="nan")
    assert [s.name for s in sol.status] == ["CONVERGED", "NOT_STATIONARY", "CONVERGED", "NON_FINITE"]
    assert sol.x.isnan().any(-1).tolist() == sol.value.isnan().tolist() == [False, True, False, True]
    single = torch.autograd.grad(solution(ball, good, t).x.sum(), t)[0]
    (found,) = torch.autograd.grad(sol.x[::2].sum() + sol.value[0], shared, retain_graph=True)
    value = torch.autograd.grad(solution(ball, good, t).value, t)[0]
    assert torch.allclose(found, 2 * single + value, atol=1e-10)
    assert torch.autograd.grad(sol.x.sum(), shared)[0].isnan().all()


def test_trees_float32_and_another_solver():
    problem = Problem(
        lambda x, p: ((x["a"] - p["t"]) ** 2).sum() + (x["b"] - 2) ** 2, equality=lambda x, p: x["a"].sum() - p["s"]
    )
    p = {"t": torch.tensor([1.0, 2.0], requires_grad=True), "s": torch.tensor(1.0, requires_grad=True)}
    x = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor(2.0)}
    for solver in (None, MINRES()):
        sol = solution(problem, x, p, solver=solver)
        assert sol.x["a"].dtype == sol.value.dtype == torch.float32
        slope = torch.autograd.grad(sol.x["a"][0], p["s"])[0]
        assert float(slope) == pytest.approx(0.5, abs=1e-5)


def test_captured_tensors_are_refused():
    hidden = tensor(1.0, 2.0).requires_grad_()
    t = tensor(0.0).requires_grad_()
    problem = Problem(lambda x, t: ((x - hidden) ** 2).sum() + (x * t).sum())
    with pytest.raises(ValueError, match=r"captures `.*hidden"):
        solution(problem, hidden.detach().clone(), t)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"degenerate": "weak"}, "degenerate must be"),
        ({"smoothing": 0.0}, "smoothing must be a positive"),
        ({"tolerance": -1.0}, "tolerance must be"),
        ({"on_failure": "zero"}, "on_failure"),
        ({"equality_dual": torch.ones(1)}, "no such constraints"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        solution(CLIP, torch.zeros(1), torch.zeros(1), **options)
