"""nestopt: nested and constrained optimisation for PyTorch, with a certificate on every derivative and solution."""

from . import bilevel, constrained, implicit, linalg

__all__ = ["__version__", "bilevel", "constrained", "implicit", "linalg"]

__version__ = "0.1.0"
