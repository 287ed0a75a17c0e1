"""Sequences of slowly changing systems: a solver that remembers, and steps back where remembering does not help."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from .cg import CG
from .krylov import Krylov
from .operator import LinearOperator
from .result import Status, Stopping, any_of, check_stopping, evolve, iterate, scalar_or_tensor
from .ritz_space import Recorder, RitzInverse, RitzSpace
from .solver import LinearSolver, Solution, default_rtol

__all__ = ["Memory", "Recycled", "RecycledSolution", "RecyclingReport"]

_CLEAR = 0.6  # share of plain steps a digit below which nothing has to be measured again
_WORTH = 0.97  # and below which recycling is worth its memory
_AGED = 10  # recycled solves after which an unclear comparison is made anew
_RETRIED = (Status.MAX_ITER, Status.STAGNATED, Status.BREAKDOWN)  # endings that the preconditioner may be blamed for
_HALFWAY = 0.1  # share of the digits to be gained in half of the expected steps, for a trial to go on
_PATIENCE = 4  # solves before the first new trial after a failed one; doubled by each failure


@dataclass(frozen=True)
class RecyclingReport:
    """What Recycled did in one solve, and why.

    Attributes:
        recycled: whether the remembered space preconditioned this solve (to its end).
        reason: a sentence.
        rank: vectors of the space that was used.
        warm_started: whether the solve began at the last solution, by the solver's own memory.
        rate: steps for each factor e of the residual in this solve, None where it had nothing to do.
        plain_rate: the same of the last solve without recycling.
        products: products with A that were spent, all columns together.
    """

    recycled: bool
    reason: str
    rank: int
    warm_started: bool
    rate: float | None
    plain_rate: float | None
    products: int


@dataclass(frozen=True, kw_only=True)
class RecycledSolution(Solution):
    """A Solution of the wrapped solver, with what recycling did for it.

    Attributes:
        recycling: the report.
        inner: the wrapped solver's own Solution, of the last leg where it took two.
    """

    recycling: RecyclingReport
    inner: Solution

    @property
    def curvature(self) -> tuple[Any, Any] | None:
        """The wrapped solver's Ritz values; None after a solve that recycled, whose operator is preconditioned."""
        return self.inner.curvature


