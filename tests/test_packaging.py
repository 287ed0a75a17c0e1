"""What pip, type checkers and the Makefile rely on. Run on the source tree and, by `make wheel-test`, on the wheel."""

import importlib.metadata
import importlib.resources
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FOLDERS = ("linalg", "implicit", "constrained", "bilevel")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
SOURCE_TREE = (ROOT / "src").is_dir()

in_source_tree = pytest.mark.skipif(not SOURCE_TREE, reason="the wheel is under test")
in_wheel = pytest.mark.skipif(SOURCE_TREE, reason="the source tree is under test")


def pins(file):
    lines = (line.partition("#")[0].strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines())
    pairs = [line.split("==") for line in lines if line]
    assert all(len(pair) == 2 for pair in pairs), f"{file} may only pin"
    versions = {canonicalize_name(name): version for name, version in pairs}
    assert len(versions) == len(pairs), f"{file} names a package twice"
    return versions


def floors(requirements):
    """The lower bounds; a requirement may hold nothing else, since an upper bound keeps users from fixes."""
    found = {}
    for requirement in map(Requirement, requirements):
        bounds = list(requirement.specifier)
        assert [bound.operator for bound in bounds] in ([], [">="]), requirement
        found[canonicalize_name(requirement.name)] = bounds[0].version if bounds else None
    return found


def python(code, cwd):
    """Runs `code` in a new interpreter that sees this nestopt and, in the source tree, nothing installed of ours."""
    environment = os.environ | ({"PYTHONPATH": str(ROOT / "src")} if SOURCE_TREE else {})
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_the_floors_are_those_that_ci_installs():
    tested = (
        floors(PYPROJECT["build-system"]["requires"])
        | floors(PROJECT["dependencies"])
        | floors(EXTRAS["layers"])
        | floors(EXTRAS["plot"])
    )
    torch = tested.pop("torch")
    assert torch == "2.11"  # for import alone, as pyproject.toml says
    assert tested == pins("constraints-floor.txt")
    constraints = pins("constraints.txt")
    for extra in ("test", "dev"):
        assert floors(EXTRAS[extra]) == {name: constraints[name] for name in floors(EXTRAS[extra])}
    for extra in ("bench", "docs"):
        assert set(floors(EXTRAS[extra]).values()) == {None}


def test_the_constraints_pin_every_dependency():
    constraints = pins("constraints.txt")
    named = floors(PROJECT["dependencies"]).keys() | floors(PYPROJECT["build-system"]["requires"]).keys()
    for extra in EXTRAS.values():
        named |= floors(extra).keys()
    assert named - constraints.keys() == set()
    assert constraints["torch"] == "2.13.0"
    assert [name for name in constraints if name.startswith(("nvidia-", "cuda-", "triton"))] == []
    assert "functorch" not in constraints


def test_the_extras_are_these():
    assert set(EXTRAS) == {"layers", "plot", "bench", "docs", "test", "dev"}


def test_torch_is_no_build_requirement():
    assert "torch" not in floors(PYPROJECT["build-system"]["requires"])


def test_the_version_has_one_source():
    import nestopt

    assert PROJECT["dynamic"] == ["version"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "nestopt.__version__"}
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[?v?(\d+\.\d+\.\d+[^\]\s]*)", changelog, flags=re.MULTILINE)
    assert released, "CHANGELOG.md has no '## X.Y.Z' heading"
    assert released[0] == nestopt.__version__


@in_source_tree
def test_the_folders_are_relative_links():
    for folder in FOLDERS:
        link = ROOT / "src" / "nestopt" / folder
        assert link.is_symlink()
        assert os.readlink(link) == f"../../{folder}"
        assert link.resolve() == ROOT / folder
        assert (ROOT / folder / "__init__.py").is_file()


@in_wheel
def test_the_wheel_holds_nestopt_alone():
    import nestopt

    assert "site-packages" in nestopt.__file__
    distribution = importlib.metadata.distribution("nestopt")
    assert distribution.version == nestopt.__version__
    tops = {file.parts[0] for file in distribution.files}
    assert tops == {"nestopt", f"nestopt-{nestopt.__version__}.dist-info"}
    for folder in FOLDERS:
        assert any(file.parts[:2] == ("nestopt", folder) for file in distribution.files)


def test_nestopt_ships_its_types():
    assert importlib.resources.files("nestopt").joinpath("py.typed").is_file()


def test_no_folder_is_importable_by_its_bare_name(tmp_path):
    find = "import importlib.util, nestopt; specs = map(importlib.util.find_spec, {})"
    found = python(f"{find.format(FOLDERS)}; print(*(spec and spec.origin for spec in specs))", tmp_path).split()
    assert len(found) == len(FOLDERS)
    # PyPI's implicit may be installed: what bears the name must then be its.
    inside = [Path(path).resolve().is_relative_to(ROOT / folder) for path, folder in zip(found, FOLDERS, strict=True)]
    assert not any(path != "None" and ours for path, ours in zip(found, inside, strict=True))
    assert PYPROJECT["tool"]["pytest"]["ini_options"]["pythonpath"] == ["src"]


def test_import_brings_no_optional_package(tmp_path):
    code = "import sys, nestopt; print(*sys.modules)"
    loaded = {name.partition(".")[0] for name in python(code, tmp_path).split()}
    assert loaded & {"matplotlib", "sklearn", "cvxpy", "diffcp", "clarabel", "higher", "pandas", "hypothesis"} == set()
