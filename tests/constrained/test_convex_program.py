"""ConvexProgram: known answers, the ten duties, statuses, and what is refused."""

import copy
import pickle

import pytest
import torch
from laws_layer import LAWS, Case, check_bad_item, check_gradcheck, check_gradgradcheck, check_module, duties
from sklearn.datasets import make_regression
from torch.func import hessian, jacfwd, jacrev, vmap

from nestopt.constrained import ConvexProgram, MinimumNorm
from nestopt.implicit import ImplicitWarning, Monitor
from nestopt.linalg import GMRES, SolverError, Status

cp = pytest.importorskip("cvxpy", reason="ConvexProgram writes its problems in cvxpy")
pytest.importorskip("clarabel", reason="clarabel is ConvexProgram's default solver")

D = torch.float64


def tensor(*values):
    return torch.tensor(values, dtype=D)


def close(a, b, atol=1e-8):
    assert a.shape == b.shape
    assert float((a - b).detach().abs().max()) <= atol, (a, b)


def leaves(*values):
    return [torch.tensor(v, dtype=D, requires_grad=True) for v in values]


def entropy(n=3):
    """max t'x + entropy(x) on the simplex: x = softmax(t), value = logsumexp(t)."""
    x, t = cp.Variable(n, name="x"), cp.Parameter(n, name="t")
    return ConvexProgram(cp.Problem(cp.Maximize(t @ x + cp.sum(cp.entr(x))), [cp.sum(x) == 1]))


def ball(n=3):
    """The distance to a ball from outside of it, by its second-order cone."""
    x, t, r = cp.Variable(n, name="x"), cp.Parameter(n, name="t"), cp.Parameter(name="r", nonneg=True)
    return ConvexProgram(cp.Problem(cp.Minimize(cp.sum_squares(x - t)), [cp.norm(x) <= r]))


def semidefinite(n=2):
    """The nearest semidefinite matrix."""
    X, C = cp.Variable((n, n), symmetric=True, name="X"), cp.Parameter((n, n), name="C")
    return ConvexProgram(cp.Problem(cp.Minimize(cp.sum_squares(X - C)), [X >> 0]))


def quadratic():
    """min x'x / 2 + q'x on x >= 0, sum x = b."""
    x, q, b = cp.Variable(3, name="x"), cp.Parameter(3, name="q"), cp.Parameter(name="b")
    return ConvexProgram(cp.Problem(cp.Minimize(cp.sum_squares(x) / 2 + q @ x), [x >= 0, cp.sum(x) == b]))


def solves(program, name):
    """The layer as a function that the laws call with a monitor and a policy."""

    def layer(*theta, monitor=None, on_failure="nan"):
        program.monitor, program.on_failure = monitor, on_failure
        solution = program(*theta)
        return solution[name], solution.value[..., None]

    return layer


def ball_exact(t, r):
    x = r * t / t.square().sum().sqrt()
    return x, ((x - t) ** 2).sum()[None]


def quadratic_exact(q, b):
    """With the last entry at its bound."""
    x = torch.cat([(b + q[:2].sum()) / 2 - q[:2], torch.zeros(1, dtype=D)])
    return x, (x @ x / 2 + q @ x)[None]


def semidefinite_exact(C):
    """Of a symmetrised 2 x 2 matrix with one negative eigenvalue: that part of its spectrum."""
    S = (C + C.mT) / 2
    half, gap = S.trace() / 2, torch.sqrt((S[0, 0] - S[1, 1]) ** 2 / 4 + S[0, 1] ** 2)
    X = (half + gap) * (S - (half - gap) * torch.eye(2, dtype=D)) / (2 * gap)
    return X, ((X - C) ** 2).sum()[None]


class Outer(torch.nn.Module):
    """A network that ends in a program."""

    def __init__(self):
        super().__init__()
        self.scale, self.program = torch.nn.Parameter(torch.tensor(1.5, dtype=D)), quadratic()

    def forward(self, q):
        return self.program(self.scale * q, self.scale)["x"]


