"""The projection onto the coupled set against quadratic programs, its certificate, and curved constraints."""

import dataclasses

import pytest
import torch
from problems import DOUBLE

from nestopt import bilevel, constrained
from nestopt.bilevel.joint_projection import JointSet, Rows
from nestopt.bilevel.problem import Spaces
from nestopt.linalg import Status

N, M = 8, 12


def joint(inequalities, equalities, sets, curve=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    G = torch.randn(inequalities, N + M, generator=g, dtype=DOUBLE)
    A = torch.randn(equalities, N + M, generator=g, dtype=DOUBLE)
    problem = bilevel.Problem(
        lambda x, y: x.sum() + y.sum(),
        lambda x, y: y.sum(),
        upper_set=sets,
        lower_set=sets,
        inequality=(lambda x, y: G @ torch.cat([x, y]) - 0.1 + curve * torch.cat([x, y]).square().sum())
        if inequalities
        else None,
        equality=(lambda x, y: A @ torch.cat([x, y]) - 0.05) if equalities else None,
    )
    spaces = Spaces.of(torch.zeros(N, dtype=DOUBLE), torch.zeros(M, dtype=DOUBLE))
    oracle = problem.oracle(spaces)
    _, c_x, c_y = oracle.constraint_jacobian(torch.zeros(N, dtype=DOUBLE), torch.zeros(M, dtype=DOUBLE))
    return JointSet(oracle, 1 / torch.cat([c_x, c_y], 1).norm(dim=1), inequalities), G, A


BOX = constrained.Box(-0.5, 0.5)


@pytest.mark.parametrize(
    ("inequalities", "equalities", "sets"),
    [(0, 2, None), (1, 0, None), (3, 2, None), (0, 2, BOX), (4, 2, BOX), (12, 3, BOX)],
    ids=str,
)
def test_affine_against_quadratic_programs(inequalities, equalities, sets):
    c, G, A = joint(inequalities, equalities, sets)
    rows = c.probe(torch.zeros(N + M, dtype=DOUBLE))
    assert rows.affine
    options = {}
    if equalities:
        options |= {"A": A, "b": torch.full((equalities,), 0.05, dtype=DOUBLE)}
    if inequalities:
        options |= {"G": G, "h": torch.full((inequalities,), 0.1, dtype=DOUBLE)}
    if sets is not None:
        options |= {"low": -0.5, "high": 0.5}
    for seed in range(3):
        v = torch.randn(N + M, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
        found = c.project(v, rows)
        assert found.status == Status.CONVERGED
        assert float(found.residual) <= 1e-11 * (1 + float(v.norm()))
        exact = constrained.solve_qp(torch.eye(N + M, dtype=DOUBLE), -v, **options)
        assert torch.allclose(found.point, exact.x, atol=1e-9)
        assert bool((found.dual[:inequalities] >= 0).all())


def test_sets_that_are_no_boxes():
    c, _, A = joint(0, 2, constrained.Ball(0.7))
    v = torch.randn(N + M, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    found = c.project(v, c.probe(v))
    assert found.status == Status.CONVERGED
    w = found.point
    assert torch.allclose(A @ w, torch.full((2,), 0.05, dtype=DOUBLE), atol=1e-9)
    assert float(max(w[:N].norm(), w[N:].norm())) <= 0.7 + 1e-12
    assert torch.allclose(w, c.project_sets(v - found.rows.jacobian.T @ found.dual), atol=1e-10)


def test_curved_constraints_are_never_taken_for_affine():
    c, _, _ = joint(3, 2, BOX, curve=0.01)
    start = c.feasible(torch.randn(N + M, generator=torch.Generator().manual_seed(2), dtype=DOUBLE))
    assert start.status == Status.CONVERGED
    assert not start.rows.affine
    assert float(c.violation(c.values(start.point))) <= 1e-10
    for size in (0.1, 1.0):
        v = start.point + size * torch.randn(N + M, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)
        found = c.project(v, start.rows)
        assert found.status == Status.CONVERGED
        assert float(c.violation(c.values(found.point))) <= 1e-10
        rows = c.linearize(found.point)
        assert torch.allclose(found.point, c.project_sets(v - rows.jacobian.T @ found.dual), atol=1e-9)


def test_a_wrong_promise_of_affinity_is_seen():
    """Curved only away from the probes: the model is verified at every projected point."""
    problem = bilevel.Problem(
        lambda x, y: x + y,
        lambda x, y: y,
        equality=lambda x, y: (x + y - 1 + torch.where((x - 5).abs() < 0.6, (x - 5) ** 2 - 0.36, 0.0))[None],
    )
    spaces = Spaces.of(torch.tensor(0.0, dtype=DOUBLE), torch.tensor(0.0, dtype=DOUBLE))
    c = JointSet(problem.oracle(spaces), torch.ones(1, dtype=DOUBLE), 0)
    rows = c.probe(torch.zeros(2, dtype=DOUBLE))
    assert rows.affine
    found = c.project(torch.tensor([5.0, -3.8], dtype=DOUBLE), rows)
    assert found.status == Status.CONVERGED
    assert not found.rows.affine
    assert float(c.values(found.point).abs()) <= 1e-10


def test_an_empty_set_is_named():
    c, _, _ = joint(0, 2, constrained.Box(-1e-3, 1e-3))  # the equations need a larger box
    v = torch.zeros(N + M, dtype=DOUBLE)
    found = c.project(v, c.probe(v))
    assert found.status == Status.INFEASIBLE
    assert c.conflict(found).endswith("within the sets of x and y")


def test_retraction_is_the_projection_to_second_order():
    c, _, _ = joint(3, 2, BOX, curve=0.01)
    g = torch.Generator().manual_seed(4)
    start = c.feasible(torch.randn(N + M, generator=g, dtype=DOUBLE))
    u = torch.randn(N + M, generator=g, dtype=DOUBLE)
    gaps = []
    for size in (1e-1, 1e-2):
        v = start.point + size * u
        near, nearest = c.retract(v, start.rows), c.project(v, start.rows)
        assert near.status == Status.CONVERGED
        assert float(c.violation(c.values(near.point))) <= 1e-10
        assert float(c.violation(near.values - c.values(near.point))) <= 1e-12
        gaps.append(float((near.point - nearest.point).norm()))
    assert gaps[0] <= 0.1 * 1e-1
    assert gaps[1] <= 0.02 * gaps[0] + 1e-12


def curved_equations():
    problem = bilevel.Problem(
        lambda x, y: x.sum() + y.sum(), lambda x, y: y.sum(), equality=lambda x, y: ((x**3).sum() + y.sum())[None]
    )
    spaces = Spaces.of(torch.zeros(N, dtype=DOUBLE), torch.zeros(M, dtype=DOUBLE))
    return JointSet(problem.oracle(spaces), torch.full((1,), M**-0.5, dtype=DOUBLE), 0)


BATCHES = {
    "equations": joint(0, 2, None)[0],
    "rows and a box": joint(4, 2, BOX)[0],
    "a ball": joint(0, 2, constrained.Ball(0.7))[0],
    "curved": joint(3, 2, BOX, curve=0.01)[0],
    "curved equations": curved_equations(),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_is_the_loop_and_no_item_changes_another(name):
    c = BATCHES[name]
    g = torch.Generator().manual_seed(6)
    start = c.feasible(torch.randn(N + M, generator=g, dtype=DOUBLE))
    v = start.point + 0.1 * torch.randn(2, 3, N + M, generator=g, dtype=DOUBLE)
    for project in (c.project, c.onto):
        together = project(v, start.rows)
        assert together.codes.shape == (2, 3)
        assert bool((together.status == Status.CONVERGED).all())
        for i, j in ((a, b) for a in range(2) for b in range(3)):
            alone = project(v[i, j], start.rows)
            assert alone.status == together.status[i, j]
            for part in ("point", "dual", "residual", "values"):
                assert torch.allclose(getattr(together, part)[i, j], getattr(alone, part), rtol=0, atol=1e-12), part
        spoilt = v.clone()
        spoilt[0, 1] = torch.nan
        spoilt[1, 2, 3] = torch.inf
        found = project(spoilt, start.rows)
        assert found.status[0, 1] == found.status[1, 2] == Status.NON_FINITE
        kept = torch.tensor([[True, False, True], [True, True, False]])
        assert bool((found.codes == together.codes)[kept].all())
        assert torch.allclose(found.point[kept], together.point[kept], rtol=0, atol=1e-12)


def test_an_item_without_a_projection_is_the_only_one():
    problem = bilevel.Problem(
        lambda x, y: x + y, lambda x, y: y, upper_set=BOX, lower_set=BOX, inequality=lambda x, y: (x + y - 0.5)[None]
    )
    zero = torch.tensor(0.0, dtype=DOUBLE)
    c = JointSet(problem.oracle(Spaces.of(zero, zero.clone())), torch.ones(1, dtype=DOUBLE), 1)
    rows = c.probe(torch.zeros(2, dtype=DOUBLE))
    own = [rows, dataclasses.replace(rows, offset=rows.offset - 5.0)]  # x + y <= -4.5 has no point in the box
    stacked = Rows(
        *(torch.stack([getattr(one, part) for one in own]) for part in ("jacobian", "offset", "basis", "transform")),
        1, True,
    )  # fmt: skip
    v = torch.tensor([[2.0, 1.0], [2.0, 1.0]], dtype=DOUBLE)
    found = c.onto(v, stacked)
    assert [status.name for status in found.status] == ["CONVERGED", "INFEASIBLE"]
    assert torch.allclose(found.point[0], c.onto(v[0], rows).point, rtol=0, atol=1e-12)
