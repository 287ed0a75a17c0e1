"""Sketch-and-project: random projections onto the solutions of small sketched systems."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .dense import by_columns
from .matrices import Dense
from .operator import LinearOperator, Transposed, power_of_two
from .result import Status, any_of, check_stopping, evolve, is_running, iterate, scalar_or_tensor
from .solver import LinearSolver, Solution, default_rtol, measure

__all__ = ["CountSketch", "Gaussian", "RowBlocks", "Rows", "Sketch", "SketchProject", "SketchSolution", "Sketched"]


@dataclass(frozen=True)
class Sketched:
    """A sketch S (m, s) applied to an operator.

    Attributes:
        image: S'A, of shape (*batch, s, n).
        compress: r -> S'r, from (*sides, *batch, m) to (*sides, *batch, s).
        products: products with A or A' that the image took, all systems together.
    """

    image: Tensor
    compress: Callable[[Tensor], Tensor]
    products: int


class Sketch(ABC):
    """A random distribution of matrices S (m, s), the same S for all systems of a batch unless said otherwise."""

    @abstractmethod
    def draws(self, A: LinearOperator, size: int, generator: torch.Generator) -> Iterator[Sketched]:
        """Endless sketches of A.

        Args:
            A: shape (*batch, m, n).
            size: s, columns of S.
            generator: of random numbers, on A's device.

        Returns:
            An iterator; nothing is computed before it is asked.
        """

    def distinct(self, m: int, size: int) -> int | None:
        """How many different sketches there are in all, None for no end.

        Args:
            m: rows of A.
            size: columns of S.

        Returns:
            The number or None.
        """
        return None


@dataclass(frozen=True)
class Gaussian(Sketch):
    """Independent normal entries: no matrix is hard for it, at the price of s products with A' a sketch.

    Example:
        >>> from nestopt.linalg import Dense, Gaussian
        >>> draw = next(Gaussian().draws(Dense(torch.eye(5)), 2, torch.Generator().manual_seed(0)))
        >>> draw.image.shape, draw.compress(torch.ones(3, 5)).shape, draw.products
        (torch.Size([2, 5]), torch.Size([3, 2]), 2)
    """

    def draws(self, A: LinearOperator, size: int, generator: torch.Generator) -> Iterator[Sketched]:
        """See Sketch; s products with A' each."""
        while True:
            S = torch.randn(size, A.shape[-2], dtype=A.dtype, device=A.device, generator=generator)
            yield _by_products(A, S)


@dataclass(frozen=True)
class CountSketch(Sketch):
    """Every row, with a random sign, added to one of s sums: one pass over a stored matrix, s products for others.

    Example:
        >>> from nestopt.linalg import CountSketch, Dense
        >>> draw = next(CountSketch().draws(Dense(torch.eye(5)), 2, torch.Generator().manual_seed(0)))
        >>> draw.image.abs().sum(0), draw.products
        (tensor([1., 1., 1., 1., 1.]), 1)
    """

    def draws(self, A: LinearOperator, size: int, generator: torch.Generator) -> Iterator[Sketched]:
        """See Sketch; the work of one product each where A is stored, s products with A' where it is not."""
        m, matrix = A.shape[-2], _stored(A)
        while True:
            bucket = torch.randint(size, (m,), device=A.device, generator=generator)
            sign = 2 * torch.randint(2, (m,), device=A.device, generator=generator).to(A.dtype) - 1
            if matrix is None:
                yield _by_products(A, torch.diag(sign).new_zeros(size, m).index_put_((bucket, _arange(A)), sign))
                continue

            def compress(r: Tensor, bucket: Tensor = bucket, sign: Tensor = sign) -> Tensor:
                return r.new_zeros(*r.shape[:-1], size).index_add_(-1, bucket, sign * r)

            yield Sketched(compress(matrix.mT).mT, compress, A.batch_shape.numel())


