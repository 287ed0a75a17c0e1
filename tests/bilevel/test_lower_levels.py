"""Constrained and non-smooth lower levels: their solvers, hypergradients, certificates, and degenerate points."""

import pytest
import torch
from laws_bilevel import vector
from problems import CLOSED_FORM, COUPLED, DOUBLE, NONSMOOTH, clipped, lasso, quadratic_equality, spectrum, weighted_l1

from nestopt import bilevel, constrained, linalg
from nestopt.bilevel.lower_choice import lower_level
from nestopt.bilevel.problem import Spaces
from nestopt.linalg import Status

SMALL = [case for case in (*NONSMOOTH, *COUPLED, *CLOSED_FORM) if vector(case.y0).numel() <= 30]


def level_of(case):
    spaces = Spaces.of(case.x0, case.y0)
    return lower_level(case.problem, spaces), spaces.x.flatten(case.x0), spaces.y.flatten(case.y0)


@pytest.mark.parametrize("case", [*NONSMOOTH, *COUPLED, *CLOSED_FORM], ids=lambda c: c.name)
def test_lower_solutions_are_the_known_ones(case):
    level, x, y = level_of(case)
    found = level.solve(x, y)
    assert found.status == Status.CONVERGED
    assert float(found.residual) < 1e-9
    assert float((found.y - vector(case.lower_solution(case.x0))).norm()) < 1e-9 * (1 + float(found.y.norm()))
    warm = level.solve(x, found.y, found.dual)
    assert warm.status == Status.CONVERGED
    assert warm.counts.lower_gradients <= found.counts.lower_gradients
    point = level.linearize(x, found.y, found.dual)
    assert abs(float(point.residual) - float(found.residual)) < 1e-12


@pytest.mark.parametrize("weight", [0.1, 10.0])
@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_a_weight_on_the_upper_objective(case, weight):
    """F makes the minimiser of f + weight F unique, so that another start ends at the same point."""
    level, x, y = level_of(case)
    found = level.solve(x, y, upper_weight=weight)
    assert found.status == Status.CONVERGED
    again = level.solve(x, found.y + 1e-3, upper_weight=weight)
    assert float((again.y - found.y).norm()) < 1e-7  # F makes the minimiser unique


@pytest.mark.parametrize("case", CLOSED_FORM, ids=lambda c: c.name)
def test_hypergradients_are_the_closed_forms(case):
    y = case.lower_solution(case.x0)
    hg = bilevel.hypergradient(case.problem, case.x0, y)
    error = float((vector(hg.value) - vector(case.hypergradient(case.x0))).norm())
    assert hg.status == Status.CONVERGED
    assert error <= 1e-10 * float(vector(hg.value).norm())
    assert error <= hg.error_bound < 1e-8
    assert hg.bound_reason is None


@pytest.mark.parametrize("case", CLOSED_FORM, ids=lambda c: c.name)
def test_the_bound_holds_for_inexact_lower_solutions(case):
    """As long as the same rows are active, which the noise here does not change."""
    y = case.lower_solution(case.x0)
    for noise in (1e-6, 1e-9):
        moved = y - noise * torch.ones_like(y)
        hg = bilevel.hypergradient(case.problem, case.x0, moved, lower_rtol=1.0)
        dual = bilevel.hypergradient(case.problem, case.x0, y).dual  # the noise would make active rows inactive
        hg = bilevel.hypergradient(case.problem, case.x0, moved, dual=dual)
        error = float((vector(hg.value) - vector(case.hypergradient(case.x0))).norm())
        assert error <= hg.error_bound


