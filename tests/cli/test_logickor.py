"""``agentmerge tasks logickor`` and the example that it is for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agentmerge.cli.app import run_app
from agentmerge.config import SearchConfig
from agentmerge.evaluation.conversations import read_conversations
from agentmerge.preflight.prepare import prepare
from agentmerge.recipe import Recipe

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_task_that_is_written_is_one(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run_app(["tasks", "logickor", str(tmp_path / "tasks"), "--json"]) == 0
    files = [Path(file) for file in json.loads(capsys.readouterr().out)["files"]]
    assert all(file.is_file() for file in files)
    found = read_conversations("logickor", tmp_path / "tasks" / "logickor")
    assert len({one.category for one in found}) == 6
    assert {len(one.turns) for one in found} == {2}
    assert run_app(["tasks", "logickor", str(tmp_path / "tasks")]) == 2
    assert "perhaps yours" in capsys.readouterr().err


def test_the_korean_example_is_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as it can be looked at without the models: genome, judge, prompt, and its price."""
    monkeypatch.chdir(tmp_path)
    assert run_app(["tasks", "logickor", "tasks"]) == 0
    options = {"num_layers": 32, "base": "meta-llama/Llama-3.1-8B"}
    overrides = {"worker.kind": "fake", "worker.options": options}
    config = SearchConfig.from_file(EXAMPLES / "korean.yml", overrides)
    assert not config.warnings
    prepared = prepare(config)
    assert prepared.space.dimensions == 32
    (judged,) = prepared.taskset.judged.values()
    assert judged.prompt_path.name == "judge.md"
    assert judged.prompt_path.parent.name == "logickor"
    recipe = Recipe.parse(EXAMPLES / "published-recipe.yml")
    assert set(recipe.models) <= set(config.genome.parents)
    prepared.space.vector(recipe.canonical(32))
    from agentmerge.preflight.plan import plan_of

    (note,) = [n for n in plan_of(prepared, None, "").notes if "judges" in n]
    assert "judges 13 answers an evaluation" in note
    assert "dollars" in note