def module():
    return Outer(), (tensor(0.3, -0.2, 0.5),)


NOT_HERE = {
    "check_captured": "takes no function",
    "check_guess": "has no initial guess",
}
NO_SCALAR = {**NOT_HERE, "check_zero_dimensions": "its parameters have dimensions"}
BALL, ENTROPY, SEMIDEFINITE, QUADRATIC = ball(), entropy(), semidefinite(), quadratic()
CASES = [
    Case(
        "quadratic", solves(QUADRATIC, "x"),
        lambda g: (
            tensor(0.0, 0.2, 3.0) + 0.1 * torch.randn(3, generator=g, dtype=D),
            1 + torch.rand((), generator=g, dtype=D),
        ),
        exact=quadratic_exact, status=lambda *t: QUADRATIC(*t).codes,
        spoil=lambda item: (item[0], torch.tensor(-1.0, dtype=D)),
        tree=lambda p: solves(QUADRATIC, "x")({"q": p["first"], "b": p["rest"][0]}), module=module,
        lacks=NOT_HERE, atol=1e-9,
    ),
    Case(
        "exponential", solves(ENTROPY, "x"), lambda g: (torch.randn(3, generator=g, dtype=D),),
        exact=lambda t: (t.softmax(-1), t.logsumexp(-1)[None]), status=lambda *t: ENTROPY(*t).codes,
        tree=lambda p: solves(ENTROPY, "x")({"t": p["first"]}), lacks=NO_SCALAR, shared=(), atol=1e-9,
    ),
    Case(
        "second-order", solves(BALL, "x"),
        lambda g: (1.5 + torch.rand(3, generator=g, dtype=D), 1 + torch.rand((), generator=g, dtype=D)),
        exact=ball_exact, status=lambda *t: BALL(*t).codes, spoil=lambda item: (item[0], torch.tensor(-1.0, dtype=D)),
        tree=lambda p: solves(BALL, "x")({"t": p["first"], "r": p["rest"][0]}), lacks=NOT_HERE, atol=1e-9,
    ),
    Case(
        "semidefinite", solves(SEMIDEFINITE, "X"),
        lambda g: (tensor([1.0, 0.4], [0.7, -1.0]) + 0.3 * torch.randn(2, 2, generator=g, dtype=D),),
        exact=semidefinite_exact, status=lambda *t: SEMIDEFINITE(*t).codes, lacks=NO_SCALAR, shared=(), atol=1e-9,
        tree=lambda p: solves(SEMIDEFINITE, "X")({"C": p["first"]}),
    ),
]  # fmt: skip


# Every law but for the exponential cone, the slowest, those alone that its projection enters.
PAIRS = [
    *duties(CASES[:1]),
    *duties(CASES[1:2], [check_gradcheck, check_gradgradcheck, check_bad_item]),
    *duties(CASES[2:], [law for law in LAWS if law is not check_module]),
]


@pytest.mark.parametrize(("case", "law"), PAIRS)
def test_duty(case, law, generator):
    law(case, generator)


@pytest.mark.parametrize("n", [1, 3])
def test_entropy_is_softmax(n, generator):
    program, t = entropy(n), torch.randn(2, n, generator=generator, dtype=D)
    solution = program(t)
    assert solution.converged.all()
    assert float(solution.error.max()) < 1e-12
    close(solution["x"], t.softmax(-1), 1e-12)
    close(solution.value, t.logsumexp(-1), 1e-12)
    close(jacrev(lambda t: program(t)["x"])(t[0]), jacfwd(lambda t: t.softmax(0))(t[0]))
    close(hessian(lambda t: program(t).value)(t[0]), hessian(lambda t: t.logsumexp(0))(t[0]))
    weights = torch.arange(1.0, n + 1, dtype=D)
    close(hessian(lambda t: program(t)["x"] @ weights)(t[0]), hessian(lambda t: t.softmax(0) @ weights)(t[0]))


