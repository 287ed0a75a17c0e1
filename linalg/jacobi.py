"""Jacobi and block Jacobi: preconditioners that invert the diagonal, or diagonal blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import optree
import torch
from jaxtyping import Float
from torch import Tensor

from .diagonal import hutchinson_diagonal
from .matrices import Dense, Diagonal, Identity
from .operator import LinearOperator, Scaled, Shifted, Sum
from .preconditioner import Preconditioner
from .probes import Estimate
from .tree import Ravel

__all__ = ["BlockJacobi", "Jacobi", "leaf_blocks", "module_blocks"]


class Jacobi(Preconditioner):
    """Divide by the diagonal: P = 1 / (diag(A) + shift).

    The diagonal is read off where A is Dense, Diagonal or made of such by sums, factors and shifts; else it is given,
    or estimated by `hutchinson_diagonal` or `xdiag`. Noise in an estimate makes a preconditioner worse than none, so
    each entry is drawn towards the mean by its measured error e_i: with S the variance over the entries less the mean
    of e_i^2, the deviation from the mean is kept by S / (S + e_i^2) (empirical Bayes). An entry that is still not
    positive is refused, or raised to `floor` times the largest one and counted in `raised`. Useful where variables have
    different scales.

    Cost: no product where the diagonal is known, else `products` a system; n operations to apply.

    Args:
        A: operator promised symmetric.
        diagonal: of A, (*batch, n), where it is known; None to read or estimate it.
        shift: P is for A + shift I.
        products: for the estimate, a system; n or more give the exact diagonal by products with unit vectors.
        estimator: `hutchinson_diagonal`, for matrices whose diagonal stands out, or `xdiag`, for nearly low rank.
        floor: None to refuse entries that are not positive; a number, such as 1e-3, to raise every entry of diag(A) +
            shift that is below floor times the largest one.
        generator: of the estimate; None for a new one with seed 0.

    Attributes:
        diagonal: of A, as read, given, or estimated and drawn towards its mean, (*batch, n).
        raised: how many entries the floor raised, all systems together.
        products: spent in building.

    Raises:
        TypeError: if A is not promised symmetric.
        ValueError: if an entry is not positive (without a floor) or not finite, or an argument does not fit.

    Reference:
        Bekas, Kokiopoulou & Saad 2007, An estimator for the diagonal of a matrix; the shrinkage: Efron & Morris 1973.

    Example:
        >>> from nestopt.linalg import CG, Dense
        >>> A = Dense(torch.tensor([[1e6, 1.0], [1.0, 2.0]], dtype=torch.float64), symmetric=True, definite=True)
        >>> Jacobi(A) @ torch.tensor([1e6, 4.0], dtype=torch.float64)
        tensor([1., 2.], dtype=torch.float64)
    """

    def __init__(
        self,
        A: LinearOperator,
        *,
        diagonal: Float[Tensor, "*batch n"] | None = None,
        shift: float | Tensor = 0.0,
        products: int = 30,
        estimator: Callable[..., Estimate] = hutchinson_diagonal,
        floor: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(A, shift)
        if floor is not None and not 0 < floor < 1:
            raise ValueError(f"Jacobi: floor must be between 0 and 1, or None, but got {floor}; use e.g. 1e-3.")
        self.floor = floor
        if diagonal is None:
            with torch.no_grad():
                diagonal, self.products = _diagonal(A, partial(estimator, products=products, generator=generator))
        elif diagonal.shape != A.shape[:-1] or diagonal.dtype != A.dtype or diagonal.device != A.device:
            raise ValueError(
                f"Jacobi: diagonal must have shape {tuple(A.shape[:-1])}, dtype and device of {A!r}, but got "
                f"{tuple(diagonal.shape)}, {diagonal.dtype} on {diagonal.device}."
            )
        self.diagonal = diagonal.detach()
        self._prepare()

    def _prepare(self) -> None:
        d = self.diagonal + self.sigma[..., None]
        if not bool(torch.isfinite(d).all()):
            raise ValueError("Jacobi: the diagonal is not finite; look for NaN or inf in A.")
        self.raised = 0
        if self.floor is not None:
            least = self.floor * d.amax(-1, keepdim=True)
            self.raised = int((d < least).sum())
            d = torch.maximum(d, least)
        bad = int((d <= 0).sum())
        if bad:
            raise ValueError(
                f"Jacobi: {bad} of {d.numel()} entries of the diagonal are not positive (least {float(d.min()):.1e}); "
                "spend more products on its estimate, add a shift, or raise them with floor=1e-3."
            )
        self._inverse = d.reciprocal()

    def _matvec(self, v: Tensor) -> Tensor:
        return self._inverse * v


def _diagonal(A: LinearOperator, estimate: Callable[[LinearOperator], Estimate]) -> tuple[Tensor, int]:
    """The diagonal, read off as far as it is known, and the products spent."""
    if isinstance(A, Dense):
        return A.matrix.diagonal(dim1=-2, dim2=-1), 0
    if isinstance(A, Diagonal):
        return A.diagonal, 0
    if isinstance(A, Identity):
        return torch.ones(A.shape[:-1], dtype=A.dtype, device=A.device), 0
    if isinstance(A, Shifted):
        inner, spent = _diagonal(A.operator, estimate)
        return inner + A.sigma[..., None], spent
    if isinstance(A, Scaled):
        inner, spent = _diagonal(A.operator, estimate)
        return A.factor * inner, spent
    if isinstance(A, Sum) and all(isinstance(part, Dense | Diagonal | Identity) for part in A.parts):
        left, right = (_diagonal(part, estimate)[0] for part in A.parts)
        return left + right, 0
    found = estimate(A)
    mean, noise = found.value.mean(-1, keepdim=True), found.standard_error**2
    signal = (found.value.var(-1, keepdim=True) - noise.mean(-1, keepdim=True)).clamp_min(0)
    kept = torch.where(noise == 0, 1, signal / (signal + noise))
    return mean + kept * (found.value - mean), found.products


def _block(A: LinearOperator, index: Tensor, chunk_size: int) -> Tensor:
    """The rows and columns `index` of A, (*batch, s, s), by s products."""
    n, batch = A.shape[-1], A.batch_shape
    columns = []
    for part in torch.split(index, chunk_size):
        unit = torch.zeros(len(part), n, dtype=A.dtype, device=A.device)
        unit[torch.arange(len(part), device=A.device), part] = 1
        unit = unit.reshape(len(part), *(1,) * len(batch), n).expand(len(part), *batch, n)
        columns.append(A._matvec(unit)[..., index])
    block = torch.cat(columns).movedim(0, -1)
    return (block + block.mT) / 2


def leaf_blocks(into: Ravel) -> dict[str, Tensor]:
    """One block for each tensor of a pytree.

    Args:
        into: the operator's Ravel, such as `Hessian(...).into`.

    Returns:
        The name and the indices of each tensor's entries in the raveled vector.
    """
    return _blocks(into, lambda path: path)


def module_blocks(into: Ravel) -> dict[str, Tensor]:
    """One block for each module: the parameters `net.0.weight` and `net.0.bias` together.

    Args:
        into: the Ravel of a module's parameters, or of any tree, whose tensors are then grouped by their container.

    Returns:
        The name and the indices of each module's parameters in the raveled vector.

    Example:
        >>> into = Ravel.of(torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 2)), "params")
        >>> {name: index.tolist() for name, index in module_blocks(into).items()}
        {'0': [0, 1], '1': [2, 3, 4, 5]}
    """
    return _blocks(into, lambda path: path[:-1])


def _blocks(into: Ravel, owner: Any) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {}
    start = 0
    for entries, shape in zip(optree.treespec_paths(into.treespec), into.shapes, strict=True):
        path = [step for entry in entries for step in str(entry).split(".")]
        parts.setdefault(".".join(owner(path)) or into.name, []).append(torch.arange(start, start + shape.numel()))
        start += shape.numel()
    return {name: torch.cat(indices) for name, indices in parts.items()}


class BlockJacobi(Preconditioner):
    """Invert diagonal blocks of A, such as those of a network's modules: P = sum_i E_i (A_ii + shift I)^-1 E_i'.

    Each block is built by products with its unit vectors, a chunk at a time, and diagonalised once, so that another
    shift costs nothing. All blocks together cost n products a system: it pays where it is reused, for a sequence of
    operators that change slowly or for many right-hand sides.

    Cost: n products a system, and sum s_i^3 operations and s_i^2 memory for blocks of size s_i, to build; 2 sum s_i^2
    operations to apply.

    Args:
        A: operator promised symmetric.
        blocks: sizes of consecutive blocks; or names with the indices of each block, that together are 0 to n - 1: see
            `leaf_blocks` and `module_blocks`, which take the `into` of a Hessian or GaussNewton.
        shift: P is for A + shift I.
        max_size: a larger block is refused, before any product.
        chunk_size: unit vectors in one product.

    Attributes:
        sizes: of the blocks, by name.
        products: spent in building.

    Raises:
        TypeError: if A is not promised symmetric.
        ValueError: if the blocks are no partition of the variables, one is larger than max_size, not finite, or not
            positive definite with the shift.

    Example:
        >>> from nestopt.linalg import Dense
        >>> A = Dense(torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 4.0]]), symmetric=True)
        >>> BlockJacobi(A, [2, 1]) @ torch.tensor([3.0, 3.0, 4.0])
        tensor([1.0000, 1.0000, 1.0000])
    """

    def __init__(
        self,
        A: LinearOperator,
        blocks: Sequence[int] | Mapping[str, Tensor],
        *,
        shift: float | Tensor = 0.0,
        max_size: int = 2048,
        chunk_size: int = 64,
    ) -> None:
        super().__init__(A, shift)
        if max_size < 1 or chunk_size < 1:
            raise ValueError(
                f"BlockJacobi: max_size and chunk_size must be at least 1, but got {max_size} and {chunk_size}."
            )
        index = _partition(A, blocks)
        self.sizes = {name: len(part) for name, part in index.items()}
        for name, size in self.sizes.items():
            if size > max_size:
                raise ValueError(
                    f"BlockJacobi: block {name!r} has {size} variables, above max_size={max_size}, and would take "
                    f"{size**2 * torch.finfo(A.dtype).bits // 8 / 2**20:.0f} MiB; split it, raise max_size, or use "
                    "Kronecker or Nystrom."
                )
        self._index = index
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}
        with torch.no_grad():
            for name, part in index.items():
                block = _block(A, part, chunk_size)
                if not bool(torch.isfinite(block).all()):
                    raise ValueError(f"BlockJacobi: block {name!r} is not finite; look for NaN or inf in A.")
                self._pairs[name] = torch.linalg.eigh(block)
        self.products = A.shape[-1] * A.batch_shape.numel()
        self._prepare()

    def _prepare(self) -> None:
        for name, (values, _) in self._pairs.items():
            self._curved(values.amin(-1) + self.sigma, f"the smallest eigenvalue of block {name!r} plus shift")

    def _matvec(self, v: Tensor) -> Tensor:
        out = torch.empty_like(v)
        for name, part in self._index.items():
            values, vectors = self._pairs[name]
            basis = Dense(vectors)
            out[..., part] = basis._matvec(basis._rmatvec(v[..., part]) / (values + self.sigma[..., None]))
        return out


def _partition(A: LinearOperator, blocks: Sequence[int] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    n = A.shape[-1]
    if isinstance(blocks, Mapping):
        index = {name: torch.as_tensor(part, device=A.device) for name, part in blocks.items()}
        covered = torch.cat(list(index.values())).sort().values if index else torch.arange(0)
    else:
        sizes = [int(size) for size in blocks]
        if any(size < 1 for size in sizes) or sum(sizes) != n:
            raise ValueError(
                f"BlockJacobi: the sizes of blocks must be positive and add up to n = {n}, but got {sizes}."
            )
        covered = torch.arange(n, device=A.device)
        index = {str(i): part for i, part in enumerate(torch.split(covered, sizes))}
    if covered.shape != (n,) or not bool((covered == torch.arange(n, device=A.device)).all()):
        raise ValueError(f"BlockJacobi: the indices of blocks must be 0 to {n - 1}, each once; see module_blocks.")
    return index
