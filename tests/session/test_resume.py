"""A search that was killed or interrupted ends as one that was not."""

from __future__ import annotations

import json
import random
import shutil
import signal
import sqlite3
import threading
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from agentmerge.cli.app import run_app
from agentmerge.errors import LeaseHeld, RunFailed, UserError
from agentmerge.ledger import Ledger
from agentmerge.ledger.lease import Lease
from agentmerge.search.evaluate import evaluate
from agentmerge.search.select import select
from agentmerge.session import driving
from agentmerge.session.checkpoints import open_saver
from agentmerge.session.opening import opened_search
from tests.session.conftest import command, config, config_text, trace_of

KILLS = 8  # `python -m benchmarks.kill` makes 100


def events(log: Path) -> list[dict]:
    """What the log holds so far; a line that a kill cut in two is left out."""
    found = []
    for line in log.read_text().splitlines() if log.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def kill_after(process, log: Path, count: int, delay_s: float) -> bool:
    """SIGKILL once the log has ``count`` more lines; False if the process ended before that."""
    start = len(events(log))
    while len(events(log)) < start + count:
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    time.sleep(delay_s)
    process.kill()
    process.communicate()
    return True


def test_killed_again_and_again_it_ends_as_if_never_killed(tmp_path: Path) -> None:
    text = config_text(
        worker={"options": {"base": "base", "delay_s": 0.03}}, budget={"max_evaluations": 40}
    )
    path = tmp_path / "config.yml"
    path.write_text(text)
    driving.run(config(budget={"max_evaluations": 40}), name="calm", runs_dir=tmp_path / "calm")
    runs, rng = tmp_path / "runs", random.Random(5)
    log = runs / "rough" / "log.jsonl"
    kills = 0
    process = command("run", path, "--name", "rough", "--runs-dir", runs, "-q")
    while kills < KILLS and kill_after(process, log, rng.randint(2, 9), rng.random() * 0.05):
        kills += 1
        process = command("resume", "rough", "--runs-dir", runs, "-q")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert kills == KILLS
    assert trace_of(runs, "rough") == trace_of(tmp_path / "calm", "calm")
    scored = Counter((e["generation"], e["slot"]) for e in events(log) if e["event"] == "candidate")
    assert max(scored.values()) == 1, "an evaluation that was committed was paid for again"