def test_quadratic_program_on_the_simplex():
    x, q, b = cp.Variable(2, name="x"), cp.Parameter(2, name="q"), cp.Parameter(1, name="b")
    A = cp.Parameter((1, 2), name="A")
    problem = cp.Problem(
        cp.Minimize(cp.quad_form(x, torch.tensor([[4.0, 1], [1, 2]]).double().numpy()) / 2 + q @ x),
        [A @ x == b, x >= 0],
    )
    program = ConvexProgram(problem, parameters=[q, A, b], constraints=problem.constraints)
    q, A, b = leaves([1.0, 1], [[1.0, 1]], [1.0])
    solution = program(q, A, b)
    close(solution["x"].detach(), tensor(0.25, 0.75), 1e-12)
    close(solution.duals[0].detach(), tensor(-2.75), 1e-12)
    close(solution.duals[1].detach(), tensor(0.0, 0.0), 1e-12)
    dq, dA, db = torch.autograd.grad(solution["x"] @ tensor(1.3, 0.5), [q, A, b], retain_graph=True)
    close(dq, tensor(-0.2, 0.2), 1e-12)
    close(dA, tensor([0.375, -1.075]), 1e-12)
    close(db, tensor(0.7), 1e-12)
    # the value's derivative in b is minus the multiplier, and the multiplier's is the second derivative
    (slope,) = torch.autograd.grad(solution.value, b, create_graph=True)
    close(slope, -solution.duals[0], 1e-12)
    (second,) = torch.autograd.grad(slope.sum(), b)
    (moved,) = torch.autograd.grad(program(q, A, b).duals[0].sum(), b)
    close(second, -moved, 1e-12)


def test_quadratic_program_with_two_active_rows():
    x, q, h = cp.Variable(3, name="x"), cp.Parameter(3, name="q"), cp.Parameter(2, name="h")
    matrix = torch.tensor([[2.0, 1, 0], [1, 2, 1], [0, 1, 2]]).double().numpy()
    rows = cp.hstack([-x[0] - 2 * x[1] - 3 * x[2] + 4, -x[0] - x[1] + 1])
    problem = cp.Problem(cp.Minimize(cp.quad_form(x, matrix) / 2 + q @ x), [rows <= h])
    q, h = leaves([0.0, 0, 0], [0.0, 0])
    solution = ConvexProgram(problem, constraints=problem.constraints)({"q": q, "h": h})
    close(solution["x"].detach(), tensor(4 / 7, 3 / 7, 6 / 7), 1e-12)
    close(solution.duals[0].detach(), tensor(5 / 7, 6 / 7), 1e-12)
    dq, dh = torch.autograd.grad(solution["x"].sum(), [q, h])
    close(dq, tensor(-3 / 14, 3 / 14, -1 / 14), 1e-12)
    close(dh, tensor(-5 / 14, -3 / 7), 1e-12)


def test_lasso():
    X, y = (torch.as_tensor(a, dtype=D) for a in make_regression(10, 3, random_state=0))
    w, lam, data = cp.Variable(3, name="w"), cp.Parameter(nonneg=True, name="lam"), cp.Parameter((10, 3), name="X")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(data @ w - y.numpy()) / 20 + lam * cp.norm1(w)))
    program = ConvexProgram(problem, parameters=[lam, data])
    lam = torch.tensor(10.0, dtype=D, requires_grad=True)
    solution = program(lam, X)
    close(solution["w"].detach(), tensor(62.16485194, 29.03583355, 88.27012188))
    slope = torch.stack([torch.autograd.grad(e, lam, retain_graph=True)[0] for e in solution["w"]])
    close(slope, tensor(-0.6017178, -0.69149565, -0.6104686))
    zero = program(torch.tensor(1e3, dtype=D), X)  # all weights at the kink
    assert zero.converged
    assert float(zero["w"].abs().max()) < 1e-9


