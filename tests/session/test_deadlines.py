"""Candidates that never end, and a search whose time is up while one runs."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from agentmerge.errors import RunFailed, UserError
from agentmerge.ledger import Ledger
from agentmerge.session import driving
from agentmerge.session.replay import replay
from tests.session.conftest import config, trace_of

pytestmark = [
    pytest.mark.usefixtures("objective"),
    pytest.mark.parametrize("objective", ["perplexity"], indirect=True),
]


def worker(hang_when: str = "", **more) -> dict:
    from tests.session.conftest import BODY

    options = dict(BODY["worker"]["options"])
    return {"options": options | ({"hang_when": hang_when} if hang_when else {}), **more}


def failures(runs: Path) -> list[str]:
    with Ledger(runs / driving.LEDGER, read_only=True) as ledger:
        found = ledger.candidates(ledger.run("a").id)
    return [c.failure for c in found if c.state == "failed"]


def test_a_candidate_that_never_ends_fails_and_the_search_goes_on(tmp_path: Path) -> None:
    hangs = worker("min_weight>0.9", timeout_s=2.0)  # a uniform merge
    settings = config(worker=hangs, budget={"max_evaluations": 10})
    row = driving.run(settings, name="a", runs_dir=tmp_path)
    assert (row.status, row.stop_reason) == ("done", "budget")
    (late,) = failures(tmp_path)
    assert "not scored within 2 s (worker.timeout_s)" in late
    assert replay("a", runs_dir=tmp_path).identical
    before = trace_of(tmp_path, "a")["candidates"]
    driving.resume("a", runs_dir=tmp_path, overrides={"worker.timeout_s": 1.0})
    assert trace_of(tmp_path, "a")["candidates"] == before


def test_a_limit_that_no_candidate_keeps_is_the_limits_fault(tmp_path: Path) -> None:
    slow = worker(timeout_s=0.2)
    slow["options"] |= {"delay_s": 0.6}
    budget = {"max_evaluations": 5}
    with pytest.raises(RunFailed, match=r"not scored within 0.2 s \(worker.timeout_s\)"):
        driving.run(config(worker=slow, budget=budget), name="a", runs_dir=tmp_path)
    assert failures(tmp_path) == []
    row = driving.resume("a", runs_dir=tmp_path, overrides={"worker.timeout_s": 60.0})
    assert (row.status, failures(tmp_path)) == ("done", [])


@pytest.mark.parametrize("apart", [False, True])
def test_the_searchs_time_ends_what_runs(tmp_path: Path, apart: bool) -> None:
    """What was cut off is not recorded: a resume ends as if nothing had been."""
    budget = {"max_evaluations": 9}
    settings = config(
        worker=worker("mean_weight>0.8", **({"timeout_s": 600.0} if apart else {})),
        budget=budget | {"timeout_s": 8.0 if apart else 1.5},
    )
    began = time.monotonic()
    row = driving.run(settings, name="a", runs_dir=tmp_path)
    assert time.monotonic() - began < 30  # on a busy machine; it would be for ever
    assert (row.status, row.stop_reason) == ("done", "timeout")
    assert failures(tmp_path) == []
    assert replay("a", runs_dir=tmp_path).identical
    with Ledger(tmp_path / driving.LEDGER) as ledger:  # whatever made it hang is mended
        run = ledger.run("a")
        ledger.update_run(run.id, config=run.config.replace("hang_when: mean_weight>0.8", ""))
    later = driving.resume("a", runs_dir=tmp_path, overrides={"budget.timeout_s": 600.0})
    assert later.stop_reason == "budget"
    driving.run(config(budget=budget), name="calm", runs_dir=tmp_path / "calm")
    mine, calm = trace_of(tmp_path, "a"), trace_of(tmp_path / "calm", "calm")
    assert mine["candidates"] == calm["candidates"]


def test_the_end_is_cut_off_too_and_resume_asks_it(tmp_path: Path, monkeypatch) -> None:
    """Sealed items that take longer than the time that is left."""
    from agentmerge.search import finish as finishing
    from agentmerge.search.search import Search

    seconds: list[float] = []
    whole = finishing.finish

    def finish(search: Search, stop_reason: str):
        if search.pool._free[0].worker._delay_s == 0.0:  # as if these were the longest items
            search.pool._free[0].worker._delay_s = 3600.0
            search.pool._deadlines.ends = ends = time.monotonic() + 0.5
            search = replace(search, seconds_left=lambda: ends - time.monotonic())
        began = time.monotonic()
        try:
            return whole(search, stop_reason)
        finally:
            seconds.append(time.monotonic() - began)

    monkeypatch.setattr(finishing, "finish", finish)
    settings = config(budget={"max_evaluations": 8, "timeout_s": 600.0})
    row = driving.run(settings, name="a", runs_dir=tmp_path)
    assert seconds[0] < 20
    assert row.result is not None
    assert not row.result["sealed"]
    assert any("sealed items were not asked; resume asks them" in n for n in row.result["notes"])
    monkeypatch.setattr(finishing, "finish", whole)
    row = driving.resume("a", runs_dir=tmp_path)
    assert row.result is not None
    assert row.result["sealed"]


def test_only_a_resume_may_shorten_it() -> None:
    with pytest.raises(UserError, match=r"worker\.timeout_s"):
        config(worker={"timeout_s": 0})


def test_a_resume_begins_with_the_slowest_of_before(tmp_path: Path) -> None:
    """By default a candidate's limit is a multiple of what the slowest took, here or before."""
    slow = worker()
    slow["options"] |= {"delay_s": 0.05}
    driving.run(config(worker=slow, budget={"max_evaluations": 8}), name="a", runs_dir=tmp_path)
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        run = ledger.run("a").id
        took = [c.seconds for c in ledger.candidates(run) if c.score is not None]
        assert ledger.slowest_s(run) == max(t for t in took if t is not None) >= 0.05
        assert ledger.slowest_s("no such run") == 0.0