def test_first_interrupt_saves_and_says_how_to_resume(tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    path.write_text(config_text(worker={"options": {"base": "base", "delay_s": 0.2}}))
    driving.run(config(), name="calm", runs_dir=tmp_path / "calm")
    runs = tmp_path / "runs"
    process = command("run", path, "--name", "stopped", "--runs-dir", runs)
    log = runs / "stopped" / "log.jsonl"
    while sum(e["event"] == "candidate" for e in events(log)) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "agentmerge resume stopped" in err
    assert time.monotonic() - began < 5, "waited for more than the running evaluation"
    with Ledger(runs / driving.LEDGER) as ledger:
        row = ledger.run("stopped")
        left = [c for c in ledger.candidates(row.id) if c.state == "open"]
    assert row.status == "interrupted"
    assert left
    assert driving.resume("stopped", runs_dir=runs).status == "done"
    assert trace_of(runs, "stopped") == trace_of(tmp_path / "calm", "calm")


def test_a_search_is_stopped_from_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yml"
    path.write_text(config_text(worker={"options": {"base": "base", "delay_s": 0.2}}))
    runs = tmp_path / "runs"
    process = command("run", path, "--name", "stopped", "--runs-dir", runs)
    while not any(e["event"] == "candidate" for e in events(runs / "stopped" / "log.jsonl")):
        time.sleep(0.01)
    assert run_app(["stop", "stopped", "--runs-dir", str(runs), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"name": "stopped", "status": "interrupted"}
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, "so that `run && export` does not go on"
    assert "asked to stop" in err
    assert "agentmerge resume stopped" in err
    assert run_app(["stop", "stopped", "--runs-dir", str(runs)]) == 2
    assert "does not run" in capsys.readouterr().err


def test_second_interrupt_stops_at_once_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    path.write_text(config_text(worker={"options": {"base": "base", "delay_s": 5.0}}))
    runs = tmp_path / "runs"
    process = command("run", path, "--name", "hasty", "--runs-dir", runs)
    log = runs / "hasty" / "log.jsonl"
    while not any(e["event"] == "evaluate" for e in events(log)):
        time.sleep(0.01)
    time.sleep(0.5)  # the event is told when a candidate queues; its score takes five seconds
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.monotonic() - began < 3
    assert "Traceback" not in err


def test_resume_of_a_finished_search_goes_on_with_a_larger_budget(tmp_path: Path) -> None:
    driving.run(config(budget={"max_evaluations": 20}), name="a", runs_dir=tmp_path)
    row = driving.resume("a", runs_dir=tmp_path, overrides={"budget.max_evaluations": 34})
    assert (row.status, row.stop_reason) == ("done", "budget")
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        states = Counter(c.state for c in ledger.candidates(row.id))
    assert states["scored"] == 34
    assert "max_evaluations: 34" in (tmp_path / "a" / "config.yml").read_text()


def test_resume_of_a_finished_search_changes_nothing(tmp_path: Path) -> None:
    driving.run(config(), name="a", runs_dir=tmp_path)
    before = trace_of(tmp_path, "a")
    assert driving.resume("a", runs_dir=tmp_path).status == "done"
    assert trace_of(tmp_path, "a") == before


def test_resume_refuses_what_is_another_search(tmp_path: Path) -> None:
    driving.run(config(budget={"max_evaluations": 12}), name="a", runs_dir=tmp_path)
    with pytest.raises(UserError, match="agentmerge branch a"):
        driving.resume("a", runs_dir=tmp_path, overrides={"search.seed": 8})


def test_resume_notices_a_changed_task(tmp_path: Path) -> None:
    row = driving.run(config(budget={"max_evaluations": 12}), name="a", runs_dir=tmp_path)
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        facts = row.facts | {"protocols": row.facts["protocols"] | {"one": "another"}}
        ledger.update_run(row.id, facts=facts)
    with pytest.raises(UserError, match="the definition of task 'one' changed"):
        driving.resume("a", runs_dir=tmp_path)


def test_two_processes_cannot_drive_one_search(tmp_path: Path) -> None:
    row = driving.run(config(budget={"max_evaluations": 12}), name="a", runs_dir=tmp_path)
    checkpoints = tmp_path / driving.CHECKPOINTS
    with Lease.acquire(checkpoints, row.id), pytest.raises(LeaseHeld, match="already running"):
        driving.resume("a", runs_dir=tmp_path)


@pytest.mark.parametrize("ending", [RuntimeError("the power went"), None], ids=str)
def test_a_search_that_another_process_finished_stays_done(
    tmp_path: Path, ending: Exception | None
) -> None:
    def taken_over(event: dict) -> None:
        if event["event"] == "generation" and event["generation"] == 1:
            with Ledger(tmp_path / driving.LEDGER) as ledger:
                ledger.update_run(ledger.run("a").id, status="done", stop_reason="budget")
            with closing(sqlite3.connect(tmp_path / driving.CHECKPOINTS)) as conn, conn:
                conn.execute("UPDATE leases SET token = 'theirs'")
            if ending:
                raise ending

    with pytest.raises(RuntimeError if ending else LeaseHeld):
        driving.run(config(), name="a", runs_dir=tmp_path, emit=taken_over)
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        row = ledger.run("a")
    assert (row.status, row.stop_reason) == ("done", "budget")


def test_timeout_ends_the_search_with_the_best_so_far(tmp_path: Path) -> None:
    slow = config(worker={"options": {"base": "base", "delay_s": 0.05}}, budget={"timeout_s": 0.6})
    row = driving.run(slow, name="a", runs_dir=tmp_path)
    assert (row.status, row.stop_reason) == ("done", "timeout")
    assert (tmp_path / "a" / "best.yml").is_file()
    assert row.result is not None
    later = driving.resume("a", runs_dir=tmp_path, overrides={"budget.timeout_s": 600.0})
    assert later.stop_reason == "budget"
    driving.run(config(), name="calm", runs_dir=tmp_path / "calm")
    mine, calm = trace_of(tmp_path, "a"), trace_of(tmp_path / "calm", "calm")
    assert mine["candidates"] == calm["candidates"]


def test_a_graph_that_ends_without_finishing_fails_loudly(tmp_path: Path) -> None:
    graph = tmp_path / "broken.py"
    graph.write_text(
        "from langgraph.graph import END, START, StateGraph\n"
        "from agentmerge import Context\n"
        "from agentmerge.search.state import SearchState\n"
        "def build():\n"
        "    graph = StateGraph(SearchState, context_schema=Context)\n"
        "    graph.add_node('seed', lambda state: {'generation': 0})\n"
        "    graph.add_edge(START, 'seed')\n"
        "    graph.add_edge('seed', END)\n"
        "    return graph\n"
    )
    with pytest.raises(RunFailed, match="ended without finishing"):
        driving.run(config(search={"graph": f"{graph}:build"}), name="a", runs_dir=tmp_path)
    with pytest.raises(RunFailed, match="ended without finishing"):
        driving.resume("a", runs_dir=tmp_path)


def test_a_lost_worker_is_replaced_and_nothing_is_lost(tmp_path: Path) -> None:
    driving.run(config(), name="calm", runs_dir=tmp_path / "calm")
    dying = config(worker={"options": {"base": "base", "die_at": 9}})
    driving.run(dying, name="a", runs_dir=tmp_path)
    assert trace_of(tmp_path, "a") == trace_of(tmp_path / "calm", "calm")


def test_failed_candidates_are_data(tmp_path: Path) -> None:
    failing = config(worker={"options": {"base": "base", "fail_when": "max_weight>0.9"}})
    row = driving.run(failing, name="a", runs_dir=tmp_path)
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        failed = [c for c in ledger.candidates(row.id) if c.state == "failed"]
    assert row.status == "done"
    assert failed
    assert all("told to" in c.failure for c in failed if c.twin is None)


def test_stopped_between_a_generations_last_score_and_the_next_step(tmp_path: Path) -> None:
    """All that was begun has ended and is saved, and nothing after it."""
    driving.run(config(), name="a", runs_dir=tmp_path / "calm")
    runs = tmp_path / "runs"
    runs.mkdir()
    with open_saver(runs / driving.CHECKPOINTS):
        pass
    with closing(sqlite3.connect(runs / driving.CHECKPOINTS)) as conn, conn:
        conn.execute(
            "CREATE TRIGGER full BEFORE INSERT ON checkpoints WHEN "
            "(SELECT count(*) FROM checkpoints) > 2 "
            "BEGIN SELECT RAISE(ABORT, 'disk full'); END"
        )
    with pytest.raises(RunFailed, match="disk full"):
        driving.run(config(), name="a", runs_dir=runs)
    with closing(sqlite3.connect(runs / driving.CHECKPOINTS)) as conn, conn:
        conn.execute("DROP TRIGGER full")
    assert driving.resume("a", runs_dir=runs).status == "done"
    assert trace_of(runs, "a") == trace_of(tmp_path / "calm", "a")


@pytest.mark.parametrize("behind", ["ledger", "checkpoints"])
def test_databases_of_different_moments_go_on_from_the_ledger(tmp_path: Path, behind: str) -> None:
    """As after a power cut: one file is older than the other. The ledger decides."""
    calm = tmp_path / "calm"
    moments: list[Path] = []
    copying = threading.Lock()

    def keep(event: dict) -> None:
        if event["event"] not in ("generation", "candidate"):
            return
        with copying:
            folder = tmp_path / str(len(moments))
            folder.mkdir()
            for name in (driving.LEDGER, driving.CHECKPOINTS):
                with (
                    closing(sqlite3.connect(calm / name)) as old,
                    closing(sqlite3.connect(folder / name)) as new,
                ):
                    old.backup(new)
            moments.append(folder)

    driving.run(config(budget={"max_evaluations": 24}), name="a", runs_dir=calm, emit=keep)
    rng = random.Random(3)
    for _ in range(4):
        early, late = sorted(rng.sample(range(6, len(moments)), 2))
        ledger, checkpoints = (early, late) if behind == "ledger" else (late, early)
        runs = tmp_path / f"mixed-{early}-{late}"
        runs.mkdir()
        shutil.copy(moments[ledger] / driving.LEDGER, runs / driving.LEDGER)
        shutil.copy(moments[checkpoints] / driving.CHECKPOINTS, runs / driving.CHECKPOINTS)
        row = driving.resume("a", runs_dir=runs)
        assert (row.status, row.stop_reason) == ("done", "budget"), (early, late)
        assert trace_of(runs, "a") == trace_of(calm, "a")


def test_a_missing_generation_is_not_an_empty_one(tmp_path: Path) -> None:
    """A server's graph goes on from its own checkpoint, which may be ahead of the ledger."""
    row = driving.run(config(budget={"max_evaluations": 24}), name="a", runs_dir=tmp_path)
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        last = ledger.candidates(row.id)[-1].generation
        with ledger._writing() as conn:
            conn.execute("DELETE FROM candidates WHERE generation = ?", (last,))
        prepared = driving.prepare(driving.SearchConfig.from_text(row.config))
    with opened_search(tmp_path, lambda _: (prepared, row)) as (search, _, _):
        evaluate(search, last, 0)
        outcome = select(search, last)
        assert (outcome.stop_reason, outcome.generation) == ("", last)
        assert outcome.open_slots[0] == (last, 0)