@pytest.mark.parametrize("x", [-0.5, -1.7, -3.1, -5.0])
def test_the_lasso_s_hypergradient(x):
    """On a support with signs s: dphi/dx = -lambda s' G^-1 F_y, by hand."""
    case = lasso(30, 6)
    x = torch.tensor(x, dtype=DOUBLE)
    level, _, y0 = level_of(case)
    y = level.solve(x[None], y0).y
    on = y != 0
    f_yy = torch.autograd.functional.hessian(lambda y: case.problem.lower(x, y), y)
    F_y = torch.func.grad(case.problem.upper, 1)(x, y)
    by_hand = -x.exp() * y[on].sign() @ torch.linalg.solve(f_yy[on][:, on], F_y[on])
    hg = bilevel.hypergradient(case.problem, x, y)
    assert abs(float(hg.value - by_hand)) <= min(hg.error_bound, 1e-12)


@pytest.mark.parametrize(
    "case",
    [weighted_l1(10), lasso(30, 6), clipped(7), clipped(2, "set"), quadratic_equality(6, 3, 2)],
    ids=lambda c: c.name,
)
def test_central_differences_agree(case):
    table = bilevel.check_hypergradient(case.problem, case.x0, case.lower_solution(case.x0), directions=2)
    assert bool(table.passed.all())


@pytest.mark.parametrize(
    "term",
    [
        lambda x: constrained.ElasticNet(x, 0.1),
        lambda x: constrained.GroupLasso([[0, 1], [2, 3, 4]], x),
        lambda x: constrained.TotalVariation1D(x),
        bilevel.LowerProx(
            prox=lambda y, step, x: y.sign() * (y.abs() - step * x).clamp_min(0), value=lambda x, y: x * y.abs().sum()
        ),
        constrained.Simplex(),
        constrained.Ball(0.5),
    ],
    ids=["elastic net", "group lasso", "total variation", "LowerProx", "simplex", "ball"],
)
def test_every_term_with_a_prox(term, generator):
    """Hypergradients agree with central differences, and AID converges."""
    A = torch.randn(8, 5, generator=generator, dtype=DOUBLE)
    b, t = torch.randn(8, generator=generator, dtype=DOUBLE), torch.randn(5, generator=generator, dtype=DOUBLE)
    part = {"lower_set": term} if isinstance(term, constrained.Set) else {"lower_prox": term}
    problem = bilevel.Problem(
        lambda x, y: ((y - t) ** 2).sum() + 0.1 * (x - 1) ** 2,
        lambda x, y: ((A @ y - x * b) ** 2).sum() / 2,
        upper_set=constrained.Box(0.05, 3.0),
        **part,
    )
    x, y = torch.tensor(0.7, dtype=DOUBLE), torch.zeros(5, dtype=DOUBLE)
    spaces = Spaces.of(x, y)
    found = lower_level(problem, spaces).solve(x[None], y)
    assert found.status == Status.CONVERGED
    bilevel.check_hypergradient(problem, x, found.y, directions=1)
    assert bilevel.solve(problem, x, y).converged


