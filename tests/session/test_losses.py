"""A candidate that loses workers is a failed candidate; a machine that loses them ends the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentmerge.errors import NoWorker, WorkerLost
from agentmerge.ledger import Ledger
from agentmerge.session import driving
from agentmerge.workers.fake import FakeWorker
from tests.session.conftest import config

BUDGET = {"max_evaluations": 18}


def candidates(folder: Path) -> list:
    with Ledger(folder / driving.LEDGER) as ledger:
        return ledger.candidates(ledger.run("a").id)


def test_a_candidate_that_loses_two_workers_is_a_failed_one(tmp_path: Path) -> None:
    options = {"die_when": "mean_weight>0.7"}  # wide uniform merges
    row = driving.run(
        config(budget=BUDGET, worker={"options": options}), name="a", runs_dir=tmp_path
    )
    found = candidates(tmp_path)
    assert (row.status, row.stop_reason) == ("done", "budget")
    assert row.result["answer"]["sealed_score"] is not None
    lost = [c for c in found if "died at load" in c.failure]
    assert lost
    assert all(c.state == "failed" for c in lost)
    assert sum(c.cost for c in found) == 18


@pytest.mark.parametrize("count", [1, 2], ids=["in this process", "apart"])
def test_where_all_die_the_run_ends_and_a_resume_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    dead = {"worker": {"count": count, "options": {"die_when": "max_weight<9"}}}
    with pytest.raises(WorkerLost, match="died at load"):
        driving.run(config(budget=BUDGET, **dead), name="a", runs_dir=tmp_path)
    assert all(c.state == "open" for c in candidates(tmp_path)), "a broken machine fails nobody"
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        row = ledger.run("a")
        ledger.update_run(row.id, config=row.config.replace("max_weight<9", "max_weight>9"))
    assert driving.resume("a", runs_dir=tmp_path).status == "done"
    assert all(c.score is not None for c in candidates(tmp_path))


def test_a_worker_that_cannot_be_started_ends_the_run_not_the_candidates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = FakeWorker.__init__

    def refused(self, *given):
        raise RuntimeError("CUDA driver version is insufficient")

    monkeypatch.setattr(FakeWorker, "__init__", refused)
    with pytest.raises(NoWorker, match="no worker can be started: RuntimeError: CUDA driver"):
        driving.run(config(budget=BUDGET), name="a", runs_dir=tmp_path)
    monkeypatch.setattr(FakeWorker, "__init__", made)
    assert driving.resume("a", runs_dir=tmp_path).status == "done"


def test_code_that_raises_on_one_merge_fails_that_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = FakeWorker.score

    def touchy(self, items):
        if self._live is not None and self._live.mean() > 0.7:
            raise ZeroDivisionError("division by zero in process_results")
        return score(self, items)

    monkeypatch.setattr(FakeWorker, "score", touchy)
    row = driving.run(config(budget=BUDGET), name="a", runs_dir=tmp_path)
    assert row.status == "done"
    assert any("ZeroDivisionError: division" in c.failure for c in candidates(tmp_path))
