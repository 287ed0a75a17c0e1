"""What tests of torch.compile share."""

import pytest
import torch._dynamo

__all__ = ["COMPILED", "graphs"]

# for `pytestmark`: every test begins with a fresh compiler
COMPILED = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the compiler's own imports
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


def graphs() -> int:
    """How many graphs the compiler has made."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
