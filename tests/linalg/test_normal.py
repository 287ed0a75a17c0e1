from laws import Promises, check_linear_solver

from nestopt.linalg import CG, Normal


def test_laws(dtype):
    check_linear_solver(lambda: Normal(CG()), Promises(condition=1e2, needs_symmetric=False, steady=False), dtype)
