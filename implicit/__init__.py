"""Roots, fixed points and minimisers, and their derivatives."""

from .adam import Adam, AdamState, AdamW
from .anderson import Anderson
from .backward_pass import BackwardPass
from .broyden import Broyden
from .comparison import PassComparison, PassReport, compare
from .descent import GradientDescent
from .differentiable_optimizers import DifferentiableOptimizer
from .equilibrium import DEQ
from .fixed_point_solver import FixedPointResult, FixedPointSolver
from .fixed_points import fixed_point
from .fosi import FOSI
from .gauss_newton import LevenbergMarquardt
from .inner_loop import Trained, unroll_training
from .lazy_newton import LazyNewton
from .lbfgs import LBFGS
from .minimizer import Minimizer, MinimizeResult
from .module import ArgminLayer, FixedPointLayer, RootLayer
from .monitor import ImplicitWarning, Monitor, Record
from .natural_gradient import MFACOptimizer
from .newton import NewtonCG
from .newton_krylov import NewtonKrylov
from .one_step import OneStep
from .outputs import mark_outputs
from .phantom import Phantom
from .picard import Picard
from .pruning import CubicSparsity, Pruner, PruneStep
from .regularized_newton import RegularizedNewton
from .roots import root
from .sgd import SGD, SGDState
from .sophia import Sophia
from .stationary import argmin
from .torch_optimizers import from_torch
from .truncated import Truncated
from .unroll import Unroll
from .warm_start import WarmStart

__all__ = [
    "DEQ",
    "FOSI",
    "LBFGS",
    "SGD",
    "Adam",
    "AdamState",
    "AdamW",
    "Anderson",
    "ArgminLayer",
    "BackwardPass",
    "Broyden",
    "CubicSparsity",
    "DifferentiableOptimizer",
    "FixedPointLayer",
    "FixedPointResult",
    "FixedPointSolver",
    "GradientDescent",
    "ImplicitWarning",
    "LazyNewton",
    "LevenbergMarquardt",
    "MFACOptimizer",
    "MinimizeResult",
    "Minimizer",
    "Monitor",
    "NewtonCG",
    "NewtonKrylov",
    "OneStep",
    "PassComparison",
    "PassReport",
    "Phantom",
    "Picard",
    "PruneStep",
    "Pruner",
    "Record",
    "RegularizedNewton",
    "RootLayer",
    "SGDState",
    "Sophia",
    "Trained",
    "Truncated",
    "Unroll",
    "WarmStart",
    "argmin",
    "compare",
    "fixed_point",
    "from_torch",
    "mark_outputs",
    "root",
    "unroll_training",
]
