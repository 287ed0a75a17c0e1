"""Roots, fixed points and minimisers, and their derivatives."""

from .adam import Adam, AdamState, AdamW
from .anderson import Anderson
from .backward_pass import BackwardPass
from .blackbox_gradients import BlackboxOptimizer, blackbox
from .broyden import Broyden
from .comparison import PassComparison, PassReport, compare
from .contrastive_losses import ContrastiveLoss, SolutionPool, contrastive, contrastive_map
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
from .oracles import Oracle, decide, optimal_value, regret
from .outputs import mark_outputs
from .perturbation import FenchelYoungLoss, PerturbedOptimizer, fenchel_young, perturbed
from .phantom import Phantom
from .picard import Picard
from .pruning import CubicSparsity, Pruner, PruneStep
from .regularized_newton import RegularizedNewton
from .roots import root
from .sgd import SGD, SGDState
from .sophia import Sophia
from .spo import SPOPlusLoss, spo_plus
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
    "BlackboxOptimizer",
    "Broyden",
    "ContrastiveLoss",
    "CubicSparsity",
    "DifferentiableOptimizer",
    "FenchelYoungLoss",
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
    "Oracle",
    "PassComparison",
    "PassReport",
    "PerturbedOptimizer",
    "Phantom",
    "Picard",
    "PruneStep",
    "Pruner",
    "Record",
    "RegularizedNewton",
    "RootLayer",
    "SGDState",
    "SPOPlusLoss",
    "SolutionPool",
    "Sophia",
    "Trained",
    "Truncated",
    "Unroll",
    "WarmStart",
    "argmin",
    "blackbox",
    "compare",
    "contrastive",
    "contrastive_map",
    "decide",
    "fenchel_young",
    "fixed_point",
    "from_torch",
    "mark_outputs",
    "optimal_value",
    "perturbed",
    "regret",
    "root",
    "spo_plus",
    "unroll_training",
]
