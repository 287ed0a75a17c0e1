"""Solutions of linear equations, and one inequality: sets that one factorisation projects onto."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nestopt.implicit.transforms import transformed
from nestopt.linalg import LinearOperator

from .sets import Set
from .structured import DiagonalPlusLowRank
from .value_only import check_every, differentiated, opaque

__all__ = ["Affine", "HalfSpace", "Hyperplane", "check_rows", "onto_rows", "orthonormal_rows", "times"]


def check_rows(owner: str, A: Any, b: Any, names: tuple[str, str] = ("A", "b")) -> None:
    """Refuse a matrix (*batch, m, n) and a right-hand side (*batch, m) that do not fit each other or are not finite.

    Args:
        owner: the set's name.
        A: the matrix.
        b: the right-hand side, which may be infinite.
        names: of the two.

    Raises:
        TypeError: if one is not a floating tensor.
        ValueError: for shapes, dtypes or devices that do not fit, an infinite entry of A, or NaN.
    """
    for name, value in zip(names, (A, b), strict=True):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{owner}: {name} must be a real floating tensor, but got {kind}.")
    if A.dtype != b.dtype or A.device != b.device:
        raise ValueError(
            f"{owner}: {names[0]} and {names[1]} must have one dtype and device, but they are {A.dtype} on {A.device} "
            f"and {b.dtype} on {b.device}."
        )
    if A.ndim < 2 or b.ndim < 1 or A.shape[-2] != b.shape[-1]:
        raise ValueError(
            f"{owner}: {names[0]} must have shape (*batch, m, n) and {names[1]} (*batch, m), but they have "
            f"{tuple(A.shape)} and {tuple(b.shape)}."
        )
    check_every(A.detach().isfinite(), f"{owner}: {names[0]} must be finite; look for NaN and inf.")
    check_every(~b.detach().isnan(), f"{owner}: {names[1]} must not hold NaN.")


def orthonormal_rows(A: Tensor, b: Tensor, owner: str = "Affine") -> tuple[Tensor, Tensor]:
    """W and Q' = W A with orthonormal rows, both (*batch, m, ...), or an error that names a dependent row."""
    size = torch.linalg.vector_norm(A, dim=-1)
    safe = torch.where(size > 0, size, 1)
    rows = A / safe[..., None]
    m, n = A.shape[-2:]
    Q, R = torch.linalg.qr(rows.mT)  # |r_kk| is the distance of row k from the span of the rows before it
    k = min(m, n)
    apart = torch.zeros_like(size)
    apart[..., :k] = R.diagonal(dim1=-2, dim2=-1).abs()
    dependent = apart <= 10 * max(m, n) * torch.finfo(A.dtype).eps
    if bool(dependent.any()):
        right = b / safe
        best = times(torch.linalg.pinv(rows), right)
        gap = (times(rows, best) - right).abs().amax(-1)
        limit = 1e3 * max(m, n) * torch.finfo(A.dtype).eps
        size_b = torch.maximum(right.abs().amax(-1), torch.linalg.vector_norm(best, dim=-1))
        row = int(dependent.reshape(-1, m).any(0).nonzero()[0, 0])
        if bool((gap > limit * size_b.clamp_min(torch.finfo(A.dtype).tiny)).any()):
            raise ValueError(
                f"{owner}: A x = b contradicts itself, so the set is empty: row {row} of A is a combination of rows "
                "before it, but b is not; correct b, or drop the row."
            )
        raise ValueError(
            f"{owner}: row {row} of A is a combination of the rows before it and says nothing new; drop it, because a "
            "projection has no derivative in a redundant row."
        )
    eye = torch.eye(m, dtype=A.dtype, device=A.device)
    W = torch.linalg.solve_triangular(R.mT, eye, upper=False) / safe[..., None, :]
    return W, Q.mT


