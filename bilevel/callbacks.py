"""What may watch a run: history, progress bar, early stopping, checkpoints."""

from __future__ import annotations

import os
import random
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

__all__ = ["Callback", "Checkpoint", "EarlyStopping", "History", "ProgressBar", "Run"]


@dataclass(frozen=True)
class Run:
    """What a callback may know when a run starts.

    Attributes:
        method: the method.
        problem: the problem.
        x0: upper start.
        y0: lower start.
        history: the run's own History, first of the callbacks.
    """

    method: Any
    problem: Any
    x0: Any
    y0: Any
    history: History


class Callback(ABC):
    """Called with (iteration, state) once before the first step and after every step; a true value ends the run.

    A plain function (iteration, state) does as well; a Callback also hears of the start and the end.
    """

    def start(self, run: Run) -> Any:
        """The run begins. A state returned here is taken in place of evaluating the start (a checkpoint does)."""
        return None

    @abstractmethod
    def __call__(self, iteration: int, state: Any) -> bool | None:
        """The state after a step."""

    def finish(self, state: Any) -> None:  # noqa: B027  (most callbacks have nothing to close)
        """The run has ended."""


class History(Callback):
    """One record an outer step: iteration, seconds, value, error, its named parts, and the counts.

    Example:
        >>> History().records
        []
    """

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self._begun = time.perf_counter()

    def start(self, run: Run) -> None:
        """Start the clock."""
        self._begun = time.perf_counter()

    def resume(self, records: list[dict[str, Any]]) -> None:
        """Go on after these records, the clock included.

        Args:
            records: of the earlier part of the run.
        """
        self.records = records
        self._begun = time.perf_counter() - (records[-1]["seconds"] if records else 0.0)

    def __call__(self, iteration: int, state: Any) -> None:
        """Append a record, unless this step has one already (a resumed run begins with the last state)."""
        step = int(state.iterations)
        if self.records and self.records[-1]["iteration"] == step:
            return
        self.records.append(
            {
                "iteration": step,
                "seconds": time.perf_counter() - self._begun,
                "value": float(state.value),
                "error": float(state.error),
                **{name: float(value) for name, value in state.residuals.items()},
                **asdict(state.counts),
            }
        )


class ProgressBar(Callback):
    """A live line (tqdm) with the value and the certified error.

    Args:
        total: outer steps that the bar counts to; None for the method's max_iter.
        label: text before the bar.
        disable: True for no output, None for none unless the output is a terminal.
    """

    def __init__(self, total: int | None = None, label: str = "", disable: bool | None = False) -> None:
        self.total, self.label, self.disable = total, label, disable
        self._bar: Any = None

    def start(self, run: Run) -> None:
        """Open the bar."""
        total = run.method.stopping.max_iter if self.total is None else self.total
        self._bar = tqdm(total=total, desc=self.label or type(run.method).__name__, disable=self.disable)

    def __call__(self, iteration: int, state: Any) -> None:
        """Move to the state's step."""
        self._bar.set_postfix(value=f"{float(state.value):.6g}", error=f"{float(state.error):.1e}", refresh=False)
        self._bar.update(int(state.iterations) - self._bar.n)

    def finish(self, state: Any) -> None:
        """Write the status in the bar's place and close it."""
        self._bar.bar_format = f"{{desc}}: {state.status.name} after {{n_fmt}} steps in {{elapsed}}{{postfix}}"
        self._bar.set_postfix(value=f"{float(state.value):.6g}", error=f"{float(state.error):.1e}", refresh=False)
        self._bar.close()


