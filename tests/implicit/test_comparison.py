"""compare: its errors, residuals and products are those of the passes, per item."""

import pytest
import torch

from nestopt import implicit
from nestopt.implicit import OneStep, Phantom, Truncated, Unroll
from nestopt.linalg import CG, GMRES, LU, Cholesky, SolverError, Status

D = torch.float64


def diagonal(slopes, b, **options):
    """y = slopes y + b, for which everything is known."""
    y = b / (1 - slopes)
    return implicit.compare(implicit.fixed_point, lambda y, b: slopes * y + b, y, b, **options)


def test_known_errors():
    slopes, b = torch.tensor([0.5, 0.5], dtype=D), torch.ones(2, dtype=D)
    found = diagonal(slopes, b, passes={"one": OneStep(), "five": Phantom(5), "unrolled": Unroll(5), "lu": LU()})
    assert [row.name for row in found.rows] == ["exact", "one", "five", "unrolled", "lu"]
    # (I - J)^-1 = 2, the series of k terms is 2 (1 - 2^-k); the residual is 2^-k
    for name, error in (("one", 0.5), ("five", 2**-5), ("unrolled", 2**-5), ("lu", 0.0)):
        assert found[name].error == pytest.approx(error, abs=1e-14)
        assert found[name].residual == pytest.approx(error, abs=1e-14)
        assert found[name].errors == pytest.approx(error, abs=1e-14)
    assert found["one"].status is Status.MAX_ITER
    assert found["exact"].status is Status.CONVERGED
    assert found["exact"].error == 0
    # three cotangents and the certificate of y
    assert [found[name].products for name in ("one", "five", "unrolled")] == [4, 16, 16]
    assert found["exact"].products == 2 + 3  # a factorisation of two columns, three solves
    assert all(row.seconds > 0 for row in found.rows)


def test_errors_are_per_item():
    slopes = torch.tensor([[0.1], [0.5], [0.9]], dtype=D)
    found = diagonal(slopes, torch.ones(3, 2, dtype=D), batch_dims=1, passes={"one": OneStep()})
    assert found["one"].errors.tolist() == pytest.approx([0.1, 0.5, 0.9], abs=1e-12)
    assert found["one"].residual == pytest.approx(0.9, abs=1e-12)
    assert found["one"].codes.shape == (3,)
    assert "MAX_ITER 3/3" in str(found)


def test_a_given_cotangent_and_a_generator():
    slopes, b = torch.tensor([0.1, 0.9], dtype=D), torch.ones(2, dtype=D)
    first = diagonal(slopes, b, passes={"one": OneStep()}, cotangent=torch.tensor([1.0, 0.0], dtype=D))
    assert first["one"].error == pytest.approx(0.1, abs=1e-12)
    values = [
        diagonal(slopes, b, passes={"one": OneStep()}, samples=1, generator=torch.Generator().manual_seed(s))["one"]
        for s in (1, 1, 2)
    ]
    assert values[0].error == values[1].error != values[2].error


@pytest.mark.parametrize("name", ["fixed_point", "argmin", "root", "symmetric root"])
def test_the_default_list(name, generator):
    """Whatever fits runs; solvers are exact to their tolerance, series are not."""
    M = torch.randn(3, 3, generator=generator, dtype=D)
    H, b = torch.eye(3, dtype=D) + 0.1 * M @ M.mT, torch.ones(3, dtype=D)
    y = torch.linalg.solve(H, b)
    found = {
        "fixed_point": lambda: implicit.compare(
            implicit.fixed_point, lambda y, b, H: y - 0.3 * (H @ y - b), y, b, {"H": H, "none": None}["H"]
        ),
        "argmin": lambda: implicit.compare(implicit.argmin, lambda y, b, H: y @ H @ y / 2 - b @ y, y, b, H),
        "root": lambda: implicit.compare(implicit.root, lambda y, b: H @ y - b, y, b),
        "symmetric root": lambda: implicit.compare(implicit.root, lambda y, b: H @ y - b, y, b, symmetric=True),
    }[name]()
    names = [row.name for row in found.rows]
    assert names[:3] == ["exact", "GMRES()", "Normal(CG())"]
    assert ("OneStep()" in names) == (name != "root")
    assert ("CG()" in names) == ("symmetric" in name or name == "argmin")
    for row in found.rows:
        exact = row.name in ("exact", "GMRES()", "Normal(CG())", "CG()", "MINRES()")
        assert row.error <= 1e-9 if exact else row.error < 1, row.name
    lines = str(found).splitlines()
    assert len(lines) == len(names) + 1
    assert lines[0].split() == ["pass", "error", "residual", "products", "seconds", "status"]


