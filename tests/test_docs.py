"""The documentation is true: its site builds, and every command in it runs.

A command in README.md or docs/ is a line of its own that begins with ``agentmerge``. It is run in a
folder that has what the pages speak of: a config, two searches, a recipe. What needs more than a
test machine has (a model's service, a served tool, trained models) is named in ``PARSED`` with
where it is run instead; its command line is parsed, so that an option that is gone is found. So are
commands inside sentences, programs of ours besides ``agentmerge``, and the pages' Python.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import typer
import yaml

import agentmerge
import agentmerge.contracts
from agentmerge.cli.app import app, run_app
from agentmerge.config import SearchConfig
from agentmerge.contracts.events import Event
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
    "agentmerge stop": "needs a search that runs: tests/session/test_resume.py",
    "--ui": "opens a port: tests/ui/test_served.py",
    "agentmerge ui": "serves until it is stopped: tests/ui/test_served.py",
    "mcp": "serves until it is stopped: tests/agents",
    "init": "names models of the reader's: tests/cli/test_start.py",
    "survey": "names models of the reader's: tests/merging/test_experts.py",
    "export first": "the fake worker has no model: tests/e2e/test_tiny_family.py",
    "export run-1": "needs trained models: tests/e2e/test_tiny_family.py",
    "export varco-storm": "needs trained models: tests/e2e/test_tiny_family.py",
    "examples/evolve-config.yml": "names models of 7 billion parameters",
    "examples/korean.yml": "names models of 8 billion parameters",
    "varco-storm": "a search over models of 7 billion parameters",
    "--png": "needs a browser: tests/report/test_page.py",
    "--tracker": "tests/report/test_trackers.py",
    "tasks search": "reads 14,000 files: tests/cli/test_start.py",
    "demo": "trains models: tests/demo and the tutorial's own test",
}


def code(page: Path) -> str:
    """The lines of a page's indented and fenced blocks."""
    text = page.read_text()
    fenced = re.findall(r"^```(?:sh|bash)\n(.*?)^```", text, re.M | re.S)
    return "\n".join([*re.findall(r"^( {4}.*)$", text, re.M), *fenced])


def spans(page: Path) -> list[str]:
    """Commands inside sentences, without those that stand for any command."""
    found = re.findall(r"`(agentmerge [a-z][^`]*)`", page.read_text())
    return [" ".join(line.split()) for line in dict.fromkeys(found) if "..." not in line]


def commands(page: Path) -> list[str]:
    found = re.findall(r"^(?: {4})?(agentmerge [a-z][^\n]*)$", code(page), re.M)
    typed = [re.split(r"\s{2,}#|\s#\s", line)[0].strip() for line in found]
    return [re.sub(r"\s+\d?> \S+", "", line) for line in typed]  # into which file is no matter


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


@pytest.mark.parametrize(("page", "line"), [(page, line) for page in PAGES for line in spans(page)])
def test_a_command_inside_a_sentence_exists(page: Path, line: str) -> None:
    fault = ""
    try:
        parse(shlex.split(line)[1:])
    except Exception as error:
        fault = str(getattr(error, "message", error))
    assert not fault or "Missing" in fault, "a sentence may leave out what a command needs"


def test_other_programs_exist_as_they_are_written() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    targets = set(re.findall(r"(?:^ {4}|`)make ([a-z][a-z-]+)", text, re.M))
    assert targets - set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)) == set()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(re.findall(r"agentmerge\[([a-z-]+)\]", text))
    assert extras - set(project["optional-dependencies"]) == set()
    modules = set(re.findall(r"python -m ((?:benchmarks|agentmerge)\.[a-z0-9_.]+[a-z0-9])", text))
    assert len(modules) > 5
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []


def benchmark_options() -> dict[str, set[str]]:
    """Benchmark -> options that the pages give it."""
    found: dict[str, set[str]] = {}
    text = re.sub(r"\\\n\s*", " ", "\n".join(page.read_text() for page in PAGES))
    for name, rest in re.findall(r"python -m (benchmarks\.[a-z0-9_]+)([^`\n]*)", text):
        found.setdefault(name, set()).update(re.findall(r"(?<=\s)--[a-z-]+", rest))
    return found


