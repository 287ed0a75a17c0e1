"""The laws of layers over root, fixed_point and argmin, each with a direct and a matrix-free solver."""

import pytest
import torch
from laws_implicit import LAWS, LAYERS

# torch's own forward mode scripts a function when it is first used
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_layer(case, law, generator):
    theta = case.example(generator)
    law(case, theta, generator)


@pytest.mark.parametrize("case", LAYERS[::2], ids=str)
def test_the_example_is_not_symmetric_where_it_need_not_be(case, generator):
    """A law over symmetric Jacobians would not see A taken for A'."""
    W = case.example(generator)[0]
    assert float((W - W.mT).abs().max()) > 0.1
    assert torch.isfinite(case.exact(*case.example(generator))).all()
