"""Quadratic and linear programs inside a compiled model: in the graph, with the values and gradients of eager."""

import gc
import weakref

import pytest
import torch
import torch._dynamo
from compiled import COMPILED, graphs
from torch import nn

from nestopt.constrained import QPLayer, solve_lp, solve_qp
from nestopt.implicit import ImplicitWarning, Monitor
from nestopt.linalg import SolverError, Status

D = torch.float64
pytestmark = COMPILED


def whole(function, backend="aot_eager"):
    """Compiled, and refused if anything of it is not in the graph."""
    return torch.compile(function, backend=backend, fullgraph=True)


def numbers(z):
    """A scalar in which every differentiable field has its own weights."""
    fields = [z.x, z.equality_dual, z.inequality_dual, z.slack, z.value]
    fields += [] if z.bound_dual is None else [z.bound_dual]
    return sum((t.sin() * torch.linspace(1, 2, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in fields)


def data(generator, dtype=D, batch=(4,), shared="QAG"):
    """Q, q, A, b, G, h with random active rows; the matrices named are shared by the batch."""
    n, p, m = 4, 1, 5
    spaces = {"Q": (n, n), "q": (n,), "A": (p, n), "b": (p,), "G": (m, n), "h": (m,)}
    found = {
        name: torch.randn(*(() if name in shared else batch), *space, generator=generator, dtype=dtype)
        for name, space in spaces.items()
    }
    found["Q"] = found["Q"] @ found["Q"].mT + torch.eye(n, dtype=dtype)
    found["h"] = found["h"].abs() + 0.1
    found["b"] = 0.1 * found["b"]
    return [t.requires_grad_() for t in found.values()]


def same(function, inputs, backend="aot_eager", tolerance=1e-10):
    compiled = whole(function, backend)
    value, truth = compiled(*inputs), function(*inputs)
    torch.testing.assert_close(value, truth, atol=tolerance, rtol=tolerance)
    live = [t for t in inputs if t.requires_grad]
    found, wanted = (torch.autograd.grad(v, live, allow_unused=True) for v in (value, truth))
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
    return compiled


OPTIONS = {
    "strong": {},
    "bounds": {"low": -0.3, "high": 0.4},
    "active": {"degenerate": "active"},
    "mean": {"degenerate": "mean", "on_failure": "nan"},
}


@pytest.mark.parametrize(("options", "batch"), [*((name, (4,)) for name in OPTIONS), ("bounds", ()), ("mean", (2, 3))])
@pytest.mark.slow
def test_all_gradients_are_those_of_eager(options, batch, generator):
    same(lambda *t: numbers(solve_qp(*t, **OPTIONS[options])), data(generator, batch=batch))


@pytest.mark.slow
def test_batched_matrices_and_float32(generator):
    same(lambda *t: numbers(solve_qp(*t)), data(generator, shared="A"))
    same(lambda *t: numbers(solve_qp(*t)), data(generator, torch.float32), tolerance=2e-4)


@pytest.mark.slow
def test_the_default_compiler(generator):
    same(lambda *t: numbers(solve_qp(*t, high=0.5)), data(generator), backend="inductor")


@pytest.mark.parametrize("names", ["Qq", "QqAb", "QqGh"])
def test_programs_without_some_rows(names, generator):
    inputs = [t for name, t in zip("QqAbGh", data(generator), strict=True) if name in names]

    def loss(*tensors):
        return numbers(solve_qp(**dict(zip(names, tensors, strict=True))))

    same(loss, inputs)


@pytest.mark.parametrize("field", ["x", "value", "inequality_dual"])
def test_a_single_field(field, generator):
    same(lambda *t: getattr(solve_qp(*t), field).sin().sum(), data(generator))


@pytest.mark.slow
def test_weakly_active_rows_follow_the_policy():
    """min (x - t)^2/2 with x <= 0 at t = 0: the derivative is 1, 0 or their mean."""
    eye = torch.eye(1, dtype=D)
    for policy, slope in {"strong": 1.0, "active": 0.0, "mean": 0.5}.items():
        t = torch.zeros(1, dtype=D, requires_grad=True)
        x = whole(lambda t, policy=policy: solve_qp(eye, -t, high=0.0, degenerate=policy).x)(t)
        (found,) = torch.autograd.grad(x.sum(), t)
        assert abs(float(found) - slope) < 1e-9, policy


@pytest.mark.slow
def test_other_numbers_and_sizes_compile_once_more_at_most(generator):
    """How many rows are active is data: no graph depends on it."""
    model = Model()
    compiled = whole(model)
    seen = []
    for scale, size in ((0.1, 4), (10.0, 4), (1.0, 7), (10.0, 3), (0.1, 5)):
        x = scale * torch.randn(size, 3, generator=generator, dtype=D)
        found, truth = (torch.autograd.grad(m(x), list(model.parameters())) for m in (compiled, model))
        for a, b in zip(found, truth, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
        seen.append(graphs())
    assert seen == [1, 1, 2, 2, 2]


class Model(nn.Module):
    """Linear -> QPLayer -> Linear -> loss, as the default compiler of a user meets it: without fullgraph."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.last = nn.Linear(3, 4, dtype=D), nn.Linear(4, 2, dtype=D)
        G = nn.Parameter(torch.randn(5, 4, generator=generator, dtype=D))
        self.layer = QPLayer(torch.eye(4, dtype=D), G=G, h=torch.ones(5, dtype=D), square_root=True)

    def forward(self, x):
        return self.last(self.layer(q=self.first(x)).x).square().sum()


def test_a_layer_breaks_no_graph_of_a_model(generator):
    model = Model()
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(6, 3, generator=generator, dtype=D)
    found, truth = (torch.autograd.grad(m(x), list(model.parameters())) for m in (compiled, model))
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    assert graphs() == 1


@pytest.mark.slow
def test_a_result_leaves_the_graph_whole(generator):
    """Its fields and properties are those of eager; numbers of a single program are 0-d tensors."""
    inputs = data(generator)
    z, truth = whole(solve_qp)(*inputs), solve_qp(*inputs)
    assert type(z) is type(truth)
    assert bool((z.status == Status.CONVERGED).all()) and bool(z.converged.all())
    assert torch.equal(z.iterations, truth.iterations) and torch.equal(z.error, truth.error)
    assert torch.equal(z.weakly_active, truth.weakly_active) and torch.equal(z.deficient, truth.deficient)
    assert not z.error.requires_grad
    single = data(generator, batch=())
    z, truth = whole(solve_qp)(*single), solve_qp(*single)
    assert z.status is Status.CONVERGED and z.converged is True
    assert int(z.iterations) == truth.iterations and z.error.shape == ()
    torch.testing.assert_close(z.unwrap(), truth.x)


def test_nothing_is_kept_where_nothing_is_differentiated(generator):
    inputs = [t.detach() for t in data(generator)]
    assert not whole(lambda *t: solve_qp(*t).x)(*inputs).requires_grad
    live = [t.requires_grad_() for t in inputs]
    with torch.no_grad():
        assert not whole(lambda *t: solve_qp(*t).value)(*live).requires_grad


def failing(on_failure):
    eye = torch.eye(2, dtype=D)
    G = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=D)

    def x(q, h):
        return solve_qp(eye, q, G=G, h=h, on_failure=on_failure).x

    q = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=D, requires_grad=True)
    h = torch.tensor([[5.0, 5.0], [-1.0, -1.0]], dtype=D)  # the second item has no feasible point
    return x, q, h


@pytest.mark.slow
def test_what_failed_is_said_inside_the_graph_too():
    x, q, h = failing("raise")
    found = whole(x)(q, h)
    assert found[1].isnan().all() and not found[0].isnan().any()
    with pytest.raises(SolverError, match="INFEASIBLE"):
        found.sum().backward()
    whole(x)(q, h)[0].sum().backward()  # nobody asks the failed item
    torch.testing.assert_close(q.grad, torch.tensor([[-1.0, -1.0], [0.0, 0.0]], dtype=D))
    x, q, h = failing("warn")
    with pytest.warns(ImplicitWarning, match="INFEASIBLE"):
        whole(x)(q, h).sum().backward()
    assert q.grad[1].isnan().all()
    x, q, h = failing("nan")
    whole(x)(q, h).sum().backward()
    assert q.grad[1].isnan().all()
    torch.testing.assert_close(q.grad[0], -torch.ones(2, dtype=D))


@pytest.mark.slow
def test_a_failed_item_poisons_no_shared_gradient():
    _, q, h = failing("nan")
    shared = torch.eye(2, dtype=D, requires_grad=True)
    for backend in ("eager", "aot_eager"):
        z = whole(lambda Q: solve_qp(Q, q, G=torch.eye(2, dtype=D), h=-h.abs() * h.sign(), on_failure="nan"), backend)
        first = z(shared)
        (found,) = torch.autograd.grad(first.x[0].sum() + first.value[0], shared)
        assert torch.isfinite(found).all()
    bad = torch.tensor([[0.0, 0.0], [torch.nan, 0.0]], dtype=D)
    for function in (solve_qp, whole(solve_qp)):
        result = function(shared, bad, G=torch.eye(2, dtype=D), h=-torch.ones(2, dtype=D))
        (found,) = torch.autograd.grad(result.x[0].sum() + 2 * result.value[0], shared)
        torch.testing.assert_close(found, torch.ones(2, 2, dtype=D))


@pytest.mark.slow
def test_absent_rows_get_no_gradient():
    h = torch.tensor([-1.0, torch.inf], dtype=D, requires_grad=True)
    eye = torch.eye(2, dtype=D)
    z = whole(solve_qp)(eye, torch.zeros(2, dtype=D), G=eye, h=h)
    (found,) = torch.autograd.grad(z.x.sum() + z.value, h)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0], dtype=D))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_second_derivatives_are_refused(backend, generator):
    """Never a wrong number: dropping how the first derivative depends on the factors would be one."""
    inputs = data(generator)
    x = whole(lambda *t: solve_qp(*t).x, backend)(*inputs)
    first = torch.autograd.grad(x.square().sum(), inputs[1], create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"double backward|no autograd formula"):
        torch.autograd.grad(first.square().sum(), inputs[1])


def test_what_no_graph_holds_runs_in_a_break(generator):
    """Each runs as in eager, and `fullgraph=True` says why it cannot."""
    inputs = data(generator)
    near = solve_qp(*(t.detach() for t in inputs))
    monitor = Monitor()
    for options in ({"monitor": monitor}, {"warm_start": near}, {"degenerate": "smoothed", "smoothing": 1e-3}):

        def loss(*t, options=options):
            return solve_qp(*(2 * s for s in t), **options).x.sin().sum()

        compiled = torch.compile(loss, backend="aot_eager")
        found, truth = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, loss))
        for a, b in zip(found, truth, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
        before = graphs()
        compiled(*(t.detach().mul(1.01).requires_grad_() for t in inputs))
        assert graphs() == before
        torch._dynamo.reset()  # which would else take what it has compiled for the same code
        with pytest.raises(Exception, match="it looks at the residuals that it certifies"):
            whole(loss)(*inputs)
    assert monitor.last("adjoint") is not None


def test_bad_input_is_refused_as_in_eager():
    eye, q = torch.eye(2, dtype=D), torch.ones(3, dtype=D)
    with pytest.raises(ValueError, match="Q must have shape"):
        torch.compile(solve_qp, backend="eager")(eye, q)


def test_a_linear_program(generator):
    """In the graph; the two solves of a vertex in a break."""
    row, one = torch.ones(1, 3, dtype=D), torch.ones(1, dtype=D)
    c = torch.randn(5, 3, generator=generator, dtype=D, requires_grad=True)
    weights = torch.arange(3.0, dtype=D)
    for options in ({"regularization": 0.7}, {}, {"ties": "vertex"}):

        def loss(c, options=options):
            return (solve_lp(2 * c, row, one, low=0.0, **options).x * weights).sum()

        compiled = torch.compile(loss, backend="aot_eager", fullgraph="ties" not in options)
        found, truth = (torch.autograd.grad(f(c), c)[0] for f in (compiled, loss))
        torch.testing.assert_close(found, truth, atol=1e-10, rtol=1e-10)


def test_the_factors_are_freed(generator):
    """What a backward pass needs lives as long as the graph of that call, and no longer."""
    inputs = data(generator)
    compiled = whole(lambda *t: solve_qp(*t).x)
    compiled(*inputs).sum().backward()
    x = compiled(*inputs)
    node = weakref.ref(x.grad_fn)
    del x
    gc.collect()
    assert node() is None


def test_the_operators_keep_their_promises(generator):
    """Shapes, aliases and the schema, by torch's own checks."""
    Q, q, A, b, G, h = (t.detach().requires_grad_(k == 1) for k, t in enumerate(data(generator)))
    for policy in ("strong", "mean", None):
        inputs = (Q, q, A, b, G, h, 1e-9, 100, policy, False, "raise")
        torch.library.opcheck(torch.ops.nestopt.solve_qp.default, inputs, test_utils=("test_schema", "test_faketensor"))
    found = torch.ops.nestopt.solve_qp(Q, q, A, b, G, h, 1e-9, 100, "strong", False, "raise")
    adjoint = (torch.ones_like(found[0]), *(t.detach() for t in found[-3:]), found[2], 4, 1, 5, "raise")
    torch.library.opcheck(
        torch.ops.nestopt.solve_qp_adjoint.default, adjoint, test_utils=("test_schema", "test_faketensor")
    )
