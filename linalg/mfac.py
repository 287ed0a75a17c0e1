"""M-FAC: exact inverse products, elements and diagonals of a damped empirical Fisher matrix of m gradients."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .mfac_rows import Rows, product, solve_factored
from .operator import LinearOperator
from .result import all_finite
from .tree import Ravel, named_tree

__all__ = ["MFAC", "DampedFisher"]


class DampedFisher(LinearOperator):
    """A damped empirical Fisher matrix F that knows its inverse: what MFAC and BlockMFAC share.

    A subclass writes `_matvec` (F v), `_solve` (F^-1 v), `inverse_diagonal`, `_element` and `_append`.

    Args:
        shape: (*batch, n, n).
        dtype: of the vectors.
        device: of the vectors.
        damping: lam > 0.

    Raises:
        ValueError: if damping is not a finite number > 0.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, damping: float) -> None:
        if not 0 < damping < math.inf:
            raise ValueError(
                f"{type(self).__name__}: damping must be a finite number > 0, but got {damping}: without it F is "
                "singular as soon as m < n; use e.g. damping=1e-5 times the mean square of the gradients."
            )
        super().__init__(shape, dtype, device, symmetric=True, definite=True)
        self.damping = float(damping)

    @property
    def inverse(self) -> LinearOperator:
        """F^-1 as an operator, symmetric positive definite: a preconditioner. It follows later appends to F."""
        return FisherInverse(self)

    def solve(self, v: Tensor) -> Tensor:
        """F^-1 v, direct.

        Args:
            v: shape (*sides, *batch, n).

        Returns:
            A tensor of v's shape.
        """
        self._check(v, self.shape[-1])
        return self._solve(v)

    def inverse_element(self, i: int | Tensor, j: int | Tensor) -> Tensor:
        """[F^-1]_ij, for every pair of two lists of indices, O(m^2) each (O(m) when whitened).

        Args:
            i: index in [0, n), or an integer tensor of them.
            j: likewise; i and j broadcast.

        Returns:
            The elements, of shape (*batch, *indices).

        Raises:
            TypeError: if an index is no integer.
            IndexError: if one is outside [0, n).
        """
        rows, columns = torch.broadcast_tensors(self._index(i, "i"), self._index(j, "j"))  # type: ignore[no-untyped-call]
        values = self._element(rows.reshape(-1), columns.reshape(-1))
        return values.reshape((*self.batch_shape, *rows.shape)).to(self.dtype)

    def append(self, gradient: Any) -> None:
        """Replace the oldest gradient of the window by this one, in place, in O(d m) plus a Cholesky factor when used.

        Args:
            gradient: shape (*batch, n), or a pytree like one sample's where F was made from pytrees.

        Raises:
            TypeError: if F keeps no window: it is whitened, or its gradients are paged.
            ValueError: if the shape, dtype or device does not fit, or an entry is NaN or infinite; F is then unchanged.
        """
        g = self._one(gradient)
        self._check(g, self.shape[-1], "gradient")
        if g.ndim != len(self.batch_shape) + 1:
            raise ValueError(
                f"{type(self).__name__}.append takes one gradient of shape {(*self.batch_shape, self.shape[-1])}, but "
                f"got {tuple(g.shape)}; append several by a loop."
            )
        self._appendable()
        if not all_finite(g):
            raise ValueError(
                f"{type(self).__name__}.append: the gradient has NaN or infinite entries, which would stay for a whole "
                "window; skip it. F is unchanged."
            )
        with torch.no_grad():
            self._append(g.detach())

    def _one(self, gradient: Any) -> Any:
        return gradient

    def _index(self, value: Any, name: str) -> Tensor:
        index = value if isinstance(value, Tensor) else torch.as_tensor(value)
        if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise TypeError(
                f"{type(self).__name__}: {name} must be an integer or a tensor of integers, but got {index.dtype}."
            )
        n = self.shape[-1]
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= n):
            raise IndexError(
                f"{type(self).__name__}: {name} must lie in [0, {n}), but got {int(index.min())} to {int(index.max())}."
            )
        return index.to(self.device, torch.int64)

    @abstractmethod
    def _solve(self, v: Tensor) -> Tensor:
        """F^-1 v for a checked v."""

    @abstractmethod
    def inverse_diagonal(self) -> Tensor:
        """The diagonal of F^-1, of shape (*batch, n)."""

    @abstractmethod
    def _element(self, rows: Tensor, columns: Tensor) -> Tensor:
        """[F^-1]_pq for two flat index tensors, of shape (*batch, k)."""

    @abstractmethod
    def _appendable(self) -> None:
        """Raise TypeError where there is no window."""

    @abstractmethod
    def _append(self, g: Tensor) -> None:
        """Replace the oldest gradient by a checked one."""


