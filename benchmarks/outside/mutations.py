"""The ways in which a chat model's reply, and the HTTP around it, are broken. Knows no search."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from typing import Any

from agentmerge.testing.scripted import Fault, Said, ToolCalls

ABSURD: tuple[Any, ...] = (
    1e308, -1e308, 1e-320, math.nan, math.inf, -math.inf, 10**400, -(10**18), 2**63, 2**64, -0.0,
    True, None, "12", "1e308", "", [], {}, [[]], 1e30, -1, 99999999999,
)  # fmt: skip
WORDS: tuple[str, ...] = (
    "\ud800", "\x00", "\x1b[2J\x1b]0;x\x07", "\u202e", "a" * 300_000, "../../etc/passwd", "%s%n{}",
    "</script><script>alert(1)</script>", "'; DROP TABLE runs; --", "\n" * 5_000, "{{config}}",
    "[red]", "é" * 2_000, "*a", "none", "&a [*a,*a]",
)  # fmt: skip


def spots(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of everything in a JSON value, itself left out."""
    inner: Any = ()
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list):
        inner = enumerate(value)
    found = []
    for key, part in inner:
        found += [(*path, key), *spots(part, (*path, key))]
    return found


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of a JSON value with something else at a path."""
    copied = json.loads(json.dumps(value))
    holder = copied
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = new
    return copied


def deep(rng: random.Random) -> str:
    depth = rng.choice([30, 400, 900, 5_000, 100_000])
    opened, closed = rng.choice([("[", "]"), ('{"a":', "}")])
    return opened * depth + "1" + closed * depth


def text_of(value: Any, nested: str = "") -> str:
    """JSON, with a nesting where the word NESTED is; json.dumps could not write it."""
    return json.dumps(value).replace('"NESTED"', nested or '"NESTED"')


def said(reply: dict[str, Any], rng: random.Random) -> Said:
    """A reply with something absurd in the place of something."""
    where = rng.choice(spots(reply))
    new: Any = rng.choice(ABSURD + WORDS)
    what = rng.randrange(6)
    if what == 0:
        return text_of(put(reply, where, "NESTED"), deep(rng))
    if what == 1:
        new = [rng.choice([new, 0, 50, "x"])] * rng.choice([5, 1_000, 40_000])
    elif what == 2:
        return text_of(reply | {rng.choice(WORDS)[:200]: new for _ in range(3)})
    elif what == 3:
        numbers = [path for path in spots(reply) if isinstance(at(reply, path), (int, float))]
        where, new = rng.choice(numbers or [where]), rng.choice(ABSURD)
    return text_of(put(reply, where, new))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def garbled(reply: dict[str, Any], rng: random.Random) -> Said:
    """A reply's text, cut, doubled, with pieces moved, amid noise."""
    text = text_of(reply)
    for _ in range(rng.randrange(1, 6)):
        a, b = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        noise = ("<think>", "</think>", "```json", '{"a": [' + "1," * 20_000, "\\", "\x00", '"')
        piece = rng.choice(["", text[a:b] * 2, "{" * rng.choice([1, 50, 3_000]), *noise])
        text = (text[:a] + piece + text[b:])[:400_000]
    return text


def tools(reply: dict[str, Any], rng: random.Random) -> Said:
    """Tool calls that nobody would make."""
    recipes: tuple[Any, ...] = (
        "[50, 50, 50, 50]", f"[{10**400}, 1, 1, 1]", "[NaN, 1, 1, 1]", "[" * 900 + "]" * 900,
        "[" * 9_000, "a: &a [*a]", "{" * 3_000, "merge_method: linear\nmodels: 3", "\ud800", "\x00",
        "merge_method: linear\nmodels: [{model: north, parameters: {weight: 1e308}},"
        " {model: south, parameters: {weight: -1e308}}]",
        "merge_method: linear\nmodels: [{model: /etc/passwd, parameters: {weight: 1}}]",
        "merge_method: &m linear\nslices: [{sources: [{model: north, layer_range: [0, 1e9]}]}]",
        "merge_method: linear\nparameters: {weight: 2026-13-45}\nmodels: [{model: north}]",
        "merge_method: linear\nmodels: [" + "{model: north, parameters: {weight: 1}}," * 450 + "]",
        "merge_method: linear\nmodels: [{model: north, parameters: {weight: [[[1]]]}}]",
        "!!python/x",
    )  # fmt: skip
    arguments = {
        "merge_and_evaluate": [
            {"recipe": rng.choice((*recipes, *ABSURD)), "limit": rng.choice((None, 3, *ABSURD))},
            {"recipe": rng.choice(recipes), "tasks": rng.choice([["one"], ["x"] * 900, *ABSURD])},
        ],
        "list_candidates": [{"count": rng.choice((3, *ABSURD))}],
        "compare": [{"a": rng.choice(("0.0", *WORDS)), "b": rng.choice(("1.0", *ABSURD))}],
        "inspect_parents": [{}, {"x": rng.choice(ABSURD)}],
        "failing_items": [{"candidate": rng.choice(("0.0", *WORDS)), "count": rng.choice(ABSURD)}],
        rng.choice(WORDS)[:5_000]: [{}],
    }
    calls: list[tuple[str, Any]] = []
    for _ in range(rng.choice([1, 1, 2, 5, 40, 3_000])):
        name = rng.choice([*arguments])
        given: Any = rng.choice(arguments[name])
        if rng.random() < 0.2:
            given = rng.choice(
                [deep(rng), "{", "not json", "[]", "null", json.dumps("a" * 100_000)]
            )
        calls.append((name, given))
        if sum(len(str(said)) for _, said in calls[-50:]) > 2**21:
            break  # the server is in this process: its own text is not what is measured
    return ToolCalls(tuple(calls))


