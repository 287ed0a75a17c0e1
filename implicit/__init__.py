"""Roots, fixed points and minimisers, and their derivatives."""

from .descent import GradientDescent
from .fixed_points import fixed_point
from .fosi import FOSI
from .gauss_newton import LevenbergMarquardt
from .lazy_newton import LazyNewton
from .lbfgs import LBFGS
from .minimizer import Minimizer, MinimizeResult
from .module import ArgminLayer, FixedPointLayer, RootLayer
from .monitor import ImplicitWarning, Monitor, Record
from .natural_gradient import MFACOptimizer
from .newton import NewtonCG
from .outputs import mark_outputs
from .pruning import CubicSparsity, Pruner, PruneStep
from .regularized_newton import RegularizedNewton
from .roots import root
from .sophia import Sophia
from .stationary import argmin
from .warm_start import WarmStart

__all__ = [
    "FOSI",
    "LBFGS",
    "ArgminLayer",
    "CubicSparsity",
    "FixedPointLayer",
    "GradientDescent",
    "ImplicitWarning",
    "LazyNewton",
    "LevenbergMarquardt",
    "MFACOptimizer",
    "MinimizeResult",
    "Minimizer",
    "Monitor",
    "NewtonCG",
    "PruneStep",
    "Pruner",
    "Record",
    "RegularizedNewton",
    "RootLayer",
    "Sophia",
    "WarmStart",
    "argmin",
    "fixed_point",
    "mark_outputs",
    "root",
]
