"""The main job on real data: the figures that the example's table prints, and the README's session."""

import doctest
import importlib.util
from pathlib import Path

import pytest
import torch
from sklearn.metrics import f1_score

from nestopt import bilevel, linalg
from nestopt.linalg import Status

ROOT = Path(__file__).parents[1]


@pytest.fixture
def example():
    """The example's module, run in its own default dtype."""
    path = ROOT / "examples" / "hyperparameter_optimization.py"
    spec = importlib.util.spec_from_file_location("hyperparameter_optimization", path)
    module = importlib.util.module_from_spec(spec)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    spec.loader.exec_module(module)
    yield module
    torch.set_default_dtype(before)


def test_learning_a_penalty_beats_the_grid(example, capsys):
    grid, path, res = example.learn_penalty(quick=True)
    assert res.status == Status.CONVERGED
    assert res.value <= 0.06273
    assert abs(float(res.x) + 6.29) <= 0.01
    assert res.residuals["upper"] <= 1e-6
    assert res.value < min(loss for loss, *_ in grid)
    assert len(path) == res.counts.lower_solves
    assert "certified to" in capsys.readouterr().out


def test_cleaning_finds_the_wrong_labels(example, capsys):
    weights, wrong, res = example.clean_labels(400, quick=False)
    assert res.status == Status.CONVERGED
    assert f1_score(wrong, weights < 0.5) >= 0.94
    last = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("hypergradients"))
    assert float(last.split()[-1]) >= 0.94  # test accuracy; .839 with the noisy labels, .938 with the right ones only


def test_hyper_cleaning_hypergradient_is_right(example):
    """Not only useful but true: 800 hyperparameters against central differences, on a random part of the data."""
    g = torch.Generator().manual_seed(0)
    X, V = torch.randn(2, 60, 8, generator=g)
    t, v = torch.randint(0, 3, (2, 60), generator=g)
    problem = bilevel.Problem(
        lambda x, y: torch.nn.functional.cross_entropy(V @ y, v),
        lambda x, y: (
            (torch.sigmoid(x) * torch.nn.functional.cross_entropy(X @ y, t, reduction="none")).mean()
            + 1e-3 * (y**2).sum()
        ),
    )
    x = torch.randn(60, generator=g)
    y = bilevel.solve(
        problem, x, torch.zeros(8, 3), bilevel.AID(stopping=linalg.Stopping(rtol=0.0, atol=1e-12, max_iter=0))
    ).y
    table = bilevel.check_hypergradient(problem, x, y, directions=4)
    assert float(table.errors.max()) < 1e-6


def test_quick_run_writes_the_figure(example, tmp_path, capsys):
    torch.manual_seed(0)
    penalty = example.learn_penalty(quick=True)
    cleaning = example.clean_labels(100, quick=True)
    example.draw(tmp_path / "figure.png", *penalty, *cleaning)
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_readme_session():
    results = doctest.testfile(str(ROOT / "README.md"), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert results.attempted > 5
    assert results.failed == 0


def test_spectrum_example_agrees_with_the_dense_matrices(tmp_path, capsys):
    path = ROOT / "examples" / "spectrum.py"
    spec = importlib.util.spec_from_file_location("spectrum", path)
    module = importlib.util.module_from_spec(spec)
    torch.set_default_dtype(torch.float64)  # the fixture `seed` puts it back
    spec.loader.exec_module(module)
    results = module.main(quick=True)
    assert [list(matrices) for matrices in results.values()] == [["Hessian", "Gauss-Newton"]] * 2
    for matrices in results.values():
        for top, trace, spectrum, exact in matrices.values():
            assert top.status == Status.CONVERGED
            torch.testing.assert_close(top.values, exact.flip(0)[:10], rtol=0, atol=1e-7)
            assert abs(trace.value - float(exact.sum())) <= 5 * trace.standard_error
            count = spectrum.count(low=0.1)
            assert abs(count.value - int((exact >= 0.1).sum())) <= 4 * count.standard_error + 1
    module.draw(tmp_path / "spectrum.png", results)
    assert (tmp_path / "spectrum.png").stat().st_size > 10_000
    assert "Gauss-Newton after training" in capsys.readouterr().out


def test_pruning_example_prefers_the_curvature_to_the_magnitude(tmp_path, capsys):
    path = ROOT / "examples" / "pruning.py"
    spec = importlib.util.spec_from_file_location("pruning", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.compare(quick=True)
    for sparsity in (0.3, 0.6):  # the training loss is what the scores predict
        ours, plain = (found["one shot", sparsity, method][0] for method in ("M-FAC", "magnitude"))
        assert ours[0] < plain[0]
        assert ours[3] == plain[3] == pytest.approx(sparsity, abs=1e-4)
    assert found["gradual", 0.95, "M-FAC"][0][3] == pytest.approx(0.95, abs=1e-4)
    module.report(found)
    module.draw(tmp_path / "pruning.png", found)
    assert (tmp_path / "pruning.png").stat().st_size > 10_000
    assert "magnitude" in capsys.readouterr().out
