"""What was paid for is kept, under a key made of everything that can change an answer."""

from __future__ import annotations

import sqlite3
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agentmerge.contracts.calls import Call
from agentmerge.contracts.strategy import Proposal
from agentmerge.contracts.worker import EngineInfo, ItemRef, ItemResult
from agentmerge.errors import LedgerError, NotFound
from agentmerge.ledger import Ledger, ResultKey, RunRow, pack, unpack

ENGINE = EngineInfo("hf", "1", "cpu", "float32", "64")
KEY = ResultKey("recipe", ENGINE, "protocol")
ITEMS = [ItemRef("task", i, f"{i:016x}") for i in range(8)]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    with Ledger(tmp_path / "l.sqlite") as found:
        yield found


def row(run_id: str = "r", name: str = "name") -> RunRow:
    return RunRow(run_id, name, 1.0, "new", "", "", "s", 0, "random", None, None, {}, None)


def results(count: int, seed: int = 0) -> list[ItemResult]:
    rng = np.random.default_rng(seed)
    return [
        ItemResult(
            float(rng.random() < 0.6),
            float(np.float32(-rng.gamma(2.0, 3.0))),
            float(np.float16(rng.normal(0, 3))),
            bool(rng.random() < 0.1),
            bool(rng.random() < 0.1),
        )
        for _ in range(count)
    ]


def test_values_come_back_exactly() -> None:
    odd = [
        ItemResult(1 / 3),
        ItemResult(-1e300, -123.45600128173828, 2.5, True, True),
        ItemResult(0.0, 0.0, -0.0),
        ItemResult(1.0, None, 7e4),
    ]
    back = unpack(pack(odd))
    assert back[:3] == odd[:3]
    assert back[3].margin == pytest.approx(6e4, rel=1e-3), "margins are clipped to their format"
    assert unpack(pack(results(500))) == results(500)
    counted = [ItemResult(1.0, tokens=0), ItemResult(0.0), ItemResult(1.0, tokens=70_000)]
    assert unpack(pack(counted)) == counted
    assert not any(result.tokens is not None for result in unpack(pack(odd))), "as older ones are"
    assert len(pack(counted[1:2])) < len(pack(counted[:1])), "nothing more where nobody counted"


def test_answers_are_asked_again_for_their_length_alone(tmp_path: Path) -> None:
    """A result of before tokens were counted is replaced by one that has them, and no other is."""
    key = ResultKey("r", EngineInfo("hf", "1", "cpu", "float32", "64"), "protocol")
    items = [ItemRef("task", i, f"{i:016x}") for i in range(3)]
    with Ledger(tmp_path / "l.sqlite") as ledger:
        ledger.save_results(key, "task", items, [ItemResult(1.0)] * 3)
        counted = [ItemResult(1.0, tokens=i) for i in range(3)]
        said = [replace(result, answers=("so",), reasons=("why",)) for result in counted]
        ledger.save_results(key, "task", items, said)  # older searches' agents never read it
        ledger.save_results(key, "task", items, [ItemResult(0.0, tokens=9)] * 3)
        ledger.save_results(key, "task", items[:2], [ItemResult(0.0)] * 2)
        assert list(ledger.results(key).values()) == counted


def test_about_six_bytes_an_item() -> None:
    assert len(pack(results(1000))) / 1000 < 7.0


@pytest.mark.parametrize(
    "other",
    [
        *[
            replace(KEY, engine=replace(ENGINE, **{field: value}))
            for field, value in {
                "engine": "vllm",
                "version": "2",
                "device": "cuda",
                "dtype": "bfloat16",
                "batch_size": "1",
                "tensor_parallel": 2,
                "scoring": "fast",
            }.items()
        ],
        replace(KEY, recipe_hash="another"),
        replace(KEY, protocol_hash="another"),
    ],
)
def test_a_different_key_never_hits(ledger: Ledger, other: ResultKey) -> None:
    ledger.save_results(KEY, "task", ITEMS, results(8))
    assert ledger.results(other) == {}
    assert len(ledger.results(KEY)) == 8


def test_subsets_and_rungs_share(ledger: Ledger) -> None:
    values = results(8)
    ledger.save_results(KEY, "task", ITEMS[:3], values[:3])
    ledger.save_results(KEY, "task", ITEMS[3:], values[3:])
    assert ledger.results(KEY) == {i.key: v for i, v in zip(ITEMS, values, strict=True)}


def test_writing_twice_changes_nothing(ledger: Ledger) -> None:
    ledger.add_run(row())
    proposals = [
        (Proposal((0.1,), "random"), "h1", "y1", ""),
        (Proposal((0.2,), "x"), "h2", "", ""),
    ]
    ledger.add_candidates("r", 0, proposals)
    ledger.save_evaluation("r", (0, 0), score=0.5, tasks=[("t", 0.5)])
    before = ledger.candidates("r")
    ledger.add_candidates("r", 0, proposals)
    ledger.save_evaluation("r", (0, 0), score=0.9)
    assert ledger.candidates("r") == before
    assert ledger.candidate("r", 0, 0).score == 0.5


