"""What every test gets: a seed, restored defaults, one thread a worker.

Shapes are checked while the tests run: pytest's `--jaxtyping-packages` wraps every annotated signature of nestopt, so
import nestopt in test modules, not here (this file is read before that hook is in place).
"""

import os
import random
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import numpy as np
import pytest
import torch

# Laws and problems are imported by their bare names. Last on the path, so that they hide nothing installed.
HERE = Path(__file__).parent
sys.path.append(str(HERE))
pytest.register_assert_rewrite("problems", *(file.stem for file in HERE.glob("laws*.py")))

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


class TorchRandom:
    """torch's generator as Hypothesis wants it, so that an example replays with the numbers it failed on."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = TorchRandom()  # Hypothesis keeps only a weak reference
hypothesis.register_random(TORCH_RANDOM)
# derandomize: the same examples on every run; no deadline: no test depends on the clock.
hypothesis.settings.register_profile("nestopt", derandomize=True, deadline=None, max_examples=50, database=None)
hypothesis.settings.load_profile("nestopt")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed():
    """Seeds torch, NumPy and random, and puts torch's defaults back afterwards."""
    value = 0
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)
    dtype, threads, deterministic = (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
    )
    yield value
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Runs the test once in each precision."""
    return request.param


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    """A seeded CPU generator."""
    return torch.Generator().manual_seed(seed)
