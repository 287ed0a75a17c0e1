"""What every test gets: a seed, restored defaults, one thread a worker, and shapes that are checked.

Each function of nestopt whose signature names jaxtyping shapes is checked at every call. jaxtyping's own import hook
would wrap all functions, shapes or not, and make iterative tests two to three times as slow.
"""

import gc
import importlib.abc
import importlib.machinery
import inspect
import os
import random
import re
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("MPLBACKEND", "Agg")

import beartype
import hypothesis
import jaxtyping
import numpy as np
import pytest
import torch

# Laws and problems are imported by their bare names. Last on the path, so that they hide nothing installed.
HERE = Path(__file__).parent
sys.path.append(str(HERE))
pytest.register_assert_rewrite("problems", *(file.stem for file in HERE.glob("laws*.py")))

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def check_shapes(module):
    """Wraps the functions and methods of `module` whose annotations name something of jaxtyping."""
    names = [name for name, value in vars(module).items() if "jaxtyping" in str(getattr(value, "__module__", ""))]
    shapes = re.compile(rf"jaxtyping|\b({'|'.join(names)})\b" if names else "jaxtyping")

    def wrap(owner, name, value):
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if inspect.isfunction(function) and function.__module__ == module.__name__:
            annotations = inspect.get_annotations(function).values()
            if any(shapes.search(a if isinstance(a, str) else repr(a)) for a in annotations):
                setattr(owner, name, jaxtyping.jaxtyped(value, typechecker=beartype.beartype))

    for name, value in list(vars(module).items()):
        wrap(module, name, value)
        if inspect.isclass(value) and value.__module__ == module.__name__:
            for attribute, member in list(vars(value).items()):
                wrap(value, attribute, member)


class ShapeFinder(importlib.abc.MetaPathFinder):
    """Finds nestopt's modules where Python would, and checks their shapes once they are executed."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] != "nestopt":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                check_shapes(module)

            spec.loader.exec_module = exec_module
        return spec


assert "nestopt" not in sys.modules, "import nestopt in test modules, not before this file"
sys.meta_path.insert(0, ShapeFinder())


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


def pytest_collection_finish() -> None:
    """Leaves what the imports made out of every later garbage collection: laws of memory count what came after it."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture(autouse=True)
def _unchecked_shapes(request: pytest.FixtureRequest):
    """Switches the check off for a test that is marked so."""
    off = request.node.get_closest_marker("unchecked_shapes") is not None
    jaxtyping.config.update("jaxtyping_disable", off)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Runs the test once in each precision."""
    return request.param


@pytest.fixture
def fresh_compiler():
    """torch.compile as in a new process, with its counters at zero."""
    import torch._dynamo  # not above: it takes a second, which most tests need not

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    """A seeded CPU generator."""
    return torch.Generator().manual_seed(seed)
