"""A torch.optim optimizer, with its parameter groups and state, as a differentiable one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .adam import Adam, AdamState, AdamW
from .differentiable_optimizers import DifferentiableOptimizer
from .sgd import SGD, SGDState

__all__ = ["from_torch"]


def from_torch(optimizer: torch.optim.Optimizer, module: nn.Module) -> tuple[DifferentiableOptimizer, Any]:
    """The differentiable optimizer that takes the same steps, and its state now.

    Hyper-parameters become dicts by parameter name, so each parameter group keeps its own; tensors among them stay
    tensors, with their graph. The state (momentum, means, step counts) is copied; eps stands outside of the root, as in
    torch. Schedulers are not seen: what counts are the values of now.

    Args:
        optimizer: torch.optim.SGD, Adam or AdamW over parameters of the module.
        module: gives the names; a trainable parameter that no group holds is left as it is, with lr 0.

    Returns:
        The optimizer and its state, for `unroll_training`.

    Raises:
        TypeError: for another class of optimizer.
        ValueError: for a parameter that is none of the module's, or an option that has no differentiable form.

    Example:
        >>> from nestopt import implicit
        >>> net = torch.nn.Linear(2, 1)
        >>> optimizer, state = implicit.from_torch(torch.optim.AdamW(net.parameters(), lr=0.1), net)
        >>> optimizer.lr, state.steps
        ({'bias': 0.1, 'weight': 0.1}, {'bias': 0, 'weight': 0})
    """
    kinds: dict[type, type[DifferentiableOptimizer]] = {
        torch.optim.SGD: SGD, torch.optim.Adam: Adam, torch.optim.AdamW: AdamW,
    }  # fmt: skip
    kind = kinds.get(type(optimizer))
    if kind is None:
        raise TypeError(
            f"from_torch: the optimizer must be torch.optim.SGD, Adam or AdamW, but got {type(optimizer).__name__}; "
            "write it as a DifferentiableOptimizer with init and _step."
        )
    names = {id(p): name for name, p in module.named_parameters()}
    trainable = sorted(name for name, p in module.named_parameters() if p.requires_grad)
    groups: dict[str, dict[str, Any]] = {}
    memory: dict[str, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) not in names:
                raise ValueError(
                    f"from_torch: the optimizer holds a parameter of shape {tuple(p.shape)} that is none of "
                    f"{type(module).__name__}'s; make it from module.parameters()."
                )
            groups[names[id(p)]], memory[names[id(p)]] = group, optimizer.state.get(p, {})
    parameters = dict(module.named_parameters())
    still = {**optimizer.defaults, "lr": 0.0, "weight_decay": 0.0}

    def column(key: str) -> dict[str, Any]:
        return {name: groups.get(name, still)[key] for name in trainable}

    def kept(key: str) -> dict[str, Any]:
        return {name: _copy(memory.get(name, {}).get(key)) for name in trainable}

    if kind is SGD:
        hypers = {key: column(key) for key in ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")}
        return SGD(**hypers), SGDState(kept("momentum_buffer"))
    hypers = {key: column(key) for key in ("lr", "eps", "weight_decay", "amsgrad", "maximize")}
    beta1, beta2 = ({name: beta[i] for name, beta in column("betas").items()} for i in range(2))
    decoupled = {bool(group.get("decoupled_weight_decay")) for group in groups.values()}
    if len(decoupled) > 1:
        raise ValueError(
            "from_torch: decoupled_weight_decay must be the same in every parameter group of the optimizer, but it is "
            "True in some and False in others; use AdamW with weight_decay=0 where none is wanted."
        )
    adam = (AdamW if True in decoupled else Adam)(**hypers, betas=(beta1, beta2), eps_root=0.0)
    fresh = adam.init({name: parameters[name] for name in trainable})

    def filled(key: str, default: dict[str, Any]) -> dict[str, Any]:
        return {name: default[name] if value is None else value for name, value in kept(key).items()}

    steps = {name: int(value) for name, value in filled("step", fresh.steps).items()}
    mean, square = filled("exp_avg", fresh.mean), filled("exp_avg_sq", fresh.square)
    return adam, AdamState(steps, mean, square, filled("max_exp_avg_sq", fresh.largest))


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
