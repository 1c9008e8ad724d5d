"""The example plugin, installed as a package, and each part of it used by name."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from agentmerge.demo.tasks import demo_config, write_tasks

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder that the plugin was installed into."""
    target = tmp_path_factory.mktemp("plugin")
    line = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*line, "--target", str(target), str(ROOT / "examples/plugin")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return target


def test_everything_that_it_adds_is_used(installed: Path, family, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks", family.skills)
    body = demo_config(family, tasks)
    body["genome"] |= {"merge_method": "capped"}
    body["genome"].pop("normalize", None)  # which is nothing to it
    body |= {
        "task_search_path": [str(tasks)],
        "limit": 10,
        "worker": {
            "kind": "timed_hf",
            "host": "polite",
            "batch_size": 60,
            "options": {"threads": 1},
        },
        "search": {"algorithm": "halfway", "population": 2, "sealed_share": 0.0},
        "budget": {"max_evaluations": 14},
    }
    body["genome"]["space"] = "seesaw"
    body["tasks"][0] = {"name": body["tasks"][0]["name"], "weight": 0.4, "scorer": "letters"}
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump(body))
    line = [sys.executable, "-m", "agentmerge", "run", str(config), "--name", "plugged", "-q"]
    line += ["--llm", "rulebook:calm", "--tracker", "csv", "--wandb-project", str(tmp_path)]
    done = subprocess.run(
        [*line, "--runs-dir", str(tmp_path / "runs"), "--json"],
        env=os.environ | {"PYTHONPATH": f"{installed}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["search"] == "halfway"
    assert found["agents"]["calls"] > 0
    assert found["agents"]["failures"] == 0
    rows = csv.DictReader((tmp_path / "plugged.csv").read_text().splitlines())
    assert {"parent", "halfway"} <= {row["operator"] for row in rows}
    log = (tmp_path / "runs/plugged/log.jsonl").read_text()
    assert "calm: stay" in log
    candidates = [event for line in log.splitlines() if "tasks" in (event := json.loads(line))]
    judged = {
        round(event["tasks"].get(body["tasks"][0]["name"], 0) * 10, 9) for event in candidates
    }
    assert any(value % 1 for value in judged)  # of ten items, more than right and wrong
    assert "merge_method: capped" in (tmp_path / "runs/plugged/config.yml").read_text()


def test_it_passes_the_suites_of_the_contracts(installed: Path, family, tmp_path: Path) -> None:
    tests = ROOT / "examples/plugin/tests"
    line = [sys.executable, "-m", "pytest", "-q", "-rA", "-W", "error", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*line, "-p", "no:asyncio", f"--rootdir={tests}", str(tests)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{installed}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    for name in (
        "TestTimedWorker::test_a_parent_with_nan",
        "TestHalfway::test_it_gains",
        "TestCapped::test_every_parameter_changes",
        "TestPolite::test_two_work_beside_each_other",
        "TestSeesaw::test_a_point_is_a_recipe_and_comes_back",
    ):
        assert f"::{name}" in done.stdout


def test_it_knows_two_doors_and_no_room_behind_them() -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "examples/plugin").rglob("*.py"))
    doors = re.findall(r"^\s*(?:from|import) (agentmerge[\w.]*)", source, re.M)
    assert set(doors) == {"agentmerge.contracts", "agentmerge.testing"}


def test_what_is_not_installed_is_unknown(tmp_path: Path, fake_config: str) -> None:
    config = tmp_path / "config.yml"
    config.write_text(fake_config)
    line = [sys.executable, "-m", "agentmerge", "check", str(config), "--search", "halfway"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2
    assert "'halfway' is not one of the strategies" in done.stderr
