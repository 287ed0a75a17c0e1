"""Bilevel problems of two modules and their losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.data import DataLoader

from nestopt.implicit.inner_step import Dropout, Named

from .module_loss import Loss, ModuleLoss, Modules, Normalization, Policy, Term
from .oracle import Oracle, part_of
from .parts import Numbered
from .problem import Problem, Spaces
from .stochastic import FromLoader, Source

__all__ = ["ModuleProblem", "from_modules"]


@dataclass(frozen=True, kw_only=True)
class ModuleProblem(Problem):
    """A Problem whose variables are the trainable parameters of two modules, as dicts by name; see `from_modules`.

    Attributes:
        modules: both modules; no evaluation changes them.
        data: k -> batch, to be passed on to `solve`; None where the losses take no batch.
    """

    modules: Modules = field(repr=False)
    data: Source | None = field(default=None, repr=False)

    @property
    def x0(self) -> Named:
        """The upper module's trainable parameters by name, copied."""
        return {name: p.detach().clone() for name, p in Modules.trained(self.modules.upper).items()}

    @property
    def y0(self) -> Named:
        """The lower module's, likewise."""
        return {name: p.detach().clone() for name, p in Modules.trained(self.modules.lower).items()}

    def oracle(self, spaces: Spaces, data: Any = None) -> Oracle:
        """First-order information, with the forward passes under autocast where that was asked for.

        Args:
            spaces: of x and y.
            data: of one step.

        Returns:
            A fresh Oracle.
        """
        if isinstance(self.lower, Term) and self.lower.mixed() is not self.lower:
            return Oracle(replace(self, lower=self.lower.mixed()), spaces, data)
        return Oracle(self, spaces, data)

    def numbered(self, source: Callable[[int], Any]) -> Numbered:
        """Your own data, with step numbers for dropout="different".

        Args:
            source: `Batches(...)`, `FromLoader(...)` or a function k -> batch.

        Returns:
            What to pass to `solve` as data.
        """
        return Numbered(source)

    def copy_to(self, result: Any) -> None:
        """Write a result (or a method's state) into the modules, in place.

        Args:
            result: with x and y, dicts of parameters by name.
        """
        with torch.no_grad():
            for module, values in ((self.modules.upper, result.x), (self.modules.lower, result.y)):
                for name, p in Modules.trained(module).items():
                    p.copy_(values[name])

    def update_statistics(self, result: Any, batches: Iterable[Any], loss: str = "lower") -> None:
        """Make the running statistics of BatchNorm anew: their mean over batches, at a result, outside of any product.

        Args:
            result: with x and y.
            batches: as the loss takes them, such as the DataLoader itself.
            loss: which of the two losses is evaluated, upper or lower.
        """
        moving = [m for m in self.modules.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
        before = [(m, m.momentum, m.training) for m in moving]
        try:
            for m in moving:
                m.reset_running_stats()
                m.momentum, m.training = None, True  # torch's word for a mean over all batches
            for batch in batches:
                self._forward(result, batch, loss)
        finally:
            for m, momentum, training in before:
                m.momentum, m.training = momentum, training

    def track_statistics(self, data: Callable[[int], Any], loss: str = "lower") -> Callable[[int, Any], None]:
        """A callback that moves BatchNorm's running statistics by their momentum, once an outer step.

        They have no part in the run itself and are not in its checkpoints: save the modules' buffers beside them, or
        call `update_statistics` at the end.

        Args:
            data: the run's.
            loss: which of the two losses is evaluated, upper or lower.

        Returns:
            The callback.
        """

        def move(iteration: int, state: Any) -> None:
            self._forward(state, part_of(data(int(state.iterations)), loss), loss)

        return move

    def _forward(self, result: Any, batch: Any, loss: str) -> None:
        """One evaluation that moves buffers."""
        term = self.upper if loss == "upper" else self.lower
        assert isinstance(term, Term)
        term.move_buffers(result.x, result.y, batch)


def from_modules(
    upper_module: nn.Module,
    lower_module: nn.Module,
    upper_loss: Loss,
    lower_loss: Loss,
    lower_loader: DataLoader[Any] | None = None,
    upper_loader: DataLoader[Any] | None = None,
    *,
    batch_norm: Normalization = "error",
    dropout: Dropout = "error",
    autocast: torch.dtype | None = None,
    micro_batch: int | None = None,
    seed: int = 0,
    upper_set: Any = None,
    lower_set: Any = None,
    lower_prox: Any = None,
) -> ModuleProblem:
    """A Problem from two modules and their losses: x the upper module's parameters, y the lower module's.

    min over x of upper_loss(upper_module, lower_module, batch), y = argmin lower_loss(upper_module, lower_module,
    batch), where the modules are called with x and y in place of their parameters. The upper module may hold a model,
    or hyper-parameters alone (an `nn.ParameterDict` or a module with a few). What an evaluation depends on beside x, y
    and the batch is decided by you, and nothing that it does to the modules stays:

    - frozen parameters (requires_grad False) are constants, tied ones are one variable under its first name;
    - buffers are constants: each evaluation starts from the modules' own and leaves them so (`linalg.isolation`);
    - BatchNorm and InstanceNorm with running statistics in train mode: `batch_norm`;
    - random numbers, of dropout modules or of any other origin: `dropout`;
    - attention runs by its mathematical kernel and LSTM and GRU without cuDNN, which alone have second derivatives.

    Cost of an evaluation: the losses'; with `micro_batch` a second forward pass for every derivative.

    Args:
        upper_module: whose trainable parameters are x.
        lower_module: whose trainable parameters are y.
        upper_loss: (upper_module, lower_module, batch) -> scalar, a mean over samples; without loaders and data there
            is no batch.
        lower_loss: likewise.
        lower_loader: batches of the lower level; with a generator of its own if it shuffles (see `FromLoader`).
        upper_loader: batches of the upper level; None for the lower ones at both.
        batch_norm: "error" refuses, "frozen" normalises by the running statistics, constants; "batch" by the batch's
            own, through which derivatives pass. Running statistics move outside of products alone: once a step by the
            callback `track_statistics`, or anew at the end by `update_statistics`.
        dropout: "error" refuses random numbers, "off" puts dropout modules (also those within LSTM and attention) into
            eval mode, "same" draws one mask for the whole run, "different" a new one at each outer step, the same for
            all evaluations of that step; then pass `problem.data`, or `problem.numbered(source)`.
        autocast: torch.bfloat16 for forward passes under autocast where first derivatives alone are taken: F always,
            and f in methods without products. Parameters, and f where its products are taken, stay float32: a product
            through bfloat16 has errors of 1e-2, on which no linear solver converges.
        micro_batch: gradient accumulation: the loss is evaluated on so many samples at a time, with a graph for one of
            them at a time (also in products, which evaluate anew), and averaged by their sizes. BatchNorm then sees
            micro-batches.
        seed: of dropout's masks and the loaders' shuffles.
        upper_set: X, a pytree of sets and Nones like x; see `Problem`.
        lower_set: likewise for y.
        lower_prox: see `Problem`.

    Returns:
        The problem, with x0, y0, data, `copy_to` and the statistics' methods.

    Raises:
        TypeError: for something else than modules, losses or loaders.
        ValueError: for unknown policies, no trainable parameter, a parameter in both modules, or autocast of parameters
            that are not float32.

    Example:
        One penalty a weight of a classifier, learnt on held-out data:

        >>> from nestopt import bilevel, linalg
        >>> X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        >>> t = (X[:, 0] > 0).long()
        >>> train, valid = (DataLoader(list(zip(X[i::2], t[i::2])), batch_size=20) for i in (0, 1))
        >>> model = nn.Linear(3, 2)
        >>> penalties = nn.ParameterDict({"weight": torch.full((2, 3), -2.0), "bias": torch.full((2,), -2.0)})
        >>> def upper_loss(penalties, model, batch):
        ...     return nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> def lower_loss(penalties, model, batch):
        ...     decay = sum((penalties[n].exp() * p**2).sum() for n, p in model.named_parameters())
        ...     return nn.functional.cross_entropy(model(batch[0]), batch[1]) + decay
        >>> problem = bilevel.from_modules(penalties, model, upper_loss, lower_loss, train, valid)
        >>> method = bilevel.AID(stopping=linalg.Stopping(rtol=0.1))
        >>> res = bilevel.solve(problem, problem.x0, problem.y0, method, data=problem.data)
        >>> problem.copy_to(res)
        >>> bool((penalties["weight"][:, 0] < penalties["weight"][:, 1]).all())
        True
    """
    for name, loss in (("upper_loss", upper_loss), ("lower_loss", lower_loss)):
        if not callable(loss):
            raise TypeError(
                f"from_modules: {name} must be a function (upper_module, lower_module, batch) -> scalar, but got "
                f"{type(loss).__name__}."
            )
    for name, loader in (("lower_loader", lower_loader), ("upper_loader", upper_loader)):
        if not (loader is None or isinstance(loader, DataLoader)):
            raise TypeError(
                f"from_modules: {name} must be a torch.utils.data.DataLoader, but got {type(loader).__name__}; other "
                "sources, such as bilevel.Batches(...), go to solve as data=."
            )
    policy = Policy(batch_norm, dropout, autocast, micro_batch, seed)
    modules = Modules(upper_module, lower_module)
    if autocast is not None:
        for path, p in modules.named_parameters():
            if p.dtype != torch.float32:
                raise ValueError(
                    f"from_modules: autocast needs float32 parameters, but {path} is {p.dtype}; call .float()."
                )
    if upper_loader is not None and lower_loader is None:
        raise ValueError("from_modules: upper_loader is given without lower_loader; pass both, or only lower_loader.")
    data: Source | None = None if lower_loader is None else FromLoader(lower_loader, upper_loader, seed=seed)
    if data is not None and dropout == "different":
        data = Numbered(data)
    return ModuleProblem(
        upper=ModuleLoss(modules, upper_loss, policy, autocast=True),
        lower=ModuleLoss(modules, lower_loss, policy),
        upper_set=upper_set,
        lower_set=lower_set,
        lower_prox=lower_prox,
        modules=modules,
        data=data,
    )
