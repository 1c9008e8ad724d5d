"""Each provider's own client against a real server on loopback that speaks its protocol."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from agentmerge.agents.models import AgentModel
from agentmerge.agents.providers import read_keys, resolve_model, split_spec
from agentmerge.agents.schemas import Bounds, ControllerReply, json_schema, parse_reply
from agentmerge.config import SearchConfig
from agentmerge.errors import ModelReplyError, UserError

KEY = "canary-9d41c07b"
BOUNDS = Bounds(4, 0.05, 0.2)
GOOD = json.dumps({"thought": "t", "sigma": 0.1})


def anthropic(text: str) -> dict[str, Any]:
    return {
        "id": "m", "type": "message", "role": "assistant", "model": "m", "stop_reason": "end_turn",
        "content": [{"type": "text", "text": text}],
        "usage": {"input_tokens": 111, "output_tokens": 7},
    }  # fmt: skip


def google(text: str) -> dict[str, Any]:
    content = {"role": "model", "parts": [{"text": text}]}
    usage = {"promptTokenCount": 111, "candidatesTokenCount": 7, "totalTokenCount": 118}
    candidate = {"content": content, "finishReason": "STOP", "index": 0}
    return {"candidates": [candidate], "usageMetadata": usage, "modelVersion": "m"}


def ollama(text: str) -> dict[str, Any]:
    return {
        "model": "m", "created_at": "2026-01-01T00:00:00Z", "done": True, "done_reason": "stop",
        "message": {"role": "assistant", "content": text},
        "prompt_eval_count": 111, "eval_count": 7,
    }  # fmt: skip


PROTOCOLS: dict[str, tuple[Callable[[str], dict[str, Any]], str]] = {
    "anthropic": (anthropic, "/v1/messages"),
    "google": (google, "/v1beta/models/m:generateContent"),
    "ollama": (ollama, "/api/chat"),
}


class Handler(BaseHTTPRequestHandler):
    script: list[Any]
    seen: list[tuple[str, dict[str, str], dict[str, Any]]]
    speak: Callable[[str], dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.seen.append((self.path.partition("?")[0], headers, body))
        said = self.script.pop(0)
        status = said if isinstance(said, int) else 200
        error = {"error": {"message": f"no: {json.dumps(headers)}", "code": status, "type": "e"}}
        raw = json.dumps(error if status != 200 else type(self).speak(said)).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


@pytest.fixture(params=PROTOCOLS)
def provider(request, monkeypatch) -> Iterator[Any]:
    """name, and ask(script) -> (reply or error, what the server saw)."""
    name = request.param
    speak, path = PROTOCOLS[name]
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    monkeypatch.setenv("GOOGLE_API_KEY", KEY)
    seen: list[Any] = []
    script: list[Any] = []
    members = {"script": script, "seen": seen, "speak": staticmethod(speak)}
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), members)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"

        def ask(*replies: Any) -> Any:
            script[:] = replies
            chat = resolve_model(
                f"{name}:m", base_url=url, temperature=0.3, timeout_s=20.0, max_tokens=99
            )
            model = AgentModel(chat, timeout_s=20.0, max_retries=1, sleep=lambda seconds: None)
            messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
            schema = json_schema(ControllerReply, BOUNDS)
            return model.ask(
                messages, schema, lambda text: parse_reply(text, ControllerReply, BOUNDS)
            )

        ask.name, ask.path, ask.seen = name, path, seen
        yield ask
        server.shutdown()


def test_a_reply_is_read_with_its_tokens(provider) -> None:
    reply = provider(GOOD)
    assert reply.parsed.sigma == 0.1
    assert (reply.tokens_in, reply.tokens_out) == (111, 7)
    (path, headers, body) = provider.seen[0]
    assert path == provider.path
    assert "99" in json.dumps(body), "the longest reply was set"
    assert "0.3" in json.dumps(body), "the temperature was set"
    assert (KEY in json.dumps(headers)) == (provider.name != "ollama")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_fault_that_passes_is_tried_again(provider, status: int) -> None:
    assert provider(status, GOOD).parsed.sigma == 0.1
    assert len(provider.seen) == 2  # Google's client tries a 503 again by itself


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_fault_that_stays_is_a_reason_without_the_key(provider, status: int) -> None:
    with pytest.raises(ModelReplyError) as refused:
        provider(*[status] * 4)
    assert KEY not in str(refused.value)
    assert str(status) in str(refused.value)


def test_nonsense_is_repaired_once(provider) -> None:
    assert provider("no json", GOOD).attempts == 2
    with pytest.raises(ModelReplyError, match="in two tries"):
        provider("no json", "none again")


def test_a_key_file_serves_where_the_environment_has_none(tmp_path, monkeypatch) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# mine\nexport ANTHROPIC_API_KEY='{KEY}'\n\nOPENAI_API_KEY = sk-x-123\n")
    for name in ("ANTHROPIC_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert read_keys(path)["ANTHROPIC_API_KEY"] == KEY
    chat = resolve_model("anthropic:m", key_file=path)
    assert chat.anthropic_api_key.get_secret_value() == KEY
    assert KEY not in repr(chat)
    from agentmerge.agents.faults import redact

    assert KEY not in redact(f"the key {KEY} is wrong")


@pytest.mark.parametrize("text", ["just-a-key-0000", "=x", "A B=c", "OTHER="])
def test_a_broken_key_file_is_named_and_not_shown(tmp_path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# first\n{text}\n")
    with pytest.raises(UserError, match=r"line 2 is not NAME=key") as refused:
        read_keys(path)
    assert text not in str(refused.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_keys(tmp_path / "none")


def test_a_role_has_settings_of_its_own(fake_config: str) -> None:
    text = (
        fake_config
        + """
agents:
  llm: openai:small
  base_url: http://127.0.0.1:1/v1
  temperature: 0.2
  proposer: {model: "anthropic:big", timeout_s: 90}
  critic: none
  controller: openai:tiny
"""
    )
    agents = SearchConfig.from_text(text).agents
    proposer = agents.settings_for("proposer")
    assert (proposer.model, proposer.timeout_s, proposer.temperature) == ("anthropic:big", 90, 0.2)
    assert proposer.base_url is None, "another provider's address is not its"
    assert agents.settings_for("controller").base_url == "http://127.0.0.1:1/v1"
    assert agents.settings_for("critic").model == "none"
    again = SearchConfig.from_text(SearchConfig.from_text(text).to_yaml())
    assert again.agents == agents


def test_a_spec_is_split() -> None:
    assert split_spec("google:gemini-x", None)[:2] == ("google_genai", "gemini-x")
    assert split_spec("ollama:llama3:8b", None) == ("ollama", "llama3:8b", None)


@pytest.mark.parametrize("around", ["{}\n", " {}\r\n"])
def test_a_key_with_a_line_break_at_its_end_is_the_key(
    monkeypatch: pytest.MonkeyPatch, around: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", around.format(KEY))
    chat: Any = resolve_model("openai:m", base_url="http://localhost:1/v1")
    assert chat.openai_api_key.get_secret_value() == KEY


def test_a_key_with_a_line_break_inside_is_refused_without_being_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nmore")
    with pytest.raises(UserError, match="OPENAI_API_KEY holds a space or a line break") as caught:
        resolve_model("openai:m")
    assert KEY not in str(caught.value)


def test_a_misspelt_provider_is_told_by_its_name() -> None:
    with pytest.raises(UserError, match="did you mean 'anthropic'"):
        split_spec("antropic:claude", None)
    assert split_spec("mine:8b", "http://localhost:1/v1")[:2] == ("openai", "mine:8b")
