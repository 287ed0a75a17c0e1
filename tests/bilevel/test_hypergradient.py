import itertools

import pytest
import torch
from laws_bilevel import check_hypergradient_value, relative, vector
from problems import DOUBLE, Answered, adversarial, merely_convex, quadratic, ridge, sine
from torch import nn

from nestopt import bilevel, linalg
from nestopt.linalg import Status

SIZES = [(1, 1), (5, 3), (200, 50)]
CONDITIONS = [1.0, 1e3, 1e6]
SOLVERS = {
    "cholesky": linalg.Cholesky(),
    "lu": linalg.LU(),
    "cg": linalg.CG(rtol=1e-10, max_iter=20_000),
    "minres": linalg.MINRES(rtol=1e-10, max_iter=20_000),
}


def in_dicts(case: Answered) -> Answered:
    """The same problem with x in a nested dict and y in a tuple of odd shapes."""
    n, m = case.y0.numel(), case.x0.numel()
    cut, low = m // 2, n // 3

    def pack_x(x):
        return {"b": {"w": x[cut:]}, "a": x[:cut].reshape(1, -1)} if m > 1 else {"s": x.reshape(())}

    def join_x(x):
        return torch.cat([x["a"].reshape(-1), x["b"]["w"]]) if m > 1 else x["s"].reshape(1)

    def pack_y(y):
        return (y[:low].reshape(-1, 1), [y[low:]])

    def join_y(y):
        return torch.cat([y[0].reshape(-1), y[1][0]])

    p = case.problem
    return Answered(
        name=case.name + " in dicts",
        problem=bilevel.Problem(lambda x, y: p.upper(join_x(x), join_y(y)), lambda x, y: p.lower(join_x(x), join_y(y))),
        x0=pack_x(case.x0),
        y0=pack_y(case.y0),
        lower_solution=lambda x: pack_y(case.lower_solution(join_x(x))),
        hypergradient=lambda x: pack_x(case.hypergradient(join_x(x))),
        strong_convexity=case.strong_convexity,
    )


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("size", "condition"), list(itertools.product(SIZES, CONDITIONS)))
def test_closed_form_of_the_quadratic_family(size, condition, solver):
    case = quadratic(*size, condition=condition)
    check_hypergradient_value(case, SOLVERS[solver], 1e-10)


@pytest.mark.parametrize("size", SIZES)
def test_dicts_and_tuples(size):
    case = in_dicts(quadratic(*size, condition=1e6))
    check_hypergradient_value(case, linalg.Cholesky(), 1e-10)


@pytest.mark.parametrize(("size", "condition"), [((5, 3), 1e6), ((200, 50), 1e6)])
def test_module_parameters(size, condition):
    case = quadratic(*size, condition=condition)
    upper_module, lower_module = nn.Linear(size[1], 1, bias=False).double(), nn.Linear(size[0], 1, bias=False).double()
    with torch.no_grad():
        upper_module.weight.copy_(case.x0[None])
        lower_module.weight.copy_(case.lower_solution(case.x0)[None])
    p = case.problem
    problem = bilevel.Problem(
        lambda x, y: p.upper(x["weight"][0], y["weight"][0]), lambda x, y: p.lower(x["weight"][0], y["weight"][0])
    )
    hg = bilevel.hypergradient(problem, upper_module, lower_module, linalg.Cholesky())
    assert hg.status == Status.CONVERGED
    assert relative(hg.value["weight"], case.hypergradient(case.x0)[None]) <= 1e-10
    assert upper_module.weight.grad is None
    assert lower_module.weight.grad is None


@pytest.mark.parametrize("case", [ridge(), sine(1), sine(6), adversarial(4)], ids=lambda c: c.name)
@pytest.mark.parametrize("solver", SOLVERS)
def test_closed_form_of_other_problems(case, solver):
    check_hypergradient_value(case, SOLVERS[solver], 1e-10)


def inexact_runs(condition):
    """Lower solutions and adjoints of every quality: the bound has to hold for each."""
    small = itertools.product([(1, 1), (5, 3), (20, 6)], range(2), [0.0, 1e-8, 1e-2, 1.0], [1, 3, 10, 1000])
    large = itertools.product([(200, 50)], [0], [0.0, 1e-2], [3, 30])
    for size, seed, noise, steps in itertools.chain(small, large):
        case = quadratic(*size, condition=condition, seed=10 * seed)
        g = torch.Generator().manual_seed(seed)
        y = case.lower_solution(case.x0) + noise * torch.randn(size[0], generator=g, dtype=DOUBLE)
        yield case, y, linalg.CG(rtol=1e-12, max_iter=steps)


@pytest.mark.parametrize("condition", [1.0, *(pytest.param(c, marks=pytest.mark.slow) for c in (1e3, 1e6))])
def test_the_bound_holds_for_every_inexact_run(condition):
    checked = 0
    for case, y, solver in inexact_runs(condition):
        truth = case.hypergradient(case.x0)
        given = bilevel.hypergradient(case.problem, case.x0, y, solver, strong_convexity=case.strong_convexity)
        error = float((given.value - truth).norm())
        assert error <= given.error_bound, (case.name, solver.max_iter, error, given.error_bound)
        estimated = bilevel.hypergradient(case.problem, case.x0, y, solver)
        assert error <= 3 * estimated.error_bound, (case.name, solver.max_iter, error, estimated.error_bound)
        checked += 1
    assert checked == 3 * 2 * 16 + 4


