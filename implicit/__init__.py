"""Roots, fixed points and minimisers, and their derivatives."""

from .descent import GradientDescent
from .fixed_points import fixed_point
from .lbfgs import LBFGS
from .minimizer import Minimizer, MinimizeResult
from .module import ArgminLayer, FixedPointLayer, RootLayer
from .monitor import ImplicitWarning, Monitor, Record
from .newton import NewtonCG
from .roots import root
from .stationary import argmin
from .warm_start import WarmStart

__all__ = [
    "LBFGS",
    "ArgminLayer",
    "FixedPointLayer",
    "GradientDescent",
    "ImplicitWarning",
    "MinimizeResult",
    "Minimizer",
    "Monitor",
    "NewtonCG",
    "Record",
    "RootLayer",
    "WarmStart",
    "argmin",
    "fixed_point",
    "root",
]
