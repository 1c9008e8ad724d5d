"""What a newcomer meets first: light imports, and documents that say what the program does."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
import yaml
from pydantic import BaseModel

import agentmerge
from agentmerge import config
from agentmerge.cli.app import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "examples/README.md", *sorted(ROOT.glob("docs/*.md"))]
SECTIONS = {
    "genome": (config.GenomeConfig, config.LayersConfig),
    "tasks": (config.TaskConfig, config.TasksConfig),
    "Judge": (config.JudgeSettings,),
    "A program": (config.ScorerCommand,),
    "search": (config.SearchSettings,),
    "agents": (config.AgentSettings,),
    "worker": (config.WorkerSettings,),
    "budget": (config.BudgetSettings,),
}
#: Written in the search section, and kept with the tasks because they decide what is asked.
ELSEWHERE = {
    "tasks": {"sealed_share", "companion", "seed", "chat_template", "gen_kwargs", "chat_date"}
}


def commands_in(path: Path) -> list[str]:
    """Every `agentmerge ...` in a document, in code blocks and in running text."""
    text = path.read_text().replace("\\\n", " ")
    blocks = re.findall(r"^ {4}(agentmerge [a-z-].*)$", text, re.MULTILINE)
    blocks = [re.sub(r"\s+\d?> \S+", "", line) for line in blocks]  # into which file is no matter
    return blocks + re.findall(r"`(agentmerge [a-z-][^`\n]*)`", text)


COMMANDS = sorted({line for path in DOCUMENTS for line in commands_in(path)})


def test_importing_agentmerge_loads_nothing_heavy() -> None:
    heavy = ("torch", "vllm", "mergekit", "langgraph", "langchain", "transformers", "wandb")
    code = (
        "import sys, agentmerge; "
        f"print([name for name in {heavy!r} if name in sys.modules], agentmerge.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] "), done.stdout


PUBLIC = ("agentmerge", "agentmerge.contracts", "agentmerge.testing")


@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_public_is_listed(name: str) -> None:
    module = importlib.import_module(name)
    assert list(module.__all__) == sorted(set(module.__all__))
    for public in module.__all__:
        assert getattr(module, public) is not None
    imported = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(Path(module.__file__).read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("agentmerge")
        for alias in node.names
    }
    assert imported == set(module.__all__) - {"__version__"}, "imported for others, and not listed"


def test_the_contracts_load_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "lm_eval", "langgraph", "langchain", "langchain_core")
    code = (
        "import sys, agentmerge.contracts; "
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_version_is_written_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["hatch"]["version"]["path"] == "agentmerge/__init__.py"
    assert f"## {agentmerge.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert (ROOT / "agentmerge" / "py.typed").is_file()


def test_help_works_in_a_process_of_its_own() -> None:
    line = [sys.executable, "-m", "agentmerge", "--help"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    for name in ("run", "resume", "branch", "export", "demo"):
        assert name in done.stdout


def test_documents_name_commands() -> None:
    named = {shlex.split(line, comments=True)[1] for line in COMMANDS}
    assert named >= {"run", "check", "resume", "branch"}


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_in_a_document_parses(line: str) -> None:
    name, *arguments = shlex.split(line, comments=True)[1:]
    group = typer.main.get_command(app)
    if name.startswith("-"):
        assert any(name in parameter.opts for parameter in group.params)
        return
    command = group.commands[name]
    while hasattr(command, "commands") and arguments:
        command = command.commands[arguments.pop(0)]
    # In running text a command may be named alone, or with its name and no more.
    if not arguments and (hasattr(command, "commands") or any(p.required for p in command.params)):
        return
    assert command.make_context(name, arguments).params  # raises where an option does not exist


def test_options_in_the_migration_table_exist() -> None:
    text = (ROOT / "docs/migrating.md").read_text()
    run = typer.main.get_command(app).commands["run"]
    known = {name for p in run.params for name in (*p.opts, *p.secondary_opts)}
    for row in re.findall(r"^\| (`-.*)$", text, re.MULTILINE):
        for option in re.findall(r"`(--?[a-z0-9-]+)", row):
            assert option in known, f"{option} in: {row}"


def test_every_old_option_is_in_the_migration_table() -> None:
    from agentmerge.cli.legacy import Legacy

    text = (ROOT / "docs/migrating.md").read_text()
    for name in Legacy.__dataclass_fields__:
        if name != "i_understand":
            assert f"`--{name.replace('_', '-')}" in text, name


def test_make_targets_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:^ {4}|`)make ([a-z-]+)", (ROOT / "README.md").read_text(), re.M))
    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_is_documented_with_its_default(section: str) -> None:
    text = "".join((ROOT / "docs" / name).read_text() for name in ("config.md", "objectives.md"))
    end = rf"^## |^### (?:{'|'.join(SECTIONS)})$|\Z"
    body = re.search(rf"^##+ {section}$(.*?)(?={end})", text, re.MULTILINE | re.DOTALL)
    assert body is not None
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|.*\|$", body[1], re.MULTILINE))
    fields = {k: v for model in SECTIONS[section] for k, v in model.model_fields.items()}
    for key in ELSEWHERE.get(section, ()):
        del fields[key]
    assert rows.keys() == fields.keys()
    for key, field in fields.items():
        if field.is_required():
            assert rows[key] == "required", key
            continue
        said = yaml.safe_load(rows[key].strip("`"))
        default = field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):  # a section of its own: what is not set is not written
            default = default.model_dump(exclude_defaults=True)
        assert said == (list(default) if isinstance(default, tuple) else default), key


def test_the_example_config_is_read_without_a_warning() -> None:
    found = config.SearchConfig.from_file(ROOT / "examples/evolve-config.yml")
    assert found.warnings == ()
    assert found.genome.merge_method == "dare_ties"


def test_documents_name_no_path_of_the_machine_they_were_written_on() -> None:
    for path in [*DOCUMENTS, ROOT / "Makefile", ROOT / "constraints.txt", ROOT / "CHANGELOG.md"]:
        assert not re.search(r"(?<![\w.])/(root|home|work|tmp|opt)/", path.read_text()), path
