"""ProjectionLayer and ProximalLayer: what they hold, copies and files, and what they refuse."""

import copy
import pickle

import pytest
import torch
from torch import nn

from nestopt.constrained import (
    L1,
    Affine,
    Ball,
    Box,
    DualCone,
    GroupLasso,
    Indicator,
    Polyhedron,
    ProductSet,
    ProjectionLayer,
    Prox,
    ProximalLayer,
    SecondOrderCone,
    Set,
    Simplex,
    capped_simplex,
)

D = torch.float64


def learnt(*values):
    return nn.Parameter(torch.tensor(values, dtype=D))


def test_parameters_buffers_and_plain_values():
    layer = ProjectionLayer(Box, low=learnt(-1.0, -2.0), high=torch.ones(2, dtype=D))
    assert [name for name, _ in layer.named_parameters()] == ["low"]
    assert [name for name, _ in layer.named_buffers()] == ["high"]
    assert list(layer.state_dict()) == ["low", "high"]
    x = torch.tensor([[-3.0, 0.0], [5.0, -5.0]], dtype=D)
    torch.testing.assert_close(layer(x), torch.tensor([[-1.0, 0.0], [1.0, -2.0]], dtype=D))
    layer(x).sum().backward()
    torch.testing.assert_close(layer.low.grad, torch.ones(2, dtype=D))
    assert list(ProjectionLayer(Ball, radius=2.0).state_dict()) == []
    assert repr(ProjectionLayer(Ball, radius=2.0)) == "ProjectionLayer(radius=2.0)"


def test_fields_in_forward_replace_those_held():
    layer = ProjectionLayer(Ball, radius=learnt(1.0)[0].detach())
    x = torch.tensor([3.0, 4.0], dtype=D)
    radius = torch.tensor(2.0, dtype=D, requires_grad=True)
    torch.testing.assert_close(layer(x, radius=radius), 0.4 * x)
    assert torch.autograd.gradcheck(lambda x, r: layer(x, radius=r), (x.clone().requires_grad_(), radius))
    torch.testing.assert_close(layer(x), 0.2 * x)  # and are not kept
    half = ProjectionLayer(Polyhedron, G=torch.eye(2, dtype=D))
    torch.testing.assert_close(half(x, h=torch.zeros(2, dtype=D)), torch.zeros(2, dtype=D))


def test_the_step_of_a_prox_is_learnt_or_given():
    layer = ProximalLayer(L1, step=nn.Parameter(torch.tensor(0.5, dtype=D)), weight=2.0)
    x = torch.tensor([3.0, -4.0, 0.1], dtype=D)
    torch.testing.assert_close(layer(x), torch.tensor([2.0, -3.0, 0.0], dtype=D))
    layer(x)[:1].sum().backward()
    torch.testing.assert_close(layer.step.grad, torch.tensor(-2.0, dtype=D))
    torch.testing.assert_close(layer(x, step=1.0, weight=1.0), torch.tensor([2.0, -3.0, 0.0], dtype=D))
    each = torch.tensor([1.0, 0.5], dtype=D)
    torch.testing.assert_close(layer(x.expand(2, 3), step=each)[1], layer(x))


def test_nested_sets_hold_parameters():
    radius = learnt(1.0)[0].detach()
    layer = ProjectionLayer(ProductSet, sets=[Ball(nn.Parameter(radius)), Simplex()], sizes=[2, 2])
    assert list(layer.state_dict()) == ["sets.0.radius"]
    x = torch.tensor([3.0, 4.0, 0.0, 0.0], dtype=D)
    layer(x)[:2].sum().backward()
    torch.testing.assert_close(layer.get_parameter("sets.0.radius").grad, torch.tensor(1.4, dtype=D))
    inner = ProximalLayer(Indicator, set=Ball(nn.Parameter(radius)))
    torch.testing.assert_close(inner(x[:2]), x[:2] / 5)
    assert list(inner.state_dict()) == ["set.radius"]
    cone = ProjectionLayer(DualCone, cone=SecondOrderCone())
    torch.testing.assert_close(cone(x[:2]), SecondOrderCone().project(x[:2]))
    assert not list(cone.parameters())
    groups = ProximalLayer(GroupLasso, groups=[[0, 1], [2, 3]], weight=learnt(1.0)[0])
    torch.testing.assert_close(groups(x)[:2], (1 - 2**0.5 / 5) * x[:2])


