"""Bilevel problems WITH their answers: closed forms, or Newton to the rounding level."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nestopt import bilevel, constrained

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
    y_star: Any = None
    unique: bool = True  # whether the lower solution is, and depends smoothly on x

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
        y_star=torch.ones(2 * n, dtype=DOUBLE),
        unique=False,
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

    return Answered(
        name=f"multimodal (from {start})",
        problem=bilevel.Problem(
            upper, lambda x, y: (x + y) ** 2 + x * torch.sin(x + y) ** 2, upper_set=constrained.Box(0.0, 3.0)
        ),
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


def coupled_equality(n: int) -> Answered:
    """LV-HBA's: y = (y1, y2), one equality that couples both levels; only y2's sum is fixed."""
    e = torch.ones(n, dtype=DOUBLE)
    return Answered(
        name=f"coupled equality (n={n})",
        problem=bilevel.Problem(
            lambda x, y: ((x - y[n:]) ** 2).sum() / 2 + ((y[:n] - e) ** 2).sum() / 2,
            lambda x, y: (y[:n] ** 2).sum() / 2 - x @ y[:n] + y[n:].sum(),
            equality=lambda x, y: (x.sum() + y.sum())[None],
        ),
        x0=torch.zeros(n, dtype=DOUBLE),
        y0=torch.zeros(2 * n, dtype=DOUBLE),
        lower_solution=lambda x: torch.cat([x + 1, (-2 * x.sum() / n - 1) * e]),
        x_star=-0.3 * e,
        y_star=torch.cat([0.7 * e, -0.4 * e]),
        value=n * (0.01 + 0.09) / 2,
        unique=False,
    )


def coupled(n: int, power: int = 1) -> Answered:
    """BiC-GAFFA's: sum x^p + 1'y1 + 1'y2 = 0, p = 1 or 3."""
    e = torch.ones(n, dtype=DOUBLE)
    return Answered(
        name=f"coupled (n={n}, p={power})",
        problem=bilevel.Problem(
            lambda x, y: (y[:n] - 2) @ (x - 1) + ((y[n:] + 3) ** 2).sum(),
            lambda x, y: (y[:n] ** 2).sum() / 2 - x @ y[:n] + y[n:].sum(),
            equality=lambda x, y: ((x**power).sum() + y.sum())[None],
        ),
        x0=torch.zeros(n, dtype=DOUBLE),
        y0=torch.zeros(2 * n, dtype=DOUBLE),
        lower_solution=lambda x: torch.cat([x + 1, -((x**power).sum() + x.sum() + n) / n * e]),
        x_star=e,
        y_star=torch.cat([2 * e, -3 * e]),
        value=0.0,
        unique=False,
    )


def coupled_inequality(start: float, minimum: float, value: float) -> Answered:
    """One variable a level, y = argmin {(y - 2x)^2: y <= x} = x on [0, 3]; several minima."""
    return Answered(
        name=f"coupled inequality (from {start})",
        problem=bilevel.Problem(
            lambda x, y: torch.exp(2 - y) / (2 + torch.cos(4 * x)) + torch.log((4 * x - 2) ** 2 + 1) / 2 + x**2,
            lambda x, y: (y - 2 * x) ** 2,
            upper_set=constrained.Box(0.0, 3.0),
            inequality=lambda x, y: (y - x)[None],
        ),
        x0=torch.tensor(start, dtype=DOUBLE),
        y0=torch.tensor(start, dtype=DOUBLE),
        lower_solution=lambda x: x,
        x_star=torch.tensor(minimum, dtype=DOUBLE),
        y_star=torch.tensor(minimum, dtype=DOUBLE),
        value=value,
    )


