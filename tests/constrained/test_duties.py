"""The ten duties of every layer of constrained that other files do not hold to them: WHERE says who does.

Each case names in `lacks` the duties that mean nothing for it, and why.
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from laws_layer import Case, check_memory, duties
from torch import nn
from torch.func import functional_call

from nestopt import constrained
from nestopt.constrained import (
    L1,
    Affine,
    Ball,
    Box,
    GroupLasso,
    HalfSpace,
    L1Ball,
    LPLayer,
    NuclearNorm,
    Polyhedron,
    ProjectionLayer,
    ProximalLayer,
    PSDCone,
    QPLayer,
    SecondOrderCone,
    Simplex,
    TotalVariation1D,
    solve_lp,
    solve_qp,
)
from nestopt.linalg import Status

D = torch.float64

# Every function and module of constrained that has derivatives of its own, and the file that runs its duties.
WHERE = {
    "solve_qp": "test_qp_derivative.py",  # and here: rows of which all is known, and the smoothed derivative
    "QPLayer": "test_duties.py",
    "solve_lp": "test_duties.py",
    "LPLayer": "test_duties.py",
    "ConvexProgram": "test_convex_program.py",
    "solution": "test_sensitivity.py",
    "composite_argmin": "test_composite.py",
    "CompositeArgminLayer": "test_composite.py",
    "ProjectionLayer": "test_duties.py",
    "ProximalLayer": "test_duties.py",
}


def test_every_layer_is_held_to_its_duties():
    layers = {
        name for name in constrained.__all__
        if isinstance(thing := getattr(constrained, name), type) and issubclass(thing, nn.Module)
    }  # fmt: skip
    assert layers <= set(WHERE)
    for name, file in WHERE.items():
        text = (Path(__file__).parent / file).read_text(encoding="utf-8").replace(f'"{name}"', "")
        assert "duties(" in text, file
        assert len(re.findall(rf"\b{name}\b", text)) > 1, (name, file)  # it is imported, and used


def uniform(g, *shape, low=0.5, high=1.5):
    return low + (high - low) * torch.rand(shape, generator=g, dtype=D)


def normal(g, *shape):
    return torch.randn(shape, generator=g, dtype=D)


NO_FUNCTION = {"check_captured": "takes no function", "check_trees": "takes tensors, not pytrees"}
NO_SCALAR = {"check_zero_dimensions": "its data have dimensions"}
NO_GUESS = {"check_guess": "warm starts are those of test_qp_derivative"}
NO_MODULE = {"check_module": "its module is a case of its own"}
SAME = dict.fromkeys(
    ("check_gradgradcheck", "check_third_order", "check_transforms", "check_certificates", "check_dtype_and_device"),
    "a call of the function with what it holds, whose derivatives are those of the function's case",
)


# Row 0 strictly active, rows 1 and 2 strictly inactive; row 2 bounds row 0's direction, so that both can be impossible.
def mixed_example(g):
    M, x, row = normal(g, 3, 3), normal(g, 3), normal(g, 2, 3)
    Q, G = M @ M.mT / 3 + torch.eye(3, dtype=D), torch.cat([row, -row[:1]])
    return Q, -Q @ x - uniform(g, 1) * G[0], G, G @ x + torch.tensor([0.0, 0.6, 0.8], dtype=D)


def mixed(Q, q, G, h, **options):
    z = solve_qp(Q, q, G=G, h=h, **options)
    return z.x, z.inequality_dual, z.slack, z.value


def mixed_exact(Q, q, G, h):
    row, zero = G[:1], torch.zeros(2, dtype=D)
    K = torch.cat([torch.cat([(Q + Q.mT) / 2, row.mT], 1), torch.cat([row, zero[:1, None]], 1)])
    w = torch.linalg.inv(K) @ torch.cat([-q, h[:1]])
    x = w[:3]
    return x, torch.cat([w[3:], zero]), h - G @ x, (x @ Q @ x / 2 + q @ x)


def smoothed(*theta, **options):
    return mixed(*theta, degenerate="smoothed", smoothing=1e-8, **options)


def impossible(item):
    *rest, h = item
    return *rest, torch.full_like(h, -5.0)


class Program(nn.Module):
    """A QPLayer or LPLayer with its input by position, and x as its output."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, costs):
        return self.layer(**{"q" if isinstance(self.layer, QPLayer) else "c": costs}).x


