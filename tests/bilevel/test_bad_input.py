"""Every bad input gets a sentence that names the argument, or a status: never zeros, never silence."""

import pytest
import torch
from problems import DOUBLE, quadratic
from torch import nn

from nestopt import bilevel, constrained, linalg
from nestopt.linalg import Status

one = torch.ones(3, dtype=DOUBLE)


def upper(x, y):
    return ((y - 1) ** 2).sum()


def lower(x, y):
    return ((y - x) ** 2).sum()


def calls(problem, x, y):
    """Both public doors."""
    yield lambda: bilevel.hypergradient(problem, x, y)
    yield lambda: bilevel.solve(problem, x, y)
    yield lambda: bilevel.solve(problem, x, y, bilevel.HOAG())


def refused(problem, x, y, error, *words):
    for call in calls(problem, x, y):
        with pytest.raises(error) as caught:
            call()
        for word in words:
            assert word in str(caught.value), (word, str(caught.value))


def test_upper_variable_nobody_uses():
    x = {"used": one, "forgotten": one.clone()}
    problem = bilevel.Problem(lambda x, y: upper(x, y), lambda x, y: lower(x["used"], y))
    refused(problem, x, one.clone(), ValueError, "x['forgotten']", "used by no function of the problem")


def test_detached_upper_variable():
    problem = bilevel.Problem(upper, lambda x, y: lower(x.detach(), y))
    refused(problem, one, one.clone(), ValueError, "used by no function of the problem", ".detach()")


def test_upper_without_y_and_lower_without_y():
    refused(bilevel.Problem(lambda x, y: x.sum(), lower), one, one.clone(), ValueError, "upper does not depend on y")
    refused(bilevel.Problem(upper, lambda x, y: x.sum()), one, one.clone(), ValueError, "lower does not depend on y")


def test_captured_tensor_that_requires_grad():
    penalty = torch.tensor(0.5, dtype=DOUBLE, requires_grad=True)
    problem = bilevel.Problem(upper, lambda x, y: lower(x, y) + penalty * (y**2).sum())
    refused(problem, one, one.clone(), ValueError, "require grad", "penalty", "lower")


def test_module_captured_instead_of_passed():
    model = nn.Linear(3, 1).double()
    problem = bilevel.Problem(lambda x, y: upper(x, y) + model(y).sum(), lower)
    refused(problem, one, one.clone(), ValueError, "require grad", "upper", "model")


def test_operations_without_a_second_derivative_are_named():
    X = torch.randn(4, 3, dtype=DOUBLE)
    problem = bilevel.Problem(upper, lambda x, y: lower(x, y) + torch.cdist(X, y[None], p=3.0).sum())
    refused(problem, one, 0 * one, TypeError, "lower", "cdist")


def test_aliased_variables():
    problem = bilevel.Problem(upper, lower)
    refused(problem, one, one, ValueError, "x and y share memory", "clone")
    both = torch.ones(6, dtype=DOUBLE)
    refused(problem, both[:4][1:], both[1:4], ValueError, "share memory")
    assert bilevel.solve(problem, both[:3], both[3:]).converged  # neighbours in one buffer are no alias
    refused(
        bilevel.Problem(lambda x, y: upper(x, y["a"]), lambda x, y: lower(x, y["a"]) + lower(x, y["b"])),
        one, {"a": (t := one.clone()), "b": t}, ValueError, "y['a'] and y['b'] share memory",
    )  # fmt: skip


def test_dtypes_and_devices():
    problem = bilevel.Problem(upper, lower)
    refused(problem, torch.ones(3, dtype=torch.int64), one, TypeError, "x", "int64")
    refused(problem, one, torch.ones(3, dtype=torch.complex128), TypeError, "y", "complex128")
    refused(problem, one, one.float(), ValueError, "x and y must share one dtype")
    refused(problem, {"a": one, "b": one.float()}, one.clone(), ValueError, "x['b']", "float32")
    refused(problem, one, torch.ones(3, dtype=DOUBLE, device="meta"), ValueError, "device")
    refused(problem, [1.0, 2.0], one, TypeError, "x[0]", "float")
    refused(problem, {}, one, ValueError, "x must hold at least one tensor")


