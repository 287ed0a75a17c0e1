"""Least squares and systems of any shape by Golub-Kahan bidiagonalisation, damped or not, many columns at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .krylov import PENDING, Krylov, KrylovState, choose
from .operator import LinearOperator
from .result import Status, any_of, evolve, is_running, scalar_or_tensor
from .solver import Solution, default_rtol, measure

__all__ = ["LSMR", "LeastSquaresSolution"]


@dataclass(frozen=True, kw_only=True)
class LeastSquaresSolution(Solution):
    """A Solution that also knows the residual of the normal equations.

    Attributes:
        normal_residual_norm: |A'(b - A x) - damping^2 x| at x, measured; a float, or a tensor over columns.
    """

    normal_residual_norm: Any


@dataclass(frozen=True, kw_only=True)
class LSMRState(KrylovState):
    """Where a run of LSMR stands; every tensor is per column, in the notation of Fong & Saunders.

    What is bidiagonalised is [A; damping I] M, so u has two parts when there is damping: (*columns, m) or
    (*columns, m + n).
    """

    u: Tensor
    v: Tensor
    z: Tensor  # M v
    h: Tensor  # directions of x
    h_bar: Tensor
    past: Tensor  # (*columns, 13): the scalars that go from step to step, named in `step`
    size: Tensor  # lower bound of |A|
    ratio: Tensor  # |M'A'r| / |A'r| where the process began: what the recurrence knows to what is wanted
    enough: Tensor  # |b - A x| that solves a system
    residual_norm: Tensor  # both as they were last measured
    normal_residual_norm: Tensor


@dataclass(frozen=True)
class LSMR(Krylov[LSMRState]):
    """Solve min |A x - b|^2 + damping^2 |x|^2 for A of any shape (m, n), square or not, of any rank.

    Golub-Kahan bidiagonalisation of A, and MINRES on the normal equations without forming them: |A'r - damping^2 x|,
    with r = b - A x, falls in every step, and so does |r|. The condition number is not squared in what can be reached,
    only in the number of steps. From x0 = 0 the solution is that of minimum length, whatever the rank. All columns of b
    run at once; one that has ended is frozen.

    CONVERGED is measured by fresh products with A and A', and means |b - A x| <= max(rtol |b|, atol) for a system,
    which is square A without damping. For a least-squares problem, any other, it means |A'(b - A x) - damping^2 x| <=
    max(rtol |A| |(b - A x, damping x)|, atol), with |A| a lower bound that the run has seen, or, without damping,
    |b - A x| <= rtol |b|. (`Normal` holds the former against rtol |A'b|, which is more than this wherever b is fitted
    well.) `error` and `tolerance` are those of the test that applies; `residual_norm` and `normal_residual_norm` are
    both reported. A system without a solution ends as SINGULAR once |A'r| <= 50 eps |A| |r| was measured, with r far
    above rounding: x is then its least-squares solution, of minimum length, and `direction` is r / |r|. A wrong claim
    of the recurrence restarts from the true residual, or ends as STAGNATED when that no longer halves the error.

    Cost: 2 products a step (A and A'), 2 to verify, and for x0 one with A and one with A' more than the first A'b.

    Args:
        rtol: relative tolerance; None for the dtype's (1e-10 in float64, 1e-5 in float32).
        atol: absolute tolerance, in units of b (a system) or of A'b (least squares).
        max_iter: limit of steps; about the condition number's, or the number of distinct singular values.
        preconditioner: of shape (n, n), from the right (x = M y): it should make A M well conditioned, as the inverse
            of R in A = Q R would. Not with damping. For rank-deficient A the length that is least is then |M^-1 x|.
        damping: in units of A, to which singular values are compared; damping^2 is what the normal equations, in units
            of A'A, are shifted by.

    Raises:
        ValueError: for a negative tolerance, limit or damping, or damping together with a preconditioner.

    Reference:
        Fong & Saunders 2011, LSMR (section 2; the estimate of |r|: section 3).

    Example:
        >>> from nestopt.linalg import LSMR, Dense
        >>> A = Dense(torch.tensor([[1.0], [1.0]], dtype=torch.float64))
        >>> b = torch.tensor([1.0, 3.0], dtype=torch.float64)
        >>> sol = LSMR()(A, b)
        >>> round(sol.x.item(), 8), sol.status.name, round(sol.residual_norm, 8)
        (2.0, 'CONVERGED', 1.41421356)
        >>> round(LSMR(damping=2**0.5)(A, b).x.item(), 8)
        1.0
    """

    damping: float = 0.0

    needs_square: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.damping < float("inf"):
            raise ValueError(f"LSMR: damping must be a number >= 0, but got {self.damping}; use e.g. damping=1e-3.")
        if self.damping and self.preconditioner is not None:
            raise ValueError(
                "LSMR: damping and preconditioner exclude each other, because x = M y would be damped as |y|; leave "
                "one of them out."
            )

    def _is_system(self, A: LinearOperator) -> bool:
        """Whether |b - A x| is to vanish; otherwise it is to be least."""
        return A.shape[-1] == A.shape[-2] and not self.damping

    def init(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> LSMRState:
        """The evaluated state at x0.

        Args:
            A: operator (*batch, m, n).
            b: right-hand sides (*sides, *batch, m).
            x0: start (*sides, *batch, n), zero when None.

        Returns:
            The state.
        """
        length, g = A.norm(b), A.T._matvec(b)
        slope = A.norm(g)
        tolerance = (self._rtol(A) * length).clamp_min(self.atol if self._is_system(A) else 0)
        size, products, r = torch.where(length > 0, slope / length, 0), length.numel(), b
        x = torch.zeros_like(g) if x0 is None else torch.where((slope == 0)[..., None], 0, x0)
        if x0 is not None:
            r, g, length, slope, spent = self._residuals(A, b, x, size, torch.ones_like(length, dtype=torch.bool))
            products += spent
        enough = tolerance
        error, tolerance = self._judge(A, x, length, slope, size, enough)
        # no step can be taken from a null vector of A'; a least-squares problem it solves, up to rounding
        stuck = Status.SINGULAR.code if self._is_system(A) else Status.STAGNATED.code
        codes = torch.where(A.norm(g) == 0, stuck, Status.RUNNING.code)
        codes = torch.where(error <= tolerance, Status.CONVERGED.code, codes)
        codes = torch.where(error < torch.inf, codes, Status.NON_FINITE.code)
        count, zero = torch.zeros_like(codes), torch.zeros_like(error)
        state = LSMRState(
            x=x, codes=codes, iterations=count, error=error, tolerance=tolerance, goal=torch.ones_like(error),
            best=error, best_at=count, verified=torch.full_like(error, torch.inf), direction=r, products=products,
            u=self._stack(r, g), v=g, z=g, h=g, h_bar=g, past=torch.stack([zero] * 13, dim=-1), size=size, ratio=zero,
            residual_norm=length, normal_residual_norm=slope, enough=enough,
        )  # fmt: skip
        return self._begin(A, state, r, g)

    def _rtol(self, A: LinearOperator) -> float:
        return default_rtol(A.dtype) if self.rtol is None else self.rtol

    def _judge(
        self, A: LinearOperator, x: Tensor, length: Tensor, slope: Tensor, size: Tensor, enough: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The error and the tolerance of x: those of the system, where it is one or solved as one, or of the slope."""
        if self._is_system(A):
            return length, enough
        whole = torch.hypot(length, self.damping * A.norm(x)) if self.damping else length
        tolerance = (self._rtol(A) * size * whole).clamp_min(self.atol)
        if self.damping:
            return slope, tolerance
        solved = length <= enough
        return torch.where(solved, length, slope), torch.where(solved, enough, tolerance)

    def _stack(self, upper: Tensor, lower: Tensor) -> Tensor:
        """The two parts of a vector that [A; damping I] maps to; only the upper one without damping."""
        return torch.cat([upper, lower], dim=-1) if self.damping else upper

    def _length(self, A: LinearOperator, u: Tensor) -> Tensor:
        m = A.shape[-2]
        return torch.hypot(A.norm(u[..., :m]), A.norm(u[..., m:])) if self.damping else A.norm(u)

    def _residuals(
        self, A: LinearOperator, b: Tensor, x: Tensor, size: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        """The residuals b - A x and A'(b - A x) - damping^2 x by fresh products, their norms' bounds, and the cost."""
        r, length, first = measure(A, x, b, columns)
        image, bound, then = measure(A.T, r, torch.zeros_like(x), columns)  # -A'r
        g = -image - self.damping**2 * x
        hidden = (bound - A.norm(image)) + (length - A.norm(r)) * size  # what rounding hides of r, A' may enlarge
        return r, g, length, A.norm(g) + hidden.clamp_min(0), first + then

    def _begin(self, A: LinearOperator, s: LSMRState, r: Tensor, g: Tensor) -> LSMRState:
        """The state with a new bidiagonalisation from the residual r, of which g is the image."""
        u = self._stack(r, -self.damping * s.x)
        beta = self._length(A, u)
        v = g if self.preconditioner is None else self.preconditioner.T._matvec(g)
        slope = A.norm(v)
        v = v / torch.where(slope > 0, slope, 1)[..., None]
        z = self._precondition(v)
        one, zero = torch.ones_like(beta), torch.zeros_like(beta)
        alpha = slope / torch.where(beta > 0, beta, 1)
        past = (alpha, alpha, one, one, one, zero, slope, zero, beta, zero, one, zero, zero)
        return evolve(
            s, u=u / torch.where(beta > 0, beta, 1)[..., None], v=v, z=z, h=z, h_bar=torch.zeros_like(z),
            past=torch.stack(past, dim=-1), ratio=slope / A.norm(g),
        )  # fmt: skip

    def step(self, A: LinearOperator, b: Tensor, s: LSMRState, look: int = 1) -> LSMRState:
        """One step for every column that is RUNNING.

        Args:
            A: the operator.
            b: right-hand sides.
            s: the state.
            look: verify claims of convergence only at every so many steps.

        Returns:
            The next state.
        """
        running, eps = is_running(s.codes), torch.finfo(A.dtype).eps
        alpha, alpha_bar, rho_old, rho_bar_old, c_bar, s_bar, zeta_bar, zeta_old, *left = s.past.unbind(-1)
        forward, spent = self._multiply(A, s.z, running)
        u = self._stack(forward, self.damping * s.z) - alpha[..., None] * s.u
        beta = self._length(A, u)
        u = u / torch.where(beta > 0, beta, 1)[..., None]
        back, more = self._multiply(A.T, u[..., : A.shape[-2]], running)
        if self.damping:
            back = back + self.damping * u[..., A.shape[-2] :]
        if self.preconditioner is not None:
            back = self.preconditioner.T._matvec(back)
        v = back - beta[..., None] * s.v
        alpha = A.norm(v)
        v = v / torch.where(alpha > 0, alpha, 1)[..., None]
        z = self._precondition(v)
        seen = A.norm(forward) / A.norm(s.z)

        c, sine, rho = _rotate(alpha_bar, beta)
        theta, alpha_bar = sine * alpha, c * alpha
        theta_bar = s_bar * rho
        c_bar, s_bar, rho_bar = _rotate(c_bar * rho, theta)
        zeta, zeta_bar = c_bar * zeta_bar, -s_bar * zeta_bar
        h_bar = s.h - (theta_bar / rho_old * (rho / rho_bar_old))[..., None] * s.h_bar
        x = s.x + (zeta / rho / rho_bar)[..., None] * h_bar
        h = z - (theta / rho)[..., None] * s.h
        norm, left = _residual_norm(c, sine, rho_bar, theta_bar, zeta_old, zeta, left)

        slope = zeta_bar.abs() / s.ratio
        error = norm if self._is_system(A) else slope
        size = torch.where(running, torch.fmax(s.size, seen), s.size)
        claims = norm <= s.goal * s.enough  # `goal` is the share of the tolerance that a claim has to reach
        if not self._is_system(A):
            flat = slope <= s.goal * (self._rtol(A) * size * norm).clamp_min(self.atol)
            claims = flat if self.damping else flat | claims
        top = torch.maximum(torch.hypot(alpha, beta), torch.hypot(rho, theta))  # of A M
        null = slope <= 10 * eps * size * norm
        exhausted = torch.minimum(alpha, beta) <= 10 * eps * top
        blocked = running & ~(torch.minimum(rho, rho_bar) > 0)
        drowned = running & (eps * size * A.norm(x) > 5 * error) if self._is_system(A) else blocked
        moved = running & ~blocked
        past = (alpha, alpha_bar, rho, rho_bar, c_bar, s_bar, zeta_bar, zeta, *left)
        new = evolve(s, x=x, error=error, u=u, v=v, z=z, h=h, h_bar=h_bar, past=torch.stack(past, dim=-1))
        pending = (moved & (claims | null | exhausted)) | blocked | drowned
        codes = torch.where(pending, PENDING, s.codes)
        codes = torch.where(running & ~(rho_bar < torch.inf), Status.NON_FINITE.code, codes)
        s = evolve(choose(moved, new, s), codes=codes, size=size, k=s.k + 1, products=s.products + spent + more)
        if s.k % look == 0 and (look > 1 or any_of(pending)):
            s = self._verify(A, b, s)
        return self._stop_on_plateau(A, s)

    def _verify(self, A: LinearOperator, b: Tensor, s: LSMRState) -> LSMRState:
        """Rule on the claims by what is measured, and restart those that were wrong and may yet gain."""
        pending, eps = s.codes == PENDING, torch.finfo(A.dtype).eps
        if not any_of(pending):
            return s
        r, g, length, slope, spent = self._residuals(A, b, s.x, s.size, pending)
        measured, tolerance = self._judge(A, s.x, length, slope, s.size, s.enough)
        error, tolerance = torch.where(pending, measured, s.error), torch.where(pending, tolerance, s.tolerance)
        ruling = torch.where(error > 0.5 * s.verified, Status.STAGNATED.code, Status.RUNNING.code)
        if self._is_system(A):
            null = slope <= 50 * eps * s.size * length
            null = null & (length > 100 * eps * (s.size * A.norm(s.x) + A.norm(b)))
            ruling = torch.where(null, Status.SINGULAR.code, ruling)
        ruling = torch.where(error <= tolerance, Status.CONVERGED.code, ruling)
        ruling = torch.where(error < torch.inf, ruling, Status.NON_FINITE.code)
        codes = torch.where(pending, ruling, s.codes)
        restart = pending & is_running(codes)
        goal = 0.5 * s.goal * (tolerance / error).clamp_max(1)
        s = evolve(
            s, codes=codes, error=error, tolerance=tolerance, verified=torch.where(pending, error, s.verified),
            goal=torch.where(restart, goal, s.goal), products=s.products + spent,
            direction=torch.where(pending[..., None], r, s.direction),
            residual_norm=torch.where(pending, length, s.residual_norm),
            normal_residual_norm=torch.where(pending, slope, s.normal_residual_norm),
        )  # fmt: skip
        return choose(restart, self._begin(A, s, r, g), s)

    def _finish(self, A: LinearOperator, b: Tensor, s: LSMRState) -> LeastSquaresSolution:
        """Measure both residuals wherever that was not the last thing done; the measurement has the last word."""
        codes = torch.where(s.codes == PENDING, Status.MAX_ITER.code, s.codes)
        unsure = codes != Status.CONVERGED.code
        length, slope, products = s.residual_norm, s.normal_residual_norm, s.products
        error, tolerance = s.error, s.tolerance
        if b.is_cuda or any_of(unsure):
            _, _, first, second, spent = self._residuals(A, b, s.x, s.size, unsure)
            length, slope = torch.where(unsure, first, length), torch.where(unsure, second, slope)
            measured, level = self._judge(A, s.x, length, slope, s.size, s.enough)
            error, tolerance = torch.where(unsure, measured, error), torch.where(unsure, level, tolerance)
            codes, products = torch.where(unsure & (error <= tolerance), Status.CONVERGED.code, codes), products + spent
            codes = torch.where(error < torch.inf, codes, Status.NON_FINITE.code)
        named = codes == Status.SINGULAR.code
        unit = s.direction / A.norm(s.direction)[..., None]
        return LeastSquaresSolution(
            x=s.x, codes=codes, iterations=scalar_or_tensor(s.iterations), error=scalar_or_tensor(error), state=s,
            residual_norm=scalar_or_tensor(length), normal_residual_norm=scalar_or_tensor(slope),
            tolerance=scalar_or_tensor(tolerance), products=products,
            direction=torch.where(named[..., None], unit, 0) if any_of(named) else None,
        )  # fmt: skip


def _rotate(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine and sine of the rotation that takes (a, b) to (r, 0), and r."""
    r = torch.hypot(a, b)
    return a / r, b / r, r


def _residual_norm(
    c: Tensor, sine: Tensor, rho_bar: Tensor, theta_bar: Tensor, zeta_old: Tensor, zeta: Tensor, left: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """|b - A x|, damping included, by the second QR factorisation of section 3, and its five scalars for later."""
    beta_dd, beta_d, rho_d, tau, theta_tilde_old = left
    beta_hat, beta_dd = c * beta_dd, -sine * beta_dd
    c_tilde, s_tilde, rho_tilde = _rotate(rho_d, theta_bar)
    theta_tilde, rho_d = s_tilde * rho_bar, c_tilde * rho_bar
    beta_d = c_tilde * beta_hat - s_tilde * beta_d
    tau = (zeta_old - theta_tilde_old * tau) / rho_tilde
    last = (zeta - theta_tilde * tau) / rho_d
    return torch.hypot(beta_d - last, beta_dd), [beta_dd, beta_d, rho_d, tau, theta_tilde]
