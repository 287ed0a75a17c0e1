"""Bilevel optimisation: hypergradients with certificates, and methods that use them."""

from .aid import AID
from .assumptions import Assumptions, methods
from .callbacks import Callback, Checkpoint, EarlyStopping, History, ProgressBar
from .certificate import Certificate, Constants
from .check import HypergradientCheck, HypergradientError, check_hypergradient
from .counts import Counts
from .estimate import Hypergradient, hypergradient
from .hoag import HOAG, Geometric, Polynomial
from .method import BilevelResult, Method
from .nonsmooth import LowerProx
from .oracle import Batch
from .problem import Problem
from .solving import solve
from .upper_step import ConstantStep, QuasiNewtonStep, SpectralStep, UpperStep

__all__ = [
    "AID",
    "HOAG",
    "Assumptions",
    "Batch",
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
    "LowerProx",
    "Method",
    "Polynomial",
    "Problem",
    "ProgressBar",
    "QuasiNewtonStep",
    "SpectralStep",
    "UpperStep",
    "check_hypergradient",
    "hypergradient",
    "methods",
    "solve",
]
