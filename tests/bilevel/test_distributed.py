"""The same trajectory in two processes as in one, also under FSDP2; the checks are in distributed_worker.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import nestopt
from nestopt import bilevel

WORKER = str(Path(__file__).with_name("distributed_worker.py"))


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What the ranks say: all checks in one run, whose imports are most of its time."""
    source = str(Path(nestopt.__file__).parents[1])
    found = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = {**found, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    folder = str(tmp_path_factory.mktemp("stores"))
    command = [sys.executable, "-P", WORKER, folder, "data_parallel", "fully_sharded", "ends", "silent"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {**{line.get("check", f"message of {line.get('fate')}"): line for line in lines}, "stderr": done.stderr}


@pytest.mark.distributed
@pytest.mark.parametrize("check", ["data_parallel", "fully_sharded"])
def test_two_processes_take_the_steps_of_one(check, reports):
    assert reports[check]["codes"] == [0, 0], reports["stderr"][-3000:]


@pytest.mark.distributed
@pytest.mark.parametrize("fate", ["ends", "silent"])
def test_a_lost_rank_is_an_error_within_the_timeout(fate, reports):
    assert reports[fate]["codes"] == [0], reports["stderr"][-3000:]
    said = reports[f"message of {fate}"]
    assert "data_parallel: a collective failed on rank 0 of 2: another rank has ended" in said["message"]
    assert said["seconds"] < 30  # the group's timeout is 3 s: an error and not a hang


def test_without_a_process_group_it_says_what_to_do():
    problem = bilevel.Problem(lambda x, y: (y**2).sum(), lambda x, y: ((y - x) ** 2).sum())
    for function in (bilevel.data_parallel, bilevel.Shards, bilevel.fully_sharded):
        with pytest.raises(RuntimeError, match=r"torch.distributed is not initialised; start.*torchrun"):
            function(problem if function is not bilevel.Shards else lambda k: None)
