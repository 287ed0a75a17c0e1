"""torch.compile around a layer: it runs, in one graph break, and gives the same derivatives."""

import pytest
import torch

from nestopt import implicit

D = torch.float64


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own imports
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # its own looking
def test_a_compiled_function_may_contain_a_layer(generator):
    W = 0.2 * torch.randn(3, 3, generator=generator, dtype=D)
    x = torch.randn(3, generator=generator, dtype=D)

    def T(y, W, x):
        return torch.tanh(W @ y) + x

    def loss(W, x):
        W = W * 1.5
        with torch.no_grad():
            y = x
            for _ in range(60):
                y = T(y, W, x)
        y = implicit.fixed_point(T, y, W, x)
        return (y.sin() ** 2).sum()

    leaf = W.clone().requires_grad_()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(loss, backend=backend)
    for _ in range(2):
        (found,) = torch.autograd.grad(compiled(leaf, x), leaf)
        (truth,) = torch.autograd.grad(loss(leaf, x), leaf)
        assert torch.allclose(found, truth, atol=1e-12)
    assert len(graphs) == 2  # before the layer, and after it
