"""kill -9 in mid-run and resume, to the last bit: each family, data with a position, steps of torch.optim."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# The runs are processes of their own, forked from one that has only imported: the imports are most of their time.
WORKER = str(Path(__file__).with_name("resume_worker.py"))
RUNS = ["AID, Adam", "F2SA, second stage", "BAMM", "SOBA", "SABA", "MRBO", "BSVRB", "Unrolled", "modules"]


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Each run whole, killed, and started again: exit codes and answers."""
    folder = tmp_path_factory.mktemp("runs")
    path = os.pathsep.join([str(Path(__file__).parents[1]), *(p for p in sys.path if p)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}  # a process with threads must not fork
    command = [sys.executable, WORKER, str(folder), *RUNS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    codes = {line["run"]: line["codes"] for line in map(json.loads, done.stdout.splitlines())}
    return folder, codes, done.stderr


@pytest.mark.parametrize("run", RUNS)
def test_resume_after_kill_is_bit_exact(run, ends):
    folder, codes, said = ends
    assert codes[run] == [0, -signal.SIGKILL, 0], said
    whole, resumed = (torch.load(folder / f"{run} {kind}.answer") for kind in ("whole", "killed"))
    assert whole["steps"] == resumed["steps"] > 5
    assert resumed["begun"] == 4  # it went on from the last save, and did not start anew
    for a, b in zip(whole["tensors"], resumed["tensors"], strict=True):
        assert torch.equal(a, b)
