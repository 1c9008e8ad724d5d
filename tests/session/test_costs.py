"""What a search takes besides its evaluations, however long it has gone on: threads and reading."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from agentmerge import session
from tests.session.conftest import config


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
    row = session.run(asked, name="a", runs_dir=tmp_path, emit=look)
    assert row.status == "done"
    assert len(scoring) <= workers
    assert max(alive) <= before + workers + 4, "the lease's, the checkpointer's and their like"