def test_semidefinite_programs():
    X, C = cp.Variable((3, 3), PSD=True, name="X"), cp.Parameter((3, 3), symmetric=True, name="C")
    nearest = cp.Problem(cp.Minimize(cp.sum_squares(X - C)), [cp.diag(X) == 1])
    program = ConvexProgram(nearest)
    C = tensor([1.0, 0.9, -0.9], [0.9, 1.0, 0.9], [-0.9, 0.9, 1.0]).requires_grad_()
    solution = program(C)
    close(solution["X"].detach(), tensor([1.0, 0.5, -0.5], [0.5, 1.0, 0.5], [-0.5, 0.5, 1.0]), 1e-10)
    (slope,) = torch.autograd.grad(solution.value, C, retain_graph=True)  # 2 (C - X), for a symmetric parameter
    close(slope, 2 * (C - solution["X"]).detach(), 1e-9)
    W = tensor([0.3, 1.0, -2.0], [1.0, -0.5, 0.7], [-2.0, 0.7, 0.1])
    (slope,) = torch.autograd.grad((W * solution["X"]).sum(), C)
    E = 1e-5 * tensor([0.0, 1.0, 0.0], [1.0, 0.0, -2.0], [0.0, -2.0, 3.0])
    difference = sum(s * (W * program(C.detach() + s * E)["X"]).sum() for s in (1, -1)) / 2
    assert float((slope * E).sum()) == pytest.approx(float(difference), rel=1e-7)
    # the largest eigenvalue: gradient q q', Hessian by torch
    t, A = cp.Variable(name="t"), cp.Parameter((3, 3), symmetric=True, name="A")
    largest = ConvexProgram(cp.Problem(cp.Minimize(t), [t * torch.eye(3).numpy() - A >> 0]))

    def eigenvalue(M):
        return torch.linalg.eigvalsh((M + M.mT) / 2)[-1]

    close(largest(W)["t"], eigenvalue(W), 1e-10)
    close(jacrev(lambda M: largest(M)["t"])(W), jacrev(eigenvalue)(W), 1e-8)
    close(hessian(lambda M: largest(M)["t"])(W), hessian(eigenvalue)(W), 1e-7)


def test_robust_least_squares(generator):
    """min |A x - b| + rho |x|: stationary where A'r / |r| + rho x / |x| = 0."""
    x, b, rho = cp.Variable(2, name="x"), cp.Parameter(4, name="b"), cp.Parameter(name="rho", nonneg=True)
    A = torch.randn(4, 2, generator=generator, dtype=D)
    program = ConvexProgram(cp.Problem(cp.Minimize(cp.norm(A.numpy() @ x - b) + rho * cp.norm(x))))
    b, rho = (3 * torch.randn(4, generator=generator, dtype=D)).requires_grad_(), torch.tensor(0.1, dtype=D)
    found = program(b, rho)["x"]
    r = A @ found - b
    close(A.mT @ r / r.norm() + rho * found / found.norm(), torch.zeros(2, dtype=D), 1e-9)
    from nestopt import implicit

    def objective(x, b, rho):
        return torch.linalg.vector_norm(A @ x - b) + rho * torch.linalg.vector_norm(x)

    again = implicit.argmin(objective, found.detach(), b, rho)
    close(torch.autograd.grad(found[0], b)[0], torch.autograd.grad(again[0], b)[0], 1e-9)


def test_power_cone():
    """min a x + b y where x^alpha y^(1 - alpha) >= 2."""
    x, y, alpha = cp.Variable(name="x"), cp.Variable(name="y"), 0.3
    a, b = cp.Parameter(name="a", pos=True), cp.Parameter(name="b", pos=True)
    problem = cp.Problem(cp.Minimize(a * x + b * y), [cp.PowCone3D(x, y, 2.0, alpha)])

    def exact(a, b):
        ratio = alpha * b / ((1 - alpha) * a)
        return torch.stack([2 * ratio ** (1 - alpha), 2 * ratio**-alpha])

    theta = (torch.tensor(1.3, dtype=D), torch.tensor(0.4, dtype=D))
    for solver in (None, "SCS"):
        program = ConvexProgram(problem, [a, b], [x, y], solver=solver)

        def layer(a, b, program=program):
            solution = program(a, b)
            return torch.stack([solution["x"], solution["y"]])

        close(layer(*theta), exact(*theta), 1e-11)
        close(hessian(lambda a, b: layer(a, b).prod())(*theta), hessian(lambda a, b: exact(a, b).prod())(*theta), 1e-8)


