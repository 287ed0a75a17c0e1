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


def cloud(n: int, dtype: torch.dtype, scale: float = 2.0, points: int = 12) -> Tensor:
    """Points of n dimensions around zero."""
    return (scale * torch.randn(points, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)).to(dtype)


def check_set(s: Set, x: Tensor, feasible: Tensor | None = None, *, exactness: float = 1.0) -> None:
    """Feasible, idempotent, obtuse angle, non-expansive, dtype kept, batch = loop = vmap, NaN kept, differentiable.

    Args:
        s: the set.
        x: a cloud of points (points, *space), most of them outside.
        feasible: more points of the set, (points, *space).
        exactness: factor of the tolerances, for projections that are iterated.
    """
    dims = s.space_dims
    eps = 100 * torch.finfo(x.dtype).eps * exactness
    flat = x.flatten(-dims)
    scale = max(1.0, float(flat.norm(dim=-1).max()))
    p = s.project(x)
    assert (p.shape, p.dtype) == (x.shape, x.dtype)
    assert bool(s.contains(p, None if exactness == 1 else eps * scale).all())
    assert s.contains(p).shape == x.shape[:-dims]
    assert float((s.project(p) - p).abs().max()) <= eps * scale
    q = p.flatten(-dims)
    assert torch.allclose(s.distance(x), (flat - q).norm(dim=-1), rtol=1e-5 if x.dtype == torch.float32 else 1e-12)
    z = q if feasible is None else torch.cat([q, feasible.flatten(-dims)])
    angles = torch.einsum("in,ijn->ij", flat - q, z[None] - q[:, None])
    assert float(angles.max()) <= eps * scale**2
    apart, nearer = (torch.cdist(v, v, compute_mode="donot_use_mm_for_euclid_dist") for v in (flat, q))
    assert bool((nearer <= apart * (1 + eps) + eps * scale).all())
    for one, projected in zip(x, p, strict=True):
        assert float((s.project(one) - projected).abs().max()) <= eps * scale
    half = x.reshape(2, -1, *x.shape[1:])
    assert float((s.project(half) - p.reshape(half.shape)).abs().max()) <= 0.01 * eps * scale
    assert float((torch.func.vmap(s.project)(x) - p).abs().max()) <= eps * scale
    poisoned = x.clone()
    poisoned[(0,) * (dims + 1)] = torch.nan
    answer = s.project(poisoned)
    assert bool(answer[(0,) * (dims + 1)].isnan())
    assert torch.equal(answer[1:], p[1:])
    assert not bool(s.contains(poisoned)[0])
    check_jacobian(s, x, poisoned)
    if x.dtype == torch.float64:
        check_derivatives(s.project, x[:3], x[:2])


def check_derivatives(function: Callable[..., Tensor], *points: Tensor | tuple[Tensor, ...]) -> None:
    """First derivatives at the first point, and second ones at the last, in both modes, batched, against differences.

    Along random directions: `check_jacobian` has every entry.

    Args:
        function: of one or more tensors.
        points: its argument, or the tuple of them, for first and for second derivatives; one for both.
    """
    first, second = (
        tuple(t.detach().clone().requires_grad_() for t in (p if isinstance(p, tuple) else (p,)))
        for p in (points[0], points[-1])
    )
    assert torch.autograd.gradcheck(
        function, first, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True, fast_mode=True
    )
    assert torch.autograd.gradgradcheck(function, second, check_fwd_over_rev=True, fast_mode=True)


def check_jacobian(s: Set, x: Tensor, poisoned: Tensor | None = None) -> None:
    """Symmetric, 0 <= D <= I, applied as stored, equal to automatic and central differences; NaN stays in its item.

    Args:
        s: the set.
        x: points (points, *space) at which the projection is smooth.
        poisoned: the same points, NaN in the first.
    """
    dims, double = s.space_dims, x.dtype == torch.float64
    n = x[0].numel()
    eps = (1e-11 if double else 1e-4) * max(1.0, n / 10)
    operator = s.jacobian(x)
    D = operator.to_dense()
    assert operator.symmetric
    assert tuple(operator.shape) == tuple(D.shape) == (*x.shape[:-dims], n, n)
    assert (operator.dtype, D.dtype) == (x.dtype, x.dtype)
    assert not D.requires_grad
    assert float((D - D.mT).abs().max()) <= eps
    spectrum = torch.linalg.eigvalsh((D + D.mT) / 2)
    assert float(spectrum.min()) >= -eps
    assert float(spectrum.max()) <= 1 + eps
    v = torch.randn(3, *x.shape[:-dims], n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(x)
    assert float((operator @ v - (D @ v[..., None])[..., 0]).abs().max()) <= 10 * eps
    assert float((operator.T @ v - operator @ v).abs().max()) <= 10 * eps
    one = s.jacobian(x[0])
    assert tuple(one.shape) == (n, n)
    assert float((one.to_dense() - D[0]).abs().max()) <= eps
    if poisoned is not None:
        assert torch.equal((s.jacobian(poisoned) @ v)[:, 1:], (operator @ v)[:, 1:])
    for mode in (torch.func.jacrev, torch.func.jacfwd):
        automatic = torch.func.vmap(mode(s.project))(x).reshape(D.shape)
        assert float((automatic - D).abs().max()) <= eps
    if double:
        h = 1e-6
        for direction in v:
            step = h * direction.reshape(x.shape)
            differences = (s.project(x + step) - s.project(x - step)).flatten(-dims) / (2 * h)
            assert float((operator @ direction - differences).abs().max()) <= 1e-7 * max(1.0, float(x.abs().max()))


def check_kink(s: Set, x: Tensor, radius: float = 1e-6, tolerance: float = 1e-4) -> None:
    """At each of the points D is a limit of Jacobians: some point nearby, where P is smooth, has almost the same.

    Args:
        s: the set.
        x: points (points, *space) at which the projection has kinks.
        radius: how far away to look.
        tolerance: of the difference.
    """
    D = s.jacobian(x).to_dense()
    g = torch.Generator().manual_seed(0)
    near = x + radius * torch.randn(400, *x.shape, generator=g, dtype=torch.float64).to(x)
    smooth = s.jacobian(near).to_dense()
    assert float((smooth - D).abs().flatten(-2).amax(-1).amin(0).max()) <= tolerance
    automatic = torch.func.vmap(torch.func.jacrev(s.project))(near[0]).reshape(smooth[0].shape)
    assert float((automatic - smooth[0]).abs().max()) <= 1e-9


def check_kink_of_projection(s: Set, x: Tensor) -> None:
    """`check_kink`, and the derivative of `project` at the kinks themselves is the documented D."""
    check_kink(s, x)
    D = s.jacobian(x).to_dense()
    automatic = torch.func.vmap(torch.func.jacrev(s.project))(x).reshape(D.shape)
    assert torch.allclose(automatic, D, rtol=0, atol=1e-12)