def hard_problems():
    """Curved constraints, domains, matrix variables, dicts, bounds beside constraints, an f that is not convex."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=DOUBLE)

    def upper(x, y):
        return ((y - 0.2) ** 2).sum() + 0.1 * (x**2).sum()

    S, q, G, M = spectrum(10, 1e4, 3), randn(10), randn(6, 10), randn(6, 5)
    eye = torch.eye(4, dtype=DOUBLE)
    return {
        "nuclear norm": (
            bilevel.Problem(
                upper,
                lambda x, y: ((y - M) ** 2).sum() / 2 + 0.1 * (y**4).sum(),
                lower_prox=lambda x: constrained.NuclearNorm(x.exp()),
            ),
            torch.tensor(-1.0, dtype=DOUBLE),
            torch.zeros(6, 5, dtype=DOUBLE),
        ),
        "semidefinite cone": (
            bilevel.Problem(
                upper, lambda x, y: ((y - x @ x.T + 2 * eye) ** 2).sum() / 2, lower_set=constrained.PSDCone()
            ),
            randn(4, 3),
            torch.zeros(4, 4, dtype=DOUBLE),
        ),
        "curved and coupled": (
            bilevel.Problem(
                upper, lambda x, y: ((y - 3 * x) ** 2).sum() / 2, inequality=lambda x, y: y @ y - 1 - x[0] ** 2
            ),
            randn(4),
            torch.zeros(4, dtype=DOUBLE),
        ),
        "entropy": (
            bilevel.Problem(upper, lambda x, y: (y * y.log()).sum() - x @ y, equality=lambda x, y: y.sum() - 1),
            randn(5),
            torch.full((5,), 0.1, dtype=DOUBLE),
        ),
        "bounds and rows": (
            bilevel.Problem(
                upper,
                lambda x, y: y @ S @ y / 2 - (q + x.sum()) @ y,
                lower_set=constrained.Box(-1.0, 1.0),
                inequality=lambda x, y: G @ y - 1 - x[:1].exp(),
            ),
            randn(3),
            torch.zeros(10, dtype=DOUBLE),
        ),
        "not convex": (
            bilevel.Problem(
                upper,
                lambda x, y: torch.cos(2 * y + x).sum() + 0.3 * (y**2).sum(),
                inequality=lambda x, y: {"rows": y - x.sum() ** 2},
            ),
            randn(4),
            torch.zeros(4, dtype=DOUBLE),
        ),
    }


@pytest.mark.parametrize("name", hard_problems())
def test_hard_lower_levels(name):
    problem, x, y = hard_problems()[name]
    spaces = Spaces.of(x, y)
    found = lower_level(problem, spaces).solve(spaces.x.flatten(x), spaces.y.flatten(y))
    assert found.status == Status.CONVERGED
    bilevel.check_hypergradient(problem, x, spaces.y.unflatten(found.y), directions=1)
    assert bilevel.solve(problem, x, y, bilevel.AID()).converged


@pytest.mark.parametrize(("x", "gradients"), [(-3.0, 700), (-4.0, 20)])
def test_a_badly_scaled_lasso(x, gradients):
    """Columns whose sizes differ by a thousand: Newton steps from zero find the support, or follow a path: pinned."""
    g = torch.Generator().manual_seed(0)
    A = torch.randn(60, 30, generator=g, dtype=DOUBLE) * torch.logspace(-1.5, 1.5, 30, dtype=DOUBLE)
    b = torch.randn(60, generator=g, dtype=DOUBLE)
    problem = bilevel.Problem(
        lambda x, y: y.square().sum(),
        lambda x, y: ((A @ y - b) ** 2).sum() / 2,
        lower_prox=lambda x: constrained.L1(x.exp()),
    )
    x, y = torch.tensor(x, dtype=DOUBLE), torch.zeros(30, dtype=DOUBLE)
    found = lower_level(problem, Spaces.of(x, y)).solve(x[None], y)
    assert found.status == Status.CONVERGED
    assert found.counts.lower_gradients < gradients
    slope = A.T @ (A @ found.y - b)
    on = found.y != 0
    assert float((slope[on] + x.exp() * found.y[on].sign()).norm()) < 1e-8
    assert bool((slope[~on].abs() < x.exp()).all())


@pytest.mark.parametrize("part", [constrained.Box(-0.5, 0.5), constrained.NonNegative()], ids=["box", "orthant"])
def test_badly_scaled_lower_sets(part):
    """Eigenvalues from 1 to 1e6: the solution's optimality conditions, and few gradients: pinned."""
    g = torch.Generator().manual_seed(0)
    A, b = spectrum(20, 1e6, 0), 1e3 * torch.randn(20, generator=g, dtype=DOUBLE)
    problem = bilevel.Problem(lambda x, y: (y**2).sum(), lambda x, y: y @ A @ y / 2 - x * (b @ y), lower_set=part)
    x, y = torch.tensor(1.0, dtype=DOUBLE), torch.zeros(20, dtype=DOUBLE)
    found = lower_level(problem, Spaces.of(x, y)).solve(x[None], y)
    assert found.status in (Status.CONVERGED, Status.STAGNATED)
    assert float((found.y - part.project(found.y - (A @ found.y - b))).norm()) < 1e-12 * float((A @ found.y).norm())
    assert found.counts.lower_gradients < 400


