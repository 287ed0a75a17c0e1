"""Deep equilibrium models: a layer that is infinitely deep, with one cell's parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from nestopt.linalg.isolation import RandomState, isolated
from nestopt.linalg.normalization import PlainNormalization
from nestopt.linalg.tree import Ravel

from .anderson import Anderson
from .fixed_point_solver import norm
from .jacobian import SystemJacobian
from .module import FixedPointLayer
from .pullback import pull
from .transforms import transformed

__all__ = ["DEQ"]


class DEQ(nn.Module):
    r"""An equilibrium model: z with z = f(z, x), where the cell f is a module and its parameters are learnt.

    Forward, `find` solves for z without recording anything, from z = 0 or from the last call's z; backward, one linear
    system (I - J') u = v with J = df/dz is solved by `solver`: memory does not grow with the iterations, and gradients
    are those of infinitely many layers, of any order, under vmap and in forward mode; see `fixed_point`. z and every
    linear solve are certified, per item. The gradient with respect to the starting z is zero.

    Policies. BatchNorm: an evaluation gets copies of the cell's buffers, and what it writes into them is dropped, so
    running statistics do not move; with batch_dims >= 1 a BatchNorm in train mode couples the items, which is refused.
    Normalise by LayerNorm or GroupNorm, or `eval()` the norm. Dropout in train mode: all evaluations of one call, the
    backward passes included, draw from the same state of torch's generator, so that f is one map with one mask; the
    next call draws another.

    `state_dict` holds the cell's parameters and buffers only, under `layer.function.`; the remembered z is in no
    state_dict, pickle or deepcopy.

    Args:
        cell: module whose forward(z, *inputs) returns a tree like z. It should contract near z: see `spectral_radius`.
        find: a solver of fixed points, e.g. `Anderson()` (the default), `Broyden()`, `Picard(0.5)`, or any (function of
            z, z0) -> z.
        solver: of the adjoint system, as in `fixed_point`; None takes LU up to n = 512, beyond that GMRES.
        batch_dims: number of leading dimensions of z that count independent items; 0 for one system of all.
        reuse: begin at the last call's z, where it is finite and of the same shapes; for data that change little from
            call to call. Not under transforms of torch.func.
        options: further keyword arguments of `fixed_point`: on_failure, monitor, rtol, atol, warm_start (of the adjoint
            system, on by default; None for none), ...

    Raises:
        TypeError: if cell is not a module.

    Reference:
        Bai, Kolter & Koltun, Deep equilibrium models, 2019; Bai, Koltun & Kolter, Stabilizing equilibrium models by
        Jacobian regularization, 2021.

    Example:
        >>> import torch
        >>> from nestopt import implicit
        >>> class Cell(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = torch.nn.Linear(3, 3)
        ...     def forward(self, z, x):
        ...         return torch.tanh(self.linear(z) / 2 + x)
        >>> model = implicit.DEQ(Cell())
        >>> x = torch.randn(5, 3)
        >>> z = model(x)
        >>> penalty = model.jacobian_penalty(z, x, generator=torch.Generator().manual_seed(0))
        >>> (z.square().sum() + 0.1 * penalty).backward()
        >>> bool((model.spectral_radius(z, x) < 1).all())
        True
    """

    def __init__(
        self,
        cell: nn.Module,
        find: Callable[..., Any] | None = None,
        *,
        solver: Any = None,
        batch_dims: int = 1,
        reuse: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if not isinstance(cell, nn.Module):
            raise TypeError(
                f"DEQ: cell must be a torch.nn.Module, but got {type(cell).__name__}; for a plain function call "
                "implicit.fixed_point itself."
            )
        find = Anderson() if find is None else find
        self.layer = _Equilibrium(cell, find, solver=solver, batch_dims=batch_dims, **options)
        self.batch_dims = batch_dims
        self.memory = _Memory() if reuse else None

    @property
    def cell(self) -> nn.Module:
        """The module f."""
        return self.layer.function

    def forward(self, *inputs: Any, z0: Any = None) -> Any:
        """The equilibrium of the cell at these inputs.

        Args:
            inputs: the further arguments of the cell's forward.
            z0: where to start, a pytree of tensors; None for zeros of the shape of the first input. With
                `reuse`, the last equilibrium takes its place.

        Returns:
            z, attached to the graph of the parameters and the inputs.

        Raises:
            TypeError: if there is neither a z0 nor a first input that is a tensor.
        """
        if z0 is None:
            if not inputs or not isinstance(inputs[0], Tensor):
                raise TypeError(
                    "DEQ: where the first input is not a tensor of z's shape, pass a z0 of that shape, "
                    "e.g. z0=torch.zeros(batch, n)."
                )
            z0 = torch.zeros_like(inputs[0], requires_grad=False)
            z0 = z0 if self.memory is None else self.memory.recall(z0)
        elif self.memory is not None:
            z0 = self.memory.recall(z0)
        z = self.layer(z0, *inputs)
        if self.memory is not None:
            self.memory.keep(z)
        return z

    def jacobian_penalty(
        self, z: Any, *inputs: Any, probes: int = 1, generator: torch.Generator | None = None
    ) -> Tensor:
        r"""An unbiased estimate of |J|_F^2 / n, J = df/dz (n x n), averaged over the items: small is contracting.

        |J|_F^2 is the mean of |J'v|^2 over v of independent signs (Hutchinson). The estimate is differentiable in the
        parameters, the inputs and z: add it to the loss with a weight of 0.1 to 2 now and then, or at every step; with
        z.detach() its gradient takes no linear solve.

        Args:
            z: the equilibrium, or any other point.
            inputs: as in `forward`.
            probes: vectors v to average over; the variance falls as 1 / probes.
            generator: of the probes; None for torch's own.

        Returns:
            A 0-d tensor.

        Raises:
            ValueError: if probes < 1.
        """
        if probes < 1:
            raise ValueError(f"DEQ: probes must be an integer >= 1, but got {probes}.")
        leaves, treespec = optree.tree_flatten(z)
        numbers = sum(leaf.numel() for leaf in leaves)
        total = leaves[0].new_zeros(())
        random = RandomState.now(leaves[0].device) if self._masks() else None

        def image(*parts: Tensor) -> tuple[Tensor, ...]:
            with isolated(), PlainNormalization():  # the penalty is differentiated, and may be vmapped before
                tree = optree.tree_unflatten(treespec, list(parts))
                value = random.run(lambda: self.cell(tree, *inputs)) if random else self.cell(tree, *inputs)
            return tuple(optree.tree_leaves(value))

        for _ in range(probes):
            signs = [_signs(leaf, generator) for leaf in leaves]
            total = total + sum((part.square().sum() for part in pull(image, leaves, signs)), total.new_zeros(()))
        penalty: Tensor = total / max(1, probes * numbers)
        return penalty

    def spectral_radius(
        self, z: Any, *inputs: Any, steps: int = 50, generator: torch.Generator | None = None
    ) -> Tensor:
        """The spectral radius of J = df/dz at z, per item, by power iteration: Picard converges where it is below 1.

        The growth of |J'^k v| is averaged over the later half of the steps, so that complex pairs do no harm. It is an
        estimate, from below more often than not; where two eigenvalues are nearly as large it takes more steps.

        Args:
            z: the equilibrium.
            inputs: as in `forward`.
            steps: products with J', one backward pass each.
            generator: of the first vector; None for a fixed seed.

        Returns:
            A tensor over the items (0-d for batch_dims=0), outside of every graph.

        Raises:
            ValueError: if steps < 2.
        """
        if steps < 2:
            raise ValueError(f"DEQ: steps must be an integer >= 2, but got {steps}.")
        ravel = Ravel.of(z, "z")
        batch = ravel.shapes[0][: self.batch_dims]
        item = Ravel(ravel.treespec, tuple(s[len(batch) :] for s in ravel.shapes), ravel.dtype, ravel.device, "z")
        y = item.join([leaf.detach() for leaf in ravel.leaves(z)])
        given: Any = inputs
        fixed: Any = optree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, given)
        random = RandomState.now(y.device)

        def image(vector: Tensor) -> Tensor:
            with isolated():
                tree = item.unflatten(vector)
                return item.join(optree.tree_leaves(random.run(lambda: self.cell(tree, *fixed))))

        A = SystemJacobian(image, y, (), (), symmetric=False)
        if generator is None:
            generator = torch.Generator(y.device).manual_seed(0)
        v = torch.randn(y.shape, generator=generator, dtype=y.dtype, device=generator.device).to(y.device)
        logs = []
        with torch.no_grad():
            for k in range(steps):
                size = norm(v)
                v = A._rmatvec(v / torch.where(size > 0, size, 1)[..., None])
                if k >= steps // 2:
                    logs.append(norm(v).log())
        return torch.stack(logs).mean(0).exp()

    def _masks(self) -> bool:
        return _draws(self.cell)


class _Equilibrium(FixedPointLayer):
    """The layer, one call of which draws one mask."""

    def _bind(self, y0: Any) -> Callable[..., Any]:
        if not _draws(self.function):
            return self._evaluate
        random = RandomState.now(optree.tree_leaves(y0)[0].device)
        torch.rand(1, device=random.device)  # the next call draws other masks
        return lambda *arguments: random.run(lambda: self._evaluate(*arguments))


class _Memory:
    """The last equilibrium, forgotten by pickle and deepcopy."""

    def __init__(self) -> None:
        self._last: Any = None

    def __reduce__(self) -> tuple[type[_Memory], tuple[()]]:
        return _Memory, ()

    def recall(self, z0: Any) -> Any:
        """The remembered tree, leaf by leaf where it is finite and looks like z0; else z0's own."""
        if self._last is None or transformed() or optree.tree_structure(z0) != optree.tree_structure(self._last):
            return z0

        def choose(new: Tensor, old: Tensor) -> Tensor:
            fits = (new.shape, new.dtype, new.device) == (old.shape, old.dtype, old.device)
            return torch.where(torch.isfinite(old), old, new) if fits else new

        tree: Any = optree.tree_map(choose, z0, self._last)
        return tree

    def keep(self, z: Any) -> None:
        """Remember z, without its graph."""
        if not transformed():
            self._last = optree.tree_map(lambda leaf: leaf.detach(), z)


def _draws(cell: nn.Module) -> bool:
    """Whether the cell holds active dropout."""
    return any(isinstance(m, (_DropoutNd, nn.RNNBase)) and m.training for m in cell.modules())


def _signs(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    bits = torch.randint(0, 2, like.shape, generator=generator, device=device)
    return (2 * bits - 1).to(like.device, like.dtype)
