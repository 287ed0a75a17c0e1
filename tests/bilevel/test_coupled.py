"""LV-HBA, BiC-GAFFA and BLOCC: known answers, bare and de-biased, multipliers, faults, resume, the published loops."""

import dataclasses

import pytest
import torch
from laws_bilevel import relative, vector
from problems import COUPLED, DOUBLE, coupled, coupled_equality, coupled_inequality, quadratic

from nestopt import bilevel, constrained
from nestopt.linalg import Status, Stopping

METHODS = [bilevel.LVHBA(), bilevel.BiCGAFFA(), bilevel.BLOCC()]
SHORT = Stopping(rtol=1e-4, max_iter=500)
EASY = coupled_inequality(1.2, 1.1627, 3.5850)


def name(value):
    return type(value).__name__ if isinstance(value, bilevel.Method) else getattr(value, "name", str(value))


def check(method, case, xtol):
    res = method(case.problem, case.x0, case.y0)
    assert res.status == Status.CONVERGED, (case.name, res.status, res.residuals)
    assert res.error == max(res.residuals.values()) <= res.tolerance
    xtol = max(xtol, 1e-4) if "inequality" in case.name else xtol  # these answers have five digits
    assert relative(res.x, case.x_star) <= xtol
    assert relative(res.y, case.y_star) <= xtol
    assert abs(res.value - case.value) <= 10 * xtol * max(1.0, abs(case.value))
    assert [record["iteration"] for record in res.history] == list(range(res.iterations + 1))
    dual = 2 * float(case.x_star) if "inequality" in case.name else -1.0  # 2 (y - 2 x) + lam = 0 at y = x
    assert abs(float(res.state.dual) - dual) <= 10 * xtol * abs(dual)
    return res


FAST = METHODS[:2]


@pytest.mark.parametrize("case", COUPLED, ids=name)
@pytest.mark.parametrize("method", METHODS, ids=name)
def test_debiased_answers(method, case):
    check(method, case, 1e-5)


