"""What workers do is one fold over a search's log: live, watched, shown and read by programs."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from agentmerge.cli.render import summary_text
from agentmerge.config import SearchConfig
from agentmerge.contracts.events import Begun, Ending, Evaluate, Evaluated, parsed
from agentmerge.ledger import Ledger
from agentmerge.ledger.lease import Lease
from agentmerge.report.board import Board, Follower
from agentmerge.report.summary import run_summary
from agentmerge.report.utilisation import LOG, Workers, WorkersLog, workers_of
from agentmerge.session import driving
from agentmerge.ui.live import Live
from agentmerge.ui.views import search as page_of
from tests.session.conftest import config_text


def begun(workers: int = 2) -> Begun:
    return Begun(run="a", status="new", advisers=[], workers=workers)


def evaluate(slot: int, worker: int | None, waiting: int = 0) -> Evaluate:
    return Evaluate(generation=1, slot=slot, worker=worker, waiting=waiting)


def ended(slot: int) -> Evaluated:
    return Evaluated(generation=1, slot=slot, operator="random", label="", score=0.5)


def test_the_share_of_time_used_counts_sessions_and_what_workers_are_at() -> None:
    found = Workers()
    for event, at in [
        (begun(), 95.0), (evaluate(0, 1, 2), 100.0), (evaluate(1, 2, 1), 100.0),
        (ended(0), 104.0), (evaluate(2, 1), 106.0),
    ]:  # fmt: skip
        found.tell(event, at)
    assert found.sentence(110.0) == "workers: 2 of 2 at work, 90 % of their time used"
    each = found.to_json(110.0)["each"]
    assert [(w["candidate"], w["for_s"], w["candidates"]) for w in each] == [
        ([1, 2], 4.0, 1), ([1, 1], 10.0, 0),
    ]  # fmt: skip
    found.tell(ended(1), 110.0)  # the other one is killed with its search
    found.tell(begun(4), 5_000.0)  # and goes on an hour later, with more workers
    assert found.used() == pytest.approx(14 / 20)
    assert found.to_json(5_000.0)["at_work"] == 0
    found.tell(evaluate(2, 3), 5_000.0)
    found.tell(ended(2), 5_005.0)
    found.tell(Ending(reason="budget"), 5_010.0)
    assert found.used() == pytest.approx(19 / 40)
    assert found.sentence() == "4 workers, 48 % of their time used"


def test_a_candidate_that_went_to_another_worker_counts_although_its_first_one_goes_on() -> None:
    found = Workers()
    for event, at in [
        (begun(), 10.0), (evaluate(0, 1), 10.0), (evaluate(1, 2), 10.0), (ended(1), 14.0),
        (evaluate(2, 1), 16.0),  # 0 is on the second by now
    ]:  # fmt: skip
        found.tell(event, at)
    assert found.to_json(18.0)["at_work"] == 2
    found.tell(ended(2), 18.0)
    found.tell(ended(0), 20.0)
    assert found.used() == pytest.approx(16 / 20)
    assert found.done.total() == 3


def test_a_log_of_before_or_torn_or_of_anybody_says_nothing_and_hurts_nobody(
    tmp_path: Path,
) -> None:
    path = tmp_path / LOG
    assert WorkersLog(path).read().used() is None
    lines = [json.dumps({"time": 1.0} | evaluate(0, None).to_json()), '{"event": "evaluate", "ti',
             '{"event": "evaluate"}', '{"event": "start", "workers": 1e99, "time": 1}',
             '{"time": NaN, "event": "evaluate", "generation": 0, "slot": 0, "worker": 1}',
             '{"time": 1, "event": "evaluate", "generation": 0, "slot": 0, "worker": 1e9}',
             '{"time": 1, "event": "evaluate", "generation": 0, "slot": 0, "worker": [1]}',
             '{"time": 1, "event": "evaluate", "generation": [1], "slot": 0, "worker": 1}',
             f'{{"time": 1{"0" * 400}, "event": "evaluate", "generation": 0, "slot": 0}}',
             '["event": "evaluate"]', "[" * 9_000 + '"event": "evaluate"', "\x00"]  # fmt: skip
    path.write_text("\n".join(lines))
    assert WorkersLog(path).read() == Workers()
    path.unlink()
    path.mkdir()
    assert WorkersLog(path).read() == Workers()


def test_a_listener_is_told_of_one_thing_at_a_time_in_the_logs_order(tmp_path: Path) -> None:
    body = yaml.safe_load(config_text(search={"algorithm": "random", "population": 8}))
    body["worker"] |= {"count": 4, "host": "process"}
    config = SearchConfig.from_text(yaml.safe_dump(body | {"budget": {"max_evaluations": 16}}))
    told, crowds, listening = list[dict[str, Any]](), list[str](), threading.Lock()

    def emit(body: dict[str, Any]) -> None:
        if not listening.acquire(blocking=False):
            crowds.append(body["event"])
            return
        told.append(body)
        time.sleep(0.01)  # a listener that takes its time, as a terminal does
        listening.release()

    driving.run(config, name="a", runs_dir=tmp_path, emit=emit)
    assert crowds == []
    lines = (tmp_path / "a" / LOG).read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == [body["event"] for body in told]


def test_a_listener_that_is_busy_hears_of_a_stop_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentmerge.ledger.lease._LISTEN_EVERY_S", 0.01)
    config = SearchConfig.from_text(config_text())
    heard: list[str] = []

    def emit(body: dict[str, Any]) -> None:
        heard.append(body.get("text") or body["event"])
        if body["event"] == "candidate" and "busy" not in heard:
            heard.append("busy")
            with Ledger(tmp_path / driving.LEDGER) as ledger:
                Lease.ask_to_stop(tmp_path / driving.CHECKPOINTS, ledger.run("a").id, "a")
            time.sleep(0.5)
            heard.append("free")

    row = driving.run(config, name="a", runs_dir=tmp_path, emit=emit)
    assert row.status == "interrupted"
    assert heard.index("free") == heard.index("busy") + 1
    assert any(text.startswith("asked to stop") for text in heard)


def test_driver_watcher_show_and_page_say_the_same_of_workers(tmp_path: Path) -> None:
    body = yaml.safe_load(config_text(search={"algorithm": "random", "population": 6}))
    body["worker"] |= {"count": 2, "host": "process"}
    body["worker"]["options"]["delay_s"] = 0.002
    config = SearchConfig.from_text(yaml.safe_dump(body | {"budget": {"max_evaluations": 24}}))
    driver, said = Board(config, tmp_path), list[str]()

    def emit(body: dict[str, Any]) -> None:
        driver.tell(parsed(body))
        said.append(driver.workers.sentence(time.time()))

    row = driving.run(config, name="a", runs_dir=tmp_path, emit=emit)
    assert any(line.startswith("workers: 2 of 2 at work, ") for line in said)
    assert any(" waiting, " in line for line in said)
    with Ledger(tmp_path / driving.LEDGER, read_only=True) as ledger:
        shown = run_summary(ledger, row) | workers_of(ledger, row, running=False)
        page = page_of(ledger, row)
        watcher = Board(config, tmp_path)
        for event in Follower(ledger, row).news():
            watcher.tell(event)
    told = shown["workers"]
    assert told["number"] == 2
    assert sum(w["candidates"] for w in told["each"]) == 24
    assert told["at_work"] == told["waiting"] == 0
    assert 0 < told["used"] <= 1
    assert page["workers"] == told
    assert watcher.workers == driver.workers
    assert told["sentence"] in summary_text(shown)
    assert Live(tmp_path).look("a")["workers_now"] == told["sentence"] == driver.workers.sentence()
