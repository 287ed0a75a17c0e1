"""Bilevel problems whose modules are sharded by FSDP2: parameters are pieces, and only backward() works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from nestopt.implicit.inner_step import Named
from nestopt.linalg.autodiff import evaluate
from nestopt.linalg.isolation import isolated
from nestopt.linalg.parallel import all_reduced, check_group

from .counts import Counts
from .module_loss import ModuleLoss, Modules
from .module_problem import ModuleProblem
from .oracle import Oracle, Slopes, part_of
from .parts import Part
from .problem import Spaces

__all__ = ["FullyShardedProblem", "PiecesOracle", "fully_sharded"]

Group = Any  # dist.ProcessGroup, which a torch without distributed lacks
OWNER = "fully_sharded"


@dataclass(frozen=True, kw_only=True)
class FullyShardedProblem(ModuleProblem):
    """A ModuleProblem whose variables are this rank's pieces of the parameters; see `fully_sharded`.

    Attributes:
        losses: the two losses, upper and lower.
        group: the process group.
    """

    losses: tuple[ModuleLoss, ModuleLoss] = field(repr=False)
    group: Group = field(default=None, repr=False)

    second_order: ClassVar[bool] = False

    @property
    def x0(self) -> Named:
        """This rank's pieces of the upper module's parameters by name, copied."""
        return {name: _piece(p).clone() for name, p in Modules.trained(self.modules.upper).items()}

    @property
    def y0(self) -> Named:
        """Those of the lower module's."""
        return {name: _piece(p).clone() for name, p in Modules.trained(self.modules.lower).items()}

    def oracle(self, spaces: Spaces, data: Any = None) -> PiecesOracle:
        """First-order information by backward() on the modules themselves.

        Args:
            spaces: of x and y.
            data: of one step.

        Returns:
            A fresh Oracle.
        """
        return PiecesOracle(self, spaces, data)

    def copy_to(self, result: Any) -> None:
        """Write a result's pieces into the modules' parameters, in place.

        Args:
            result: with x and y.
        """
        with torch.no_grad():
            for module, values in ((self.modules.upper, result.x), (self.modules.lower, result.y)):
                for name, p in Modules.trained(module).items():
                    _piece(p).copy_(values[name])

    def _forward(self, result: Any, batch: Any, loss: str) -> None:
        self.copy_to(result)
        with torch.no_grad():
            self.losses[loss == "lower"].in_place(batch, moving=True)


