"""Every back end for H v = F_y, without tuning: exact ones are exact, cheap ones say by how much they are not."""

import pytest
import torch
from laws_bilevel import relative, vector
from problems import DOUBLE, SMOOTH, logistic, merely_convex, quadratic

from nestopt import bilevel, linalg
from nestopt.linalg import CG, Dense, Status, Stopping

EXACT = [
    linalg.CG(), linalg.MINRES(), linalg.MINRESQLP(), linalg.GMRES(), linalg.BiCGStab(), linalg.LSMR(),
    linalg.Normal(), linalg.Cholesky(), linalg.LDL(), linalg.LU(), linalg.Auto(), linalg.NystromCG(),
    linalg.Recycled(CG()),
]  # fmt: skip
LEFT = ("quadratic(n=200", "quadratic(n=1,", "sine (n=1)", "sine (n=2)", "multimodal", "adversarial (n=4)")
FEW = [case for case in SMOOTH if not case.name.startswith(LEFT)]  # one of each kind
CHEAP = [linalg.Neumann(), linalg.Neumann(20), linalg.NystromInverse(), linalg.SingleStep()]


def name(value):
    return getattr(value, "name", None) or repr(value).replace("Memory", "")[:40]


def at_solution(case, solver):
    y = case.lower_solution(case.x0)
    return bilevel.hypergradient(case.problem, case.x0, y, solver, certificate=False)


@pytest.mark.parametrize("case", FEW, ids=lambda c: c.name)
@pytest.mark.parametrize("solver", EXACT, ids=name)
def test_exact_back_ends(case, solver):
    hg = at_solution(case, solver)
    reference = case.hypergradient  # without a closed form, a factorisation is the reference
    truth = at_solution(case, linalg.Cholesky()).value if reference is None else reference(case.x0)
    assert hg.status == Status.CONVERGED, (hg.status, hg.linear_residual)
    assert float((vector(hg.value) - vector(truth)).norm()) <= 1e-8 * max(1.0, float(vector(truth).norm()))


@pytest.mark.parametrize("case", FEW, ids=lambda c: c.name)
@pytest.mark.parametrize("solver", CHEAP, ids=name)
def test_cheap_back_ends_say_what_they_are(case, solver):
    """A wrong answer never counts as converged, and the residual that is told is the true one."""
    hg = at_solution(case, solver)
    exact = at_solution(case, linalg.Cholesky())
    off = float((vector(hg.value) - vector(exact.value)).norm())
    H = torch.autograd.functional.hessian(
        lambda v: case.problem.lower(case.x0, unravel(case, v)), vector(case.lower_solution(case.x0))
    )
    H = H.reshape(vector(case.y0).numel(), -1)
    rest = vector(exact.adjoint) - vector(hg.adjoint)
    assert abs(float((H @ rest).norm()) - hg.linear_residual) <= 1e-6 * max(1.0, float((H @ rest).norm()))
    if hg.status == Status.CONVERGED:
        assert off <= 1e-6 * max(1.0, float(vector(exact.value).norm()))
    else:
        assert hg.status == Status.MAX_ITER, hg.status
        assert hg.error == hg.linear_residual > 0


def unravel(case, v):
    from nestopt.linalg.tree import Ravel

    return Ravel.of(case.y0, "y").unflatten(v)


@pytest.mark.parametrize("solver", EXACT, ids=name)
def test_exact_back_ends_in_aid(solver):
    case = logistic()
    res = bilevel.solve(case.problem, case.x0, case.y0, bilevel.AID(linear_solver=solver))
    # phi falls for ever, flatter and flatter: all have to take the same steps to stop at the same point
    reference = bilevel.solve(case.problem, case.x0, case.y0, bilevel.AID(linear_solver=linalg.Cholesky(refinements=3)))
    assert res.converged, (res.status, res.residuals)
    assert relative(res.x, reference.x) <= 1e-6