class EarlyStopping(Callback):
    """End the run as STOPPED when a figure has not improved for a while; `best` keeps the state with the best one.

    Args:
        monitor: state -> number to be lowered, such as a loss on held-out data; None for the value F(x, y).
        patience: outer steps without improvement that are put up with.
        min_delta: what counts as an improvement.

    Raises:
        ValueError: if patience is below 1 or min_delta is negative.

    Example:
        >>> EarlyStopping(patience=5).best is None
        True
    """

    def __init__(
        self, monitor: Callable[[Any], float] | None = None, patience: int = 10, min_delta: float = 0.0
    ) -> None:
        if patience < 1 or min_delta < 0:
            raise ValueError(
                f"EarlyStopping: patience >= 1 and min_delta >= 0 are needed, but got {patience} and {min_delta}."
            )
        self.monitor = monitor if monitor is not None else lambda state: float(state.value)
        self.patience, self.min_delta = patience, min_delta
        self.best: Any = None
        self.best_figure = float("inf")
        self._last_improvement = 0

    def start(self, run: Run) -> None:
        """Forget an earlier run."""
        self.best, self.best_figure, self._last_improvement = None, float("inf"), 0

    def __call__(self, iteration: int, state: Any) -> bool:
        """Compare with the best."""
        figure = float(self.monitor(state))
        if figure < self.best_figure - self.min_delta or self.best is None:
            self.best, self.best_figure, self._last_improvement = state, figure, iteration
        return iteration - self._last_improvement >= self.patience


class Checkpoint(Callback):
    """Save the run every so many steps; started again with the same arguments, the run goes on from the file.

    The file holds the state, the history and the random states (torch, CUDA, NumPy, Python), so a run that was killed
    and started again gives the same numbers to the last bit. It is written beside itself and renamed: a crash while
    saving leaves the last good file. It is read with `weights_only=True`: nothing in it is executed. Not in the file
    are the problem and the data, which have to be the same again, and what other callbacks remember (`EarlyStopping`
    counts its patience anew). The method is compared by its repr, functions in it by their names.

    Args:
        path: the file, in a folder that exists.
        every: outer steps between two saves; the end of the run is always saved.
        resume: False to start anew and overwrite the file.

    Raises:
        FileNotFoundError: at the start, if the folder does not exist.
        ValueError: if every is below 1, or (at the start) the file belongs to another method or other shapes.
    """

    def __init__(self, path: str | os.PathLike[str], every: int = 10, resume: bool = True) -> None:
        if every < 1:
            raise ValueError(f"Checkpoint: every must be at least 1, but got {every}.")
        self.path, self.every, self.resume = Path(path), every, resume
        self._run: Run | None = None
        self._saved_at = -1

    def start(self, run: Run) -> Any:
        """Go on from the file if there is one."""
        self._run, self._saved_at = run, -1
        if not self.path.parent.is_dir():  # found out here, not at the first save
            raise FileNotFoundError(f"Checkpoint: the folder {self.path.parent} does not exist; make it first.")
        if not (self.resume and self.path.exists()):
            return None
        saved = torch.load(self.path, weights_only=True)
        if saved["method"] != _words(run.method):
            raise ValueError(
                f"Checkpoint: {self.path} was written by {saved['method']}, but this run's method is {run.method!r}; "
                "use another path, or resume=False to start anew."
            )
        state = run.method.restore(saved["state"], run.x0, run.y0)
        if state.x_vector.shape[-1] != state.spaces.x.size or state.y_vector.shape[-1] != state.spaces.y.size:
            raise ValueError(
                f"Checkpoint: {self.path} holds {state.x_vector.shape[-1]} upper and {state.y_vector.shape[-1]} lower "
                f"variables, but x0 and y0 have {state.spaces.x.size} and {state.spaces.y.size}; use another path."
            )
        run.history.resume(saved["history"])
        self._saved_at = int(state.iterations)
        _restore_random_state(saved["random"])
        return state

    def __call__(self, iteration: int, state: Any) -> None:
        """Save at every `every`-th step."""
        if int(state.iterations) % self.every == 0 and int(state.iterations) != self._saved_at:
            self._save(state)

    def finish(self, state: Any) -> None:
        """Save the end."""
        self._save(state)

    def _save(self, state: Any) -> None:
        assert self._run is not None
        payload = {
            "method": _words(self._run.method),
            "state": state.to_dict(),
            "history": self._run.history.records,
            "random": _random_state(),
        }
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        with beside.open("wb") as file:
            torch.save(payload, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)
        self._saved_at = int(state.iterations)


def _words(method: Any) -> str:
    """The method's repr without the addresses of functions in it, which are others in another process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(method))


def _random_state() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }


def _restore_random_state(saved: dict[str, Any]) -> None:
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(saved["cuda"])
    kind, keys, position, has_gauss, gauss = saved["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = saved["python"]
    random.setstate((version, tuple(internal), gauss_next))