@pytest.mark.filterwarnings("ignore:The default value of raise_error:PendingDeprecationWarning")  # cvxpy calls osqp so
@pytest.mark.parametrize("solver", ["SCS", "CLARABEL", "OSQP"])
def test_any_solver_of_cvxpy_gives_the_same(solver):
    if solver not in cp.installed_solvers():
        pytest.skip(f"cvxpy has no {solver} here")
    # every cone that the solver can do
    x, t = cp.Variable(3, name="x"), cp.Parameter(3, name="t")
    constraints = [cp.sum(x) == 1, x >= -1]
    if solver != "OSQP":
        constraints += [cp.norm(x) <= 2, cp.exp(x[0]) <= 1.2, cp.bmat([[x[0] + 2, x[1]], [x[1], x[2]]]) >> 0]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - t)), constraints)
    t = tensor(2.0, -3.0, 0.1).requires_grad_()
    options = {} if solver == "CLARABEL" else {"eps_abs": 1e-8, "eps_rel": 1e-8}
    other, ours = ConvexProgram(problem, solver=solver.lower(), solver_options=options), ConvexProgram(problem)
    a, b = other(t), ours(t)
    assert a.converged
    close(a["x"], b["x"], 1e-10)
    close(torch.autograd.grad(a["x"][0], t)[0], torch.autograd.grad(b["x"][0], t)[0], 1e-9)