@pytest.mark.parametrize(
    ("method", "case"),
    [(m, c) for m in FAST for c in (coupled(10), coupled(10, 3), EASY)]
    + [(METHODS[0], coupled_equality(10)), (METHODS[2], coupled(1))],
    ids=name,
)
def test_bare_answers(method, case):
    method = dataclasses.replace(method, debias=None, stopping=SHORT)
    if isinstance(method, bilevel.BiCGAFFA) and case is EASY:
        method = dataclasses.replace(method, stopping=Stopping(rtol=3e-4, max_iter=500))
    check(method, case, 1e-3)


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_set_inequality_and_equality_in_pytrees(method):
    """min (y - 2x)^2 with 0 <= y <= 1, two inequality tensors and an equality: y = (x, 1 - x) on x in [0, 1]."""
    problem = bilevel.Problem(
        upper=lambda x, y: ((x["a"] - 0.2) ** 2).sum() + ((y["p"] - 0.6) ** 2).sum() + 0.1 * (y["q"] ** 2).sum(),
        lower=lambda x, y: ((y["p"] - 2 * x["a"]) ** 2).sum() + ((y["q"] - 0.5) ** 2).sum(),
        upper_set=constrained.Box(0.1, 1.0),
        lower_set={"p": constrained.Box(0.0, 1.0), "q": None},
        inequality=lambda x, y: {"one": y["p"] - x["a"], "two": (y["p"] - 3.0)[None]},
        equality=lambda x, y: [y["q"] - 1 + x["a"]],
    )
    x0 = {"a": torch.full((2,), 0.5, dtype=DOUBLE)}
    y0 = {"p": torch.full((2,), 0.4, dtype=DOUBLE), "q": torch.zeros(2, dtype=DOUBLE)}
    # y = (x, 1 - x): (x - .2)^2 + (x - .6)^2 + .1 (1 - x)^2
    best = (0.2 + 0.6 + 0.1) / 2.1
    res = method(problem, x0, y0)
    assert res.status == Status.CONVERGED, res.residuals
    assert relative(res.x["a"], torch.full((2,), best, dtype=DOUBLE)) <= 1e-5
    assert relative(res.y["p"], res.x["a"]) <= 1e-5
    lam, mu = res.state.inequality_dual, res.state.equality_dual
    assert lam.shape == (4,)
    assert mu.shape == (2,)
    assert relative(lam[:2], torch.full((2,), 2 * best, dtype=DOUBLE)) <= 1e-4
    assert float(lam[2:].abs().max()) <= 1e-6
    assert relative(mu, 2 * (0.5 - (1 - res.x["a"]))) <= 1e-4


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_without_constraints(method):
    case = quadratic(5, 3)
    res = method(case.problem, case.x0, case.y0)
    assert res.status == Status.CONVERGED
    assert relative(res.x, case.x_star) <= 1e-5
    assert res.state.dual.shape == (0,)


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_float32_and_scalars(method):
    problem = bilevel.Problem(
        lambda x, y: (x - 2) ** 2 + y**2, lambda x, y: (y - 2 * x) ** 2, inequality=lambda x, y: (y - x)[None]
    )
    res = method(problem, torch.tensor(0.5), torch.tensor(0.5))
    assert res.status == Status.CONVERGED, res.residuals
    assert res.x.shape == ()
    assert res.x.dtype == torch.float32
    assert abs(float(res.x) - 1) <= 2e-3


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_empty_coupled_set_is_named(method):
    problem = dataclasses.replace(
        EASY.problem, inequality=None, equality=lambda x, y: torch.stack([x + y - 1, x + y - 2])
    )
    res = method(problem, EASY.x0, EASY.y0)
    assert res.status == Status.INFEASIBLE
    assert "equality[0], equality[1]" in res.state.advice
    problem = dataclasses.replace(
        EASY.problem, inequality=lambda x, y: {"fine": y - 9, "curved": torch.stack([x - 9, x**2 + y**2 + 1])}
    )
    res = method(problem, EASY.x0, EASY.y0)
    assert res.status == Status.INFEASIBLE
    assert "inequality['curved'][1] within the sets of x and y together" in res.state.advice
    again = method.restore(res.state.to_dict(), EASY.x0, EASY.y0)
    assert again.advice == res.state.advice


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_nan_in_the_constraints_is_named(method):
    problem = dataclasses.replace(EASY.problem, inequality=lambda x, y: (y - x + torch.nan)[None])
    assert method(problem, EASY.x0, EASY.y0).status == Status.NON_FINITE


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_rows_in_other_units_give_the_same_run(method):
    case = coupled_equality(3)
    other = dataclasses.replace(case.problem, equality=lambda x, y: 2.0**20 * case.problem.equality(x, y))
    bare = dataclasses.replace(method, debias=None, stopping=Stopping(rtol=1e-2, max_iter=20))
    a, b = (bare(problem, case.x0, case.y0) for problem in (case.problem, other))
    assert torch.equal(a.x, b.x)
    assert torch.equal(a.state.dual, 2.0**20 * b.state.dual)


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_nan_is_named_and_the_last_good_state_kept(method):
    case = coupled(2)
    problem = dataclasses.replace(case.problem, upper=lambda x, y: case.problem.upper(x, y) / (x.sum() != 0))
    method = dataclasses.replace(method, debias=None, stopping=Stopping(rtol=1e-6, max_iter=15))
    assert method(problem, case.x0, case.y0).status == Status.NON_FINITE

    def breaking(x, y):
        return case.problem.upper(x, y) * torch.where(x.sum() > 1, torch.nan, 1.0)

    res = method(dataclasses.replace(case.problem, upper=breaking), case.x0, case.y0)
    assert res.status != Status.CONVERGED
    assert torch.isfinite(res.x).all()


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_resume_is_exact_and_init_with_steps_equals_the_call(method, tmp_path):
    case = coupled_equality(3)
    whole = method(case.problem, case.x0, case.y0)
    state = method.init(case.problem, case.x0, case.y0)
    for k in range(whole.iterations):
        if k == 2:
            torch.save(state.to_dict(), tmp_path / "state.pt")
            state = method.restore(torch.load(tmp_path / "state.pt", weights_only=True), case.x0, case.y0)
        state = method.step(case.problem, state)
    assert torch.equal(state.x_vector, vector(whole.x))
    assert state.counts == whole.counts


LARGER = {"step_size": 0.1, "inner_step_size": 0.3, "dual_step_size": 0.1, "gamma1": 1.0, "radius": 10.0,
          "scale_rows": True}  # fmt: skip
PUBLISHED = [
    (bilevel.LVHBA.published(c0=2.0, stopping=Stopping(rtol=5e-4, max_iter=500)), coupled(2), 1e-3),
    (
        bilevel.BiCGAFFA.published(**LARGER, stopping=Stopping(rtol=1e-3, max_iter=500)),
        coupled(2),
        1e-2,
    ),
]


@pytest.mark.parametrize(("method", "case", "xtol"), PUBLISHED, ids=name)
def test_published_loops(method, case, xtol):
    res = method(case.problem, case.x0, case.y0)
    assert res.status in (Status.CONVERGED, Status.MAX_ITER), res.status
    assert relative(res.x, case.x_star) <= xtol
    assert res.counts.upper_evaluations <= 3 * (res.iterations + 2)


