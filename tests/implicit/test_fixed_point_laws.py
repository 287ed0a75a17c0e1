"""The laws of fixed-point and root solvers, over all of them; what is each one's own stands in its own file."""

import pytest
from laws_fixed_point import (
    Solve,
    check_bad_arguments,
    check_batch,
    check_edges,
    check_known_answer,
    check_layer,
    check_rounding,
    check_structure,
)

from nestopt.implicit import Anderson, Broyden, NewtonKrylov, Picard
from nestopt.linalg import LU

SOLVES = [
    Solve(Picard()),
    Solve(Picard(0.9), is_map=False),
    Solve(Anderson()),
    Solve(Anderson(damping=0.7), is_map=False),
    Solve(Broyden()),
    Solve(Broyden(), is_map=False),
    Solve(NewtonKrylov()),
    Solve(NewtonKrylov(), is_map=False),
    Solve(NewtonKrylov(LU()), is_map=False),
]
solves = pytest.mark.parametrize("solve", SOLVES, ids=str)


@solves
def test_known_answer(solve, dtype):
    check_known_answer(solve, dtype)


@solves
def test_batch(solve, generator, dtype):
    check_batch(solve, generator, dtype)


@solves
def test_structure(solve, generator):
    check_structure(solve, generator)


@pytest.mark.parametrize("law", [check_edges, check_rounding, check_bad_arguments])
@solves
def test_law(solve, law):
    law(solve)


@solves
def test_layer(solve, generator):
    check_layer(solve, generator)
