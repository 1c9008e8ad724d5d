"""A search as it is watched: a screen on a terminal, lines elsewhere, JSON for programs."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from agentmerge.cli.app import run_app
from agentmerge.cli.live import Progress, sparkline
from agentmerge.config import SearchConfig
from agentmerge.contracts.events import Evaluate, Evaluated, parsed
from agentmerge.ledger import Ledger
from agentmerge.report.board import Board, Follower
from agentmerge.session import driving
from tests.report.conftest import CONFIG, search_family


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    search_family(folder)
    return folder


def on_a_terminal(*arguments: str, columns: int = 100) -> str:
    """What a command shows on a terminal of its own (stderr and stdout together)."""
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "40"}
    process = subprocess.Popen(
        [sys.executable, "-m", "agentmerge", *arguments],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environment,
    )
    os.close(follower)
    shown = b""
    while process.poll() is None or select.select([leader], [], [], 0.2)[0]:
        if select.select([leader], [], [], 0.2)[0]:
            try:
                shown += os.read(leader, 65536)
            except OSError:
                break
    os.close(leader)
    assert process.wait() == 0
    return shown.decode(errors="replace")


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_a_terminal_gets_a_screen_and_then_the_result(tmp_path: Path) -> None:
    config = tmp_path / "config.yml"
    config.write_text(CONFIG)
    shown = on_a_terminal("run", str(config), "--runs-dir", str(tmp_path), "--name", "a")
    assert "\x1b[" in shown
    text = plain(shown)
    assert "╭─ agentmerge" in text
    for words in ("best: ", "parent base", "best cheap merge", "best by generation"):
        assert words in text, words
    assert re.search(r"evaluations +[━╸╺ ]+ +\d+ of 40", text)
    assert "this search's answer" in text.rsplit("╰", 1)[-1], "the result stays below"
    assert max(len(line.rstrip("\r")) for line in text.split("\n") if "│" in line) <= 100


def test_the_closing_table_fits_a_terminal(tmp_path: Path) -> None:
    names = {f"name: {one}": f"name: tasks_of_one_family_{one}" for one in ("one", "two")}
    config = tmp_path / "config.yml"
    text = CONFIG
    for old, new in names.items():
        text = text.replace(old, new)
    config.write_text(text)
    where = ("--runs-dir", str(tmp_path), "--name", "a")
    assert run_app(["run", str(config), *where, "-q"]) == 0
    head = next(
        line
        for line in plain(on_a_terminal("show", "a", *where[:2], columns=80)).splitlines()
        if "sealed" in line and "…one" in line and "…two" in line
    )
    assert len(head) <= 80


def test_elsewhere_it_is_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yml"
    config.write_text(CONFIG)
    assert run_app(["run", str(config), "--runs-dir", str(tmp_path)]) == 0
    err = capsys.readouterr().err
    assert "\x1b" not in err
    assert "generation   0" in err


def test_programs_get_every_event_and_the_result_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yml"
    config.write_text(CONFIG)
    assert run_app(["run", str(config), "--runs-dir", str(tmp_path), "--json"]) == 0
    streams = capsys.readouterr()
    result = json.loads(streams.out)
    lines = [line for line in streams.err.splitlines() if line.startswith("{")]
    events = [json.loads(line) for line in lines]
    kinds = [event["event"] for event in events]
    assert kinds[0] == "start"
    assert kinds[-1] == "done"
    assert kinds.count("candidate") == result["evaluations"]["total"]
    log = (tmp_path / result["name"] / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in log] == kinds


def test_what_a_watcher_reads_is_what_the_driver_told(tmp_path: Path) -> None:
    """The same scores, generations and words, from the ledger alone."""
    told: list[dict] = []
    driving.run(SearchConfig.from_text(CONFIG), name="a", runs_dir=tmp_path, emit=told.append)
    with Ledger(tmp_path / driving.LEDGER, read_only=True) as ledger:
        read = [event.to_json() for event in Follower(ledger, ledger.run("a")).news()]

    def gist(events: list[dict]) -> list[tuple]:
        kept = []
        for e in events:
            if e["event"] == "candidate":
                kept.append(("candidate", e["generation"], e["slot"], e["score"], e["failure"]))
            elif e["event"] == "generation":
                kept.append(("generation", e["generation"], e["evaluations"], e["best"]))
            elif e["event"] == "advice":
                kept.append(("advice", e["generation"], e["role"], e["words"]))
        return kept

    twins = {(e["generation"], e["slot"]) for e in read if e.get("twin")}
    without = [g for g in gist(read) if g[0] != "candidate" or (g[1], g[2]) not in twins]
    assert sorted(without, key=repr) == sorted(gist(told), key=repr)  # workers race
    config = SearchConfig.from_text(CONFIG)
    boards = Board(config), Board(config)
    for board, events in zip(boards, (told, read), strict=True):
        for event in events:
            board.tell(parsed(event))
    one, other = boards
    assert one.best is not None
    assert other.best is not None
    scores = [{name: line.score for name, line in board.rivals.items()} for board in boards]
    assert scores[0] == scores[1]
    assert (one.best.score, one.trail, one.words) == (
        other.best.score,
        other.trail,
        other.words,
    )
    assert one.evaluations == other.evaluations == 40
    assert one.phase == other.phase == "done"


def test_the_board_knows_every_cheap_merge_and_names_candidates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    board = Board(SearchConfig.from_text(CONFIG))
    assert board.phase == "reading models and tasks"
    now = [board.began]
    monkeypatch.setattr("agentmerge.report.board.time.monotonic", lambda: now[0])

    def told(slot: int, operator: str, score: float) -> None:
        board.tell(Evaluate(generation=0, slot=slot))
        now[0] += 2.0
        board.tell(
            Evaluated(generation=0, slot=slot, operator=operator, label=operator, score=score)
        )

    told(9, "uniform", 0.5)
    told(10, "depth", 0.9)
    assert board.rivals["best cheap merge"].name == "depth"
    assert (board.generation, board.current) == (0, "candidate 10"), "0.10 reads as a tenth"
    before = board.seconds_left
    now[0] += 1.0
    after = board.seconds_left
    assert before is not None
    assert after is not None
    assert after < before, "time goes on while a candidate is scored"


def test_what_others_wrote_commands_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    board = Board(SearchConfig.from_text(CONFIG))
    fault = "\x1b[2Jthe task's own words\nand more"
    failed = Evaluated(
        generation=1, slot=2, operator="x", label="", score=None, failure=fault
    ).to_json()
    Progress(board)(failed)
    assert capsys.readouterr().err == "  candidate 1.2: [2Jthe task's own wordsand more\n"


def test_watch_follows_a_search_until_it_ends(tmp_path: Path) -> None:
    config = tmp_path / "config.yml"
    config.write_text(CONFIG.replace("num_layers: 4", "num_layers: 4, delay_s: 0.02"))
    where = ["--runs-dir", str(tmp_path)]
    command = [sys.executable, "-m", "agentmerge"]
    driver = subprocess.Popen(
        [*command, "run", str(config), "--name", "a", *where],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert driver.stderr is not None
    driver.stderr.readline()  # it has begun
    drained = threading.Thread(target=driver.stderr.read)
    drained.start()
    watched = subprocess.run(
        [*command, "watch", "a", "--every", "0.05", "--json", *where],
        capture_output=True,
        text=True,
        check=True,
    )
    assert driver.wait() == 0
    drained.join()
    driver.stderr.close()
    events = [json.loads(line) for line in watched.stdout.splitlines()]
    places = [(e["generation"], e["slot"]) for e in events if e["event"] == "candidate"]
    with Ledger(tmp_path / driving.LEDGER, read_only=True) as ledger:
        known = [(c.generation, c.slot) for c in ledger.candidates(ledger.run("a").id)]
    assert places == known, "each once, in order"
    assert events[-1]["event"] == "done"


def test_watch_of_a_finished_search_shows_it_and_ends(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (runs / driving.LEDGER).read_bytes()
    assert run_app(["watch", "second", "--runs-dir", str(runs)]) == 0
    shown = capsys.readouterr()
    assert "branched from first" in shown.out
    assert "generation   2" in shown.err
    assert " left" not in shown.err, "nothing is known of the pace of what was there before"
    assert (runs / driving.LEDGER).read_bytes() == before
    assert run_app(["watch", "nobody", "--runs-dir", str(runs)]) == 2


def test_a_sparkline_shows_the_last_values() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([0.5, 0.5]) == "▄▄"
    assert len(sparkline([float(i) for i in range(100)])) == 40
