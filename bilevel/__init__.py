"""Bilevel optimisation: hypergradients with certificates, and methods that use them."""

from .aid import AID
from .amigo import AmIGO, StocBiO
from .assumptions import Assumptions, methods
from .bamm import BAMM
from .batched_aid import BatchedAID, BatchedAIDResult
from .bda import BDA
from .blocc import BLOCC
from .block_batches import BlockBatches, BlockDraw
from .bmg import BMG
from .bome import BOME
from .bsvrb import BSVRB
from .bvfsm import BVFSM
from .callbacks import Callback, Checkpoint, EarlyStopping, History, ProgressBar
from .certificate import Certificate, Constants
from .check import HypergradientCheck, HypergradientError, check_hypergradient
from .counts import Counts
from .darts import DARTS
from .distributed import Shards, data_parallel
from .es_single import ESSingle
from .estimate import Hypergradient, hypergradient
from .estimators import SAGA, SPIDER, STORM, Estimator, Minibatch
from .f2sa import F2SA
from .f3sa import F3SA
from .gaffa import BiCGAFFA
from .gpbgd import GPBGD
from .hoag import HOAG, Geometric, LipschitzStep, Polynomial
from .inner_steps import PerStep
from .inverses import MinimumNormInverse, RidgeInverse
from .lv_hba import LVHBA
from .meha import MEHA
from .method import BilevelResult, Method
from .mfac_inverse import MFACInverse
from .module_problem import ModuleProblem, from_modules
from .mrbo import MRBO, TTSA
from .nonsmooth import LowerProx
from .oracle import Batch
from .penalty_steps import Growth
from .per_task import PerTask
from .pes import PES
from .polishing import polish
from .problem import Problem
from .quasi_newton import CompactLBFGS
from .real_time import RealTime
from .replay import Replay
from .sharded_parameters import FullyShardedProblem, fully_sharded
from .soba import SABA, SOBA, SRBA
from .solving import solve
from .step_sizes import ScheduledStep
from .stochastic import Batches, Draw, FromLoader
from .task_problem import TaskProblem
from .tasks import TaskReport, TaskResult, examine_tasks, solve_tasks
from .unrolled import Unrolled
from .upper_optimizer import TorchOptimizer
from .upper_step import ConstantStep, QuasiNewtonStep, SpectralStep, UpperStep
from .value_difference import ValueDifference
from .vpbgd import VPBGD

__all__ = [
    "AID",
    "BAMM",
    "BDA",
    "BLOCC",
    "BMG",
    "BOME",
    "BSVRB",
    "BVFSM",
    "DARTS",
    "F2SA",
    "F3SA",
    "GPBGD",
    "HOAG",
    "LVHBA",
    "MEHA",
    "MRBO",
    "PES",
    "SABA",
    "SAGA",
    "SOBA",
    "SPIDER",
    "SRBA",
    "STORM",
    "TTSA",
    "VPBGD",
    "AmIGO",
    "Assumptions",
    "Batch",
    "BatchedAID",
    "BatchedAIDResult",
    "Batches",
    "BiCGAFFA",
    "BilevelResult",
    "BlockBatches",
    "BlockDraw",
    "Callback",
    "Certificate",
    "Checkpoint",
    "CompactLBFGS",
    "ConstantStep",
    "Constants",
    "Counts",
    "Draw",
    "ESSingle",
    "EarlyStopping",
    "Estimator",
    "FromLoader",
    "FullyShardedProblem",
    "Geometric",
    "Growth",
    "History",
    "Hypergradient",
    "HypergradientCheck",
    "HypergradientError",
    "LipschitzStep",
    "LowerProx",
    "MFACInverse",
    "Method",
    "Minibatch",
    "MinimumNormInverse",
    "ModuleProblem",
    "PerStep",
    "PerTask",
    "Polynomial",
    "Problem",
    "ProgressBar",
    "QuasiNewtonStep",
    "RealTime",
    "Replay",
    "RidgeInverse",
    "ScheduledStep",
    "Shards",
    "SpectralStep",
    "StocBiO",
    "TaskProblem",
    "TaskReport",
    "TaskResult",
    "TorchOptimizer",
    "Unrolled",
    "UpperStep",
    "ValueDifference",
    "check_hypergradient",
    "data_parallel",
    "examine_tasks",
    "from_modules",
    "fully_sharded",
    "hypergradient",
    "methods",
    "polish",
    "solve",
    "solve_tasks",
]
