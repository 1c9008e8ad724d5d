"""Trackers hear what a search does and can never stop it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from agentmerge.cli.app import run_app
from agentmerge.cli.trackers import tracked
from tests.session.conftest import config, config_text

pytest.importorskip("wandb")


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yml"
    path.write_text(config_text(budget={"max_evaluations": 12}))
    return path


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_wandb_offline_logs_scores_and_thoughts(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    arguments = ["run", str(config_file), "--runs-dir", str(tmp_path / "runs"), "-q"]
    arguments += ["--wandb", "--wandb-project", "merges", "--wandb-entity", "us"]
    assert run_app(arguments) == 0
    logs = list(tmp_path.rglob("*.wandb"))
    assert len(logs) == 1
    words = (b"merges", b"task/one", b"thought/critic", b"verdict")
    deadline = time.monotonic() + 60  # W&B's own process may still be writing
    while any(word not in logs[0].read_bytes() for word in words):
        assert time.monotonic() < deadline, [w for w in words if w not in logs[0].read_bytes()]
        time.sleep(0.1)


def test_a_tracker_that_fails_is_said_once_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def __init__(self, *_: object, **__: object) -> None:
            self.heard = 0

        def tell(self, event: dict) -> None:
            self.heard += 1
            raise ConnectionError(f"no network at event {self.heard}")

        def close(self) -> None:
            pass

    monkeypatch.setattr("agentmerge.plugins.load", lambda group, name: Broken)
    seen: list[dict] = []
    with tracked(seen.append, config(), True, None, None, None) as tell:
        tell({"event": "start"})
        tell({"event": "done"})
    assert [event["event"] for event in seen] == ["start", "done"]
    said = capsys.readouterr().err
    assert said.count("W&B failed") == 1
    assert "no network at event 1" in said


def test_a_tracker_that_does_not_start_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no login")

    monkeypatch.setattr("agentmerge.plugins.load", lambda group, name: broken)
    seen: list[dict] = []
    with tracked(seen.append, config(), True, None, None, None) as tell:
        tell({"event": "start"})
    assert seen
    assert "no login" in capsys.readouterr().err
