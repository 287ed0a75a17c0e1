"""The randomized Nystrom approximation, as a preconditioner, as an inverse and as a solver."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .lanczos import extreme_eigenvalues
from .operator import LinearOperator
from .preconditioner import Preconditioner, Spectral
from .result import Status, any_of, check_stopping, scalar_or_tensor
from .solver import LinearSolver, Prepared, Solution, default_rtol

__all__ = ["Nystrom", "NystromInverse", "NystromSketch"]


class Nystrom(Spectral):
    """Precondition A + shift I, A symmetric positive semidefinite (*batch, n, n), by a randomized low-rank part of A.

    From products with a random orthonormal W of `rank` columns comes A_hat = (A W) (W'A W)^+ (A W)' = U L U', and
    P = U (L + shift)^-1 U' + (I - U U') / (l_min + shift), l_min the smallest of L. (The papers' preconditioner is
    (l_min + shift) P, which gives the same iterates; P itself is close to the inverse, and equals it at full rank.) The
    condition number of P (A + shift I) is at most (l_min + shift + |A - A_hat|) / shift. Stale, it serves any operator
    that is still close to A, and `with_shift` costs no product.

    With an `rtol`, new columns are added, doubling the rank and keeping the old products, until |A - A_hat|, as Lanczos
    estimates it, is at most rtol shift. Useful where a few tens of eigenvalues stand above the shift; `inverse()` is
    (A_hat + shift I)^-1, for comparisons: as a solver it is only as accurate as A_hat.

    Cost: `products` to build, rank + error_steps a system (and for each doubling as many again), and n rank^2
    operations; 10 n rank operations to apply, n rank numbers of memory.

    Args:
        A: operator promised symmetric, positive semidefinite; WITHOUT the shift.
        rank: columns of W, at most n; the number of eigenvalues above the shift is the best.
        shift: > 0; P is for A + shift I. Where A itself is definite, a shift of the size of its smallest eigenvalue.
        rtol: None to keep the rank; else the largest |A - A_hat| wanted, in units of shift: 1 to 10 is common.
        max_rank: where the doubling ends; None for 8 rank, at most n.
        error_steps: limit of Lanczos steps for the estimate of |A - A_hat|; 0 for none, where rtol is None.
        generator: of W; None for a new one with seed 0.

    Attributes:
        vectors: U', (rank, *batch, n).
        values: L, descending, (rank, *batch).
        tail: l_min.
        error: |A - A_hat|, estimated from below; a number, or a tensor over the batch; None without error_steps.
        condition_bound: (l_min + shift + error) / shift.
        converged: whether error <= rtol shift for all systems; None without rtol.
        products: spent in building, all systems together.

    Raises:
        TypeError: if A is not promised symmetric.
        ValueError: if shift <= 0, rank > n, A has negative curvature or is not finite, or A brings its own inner
            product (sharded vectors, for which `Deflation` works).

    Reference:
        Frangella, Tropp & Udell 2023, Randomized Nystrom preconditioning, Algorithms 2.1 and E.2, Proposition 5.3;
        Tropp, Yurtsever, Udell & Cevher 2017 (the stable form).

    Example:
        >>> from nestopt.linalg import CG, Diagonal
        >>> A = Diagonal(torch.tensor([0.0, 0.0, 0.0, 50.0, 90.0], dtype=torch.float64))
        >>> M = Nystrom(A, rank=3, shift=1e-2)
        >>> CG(preconditioner=M)(A.shift(1e-2), torch.ones(5, dtype=torch.float64)).iterations
        1
    """

    def __init__(
        self,
        A: LinearOperator,
        rank: int,
        *,
        shift: float | Tensor,
        rtol: float | None = None,
        max_rank: int | None = None,
        error_steps: int = 8,
        generator: torch.Generator | None = None,
    ) -> None:
        Preconditioner.__init__(self, A, shift, positive=True)
        n = A.shape[-1]
        limit = min(8 * rank, n) if max_rank is None else max_rank
        if not 1 <= rank <= limit <= n:
            raise ValueError(
                f"Nystrom: 1 <= rank <= max_rank <= n = {n} must hold, but got rank={rank} and max_rank={limit}."
            )
        if error_steps < 0 or (rtol is not None and (not rtol > 0 or error_steps == 0)):
            raise ValueError(
                f"Nystrom: rtol must be > 0 (or None) and have error_steps > 0, but got rtol={rtol} and "
                f"error_steps={error_steps}; use e.g. rtol=10, error_steps=8."
            )
        if A._space() is not None:
            raise ValueError(f"Nystrom: {A!r} brings its own inner product; use Deflation, which keeps to it.")
        generator = _seeded(A, generator)
        self.error: Any = None
        self.converged: bool | None = None
        ranks = [rank]
        while rtol is not None and ranks[-1] < limit:
            ranks.append(min(2 * ranks[-1], limit))
        sketch, spent = None, 0
        with torch.no_grad():
            for columns in ranks:
                sketch = NystromSketch.draw(A, columns, generator, sketch)
                sketch.refuse(self.sigma)
                self._hold(sketch.vectors, sketch.values, sketch.values[-1])
                if error_steps:
                    spent += self._estimate(A, error_steps, generator)
                if rtol is not None:
                    self.converged = bool((torch.as_tensor(self.error, device=A.device) <= rtol * self.sigma).all())
                if self.converged:
                    break
        self.products = self.rank * A.batch_shape.numel() + spent

    def _estimate(self, A: LinearOperator, steps: int, generator: torch.Generator) -> int:
        """Look at A - A_hat, and say what that cost."""
        spectrum = extreme_eigenvalues(
            A - self.approximation(), steps=steps, rtol=0.1, generator=generator, need_lowest=False
        )
        low, high = (torch.as_tensor(end, device=A.device) for end in (spectrum.lowest, spectrum.highest))
        self.error = scalar_or_tensor(torch.maximum(high.abs(), low.abs()))
        return spectrum.products

    @property
    def condition_bound(self) -> Any:
        """(l_min + shift + error) / shift, above the condition number of P (A + shift I); None without an estimate."""
        if self.error is None:
            return None
        error = torch.as_tensor(self.error, dtype=self.dtype, device=self.device)
        return scalar_or_tensor((self.tail + self.sigma + error) / self.sigma)

    def approximation(self) -> LinearOperator:
        """A_hat = U L U', symmetric and positive semidefinite."""
        return _LowRank(self)

    def inverse(self) -> Spectral:
        """(A_hat + shift I)^-1, which counts what A_hat leaves out as zero."""
        return Spectral(self, self.sigma, self.vectors, self.values, torch.zeros_like(self.tail), positive=True)


