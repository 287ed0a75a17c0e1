import pytest
import torch
from problems import DOUBLE, adversarial, quadratic, ridge, sine

from nestopt import bilevel, linalg


@pytest.mark.parametrize(
    "case", [quadratic(5, 3), quadratic(20, 6, 1e3), sine(3), ridge(), adversarial(4)], ids=lambda c: c.name
)
def test_the_right_hypergradient_passes(case):
    table = bilevel.check_hypergradient(case.problem, case.x0, case.lower_solution(case.x0), directions=3)
    assert bool(table.passed.all())
    assert float(table.errors.max()) < 1e-6
    assert len(str(table).splitlines()) == 4


def test_float32():
    case = quadratic(5, 3, dtype=torch.float32)
    assert bool(bilevel.check_hypergradient(case.problem, case.x0, case.lower_solution(case.x0)).passed.all())


class _Wrong(linalg.CG):
    """A linear solver that claims convergence at half the solution: a gradient of the wrong size."""

    def _solve(self, A, b, x0):
        solution = super()._solve(A, b, x0)
        return linalg.Solution(
            x=solution.x / 2,
            codes=solution.codes,
            iterations=1,
            error=0.0,
            residual_norm=0.0,
            tolerance=1.0,
            products=1,
        )


def test_wrong_ones_fail_with_the_table():
    case = quadratic(5, 3)
    y = case.lower_solution(case.x0)
    with pytest.raises(bilevel.HypergradientError, match=r"disagrees.*\n *direction"):
        bilevel.check_hypergradient(case.problem, case.x0, y, linear_solver=_Wrong())
    with pytest.raises(bilevel.HypergradientError, match="Solve the lower level"):
        bilevel.check_hypergradient(case.problem, case.x0, y + 0.1)  # not at the solution
    cut = bilevel.Problem(lambda x, y: case.problem.upper(x, y) + (x.detach() * y[:3]).sum(), case.problem.lower)
    with pytest.raises(bilevel.HypergradientError, match=r"\.detach"):
        bilevel.check_hypergradient(cut, case.x0, y)


def test_nan_fails():
    problem = bilevel.Problem(lambda x, y: (y * float("nan")).sum(), lambda x, y: ((y - x) ** 2).sum())
    x = torch.ones(2, dtype=DOUBLE)
    with pytest.raises(bilevel.HypergradientError):
        bilevel.check_hypergradient(problem, x, x.clone())