class PiecesOracle(Oracle):
    """Values and gradients of a FullyShardedProblem; inner products are those of the whole vectors.

    An evaluation writes the point into the modules' parameters, and leaves it there.

    Args:
        problem: the problem.
        spaces: of the pieces.
        data: of this step, this rank's share.
    """

    def __init__(self, problem: FullyShardedProblem, spaces: Spaces, data: Any = None) -> None:
        super().__init__(problem, spaces, data)
        self.problem: FullyShardedProblem = problem

    def check(self, x: Tensor, y: Tensor) -> None:
        """Refuse variables that nothing uses.

        Args:
            x: raveled upper variable.
            y: raveled lower variable.

        Raises:
            ValueError: naming the variable.
        """
        upper = {name: self._backward(x, y, {name: 1.0})[1:] for name in ("upper", "lower")}
        for name, (_, found) in upper.items():
            if all(g is None for g in found.values()):
                raise ValueError(
                    f"{name} does not depend on y, so there is nothing to differentiate; look for .detach(), "
                    "torch.no_grad() or an unused argument."
                )
        unused = [f"x[{n!r}]" for n, g in upper["upper"][0].items() if g is None and upper["lower"][0][n] is None]
        if unused:
            raise ValueError(
                f"{', '.join(unused)} is used by no function of the problem, so its hypergradient would be a silent "
                "zero; use it, or freeze it by requires_grad_(False) before fully_shard."
            )

    def weighted(
        self,
        x: Tensor,
        y: Tensor,
        *,
        upper: float | Tensor | None = None,
        lower: float | Tensor | None = None,
        dual: Tensor | Callable[[Tensor], Tensor] | None = None,
    ) -> Slopes:
        """The sum a F + b f with its gradients, by one backward() a function; see `Oracle.weighted`.

        Args:
            x: raveled pieces of the upper variable.
            y: raveled pieces of the lower variable.
            upper: a; None leaves F out, unevaluated.
            lower: b; None likewise.
            dual: None: there are no constraints.

        Returns:
            The Slopes: the value of the whole, and this rank's pieces of the gradients.
        """
        assert dual is None or (isinstance(dual, Tensor) and not dual.numel())
        self.counts += Counts(int(upper is not None), int(lower is not None))
        factors = {name: a for name, a in (("upper", upper), ("lower", lower)) if a is not None}
        value, in_x, in_y = self._backward(x, y, factors)
        spaces = self.spaces
        return Slopes(value, _joined(spaces.x, x, in_x), _joined(spaces.y, y, in_y))

    def lower_y(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The lower objective f with f_y."""
        found = self.weighted(x, y, lower=1.0)
        return found.value, found.y

    def values(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The objectives F and f, without derivatives."""
        self._load(x, y)
        with torch.no_grad():
            return self._mean(self._value("upper").detach()), self._mean(self._value("lower").detach())

    def dot(self, u: Tensor, v: Tensor) -> Tensor:
        """<u, v> over all ranks' pieces."""
        return all_reduced(torch.dot(u, v), OWNER, self.problem.group)

    def norm(self, v: Tensor) -> Tensor:
        """|v| over all ranks' pieces."""
        return self.dot(v, v).sqrt()

    def constraints(self, x: Tensor, y: Tensor) -> Tensor:
        """Refused: a method that asks for constraints keeps multipliers and sets of the whole vectors."""
        raise _no_constraints()

    def inequalities(self, x: Tensor, y: Tensor) -> int:
        """Refused likewise."""
        raise _no_constraints()

    def constraint_jacobian(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Refused likewise."""
        raise _no_constraints()

    def _load(self, x: Tensor, y: Tensor) -> None:
        spaces = self.spaces
        self.problem.copy_to(_Point(spaces.x.unflatten(x), spaces.y.unflatten(y)))

    def _value(self, name: str) -> Tensor:
        """This rank's value, weighted by its share of the samples."""
        part = part_of(self.data, name)
        loss = self.problem.losses[name == "lower"]
        return Part.of(part).weight * evaluate(loss.in_place, *(() if part is None else (part,)), name=name)

    def _mean(self, value: Tensor) -> Tensor:
        total = all_reduced(value.clone(), OWNER, self.problem.group)
        return total / dist.get_world_size(self.problem.group)

    def _backward(
        self, x: Tensor, y: Tensor, factors: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor | None], dict[str, Tensor | None]]:
        """The value and the pieces of the gradients, None where nothing depends on a parameter."""
        self._load(x, y)
        sides = Modules.trained(self.problem.modules.upper), Modules.trained(self.problem.modules.lower)
        kept = {p: p.grad for side in sides for p in side.values()}
        total = x.new_zeros(())
        try:
            for p in kept:
                p.grad = None
            for name, factor in factors.items():
                with isolated():
                    value = factor * self._value(name)
                    value.backward()
                total = total + value.detach()
            found = [{n: None if p.grad is None else _piece(p.grad).clone() for n, p in s.items()} for s in sides]
        finally:
            for p, grad in kept.items():
                p.grad = grad
        return self._mean(total), found[0], found[1]


@dataclass(frozen=True)
class _Point:
    x: Any
    y: Any


def _piece(t: Tensor) -> Tensor:
    """The local piece, which shares its memory."""
    from torch.distributed.tensor import DTensor  # takes a while, and a torch without distributed lacks it

    return t.to_local().detach() if isinstance(t, DTensor) else t.detach()


def _joined(space: Any, like: Tensor, found: dict[str, Tensor | None]) -> Tensor:
    """Gradients by name as one vector, in the order of the space."""
    zeros = space.unflatten(torch.zeros_like(like))
    vector: Tensor = space.flatten({n: zeros[n] if g is None else g for n, g in found.items()})
    return vector


_ABLE = (
    "use F2SA, F3SA, VPBGD, BOME or MEHA with debias=None, or bilevel.data_parallel, where every rank has all "
    "parameters."
)


def _no_constraints() -> ValueError:
    return ValueError(
        f"{OWNER}: this method is one for constraints, whose inner products it takes by itself, but here every rank "
        f"has pieces of the vectors; {_ABLE}"
    )


def _no_products(*_: Any) -> Tensor:
    raise ValueError(
        f"{OWNER}: this method differentiates the objectives by itself (second derivatives, or a lower solver of its "
        f"own), but under fully_shard only backward() on the modules works; {_ABLE}"
    )


def fully_sharded(problem: ModuleProblem, group: Group = None) -> FullyShardedProblem:
    """The problem of two modules that FSDP2 (`torch.distributed.fsdp.fully_shard`) has sharded.

    x and y are this rank's pieces of the parameters, and so is all that a method keeps; inner products and norms are
    summed over ranks, gradients come from backward() on the modules, and values are means over the ranks' samples. So
    F2SA, F3SA, VPBGD, BOME and MEHA with given sizes take the same steps as in one process (automatic sizes begin with
    power steps from another random vector). Methods with Hessian products or multipliers, and second stages, refuse:
    pass debias=None.

    FSDP gathers a module's parameters while its forward runs: a loss must call the modules, and not use parameters of
    theirs outside. Every parameter must be in a `fully_shard`ed module, and have at least one dimension. Evaluations
    move the modules' parameters to where they evaluate; call `problem.copy_to(res)` at the end.

    Args:
        problem: of `from_modules`, made after `fully_shard` was applied to both modules; without sets and prox.
        group: the process group that the modules are sharded over; None for all.

    Returns:
        The problem; x0, y0 and results are pieces.

    Raises:
        RuntimeError: if torch.distributed is not initialised.
        TypeError: for a problem of another kind.
        ValueError: for parameters that are not sharded, or parts that pieces cannot have.

    Example:
        A script that `torchrun --nproc-per-node 2` starts::

            for module in (hyper, model):
                fully_shard(module)
            problem = bilevel.fully_sharded(bilevel.from_modules(hyper, model, upper_loss, lower_loss, train, valid))
            method = bilevel.F2SA(debias=None)
            res = bilevel.solve(problem, problem.x0, problem.y0, method, data=bilevel.Shards(problem.data))
            problem.copy_to(res)
    """
    check_group(OWNER, group)
    if not isinstance(problem, ModuleProblem):
        raise TypeError(f"{OWNER}: problem must be one of from_modules, but got {type(problem).__name__}.")
    from torch.distributed.tensor import DTensor

    plain = [name for name, p in problem.modules.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if plain:
        raise ValueError(
            f"{OWNER}: {', '.join(plain)} is not sharded; call fully_shard on both modules, then from_modules."
        )
    parts = ("upper_set", "lower_set", "lower_prox", "inequality", "equality")
    present = [name for name in parts if getattr(problem, name) is not None]
    upper, lower = problem.upper, problem.lower
    if present or not isinstance(upper, ModuleLoss) or not isinstance(lower, ModuleLoss):
        raise ValueError(
            f"{OWNER}: the problem must be that of from_modules with nothing but its losses, but it has "
            f"{' and '.join(present) or 'other objectives'}; sets and prox would see pieces of the variables."
        )
    for loss in (upper, lower):
        if loss.policy.micro_batch is not None:
            raise ValueError(f"{OWNER}: micro_batch evaluates anew in backward, which FSDP does not; pass None.")
    kept = {f.name: getattr(problem, f.name) for f in fields(ModuleProblem) if f.name not in ("upper", "lower")}
    return FullyShardedProblem(
        upper=_no_products, lower=_no_products, losses=(upper.mixed(), lower.mixed()), group=group, **kept
    )