def test_statuses_of_a_batch():
    y, b, c = cp.Variable(2, name="y"), cp.Parameter(2, name="b"), cp.Parameter(2, name="c")
    program = ConvexProgram(cp.Problem(cp.Minimize(c @ y), [y >= b, y[0] <= 1]), parameters=[b, c])
    b = tensor([0.0, 0.0], [2.0, 0.0], [0.5, 0.0], [torch.nan, 0.0])
    c = tensor([-1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [-1.0, 1.0]).requires_grad_()
    solution = program(b, c)
    assert [s.name for s in solution.status] == ["CONVERGED", "INFEASIBLE", "UNBOUNDED", "NON_FINITE"]
    assert solution["y"].isnan().all(-1).tolist() == solution.value.isnan().tolist() == [False, True, True, True]
    close(solution["y"][0].detach(), tensor(1.0, 0.0), 1e-10)
    close(torch.autograd.grad(solution.value[0], c)[0], tensor([1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]), 1e-10)
    program.on_failure = "raise"
    with pytest.raises(SolverError, match="1 of 4 INFEASIBLE"):
        program(b, c)
    program.on_failure = "warn"
    with pytest.warns(ImplicitWarning, match="UNBOUNDED"):
        assert program(b, c)["y"][0].isfinite().all()
    # outside of the sign that a parameter was declared with, the problem is another one
    assert [s.name for s in ball()(tensor(2.0, 0.0, 0.0), tensor(1.0, -1.0)).status] == ["CONVERGED", "NOT_CONVEX"]


@pytest.mark.parametrize("solver", [None, "SCS"])
def test_infeasible_and_unbounded_by_certificate(solver):
    if solver and solver not in cp.installed_solvers():
        pytest.skip(f"cvxpy has no {solver} here")
    x, t, h = cp.Variable(3, name="x"), cp.Parameter(3, name="t"), cp.Parameter(name="h")
    cone = [cp.norm(x[1:]) <= x[0], x[0] >= h, x[1] == 1 - h]
    program = ConvexProgram(cp.Problem(cp.Minimize(t @ x), cone), solver=solver)
    ends = program({"t": tensor([2.0, 0.0, 0.0], [-1.0, 0.0, 0.0]), "h": torch.tensor(1.0, dtype=D)})
    assert [s.name for s in ends.status] == ["CONVERGED", "UNBOUNDED"]
    bounded = ConvexProgram(cp.Problem(cp.Minimize(t @ x), [cp.norm(x) <= 1, x[0] >= h]), solver=solver)
    ends = bounded({"t": tensor(1.0, 1.0, 0.0), "h": tensor(0.0, 1.5)})
    assert [s.name for s in ends.status] == ["CONVERGED", "INFEASIBLE"]


def test_solvers_and_settings_that_do_not_fit_are_named():
    x, t = cp.Variable(2, name="x"), cp.Parameter(2, name="t")
    program = ConvexProgram(cp.Problem(cp.Minimize(t @ x), [cp.norm(x) <= 1]), solver_options={"max_itr": 3})
    with pytest.raises(ValueError, match="max_itr"):
        program(tensor(1.0, 2.0))
    if "OSQP" in cp.installed_solvers():
        cones = ConvexProgram(cp.Problem(cp.Minimize(t @ x), [cp.norm(x) <= 1]), solver="OSQP")
        with pytest.raises(ValueError, match="OSQP cannot do the cones"):
            cones(tensor(1.0, 2.0))


def test_redundant_constraints():
    x, t = cp.Variable(2, name="x"), cp.Parameter(2, name="t")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - t)), [cp.sum(x) == 1, 2 * cp.sum(x) == 2])
    t = tensor(1.0, 3.0).requires_grad_()
    monitor = Monitor()
    solution = ConvexProgram(problem, monitor=monitor)(t)
    assert solution.converged
    (slope,) = torch.autograd.grad(solution["x"][0], t)
    assert slope.isnan().all()
    assert monitor.last("adjoint").status is Status.SINGULAR
    shortest = ConvexProgram(problem, linear_solver=MinimumNorm(), on_failure="raise")(t)
    close(torch.autograd.grad(shortest["x"][0], t)[0], tensor(0.5, -0.5), 1e-9)
    iterative = ConvexProgram(cp.Problem(problem.objective, problem.constraints[:1]), linear_solver=GMRES(rtol=1e-12))
    close(torch.autograd.grad(iterative(t)["x"][0], t)[0], tensor(0.5, -0.5), 1e-9)


def test_shapes_attributes_and_names(generator):
    # matrices are flattened by columns in cvxpy and by rows in torch; attributes make entries depend on each other
    X = cp.Variable((2, 3), name="X")
    S, d = cp.Variable((3, 3), symmetric=True, name="S"), cp.Variable((2, 2), diag=True, name="d")
    M, N = cp.Parameter((2, 3), name="M"), cp.Parameter((3, 3), symmetric=True, name="N")
    k = cp.Parameter((2, 2), diag=True, name="k")
    objective = cp.sum_squares(X - M) + cp.sum_squares(S - N) + cp.sum_squares(d - k)
    program = ConvexProgram(cp.Problem(cp.Minimize(objective)), parameters=[k, M, N], variables=[S, X, d])
    m, n = torch.randn(5, 2, 3, generator=generator), torch.randn(3, 3, generator=generator)
    solution = program(M=m, N=n, k=torch.diag(torch.tensor([1.0, -2.0])))
    assert solution["X"].dtype == solution.value.dtype == torch.float32
    close(solution["X"], m, 1e-6)
    close(solution["S"], ((n + n.mT) / 2).expand(5, 3, 3), 1e-6)
    close(solution["d"], torch.diag(torch.tensor([1.0, -2.0])).expand(5, 2, 2), 1e-6)
    assert solution.value.shape == (5,)
    assert program(n[:2, :2], m[:0], n)["X"].shape == (0, 2, 3)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(duplicate):
    program, t = entropy(), tensor(0.3, 0.1, -0.4)
    twin = duplicate(program)
    assert torch.equal(twin(t)["x"], program(t)["x"])
    assert twin.state_dict() == {}
    assert "parameters=['t']" in repr(twin)


