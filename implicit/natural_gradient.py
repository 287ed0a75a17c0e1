"""Natural-gradient training with M-FAC: a torch optimizer that preconditions by a window of past gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from nestopt.linalg import MFAC
from nestopt.linalg.result import all_finite

__all__ = ["MFACOptimizer"]


class MFACOptimizer(torch.optim.Optimizer):
    r"""Gradient steps preconditioned by the damped empirical Fisher matrix of the last `window` gradients.

    For each parameter group, raveled to one vector w with gradient g of the mini-batch,

        F = damping I + (1 / window) sum of g g' over the window, g included
        u <- momentum u + F^-1 g,  w <- w - lr (u + weight_decay w)

    F^-1 g is exact. While the window fills, its empty rows count as zero gradients, so that the first steps are longer
    than later ones of equal gradients: the very first has |F^-1 g| = |g| / (damping + |g|^2 / window). The weight decay
    is decoupled, since the window holds gradients of the loss alone. The empirical Fisher matrix of mini-batch
    gradients is not the Hessian: what this does is to shorten steps along directions in which gradients were large.

    A parameter whose .grad is None has a zero in the window's row and is left as it is, weight decay and momentum
    included; a group in which all are None does nothing. Sparse gradients are refused.

    Cost: a step reads the window twice (the append, the product), plus window^3 / 3 for the factor; memory of
    window * (number of parameters) numbers a group.

    Args:
        params: an iterable of parameters, of named ones, or of dicts that are groups with options of their own. A group
            has one window, one dtype and one device; its parameters cannot change after its first step.
        lr: step size; 1e-3 with momentum 0.9 in the paper. 1 is a full natural-gradient step.
        window: gradients kept; 32 to 1024.
        damping: lam of F, in units of squared gradients; 1e-6 to 1e-3.
        momentum: in [0, 1).
        weight_decay: at least 0, decoupled.

    Raises:
        ValueError: if an option is out of range.

    Reference:
        Frantar, Kurtic & Alistarh 2021, M-FAC, section 4 (dynamic algorithm); decoupled decay: Loshchilov & Hutter
        2019.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([2.0, 4.0]))
        >>> optimizer = MFACOptimizer([w], lr=0.5, window=1, damping=0.25)
        >>> (w**2).sum().div(4).backward()  # gradient (1, 2), F^-1 g = g / 5.25
        >>> optimizer.step()
        >>> w.detach()
        tensor([1.9048, 3.8095])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        window: int = 256,
        damping: float = 1e-5,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        self._windows: list[MFAC | None] = []
        options = dict(lr=lr, window=window, damping=damping, momentum=momentum, weight_decay=weight_decay)
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with a window of its own; see torch.optim.Optimizer.

        Args:
            param_group: "params" and any of the options.

        Raises:
            ValueError: if an option is out of range, or the group mixes dtypes or devices.
        """
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise
        self._windows.append(None)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every group.

        Args:
            closure: evaluates the loss anew, with its gradients, and returns it.

        Returns:
            The closure's value; None without one.

        Raises:
            TypeError: if a gradient is sparse.
            ValueError: if a gradient is NaN or infinite; no group has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [self._gradient(group, i) for i, group in enumerate(self.param_groups)]
        for i, (group, g) in enumerate(zip(self.param_groups, gradients, strict=True)):
            if g is None:
                continue
            F = self._window(i, g)
            F.append(g)
            self._move(group, F.solve_newest())
        return loss

    def _gradient(self, group: dict[str, Any], number: int) -> Tensor | None:
        params = group["params"]
        if all(p.grad is None for p in params):
            return None
        if any(p.grad is not None and p.grad.layout != torch.strided for p in params):
            raise TypeError(
                f"MFACOptimizer: a gradient of group {number} is sparse; the window holds dense rows: use "
                "sparse=False in the embedding, or another optimizer for it."
            )
        g = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in params])
        if not all_finite(g):
            raise ValueError(
                f"MFACOptimizer: the gradient of group {number} has NaN or infinite entries; skip this step (a "
                "GradScaler does), or lower lr. No parameter has moved."
            )
        return g

    def _window(self, number: int, g: Tensor) -> MFAC:
        F, group = self._windows[number], self.param_groups[number]
        if F is None:
            F = MFAC.window(group["window"], g.numel(), group["damping"], dtype=g.dtype, device=g.device)
            self._windows[number] = F
        F.damping = group["damping"]
        return F

    def _move(self, group: dict[str, Any], direction: Tensor) -> None:
        parts = torch.split(direction, [p.numel() for p in group["params"]])
        for p, part in zip(group["params"], parts, strict=True):
            if p.grad is None:
                continue
            u = part.view_as(p)
            if group["momentum"]:
                state = self.state[p]
                u = u + group["momentum"] * state["momentum_buffer"] if state else u.clone()
                state["momentum_buffer"] = u
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(u, alpha=group["lr"])

    def state_dict(self) -> dict[str, Any]:
        """The state of torch.optim.Optimizer, and the windows, which a run resumed from it goes on with bit for bit."""
        windows = [None if F is None else F.state_dict() for F in self._windows]
        return {**super().state_dict(), "windows": windows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state, with its windows; see torch.optim.Optimizer.

        Args:
            state_dict: from `state_dict`, of an optimizer with the same groups; it is copied.

        Raises:
            ValueError: if the groups differ.
        """
        if len(state_dict.get("windows", ())) != len(self.param_groups):
            raise ValueError(
                f"MFACOptimizer.load_state_dict: the state must come from an MFACOptimizer of {len(self.param_groups)} "
                f"groups, but it has the entries {sorted(state_dict)}."
            )
        super().load_state_dict(state_dict)
        self._windows = [None] * len(self.param_groups)
        for i, (group, saved) in enumerate(zip(self.param_groups, state_dict["windows"], strict=True)):
            if saved is not None:
                self._window(i, torch.cat([p.detach().reshape(-1) for p in group["params"]])).load_state_dict(saved)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_windows": self._windows}


def _check_group(group: dict[str, Any]) -> None:
    for name, good, rule in (
        ("lr", 0 <= group["lr"] < math.inf, "a number >= 0"),
        ("window", isinstance(group["window"], int) and group["window"] >= 1, "an integer >= 1"),
        ("damping", 0 < group["damping"] < math.inf, "a finite number > 0"),
        ("momentum", 0 <= group["momentum"] < 1, "in [0, 1)"),
        ("weight_decay", 0 <= group["weight_decay"] < math.inf, "a number >= 0"),
    ):
        if not good:
            raise ValueError(f"MFACOptimizer: {name} must be {rule}, but got {group[name]}.")
    kinds = {(p.dtype, p.device) for p in group["params"]}
    if len(kinds) > 1:
        raise ValueError(
            f"MFACOptimizer: the parameters of a group must share one dtype and device, but got "
            f"{sorted(map(str, kinds))}; make a group for each."
        )