@pytest.mark.parametrize("nested", [False, True])
def test_copies_files_and_dtypes(nested):
    ball = Ball(nn.Parameter(torch.tensor(1.0, dtype=D)), torch.tensor([0.5, 0.0], dtype=D))
    layer = ProximalLayer(Indicator, set=ball) if nested else ProjectionLayer(Ball, radius=ball.radius, center=0.5)
    x = torch.tensor([3.0, 4.0], dtype=D)
    before = layer(x).detach()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with torch.no_grad():
            next(twin.parameters()).mul_(2)
        assert not torch.equal(twin(x), before)
        torch.testing.assert_close(layer(x), before)
        twin.load_state_dict(layer.state_dict())
        torch.testing.assert_close(twin(x), before)
    narrow = twin.float()(x.float())
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.to(D), before, atol=1e-6, rtol=0)


def test_functional_call_and_vmap_over_parameters():
    layer = ProjectionLayer(Ball, radius=nn.Parameter(torch.tensor(1.0, dtype=D)))
    x = torch.tensor([3.0, 4.0], dtype=D)
    radii = torch.tensor([1.0, 2.0, 9.0], dtype=D)
    found = torch.func.vmap(lambda r: torch.func.functional_call(layer, {"radius": r}, (x,)))(radii)
    torch.testing.assert_close(found, torch.stack([0.2 * x, 0.4 * x, x]))


def test_training_finds_the_radius():
    layer = ProjectionLayer(Ball, radius=nn.Parameter(torch.tensor(0.5, dtype=D)))
    x = torch.randn(20, 3, dtype=D, generator=torch.Generator().manual_seed(0))
    wanted = Ball(1.2).project(x)
    optimizer = torch.optim.LBFGS(layer.parameters(), line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = ((layer(x) - wanted) ** 2).sum()
        value.backward()
        return value

    for _ in range(5):
        optimizer.step(loss)
    assert abs(float(layer.radius.detach()) - 1.2) < 1e-6


def test_refusals():
    with pytest.raises(TypeError, match=r"ProjectionLayer: kind must be a class of Set.*object of type Ball; give its"):
        ProjectionLayer(Ball(1.0))
    with pytest.raises(TypeError, match="ProjectionLayer: kind must be a class of Set, such as Ball, but got L1"):
        ProjectionLayer(L1)
    with pytest.raises(TypeError, match="ProximalLayer: kind must be a class of Prox, such as L1, but got Ball"):
        ProximalLayer(Ball)
    with pytest.raises(TypeError, match="kind must be a class of Set"):
        ProjectionLayer(capped_simplex)
    for abstract, layer in ((Set, ProjectionLayer), (Prox, ProximalLayer)):
        with pytest.raises(TypeError, match=f"{abstract.__name__} is abstract"):
            layer(abstract)
    with pytest.raises(TypeError, match="ProjectionLayer: Ball has no field `radios`; its fields are radius, center"):
        ProjectionLayer(Ball, radios=1.0)
    x = torch.ones(2)
    with pytest.raises(TypeError, match="SecondOrderCone has no field `radius`; it has no fields"):
        ProjectionLayer(SecondOrderCone)(x, radius=1.0)
    with pytest.raises(ValueError, match=r"Affine needs `b`, neither held by the layer nor given; pass layer\(x, b="):
        ProjectionLayer(Affine, A=torch.ones(1, 2))(x)
    with pytest.raises(ValueError, match="Ball: radius"):
        ProjectionLayer(Ball, radius=-1.0)
    layer = ProjectionLayer(Ball, radius=nn.Parameter(torch.tensor(1.0)))
    with torch.no_grad():
        layer.radius.neg_()
    with pytest.raises(ValueError, match="Ball: every radius"):
        layer(x)
    with pytest.raises(ValueError, match="step must be"):
        ProximalLayer(L1)(x, step=0.0)
    with pytest.raises(ValueError, match="groups is a list with tensors in it"):
        ProximalLayer(GroupLasso, groups=[torch.ones(2), torch.ones(2)])
