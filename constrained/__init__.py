"""Feasible sets and constrained problems."""

from .sets import Ball, Box, Set, Simplex, WholeSpace, project

__all__ = ["Ball", "Box", "Set", "Simplex", "WholeSpace", "project"]