def qp_module():
    Q, q, G, h = mixed_example(torch.Generator().manual_seed(1))
    low = nn.Parameter(torch.full((3,), -9.0, dtype=D))
    layer = QPLayer(torch.linalg.cholesky(Q), G=nn.Parameter(G), h=h, low=low, square_root=True)
    return Program(layer), (q,)


def qp_layer(q, Q, G, h, **options):
    layer = QPLayer(Q, G=G, h=nn.Parameter(torch.zeros_like(h)), **options)
    return functional_call(layer, {"h": h}, (), {"q": q}).x


# gamma |x|^2 / 2 + c'x over {x >= 0, sum x = b}: the projection of -c / gamma.
def regularised(c, b, gamma, **options):
    return solve_lp(c, torch.ones(1, 3).to(c), b, low=0.0, regularization=gamma, **options).x


def regularised_exact(c, b, gamma):
    return Simplex(b[0]).project(-c / gamma)


# As many rows as unknowns, all active: x = G^-1 h, duals -G^-T c.
def vertex_example(g):
    G = torch.eye(2, dtype=D) + 0.3 * normal(g, 2, 2)
    return -G.mT @ uniform(g, 2), G, normal(g, 2)


def vertex(c, G, h, **options):
    z = solve_lp(c, G=G, h=h, ties="vertex", **options)
    return z.x, z.inequality_dual, z.value


def vertex_exact(c, G, h):
    inverse = torch.linalg.inv(G)
    x = inverse @ h
    return x, -inverse.mT @ c, c @ x


def lp_module():
    c, G, h = vertex_example(torch.Generator().manual_seed(1))
    return Program(LPLayer(G=nn.Parameter(G), h=h, regularization=0.1)), (c,)


def lp_layer(c, G, h, **options):
    options = options if "regularization" in options else {"ties": "vertex", **options}
    layer = LPLayer(G=nn.Parameter(torch.zeros_like(G)), **options)
    z = functional_call(layer, {"G": G}, (), {"c": c, "h": h})
    return z.x, z.inequality_dual, z.value


PROGRAMS = [
    Case(
        "qp-strictly-mixed", mixed, mixed_example, mixed_exact, shared=(0, 2), spoil=impossible, atol=1e-9,
        status=lambda *t: solve_qp(t[0], t[1], G=t[2], h=t[3]).codes,
        lacks={**NO_FUNCTION, **NO_SCALAR, **NO_GUESS, **NO_MODULE},
    ),
    Case(
        "qp-smoothed", smoothed, mixed_example, shared=(0, 2), spoil=impossible, atol=1e-9,
        lacks={**NO_FUNCTION, **NO_SCALAR, **NO_GUESS, **NO_MODULE},
    ),
    Case(
        "qp-layer", qp_layer, lambda g: tuple(mixed_example(g)[i] for i in (1, 0, 2, 3)), shared=(1, 2),
        spoil=impossible, atol=1e-9, module=qp_module, lacks={**NO_FUNCTION, **NO_SCALAR, **NO_GUESS, **SAME},
    ),
    Case(
        "lp-regularised", regularised, lambda g: (normal(g, 3) / 8, uniform(g, 1), uniform(g)), regularised_exact,
        shared=(0, 2), spoil=lambda t: (t[0], -t[1], t[2]), atol=1e-9, lacks={**NO_FUNCTION, **NO_GUESS, **NO_MODULE},
    ),
    Case(
        "lp-vertex", vertex, vertex_example, vertex_exact, shared=(1, 2), spoil=lambda t: (-t[0], *t[1:]), atol=1e-9,
        status=lambda *t: solve_lp(t[0], G=t[1], h=t[2], ties="vertex").codes,
        lacks={**NO_FUNCTION, **NO_SCALAR, **NO_GUESS, **NO_MODULE},
    ),
    Case(
        "lp-layer", lp_layer, vertex_example, vertex_exact, shared=(1, 2), spoil=lambda t: (-t[0], *t[1:]), atol=1e-9,
        module=lp_module, lacks={**NO_FUNCTION, **NO_SCALAR, **NO_GUESS, **SAME},
    ),
]  # fmt: skip

