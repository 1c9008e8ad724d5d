"""Searches whose checkpoints an older graph saved go on from their ledgers, to the same end.

``tests/data/graph-1.sql`` holds the last checkpoints of two searches as version 1 saved them, which
sent each candidate to a node of its own: one was killed in generation 2, one waits for an answer.
"""

from __future__ import annotations

import sqlite3
import uuid
from contextlib import closing
from pathlib import Path

import pytest

from agentmerge.errors import RunFailed
from agentmerge.ledger import Ledger, RunRow
from agentmerge.ledger.words import openings
from agentmerge.preflight.graphs import load_graph
from agentmerge.search.state import GRAPH_VERSION
from agentmerge.session import driving
from agentmerge.session.checkpoints import open_saver
from agentmerge.session.context import Context
from agentmerge.testing.scripted import ScriptedServer
from tests.session.conftest import config, trace_of
from tests.session.test_agents import advised
from tests.session.test_structure import mover

SAVED = Path(__file__).parents[1] / "data" / "graph-1.sql"
KILLED, WAITING = (f"00000000-0000-4000-8000-00000000000{n}" for n in (1, 2))


class PowerCut(BaseException):
    """Nobody catches it."""


def checkpoints_of_version_1(runs_dir: Path) -> None:
    """In the place of what this version saved."""
    with closing(sqlite3.connect(runs_dir / driving.CHECKPOINTS)) as conn, conn:
        conn.executescript("DELETE FROM writes; DELETE FROM checkpoints; DELETE FROM leases;")
        conn.executescript(SAVED.read_text())


@pytest.fixture
def killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The runs directory of a search that was killed after 18 candidates, as version 1 left it."""
    scored: list[dict] = []

    def cut(event: dict) -> None:
        scored.extend([event] if event["event"] == "candidate" else [])
        if len(scored) == 18:
            raise PowerCut

    monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(KILLED))
    with pytest.raises(PowerCut):
        driving.run(config(), name="a", runs_dir=tmp_path, emit=cut)
    monkeypatch.undo()
    checkpoints_of_version_1(tmp_path)
    return tmp_path


def test_a_killed_search_of_version_1_ends_as_if_never_killed(killed: Path) -> None:
    events: list[dict] = []
    row = driving.resume("a", runs_dir=killed, emit=events.append)
    assert (row.id, row.status, row.stop_reason) == (KILLED, "done", "budget")
    assert sum(e["event"] == "evaluate" for e in events) == 34 - 18, "none is paid for again"
    driving.run(config(), name="a", runs_dir=killed / "calm")
    assert trace_of(killed, "a") == trace_of(killed / "calm", "a")


@pytest.mark.parametrize("begin", [None, {}])
def test_a_servers_thread_of_version_1_goes_on(killed: Path, begin: dict | None) -> None:
    """Also with ``None``: from the checkpoint, whose next step sends candidates to ``evaluate``."""
    thread = {"configurable": {"thread_id": KILLED}}
    with open_saver(killed / driving.CHECKPOINTS) as saver:
        graph = load_graph("search").compile(checkpointer=saver)
        assert graph.get_state(thread).next == ("evaluate",) * 5
        ended = graph.invoke(begin, thread, context=Context(runs_dir=str(killed)))
    assert ended["status"] == "done"
    driving.run(config(), name="a", runs_dir=killed / "calm")
    assert trace_of(killed, "a") == trace_of(killed / "calm", "a")


def test_a_question_of_version_1_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")
    with ScriptedServer(mover(("method", "ties"))) as server:
        sections = advised(server, search={"approve": True}) | {"budget": {"max_evaluations": 50}}

        def asked(runs_dir: Path) -> RunRow:
            monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(WAITING))
            row = driving.run(config(**sections), name="a", runs_dir=runs_dir)
            monkeypatch.undo()
            monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")
            return row

        assert asked(tmp_path).status == "waiting"
        checkpoints_of_version_1(tmp_path)
        assert driving.resume("a", runs_dir=tmp_path).status == "waiting", "no answer: it waits on"
        checkpoints_of_version_1(tmp_path)
        driving.resume("a", runs_dir=tmp_path, answer=False)
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        found = openings(ledger.advice(WAITING))
    assert [o.refusal for o in found][:1] == ["you said no"]


def test_what_a_newer_graph_saved_is_refused(killed: Path) -> None:
    with open_saver(killed / driving.CHECKPOINTS) as saver:
        graph = load_graph("search").compile(checkpointer=saver)
        thread = {"configurable": {"thread_id": KILLED}}
        graph.update_state(thread, {"graph_version": GRAPH_VERSION + 1}, as_node="select")
    with pytest.raises(RunFailed, match=rf"version {GRAPH_VERSION + 1}.*agentmerge branch a"):
        driving.resume("a", runs_dir=killed)
