"""The graph in someone else's hands: streamed, traced, and opened from a config alone."""

from __future__ import annotations

import base64
import os
import runpy
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from agentmerge.errors import LeaseHeld, NotFound, TaskError
from agentmerge.ledger import Ledger
from agentmerge.session import driving
from agentmerge.session.checkpoints import open_saver
from agentmerge.session.context import Context
from agentmerge.system.bundled import bundled
from agentmerge.testing.scripted import Fault, ScriptedServer
from agentmerge.workers.fake import FakeWorker
from tests.session.conftest import config, config_text, trace_of


def streamed(runs_dir: Path, context: Context, thread_id: str, begin: dict | None) -> list:
    thread = {"configurable": {"thread_id": thread_id}}
    with open_saver(runs_dir / driving.CHECKPOINTS) as saver:
        graphs = runpy.run_path(str(bundled("graphs") / "search.py"))
        graph = graphs["graph"].compile(checkpointer=saver)
        modes = ["updates", "custom"]
        return [*graph.stream(begin, thread, context=context, stream_mode=modes)]


def test_a_stream_gives_live_progress(tmp_path: Path) -> None:
    thread_id = str(uuid.uuid4())
    context = Context(config=config_text(), name="served", runs_dir=str(tmp_path))
    parts = streamed(tmp_path, context, thread_id, {})
    nodes = [name for mode, part in parts if mode == "updates" for name in part]
    events = [part["event"] for mode, part in parts if mode == "custom"]
    assert nodes[0] == "seed"
    assert nodes[-1] == "finish"
    assert events.count("candidate") == 34
    assert events.index("generation") < len(events) - 1
    assert events[-1] == "done"
    driving.run(config(), name="calm", runs_dir=tmp_path)
    assert trace_of(tmp_path, "served") == trace_of(tmp_path, "calm")
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        assert ledger.run("served").id == thread_id, (
            "one thread for the server and the command line"
        )
    row = driving.resume("served", runs_dir=tmp_path, overrides={"budget.max_evaluations": 40})
    assert (row.status, row.stop_reason) == ("done", "budget")


def test_a_thread_may_begin_as_a_branch(tmp_path: Path) -> None:
    driving.run(config(), name="trunk", runs_dir=tmp_path)
    overrides = {"search.seed": 11, "budget.max_evaluations": 26}
    context = Context(
        branch_of="trunk", at=1, name="twig", overrides=overrides, runs_dir=str(tmp_path)
    )
    streamed(tmp_path, context, str(uuid.uuid4()), {})
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        row = ledger.run("twig")
        assert row.parent_generation == 1
        assert row.status == "done"


def test_what_cannot_be_opened_is_said(tmp_path: Path) -> None:
    unknown = Context(runs_dir=str(tmp_path))
    with pytest.raises(NotFound, match="no run called"):
        streamed(tmp_path, unknown, str(uuid.uuid4()), {})
    from agentmerge.ledger.lease import Lease

    row = driving.run(config(), name="a", runs_dir=tmp_path)
    with (
        Lease.acquire(tmp_path / driving.CHECKPOINTS, row.id, name="a"),
        pytest.raises(LeaseHeld),
    ):
        streamed(tmp_path, Context(runs_dir=str(tmp_path)), row.id, {})


def test_a_run_that_fails_gives_back_what_it_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agentmerge.ledger.lease import Lease
    from agentmerge.session.context import _HELD, _OPEN

    made, closed = FakeWorker.score, []

    def broken(self, items):
        raise TaskError("the data of task 'one' is gone")

    monkeypatch.setattr(FakeWorker, "score", broken)
    monkeypatch.setattr(FakeWorker, "close", lambda self: closed.append(self))
    thread_id = str(uuid.uuid4())
    context = Context(config=config_text(), name="served", runs_dir=str(tmp_path))
    with pytest.raises(TaskError, match="is gone"):
        streamed(tmp_path, context, thread_id, {})
    assert closed
    assert not _HELD
    assert not _OPEN
    assert Lease.holder(tmp_path / driving.CHECKPOINTS, thread_id) is None
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        assert ledger.run("served").status == "interrupted"
    monkeypatch.setattr(FakeWorker, "score", made)
    streamed(tmp_path, context, thread_id, None)
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        assert ledger.run("served").status == "done"


class _LangSmith(BaseHTTPRequestHandler):
    """Takes what a tracing client sends."""

    bodies: list[bytes]

    def do_GET(self) -> None:
        self._answer(b'{"batch_ingest_config": {}}')

    def do_POST(self) -> None:
        self.bodies.append(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        self._answer(b"{}")

    def do_PATCH(self) -> None:
        self.do_POST()

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@pytest.fixture
def langsmith() -> Iterator[tuple[str, list[bytes]]]:
    bodies: list[bytes] = []
    handler = type("Handler", (_LangSmith,), {"bodies": bodies})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", bodies
        server.shutdown()


@pytest.mark.parametrize("who", ["", "me:canary-pass-5a31@"])
def test_traces_reach_langsmith_without_keys(tmp_path: Path, langsmith, who: str) -> None:
    """In a process of its own: a tracing client lives as long as its process."""
    url, bodies = langsmith
    path = tmp_path / "config.yml"
    key, other = "sk-canary-2f9a71", "canary-in-a-file-7c"
    (tmp_path / "keys").write_text(f"OTHER_API_KEY={other}\n")
    variables = {
        "OPENAI_API_KEY": key,
        "LANGSMITH_TRACING": "true",
        "LANGSMITH_ENDPOINT": url,
        "LANGSMITH_API_KEY": "ls-canary-0b",
        "LANGSMITH_PROJECT": "merges",
    }
    with ScriptedServer(lambda body: Fault("401")) as server:
        agents = {
            "llm": "openai:m",
            "base_url": server.base_url.replace("://", f"://{who}"),
            "api_key_env": "OPENAI_API_KEY",
            "max_retries": 0,
            "key_file": str(tmp_path / "keys"),
        }
        path.write_text(config_text(agents=agents, budget={"max_evaluations": 16}))
        line = [
            sys.executable,
            "-m",
            "agentmerge",
            "run",
            str(path),
            "-q",
            "--runs-dir",
            str(tmp_path),
        ]
        done = subprocess.run(
            line, env=os.environ | variables, capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, done.stderr
    import zlib

    sent = b"".join(bodies)
    for body in bodies:  # some are compressed
        for wbits in (15, 31):
            try:
                sent += zlib.decompress(body, wbits)
            except zlib.error:
                continue
        if body[:4] == b"\x28\xb5\x2f\xfd":
            import zstandard

            sent += zstandard.ZstdDecompressor().decompressobj().decompress(body)
    assert b"ChatOpenAI" in sent
    assert b"[redacted]" in sent, "the server's refusal repeats the key"
    basic = base64.b64encode(who.removesuffix("@").encode()).decode() if who else key
    assert server.requests[0].headers["authorization"].endswith(basic)
    for secret in (key, other, "ls-canary-0b", "canary-pass", basic):
        assert secret.encode() not in sent
