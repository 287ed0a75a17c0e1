"""BSVRB: many lower problems of one kind, a few of them and a few samples of each at a step."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import optree
import torch
from torch import Tensor

from .assumptions import Assumptions
from .estimators import STORM, Estimator, Pieces
from .problem import Problem, Spaces
from .single_loop import SingleLoop, SingleLoopState, pieces_at
from .stochastic import Draw, Source

__all__ = ["BSVRB", "BlockBatches", "BlockDraw"]


@dataclass(frozen=True)
class BlockDraw(Draw):
    """Samples of some of the blocks.

    Attributes:
        blocks: which, sorted.
    """

    blocks: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))


class BlockBatches(Source):
    """Samples of many lower problems: step k draws some blocks, and some samples of each.

    The objectives get tensors of shape (blocks, samples, ...) and the matching rows of y, and must return the MEAN
    over the blocks at hand, at both levels.

    Args:
        lower: a pytree of tensors of shape (m, n, ...): n samples of each of m blocks.
        upper: likewise, with the same m; None for the lower level's samples, drawn independently.
        blocks: how many blocks a step draws.
        batch_size: how many samples of each.
        seed: of the draws.

    Raises:
        ValueError: if the tensors do not share m, or more is to be drawn than there is.

    Example:
        >>> batches = BlockBatches(torch.arange(12.0).reshape(4, 3), blocks=2, batch_size=1)
        >>> batches(0).blocks.shape, batches(0).lower.shape
        (torch.Size([2]), torch.Size([2, 1]))
    """

    def __init__(self, lower: Any, upper: Any = None, *, blocks: int, batch_size: int, seed: int = 0) -> None:
        self.lower, self.upper = lower, lower if upper is None else upper
        self.blocks, self.batch_size, self.seed = blocks, batch_size, seed
        leaves: list[Tensor] = [*optree.tree_leaves(self.lower), *optree.tree_leaves(self.upper)]
        shapes = {tuple(leaf.shape[:1]) for leaf in leaves}
        if len(shapes) != 1:
            raise ValueError(f"BlockBatches: all tensors must share their first dimension, the blocks, not {shapes}.")
        self.count: int = leaves[0].shape[0]
        if not 1 <= blocks <= self.count:
            raise ValueError(f"BlockBatches: blocks must be between 1 and {self.count}, but got {blocks}.")
        least = min(leaf.shape[1] for leaf in leaves)
        if not 1 <= batch_size <= least:
            raise ValueError(f"BlockBatches: batch_size must be between 1 and {least}, but got {batch_size}.")

    def draw(self, k: int, i: int = 0) -> BlockDraw:
        """The i-th independent draw of step k.

        Args:
            k: outer step.
            i: which draw of that step.

        Returns:
            The draw.
        """
        rng = np.random.default_rng([self.seed, k, i])
        blocks = torch.from_numpy(np.sort(rng.choice(self.count, self.blocks, replace=False)))
        size = self.blocks * self.batch_size
        upper, lower = self._take(self.upper, blocks, rng), self._take(self.lower, blocks, rng)
        return BlockDraw(upper, lower, samples=(size, size), position=k, source=self, blocks=blocks)

    def whole(self) -> BlockDraw:
        """All samples of all blocks."""
        sizes = [int(np.prod(optree.tree_leaves(part)[0].shape[:2])) for part in (self.upper, self.lower)]
        every = torch.arange(self.count)
        return BlockDraw(self.upper, self.lower, samples=(sizes[0], sizes[1]), source=self, complete=True, blocks=every)

    def __len__(self) -> int:
        """Draws in which as many blocks are seen as there are."""
        return -(-self.count // self.blocks)

    def _take(self, values: Any, blocks: Tensor, rng: np.random.Generator) -> Any:
        n = optree.tree_leaves(values)[0].shape[1]
        rows = torch.from_numpy(rng.permuted(np.tile(np.arange(n), (len(blocks), 1)), axis=1)[:, : self.batch_size])
        return optree.tree_map(lambda leaf: leaf[blocks[:, None].to(leaf.device), rows.to(leaf.device)], values)


@dataclass(frozen=True)
class BSVRB(SingleLoop):
    """Blockwise stochastic variance-reduced bilevel method: F = mean_i F_i(x, y_i), y_i = argmin f_i(x, .), i = 1..m.

    y is a pytree of tensors with the blocks as first dimension, and the data are `BlockBatches`. A step sees |I| blocks
    and B samples of each. For i in I, with the same samples at the present and the last point,

        s_i+ = (1 - c) s_i + c g_i + h (g_i - g_i_last),   h = (m - |I|) / (|I| (1 - c)) + 1 - c,

    where g_i is f_i's gradient in y_i, and likewise for the adjoint v_i with f_yy v_i - F_y; then y_i -= b s_i,
    v_i -= b u_i. x moves by a STORM estimate of F_x - mean_i f_xy v_i. Blocks that were not drawn stay as they are.
    On other data, or none, it is the single loop with STORM (see `SingleLoop`, MRBO).

    `error` is the largest of |f_y|, |F_y - H v| and |P_X(x - g) - x| over all blocks, measured once an epoch on all
    samples, at the point returned; CONVERGED means error <= max(rtol (|F_x| + |f_xy v|), atol), the scale taken on the
    first blocks at x0.

    Cost of a step: two gradients of F, two of f, four products, on |I| B samples: independent of m but for copying y.

    Args:
        step_size: b, a number or a schedule, for means over |I| blocks; None for automatic steps.
        upper_step: a, likewise, or an UpperStep such as TorchOptimizer; None for automatic ones.
        inner: 1 on blocks.
        estimator: STORM(momentum): c at step k, both for the blocks and for x.
        stopping: rtol None is 1e-9 in float64 and 1e-4 in float32.

    Reference:
        Hu, Qiu, Guo, Zhang & Yang 2023, "Blockwise stochastic variance-reduced methods with parallel speedup for
        multi-block bilevel optimization", algorithm 2 (a v for every block).

    Example:
        >>> from nestopt import bilevel
        >>> from nestopt.linalg import Stopping
        >>> t = torch.linspace(0, 1, 6, dtype=torch.float64).reshape(6, 1)
        >>> problem = bilevel.Problem(
        ...     upper=lambda x, y, d: ((y[:, None] - d) ** 2).mean() + x**2, lower=lambda x, y, d: ((y - x) ** 2).mean()
        ... )
        >>> method = bilevel.BSVRB(stopping=Stopping(rtol=1e-2, max_iter=500))
        >>> start = torch.zeros((), dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
        >>> res = bilevel.solve(problem, *start, method, data=bilevel.BlockBatches(t, blocks=3, batch_size=1))
        >>> abs(res.x.item() - 0.25) < 0.05
        True
    """

    estimator: Estimator = STORM()
    decay: ClassVar[tuple[float, float]] = (1 / 3, 1 / 3)

    assumptions: ClassVar[Assumptions] = Assumptions("single loop", "Hu et al. 2023", products=True, stochastic=True)

    def init(self, problem: Problem, x0: Any, y0: Any, data: Any = None) -> SingleLoopState:
        """As `SingleLoop.init`, on the first blocks where the data have blocks.

        Args:
            problem: with a smooth, unconstrained lower level.
            x0: upper start.
            y0: lower start, with the blocks as first dimension.
            data: the first batch.

        Returns:
            The evaluated state.

        Raises:
            ValueError: if y0 lacks the blocks' dimension, or a step has several inner steps.
        """
        if not isinstance(data, BlockDraw) or data.complete:
            return super().init(problem, x0, y0, data)
        if self.inner != 1 or not isinstance(self.estimator, STORM):
            raise ValueError("BSVRB: on blocks a step has inner=1 and the estimator is STORM(momentum).")
        count = data.source.count if isinstance(data.source, BlockBatches) else int(data.blocks.max()) + 1
        spaces = Spaces.of(x0, y0)
        wrong = [tuple(shape) for shape in spaces.y.shapes if len(shape) == 0 or shape[0] != count]
        if wrong:
            raise ValueError(
                f"BSVRB: every tensor of y must have the {count} blocks as its first dimension, but got {wrong}."
            )
        tree = spaces.y.unflatten(spaces.y.flatten(y0).detach())
        few = super().init(problem, x0, _rows(tree, data.blocks), data)
        if "estimate" not in few.memory:  # a fault at the start
            return replace(few, spaces=spaces, y_vector=spaces.y.flatten(tree), adjoint=spaces.y.flatten(tree) * 0)
        s = replace(few, spaces=spaces, y_vector=spaces.y.flatten(tree), adjoint=spaces.y.flatten(tree) * 0)
        estimate = Pieces(**few.memory["estimate"])
        share = len(data.blocks) / count  # a block moves at so many of the steps
        track = few.memory["track"]
        track = {**track, "rate": share * track["rate"]} if track else track
        kept = {name: value for name, value in few.memory.items() if name not in ("estimate", "estimator")}
        first = {
            "s": _put(s.adjoint, spaces, few.spaces, data.blocks, estimate.lower_y),
            "u": _put(s.adjoint, spaces, few.spaces, data.blocks, estimate.hessian_v - estimate.upper_y),
        }
        y = _put(s.y_vector, spaces, few.spaces, data.blocks, few.y_vector)
        v = _put(s.adjoint, spaces, few.spaces, data.blocks, few.adjoint)
        memory = {**kept, "rate": share * kept["rate"], "track": track, **first, "x": s.x_vector, "y": y, "v": v}
        return replace(s, y_vector=y, adjoint=v, memory=memory)

    def step(self, problem: Problem, state: SingleLoopState, data: Any = None) -> SingleLoopState:
        """One step on the drawn blocks.

        Args:
            problem: the problem.
            state: the state.
            data: the step's draw.

        Returns:
            The next state.
        """
        if "u" not in state.memory:
            return super().step(problem, state, data)
        s, m, k, blocks = state, state.memory, int(state.iterations), data.blocks
        b, a = self.sizes(s, k)
        rule = self.sample_rule(problem)
        x = problem.project(s.x_vector + a * s.rule.size * rule.direction(s.rule, s.hypergradient), s.spaces)
        few = Spaces.of(s.x, _rows(s.y, blocks))
        here, point, spent = pieces_at(problem, _sub(s, few, blocks, x, s.y_vector, s.adjoint), data)
        before, _, more = pieces_at(problem, _sub(s, few, blocks, m["x"], m["y"], m["v"]), data)
        assert isinstance(self.estimator, STORM)
        c = self.estimator.weight(k + 1)
        h = (data.source.count - len(blocks)) / (len(blocks) * max(1 - c, 1e-3)) + 1 - c if c < 1 else 0.0
        g = here.upper_x - here.cross_v + (1 - c) * (s.hypergradient - before.upper_x + before.cross_v)
        counts = s.counts + spent + more
        if not (point.finite() and bool(torch.isfinite(g).all())):
            return self.lost(s, counts)
        tables, moved = {}, {}
        for name, new, old, vector in (
            ("s", here.lower_y, before.lower_y, s.y_vector),
            ("u", here.hessian_v - here.upper_y, before.hessian_v - before.upper_y, s.adjoint),
        ):
            last = few.y.flatten(_rows(s.spaces.y.unflatten(m[name]), blocks))
            estimate = (1 - c) * last + c * new + h * (new - old)
            tables[name] = _put(m[name], s.spaces, few, blocks, estimate)
            rows = few.y.flatten(_rows(s.spaces.y.unflatten(vector), blocks))
            moved[name] = _put(vector, s.spaces, few, blocks, rows - b * estimate)
        last_point = {"x": x, "y": s.y_vector, "v": s.adjoint}
        there = replace(
            s, x_vector=x, y_vector=moved["s"], adjoint=moved["u"], hypergradient=g, value=point.upper, counts=counts,
            iterations=s.iterations + 1, rule=rule.after(s.rule, x - s.x_vector, g - s.hypergradient, point.upper),
            memory={**m, **tables, **last_point},
        )  # fmt: skip
        return replace(there, **self.certificate(problem, there, here))


def _rows(tree: Any, blocks: Tensor) -> Any:
    return optree.tree_map(lambda leaf: leaf[blocks.to(leaf.device)], tree)


def _put(vector: Tensor, spaces: Spaces, few: Spaces, blocks: Tensor, rows: Tensor) -> Tensor:
    """The raveled vector with the rows of some blocks replaced."""
    parts = zip(spaces.y.split(vector), few.y.split(rows), strict=True)
    return spaces.y.join([leaf.index_copy(0, blocks.to(leaf.device), part) for leaf, part in parts])


def _sub(s: SingleLoopState, few: Spaces, blocks: Tensor, x: Tensor, y: Tensor, v: Tensor) -> SingleLoopState:
    """The state of some blocks alone."""
    y, v = (few.y.flatten(_rows(s.spaces.y.unflatten(part), blocks)) for part in (y, v))
    return replace(s, spaces=few, x_vector=x, y_vector=y, adjoint=v)
