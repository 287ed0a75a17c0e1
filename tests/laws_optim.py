"""Laws of minimisers, over problems with answers, and of sets, over clouds of points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import optree
import torch
from torch import Tensor

from nestopt.constrained import Set
from nestopt.implicit import Minimizer, MinimizeResult
from nestopt.linalg import Status
from nestopt.linalg.tree import Ravel


@dataclass(frozen=True)
class Case:
    """An objective in any precision, a start, and its minimiser."""

    name: str
    objective: Callable[[torch.dtype], Callable[[Any], Tensor]]
    start: Callable[[torch.dtype], Any]
    solution: Any  # in float64
    xtol: float  # of a float64 solve to a relative gradient of 1e-10


def vector(tree: Any) -> Tensor:
    """The tree as one vector."""
    return Ravel.of(tree, "tree").flatten(tree).detach()


def gradient_norm(objective: Callable[[Any], Tensor], y: Any) -> float:
    """|grad|, computed without the library."""
    leaves, treespec = optree.tree_flatten(y)
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    value = objective(optree.tree_unflatten(treespec, leaves))
    return float(torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, leaves)]).norm())


def check_minimizer(minimizer: Minimizer, case: Case, dtype: torch.dtype) -> MinimizeResult:
    """Known answer, certified error, counters, nothing of the caller's touched, init + step equal to the call."""
    objective, y0 = case.objective(dtype), case.start(dtype)
    optree.tree_map(lambda leaf: leaf.requires_grad_(), y0)
    before = vector(y0).clone()
    evaluated, seen = [], []

    def counted(y: Any) -> Tensor:
        evaluated.append(1)
        return objective(y)

    res = minimizer(counted, y0, callbacks=[lambda k, state: seen.append((k, float(state.error)))])
    assert res.status == Status.CONVERGED, (case.name, res.status, res.error)
    assert res.error <= res.tolerance
    double = dtype == torch.float64
    start = gradient_norm(objective, y0)
    assert abs(res.tolerance - (1e-10 if double else 1e-5) * start) <= 1e-5 * res.tolerance
    # certified: in the working precision, and in float64 as far as a lower precision can know
    x = optree.tree_map(Tensor.detach, res.x)
    assert abs(gradient_norm(objective, x) - res.error) <= 1e-6 * res.error + torch.finfo(dtype).eps * start
    exact = case.objective(torch.float64)
    true = gradient_norm(exact, optree.tree_map(Tensor.double, x))
    scale = gradient_norm(exact, case.start(torch.float64))
    assert true <= res.tolerance * (1 + 1e-6) + (0.0 if double else 1e-5 * scale), (case.name, true)
    error = float((vector(x).double() - vector(case.solution)).norm()) / max(1.0, float(vector(case.solution).norm()))
    assert error <= case.xtol * (1 if double else 1e5), (case.name, error)
    assert res.value == float(objective(x).detach())
    # counters
    assert res.evaluations == len(evaluated)
    assert res.iterations == seen[-1][0] == len(seen) - 1
    assert res.iterations + 1 <= res.gradients <= res.evaluations
    assert seen[-1][1] == res.error
    # nothing of the caller's is touched, nothing is shared with it
    for leaf, mine in zip(optree.tree_leaves(y0), optree.tree_leaves(res.x), strict=True):
        assert leaf.grad is None
        assert not mine.requires_grad
        assert (mine.shape, mine.dtype) == (leaf.shape, leaf.dtype)
        assert mine.untyped_storage().data_ptr() != leaf.untyped_storage().data_ptr()
    y = minimizer.init(objective, y0).point.y
    for leaf in optree.tree_leaves(y0):
        assert y.untyped_storage().data_ptr() != leaf.untyped_storage().data_ptr()
    assert torch.equal(vector(y0), before)
    assert optree.tree_structure(res.x) == optree.tree_structure(y0)
    # the same numbers again, by hand (long runs are left out for the time they take)
    state = minimizer.init(objective, y0)
    while state.error > state.tolerance and res.iterations <= 200:
        state = minimizer.step(objective, state)
    if res.iterations <= 200:
        assert torch.equal(vector(state.x), vector(res.x))
        assert (state.evaluations, state.gradients, state.products) == (res.evaluations, res.gradients, res.products)
    # a warm start at the answer costs one gradient, from the point or from the state
    for from_ in (res.x, res.state):
        warm = minimizer(objective, from_, res.tolerance)
        assert (warm.status, warm.iterations, warm.evaluations, warm.gradients, warm.products) == (
            Status.CONVERGED, 0, 1, 1, 0,
        ), (case.name, warm)  # fmt: skip
        assert torch.equal(vector(warm.x), vector(res.x))
    # a looser tolerance of the caller's is the one that counts
    loose = minimizer(objective, y0, 0.1 * scale)
    assert loose.status == Status.CONVERGED
    assert abs(loose.tolerance - 0.1 * scale) <= 1e-6 * scale
    assert loose.iterations <= res.iterations
    # a run cut short says so, and its state goes on
    if res.iterations > 2:
        cut = replace(minimizer, max_iter=2)(objective, y0)
        assert (cut.status, cut.iterations) == (Status.MAX_ITER, 2)
        assert minimizer(objective, cut.state, loose.tolerance).status == Status.CONVERGED
    return res


def check_structure(minimizer: Minimizer, objective: Callable[[Tensor], Tensor], y0: Tensor) -> None:
    """A flat tensor and a dict of its parts take the same steps."""
    flat = minimizer(objective, y0)
    parts = {"a": y0[:1].reshape(()), "b": (y0[1:],)}
    tree = minimizer(lambda y: objective(torch.cat([y["a"][None], *y["b"]])), parts)
    assert tree.iterations == flat.iterations
    assert float((vector(tree.x) - flat.x).norm()) <= 1e-9 * float(flat.x.norm())


def check_set(s: Set, x: Tensor, feasible: Tensor | None = None) -> None:
    """Feasible, idempotent, obtuse angle, non-expansive, dtype kept, batch = loop, NaN kept, differentiable.

    Args:
        s: the set.
        x: a cloud of points (points, n), most of them outside.
        feasible: more points of the set, (points, n).
    """
    eps = 100 * torch.finfo(x.dtype).eps
    scale = max(1.0, float(x.norm(dim=-1).max()))
    p = s.project(x)
    assert (p.shape, p.dtype) == (x.shape, x.dtype)
    assert bool(s.contains(p).all())
    assert s.contains(p).shape == x.shape[:-1]
    assert float((s.project(p) - p).abs().max()) <= eps * scale
    z = p if feasible is None else torch.cat([p, feasible])
    angles = torch.einsum("in,ijn->ij", x - p, z[None] - p[:, None])
    assert float(angles.max()) <= eps * scale**2
    apart, nearer = torch.cdist(x, x), torch.cdist(p, p)
    assert bool((nearer <= apart * (1 + eps) + eps * scale).all())
    for one, projected in zip(x, p, strict=True):
        assert float((s.project(one) - projected).abs().max()) <= eps * scale
    half = x.reshape(2, -1, x.shape[-1])
    assert torch.equal(s.project(half), p.reshape(half.shape))
    poisoned = x.clone()
    poisoned[0, 0] = torch.nan
    answer = s.project(poisoned)
    assert bool(answer[0, 0].isnan())
    assert torch.equal(answer[1:], p[1:])
    assert not bool(s.contains(poisoned)[0])
    if x.dtype == torch.float64:
        assert torch.autograd.gradcheck(s.project, x[:4].clone().requires_grad_())
        assert torch.autograd.gradgradcheck(s.project, x[:2].clone().requires_grad_())
