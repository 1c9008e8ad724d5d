"""From models to a config that passes check; finding tasks; shell completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from agentmerge.cli.app import run_app
from agentmerge.config import SearchConfig
from agentmerge.demo.family import TinyFamily
from agentmerge.demo.tasks import skill_task, write_tasks
from agentmerge.ledger import Ledger, RunRow
from agentmerge.ledger.folder import LEDGER


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_init_writes_a_config_that_passes_check(
    here: Path, family: TinyFamily, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [str(expert) for expert in family.experts]
    assert run_app(["init", *models, "--base", str(family.base)]) == 0
    assert "8 axes" in capsys.readouterr().out
    text = (here / "config.yml").read_text()
    config = SearchConfig.from_text(text)
    assert config.genome.merge_method == "task_arithmetic"
    assert config.genome.layer_granularity == 1
    assert config.warnings == ()
    assert "4 layers can be grouped by [1, 2, 4]" in text, "it says why"
    assert run_app(["check", "config.yml", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert (plan["items"], plan["dimensions"]) == (200, 8)
    assert plan["sealed_items"] > 0


def test_init_takes_the_tasks_metrics_from_their_files(
    here: Path, family: TinyFamily, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = write_tasks(here / "tasks", family.skills, n_items=60)
    arguments = ["init", *map(str, family.experts), "--to", "sub/mine.yml"]
    arguments += ["--task", skill_task("shift"), "--task-search-path", str(tasks)]
    assert run_app(arguments) == 0
    body = yaml.safe_load((here / "sub" / "mine.yml").read_text())
    assert body["tasks"] == [
        {"name": skill_task("shift"), "metric": "exact_match,none", "weight": 1.0}
    ]
    assert body["genome"]["merge_method"] == "linear"
    assert "base_model" not in body["genome"]
    assert run_app(["check", "sub/mine.yml"]) == 0


def test_one_model_and_its_base_are_enough(here: Path, family: TinyFamily) -> None:
    assert run_app(["init", str(family.experts[0]), "--base", str(family.base)]) == 0
    body = yaml.safe_load((here / "config.yml").read_text())
    assert body["genome"]["merge_method"] == "linear"
    assert body["genome"]["models"] == [str(family.experts[0]), str(family.base)]
    assert run_app(["check", "config.yml"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["init", "{one}"], "needs two models"),
        (["init", "{one}", "nowhere"], "nowhere"),
        (["init", "{one}", "{two}", "--task", "no_such_task_here"], "no_such_task_here"),
        (["init", "{one}", "{two}", "--to", "there.yml"], "exists"),
    ],
)
def test_a_mistake_writes_nothing(
    here: Path,
    family: TinyFamily,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (here / "there.yml").write_text("mine")
    one, two = map(str, family.experts)
    filled = [argument.format(one=one, two=two) for argument in arguments]
    assert run_app(filled) == 2
    assert message in capsys.readouterr().err
    assert not (here / "config.yml").exists()
    assert [path.name for path in here.iterdir()] == ["there.yml"]
    assert (here / "there.yml").read_text() == "mine"


def test_tasks_search_names_tasks_and_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["tasks", "search", "gsm8k", "--json"]) == 0
    found = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert found["gsm8k"]["metrics"] == [
        ["exact_match,strict-match", True],
        ["exact_match,flexible-extract", True],
    ]
    assert found["gsm8k"]["dataset"] == "openai/gsm8k main"
    assert run_app(["tasks", "search", "wikitext"]) == 0
    line = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("wikitext ")
    )
    assert "-word_perplexity,none" in line, "lower is better"
    assert run_app(["tasks", "search", "mbpp"]) == 0
    names = [
        line.split()[0] for line in capsys.readouterr().out.splitlines() if "pass_at_1" in line
    ]
    assert "mbpp" in names, "a metric that is the task's own function has the function's name"
    assert run_app(["tasks", "search", "bbq"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) < 200
    assert run_app(["tasks", "search", "no such word anywhere"]) == 2
    assert "no task has" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("agentmerge comp", "compare"),
        ("agentmerge ledger pr", "prune"),
        ("agentmerge tas", "tasks"),
        ("agentmerge show fi", "first"),
        ("agentmerge compare first s", "second"),
        ("agentmerge run --worker f", "fake"),
        ("agentmerge branch first --search mar", "margins"),
    ],
)
def test_the_shell_completes_commands_and_names(here: Path, typed: str, expected: str) -> None:
    with Ledger(here / "runs" / LEDGER) as ledger:
        for name in ("first", "second"):
            ledger.add_run(
                RunRow(name, name, 1.0, "new", "", "", "s", 0, "x", None, None, {}, None)
            )
    words = typed.split()
    environment = {
        "_AGENTMERGE_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(words) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-m", "agentmerge"],
        cwd=here,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert expected in done.stdout.split()
