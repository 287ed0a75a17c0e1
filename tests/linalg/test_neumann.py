from laws import Promises, check_linear_solver

from nestopt.linalg import Neumann, Status


def test_laws(dtype):
    promises = Promises(condition=10.0, indefinite=Status.NEGATIVE_CURVATURE, singular=(Status.MAX_ITER,))
    check_linear_solver(lambda: Neumann(terms=400), promises, dtype)
