"""The house: which way imports point, and that a name leads to one place."""

from __future__ import annotations

import ast
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from agentmerge import plugins
from agentmerge.contracts import operators
from agentmerge.methods import METHODS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "agentmerge"
ROOMS = runpy.run_path(str(ROOT / ".ci" / "rooms.py"))


def test_every_module_can_be_imported() -> None:
    """In whatever order, since none leads back to itself."""
    optional = "vllm"  # the workers' room for it needs the extra
    modules = [name for name in ROOMS["imports"]() if f".{optional}." not in name]
    assert len(modules) > 200
    code = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    found = subprocess.run(
        [sys.executable, "-c", code, *sorted(set(modules) - {"agentmerge.__main__"})],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr


def test_no_module_leads_back_to_itself() -> None:
    """Not even by imports inside functions, or for types alone."""
    graph = ROOMS["imports"]()
    del graph["agentmerge"]  # loads on demand what it offers
    graph = {name: others - {"agentmerge"} for name, others in graph.items()}
    assert [name for name in graph if name in ROOMS["beyond"](graph, [name])] == []


def test_few_modules_stand_beside_the_rooms() -> None:
    beside = {path.stem for path in PACKAGE.glob("*.py")}
    assert beside == {"__init__", "__main__", "config", "errors", "plugins"}
    assert all((path / "__init__.py").exists() for path in PACKAGE.iterdir() if path.is_dir()
               and path.name not in ("__pycache__", "_bundled"))  # fmt: skip


def test_no_two_classes_have_a_name() -> None:
    names = Counter(
        node.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in names.items() if count > 1] == []


#: Words of these tables that are words of others too: a placement, what a proposal wants, an axis.
ALSO = {"auto", "gradient", "scale"}
TABLES = {"methods/__init__.py", "methods/kinds.py", "plugins.py", "contracts/operators.py"}


def compared(node: ast.Compare) -> set[object]:
    """The literals that something is held against: ``x == "a"``, ``x in ("a", "b")``."""
    sides = [node.left, *node.comparators] if isinstance(node.ops[0], (ast.Eq, ast.NotEq)) else []
    for side in node.comparators:
        if isinstance(side, (ast.Tuple, ast.List, ast.Set)):
            sides += side.elts
    return {side.value for side in sides if isinstance(side, ast.Constant)}


def test_nobody_asks_for_a_kind_by_its_name() -> None:
    """Workers, strategies, trackers, merge methods and operators answer questions instead."""
    names = {name for group in plugins._BUILT_IN.values() for name in group} | set(METHODS)
    names |= {v for k, v in vars(operators).items() if k.isupper() and isinstance(v, str)}
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}"
        for path in PACKAGE.rglob("*.py")
        if str(path.relative_to(PACKAGE)) not in TABLES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Compare) and compared(node) & (names - ALSO)
    ]
    assert found == []


def test_the_picture_of_the_rooms_is_of_today() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert ROOMS["BEGIN"] + ROOMS["picture"]() + ROOMS["END"] in page


@pytest.mark.parametrize("name", ["agentmerge.report", "agentmerge.ledger"])
def test_who_reads_results_loads_no_graph(name: str) -> None:
    """Nor does any module of these rooms."""
    room = name.rpartition(".")[2]
    modules = [m for m in ROOMS["imports"]() if ROOMS["room"](m) == room]
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "sys.exit(' '.join(m for m in sys.modules if m.split('.')[0] in "
        "('langgraph', 'torch', 'transformers', 'lm_eval', 'mergekit')) or 0)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, *modules], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