def test_first_published_steps_are_the_formulas():
    case = coupled_equality(2)
    method = bilevel.LVHBA.published(scale_rows=False)
    s = method.init(case.problem, case.x0, case.y0)
    x, y, th, lam, z = s.x_vector, s.y_vector, s.theta, s.multiplier, s.anchor
    e, row = torch.ones(2, dtype=DOUBLE), torch.ones(4, dtype=DOUBLE)
    for k in range(3):
        s = method.step(case.problem, s)
        c = 5 * (k + 1) ** 0.3
        f_y = torch.cat([th[:2] - x, e])
        th_new = th - 0.3 * (f_y + lam * row + (th - y))
        lam = lam + 0.3 * (x.sum() + th.sum() - (lam - z))
        th = th_new
        dx = (x - y[2:]) / c - y[:2] + th[:2] - lam * e
        dy = torch.cat([y[:2] - e, y[2:] - x]) / c + torch.cat([y[:2] - x, e]) - (y - th)
        w = torch.cat([x - 0.1 * dx, y - 0.1 * dy])
        w = w - w.mean()
        x, y, z = w[:2], w[2:], z + (lam - z)
        for found, expected in ((s.x_vector, x), (s.y_vector, y), (s.theta, th), (s.multiplier, lam), (s.anchor, z)):
            assert torch.allclose(found, expected, atol=1e-12)


def test_a_multiplier_at_its_clip_is_said():
    case = coupled(2)
    method = bilevel.LVHBA.published(radius=0.01, stopping=Stopping(rtol=1e-4, max_iter=400))
    res = method(case.problem, case.x0, case.y0)
    assert res.status == Status.DIVERGED
    assert "radius" in res.state.advice


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_a_clip_is_never_taken_for_an_answer(method):
    """The multiplier of the scaled row is -2 at the answer, beyond the radius."""
    case = coupled(2)
    bare = dataclasses.replace(method, radius=0.01, debias=None, stopping=Stopping(rtol=1e-4, max_iter=300))
    res = bare(case.problem, case.x0, case.y0)
    assert res.status in (Status.DIVERGED, Status.STAGNATED, Status.MAX_ITER)
    assert "radius" in res.state.advice
    assert float(res.state.multiplier.abs().max()) == 0.01


def test_steps_that_cannot_work_are_refused():
    case = coupled(2)
    with pytest.raises(ValueError, match="inner_step_size must be below 2 / L"):
        bilevel.LVHBA.published(inner_step_size=5.0).init(case.problem, case.x0, case.y0)
    with pytest.raises(ValueError, match="dual_step_size must be below 2 gamma2"):
        bilevel.LVHBA.published(dual_step_size=2.5).init(case.problem, case.x0, case.y0)
    with pytest.raises(ValueError, match="belong together"):
        bilevel.LVHBA(step_size=0.1)
    with pytest.raises(ValueError, match="outgrows"):
        bilevel.BiCGAFFA(power=0.5)
    with pytest.raises(ValueError, match="c0 must be"):
        bilevel.LVHBA(c0=0.0)
    with pytest.raises(ValueError, match="penalty must be"):
        bilevel.BLOCC(penalty=-1.0)
    assert bilevel.LVHBA.published(c0=1e300, c_max=1e301).step_size  # c_k is bounded whatever k


def test_data():
    case = coupled(2)
    samples = torch.tensor([1.0, 2.0, 4.0], dtype=DOUBLE)
    problem = bilevel.Problem(
        lambda x, y, d: case.problem.upper(x, y),
        lambda x, y, d: case.problem.lower(x, y),
        equality=lambda x, y, d: case.problem.equality(x, y) * d,
    )
    fixed = bilevel.LVHBA.published(stopping=Stopping(rtol=0.0, max_iter=5))
    with pytest.raises(ValueError, match="sample key"):
        fixed(problem, case.x0, case.y0, data=lambda k: samples[k % 3])
    with pytest.raises(ValueError, match="sample key"):
        fixed(problem, case.x0, case.y0, data=lambda k: samples[: 1 + k % 2])
    with pytest.raises(ValueError, match="automatic steps"):
        bilevel.LVHBA(debias=None)(problem, case.x0, case.y0, data=lambda k: samples[0])
    with pytest.raises(ValueError, match="automatic steps"):
        bilevel.BLOCC(debias=None)(problem, case.x0, case.y0, data=lambda k: samples[0])
    few = Stopping(rtol=0.0, max_iter=3)
    steps = bilevel.BLOCC(debias=None, upper_step=bilevel.ConstantStep(1e-3), stopping=few)
    with pytest.raises(ValueError, match="sample key"):
        steps(problem, case.x0, case.y0, data=lambda k: samples[k % 3])
    assert steps(problem, case.x0, case.y0, data=lambda k: samples[0]).iterations == 3
    same = fixed(problem, case.x0, case.y0, data=lambda k: samples[0])
    assert torch.equal(same.x, fixed(case.problem, case.x0, case.y0).x)


def test_pinned():
    case = coupled(100)
    res = bilevel.LVHBA(debias=None, stopping=SHORT)(case.problem, case.x0, case.y0)
    assert res.iterations <= 20
    assert res.counts.lower_gradients <= 170
