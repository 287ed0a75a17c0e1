import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from laws_bilevel import vector
from problems import quadratic

from nestopt import bilevel
from nestopt.linalg import Status, Stopping

# The runs are processes of their own, forked from one that has only imported: the imports are most of their time.
SCRIPT = """
    import os, signal, sys, traceback
    import torch
    from problems import quadratic
    from nestopt import bilevel, linalg

    torch.set_num_threads(1)

    def run(path, method, kill_at):
        case = quadratic(40, 12, 1e3)
        noise = lambda: 1e-9 * torch.rand((), dtype=torch.float64)  # draws from the global generator
        problem = bilevel.Problem(lambda x, y: case.problem.upper(x, y) + noise(), case.problem.lower)

        def die(k, state):
            if int(state.iterations) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        torch.manual_seed(3)
        stopping = linalg.Stopping(rtol=1e-12, max_iter=15)
        callbacks = [bilevel.Checkpoint(path, every=2), die]
        res = bilevel.solve(problem, case.x0, case.y0, method(stopping=stopping), callbacks=callbacks)
        torch.save([res.x, res.y, torch.tensor([r["value"] for r in res.history])], path + ".answer")

    method = getattr(bilevel, sys.argv[1])
    for path, kill_at in zip(sys.argv[2::2], sys.argv[3::2]):
        child = os.fork()
        if not child:
            try:
                run(path, method, int(kill_at))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(code, os.path.exists(path + ".answer"), flush=True)
"""


@pytest.mark.parametrize("method", ["AID", "HOAG"])
def test_resume_after_kill_is_bit_exact(tmp_path, method):
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(SCRIPT))
    path = os.pathsep.join([str(Path(__file__).parents[1]), *(p for p in sys.path if p)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}  # a process with threads must not fork
    whole, killed = str(tmp_path / "whole"), str(tmp_path / "killed")
    command = [sys.executable, str(script), method, whole, "-1", killed, "9", killed, "-1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ends = [line.split() for line in done.stdout.splitlines()]
    assert ends == [["0", "True"], [str(-signal.SIGKILL), "False"], ["0", "True"]], done.stderr
    for a, b in zip(torch.load(tmp_path / "whole.answer"), torch.load(tmp_path / "killed.answer"), strict=True):
        assert torch.equal(a, b)


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
