from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from nestopt.linalg import Result, SolverError, Status, Statuses, Stopping, iterate


@dataclass(frozen=True)
class Halving:
    """Every item halves its error; item i of a batch starts at 2^i."""

    codes: Tensor
    iterations: Tensor
    error: Tensor

    @classmethod
    def start(cls, error: Tensor) -> "Halving":
        zero = torch.zeros_like(error, dtype=torch.int64)
        return cls(zero, zero, error)


def halve(s: Halving) -> Halving:
    return replace(s, error=torch.where(s.codes == Status.RUNNING.code, s.error / 2, s.error))


def test_items_are_counted_and_frozen_one_by_one():
    end = iterate(halve, Halving.start(2.0 ** torch.arange(5.0)), max_iter=10, tolerance=torch.tensor(1.0))
    assert end.iterations.tolist() == [0, 1, 2, 3, 4]
    assert end.error.tolist() == [1.0] * 5
    assert (Statuses(end.codes) == Status.CONVERGED).all()


def test_limit_nan_and_resume():
    start = Halving.start(torch.tensor([8.0, 4.0, float("nan"), float("inf")]))
    tolerance = torch.tensor(1.0)
    end = iterate(halve, start, max_iter=2, tolerance=tolerance)
    names = [status.name for status in Statuses(end.codes)]
    assert names == ["MAX_ITER", "CONVERGED", "NON_FINITE", "NON_FINITE"]
    assert end.iterations.tolist() == [2, 2, 0, 0]
    again = iterate(halve, end, max_iter=5, tolerance=tolerance)
    assert again.iterations.tolist() == [3, 2, 0, 0]
    assert [status.name for status in Statuses(again.codes)] == ["CONVERGED", "CONVERGED", "NON_FINITE", "NON_FINITE"]
    none = iterate(halve, start, max_iter=0, tolerance=tolerance)
    assert Statuses(none.codes)[0] == Status.MAX_ITER


def test_a_nan_on_the_way_ends_its_item_only():
    def poison(s: Halving) -> Halving:
        s = halve(s)
        return replace(s, error=torch.where(s.iterations == 1, torch.tensor([float("nan"), 1.0]) * s.error, s.error))

    end = iterate(poison, Halving.start(torch.tensor([64.0, 64.0])), max_iter=20, tolerance=torch.tensor(1.0))
    assert [status.name for status in Statuses(end.codes)] == ["NON_FINITE", "CONVERGED"]
    assert end.iterations.tolist() == [2, 6]


def test_callbacks_see_every_step_and_may_stop():
    seen = []

    def stop_at_three(k, state):
        seen.append((k, float(state.error)))
        return k == 3

    calls = []
    end = iterate(
        halve,
        Halving.start(torch.tensor(1024.0)),
        max_iter=100,
        tolerance=torch.tensor(1.0),
        callbacks=[stop_at_three, lambda k, s: calls.append(k)],
    )
    assert Status.from_code(int(end.codes)) == Status.STOPPED
    assert seen == [(0, 1024.0), (1, 512.0), (2, 256.0), (3, 128.0)]
    assert calls == [0, 1, 2, 3]  # the one after a stop is called all the same
    rest = iterate(halve, end, max_iter=100, tolerance=torch.tensor(1.0))
    assert int(rest.iterations) == 10


def test_looking_seldom_gives_the_same_answers():
    start = Halving.start(2.0 ** torch.arange(6.0))
    often, seldom = (
        iterate(halve, start, max_iter=40, tolerance=torch.tensor(1.0), check_every=every) for every in (1, 8)
    )
    assert torch.equal(often.iterations, seldom.iterations)
    assert torch.equal(often.codes, seldom.codes)


def test_a_step_that_counts_for_itself_is_not_counted_twice():
    def counting(s: Halving) -> Halving:
        return replace(halve(s), iterations=s.iterations + 1)

    end = iterate(counting, Halving.start(torch.tensor(16.0)), max_iter=40, tolerance=torch.tensor(1.0))
    assert int(end.iterations) == 4


def test_statuses():
    batch = Statuses(torch.tensor([[1, 2], [3, 1]]))
    assert (batch == Status.CONVERGED).tolist() == [[True, False], [False, True]]
    assert (batch != Status.CONVERGED).tolist() == [[False, True], [True, False]]
    assert batch[0, 1] == Status.MAX_ITER
    assert batch[1][0] == Status.STAGNATED
    assert [status.code for status in batch] == [1, 2, 3, 1]
    assert "CONVERGED: 2" in repr(batch)
    for status in Status:
        assert Status.from_code(status.code) is status
        assert len(status.value) > 10


def test_unwrap_gives_the_answer_or_the_advice():
    good = Result(x="answer", codes=torch.tensor(1), iterations=3, error=0.0)
    assert good.unwrap() == "answer"
    assert good.converged is True
    bad = Result(x=None, codes=torch.tensor(4), iterations=3, error=0.25)
    with pytest.raises(SolverError, match=r"NEGATIVE_CURVATURE.*2\.50e-01.*MINRES") as caught:
        bad.unwrap()
    assert caught.value.result is bad
    batch = Result(
        x=None, codes=torch.tensor([1, 2, 7]), iterations=torch.tensor([1, 9, 2]), error=torch.tensor([9.0, 2.0, 3.0])
    )
    with pytest.raises(SolverError, match=r"1 of 3 MAX_ITER, 1 of 3 DIVERGED.*3\.00e\+00"):
        batch.unwrap()


@pytest.mark.parametrize(
    "bad",
    [{"rtol": -1.0}, {"atol": float("nan")}, {"max_iter": -1}, {"max_iter": 2.5}],
    ids=lambda bad: next(iter(bad)),
)
def test_stopping_refuses_what_nobody_can_mean(bad):
    with pytest.raises((ValueError, TypeError), match=next(iter(bad))):
        Stopping(**bad)


def test_stopping_tolerance():
    scale = torch.tensor([0.0, 1.0, 100.0], dtype=torch.float64)
    assert Stopping(rtol=1e-2, atol=0.5).tolerance(scale).tolist() == [0.5, 0.5, 1.0]
    assert Stopping(rtol=None).tolerance(scale, 1e-3).tolist() == [0.0, 1e-3, 0.1]
