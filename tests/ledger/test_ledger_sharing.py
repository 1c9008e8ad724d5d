"""Many hands on one results database: processes, kills, read-only disks, branches."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmerge.contracts.strategy import Proposal
from agentmerge.contracts.worker import EngineInfo, ItemRef, ItemResult
from agentmerge.errors import LedgerError, NotFound, UserError
from agentmerge.ledger import Ledger, ResultKey, RunRow, pack, unpack

KEY = ResultKey("recipe", EngineInfo("hf", "1", "cpu", "float32", "64"), "protocol")
ITEMS = [ItemRef("task", i, f"{i:016x}") for i in range(6)]

#: Scores candidates START..END of run "r" with results of their own, one transaction each.
WRITER = """
import sys
from dataclasses import replace
from agentmerge.ledger import Ledger
from agentmerge.contracts.worker import ItemResult
from tests.ledger.test_ledger_sharing import ITEMS, KEY
path, start, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with Ledger(path) as ledger:
    for slot in range(start, end):
        results = [ItemResult(float(slot), -1.0, 0.5) for _ in ITEMS]
        paid = [(replace(KEY, recipe_hash=f"h{slot}"), "task", ITEMS, results)]
        ledger.save_evaluation("r", (0, slot), score=float(slot), results=paid)
        print(slot, flush=True)
