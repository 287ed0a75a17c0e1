from laws import Promises, check_linear_solver

from nestopt.linalg import LU, Cholesky, Status


def test_laws_of_lu(dtype):
    check_linear_solver(LU, Promises(condition=1e4, needs_symmetric=False, direct=True, directions=False), dtype)


def test_laws_of_cholesky(dtype):
    promises = Promises(condition=1e4, indefinite=Status.NEGATIVE_CURVATURE, direct=True, directions=False)
    check_linear_solver(Cholesky, promises, dtype)