class _LowRank(LinearOperator):
    """U L U'."""

    def __init__(self, pairs: Spectral) -> None:
        super().__init__(tuple(pairs.shape), pairs.dtype, pairs.device, symmetric=True)
        self.pairs = pairs

    def _matvec(self, v: Tensor) -> Tensor:
        along = self.pairs.coefficients(v)
        return self.pairs.combination(self.pairs._aligned(self.pairs.values, along) * along)


def _seeded(A: LinearOperator, generator: torch.Generator | None) -> torch.Generator:
    return torch.Generator(A.device).manual_seed(0) if generator is None else generator


@dataclass(frozen=True)
class NystromSketch:
    """W and A W with what follows from them, in float64 because the core W'A W is nearly singular by design.

    Attributes:
        W: orthonormal columns, (*batch, n, rank).
        Y: A W.
        vectors: U', (rank, *batch, n), of A's dtype.
        values: L, descending, (rank, *batch), likewise.
        finite: per system, whether A W is.
        lowest: per system, the smallest Rayleigh quotient in the span of W.
        direction: where it was found.
        floor: what of it is rounding.
    """

    W: Tensor
    Y: Tensor
    vectors: Tensor
    values: Tensor
    finite: Tensor
    lowest: Tensor
    direction: Tensor
    floor: Tensor

    @property
    def rank(self) -> int:
        """How many columns it has."""
        return self.W.shape[-1]

    @classmethod
    def draw(
        cls, A: LinearOperator, rank: int, generator: torch.Generator, old: NystromSketch | None = None
    ) -> NystromSketch:
        """The sketch with this many columns, the old ones among them."""
        have = 0 if old is None else old.rank
        shape = (*A.batch_shape, A.shape[-1], rank - have)
        Z = torch.randn(shape, dtype=torch.float64, device=generator.device, generator=generator).to(A.device)
        if old is not None:
            for _ in range(2):  # twice is enough
                Z = Z - old.W @ (old.W.mT @ Z)
        Z = torch.linalg.qr(Z).Q.to(A.dtype)
        image = A._matvec(Z.movedim(-1, 0).contiguous()).movedim(0, -1).double()
        W, Y = Z.double(), image
        if old is not None:
            W, Y = torch.cat([old.W, W], -1), torch.cat([old.Y, Y], -1)
        return cls(W, Y, *_factorise(W, Y, A.dtype))

    def refuse(self, shift: Tensor) -> None:
        """Raise where there is nothing definite to precondition."""
        if not bool(self.finite.all()):
            raise ValueError("Nystrom: a product with A is not finite; look for NaN or inf in A.")
        if bool(self.indefinite(shift).any()):
            raise ValueError(
                f"Nystrom: A + shift I has negative curvature ({float((self.lowest + shift).min()):.2e}) and so no "
                "positive definite preconditioner of this kind; raise shift, or use MINRES."
            )

    def indefinite(self, shift: Tensor) -> Tensor:
        """Which systems A + shift I are proved not to be positive definite."""
        return self.lowest + shift < -self.floor


