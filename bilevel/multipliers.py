"""What methods with multipliers share: where they stand, and rows that stay with their own multipliers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nestopt.linalg import Status

from .joint_projection import JointSet
from .penalty import PenaltyState
from .upper_step import StepState
from .value_difference import ValueDifferenceState

__all__ = ["MultiplierState", "clip_code", "probe_rows", "refuse_changed_rows"]


@dataclass(frozen=True, kw_only=True)
class MultiplierState(PenaltyState):
    """Where a method for coupled constraints stands.

    Attributes:
        theta: the minimiser of the inner problem that does without F, raveled.
        multiplier: of the scaled constraints, inequalities first.
        penalty: c_k, or gamma.
        curvature: Lipschitz constant of the inner gradients.
        scales: the constraints' factors, 1 / (norm of their gradient at the start) where rows are scaled.
        inequalities: how many rows are.
        probe: the scaled constraints at a point that stays, to see whether they depend on the data.
        at_clip: steps in a row for which a multiplier was at its clip.
        conflict: the constraints that contradict each other, where the status is INFEASIBLE.
        rule: the step rule's memory.
    """

    theta: Tensor
    multiplier: Tensor
    penalty: Tensor
    curvature: Tensor
    scales: Tensor
    inequalities: int
    probe: Tensor
    at_clip: Tensor
    conflict: str
    rule: StepState

    @property
    def dual(self) -> Tensor:
        """Multipliers of the constraints as the user wrote them, inequalities first, each raveled."""
        if isinstance(self.second, ValueDifferenceState):
            return self.second.duals[0 if self.second.one_sided else 1]
        return self.scales * self.multiplier

    @property
    def inequality_dual(self) -> Tensor:
        """Multipliers of g(x, y) <= 0, >= 0."""
        return self.dual[: self.inequalities]

    @property
    def equality_dual(self) -> Tensor:
        """Multipliers of h(x, y) = 0."""
        return self.dual[self.inequalities :]

    @property
    def advice(self) -> str:
        """What the status means here."""
        if self.conflict:
            return f"no x and y were found that meet {self.conflict} together; drop or relax some of them."
        if int(self.at_clip):
            return (
                f"a multiplier is at its clip since {int(self.at_clip)} steps, so that the lower level is not the one "
                "that was asked for: raise `radius`, or look for constraints that no y can meet."
            )
        return self.status.value


def clip_code(at_clip: Tensor, limit: int) -> Tensor:
    """RUNNING, or DIVERGED where a multiplier was at its clip for too long.

    Args:
        at_clip: steps in a row.
        limit: how many end a run.

    Returns:
        A Status code.
    """
    return torch.tensor((Status.DIVERGED if int(at_clip) >= limit else Status.RUNNING).code)


def probe_rows(joint: JointSet) -> Tensor:
    """The scaled constraints at a random point that is always the same.

    Args:
        joint: the set, with the data of a step.

    Returns:
        One value a row.
    """
    spaces, scales = joint.oracle.spaces, joint.scales
    point = torch.randn(
        spaces.x.size + spaces.y.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).to(scales)
    return joint.values(point)


def refuse_changed_rows(owner: str, joint: JointSet, probe: Tensor) -> None:
    """Refuse constraints whose rows change with the data: multipliers would belong to other samples.

    Args:
        owner: the method's name.
        joint: the set, with the data of this step.
        probe: of the first step.

    Raises:
        ValueError: naming what a multiplier would lose.
    """
    c = probe_rows(joint)
    if c.shape == probe.shape and torch.allclose(c, probe, rtol=1e-6, atol=1e-6, equal_nan=True):
        return
    raise ValueError(
        f"{owner}: the constraints depend on the data, so that from step to step their rows belong to other samples, "
        "but a multiplier has to stay with its own (there is no sample key); let the constraints use all samples at "
        "every step, and only the objectives the minibatch."
    )