class FisherInverse(LinearOperator):
    """F^-1 of a DampedFisher; to_dense, algebra and preconditioning come from LinearOperator."""

    def __init__(self, fisher: DampedFisher) -> None:
        super().__init__(fisher.shape, fisher.dtype, fisher.device, symmetric=True, definite=True)
        self.fisher = fisher

    def _matvec(self, v: Tensor) -> Tensor:
        return self.fisher._solve(v)


class MFAC(DampedFisher):
    r"""F = damping I + (1/m) sum_i g_i g_i' of m gradients, as an operator that knows its inverse.

    With the gradients as rows of G (m, n) and lam = damping, Woodbury's identity through an m x m matrix,

        K = m lam I + G G' = L L',  F^-1 v = (v - G' K^-1 G v) / lam,  [F^-1]_pq = (delta_pq - V[:, p]'V[:, q]) / lam

    with V = L^-1 G, gives in one Cholesky factorisation what the published recursion gives in m rank-one updates. K is
    accumulated in float64 over blocks of columns, whatever the dtype, and no float64 copy of G is made: gradients that
    are nearly parallel lose nothing.

    Two ways to keep it. By default G itself is kept, not copied (do not change it), with the factor of K: for products,
    and as a window that `append` moves on. With `whitened=True` V is kept in place of G: elements then cost O(m), the
    diagonal nothing, and a float32 solve is within 1e-7 of the truth where G, with gradients of correlation 0.9999,
    gives 2e-5. Both are for vectors outside the span of the gradients: along it F^-1 v is smaller than v / lam by the
    factor |g|^2 / (m lam), and as many digits cancel; `solve_newest` avoids that. `MFAC.paged` leaves gradients that do
    not fit where they are, `MFAC.window` starts empty.

    The empirical Fisher matrix is NOT the Hessian, except near a minimum where the model interpolates its data: as its
    replacement use `FisherSolver`, which measures the difference, or take `F.inverse` as a preconditioner of CG, which
    makes the answer exact.

    Cost: n m^2 once; 4 n m a product with F or F^-1 (two passes over G), m^2 an element, n m^2 the diagonal; an append
    2 n m, and m^3 / 3 at the next product.

    Args:
        gradients: one a row, (m, n), or (*batch, m, n) for a batch of matrices, or a pytree (a dict, a module's names)
            of per-sample gradients, leaves (m, *shape), raveled in optree's order. m = 64 to 1024 is common. NaN and
            infinity are refused by row, since one would spoil every product.
        damping: lam; 1e-6 to 1e-3 in the literature. It sets the scale of F^-1 outside the gradients' span, 1 / lam.
        whitened: keep V in place of G.
        width: columns that are moved and converted to float64 at a time; None for 2^18 entries of G on a CPU and 2^24
            on a GPU.

    Attributes:
        samples: m.
        into: the Ravel of one sample's pytree, None for a tensor.

    Raises:
        TypeError: if the gradients are no floating tensors.
        ValueError: if there is no row, a row is not finite, damping is not > 0 or too small for float64, width < 1.

    Reference:
        Frantar, Kurtic & Alistarh 2021, M-FAC, eq. (1) and sections 3.1 and 3.2.

    Example:
        >>> G = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
        >>> F = MFAC(G, damping=0.5)
        >>> F @ torch.ones(3, dtype=torch.float64)
        tensor([1.5000, 2.0000, 0.5000], dtype=torch.float64)
        >>> F.solve(torch.tensor([1.5, 2.0, 0.5], dtype=torch.float64))
        tensor([1.0000, 1.0000, 1.0000], dtype=torch.float64)
        >>> F.inverse_diagonal()[2], F.inverse_element(0, 1)
        (tensor(2., dtype=torch.float64), tensor(-0.4000, dtype=torch.float64))
        >>> F.append(torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64))  # (1, 1, 0) leaves the window
        >>> F.inverse_diagonal()
        tensor([2.0000, 1.0000, 0.4000], dtype=torch.float64)
    """

    def __init__(
        self, gradients: Any, damping: float = 1e-5, *, whitened: bool = False, width: int | None = None
    ) -> None:
        self.into: Ravel | None = None
        if not isinstance(gradients, Tensor):
            gradients = self._ravel(gradients)
        self._build(Rows.of([gradients], None, width, "gradients"), damping, whitened)

    @classmethod
    def paged(
        cls,
        pages: Iterable[Tensor],
        damping: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        whitened: bool = False,
        width: int | None = None,
    ) -> MFAC:
        """From gradients that do not fit where the vectors live: pages stay, and are moved block of columns by block.

        Args:
            pages: tensors (*batch, m_i, n), of any sizes m_i, none dropped; on the CPU, pinned or memory-mapped.
            damping: see MFAC.
            device: of the vectors and the arithmetic; None for the pages' own.
            whitened: keep V on the pages' device in place of the pages.
            width: columns moved at a time; see MFAC.

        Returns:
            The operator on `device`.

        Raises:
            TypeError: if a page is not a floating tensor.
            ValueError: if there is no page, or pages differ in all but m_i; and as for MFAC.

        Example:
            >>> G = torch.arange(6.0).reshape(3, 2)
            >>> F = MFAC.paged([G[:2], G[2:]], damping=0.1, width=1)
            >>> bool(torch.allclose(F.to_dense(), MFAC(G, 0.1).to_dense()))
            True
        """
        self = cls.__new__(cls)
        self.into = None
        self._build(Rows.of(list(pages), device, width, "pages"), damping, whitened)
        return self

    @classmethod
    def window(
        cls,
        m: int,
        n: int,
        damping: float = 1e-5,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> MFAC:
        """An empty window for m gradients: F = damping I until the first append.

        The divisor is m from the start, so that an empty row counts as a zero gradient.

        Args:
            m: gradients that it will hold.
            n: their dimension.
            damping: see MFAC.
            dtype: of the gradients.
            device: likewise.

        Returns:
            The operator, which owns its rows.

        Raises:
            ValueError: if m < 1 or n < 0.
        """
        if m < 1 or n < 0:
            raise ValueError(f"{cls.__name__}.window: m must be at least 1 and n at least 0, but got m={m} and n={n}.")
        F = cls(torch.zeros(m, n, dtype=dtype, device=device), damping)
        F._owned = True
        return F

    def _ravel(self, tree: Any) -> Tensor:
        tree = named_tree(tree)
        stacked = Ravel.of(tree, "gradients")
        sizes = [shape[0] if shape else None for shape in stacked.shapes]
        if None in sizes or len(set(sizes)) > 1:
            raise ValueError(
                f"{type(self).__name__}: the leaves of gradients must have shapes (m, *shape) with one m, the samples, "
                f"but got {[tuple(shape) for shape in stacked.shapes]}; pages of rows go to MFAC.paged."
            )
        shapes = tuple(shape[1:] for shape in stacked.shapes)
        self.into = Ravel(stacked.treespec, shapes, stacked.dtype, stacked.device, "gradient")
        return self.into.join(stacked.leaves(tree))

    def _build(self, rows: Rows, damping: float, whitened: bool) -> None:
        super().__init__((*rows.batch, rows.n, rows.n), rows.dtype, rows.device, damping)
        self.samples, self._slot, self._owned, self._whitened = rows.m, 0, False, whitened
        self._diagonal: Tensor | None = None
        self._factor: Tensor | None = None
        with torch.no_grad():
            self._gram = rows.gram()
            squares = self._gram.diagonal(dim1=-2, dim2=-1)
            if not all_finite(squares):
                bad = (~torch.isfinite(squares)).nonzero().tolist()
                where = [index[0] if len(index) == 1 else tuple(index) for index in bad]
                raise ValueError(
                    f"{type(self).__name__}: the gradients of rows {where[:8]}{' ...' if len(where) > 8 else ''} have "
                    "NaN or infinite entries (or squares); leave those rows out."
                )
            self._rows = rows
            L = self._cholesky()
            if whitened:
                self._rows, diagonal = rows.whiten(L)
                self._diagonal = (diagonal / self.damping).to(self.dtype)

    def _cholesky(self) -> Tensor:
        """L of K = m lam I + G G' = L L', float64, made anew after an append."""
        if self._factor is None:
            K = self._gram.clone()
            K.diagonal(dim1=-2, dim2=-1).add_(self.samples * self.damping)
            L, info = torch.linalg.cholesky_ex(K)
            if bool((info != 0).any()):
                scale = float(self._gram.diagonal(dim1=-2, dim2=-1).amax()) / self.samples
                raise ValueError(
                    f"{type(self).__name__}: damping={self.damping:.1e} is lost in the rounding of float64 beside "
                    f"gradients of mean square norm up to {scale:.1e}; use at least {1e-14 * scale * self.samples:.1e}."
                )
            self._factor = L
        return self._factor

    def _matvec(self, v: Tensor) -> Tensor:
        t = self._rows.times(v)
        if self._whitened:  # G = L V
            L = self._cholesky()
            t = product(L.mT, product(L, t))
        return (self.damping * v + self._rows.combine(t / self.samples)).to(self.dtype)

    def _solve(self, v: Tensor) -> Tensor:
        t = self._rows.times(v)
        if not self._whitened:
            t = solve_factored(self._cholesky(), t)
        return ((v - self._rows.combine(t)) / self.damping).to(self.dtype)

    def solve_newest(self) -> Tensor:
        """F^-1 g for the newest gradient g (the last row), by F^-1 G' = m G' K^-1: one pass, and nothing cancels.

        Returns:
            Shape (*batch, n).
        """
        L = self._cholesky()
        t = L.new_zeros(*self.batch_shape, self.samples)
        t[..., self._slot - 1] = self.samples
        if self._whitened:  # G' K^-1 = V' L^-1
            t = torch.linalg.solve_triangular(L, t[..., None], upper=False)[..., 0]
        else:
            t = solve_factored(L, t)
        return self._rows.combine(t).to(self.dtype)

    def inverse_diagonal(self) -> Tensor:
        """The diagonal of F^-1, of shape (*batch, n), with float64 sums: O(n m^2), or kept when whitened."""
        if self._diagonal is None:
            with torch.no_grad():
                self._diagonal = (self._rows.complement(self._cholesky()) / self.damping).to(self.dtype)
        return self._diagonal

    def _element(self, rows: Tensor, columns: Tensor) -> Tensor:
        with torch.no_grad():
            left, right = self._rows.columns(rows), self._rows.columns(columns)
            if not self._whitened:
                L = self._cholesky()
                left, right = (torch.linalg.solve_triangular(L, side, upper=False) for side in (left, right))
            return ((rows == columns).double() - (left * right).sum(-2)) / self.damping

    def _one(self, gradient: Any) -> Any:
        if self.into is None or isinstance(gradient, Tensor):
            return gradient
        return self.into.flatten(gradient)

    def _appendable(self) -> None:
        if self._whitened or not self._rows.resident:
            kept = "V = L^-1 G" if self._whitened else "pages on another device"
            raise TypeError(
                f"{type(self).__name__}.append: this one keeps {kept}, not a window of gradients; build it from one "
                "tensor with whitened=False, or by MFAC.window."
            )

    def _append(self, g: Tensor) -> None:
        if not self._owned:  # the caller's tensor is never written to
            self._rows, self._owned = self._rows.copy(), True
        self._rows.replace(self._slot, g)
        products = self._products(g)
        self._gram[..., self._slot, :] = products
        self._gram[..., :, self._slot] = products
        self._slot = (self._slot + 1) % self.samples
        self._factor = self._diagonal = None

    def _products(self, g: Tensor) -> Tensor:
        """The row of the Gram matrix of a gradient that has just been written to the window, (*batch, m)."""
        first = self._rows.pages[0][..., 0, :]
        if self._slot == 0 or self.dtype == torch.float64:
            return self._rows.times64(g)
        # A float64 pass costs several readings of G. Row 0 had one, once a turn of the ring; against it the others need
        # only G (g - g_0), which float32 gives to the rounding of the difference: small for gradients of one direction.
        products = self._gram[..., 0] + self._rows.times(g - first)
        wide = g.double()
        products[..., 0] = torch.linalg.vecdot(first.double(), wide)
        products[..., self._slot] = torch.linalg.vecdot(wide, wide)
        return products

    def state_dict(self) -> dict[str, Any]:
        """The window as tensors and numbers, for a checkpoint; from it `load_state_dict` goes on bit for bit."""
        self._appendable()
        return {"rows": self._rows.pages[0], "gram": self._gram, "slot": self._slot, "damping": self.damping}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a window of the same shape.

        Args:
            state: from `state_dict`; it is copied.

        Raises:
            ValueError: if the shape or dtype differs.
        """
        self._appendable()
        rows, own = state["rows"], self._rows.pages[0]
        if rows.shape != own.shape or rows.dtype != own.dtype:
            raise ValueError(
                f"{type(self).__name__}.load_state_dict: the window must be {tuple(own.shape)} of {own.dtype}, but got "
                f"{tuple(rows.shape)} of {rows.dtype}."
            )
        self._rows, self._owned = self._rows.copy(rows.to(self.device)), True
        self._gram = state["gram"].to(self.device, copy=True)
        self._slot, self.damping = int(state["slot"]), float(state["damping"])
        self._factor = self._diagonal = None
