"""The bilevel examples in their quick mode: what each is there to show, the table, the figure."""

import importlib.util
from pathlib import Path

import pytest
import torch
from sklearn.metrics import f1_score

from nestopt import bilevel
from nestopt.linalg import Status, Stopping

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example():
    """name -> the example's module, run in float64."""
    before = torch.get_default_dtype()

    def load(name, dtype=torch.float64):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        torch.set_default_dtype(dtype)
        spec.loader.exec_module(module)
        return module

    yield load
    torch.set_default_dtype(before)


def cell(printed, row, column):
    """A number of the printed table."""
    line = next(line for line in printed.splitlines() if line.startswith(row))
    return float(line[len(row) :].split()[column])


def drawn(path):
    return path.stat().st_size > 10_000


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short_and_have_a_quick_mode(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert "--quick" in text
    assert f"examples/{path.name}" in text  # how to run it


def test_ten_distilled_digits_do_for_a_thousand(example, tmp_path, capsys):
    module = example("dataset_distillation")
    module.draw(tmp_path / "figure.png", module.main(quick=True))
    printed = capsys.readouterr().out
    assert cell(printed, "for ridge, 1 a class", 3) >= 0.93
    assert cell(printed, "for kernel ridge, 10 a class", 4) >= 0.95
    assert cell(printed, "real digits, 1 a class", 2) < 0.7
    assert drawn(tmp_path / "figure.png")


def test_penalties_of_every_weight_cost_little(example, tmp_path, capsys):
    module = example("per_weight_penalties", torch.float32)
    found = module.per_weight(quick=True)
    assert found["through one step"][1] <= 2.5  # memory, counted in bytes
    module.draw(tmp_path / "figure.png", found, module.per_feature(quick=True))
    printed = capsys.readouterr().out
    assert cell(printed, "30 penalties, one a feature", 0) < cell(printed, "one penalty", 0)
    assert drawn(tmp_path / "figure.png")


@pytest.mark.slow
def test_meta_learnt_features_serve_new_tasks(example, tmp_path, capsys):
    module = example("meta_learning")
    module.main(tmp_path / "figure.png", quick=True)
    printed = capsys.readouterr().out
    assert cell(printed, "meta-learnt (iMAML)", 3) < 0.5 * cell(printed, "untrained features", 2)
    assert drawn(tmp_path / "figure.png")


def test_unrolled_hypergradients_approach_the_implicit_one(example):
    module = example("meta_learning")
    module.NEW = 5
    train = module.sinusoids(5, 0)
    problem, best, *_ = module.learn("sinusoids", train, train, train, 1, lambda p, t: 0.0, 2)
    _, differences = module.agreement(problem, best, [4, 32, 256])
    assert differences[0] > differences[1] > differences[2]
    assert differences[2] < 1e-4  # the implicit one stands at heads solved to a tenth of that


def test_cleaning_by_a_chosen_strength(example):
    """The full-size figures of the strength that `best_strength` chooses."""
    module = example("hyper_cleaning")
    train, held, (E, e) = module.load()
    problem = module.cleaning(train, held, 3e-5)
    y0 = {"weight": torch.zeros(64, 10), "bias": torch.zeros(10)}
    res = bilevel.solve(problem, torch.zeros(800), y0, bilevel.AID(stopping=Stopping(rtol=1e-3, max_iter=60)))
    assert res.status == Status.CONVERGED
    assert float((module.predict(res.y, E).argmax(-1) == e).double().mean()) >= 0.945
    assert f1_score(train[2], res.x < 0) >= 0.946


@pytest.mark.slow
def test_every_family_finds_wrong_labels(example, tmp_path, capsys):
    module = example("hyper_cleaning")
    runs, wrong = module.compare(quick=True)
    assert all(f1 >= 0.9 for name, (_, f1) in runs.items() if name.startswith(("AID", "HOAG", "Unrolled")))
    module.draw(tmp_path / "figure.png", runs, wrong)
    assert drawn(tmp_path / "figure.png")


@pytest.mark.slow
def test_sparse_penalties_are_learnt(example, tmp_path):
    module = example("sparse_penalties")
    best, runs = module.compare(quick=True)
    assert runs["elastic net, 2 penalties"].value <= 0.64
    module.draw(tmp_path / "figure.png", best, runs)
    assert drawn(tmp_path / "figure.png")


@pytest.mark.slow
def test_coupled_machines_keep_their_constraints(example, tmp_path):
    module = example("coupled_svm")
    runs, X, t = module.compare(quick=True)
    for res in runs.values():
        y = res.y
        assert float((1 - y["s"] - t * (X @ y["w"] + y["b"])).max()) <= 1e-6
        assert float((y["s"] - res.x).max()) <= 1e-6
    module.draw(tmp_path / "figure.png", runs, X, t)
    assert drawn(tmp_path / "figure.png")


@pytest.mark.slow
def test_a_learnt_schedule_beats_the_best_constant_rate(example, tmp_path, capsys):
    module = example("learning_rate_schedule")
    learnt = module.learn(quick=True)
    assert learnt[-1].value < cell(capsys.readouterr().out.replace(",", " "), "best constant rate", -2)
    module.draw(tmp_path / "figure.png", *learnt)
    assert drawn(tmp_path / "figure.png")


def test_poison_is_found(example, tmp_path):
    module = example("poisoning")
    runs = module.main(quick=True)
    (poisoned, oracle, learnt), _, _, auc = runs[0.15]
    assert poisoned < 0.4
    assert learnt >= oracle - 0.05
    assert auc >= 0.85
    module.draw(tmp_path / "figure.png", runs)
    assert drawn(tmp_path / "figure.png")


def test_rare_classes_gain(example, tmp_path):
    module = example("long_tail")
    found, weights, t, res = module.compare(quick=True)
    assert res.status in (Status.CONVERGED, Status.MAX_ITER)
    assert float(found["weights learnt"][5:].mean()) > float(found["plain"][5:].mean()) + 0.1
    module.draw(tmp_path / "figure.png", found, weights, t, res)
    assert drawn(tmp_path / "figure.png")
