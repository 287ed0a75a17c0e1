"""What the Krylov solvers share: the run, the test of every claim of convergence, plateaus, and the ending."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from .operator import LinearOperator
from .result import Status, all_of, any_of, check_stopping, evolve, is_running, iterate, scalar_or_tensor
from .solver import LinearSolver, Solution, default_rtol, measure

__all__ = ["PENDING", "STRIDE", "Krylov", "KrylovState", "choose"]

PENDING = -1  # internal code: the recurrence claims convergence, a fresh product has yet to confirm it
STRIDE = 10  # steps between two looks for a plateau


@dataclass(frozen=True, kw_only=True)
class KrylovState:
    """Where a run stands; every tensor is per column."""

    x: Tensor
    codes: Tensor
    iterations: Tensor
    error: Tensor  # of the recurrence, replaced by the measured one whenever there is one
    tolerance: Tensor
    goal: Tensor  # what the recurrence has to reach for a claim: half of the last one after a claim that was wrong
    verified: Tensor  # the measured error at the last claim
    best: Tensor
    best_at: Tensor
    direction: Tensor
    k: int = 0
    products: int = 0


State = TypeVar("State", bound=KrylovState)


def choose(mask: Tensor, new: State, old: State) -> State:
    """Every tensor of `new` in the columns where the mask holds, of `old` elsewhere."""
    if not mask.is_cuda and all_of(mask):
        return new
    changed = {}
    for name, before in vars(old).items():
        after = getattr(new, name)
        if isinstance(after, Tensor) and after is not before:
            changed[name] = torch.where(mask if after.ndim == mask.ndim else mask[..., None], after, before)
    return evolve(new, **changed)


@dataclass(frozen=True)
class Krylov(LinearSolver, Generic[State]):
    """A solver that builds a Krylov space, all columns of b at once; it writes `init` and `step`."""

    rtol: float | None = None
    atol: float = 0.0
    max_iter: int = 1000
    preconditioner: LinearOperator | None = None

    def __post_init__(self) -> None:
        check_stopping(type(self).__name__, self.rtol, self.atol, self.max_iter)

    @abstractmethod
    def init(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> State:
        """The evaluated state at x0 (zero when None)."""

    @abstractmethod
    def step(self, A: LinearOperator, b: Tensor, s: State, look: int = 1) -> State:
        """One step for every column that is RUNNING; claims are verified in every `look`-th step only."""

    def _check_operator(self, A: LinearOperator) -> None:
        super()._check_operator(A)
        M, name = self.preconditioner, type(self).__name__
        if M is None:
            return
        if not isinstance(M, LinearOperator):
            raise TypeError(f"{name}: preconditioner must be a LinearOperator, but got {type(M).__name__}.")
        fits = M.shape[-2:] == (A.shape[-1], A.shape[-1]) and M.batch_shape in (torch.Size(()), A.batch_shape)
        if not fits or M.dtype != A.dtype or M.device != A.device:
            raise ValueError(f"{name}: preconditioner {M!r} must have the shape, dtype and device of A, {A!r}.")
        if self.needs_symmetric and not M.symmetric:
            raise TypeError(f"{name}: preconditioner must be promised symmetric positive definite, but {M!r} is not.")

    def _solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None) -> Solution:
        look = self._look(b)
        state = iterate(
            lambda s: self.step(A, b, s, look), self.init(A, b, x0), max_iter=self.max_iter, check_every=look
        )
        return self._finish(A, b, state)

    def _look(self, b: Tensor) -> int:
        """Looking at the codes synchronises a GPU: there, claims wait for every eighth step."""
        return 8 if b.is_cuda else 1

    def _start(self, A: LinearOperator, b: Tensor, x0: Tensor | None) -> tuple[KrylovState, Tensor]:
        """The shared part of the state at x0, and the residual there."""
        norm = A.norm(b)
        rtol = default_rtol(A.dtype) if self.rtol is None else self.rtol
        tolerance = (rtol * norm).clamp_min(self.atol)
        if x0 is None:
            x, r, error = torch.zeros_like(b), b, norm
        else:
            x = torch.where((norm == 0)[..., None], 0, x0)
            r, error = A.certified_residual(x, b)
        # zero within a bound that is not: rounding alone, nothing to go on with
        lost = torch.where((r == 0).all(-1), Status.STAGNATED.code, Status.RUNNING.code)
        codes = torch.where(error <= tolerance, Status.CONVERGED.code, lost)
        codes = torch.where(error < torch.inf, codes, Status.NON_FINITE.code)
        count = torch.zeros_like(codes)
        state = KrylovState(
            x=x, codes=codes, iterations=count, error=error, tolerance=tolerance, goal=tolerance, best=error,
            best_at=count, verified=torch.full_like(error, torch.inf), direction=torch.zeros_like(b),
            products=0 if x0 is None else error.numel() * A.certification_products,
        )  # fmt: skip
        return state, r

    def _multiply(self, A: LinearOperator, v: Tensor, running: Tensor) -> tuple[Tensor, int]:
        """A v for the running columns, and what it cost."""
        if not v.is_cuda and all_of(running):
            return A._matvec(v), running.numel()
        return A.active_matvec(v, running), int(running.sum()) if A.skips(running) else running.numel()

    def _precondition(self, r: Tensor) -> Tensor:
        return r if self.preconditioner is None else self.preconditioner._matvec(r)

    def _settle(self, A: LinearOperator, b: Tensor, s: State, columns: Tensor) -> tuple[State, Tensor, Tensor]:
        """Measure the true residual of some columns, and rule on those among them that are PENDING.

        A claim that was right is CONVERGED; a wrong one restarts from the true residual, or is STAGNATED when a restart
        has already failed to halve it.

        Returns:
            The state, the true residual, and which columns have to restart.
        """
        pending = s.codes == PENDING
        r, bound, spent = measure(A, s.x, b, columns)
        error = torch.where(columns, bound, s.error)
        # a residual of zero within a bound that is not: the product's own rounding, from which nothing can restart
        spent_out = (error > 0.5 * s.verified) | (r == 0).all(-1)
        ruling = torch.where(spent_out, Status.STAGNATED.code, Status.RUNNING.code)
        ruling = torch.where(error <= s.tolerance, Status.CONVERGED.code, ruling)
        ruling = torch.where(error < torch.inf, ruling, Status.NON_FINITE.code)
        codes = torch.where(pending, ruling, s.codes)
        restart = pending & is_running(codes)
        s = evolve(
            s, codes=codes, error=error, verified=torch.where(pending, error, s.verified),
            goal=torch.where(restart, 0.5 * s.goal, s.goal), products=s.products + spent,
        )  # fmt: skip
        return s, r, restart

    def _stop_on_plateau(self, A: LinearOperator, s: State, improved: Tensor | None = None) -> State:
        """STAGNATED where, over a long window, the best error has not fallen by 1 % nor anything else `improved`."""
        if s.k % STRIDE:
            return s
        better = s.error < 0.99 * s.best
        best_at = torch.where(better if improved is None else better | improved, s.k, s.best_at)
        stale = is_running(s.codes) & (s.k - best_at >= max(50, min(2 * A.shape[-1], 1000)))
        codes = torch.where(stale, Status.STAGNATED.code, s.codes)
        return evolve(s, best=torch.minimum(s.best, s.error), best_at=best_at, codes=codes)

    def _finish(self, A: LinearOperator, b: Tensor, s: State) -> Solution:
        """Measure the residual wherever that was not the last thing done; the measurement has the last word."""
        codes = torch.where(s.codes < 0, Status.MAX_ITER.code, s.codes)  # internal codes: the limit came before a look
        unsure = codes != Status.CONVERGED.code
        error, products = s.error, s.products
        if b.is_cuda or any_of(unsure):
            _, bound, spent = measure(A, s.x, b, unsure)
            error, products = torch.where(unsure, bound, error), products + spent
            codes = torch.where(unsure & (error <= s.tolerance), Status.CONVERGED.code, codes)
            codes = torch.where(error < torch.inf, codes, Status.NON_FINITE.code)
        named = (codes == Status.NEGATIVE_CURVATURE.code) | (codes == Status.SINGULAR.code)
        direction = None
        if any_of(named):
            size = A.norm(s.direction)[..., None]
            direction = torch.where(named[..., None] & (size > 0), s.direction / size, 0)
        return self._solution(
            x=s.x, codes=codes, iterations=scalar_or_tensor(s.iterations), error=scalar_or_tensor(error), state=s,
            residual_norm=scalar_or_tensor(error), tolerance=scalar_or_tensor(s.tolerance), products=products,
            direction=direction,
        )  # fmt: skip

    def _solution(self, **parts: object) -> Solution:
        return Solution(**parts)  # type: ignore[arg-type]