@dataclass(frozen=True)
class Rows(Sketch):
    """S takes s rows of A without replacement: randomised (block) Kaczmarz.

    They cost nothing where A is stored, and s products with A' where it is not. A store of few sketches may miss a row
    (one in 2^k of them for k halves): RowBlocks misses none.

    Args:
        weighted: take rows with probabilities in the ratio of their squared norms, each system its own; with one row a
            sketch this is the rule whose rate is 1 - sigma_min^2 / |A|_F^2. Needs a stored matrix.

    Example:
        >>> from nestopt.linalg import Dense, Rows
        >>> draw = next(Rows().draws(Dense(torch.eye(5)), 2, torch.Generator().manual_seed(0)))
        >>> draw.image.sum(-1), draw.products
        (tensor([1., 1.]), 0)
    """

    weighted: bool = False

    def draws(self, A: LinearOperator, size: int, generator: torch.Generator) -> Iterator[Sketched]:
        """See Sketch; a TypeError if weighted rows are asked of an operator that is not stored."""
        matrix = _stored(A)
        if self.weighted and matrix is None:
            raise TypeError(
                f"Rows(weighted=True): the norms of the rows need a stored matrix, but got {A!r}; use Dense, Rows() "
                "with uniform weights, or Gaussian()."
            )
        weights = None if matrix is None or not self.weighted else (matrix / _unit(matrix)).square().sum(-1)
        while True:
            # the s first of independent exponential times with these rates: weighted draws without replacement
            times = torch.rand(A.shape[-2], dtype=torch.float64, device=A.device, generator=generator)
            times = -torch.log1p(-times)
            rows = (times if weights is None else times / weights.double()).argsort(-1)[..., :size]
            yield _of_rows(A, rows)


