"""What is let through to the platform behind ``http.app``: hosts, origins, routes and bodies."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from agentmerge.session.server_app import MAX_BODY_BYTES, Gate

THREAD = "01a229a6-80e3-7048-a594-3c19bc341ea8"
RUNS = f"/threads/{THREAD}/runs"


async def echo(request: Request) -> JSONResponse:
    return JSONResponse({"path": request.url.path, "body": (await request.body()).decode()})


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> TestClient:
    cors = {"cors": {"allow_origins": ["https://smith.langchain.com"]}}
    monkeypatch.setenv("LANGGRAPH_HTTP", json.dumps(cors))
    methods = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
    app = Starlette(
        routes=[Route("/{path:path}", echo, methods=methods)], middleware=[Middleware(Gate)]
    )
    return TestClient(app, base_url="http://127.0.0.1:2024")


@pytest.mark.parametrize(
    "host",
    ["localhost:2024", "LOCALHOST", "127.0.0.1:2024", "[::1]:2024", "192.168.1.7", "merge.lan"],
)
def test_its_own_names_and_numbers_are_answered(client, host: str, monkeypatch) -> None:
    monkeypatch.setenv("AGENTMERGE_SERVER_HOSTS", "merge.lan, other.lan")
    assert client.get("/info", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:2024", "localhost.evil.example", "127.0.0.1.nip.io", "",
             "[", "2130706433x"],
)  # fmt: skip
def test_a_name_that_was_made_to_lead_here_is_not(client, host: str) -> None:
    answer = client.post("/threads", headers={"Host": host}, json={})
    assert answer.status_code == 421
    assert "AGENTMERGE_SERVER_HOSTS" in answer.json()["detail"]
    assert client.get("/ok", headers={"Host": host}).status_code == 200, "a health check may"


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:9999", "https://smith.langchain.com.x",
               "http://[", "file://", ""],
)  # fmt: skip
def test_another_sites_page_starts_nothing(client, origin: str) -> None:
    plain = {"Origin": origin, "Content-Type": "text/plain"}  # as a form, which asks nobody first
    assert client.post("/threads", headers=plain, content="{}").status_code == 403
    assert client.options("/threads", headers=plain).status_code == 403


@pytest.mark.parametrize("origin", ["https://smith.langchain.com", "http://127.0.0.1:2024"])
def test_studios_pages_and_its_own_may(client, origin: str) -> None:
    assert client.post("/threads", headers={"Origin": origin}, json={}).status_code == 200
    assert client.options(RUNS, headers={"Origin": origin}).status_code == 200


NEEDED = [
    ("GET", "/info"), ("POST", "/assistants/search"), ("GET", f"/assistants/{THREAD}/schemas"),
    ("POST", "/threads"), ("GET", f"/threads/{THREAD}"), ("GET", f"/threads/{THREAD}/state"),
    ("POST", f"/threads/{THREAD}/history"), ("POST", RUNS), ("POST", f"{RUNS}/stream"),
    ("POST", f"{RUNS}/wait"), ("GET", f"{RUNS}/{THREAD}/join"), ("POST", f"{RUNS}/{THREAD}/cancel"),
]  # fmt: skip
NOT_OFFERED = [
    ("POST", f"/threads/{THREAD}/state"), ("PUT", "/store/items"), ("POST", "/runs/crons"),
    ("POST", f"{RUNS}/crons"), ("POST", "/runs"), ("POST", "/runs/wait"), ("POST", "/runs/batch"),
    ("POST", "/assistants"), ("PATCH", f"/assistants/{THREAD}"), ("POST", "/deploy"),
    ("GET", "/deploy"), ("POST", "/internal/truncate"), ("POST", "/mcp"), ("GET", f"/a2a/{THREAD}"),
    ("DELETE", f"/threads/{THREAD}"), ("POST", "/threads/prune"), ("GET", "/ui/../../etc/passwd"),
    ("POST", f"/threads/{THREAD}/commands"), ("POST", f"//threads/{THREAD}/state"),
    ("POST", f"/threads/{THREAD}/state/"), ("GET", "/metrics"), ("TRACE", "/info"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), NEEDED)
def test_what_a_search_needs_is_offered(client, method: str, path: str) -> None:
    body = {} if method == "POST" else None
    answer = client.request(method, path, json=body)
    assert answer.status_code == 200
    assert answer.json()["body"] == ("" if body is None else "{}"), "as it was sent"


@pytest.mark.parametrize(("method", "path"), NOT_OFFERED)
def test_nothing_else_is(client, method: str, path: str) -> None:
    answer = client.request(method, f"http://127.0.0.1:2024{path}")
    assert answer.status_code == 403
    assert "is not offered" in answer.json()["detail"]


def test_no_socket_is_opened(client) -> None:
    with (
        pytest.raises(WebSocketDisconnect),
        client.websocket_connect(f"/threads/{THREAD}/stream/events"),
    ):
        pass


GOOD: dict[str, Any] = {
    "assistant_id": "search", "input": {}, "context": {"config": "genome: {}", "name": "a"},
    "stream_mode": ["updates", "custom"], "metadata": {"a": 1}, "multitask_strategy": "reject",
    "config": {"recursion_limit": 50, "configurable": {"run": "first"}},
    "command": {"resume": True}, "webhook": None, "after_seconds": 0, "checkpoint": {},
}  # fmt: skip


def test_a_run_is_told_what_to_search(client) -> None:
    assert client.post(RUNS, json=GOOD).json()["body"]
    assert json.loads(client.post(RUNS, json=GOOD).json()["body"]) == GOOD


@pytest.mark.parametrize(
    "more",
    [
        {"webhook": "http://169.254.169.254/"},
        {"checkpoint_id": THREAD},
        {"checkpoint": {"checkpoint_id": THREAD}},
        {"command": {"goto": "finish"}},
        {"command": {"resume": 1, "update": {"stop_reason": "x"}}},
        {"command": ["goto"]},
        {"input": {"generation": 7}},
        {"config": {"configurable": {"__pregel_task_id": "x"}}},
        {"config": {"configurable": {"thread_id": "other"}}},
        {"config": {"callbacks": ["x"]}},
        {"context": {"runs_dir": "elsewhere"}},
        {"context": "runs_dir"},
        {"feedback_keys": ["a"]},
        {"langsmith_tracer": {"project_name": "theirs"}},
        {"on_completion": "delete"},
    ],
)
def test_and_nothing_else(client, more: dict[str, Any]) -> None:
    for route in ("", "/wait", "/stream"):
        answer = client.post(RUNS + route, json=GOOD | more)
        assert answer.status_code == 422, answer.text
        assert next(iter(more)) in answer.json()["detail"]


@pytest.mark.parametrize(
    "wrong",
    [{"run": 7}, {"config": ["genome"]}, {"name": {"a": 1}}, {"branch_of": True}, {"at": "2"},
     {"at": True}, {"at": 1.5}, {"overrides": ["a"]}],
)  # fmt: skip
@pytest.mark.parametrize("place", ["context", "configurable"])
def test_a_context_has_values_of_its_kinds(client, wrong: dict[str, Any], place: str) -> None:
    said = {"context": wrong} if place == "context" else {"config": {"configurable": wrong}}
    answer = client.post(RUNS, json=GOOD | said)
    assert answer.status_code == 422
    assert f"{next(iter(wrong))} must be " in answer.json()["detail"]


def test_a_thread_begins_without_a_state(client) -> None:
    written = {"supersteps": [{"updates": [{"values": {"stop_reason": "x"}, "as_node": "select"}]}]}
    assert client.post("/threads", json=written).status_code == 422
    assert client.post("/threads", json={"thread_id": THREAD}).status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"[" * 100_000, b"{", b"[1]", b"\xff", '{"webhook": "x"}'.encode("utf-16"), b"9" * 9000],
)
def test_what_is_no_json_object_is_refused(client, body: bytes) -> None:
    assert client.post(RUNS, content=body).status_code == 422


def test_bodies_are_bounded(client) -> None:
    long = b'"' + b"a" * MAX_BODY_BYTES + b'"'
    parts = (long[n : n + 4096] for n in range(0, len(long), 4096))
    for body, headers in ((long, {}), (parts, {}), (b"{}", {"Content-Length": "9" * 40})):
        assert client.post(RUNS, content=body, headers=headers).status_code == 413