@dataclass
class Memory:
    """What a Recycled solver carries from one call to the next; it belongs to one sequence of systems.

    It can be deep-copied and pickled, and `replace(solver, rtol=...)` shares it.

    Attributes:
        solution: of the last call, to start the next one from.
        space: the Ritz vectors.
        plain_rate: steps for each factor e of the residual, of the last solve without recycling.
        recycled_rate: likewise of the last one with it.
        warm: whether plain_rate was measured from a warm start.
        wait: solves to go before recycling is tried again.
        age: recycled solves since plain_rate was measured.
        patience: the length of the next such pause.
        solves: calls so far.
        resets: how often a system of another shape, dtype or device made it forget.
        report: of the last call.
    """

    solution: Tensor | None = field(default=None, repr=False)
    space: RitzSpace | None = field(default=None, repr=False)
    plain_rate: float | None = None
    recycled_rate: float | None = None
    warm: bool = False
    wait: int = 0
    age: int = 0
    patience: int = _PATIENCE
    solves: int = 0
    resets: int = 0
    report: RecyclingReport | None = None
    key: tuple[Any, ...] | None = field(default=None, repr=False)

    def reset(self) -> None:
        """Forget everything but the count of resets, for a new sequence."""
        resets = self.resets
        for part in fields(Memory):
            setattr(self, part.name, part.default)
        self.resets = resets

    def recognise(self, A: LinearOperator) -> str | None:
        """Forget a space of another shape, dtype or device; count the call.

        Args:
            A: the operator of this call.

        Returns:
            Why there is nothing to recycle, or None.
        """
        key, reason = (A.shape, A.dtype, str(A.device), A.symmetric), None
        if self.key is not None and self.key != key:
            reason = f"forgot a sequence of {tuple(self.key[0])} {self.key[1]} for one of {tuple(A.shape)} {A.dtype}"
            self.reset()
            self.resets += 1
        self.key, self.solves = key, self.solves + 1
        return reason

    def refusal(self) -> str | None:
        """Why this solve is not to recycle, or None."""
        if self.wait:
            return (
                f"recycling did not help; it is tried again after {self.wait} more"
                if self.wait > 1
                else ("a solve without recycling, to compare with")
            )
        if self.space is None:
            return "nothing to recycle yet"
        return None

    def limit(self, digits: Tensor) -> int:
        """The steps that a solve without recycling is expected to take.

        Args:
            digits: factors e by which the residual has to fall, per column.

        Returns:
            A number of steps, beyond any limit where none is known.
        """
        if self.plain_rate is None or not digits.numel():
            return sys.maxsize
        return max(1, math.ceil(self.plain_rate * float(digits.max())))

    def learn(self, rate: float | None, *, tried: bool, lost: bool, warm: bool) -> None:
        """Compare, and decide how the next solves are done.

        Args:
            rate: steps for each factor e of the residual, None where the solve had nothing to do.
            tried: whether it recycled.
            lost: whether it had to go on without.
            warm: whether it began at an x0.
        """
        if not tried:
            self.wait = max(0, self.wait - 1)
            self.age = 0
            if rate is not None:
                self.plain_rate, self.warm = rate, warm
        else:
            self.age += 1
            self.recycled_rate = self.recycled_rate if rate is None else rate
        if self.recycled_rate is None or self.plain_rate is None:
            return
        share = self.recycled_rate / self.plain_rate
        if lost or (self.warm and share > _WORTH):
            self.wait, self.recycled_rate = self.patience, None
            self.patience *= 2
        elif share < _CLEAR:
            self.patience = _PATIENCE
        elif tried and (not self.warm or self.age >= _AGED):
            self.wait = 1

    def state_dict(self) -> dict[str, Any]:
        """All of it, for a checkpoint: tensors and plain values.

        Returns:
            A dict for `load_state_dict`.
        """
        state = {part.name: getattr(self, part.name) for part in fields(Memory)}
        state["space"] = None if self.space is None else dict(vars(self.space))
        state["report"] = None if self.report is None else dict(vars(self.report))
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Args:
            state: what it returned.

        Raises:
            ValueError: if entries are missing or unknown.
        """
        names = {part.name for part in fields(Memory)}
        if set(state) != names:
            wrong = sorted(set(state) ^ names)
            raise ValueError(f"Memory.load_state_dict: expected the entries of state_dict, but {wrong} do not agree.")
        for name in names:
            setattr(self, name, state[name])
        self.space = None if state["space"] is None else RitzSpace(**state["space"])
        self.report = None if state["report"] is None else RecyclingReport(**state["report"])


@dataclass(frozen=True)
class Recycled(LinearSolver):
    r"""Solve a sequence A_i x_i = b_i of slowly changing systems by a Krylov solver that keeps what it has learnt.

    Each solve starts from the last solution where that is nearer than zero, and is preconditioned by the `rank` Ritz
    vectors W that slow it most (see `ritz_space.refine`), found by Rayleigh and Ritz in the products that the solves
    before have formed anyway. Deflated CG multiplies W with the new operator, `rank` products a solve; here the old
    image of W serves, in a form that is definite however stale it is (see `ritz_space.RitzInverse`), so the solver
    stays exact and recycling costs no product at all: only steps, where the space has aged. CG takes positive Ritz
    values; MINRES those of both signs, by magnitude; GMRES singular vectors. A preconditioner that the solver brings
    acts on what W leaves. CONVERGED means what it means for the solver.

    Budget: steps for each factor e of the residual are compared with those of the last solve without recycling, which
    is a warm-started solve and costs nothing extra. A recycled solve that gains next to nothing in half of the steps
    that this predicts, or has not ended after all of them, goes on without recycling; where recycling did not save 3 %
    it pauses for 4, 8, 16, ... solves, from 4 again once it has clearly helped. So over N solves of a sequence on which
    it never helps about log2(N) trials are lost, each at most the steps predicted for one solve and those of the
    restart; no rule can do without a trial, as the next operator may be anything. `solution.recycling` says what was
    done.

    Cost: the solver's products and no other; memory of 2 (rank + window) vectors a system while it solves, 2 rank + 1
    between solves.

    Args:
        solver: CG(...), MINRES(...) or GMRES(...).
        rank: the number of outlying eigenvalues; 10 to 50 are common, and more only cost memory and 6 n rank
            operations a step. 0 leaves the warm start alone.
        window: products held before they are folded into 2 rank Ritz vectors; 0 for 4 rank + 20.
        rtol: replaces the solver's, unless None.
        atol: replaces the solver's, unless None.
        memory: made empty; give one to share it.

    Raises:
        TypeError: if solver is no Krylov solver.
        ValueError: for a negative rank, window or tolerance.

    Reference:
        Saad, Yeung, Erhel & Guyomarc'h 2000 (deflated CG); Parks et al. 2006 (recycling); Stathopoulos & Orginos 2010
        (Ritz vectors from CG); Gratton, Sartenaer & Tshimanga 2011 (preconditioners from Ritz pairs).

    Example:
        >>> from nestopt.linalg import CG, Dense, Recycled
        >>> solver = Recycled(CG(), rank=5)
        >>> d = torch.cat([torch.linspace(1, 2, 20), torch.logspace(2, 4, 5)]).double()
        >>> for i in range(2):
        ...     A = Dense(torch.diag(d + 0.01 * i), symmetric=True, definite=True)
        ...     sol = solver(A, torch.ones(25, dtype=torch.float64))
        >>> sol.converged, sol.recycling.recycled, sol.recycling.rank
        (True, True, 5)
    """

    solver: Krylov[Any]
    rank: int = 20
    window: int = 0
    rtol: float | None = None
    atol: float | None = None
    memory: Memory = field(default_factory=Memory, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Krylov):
            raise TypeError(
                f"Recycled: solver must be a Krylov solver such as CG(), MINRES() or GMRES(), but got "
                f"{type(self.solver).__name__}; other solvers leave nothing to recycle."
            )
        check_stopping("Recycled", self.rtol, 0.0 if self.atol is None else self.atol, 0)
        for name in ("rank", "window"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"Recycled: {name} must be an integer >= 0, but got {value!r}; use e.g. {name}=20.")

    def _check_operator(self, A: LinearOperator) -> None:
        super()._check_operator(A)
        if self.solver.needs_symmetric and not A.symmetric:
            raise TypeError(
                f"{type(self).__name__}: A must be promised symmetric, but {A!r} is not; build it with "
                "symmetric=True, or use Recycled(GMRES())."
            )
        self.solver._check_operator(A)

    def _solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None) -> Solution:
        m, solver = self.memory, self._configured()
        reason = m.recognise(A)
        # while recycling pauses, only what the next trial may need is kept
        window = 0 if not self.rank or m.wait > 1 else self.window or 4 * self.rank + 20
        recorder = Recorder(A, m.space, self.rank, window, definite=isinstance(solver, CG))
        start, own = self._begin(recorder, b, x0)
        reason = reason or m.refusal()
        lost, rank = False, 0
        if reason is None:
            assert m.space is not None
            rank, reason = m.space.W.shape[0], "the remembered space preconditioned the solve"
            M = RitzInverse(A, m.space, solver.preconditioner)
            deflated = replace(solver, preconditioner=M)
            first = deflated.init(recorder, b, start)
            wanted = _digits(A, b, first, first.tolerance)
            limit = min(solver.max_iter, m.limit(wanted))
            last = _advance(deflated, recorder, b, first, -(-limit // 2))
            behind = _digits(A, b, first, torch.minimum(last.best, last.error)) < _HALFWAY * wanted
            if not any_of(behind & (last.codes == Status.MAX_ITER.code)):
                last = _advance(deflated, recorder, b, last, limit // 2)
            solution = deflated._finish(recorder, b, last)
            steps, left = torch.as_tensor(solution.iterations), solver.max_iter - last.k
            failed = torch.stack([solution.codes == status.code for status in _RETRIED]).any(0)
            lost = left > 0 and any_of(failed)
            if lost:
                again = solver.init(recorder, b, solution.x)
                again = evolve(again, products=again.products + solution.products)
                solution = solver._finish(recorder, b, _advance(solver, recorder, b, again, left))
                steps = steps + solution.iterations
                reason = "recycling was no faster than the solve is expected to be without it, and was given up"
        else:
            first = solver.init(recorder, b, start)
            last = _advance(solver, recorder, b, first, solver.max_iter)
            solution = solver._finish(recorder, b, last)
            steps = torch.as_tensor(solution.iterations)
        digits = _digits(A, b, first, torch.as_tensor(solution.error, dtype=b.dtype, device=b.device))
        total = float(digits.sum())
        rate = float(torch.where(digits > 0, steps, 0).sum()) / total if total > 0 else None
        report = RecyclingReport(
            recycled=rank > 0 and not lost, reason=reason, rank=rank, warm_started=own, rate=rate,
            plain_rate=m.plain_rate, products=solution.products,
        )  # fmt: skip
        m.learn(rate, tried=rank > 0, lost=lost, warm=start is not None)
        m.report, m.space = report, recorder.harvest()
        m.solution = torch.where(torch.isfinite(solution.x).all(-1)[..., None], solution.x, 0)
        parts = {part.name: getattr(solution, part.name) for part in fields(Solution)}
        parts["iterations"] = scalar_or_tensor(steps)
        return RecycledSolution(**parts, recycling=report, inner=solution)

    def _configured(self) -> Krylov[Any]:
        changes = {name: getattr(self, name) for name in ("rtol", "atol") if getattr(self, name) is not None}
        return replace(self.solver, **changes) if changes else self.solver

    def _begin(self, A: Recorder, b: Tensor, x0: Tensor | None) -> tuple[Tensor | None, bool]:
        """Where to start, and whether that is the remembered solution."""
        m, own = self.memory, False
        if x0 is None and m.solution is not None and m.solution.shape == b.shape:
            x0, own = m.solution, True
        if x0 is None or not own or not b.numel():
            return x0, False
        norm = A.norm(b)
        x0 = torch.where((norm == 0)[..., None], 0, x0)
        r, bound = A.certified_residual(x0, b)
        # The best multiple is never worse than zero: in the energy for CG (whose steps the residual of a start does not
        # tell: it may be a hundred times |b|, all of it in a few large eigenvectors), in the residual for the others.
        image = b - r
        test = x0 if isinstance(self.solver, CG) else image
        square, overlap = A.vecdot(test, image), A.vecdot(test, b)
        factor = torch.where((square > 0) & (overlap > 0), overlap / square, 0)
        factor = torch.where((bound <= self._tolerance(norm, A)) | ~torch.isfinite(factor), 1, factor)
        noise = bound - A.norm(r)
        r = torch.where((factor == 1)[..., None], r, b - factor[..., None] * image)
        A.known = (r, A.norm(r) + factor * noise)  # init asks for it again, and counts it
        return factor[..., None] * x0, own

    def _tolerance(self, norm: Tensor, A: LinearOperator) -> Tensor:
        solver = self._configured()
        return Stopping(solver.rtol, solver.atol).tolerance(norm, default_rtol(A.dtype))


def _advance(solver: Krylov[Any], A: LinearOperator, b: Tensor, state: Any, steps: int) -> Any:
    """At most so many steps from an evaluated state."""
    look = solver._look(b)
    return iterate(lambda s: solver.step(A, b, s, look), state, max_iter=steps, check_every=look)


def _digits(A: LinearOperator, b: Tensor, first: Any, error: Tensor) -> Tensor:
    """The factors e by which the residual falls from the start, or from |b| where that is less, to the error."""
    digits = (torch.minimum(first.error, A.norm(b)) / error.clamp_min(0.01 * first.tolerance)).log()
    return torch.where((first.error > first.tolerance) & torch.isfinite(digits), digits, 0).clamp_min(0)