@pytest.mark.parametrize("name", sorted(benchmark_options()))
def test_a_benchmark_takes_the_options_that_the_pages_give_it(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):  # a package is run by its __main__
        module = importlib.import_module(f"{name}.__main__")
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit):
        module.main()
    shown = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert benchmark_options()[name] - shown == set()


@pytest.mark.parametrize(
    ("page", "begins"),
    [("README.md", "import agentmerge"), ("docs/ledger.md", "import pandas")],
)
def test_python_in_the_pages_runs(
    page: str, begins: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(place, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    assert run_app(["ledger", "export", "--to", "parquet"]) == 0
    blocks = re.findall(r"((?:^(?: {4}.*)?\n)+)", (ROOT / page).read_text(), re.M)
    (block,) = [text for block in blocks if (text := dedent(block).strip()).startswith(begins)]
    exec(compile(block.replace('name="first"', 'name="third"'), page, "exec"), {})


def yardstick(begins: str) -> dict[str, Any]:
    """What an example of that page leaves."""
    text = (ROOT / "docs" / "yardsticks.md").read_text()
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", text, re.S) if b.startswith(begins)]
    there: dict[str, Any] = {}
    exec(compile(block, "yardsticks.md", "exec"), there)
    return there


def test_the_optuna_example_runs() -> None:
    assert yardstick("import optuna")["study"].best_value < 1.5


def test_the_example_of_another_search_runs(capsys: pytest.CaptureFixture[str]) -> None:
    mine, ours = zip(*yardstick("import numpy")["scores"], strict=True)
    assert sum(ours) > sum(mine) > 0
    assert "sealed, yours and ours: [" in capsys.readouterr().out


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
    for name in [*agentmerge.__all__, *agentmerge.contracts.__all__]:
        assert name.startswith("_") or f"### {name}\n" in pages["python.md"]
    assert "def from_file(path: Path | str" in pages["python.md"]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_rows_of_a_table_have_its_columns(page: Path) -> None:
    """Else a line of one table went to another, and what stood between is gone."""
    columns = 0
    for line in page.read_text().splitlines():
        row = re.sub(r"`[^`]*`", "", line.strip()).replace(r"\|", "")
        cells = row.count("|") - 1 if row.startswith("|") and row.endswith("|") else 0
        assert not (columns and cells) or cells == columns, f"{page.name}: {line}"
        columns = cells


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    missing = [page.name for page in (ROOT / "docs").glob("*.md") if page.name not in text]
    assert missing == []


def test_where_things_go_is_where_they_are() -> None:
    page = (ROOT / "docs" / "contributing.md").read_text()
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", page, re.M)
    assert len(rows) > 30
    named = [name for _, answer in rows for name in re.findall(r"`([^`]+)`", answer)]
    places = [name for name in named if "/" in name]
    assert [place for place in places if not (ROOT / place).exists()] == []
    source = "".join((ROOT / place).read_text() for place in places if place.endswith(".py"))
    assert [name for name in set(named) - set(places) if name.split(".")[-1] not in source] == []


def test_what_github_reads_is_yaml() -> None:
    pages = [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml"]
    read = {page.name: yaml.safe_load(page.read_text()) for page in pages}
    assert {"bug.yml", "surprise.yml", "feature.yml", "ci.yml"} <= read.keys()
    assert ".ci/run" in [step.get("run") for step in read["ci.yml"]["jobs"]["run"]["steps"]]


def test_the_events_of_a_search_are_written_down() -> None:
    """Each kind, and each of its fields."""
    page = (ROOT / "docs" / "watching.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)", page, re.M))
    assert {kind: set(re.findall(r"`(\w+)`", row)) - {"watch"} for kind, row in rows.items()} == {
        kind.event: {field.name for field in fields(kind)} for kind in Event.__subclasses__()
    }


def test_the_configuration_page_names_every_section() -> None:
    text = (ROOT / "docs" / "config.md").read_text()
    for section in SearchConfig.model_fields:
        if section not in ("warnings", "notices"):
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
