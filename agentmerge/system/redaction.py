"""Secrets: how they are known, taken out of what is stored or shown, and named in a config instead.

A secret is known by its value (variables of the environment by their names, and whatever
``keep_secret`` was told) or by its shape (a password in a URL, ``sk-...``, a bearer token). Text
from outside goes through ``redact``; a config holds a reference ``${NAME}`` where a secret was
written (``hidden``), and whoever needs the value reads it back (``revealed``). Knows no config, no
server and no file.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from urllib.parse import quote, quote_plus, unquote

import yaml

from agentmerge.errors import UserError

MASK = "[redacted]"
_Environment = tuple[tuple[str, str], ...]
#: How variables begin that stand for secrets which a config had in so many words.
PREFIX = "AGENTMERGE_SECRET_"
_REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*)\}")
#: Shorter ones are in too many words to be told by their value.
_LEAST, _LEAST_OF_ENVIRONMENT = 6, 8

_SECRET_NAME = re.compile(r"(?i)KEY|TOKEN(?!IZ)|SECRET|PASSW|PASSPHRASE|CREDENTIAL")
_NO_SECRET_NAME = re.compile(
    r"(?i)_(PATH|FILE|DIR|ENV|NAME|HOST|TYPE|LIMIT|SIZE|TOKENS)$|KEYBOARD|KEYRING|KEYMAP"
)
#: Keys of worker.options and worker.engine_args whose text is a secret.
_SECRET_KEY = re.compile(
    r"(?i)(^|[_-])(api[_-]?key|access[_-]?key|private[_-]?key|secret([_-]?key)?|passw(or)?d|"
    r"passphrase|credentials?|authorization)$|^((hf|hub|api|auth|access|bearer|session|refresh|"
    r"use[_-]?auth|\w*hub|\w*face)[_-])?token$"
)
#: ``image_token`` is a word of a tokenizer; a long one without brackets is none.
_LONG_TOKEN = re.compile(r"[^\s<>\[\]|]{16,}")

#: Keys of services, by how they begin.
_TOKEN = (
    r"(?<![/\w.-])(?:sk-[\w.-]*\*[\w*.-]*|sk-(?=[\w-]*\d)[\w-]{16,}|hf_[A-Za-z0-9]{16,}|gh[oprsu]_\w{20,}|"
    r"github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abpsr]-[\w-]{10,}|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}|"
    r"gsk_\w{20,}|nvapi-[\w-]{20,}|r8_\w{20,}|lsv2_\w{20,}|"
    r"eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*)"
)
_USERINFO = r"(?<=://)[^/?#\s\"'<>]+(?=@)"
_QUERY = (
    r"(?i)(?<=[?&])([\w-]*(?:token|secret|signature|password|credential|api_?key|access_?key)="
    r")([^&\s\"'<>]+)"
)
_BEARER = r"(?i)\b(bearer\s+)([^\s\"')}]+)"
_HEADER = r"(?i)(authorization[\"']?\s*[:=]\s*[\"']?)((?:\w+ )?[^\s\"',]{6,})"
_ASSIGNED = (
    r"(?i)((?:api[_-]?key|password|passwd|secret|(?:access|auth|hf|hub)[_-]token)[\"']?"
    r"\s*[:=]\s*[\"']?)([^\s\"',}&\[]{6,})"
)
#: Shapes of secrets, and what text keeps of them.
_SHAPES = (
    (re.compile(_TOKEN), MASK),
    (re.compile(_USERINFO), MASK),
    (re.compile(_QUERY), r"\1" + MASK),
    (re.compile(_HEADER), r"\1" + MASK),
    (re.compile(_BEARER), MASK),
    (re.compile(_ASSIGNED), r"\1" + MASK),
)
#: Shapes that are looked for in a config: all of a match, or its second group, is the secret.
_IN_CONFIG = tuple(map(re.compile, (_USERINFO, _QUERY, _BEARER, _TOKEN)))

#: Values that no text may hold, in every form that they take in one.
_values: set[str] = set()
#: What references stand for besides variables of the environment.
_named: dict[str, str] = {}


def keep_secret(value: str) -> None:
    """Never show this value, wherever it came from."""
    if len(value) >= _LEAST:
        _values.update(_forms(value))


def is_secret(name: str, value: str) -> bool:
    """Whether a variable of the environment is one, or has one in it: what others' programs, which
    need none, are started without."""
    named = _SECRET_NAME.search(name) and not _NO_SECRET_NAME.search(name)
    return bool(named) or redact(value) != value


def redact(text: str, *, shapes: bool = True) -> str:
    """The text without secrets. shapes: also what only looks like one; text that must stay usable
    as it is (a recipe on its way to a pipe) goes without."""
    return _cleaned(text, _known(), shapes)


def redacted(value: Any, *, shapes: bool = True) -> Any:
    """The same value with ``redact`` applied to every text in it, keys of mappings included."""
    return _walked(value, _known(), shapes)  # the environment is read once, whatever its size


def _known() -> re.Pattern[str] | None:
    return _pattern(_environment(), frozenset(_values))


def _cleaned(text: str, known: re.Pattern[str] | None, shapes: bool) -> str:
    """The same short texts come again and again: keys, kinds, names."""
    return (_looked_at if len(text) <= _SHORT else _clean)(text, known, shapes)


def _clean(text: str, known: re.Pattern[str] | None, shapes: bool) -> str:
    if known is not None:
        text = known.sub(MASK, text)
    if shapes:
        for pattern, kept in _SHAPES:
            text = pattern.sub(kept, text)
    return text


_SHORT = 64
_looked_at = lru_cache(maxsize=1024)(_clean)


def _walked(value: Any, known: re.Pattern[str] | None, shapes: bool) -> Any:
    if isinstance(value, str):
        return _cleaned(value, known, shapes)
    if isinstance(value, Mapping):
        return {
            _walked(key, known, shapes): _walked(item, known, shapes) for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_walked(item, known, shapes) for item in value]
    return value


def redact_json(text: str) -> str:
    """``redact`` for what may be JSON: escapes (``\\u0073k-...``) hide no secret."""
    text = redact(text)
    if "\\" in text:
        try:
            body = json.loads(text)
            clean = redacted(body)
        except (ValueError, RecursionError):
            return text
        if clean != body:
            return json.dumps(clean, ensure_ascii=False)
    return text


def hidden(value: Any, key: str = "") -> Any:
    """A config's value with a reference ``${NAME}`` in the place of each secret.

    The name is that of the environment's variable that holds it, else a new one that this process
    remembers (``revealed``) and a later one has to be given. key: what the value is called.
    """
    if isinstance(value, str):
        return _hidden_text(value, key)
    if isinstance(value, Mapping):
        return {name: hidden(item, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(hidden(item, key) for item in value)
    return value


def revealed(value: Any, where: str) -> Any:
    """The value with what its references stand for; from here on ``redact`` knows that.

    Raises:
        UserError: a variable is not set.
    """
    if isinstance(value, str):
        return _REFERENCE.sub(lambda match: _value_of(match[1], where), value)
    if isinstance(value, Mapping):
        return {name: revealed(item, f"{where}.{name}") for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(revealed(item, where) for item in value)
    return value


def references(text: str) -> set[str]:
    """The variables that a text refers to."""
    return set(_REFERENCE.findall(text))


def remembered(value: Any) -> dict[str, str]:
    """What the references in a value stand for here, and those in the place of secrets, for
    ``remember`` in another process, whose environment may be another."""
    named = references(json.dumps(value, default=str))
    return {name: os.environ[name] for name in named if name in os.environ} | _named


def remember(named: Mapping[str, str]) -> None:
    _named.update(named)
    for value in named.values():
        if not os.path.exists(value):  # as in _value_of
            keep_secret(value)


def hidden_config(text: str) -> tuple[str, dict[str, str]]:
    """A stored config without the secrets that older versions kept there, and the reference in the
    place of each; the text itself where it has none."""
    if not _may_hold_secrets(text):
        return text, {}
    body = yaml.safe_load(text)
    agents, worker = body.get("agents") or {}, body.get("worker") or {}
    for section in (agents, *(role for role in agents.values() if isinstance(role, dict))):
        if section.get("base_url"):
            section["base_url"] = hidden(section["base_url"], "base_url")
    for key in ("options", "engine_args"):
        if worker.get(key):
            worker[key] = hidden(worker[key])
    found = yaml.safe_dump(body, sort_keys=False, allow_unicode=True)
    new = references(found) - references(text)
    if not new:
        return text, {}
    return found, {_value_of(name, ""): f"${{{name}}}" for name in new}


@contextmanager
def clean_screen() -> Iterator[None]:
    """Inside, nothing that Python writes to stdout or stderr holds a secret. What is for pipes goes
    without shapes, since it may be a recipe."""
    out, err = sys.stdout, sys.stderr
    sys.stdout = _Clean(out, lambda text: redact(text, shapes=False))
    sys.stderr = _Clean(err, redact)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err


class _Clean:
    """A text stream whose text is redacted on its way."""

    def __init__(self, stream: Any, clean: Callable[[str], str]) -> None:
        self._stream = stream
        self._clean = clean

    def write(self, text: str) -> int:
        self._stream.write(self._clean(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "write":  # whoever listens in, as W&B's console log does, hears clean text
            heard, clean = value, self._clean
            value = lambda text: heard(clean(text))  # noqa: E731
        object.__setattr__(self, name, value)


def _hidden_text(text: str, key: str) -> str:
    if not text or _REFERENCE.search(text):
        return text
    named_so = _SECRET_KEY.search(key) or (
        key.lower().endswith("token") and _LONG_TOKEN.fullmatch(text)
    )
    if named_so:
        return _reference(text, key)
    for value in sorted(_values_of(_environment()), key=len, reverse=True):
        if value in text:
            text = text.replace(value, _reference(value, key))
    for pattern in _IN_CONFIG:
        text = pattern.sub(lambda match: _in_place(match, key), text)
    return text


def _in_place(match: re.Match[str], key: str) -> str:
    kept, secret = (match[1], match[2]) if match.re.groups else ("", match[0])
    if _REFERENCE.search(secret):
        return match[0]
    if match.re.pattern == _USERINFO:
        _keep_userinfo(secret)
    return kept + _reference(secret, key)


def _reference(secret: str, key: str) -> str:
    """``${NAME}``, whose value is known from now on."""
    keep_secret(secret)
    for name, value in _secret_variables(_environment()):
        if value == secret:
            return f"${{{name}}}"
    stem = PREFIX + (re.sub(r"\W+", "_", key).strip("_").upper() or "VALUE")
    name, number = stem, 1
    while _named.get(name, secret) != secret:
        number += 1
        name = f"{stem}_{number}"
    _named[name] = secret
    return f"${{{name}}}"


def _value_of(name: str, where: str) -> str:
    value = _named.get(name, os.environ.get(name))
    if not value:
        why = ": its value is a secret, which no file keeps" if name.startswith(PREFIX) else ""
        raise UserError(
            f"{where} refers to ${{{name}}}, and no such variable is set{why}; "
            f"export {name}=... and run the same command again"
        )
    if not os.path.exists(value):  # ${HOME} may be named, and is no secret
        keep_secret(value)
        for inside in re.findall(_USERINFO, value) if "://" in value else [value]:
            _keep_userinfo(inside)
    return value


def _may_hold_secrets(text: str) -> bool:
    return any(pattern.search(text) for pattern in (*_IN_CONFIG, _LINE)) or any(
        value in text for value in _values_of(_environment())
    )


_LINE = re.compile(r"(?im)^\s*[\w-]*(key|token|secret|passw(or)?d|passphrase|credentials?|"
                   r"authorization)[\"']?:\s*[\"']?[^\s$\"'{]")  # fmt: skip


def _environment() -> _Environment:
    """Decoded anew only where it is not what it was."""
    raw = getattr(os.environ, "_data", None)
    if raw is None:
        return tuple(os.environ.items())
    if raw != _decoded.get("raw"):
        _decoded.update(raw=dict(raw), items=tuple(os.environ.items()))
    found: _Environment = _decoded["items"]
    return found


#: The variables as the system has them, and as text.
_decoded: dict[str, Any] = {}


@lru_cache(maxsize=4)
def _secret_variables(environment: _Environment) -> tuple[tuple[str, str], ...]:
    """The variables that hold a secret, by their names, with their values."""
    return tuple(
        (name, value)
        for name, value in environment
        if len(value) >= _LEAST_OF_ENVIRONMENT
        and not value.isdigit()
        and _SECRET_NAME.search(name)
        and not _NO_SECRET_NAME.search(name)
        and not os.path.exists(value)
    )


@lru_cache(maxsize=4)
def _values_of(environment: _Environment) -> frozenset[str]:
    """Values of key variables, stripped, and passwords in addresses (proxies, trackers)."""
    found = {value.strip() for _, value in _secret_variables(environment)}
    for _, value in environment:
        for inside in re.findall(_USERINFO, value) if "://" in value else ():
            found.update(part for part in _userinfo(inside) if len(part) >= _LEAST)
    return frozenset(value for value in found if value)


@lru_cache(maxsize=4)
def _pattern(environment: _Environment, told: frozenset[str]) -> re.Pattern[str] | None:
    """Matches every value that is known, the longest first."""
    values = told.union(*map(_forms, _values_of(environment)))
    if not values:
        return None
    return re.compile("|".join(map(re.escape, sorted(values, key=len, reverse=True))))


def _keep_userinfo(inside: str) -> None:
    for part in _userinfo(inside):
        keep_secret(part)


def _userinfo(inside: str) -> Iterator[str]:
    """What of an address before its @ is secret: its password, and "user:password" (an HTTP client
    makes a header of that); a long name alone is a token."""
    _, colon, password = inside.partition(":")
    if colon:
        yield from (inside, password)
    elif len(inside) >= 16:
        yield inside


def _forms(value: str) -> set[str]:
    """The ways in which text may hold a value: as it is, escaped, or as a header of Basic
    authentication."""
    found = {value}
    plain = unquote(value)
    if not re.fullmatch(r"[\w.~-]+", value):
        found |= {plain, json.dumps(value)[1:-1], repr(value)[1:-1], quote(value, safe="")}
        found |= {quote_plus(value), json.dumps(value, ensure_ascii=False)[1:-1]}
        lines = [line.strip() for line in value.splitlines()]
        found |= {line for line in lines if len(line) >= _LEAST_OF_ENVIRONMENT}
    if ":" in plain:
        found.add(base64.b64encode(plain.encode()).decode())
    return {form for form in found if len(form) >= _LEAST}
