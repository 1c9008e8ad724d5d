"""Where the parents are kept, seen from a search: the same scores and keys, and what is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from agentmerge.cli.app import run_app
from agentmerge.config import SearchConfig
from agentmerge.demo.family import TinyFamily
from agentmerge.demo.tasks import demo_config, write_tasks
from agentmerge.errors import RunFailed
from agentmerge.ledger import Ledger
from agentmerge.session import driving
from tests.session.conftest import trace_of


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), ("shift", "sort"), n_items=60)


def body_of(family: TinyFamily, tasks: Path, **worker: Any) -> dict[str, Any]:
    return demo_config(family, tasks) | {
        "limit": 10,
        "task_search_path": [str(tasks)],
        "budget": {"max_evaluations": 9},
        "search": {"seed": 3, "algorithm": "random", "population": 3},
        "worker": {"batch_size": 64, "options": {"threads": 1}} | worker,
    }


def config_of(family: TinyFamily, tasks: Path, **worker: Any) -> SearchConfig:
    return SearchConfig.from_text(yaml.safe_dump(body_of(family, tasks, **worker)))


def test_a_streamed_search_is_the_resident_one(
    family: TinyFamily, tasks: Path, tmp_path: Path
) -> None:
    driving.run(config_of(family, tasks), name="a", runs_dir=tmp_path / "one")
    streamed = config_of(family, tasks, placement="stream")
    driving.run(streamed, name="a", runs_dir=tmp_path / "two")
    first, second = (trace_of(tmp_path / runs, "a") for runs in ("one", "two"))
    assert first["candidates"] == second["candidates"]
    driving.run(streamed, name="b", runs_dir=tmp_path / "one")
    with Ledger(tmp_path / "one" / driving.LEDGER) as ledger:
        assert all(c.reused for c in ledger.candidates(ledger.run("b").id) if c.state == "scored")


def test_a_parent_that_vanishes_ends_the_search_and_loses_nothing(
    family: TinyFamily, tasks: Path, tmp_path: Path
) -> None:
    own = tmp_path / "family"
    shutil.copytree(family.base, own / "base")
    experts = []
    for expert in family.experts:
        shutil.copytree(expert, own / expert.name)
        experts.append(str(own / expert.name))
    body = body_of(family, tasks, placement="stream")
    body["genome"] |= {"models": experts, "base_model": str(own / "base")}
    config = SearchConfig.from_text(yaml.safe_dump(body))
    file = own / family.experts[0].name / "model.safetensors"

    def spoil(event: dict[str, Any]) -> None:
        if event["event"] == "candidate" and event["slot"] == 3:
            file.rename(file.with_suffix(".away"))

    with pytest.raises(RunFailed, match="cannot be read now: No such file"):
        driving.run(config, name="a", runs_dir=tmp_path, emit=spoil)
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        done = [c for c in ledger.candidates(ledger.run("a").id) if c.state == "scored"]
    assert done
    file.with_suffix(".away").rename(file)
    assert driving.resume("a", runs_dir=tmp_path).status == "done"
    driving.run(config, name="a", runs_dir=tmp_path / "whole")
    assert trace_of(tmp_path, "a")["candidates"] == trace_of(tmp_path / "whole", "a")["candidates"]


class TestWhatIsSaid:
    def written(self, family: TinyFamily, tasks: Path, path: Path, **worker: Any) -> str:
        path.write_text(yaml.safe_dump(body_of(family, tasks, **worker)))
        return str(path)

    def test_check_and_doctor_show_the_forecast(
        self, family: TinyFamily, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = self.written(family, tasks, tmp_path / "c.yml", count=2)
        for command in (["check", config], ["doctor", config]):
            assert run_app([*command, "--runs-dir", str(tmp_path)]) == 0
            out = capsys.readouterr().out
            for part in (
                "parents",
                "live model",
                "2 workers and this process",
                "resident (it fits)",
            ):
                assert part in out
        assert run_app(["check", config, "--runs-dir", str(tmp_path), "--json"]) == 0
        memory = json.loads(capsys.readouterr().out)["plan"]["memory"]
        assert (memory["chosen"], memory["workers"]) == ("device", 2)
        assert memory["forecasts"][0]["host"]["parents"] > 0
        assert run_app(["doctor", config, "--runs-dir", str(tmp_path), "--json"]) == 0
        found = {row["what"]: row for row in json.loads(capsys.readouterr().out)}
        assert found["placement"]["forecast"]["chosen"] == "device"
        assert found["memory"]["ok"]

    def test_too_little_memory_is_said_before_the_search(
        self, family: TinyFamily, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = self.written(family, tasks, tmp_path / "c.yml", memory_gb=0.01)
        for command in (["check", config], ["run", config]):
            assert run_app([*command, "--runs-dir", str(tmp_path)]) == 2
            said = capsys.readouterr().err
            assert "even with the parents streamed" in said
            assert "0.01 GB are allowed by worker.memory_gb" in said
        assert run_app(["doctor", config, "--runs-dir", str(tmp_path)]) == 1
        assert "NOT placement" in capsys.readouterr().out

    def test_a_search_says_that_it_streams(
        self, family: TinyFamily, tasks: Path, tmp_path: Path
    ) -> None:
        events: list[dict[str, Any]] = []
        config = config_of(family, tasks, placement="stream")
        driving.run(config, name="a", runs_dir=tmp_path, emit=events.append)
        assert events[0]["memory"] == "parents: stream; as worker.placement says"
