"""From "provider:model" to a chat model: which package, which key, which options.

Knows providers by name and nothing of what is asked. Keys come from the environment or from a key
file, go into the client, and nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from agentmerge import plugins
from agentmerge.config import DEFAULT_KEY, NO_KEY
from agentmerge.errors import UserError
from agentmerge.system.bounded import read_text
from agentmerge.system.redaction import keep_secret, redact
from agentmerge.system.yaml_text import misspelt

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel

#: Where each provider's key is read from; a provider that is not here looks for its own.
KEY_VARIABLES = {
    "anthropic": "ANTHROPIC_API_KEY",
    "deepseek": "DEEPSEEK_API_KEY",
    "google_genai": "GOOGLE_API_KEY",
    "groq": "GROQ_API_KEY",
    "mistralai": "MISTRAL_API_KEY",
    "openai": "OPENAI_API_KEY",
    "openrouter": "OPENROUTER_API_KEY",
    "xai": "XAI_API_KEY",
}
_ALIASES = {"google": "google_genai", "gemini": "google_genai", "mistral": "mistralai"}
_EXTRAS = {"anthropic": "anthropic", "google_genai": "google", "ollama": "ollama"}
_GROUP = "agentmerge.models"


def resolve_model(
    spec: str,
    *,
    base_url: str | None = None,
    temperature: float | None = None,
    timeout_s: float = 60.0,
    max_tokens: int | None = None,
    key_file: Path | str | None = None,
    api_key_env: str | None = DEFAULT_KEY,
) -> BaseChatModel:
    """The chat model of "provider:model"; a bare model name is OpenAI's, or that of `base_url`.

    api_key_env: the variable whose key the server may have, "default" for the provider's own,
    "none" for no key; None where nobody said so (``refuse_unnamed_key``). max_tokens: of one reply.
    key_file: lines NAME=key, for keys that the environment lacks.
    The client never retries: `AgentModel` does, in one place. Raises UserError for an unknown
    provider, a package that is not installed, or a missing key, naming the variable to set.
    """
    if base_url is not None and api_key_env is None:
        refuse_unnamed_key(spec, base_url)
        api_key_env = NO_KEY
    provider, model, base_url = split_spec(spec, base_url)
    given = {
        "temperature": temperature,
        "base_url": base_url,
        "max_tokens": max_tokens,
        "timeout": timeout_s,
    }
    options = {name: value for name, value in given.items() if value is not None}
    build: Callable[..., BaseChatModel]
    if provider in plugins.known(_GROUP):
        build = plugins.load(_GROUP, provider)
    else:
        keys = read_keys(key_file)
        options |= _key(provider, model, base_url, keys, api_key_env) | {"max_retries": 0}
        build = _init
        if provider in _ADAPTED:
            options = _ADAPTED[provider](options)
        options["model_provider"] = provider
    try:
        return build(model, **options)
    except ImportError as error:
        extra = _EXTRAS.get(provider)
        remedy = f"; pip install 'agentmerge[{extra}]'" if extra else ""
        fault = f"its package is not installed: {error}{remedy}"
    except Exception as error:
        fault = str(error)
    raise UserError(f"cannot use {spec!r} as a model: {' '.join(redact(fault).split())}")


def split_spec(spec: str, base_url: str | None) -> tuple[str, str, str | None]:
    """(provider, model, base URL).

    Raises:
        UserError: it names no model.
    """
    head, colon, rest = spec.partition(":")
    provider = _ALIASES.get(head, head)
    own = provider in plugins.known(_GROUP)
    known = own or provider in KEY_VARIABLES or provider == "ollama"
    if not head or (known and colon and not rest):
        raise UserError(f"{spec!r} names no model: write provider:model, such as openai:gpt-4o")
    near = next((name for name in KEY_VARIABLES if misspelt(provider, name)), None)
    if colon and not known and near:
        raise UserError(f"no provider {head!r} of {spec!r} is known; did you mean {near!r}?")
    server = base_url or os.environ.get("OPENAI_BASE_URL")
    if colon and known and provider != "openai":
        return provider, rest, base_url
    if colon and (known or not server):
        return provider, rest, server if provider == "openai" else base_url
    # No provider in front: a name such as "llama3:8b" on a server of the user's own.
    return "openai", spec, server


def read_keys(path: Path | str | None) -> dict[str, str]:
    """NAME=key lines of a key file; no key of it is ever shown or stored.

    Raises:
        UserError: it cannot be read, or a line is no NAME=key.
    """
    if path is None:
        return {}
    missing = f"key file {path} cannot be read: it is missing"
    lines = read_text(Path(path).expanduser(), UserError, missing=missing).splitlines()
    keys = {}
    for number, line in enumerate(lines, 1):
        line = line.strip().removeprefix("export ")
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        value = value.strip().strip("'\"")
        if not equals or not name.strip().isidentifier() or not value:
            raise UserError(f"key file {path}, line {number} is not NAME=key")
        keys[name.strip()] = value
        keep_secret(value)
    return keys


def refuse_unnamed_key(spec: str, base_url: str) -> None:
    """A server of a config that says nothing of its key: one of this machine needs none, and gets a
    placeholder.

    Raises:
        UserError: it is another machine's, which the environment's key is nobody's to send to.
    """
    host = urlsplit(base_url).hostname or ""
    provider = split_spec(spec, base_url)[0]
    variable = KEY_VARIABLES.get(provider, "OLLAMA_API_KEY" if provider == "ollama" else "NAME")
    if _is_loopback(host) or (provider == "ollama" and not os.environ.get(variable)):
        return
    raise UserError(
        f"the config sends {spec} to {host} and does not say which key that server may have, so it "
        f"gets none: add `api_key_env: {variable}` beside base_url (or --api-key-env {variable}), "
        "or `api_key_env: none` if it needs no key"
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _key(
    provider: str, model: str, base_url: str | None, keys: Mapping[str, str], named: str | None
) -> Any:
    usual = KEY_VARIABLES.get(provider)
    if usual is None:
        return {}
    if named == NO_KEY:
        return {"api_key": "none"}
    variable = usual if named in (None, DEFAULT_KEY) else str(named)
    given = os.environ.get(variable, "")
    if key := given.strip():
        keep_secret(key)
        if len(key.split()) > 1 or not key.isprintable():
            raise UserError(
                f"{variable} holds a space or a line break, which no key has; set it again"
            )
        # As it stands a line break at its end makes every request fail before it is sent.
        return {} if key == given and variable == usual else {"api_key": key}
    if variable in keys:
        return {"api_key": keys[variable]}
    if named not in (None, DEFAULT_KEY):
        raise UserError(
            f"{variable} is not set, and agents.api_key_env names it for {provider}:{model}: "
            f"export {variable}=..., put it in a key file (agents.key_file), or write "
            "`api_key_env: none` for a server that needs no key"
        )
    if base_url is None:
        raise UserError(
            f"{variable} is not set, and {provider}:{model} needs it: export {variable}=..., "
            "put it in a key file (agents.key_file), or give the base URL of a server that needs "
            "no key"
        )
    return {"api_key": "none"}


def _init(model: str, **options: Any) -> BaseChatModel:
    from langchain.chat_models import init_chat_model

    chat: BaseChatModel = init_chat_model(model, **options)
    return chat


def _openai(options: dict[str, Any]) -> dict[str, Any]:
    # Without stream_usage a streamed reply has no token counts once there is a base URL.
    return options | {"stream_usage": True, "use_responses_api": False}


def _google(options: dict[str, Any]) -> dict[str, Any]:
    # gRPC takes no URL with a path, and its first try counts among max_retries.
    return options | {"transport": "rest", "max_retries": 1}


def _ollama(options: dict[str, Any]) -> dict[str, Any]:
    names = {"max_tokens": "num_predict"}
    adapted = {names.get(name, name): value for name, value in options.items()}
    adapted.pop("max_retries")
    return adapted | {"client_kwargs": {"timeout": adapted.pop("timeout")}}


_ADAPTED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "openai": _openai,
    "google_genai": _google,
    "ollama": _ollama,
}
