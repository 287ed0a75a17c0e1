"""The larger problems are slow tests, but for AID, whose answers the others are compared with."""

import pytest

LARGER = (
    "n=200", "n=100", "n=40", "n=30", "n=20", "size8-1000000", "kernel ridge", "ridge, one penalty",
    "multimodal (from 1", "multimodal (from 2", "lasso", "lstm", "attention", "nuclear norm", "sparse group",
    "StocBiO", "sine (n=2)", "p=3",
)  # fmt: skip
ALWAYS = ("test_aid_needs_no_tuning", "test_the_choice_solves")


def pytest_collection_modifyitems(items):
    for item in items:
        larger = any(word in item.name for word in LARGER) and not item.name.startswith(ALWAYS)
        if larger and "tests/bilevel/" in item.nodeid:
            item.add_marker(pytest.mark.slow)