"""


def row(run_id: str = "r", name: str = "name") -> RunRow:
    return RunRow(run_id, name, 1.0, "new", "", "", "s", 0, "random", None, None, {}, None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "l.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger(path) as found:
        found.add_run(row())
        yield found


def proposals(count: int, start: int = 0) -> list[tuple[Proposal, str, str, str]]:
    return [
        (Proposal((i / 100,), "random"), f"h{i}", f"recipe {i}", "")
        for i in range(start, start + count)
    ]


def writer(path: Path, start: int, end: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(start), str(end)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_write_at_once(ledger: Ledger, path: Path) -> None:
    ledger.add_candidates("r", 0, proposals(60))
    writers = [writer(path, 0, 30), writer(path, 30, 60)]
    for process in writers:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    assert [c.score for c in ledger.candidates("r")] == [float(slot) for slot in range(60)]
    for slot in (0, 29, 30, 59):
        kept = ledger.results(replace(KEY, recipe_hash=f"h{slot}"))
        assert {result.value for result in kept.values()} == {float(slot)}
        assert set(kept) == {item.key for item in ITEMS}


def test_a_killed_writer_leaves_whole_candidates_only(ledger: Ledger, path: Path) -> None:
    ledger.add_candidates("r", 0, proposals(400))
    process = writer(path, 0, 400)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 20:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    scored = [c for c in ledger.candidates("r") if c.state == "scored"]
    assert 20 < len(scored) < 400
    for candidate in ledger.candidates("r"):
        kept = ledger.results(replace(KEY, recipe_hash=candidate.recipe_hash))
        assert len(kept) == (len(ITEMS) if candidate.state == "scored" else 0)
    ledger.save_evaluation("r", (0, 399), score=1.0)  # the lock died with its process
    assert ledger.candidate("r", 0, 399).score == 1.0


def test_a_short_lock_is_waited_for(ledger: Ledger, path: Path) -> None:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    process = writer(path, 0, 0)  # opening needs the lock for a moment, too
    time.sleep(0.3)
    other.rollback()
    other.close()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err


def test_a_database_that_cannot_be_written_says_so_and_keeps_what_it_has(
    ledger: Ledger, path: Path
) -> None:
    ledger.save_results(KEY, "task", ITEMS, [ItemResult(1.0)] * 6)
    ledger._conn.execute("PRAGMA query_only = ON")  # as a disk that turned read-only does
    with pytest.raises(LedgerError, match="readonly") as caught:
        ledger.save_results(replace(KEY, recipe_hash="b"), "task", ITEMS, [ItemResult(0.0)] * 6)
    assert str(path) in str(caught.value)
    with pytest.raises(LedgerError):
        ledger.add_candidates("r", 0, proposals(1))
    with Ledger(path) as again:
        assert len(again.results(KEY)) == 6
        assert again.results(replace(KEY, recipe_hash="b")) == {}
        assert again.candidates("r") == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(LedgerError, match="cannot be opened"):
            Ledger(tmp_path / "new" / "l.sqlite")
    finally:
        tmp_path.chmod(0o700)


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(LedgerError, match="cannot be opened"):
        Ledger(tmp_path / "runs" / "l.sqlite")


def test_closed_and_opened_again_it_is_the_same(ledger: Ledger, path: Path) -> None:
    ledger.add_candidates("r", 0, proposals(3))
    results = [ItemResult(0.1 * i, -float(i), 0.25 * i, i % 2 == 0) for i in range(6)]
    ledger.save_results(KEY, "task", ITEMS, results)
    ledger.save_advice("r", 0, "critic", {"guidance": {"critique": "näh"}, "failure": ""})
    ledger.close()
    with Ledger(path) as again:
        assert again.results(KEY) == {
            item.key: result for item, result in zip(ITEMS, again_floats(results), strict=True)
        }
        assert [c.label for c in again.candidates("r")] == ["", "", ""]
        assert again.recipe("h2") == "recipe 2"
        assert again.advice("r")[0]["guidance"] == {"critique": "näh"}
    with pytest.raises(LedgerError, match="cannot be read"):
        ledger.runs()


def again_floats(results: list[ItemResult]) -> list[ItemResult]:
    """What the packed formats keep of them: these numbers have no more digits than that."""
    return unpack(pack(results))


numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(
    st.lists(
        st.builds(
            ItemResult,
            st.floats(allow_nan=False, allow_infinity=False),
            st.none() | numbers,
            st.none() | st.floats(-6e4, 6e4, width=16),
            st.booleans(),
            st.booleans(),
        ),
        max_size=40,
    )
)
@settings(max_examples=60, deadline=None)
def test_any_results_come_back_as_they_were(results: list[ItemResult]) -> None:
    assert unpack(pack(results)) == results


def test_results_of_overlapping_item_sets_are_one_answer_an_item(ledger: Ledger) -> None:
    one = [ItemResult(float(i)) for i in range(6)]
    ledger.save_results(KEY, "task", ITEMS[:4], one[:4])
    ledger.save_results(KEY, "task", ITEMS[2:], one[2:])
    ledger.save_results(KEY, "task", ITEMS[:4], [ItemResult(99.0)] * 4)  # the same set again
    kept = ledger.results(KEY)
    assert [kept[item.key].value for item in ITEMS] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_refused_candidate_is_neither_open_nor_a_twin(ledger: Ledger) -> None:
    refused = (Proposal((0.5,), "random"), "refused-0-0", "", "weights cancel")
    ledger.add_candidates("r", 0, [refused, *proposals(1)])
    first, second = ledger.candidates("r")
    assert (first.state, first.failure, first.score) == ("failed", "weights cancel", None)
    assert second.state == "open"
    assert [o.failure for o in ledger.history("r")] == ["weights cancel"]


def test_twins_of_a_failure_fail_and_other_runs_have_no_twins(ledger: Ledger) -> None:
    ledger.add_run(row("q", "other"))
    same = proposals(1)
    ledger.add_candidates("r", 0, [*same, *same])
    ledger.add_candidates("q", 0, same)
    ledger.save_evaluation("r", (0, 0), score=None, failure="out of memory")
    twin = ledger.candidate("r", 0, 1)
    assert (twin.state, twin.twin, twin.failure) == ("twin", (0, 0), "out of memory")
    assert ledger.candidate("q", 0, 0).state == "open"


def test_a_branch_copies_the_past_and_leaves_it_alone(ledger: Ledger) -> None:
    ledger.add_run(row("b", "branch"))
    for generation in range(3):
        ledger.add_candidates("r", generation, proposals(2, 10 * generation))
        for slot in range(2):
            ledger.save_evaluation("r", (generation, slot), score=float(generation))
        ledger.save_advice("r", generation, "critic", {"guidance": {}, "failure": ""})
    before = ledger.candidates("r")
    ledger.copy_past("r", "b", 1, prior=False)
    ledger.copy_past("r", "b", 1, prior=False)  # a step that runs twice
    assert ledger.candidates("b") == [c for c in before if c.generation <= 1]
    assert [word["generation"] for word in ledger.advice("b")] == [0, 1]
    ledger.add_candidates("b", 2, proposals(1, 10))
    assert ledger.candidate("b", 2, 0).state == "twin"
    assert ledger.candidates("r") == before


def test_a_past_of_other_settings_is_known_and_never_a_twin(ledger: Ledger) -> None:
    ledger.add_run(row("b", "branch"))
    ledger.add_candidates("r", 0, proposals(1))
    ledger.save_evaluation("r", (0, 0), score=0.5)
    ledger.copy_past("r", "b", 0, prior=True)
    ledger.add_candidates("b", 1, proposals(1))
    old, new = ledger.candidates("b")
    assert old.prior
    assert [o.score for o in ledger.history("b")] == [0.5]
    assert (new.state, new.prior) == ("open", False)


def test_advice_is_said_once_and_found_by_generation(ledger: Ledger) -> None:
    ledger.save_advice("r", 0, "proposer", {"guidance": {"thought": "first"}, "failure": ""})
    ledger.save_advice("r", 0, "proposer", {"guidance": {"thought": "second"}, "failure": ""})
    ledger.save_advice("r", 1, "critic", {"guidance": {}, "failure": "401"})
    assert ledger.advice("r", 0)[0]["guidance"]["thought"] == "first"
    assert [(w["generation"], w["role"]) for w in ledger.advice("r")] == [
        (0, "proposer"),
        (1, "critic"),
    ]
    assert ledger.advice("other") == []


def test_what_does_not_exist_is_not_found(ledger: Ledger) -> None:
    with pytest.raises(NotFound, match="no recipe nothing"):
        ledger.recipe("nothing")
    with pytest.raises(NotFound, match=r"no candidate 3\.1"):
        ledger.candidate("r", 3, 1)
    with pytest.raises(UserError, match="choose another name"):
        ledger.add_run(row())


LOOKS_ON = """
import sqlite3, sys
from pathlib import Path
from agentmerge.ledger import Ledger

class Hook:
    def find_spec(self, name, path=None, target=None):
        if name == "sqlite_utils":
            conn = sqlite3.connect(sys.argv[1], timeout=0)
            conn.execute("BEGIN IMMEDIATE")
            conn.close()
            print("free", flush=True)

sys.meta_path.insert(0, Hook())
Ledger(Path(sys.argv[1])).close()
"""


def test_nobody_waits_for_a_lock_while_another_imports(tmp_path: Path) -> None:
    """Ten searches that begin at once on a busy machine would wait for ten imports in turn."""
    where = [sys.executable, "-c", LOOKS_ON, str(tmp_path / "agentmerge.sqlite")]
    found = subprocess.run(where, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "free\n"), found.stderr
