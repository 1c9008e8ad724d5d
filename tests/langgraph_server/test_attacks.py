"""A real ``langgraph dev`` under attack: by pages, by clients that ask for what they may not, and
by clients that go away; with worker processes that must be gone afterwards."""

from __future__ import annotations

import http.client
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from agentmerge.ledger import Ledger
from agentmerge.ledger.folder import CHECKPOINTS, LEDGER
from agentmerge.ledger.lease import Lease
from tests.langgraph_server.conftest import ROOT, serving
from tests.session.conftest import BODY

pytestmark = pytest.mark.slow
SEARCHED = {key: value for key, value in BODY.items() if key != "worker"}
#: Two workers, in processes of their own, that take their time.
OWN = {
    "worker": {"kind": "fake", "count": 2, "options": {"base": "base", "delay_s": 0.5}},
    "budget": {"max_evaluations": 60},
}


class Served:
    def __init__(self, url: str, runs: Path, log: Path) -> None:
        self.host, self.runs, self.log = urlsplit(url).netloc, runs, log

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, timeout=60)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        connection = self.connect()
        sent = None if body is None else json.dumps(body)
        given = {"Content-Type": "application/json"} | headers
        connection.request(method, path, sent, given)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        try:
            return answer.status, json.loads(text)
        except ValueError:
            return answer.status, text

    def thread(self) -> str:
        status, found = self.ask("POST", "/threads", {"thread_id": str(uuid.uuid4())})
        assert status == 200, found
        return found["thread_id"]

    def begin(self, thread: str, name: str, **more: Any) -> str:
        context = {"config": yaml.safe_dump(SEARCHED | more), "name": name}
        body = {"assistant_id": "search", "input": {}, "context": context}
        status, found = self.ask("POST", f"/threads/{thread}/runs", body)
        assert status == 200, found
        return found["run_id"]

    def status(self, name: str) -> str:
        with Ledger(self.runs / LEDGER) as ledger:
            return next((row.status for row in ledger.runs() if row.name == name), "")

    def scored(self, thread: str) -> int:
        with Ledger(self.runs / LEDGER) as ledger:
            return sum(c.state == "scored" for c in ledger.candidates(thread))

    def held(self, thread: str) -> bool:
        return Lease.holder(self.runs / CHECKPOINTS, thread) is not None


@pytest.fixture(scope="module")
def served(langgraph: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("attacked")
    with serving(langgraph, folder, OWN) as (url, runs):
        yield Served(url, runs, folder / "server.log")


def until(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def workers_of(server_log: Path) -> list[int]:
    """Processes below this one that score for a search (spawned by multiprocessing)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
                environ = (entry / "environ").read_bytes()
            except OSError:
                continue
            if b"spawn_main" in line and str(server_log.parent).encode() in environ:
                found.append(int(entry.name))
    return found


def test_pages_of_elsewhere_reach_nothing(served: Served) -> None:
    rebound = {"Host": f"evil.example:{served.host.rpartition(':')[2]}"}
    assert served.ask("GET", "/info", **rebound)[0] == 421
    assert served.ask("POST", "/threads", {}, **rebound)[0] == 421
    form = {"Origin": "https://evil.example", "Content-Type": "text/plain"}
    assert served.ask("POST", "/threads", {}, **form)[0] == 403
    assert served.ask("POST", "/threads", {}, Origin="https://smith.langchain.com")[0] == 200


def test_only_a_search_is_offered(served: Served) -> None:
    thread = served.thread()
    for method, path in (
        ("POST", "/deploy"), ("PUT", "/store/items"), ("POST", "/runs/crons"), ("POST", "/mcp"),
        ("POST", "/runs/wait"), ("POST", f"/threads/{thread}/state"), ("POST", "/assistants"),
    ):  # fmt: skip
        assert served.ask(method, path, {})[0] in (403, 404), path
    asked = {"assistant_id": "search", "input": {}}
    for more in ({"webhook": "http://127.0.0.1:9/"}, {"command": {"goto": "finish"}}):
        assert served.ask("POST", f"/threads/{thread}/runs", asked | more)[0] == 422


def test_a_branch_runs_no_file(served: Served, tmp_path: Path) -> None:
    code = tmp_path / "mine.py"
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    thread = served.thread()
    run = served.begin(thread, "trunk", budget={"max_evaluations": 9})
    served.ask("GET", f"/threads/{thread}/runs/{run}/join")
    assert served.status("trunk") == "done"
    context = {"branch_of": "trunk", "at": 0, "overrides": {"search": {"graph": f"{code}:build"}}}
    body = {"assistant_id": "search", "input": {}, "context": context}
    found = served.ask("POST", f"/threads/{served.thread()}/runs/wait", body)[1]
    assert "UserError" in str(found)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("way", "seed"), [("cancel", 1), ("disconnect", 2), ("failure", 3)])
def test_a_run_that_ends_early_gives_everything_back(served: Served, way: str, seed: int) -> None:
    thread = served.thread()
    search = SEARCHED["search"] | {"seed": seed}  # what another has paid for needs no worker
    if way == "disconnect":
        context = {"config": yaml.safe_dump(SEARCHED | {"search": search}), "name": way}
        body = {"assistant_id": "search", "input": {}, "context": context}
        body["on_disconnect"] = "cancel"
        connection = served.connect()
        connection.request(
            "POST", f"/threads/{thread}/runs/stream", json.dumps(body),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        answer = connection.getresponse()
        assert answer.read(1)
    else:
        run = served.begin(thread, way, search=search)
    until(lambda: len(workers_of(served.log)) == 2, "no worker began")
    until(lambda: served.scored(thread) > 7, "nothing was scored")
    assert served.held(thread)
    if way == "cancel":
        assert served.ask("POST", f"/threads/{thread}/runs/{run}/cancel?wait=true", {})[0] < 300
    elif way == "disconnect":
        connection.sock.close() if connection.sock else None
        answer.close()
        connection.close()
    else:  # the search's folder becomes a file: best.yml cannot be written
        folder = served.runs / way
        folder.rename(served.runs / "moved")
        folder.write_text("in the way")
    until(lambda: not served.held(thread), "the lease is still held", 30)
    until(lambda: not workers_of(served.log), "the workers are still there", 30)
    assert served.status(way) == "interrupted"
    before = served.scored(thread)
    if way == "failure":
        (served.runs / way).unlink()
        (served.runs / "moved").rename(served.runs / way)
    # And whoever comes next goes on with it.
    body = {"assistant_id": "search", "input": None, "context": {"run": thread}}
    found = served.ask("POST", f"/threads/{thread}/runs/wait", body)[1]
    assert found["status"] == "done", found
    assert served.scored(thread) == 34 > before
    assert not workers_of(served.log)
    assert not (ROOT / way).exists()
    assert os.listdir(served.runs)
