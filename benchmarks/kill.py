"""Kills searches, branches and resumes at random moments, and counts what that cost.

    python -m benchmarks.kill --kills 200 --worker fake
    python -m benchmarks.kill --kills 20 --worker hf
    python -m benchmarks.kill --kills 20 --worker vllm --apart
    python -m benchmarks.kill --kills 40 --small-disk
    python -m benchmarks.kill --kills 0 --power-cuts 100
    python -m benchmarks.kill --kills 100 --host process
    python -m benchmarks.kill --kills 100 --host ray

One search and one branch of it run undisturbed: the reference. The same two are then run again and
again in fresh folders, and each time the process is hit at a random moment, until it is done: by
``kill -9``, by a disk that is full (a limit on the size of files, a little above what is there;
with ``--small-disk``, for which one must be root, a small filesystem of its own that is really
full), or by another process that holds the database locked. Printed:

    lost       evaluations that were committed before a fault and are not there after it
    repeated   evaluations that were paid for again although they had been committed
    diverged   candidates, words and final cards that differ from the reference's
    left       processes of a killed search that were still there a minute after it, and what it
               had in a Ray cluster

With ``--host`` the search has a window and several workers there, and the faults are those of
``hosts.py``; it goes on with another number of workers, and the reference had one, in its process.

With ``--power-cuts`` the two databases are also taken from different moments of a running search,
as a power cut may leave them, and gone on from: see ``power_cut.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from agentmerge.ledger import Ledger
from agentmerge.ledger.folder import CHECKPOINTS, LEDGER
from agentmerge.report.summary import trace
from benchmarks.fake import fake_config
from benchmarks.hosts import LAG, WORKERS, Processes, disturb, host_of

FAULTS = ("kill", "kill", "kill", "full disk", "locked")
AT = 2  # the generation that the branch leaves the search at
PATIENCE_S = 60  # that what a killed search started may take to end
DISK_MB = 32


@dataclass
class Tally:
    """What was done and what it cost. faults: how many of each kind hit a running process."""

    faults: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    repeated: int = 0
    diverged: int = 0
    left: int = 0
    rounds: int = 0


def config_of(worker: str, apart: bool, folder: Path, host: str = "") -> Path:
    """A config whose search takes a few seconds on this worker.

    apart: what scores runs in processes of its own: two workers, or vLLM's engine. host: where
        several live.
    """
    body = fake_config(60, delay_s=0.03)
    if worker != "fake":
        from agentmerge.demo.family import cached_family
        from agentmerge.demo.tasks import demo_config, write_tasks

        family = cached_family(("shift", "sort"), 0)
        tasks = write_tasks(folder / "tasks", ("shift", "sort"), n_items=120)
        body = demo_config(family, tasks)
        body |= {"task_search_path": [str(tasks)], "limit": 40}
        body["worker"] = {"kind": worker, "batch_size": 64}
    if apart and worker == "vllm":
        body["worker"]["options"] = {"engine_process": True}
    elif apart:
        body["worker"]["count"] = 2
    body["search"] = {"algorithm": "cma_es", "seed": 7, "population": 5}
    body["budget"] = {"max_evaluations": 40 if worker == "fake" else 24}
    if host:
        body["search"] = {"algorithm": "one_plus_one", "seed": 7, "lag": LAG}
        body["budget"] = {"max_evaluations": 80 if worker == "fake" else 50}
    if host not in ("", "here"):
        body["worker"] |= {"host": host, "count": WORKERS}
    path = folder / f"config{host}.yml"
    path.write_text(yaml.safe_dump(body))
    return path


def start(
    runs: Path, *arguments: str, limit: int | None = None, env: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """A command in a process of its own; ``limit``: bytes that a file may grow to. env: besides
    this process's."""

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [sys.executable, "-m", "agentmerge", *arguments, "--runs-dir", str(runs), "-q"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limited,
        env=os.environ | (env or {}),
        start_new_session=True,
    )