def test_a_merge_is_paid_for_once(ledger: Ledger) -> None:
    ledger.add_run(row())
    same = (Proposal((0.1,), "random"), "h1", "y1", "")
    ledger.add_candidates("r", 0, [same, same])
    ledger.add_candidates("r", 1, [same])
    states = [(c.generation, c.slot, c.state, c.twin) for c in ledger.candidates("r")]
    assert states == [(0, 0, "open", None), (0, 1, "twin", (0, 0)), (1, 0, "twin", (0, 0))]
    ledger.save_evaluation("r", (0, 0), score=0.7, tasks=[("t", 0.7)])
    assert [c.score for c in ledger.candidates("r")] == [0.7, 0.7, 0.7]
    assert [o.score for o in ledger.history("r")] == [0.7, 0.7, 0.7]


def test_a_score_and_its_items_are_written_together(ledger: Ledger, tmp_path: Path) -> None:
    ledger.add_run(row())
    ledger.add_candidates("r", 0, [(Proposal((0.1,), "random"), "recipe", "y", "")])
    blocker = sqlite3.connect(tmp_path / "l.sqlite", isolation_level=None)
    blocker.execute(
        "CREATE TRIGGER stop BEFORE UPDATE ON candidates BEGIN SELECT RAISE(ABORT, 'full'); END"
    )
    blocker.close()
    paid = [(KEY, "task", ITEMS, results(8))]
    with pytest.raises(LedgerError, match="cannot be written"):
        ledger.save_evaluation("r", (0, 0), score=0.5, results=paid)
    assert ledger.results(KEY) == {}
    assert ledger.candidate("r", 0, 0).state == "open"


def test_a_full_disk_loses_nothing_saved(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite") as ledger:
        ledger.save_results(KEY, "task", ITEMS, results(8))
        pages = ledger._conn.execute("PRAGMA page_count").fetchone()[0]
        ledger._conn.execute(f"PRAGMA max_page_count = {pages}")
        items = [ItemRef("task", i, f"{i:016x}") for i in range(5000)]
        with pytest.raises(LedgerError, match=r"full.*free the disk"):
            ledger.save_results(replace(KEY, recipe_hash="b"), "task", items, results(5000))
        assert len(ledger.results(KEY)) == 8


def test_a_locked_database_is_waited_for_and_then_said(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    with Ledger(path, busy_timeout_s=0.2) as ledger:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerError, match="locked"):
            ledger.add_run(row())
        other.rollback()
        other.close()
        ledger.add_run(row())
        assert ledger.run("name").id == "r"


def test_what_is_no_database_is_said(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    path.write_bytes(b"not a database, surely" * 100)
    with pytest.raises(LedgerError, match="cannot be opened"):
        Ledger(path)


def test_many_threads_write_at_once(ledger: Ledger) -> None:
    ledger.add_run(row())
    proposals = [(Proposal((i / 50,), "random"), f"h{i}", "y", "") for i in range(50)]
    ledger.add_candidates("r", 0, proposals)

    def score(slot: int) -> None:
        key = replace(KEY, recipe_hash=f"h{slot}")
        paid = [(key, "task", ITEMS, results(8, slot))]
        ledger.save_evaluation("r", (0, slot), score=float(slot), results=paid)

    threads = [threading.Thread(target=score, args=(slot,)) for slot in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [c.score for c in ledger.candidates("r")] == [float(s) for s in range(50)]
    assert ledger.results(replace(KEY, recipe_hash="h7")) == {
        i.key: v for i, v in zip(ITEMS, results(8, 7), strict=True)
    }


def test_a_call_that_was_paid_for_is_there(ledger: Ledger) -> None:
    asked = [{"role": "user", "content": "?"}]
    cost = {"tokens_in": 10, "tokens_out": 3, "latency_s": 0.1}
    yes = Call(asked, "answered", "text", "yes", **cost)
    refused = Call(asked, "failed", "text", error="401", **cost)
    for prompt, call in (("p", yes), ("p", replace(yes, reply="no")), ("q", refused)):
        ledger.save_call("r", 1, "critic", prompt, 0, call, model="m", prompt_file="f")
    assert ledger.call("r", 1, "critic", "p") == yes
    assert ledger.call("r", 1, "critic", "other") is None
    totals = ledger.call_totals("r")
    assert totals == {
        "calls": 2, "failures": 1, "tokens_in": 20, "tokens_out": 6, "cost_usd": None, "unpriced": 1
    }  # fmt: skip


def test_an_unknown_run_names_those_there_are(ledger: Ledger) -> None:
    ledger.add_run(row())
    with pytest.raises(NotFound, match=r"no run called .x..*name"):
        ledger.run("x")
    for n in range(10):
        ledger.add_run(replace(row(), id=f"r-{n}", name=f"search-{n}"))
    shown = r"there are: name, search-2, .*search-9 and 2 more \(`agentmerge list`\)"
    with pytest.raises(NotFound, match=shown):
        ledger.run("nmae")
