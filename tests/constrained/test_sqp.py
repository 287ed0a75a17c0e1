"""SQP on problems of the Hock-Schittkowski collection, and its statuses."""

import math

import pytest
import torch

from nestopt.constrained import SQP, Problem
from nestopt.constrained.range_space import convexity_shift, equality_step
from nestopt.linalg import Status


def t(*entries):
    return torch.tensor(entries, dtype=torch.float64)


def hs43(x):
    return torch.stack(
        [
            x.square().sum() + x[0] - x[1] + x[2] - x[3] - 8,
            x[0] ** 2 + 2 * x[1] ** 2 + x[2] ** 2 + 2 * x[3] ** 2 - x[0] - x[3] - 10,
            2 * x[0] ** 2 + x[1] ** 2 + x[2] ** 2 + 2 * x[0] - x[1] - x[3] - 5,
        ]
    )


KNOWN = {
    "HS6": (Problem(lambda x: (1 - x[0]) ** 2, lambda x: 10 * (x[1] - x[0] ** 2)), t(-1.2, 1), 0.0),
    "HS7": (
        Problem(lambda x: torch.log(1 + x[0] ** 2) - x[1], lambda x: (1 + x[0] ** 2) ** 2 + x[1] ** 2 - 4),
        t(2, 2),
        -math.sqrt(3),
    ),
    "HS10": (
        Problem(lambda x: x[0] - x[1], inequality=lambda x: 3 * x[0] ** 2 - 2 * x[0] * x[1] + x[1] ** 2 - 1),
        t(-10, 10),
        -1.0,
    ),
    "HS28": (
        Problem(lambda x: (x[0] + x[1]) ** 2 + (x[1] + x[2]) ** 2, lambda x: x[0] + 2 * x[1] + 3 * x[2] - 1),
        t(-4, 1, 1),
        0.0,
    ),
    "HS35": (
        Problem(
            lambda x: (
                9
                - 8 * x[0]
                - 6 * x[1]
                - 4 * x[2]
                + 2 * x[0] ** 2
                + 2 * x[1] ** 2
                + x[2] ** 2
                + 2 * x[0] * x[1]
                + 2 * x[0] * x[2]
            ),
            inequality=lambda x: x[0] + x[1] + 2 * x[2] - 3,
            bounds=(0.0, None),
        ),
        t(0.5, 0.5, 0.5),
        1 / 9,
    ),
    "HS39": (
        Problem(lambda x: -x[0], lambda x: torch.stack([x[1] - x[0] ** 3 - x[2] ** 2, x[0] ** 2 - x[1] - x[3] ** 2])),
        t(2, 2, 2, 2),
        -1.0,
    ),
    "HS43": (
        Problem(lambda x: x @ (t(1, 1, 2, 1) * x) - 5 * x[0] - 5 * x[1] - 21 * x[2] + 7 * x[3], inequality=hs43),
        t(0, 0, 0, 0),
        -44.0,
    ),
    "HS71": (
        Problem(
            lambda x: x[0] * x[3] * (x[0] + x[1] + x[2]) + x[2],
            lambda x: x.square().sum() - 40,
            lambda x: 25 - x.prod(),
            bounds=(1.0, 5.0),
        ),
        t(1, 5, 5, 1),
        17.0140172891563,
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_answers(name):
    problem, x0, value = KNOWN[name]
    res = SQP()(problem, x0)
    assert res.status == Status.CONVERGED
    assert abs(res.value - value) <= 1e-9 * max(1.0, abs(value))
    assert float(res.kkt.error) <= 1e-8
    assert res.error <= res.tolerance
    again = SQP()(problem, x0)
    assert torch.equal(again.x, res.x)
    warm = SQP()(
        problem, res.x, equality_dual=res.equality_dual, inequality_dual=res.inequality_dual, bound_dual=res.bound_dual,
        tolerance=1e-6,
    )  # fmt: skip
    assert warm.iterations == 0


def test_a_problem_without_a_kkt_point_is_not_claimed():
    """HS13: the constraint's gradient vanishes at the solution."""
    problem = Problem(
        lambda x: (x[0] - 2) ** 2 + x[1] ** 2, inequality=lambda x: x[1] - (1 - x[0]) ** 3, bounds=(0.0, None)
    )
    assert SQP()(problem, t(-2, -2)).status != Status.CONVERGED


@pytest.mark.parametrize(
    "problem",
    [
        Problem(lambda x: x.square().sum(), inequality=lambda x: torch.stack([x[0] - 1, 2 - x[0]])),
        Problem(lambda x: x.square().sum(), lambda x: x.square().sum() + 1),
        Problem(lambda x: x.square().sum(), lambda x: torch.stack([x.sum(), x.sum() - 1])),
    ],
    ids=["half spaces", "sphere of radius i", "parallel planes"],
)
def test_infeasible_problems_are_named(problem):
    assert SQP()(problem, t(1, 1)).status == Status.INFEASIBLE


def test_an_unbounded_problem_is_named():
    assert SQP()(Problem(lambda x: x.sum(), inequality=lambda x: x[0] - 1), t(0, 0)).status == Status.UNBOUNDED


def test_nan_is_named():
    assert SQP()(Problem(lambda x: x.sum() * torch.nan, lambda x: x.sum()), t(0, 0)).status == Status.NON_FINITE


def test_dependent_rows_and_a_singular_hessian_are_no_obstacle():
    """Only x1 and the sum of the others are determined; the row is given twice."""
    problem = Problem(lambda x: (x[0] - 1) ** 2 + x[1:].sum(), lambda x: torch.stack([x.sum(), 2 * x.sum()]))
    res = SQP()(problem, t(3, 0, 0, 0))
    assert res.status == Status.CONVERGED
    assert float(res.x[0]) == pytest.approx(1.5)
    assert float(res.x.sum()) == pytest.approx(0.0, abs=1e-12)


def test_trees_and_float32():
    problem = Problem(
        lambda x: ((x["a"] - 2) ** 2).sum() + x["b"] ** 2, inequality=lambda x: {"g": x["a"].sum() - x["b"]}
    )
    res = SQP()(problem, {"a": torch.zeros(2, 1), "b": torch.zeros(())})
    assert res.status == Status.CONVERGED
    assert res.x["a"].dtype == torch.float32
    assert res.inequality_dual["g"].shape == ()
    # 2 (a - 2) + mu = 0, 2 b = mu, b = 2 a
    assert torch.allclose(res.x["a"], torch.full((2, 1), 2 / 3), atol=1e-5)


def test_the_equality_step_says_what_it_cannot_solve():
    W, g = torch.diag(t(1, 0)), t(1, 1)
    assert not equality_step(W, g, torch.zeros(0, 2, dtype=torch.float64), t()).solved  # falls for ever
    assert equality_step(W, t(1, 0), torch.zeros(0, 2, dtype=torch.float64), t()).free == 1
    assert not equality_step(-W, t(1, 0), torch.zeros(0, 2, dtype=torch.float64), t()).solved
    assert not equality_step(torch.eye(2, dtype=torch.float64), g, torch.stack([g, g]), t(0, 1)).solved
    assert convexity_shift(W) == 0
    assert convexity_shift(-W) > 1
