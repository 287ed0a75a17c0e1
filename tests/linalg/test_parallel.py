"""Data-parallel products and sharded vectors, in 2 and 4 processes over gloo; the checks are in parallel_worker.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from laws import rand

import nestopt
from nestopt.linalg import DataParallel, Dense, Sharded

WORKER = str(Path(__file__).with_name("parallel_worker.py"))


def environment():
    """This interpreter's nestopt, one thread a process, and the loopback alone."""
    source = str(Path(nestopt.__file__).parents[1])
    found = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**found, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def worker(*arguments):
    """Runs the ranks to their end."""
    command = [sys.executable, "-P", WORKER, *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=150, check=False)


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_agree_with_one(processes, tmp_path):
    done = worker("all", str(processes), str(tmp_path / "store"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all equal" in done.stdout


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("fate", ["ends", "silent"])
def test_a_lost_rank_is_an_error_within_the_timeout(fate, tmp_path):
    done = worker("die", str(tmp_path / "store"), fate)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert "DataParallel: a collective failed on rank 0 of 2: another rank has ended" in said["message"]
    assert said["seconds"] < 30  # the group's timeout is 3 s: an error and not a hang


@pytest.mark.parametrize("kind", [DataParallel, Sharded])
def test_without_a_process_group_it_says_what_to_do(kind):
    with pytest.raises(RuntimeError, match=f"{kind.__name__}: torch.distributed is not initialised; start.*torchrun"):
        kind(Dense(torch.eye(2)))
    with pytest.raises(TypeError, match="operator must be a LinearOperator"):
        kind(rand(2, 2))
