"""The larger problems, and whole files that take long, are slow tests, but for AID, which the others are held to."""

import pytest

LARGER = (
    "n=200", "n=100", "n=40", "n=30", "n=20", "size8-1000000", "kernel ridge", "ridge, one penalty",
    "lasso", "lstm", "attention", "nuclear norm", "sparse group",
    "StocBiO", "sine (n=2", "p=3", "adversarial", "multimodal", "logistic", "test_resume_after_kill",
)  # fmt: skip
SLOW_FILES = ("test_evolution.py", "test_replay.py", "test_distributed.py")
ALWAYS = ("test_aid_needs_no_tuning", "test_the_choice_solves")


def pytest_collection_modifyitems(items):
    for item in items:
        larger = any(word in item.name for word in LARGER) and not item.name.startswith(ALWAYS)
        if (larger and "tests/bilevel/" in item.nodeid) or item.path.name in SLOW_FILES:
            item.add_marker(pytest.mark.slow)
