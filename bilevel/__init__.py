"""Bilevel optimisation: hypergradients with certificates, and methods that use them."""

from .aid import AID
from .callbacks import Callback, Checkpoint, EarlyStopping, History, ProgressBar
from .certificate import Certificate, Constants
from .check import HypergradientCheck, HypergradientError, check_hypergradient
from .estimate import Hypergradient, hypergradient
from .hoag import HOAG, Geometric, Polynomial
from .method import BilevelResult, Counts, Method
from .problem import Problem
from .solving import solve
from .upper_step import ConstantStep, QuasiNewtonStep, SpectralStep, UpperStep

__all__ = [
    "AID",
    "HOAG",
    "BilevelResult",
    "Callback",
    "Certificate",
    "Checkpoint",
    "ConstantStep",
    "Constants",
    "Counts",
    "EarlyStopping",
    "Geometric",
    "History",
    "Hypergradient",
    "HypergradientCheck",
    "HypergradientError",
    "Method",
    "Polynomial",
    "Problem",
    "ProgressBar",
    "QuasiNewtonStep",
    "SpectralStep",
    "UpperStep",
    "check_hypergradient",
    "hypergradient",
    "solve",
]
