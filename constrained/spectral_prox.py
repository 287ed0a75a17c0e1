"""Proximal operators of functions of singular values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nestopt.linalg import LinearOperator

from .arguments import check_weight, fit, nonnegative
from .prox import Prox
from .spectral_function import differentiated, finite_or, shrink, shrink_product, shrunk_sum, with_value
from .spectral_sets import matrix_operator

__all__ = ["NuclearNorm"]


@dataclass(frozen=True, eq=False)
class NuclearNorm(Prox):
    """g(X) = weight * (the sum of singular values), of matrices of any shape in the last two dimensions.

    prox(X, s) = U max(S - s weight, 0) V' for X = U S V'. The derivative is right for repeated, clustered and zero
    singular values, to every order. At the kink S_i = s weight > 0 it is the limit from below, as for a value that is
    zeroed. The gradient of the value is U V', from the positive singular values
    alone.

    Cost: one thin singular value decomposition; second derivatives, and the value's, add eigendecompositions of order
    m + n.

    Args:
        weight: number >= 0, or tensor that broadcasts to (*batch,).

    Raises:
        TypeError: if weight is neither a number nor a floating tensor.
        ValueError: if it is a number that is negative or not finite.

    Reference:
        Cai, Candes & Shen 2010, A singular value thresholding algorithm for matrix completion, Theorem 2.1.

    Example:
        >>> NuclearNorm(weight=2.0).prox(torch.diag(torch.tensor([3.0, -1.0])))
        tensor([[1., 0.],
                [0., 0.]])
    """

    weight: float | Tensor = 1.0

    def __post_init__(self) -> None:
        check_weight("NuclearNorm", "weight", self.weight)

    @property
    def space_dims(self) -> int:
        """Two."""
        return 2

    def _weight(self, x: Tensor) -> Tensor:
        return nonnegative(fit("NuclearNorm", "weight", self.weight, x, x.shape[:-2]))

    def _finite(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return finite_or(x, torch.zeros(x.shape[-2:], dtype=x.dtype, device=x.device))

    def _value(self, x: Tensor) -> Tensor:
        X, finite = self._finite(x)
        S = torch.linalg.svdvals(X.detach())
        total = S.sum(-1)
        if differentiated(X) and S.shape[-1]:
            # what is above a level below all that is not zero moves as the sum does
            positive = 10 * torch.finfo(S.dtype).eps * S[..., :1] < S
            level = torch.where(positive, S, torch.inf).amin(-1) / 2
            level = torch.where(level == torch.inf, 1, level)
            total = with_value(shrunk_sum(X, level[..., None, None])[..., 0, 0], total)
        return torch.where(finite[..., 0, 0], self._weight(x) * total, torch.nan)

    def _least(self, x: Tensor, step: Tensor, p: Tensor) -> Tensor:
        X, finite = self._finite(x)
        weight = self._weight(x)
        total = shrunk_sum(X, step * weight[..., None, None])[..., 0, 0]
        return torch.where(finite[..., 0, 0], weight * total, torch.nan)

    def _prox(self, x: Tensor, step: Tensor) -> Tensor:
        X, finite = self._finite(x)
        return torch.where(finite, shrink(X, step * self._weight(x)[..., None, None]), torch.nan)

    def _jacobian(self, x: Tensor, step: Tensor) -> LinearOperator:
        X, finite = self._finite(x)
        U, S, Vh = torch.linalg.svd(X, full_matrices=False)
        t = step * self._weight(x)[..., None, None].detach()
        return matrix_operator(x, finite, lambda H: shrink_product(U, S, Vh, t, H))