FORMULA = {
    "check_captured": "takes no function",
    "check_trees": "takes one tensor: `project` and `prox_tree` take pytrees",
    "check_certificates": "a formula: nothing is solved",
    "check_failures": "a formula: NaN in is NaN out, and no policy asks",
    "check_guess": "a formula: there is no guess",
}


def built(kind, names, example, where=ProjectionLayer, scalar=False, **fields):
    """A case whose inputs are x and the fields called `names`; `fields` are the others."""

    def layer(x, *values, monitor=None, on_failure="nan"):
        return where(kind, **fields)(x, **dict(zip(names, values, strict=True)))

    def status(*theta):
        flat = layer(*theta).flatten(-space) if space else layer(*theta)
        return torch.where(flat.isfinite().all(-1), Status.CONVERGED.code, Status.NON_FINITE.code)

    def module():
        x, *values = example(torch.Generator().manual_seed(1))
        held = {name: nn.Parameter(value) for name, value in zip(names, values, strict=True)}
        return where(kind, **held, **fields), (x,)

    space = example(torch.Generator()).__getitem__(0).ndim
    exceptions = FORMULA if scalar else {**FORMULA, **NO_SCALAR}
    if kind not in (Affine, Polyhedron):  # which keep factors
        exceptions = {**exceptions, "check_memory": "a formula of its arguments, which keeps nothing between calls"}
    return Case(
        kind.__name__, layer, example, shared=tuple(range(1, 1 + len(names))), status=status, module=module,
        spoil=lambda t: (torch.full_like(t[0], torch.nan), *t[1:]),
        lacks=exceptions,
    )  # fmt: skip


def rows(g):
    """x violates the first row, and fulfils the second."""
    G, x = normal(g, 2, 3), normal(g, 3)
    return x, G, G @ x + torch.tensor([-0.5, 3.0], dtype=D)


def semidefinite(g):
    return (torch.diag(torch.tensor([1.0, -1.0], dtype=D)) + 0.3 * normal(g, 2, 2),)


FORMULAS = [
    built(Ball, ("radius", "center"), lambda g: (2 + uniform(g, 2), uniform(g), 0.3 * normal(g, 2)), scalar=True),
    built(Box, ("low", "high"), lambda g: (torch.tensor([-2.0, 0.0, 2.0], dtype=D), -uniform(g, 3), uniform(g, 3))),
    built(Simplex, ("scale",), lambda g: (normal(g, 3), uniform(g)), scalar=True),
    built(L1Ball, ("radius",), lambda g: (1 + uniform(g, 3), uniform(g)), scalar=True),
    built(HalfSpace, ("a", "b"), lambda g: (2 + normal(g, 2) / 3, uniform(g, 2), uniform(g)), scalar=True),
    built(Affine, ("A", "b"), lambda g: (normal(g, 3), normal(g, 2, 3), normal(g, 2))),
    built(Polyhedron, ("G", "h"), rows),
    built(SecondOrderCone, (), lambda g: (uniform(g, 3),)),
    built(PSDCone, (), semidefinite),
    built(
        L1, ("step", "weight"), lambda g: (2 + normal(g, 2) / 3, uniform(g), uniform(g, 2)), ProximalLayer, scalar=True
    ),
    built(GroupLasso, ("weight",), lambda g: (3 + normal(g, 3), uniform(g, 2)), ProximalLayer, groups=[[0, 2], [1]]),
    built(TotalVariation1D, ("weight",), lambda g: (3 * normal(g, 4), uniform(g, 3) / 2), ProximalLayer),
    built(NuclearNorm, ("weight",), lambda g: (3 * normal(g, 2, 2), uniform(g) / 2), ProximalLayer, scalar=True),
]


@pytest.mark.parametrize(("case", "law"), duties([*PROGRAMS, *FORMULAS]))
def test_duty(case, law, generator):
    law(case, generator)


# A regularised program takes a fifth of the time of a vertex, whose memory is that of its duty above.
LONG = [PROGRAMS[2], replace(PROGRAMS[5], options={"regularization": 0.1}), FORMULAS[6]]


@pytest.mark.slow
@pytest.mark.parametrize("case", LONG, ids=str)
@pytest.mark.slow
def test_memory_over_1000_steps(case, generator):
    check_memory(case, generator, steps=1000)
