"""What a search takes besides its evaluations, however long it has gone on: threads and reading."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentmerge.ledger import Ledger, book
from agentmerge.ledger.store import Store
from agentmerge.search import advise as advising
from agentmerge.search.search import Search
from agentmerge.session import driving
from agentmerge.testing.scripted import ScriptedServer
from tests.session.conftest import config
from tests.session.test_agents import advised, adviser


@pytest.mark.parametrize("workers", [1, 2])
def test_a_generation_has_one_thread_a_worker(tmp_path: Path, workers: int) -> None:
    before, alive, scoring = threading.active_count(), set[int](), set[int]()

    def look(event: dict) -> None:
        alive.add(threading.active_count())
        if event["event"] == "candidate":
            scoring.add(threading.get_ident())

    asked = config(
        search={"algorithm": "random", "population": 150, "max_generations": 1},
        budget={"max_evaluations": 170},
        worker={"kind": "fake", "count": workers},
        limit=4,
    )
    row = driving.run(asked, name="a", runs_dir=tmp_path, emit=look)
    assert row.status == "done"
    assert len(scoring) <= workers
    assert max(alive) <= before + 2 * workers + 4, "the lease's, the checkpointer's and their like"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Rows that were read from the results database, whatever of: {"rows": n}."""
    found: Counter[str] = Counter()
    for name in ("_rows", "records"):
        plain = getattr(Store, name)

        def counted(store: Store, sql: str, *values: object, plain=plain) -> list:
            rows = plain(store, sql, *values)
            found["rows"] += len(rows)
            return rows

        monkeypatch.setattr(Store, name, counted)
    return found


SEARCHES = {
    "one at a time": {"algorithm": "one_plus_one", "population": 1},
    "generations": {"algorithm": "cma_es", "population": 8},
    "races": {"algorithm": "random", "population": 8, "racing": {"rungs": [0.25, 0.5]}},
    "constraints": {"algorithm": "random", "constraints": [{"task": "*", "max_drop": 0.05}]},
    "items": {"algorithm": "margins", "population": 8},
}


def rows_a_candidate(
    folder: Path, read: Counter, evaluations: int, search: dict
) -> tuple[float, list[float]]:
    """Of a search of two tasks: over all of it, and by tenths of its budget, its end left out."""
    marks, candidates = [(0, read["rows"])], 0
    asked = config(search=search, budget={"max_evaluations": evaluations}, limit=8)

    def look(event: dict) -> None:
        nonlocal candidates
        candidates += event["event"] == "candidate"
        if event["event"] == "generation" and candidates >= evaluations / 10 * len(marks):
            marks.append((candidates, read["rows"]))

    driving.run(asked, name="a", runs_dir=folder, emit=look)
    tenths = [(r - rows) / (c - count) for (count, rows), (c, r) in itertools.pairwise(marks)]
    return read["rows"] / candidates, tenths


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_a_search_of_two_hundred_reads_few_rows_a_candidate(
    tmp_path: Path, read: Counter, search: dict
) -> None:
    whole, _ = rows_a_candidate(tmp_path, read, 200, search)
    most = 20 if "racing" in search else 10  # a race asks in three parts, each with rows of its own
    assert whole < most


def test_a_generation_walks_the_whole_past_as_often_as_the_first_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget is added up as candidates change, and three agents by rules share one view."""
    done: Counter[str] = Counter()

    def count(owner: object, name: str, many: Callable[..., int]) -> None:
        plain = getattr(owner, name)

        def counted(*given: Any, **more: Any) -> Any:
            done[name] += many(*given)
            return plain(*given, **more)

        monkeypatch.setattr(owner, name, counted)

    count(advising, "HistoryView", lambda *_: 1)
    count(Search, "_history_of", lambda *_: 1)
    count(book, "evaluations", lambda candidates: len(candidates))
    search = {"algorithm": "random", "population": 3, "max_generations": 40}
    asked = config(search=search, budget={"max_evaluations": 200}, limit=8)
    driving.run(asked, name="a", runs_dir=tmp_path)
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        candidates = len(ledger.candidates(ledger.run("a").id))
    assert candidates > 120
    assert done["HistoryView"] == 40
    assert done["_history_of"] <= 2 * 40
    assert done["evaluations"] <= 3 * candidates, "as a candidate is written, not as it is asked"


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["accuracy", "perplexity"], indirect=True)
def test_after_two_thousand_candidates_one_reads_what_the_first_did(
    objective: str, tmp_path: Path, read: Counter
) -> None:
    search = {"algorithm": "cma_es", "population": 40}
    _, tenths = rows_a_candidate(tmp_path, read, 2000, search)
    assert len(tenths) > 8
    assert max(tenths) < 10
    assert tenths[-1] < 1.5 * tenths[1]


def test_advised_searches_with_two_arms_read_no_more(
    tmp_path: Path, read: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")
    with ScriptedServer(adviser) as server:
        asked = advised(server, search={"shadow": 0.4}, budget={"max_evaluations": 200})
        driving.run(config(**asked, limit=12), name="a", runs_dir=tmp_path)
    assert read["rows"] < 2000
