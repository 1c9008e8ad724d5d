"""The documentation is true: its site builds, and every command in it runs.

A command in README.md or docs/ is an indented line that begins with ``agentmerge``. It is run in a
folder that has what the pages speak of: a config, two searches, a recipe. What needs more than a
test machine has (a model's service, a served tool, trained models) is named in ``PARSED`` with
where it is run instead; its command line is parsed, so that an option that is gone is found.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from agentmerge.cli.app import app, run_app
from agentmerge.config import SearchConfig
from agentmerge.methods import METHODS
from tests.report.conftest import CONFIG, search_family

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "examples" / "README.md", *(ROOT / "docs").glob("*.md")])

#: What a command holds -> why it is parsed and not run here.
PARSED = {
    "--llm": "needs a model's service: tests/session/test_agents.py has one",
    "--llm-model": "needs a model's service: tests/cli/test_legacy.py",
    "--search llm_evo": "needs a model's service: tests/session/test_agents.py has one",
    "--answer": "to a search that a model advises: tests/session/test_structure.py",
    "replay": "tests/session has searches to replay",
    "prompts try": "tests/agents has prompts to try",
    "mcp": "serves until it is stopped: tests/agents",
    "init": "names models of the reader's: tests/cli/test_start.py",
    "export first": "the fake worker has no model: tests/e2e/test_tiny_family.py",
    "export run-1": "needs trained models: tests/e2e/test_tiny_family.py",
    "export varco-storm": "needs trained models: tests/e2e/test_tiny_family.py",
    "examples/evolve-config.yml": "names models of 7 billion parameters",
    "varco-storm": "a search over models of 7 billion parameters",
    "--png": "needs a browser: tests/report/test_page.py",
    "--tracker": "tests/report/test_trackers.py",
    "tasks search": "reads 14,000 files: tests/cli/test_start.py",
    "demo": "trains models: tests/demo and the tutorial's own test",
}


def commands(page: Path) -> list[str]:
    found = re.findall(r"^ {4}(agentmerge [^\n]*)$", page.read_text(), re.M)
    return [re.split(r"\s{2,}#|\s#\s", line)[0].strip() for line in found]


ALL = [(page, line) for page in PAGES for line in dict.fromkeys(commands(page))]


def parsed_only(line: str) -> bool:
    return any(re.search(rf"(?<!\S){re.escape(part)}(?!\S)", line) for part in PARSED)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages speak of: config.yml, searches first and other, run-1 in runs/demo."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "config.yml").write_text(CONFIG)
    search_family(folder / "runs")
    where = ["--runs-dir", str(folder / "runs"), "-q"]
    branch = ["branch", "first", "--at", "1", "--as", "other", "--max-evaluations", "25"]
    assert run_app([*branch, *where]) == 0
    demo = ["--runs-dir", str(folder / "runs" / "demo"), "-q"]
    assert run_app(["run", str(folder / "config.yml"), "--name", "run-1", *demo]) == 0
    assert run_app(["branch", "run-1", "--at", "2", "--as", "random", *demo]) == 0
    shutil.copy(folder / "runs" / "first" / "best.yml", folder / "recipe.yml")
    return folder


@pytest.mark.parametrize(("page", "line"), ALL, ids=[f"{p.name}: {line}" for p, line in ALL])
def test_every_command_in_the_pages_runs(
    page: Path, line: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = shlex.split(line)[1:]
    if parsed_only(line):
        parse(arguments)
        return
    shutil.copytree(place, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("BROWSER", "true")  # what --open starts
    if "--name" in arguments or "--as" in arguments or "--storage-path" in arguments:
        arguments = anew(arguments)
    assert run_app(["first" if word == "NAME" else word for word in arguments]) == 0, line


def anew(arguments: list[str]) -> list[str]:
    """The same command where the search that it begins has not been run yet."""
    for option in ("--name", "--as"):
        if option in arguments:
            at = arguments.index(option) + 1
            arguments = [*arguments[:at], f"{arguments[at]}-again", *arguments[at + 1 :]]
    if "--storage-path" in arguments:
        arguments = [*arguments, "--no-save-final-model"]  # the fake worker has no model
    return arguments


def parse(arguments: list[str]) -> None:
    """As the program reads it, without doing it.

    Raises:
        an error of the command line for an unknown command or option.
    """
    command: Any = typer.main.get_command(app)
    context = command.make_context("agentmerge", list(arguments))
    while hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)


def test_pages_have_commands_and_reasons_are_needed() -> None:
    assert len(ALL) > 30
    for part in PARSED:
        assert any(parsed_only(line) and part in line for _, line in ALL), f"{part}: not in a page"


def reference() -> Any:
    spec = importlib.util.spec_from_file_location("reference", ROOT / ".ci" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_has_everything() -> None:
    made = reference()
    pages = {name: page() for name, page in made.PAGES.items()}
    for method in METHODS:
        assert f"## {method}\n" in pages["methods.md"]
    for key in ("genome.models", "search.algorithm", "budget.max_evaluations", "worker.kind"):
        assert f"`{key}`" in pages["config-keys.md"]
    for name in ("run", "ledger prune", "tasks search", "compare"):
        assert f"## agentmerge {name}\n" in pages["commands.md"]
    assert "  --runs-dir" in pages["commands.md"]


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    missing = [page.name for page in (ROOT / "docs").glob("*.md") if page.name not in text]
    assert missing == []


def test_the_configuration_page_names_every_section() -> None:
    text = (ROOT / "docs" / "config.md").read_text()
    for section in SearchConfig.model_fields:
        if section not in ("warnings",):
            assert section in text


@pytest.mark.filterwarnings("ignore")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    built = (tmp_path / "site" / "reference" / "commands" / "index.html").read_text()
    assert "agentmerge ledger prune" in built