def test_objectives_that_are_no_scalars():
    refused(bilevel.Problem(lambda x, y: (y - x) ** 2, lower), one, one.clone(), ValueError, "upper", "scalar", "(3,)")
    refused(bilevel.Problem(upper, lambda x, y: (y - x) ** 2), one, one.clone(), ValueError, "lower", "scalar")
    refused(bilevel.Problem(lambda x, y: 3.0, lower), one, one.clone(), TypeError, "upper", "float")
    refused(bilevel.Problem(upper, lambda x, y: (y > x).sum()), one, one.clone(), TypeError, "lower", "int64")


def test_not_callable_and_wrong_types():
    with pytest.raises(TypeError, match="upper must be a function"):
        bilevel.Problem(upper=1.0, lower=lower)
    with pytest.raises(TypeError, match=r"problem must be a bilevel\.Problem"):
        bilevel.solve(upper, one, one.clone())
    with pytest.raises(TypeError, match="method"):
        bilevel.solve(bilevel.Problem(upper, lower), one, one.clone(), "AID")


def test_parts_that_the_method_would_ignore_are_refused():
    coupled = {"inequality": lambda x, y: y - x}
    for part, error in (
        ({"lower_set": constrained.Ball(1.0), **coupled}, ValueError),
        ({"lower_prox": constrained.L1(0.1), **coupled}, ValueError),
        ({"lower_prox": object()}, TypeError),
    ):
        refused(bilevel.Problem(upper, lower, **part), one, one.clone(), error, next(iter(part)).removeprefix("lower_"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_is_a_status(bad):
    poisoned = one.clone()
    poisoned[1] = bad
    problem = bilevel.Problem(upper, lambda x, y: lower(x, y) + (poisoned * y).sum())
    assert bilevel.hypergradient(problem, one, one.clone()).status == Status.NON_FINITE
    for method in (bilevel.AID(), bilevel.HOAG()):
        res = bilevel.solve(problem, one, one.clone(), method)
        assert res.status == Status.NON_FINITE
    assert bilevel.hypergradient(bilevel.Problem(upper, lower), poisoned, one.clone()).status == Status.NON_FINITE
    only_upper = bilevel.Problem(lambda x, y: upper(x, y) * bad, lower)
    assert bilevel.hypergradient(only_upper, one, one.clone()).status == Status.NON_FINITE
    assert bilevel.solve(only_upper, one, one.clone()).status == Status.NON_FINITE


def test_singular_and_indefinite_lower_levels_end_the_run():
    flat = bilevel.Problem(upper, lambda x, y: (y[0] - x.sum()) ** 2 + 0 * y.sum())
    saddle = bilevel.Problem(upper, lambda x, y: y[0] ** 2 - y[1] ** 2 + y[2] ** 2 + 1e-3 * (x * y).sum() + y[1] ** 4)
    for method in (bilevel.AID(), bilevel.HOAG()):
        assert bilevel.solve(flat, one, 0 * one, method).status == Status.SINGULAR
    start = torch.tensor([0.0, 0.0, 0.0], dtype=DOUBLE)
    hg = bilevel.hypergradient(saddle, 0 * one, start)
    assert hg.status == Status.NEGATIVE_CURVATURE


def test_unbounded_lower_level_is_a_status():
    problem = bilevel.Problem(upper, lambda x, y: (x * y).sum() - (y**2).sum())
    res = bilevel.solve(problem, one, one.clone())
    assert res.status in (Status.DIVERGED, Status.NON_FINITE, Status.NEGATIVE_CURVATURE)
    assert not res.converged


def test_wrong_shape_of_the_adjoint_and_of_sets():
    case = quadratic(5, 3)
    with pytest.raises(ValueError, match="shape"):
        bilevel.hypergradient(case.problem, case.x0, case.y0, adjoint=torch.zeros(4, dtype=DOUBLE))
    with pytest.raises(ValueError, match="directions"):
        bilevel.check_hypergradient(case.problem, case.x0, case.y0, directions=0)
    with pytest.raises(ValueError, match="rtol"):
        linalg.CG(rtol=-1.0)


def test_the_callers_tensors_are_untouched():
    x, y = one.clone().requires_grad_(), torch.zeros(3, dtype=DOUBLE, requires_grad=True)
    res = bilevel.solve(bilevel.Problem(upper, lower), x, y)
    assert x.grad is None
    assert y.grad is None
    assert torch.equal(x, one)
    assert torch.equal(y, 0 * one)
    assert not res.x.requires_grad
    assert not res.y.requires_grad
