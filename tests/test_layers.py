"""The house rules that the source itself must keep, and proof that each rule can fail.

Imports point one way, `linalg <- implicit <- constrained <- bilevel`, wherever they stand: in functions, under
TYPE_CHECKING, as strings given to import_module. Across folders they are absolute.
"""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

LAYERS = ("linalg", "implicit", "constrained", "bilevel")
MAX_LINES = 500
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)


def modules(root: Path) -> Iterator[tuple[Path, ast.Module]]:
    """Each module of the four folders under `root`, as a path relative to it and its tree."""
    for layer in LAYERS:
        files = sorted((root / layer).rglob("*.py"))
        assert files, f"no modules under {root / layer}"
        for file in files:
            yield file.relative_to(root), ast.parse(file.read_text(encoding="utf-8"), str(file))


def imported(node: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The dotted names, as tuples, that `node` imports when it stands in `package`, itself relative to nestopt.

    Relative imports that stay in their folder come back as nestopt's; those that climb out, as ("..",).
    """
    if isinstance(node, ast.Import):
        for alias in node.names:
            # `import nestopt.linalg` without `as` binds nestopt, yet needs only what it names.
            yield tuple(alias.name.split("."))
    elif isinstance(node, ast.ImportFrom):
        module = tuple(node.module.split(".")) if node.module else ()
        if node.level:
            if node.level > len(package):
                yield ("..",)
                return
            module = ("nestopt", *package[: len(package) - node.level + 1], *module)
        for alias in node.names:
            yield (*module, alias.name)
    elif isinstance(node, ast.Call) and node.args:
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        first = node.args[0]
        if function in ("import_module", "__import__") and isinstance(first, ast.Constant):
            name = str(first.value)
            yield (("..",) if name.startswith(".") else tuple(name.split(".")))


def wrong_arrows(root: Path) -> list[str]:
    """Imports that point up, name nestopt itself, name a folder without nestopt, or climb out of their folder."""
    found = []
    for path, tree in modules(root):
        rank = LAYERS.index(path.parts[0])
        for node in ast.walk(tree):
            for name in imported(node, path.parent.parts):
                where = f"{path}:{node.lineno}:"
                if name == ("..",):
                    found.append(f"{where} a relative import leaves {path.parts[0]}; write `from nestopt...`")
                elif name[0] in LAYERS:
                    found.append(f"{where} `{name[0]}` without nestopt is another package")
                elif name[0] == "nestopt" and (len(name) == 1 or name[1] not in LAYERS):
                    found.append(f"{where} `{'.'.join(name)}` imports the whole of nestopt; name one of {LAYERS}")
                elif name[0] == "nestopt" and LAYERS.index(name[1]) > rank:
                    found.append(f"{where} {path.parts[0]} may not import {name[1]}")
    return found


def shadowed_modules(root: Path) -> list[str]:
    """Modules that bear the name of what they, or their package, export: the import would hide one of the two."""
    found = []
    for path, tree in modules(root):
        if path.name != "__init__.py":
            found += [
                f"{path}:{node.lineno}: exports `{node.name}`, its own name"
                for node in tree.body
                if isinstance(node, DEFINITIONS) and node.name == path.stem
            ]
            continue
        folder = (root / path).parent
        siblings = {p.stem for p in folder.glob("*.py")} | {p.name for p in folder.iterdir() if p.is_dir()}
        for node in ast.walk(tree):
            # `from . import transport` names the module itself, `from .trace import trace` hides it.
            if isinstance(node, ast.ImportFrom) and not (node.level == 1 and node.module is None):
                names = {alias.asname or alias.name for alias in node.names}
            elif isinstance(node, DEFINITIONS):
                names = {node.name}
            else:
                continue
            found += [f"{path}:{node.lineno}: `{name}` is also a module here" for name in sorted(names & siblings)]
    return found


def long_files(root: Path) -> list[str]:
    """Files of more than 500 lines."""
    lengths = ((path, len((root / path).read_text(encoding="utf-8").splitlines())) for path, _ in modules(root))
    return [f"{path}: {length} lines, at most {MAX_LINES}" for path, length in lengths if length > MAX_LINES]


def undocumented(root: Path) -> list[str]:
    """Public functions and classes of a module without a docstring (methods are ruff's part, D102)."""
    return [
        f"{path}:{node.lineno}: `{node.name}` has no docstring"
        for path, tree in modules(root)
        for node in tree.body
        if isinstance(node, DEFINITIONS) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]


RULES = [wrong_arrows, shadowed_modules, long_files, undocumented]


@pytest.mark.parametrize("rule", RULES)
def test_nestopt_keeps(rule):
    spec = importlib.util.find_spec("nestopt")
    root = Path(spec.origin).parent
    assert all((root / layer).is_dir() for layer in LAYERS)
    assert not rule(root), "\n".join(rule(root))


@pytest.fixture
def house(tmp_path):
    """A sound house of four folders, to be spoilt."""
    for layer in LAYERS:
        (tmp_path / layer).mkdir()
        (tmp_path / layer / "__init__.py").write_text('"""Folder."""\n')
    (tmp_path / "linalg" / "cg.py").write_text('class CG:\n    """Solver."""\n')
    (tmp_path / "linalg" / "__init__.py").write_text("from .cg import CG\n")
    (tmp_path / "constrained" / "transport").mkdir()
    (tmp_path / "constrained" / "transport" / "__init__.py").write_text("from ..problem import Problem\n")
    (tmp_path / "constrained" / "__init__.py").write_text("from . import transport\n")
    (tmp_path / "bilevel" / "aid.py").write_text(
        "import math\nimport nestopt.implicit\nfrom nestopt import linalg\nfrom nestopt.linalg.cg import CG\n"
        "from . import problem\nimport implicitly\nprint('nestopt.bilevel')\ndef _hidden(): pass\n"
    )
    return tmp_path


@pytest.mark.parametrize("rule", RULES)
def test_a_sound_house_passes(house, rule):
    assert rule(house) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("linalg/x.py", "import nestopt.implicit"),
        ("linalg/x.py", "import nestopt.bilevel.problem as p"),
        ("linalg/x.py", "from nestopt import bilevel"),
        ("linalg/x.py", "from nestopt import linalg, constrained as c"),
        ("implicit/x.py", "from nestopt.constrained import Problem"),
        ("constrained/transport/x.py", "from nestopt.bilevel.problem import Problem"),
        ("linalg/x.py", "def f():\n    from nestopt.implicit import root"),
        ("linalg/x.py", "class A:\n    def f(self):\n        import nestopt.implicit.roots"),
        ("linalg/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from nestopt.bilevel import AID"),
        ("linalg/x.py", "try:\n    import nestopt.bilevel\nexcept ImportError:\n    pass"),
        ("linalg/x.py", "import importlib\nimportlib.import_module('nestopt.bilevel')"),
        ("linalg/x.py", "from importlib import import_module\nimport_module('..bilevel', __package__)"),
        ("linalg/x.py", "__import__('nestopt.bilevel')"),
        ("linalg/x.py", "from ..implicit import root"),
        ("linalg/x.py", "from .. import implicit"),
        ("bilevel/x.py", "from ..linalg import CG"),
        ("constrained/transport/x.py", "from ... import linalg"),
        ("constrained/transport/x.py", "from ...linalg import CG"),
        ("linalg/x.py", "import nestopt"),
        ("linalg/x.py", "import nestopt as n"),
        ("linalg/x.py", "from nestopt import *"),
        ("linalg/x.py", "from nestopt import Result"),
        ("bilevel/x.py", "from nestopt import __version__"),
        ("bilevel/__init__.py", "import nestopt"),
        ("implicit/x.py", "from linalg import CG"),
        ("implicit/x.py", "import implicit.roots"),
    ],
)
def test_wrong_arrows_are_found(house, file, source):
    (house / file).write_text(source)
    found = wrong_arrows(house)
    assert len(found) == 1
    assert found[0].startswith(f"{file}:{1 + source.count(chr(10)) - source.count('except') * 2}:")


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("linalg/trace.py", "def trace(): pass"),
        ("linalg/CG2.py", "class CG2: pass"),
        ("linalg/trace.py", "async def trace(): pass"),
        ("linalg/__init__.py", "from .other import cg"),
        ("linalg/__init__.py", "from .cg import CG as cg"),
        ("linalg/__init__.py", "def cg(): pass"),
        ("constrained/__init__.py", "from .sinkhorn import transport"),
    ],
)
def test_shadowed_modules_are_found(house, file, source):
    (house / file).write_text(source)
    assert len(shadowed_modules(house)) == 1


def test_long_files_are_found(house):
    (house / "linalg" / "x.py").write_text("pass\n" * MAX_LINES)
    assert long_files(house) == []
    (house / "linalg" / "x.py").write_text("pass\n" * (MAX_LINES + 1))
    assert long_files(house) == ["linalg/x.py: 501 lines, at most 500"]


@pytest.mark.parametrize("source", ["def f(): pass", "class A: pass", "async def f(): pass", 'def f():\n    ""\n'])
def test_undocumented_definitions_are_found(house, source):
    (house / "constrained" / "transport" / "x.py").write_text(source)
    assert len(undocumented(house)) == 1


def test_an_empty_folder_is_no_success(tmp_path):
    with pytest.raises(AssertionError, match="no modules"):
        wrong_arrows(tmp_path)
