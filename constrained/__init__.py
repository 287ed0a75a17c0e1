"""Feasible sets and constrained problems."""

from .affine import Affine, HalfSpace, Hyperplane
from .birkhoff import Birkhoff
from .box_section import BoxSection, capped_simplex
from .composite import composite_argmin
from .composite_layer import CompositeArgminLayer
from .cones import DualCone, NonNegative, SecondOrderCone
from .convex_program import ConvexProgram, ConvexSolution
from .exponential_cone import ExponentialCone
from .first_order import CompositeResult, FirstOrder
from .group_prox import GroupLasso, SparseGroupLasso
from .kkt import MinimumNorm
from .linear_program import LPResult, solve_lp
from .lp_layer import LPLayer
from .manifolds import Sphere, Stiefel
from .mirror_descent import MirrorDescent
from .norm_balls import L1Ball, LinfBall
from .polyhedra import Polyhedron
from .power_cone import PowerCone
from .problem import KKT, Problem
from .product_set import ProductSet
from .projected_gradient import ProjectedGradient
from .projection_layer import ProjectionLayer, ProximalLayer
from .prox import L1, ElasticNet, Huber, Indicator, Prox, Separable, SquaredL2
from .proximal_gradient import ProximalGradient
from .proximal_trees import prox_tree, value_tree
from .qp_backends import OSQP, Backend, Moreau, ProxQP
from .qp_layer import QPLayer
from .quadratic_program import QPResult, solve_qp
from .sensitivity import ProblemSolution, solution
from .sets import Ball, Box, Set, Simplex, WholeSpace, project
from .spectral_prox import NuclearNorm
from .spectral_sets import NuclearBall, PSDCone, SpectralBall
from .sqp import SQP, SQPResult
from .total_variation import TotalVariation1D

__all__ = [
    "KKT",
    "L1",
    "OSQP",
    "SQP",
    "Affine",
    "Backend",
    "Ball",
    "Birkhoff",
    "Box",
    "BoxSection",
    "CompositeArgminLayer",
    "CompositeResult",
    "ConvexProgram",
    "ConvexSolution",
    "DualCone",
    "ElasticNet",
    "ExponentialCone",
    "FirstOrder",
    "GroupLasso",
    "HalfSpace",
    "Huber",
    "Hyperplane",
    "Indicator",
    "L1Ball",
    "LPLayer",
    "LPResult",
    "LinfBall",
    "MinimumNorm",
    "MirrorDescent",
    "Moreau",
    "NonNegative",
    "NuclearBall",
    "NuclearNorm",
    "PSDCone",
    "Polyhedron",
    "PowerCone",
    "Problem",
    "ProblemSolution",
    "ProductSet",
    "ProjectedGradient",
    "ProjectionLayer",
    "Prox",
    "ProxQP",
    "ProximalGradient",
    "ProximalLayer",
    "QPLayer",
    "QPResult",
    "SQPResult",
    "SecondOrderCone",
    "Separable",
    "Set",
    "Simplex",
    "SparseGroupLasso",
    "SpectralBall",
    "Sphere",
    "SquaredL2",
    "Stiefel",
    "TotalVariation1D",
    "WholeSpace",
    "capped_simplex",
    "composite_argmin",
    "project",
    "prox_tree",
    "solution",
    "solve_lp",
    "solve_qp",
    "value_tree",
]