def quadratic_equality(n: int, m: int, p: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Answered:
    """F = |y - t|^2/2 + |x - xh|^2/2, f = y'Ay/2 - x'By subject to C y + E x = d: y*(x) = P x + q."""
    g = torch.Generator().manual_seed(seed + 7)
    A = spectrum(n, 10.0, seed)
    B, C, E, d, t, xh = (
        torch.randn(*shape, generator=g, dtype=DOUBLE) for shape in ((m, n), (p, n), (p, m), (p,), (n,), (m,))
    )
    K = torch.cat([torch.cat([A, C.T], 1), torch.cat([C, torch.zeros(p, p, dtype=DOUBLE)], 1)])
    P = torch.linalg.solve(K, torch.cat([B.T, -E]))[:n]
    q = torch.linalg.solve(K, torch.cat([torch.zeros(n, dtype=DOUBLE), d]))[:n]
    x_star = torch.linalg.solve(P.T @ P + torch.eye(m, dtype=DOUBLE), P.T @ (t - q) + xh)
    y_star = P @ x_star + q
    A_, B_, C_, E_, d_, t_, xh_ = (v.to(dtype) for v in (A, B, C, E, d, t, xh))
    return Answered(
        name=f"quadratic with equalities (n={n}, m={m}, p={p}, {str(dtype)[6:]})",
        problem=bilevel.Problem(
            lambda x, y: ((y - t_) ** 2).sum() / 2 + ((x - xh_) ** 2).sum() / 2,
            lambda x, y: y @ A_ @ y / 2 - x @ B_ @ y,
            equality=lambda x, y: C_ @ y + E_ @ x - d_,
        ),
        x0=torch.randn(m, generator=g, dtype=DOUBLE).to(dtype),
        y0=torch.zeros(n, dtype=dtype),
        lower_solution=lambda x: (P @ x.double() + q).to(dtype),
        hypergradient=lambda x: (x.double() - xh + P.T @ (P @ x.double() + q - t)).to(dtype),
        x_star=x_star.to(dtype),
        y_star=y_star.to(dtype),
        value=float(((y_star - t) ** 2).sum() / 2 + ((x_star - xh) ** 2).sum() / 2),
    )


def clipped(n: int, kind: str = "inequality", dtype: torch.dtype = DOUBLE) -> Answered:
    """F = |y - t|^2/2 + |x - xh|^2/2, y* = min(x, u(x)): every second entry is clipped at the solution.

    The limit is u = 1 - x/2 for "inequality" (rows that couple both levels), and u = 1 for "set".
    """
    k = torch.arange(n, dtype=DOUBLE) / n
    on = torch.arange(n) % 2 == 0
    t, xh = torch.where(on, 0.0, 0.2 + k / 10), torch.where(on, 3.0 + k, 0.1)
    slope = 0.5 if kind == "inequality" else 0.0

    def solution(x: Tensor) -> Tensor:
        return torch.minimum(x, 1 - slope * x)

    def hypergradient(x: Tensor) -> Tensor:
        x = x.double()
        return (x - xh + torch.where(x < 1 - slope * x, 1.0, -slope) * (solution(x) - t)).to(dtype)

    # free: (x - t) + (x - xh) = 0; clipped: -slope (1 - slope x - t) + (x - xh) = 0
    x_star = torch.where(on, (xh + slope * (1 - t)) / (1 + slope**2), (t + xh) / 2)
    y_star = solution(x_star)
    t_, xh_ = t.to(dtype), xh.to(dtype)
    coupled = {"inequality": lambda x, y: y + slope * x - 1} if kind == "inequality" else {}
    inside = {"lower_set": constrained.Box(-torch.inf, 1.0)} if kind == "set" else {}
    return Answered(
        name=f"clipped by {kind} (n={n}, {str(dtype)[6:]})",
        problem=bilevel.Problem(
            lambda x, y: ((y - t_) ** 2).sum() / 2 + ((x - xh_) ** 2).sum() / 2,
            lambda x, y: ((y - x) ** 2).sum() / 2,
            **coupled,
            **inside,
        ),
        x0=torch.where(on, 2.0, 0.4).to(dtype),
        y0=torch.zeros(n, dtype=dtype),
        lower_solution=solution,
        hypergradient=hypergradient,
        x_star=x_star.to(dtype),
        y_star=y_star.to(dtype),
        value=float(((y_star - t) ** 2).sum() / 2 + ((x_star - xh) ** 2).sum() / 2),
    )


def weighted_l1(n: int) -> Answered:
    """min over x in [0,1]^n of sum y_i, y = argmin |y - a|^2/2 + sum x_i |y_i|; F* = -1/2, minimisers not unique."""
    a = torch.cat([torch.full((n // 2,), 1.0 / n, dtype=DOUBLE), torch.full((n - n // 2,), -1.0 / n, dtype=DOUBLE)])
    return Answered(
        name=f"weighted l1 (n={n})",
        problem=bilevel.Problem(
            lambda x, y: y.sum(),
            lambda x, y: ((y - a) ** 2).sum() / 2,
            upper_set=constrained.Box(0.0, 1.0),
            lower_prox=lambda x: constrained.L1(x),
        ),
        x0=torch.full((n,), 0.5 / n, dtype=DOUBLE),
        y0=torch.zeros(n, dtype=DOUBLE),
        lower_solution=lambda x: a.sign() * (a.abs() - x).clamp_min(0),
        value=-(n - n // 2) / n,
    )


def lasso(n: int = 30, p: int = 12, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Answered:
    """The penalty of a lasso learnt on held-out rows: x is log lambda, h = exp(x) |y|_1."""
    g = torch.Generator().manual_seed(seed)
    X, Z = torch.randn(n, p, generator=g, dtype=DOUBLE), torch.randn(n, p, generator=g, dtype=DOUBLE)
    w = torch.randn(p, generator=g, dtype=DOUBLE) * (torch.arange(p) < p // 2)
    t = X @ w + torch.randn(n, generator=g, dtype=DOUBLE)
    u = Z @ w + torch.randn(n, generator=g, dtype=DOUBLE)
    G, c = X.T @ X / n, X.T @ t / n

    def path(x: Tensor) -> Tensor:
        """Coordinate descent until nothing moves, then the exact solution on its support and signs."""
        lam, rows, values = float(x.double().exp()), G.tolist(), [0.0] * p
        for _ in range(5000):
            moved = 0.0
            for i, row in enumerate(rows):
                r = float(c[i]) - sum(a * b for a, b in zip(row, values, strict=True)) + row[i] * values[i]
                new = math.copysign(max(abs(r) - lam, 0.0), r) / row[i]
                moved, values[i] = max(moved, abs(new - values[i])), new
            if moved < 1e-15:
                break
        y = torch.tensor(values, dtype=DOUBLE)
        on = y != 0
        y[on] = torch.linalg.solve(G[on][:, on], c[on] - lam * y[on].sign())
        return y

    def hypergradient(x: Tensor) -> Tensor:
        """On the support S: dy_S / dx = -lam G_SS^-1 sign(y_S)."""
        y = path(x)
        on = y != 0
        slope = Z.T @ (Z @ y - u) / n
        return -x.double().exp() * slope[on] @ torch.linalg.solve(G[on][:, on], y[on].sign())

    def upper(x: Tensor, y: Tensor) -> Tensor:
        return ((Z.to(y) @ y - u.to(y)) ** 2).mean() / 2

    return Answered(
        name=f"lasso (n={n}, p={p})",
        problem=bilevel.Problem(
            upper,
            lambda x, y: ((X.to(y) @ y - t.to(y)) ** 2).mean() / 2,
            upper_set=constrained.Box(-6.0, 0.0),
            lower_prox=lambda x: constrained.L1(x.exp()),
        ),
        x0=torch.tensor(-1.0, dtype=dtype),
        y0=torch.zeros(p, dtype=dtype),
        lower_solution=lambda x: path(x).to(dtype),
        value=None,
        hypergradient=lambda x: hypergradient(x).to(dtype),
    )


def kernel_ridge(n: int = 30, seed: int = 0) -> Answered:
    """Log penalty and log width of kernel ridge regression: the lower level is the dual system."""
    g = torch.Generator().manual_seed(seed)
    A, V = torch.rand(n, 2, generator=g, dtype=DOUBLE), torch.rand(n, 2, generator=g, dtype=DOUBLE)
    t, u = ((torch.sin(4 * P.sum(1)) + 0.1 * torch.randn(n, generator=g, dtype=DOUBLE)) for P in (A, V))

    def kernel(P: Tensor, Q: Tensor, x: Tensor) -> Tensor:
        return torch.exp(-((P[:, None] - Q) ** 2).sum(-1) * torch.exp(x[1]))

    def solve(x: Tensor) -> Tensor:
        K = kernel(A, A, x) + torch.exp(x[0]) * torch.eye(n, dtype=DOUBLE)
        return torch.linalg.solve(K, t)

    def hypergradient(x: Tensor) -> Tensor:
        s = x.detach().requires_grad_()
        return torch.autograd.grad(((kernel(V, A, s) @ solve(s) - u) ** 2).mean() / 2, s)[0]

    return Answered(
        name=f"kernel ridge (n={n})",
        problem=bilevel.Problem(
            lambda x, y: ((kernel(V, A, x) @ y - u) ** 2).mean() / 2,
            lambda x, y: y @ (kernel(A, A, x) @ y + torch.exp(x[0]) * y) / 2 - t @ y,
        ),
        x0=torch.tensor([-1.0, 1.0], dtype=DOUBLE),
        y0=torch.zeros(n, dtype=DOUBLE),
        lower_solution=solve,
        hypergradient=hypergradient,
    )


def logistic(n: int = 80, p: int = 6, seed: int = 0) -> Answered:
    """One log penalty of a logistic regression, solved by Newton to the rounding level."""
    g = torch.Generator().manual_seed(seed)
    X, Z = torch.randn(n, p, generator=g, dtype=DOUBLE), torch.randn(n, p, generator=g, dtype=DOUBLE)
    w = torch.randn(p, generator=g, dtype=DOUBLE)
    t = (X @ w + torch.randn(n, generator=g, dtype=DOUBLE) > 0).double()
    u = (Z @ w + torch.randn(n, generator=g, dtype=DOUBLE) > 0).double()

    def loss(features: Tensor, labels: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(features @ y, labels)

    def newton(x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.zeros(p, dtype=DOUBLE)
        for _ in range(50):
            s = torch.sigmoid(X @ y)
            H = X.T @ ((s * (1 - s))[:, None] * X) / n + x.exp() * torch.eye(p, dtype=DOUBLE)
            y = y - torch.linalg.solve(H, X.T @ (s - t) / n + x.exp() * y)
        return y, H

    def hypergradient(x: Tensor) -> Tensor:
        y, H = newton(x)
        slope = Z.T @ (torch.sigmoid(Z @ y) - u) / n
        return -x.exp() * y @ torch.linalg.solve(H, slope)

    return Answered(
        name=f"logistic (n={n}, p={p})",
        problem=bilevel.Problem(lambda x, y: loss(Z, u, y), lambda x, y: loss(X, t, y) + x.exp() * (y**2).sum() / 2),
        x0=torch.tensor(-1.0, dtype=DOUBLE),
        y0=torch.zeros(p, dtype=DOUBLE),
        lower_solution=lambda x: newton(x)[0],
        hypergradient=hypergradient,
    )


SMOOTH = [
    quadratic(1, 1), quadratic(5, 3), quadratic(40, 12, 1e3), quadratic(200, 50, 1e2), sine(1), sine(2), sine(20),
    adversarial(4), adversarial(30),
    multimodal(0.3, 0.38236007476698836, 0.44270572244449974), multimodal(1.2, 1.2151454754759206, 0.199910887700403),
    multimodal(2.9, 2.829641800022212, 1.2434582728208743), ridge(), kernel_ridge(), logistic(),
]  # fmt: skip
NOT_UNIQUE = [merely_convex(1), merely_convex(10), merely_convex(100)]
NONSMOOTH = [weighted_l1(2), weighted_l1(10), weighted_l1(100), lasso()]
COUPLED = [
    coupled_equality(1), coupled_equality(10), coupled_equality(100), coupled(1), coupled(10), coupled(100),
    coupled(10, 3), coupled_inequality(0.3, 0.3007047783295452, 2.654498331390548),
    coupled_inequality(1.2, 1.1626902180407033, 3.5849968897783526),
]  # fmt: skip
CLOSED_FORM = [  # constrained lower levels with a unique solution
    quadratic_equality(1, 1, 1), quadratic_equality(6, 3, 2), quadratic_equality(60, 20, 15),
    clipped(1), clipped(7), clipped(60), clipped(2, "set"), clipped(60, "set"),
]  # fmt: skip
