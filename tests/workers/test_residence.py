"""A pool's search on a live model: as with all parents in memory, with few of them there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from agentmerge.cli.app import run_app
from agentmerge.config import GenomeConfig, SearchConfig
from agentmerge.merging.placement import layout_bytes
from agentmerge.recipe import Recipe
from agentmerge.session.driving import resume, run
from agentmerge.workers.hf import HfWorker
from tests.session.conftest import trace_of

NAMES = ("b", "c", "d", "e")


@pytest.fixture(scope="module")
def pool(parents: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pool")
    more = {
        name: tiny.write_model(root / name, seed=seed, near=parents["base"])
        for name, seed in (("d", 6), ("e", 7))
    }
    return parents | more


def merge(one: str, other: str, weight: float) -> Recipe:
    own = {"weight": weight, "density": 0.5}
    models = [{"model": name, "parameters": own} for name in (one, other)]
    body = {"merge_method": "ties", "base_model": "base", "models": models}
    return Recipe.parse(body).canonical(2)


def stack(*names: str) -> Recipe:
    slices = [{"sources": [{"model": name, "layer_range": [0, 2]}]} for name in names]
    return Recipe.parse({"merge_method": "passthrough", "slices": slices}).canonical(2)


def test_a_worker_answers_alike_with_few_parents_in_memory(
    pool: dict[str, Path], tasks_dir: Path
) -> None:
    asked = tiny.tasks_config(tasks_dir, "tiny_choice", "tiny_text", limit=6)
    whole = HfWorker(tiny.spec(pool, asked, options={"base": "base"}))
    few = HfWorker(tiny.spec(pool, asked, options={"base": "base"}, resident=3))
    items = HfWorker.tasks(tiny.spec(pool, asked)).refs()
    model = layout_bytes(few._family.layout)
    walk = [
        merge("b", "c", 0.4),
        Recipe.of_model("e", 2),
        merge("d", "c", 0.4),
        stack("b", "e"),
        merge("b", "c", 0.8),
        stack("d", "c", "d"),
        merge("e", "d", 0.3),
        merge("b", "c", 0.4),
    ]
    for recipe in walk:
        assert few.load(recipe) == whole.load(recipe)
        assert few.score(items) == whole.score(items)
        assert few._family.size_bytes <= 3 * model < whole._family.size_bytes
    assert few.gradient(walk[2], items, "margin") == whole.gradient(walk[2], items, "margin")
    few.close()
    whole.close()


def config(pool: dict[str, Path], tasks_dir: Path, evaluations: int) -> dict[str, Any]:
    return {
        "genome": {
            "models": [str(pool[name]) for name in NAMES],
            "base_model": str(pool["base"]),
            "merge_method": "task_arithmetic",
            "pool": 2,
        },
        "tasks": [{"name": name, "metric": tiny.METRICS[name]} for name in ("tiny_choice",)],
        "task_search_path": [str(tasks_dir)],
        "apply_chat_template": False,
        "limit": 8,
        "search": {"seed": 3, "algorithm": "random", "population": 3},
        "budget": {"max_evaluations": evaluations},
    }


def searched(body: dict[str, Any]) -> SearchConfig:
    return SearchConfig.from_text(yaml.safe_dump(body))


def test_a_search_of_a_pool_finds_what_it_found_with_all_in_memory(
    pool: dict[str, Path], tasks_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(searched(config(pool, tasks_dir, 8)), name="a", runs_dir=tmp_path / "few")
    resume("a", runs_dir=tmp_path / "few", overrides={"budget.max_evaluations": 12})
    monkeypatch.setattr(GenomeConfig, "at_a_time", None)
    run(searched(config(pool, tasks_dir, 12)), name="a", runs_dir=tmp_path / "all")
    few, whole = (trace_of(tmp_path / runs, "a")["candidates"] for runs in ("few", "all"))
    assert few == whole
    assert len(few) == 12


def test_check_forecasts_what_is_merged_at_a_time(
    pool: dict[str, Path], tasks_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for most, genome in ((3, {"pool": 2}), (5, {"pool": None})):
        body = config(pool, tasks_dir, 12)
        body["genome"] |= genome
        (tmp_path / "config.yml").write_text(yaml.safe_dump(body))
        command = ["check", str(tmp_path / "config.yml"), "--runs-dir", str(tmp_path)]
        assert run_app(command) == 0
        assert ("3 of 5 parents" in capsys.readouterr().out) == (most == 3)
        assert run_app([*command, "--json"]) == 0
        memory = json.loads(capsys.readouterr().out)["plan"]["memory"]
        assert (memory["at_a_time"], memory["parents"]) == (most, 5)
        found[most] = memory["forecasts"][0]["host"]["parents"]
    assert found[5] * 3 == found[3] * 5 > 0
