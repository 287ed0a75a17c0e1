"""BSVRB: many lower problems of one kind, a few of them and a few samples of each at a step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import optree
import torch
from torch import Tensor

from nestopt.linalg import Status
from nestopt.linalg.result import all_finite
from nestopt.linalg.tree import Ravel

from .assumptions import Assumptions
from .block_batches import BlockDraw
from .counts import Counts
from .estimators import STORM, Estimator, Pieces
from .problem import Linearization, Problem, Spaces
from .single_loop import SingleLoop, SingleLoopState, pieces_of, seen_samples

__all__ = ["BSVRB"]


class _Seen(NamedTuple):
    """One look at the drawn blocks: their space, pieces, adjoints and (if tracked) Hessians; whether all is finite."""

    space: Ravel
    pieces: Pieces
    value: Tensor
    adjoint: Tensor
    hessians: Tensor
    counts: Counts
    finite: bool


@dataclass(frozen=True)
class BSVRB(SingleLoop):
    """Blockwise stochastic variance-reduced bilevel method: F = mean_i F_i(x, y_i), y_i = argmin f_i(x, .), i = 1..m.

    y is a pytree of tensors with the blocks as first dimension, and the data are `BlockBatches`. A step sees |I| blocks
    and B samples of each. For i in I, with the same samples at the present and the last point,

        s_i+ = (1 - c) s_i + c g_i + h (g_i - g_i_last),   h = (m - |I|) / (|I| (1 - c)) + 1 - c,

    where g_i is f_i's gradient in y_i (s_i = g_i at a block's first draw); then y_i -= b s_i. The adjoint comes in the
    paper's two versions: track="adjoint" treats f_yy v_i - F_y likewise and takes a step v_i -= b u_i, track="hessian"
    treats f_i's Hessian likewise, H_i, and solves H_i v_i = F_y, with H_i's eigenvalues kept above half of the least
    one seen. x moves by a STORM estimate of F_x - mean_i f_xy v_i. Blocks that were not drawn stay as they are. On
    other data, or none, it is the single loop with STORM (see `SingleLoop`, MRBO).

    Which one: v_i takes 2 products a step and lags by the condition number of f_yy; H_i takes one for each dimension of
    a block, and memory for its square, and v_i is exact once H_i is, however ill-conditioned: for blocks of small
    dimension.

    `error` is the largest of |f_y|, |F_y - H v| and |P_X(x - g) - x| over all blocks, measured once an epoch on all
    samples, at the point returned; CONVERGED means error <= max(rtol (|F_x| + |f_xy v|), atol), the scale taken on the
    first blocks at x0.

    Cost of a step: two gradients of F, two of f, four products (by track="hessian" and blocks of dimension d: 4 + 2 d),
    on |I| B samples: independent of m but for copying y, and what is tracked for it.

    Args:
        step_size: b, a number or a schedule, for means over |I| blocks; None for automatic steps, below 1 / (h L).
        upper_step: a, likewise, or an UpperStep such as TorchOptimizer; None for automatic ones.
        inner: 1 on blocks.
        estimator: STORM(momentum): c at step k, both for the blocks and for x; for the blocks 1/2 at most.
        stopping: rtol None is 1e-9 in float64 and 1e-4 in float32.
        track: "adjoint" (the paper's second version) or "hessian" (its first).

    Raises:
        ValueError: for another track.

    Reference:
        Hu, Qiu, Guo, Zhang & Yang 2023, "Blockwise stochastic variance-reduced methods with parallel speedup for
        multi-block bilevel optimization", algorithms 1 and 2.

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
    track: Literal["adjoint", "hessian"] = "adjoint"

    assumptions: ClassVar[Assumptions] = Assumptions("single loop", "Hu et al. 2023", products=True, stochastic=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.track not in ("adjoint", "hessian"):
            raise ValueError(f'BSVRB: track must be "adjoint" or "hessian", but got {self.track!r}.')

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
            ValueError: if y0 lacks the blocks' dimension, a step has several inner steps, or nothing has Hessians of
                blocks to track.
        """
        if not isinstance(data, BlockDraw) or data.complete:
            if self.track == "hessian":
                raise ValueError(
                    'BSVRB: track="hessian" keeps a Hessian for every block, but the data are not draws of '
                    'BlockBatches; pass data=bilevel.BlockBatches(...), or track="adjoint".'
                )
            return super().init(problem, x0, y0, data)
        if self.inner != 1 or not isinstance(self.estimator, STORM):
            raise ValueError("BSVRB: on blocks a step has inner=1 and the estimator is STORM(momentum).")
        spaces = Spaces.of(x0, y0)
        blocks = data.blocks.to(spaces.y.device)
        wrong = [tuple(shape) for shape in spaces.y.shapes if len(shape) == 0 or shape[0] != data.count]
        if wrong:
            raise ValueError(
                f"BSVRB: every tensor of y must have the {data.count} blocks as its first dimension, but got {wrong}."
            )
        start = spaces.y.flatten(y0).detach()
        first = super().init(problem, x0, _rows(spaces.y.unflatten(start), blocks), data)
        s = replace(first, spaces=spaces, y_vector=start, adjoint=torch.zeros_like(start))
        if "estimate" not in first.memory:  # a fault at the start
            return s
        few, estimate, every = first.spaces.y, Pieces(**first.memory["estimate"]), _matrix(spaces.y, s.adjoint)
        s = replace(
            s, y_vector=_put(spaces.y, start, blocks, _matrix(few, first.y_vector)),
            adjoint=_put(spaces.y, s.adjoint, blocks, _matrix(few, first.adjoint)),
        )  # fmt: skip
        share = len(blocks) / data.count  # a block moves at so many of the steps
        kept = {name: value for name, value in first.memory.items() if name not in ("estimate", "estimator")}
        track = {**kept["track"], "rate": share * kept["track"]["rate"]} if kept["track"] else kept["track"]
        tables = {"s": every.index_copy(0, blocks, _matrix(few, estimate.lower_y))}
        met = torch.zeros(data.count, dtype=torch.bool, device=blocks.device).index_fill(0, blocks, True)
        memory = {**kept, "rate": share * kept["rate"], "track": track, "met": met, "x": s.x_vector, "y": s.y_vector}
        memory["drawn"] = len(blocks)
        if self.track == "adjoint":
            tables["u"] = every.index_copy(0, blocks, _matrix(few, estimate.hessian_v - estimate.upper_y))
            return replace(s, memory={**memory, **tables, "v": s.adjoint})
        point = Linearization(problem, first.spaces, s.x_vector, first.y_vector, data)
        found, spent = _hessians(point, data)
        if not all_finite(found):
            return replace(s, codes=torch.tensor(Status.NON_FINITE.code))
        values = torch.linalg.eigvalsh(found)
        floor = (values.amin() / 2).clamp_min(1e-6 * values.amax())
        H = found.mean(0).expand(data.count, *found.shape[1:]).index_copy(0, blocks, found)
        counts = s.counts + spent + Counts(1, 1)
        return replace(s, counts=counts, memory={**memory, **tables, "H": H, "H_last": H, "floor": floor})

    def step(self, problem: Problem, state: SingleLoopState, data: Any = None) -> SingleLoopState:
        """One step on the drawn blocks.

        Args:
            problem: the problem.
            state: the state.
            data: the step's draw.

        Returns:
            The next state.

        Raises:
            ValueError: for a momentum above 1/2.
        """
        if "met" not in state.memory:
            return super().step(problem, state, data)
        s, m, k, space = state, state.memory, int(state.iterations), state.spaces.y
        blocks = data.blocks.to(space.device)
        b, a = self.sizes(s, k)
        assert isinstance(self.estimator, STORM)
        c = self.estimator.weight(k + 1, b * float(m["high"]))
        if self.estimator.momentum is None:
            c = min(0.5, c)
        elif not 0 < c <= 0.5:
            raise ValueError(
                f"BSVRB: on blocks the momentum must be in (0, 1/2], since h grows like 1 / (1 - c), but it is {c} at "
                f"step {k + 1}; pass STORM(lambda k: 0.1), or STORM()."
            )
        h = (data.count - len(blocks)) / (len(blocks) * (1 - c)) + 1 - c
        if self.step_size is None:
            b = min(b, 1 / (h * float(m["high"])))  # s_i shrinks by h b f_yy where a block is drawn twice running
        rule = self.sample_rule(problem)
        x = problem.project(s.x_vector + a * s.rule.size * rule.direction(s.rule, s.hypergradient), s.spaces)
        here = self._look(problem, s, data, x, s.y_vector, s.adjoint if "v" in m else m["H"])
        before = self._look(problem, s, data, m["x"], m["y"], m["v"] if "v" in m else m["H_last"])
        new, old, counts = here.pieces, before.pieces, s.counts + here.counts + before.counts
        g = new.upper_x - new.cross_v + (1 - c) * (s.hypergradient - old.upper_x + old.cross_v)
        if not (here.finite and bool(torch.isfinite(g).all())):
            return self.lost(replace(s, iterations=s.iterations + 1), counts)

        def follow(name: str, now: Tensor, last: Tensor) -> Tensor:
            """The table with the drawn blocks' rows brought up to date."""
            met = m["met"][blocks].reshape(-1, *[1] * (now.ndim - 1))
            estimate = (1 - c) * m[name][blocks] + c * now + h * (now - last)
            table: Tensor = m[name].index_copy(0, blocks, torch.where(met, estimate, now))
            return table

        few = here.space
        tables = {"s": follow("s", _matrix(few, new.lower_y), _matrix(few, old.lower_y))}
        y = _put(space, s.y_vector, blocks, _matrix(space, s.y_vector)[blocks] - b * tables["s"][blocks])
        if "v" in m:
            r, r_last = new.hessian_v - new.upper_y, old.hessian_v - old.upper_y
            tables |= {"u": follow("u", _matrix(few, r), _matrix(few, r_last)), "v": s.adjoint}
            v = _put(space, s.adjoint, blocks, _matrix(space, s.adjoint)[blocks] - b * tables["u"][blocks])
        else:
            tables |= {"H": follow("H", here.hessians, before.hessians), "H_last": m["H"]}
            least = torch.linalg.eigvalsh(here.hessians).amin() / 2
            tables["floor"] = torch.minimum(m["floor"], least).clamp_min(1e-6 * m["high"])
            v = _put(space, s.adjoint, blocks, _matrix(few, here.adjoint))
        size = here.adjoint.norm()
        high = torch.maximum(m["high"], torch.where(size > 0, new.hessian_v.norm() / size, 0.0))
        met = m["met"].index_fill(0, blocks, True)
        there = replace(
            s, x_vector=x, y_vector=y, adjoint=v, hypergradient=g, value=here.value, counts=counts,
            iterations=s.iterations + 1, rule=rule.after(s.rule, x - s.x_vector, g - s.hypergradient, here.value),
            memory={**m, **tables, "x": x, "y": s.y_vector, "met": met, "high": high},
        )  # fmt: skip
        return replace(there, **self.certificate(problem, there, new))

    def measure(self, problem: Problem, state: SingleLoopState, held: Any) -> SingleLoopState:
        """As `SingleLoop.measure`; where Hessians are tracked, v_i = H_i^-1 F_y with the held data's F_y.

        Args:
            problem: the problem.
            state: the state.
            held: third argument of the objectives, on all blocks.

        Returns:
            The state.
        """
        if "H" in state.memory:
            m, space = state.memory, state.spaces.y
            point = Linearization(problem, state.spaces, state.x_vector, state.y_vector, held)
            share = m["drawn"] / len(m["met"])  # H_i is kept in the scale of a mean over the drawn blocks
            v = _solved(share * m["H"], _matrix(space, point.upper_y), share * m["floor"])
            counts = state.counts + Counts(1, 1, samples=seen_samples(held, 1, 1))
            state = replace(state, adjoint=_vector(space, v), counts=counts)
        return super().measure(problem, state, held)

    def _look(self, problem: Problem, s: SingleLoopState, data: Any, x: Tensor, y: Tensor, kept: Tensor) -> _Seen:
        """The drawn blocks at (x, y) with what was kept for them: adjoints, or Hessians."""
        blocks = data.blocks.to(y.device)
        rows = _matrix(s.spaces.y, y)[blocks]
        spaces = Spaces.of(s.spaces.x.unflatten(x), _rows(s.spaces.y.unflatten(y), blocks))
        point = Linearization(problem, spaces, x, _vector(spaces.y, rows), data)
        counts, hessians = Counts(1, 1, 2, samples=seen_samples(data, 1, 3)), rows
        if "H" in s.memory:
            hessians, spent = _hessians(point, data)
            counts += spent
            v = _vector(spaces.y, _solved(kept[blocks], _matrix(spaces.y, point.upper_y), s.memory["floor"]))
        else:
            v = _vector(spaces.y, _matrix(s.spaces.y, kept)[blocks])
        pieces = pieces_of(point, v)
        finite = point.finite() and all_finite(hessians) and all_finite(pieces.hessian_v)
        return _Seen(spaces.y, pieces, point.upper, v, hessians, counts, finite)


def _rows(tree: Any, blocks: Tensor) -> Any:
    return optree.tree_map(lambda leaf: leaf[blocks], tree)


def _matrix(space: Ravel, vector: Tensor) -> Tensor:
    """The raveled vector as one row a block."""
    return torch.cat([leaf.reshape(len(leaf), -1) for leaf in space.split(vector)], 1)


def _vector(space: Ravel, rows: Tensor) -> Tensor:
    """One row a block as a raveled vector."""
    parts = torch.split(rows, [shape[1:].numel() for shape in space.shapes], 1)
    return space.join([part.reshape(shape) for part, shape in zip(parts, space.shapes, strict=True)])


def _put(space: Ravel, vector: Tensor, blocks: Tensor, rows: Tensor) -> Tensor:
    """The raveled vector with the rows of some blocks replaced."""
    return _vector(space, _matrix(space, vector).index_copy(0, blocks, rows))


def _hessians(point: Linearization, data: Any) -> tuple[Tensor, Counts]:
    """The blocks' Hessians (|I|, d, d): a product with the same unit vector in every block gives a column of each."""
    space = point.spaces.y
    like = _matrix(space, point.lower_y)
    count, d = like.shape
    units = torch.eye(d, dtype=like.dtype, device=like.device)
    columns = point.hessian @ torch.stack([_vector(space, unit.expand(count, d)) for unit in units])
    found = torch.stack([_matrix(space, column) for column in columns], 2)
    return (found + found.mT) / 2, Counts(products=d, samples=seen_samples(data, 0, d))


def _solved(H: Tensor, g: Tensor, floor: Tensor) -> Tensor:
    """H^-1 g for each block, eigenvalues below the floor raised to it."""
    values, vectors = torch.linalg.eigh(H)
    inside = (vectors.mT @ g[:, :, None]) / values.clamp_min(floor)[:, :, None]
    solution: Tensor = (vectors @ inside)[:, :, 0]
    return solution
