"""What a chat model's server sends is bounded in bytes, in time and in where it leads."""

from __future__ import annotations

import json
import resource
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from agentmerge.agents import wire
from agentmerge.agents.models import AgentModel
from agentmerge.agents.providers import resolve_model
from agentmerge.agents.schemas import Bounds, ControllerReply, json_schema, parse_reply
from agentmerge.agents.wire import bind
from agentmerge.errors import ModelReplyError
from agentmerge.testing.scripted import Fault, ScriptedServer

KEY = "sk-canary-11aa0b3c"
BOUNDS = Bounds(4, 0.05, 0.2)
GOOD = {"thought": "narrow a little", "sigma": 0.1}
PROVIDERS = ("openai", "anthropic", "google", "ollama")


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for provider in ("OPENAI", "ANTHROPIC", "GOOGLE"):
        monkeypatch.setenv(f"{provider}_API_KEY", KEY)


def model_of(provider: str, server: ScriptedServer, timeout_s: float = 20.0) -> AgentModel:
    url = server.base_url if provider == "openai" else server.base_url.removesuffix("/v1")
    chat = resolve_model(f"{provider}:m", base_url=url, timeout_s=timeout_s)
    return AgentModel(chat, timeout_s=timeout_s, max_retries=0, sleep=lambda s: None)


def ask(model: AgentModel) -> Any:
    return model.ask(
        [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        json_schema(ControllerReply, BOUNDS),
        lambda text: parse_reply(text, ControllerReply, BOUNDS),
    )


def nobody_reads_on(patience_s: float = 1.0) -> bool:
    ends = time.monotonic() + patience_s
    while any(t.name == "chat-model" for t in threading.enumerate()):
        if time.monotonic() > ends:
            return False
        time.sleep(0.01)
    return True


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.fixture
def no_growth() -> Iterator[None]:
    before = peak_mb()
    yield
    assert peak_mb() - before < 200


@pytest.mark.usefixtures("no_growth")
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("kind", ["flood", "bomb", "continue", "header", "drip", "hang"])
def test_no_thread_reads_on_after_the_timeout(provider: str, kind: Any) -> None:
    with ScriptedServer(lambda body: Fault(kind, seconds=20)) as server:
        timeout_s = 20.0 if kind in ("flood", "bomb") else 0.5
        model = model_of(provider, server, timeout_s)
        began = time.monotonic()
        with pytest.raises(ModelReplyError) as failed:
            ask(model)
    assert time.monotonic() - began < 5
    assert nobody_reads_on()
    said = str(failed.value)
    if kind in ("flood", "bomb"):
        assert "sent more than 16 MB" in said
    else:
        assert "did not answer in time" in said or "could not be reached" in said


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_prompt_is_not_taken_to_another_host(provider: str) -> None:
    with ScriptedServer([GOOD] * 9) as other:
        elsewhere = other.base_url.replace("127.0.0.1", "localhost") + "/chat/completions"
        with (
            ScriptedServer(lambda body: Fault("redirect", elsewhere)) as server,
            pytest.raises(ModelReplyError, match="sends its callers on to localhost") as failed,
        ):
            ask(model_of(provider, server))
        assert other.requests == []
    assert KEY not in str(failed.value)


def test_clients_of_others_are_as_they_were() -> None:
    """The hooks are for calls of ours; an asynchronous client could not call them at all."""
    import httpx

    class Holder:
        client = httpx.AsyncClient()

    bind(Holder())
    assert Holder.client.event_hooks == {"request": [], "response": []}
    chat: Any = resolve_model("openai:m", base_url="http://127.0.0.1:9/v1")
    bind(chat)
    bind(chat)
    (client,) = {id(client): client for client in wire._clients(chat, 4)}.values()
    assert len(client.event_hooks["request"]) == len(client.event_hooks["response"]) == 1
    request = client.build_request("GET", "http://127.0.0.1:9/")
    client.event_hooks["request"][0](request)
    assert "trace" not in request.extensions
    assert request.headers["Connection"] == "keep-alive"


def test_a_redirect_within_the_server_is_followed() -> None:
    def moved(body: Any) -> Any:
        path = server.requests[-1].path
        return GOOD if path == "/elsewhere" else Fault("redirect", "/elsewhere")

    with ScriptedServer(moved) as server:
        assert ask(model_of("openai", server)).parsed.sigma == 0.1


def test_a_body_in_gzip_is_read_and_one_that_is_none_is_a_reason() -> None:
    text = json.dumps(GOOD)
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    bodies = {
        "openai": {"id": "x", "object": "chat.completion", "model": "m", "choices": [choice]},
        "google": {"candidates": [{"content": {"role": "model", "parts": [{"text": text}]}}]},
    }
    for provider, body in bodies.items():
        with ScriptedServer([Fault("raw", body, encoding="gzip")]) as server:
            assert ask(model_of(provider, server)).parsed.sigma == 0.1
        for encoding in ("br", "deflate"):
            with (
                ScriptedServer([Fault("raw", body, encoding=encoding)]) as server,
                pytest.raises(ModelReplyError, match="in an encoding that was not asked for"),
            ):
                ask(model_of(provider, server))
