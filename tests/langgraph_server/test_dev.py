"""``langgraph validate`` and a real ``langgraph dev`` on loopback, sharing its threads with us."""

from __future__ import annotations

import json
import subprocess
import uuid
from pathlib import Path

import pytest
import yaml
from langgraph_sdk import get_sync_client
from langgraph_sdk.client import SyncLangGraphClient

from agentmerge.cli.app import run_app
from agentmerge.ledger import Ledger
from agentmerge.ledger.folder import LEDGER
from tests.langgraph_server.conftest import ROOT, environment
from tests.session.conftest import BODY, config_text

pytestmark = pytest.mark.slow


def test_validate_passes(langgraph: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [langgraph, "validate"], cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "is valid" in done.stdout + done.stderr


def test_a_server_and_the_command_line_share_searches(server, capsys) -> None:
    url, runs = server
    with get_sync_client(url=url) as client:
        share(client, runs, capsys)


def share(client: SyncLangGraphClient, runs: Path, capsys) -> None:
    (assistant,) = client.assistants.search(graph_id="search")
    drawn = client.assistants.get_graph(assistant["assistant_id"])
    nodes = {"seed", "dispatch", "collect", "select", "critic", "finish"}
    assert nodes <= {n["id"] for n in drawn["nodes"]}

    thread = client.threads.create(thread_id=str(uuid.uuid4()))["thread_id"]
    evil = yaml.safe_load(config_text()) | {"agents": {"llm": "openai:m", "base_url": "http://x"}}
    for context in ({"config": yaml.safe_dump(evil)}, {"runs_dir": "elsewhere"}):
        other = client.threads.create(thread_id=str(uuid.uuid4()))["thread_id"]
        with pytest.raises(Exception, match=r"UserError|not a client's to set"):
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