@pytest.mark.parametrize("solver", [linalg.Neumann(20), linalg.NystromInverse(rank=3), linalg.SingleStep()], ids=name)
def test_warm_starts_take_the_bias_out_in_aid(solver):
    """Each outer step corrects the last v: the cheap ones get there, and until then the residual says how far."""
    case = quadratic(5, 3)
    method = bilevel.AID(linear_solver=solver)
    assert bilevel.solve(case.problem, case.x0, case.y0, method).converged
    method = bilevel.AID(linear_solver=solver, stopping=Stopping(rtol=None, max_iter=30), warm_start=False)
    res = bilevel.solve(case.problem, case.x0, case.y0, method)
    if res.converged:
        assert relative(res.x, case.x_star) <= 1e-7
    else:
        assert res.residuals["adjoint"] > res.tolerance
        assert res.error >= res.residuals["adjoint"]


def test_steps_that_diverge_are_named():
    case = quadratic(5, 3)
    hg = at_solution(case, linalg.Neumann(50, step_size=1.0))
    assert hg.status == Status.DIVERGED
    for solver in (linalg.Neumann(50, step_size=1.0), linalg.SingleStep(0.5), linalg.NystromInverse(3, 0.1)):
        res = bilevel.solve(case.problem, case.x0, case.y0, bilevel.AID(linear_solver=solver))
        assert res.status == Status.DIVERGED


def samples_of(n=80, p=6):
    """The lower samples of `logistic`, which are made of the same generator."""
    g = torch.Generator().manual_seed(0)
    X, _ = torch.randn(n, p, generator=g, dtype=DOUBLE), torch.randn(n, p, generator=g, dtype=DOUBLE)
    w = torch.randn(p, generator=g, dtype=DOUBLE)
    t = (X @ w + torch.randn(n, generator=g, dtype=DOUBLE) > 0).double()
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    return lambda x, y: loss(X @ y, t, reduction="none")


def test_fisher_of_samples():
    case, samples = logistic(), samples_of()
    y = case.lower_solution(case.x0)
    penalty = case.x0.exp() * (y**2).sum() / 2
    assert float(samples(case.x0, y).mean() + penalty - case.problem.lower(case.x0, y)) == pytest.approx(0, abs=1e-12)
    exact = at_solution(case, bilevel.MFACInverse(samples, solver=CG()))
    assert exact.converged
    assert relative(exact.value, case.hypergradient(case.x0)) <= 1e-8
    biased = at_solution(case, bilevel.MFACInverse(samples))
    nothing = float(vector(biased.adjoint).norm()) == 0
    assert biased.status == Status.MAX_ITER
    assert not nothing
    none = at_solution(case, linalg.SingleStep(1e-12))
    assert biased.linear_residual < none.linear_residual  # v = 0 is worse
    # with the weight of the penalty as damping F is close to H here, and the published F^-1 F_y within a half
    weight = float(case.x0.exp())
    published = at_solution(case, bilevel.MFACInverse(samples, damping=weight, step_size=1.0))
    assert published.linear_residual < 0.5 * none.linear_residual
    res = bilevel.solve(
        case.problem, case.x0, case.y0, bilevel.AID(linear_solver=bilevel.MFACInverse(samples, solver=CG()))
    )
    assert res.converged


def test_fisher_takes_the_samples_from_data():
    X = torch.randn(12, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))

    def samples(x, y, d):
        return (d @ y - 1) ** 2

    problem = bilevel.Problem(
        lambda x, y, d: (y**2).sum(), lambda x, y, d: samples(x, y, d).mean() + x.exp() * (y**2).sum()
    )
    x = torch.zeros((), dtype=DOUBLE)
    y = torch.linalg.solve(X.T @ X / 12 + torch.eye(3), X.mean(0))
    hg = bilevel.hypergradient(problem, x, y, bilevel.MFACInverse(samples, solver=CG()), data=X)
    reference = bilevel.hypergradient(problem, x, y, data=X)
    assert hg.converged
    assert relative(hg.value, reference.value) < 1e-8