@pytest.mark.parametrize("part", ["lower_set", "inequality"])
def test_nan_in_a_constrained_lower_level(part):
    a = torch.tensor([1.0, torch.nan], dtype=DOUBLE)
    extra = {"lower_set": constrained.Box(-1.0, 1.0)} if part == "lower_set" else {"inequality": lambda x, y: y - 1}
    problem = bilevel.Problem(
        lambda x, y: ((y - 1) ** 2).sum() + (x**2).sum(), lambda x, y: ((y - a * x) ** 2).sum(), **extra
    )
    start = torch.ones(2, dtype=DOUBLE)
    assert bilevel.solve(problem, start, start.clone(), bilevel.AID()).status == Status.NON_FINITE


def test_weakly_active_constraints_are_counted_and_inactive():
    problem = bilevel.Problem(
        lambda x, y: (y**2).sum() + y.sum(), lambda x, y: ((y - x) ** 2).sum() / 2, inequality=lambda x, y: y - 1
    )
    x = torch.tensor([0.5, 1.0, 2.0], dtype=DOUBLE)
    y = x.clamp(max=1.0)
    hg = bilevel.hypergradient(problem, x, y)
    assert hg.weak == 1
    assert hg.value.tolist() == pytest.approx([2.0, 3.0, 0.0])  # the middle one: to the side that lets go
    assert hg.error_bound == float("inf")
    assert "weakly active" in hg.bound_reason


def test_dependent_constraints_are_said_to_be_singular():
    weights = torch.tensor([1.0, 3.0], dtype=DOUBLE)
    problem = bilevel.Problem(
        lambda x, y: (y * weights).sum(),
        lambda x, y: ((y - x) ** 2).sum() / 2,
        equality=lambda x, y: torch.stack([y.sum()] * 2),
    )
    x = torch.ones(2, dtype=DOUBLE)
    assert bilevel.hypergradient(problem, x, 0 * x).status == Status.SINGULAR
    named = bilevel.hypergradient(problem, x, 0 * x, bilevel.MinimumNormInverse())
    assert named.status == Status.CONVERGED  # y is unique, and only the multipliers are not
    assert named.value.tolist() == pytest.approx([-1.0, 1.0])  # y* = x - mean(x)


def test_what_has_no_solver_or_meaning_is_refused():
    case = clipped(3, "set")
    with pytest.raises(ValueError, match="strong_convexity is that of f_yy"):
        bilevel.hypergradient(case.problem, case.x0, case.y0, strong_convexity=1.0)
    with pytest.raises(TypeError, match="CG: A must be promised symmetric"):
        bilevel.hypergradient(case.problem, case.x0, case.y0, linalg.CG())


def test_unsolved_lower_levels_say_so():
    case = clipped(7)
    hg = bilevel.hypergradient(case.problem, case.x0, case.lower_solution(case.x0) - 0.5)
    assert hg.status == Status.NOT_STATIONARY


def test_many_lower_variables_take_gmres():
    n = 600
    weights = torch.linspace(1, 4, n, dtype=DOUBLE)
    problem = bilevel.Problem(
        lambda x, y: ((y - 0.3) ** 2).sum() / 2,
        lambda x, y: (weights * (y - 1.0) ** 2).sum() / 2,
        lower_prox=lambda x: constrained.L1(x),
        upper_set=constrained.Box(0.0, 3.0),
    )
    x = torch.tensor(0.9, dtype=DOUBLE)
    y = (1 - x / weights).clamp_min(0)
    hg = bilevel.hypergradient(problem, x, y)
    assert float(hg.value) == pytest.approx(float(-((y - 0.3) / weights).sum()), rel=1e-9)
    assert hg.error_bound == float("inf")
    assert "too large" in hg.bound_reason
