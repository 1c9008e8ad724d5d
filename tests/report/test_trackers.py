"""Trackers hear what a search does and can never stop it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agentmerge.cli import trackers
from agentmerge.cli.app import run_app
from agentmerge.cli.trackers import Tracking, tracked
from agentmerge.ledger import Ledger
from tests.session.conftest import command, config, config_text

Logged = Callable[[], str]


def wandb_store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Logged:
    """Everything that W&B wrote offline, as one text."""
    pytest.importorskip("wandb")
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(folder))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")

    def read() -> str:
        parts = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
        return b"".join(parts).decode(errors="replace")

    return read


def mlflow_store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Logged:
    """Everything that MLflow wrote into a database and a folder of artifacts, as one text."""
    pytest.importorskip("mlflow")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (folder / "mlruns").as_uri())

    def read() -> str:
        parts = []
        for path in folder.rglob("*"):
            if path.is_file():
                name = str(path.relative_to(folder)).encode()
                parts.append(name + b"\n" + path.read_bytes())
        return b"\n".join(parts).decode(errors="replace")

    return read


def holds(logged: Logged, words: list[str]) -> None:
    deadline = time.monotonic() + 60  # W&B's own process may still be writing
    while missing := [word for word in words if word not in logged()]:
        assert time.monotonic() < deadline, missing
        time.sleep(0.1)


STORES = {"wandb": wandb_store, "mlflow": mlflow_store}


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yml"
    path.write_text(config_text(budget={"max_evaluations": 12}))
    return path


@pytest.mark.parametrize("kind", STORES)
@pytest.mark.filterwarnings("ignore")
def test_it_logs_scores_thoughts_recipe_and_report(
    kind: str, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / kind
    folder.mkdir()
    logged = STORES[kind](folder, monkeypatch)
    runs = tmp_path / "runs"
    arguments = ["run", str(config_file), "--runs-dir", str(runs), "--name", "a", "-q"]
    arguments += ["--tracker", kind, "--wandb-project", "merges", "--wandb-entity", "us"]
    assert run_app(arguments) == 0
    assert (runs / "a" / "report.html").is_file()
    recipe = (runs / "a" / "best.yml").read_text()
    words = ["merges", "task/one", "critic", "verdict", "best.yml", "report.html", recipe]
    words += ["Best score", "agentmerge report: a"]
    holds(logged, words)


@pytest.mark.filterwarnings("ignore")
def test_mlflow_can_be_asked_for_it(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow_store(tmp_path, monkeypatch)
    from mlflow.tracking import MlflowClient

    runs = tmp_path / "runs"
    where = ["--runs-dir", str(runs), "--name", "a", "-q"]
    assert run_app(["run", str(config_file), *where, "--tracker", "mlflow"]) == 0
    with Ledger(runs / "agentmerge.sqlite") as ledger:
        row = ledger.run("a")
        scores = [c.score for c in ledger.candidates(row.id) if c.score is not None and not c.twin]
    client = MlflowClient()
    experiment = client.get_experiment_by_name("agentmerge")
    (found,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "score")
    assert sorted(metric.value for metric in history) == pytest.approx(sorted(scores))
    assert found.data.metrics["best"] == pytest.approx(max(scores))
    assert found.data.params["search.seed"] == "7"
    assert found.data.tags["verdict"] == row.result["verdict"]
    assert found.info.status == "FINISHED"
    kinds = {artifact.path for artifact in client.list_artifacts(found.info.run_id)}
    assert kinds == {"recipe", "report", "thoughts"}


@pytest.mark.filterwarnings("ignore")
def test_two_trackers_hear_one_search_and_wandb_is_one_of_them(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = []
    for kind, store in STORES.items():
        folder = tmp_path / kind
        folder.mkdir()
        logged.append(store(folder, monkeypatch))
    # in a process of its own: W&B keeps its first folder for as long as a process lives
    arguments = [config_file, "--runs-dir", tmp_path / "runs", "-q", "--wandb"]
    process = command("run", *arguments, "--tracker", "mlflow", "--tracker", "wandb")
    process.communicate()
    assert process.returncode == 0
    for read in logged:
        holds(read, ["task/one"])
    assert len(list((tmp_path / "wandb").rglob("*.wandb"))) == 1, "one run, however often asked"


def test_an_unknown_tracker_is_said_before_anything_is_paid(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    arguments = ["run", str(config_file), "--runs-dir", str(runs), "--tracker", "wandbb"]
    assert run_app(arguments) == 2
    assert "did you mean 'wandb'" in capsys.readouterr().err
    assert not (runs / "agentmerge.sqlite").exists()


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
    with tracked(seen.append, config(), Tracking(("wandb",)), Path("runs"), None) as tell:
        tell({"event": "start"})
        tell({"event": "done"})
    assert [event["event"] for event in seen] == ["start", "done"]
    said = capsys.readouterr().err
    assert said.count("wandb failed") == 1
    assert "no network at event 1" in said


def test_a_tracker_that_does_not_start_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no login")

    monkeypatch.setattr("agentmerge.plugins.load", lambda group, name: broken)
    seen: list[dict] = []
    with tracked(seen.append, config(), Tracking(("wandb",)), Path("runs"), None) as tell:
        tell({"event": "start"})
    assert seen
    assert "no login" in capsys.readouterr().err


@pytest.mark.parametrize("silent", ["start", "tell", "close"])
def test_a_tracker_that_never_answers_costs_the_search_no_time(
    silent: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forever = threading.Event()

    class Silent:
        def __init__(self, *_: object, **__: object) -> None:
            self.answer("start")

        def answer(self, to: str) -> None:
            if to == silent:
                forever.wait(60)

        def tell(self, event: dict) -> None:
            self.answer("tell")

        def close(self) -> None:
            self.answer("close")

    monkeypatch.setattr("agentmerge.plugins.load", lambda group, name: Silent)
    monkeypatch.setattr(trackers, "START_S", 0.3)
    monkeypatch.setattr(trackers, "END_S", 0.5)
    seen: list[dict] = []
    began = time.monotonic()
    with tracked(seen.append, config(), Tracking(("mlflow", "wandb")), Path("runs"), None) as tell:
        for _ in range(40):
            tell({"event": "candidate"})
        within = time.monotonic() - began
    took = time.monotonic() - began
    forever.set()
    assert len(seen) == 40
    assert within < 10
    assert took < 20, "two that hang share one deadline"
    said = capsys.readouterr().err
    for name in ("mlflow", "wandb"):
        assert f"{name} did not take everything in 0.5 s" in said


def test_a_server_that_takes_no_request_does_not_hold_a_real_tracker(
    config_file: Path, tmp_path: Path
) -> None:
    """MLflow's client tries for minutes; the search is over before its first try is."""
    pytest.importorskip("mlflow")
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        where = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        runs = tmp_path / "runs"
        code = (
            "import sys; from agentmerge.cli import trackers; from agentmerge.cli.app import "
            "run_app; trackers.START_S = trackers.END_S = 0.5; sys.exit(run_app(sys.argv[1:]))"
        )
        line = ["run", str(config_file), "--runs-dir", str(runs), "-q", "--tracker", "mlflow"]
        done = subprocess.run(
            [sys.executable, "-c", code, *line],
            env=os.environ | {"MLFLOW_TRACKING_URI": where},
            capture_output=True,
            text=True,
            timeout=100,
        )
    assert done.returncode == 0, done.stderr
    assert "mlflow has not answered in 0.5 s" in done.stderr
    with Ledger(runs / "agentmerge.sqlite") as ledger:
        assert [row.status for row in ledger.runs()] == ["done"]
