"""What a search started ends with it, also where the search was killed in the middle of a call."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

#: A search whose worker processes are busy for an hour; it prints their ids.
SEARCH = """
import multiprocessing, threading, time
from agentmerge.recipe import Recipe
from agentmerge.contracts.worker import WorkerSpec
from agentmerge.workers.pool import Pool
from agentmerge.config import TasksConfig
from agentmerge.workers.fake import FakeWorker

TASKS = TasksConfig(tasks=({"name": "code"},), limit=20)
PARENTS = (("base", "/x"), ("b", "/y"))
SPEC = WorkerSpec("fake", PARENTS, "base", TASKS, "float32", 8, options={"delay_s": 3600})

if __name__ == "__main__":
    pool, items = Pool(SPEC, count=2), FakeWorker.tasks(SPEC).refs()
    for model in ("base", "b"):
        one = Recipe.of_model(model, 4).canonical(4)
        threading.Thread(target=pool.evaluate, args=(one, items)).start()
    while len(multiprocessing.active_children()) < 2:
        time.sleep(0.01)
    time.sleep(1)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(3600)
"""
#: An engine's process, by either way of starting one: it prints its id and sleeps.
ENGINE = """
import multiprocessing, os, time
from agentmerge.workers.vllm import extension

def engine():
    if "{method}" == "spawn":
        from agentmerge.workers.vllm import extension
    print(os.getpid(), flush=True)
    time.sleep(3600)

if __name__ == "__main__":
    os.environ[extension.SEARCH] = str(os.getpid())
    multiprocessing.get_context("{method}").Process(target=engine).start()
    time.sleep(3600)
"""
#: An engine that looks at nothing, and its rank, which does.
RANK = """
import multiprocessing, os, time
SPAWN = multiprocessing.get_context("spawn")

def rank(engine):
    from agentmerge.workers.vllm import extension
    print(engine, os.getpid(), flush=True)
    time.sleep(3600)

def engine():
    SPAWN.Process(target=rank, args=(os.getpid(),)).start()
    time.sleep(3600)

if __name__ == "__main__":
    os.environ["AGENTMERGE_SEARCH_PROCESS"] = str(os.getpid())
    SPAWN.Process(target=engine).start()
    time.sleep(3600)
"""


def killed(path: Path, program: str) -> list[int]:
    """The processes that a program printed before it was killed."""
    path.write_text(textwrap.dedent(program))
    process = subprocess.Popen(
        [sys.executable, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdout is not None
    found = [int(word) for word in process.stdout.readline().split()]
    assert all(psutil.pid_exists(each) for each in found)
    process.kill()
    process.wait()
    process.stdout.close()
    return found


def gone(processes: list[int], within_s: float = 10) -> bool:
    patience = time.monotonic() + within_s
    while any(map(alive, processes)) and time.monotonic() < patience:
        time.sleep(0.05)
    left = [process for process in processes if alive(process)]
    for process in left:
        os.kill(process, signal.SIGKILL)
    return not left


def alive(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_busy_worker_processes_end_with_a_killed_search(tmp_path: Path) -> None:
    workers = killed(tmp_path / "search.py", SEARCH)
    assert len(workers) == 2
    assert gone(workers)


@pytest.mark.parametrize("method", [pytest.param("spawn", marks=pytest.mark.slow), "fork"])
def test_an_engines_process_ends_with_a_killed_search(tmp_path: Path, method: str) -> None:
    assert gone(killed(tmp_path / "engine.py", ENGINE.replace("{method}", method)))


def test_an_engine_of_several_processes_ends_whole(tmp_path: Path) -> None:
    processes = killed(tmp_path / "ranks.py", RANK)
    assert len(processes) == 2
    assert gone(processes)