def running(search: int) -> list[int]:
    """Processes of the session that a search began, which have not ended."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state, *rest = (process / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if int(rest[2]) == search and state != "Z":
            found.append(int(process.name))
    return found


def left(search: int, host: Processes | None = None) -> int:
    """How many are there a minute after their search, with what its workers' host has; processes
    are ended then."""
    patience = time.monotonic() + PATIENCE_S
    while (found := running(search)) and time.monotonic() < patience:
        time.sleep(0.05)
    for process in found:
        os.kill(process, 9)
    if host is None:
        return len(found)
    while (there := host.left()) and time.monotonic() < patience:
        time.sleep(0.5)
    return len(found) + there


def commands(config: Path) -> dict[str, list[str]]:
    """The two searches, each by the command that begins it."""
    return {
        "search": ["run", str(config), "--name", "search"],
        "branch": ["branch", "search", "--at", str(AT), "--as", "branch", "--search", "random"],
    }


def traces(runs: Path) -> dict[str, Any]:
    with Ledger(runs / LEDGER) as ledger:
        return {row.name: trace(ledger, row) for row in ledger.runs()}


def committed(runs: Path) -> dict[tuple[str, int, int], float | None]:
    """(search, generation, slot) -> score of every candidate that was paid for."""
    if not (runs / LEDGER).is_file():
        return {}
    with Ledger(runs / LEDGER) as ledger:
        return {
            (row.name, c.generation, c.slot): c.score
            for row in ledger.runs()
            for c in ledger.candidates(row.id)
            if c.state in ("scored", "failed")
        }


def status(runs: Path, name: str) -> str:
    if not (runs / LEDGER).is_file():
        return "absent"
    with Ledger(runs / LEDGER) as ledger:
        found = [row.status for row in ledger.runs() if row.name == name]
    return found[0] if found else "absent"


@contextmanager
def filled(folder: Path, free: int) -> Iterator[None]:
    """The filesystem of ``folder`` with no more than ``free`` bytes free, for as long."""
    filler = folder / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(folder).free - free))
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def place(small_disk: bool) -> Iterator[Path]:
    """An empty folder; on a small filesystem of its own, if asked."""
    with tempfile.TemporaryDirectory() as folder:
        if small_disk:
            size = f"size={DISK_MB}m"
            subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], check=True)
        try:
            yield Path(folder)
        finally:
            if small_disk:
                subprocess.run(["umount", "--lazy", folder], check=True)


def disturbed(
    runs: Path,
    name: str,
    begin: list[str],
    whole_s: float,
    rng: random.Random,
    tally: Tally,
    small_disk: bool,
) -> None:
    """One fault upon one attempt at a search, and what it left."""
    before = committed(runs)
    fault = rng.choice(FAULTS)
    known = status(runs, name) != "absent"
    arguments = ["resume", name] if known else begin
    limit = None
    disk: Any = nullcontext()
    if fault == "full disk":
        room = rng.randrange(4_096, 200_000)
        sizes = [path.stat().st_size for path in runs.glob("*.sqlite*")] or [0]
        limit = None if small_disk else max(sizes) + room
        disk = filled(runs.parent, room) if small_disk else disk
    with disk:
        process = start(runs, *arguments, limit=limit)
        moment = time.monotonic() + rng.uniform(0.2, 1.0) * whole_s
        if fault == "full disk":
            process.wait()
    while process.poll() is None and time.monotonic() < moment:
        time.sleep(0.01)
    hit = process.poll() is None or (fault == "full disk" and process.returncode != 0)
    database = runs / rng.choice((LEDGER, CHECKPOINTS))
    if fault == "locked" and process.poll() is None and database.is_file():
        other = sqlite3.connect(database, isolation_level=None, timeout=10)
        other.execute("BEGIN IMMEDIATE")
        time.sleep(rng.uniform(0.1, 2.0))
        other.rollback()
        other.close()
        process.wait()
    process.kill()
    _, err = process.communicate()
    if "Traceback" in err:
        raise SystemExit(f"a traceback after {fault}:\n{err}")
    tally.faults[fault] += hit
    tally.left += left(process.pid)
    after = committed(runs)
    tally.lost += sum(key not in after or after[key] != score for key, score in before.items())


def disturbed_there(
    runs: Path,
    name: str,
    begin: list[str],
    whole_s: float,
    rng: random.Random,
    tally: Tally,
    host: Processes,
    most: int,
) -> None:
    """One attempt at a search whose workers live elsewhere, hit until it ends, or ``most``
    faults have been, and what they left."""
    before = committed(runs)
    count = str(rng.randint(2, WORKERS))
    arguments = ["resume", name, "--workers", count] if status(runs, name) != "absent" else begin
    process = start(runs, *arguments, env=host.env)
    if tally.faults.total() < most:
        for fault in disturb(process, runs / name / "log.jsonl", host, whole_s, rng):
            tally.faults[fault] += 1
            print(f"{name}: {fault}", file=sys.stderr, flush=True)
            if tally.faults.total() >= most:
                break
    _, err = process.communicate()
    if "Traceback" in err or process.returncode not in (0, 1, -9):
        raise SystemExit(f"it ended with {process.returncode}:\n{err}")
    tally.left += left(process.pid, host)
    after = committed(runs)
    tally.lost += sum(key not in after or after[key] != score for key, score in before.items())


def repeated(runs: Path) -> int:
    """Evaluations that a worker was asked for after they had been committed, by the run's log."""
    found = 0
    for log in runs.glob("*/log.jsonl"):
        paid: Counter[tuple[int, int]] = Counter()
        for line in log.read_text().splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue  # half a line, where a kill or a full disk cut it
            if event.get("event") == "candidate" and not event["reused"]:
                paid[event["generation"], event["slot"]] += 1
        found += sum(count - 1 for count in paid.values())
    return found


