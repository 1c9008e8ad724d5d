"""The live page as a program: a real server, a real search that goes on, dies, ends and is gone."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agentmerge.cli.app import run_app
from agentmerge.session import driving
from tests.report.conftest import CONFIG

#: A search of some seconds.
SLOW = CONFIG.replace("num_layers: 4,", "num_layers: 4, delay_s: 0.05,").replace("40}", "80}")


@contextmanager
def served(runs: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """(address, process) of ``agentmerge ui``."""
    where = ["--runs-dir", str(runs), "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "agentmerge", "ui", *where, *options],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        told = process.stderr.readline()
        found = re.match(r"(http://127\.0\.0\.1:\d+)/(?:#token=\S+)? ", told)
        assert found, told
        yield told.split(" ")[0] if options else found[1], process
    finally:
        process.kill()
        process.communicate()


def events(address: str, within_s: float = 60.0) -> Iterator[tuple[str, Any]]:
    """(kind, data) of a stream."""
    until = time.monotonic() + within_s
    with urllib.request.urlopen(address, timeout=within_s) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        kind = ""
        for raw in answer:
            assert time.monotonic() < until, "the stream did not come to what was awaited"
            line = raw.decode().rstrip("\n")
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield kind, json.loads(line.removeprefix("data: "))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yml"
    path.write_text(SLOW)
    return path


def began(runs: Path, config: Path, name: str) -> subprocess.Popen[bytes]:
    """A search in a process of its own, once it is in the ledger."""
    where = ["--name", name, "--runs-dir", str(runs), "-q"]
    process = subprocess.Popen(
        [sys.executable, "-m", "agentmerge", "run", str(config), *where],
        stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    until = time.monotonic() + 60
    while time.monotonic() < until and not (runs / name / "best.yml").exists():
        time.sleep(0.05)
    return process


def test_a_search_is_followed_while_it_goes_on(tmp_path: Path, config: Path) -> None:
    runs = tmp_path / "runs"
    search = began(runs, config, "a")
    with served(runs) as (address, server):
        listed = events(f"{address}/live")
        kind, found = next(listed)
        assert (kind, found["names"]) == ("searches", ["a"])

        counts: list[float] = []
        started = time.monotonic()
        for kind, found in events(f"{address}/run/a/live"):
            assert kind == "board"
            board = found["board"]
            assert "data-part" in found["html"]
            counts.append(board["evaluations"])
            if len(counts) == 3:
                assert board["status"] == "running"
                assert 0 < board["evaluations"] < 80
                os.killpg(search.pid, signal.SIGKILL)
                search.wait()
            if board["status"] == "interrupted":
                break
        # At most one message a look, but for the reading of the past at the begin.
        assert len(counts) <= time.monotonic() - started + 4
        assert counts == sorted(counts)
        assert counts[-1] > 0

        # Somebody goes on with it, and pages see it to its end.
        row = driving.resume("a", runs_dir=runs)
        assert row.status == "done"
        for kind, found in events(f"{address}/run/a/live"):
            assert kind == "board"
            if found["board"]["status"] == "done" and found["board"]["read"]:
                break
        assert found["board"]["evaluations"] == 80
        assert found["board"]["phase"] == "done"
        for _, told in listed:
            cells = {row["name"]: row["cells"] for row in told["changed"]}.get("a", {})
            if cells.get("phase") == "done":
                break
        assert cells["evaluations"] == "80 of 80"
        assert cells["sparkline"]

        # It is forgotten while a page is open.
        stream = events(f"{address}/run/a/live")
        assert next(stream)[0] == "board"
        where = ["--runs-dir", str(runs), "--json"]
        assert run_app(["ledger", "prune", "--forget", "a", *where]) == 0
        kind, found = next(stream)
        assert kind == "trouble"
        assert "no run called 'a'" in found["sentence"]

        # Ctrl-C ends it, open pages or not, and says nothing.
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=20)
        assert (server.returncode, out, err) == (0, "", "")


def test_the_port_and_the_folder_are_checked_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--runs-dir", str(tmp_path)]
    assert run_app(["ui", *where]) == 2
    assert "no runs in" in capsys.readouterr().err
    (tmp_path / "agentmerge.sqlite").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert run_app(["ui", *where, "--port", port]) == 2
    said = capsys.readouterr().err
    assert f"port {port} of 127.0.0.1 cannot be had" in said
    assert len(said.splitlines()) == 1
    assert run_app(["ui", *where, "--host", "no.such.host.invalid"]) == 2
    assert "cannot be had" in capsys.readouterr().err


def test_without_its_packages_it_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert run_app(["ui", "--runs-dir", str(tmp_path)]) == 2
    assert "pip install 'agentmerge[ui]'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_page_beside_a_search_ends_with_it(tmp_path: Path, config: Path) -> None:
    """However it ends: done, or killed."""
    where = ["--runs-dir", str(tmp_path / "runs"), "--ui", "-q"]
    for name, more in (("a", ["--max-evaluations", "40"]), ("b", ["--seed", "4"])):
        search = subprocess.Popen(
            [sys.executable, "-m", "agentmerge", "run", str(config), "--name", name, *more, *where],
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert search.stderr is not None
        address, _, rest = search.stderr.readline().partition(" ")
        assert rest == "shows it live, until it ends\n", address
        for _, found in events(f"{address}live"):
            if found.get("names", [""])[0] == name:
                break
        if name == "b":
            search.kill()
        search.communicate()
        assert search.returncode == (0 if name == "a" else -signal.SIGKILL)
        until = time.monotonic() + 10
        while time.monotonic() < until:
            try:
                urllib.request.urlopen(address, timeout=5).close()
            except OSError:
                break
        else:
            raise AssertionError("the page is still there")
