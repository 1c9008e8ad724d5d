"""Whoever opens a search, and fails in the middle of it, holds nothing afterwards."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from agentmerge import Context, MergeToolkit, load_graph
from agentmerge.errors import LeaseHeld, WorkerLost
from agentmerge.ledger.folder import opened
from agentmerge.ledger.lease import Lease
from agentmerge.session import driving
from agentmerge.session.context import _HELD, _OPEN
from agentmerge.session.preview import preview
from agentmerge.session.replay import replay
from agentmerge.workers.pool import Pool
from tests.session.conftest import config, config_text


def graph_of(context: Context) -> object:
    thread: dict = {"configurable": {"thread_id": str(uuid.uuid4())}}
    return load_graph("search").compile().invoke({}, thread, context=context)


OPENERS: dict[str, Callable[[Path], object]] = {
    "run": lambda runs: driving.run(config(), name="b", runs_dir=runs),
    "resume": lambda runs: driving.resume(
        "a", runs_dir=runs, overrides={"budget.max_evaluations": 24}
    ),
    "branch": lambda runs: driving.branch("a", at=0, runs_dir=runs),
    "a new thread": lambda runs: graph_of(Context(config=config_text(), runs_dir=str(runs))),
    "an old thread": lambda runs: graph_of(Context(run="a", runs_dir=str(runs))),
    "new tools": lambda runs: MergeToolkit(config(), runs_dir=runs),
    "old tools": lambda runs: MergeToolkit(name="a", runs_dir=runs),
    "preview": lambda runs: preview("a", "critic", runs_dir=runs),
    "replay": lambda runs: replay("a", runs_dir=runs),
}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    driving.run(config(budget={"max_evaluations": 8}), name="a", runs_dir=tmp_path)
    return tmp_path


@pytest.mark.parametrize("how", OPENERS)
def test_an_opening_that_fails_gives_all_back(
    runs: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(self: Pool, *_: object, **__: object) -> None:
        raise WorkerLost("no worker can be had")

    monkeypatch.setattr(Pool, "__init__", lost)
    with pytest.raises(WorkerLost):
        OPENERS[how](runs)
    with opened(runs) as ledger:
        rows = ledger.runs()
    assert all(Lease.holder(runs / driving.CHECKPOINTS, row.id) is None for row in rows)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lease-")]
    assert _OPEN == _HELD == {}


def test_who_only_looks_needs_no_lease(runs: Path) -> None:
    with opened(runs) as ledger:
        row = ledger.run("a")
    with Lease.acquire(runs / driving.CHECKPOINTS, row.id):
        assert preview("a", "critic", runs_dir=runs)["messages"]
        assert replay("a", runs_dir=runs).identical
        for how in ("resume", "an old thread", "old tools"):
            with pytest.raises(LeaseHeld):
                OPENERS[how](runs)