def differences(
    one: Mapping[str, Any], other: Mapping[str, Any], names: Sequence[str] = ("search", "branch")
) -> int:
    count = 0
    for name in names:
        mine, theirs = one[name], other[name]
        longest = max(len(mine["candidates"]), len(theirs["candidates"]))
        pairs = zip(mine["candidates"], theirs["candidates"], strict=False)
        count += longest - sum(a == b for a, b in pairs)
        count += (mine["advice"] != theirs["advice"]) + (mine["result"] != theirs["result"])
    return count


def power_cuts(
    folder: Path,
    begin: Mapping[str, list[str]],
    reference: Mapping[str, Any],
    trials: int,
    rng: random.Random,
) -> bool:
    """Trials on databases of different moments; whether anything was wrong."""
    from agentmerge.config import SearchConfig
    from agentmerge.session import driving
    from benchmarks.power_cut import cut

    config = SearchConfig.from_file(folder / "config.yml")
    other = {"search.algorithm": "random"}
    searches = {
        "search": lambda runs, emit: driving.run(config, name="search", runs_dir=runs, emit=emit),
        "branch": lambda runs, emit: driving.branch(
            "search", at=AT, name="branch", runs_dir=runs, overrides=other, emit=emit
        ),
    }
    starts = [partial(start, folder / "source", *arguments) for arguments in begin.values()]
    found = cut(folder, starts, searches, reference, trials, rng)
    print(f"{found.trials} power cuts, {found.journals} of {2 * found.trials} databases with a "
          f"journal, {found.gone_on} searches and branches gone on")  # fmt: skip
    print(f"lost {found.lost}, repeated {found.repeated}, diverged {found.diverged}")
    return bool(found.lost + found.repeated + found.diverged)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="faults that hit, of all kinds")
    parser.add_argument("--worker", default="fake", help="fake, hf or vllm")
    parser.add_argument("--apart", action="store_true", help="what scores in processes of its own")
    parser.add_argument("--small-disk", action="store_true", help="a disk that is really full")
    parser.add_argument("--power-cuts", type=int, default=0, help="trials on mixed databases")
    parser.add_argument("--host", default="", help="process or ray: faults of its workers there")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng, tally = random.Random(asked.seed), Tally()
    with ExitStack() as stack:
        folder = stack.enter_context(place(asked.small_disk))
        begin = commands(config_of(asked.worker, asked.apart, folder, asked.host))
        alone = asked.host and config_of(asked.worker, asked.apart, folder, "here")
        whole: dict[str, float] = {}
        for search, arguments in (commands(alone) if alone else begin).items():
            began = time.monotonic()
            if start(folder / "calm", *arguments).wait():
                raise SystemExit(f"the undisturbed {search} failed")
            whole[search] = time.monotonic() - began
        reference = traces(folder / "calm")
        wrong = bool(asked.power_cuts) and power_cuts(
            folder, begin, reference, asked.power_cuts, rng
        )
        host = stack.enter_context(host_of(asked.host)) if asked.host else None
        while tally.faults.total() < asked.kills:
            runs = folder / f"round-{tally.rounds}"
            for search, arguments in begin.items():
                while status(runs, search) != "done":
                    if host is not None:
                        disturbed_there(
                            runs, search, arguments, whole[search], rng, tally, host, asked.kills
                        )
                    elif tally.faults.total() < asked.kills:
                        disturbed(
                            runs, search, arguments, whole[search], rng, tally, asked.small_disk
                        )
                    else:
                        known = status(runs, search) != "absent"
                        start(runs, *(["resume", search] if known else arguments)).wait()
            tally.repeated += repeated(runs)
            tally.diverged += differences(reference, traces(runs))
            tally.rounds += 1
            shutil.rmtree(runs)
            print(f"round {tally.rounds}: {tally}", file=sys.stderr, flush=True)
    if not asked.kills:
        raise SystemExit(wrong)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(tally.faults.items()))
    print(f"{tally.faults.total()} faults ({kinds}) on the {asked.worker} worker, "
          f"{tally.rounds} searches and branches")  # fmt: skip
    print(f"lost {tally.lost}, repeated {tally.repeated}, diverged {tally.diverged}; "
          f"processes left {tally.left}")  # fmt: skip
    raise SystemExit(wrong or bool(tally.lost + tally.repeated + tally.diverged + tally.left))


if __name__ == "__main__":
    main()