def test_fisher_refusals():
    case = logistic()
    with pytest.raises(TypeError, match="samples must be a function"):
        bilevel.MFACInverse(None)
    with pytest.raises(TypeError, match=r"solver must be CG"):
        bilevel.MFACInverse(samples_of(), solver=linalg.MINRES())
    with pytest.raises(ValueError, match="one loss a sample"):
        at_solution(case, bilevel.MFACInverse(lambda x, y: samples_of()(x, y).mean()))
    with pytest.raises(TypeError, match="needs the point"):
        bilevel.MFACInverse(samples_of())(Dense(torch.eye(2), symmetric=True), torch.ones(2))


@pytest.mark.parametrize("solver", [linalg.CG(), linalg.MINRESQLP(), linalg.Auto(), linalg.SingleStep(), linalg.LDL()])
def test_singular_hessians_are_named_or_solved(solver):
    """F_y is not in H's range: no solver may claim an answer."""
    case = merely_convex(3)
    x = case.x0 + 0.5
    y = torch.cat([x, torch.zeros(3, dtype=DOUBLE)])
    hg = bilevel.hypergradient(case.problem, x, y, solver, certificate=False)
    assert not hg.converged
    assert not hg.linear_residual <= 0.5  # LDL leaves no answer at all: NaN


@pytest.mark.parametrize("solver", [linalg.LDL(), linalg.MINRES(), linalg.MINRESQLP(), linalg.Auto(), linalg.GMRES()])
def test_indefinite_systems(solver):
    """A saddle of f: those that can solve it do, and the hypergradient still says that y is no minimiser."""
    problem = bilevel.Problem(lambda x, y: y.sum(), lambda x, y: y[0] ** 2 - y[1] ** 2 + (x * y).sum())
    x = torch.tensor([1.0, 2.0], dtype=DOUBLE)
    hg = bilevel.hypergradient(problem, x, torch.tensor([-0.5, 1.0], dtype=DOUBLE), solver)
    assert hg.linear_residual < 1e-8
    assert relative(hg.value, torch.tensor([-0.5, 0.5], dtype=DOUBLE)) < 1e-8


def test_single_step_on_columns_and_in_float32():
    A = Dense(torch.diag(torch.tensor([1.0, 2.0, 4.0])), symmetric=True)
    b = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    sol = linalg.SingleStep()(A, b)
    assert [s.name for s in sol.status] == ["CONVERGED", "MAX_ITER", "CONVERGED"]
    assert torch.allclose(sol.x[1], torch.full((3,), 1 / 3))
    assert torch.equal(sol.x[2], torch.zeros(3))
    exact = linalg.SingleStep(preconditioner=linalg.Diagonal(torch.tensor([1.0, 0.5, 0.25])))(A, b)
    assert bool(exact.converged.all())
    saddle = linalg.SingleStep()(Dense(torch.diag(torch.tensor([1.0, -2.0])), symmetric=True), torch.ones(2))
    assert saddle.status == Status.NEGATIVE_CURVATURE
    assert saddle.direction is not None
    with pytest.raises(ValueError, match="step_size"):
        linalg.SingleStep(0.0)


def test_nystrom_cg_names_faults():
    b = torch.ones(4, dtype=DOUBLE)
    saddle = Dense(torch.diag(torch.tensor([1.0, 2.0, -3.0, 1.0], dtype=DOUBLE)), symmetric=True)
    assert linalg.NystromCG()(saddle, b).status == Status.NEGATIVE_CURVATURE
    assert linalg.NystromCG()(Dense(torch.full((4, 4), torch.nan, dtype=DOUBLE), symmetric=True), b).status == (
        Status.NON_FINITE
    )
    batch = torch.stack([torch.eye(4, dtype=DOUBLE), torch.diag(torch.arange(1.0, 5.0, dtype=DOUBLE))])
    sol = linalg.NystromCG(rank=2)(Dense(batch, symmetric=True), b.expand(2, 4))
    assert bool(sol.converged.all())
    with pytest.raises(ValueError, match="rank"):
        linalg.NystromCG(rank=0)


def test_pinned():
    hg = at_solution(logistic(), linalg.SingleStep())
    assert hg.products == 3  # the step size, the residual, and f_xy v
