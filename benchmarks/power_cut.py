"""Two databases of different moments, as a power cut leaves them: what resumes make of them.

A search, and a branch of it, is stopped for an instant at random moments, and both databases are
copied as they lie there, with their journals. Each trial puts the ledger of one moment beside the
checkpoints of another, some without the journal, and goes on until both searches are done.

    lost       evaluations that the trial's ledger had and that are not there afterwards
    repeated   evaluations that it had and that were paid for again
    diverged   candidates, words and final cards that differ from the reference's
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentmerge.ledger.folder import CHECKPOINTS, LEDGER

#: What a search begins with, and goes on with: a config's or another search's name, and a listener.
Begin = Callable[[Path, Callable[[dict[str, Any]], None]], object]


@dataclass
class Cuts:
    """What trials cost. journals: how many databases kept their journal, of two each. gone_on: how
    many searches and branches were not done in the trials' ledgers."""

    trials: int = 0
    gone_on: int = 0
    journals: int = 0
    lost: int = 0
    repeated: int = 0
    diverged: int = 0


def snapshots(
    runs: Path, to: Path, name: str, process: Any, count: int, rng: random.Random
) -> None:
    """Copy both databases of a process that searches at ``count`` moments, spread evenly over the
    search's time however long it takes, into folders of ``to``. All that the process still does
    when its search is done is one moment."""
    first, seen, done = len([*to.iterdir()]), 0, False
    with process:
        while process.poll() is None:
            time.sleep(rng.uniform(0.0, 0.1))
            if done or not ((runs / LEDGER).is_file() and (runs / CHECKPOINTS).is_file()):
                continue
            done = _is_done(runs / LEDGER, name)
            place = seen if seen < count else rng.randrange(seen + 1)
            seen += 1
            if place < count:
                os.kill(process.pid, signal.SIGSTOP)
                try:
                    _copy(runs, to / str(first + place))
                finally:
                    os.kill(process.pid, signal.SIGCONT)
    if process.returncode:
        raise SystemExit("the search that was copied from failed")


def _is_done(ledger: Path, name: str) -> bool:
    with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as conn:
        try:
            row = conn.execute("SELECT status FROM runs WHERE name = ?", (name,)).fetchone()
        except sqlite3.OperationalError:  # its tables are not there yet
            return False
    return row == ("done",)


def _copy(runs: Path, to: Path) -> None:
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir()
    for name in (LEDGER, CHECKPOINTS):
        for end in ("", "-wal"):
            if (file := runs / f"{name}{end}").is_file():
                shutil.copyfile(file, to / file.name)


def put_together(taken: Path, runs: Path, cuts: Cuts, rng: random.Random) -> None:
    """A runs directory with each database of a moment of its own."""
    runs.mkdir()
    for name in (LEDGER, CHECKPOINTS):
        source = taken / str(rng.randrange(len([*taken.iterdir()])))
        shutil.copyfile(source / name, runs / name)
        journal = source / f"{name}-wal"
        if journal.is_file() and (rng.random() < 0.7 or not _is_whole(runs / name)):
            shutil.copyfile(journal, runs / journal.name)
            cuts.journals += 1


def _is_whole(path: Path) -> bool:
    """Whether a database can do without its journal: it was not copied amid a checkpoint."""
    alone = path.with_name("alone.sqlite")
    shutil.copyfile(path, alone)
    try:
        with closing(sqlite3.connect(alone)) as conn:
            return bool(conn.execute("PRAGMA integrity_check").fetchone() == ("ok",))
    except sqlite3.DatabaseError:
        return False
    finally:
        for file in path.parent.glob("alone.sqlite*"):
            file.unlink()


def trial(
    taken: Path,
    runs: Path,
    searches: Mapping[str, Begin],
    reference: Mapping[str, Any],
    cuts: Cuts,
    rng: random.Random,
) -> None:
    """Go on from a ledger and checkpoints of different moments, and count what it cost."""
    from agentmerge.session import driving
    from benchmarks.kill import committed, differences, status, traces

    put_together(taken, runs, cuts, rng)
    before = committed(runs)
    paid: set[tuple[str, int, int]] = set()
    for name, begin in searches.items():

        def listen(event: dict[str, Any], name: str = name) -> None:
            if event["event"] == "candidate" and not event["reused"]:
                paid.add((name, event["generation"], event["slot"]))

        known = status(runs, name)
        cuts.gone_on += known != "done"
        if known == "absent":
            begin(runs, listen)
        elif known != "done":
            driving.resume(name, runs_dir=runs, emit=listen)
    after = committed(runs)
    cuts.trials += 1
    cuts.lost += sum(key not in after or after[key] != score for key, score in before.items())
    cuts.repeated += len(paid & before.keys())
    cuts.diverged += differences(reference, traces(runs), [*searches])
    shutil.rmtree(runs)


def cut(
    folder: Path,
    starts: Sequence[Callable[[], Any]],
    searches: Mapping[str, Begin],
    reference: Mapping[str, Any],
    trials: int,
    rng: random.Random,
    moments: int = 20,
) -> Cuts:
    """All of it in a folder. starts: ``searches`` in turn, as processes on ``folder/source``."""
    taken = folder / "taken"
    taken.mkdir()
    for name, start in zip(searches, starts, strict=True):
        snapshots(folder / "source", taken, name, start(), moments, rng)
    cuts = Cuts()
    for number in range(trials):
        trial(taken, folder / f"trial-{number}", searches, reference, cuts, rng)
    return cuts