def test_the_bound_is_no_more_than_its_constants_make_it():
    """It shrinks with the residuals: a bound that is always huge would pass the law above."""
    case = quadratic(40, 12, condition=10.0)
    exact = case.lower_solution(case.x0)
    bounds = []
    for noise in (1e-2, 1e-5, 1e-8):
        y = exact + noise * torch.ones(40, dtype=DOUBLE)
        hg = bilevel.hypergradient(case.problem, case.x0, y, linalg.CG(rtol=1e-14))
        error = float((hg.value - case.hypergradient(case.x0)).norm())
        assert error <= hg.error_bound <= 1e3 * error
        bounds.append(hg.error_bound)
    assert bounds[2] < 1e-5 * bounds[0]


def test_the_bound_on_a_problem_that_is_not_quadratic():
    case = ridge()
    exact = case.lower_solution(case.x0)
    truth = case.hypergradient(case.x0)
    for noise in (0.0, 1e-6, 1e-3):
        y = {name: part + noise for name, part in exact.items()}
        hg = bilevel.hypergradient(case.problem, case.x0, y, linalg.CG())
        assert float((vector(hg.value) - vector(truth)).norm()) <= hg.error_bound


def test_constants_are_reused_at_no_product():
    case = quadratic(40, 12)
    y = case.lower_solution(case.x0)
    first = bilevel.hypergradient(case.problem, case.x0, y)
    second = bilevel.hypergradient(case.problem, case.x0, y, constants=first.constants)
    bare = bilevel.hypergradient(case.problem, case.x0, y, certificate=False)
    assert second.error_bound == pytest.approx(first.error_bound)
    assert second.products == bare.products < first.products
    assert bare.error_bound is None


def test_a_warm_adjoint_costs_one_product():
    case = quadratic(40, 12)
    y = case.lower_solution(case.x0)
    cold = bilevel.hypergradient(case.problem, case.x0, y, certificate=False)
    warm = bilevel.hypergradient(case.problem, case.x0, y, adjoint=cold.adjoint, certificate=False)
    assert cold.iterations > 3
    assert warm.iterations == 0
    assert relative(warm.value, cold.value) < 1e-9


def test_singular_lower_level_says_singular():
    case = merely_convex(3)
    y = torch.cat([torch.zeros(3, dtype=DOUBLE), torch.ones(3, dtype=DOUBLE)])
    for solver in (linalg.CG(), linalg.Cholesky(), linalg.MINRES()):
        hg = bilevel.hypergradient(case.problem, case.x0, y, solver)
        assert hg.status == Status.SINGULAR, solver
        assert hg.error_bound == float("inf")


@pytest.mark.parametrize("solver", [linalg.CG(), linalg.Cholesky(), linalg.MINRES()], ids=str)
def test_indefinite_lower_level_says_negative_curvature(solver):
    S = torch.diag(torch.tensor([2.0, -1.0, 3.0], dtype=DOUBLE))
    problem = bilevel.Problem(lambda x, y: ((y - 1) ** 2).sum(), lambda x, y: y @ S @ y / 2 - x @ y)
    x = torch.ones(3, dtype=DOUBLE)
    hg = bilevel.hypergradient(problem, x, torch.linalg.solve(S, x), solver)
    assert hg.status == Status.NEGATIVE_CURVATURE
    with pytest.raises(linalg.SolverError, match="NEGATIVE_CURVATURE"):
        hg.unwrap()


def test_a_lower_level_that_is_not_solved_says_so():
    case = quadratic(5, 3)
    hg = bilevel.hypergradient(case.problem, case.x0, case.y0 + 1)
    assert hg.status == Status.NOT_STATIONARY
    assert hg.lower_gradient_norm > 0.1


def test_float32_stays_float32_and_is_honest():
    case = quadratic(40, 12, condition=1e2, dtype=torch.float32)
    hg = bilevel.hypergradient(case.problem, case.x0, case.lower_solution(case.x0), linalg.CG(rtol=1e-5))
    assert hg.value.dtype == torch.float32
    assert relative(hg.value, case.hypergradient(case.x0)) < 1e-4
    assert float((hg.value - case.hypergradient(case.x0)).norm()) <= hg.error_bound


def test_identical_twice_and_pinned():
    case = quadratic(5, 3)
    values = [bilevel.hypergradient(case.problem, case.x0, case.lower_solution(case.x0)).value for _ in range(2)]
    assert torch.equal(*values)


def test_the_certificate_sees_third_derivatives_of_a_normalised_lower_level(generator):
    """torch has wrong ones, without a word: the constants are those of the same layer written by hand."""
    x, y = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))

    def by_hand(z):
        z = z - z.mean(-1, keepdim=True)
        return z / (z.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    found = []
    for norm in (by_hand, lambda z: torch.nn.functional.layer_norm(z, (4,))):

        def lower(x, y, norm=norm):
            return (y - x).square().sum() * 20 + (norm(y + x) * x).sum().sin()

        problem = bilevel.Problem(lambda x, y: (x + y).square().sum(), lower)
        found.append(bilevel.hypergradient(problem, x, y).constants)
    for name in ("strong_convexity", "cross", "upper_lower", "lower_lower"):
        assert getattr(found[1], name) == pytest.approx(getattr(found[0], name), rel=1e-6), name