def completion(reply: dict[str, Any], usage: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text_of(reply), "refusal": None, "tool_calls": None}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    head = {"id": "x", "object": "chat.completion", "created": 0, "model": "scripted"}
    return head | {"choices": [choice], "usage": usage}


HONEST = {"prompt_tokens": 900, "completion_tokens": 60, "total_tokens": 960}


def envelope(reply: dict[str, Any], rng: random.Random) -> Said:
    """A completion with something absurd around what was said."""
    whole = completion(reply, HONEST)
    where = rng.choice(spots(whole))
    if rng.random() < 0.2:
        return Fault("raw", text_of(put(whole, where, "NESTED"), deep(rng)))
    parts: tuple[Any, ...] = ([{"type": "text", "text": "{}"}], [{"type": 3}], [1, None, "x"],
                              [{"id": 1, "function": {"name": None, "arguments": 3}}])  # fmt: skip
    return Fault("raw", text_of(put(whole, where, rng.choice((*ABSURD, *WORDS, *parts)))))


def usage(reply: dict[str, Any], rng: random.Random) -> Said:
    counts: dict[str, Any] = {name: rng.choice((*ABSURD, 900)) for name in HONEST}
    if rng.random() < 0.3:
        counts["prompt_tokens_details"] = {"cached_tokens": rng.choice(ABSURD)}
        counts["completion_tokens_details"] = rng.choice(ABSURD)
    whole = completion(reply, rng.choice([counts, counts, counts, rng.choice(ABSURD)]))
    return Fault("raw", text_of(whole))


def status(reply: dict[str, Any], rng: random.Random) -> Said:
    """Any status with any headers and any words."""
    code = rng.choice([rng.randrange(100, 600), 0, 999, 400, 401, 408, 429, 429, 500, 503])
    said = rng.choice([*WORDS, "sorry", "response_format json_schema", "tools", "system role"])
    body: Any = {"error": {"message": said, "code": rng.choice((*ABSURD, "insufficient_quota"))}}
    if rng.random() < 0.4:
        body = put(body, rng.choice(spots(body)), rng.choice((*ABSURD, *WORDS)))
    waits = [*map(str, ABSURD), "Fri, 01 Jan 99999999999 00:00:00 GMT", "-1", "0.01", "9" * 400]
    headers = f"Retry-After: {rng.choice(waits)}\r\nX-Request-Id: {rng.choice(WORDS)[:9_000]!r}\r\n"
    return http(f"HTTP/1.1 {code} Said", headers, text_of(body))


def http(line: str, headers: str, body: str, length: int | None = None) -> Said:
    size = len(body) if length is None else length
    head = f"{line}\r\nContent-Type: application/json\r\n{headers}Content-Length: {size}\r\n\r\n"
    return Fault("wire", head + body)


def wire(reply: dict[str, Any], rng: random.Random) -> Said:
    """HTTP itself, broken."""
    body, ok = text_of(completion(reply, HONEST)), "HTTP/1.1 200 OK"
    lines = ("HTTP/9.9 200 OK", "ICY 200 OK", "", "\x00" * 500, "HTTP/1.1 200")
    sizes = ("ffffffffffffffffff", "-1", "zz", "", "1;" + "x" * 9_000)
    encodings = ("gzip", "br", "deflate", "gzip, gzip", "x")
    targets = ("http://localhost:9/v1", "/v1/chat/completions", "file:///etc/passwd", "//", "",
               "http://", "http://[::1", "\x01", "https://127.0.0.1/", "gopher://x/",
               "http://user:pw@h/")  # fmt: skip
    endless: tuple[Any, ...] = ("flood", "bomb", "continue", "header", "drip", "hang")
    short: tuple[Any, ...] = ("cut", "reset", "not_json", "wrong_shape", "no_choices")
    noise = "".join(chr(rng.randrange(256)) for _ in range(rng.randrange(2_000)))
    chunked = f"{ok}\r\nTransfer-Encoding: chunked\r\n\r\n{rng.choice(sizes)}\r\n{body}"
    kinds: tuple[Said, ...] = (
        Fault(rng.choice(endless), seconds=5.0),
        Fault(rng.choice(endless), seconds=5.0),
        Fault(rng.choice(short)),
        Fault("redirect", rng.choice(targets)),
        http(ok, "", body, rng.choice([0, 3, len(body) * 9, 2**63, -5])),
        Fault("wire", chunked),
        http(rng.choice(lines), "", body),
        http(ok, "X: y\r\n" * rng.choice([100, 3_000, 40_000]), body),
        http(ok, f"X-{'a' * rng.choice([1_000, 200_000])}: 1\r\n", body),
        Fault("raw", body, encoding=rng.choice(encodings)),
        http(ok, "Content-Encoding: gzip\r\n", body),
        Fault("wire", noise),
        http(ok, f"Set-Cookie: a={'b' * 9_000}\r\nContent-Length: 3\r\n", body),
        Fault("wire", f"HTTP/1.0 200 OK\r\n\r\n{body}"),
    )
    return rng.choice(kinds)


KINDS: dict[str, Callable[[dict[str, Any], random.Random], Said]] = {
    "what is said": said,
    "its text": garbled,
    "tool calls": tools,
    "the completion": envelope,
    "usage": usage,
    "status": status,
    "HTTP": wire,
}
