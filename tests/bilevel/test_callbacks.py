import pytest
import torch
from laws_bilevel import vector
from problems import quadratic

from nestopt import bilevel
from nestopt.linalg import Status, Stopping


def test_checkpoint_refuses_another_run(tmp_path):
    case, other = quadratic(5, 3), quadratic(6, 4)
    path = tmp_path / "run"
    bilevel.solve(case.problem, case.x0, case.y0, callbacks=[bilevel.Checkpoint(path)])
    with pytest.raises(ValueError, match="another path"):
        bilevel.solve(case.problem, case.x0, case.y0, bilevel.HOAG(), callbacks=[bilevel.Checkpoint(path)])
    with pytest.raises(ValueError, match="5 lower"):
        bilevel.solve(other.problem, other.x0, other.y0, callbacks=[bilevel.Checkpoint(path)])
    anew = bilevel.solve(case.problem, case.x0, case.y0, callbacks=[bilevel.Checkpoint(path, resume=False)])
    assert anew.history[0]["iteration"] == 0
    with pytest.raises(ValueError, match="every"):
        bilevel.Checkpoint(path, every=0)


def test_checkpoint_wants_a_folder_that_exists(tmp_path):
    case = quadratic(5, 3)
    path = tmp_path / "no" / "run"
    with pytest.raises(FileNotFoundError, match="no does not exist"):
        bilevel.solve(case.problem, case.x0, case.y0, callbacks=[bilevel.Checkpoint(path)])


def test_a_run_with_schedules_is_found_again(tmp_path):
    """Functions have other addresses in another process; the method is the same."""
    case = quadratic(5, 3)
    runs = [
        bilevel.solve(
            case.problem,
            case.x0,
            case.y0,
            bilevel.SOBA(step_size=lambda k: 0.05, upper_step=lambda k: 0.01, stopping=Stopping(max_iter=steps)),
            callbacks=[bilevel.Checkpoint(tmp_path / "run")],
        )
        for steps in (4, 4)
    ]
    assert torch.equal(runs[0].x, runs[1].x)
    assert len(runs[1].history) == 5


def test_what_cannot_be_called_is_refused():
    case = quadratic(5, 3)
    for solve in (bilevel.solve, bilevel.AID()):
        with pytest.raises(TypeError, match=r"data must be a function k -> batch, .* but got list"):
            solve(case.problem, case.x0, case.y0, data=[1, 2])
        with pytest.raises(TypeError, match=r"but got ProgressBar; write callbacks=\[...\]"):
            solve(case.problem, case.x0, case.y0, callbacks=bilevel.ProgressBar())


def test_a_finished_run_started_again_is_where_it_ended(tmp_path):
    case = quadratic(5, 3)
    runs = [
        bilevel.solve(case.problem, case.x0, case.y0, callbacks=[bilevel.Checkpoint(tmp_path / "run")])
        for _ in range(2)
    ]
    assert runs[1].converged
    assert torch.equal(runs[0].x, runs[1].x)
    assert runs[0].counts == runs[1].counts
    assert len(runs[0].history) == len(runs[1].history)


def test_early_stopping_keeps_the_best():
    case = quadratic(5, 3)
    figures = iter([5.0, 3.0, 4.0, 4.0, 4.0, 4.0, 1.0])
    stop = bilevel.EarlyStopping(lambda state: next(figures), patience=3)
    method = bilevel.AID(stopping=Stopping(rtol=0.0, max_iter=50))
    res = bilevel.solve(case.problem, case.x0, case.y0, method, callbacks=[stop])
    assert res.status == Status.STOPPED
    assert res.iterations == 4
    assert int(stop.best.iterations) == 1
    assert stop.best_figure == 3.0
    with pytest.raises(ValueError, match="patience"):
        bilevel.EarlyStopping(patience=0)


def test_progress_bar_shows_value_and_status(capsys):
    case = quadratic(5, 3)
    res = bilevel.solve(case.problem, case.x0, case.y0, callbacks=[bilevel.ProgressBar(label="learning")])
    shown = capsys.readouterr().err
    assert "learning" in shown
    assert "CONVERGED" in shown
    assert f"{res.value:.6g}" in shown


def test_plain_functions_are_callbacks():
    case = quadratic(5, 3)
    seen = []
    res = bilevel.solve(case.problem, case.x0, case.y0, callbacks=[lambda k, s: seen.append((k, vector(s.x)))])
    assert [k for k, _ in seen] == list(range(res.iterations + 1))
    assert torch.equal(seen[-1][1], vector(res.x))
