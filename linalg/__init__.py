"""Matrix-free linear algebra: operators, solvers with certified residuals, and the library's one loop."""

from .auto import Auto
from .bicgstab import BiCGStab
from .cg import CG
from .chunks import AutoChunk
from .comparison import Comparison, compare_preconditioners
from .curvature import GaussNewton, Hessian, Jacobian
from .dense import LU, Cholesky
from .diagonal import hutchinson_diagonal, xdiag
from .fisher import EmpiricalFisher, Fisher, MonteCarloFisher, per_sample_gradients
from .fisher_solver import FisherSolver
from .gmres import GMRES
from .guard import UndifferentiableError
from .jacobi import BlockJacobi, Jacobi, leaf_blocks, module_blocks
from .kronecker import Kronecker
from .lanczos import extreme_eigenvalues, operator_norm
from .ldl import LDL
from .lsmr import LSMR
from .matrices import Dense, Diagonal, FunctionOperator, Identity
from .mfac import MFAC, DampedFisher
from .mfac_blocks import BlockMFAC
from .minres import MINRES
from .minres_qlp import MINRESQLP
from .multishift import MultiShiftCG
from .neumann import Neumann
from .normal import Normal
from .nystrom import Nystrom, NystromInverse
from .nystrom_cg import NystromCG
from .operator import LinearOperator
from .pairs import EigenpairsResult, extreme_pairs
from .parallel import DataParallel, Sharded
from .preconditioner import Deflation, Preconditioner
from .probes import Estimate
from .product import Compiled, ForwardOverReverse, FreshGraph, KeptGraph
from .recycle import Recycled
from .result import Result, SolverError, Status, Statuses, Stopping, iterate
from .single_step import SingleStep
from .sketch import CountSketch, Gaussian, RowBlocks, Rows, Sketch, SketchProject
from .solver import LinearSolver, Prepared, Solution
from .spectrum import FunctionTrace, SpectralDensity, log_determinant, spectral_density, trace_function
from .trace import frobenius_norm, hutchinson_trace, hutchpp_trace, xtrace

__all__ = [
    "CG",
    "GMRES",
    "LDL",
    "LSMR",
    "LU",
    "MFAC",
    "MINRES",
    "MINRESQLP",
    "Auto",
    "AutoChunk",
    "BiCGStab",
    "BlockJacobi",
    "BlockMFAC",
    "Cholesky",
    "Comparison",
    "Compiled",
    "CountSketch",
    "DampedFisher",
    "DataParallel",
    "Deflation",
    "Dense",
    "Diagonal",
    "EigenpairsResult",
    "EmpiricalFisher",
    "Estimate",
    "Fisher",
    "FisherSolver",
    "ForwardOverReverse",
    "FreshGraph",
    "FunctionOperator",
    "FunctionTrace",
    "GaussNewton",
    "Gaussian",
    "Hessian",
    "Identity",
    "Jacobi",
    "Jacobian",
    "KeptGraph",
    "Kronecker",
    "LinearOperator",
    "LinearSolver",
    "MonteCarloFisher",
    "MultiShiftCG",
    "Neumann",
    "Normal",
    "Nystrom",
    "NystromCG",
    "NystromInverse",
    "Preconditioner",
    "Prepared",
    "Recycled",
    "Result",
    "RowBlocks",
    "Rows",
    "Sharded",
    "SingleStep",
    "Sketch",
    "SketchProject",
    "Solution",
    "SolverError",
    "SpectralDensity",
    "Status",
    "Statuses",
    "Stopping",
    "UndifferentiableError",
    "compare_preconditioners",
    "extreme_eigenvalues",
    "extreme_pairs",
    "frobenius_norm",
    "hutchinson_diagonal",
    "hutchinson_trace",
    "hutchpp_trace",
    "iterate",
    "leaf_blocks",
    "log_determinant",
    "module_blocks",
    "operator_norm",
    "per_sample_gradients",
    "spectral_density",
    "trace_function",
    "xdiag",
    "xtrace",
]