def test_trees_and_what_requires_grad(generator):
    """Only what requires grad is differentiated, where anything does."""
    y = {"p": torch.tensor(2.0, dtype=D), "q": torch.tensor([3.0, 1.0], dtype=D)}
    theta = {"a": torch.tensor(4.0, dtype=D, requires_grad=True), "b": torch.tensor([9.0, 1.0], dtype=D), "c": 2}

    def residual(y, theta):
        return {"p": y["p"] ** theta["c"] - theta["a"], "q": y["q"] ** 2 - theta["b"]}

    found = implicit.compare(implicit.root, residual, y, theta, passes={"gmres": GMRES(), "one": OneStep(step=0.25)})
    assert found["gmres"].error < 1e-9
    assert found["one"].error == pytest.approx(0.0, abs=1e-12)  # of a alone, where 1 / (2 p) = 1/4
    assert found["one"].errors > 0.1
    assert theta["a"].grad is None


def test_a_failing_pass_is_named_and_has_no_numbers():
    b = torch.ones(2, dtype=D)
    found = implicit.compare(
        implicit.argmin, lambda y, b: ((y - b) ** 2 * torch.tensor([1.0, -1.0], dtype=D)).sum(), b, b,
        passes={"cg": CG(), "truncated": Truncated(CG(max_iter=1))},
    )  # fmt: skip
    assert found["cg"].status is Status.NEGATIVE_CURVATURE
    assert found["cg"].error != found["cg"].error
    assert "nan" in str(found)
    with pytest.raises(SolverError, match="NEGATIVE_CURVATURE"):
        implicit.compare(
            implicit.argmin, lambda y, b: -((y - b) ** 2).sum(), b, b, exact=Cholesky(), passes={"lu": LU()}
        )
    with pytest.raises(SolverError, match="not a fixed point"):
        implicit.compare(implicit.fixed_point, lambda y, b: 0.5 * y + b, b, b)


B = torch.ones(2, dtype=D)
BAD = {
    "another layer": (lambda: implicit.compare(torch.sin, lambda y, b: y - b, B, B), "layer must be implicit.root"),
    "exact": (
        lambda: implicit.compare(implicit.root, lambda y, b: y - b, B, B, passes={"exact": LU()}),
        "call yours otherwise",
    ),
    "solver": (lambda: implicit.compare(implicit.root, lambda y, b: y - b, B, B, solver=LU()), "leave it out"),
    "samples": (lambda: implicit.compare(implicit.root, lambda y, b: y - b, B, B, samples=0), "at least 1"),
    "nothing": (lambda: implicit.compare(implicit.root, lambda y: y - 1, B), "nothing to differentiate"),
    "a cotangent of another shape": (
        lambda: implicit.compare(implicit.root, lambda y, b: y - b, B, B, cotangent=torch.ones(3, dtype=D)),
        "must have shape",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_an_unknown_line():
    found = diagonal(torch.tensor([0.5], dtype=D), torch.ones(1, dtype=D), passes={"one": OneStep()})
    with pytest.raises(KeyError, match="'two' was not compared; there are exact, one"):
        found["two"]
