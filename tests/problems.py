"""Bilevel problems WITH their answers: closed forms, or Newton to the rounding level."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nestopt import bilevel

DOUBLE = torch.float64


@dataclass(frozen=True)
class Answered:
    """A problem, a start, and what is known of it."""

    name: str
    problem: bilevel.Problem
    x0: Any
    y0: Any
    lower_solution: Callable[[Any], Any]
    hypergradient: Callable[[Any], Any] | None = None
    x_star: Any = None
    value: float | None = None
    strong_convexity: float | None = None

    @property
    def easy(self) -> bool:
        """Whether plain gradient steps in x get there soon."""
        return any(word in self.name for word in ("n=1,", "n=5,", "sine", "multimodal", "adversarial (n=4)"))


def spectrum(n: int, condition: float, seed: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    """An SPD matrix with eigenvalues spread evenly in the logarithm from 1 to `condition`."""
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=DOUBLE))
    values = (
        torch.logspace(0, math.log10(condition), n, dtype=DOUBLE)
        if n > 1
        else torch.full((1,), condition, dtype=DOUBLE)
    )
    matrix = (Q * values) @ Q.T
    return ((matrix + matrix.T) / 2).to(dtype)


def quadratic(n: int, m: int, condition: float = 10.0, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Answered:
    """F = y'Ay/2 + (x - xh)'D(x - xh)/2, f = y'Ay/2 - x'By, with m upper and n lower variables."""
    g = torch.Generator().manual_seed(seed + 1)
    A = spectrum(n, condition, seed)
    D = spectrum(m, 3.0, seed + 2)
    B = torch.randn(m, n, generator=g, dtype=DOUBLE) / math.sqrt(n)
    xh = torch.randn(m, generator=g, dtype=DOUBLE)
    solve = torch.linalg.solve(A, B.T)  # A^-1 B'
    x_star = torch.linalg.solve(B @ solve + D, D @ xh)
    A_, D_, B_, xh_ = (t.to(dtype) for t in (A, D, B, xh))

    def upper(x: Tensor, y: Tensor) -> Tensor:
        return y @ A_ @ y / 2 + (x - xh_) @ D_ @ (x - xh_) / 2

    def lower(x: Tensor, y: Tensor) -> Tensor:
        return y @ A_ @ y / 2 - x @ B_ @ y

    y_star = solve @ x_star
    return Answered(
        name=f"quadratic(n={n}, m={m}, condition={condition:g}, {str(dtype)[6:]})",
        problem=bilevel.Problem(upper, lower),
        x0=torch.randn(m, generator=g, dtype=DOUBLE).to(dtype),
        y0=torch.zeros(n, dtype=dtype),
        lower_solution=lambda x: (solve @ x.double()).to(dtype),
        hypergradient=lambda x: (D @ (x.double() - xh) + B @ (solve @ x.double())).to(dtype),
        x_star=x_star.to(dtype),
        value=float(y_star @ A @ y_star / 2 + (x_star - xh) @ D @ (x_star - xh) / 2),
        strong_convexity=float(torch.linalg.eigvalsh(A)[0]),
    )


def merely_convex(n: int) -> Answered:
    """f has no unique minimiser in y2: the implicit function theorem cannot move it, and has to say so."""
    e = torch.ones(n, dtype=DOUBLE)
    return Answered(
        name=f"merely convex (n={n})",
        problem=bilevel.Problem(
            lambda x, y: ((x - y[n:]) ** 2).sum() / 2 + ((y[:n] - e) ** 2).sum() / 2,
            lambda x, y: (y[:n] ** 2).sum() / 2 - x @ y[:n] + 0 * y[n:].sum(),
        ),
        x0=torch.zeros(n, dtype=DOUBLE),
        y0=torch.zeros(2 * n, dtype=DOUBLE),
        lower_solution=lambda x: torch.cat([x, x]),
        x_star=e,
        value=0.0,
    )


def sine(n: int, a: float = 2.0, c: float = 2.0) -> Answered:
    """F = (x - a)^2 + |y - a - c|^2, f = sum sin(x + y_i - c_i)."""
    k = round((2 * a + math.pi / 2) / (2 * math.pi))
    C = -math.pi / 2 + 2 * math.pi * k
    x_star = ((1 - n) * a + n * C) / (1 + n)
    shift = torch.full((n,), c, dtype=DOUBLE)
    return Answered(
        name=f"sine (n={n})",
        problem=bilevel.Problem(
            lambda x, y: (x - a) ** 2 + ((y - a - shift) ** 2).sum(), lambda x, y: torch.sin(x + y - shift).sum()
        ),
        x0=torch.tensor(x_star + 0.3, dtype=DOUBLE),
        y0=C + shift - x_star,
        lower_solution=lambda x: C + shift - x,
        hypergradient=lambda x: 2 * (x - a) - 2 * (C - x - a) * n,
        x_star=torch.tensor(x_star, dtype=DOUBLE),
        value=n * (C - 2 * a) ** 2 / (1 + n),
        strong_convexity=1.0,
    )


def multimodal(start: float, minimum: float, value: float) -> Answered:
    """One upper and one lower variable, y* = -x, an upper level with several minima on [0, 3]."""

    def upper(x: Tensor, y: Tensor) -> Tensor:
        return torch.cos(4 * y + 2) / (1 + torch.exp(2 - 4 * x)) + torch.log((4 * x - 2) ** 2 + 1) / 2

    from nestopt.constrained import Box

    return Answered(
        name=f"multimodal (from {start})",
        problem=bilevel.Problem(upper, lambda x, y: (x + y) ** 2 + x * torch.sin(x + y) ** 2, upper_set=Box(0.0, 3.0)),
        x0=torch.tensor(start, dtype=DOUBLE),
        y0=torch.tensor(-start, dtype=DOUBLE),
        lower_solution=lambda x: -x,
        x_star=torch.tensor(minimum, dtype=DOUBLE),
        value=value,
    )


def ridge(n: int = 40, p: int = 7, seed: int = 0) -> Answered:
    """Ridge regression with one log-penalty a feature, judged on held-out rows; tensors in a dict on both levels."""
    g = torch.Generator().manual_seed(seed)
    X, Z = torch.randn(n, p, generator=g, dtype=DOUBLE), torch.randn(n, p, generator=g, dtype=DOUBLE)
    w = torch.randn(p, generator=g, dtype=DOUBLE)
    t = X @ w + torch.randn(n, generator=g, dtype=DOUBLE)
    u = Z @ w + torch.randn(n, generator=g, dtype=DOUBLE)

    def lower_solution(x: dict[str, Tensor]) -> dict[str, Tensor]:
        ones = torch.ones(n, 1, dtype=DOUBLE)
        full = torch.cat([X, ones], 1)
        penalty = torch.cat([x["log_penalty"].exp(), torch.full((1,), 1e-3, dtype=DOUBLE)])
        solution = torch.linalg.solve(full.T @ full / n + penalty.diag(), full.T @ t / n)
        return {"weight": solution[:p], "bias": solution[p]}

    def hypergradient(x: dict[str, Tensor]) -> dict[str, Tensor]:
        s = x["log_penalty"].detach().requires_grad_()
        y = lower_solution({"log_penalty": s})
        loss = ((Z @ y["weight"] + y["bias"] - u) ** 2).mean() / 2
        return {"log_penalty": torch.autograd.grad(loss, s)[0]}

    return Answered(
        name="ridge, one penalty a feature",
        problem=bilevel.Problem(
            lambda x, y: ((Z @ y["weight"] + y["bias"] - u) ** 2).mean() / 2,
            lambda x, y: (
                ((X @ y["weight"] + y["bias"] - t) ** 2).mean() / 2
                + (x["log_penalty"].exp() * y["weight"] ** 2).sum() / 2
                + 1e-3 * y["bias"] ** 2 / 2
            ),
        ),
        x0={"log_penalty": torch.full((p,), -2.0, dtype=DOUBLE)},
        y0={"weight": torch.zeros(p, dtype=DOUBLE), "bias": torch.zeros((), dtype=DOUBLE)},
        lower_solution=lower_solution,
        hypergradient=hypergradient,
    )


def adversarial(n: int) -> Answered:
    """F = x'Ay, f = -x'Ay + |y|^2/2: y* = A'x, phi = |A'x|^2, least at zero."""
    A = spectrum(n, 10.0, n) @ torch.linalg.qr(spectrum(n, 3.0, n + 1))[0]
    return Answered(
        name=f"adversarial (n={n})",
        problem=bilevel.Problem(lambda x, y: x @ A @ y, lambda x, y: (y**2).sum() / 2 - x @ A @ y),
        x0=torch.ones(n, dtype=DOUBLE),
        y0=torch.zeros(n, dtype=DOUBLE),
        lower_solution=lambda x: A.T @ x,
        hypergradient=lambda x: 2 * A @ A.T @ x,
        x_star=torch.zeros(n, dtype=DOUBLE),
        value=0.0,
        strong_convexity=1.0,
    )
