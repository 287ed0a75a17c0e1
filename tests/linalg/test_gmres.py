from laws import Promises, check_linear_solver

from nestopt.linalg import GMRES


def test_laws(dtype):
    check_linear_solver(GMRES, Promises(condition=1e4, needs_symmetric=False), dtype)
