"""Matrix-free linear algebra: operators, solvers with certified residuals, and the library's one loop."""

from .cg import CG
from .curvature import GaussNewton, Hessian, Jacobian
from .dense import LU, Cholesky
from .gmres import GMRES
from .guard import UndifferentiableError
from .lanczos import extreme_eigenvalues, operator_norm
from .matrices import Dense, Diagonal, FunctionOperator, Identity
from .minres import MINRES
from .neumann import Neumann
from .normal import Normal
from .operator import LinearOperator
from .product import ForwardOverReverse, FreshGraph, KeptGraph
from .result import Result, SolverError, Status, Statuses, Stopping, iterate
from .solver import LinearSolver, Prepared, Solution

__all__ = [
    "CG",
    "GMRES",
    "LU",
    "MINRES",
    "Cholesky",
    "Dense",
    "Diagonal",
    "ForwardOverReverse",
    "FreshGraph",
    "FunctionOperator",
    "GaussNewton",
    "Hessian",
    "Identity",
    "Jacobian",
    "KeptGraph",
    "LinearOperator",
    "LinearSolver",
    "Neumann",
    "Normal",
    "Prepared",
    "Result",
    "Solution",
    "SolverError",
    "Status",
    "Statuses",
    "Stopping",
    "UndifferentiableError",
    "extreme_eigenvalues",
    "iterate",
    "operator_norm",
]
