"""solve_qp inside a compiled model: it runs in a graph break, and values and gradients are those of eager."""

import pytest
import torch

from nestopt.constrained import solve_qp

D = torch.float64


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own imports
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # its own looking
def test_a_compiled_model_may_contain_a_program(generator):
    W = torch.randn(3, 3, generator=generator, dtype=D)
    x = torch.randn(4, 3, generator=generator, dtype=D)

    def loss(W, x):
        q = torch.tanh(x @ W)
        z = solve_qp(torch.eye(3, dtype=D), q, torch.ones(1, 3, dtype=D), torch.ones(1, dtype=D), low=0.0)
        return (z.x.sin() * torch.linspace(1, 2, 3, dtype=D)).sum() + z.value.sum()

    compiled = torch.compile(loss, backend="aot_eager")
    leaf = W.clone().requires_grad_()
    for _ in range(2):
        value = compiled(leaf, x)
        wanted = loss(leaf, x)
        torch.testing.assert_close(value, wanted, atol=1e-12, rtol=0)
        found, truth = (torch.autograd.grad(v, leaf)[0] for v in (value, wanted))
        torch.testing.assert_close(found, truth, atol=1e-12, rtol=0)
