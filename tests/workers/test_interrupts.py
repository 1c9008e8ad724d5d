"""Ctrl-C in real processes: answered at once in every stage of a search; the second ends it all."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import tiny
import yaml
from test_pool import spec

from agentmerge.config import SearchConfig
from agentmerge.ledger import Ledger
from agentmerge.session import driving
from agentmerge.workers.hosts.process import WorkerProcess
from agentmerge.workers.kinds import Building
from agentmerge.workers.processes import end
from tests.session.conftest import config_text, trace_of

#: Seconds within which the first Ctrl-C says what is waited for.
ANSWER_S = 2.0

#: The command line, with one stage of a search that says that it has begun, and does not end.
PROGRAM = """
import hashlib, sys, time
from agentmerge import plugins
from agentmerge.cli import main, trackers
from agentmerge.search import propose
from agentmerge.workers.fake import FakeWorker

def hang(*_, **__):
    print("here", flush=True)
    time.sleep(3600)

def compute(*_, **__):
    print("here", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**10)  # in C, and no signal ends it

class Tracker:
    def __init__(self, config, **where): pass
    def tell(self, event): pass
    def keep(self, kind, path): pass
    close = hang

stage = sys.argv.pop(1)
if stage == "models and tasks": FakeWorker.tasks = hang
if stage == "loading": FakeWorker.__init__ = hang
if stage == "scoring": FakeWorker.score = hang
if stage == "a step in C": propose.propose = compute
if stage == "a tracker":
    load, trackers.END_S = plugins.load, 3600
    plugins.load = lambda group, name: Tracker if "trackers" in group else load(group, name)
main()
"""
SAID = {
    "models and tasks": "a look at models and tasks",
    "loading": "a worker to load its models",
    "scoring": "a candidate's scores",
    "a step in C": "the step that runs",
    "a tracker": "mlflow to take what it was told",
    "a model": "a reply of silent",
}


class Lines:
    """What a process says, read as it comes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.all: list[str] = []
        self._new: queue.SimpleQueue[str] = queue.SimpleQueue()
        assert process.stderr is not None
        threading.Thread(target=self._read, args=(process.stderr,), daemon=True).start()

    def _read(self, stream) -> None:
        for line in stream:
            self._new.put(line)

    def until(self, words: str, seconds: float) -> str:
        end = time.monotonic() + seconds
        while True:
            try:
                line = self._new.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                pytest.fail(f"{words!r} was not said in {seconds} s, but: {''.join(self.all)}")
            self.all.append(line)
            if words in line:
                return line


@contextmanager
def started(*line: str | Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, *map(str, line)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


def workers_of(process: subprocess.Popen[str], count: int) -> list[psutil.Process]:
    """Once there are so many."""
    end = time.monotonic() + 60
    workers: list[psutil.Process] = []
    while len(workers) < count and time.monotonic() < end:
        time.sleep(0.02)
        workers = []
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.Error):  # it ends, or begins, while it is looked at
                workers += [child] if "spawn_main" in str(child.cmdline()) else []
    return workers


def is_tracker(process: psutil.Process) -> bool:
    """Python's own, which ends by itself."""
    try:
        return "resource_tracker" in str(process.cmdline())
    except psutil.Error:
        return True


def interrupted(process: subprocess.Popen[str], said: Lines, expected: str) -> None:
    """Once: an answer. Twice: the end, with every process that it started."""
    process.send_signal(signal.SIGINT)
    assert expected in said.until("once more: stop at once", ANSWER_S)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(ANSWER_S) == 130
    _, left = psutil.wait_procs(family, timeout=ANSWER_S)
    assert not [p for p in left if not is_tracker(p)]
    said.until("stopped at once; everything scored is saved", ANSWER_S)