def test_vmap_with_a_shared_parameter(generator):
    program = ball()
    t, r = 2 + torch.rand(3, 3, generator=generator, dtype=D), torch.tensor(1.5, dtype=D)
    found = vmap(lambda t, r: program(t, r)["x"], (0, None))(t, r)
    close(found, program(t, r)["x"], 1e-12)


def a(**options):
    return cp.Parameter(2, name="a", **options)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda x, p: ConvexProgram(3), TypeError, "must be a cvxpy.Problem"),
        (lambda x, p: ConvexProgram(cp.Problem(cp.Minimize(cp.sum(x)))), ValueError, "no cvxpy.Parameter"),
        (
            lambda x, p: ConvexProgram(cp.Problem(cp.Minimize(cp.sum_squares(x)), [x >= p, cp.exp(p) @ x <= 1])),
            ValueError, r"not DPP.*constraint exp\(p\) @ x <= 1",
        ),
        (lambda x, p: ConvexProgram(cp.Problem(cp.Minimize(cp.sum(p - cp.square(x))))), ValueError, "not convex"),
        (lambda x, p: ConvexProgram(cp.Problem(cp.Minimize(p @ x)), parameters=[]), ValueError, "p of the problem"),
        (lambda x, p: ConvexProgram(cp.Problem(cp.Minimize(p @ x)), [p, a()]), ValueError, "a are not in the problem"),
        (lambda x, p: ConvexProgram(cp.Problem(cp.Minimize(p @ x)), variables=[cp.Variable(name="z")]), ValueError,
         "variables z are not"),
        (lambda x, p: ConvexProgram(cp.Problem(cp.Minimize(p @ x)), solver="GUROBY"), ValueError, "solver must be one"),
        (lambda x, p: ConvexProgram(cp.Problem(cp.Minimize(p @ x)), tolerance=0.0), ValueError, "tolerance"),
        (lambda x, p: ConvexProgram(cp.Problem(cp.Minimize(p @ x)), on_failure="no"), ValueError, "on_failure"),
        (lambda x, p: ConvexProgram(cp.Problem(cp.Minimize(p @ x)), constraints=[x >= 0]), ValueError, "same objects"),
        (
            lambda x, p: ConvexProgram(cp.Problem(cp.Minimize(p @ cp.Variable(2, integer=True)))), TypeError,
            "continuous",
        ),
        (
            lambda x, p: ConvexProgram(cp.Problem(cp.Minimize(p @ x + cp.Parameter(2, name="p") @ x))), ValueError,
            "names of their own",
        ),
    ],
)  # fmt: skip
def test_bad_problems_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make(cp.Variable(2, name="x"), cp.Parameter(2, name="p"))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f(torch.ones(3)), ValueError, "expected 2 parameters, t, r"),
        (lambda f: f({"t": torch.ones(3)}), ValueError, "parameters r are missing"),
        (lambda f: f(t=torch.ones(3), r=torch.ones(()), s=torch.ones(())), ValueError, "parameters s do not exist"),
        (lambda f: f(torch.ones(3), r=torch.ones(())), ValueError, "either in order or by name"),
        (lambda f: f(torch.ones(2), torch.ones(())), ValueError, r"t must have shape \(\*batch, \*\(3,\)\)"),
        (lambda f: f(torch.ones(4, 3), torch.ones(5)), ValueError, "do not broadcast"),
        (lambda f: f(torch.ones(3), torch.ones((), dtype=D)), ValueError, "share one dtype"),
        (lambda f: f(torch.ones(3, dtype=torch.int64), torch.ones(())), TypeError, "real floating"),
        (lambda f: f([1.0, 2.0, 3.0], torch.ones(())), TypeError, "real floating tensor, but got list"),
    ],
)
def test_bad_values_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(BALL)
