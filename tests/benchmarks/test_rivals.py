"""What the rivals are given, and what is read of them, with real files and no rival."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from agentmerge.config import SearchConfig
from agentmerge.demo.family import TinyFamily
from agentmerge.demo.tasks import SEARCH_LIMIT
from agentmerge.recipe import Recipe
from benchmarks.rivals import __main__ as rivals
from benchmarks.rivals import orders, reading
from benchmarks.rivals.orders import ARMS, SEARCHED, UNSEEN, Setting

PYTHON = Path("rival/bin/python")


@pytest.fixture(scope="module")
def settings(
    family: TinyFamily, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Setting, Setting]:
    folder = tmp_path_factory.mktemp("rivals")
    found = tuple(Setting(folder / f"seed-{seed}", seed) for seed in (0, 1))
    for setting in found:
        orders.prepare(family, setting)
    return found[0], found[1]


def prompts(folder: Path) -> dict[str, list[str]]:
    """Task file -> what its items ask, found as lm-eval finds them: by the path in the task."""
    found = {}
    for path in sorted(folder.glob("*.yaml")):
        items = Path(yaml.safe_load(path.read_text())["dataset_kwargs"]["data_files"]["test"])
        assert items.parent == folder
        found[path.stem] = [json.loads(line)["prompt"] for line in items.read_text().splitlines()]
    return found


def test_what_is_scored_at_the_end_no_search_may_see(settings: tuple[Setting, Setting]) -> None:
    for setting in settings:
        searched, unseen = prompts(setting.tasks), prompts(setting.unseen)
        assert len(searched) == len(unseen) == 3
        for task, asked in searched.items():
            assert (len(asked), len(unseen[task])) == (SEARCHED, UNSEEN)
            assert not set(asked) & set(unseen[task])
    first, second = (prompts(setting.tasks) for setting in settings)
    assert first != second  # a seed asks other items


def test_one_config_is_everybodys(settings: tuple[Setting, Setting]) -> None:
    setting = settings[0]
    ours = SearchConfig.from_file(setting.config)
    order = orders.order(ARMS["mergenetic"], setting, Path("out"), budget=60)
    assert ours.tasks.limit == order["limit"] == SEARCH_LIMIT
    assert [task.name for task in ours.tasks.tasks] == [task["name"] for task in order["tasks"]]
    assert [Path(m).name for m in ours.genome.models] == [Path(m).name for m in order["experts"]]


@pytest.mark.parametrize(("arm", "evaluations"), [("mergenetic", 64), ("mergenetic-small", 60)])
def test_a_budget_is_whole_generations(
    settings: tuple[Setting, Setting], arm: str, evaluations: int
) -> None:
    order = orders.order(ARMS[arm], settings[0], Path("out"), budget=60)
    assert order["population"] * order["generations"] == evaluations


def test_the_command_line_after_the_names_is_the_same(settings: tuple[Setting, Setting]) -> None:
    given = [
        orders.command(ARMS[arm], settings[0], Path("out"), 60, PYTHON)
        for arm in ("agentmerge", "mergekit-evolve")
    ]
    ours, theirs = given[0][given[0].index("run") + 1 :], given[1][2:]
    assert ours[: len(theirs)] == theirs
    assert ours[len(theirs) :] == ["--runs-dir", "out/runs", "--name", "search"]


def test_mergenetic_reads_its_order_from_a_file(
    settings: tuple[Setting, Setting], tmp_path: Path
) -> None:
    python, driver, path = orders.command(ARMS["mergenetic"], settings[0], tmp_path, 60, PYTHON)
    assert (python, Path(driver).is_file()) == (str(PYTHON), True)
    order = json.loads(Path(path).read_text())
    for model in (order["base"], *order["experts"]):
        kind = json.loads((Path(model) / "tokenizer_config.json").read_text())["tokenizer_class"]
        assert kind == "PreTrainedTokenizerFast"
        assert (Path(model) / "model.safetensors").is_file()


MERGEKIT_LOG = """Received 10 genotypes
\x1b[36m(OnDiskMergeEvaluator pid=7)\x1b[0m Received 3 genotypes, says a worker
New best score: 0.1450
Received 10 genotypes
Received 1 genotypes
!!! OPTIMIZATION COMPLETE !!!
Best cost: -0.7440
"""


def test_evaluations_are_read_from_the_logs() -> None:
    found = reading.found(ARMS["mergekit-evolve"], Path("out"), MERGEKIT_LOG)
    assert found == {"evaluations": 21, "search": 0.744}
    log = "scored 0.2490\nINFO scored 9.0\nscored 0.5000\nscored 0.4000\n"
    assert reading.found(ARMS["mergenetic"], Path("out"), log) == {
        "evaluations": 3,
        "search": 0.5,
    }


def test_a_failure_says_the_error() -> None:
    log = "Traceback\n  File x\nAssertionError: Torch not compiled with CUDA enabled\nbye\n"
    assert reading.ended_by(log) == "AssertionError: Torch not compiled with CUDA enabled"
    assert reading.ended_by("ray.exceptions.RayTaskError(TypeError): x\n").startswith("ray.exc")
    assert reading.ended_by("killed\n") == "killed"
    assert reading.ended_by("") == "no word"


def test_the_processor_s_time_of_a_child_s_child_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rivals, "EVERY_S", 0.05)
    busy = "import time\nwhile time.process_time() < 0.5: pass"
    line = [sys.executable, "-c", "import subprocess, sys; subprocess.run([sys.executable, '-c', "]
    line[-1] += f"{busy!r}])"
    code, wall_s, cpu_s = rivals.timed(line, tmp_path / "log", {}, tmp_path)
    assert code == 0
    assert wall_s >= 0.5
    assert cpu_s > 0.2


def test_the_dtype_is_the_folder_s_own(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    assert reading.stored_dtype(tmp_path) == "bfloat16"


def row(arm: str, seed: int, score: float, **more: Any) -> dict[str, Any]:
    return {
        "arm": arm,
        "seed": seed,
        "evaluations": 50,
        "wall_s": 100.0,
        "cpu_s": 50.0,
        "search": 0.9,
        "unseen": {"score": score},
    } | more


def test_the_table_pairs_by_seed_and_says_what_failed() -> None:
    rows = [row("agentmerge", seed, 0.9) for seed in range(3)]
    rows += [row("mergekit-evolve", seed, 0.7 + 0.1 * seed) for seed in range(2)]
    rows += [{"arm": "mergenetic", "seed": 0, "failed": "TypeError: no"}]
    lines = rivals.table(rows).splitlines()
    assert len(lines) == 2 + 3
    assert re.search(r"3 of 3 \| 50 \| 2.0 \| 1.0 \| 0.900 \| 0.900 \(0.900 to 0.900\)", lines[2])
    assert lines[3].endswith("| 0.750 (0.700 to 0.800) | +0.150 (+0.100 to +0.200) |")
    assert "0 of 1 | TypeError: no |" in lines[4]
    assert len({line.count("|") for line in lines}) == 1


def test_what_ran_before_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is left to run")

    monkeypatch.setattr(rivals, "timed", fails)
    kept = tmp_path / "mergenetic-3.json"
    kept.write_text("{}")
    rivals.made(tmp_path, "mergenetic", Setting(tmp_path / "seed-3", 3), 60)
    assert kept.read_text() == "{}"


def test_a_ray_that_is_late_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = [sys.executable, "-c", f"raise Exception({rivals.RAY_LATE!r})"]
    monkeypatch.setattr(orders, "command", lambda *_: line)
    monkeypatch.setattr(rivals, "versions", lambda _: {})
    rivals.made(tmp_path, "mergekit-evolve", Setting(tmp_path / "seed-3", 3), 60)
    assert not (tmp_path / "mergekit-evolve-3.json").exists()


def test_a_rival_that_fails_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = [sys.executable, "-c", "raise SystemError('no GPU here')"]
    monkeypatch.setattr(orders, "command", lambda *_: line)
    monkeypatch.setattr(rivals, "versions", lambda _: {})
    rivals.made(tmp_path, "mergekit-evolve", Setting(tmp_path / "seed-3", 3), 60)
    found = json.loads((tmp_path / "mergekit-evolve-3.json").read_text())
    assert found["failed"] == "SystemError: no GPU here"


def test_a_model_folder_is_scored_on_unseen_items(
    settings: tuple[Setting, Setting], family: TinyFamily, tmp_path: Path
) -> None:
    setting = settings[1]
    for items in setting.unseen.glob("*.jsonl"):
        items.write_text("".join(items.read_text().splitlines(keepends=True)[:30]))
    found = reading.unseen_score(family.experts[0], setting, tmp_path)
    assert found["items"] == 3 * 30
    by_task = found["tasks"]
    assert by_task["agentmerge_demo_shift"] > 0.9
    assert by_task["agentmerge_demo_sort"] < 0.1
    assert Recipe.parse(tmp_path / "recipe.yml").models == (str(family.experts[0]),)