def _factorise(W: Tensor, Y: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Eigenpairs of A_hat = Y (W'Y)^+ Y', by the shift nu = sqrt(n) eps |W'Y|, and what W saw of the spectrum."""
    n = W.shape[-2]
    finite = torch.isfinite(Y).flatten(-2).all(-1)
    core = torch.where(finite[..., None, None], W.mT @ Y, 0)
    s, V = torch.linalg.eigh((core + core.mT) / 2)
    nu = n**0.5 * torch.finfo(dtype).eps * s.abs().amax(-1)
    # a root of the core by its eigenvalues: Cholesky up to a rotation, but it also shows negative curvature, and lets
    # such directions go where the shift makes up for them
    weak, nu_ = nu[..., None] <= 0, nu[..., None]
    root = torch.where((s < -10 * nu_) | weak, 0, 1 / torch.where(weak, 1, torch.maximum(s + nu_, nu_)).sqrt())
    B = torch.where(finite[..., None, None], Y + nu[..., None, None] * W, 0) @ (V * root[..., None, :])
    U, S, _ = torch.linalg.svd(B, full_matrices=False)
    values = (S**2 - nu_).clamp_min(0).movedim(-1, 0).to(dtype)
    lowest, direction = s[..., 0], (W @ V[..., :1])[..., 0]
    return U.movedim(-1, 0).to(dtype).contiguous(), values, finite, lowest, direction, 10 * nu


@dataclass(frozen=True)
class SketchedInverse(Prepared):
    """The factors of a NystromInverse, kept for many solves with A, which is its own transpose."""

    sketch: NystromSketch

    def solve(self, b: Tensor, x0: Tensor | None = None) -> Solution:
        """Solve A x = b approximately; see NystromInverse."""
        self.solver._check(self.operator, b, x0)
        with torch.no_grad():
            return self.solver._substitute(self, b.detach(), x0)  # type: ignore[attr-defined, no-any-return]

    def solve_transposed(self, b: Tensor, x0: Tensor | None = None) -> Solution:
        """The same, as A is symmetric."""
        return self.solve(b, x0)


@dataclass(frozen=True)
class NystromInverse(LinearSolver):
    """Approximate the solution of A x = b, A symmetric positive semidefinite, by x = (A_hat + shift I)^-1 b.

    A_hat is the randomized Nystrom approximation of `Nystrom`; from an x0, one correction x0 + (A_hat + shift I)^-1
    (b - A x0), and where that enlarges the residual x0 and DIVERGED. With a shift of None the correction is scaled
    so that its residual is the smallest. There is no iteration: the residual |b - A x| is measured, and the outcome
    is CONVERGED only where it is at most max(rtol |b|, atol), which takes a shift below rtol |A| and an A of
    (nearly) that rank; else MAX_ITER. It is here for parity with papers that use it as a hypergradient's inverse:
    as many products spent on CG, with `Nystrom` as a preconditioner where it helps, are better.

    Cost: rank products, once where `prepare` is used, 1 to certify, 1 for x0, 1 for the scale without a shift.

    Args:
        rank: columns of the sketch; at most n are used.
        shift: > 0; the larger, the more stable and the more biased. None for the smallest curvature of the sketch,
            about the largest of those that it leaves out, or for n eps of the largest at full rank.
        rtol: relative tolerance of the claim; None for the dtype's.
        atol: absolute tolerance, in b's units.
        seed: of the sketch.

    Raises:
        ValueError: if rank < 1, shift <= 0 or a tolerance is negative.

    Reference:
        Hataya & Yamada 2023, Nystrom method for accurate and scalable implicit differentiation.

    Example:
        >>> from nestopt.linalg import Diagonal
        >>> A = Diagonal(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
        >>> NystromInverse(rank=3, shift=1e-14)(A, torch.ones(3, dtype=torch.float64)).status.name
        'CONVERGED'
        >>> NystromInverse(rank=2, shift=1e-2)(A, torch.ones(3, dtype=torch.float64)).status.name
        'MAX_ITER'
    """

    rank: int = 20
    shift: float | None = None
    rtol: float | None = None
    atol: float = 0.0
    seed: int = 0

    needs_symmetric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_stopping("NystromInverse", self.rtol, self.atol, 1)
        if self.rank < 1 or (self.shift is not None and not 0 < self.shift < float("inf")):
            raise ValueError(
                f"NystromInverse: rank must be at least 1 and shift > 0, but got rank={self.rank}, shift={self.shift}."
            )

    def prepare(self, A: LinearOperator) -> SketchedInverse:
        """Sketch A by `rank` products, for many solves.

        Args:
            A: the operator.

        Returns:
            The factors, with solve and solve_transposed.

        Raises:
            ValueError: if A brings its own inner product.
        """
        self._check_operator(A)
        if A._space() is not None:
            raise ValueError(f"NystromInverse: {A!r} brings its own inner product, which the sketch would not keep.")
        with torch.no_grad():
            generator = torch.Generator(A.device).manual_seed(self.seed)
            return SketchedInverse(self, A, NystromSketch.draw(A, min(self.rank, A.shape[-1]), generator))

    def _solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None) -> Solution:
        prepared = self.prepare(A)
        solution = self._substitute(prepared, b, x0)
        return replace(solution, products=solution.products + prepared.sketch.rank * A.batch_shape.numel())

    def _substitute(self, prepared: SketchedInverse, b: Tensor, x0: Tensor | None) -> Solution:
        A, sketch = prepared.operator, prepared.sketch
        shift = self._damping(A, sketch)
        norm = A.norm(b)
        tolerance = ((default_rtol(A.dtype) if self.rtol is None else self.rtol) * norm).clamp_min(self.atol)
        zero, products = norm == 0, 0
        r, start = b, torch.zeros_like(b)
        if x0 is not None:
            r, start, products = A.residual(x0, b), x0, norm.numel()
        inverse = Spectral(A, shift, sketch.vectors, sketch.values, torch.zeros_like(sketch.values[0]), positive=True)
        d = inverse._matvec(r)
        if self.shift is None:
            image = A._matvec(d)
            square = A.vecdot(image, image)
            d = (A.vecdot(r, image).clamp_min(0) / torch.where(square > 0, square, 1))[..., None] * d
            products += square.numel()
        x = torch.where(zero[..., None], 0, start + d)
        error = A.certified_residual(x, b)[1]
        products += error.numel() * A.certification_products
        error = torch.where(zero, 0, error)
        codes = torch.where(error <= tolerance, Status.CONVERGED.code, Status.MAX_ITER.code)
        if x0 is not None:
            grown = ~zero & (error > A.norm(r) * (1 + 1e-6)) & (codes != Status.CONVERGED.code)
            x, error = torch.where(grown[..., None], x0, x), torch.where(grown, A.norm(r), error)
            codes = torch.where(grown, Status.DIVERGED.code, codes)
        negative = sketch.indefinite(shift) & (codes != Status.CONVERGED.code)
        codes = torch.where(negative, Status.NEGATIVE_CURVATURE.code, codes)
        unknown = ~sketch.finite | ~torch.isfinite(error)
        codes = torch.where(unknown & ~(zero & sketch.finite), Status.NON_FINITE.code, codes)
        direction = torch.where(negative[..., None], sketch.direction.to(A.dtype), 0) if any_of(negative) else None
        return Solution(
            x=x, codes=codes, iterations=scalar_or_tensor(torch.zeros_like(codes)), error=scalar_or_tensor(error),
            residual_norm=scalar_or_tensor(error), tolerance=scalar_or_tensor(tolerance), products=products,
            direction=direction,
        )  # fmt: skip

    def _damping(self, A: LinearOperator, sketch: NystromSketch) -> Tensor:
        if self.shift is not None:
            return torch.as_tensor(self.shift, dtype=A.dtype, device=A.device)
        top = torch.where(sketch.finite, sketch.values.amax(0), 1)
        floor = (A.shape[-1] * torch.finfo(A.dtype).eps * top).clamp_min(torch.finfo(A.dtype).tiny)
        return floor if sketch.rank == A.shape[-1] else torch.maximum(sketch.values[-1], floor)