@pytest.mark.parametrize("stage", [stage for stage in SAID if stage != "a model"])
def test_every_stage_answers_and_ends(tmp_path: Path, stage: str) -> None:
    path = tmp_path / "config.yml"
    path.write_text(config_text(budget={"max_evaluations": 12}))
    options = ["--tracker", "mlflow"] if stage == "a tracker" else []
    line = ["run", path, "--runs-dir", tmp_path / "runs", "--name", "a", *options]
    with started("-c", PROGRAM, stage, *line) as process:
        said = Lines(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        interrupted(process, said, SAID[stage])
    if stage == "a step in C":  # what was paid for before is there
        with Ledger(tmp_path / "runs" / driving.LEDGER) as ledger:
            found = ledger.candidates(ledger.run("a").id)
        assert {c.state for c in found} == {"scored"}


def test_a_model_that_does_not_reply(tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        where = f"http://127.0.0.1:{deaf.getsockname()[1]}/v1"
        agents = {"llm": "openai:silent", "base_url": where, "timeout_s": 3000.0}
        path.write_text(config_text(agents=agents, search={"algorithm": "llm_evo"}))
        line = ["-m", "agentmerge", "run", path, "--runs-dir", tmp_path / "runs"]
        with started(*line, OPENAI_API_KEY="sk-canary") as process:
            said = Lines(process)
            deaf.settimeout(60)
            connection, _ = deaf.accept()
            with connection:
                connection.recv(10)
                interrupted(process, said, SAID["a model"])


def test_workers_that_hang_or_are_stopped_end_with_the_second(tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    options = {"base": "base", "delay_s": 3600}
    path.write_text(config_text(worker={"count": 2, "options": options}))
    line = ["-m", "agentmerge", "run", path, "--runs-dir", tmp_path / "runs"]
    with started(*line) as process:
        said = Lines(process)
        workers = workers_of(process, 2)
        time.sleep(2)
        workers[0].send_signal(signal.SIGSTOP)
        interrupted(process, said, "a ")
    with Ledger(tmp_path / "runs" / driving.LEDGER) as ledger:
        (row,) = ledger.runs()
        assert {c.state for c in ledger.candidates(row.id)} == {"open"}, "none was taken for lost"


def test_a_search_on_real_models_is_answered_while_they_load(
    parents: dict[str, Path], tasks_dir: Path, tmp_path: Path
) -> None:
    body = {
        "genome": {
            "models": [str(parents["b"]), str(parents["c"])],
            "base_model": str(parents["base"]),
            "merge_method": "task_arithmetic",
        },
        "tasks": [
            {"name": "tiny_choice", "metric": tiny.METRICS["tiny_choice"]},
            {"name": "tiny_text", "metric": tiny.METRICS["tiny_text"], "weight": 0.01},
        ],
        "task_search_path": [str(tasks_dir)],
        "limit": 20,
        "search": {"algorithm": "random", "population": 2},
        "budget": {"max_evaluations": 10},
        "worker": {"kind": "hf", "batch_size": 20, "device": "cpu", "timeout_s": 600},
    }
    path, runs = tmp_path / "config.yml", tmp_path / "runs"
    path.write_text(yaml.safe_dump(body))
    line = ["-m", "agentmerge", "run", path, "--runs-dir", runs, "--name", "a", "--json"]
    with started(*line, OMP_NUM_THREADS="1") as process:
        said = Lines(process)
        said.until('"evaluate"', 120)
        workers_of(process, 1)
        process.send_signal(signal.SIGINT)
        answer = said.until("once more: stop at once", ANSWER_S)
        assert SAID["loading"] in answer or SAID["scoring"] in answer
        family = psutil.Process(process.pid).children(recursive=True)
        assert process.wait(120) == 130, said.all
        _, left = psutil.wait_procs(family, timeout=5)
        assert not left
    with Ledger(runs / driving.LEDGER) as ledger:
        row = ledger.run("a")
        states = [c.state for c in ledger.candidates(row.id)]
    assert (row.status, "open" in states) == ("interrupted", True)
    assert driving.resume("a", runs_dir=runs).status == "done"
    body["worker"].pop("timeout_s")
    config = SearchConfig.from_text(yaml.safe_dump(body))
    driving.run(config, name="a", runs_dir=tmp_path / "calm")
    mine, calm = trace_of(runs, "a"), trace_of(tmp_path / "calm", "a")
    assert mine["candidates"] == calm["candidates"], "a process of its own answers the same"


def test_another_command_ends_with_the_first(tmp_path: Path) -> None:
    """There is nothing to save: nobody waits for the worker, which is given up."""
    path, recipe = tmp_path / "config.yml", tmp_path / "recipe.yml"
    path.write_text(config_text())
    recipe.write_text(
        "merge_method: task_arithmetic\nbase_model: base\ndtype: float32\nmodels:\n"
        "- {model: north, parameters: {weight: 0.5}}\n"
    )
    line = ["evaluate", recipe, "--config", path, "--runs-dir", tmp_path / "runs"]
    with started("-c", PROGRAM, "scoring", *line) as process:
        said = Lines(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        said.until("stopped; everything scored is saved", ANSWER_S)
        assert process.wait(ANSWER_S) == 130


@pytest.mark.parametrize("module", ["agentmerge.cli.terminal", "agentmerge.cli.app"])
def test_a_command_that_is_still_imported_ends_with_a_word(module: str) -> None:
    script = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(name, *_):\n"
        f"        if name == {module!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder)\n"
        "from agentmerge.cli import main\nsys.argv[1:] = ['list']\nmain()"
    )
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (130, "error: stopped\n")


def test_a_worker_that_is_still_imported_hears_no_ctrl_c(capfd: pytest.CaptureFixture[str]) -> None:
    worker = WorkerProcess(spec(), Building(None, None, {}), 2)
    try:
        assert worker._process.pid is not None
        os.kill(worker._process.pid, signal.SIGINT)
        worker.ready()
        assert worker.info.device == "cpu"
    finally:
        end(worker._process)
    assert "Traceback" not in capfd.readouterr().err