@dataclass(frozen=True)
class RowBlocks(Sketch):
    """A random partition of the rows into blocks of s, drawn once; every pass takes all blocks in another order.

    They cost nothing where A is stored, and s products with A' where it is not. There are only ceil(m / s) of them:
    stored, they are the whole of the work that is not repeated. Blocks that are nearly dependent on each other make it
    slow, which Gaussian sketches never are.

    Example:
        >>> from nestopt.linalg import Dense, RowBlocks
        >>> draws = RowBlocks().draws(Dense(torch.eye(5)), 3, torch.Generator().manual_seed(0))
        >>> sum(next(draws).image.sum(0) for _ in range(RowBlocks().distinct(5, 3)))  # two blocks hold every row once
        tensor([1., 1., 1., 1., 1.])
    """

    def draws(self, A: LinearOperator, size: int, generator: torch.Generator) -> Iterator[Sketched]:
        """See Sketch."""
        m = A.shape[-2]
        blocks = torch.randperm(m, device=A.device, generator=generator).tensor_split(self.distinct(m, size))
        while True:
            for i in torch.randperm(len(blocks), device=A.device, generator=generator).tolist():
                yield _of_rows(A, blocks[i])

    def distinct(self, m: int, size: int) -> int:
        """The number of blocks, ceil(m / s)."""
        return max(1, -(-m // size))


def _stored(A: LinearOperator) -> Tensor | None:
    """The matrix of an operator that has it, None for a matrix-free one."""
    if isinstance(A, Transposed):
        matrix = _stored(A.operator)
        return None if matrix is None else matrix.mT
    return A.matrix if isinstance(A, Dense) else None


def _unit(matrix: Tensor) -> Tensor:
    return power_of_two(matrix.flatten(-2))[..., None, None]


def _arange(A: LinearOperator) -> Tensor:
    return torch.arange(A.shape[-2], device=A.device)


def _by_products(A: LinearOperator, S: Tensor) -> Sketched:
    """S' of shape (s, m), or (s, *batch, m) for a sketch that differs between systems, by products with A'."""
    batch = A.batch_shape
    vectors = S.reshape(S.shape[0], *(1,) * len(batch), -1).expand(-1, *batch, -1) if S.ndim == 2 else S
    image = A.T._matvec(vectors).movedim(0, -2)
    return Sketched(image, Dense(S)._matvec, S.shape[0] * batch.numel())


def _of_rows(A: LinearOperator, rows: Tensor) -> Sketched:
    """The sketch that takes these rows, of shape (s,) or (*batch, s)."""
    matrix = _stored(A)
    if matrix is None:
        S = torch.zeros(rows.shape[-1], A.shape[-2], dtype=A.dtype, device=A.device)
        return _by_products(A, S.scatter_(-1, rows[:, None], 1.0))
    taken = rows[..., None].expand(*A.batch_shape, rows.shape[-1], A.shape[-1])
    return Sketched(matrix.gather(-2, taken), lambda r: r.gather(-1, rows.expand(*r.shape[:-1], rows.shape[-1])), 0)


@dataclass(frozen=True)
class _Factor:
    """A sketched system, ready to be projected onto."""

    image: Dense  # S'A in units of `unit`
    lower: Tensor  # Cholesky factor of its Gram matrix
    unit: Tensor
    compress: Callable[[Tensor], Tensor]

    def correct(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """A'S (S'AA'S)^+ S'r, and whether it cannot exist: where S'A = 0 but S'r is not."""
        short = self.compress(r)
        y = by_columns(lambda columns: torch.cholesky_solve(columns, self.lower), short, self.image.batch_shape)
        empty = self.lower.diagonal(dim1=-2, dim2=-1).amax(-1) < torch.finfo(r.dtype).eps  # of a Gram matrix of zero
        return self.image._rmatvec(y) / self.unit, empty & (short != 0).any(-1)


class _Supply:
    """Fresh sketches, or a store of them in a new random order on every pass; counts what was drawn."""

    def __init__(self, A: LinearOperator, sketch: Sketch, size: int, stored: int | None, seed: int) -> None:
        self.draws = sketch.draws(A, size, torch.Generator(A.device).manual_seed(seed))
        self.order = torch.Generator().manual_seed(seed)  # on the CPU: an index from a GPU would synchronise it
        self.stored = stored
        self.kept: list[_Factor] = []
        self.queue: list[int] = []
        self.products = 0
        self.drawn = 0

    def take(self) -> _Factor:
        if self.stored is None or len(self.kept) < self.stored:
            factor = self._draw()
            if self.stored is not None:
                self.kept.append(factor)
            return factor
        if not self.queue:
            self.queue = torch.randperm(len(self.kept), generator=self.order).tolist()
        return self.kept[self.queue.pop()]

    def _draw(self) -> _Factor:
        sketched = next(self.draws)
        self.products += sketched.products
        self.drawn += 1
        unit = _unit(sketched.image)
        image = sketched.image / unit
        gram = image @ image.mT
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        lower, failed = torch.linalg.cholesky_ex(gram)
        # Where rows depend on each other, a shift at the rounding level stands for the pseudo-inverse: it only damps,
        # and later steps make up for what it left. It is never zero, for the sketch that is.
        info = torch.finfo(gram.dtype)
        shift = (10 * info.eps * diagonal.sum(-1)).clamp_min(info.tiny / info.eps)
        weakest = lower.diagonal(dim1=-2, dim2=-1).square().amin(-1)
        shifted, broken = torch.linalg.cholesky_ex(gram + torch.diag_embed(shift[..., None].expand_as(diagonal)))
        strong = (failed == 0) & (weakest > shift)
        lower = torch.where(strong[..., None, None], lower, shifted)
        lower = torch.where((strong | (broken == 0))[..., None, None], lower, torch.nan)
        return _Factor(Dense(image), lower, unit[..., 0], sketched.compress)


@dataclass(frozen=True)
class SketchState:
    """Where a run stands; every tensor is per column."""

    x: Tensor
    r: Tensor  # b - A x, updated by products with the steps
    velocity: Tensor  # the last step
    codes: Tensor
    iterations: Tensor
    error: Tensor
    goal: Tensor  # where a claim is made: half of the last one after a claim that was wrong
    verified: Tensor  # the measured error at the last claim
    best: Tensor
    best_at: Tensor
    k: int
    products: int


@dataclass(frozen=True, kw_only=True)
class SketchSolution(Solution):
    """A Solution of SketchProject, which also counts sketches.

    Attributes:
        sketches: how many were drawn and factorised; steps beyond that used stored ones.
    """

    sketches: int


@dataclass(frozen=True)
class SketchProject(LinearSolver):
    """Solve any consistent A x = b, A of shape (m, n), by projections onto random sketched systems.

    A step draws S (m, s) and takes the nearest solution of S'A x = S'b,

        x <- x + A'S (S'A A'S)^+ S'(b - A x) + momentum (x - x_old),

    for all columns of b at once with the same S; a column that has ended is frozen. The residual is updated by one
    product with the step. From x0 = 0 the limit is the solution of minimum norm. Without momentum the expected squared
    error falls by 1 - lambda_min(E[P]) a step, P being the projector onto the range of A'S: 1 - s / n for an orthogonal
    A. CONVERGED means that a fresh product gave |b - A x| <= max(rtol |b|, atol); a wrong claim goes on from the true
    residual, or ends as STAGNATED when that no longer halves it. STAGNATED is also the end of a long window without
    gain, as for a system without a solution; a sketch with S'A = 0 but S'b not proves that and is SINGULAR. A run whose
    momentum blows it up is DIVERGED.

    Cost: 1 product a step, 1 to verify, 1 for x0; a sketch takes s products with A' where A is matrix-free (for Dense,
    Rows and RowBlocks take none, CountSketch one), and s^2 (n + s/3) operations to factorise; a stored one none.

    Args:
        sketch: the distribution of S; Gaussian() suits any A, Rows() and RowBlocks() stored ones.
        block: s; None for half of min(m, n), rounded up. From a quarter to a half is best: with s = 1 a system takes
            hundreds of times the steps.
        stored: sketches to draw, factorise and then use again in random order; they must reach all unknowns (stored *
            block >= min(m, n)) and take memory of stored * block * n. None draws a fresh one for every step.
        momentum: of the heavy ball, 0 <= momentum < 1; 0.2 to 0.4 saves up to half of the steps of an ill-conditioned
            system and costs some on others; more than 0.6 often diverges.
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in b's units.
        max_iter: limit of steps.
        seed: of the random numbers; two solves with one seed draw the same sketches.

    Raises:
        TypeError: if sketch is no Sketch.
        ValueError: for a size, momentum, tolerance or limit that cannot be meant.

    Reference:
        Gower & Richtarik 2015 (sketch-and-project, theorem 4.6); Strohmer & Vershynin 2009 and Needell & Tropp 2014
        (rows, blocks); Loizou & Richtarik 2020 (momentum); Derezinski, Needell, Rebrova & Yang 2025 (stored factors).

    Example:
        >>> from nestopt.linalg import Dense, SketchProject
        >>> A = Dense(torch.tensor([[2.0, 1.0], [1.0, -3.0]], dtype=torch.float64))
        >>> sol = SketchProject()(A, torch.tensor([4.0, -5.0], dtype=torch.float64))
        >>> [round(x, 6) for x in sol.x.tolist()], sol.status.name, sol.sketches <= 16
        ([1.0, 2.0], 'CONVERGED', True)
    """

    sketch: Sketch = Gaussian()
    block: int | None = None
    stored: int | None = 16
    momentum: float = 0.0
    rtol: float | None = None
    atol: float = 0.0
    max_iter: int = 1000
    seed: int = 0

    needs_square: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_stopping("SketchProject", self.rtol, self.atol, self.max_iter)
        if not isinstance(self.sketch, Sketch):
            raise TypeError(f"SketchProject: sketch must be a Sketch, but got {self.sketch!r}; use e.g. Gaussian().")
        for name, value in (("block", self.block), ("stored", self.stored)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"SketchProject: {name} must be None or an integer >= 1, but got {value!r}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"SketchProject: momentum must be in [0, 1), but got {self.momentum}; use e.g. 0.3.")

    def _sizes(self, A: LinearOperator) -> tuple[int, int | None]:
        """The block size and the number of stored sketches."""
        m, n = A.shape[-2:]
        size = max(1, -(-min(m, n) // 2)) if self.block is None else self.block
        if size > max(m, 1):
            raise ValueError(f"SketchProject: block must be at most the {m} rows of {A!r}, but got {size}.")
        if self.stored is None:
            return size, None
        if self.stored * size < min(m, n):
            raise ValueError(
                f"SketchProject: stored={self.stored} sketches of block={size} reach {self.stored * size} of the "
                f"{min(m, n)} dimensions of {A!r}; store at least {-(-min(m, n) // size)}, or None for fresh ones."
            )
        return size, min(self.stored, self.sketch.distinct(m, size) or self.stored)

    def _solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None) -> SketchSolution:
        size, stored = self._sizes(A)
        supply = _Supply(A, self.sketch, size, stored, self.seed)
        norm = A.norm(b)
        tolerance = ((default_rtol(A.dtype) if self.rtol is None else self.rtol) * norm).clamp_min(self.atol)
        look = 8 if b.is_cuda else 1
        window = max(200, 50 * -(-A.shape[-2] // size))
        s = iterate(
            lambda s: self._step(A, b, s, supply, tolerance, look, window), self._start(A, b, x0, norm, tolerance),
            max_iter=self.max_iter, check_every=look,
        )  # fmt: skip
        unsure = s.codes != Status.CONVERGED.code
        codes, error, products = s.codes, s.error, s.products + supply.products
        if any_of(unsure):
            _, bound, spent = measure(A, s.x, b, unsure)
            error, products = torch.where(unsure, bound, error), products + spent
            codes = torch.where(unsure & (error <= tolerance), Status.CONVERGED.code, codes)
            codes = torch.where(error < torch.inf, codes, Status.NON_FINITE.code)
        return SketchSolution(
            x=s.x, codes=codes, iterations=scalar_or_tensor(s.iterations), error=scalar_or_tensor(error), state=s,
            residual_norm=scalar_or_tensor(error), tolerance=scalar_or_tensor(tolerance), products=products,
            sketches=supply.drawn,
        )  # fmt: skip

    def _start(self, A: LinearOperator, b: Tensor, x0: Tensor | None, norm: Tensor, tolerance: Tensor) -> SketchState:
        x = b.new_zeros(*b.shape[:-1], A.shape[-1])
        r, error, products = b, norm, 0
        if x0 is not None:
            x = torch.where((norm == 0)[..., None], 0, x0)
            r, error, products = measure(A, x, b, torch.ones_like(norm, dtype=torch.bool))
        codes = torch.where(error <= tolerance, Status.CONVERGED.code, Status.RUNNING.code)
        codes = torch.where(error < torch.inf, codes, Status.NON_FINITE.code)
        zero = torch.zeros_like(codes)
        return SketchState(
            x, r, torch.zeros_like(x), codes, zero, error, tolerance, torch.full_like(error, torch.inf), error, zero, 0,
            products,
        )  # fmt: skip

    def _step(
        self, A: LinearOperator, b: Tensor, s: SketchState, supply: _Supply, tolerance: Tensor, look: int, window: int
    ) -> SketchState:
        running = is_running(s.codes)
        correction, impossible = supply.take().correct(s.r)
        codes = torch.where(running & impossible, Status.SINGULAR.code, s.codes)
        running = is_running(codes)
        velocity = torch.where(running[..., None], correction + self.momentum * s.velocity, 0)
        x = s.x + velocity
        r = torch.where(running[..., None], s.r - A.active_matvec(velocity, running), s.r)
        error, k = torch.where(running, A.norm(r), s.error), s.k + 1
        products = s.products + (int(running.sum()) if A.skips(running) else running.numel())
        goal, verified = s.goal, s.verified

        claims = running & (error <= goal)
        if k % look == 0 and (look > 1 or any_of(claims)):
            true, bound, spent = measure(A, x, b, claims)
            ruling = torch.where(bound > 0.5 * verified, Status.STAGNATED.code, Status.RUNNING.code)
            ruling = torch.where(bound <= tolerance, Status.CONVERGED.code, ruling)
            codes, error = torch.where(claims, ruling, codes), torch.where(claims, bound, error)
            r = torch.where(claims[..., None], true, r)
            goal, verified = torch.where(claims, 0.5 * goal, goal), torch.where(claims, bound, verified)
            products += spent
        best_at = torch.where(error < 0.99 * s.best, k, s.best_at)
        ruling = torch.where(error > 1e3 * s.best, Status.DIVERGED.code, Status.STAGNATED.code)
        codes = torch.where(is_running(codes) & (k - best_at >= window), ruling, codes)
        best = torch.where(best_at == k, error, s.best)  # so that many small gains add up to one
        return evolve(
            s, x=x, r=r, velocity=velocity, codes=codes, error=error, goal=goal, verified=verified, best=best,
            best_at=best_at, k=k, products=products,
        )  # fmt: skip