def _for_each_b(A: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`orthonormal_rows`, repeated where vmap has one A and many b."""
    W, Q = orthonormal_rows(A, b)
    batch = torch.broadcast_shapes(A.shape[:-2], b.shape[:-1])  # type: ignore[no-untyped-call]
    return W.expand(*batch, *W.shape[-2:]), Q.expand(*batch, *Q.shape[-2:])


@dataclass(frozen=True, eq=False)
class Affine(Set):
    """{x: A x = b} for A of full row rank.

    With W A = Q' of orthonormal rows (a QR factorisation of A', rows scaled first), P(x) = x - Q (Q'x - W b), applied
    twice so that a far x ends on the set. The factorisation is made once and kept while A's memory is not written to;
    forward, backward and every later call share it. Where A itself is differentiated, W is a constant preconditioner of
    (W A)(W A)', which is the identity at A, so that the error of the derivative grows with A's condition, not with its
    square. The Jacobian is I - Q Q'.

    Cost: 2 m^2 n once, 8 m n a point.

    Args:
        A: shape (m, n) or (*batch, m, n), m <= n.
        b: shape (m,) or (*batch, m).

    Raises:
        TypeError: if A or b is not a floating tensor.
        ValueError: if they do not fit each other, A's rows are dependent, or A x = b contradicts itself.

    Example:
        >>> Affine(torch.tensor([[3.0, 4.0]]), torch.tensor([5.0])).project(torch.tensor([6.0, 8.0]))
        tensor([0.6000, 0.8000])
    """

    A: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        check_rows("Affine", self.A, self.b)
        check_every(self.b.detach().isfinite(), "Affine: b must be finite; look for inf.")
        self._factors()

    def _factors(self) -> tuple[Tensor, Tensor]:
        """W and Q', constants, from the last call if A is the same."""
        key = _memory(self.A)
        kept = self.__dict__.get("_kept")
        if key is not None and kept is not None and kept[0] == key:
            return kept[1]  # type: ignore[no-any-return]
        find = _for_each_b if transformed() else orthonormal_rows
        factors: tuple[Tensor, Tensor] = opaque(find, self.A, self.b, spaces=[2, 1])
        if key is not None:
            object.__setattr__(self, "_kept", (key, factors))
        return factors

    def _check_point(self, x: Tensor) -> None:
        self._need_space(x)
        n = self.A.shape[-1]
        if x.shape[-1] != n:
            raise ValueError(
                f"Affine: x must have shape (*batch, {n}) for A's {n} columns, but it has {tuple(x.shape)}."
            )
        # only the checks are wanted: of dtype, device and batch
        self._fit(self.A, x, "A", (*x.shape[:-1], *self.A.shape[-2:]))
        self._fit(self.b, x, "b", (*x.shape[:-1], self.A.shape[-2]))

    def _project(self, x: Tensor) -> Tensor:
        self._check_point(x)
        W, Q = self._factors()
        return onto_rows(x, self.A, self.b, W, Q)

    def _jacobian(self, x: Tensor) -> LinearOperator:
        self._check_point(x)
        _, Q = self._factors()
        return DiagonalPlusLowRank(torch.ones_like(x), Q if Q.ndim == 2 else Q.expand(*x.shape[:-1], *Q.shape[-2:]))


def onto_rows(x: Tensor, C: Tensor, d: Tensor, W: Tensor, Q: Tensor) -> Tensor:
    """The projection of x onto {C x = d}, whose rows may be zero with d zero as well.

    Args:
        x: shape (*batch, n).
        C: shape (*batch, m, n), which may be differentiated.
        d: shape (*batch, m).
        W: constant, of shape (*batch, m, m).
        Q: W C, with rows that are orthonormal or zero.

    Returns:
        The projection, of x's shape.
    """
    c = times(W, d)
    if differentiated(C):
        rows = W @ C
        gram = rows @ rows.mT
        inverse = torch.linalg.inv(gram + (torch.eye(gram.shape[-1], dtype=Q.dtype, device=Q.device) - Q @ Q.mT))
        p = x - times(rows.mT, times(inverse, times(rows, x) - c))
    else:
        p = x - times(Q.mT, times(Q, x) - c)
    return p - times(Q.mT, times(Q, p.detach()) - c.detach())  # once more, because a far x leaves a rounding error


def times(matrix: Tensor, v: Tensor) -> Tensor:
    """M v for (*batch, m, n) and (*batch, n) whose batches broadcast."""
    return v @ matrix.mT if matrix.ndim == 2 and v.ndim > 1 else (matrix @ v[..., None])[..., 0]


def _memory(tensor: Tensor) -> tuple[Any, ...] | None:
    """What changes when the tensor's memory is written to or exchanged; None where nobody can tell."""
    if tensor.is_inference():
        return None
    try:
        return tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride()
    except RuntimeError:  # the wrapper of a transform has no memory
        return None


@dataclass(frozen=True, eq=False)
class _OneRow(Set):
    """A set of x by the value of one linear function a'x."""

    a: Tensor
    b: float | Tensor = 0.0

    def __post_init__(self) -> None:
        owner = type(self).__name__
        if not isinstance(self.a, Tensor) or not self.a.is_floating_point() or self.a.ndim == 0:
            raise TypeError(f"{owner}: a must be a floating tensor of shape (n,) or (*batch, n).")
        a = self.a.detach()
        check_every(a.isfinite(), f"{owner}: a must be finite; look for NaN and inf.")
        check_every((a != 0).any(-1), f"{owner}: a is zero, and 0'x says nothing of x; pass a normal vector.")
        b = torch.as_tensor(self.b).detach()
        check_every(
            ~(b.isnan() | (b == self._empty())), f"{owner}: no x has a'x = b for b NaN or of the wrong infinity."
        )

    def _empty(self) -> float:
        return -torch.inf

    def _gap(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The unit normal, and how far x is beyond the plane."""
        self._need_space(x)
        a, b = self._fit(self.a, x, "a"), self._fit_item(self.b, x, "b")
        largest = a.detach().abs().amax(-1, keepdim=True)
        scaled = a / largest
        norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
        unit = scaled / norm
        return unit, (unit * x).sum(-1, keepdim=True) - b / largest / norm


@dataclass(frozen=True, eq=False)
class HalfSpace(_OneRow):
    """{x: a'x <= b}.

    P(x) = x - max(a'x - b, 0) a / |a|^2. The Jacobian is I inside and I - a a' / |a|^2 outside; on the boundary the
    point counts as inside.

    Args:
        a: shape (n,) or (*batch, n), not zero.
        b: number, or tensor of shape (*batch,); inf for the whole space.

    Raises:
        TypeError: if a is not a floating tensor with a dimension.
        ValueError: if a is zero or not finite, or b is NaN or -inf.

    Example:
        >>> HalfSpace(torch.tensor([3.0, 4.0]), 5.0).project(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """

    def _project(self, x: Tensor) -> Tensor:
        unit, gap = self._gap(x)
        return torch.where(gap <= 0, x, x - gap * unit)

    def _jacobian(self, x: Tensor) -> LinearOperator:
        unit, gap = self._gap(x)
        outside = torch.where(gap.isnan(), torch.nan, (gap > 0).to(x.dtype)).detach()
        rows = unit.detach().expand_as(x)[..., None, :]
        return DiagonalPlusLowRank(torch.ones_like(x), rows, -outside)


@dataclass(frozen=True, eq=False)
class Hyperplane(_OneRow):
    """{x: a'x = b}.

    P(x) = x - (a'x - b) a / |a|^2, and the Jacobian is I - a a' / |a|^2.

    Args:
        a: shape (n,) or (*batch, n), not zero.
        b: number, or tensor of shape (*batch,).

    Raises:
        TypeError: if a is not a floating tensor with a dimension.
        ValueError: if a is zero, or a or b is not finite.

    Example:
        >>> Hyperplane(torch.tensor([3.0, 4.0]), 5.0).project(torch.tensor([0.0, 0.0]))
        tensor([0.6000, 0.8000])
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check_every(torch.as_tensor(self.b).detach().isfinite(), "Hyperplane: b must be finite; look for inf.")

    def _project(self, x: Tensor) -> Tensor:
        unit, gap = self._gap(x)
        return x - gap * unit

    def _jacobian(self, x: Tensor) -> LinearOperator:
        unit, _ = self._gap(x)
        return DiagonalPlusLowRank(torch.ones_like(x), unit.detach().expand_as(x)[..., None, :])
