"""Any torch.optim optimizer and scheduler as the rule of the upper level's steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .upper_step import StepState, UpperStep

__all__ = ["TorchOptimizer"]


@dataclass(frozen=True, repr=False)
class TorchOptimizer(UpperStep):
    """Upper steps by an optimizer of torch.optim, with a scheduler if wanted: x+ = P_X(x + the optimizer's step).

    The optimizer sees the raveled x as one parameter and the hypergradient as its `.grad`; its state and the
    scheduler's live in the method's own state, so that a run resumes to the last bit. After its step x is projected
    onto the upper set, and every finite trial is accepted. Usable by the single-loop methods and by AID.

    Cost: none beside the optimizer's own; nothing is evaluated anew, so an optimizer with a closure (LBFGS) is refused.

    Args:
        optimizer: params -> optimizer, such as `lambda params: torch.optim.Adam(params, lr=1e-2)`.
        scheduler: optimizer -> scheduler, stepped once an upper step, with F(x, y) for ReduceLROnPlateau.

    Raises:
        TypeError: if they build something else.
        ValueError: for an optimizer that needs a closure.

    Example:
        >>> from nestopt import bilevel
        >>> from nestopt.linalg import Stopping
        >>> rule = TorchOptimizer(lambda params: torch.optim.Adam(params, lr=0.1))
        >>> problem = bilevel.Problem(lambda x, y: ((y - 1) ** 2).sum(), lambda x, y: ((y - x) ** 2).sum())
        >>> start = torch.zeros(1, dtype=torch.float64)
        >>> method = bilevel.AID(upper_step=rule, stopping=Stopping(rtol=1e-6, max_iter=500))
        >>> bilevel.solve(problem, start, start.clone(), method).x
        tensor([1.0000], dtype=torch.float64)
    """

    optimizer: Callable[[Any], torch.optim.Optimizer]
    scheduler: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        built, scheduler = self._build(torch.zeros(1))
        if isinstance(built, torch.optim.LBFGS):
            raise ValueError(
                "TorchOptimizer: LBFGS evaluates the objective by a closure within one step; use QuasiNewtonStep()."
            )
        if scheduler is not None and not callable(getattr(scheduler, "step", None)):
            raise TypeError(f"TorchOptimizer: scheduler must build a scheduler, but it built {scheduler!r}.")

    def __repr__(self) -> str:
        # an optimizer's own words, not a lambda's address: a checkpoint compares them over processes
        built, scheduler = self._build(torch.zeros(1))
        options = ", ".join(f"{name}={value!r}" for name, value in built.defaults.items())
        words = f"{type(built).__name__}({options})"
        if scheduler is not None:
            known = {n: v for n, v in scheduler.state_dict().items() if isinstance(v, (int, float, list))}
            words += f", {type(scheduler).__name__}({known})"
        return f"TorchOptimizer({words})"

    def start(self, x: Tensor, hypergradient: Tensor, value: Tensor) -> StepState:
        """The optimizer's first state at x."""
        built, scheduler = self._build(x)
        memory = {"x": x, "gradient": hypergradient, **_saved(built, scheduler)}
        none = x.new_zeros(0, len(x))
        return StepState(x.new_ones(()), value[None], none, none, memory)

    def direction(self, s: StepState, hypergradient: Tensor) -> Tensor:
        """The optimizer's displacement from the current x; its state stays."""
        parameter, _, _ = self._moved(s, hypergradient, None)
        step: Tensor = parameter - s.memory["x"]
        return step

    def accepts(self, s: StepState, dx: Tensor, hypergradient: Tensor, value: Tensor, noise: float) -> bool:
        """Every finite value."""
        return bool(torch.isfinite(value))

    def after(self, s: StepState, dx: Tensor, change: Tensor | None, value: Tensor) -> StepState:
        """The optimizer's state after its step; after a non-finite trial there is nothing to try, so the size is 0."""
        if change is None:
            return replace(s, size=torch.zeros_like(s.size))
        _, built, scheduler = self._moved(s, s.memory["gradient"], value)
        memory = {"x": s.memory["x"] + dx, "gradient": s.memory["gradient"] + change, **_saved(built, scheduler)}
        return replace(s, values=value[None], memory=memory)

    def _build(self, x: Tensor) -> tuple[torch.optim.Optimizer, Any]:
        parameter = torch.nn.Parameter(x.detach().clone())
        parameter.grad = torch.zeros_like(parameter)
        built = self.optimizer([parameter])
        if not isinstance(built, torch.optim.Optimizer):
            raise TypeError(
                "TorchOptimizer: optimizer must build a torch.optim.Optimizer from a list of parameters, but it built "
                f"{type(built).__name__}; pass e.g. lambda params: torch.optim.Adam(params, lr=1e-2)."
            )
        return built, None if self.scheduler is None else self.scheduler(built)

    def _moved(self, s: StepState, gradient: Tensor, value: Tensor | None) -> tuple[Tensor, torch.optim.Optimizer, Any]:
        """The parameter, optimizer and scheduler after one step from the saved state."""
        built, scheduler = self._build(s.memory["x"])
        built.load_state_dict(copy.deepcopy(s.memory["optimizer"]))  # a step updates the tensors of its state in place
        parameter = built.param_groups[0]["params"][0]
        parameter.grad = gradient.detach().clone()
        with torch.enable_grad():
            built.step()
        if scheduler is not None and value is not None:
            scheduler.load_state_dict(copy.deepcopy(s.memory["scheduler"]))
            plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            scheduler.step(float(value)) if plateau else scheduler.step()
        return parameter.detach(), built, scheduler


def _saved(built: torch.optim.Optimizer, scheduler: Any) -> dict[str, Any]:
    state = {"optimizer": built.state_dict()}
    return state if scheduler is None else {**state, "scheduler": scheduler.state_dict()}
