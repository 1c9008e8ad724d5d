"""``langgraph validate`` and a real ``langgraph dev`` on loopback, sharing its threads with us.

The server is installed into an environment of its own (.ci/langgraph-server), once.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from langgraph_sdk import get_sync_client
from langgraph_sdk.client import SyncLangGraphClient

from agentmerge.cli.app import run_app
from agentmerge.ledger import Ledger
from agentmerge.session import LEDGER
from agentmerge.temporary import cache_dir
from tests.session.conftest import BODY, config_text

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def langgraph() -> Path:
    """The ``langgraph`` program."""
    home = cache_dir() / "langgraph-server"
    script = [ROOT / ".ci/langgraph-server", sys.executable, home]
    subprocess.run([str(part) for part in script], check=True, timeout=600)
    return home / "bin" / "langgraph"


def environment(runs_dir: Path) -> dict[str, str]:
    own = {
        "AGENTMERGE_RUNS_DIR": str(runs_dir),
        "LANGGRAPH_CLI_NO_ANALYTICS": "1",
        "PYTHONPATH": str(ROOT),
        "AGENTMERGE_SERVER_CONFIG": str(runs_dir.parent / "server.yml"),
    }
    return {name: value for name, value in os.environ.items() if "API_KEY" not in name} | own


def test_validate_passes(langgraph: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [langgraph, "validate"], cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "is valid" in done.stdout + done.stderr


@pytest.fixture
def server(langgraph: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """(URL, runs directory) of a development server that runs until the test is over."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, runs = f"http://127.0.0.1:{port}", tmp_path / "runs"
    (tmp_path / "server.yml").write_text(yaml.safe_dump({"worker": BODY["worker"]}))
    line = [langgraph, "dev", "--no-browser", "--no-reload"]
    log = (tmp_path / "server.log").open("w")
    process = subprocess.Popen(
        [*line, "--host", "127.0.0.1", "--port", str(port)],
        cwd=ROOT,
        env=environment(runs),
        stdout=log,
        stderr=log,
    )
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(f"{url}/ok", timeout=2)
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "server.log").read_text()[-2000:]
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(0.2)
        yield url, runs
    finally:
        process.terminate()
        process.wait(20)
        log.close()


def test_a_server_and_the_command_line_share_searches(server, capsys) -> None:
    url, runs = server
    with get_sync_client(url=url) as client:
        share(client, runs, capsys)


def test_another_sites_page_may_not_speak_to_it(server) -> None:
    url, _ = server
    asked = urllib.request.Request(f"{url}/ok", headers={"Origin": "https://evil.example"})
    with urllib.request.urlopen(asked, timeout=5) as answer:
        assert answer.headers.get("access-control-allow-origin") is None


def share(client: SyncLangGraphClient, runs: Path, capsys) -> None:
    (assistant,) = client.assistants.search(graph_id="search")
    drawn = client.assistants.get_graph(assistant["assistant_id"])
    assert {"seed", "evaluate", "select", "critic", "finish"} <= {n["id"] for n in drawn["nodes"]}

    thread = client.threads.create(thread_id=str(uuid.uuid4()))["thread_id"]
    evil = yaml.safe_load(config_text()) | {"agents": {"llm": "openai:m", "base_url": "http://x"}}
    for context in ({"config": yaml.safe_dump(evil)}, {"runs_dir": "elsewhere"}):
        other = client.threads.create(thread_id=str(uuid.uuid4()))["thread_id"]
        with pytest.raises(Exception, match=r"UserError|NotFound"):
            client.runs.wait(other, assistant["assistant_id"], input={}, context=context)
    assert not (ROOT / "elsewhere").exists()

    body = {key: value for key, value in BODY.items() if key != "worker"}
    context = {"config": yaml.safe_dump(body), "name": "served"}
    modes = ["updates", "custom"]
    parts = [
        *client.runs.stream(
            thread, assistant["assistant_id"], input={}, context=context, stream_mode=modes
        )
    ]
    assert not [part for part in parts if part.event == "error"], parts[-1]
    scored = [p for p in parts if p.event == "custom" and p.data["event"] == "candidate"]
    assert len(scored) == 34
    state = client.threads.get_state(thread)
    assert state["values"]["status"] == "done"

    # The same search by the command line: shown, branched, its best printed.
    here = ["--runs-dir", str(runs)]
    assert run_app(["show", "served", *here, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["id"] == thread
    assert run_app(["branch", "served", "--at", "1", "--as", "by-hand", "-q", *here]) == 0
    assert run_app(["resume", "served", "--max-evaluations", "40", "-q", *here]) == 0
    capsys.readouterr()

    # And what the command line went on with, by the server; then a branch on the server.
    assert client.threads.get_state(thread)["values"]["status"] == "done"
    twig = client.threads.create(thread_id=str(uuid.uuid4()))["thread_id"]
    origin = {"branch_of": "served", "at": 1, "name": "by-server"}
    found = client.runs.wait(twig, assistant["assistant_id"], input={}, context=origin)
    assert found["status"] == "done"
    with Ledger(runs / LEDGER) as ledger:
        first, second = ledger.run("by-hand"), ledger.run("by-server")
        assert first.parent_run == second.parent_run == thread
        assert second.id == twig
        by_hand, by_server = (ledger.candidates(row.id) for row in (first, second))
    assert (len(by_hand), len(by_server)) == (34, 40)  # the budget was raised in between
    assert [c.recipe_hash for c in by_hand] == [c.recipe_hash for c in by_server[:34]]
